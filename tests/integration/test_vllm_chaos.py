"""Chaos: requests that come and go, a small L1, few engine blocks, and a server that is killed, frozen, cleared and restarted.

Whatever happens, an answer is the right one, none is an HTTP 5xx, and in the end nothing is held. `make chaos` goes on for ten
minutes; `--chaos-class built-in` takes vLLM's own connector class.

What is right: rounding depends on how vLLM cuts a prompt into steps and on what else is in a batch, and may decide between two
tokens that are about as likely. So an answer is compared up to the first token that rounding could decide. That a wrong byte
changes the answers is proved first, by writing into the pool.
"""

import collections
import concurrent.futures
import json
import random
import threading
import time
from pathlib import Path

import httpx
import pytest

from lmcache.pool import PoolView
from tests.chaos.waiting import wait_until
from tests.integration.conftest import BUILT_IN, Engine, make_prompt
from tests.server_process import LmcacheServer
from tests.vllm_process import MODEL_NAME

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]

CHUNK_SIZE = 128  # one block of vLLM's
MAX_CHUNKS = 4
NUM_STEMS = 5
NUM_CLIENTS = 8
OUTPUT_TOKENS = 10
ASK = {"max_tokens": OUTPUT_TOKENS, "return_token_ids": True}
NUM_REFERENCES = 2
# Between the two most likely tokens, in nats. Rounding in bf16 moves a logit by 0.03 here.
SAFE_MARGIN = 0.1
# 12 chunks of 512 KiB: not all that the stems have.
L1_GIB = 6 / 1024
SERVER_FLAGS = ["--chunk-size", str(CHUNK_SIZE)]
# 24 blocks hold the longest prompt four times; a step computes two chunks of it.
VLLM_FLAGS = ["--max-model-len", "1024", "--num-gpu-blocks-override", "24", "--max-num-seqs", "6"]
VLLM_FLAGS += ["--max-num-batched-tokens", "256"]
FAULTS = ("kill", "kill and leave the pool", "freeze", "clear", "forget")


@pytest.fixture(scope="module")
def server():
    with LmcacheServer(SERVER_FLAGS, l1_size_gb=L1_GIB) as server:
        yield server


@pytest.fixture(scope="module")
def named(server):
    """The same server with a pool that outlives it: only one of the two runs at a time."""
    name = f"lmcache-chaos-{random.SystemRandom().randrange(1 << 40):010x}"
    flags = [*SERVER_FLAGS, "--port", str(server.port), "--http-port", str(server.http_port), "--pool-name", name]
    other = LmcacheServer(flags, l1_size_gb=L1_GIB, leaves_pool=True)
    other.port, other.zmq_url, other.http_port, other.http_url = server.port, server.zmq_url, server.http_port, server.http_url
    yield other
    other.close()


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tmp_path_factory, server, pytestconfig):
    env = BUILT_IN if pytestconfig.getoption("--chaos-class") == "built-in" else {}
    own_cache = "--enable-prefix-caching" if pytestconfig.getoption("--chaos-own-cache") else "--no-enable-prefix-caching"
    log_path = tmp_path_factory.mktemp("vllm") / "chaos.log"
    with Engine(tiny_model_dir, log_path, server, env=env, flags=[*VLLM_FLAGS, own_cache]) as engine:
        engine.wait_for_cache()
        yield engine


def make_prompts(seed):
    """Prompts of 1 to MAX_CHUNKS chunks and a tail, many of which begin alike."""
    generator = random.Random(seed)
    prompts = []
    for stem_number in range(NUM_STEMS):
        stem = make_prompt(f"stem {seed} {stem_number}", MAX_CHUNKS * CHUNK_SIZE)
        for num_chunks in range(1, MAX_CHUNKS + 1):
            tail = make_prompt(f"tail {seed} {stem_number} {num_chunks}", generator.randrange(1, 100))
            prompts.append(stem[: num_chunks * CHUNK_SIZE] + tail)
    return prompts


