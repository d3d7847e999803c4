"""Storing and retrieving through a real server: both paths, restarts, late and missing replies, and bytes that changed."""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

import msgspec
import pytest

from lmcache.client import kvcache, mq
from lmcache.client.kvcache import KVCacheClient, checksum
from lmcache.errors import ChecksumError, DeadlineError, PoolError, RemoteError, StaleReadError, UnreachableError
from lmcache.keys import KEY_BYTES, chunk_keys
from lmcache.pool import PAGE_BYTES, Presence, client_path
from lmcache.protocol import Clear, EndSession, Evict, FailureReason, Goodbye, HelloReply, NoopReply, PinReport, StoreOutcome
from tests.fakes import Proxy, ScriptedPeer, reply_of, seconds
from tests.pools import content, key, keys, server_in, status_of, wait_until
from tests.server.harness import LAYOUT, namespace
from tests.server_process import LmcacheServer, free_port

STORED = StoreOutcome.RESERVED


@pytest.fixture
def server(tmp_path):
    with server_in(tmp_path) as server:
        yield server


@pytest.fixture(params=[False, True], ids=["mapped", "inline"])
def client(request, server):
    with KVCacheClient(server.endpoints.zmq, inline=request.param) as client:
        assert client.is_inline == request.param
        yield client


def chunks_of(*numbers: int, num_bytes: int = PAGE_BYTES) -> list[bytes]:
    return [content(number, num_bytes) for number in numbers]


def buffers_for(count: int, num_bytes: int = PAGE_BYTES) -> list[bytearray]:
    return [bytearray(num_bytes) for _ in range(count)]


def nothing_is_held(server) -> bool:
    l1 = status_of(server)["l1"]
    return (l1["pins"], l1["reserved_bytes"]) == (0, 0)


# -- both paths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_bytes", [1, 100, PAGE_BYTES, 3 * PAGE_BYTES + 17, 200_000])
def test_what_is_stored_is_retrieved(server, client, num_bytes):
    assert client.store(keys(1, 2, 3), chunks_of(1, 2, 3, num_bytes=num_bytes)) == [STORED] * 3
    buffers = buffers_for(3, num_bytes)
    assert client.retrieve(keys(1, 2, 3), buffers) == 3
    assert buffers == chunks_of(1, 2, 3, num_bytes=num_bytes)
    wait_until(lambda: nothing_is_held(server))


@pytest.mark.parametrize("writer_is_inline", [False, True])
def test_both_paths_see_the_same_chunks(server, client, writer_is_inline):
    with KVCacheClient(server.endpoints.zmq, inline=writer_is_inline) as writer:
        writer.store(keys(1, 2), chunks_of(1, 2), with_checksums=True)
    buffers = buffers_for(3)
    assert client.retrieve(keys(1, 2, 3), buffers, check_content=True) == 2
    assert buffers[:2] == chunks_of(1, 2)
    assert buffers[2] == bytes(PAGE_BYTES)
    assert client.lookup(keys(1, 2, 3), pin=False).hit_chunks == 2


def test_outcomes_come_chunk_by_chunk_on_both_paths(client):
    client.store(keys(2), chunks_of(2))
    assert client.store(keys(1, 2, 3), chunks_of(1, 99, 3)) == [STORED, StoreOutcome.EXISTS, STORED]
    buffers = buffers_for(3)
    assert client.retrieve(keys(1, 2, 3), buffers) == 3
    assert buffers == chunks_of(1, 2, 3), "what was there already stays as it was"


def test_a_prefix_ends_at_the_first_missing_chunk(client):
    client.store(keys(1, 3), chunks_of(1, 3))
    assert client.retrieve(keys(1, 2, 3), buffers_for(3)) == 1
    assert client.retrieve(keys(9), buffers_for(1)) == 0
    assert client.retrieve(b"", []) == 0
    assert client.store(b"", []) == []


def test_ranks_and_parents_travel_on_both_paths(server, client):
    with client.reserve(keys(2), PAGE_BYTES, namespace_id=7, rank=3, parent=key(1)) as reservation:
        reservation.extents[0][:] = content(2, PAGE_BYTES)
        assert reservation.commit() == 1
    assert client.retrieve(keys(2), buffers_for(1)) == 0
    assert client.retrieve(keys(2), buffers_for(1), rank=3) == 1
    [slot] = server.service.storage.l1.slots()
    assert server.service.storage.l1.record(slot).namespace_id == 7


@pytest.mark.parametrize("other", [{"lora": "a"}, {"cache_salt": "b"}, {"multimodal": "c"}])
def test_the_same_tokens_of_another_adapter_tenant_or_image_are_a_miss(client, other):
    """COR-4, from the tokens to the server and back."""
    engine, token_ids = namespace(), list(range(64))
    client.store(chunk_keys(engine, token_ids), chunks_of(1, 2, 3, 4))
    assert client.lookup(chunk_keys(engine, token_ids), pin=False).hit_chunks == 4
    assert client.lookup(chunk_keys(engine.for_request(**other), token_ids), pin=False).hit_chunks == 0
    assert client.retrieve(chunk_keys(engine.for_request(**other), token_ids), buffers_for(4)) == 0


def test_a_batch_larger_than_one_message_is_cut_into_several(server, monkeypatch):
    monkeypatch.setattr(kvcache, "INLINE_BATCH_BYTES", 2 * PAGE_BYTES)
    with KVCacheClient(server.endpoints.zmq, inline=True) as client:
        client.store(keys(*range(5)), chunks_of(*range(5)), with_checksums=True)
        assert client.retrieve(keys(*range(5)), buffers_for(5), check_content=True) == 5
    assert server.service.metrics.value("lmcache_requests", "PUT", "ok") == 3


