"""A real vLLM under load, and its cache server killed, frozen, filled, cleared and restarted.

Whatever happens: every answer is right, none is an HTTP 5xx, no request hangs, vLLM lives, and afterwards nobody holds
anything. `make chaos` goes on for ten minutes; `--chaos-class built-in` takes vLLM's own connector class. What is right is
said in `answers.py`.
"""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmcache.pool import PoolView
from tests.chaos.conftest import directory_left_empty
from tests.chaos.waiting import wait_until
from tests.chaos_vllm.answers import CHUNK_SIZE, MAX_CHUNKS, OUTPUT_TOKENS, Reference, make_references
from tests.chaos_vllm.cache_server import MortalServer, make_seed
from tests.chaos_vllm.clients import ABORTS, MANNERS, Clients
from tests.chaos_vllm.completion import Completion, complete
from tests.chaos_vllm.faults import CHUNK_BYTES, Faults
from tests.integration.conftest import BUILT_IN, Engine
from tests.integration.later_copier import LATER
from tests.server_process import run_lmcache

pytest.importorskip("torch", reason="needs torch: make setup-vllm")

LONG_RUN_SECONDS = 300.0
DRAIN_SECONDS = 120.0
# 32 chunks; the stems alone have 60.
L1_GIB = 8 / 1024
SERVER_FLAGS = ["--chunk-size", str(CHUNK_SIZE)]
# Blocks for two of the longest prompts; a step computes five of a prompt's blocks at most.
# fmt: off
VLLM_FLAGS = [
    "--block-size", "32", "--max-model-len", "1024", "--num-gpu-blocks-override", "64",
    "--max-num-seqs", "6", "--max-num-batched-tokens", "160", "--enable-prefix-caching",
]
# fmt: on
SIGNS_OF_A_BUG = (
    "plug-in failed",
    "failed unexpectedly",
    "EngineDeadError",
    "EngineCore encountered",
    "Traceback (most recent",
)


pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def seconds(pytestconfig: pytest.Config) -> float:
    seconds = float(pytestconfig.getoption("--chaos-seconds"))
    if not seconds:
        pytest.skip("takes minutes: make chaos")
    return seconds


