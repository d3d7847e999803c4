"""Clients that share a pool which is too small for them never read each other's bytes."""

import contextlib
from collections import Counter

from tests.chaos.load import Load
from tests.chaos.waiting import assert_adds_up, wait_until
from tests.server_process import LmcacheServer

SMALL_GIB = 8 / 1024


def run_loads(server: LmcacheServer, loads: list[Load], num_read: int, num_evicted: int = 0) -> list[Counter[str]]:
    """Let them run side by side until the server has handed out and evicted so many chunks; return what each counted."""

    def is_enough() -> bool:
        counters = server.status()["counters"]
        return counters["retrieved_chunks"] >= num_read and sum(counters["evicted_chunks"].values()) >= num_evicted

    with contextlib.ExitStack() as running:
        for load in loads:
            running.enter_context(load)
        for load in loads:
            load.wait_until_it_runs()
        wait_until(is_enough, "enough was read and evicted")
        return [load.finish() for load in loads]


def errors_of(counts: Counter[str]) -> dict[str, int]:
    return {name: number for name, number in counts.items() if name.startswith("error") or name == "wrong"}


def test_two_clients_and_one_that_evicts_read_only_their_own_bytes(pool_dir):
    with LmcacheServer(["--pool-dir", str(pool_dir)], http=False, l1_size_gb=SMALL_GIB) as server:
        loads = [
            Load(server.zmq_url, seed=1, num_keys=300, writes_ratio=0.3),
            Load(server.zmq_url, seed=2, num_keys=300, writes_ratio=0.3),
            Load(server.zmq_url, seed=3, num_keys=3000, writes_ratio=0.95),
        ]
        counts = run_loads(server, loads, num_read=1200, num_evicted=1200)
        assert_adds_up(server)
    assert [errors_of(each) for each in counts] == [{}, {}, {}]
    total = sum(counts, Counter())
    print(total)
    # The test is empty unless chunks were hit, and evicted under a reader.
    assert min(each["hits"] for each in counts[:2]) > 200
    assert total["stale"] > 10


def test_clients_over_the_socket_and_in_the_pool_read_only_their_own_bytes(pool_dir):
    with LmcacheServer(["--pool-dir", str(pool_dir)], http=False, l1_size_gb=SMALL_GIB) as server:
        loads = [
            Load(server.zmq_url, seed=4, num_keys=300, writes_ratio=0.4, inline=True),
            Load(server.zmq_url, seed=5, num_keys=300, writes_ratio=0.4),
        ]
        counts = run_loads(server, loads, num_read=600, num_evicted=200)
        assert_adds_up(server)
    assert [errors_of(each) for each in counts] == [{}, {}]
    print(counts)
    assert min(each["hits"] for each in counts) > 150


def test_64_clients_store_read_and_look_up_at_once_without_an_error(pool_dir):
    with LmcacheServer(["--pool-dir", str(pool_dir)], http=False, l1_size_gb=4 * SMALL_GIB) as server:
        loads = [Load(server.zmq_url, seed=10 + n, num_keys=800, writes_ratio=0.5, num_threads=16) for n in range(4)]
        counts = run_loads(server, loads, num_read=3000)
        assert_adds_up(server)
    assert [errors_of(each) for each in counts] == [{}] * 4
    print(sum(counts, Counter()))
    assert min(each["hits"] for each in counts) > 50
    assert min(each["stored"] for each in counts) > 50
