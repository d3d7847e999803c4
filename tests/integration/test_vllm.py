"""Real vLLM on the CPU stores to and loads from a real server, through our connector class and through vLLM's own.

Loaded KV must give the answer that the same vLLM gives from its own prefix cache: that is the same split of the same sums.
Prompts end less than a block (128) after a whole chunk (256), so that both caches hold the same tokens of them.
"""

import concurrent.futures
import contextlib
import os
import signal
import time

import httpx
import pytest

from lmcache.client.mq import MessageQueueClient
from lmcache.protocol import Clear
from tests.chaos.waiting import wait_until
from tests.cli.conftest import Cli
from tests.integration.conftest import BUILT_IN, CHUNK_SIZE, STEP_TOKENS, Engine, is_at_rest, make_prompt
from tests.server_process import running_lmcache
from tests.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

MAX_TRIES = 5
CACHED = 3 * CHUNK_SIZE
TAIL = 50
SHARED = 2 * CHUNK_SIZE
KIB_PER_TOKEN = 4
CLASSES = ["ours", "built-in"]


def prompts_of(name):
    """Return a prompt and another that begins like it."""
    prompt = make_prompt(f"prompt {name}", CACHED + TAIL)
    return prompt, prompt[: SHARED + TAIL] + make_prompt(f"branch {name}", CACHED - SHARED)


@pytest.fixture(scope="module")
def engines(tiny_model_dir, tmp_path_factory, cache_server, engine):
    """Two engines on one server, one for each class."""
    log_path = tmp_path_factory.mktemp("vllm") / "built-in.log"
    with Engine(tiny_model_dir, log_path, cache_server, env=BUILT_IN, failure_policy="fail") as built_in:
        built_in.wait_for_cache()
        yield {"ours": engine, "built-in": built_in}


@pytest.fixture(scope="module")
def own(engines):
    """What each engine says to its prompts over its own prefix cache, under a salt that only these requests use."""
    answers = {}
    for name, engine in engines.items():
        prompt, branch = prompts_of(name)
        cold = engine.ask(prompt, cache_salt="own")
        own, counts = engine.ask_counted(prompt, cache_salt="own")
        assert counts == {"hit": CACHED, "loaded": 0, "stored": 0}
        own_branch, counts = engine.ask_counted(branch, cache_salt="own")
        assert counts == {"hit": SHARED, "loaded": 0, "stored": CACHED - SHARED}
        answers[name] = {"cold": cold, "prompt": own, "branch": own_branch}
    return answers


@pytest.fixture(scope="module")
def stored(engines, own):
    """Each engine has computed and stored its prompt, and forgotten it."""
    for name, engine in engines.items():
        text, counts = engine.ask_counted(prompts_of(name)[0])
        assert (text, counts) == (own[name]["cold"], {"hit": 0, "loaded": 0, "stored": CACHED})
        engine.forget()
    return own


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ours", ["Using external LMCacheMPConnector from lmcache.integration.vllm", "with name: LMCacheMPConnector and"]),
        ("built-in", ["Force use builtin LMCacheMPConnectorUpstream", "with name: LMCacheMPConnectorUpstream and"]),
    ],
)
def test_vllm_resolved_the_class_that_was_asked_for(engines, name, told):
    log = engines[name].log_text()
    assert all(line in log for line in told)


def test_both_classes_register_the_same_layout(engines, cache_server):
    (model,) = cache_server.status()["models"]
    assert model["bytes_per_token"] == KIB_PER_TOKEN * 1024
    assert model["live"]


@pytest.mark.parametrize("name", CLASSES)
def test_warm_is_what_the_engines_own_cache_gives(engines, stored, name):
    text, counts = engines[name].ask_counted(prompts_of(name)[0])
    assert (text, counts) == (stored[name]["prompt"], {"hit": CACHED, "loaded": CACHED, "stored": 0})