def test_leaving_a_reservation_without_a_commit_gives_it_back(server, client):
    with client.reserve(keys(1), PAGE_BYTES) as reservation:
        assert reservation.outcomes == [STORED]
    assert nothing_is_held(server)
    with pytest.raises(ZeroDivisionError), client.reserve(keys(1), PAGE_BYTES):
        raise ZeroDivisionError
    assert nothing_is_held(server)
    assert client.lookup(keys(1), pin=False).hit_chunks == 0
    reservation.abort()  # again: nothing happens
    with pytest.raises(ValueError, match="released"):
        reservation.extents[0][:1] = b"x"


def test_views_are_closed_with_what_they_belong_to_and_cannot_be_written(client):
    client.store(keys(1), chunks_of(1))
    with client.pin(keys(1)) as pinned:
        [extent] = pinned.extents
        assert extent.readonly
        assert extent == content(1, PAGE_BYTES)
    with pytest.raises(ValueError, match="released"):
        bytes(extent)


def test_lookup_locks_are_freed_by_range_and_by_session(server, client):
    client.store(keys(*range(4)), chunks_of(*range(4)))
    assert client.lookup(keys(*range(6)), request_id="r").hit_chunks == 4
    assert client.free_lookup_locks("r", start=3) == 1
    assert client.free_lookup_locks("another") == 0
    assert client.end_session("r").released == 3
    assert nothing_is_held(server)


def test_closing_gives_everything_back_and_is_noticed_at_once(server, client):
    client.store(keys(1, 2), chunks_of(1, 2))
    client.lookup(keys(1, 2), request_id="r")
    other = KVCacheClient(server.endpoints.zmq)
    pinned = other.pin(keys(1), "r")
    assert not nothing_is_held(server)
    other.close()
    client.close()
    pinned.release()
    with pytest.raises(UnreachableError, match="closed"):
        other.lookup(keys(1))
    assert nothing_is_held(server)
    assert status_of(server)["clients"] == []


def test_what_is_being_written_when_its_client_is_closed_is_freed_when_it_is_given_back(server):
    client = KVCacheClient(server.endpoints.zmq)
    first, second = client.reserve(keys(3), PAGE_BYTES), client.reserve(keys(4), PAGE_BYTES)
    client.close()
    first.abort()
    assert status_of(server)["l1"]["reserved_bytes"] == 2 * PAGE_BYTES
    second.abort()
    wait_until(lambda: nothing_is_held(server))
    assert status_of(server)["clients"] == []


@pytest.mark.parametrize("who_is_late", ["the heartbeat", "another thread"])
def test_closing_says_goodbye_also_for_a_thread_that_it_turned_away(server, who_is_late):
    """A call that begins while the client closes fails; the server must not go on counting a client that has left."""
    gpu = Gpu()
    client = KVCacheClient(server.endpoints.zmq, heartbeat=True, heartbeat_seconds=0.02, kind="engine-worker")
    client.watch_pins(lambda: gpu.pins)
    client.register(namespace(), LAYOUT)
    wait_until(lambda: told_of(server)[0] == [msgspec.to_builtins(gpu.pins)])
    is_late = threading.Event()

    def look_up():
        with pytest.raises(UnreachableError, match="closed"):
            client.lookup(keys(1))

    def answer_late():
        """Asked by the heartbeat, which has to report the answer to the server, and by `close`."""
        is_late.set()
        wait_until(lambda: client.mq._usable_by is not None)
        if threading.current_thread() is client._heartbeat and who_is_late == "another thread":
            thread = threading.Thread(target=look_up)
            thread.start()
            thread.join()
            return None
        return msgspec.structs.replace(gpu.pins, pinned_bytes=50)

    client.watch_pins(answer_late)
    assert is_late.wait(30)
    client.close()
    assert told_of(server)[0] == []


# -- places that another client was told ------------------------------------------------------------------------------


def look_up_places(client, *numbers):
    lookup = client.start_lookup(keys(*numbers), "r", world_size=1, timeout_seconds=60, places=True)
    wait_until(lambda: lookup.wait(1))
    return lookup.result()


@pytest.fixture
def pair(server):
    """An engine: who looks up, and who reads; both have mapped the pool."""
    with KVCacheClient(server.endpoints.zmq) as scheduler, KVCacheClient(server.endpoints.zmq) as worker:
        scheduler.store(keys(1, 2), chunks_of(1, 2))
        worker.register(namespace(), LAYOUT)
        yield scheduler, worker


def test_chunks_are_read_where_another_clients_lookup_found_them_without_a_message_and_counted(server, pair):
    scheduler, worker = pair
    found = look_up_places(scheduler, 1, 2, 3)
    num_asked = server.service.metrics.value("lmcache_requests", "RETRIEVE", "ok")
    with worker.borrow(found.placements, found.boot) as borrowed:
        assert [bytes(extent) for extent in borrowed.extents] == chunks_of(1, 2)
        assert all(extent.readonly for extent in borrowed.extents)
        borrowed.verify()
    worker.post_report()
    assert status_of(server)["l1"]["pins"] == 2, "they are the lookup's"
    wait_until(lambda: status_of(server)["counters"]["retrieved_chunks"] == 2)
    counters = status_of(server)["counters"]
    assert (counters["retrieved_bytes"], counters["retrieved_tokens"]) == (2 * PAGE_BYTES, 2 * 16)
    assert server.service.metrics.value("lmcache_requests", "RETRIEVE", "ok") == num_asked
    assert scheduler.end_session("r").released == 2


