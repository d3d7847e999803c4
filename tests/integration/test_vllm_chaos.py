"""Chaos: requests that come and go, a small L1, few engine blocks, and a server that is killed, frozen, cleared and restarted.

Whatever happens, an answer is the right one, none is an HTTP 5xx, and in the end nothing is held. `make chaos` goes on for ten
minutes; `--chaos-class built-in` takes vLLM's own connector class.

What is right: rounding depends on how vLLM cuts a prompt into steps and on what else is in a batch, so each prompt is asked
several times without any cached KV and in company, and only prompts whose answer is always the same are used. That a wrong
byte changes the answers is proved first, by writing into the pool.
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
from tests.integration.conftest import BUILT_IN, CHUNK_SIZE, Engine, make_prompt
from tests.server_process import LmcacheServer
from tests.vllm_process import MODEL_NAME

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

L1_GIB = 0.03125  # 32 chunks of 1 MiB
MAX_CHUNKS = 5
NUM_STEMS = 6
NUM_CLIENTS = 8
OUTPUT_TOKENS = 10
NUM_REFERENCES = 4
# 48 blocks of 128 tokens hold the longest prompt four times; a step computes two chunks of it.
VLLM_FLAGS = [
    "--max-model-len",
    "2048",
    "--num-gpu-blocks-override",
    "48",
    "--max-num-seqs",
    "6",
    "--max-num-batched-tokens",
    "512",
]
FAULTS = ("kill", "kill and leave the pool", "freeze", "clear", "forget")


@pytest.fixture(scope="module")
def server():
    with LmcacheServer(l1_size_gb=L1_GIB) as server:
        yield server


@pytest.fixture(scope="module")
def named(server):
    """The same server with a pool that outlives it: only one of the two runs at a time."""
    name = f"lmcache-chaos-{random.SystemRandom().randrange(1 << 40):010x}"
    flags = ["--port", str(server.port), "--http-port", str(server.http_port), "--pool-name", name]
    other = LmcacheServer(flags, l1_size_gb=L1_GIB, leaves_pool=True)
    other.port, other.zmq_url, other.http_port, other.http_url = server.port, server.zmq_url, server.http_port, server.http_url
    yield other
    other.close()


@pytest.fixture(scope="module")
def engine(tiny_model_dir, tmp_path_factory, server, pytestconfig):
    env = BUILT_IN if pytestconfig.getoption("--chaos-class") == "built-in" else {}
    log_path = tmp_path_factory.mktemp("vllm") / "chaos.log"
    with Engine(tiny_model_dir, log_path, server, env=env, flags=VLLM_FLAGS) as engine:
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
    """The answer to each prompt, where it does not depend on rounding."""
    seed = time.time_ns()
    answers = collections.defaultdict(set)
    work = [(number, turn) for turn in range(NUM_REFERENCES) for number in range(NUM_STEMS * MAX_CHUNKS)]
    random.Random(seed).shuffle(work)
    prompts = make_prompts(seed)

    def ask(item):
        number, turn = item
        answers[number].add(engine.ask(prompts[number], max_tokens=OUTPUT_TOKENS, cache_salt=f"reference {turn}"))

    # A salt for each turn: nothing that another turn has computed is used, but stems are shared within one.
    with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
        list(pool.map(ask, work))
    stable = {tuple(prompts[number]): texts.pop() for number, texts in answers.items() if len(texts) == 1}
    assert len(stable) >= len(prompts) // 2, f"only {len(stable)} of {len(prompts)} prompts have one answer"
    return stable


def test_a_wrong_byte_is_noticed(engine, server, references):
    """Otherwise what follows would prove nothing."""
    prompt, right = max(references.items(), key=lambda item: len(item[0]))
    engine.ask(list(prompt), max_tokens=OUTPUT_TOKENS)
    engine.forget()
    view = PoolView(Path(server.pool_path))
    data = view.extent(0, view.header.capacity_bytes)
    data[:] = random.Random(0).randbytes(len(data))
    data.release()
    view.close()
    text, counts = engine.ask_counted(list(prompt), max_tokens=OUTPUT_TOKENS)
    assert counts["loaded"] > 0
    assert text != right
    assert httpx.post(f"{server.http_url}/api/clear", timeout=60).is_success
    engine.forget()
    assert engine.ask(list(prompt), max_tokens=OUTPUT_TOKENS) == right


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
                status, text = self._ask(prompt, abort_after)
            except Exception as exc:
                with self._lock:
                    self.errors.append(repr(exc))
                return
            with self._lock:
                self.counts["requests"] += 1
                self.longest_seconds = max(self.longest_seconds, time.monotonic() - started_at)
                if status >= 400:
                    self.bad_statuses.append(status)
                elif text is None:
                    self.counts["aborts"] += 1
                elif text != right:
                    self.wrong.append((len(prompt), right, text))

    def _ask(self, prompt, abort_after):
        """Return the status and the text; None when the request was aborted before it had all come."""
        body = {
            "model": MODEL_NAME,
            "prompt": list(prompt),
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        if abort_after is None:
            response = httpx.post(f"{self.engine.url}/v1/completions", json=body, timeout=300)
            return response.status_code, response.json()["choices"][0]["text"] if response.is_success else ""
        deadline = time.monotonic() + abort_after
        try:
            body["stream"] = True
            with httpx.stream(
                "POST", f"{self.engine.url}/v1/completions", json=body, timeout=max(0.01, abort_after)
            ) as response:
                if response.is_error:
                    return response.status_code, ""
                text = ""
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                    if time.monotonic() > deadline:
                        return 200, None
                return 200, text
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
        prompt, right = chaos.references[0]
        assert engine.ask(list(prompt), max_tokens=OUTPUT_TOKENS) == right
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