@pytest.mark.parametrize("name", CLASSES)
def test_a_partial_prefix_is_loaded_and_the_rest_stored(engines, stored, name):
    engines[name].forget()
    text, counts = engines[name].ask_counted(prompts_of(name)[1])
    assert (text, counts) == (stored[name]["branch"], {"hit": SHARED, "loaded": SHARED, "stored": CACHED - SHARED})


@pytest.mark.parametrize("name", CLASSES)
def test_warm_beside_an_unrelated_prompt(engines, stored, name):
    """What else is in the batch may change the last bits of the sums, so the engine's own cache is asked in company too."""
    engine, prompt = engines[name], prompts_of(name)[0]
    engine.ask(prompt)
    in_company = ask_in_company(engine, prompt, f"first {name}")
    engine.forget()
    before = engine.server.status()["counters"]["retrieved_tokens"]
    text = ask_in_company(engine, prompt, f"second {name}")
    assert engine.server.status()["counters"]["retrieved_tokens"] - before == CACHED
    assert text in {stored[name]["prompt"], in_company}


def ask_in_company(engine, prompt, seed):
    company = make_prompt(f"unrelated {seed}", CACHED + TAIL)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer, _ = pool.submit(engine.ask, prompt), pool.submit(engine.ask, company)
        return answer.result()


@pytest.mark.parametrize("name", CLASSES)
def test_warm_from_the_second_engine(engines, stored, name):
    """Also from one class to the other: they share what they store."""
    (other,) = [engine for other, engine in engines.items() if other != name]
    text, counts = other.ask_counted(prompts_of(name)[0])
    assert (text, counts) == (stored[name]["prompt"], {"hit": CACHED, "loaded": CACHED, "stored": 0})


@pytest.mark.parametrize("name", CLASSES)
def test_tenants_with_different_salts_never_share(engines, name):
    prompt = make_prompt(f"salted {name}", 2 * CHUNK_SIZE + TAIL)
    engine = engines[name]
    _, counts = engine.ask_counted(prompt, cache_salt="tenant a")
    assert counts == {"hit": 0, "loaded": 0, "stored": 2 * CHUNK_SIZE}
    engine.forget()
    _, counts = engine.ask_counted(prompt, cache_salt="tenant b")
    assert counts == {"hit": 0, "loaded": 0, "stored": 2 * CHUNK_SIZE}
    engine.forget()
    _, counts = engine.ask_counted(prompt)
    assert counts == {"hit": 0, "loaded": 0, "stored": 2 * CHUNK_SIZE}
    engine.forget()
    _, counts = engine.ask_counted(prompt, cache_salt="tenant a")
    assert counts == {"hit": 2 * CHUNK_SIZE, "loaded": 2 * CHUNK_SIZE, "stored": 0}


@pytest.mark.parametrize("name", CLASSES)
def test_a_prompt_of_several_steps_is_stored_and_loaded_whole(engines, name):
    prompt, engine = make_prompt(f"long {name}", STEP_TOKENS + CHUNK_SIZE + TAIL), engines[name]
    _, counts = engine.ask_counted(prompt)
    assert counts == {"hit": 0, "loaded": 0, "stored": STEP_TOKENS + CHUNK_SIZE}
    own = engine.ask(prompt)
    engine.forget()
    warm, counts = engine.ask_counted(prompt)
    assert (warm, counts) == (own, {"hit": STEP_TOKENS + CHUNK_SIZE, "loaded": STEP_TOKENS + CHUNK_SIZE, "stored": 0})


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("num_tokens", "stored", "loaded"),
    [(CHUNK_SIZE - 1, 0, 0), (CHUNK_SIZE, CHUNK_SIZE, 0), (CHUNK_SIZE + 1, CHUNK_SIZE, CHUNK_SIZE)],
)
def test_one_token_at_least_is_left_to_compute(engines, name, num_tokens, stored, loaded):
    prompt, engine = make_prompt(f"{num_tokens} {name}", num_tokens), engines[name]
    _, counts = engine.ask_counted(prompt, max_tokens=1)
    assert counts == {"hit": 0, "loaded": 0, "stored": stored}
    engine.forget()
    _, counts = engine.ask_counted(prompt, max_tokens=1)
    assert counts == {"hit": loaded, "loaded": loaded, "stored": 0}


