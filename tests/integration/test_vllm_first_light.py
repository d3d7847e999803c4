"""Real vLLM on the CPU stores to and loads from a real server, and needs neither to stay alive."""

import json
import random
import time

import httpx
import pytest

from tests.server_process import LmcacheServer
from tests.vllm_process import MODEL_NAME, VllmServer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
]

CHUNK_SIZE = 256
# vLLM computes 7 chunks a step. A prompt whose cached part is a multiple of that is computed in the
# same steps, the same sums, whether that part was loaded or not: answers must be equal to the bit.
STEP_TOKENS = 7 * CHUNK_SIZE
KIB_PER_TOKEN = 4
RECONNECT_SECONDS = 60.0


def make_prompt(seed, num_tokens):
    """Token ids that share no prefix with those of another seed."""
    generator = random.Random(seed)
    return [generator.randrange(10, 8000) for _ in range(num_tokens)]


def start_vllm(model_dir, log_path, server):
    transfer = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": server.port,
        },
    }
    flags = ["--no-enable-prefix-caching", "--max-num-batched-tokens", str(STEP_TOKENS)]
    return VllmServer(model_dir, log_path, [*flags, "--kv-transfer-config", json.dumps(transfer)])


class Asker:
    """Asks vLLM, and tells what the cache server counted meanwhile."""

    def __init__(self, vllm, server):
        self.vllm = vllm
        self.server = server

    def ask(self, prompt, **extra):
        response = httpx.post(
            f"{self.vllm.url}/v1/completions",
            json={
                "model": MODEL_NAME,
                "prompt": prompt,
                "max_tokens": 16,
                "temperature": 0.0,
                "ignore_eos": True,
                **extra,
            },
            timeout=100,
        )
        assert response.status_code == 200, f"{response.text}\n{self.vllm.log_tail()}"
        return response.json()["choices"][0]["text"]

    def ask_counted(self, prompt, **extra):
        """Return the text, and the tokens that were looked up with success, loaded and stored."""
        before = self.server.status()["counters"]
        text = self.ask(prompt, **extra)
        after = self.server.status()["counters"]
        return text, {
            "hit": CHUNK_SIZE * (after["lookup_chunks"]["hit"] - before["lookup_chunks"]["hit"]),
            "loaded": after["retrieved_tokens"] - before["retrieved_tokens"],
            "stored": CHUNK_SIZE * (after["stored_chunks"] - before["stored_chunks"]),
        }


def wait_for_engine(server):
    """Return when both halves of the plug-in are this server's clients, the worker registered."""
    deadline = time.monotonic() + RECONNECT_SECONDS
    while time.monotonic() < deadline:
        clients = server.status()["clients"]
        known = {client["kind"]: client["model"] for client in clients}
        if known.keys() >= {"engine-scheduler", "engine-worker"} and known["engine-worker"]:
            return
        time.sleep(0.1)
    raise AssertionError(f"the engine did not come back: {server.status()['clients']}")


@pytest.fixture(scope="module")
def server():
    """The cache server, not started yet."""
    server = LmcacheServer(l1_size_gb=0.25)
    yield server
    server.close()


PROMPT = make_prompt("the prompt", 2000)
CACHED = STEP_TOKENS


@pytest.fixture(scope="module")
def first_answers(tiny_model_dir, tmp_path_factory, server):
    """What a first vLLM says to one prompt: without a server, cold, warm, and warm again."""
    log_path = tmp_path_factory.mktemp("vllm") / "first.log"
    with start_vllm(tiny_model_dir, log_path, server) as vllm:
        asker = Asker(vllm, server)
        answers = [(asker.ask(PROMPT), None)]
        server.start()
        wait_for_engine(server)
        answers += [asker.ask_counted(PROMPT) for _ in range(3)]
        return answers


@pytest.fixture(scope="module")
def asker(tiny_model_dir, tmp_path_factory, server, first_answers):
    """A second vLLM, with the server that the first one has filled."""
    log_path = tmp_path_factory.mktemp("vllm") / "second.log"
    with start_vllm(tiny_model_dir, log_path, server) as vllm:
        yield Asker(vllm, server)


def test_vllm_starts_and_serves_without_a_server_and_finds_one_later(first_answers):
    without, cold = first_answers[:2]
    assert cold == (without[0], {"hit": 0, "loaded": 0, "stored": CACHED})