def test_places_whose_chunk_is_gone_are_a_stale_read_and_not_counted(server, pair):
    scheduler, worker = pair
    found = look_up_places(scheduler, 1, 2)
    scheduler.close()  # its pins go
    with worker.borrow(found.placements, found.boot) as borrowed:
        worker.mq.call(Evict(), [keys(2)])
        with pytest.raises(StaleReadError, match="was freed while it was read"):
            borrowed.verify()
    worker.store(keys(3, 4), chunks_of(3, 4))
    with worker.borrow(found.placements, found.boot) as borrowed, pytest.raises(StaleReadError):
        borrowed.verify()
    worker.post_report()
    assert status_of(server)["counters"]["retrieved_chunks"] == 0


def test_places_are_borrowed_only_in_the_life_of_the_server_that_told_them_and_by_who_has_mapped_its_pool(server, pair):
    scheduler, worker = pair
    found = look_up_places(scheduler, 1, 2)
    assert worker.borrow([], found.boot) is None
    assert worker.borrow(found.placements, "0" * 32) is None
    assert worker.borrow(found.placements, "") is None
    outside = [kvcache.Placement(0, 1 << 40, PAGE_BYTES, 0)]
    with pytest.raises(PoolError, match="outside the pool"):
        worker.borrow(outside, found.boot)
    with KVCacheClient(server.endpoints.zmq, inline=True) as remote:
        remote.attach()
        assert remote.borrow(found.placements, found.boot) is None
    with KVCacheClient(server.endpoints.zmq) as new:
        assert new.borrow(found.placements, found.boot) is None, "it was not introduced yet"
    worker.close()
    assert worker.borrow(found.placements, found.boot) is None


def test_a_pool_stays_mapped_while_its_chunks_are_borrowed(server, pair):
    scheduler, worker = pair
    found = look_up_places(scheduler, 1, 2)
    with worker.borrow(found.placements, found.boot) as borrowed:
        worker.close()
        assert [bytes(extent) for extent in borrowed.extents] == chunks_of(1, 2)
        borrowed.verify()
    worker.post_report()  # a closed client tells nothing


def test_whoever_lets_go_of_a_mapping_last_does_not_wait_until_it_is_unpinned_and_unmapped(server, pair):
    scheduler, worker = pair
    found = look_up_places(scheduler, 1, 2)
    may_end = threading.Event()
    worker.watch_mapping(lambda view: lambda: may_end.wait(30))
    borrowed = worker.borrow(found.placements, found.boot)
    worker.close()
    attachment = borrowed._attachment
    borrowed.release()
    assert attachment.view.extent(0, PAGE_BYTES), "it cannot be unmapped before it is unpinned"
    assert not client_path(attachment.view.path, attachment.client_id).exists(), "the server need not wait for that"
    may_end.set()
    attachment.mapping.join(30)
    assert not hasattr(attachment.view, "data")


def test_closing_waits_until_all_its_mappings_are_unpinned_and_unmapped(server):
    client, order = KVCacheClient(server.endpoints.zmq), []
    client.watch_mapping(lambda _: lambda: (time.sleep(0.2), order.append("unpinned")))
    attachments = []
    for _ in range(3):
        attachments.append(client.attach())
        client._retire(attachments[-1])
        client._let_go_of_mapping()
    attachments.append(client.attach())
    client.close()
    assert order == ["unpinned"] * 4
    assert not any(hasattr(attachment.view, "data") for attachment in attachments)


def test_a_pool_stays_mapped_and_pinned_from_one_life_to_the_next_where_it_is_the_same_file(tmp_path):
    """As after a restart over a kept pool, or a moment of silence: to pin 64 GiB anew takes a minute."""
    port, events = free_port(), []

    def watch(view):
        events.append("pinned")
        return lambda: events.append("unpinned")

    with KVCacheClient(f"tcp://127.0.0.1:{port}", heartbeat=True, heartbeat_seconds=0.05) as client:
        client.watch_mapping(watch)
        lives = set()
        for _ in range(2):
            with server_in(tmp_path, port=port, leaves_pool=True, pool_name="kept"):
                wait_until(lambda: client._attachment is not None)
                lives.add((client.attach().client_id, client.attach().boot))
                assert client.store(keys(1), chunks_of(1)) in ([STORED], [StoreOutcome.EXISTS])
                with client.pin(keys(1)) as pinned:
                    assert [bytes(extent) for extent in pinned.extents] == chunks_of(1)
                    assert pinned.are_kept
                    pinned.verify()
            wait_until(lambda: client._attachment is None)
        assert (len(lives), events) == (2, ["pinned"])
        next(tmp_path.glob("lmcache-pool-kept")).unlink()
        wait_until(lambda: events == ["pinned", "unpinned"])  # nobody will serve it again
        with server_in(tmp_path, port=port, leaves_pool=True, pool_name="kept"):
            wait_until(lambda: events == ["pinned", "unpinned", "pinned"])
    assert events == ["pinned", "unpinned", "pinned", "unpinned"]
    next(tmp_path.glob("lmcache-pool-kept")).unlink()


def test_the_pool_of_a_server_that_was_killed_is_let_go_of_although_its_file_is_still_there(tmp_path):
    """Nobody will serve it again; the next server would find no room beside it."""
    undone = threading.Event()
    with (  # in a folder of its own: any server that is started removes what killed ones have left beside its pool
        LmcacheServer(["--pool-dir", str(tmp_path)]) as server,
        KVCacheClient(server.zmq_url, heartbeat=True, heartbeat_seconds=0.05) as client,
    ):
        client.watch_mapping(lambda view: undone.set)
        client.attach()
        os.kill(server.pid, signal.SIGKILL)
        assert undone.wait(30)
        assert Path(server.pool_path).exists()
        server.kill()  # removes it


