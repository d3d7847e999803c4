"""Real vLLM with an L1 far smaller than its prompts and a folder below it: what comes back gives the same answers."""

import signal

import pytest

from tests.chaos.waiting import wait_until
from tests.integration.conftest import CHUNK_SIZE, make_prompt
from tests.server_process import LmcacheServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT_CHUNKS = 3
CACHED = PROMPT_CHUNKS * CHUNK_SIZE
NUM_PROMPTS = 8
# The tiny model's chunks have 1 MiB: L1 holds two prompts of eight.
L1_GIB = 2.5 * PROMPT_CHUNKS / 1024
PROMPTS = [make_prompt(f"l2 prompt {number}", CACHED + 50) for number in range(NUM_PROMPTS)]


@pytest.fixture(scope="module")
def tiered_engine(tmp_path_factory, engine, cache_server):
    """The engine that all share, with another server at the port of its own."""
    folder = tmp_path_factory.mktemp("l2")
    flags = ["--l2-adapter", f"fs://{folder}?capacity-gb=1", "--l2-lookup-timeout-seconds", "30", "--l2-inflight-ratio", "1"]
    # However long a read takes: other work shares the disk, too.
    flags += ["--l2-min-tokens-per-second", "0"]
    cache_server.stop(signal.SIGTERM)
    with LmcacheServer(flags, l1_size_gb=L1_GIB, port=cache_server.port) as engine.server:
        engine.wait_for_cache()
        yield engine
    cache_server.start()
    engine.server = cache_server
    engine.wait_for_cache()


@pytest.fixture(scope="module")
def tiered_server(tiered_engine):
    return tiered_engine.server


def wait_for_writes(server):
    wait_until(lambda: not server.status()["l2"][0]["queued_chunks"], "all chunks are written")


@pytest.fixture(scope="module")
def own(tiered_engine, tiered_server):
    """What the engine says over its own prefix cache; afterwards all prompts are stored and the engine has forgotten them."""
    answers = []
    for prompt in PROMPTS:
        tiered_engine.ask(prompt)
        answers.append(tiered_engine.ask(prompt))
        wait_for_writes(tiered_server)
    return answers


def assert_all_warm(engine, own):
    before = engine.server.status()["counters"]
    for prompt, expected in zip(PROMPTS, own, strict=True):
        assert engine.ask(prompt) == expected
    after = engine.counters_at_rest()
    what_else = {name: count for name, count in after.items() if name.startswith(("l2_", "lookup", "retrieve_"))}
    assert after["retrieved_tokens"] - before["retrieved_tokens"] == NUM_PROMPTS * CACHED, what_else
    assert after["stored_chunks"] == before["stored_chunks"]
    promoted = after["l2_promoted_chunks"] - before["l2_promoted_chunks"]
    assert promoted >= (NUM_PROMPTS - 2) * PROMPT_CHUNKS


@pytest.fixture(autouse=True)
def forgets(tiered_engine):
    """Each test begins with an engine whose own prefix cache is empty, whatever became of the one before."""
    tiered_engine.forget()


def test_a_prompt_that_the_engine_has_itself_leaves_no_pins(tiered_engine, own):
    """It is computed while the server still loads it from L2; nobody reads what the server answers in the end."""
    for prompt in PROMPTS:
        tiered_engine.ask(prompt)
    before = tiered_engine.counters_at_rest()
    for prompt, expected in zip(PROMPTS, own, strict=True):
        assert tiered_engine.ask(prompt) == expected
    after = tiered_engine.counters_at_rest()
    assert after["retrieved_tokens"] == before["retrieved_tokens"]


def test_what_l1_could_not_keep_comes_back_from_l2(tiered_engine, own):
    assert tiered_engine.server.status()["counters"]["evicted_chunks"]["demand"] > 0
    assert_all_warm(tiered_engine, own)


def test_the_cache_is_warm_after_the_servers_restart(tiered_engine, tiered_server, own):
    tiered_server.stop(signal.SIGTERM)
    tiered_server.start()
    tiered_engine.wait_for_cache()
    assert tiered_server.status()["l1"]["chunks"] == 0
    assert_all_warm(tiered_engine, own)