@pytest.fixture(scope="module")
def num_clients(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--chaos-clients"))


@pytest.fixture(scope="module")
def generator(pytestconfig: pytest.Config) -> random.Random:
    """Where the prompts and the faults come from."""
    seed = make_seed(pytestconfig.getoption("--chaos-seed"))
    print(f"\nrun this again with --chaos-seed {seed}")
    return random.Random(seed)


@pytest.fixture(scope="module")
def server(seconds: float) -> Iterator[MortalServer]:
    with directory_left_empty() as pool_dir:
        server = MortalServer(SERVER_FLAGS, pool_dir, L1_GIB)
        server.start()
        try:
            yield server
        finally:
            server.close()


@pytest.fixture(scope="module")
def engine(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, server: MortalServer, pytestconfig: pytest.Config
) -> Iterator[Engine]:
    kind = pytestconfig.getoption("--chaos-class")
    env, connector = BUILT_IN if kind == "built-in" else {}, LATER if kind == "later" else {}
    log_path = tmp_path_factory.mktemp("vllm") / "chaos.log"
    with Engine(tiny_model_dir, log_path, server.now, env=env, flags=VLLM_FLAGS, connector=connector) as engine:
        engine.wait_for_cache()
        yield engine


@pytest.fixture(scope="module")
def references(
    engine: Engine, server: MortalServer, generator: random.Random, seconds: float, num_clients: int
) -> list[Reference]:
    """Prompts and answers, made while there is no cache server."""
    server.kill()

    def ask(prompt: tuple[int, ...], max_tokens: int, **extra: object) -> Completion:
        completion = complete(engine.port, prompt, max_tokens, **extra)
        assert completion.is_whole, completion
        return completion

    boundaries = MAX_CHUNKS if seconds >= LONG_RUN_SECONDS else 1
    references = make_references(ask, generator, num_clients, boundaries)
    server.start()
    engine.server = server.now
    engine.wait_for_cache()
    return references


def faults_of(engine: Engine, references: list[Reference]) -> list[str]:
    """Ask for each and return what is wrong with the answers."""
    faults = []
    for reference in references:
        completion = complete(engine.port, reference.prompt, OUTPUT_TOKENS)
        assert completion.status == 200, completion
        faults.append(reference.fault_of(completion))
    return faults


def test_a_wrong_chunk_is_noticed(engine: Engine, server: MortalServer, references: list[Reference]) -> None:
    """Otherwise the next test would prove nothing. Each chunk in the pool gets the bytes of the next one."""
    some = [reference for reference in references if 2 <= len(reference.prompt) // CHUNK_SIZE <= 6][:5]
    assert not any(faults_of(engine, some))
    engine.forget()
    view = PoolView(Path(server.now.pool_path))
    data = view.extent(0, view.header.capacity_bytes)
    data[:] = bytes(data[CHUNK_BYTES:]) + bytes(data[:CHUNK_BYTES])
    data.release()
    view.close()
    before = server.total("retrieved_tokens")
    faults = faults_of(engine, some)
    assert server.total("retrieved_tokens") - before > 0
    assert sum(map(bool, faults)) > len(some) // 2
    assert httpx.post(f"{server.now.http_url}/api/clear", timeout=60).is_success
    engine.forget()
    assert not any(faults_of(engine, some))


def test_answers_are_right_and_nothing_is_held_whatever_happens(
    engine: Engine,
    server: MortalServer,
    references: list[Reference],
    generator: random.Random,
    seconds: float,
    num_clients: int,
) -> None:
    preempted_before = engine.metric("vllm:num_preemptions_total")
    faults = Faults(engine, server, random.Random(generator.random()))
    with Clients(engine.port, references, num_clients, generator) as clients:
        faults.cause_for(seconds)
    tally = clients.tally
    engine.server = server.now
    log = engine.log_text()
    print(
        f"\n{tally.num_requests} requests of {len(references)} prompts in {seconds:.0f} s, {dict(tally.manners)}, of which "
        f"{tally.num_aborts} aborted; faults {dict(faults.counts)}; {tally.num_5xx} HTTP 5xx, {len(tally.wrong)} wrong, "
        f"{len(tally.errors)} errors; {tally.checked_tokens} tokens compared; "
        f"retrieved {server.total('retrieved_tokens')} tokens, "
        f"failed loads {server.total('retrieve_failed')} blocks, failed lookups {server.total('lookup_failed')}, "
        f"evicted {server.total('evicted_chunks')} chunks, full {server.total('store_rejected_chunks.full')}, "
        f"adopted {server.adopted_chunks}; preempted {engine.metric('vllm:num_preemptions_total') - preempted_before:.0f}; "
        f"waited {faults.waits_for_room} times for room in L1; "
        f"longest request {tally.longest_seconds:.1f} s, longest return of the engine {faults.longest_return_seconds:.1f} s"
    )
    assert not tally.errors
    assert not tally.wrong
    assert not faults.failures
    assert not [line for line in log.splitlines() if any(sign in line for sign in SIGNS_OF_A_BUG)]
    assert_at_rest(engine, server)
    assert not any(faults_of(engine, references[:3]))
    assert_at_rest(engine, server)

    assert min(faults.counts[kind] for kind in faults.kinds) > 0
    assert min(tally.manners[manner] for manner in MANNERS) > 0
    assert tally.num_aborts == sum(tally.manners[manner] for manner in ABORTS)
    assert server.total("retrieved_tokens") > 0
    assert server.total("evicted_chunks") > 0
    assert tally.checked_tokens > 0


def assert_at_rest(engine: Engine, server: MortalServer) -> None:
    """vLLM has no request and no block in use, the cache server no pin, session or reservation, and its books add up."""
    engine.wait_for_cache()
    in_use = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    # An HTTP route tells before the scheduler's next step what there was in the last one.
    wait_until(
        lambda: not any(engine.metric(f"vllm:{name}") for name in in_use),
        f"vLLM is idle and all its blocks are free: {[(name, engine.metric(f'vllm:{name}')) for name in in_use]}",
        DRAIN_SECONDS,
    )
    assert httpx.get(f"{engine.url}/health", timeout=60).is_success

    def held() -> dict[str, int]:
        status = describe(server)
        l1 = status["l1"]
        return {"pins": l1["pins"], "reserved bytes": l1["reserved_bytes"], "sessions": status["sessions"]}

    deadline = time.monotonic() + DRAIN_SECONDS
    while any(held().values()):
        assert time.monotonic() < deadline, f"still held: {held()}"
        time.sleep(1.5)  # the server counts its entries when it was idle for a second
    status = describe(server)
    assert status["l1"]["used_bytes"] + status["l1"]["free_bytes"] == status["l1"]["capacity_bytes"]
    assert status["healthy"], status["problems"]


def describe(server: MortalServer) -> dict[str, Any]:
    """What a person would look at."""
    ran = run_lmcache("describe", "kvcache", "--url", server.now.zmq_url, "--format", "json")
    assert ran.returncode in (0, 1), ran.stderr
    return json.loads(ran.stdout)