def test_generated_tokens_are_not_stored(engines):
    """vLLM's own class does not say where a prompt ends: the chunk in which a short one does is stored."""
    for name, stored in (("ours", 0), ("built-in", CHUNK_SIZE)):
        prompt = make_prompt(f"short {name}", CHUNK_SIZE - 10)
        _, counts = engines[name].ask_counted(prompt, max_tokens=CHUNK_SIZE + 50)
        assert counts["stored"] == stored


@pytest.mark.parametrize("name", CLASSES)
def test_nothing_stays_pinned_and_each_request_is_forgotten(engines, stored, cache_server, name):
    engines[name].forget()
    engines[name].ask(prompts_of(name)[0])
    wait_until(lambda: is_at_rest(cache_server), "no pins, sessions and reservations", 60)


def fail_the_load(engine, server, prompt):
    """Return vLLM's answer to a prompt that is found, but whose chunks are gone when they are loaded.

    Where vLLM had not read the lookup's answer when the server was killed there was no load to fail: that is tried again.
    """
    for _ in range(MAX_TRIES):
        response = lose_the_chunks_before_the_load(engine, server, prompt)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: response.is_error or num_failed_blocks(server) > 0, "a load failed", 15)  # noqa: B023 - at once
            return response
        assert response.status_code == 200, response.text
        engine.wait_for_cache()
        engine.forget()
        engine.ask(prompt)
    raise AssertionError(f"in {MAX_TRIES} tries no load was begun\n{engine.log_tail()}")


