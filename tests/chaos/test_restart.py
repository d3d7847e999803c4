"""A server is killed, and the next one takes its pool over."""

import contextlib
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.pool import CLIENT_SUFFIX
from lmcache.protocol import StoreOutcome
from tests.chaos.actor import Actor
from tests.chaos.content import PAGE, chunk_key, chunk_keys, content
from tests.chaos.load import Load
from tests.chaos.waiting import assert_adds_up, wait_for_rest, wait_until
from tests.server_process import LmcacheServer

LARGE = 64 * PAGE
NUM_KILLS = 10
NUM_LATE_WRITES = 2


@pytest.fixture
def named(pool_dir):
    """A server whose pool outlives it."""
    flags = ["--pool-dir", str(pool_dir), "--pool-name", "kept", "--client-lease-seconds", "1"]
    with LmcacheServer(flags, http=False, l1_size_gb=8 / 1024, leaves_pool=True) as server:
        yield server


def restart(server: LmcacheServer) -> None:
    server.kill()
    server.start()


def chunk(index: int, num_bytes: int = LARGE) -> bytes:
    return content(chunk_key(index), num_bytes)


def assert_holds(client: KVCacheClient, index: int, num_bytes: int = LARGE) -> None:
    with client.pin(chunk_key(index)) as pinned:
        copies = [bytes(extent) for extent in pinned.extents]
        pinned.verify()
    assert copies == [chunk(index, num_bytes)]


def fill(client: KVCacheClient, first: int, num_chunks: int) -> None:
    """Store many chunks: everything that is not in use is evicted."""
    for index in range(first, first + num_chunks):
        client.store(chunk_key(index), [chunk(index)])


def test_the_next_server_serves_what_was_committed_and_drops_what_was_reserved(named):
    with Actor(named.zmq_url) as writer, KVCacheClient(named.zmq_url) as client:
        for index, num_bytes in enumerate((1, PAGE - 1, PAGE, PAGE + 1, LARGE)):
            client.store(chunk_key(index), [chunk(index, num_bytes)], with_checksums=True)
        writer.tell("reserve", indices=[10, 11], chunk_bytes=LARGE)
        named.kill()
        writer.signal(signal.SIGKILL)
        named.start()
        status = named.status()["l1"]
        assert (status["adopted_chunks"], status["dropped_reservations"]) == (5, 2)
        wait_until(lambda: "5 chunks served again, 2 reservations dropped" in named.log_text(), "the log says so too")
        for index, num_bytes in enumerate((1, PAGE - 1, PAGE, PAGE + 1, LARGE)):
            assert_holds(client, index, num_bytes)
        assert client.lookup(chunk_keys([10, 11])).hit_chunks == 0
    used = wait_for_rest(named)["l1"]["used_bytes"]
    assert used == (1 + 1 + 1 + 2) * PAGE + LARGE


def test_files_of_clients_that_died_with_the_server_go(named):
    with Actor(named.zmq_url) as client:
        client.tell("reserve", indices=[0], chunk_bytes=PAGE)
        named.kill()
        client.signal(signal.SIGKILL)
    named.start()
    assert named.shared_files() == [Path(named.pool_path)]
    assert wait_for_rest(named)["l1"]["used_bytes"] == 0


def test_a_late_writer_from_before_the_kill_damages_nothing(named):
    """Its place stays its own as long as it lives, however the pool fills up; then it is free."""
    capacity = named.status()["l1"]["capacity_bytes"]
    for turn in range(NUM_LATE_WRITES):
        first = 1000 * turn
        with Actor(named.zmq_url) as writer, KVCacheClient(named.zmq_url) as client:
            assert writer.tell("reserve", indices=[first, first + 1], chunk_bytes=LARGE) == [StoreOutcome.RESERVED] * 2
            restart(named)
            last = first + 10 + 2 * capacity // LARGE
            fill(client, first + 10, last - first - 10)
            assert client.store(chunk_key(first), [chunk(first)]) == [StoreOutcome.BUSY]
            assert writer.tell("write", fill=0xEE) == 2
            for index in range(last - 20, last):
                assert_holds(client, index)
            assert writer.tell("commit") == {"error": "RemoteError", "code": "unknown_client"}
            assert client.lookup(chunk_key(first)).hit_chunks == 0
            writer.tell("close")
            wait_until(lambda: not named.status()["l1"]["reserved_bytes"], "the places are free")
            assert client.store(chunk_key(first), [chunk(first)]) == [StoreOutcome.RESERVED]
            assert_holds(client, first)
    assert_adds_up(named)


def test_a_reader_from_before_the_kill_gets_the_right_bytes_or_is_told(named):
    capacity = named.status()["l1"]["capacity_bytes"]
    with Actor(named.zmq_url) as reader, KVCacheClient(named.zmq_url) as client:
        fill(client, 0, 2)
        reader.tell("pin", indices=[0, 1])
        restart(named)
        assert reader.tell("read") == "right"
        fill(client, 1000, 2 * capacity // LARGE)
        assert reader.tell("read") == "stale"


def test_a_server_killed_at_any_moment_under_load_never_serves_a_wrong_byte(named):
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    options = {"num_keys": 200, "writes_ratio": 0.5, "timeout_seconds": 1.0}
    with contextlib.ExitStack() as running:
        loads = [
            running.enter_context(Load(named.zmq_url, seed=seed + 1, num_threads=3, heartbeat=True, **options)),
            running.enter_context(Load(named.zmq_url, seed=seed + 2, num_threads=2, **options)),
            running.enter_context(Load(named.zmq_url, seed=seed + 3, inline=True, heartbeat=True, **options)),
        ]
        for load in loads:
            load.wait_until_it_runs()
        for _ in range(NUM_KILLS):
            time.sleep(0.1 + moments.random() ** 2 * 0.4)
            restart(named)
        for load in loads:
            load.wait_until_it_has_done_enough()
        counts = [load.finish() for load in loads]
    assert_adds_up(named)
    print(counts)
    assert [each["wrong"] for each in counts] == [0, 0, 0]
    assert {name for each in counts for name in each if name.startswith("error")} <= {
        "error UnreachableError",
        "error DeadlineError",
        "error RemoteError",
        "error PoolError",
    }
    assert sum(counts, Counter())["hits"] > 500
    assert min(each["hits"] for each in counts) > 50
    assert not [path for path in named.shared_files() if CLIENT_SUFFIX in path.name]