def test_a_life_that_falls_back_to_the_socket_keeps_no_pool_mapped(server, monkeypatch):
    with KVCacheClient(server.endpoints.zmq) as client:
        mapping = client.attach().mapping
        monkeypatch.setattr(kvcache, "Presence", lambda path, client_id: Presence(path, "f" * 32))
        client._retire(client.attach())
        assert client.is_inline
        mapping.join(30)
        assert mapping.is_undone


@pytest.mark.parametrize("where", ["Attach", "Presence", "watch"])
def test_what_nobody_foresaw_while_introducing_leaves_neither_a_mapping_nor_a_proof_of_life(server, monkeypatch, where):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    with KVCacheClient(server.endpoints.zmq) as client:
        with monkeypatch.context() as patch:
            if where == "watch":
                client._watch = fail
            else:
                patch.setattr(kvcache, where, fail)
            for _ in range(3):
                with pytest.raises(MemoryError):
                    client.attach()
        client._watch = None
        mapping = client._mapping
        client._let_go_of_mapping()
        mapping.join(30)
        assert mapping.is_undone
        wait_until(lambda: not any(known["mapped"] for known in status_of(server)["clients"]))


def test_reports_that_nobody_waits_for_do_not_pile_up_their_replies(server, pair):
    scheduler, worker = pair
    found = look_up_places(scheduler, 1)
    for _ in range(3000):
        with worker.borrow(found.placements, found.boot) as borrowed:
            borrowed.verify()
        worker.post_report()
    # What found no room in a full queue is told with the next report.
    wait_until(lambda: worker.post_report() or status_of(server)["counters"]["retrieved_chunks"] == 3000)
    assert status_of(server)["counters"]["replies_dropped"] == 0


def test_what_was_posted_to_a_life_that_has_ended_is_counted_once_in_the_next(server):
    with KVCacheClient(server.endpoints.zmq, heartbeat=True, heartbeat_seconds=0.02) as client:
        for expected in (3, 6):
            client.mq.call(Goodbye(client=client.attach().client_id))  # the server forgets us, and we do not know
            client.tally.add(failed_blocks={FailureReason.MISSING: 3})
            client.post_report()
            wait_until(lambda: status_of(server)["counters"]["retrieve_failed"]["missing"] == expected)  # noqa: B023
        time.sleep(0.1)
        assert status_of(server)["counters"]["retrieve_failed"]["missing"] == 6


def test_what_was_posted_before_a_client_began_a_new_life_of_its_own_is_counted_once(server):
    """A call that came to no end made it do so; the server had counted the report long before."""
    with KVCacheClient(server.endpoints.zmq, heartbeat=True, heartbeat_seconds=0.3) as client:
        attachment = client.attach()
        client.tally.add(failed_blocks={FailureReason.MISSING: 3})
        client.post_report()
        wait_until(lambda: status_of(server)["counters"]["retrieve_failed"]["missing"] == 3)
        client.note_unreachable(attachment, UnreachableError("the test says so"))
        wait_until(lambda: client._attachment not in (None, attachment))
        time.sleep(0.7)  # two heartbeats
        assert status_of(server)["counters"]["retrieve_failed"]["missing"] == 3


# -- bytes that changed -----------------------------------------------------------------------------------------------


def test_an_extent_that_was_given_away_during_the_copy_is_a_stale_read(server):
    with KVCacheClient(server.endpoints.zmq) as reader, KVCacheClient(server.endpoints.zmq) as other:
        reader.store(keys(1), chunks_of(1), with_checksums=True)
        with reader.pin(keys(1), "r") as pinned:
            pinned.verify(check_content=True)
            other.mq.call(Clear())
            pinned.verify()  # pinned: it stayed
            reader.end_session("r")  # the pin is gone, the reader does not know
            other.mq.call(Clear())
            with pytest.raises(StaleReadError, match="was freed while it was read"):
                pinned.verify()
            other.store(keys(2), chunks_of(2))
            with pytest.raises(StaleReadError):
                pinned.verify(check_content=True)


def test_a_flipped_byte_is_found_by_the_checksum_where_there_is_one(server, client):
    client.store(keys(1), chunks_of(1), with_checksums=True)
    client.store(keys(2), chunks_of(2))
    l1 = server.service.storage.l1
    for number in (1, 2):
        l1.pool.data[l1.placement(l1.find(key(number), 0)).offset + 7] ^= 1
    assert client.retrieve(keys(1), buffers_for(1)) == 1
    with pytest.raises(ChecksumError, match="differs from what was stored"):
        client.retrieve(keys(1), buffers_for(1), check_content=True)
    assert client.retrieve(keys(2), buffers_for(1), check_content=True) == 1, "it was stored without one"
    wait_until(lambda: nothing_is_held(server))


def test_the_checksum_tells_contents_apart_and_is_never_the_sign_for_none():
    assert checksum(b"a") != checksum(b"b")
    assert checksum(b"") != 0
    assert checksum(bytearray(b"abc")) == checksum(memoryview(b"abc")) == checksum(b"abc")


def test_a_buffer_of_another_length_than_the_chunk_is_an_error_and_no_short_read(client):
    client.store(keys(1), chunks_of(1))
    for length in (PAGE_BYTES - 1, PAGE_BYTES + 1):
        with pytest.raises(ValueError, match=r"different structures|not equal"):
            client.retrieve(keys(1), [bytearray(length)])