def lose_the_chunks_before_the_load(engine, server, prompt):
    """Return the answer; the next server knows of nobody's pins, and is emptied while the worker stands still."""
    engine.forget()
    worker = engine.pid_of("engine-worker")
    before = server.status()["counters"]["lookup_chunks"]["hit"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        os.kill(worker, signal.SIGSTOP)
        try:
            answer = pool.submit(engine.send, prompt)
            wait_until(lambda: server.status()["counters"]["lookup_chunks"]["hit"] > before, "it was looked up", 60)
            time.sleep(0.5)  # the scheduler reads the answer, unless it waits for the worker already
            server.kill()
            server.start()
            with MessageQueueClient(server.zmq_url) as client:
                client.call(Clear())
        finally:
            os.kill(worker, signal.SIGCONT)
        return answer.result()


def store_again(engines):
    """Fill the cache with each engine's prompt."""
    for name, engine in engines.items():
        engine.wait_for_cache()
        engine.forget()
        engine.ask(prompts_of(name)[0])


def test_a_load_that_fails_is_computed_under_the_policy_recompute(engines, stored, cache_server):
    response = fail_the_load(engines["ours"], cache_server, prompts_of("ours")[0])
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == stored["ours"]["cold"]
    wait_until(lambda: num_failed_blocks(cache_server) >= CACHED // 128, "the failed load was reported", 60)
    store_again(engines)


def num_failed_blocks(server):
    return sum(server.status()["counters"]["retrieve_failed"].values())


def test_the_pool_that_the_server_left_is_warm_for_its_successor(engines, stored, cache_server):
    cache_server.kill()
    cache_server.start()
    for name, engine in engines.items():
        engine.wait_for_cache()
        engine.forget()
        text, counts = engine.ask_counted(prompts_of(name)[0])
        assert (text, counts) == (stored[name]["prompt"], {"hit": CACHED, "loaded": CACHED, "stored": 0})


def test_a_load_that_fails_is_an_error_under_the_policy_fail_and_the_engine_lives(engines, stored, cache_server):
    engine = engines["built-in"]
    response = fail_the_load(engine, cache_server, prompts_of("built-in")[0])
    assert response.status_code >= 500, response.text
    assert engine.ask(prompts_of("built-in")[0]) == stored["built-in"]["cold"]
    store_again(engines)


def test_requests_are_answered_while_the_server_is_away(engines, stored, cache_server):
    cache_server.kill()
    for name, engine in engines.items():
        engine.forget()
        assert [engine.ask(prompts_of(name)[0]) for _ in range(2)] == [stored[name]["cold"], stored[name]["prompt"]]
    cache_server.start()


def test_after_a_reset_of_both_caches_the_engine_computes_anew(engines, stored):
    """What vLLM asks for when its weights were replaced. Until it is restarted it shares with no other engine."""
    engine = engines["ours"]
    engine.wait_for_cache()
    answer = httpx.post(f"{engine.url}/reset_prefix_cache", params={"reset_external": "true"}, timeout=60)
    assert answer.status_code == 200, answer.text
    for kind, loaded in (("cold", 0), ("prompt", CACHED)):
        text, counts = engine.ask_counted(prompts_of("ours")[0])
        assert (text, counts) == (stored["ours"][kind], {"hit": loaded, "loaded": loaded, "stored": CACHED - loaded})
        engine.forget()


def test_the_first_request_after_an_engine_restart_is_warm(engines, stored):
    engine = engines["ours"]
    engine.close()
    engine.start()
    engine.wait_for_cache()
    text, counts = engine.ask_counted(prompts_of("ours")[0])
    assert (text, counts) == (stored["ours"]["prompt"], {"hit": CACHED, "loaded": CACHED, "stored": 0})


# More than what comes before an answer; the whole answer has 40 times as many.
BEGUN_BYTES = 40_000


@contextlib.contextmanager
def frozen_within_an_answer(engine, *words):
    """Yield a command that waits for the rest of an answer; the engine is stopped.

    The command's own connection tells that the answer has begun: a vLLM that lags behind its engine answers nothing else.
    One that has lagged may then say all of it at once: what it has said goes on when it is stopped.
    """
    command = ["query", "engine", "--prompt", "go on", "--max-tokens", "8000", "--ignore-eos", *words]
    group = engine.group
    for _ in range(MAX_TRIES):
        with TcpProxy(engine.port) as proxy, running_lmcache(*command, "--url", f"http://127.0.0.1:{proxy.port}") as process:
            wait_until(lambda: process.poll() is not None or proxy.num_down > BEGUN_BYTES, "the engine answers", 300)
            os.killpg(group, signal.SIGSTOP)
            try:
                if is_within_an_answer(proxy):
                    yield process
                    return
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGCONT)
    pytest.fail("every answer was over before the engine was stopped")


def is_within_an_answer(proxy):
    """Return, when nothing more comes, whether the answer's end has not come."""
    num_down = -1
    while num_down != (num_down := proxy.num_down):
        time.sleep(0.5)
    return b"[DONE]" not in proxy.down_tail


def test_an_engine_that_freezes_within_its_answer_is_exit_code_3(engines):
    engine = engines["built-in"]
    with frozen_within_an_answer(engine, "--timeout", "15") as process:
        output, error = process.communicate(timeout=300)
        for command in (["ping"], ["describe"], ["query", "engine", "--prompt", "x"]):
            words = [command[0], "engine", *command[2:], "--timeout", "0.5", "--url", engine.url]
            assert "within 0.5 s" in Cli("").refused(*words, code=3)
    assert process.returncode == 3, output
    assert "no token from" in error


def test_an_engine_that_dies_within_its_answer_is_exit_code_3(engines):
    """Last: nothing answers afterwards."""
    engine = engines["built-in"]
    with frozen_within_an_answer(engine, "--timeout", "60") as process:
        engine.kill()
        output, error = process.communicate(timeout=300)
    assert process.returncode == 3, output
    assert "ended the connection within its answer" in error
    assert "cannot connect to" in Cli("").refused("ping", "engine", "--url", engine.url, code=3)
