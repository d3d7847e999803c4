"""Clients that are killed or stopped at the worst moment leave no entry, no pin and no lost byte."""

import contextlib
import signal
import time
from pathlib import Path

from lmcache.client.kvcache import KVCacheClient
from lmcache.protocol import StoreOutcome
from tests.chaos.actor import Actor
from tests.chaos.content import PAGE, chunk_key, chunk_keys, content
from tests.chaos.waiting import wait_for_rest, wait_until

LARGE = 64 * PAGE


def chunks(indices, num_bytes=LARGE):
    return [content(chunk_key(index), num_bytes) for index in indices]


def test_a_client_killed_between_reserve_and_commit_leaves_nothing(server):
    with Actor(server.zmq_url) as writer:
        assert writer.tell("reserve", indices=[0, 1, 2], chunk_bytes=LARGE) == [StoreOutcome.RESERVED] * 3
        writer.tell("write")
        assert server.status()["l1"]["reserved_bytes"] == 3 * LARGE
        writer.signal(signal.SIGKILL)
        wait_until(lambda: not server.status()["l1"]["reserved_bytes"], "the places are free")
    with KVCacheClient(server.zmq_url) as other:
        assert other.lookup(chunk_keys([0, 1, 2])).hit_chunks == 0
        assert other.store(chunk_keys([0, 1, 2]), chunks([0, 1, 2])) == [StoreOutcome.RESERVED] * 3
        assert [bytes(extent) for extent in other.pin(chunk_keys([0, 1, 2])).extents] == chunks([0, 1, 2])
    assert wait_for_rest(server)["l1"]["used_bytes"] == 3 * LARGE


def test_pins_of_a_killed_client_go(server):
    with KVCacheClient(server.zmq_url) as client, Actor(server.zmq_url) as reader:
        client.store(chunk_keys([0, 1]), chunks([0, 1]))
        assert reader.tell("pin", indices=[0, 1]) == 2
        assert reader.tell("lookup", indices=[0, 1], request_id="request") == 2
        assert server.status()["l1"]["pins"] == 4
        reader.signal(signal.SIGKILL)
        wait_until(lambda: not server.status()["l1"]["pins"], "the pins are gone")
    assert wait_for_rest(server)["l1"]["used_bytes"] == 2 * LARGE
    assert server.shared_files() == [Path(server.pool_path)]


def test_eight_clients_killed_at_once_leave_nothing(server):
    with contextlib.ExitStack() as running:
        actors = [running.enter_context(Actor(server.zmq_url)) for _ in range(8)]
        for actor in actors:
            actor.tell("attach")
        for number, actor in enumerate(actors):
            actor.begin("reserve", indices=[10 * number, 10 * number + 1], chunk_bytes=LARGE)
        for actor in actors:
            actor.signal(signal.SIGKILL)
        wait_until(lambda: not server.status()["clients"], "the clients are gone")
    assert wait_for_rest(server)["l1"]["used_bytes"] == 0
    assert server.shared_files() == [Path(server.pool_path)]


def test_the_place_of_a_stopped_writer_is_given_to_nobody_and_its_commit_is_right(server):
    capacity = server.status()["l1"]["capacity_bytes"]
    with Actor(server.zmq_url) as writer, KVCacheClient(server.zmq_url) as other:
        writer.tell("reserve", indices=[0, 1], chunk_bytes=LARGE)
        writer.signal(signal.SIGSTOP)
        # Twice what the pool holds goes through, and the server looks at least twice who is still there.
        rounds = 0
        until = time.monotonic() + 1.2
        while rounds < 2 * capacity // LARGE or time.monotonic() < until:
            other.store(chunk_key(100 + rounds), chunks([100 + rounds]))
            rounds += 1
        assert other.store(chunk_key(0), chunks([0])) == [StoreOutcome.BUSY]
        assert server.status()["l1"]["reserved_bytes"] == 2 * LARGE
        writer.signal(signal.SIGCONT)
        writer.tell("write")
        assert writer.tell("commit") == 2
        with other.pin(chunk_keys([0, 1])) as pinned:
            assert [bytes(extent) for extent in pinned.extents] == chunks([0, 1])
        for index in range(100 + rounds - 10, 100 + rounds):
            with other.pin(chunk_key(index)) as pinned:
                assert [bytes(extent) for extent in pinned.extents] == chunks([index])


def test_what_a_stopped_reader_pinned_stays_until_it_goes_on(server):
    capacity = server.status()["l1"]["capacity_bytes"]
    with Actor(server.zmq_url) as reader, KVCacheClient(server.zmq_url) as other:
        other.store(chunk_keys([0, 1]), chunks([0, 1]))
        reader.tell("pin", indices=[0, 1])
        reader.signal(signal.SIGSTOP)
        for index in range(100, 100 + 2 * capacity // LARGE):
            other.store(chunk_key(index), chunks([index]))
        reader.signal(signal.SIGCONT)
        assert reader.tell("read") == "right"