# -- a server that restarts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inline", [False, True])
@pytest.mark.parametrize(
    "first_call",
    [
        lambda client: client.store(keys(2), chunks_of(2)),
        lambda client: client.retrieve(keys(1), buffers_for(1)),
        lambda client: client.lookup(keys(1), request_id="r"),
        lambda client: client.end_session("r"),
        lambda client: client.free_lookup_locks("r"),
        lambda client: client.reserve(keys(2), PAGE_BYTES).commit(),
    ],
    ids=["store", "retrieve", "lookup", "end_session", "free_lookup_locks", "reserve"],
)
def test_whatever_is_called_first_after_a_restart_works(tmp_path, inline, first_call):
    """LIV-2, without a heartbeat: the server's "unknown client" is enough."""
    port = free_port()
    with KVCacheClient(f"tcp://127.0.0.1:{port}", inline=inline, timeout_seconds=60) as client:
        with server_in(tmp_path, port=port) as server:
            client.store(keys(1), chunks_of(1))
            first_boot = client.attach().boot
        with server_in(tmp_path, port=port) as server:
            first_call(client)
            assert client.attach().boot == status_of(server)["boot"] != first_boot
            assert client.is_inline == inline
            client.close()


def test_a_heartbeat_introduces_and_registers_again_without_being_asked(tmp_path):
    """LIV-2: the engine is idle, the server restarts on the same port."""
    port = free_port()
    url = f"tcp://127.0.0.1:{port}"
    with KVCacheClient(url, heartbeat=True, heartbeat_seconds=0.05, kind="engine-worker") as client:
        boots = set()
        for _ in range(3):
            with server_in(tmp_path, port=port) as server:
                if not boots:
                    wait_until(lambda: client._attachment is not None)
                    client.register(namespace(), LAYOUT)

                def is_registered(server=server) -> bool:
                    return [(c["model"], c["mapped"]) for c in status_of(server)["clients"]] == [("m", True)]

                wait_until(is_registered)
                boots.add(status_of(server)["boot"])
        assert len(boots) == 3


class Gpu:
    """A fake of what a GPU's copier says of the pool that is pinned for it."""

    def __init__(self):
        self.pins = PinReport(pool_bytes=100, pinned_bytes=25)

    def change(self, **fields):
        self.pins = msgspec.structs.replace(self.pins, **fields)


def told_of(server):
    """What the server shows of pinned memory, client by client, and what it has counted."""
    status = status_of(server)
    return [client["gpu_pins"] for client in status["clients"]], status["counters"]["unpinned_copied_bytes"]


def test_a_heartbeat_outlives_what_nobody_foresaw_and_leaves_nothing_behind(server, monkeypatch, caplog):
    """Such as that no thread is to be had: without it the engine would never have a cache again."""
    monkeypatch.setattr(kvcache, "BACKOFF_MAX_SECONDS", 0.1)
    fails = [True, True, False]

    def watch(view):
        if fails.pop(0):
            raise RuntimeError("can't start new thread")
        return lambda: None

    with KVCacheClient(server.endpoints.zmq, heartbeat=True, heartbeat_seconds=0.1) as client:
        wait_until(lambda: client._attachment is not None)
        client._watch = watch
        client._retire(client._attachment)
        wait_until(lambda: not fails)
        wait_until(lambda: client._attachment is not None)
        wait_until(lambda: len(status_of(server)["clients"]) == 1)
    assert "can't start new thread" in caplog.text


def test_what_is_pinned_is_told_when_it_changes_and_nothing_copied_counts_twice(server):
    gpu = Gpu()
    with KVCacheClient(server.endpoints.zmq, heartbeat=True, heartbeat_seconds=0.02, kind="engine-worker") as client:
        client.watch_pins(lambda: gpu.pins)
        client.register(namespace(), LAYOUT, backend="cuda, Triton")
        wait_until(lambda: told_of(server) == ([msgspec.to_builtins(gpu.pins)], 0))
        gpu.change(pinned_bytes=60, unpinned_bytes=40, unpinned_copied_bytes=7)
        wait_until(lambda: told_of(server) == ([msgspec.to_builtins(gpu.pins)], 7))
        wait_until(lambda: client._new_pins(client.present()) is None)
        client._retire(client.present())  # another introduction to the same server
        wait_until(lambda: told_of(server)[0] == [{**msgspec.to_builtins(gpu.pins), "unpinned_copied_bytes": 0}])
        gpu.change(unpinned_copied_bytes=12)
        wait_until(lambda: told_of(server)[1] == 12)
        gpu.change(unpinned_copied_bytes=20)
    assert told_of(server) == ([], 20), "told at the latest when the engine leaves"


def test_a_client_whose_copies_need_nothing_pinned_tells_nothing(server):
    with KVCacheClient(server.endpoints.zmq, heartbeat=True, heartbeat_seconds=0.02) as client:
        client.register(namespace(), LAYOUT)
        time.sleep(0.1)
        assert told_of(server) == ([None], 0)


def test_a_pool_that_is_served_again_gives_its_chunks_to_a_client_that_stayed(tmp_path):
    port = free_port()
    with KVCacheClient(f"tcp://127.0.0.1:{port}", timeout_seconds=60) as client:
        with server_in(tmp_path, leaves_pool=True, port=port, pool_name="kept"):
            client.store(keys(1, 2), chunks_of(1, 2), with_checksums=True)
        with server_in(tmp_path, leaves_pool=True, port=port, pool_name="kept") as server:
            buffers = buffers_for(2)
            assert client.retrieve(keys(1, 2), buffers, check_content=True) == 2
            assert buffers == chunks_of(1, 2)
            assert status_of(server)["l1"]["adopted_chunks"] == 2
            client.close()
    (tmp_path / "lmcache-pool-kept").unlink()


