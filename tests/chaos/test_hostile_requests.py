"""Requests that are well formed and unreasonable: each costs its sender an error at most, and nobody else anything."""

import contextlib

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.client.mq import MessageQueueClient
from lmcache.errors import RemoteError, UnreachableError
from lmcache.keys import Namespace
from lmcache.layout import KVLayout
from lmcache.protocol import Clear, Commit, Evict, Get, Lookup, Noop, Placement, Store, StoreOutcome, encode
from lmcache.server.service import MAX_MODELS, MAX_PENDING_REMOVALS
from tests.chaos.content import PAGE, chunk_key, chunk_keys, content
from tests.chaos.waiting import wait_until
from tests.fakes import PATIENCE_SECONDS
from tests.server_process import LmcacheServer
from tests.zmtp import RawPeer

POOL_GIB = 24 / 1024
# More than the socket buffers of both sides take in.
LARGE_BYTES = 16 << 20


@pytest.fixture(scope="module")
def server():
    with LmcacheServer(http=False, l1_size_gb=POOL_GIB) as server:
        yield server


@pytest.fixture
def client(server):
    with KVCacheClient(server.zmq_url) as client:
        client.mq.call(Clear())
        yield client


def reserve(client, indices, chunk_bytes=PAGE, parent=b"", rank=0):
    request = Store(client=client.attach().client_id, chunk_bytes=chunk_bytes, parent=parent, rank=rank)
    return client.mq.call(request, [chunk_keys(indices)])


def commit(client, placements):
    return client.mq.call(Commit(client=client.attach().client_id, placements=placements))


def test_chunks_committed_in_another_order_than_stored_can_all_be_evicted(client):
    placements = reserve(client, range(8)).placements
    assert commit(client, placements[::-1]).committed == 8
    assert client.mq.call(Clear()).objects == 8


def test_a_chunk_that_names_itself_as_its_predecessor_can_be_evicted(client):
    commit(client, reserve(client, [0], parent=chunk_key(0)).placements)
    commit(client, reserve(client, [1, 2], parent=chunk_key(2)).placements)
    assert client.mq.call(Clear()).objects == 3


def test_evict_counts_a_key_that_is_given_twice_once(client):
    client.store(chunk_key(0), [bytes(PAGE)])
    assert client.mq.call(Evict(), [chunk_key(0) * 3]).objects == 1


def test_many_keys_after_a_store_by_a_high_rank_are_answered_and_those_of_all_ranks_refused(client):
    commit(client, reserve(client, [0], rank=65535).placements)
    assert client.mq.call(Lookup(world_size=65535), [chunk_keys(range(4))]).hit_chunks == 0
    with pytest.raises(RemoteError, match="4000 chunks of 65535 ranks are too many at once"):
        client.mq.call(Lookup(world_size=65535), [chunk_keys(range(4000))])
    assert client.mq.call(Evict(), [chunk_keys(range(4000))]).objects == 1


def test_a_store_that_finds_no_room_for_thousands_of_chunks_is_answered(server, client):
    num_small = server.status()["l1"]["capacity_bytes"] // (16 * PAGE)
    client.store(chunk_keys(range(num_small)), [bytes(16 * PAGE)] * num_small)
    with contextlib.ExitStack() as pins:
        for index in range(0, num_small, 2):
            pins.enter_context(client.pin(chunk_key(index)))
        outcomes = reserve(client, range(10**6, 10**6 + 16384), chunk_bytes=64 * PAGE).outcomes
    assert outcomes.count(StoreOutcome.FULL) > 16000


def test_commit_of_a_place_that_was_not_granted_like_that_publishes_nothing(server, client):
    (granted,) = reserve(client, [0]).placements
    before = server.status()["counters"]["stored_bytes"]
    for offset, length in ((granted.offset, 1 << 28), (granted.offset + PAGE, PAGE), (granted.offset, PAGE - 1)):
        forged = Placement(granted.slot, offset, length, granted.generation)
        assert commit(client, [forged]).rejected == [granted.slot]
    assert server.status()["counters"]["stored_bytes"] == before
    assert commit(client, [granted, granted]).committed == 1
    assert server.status()["counters"]["stored_bytes"] == before + PAGE


def test_clears_that_wait_for_a_pin_are_limited_and_keep_nobody_waiting(server, client):
    client.store(chunk_key(0), [bytes(PAGE)])
    with KVCacheClient(server.zmq_url, inline=True) as other:
        with client.pin(chunk_key(0)):
            assert other.mq.call(Clear(force=True, timeout_seconds=0.2)).kept_objects == 1
            request = Clear(force=True, timeout_seconds=PATIENCE_SECONDS)
            waiting = [other.mq.submit(request, may_wait=True) for _ in range(MAX_PENDING_REMOVALS)]
            with pytest.raises(RemoteError, match="clears are under way already"):
                other.mq.call(request)
            assert server.status()["healthy"]
            assert not any(future.done() for future in waiting)
        assert {future.result().kept_objects for future in waiting} == {0}


def test_every_one_of_a_thousand_requests_under_way_is_answered(server):
    with MessageQueueClient(server.zmq_url) as client:
        futures = [client.submit(Noop(), may_wait=True) for _ in range(1000)]
        assert all(not future.result().problems for future in futures)


def test_models_that_nobody_uses_any_more_are_forgotten(server, client):
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=16, block_size=16, dtype="bfloat16")
    for number in range(MAX_MODELS + 10):
        client.register(Namespace(model=f"model-{number}", layout=layout.fingerprint, chunk_size=256), layout)
    models = server.status()["models"]
    assert len(models) == MAX_MODELS
    assert models[-1]["live"]


def num_read(server: LmcacheServer) -> int:
    return server.status()["counters"]["retrieved_chunks"]


def test_a_reader_that_stalls_gets_the_bytes_it_asked_for(server, client):
    """Chunks of two sizes: libzmq copies the small one at once and is still sending the large one."""
    large, small = chunk_key(0), chunk_key(1)
    client.store(large, [content(large, LARGE_BYTES)])
    client.store(small, [content(small, PAGE)])
    with RawPeer(server.port, receive_buffer_bytes=PAGE) as stalled:
        stalled.shake_hands()
        before = num_read(server)
        stalled.send([b"id", encode(Get(client=client.attach().client_id)), large + small])
        wait_until(lambda: num_read(server) == before + 2, "the server has begun to send them")
        for index in range(10, 20):
            client.store(chunk_key(index), [b"\xee" * (4 << 20)])
        _, _, *chunks = stalled.receive()
    assert chunks == [content(large, LARGE_BYTES), content(small, PAGE)]


def test_a_server_whose_reader_stalls_stops_and_leaves_nothing():
    with LmcacheServer(http=False, l1_size_gb=POOL_GIB) as server, KVCacheClient(server.zmq_url) as client:
        client.store(chunk_key(0), [bytes(LARGE_BYTES)])
        with RawPeer(server.port, receive_buffer_bytes=PAGE) as stalled:
            stalled.shake_hands()
            stalled.send([b"id", encode(Get(client=client.attach().client_id)), chunk_key(0)])
            wait_until(lambda: num_read(server) == 1, "the server has begun to send it")
            assert server.stop() == 0
        assert "Traceback" not in server.log_text()
        with pytest.raises(UnreachableError):
            client.mq.call(Clear(), timeout_seconds=0.1)