@pytest.fixture(scope="module")
def references(engine):
    """The leading tokens of the answer to each prompt, as far as rounding cannot change them."""
    seed = time.time_ns()
    prompts = make_prompts(seed)
    answers = collections.defaultdict(list)
    work = [(number, turn) for turn in range(NUM_REFERENCES) for number in range(len(prompts))]
    random.Random(seed).shuffle(work)

    def ask(item):
        number, turn = item
        response = engine.send(prompts[number], **ASK, logprobs=2, cache_salt=f"reference {turn}")
        assert response.status_code == 200, response.text
        answers[number].append(safe_tokens(response.json()["choices"][0]))

    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
        list(pool.map(ask, work))
    safe = {tuple(prompts[number]): min(found, key=len) for number, found in answers.items()}
    assert all(
        found[: len(safe[tuple(prompts[number])])] == safe[tuple(prompts[number])]
        for number, all_ in answers.items()
        for found in all_
    )
    usable = {prompt: tokens for prompt, tokens in safe.items() if tokens}
    assert len(usable) >= len(prompts) // 5, f"only {len(usable)} of {len(prompts)} prompts have a first token that is sure"
    return usable


def safe_tokens(choice):
    """Return the leading tokens that are clearly the most likely ones."""
    tokens = []
    for token, likely in zip(choice["token_ids"], choice["logprobs"]["top_logprobs"], strict=True):
        first, second = sorted(likely.values(), reverse=True)[:2]
        if first - second < SAFE_MARGIN:
            break
        tokens.append(token)
    return tokens


def answer(engine, prompt):
    response = engine.send(list(prompt), **ASK)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["token_ids"]


def test_a_wrong_byte_is_noticed(engine, server, references):
    """Otherwise what follows would prove nothing."""
    prompts = sorted(references, key=len)[-2:]  # more would push each other out
    for prompt in prompts:
        answer(engine, prompt)
    engine.forget()
    view = PoolView(Path(server.pool_path))
    data = view.extent(0, view.header.capacity_bytes)
    # Finite in bf16: a NaN would stay in vLLM's blocks and spoil whoever gets them next, masked or not.
    data[:] = b"\x3f" * len(data)
    data.release()
    view.close()
    before = server.status()["counters"]["retrieved_tokens"]
    wrong = [prompt for prompt in prompts if not begins_with(answer(engine, prompt), references[prompt])]
    assert server.status()["counters"]["retrieved_tokens"] > before
    assert wrong
    assert httpx.post(f"{server.http_url}/api/clear", timeout=60).is_success
    engine.forget()
    assert all(begins_with(answer(engine, prompt), references[prompt]) for prompt in prompts)


def begins_with(tokens, expected):
    return tokens[: len(expected)] == expected