def test_an_extent_being_written_when_the_server_restarts_is_given_to_nobody(tmp_path):
    """COR: the writer is alive and knows nothing of the restart."""
    port = free_port()
    url = f"tcp://127.0.0.1:{port}"
    settings = {"leaves_pool": True, "port": port, "pool_name": "kept", "eviction_watermark": 1.0}
    with KVCacheClient(url, timeout_seconds=60) as writer, KVCacheClient(url, timeout_seconds=60) as other:
        with server_in(tmp_path, **settings):
            reservation = writer.reserve(keys(1), PAGE_BYTES)
            offset = reservation._placements[0].offset
        with server_in(tmp_path, **settings) as server:
            pages = server.service.storage.l1.capacity_pages
            for number in range(10, 10 + pages):
                other.store(keys(number), chunks_of(number))
            offsets = {server.service.storage.l1.placement(slot).offset for slot in server.service.storage.l1.slots()}
            assert len(offsets) == pages - 1
            assert offset not in offsets
            reservation.extents[0][:] = bytes(PAGE_BYTES)
            with pytest.raises(RemoteError, match="not known to this server"):
                reservation.commit()
            writer.lookup(keys(1), "r")  # introduces itself anew: the old life's lock is gone
            wait_until(lambda: nothing_is_held(server))
            writer.close()
            other.close()
    (tmp_path / "lmcache-pool-kept").unlink()


def test_a_chunk_is_kept_for_a_while_when_its_pin_is_taken_but_not_when_it_is_given_back(server, monkeypatch):
    monkeypatch.setattr("lmcache.storage.l1.KEPT_SECONDS", 600.0)
    with KVCacheClient(server.endpoints.zmq) as client, KVCacheClient(server.endpoints.zmq) as other:
        other.store(keys(1, 2), chunks_of(1, 2))
        pinned = {name: client.pin(keys(number), name) for name, number in (("taken", 1), ("given back", 2))}
        assert all(one.are_kept for one in pinned.values())
        other.mq.call(EndSession(request_id="taken"))
        client.end_session("given back")
        assert other.mq.call(Evict(), [keys(1, 2)]).objects == 1
        pinned["taken"].verify()
        assert not pinned["taken"].are_kept  # for how long is not sure
        with pytest.raises(StaleReadError):
            pinned["given back"].verify()
        for one in pinned.values():
            one.release()


@pytest.mark.parametrize("for_ever", [False, True])
def test_places_that_may_still_be_written_when_their_client_leaves_are_given_to_nobody(server, for_ever):
    """Else the device's late bytes would land in another's chunk, which nothing would notice."""
    with KVCacheClient(server.endpoints.zmq, heartbeat=True) as writer, KVCacheClient(server.endpoints.zmq) as other:
        reservation = writer.reserve(keys(1), PAGE_BYTES)
        if for_ever:
            reservation.keep_for_ever()
        writer.close()
        time.sleep(1.5)  # the server looks after its clients twice a second
        numbers = range(10, 9 + server.service.storage.l1.capacity_pages)
        assert other.store(keys(*numbers), chunks_of(*numbers)) == [STORED] * len(numbers)
        assert other.store(keys(5), chunks_of(5)) == [STORED]  # in the place of another
        reservation.extents[0][:] = b"\xbb" * PAGE_BYTES
        found = {number: buffers_for(1) for number in (5, *numbers)}
        for number in [number for number, buffers in found.items() if not other.retrieve(keys(number), buffers)]:
            del found[number]  # was evicted
        assert found == {number: chunks_of(number) for number in found}
        assert 5 in found
        assert status_of(server)["l1"]["reserved_bytes"] == PAGE_BYTES
        if for_ever:
            reservation._is_open = True  # as the process's end would
        reservation.abort()
        wait_until(lambda: not status_of(server)["l1"]["reserved_bytes"])


# -- replies that come late or never ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["reserve", "pin", "lookup"])
def test_what_a_late_reply_grants_is_given_back_while_that_life_of_the_client_goes_on(server, verb):
    """Another thread is still at work with what it was granted, so the lock stays: the reply itself must be undone."""
    with KVCacheClient(server.endpoints.zmq) as helper, Proxy(server.endpoints.zmq) as proxy:
        helper.store(keys(1), chunks_of(1))
        with KVCacheClient(proxy.url, timeout_seconds=60) as client, client.reserve(keys(7), PAGE_BYTES) as busy:
            proxy.hold.set()
            client.mq.timeout_seconds = 0.3
            late = {
                "reserve": lambda: client.reserve(keys(2), PAGE_BYTES),
                "pin": lambda: client.pin(keys(1), "r"),
                "lookup": lambda: client.lookup(keys(1), "r"),
            }
            with pytest.raises(DeadlineError):
                late[verb]()
            wait_until(lambda: proxy.held)
            proxy.hold.clear()
            client.mq.timeout_seconds = 60
            assert client.lookup(keys(1), pin=False).hit_chunks == 1

            def only_the_other_reservation_is_held() -> bool:
                l1 = status_of(server)["l1"]
                return (l1["pins"], l1["reserved_bytes"]) == (0, PAGE_BYTES)

            wait_until(only_the_other_reservation_is_held)
            busy.extents[0][:] = content(7, PAGE_BYTES)
            assert busy.commit() == 1