def test_the_same_prompt_again_is_loaded_and_gives_the_same_text(first_answers):
    _, cold, warm, again = first_answers
    assert warm == (cold[0], {"hit": CACHED, "loaded": CACHED, "stored": 0})
    assert again == warm


def test_a_restarted_vllm_loads_what_the_first_one_stored(first_answers, asker):
    text, counts = asker.ask_counted(PROMPT)
    assert counts == {"hit": CACHED, "loaded": CACHED, "stored": 0}
    assert text == first_answers[0][0]


def test_vllm_picked_our_class_and_registered_its_layout(asker, server):
    log = asker.vllm.log_text()
    assert "Using external LMCacheMPConnector from lmcache.integration.vllm" in log
    assert "Creating v1 connector with name: LMCacheMPConnector" in log
    wait_for_engine(server)
    (model,) = server.status()["models"]
    assert model["bytes_per_token"] == KIB_PER_TOKEN * 1024
    assert model["live"]


def test_an_unrelated_prompt_hits_nothing(asker):
    _, counts = asker.ask_counted(make_prompt("unrelated", 2000))
    assert counts == {"hit": 0, "loaded": 0, "stored": CACHED}


def test_tenants_with_different_salts_never_share(asker):
    prompt = make_prompt("salted", 1900)
    cold, counts = asker.ask_counted(prompt, cache_salt="tenant a")
    assert counts == {"hit": 0, "loaded": 0, "stored": CACHED}
    for other in ({"cache_salt": "tenant b"}, {}):
        text, counts = asker.ask_counted(prompt, **other)
        assert (text, counts) == (cold, {"hit": 0, "loaded": 0, "stored": CACHED})
    text, counts = asker.ask_counted(prompt, cache_salt="tenant a")
    assert (text, counts) == (cold, {"hit": CACHED, "loaded": CACHED, "stored": 0})


def test_a_prompt_of_several_steps_extends_what_is_cached_of_it(asker):
    prompt = make_prompt("long", 2 * STEP_TOKENS + 100)
    asker.ask(prompt[: STEP_TOKENS + 10])
    text, counts = asker.ask_counted(prompt)
    assert counts == {"hit": STEP_TOKENS, "loaded": STEP_TOKENS, "stored": STEP_TOKENS}
    again, counts = asker.ask_counted(prompt)
    assert counts == {"hit": 2 * STEP_TOKENS, "loaded": 2 * STEP_TOKENS, "stored": 0}
    assert again == text


@pytest.mark.parametrize(
    ("num_tokens", "stored", "loaded"),
    [(CHUNK_SIZE - 1, 0, 0), (CHUNK_SIZE, CHUNK_SIZE, 0), (CHUNK_SIZE + 1, CHUNK_SIZE, CHUNK_SIZE)],
)
def test_one_token_at_least_is_left_to_compute(asker, num_tokens, stored, loaded):
    prompt = make_prompt(num_tokens, num_tokens)
    _, counts = asker.ask_counted(prompt)
    assert counts == {"hit": 0, "loaded": 0, "stored": stored}
    _, counts = asker.ask_counted(prompt)
    assert counts == {"hit": loaded, "loaded": loaded, "stored": 0}


def test_generated_tokens_are_not_stored(asker):
    prompt = make_prompt("short", CHUNK_SIZE - 10)
    _, counts = asker.ask_counted(prompt, max_tokens=CHUNK_SIZE)
    assert counts["stored"] == 0


def test_nothing_stays_pinned_and_each_request_is_forgotten(asker, server):
    asker.ask_counted(PROMPT)
    status = server.status()
    assert (status["l1"]["pins"], status["sessions"]) == (0, 0)
    assert status["l1"]["reserved_bytes"] == 0


def test_requests_are_answered_when_the_server_is_killed_and_hits_come_back(asker, server):
    cold = asker.ask(PROMPT)
    server.kill()
    assert [asker.ask(PROMPT) for _ in range(2)] == [cold, cold]
    server.start()
    wait_for_engine(server)
    assert asker.ask_counted(PROMPT) == (cold, {"hit": 0, "loaded": 0, "stored": CACHED})
    assert asker.ask_counted(PROMPT) == (cold, {"hit": CACHED, "loaded": CACHED, "stored": 0})
