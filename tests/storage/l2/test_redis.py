"""What is Redis' own: round trips, lifetimes, kept connections, names that a pattern would match."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from lmcache.storage.l2.base import L2Error
from tests.l2_servers import redis_server, wait_for
from tests.storage.l2.test_contract import fetch
from tests.tcp_proxy import TcpProxy

DEADLINE_SECONDS = 120.0


def test_lengths_of_512_keys_take_one_round_trip(make, redis_port):
    """All of them are asked before anything was answered."""
    keys = [f"key-{number:03}" for number in range(512)]
    with TcpProxy(redis_port) as proxy, ThreadPoolExecutor(1) as threads:
        adapter = make(f"redis://127.0.0.1:{proxy.port}?prefix=trips:&timeout-seconds=120")
        adapter.put("key-007", [memoryview(b"value")])
        proxy.hold.set()
        asked = threads.submit(adapter.lengths, keys)
        try:
            wait_for(lambda: b"key-511" in proxy.up_tail, "the last question")
        finally:
            proxy.forget()
        assert asked.result(DEADLINE_SECONDS) == [5 if key == "key-007" else None for key in keys]


def test_a_value_takes_one_round_trip_each_way(make, redis_port):
    with TcpProxy(redis_port) as proxy:
        adapter = make(f"redis://127.0.0.1:{proxy.port}?prefix=one:&timeout-seconds=60")
        adapter.ping()
        before = proxy.turns
        adapter.put("key", [memoryview(bytes(10_000))])
        assert proxy.turns == before + 1
        assert fetch(adapter, "key", 10_000) == bytes(10_000)
        assert proxy.turns == before + 2


def test_a_value_lives_as_long_as_it_is_told(make, redis_port):
    adapter = make(f"redis://127.0.0.1:{redis_port}?prefix=ttl:&ttl-seconds=1000")
    forever = make(f"redis://127.0.0.1:{redis_port}?prefix=ttl:")
    adapter.put("short", [memoryview(b"value")])
    forever.put("long", [memoryview(b"value")])
    with contextlib.closing(redis.Redis(port=redis_port, protocol=2)) as admin:
        assert 0 < admin.ttl("ttl:short") <= 1000
        assert admin.ttl("ttl:long") == -1
    assert fetch(adapter, "short", 5) == b"value"
    assert adapter.clear() == 2


def test_threads_share_the_connections_that_there_may_be(make, tmp_path):
    with redis_server(tmp_path) as port:
        adapter = make(f"redis://127.0.0.1:{port}?max-connections=3&timeout-seconds=60")

        def one(number: int) -> bytes | None:
            adapter.put(f"{number}", [memoryview(b"%d" % number)])
            return fetch(adapter, f"{number}", 1)

        with ThreadPoolExecutor(9) as threads:
            futures = [threads.submit(one, number) for number in range(9)]
            assert [future.result(DEADLINE_SECONDS) for future in futures] == [b"%d" % number for number in range(9)]
        with contextlib.closing(redis.Redis(port=port, protocol=2)) as admin:
            assert len(admin.client_list()) <= 3 + 1


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
def test_calls_wait_for_a_connection(make, redis_port, redis_cluster_ports, scheme):
    port = redis_port if scheme == "redis" else redis_cluster_ports[0]
    adapter = make(f"{scheme}://127.0.0.1:{port}?max-connections=3&timeout-seconds=60")
    adapter.ping()
    begun, busy, most_busy = [], [], []

    def hold(connection: object) -> None:
        busy.append(connection)
        most_busy.append(len(busy))
        wait_for(lambda: len(begun) == 9, "all calls")
        busy.remove(connection)

    def call() -> None:
        begun.append(True)
        adapter._on_connection(b"name", hold)

    with ThreadPoolExecutor(9) as threads:
        for future in [threads.submit(call) for _ in range(9)]:
            future.result(DEADLINE_SECONDS)
    assert max(most_busy) <= 3


def test_clear_takes_its_prefix_by_the_letter(make, redis_port):
    names = ["a*c", "a?c", "[ab]c", "a\\c", "abc", "^c"]
    adapters = {name: make(f"redis://127.0.0.1:{redis_port}?prefix={name.replace('?', '%3F')}:") for name in names}
    for adapter in adapters.values():
        adapter.put("key", [memoryview(b"value")])
    assert [adapter.clear() for adapter in adapters.values()] == [1] * len(names)


def test_the_database_is_the_one_in_the_url(make, redis_port):
    zero, one = make(f"redis://127.0.0.1:{redis_port}/0?prefix=db:"), make(f"redis://127.0.0.1:{redis_port}/1?prefix=db:")
    one.put("key", [memoryview(b"value")])
    assert zero.lengths(["key"]) == [None]
    assert one.clear() == 1


def test_a_node_of_a_cluster_that_is_taken_for_a_single_server_says_so(make, redis_cluster_ports):
    adapter = make(f"redis://127.0.0.1:{redis_cluster_ports[0]}?timeout-seconds=60")
    messages = []
    for number in range(20):  # one of three nodes has the name
        try:
            adapter.put(f"key-{number}", [memoryview(b"value")])
        except L2Error as exc:
            messages.append(str(exc))
    assert messages
    assert all("is a node of a cluster; write redis+cluster://" in message for message in messages)


def test_a_slot_that_has_moved_is_found_on_its_new_node(make, redis_cluster_ports):
    """As after a cluster was rebalanced: the map that the client has is old."""
    adapter = make(f"redis+cluster://127.0.0.1:{redis_cluster_ports[0]}?timeout-seconds=60")
    adapter.put("key", [memoryview(b"value")])
    nodes = adapter._connected().nodes_manager
    slot = adapter._connected().keyslot("lmcache:key")
    others = [node for node in nodes.get_nodes_by_server_type("primary") if node not in nodes.slots_cache[slot]]
    nodes.slots_cache[slot] = [others[0]]
    adapter.put("key", [memoryview(b"other")])
    assert nodes.slots_cache[slot] != [others[0]]
    nodes.slots_cache[slot] = [others[0]]
    assert adapter.lengths(["elsewhere", "key", "neither"]) == [None, 5, None]