def test_the_late_answer_to_a_lookup_takes_no_pins_of_the_requests_next_one(server):
    """An engine did not wait for the first, and freed what it may have pinned; the answer is read only now."""
    with KVCacheClient(server.endpoints.zmq) as helper, Proxy(server.endpoints.zmq) as proxy:
        helper.store(keys(1), chunks_of(1))
        with KVCacheClient(proxy.url, timeout_seconds=60) as client:
            client.attach()
            proxy.hold.set()
            first = client.start_lookup(keys(1), "r", 1, 60.0)
            wait_until(lambda: proxy.held)
            first.abandon()
            client.post_free_lookup_locks("r")
            proxy.hold.clear()
            second = client.start_lookup(keys(1), "r", 1, 60.0)
            assert second.result().l1_chunks == 1
            assert client.lookup(keys(1), pin=False).hit_chunks == 1  # after what may have been posted
            assert status_of(server)["l1"]["pins"] == 1
            client.end_session("r")


@pytest.mark.parametrize("verb", ["reserve", "pin", "commit", "abort", "release"])
def test_what_a_lost_message_leaves_at_the_server_is_freed_although_the_client_lives_on(server, verb):
    """The reply never comes. The client ends that life of its own, and the server sees the lock go."""
    with KVCacheClient(server.endpoints.zmq) as helper, Proxy(server.endpoints.zmq) as proxy:
        helper.store(keys(1), chunks_of(1))
        with KVCacheClient(proxy.url, timeout_seconds=60) as client:
            reservation = client.reserve(keys(2), PAGE_BYTES) if verb in ("commit", "abort") else None
            pinned = client.pin(keys(1), "r") if verb == "release" else None
            client.attach()
            first = client.attach().client_id
            proxy.drop.set()
            client.mq.timeout_seconds = 0.3
            if reservation is not None and verb == "commit":
                with pytest.raises(DeadlineError):
                    reservation.commit()
            elif reservation is not None:
                reservation.abort()
            elif pinned is not None:
                pinned.release()
            else:
                with pytest.raises(DeadlineError):
                    client.reserve(keys(3), PAGE_BYTES) if verb == "reserve" else client.pin(keys(1), "r")
            proxy.drop.clear()
            client.mq.timeout_seconds = 60
            assert client.lookup(keys(1), pin=False).hit_chunks == 1
            wait_until(lambda: nothing_is_held(server))
            if verb != "release":
                assert client.attach().client_id != first


def test_a_server_that_hangs_is_noticed_by_the_heartbeat_and_calls_then_fail_at_once(server):
    with (
        Proxy(server.endpoints.zmq) as proxy,
        KVCacheClient(proxy.url, heartbeat=True, heartbeat_seconds=0.05) as client,
    ):
        client.store(keys(1), chunks_of(1))
        proxy.hold.set()
        client.mq.timeout_seconds = 0.5
        wait_until(lambda: client._down_reason)
        client.mq.timeout_seconds = 60
        for call in (
            lambda: client.lookup(keys(1)),
            lambda: client.store(keys(2), chunks_of(2)),
            lambda: client.retrieve(keys(1), buffers_for(1)),
        ):
            with pytest.raises(UnreachableError, match="no reply"):
                call()
        proxy.hold.clear()

        def is_served_again() -> bool:
            with contextlib.suppress(UnreachableError):  # a heartbeat that a busy machine delays is one more try
                return client.retrieve(keys(1), buffers_for(1)) == 1
            return False

        wait_until(is_served_again)


def test_many_threads_that_find_the_server_hanging_wait_for_one_deadline_and_not_for_each_other():
    """Each call ends by its deadline, although only one of them can introduce the client."""
    with ScriptedPeer(lambda op: None) as peer, KVCacheClient(peer.url, timeout_seconds=2) as client:
        errors = []

        def ask() -> None:
            try:
                client.lookup(keys(1))
            except UnreachableError as error:
                errors.append(error)

        threads = [threading.Thread(target=ask) for _ in range(20)]

        def all_of_them() -> None:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)

        assert seconds(all_of_them) < 30  # one after the other they would take 40
        assert len(errors) == 20


def test_an_engine_that_was_given_the_servers_http_port_is_told_so_also_where_it_was_there_first(tmp_path):
    """VER-3: by the heartbeat, which looks at what answers there."""
    port = free_port()
    with KVCacheClient(f"tcp://127.0.0.1:{port}", heartbeat=True, heartbeat_seconds=0.05, timeout_seconds=0.2) as client:
        wait_until(lambda: client._down_reason)
        with server_in(tmp_path, no_http=False, http_port=port):
            wait_until(lambda: "speaks HTTP, not ZMQ" in client._down_reason)
            with pytest.raises(UnreachableError, match="speaks HTTP, not ZMQ"):
                client.lookup(keys(1))


def test_no_server_at_all_is_an_error_by_the_deadline():
    with KVCacheClient(f"tcp://127.0.0.1:{free_port()}", timeout_seconds=0.3) as client:
        with pytest.raises(UnreachableError, match="no connection"):
            client.lookup(keys(1))
        with pytest.raises(UnreachableError, match="no connection"):
            client.store(keys(1), chunks_of(1))


@pytest.mark.parametrize("silent_on", ["HELLO", "NOOP", "ATTACH", "REGISTER_KV_CACHE"])
def test_closing_is_quick_whichever_reply_the_heartbeat_waits_for(tmp_path, silent_on):
    """The heartbeat's thread must not be using its socket when that is closed."""
    hello = HelloReply(client="0" * 32, chunk_size=16, lease_seconds=15)

    def answer(op: str) -> list[bytes] | None:
        if op == silent_on:
            return None
        return reply_of(msgspec.structs.replace(hello) if op == "HELLO" else NoopReply())

    with ScriptedPeer(answer) as peer:
        client = KVCacheClient(peer.url, heartbeat=True, heartbeat_seconds=0.01, timeout_seconds=60)
        wait_until(lambda: len(peer.ops) >= 2 or silent_on in peer.ops)
        assert seconds(client.close) < 30
        assert client._heartbeat is not None
        assert not client._heartbeat.is_alive()