class Chaos:
    """Clients and faults, and what became of them."""

    def __init__(self, engine, servers, references, seed):
        self.engine = engine
        self.servers = servers
        self.references = list(references.items())
        self.generator = random.Random(seed)
        self.counts = collections.Counter()
        self.wrong = []
        self.bad_statuses = []
        self.errors = []
        self.longest_seconds = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def run(self, seconds):
        threads = [threading.Thread(target=self._client, args=(number,)) for number in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            end = time.monotonic() + seconds
            faults = []
            while time.monotonic() < end or faults:
                faults = faults or self.generator.sample(FAULTS, len(FAULTS))
                self._cause(faults.pop())
                time.sleep(self.generator.uniform(0.2, 2.0))
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    # -- faults -------------------------------------------------------------------------------------------------------

    def _cause(self, fault):
        self.counts[fault] += 1
        running, other = self.servers
        if fault == "freeze":
            running.freeze()
            time.sleep(self.generator.uniform(0.1, 4.0))
            running.thaw()
        elif fault == "forget":  # vLLM refuses while requests run, now and then it works
            httpx.post(f"{self.engine.url}/reset_prefix_cache", timeout=60)
        elif fault == "clear":
            httpx.post(f"{running.http_url}/api/clear", timeout=60)
        else:
            self.counts["retrieved"] += running.status()["counters"]["retrieved_tokens"]
            running.kill()
            time.sleep(self.generator.uniform(0.0, 2.0))
            if fault == "kill":
                self.servers = other, running
            self.servers[0].start()

    # -- clients ------------------------------------------------------------------------------------------------------

    def _client(self, number):
        generator = random.Random(number)
        while not self._stop.is_set():
            prompt, right = generator.choice(self.references)
            abort_after = generator.choice([None, None, generator.uniform(0.0, 1.5)])
            started_at = time.monotonic()
            try:
                status, tokens = self._ask(prompt, abort_after)
            except Exception as exc:
                with self._lock:
                    self.errors.append(repr(exc))
                return
            with self._lock:
                self.counts["requests"] += 1
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - started_at)
                if status >= 400:
                    self.bad_statuses.append(status)
                elif tokens is None:
                    self.counts["aborts"] += 1
                elif not begins_with(tokens, right):
                    self.wrong.append((len(prompt), right, tokens, abort_after))

    def _ask(self, prompt, abort_after):
        """Return the status and the tokens; None when the request was aborted before they had all come."""
        if abort_after is None:
            response = self.engine.send(list(prompt), **ASK)
            return response.status_code, response.json()["choices"][0]["token_ids"] if response.is_success else []
        deadline = time.monotonic() + abort_after
        body = {"model": MODEL_NAME, "prompt": list(prompt), "temperature": 0.0, "ignore_eos": True, "stream": True, **ASK}
        tokens = []
        try:
            with httpx.stream(
                "POST", f"{self.engine.url}/v1/completions", json=body, timeout=max(0.01, abort_after)
            ) as response:
                if response.is_error:
                    return response.status_code, []
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
                    if time.monotonic() > deadline:
                        return 200, None
                return 200, tokens
        except httpx.TimeoutException:
            return 200, None


@pytest.mark.timeout(1800)
def test_whatever_happens_answers_are_right_and_nothing_is_left(engine, server, named, references, pytestconfig):
    seconds = pytestconfig.getoption("--chaos-seconds")
    chaos = Chaos(engine, (server, named), references, seed=time.time_ns())
    chaos.run(seconds)
    running = chaos.servers[0]
    engine.server = running
    try:
        engine.wait_for_cache()
        assert httpx.get(f"{engine.url}/health", timeout=60).status_code == 200
        assert all(begins_with(answer(engine, prompt), right) for prompt, right in chaos.references[:4])
        wait_until(lambda: is_at_rest(running), "no pins, sessions and reservations", 120)
        status = running.status()
        chaos.counts["retrieved"] += status["counters"]["retrieved_tokens"]
        assert status["l1"]["used_bytes"] + status["l1"]["free_bytes"] == status["l1"]["capacity_bytes"]
        assert status["healthy"], status["problems"]
        counts = dict(chaos.counts)
        print(
            f"\nchaos for {seconds:.0f} s: {counts}, {len(references)} prompts, longest request {chaos.longest_seconds:.1f} s, "
            f"failed loads {status['counters']['retrieve_failed']}, evicted {status['counters']['evicted_chunks']}, "
            f"5xx {len(chaos.bad_statuses)}, wrong {len(chaos.wrong)}"
        )
        assert not chaos.errors
        assert not chaos.bad_statuses
        assert not chaos.wrong
        assert chaos.counts["retrieved"] > 0
        assert all(chaos.counts[kind] for kind in (*FAULTS, "requests", "aborts"))
    finally:
        if running is not server:  # the fixture ends what it started
            running.close()
            server.start()


def is_at_rest(server):
    status = server.status()
    return not (status["l1"]["pins"] or status["sessions"] or status["l1"]["reserved_bytes"])