def test_closing_a_client_of_a_server_that_hangs_is_quick(server):
    with Proxy(server.endpoints.zmq) as proxy:
        client = KVCacheClient(proxy.url, heartbeat=True, timeout_seconds=60)
        client.store(keys(1), chunks_of(1))
        proxy.hold.set()
        assert seconds(client.close) < 30


# -- closing as a finalizer, which garbage collection runs in any thread -----------------------------------------------


def beating(server, **options) -> KVCacheClient:
    client = KVCacheClient(server.endpoints.zmq, heartbeat=True, heartbeat_seconds=0.02, **options)
    wait_until(lambda: client._attachment is not None)
    return client


def test_a_client_closed_by_its_own_heartbeat_leaves(server):
    closed = threading.Event()

    def close_it(client: KVCacheClient) -> None:
        client.close()
        closed.set()

    client = KVCacheClient(server.endpoints.zmq, heartbeat=True, on_beat=close_it)
    assert closed.wait(60)
    wait_until(lambda: not client._heartbeat.is_alive())
    assert status_of(server)["clients"] == []


def test_a_client_closed_within_its_heartbeats_request_leaves(server, monkeypatch):
    client = beating(server)
    closed = threading.Event()
    receive = mq._Channel._receive

    def close_first(channel: mq._Channel, timeout_ms: int) -> object:
        if threading.current_thread() is client._heartbeat and not closed.is_set():
            client.close()
            closed.set()
        return receive(channel, timeout_ms)

    monkeypatch.setattr(mq._Channel, "_receive", close_first)
    assert closed.wait(60)
    wait_until(lambda: not client._heartbeat.is_alive())


def test_a_client_closed_within_its_introduction_keeps_none(server):
    client = KVCacheClient(server.endpoints.zmq)
    client._watch = lambda view: client.close() or (lambda: None)
    with pytest.raises(UnreachableError, match="is closed"):
        client.attach()


def test_a_client_can_be_closed_where_its_locks_are_held(server):
    client = beating(server)

    def close() -> None:
        with client._lock, client._pause, client.tally._lock, client._attachment._lock, client._mapping._lock:
            client.close()

    closer = threading.Thread(target=close, daemon=True)
    closer.start()
    closer.join(60)
    assert not closer.is_alive()
    assert status_of(server)["clients"] == []


def test_a_client_closed_by_the_thread_that_unmaps_its_pool_does_not_wait_for_that(server, monkeypatch):
    monkeypatch.setattr(kvcache, "UNMAP_SECONDS", 3600.0)
    closed = threading.Event()
    client = beating(server)
    client.watch_mapping(lambda view: lambda: client.close() or closed.set())
    client._let_go_of_mapping()
    client._retire(client._attachment)
    assert closed.wait(60)
    wait_until(lambda: not client._heartbeat.is_alive())


# -- a pool that cannot be mapped -------------------------------------------------------------------------------------


def test_a_pool_that_cannot_be_mapped_is_used_over_the_socket_and_that_is_told_once(server, monkeypatch, caplog):
    def refuse(*args: object) -> None:
        raise PoolError("no such file: another container", "mount it")

    monkeypatch.setattr("lmcache.client.mapping.PoolView", refuse)
    with KVCacheClient(server.endpoints.zmq) as client:
        assert client.is_inline
        assert client.store(keys(1), chunks_of(1)) == [STORED]
        assert client.retrieve(keys(1), buffers_for(1)) == 1
        assert [known["mapped"] for known in status_of(server)["clients"]] == [False]
        client._retire(client.attach())
        assert client.is_inline  # introduced anew
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["using the socket for chunks, the pool cannot be mapped: no such file: another container; hint: mount it"]


def test_a_presence_that_the_server_does_not_see_is_used_over_the_socket(server, monkeypatch):
    monkeypatch.setattr(kvcache, "Presence", lambda path, client_id: Presence(path, "f" * 32))
    with KVCacheClient(server.endpoints.zmq) as client:
        assert client.is_inline
        assert client.store(keys(1), chunks_of(1)) == [STORED]


def test_a_placement_outside_the_pool_is_refused_before_anything_is_touched(server, monkeypatch):
    """A server that lies, or a pool that is another one's."""
    with KVCacheClient(server.endpoints.zmq) as client:
        client.store(keys(1), chunks_of(1))
        monkeypatch.setattr(
            type(server.service.storage.l1),
            "placement",
            lambda self, slot: kvcache.Placement(slot, 1 << 40, PAGE_BYTES, 0),
        )
        with pytest.raises(PoolError, match="outside the pool"):
            client.retrieve(keys(1), buffers_for(1))
        monkeypatch.undo()
        assert client.retrieve(keys(1), buffers_for(1)) == 1


def test_evicting_from_outside_makes_a_miss_and_no_error(server, client):
    client.store(keys(1, 2), chunks_of(1, 2))
    client.mq.call(Evict(), [keys(2)])
    assert client.retrieve(keys(1, 2), buffers_for(2)) == 1


def test_keys_are_sent_whole(client):
    with pytest.raises(RemoteError, match="not a multiple of 32") as caught:
        client.lookup(bytes(KEY_BYTES + 1))
    assert caught.value.code == "bad_keys"
