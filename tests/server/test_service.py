"""What every operation means, and what a bad request costs: an error to its sender, nothing to the server."""

import os
import threading

import msgspec
import pytest

from lmcache import __version__
from lmcache.errors import RemoteError
from lmcache.pool import KEPT_SECONDS, PAGE_BYTES, taken_generation
from lmcache.protocol import (
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    Abort,
    Attach,
    Clear,
    Commit,
    EndSession,
    Evict,
    FindWorkers,
    FreeLookupLocks,
    Get,
    GetChunkSize,
    Goodbye,
    Hello,
    Lookup,
    Noop,
    PinReport,
    Placement,
    Put,
    RegisterKVCache,
    Release,
    Report,
    Retrieve,
    Store,
    StoreOutcome,
    UnregisterKVCache,
)
from lmcache.server.service import GONE_LOG_SECONDS, MAX_COPIED_BYTES, MAX_GET_BYTES
from lmcache.storage.manager import MAX_ENTRIES_PER_SLICE
from tests.pools import content, key, keys, wait_until
from tests.server.harness import CHUNK_SIZE, LAYOUT, LEASE_SECONDS, PIN_TIMEOUT_SECONDS, as_builtins, namespace, service_in

NOBODY = "0" * 32


# -- who is there -----------------------------------------------------------------------------------------------------


def test_noop_tells_what_the_server_is(service):
    service.clock.now += 7
    reply = service.call(Noop())
    assert (reply.version, reply.engine_type, reply.problems) == (__version__, "default", [])
    assert (reply.min_protocol, reply.max_protocol) == (1, 1)
    assert (reply.zmq_endpoint, reply.http_endpoint) == ("tcp://127.0.0.1:1", "http://127.0.0.1:2")
    assert reply.uptime_seconds == 7
    assert service.call(GetChunkSize()).chunk_size == CHUNK_SIZE


def test_every_reply_names_the_servers_life_also_an_error(service):
    boot = service.pool.header.boot_id.hex()
    for answers in (
        service.send(Noop()),
        service.send(Noop(client=NOBODY)),
        service.send_raw(b"junk"),
        service.send(Clear(force=True)),
    ):
        assert [answer.reply.boot for answer in answers] == [boot]


def test_clients_get_ids_of_their_own_and_the_features_that_both_have(service):
    replies = [service.call(Hello(kind="x", features=features)) for features in (7, 2, 2**40)]
    assert len({reply.client for reply in replies}) == 3
    assert [reply.features for reply in replies] == [7, 2, 0]
    assert all(reply.pool_path == str(service.pool.path) for reply in replies)
    assert all(reply.lease_seconds == LEASE_SECONDS for reply in replies)
    for reply in replies:
        service.call(Goodbye(client=reply.client))
    assert service.sessions.clients == {}


@pytest.mark.parametrize(
    "request_",
    [
        Noop(client=NOBODY),
        Attach(client=NOBODY, cookie=bytes(16)),
        Goodbye(client=NOBODY),
        RegisterKVCache(client=NOBODY, namespace=namespace(), layout=LAYOUT),
        UnregisterKVCache(client=NOBODY),
        Lookup(client=NOBODY),
        FreeLookupLocks(client=NOBODY, request_id="r"),
        EndSession(client=NOBODY, request_id="r"),
        Store(client=NOBODY, chunk_bytes=1),
        Commit(client=NOBODY, placements=[]),
        Abort(client=NOBODY, placements=[]),
        Retrieve(client=NOBODY),
        Release(client=NOBODY, placements=[]),
        Put(client=NOBODY),
        Get(client=NOBODY),
    ],
    ids=lambda request: type(request).__name__,
)
def test_an_unknown_client_is_told_to_say_hello_first(service, request_):
    with pytest.raises(RemoteError, match="not known to this server") as caught:
        service.call(request_, [keys(1)])
    assert caught.value.code == "unknown_client"
    assert "HELLO" in caught.value.hint


def test_a_wrong_cookie_and_a_missing_presence_keep_a_client_from_attaching(service):
    client = service.client(mapped=False)
    assert service.code_of(Attach(client=client.id, cookie=bytes(16))) == "wrong_pool"
    assert service.code_of(Attach(client=client.id, cookie=service.pool.header.cookie)) == "no_presence"
    service.pool.client_path(client.id).write_bytes(b"")
    assert service.code_of(Attach(client=client.id, cookie=service.pool.header.cookie)) == "no_presence"


def test_a_client_whose_presence_file_was_removed_lives_on_until_it_dies(service):
    """Logging out may clear a user's /dev/shm (RemoveIPC= of systemd); what still writes must not lose its places."""
    client = service.client()
    client.reserve(1)
    service.pool.client_path(client.id).unlink()
    service.pass_time(1.0)
    assert client.id in service.sessions.clients
    assert service.storage.l1.num_reserved == 1
    client.die()
    service.pass_time(1.0)
    assert client.id not in service.sessions.clients
    assert service.storage.l1.num_reserved == 0


def test_a_client_that_has_not_attached_may_not_reserve_commit_or_retrieve(service):
    """Its places would be freed by nobody when it dies, and it cannot write them."""
    client = service.client(mapped=False)
    for request in (
        Store(client=client.id, chunk_bytes=1),
        Commit(client=client.id, placements=[]),
        Retrieve(client=client.id),
    ):
        assert service.code_of(request, [keys(1)]) == "not_attached"
    assert service.storage.l1.used_pages == 0


def test_goodbye_takes_pins_reservations_registration_and_file_along(service):
    client = service.client()
    client.store(1, 2)
    client.reserve(3)
    service.call(Lookup(client=client.id, request_id="r"), [keys(1, 2)])
    service.call(Retrieve(client=client.id, request_id="r"), [keys(1)])
    client.register()
    assert service.pins == 3
    client.leave()
    assert service.pins == service.storage.l1.num_reserved == 0
    assert service.code_of(Goodbye(client=client.id)) == "unknown_client"
    assert not service.pool.client_path(client.id).exists()
    assert [model["live"] for model in service.status()["models"]] == [False]


# -- registration -----------------------------------------------------------------------------------------------------


def test_registering_tells_what_a_token_weighs_and_how_many_fit(service, caplog):
    reply = service.client().register()
    assert [record.message for record in caplog.records if "KV a token" in record.message] == [
        "m rank 0 of 1: 0.2 KiB of KV a token; L1 holds 512 tokens of it: 0.0 sessions of 32K or 0.0 of 128K tokens"
    ]
    assert as_builtins(reply) == {"bytes_per_token": PAGE_BYTES // 16, "l1_tokens": 32 * 16}
    [model] = service.status()["models"]
    assert (model["ranks"], model["world_size"], model["live"], model["l1_tokens"]) == ([0], 1, True, 32 * 16)
    assert model["namespace"]["model"] == "m"
    assert model["namespace_id"] == namespace().id


def test_all_ranks_of_an_engine_count_for_what_a_token_weighs(service):
    for rank in range(2):
        reply = service.client().register(rank=rank, world_size=2)
        assert as_builtins(reply) == {"bytes_per_token": PAGE_BYTES // 16, "l1_tokens": 16 * 16}
    [model] = service.status()["models"]
    assert (model["ranks"], model["bytes_per_token"]) == ([0, 1], PAGE_BYTES // 8)


def test_ranks_that_hold_the_same_kv_weigh_once_and_their_tokens_count_once(service):
    ranks = [service.client() for _ in range(2)]
    for rank, client in enumerate(ranks):
        reply = client.register(rank=rank, world_size=2, num_shards=1)
        assert as_builtins(reply) == {"bytes_per_token": PAGE_BYTES // 16, "l1_tokens": 32 * 16}
    [model] = service.status()["models"]
    assert (model["ranks"], model["world_size"], model["bytes_per_token"]) == ([0, 1], 2, PAGE_BYTES // 16)
    ranks[0].store(1, 2)
    for client in ranks:
        assert len(service.call(Retrieve(client=client.id, request_id="r"), [keys(1, 2)]).placements) == 2
        service.call(Report(client=client.id, loaded_chunks=1))
    counted = [service.value(f"retrieved_{what}") for what in ("chunks", "tokens")]
    assert counted == [6, 3 * CHUNK_SIZE]


def test_an_engine_that_comes_back_with_another_number_of_ranks_shows_those(service):
    for world_size in (8, 2, 16):
        ranks = [service.client() for _ in range(world_size)]
        for rank, client in enumerate(ranks):
            client.register(rank=rank, world_size=world_size, num_shards=1)
            [model] = service.status()["models"]
            assert (model["ranks"], model["world_size"]) == ([*range(rank + 1)], world_size)
        for client in ranks:
            client.leave()


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"layout": msgspec.structs.replace(LAYOUT, num_layers=3)}, "layout_mismatch"),
        ({"world_size": 3, "namespace": namespace(world_size=2)}, "layout_mismatch"),
        ({"rank": 1}, "bad_field"),
        ({"namespace": msgspec.structs.replace(namespace(), chunk_size=32)}, "chunk_size"),
    ],
)
def test_a_registration_that_contradicts_itself_or_the_server_is_refused(service, changes, code):
    client = service.client()
    fields = {"client": client.id, "namespace": namespace(), "layout": LAYOUT, **changes}
    assert service.code_of(RegisterKVCache(**fields)) == code
    assert service.status()["models"] == []


@pytest.mark.parametrize(
    "changes",
    [{"block_size": 5}, {"block_size": 32}, {"block_bytes": MAX_CHUNK_BYTES}, {"num_layers": 65536, "block_bytes": 2**40}],
)
def test_a_layout_whose_chunk_cannot_be_is_refused(service, changes):
    layout = msgspec.structs.replace(LAYOUT, **changes)
    client = service.client()
    wanted = msgspec.structs.replace(namespace(), layout=layout.fingerprint)
    with pytest.raises(RemoteError) as caught:
        service.call(RegisterKVCache(client=client.id, namespace=wanted, layout=layout))
    assert caught.value.code == "chunk_size"
    assert caught.value.hint


def test_an_engine_may_not_store_chunks_of_another_length_than_it_registered(service):
    """COR-6, on either way in."""
    client = service.client()
    client.register()
    assert service.code_of(Store(client=client.id, chunk_bytes=PAGE_BYTES - 1), [keys(1)]) == "chunk_bytes"
    assert service.code_of(Put(client=client.id), [keys(1), b"short"]) == "chunk_bytes"
    client.store(1)
    assert service.call(Put(client=client.id), [keys(2), bytes(PAGE_BYTES)]).outcomes == [0]
    service.call(UnregisterKVCache(client=client.id))
    client.store(3, num_bytes=5)


# -- store ------------------------------------------------------------------------------------------------------------


def test_a_store_is_seen_by_others_only_after_its_commit(service):
    writer, reader = service.client(), service.client()
    placements = writer.reserve(1, 2)
    assert service.call(Lookup(), [keys(1, 2)]).hit_chunks == 0
    assert service.call(Retrieve(client=reader.id), [keys(1)]).placements == []
    service.call(Commit(client=writer.id, placements=placements))
    assert service.call(Lookup(), [keys(1, 2)]).hit_chunks == 2
    assert service.call(Retrieve(client=reader.id), [keys(1)]).placements == placements[:1]


def test_each_chunk_of_a_store_has_its_outcome(service):
    one, other = service.client(), service.client()
    one.store(1)
    one.reserve(2)
    reply = service.call(Store(client=other.id, chunk_bytes=PAGE_BYTES), [keys(1, 2, 3)])
    assert reply.outcomes == [StoreOutcome.EXISTS, StoreOutcome.BUSY, StoreOutcome.RESERVED]
    assert len(reply.placements) == 1


def test_anothers_reservation_can_be_neither_committed_nor_aborted(service):
    owner, thief = service.client(), service.client()
    placements = owner.reserve(1)
    reply = service.call(Commit(client=thief.id, placements=placements))
    assert (reply.committed, reply.rejected) == (0, [placements[0].slot])
    service.call(Abort(client=thief.id, placements=placements))
    assert service.storage.l1.num_reserved == 1
    assert service.call(Commit(client=owner.id, placements=placements)).committed == 1


def test_an_abort_of_long_ago_leaves_a_newer_reservation_of_the_same_slot_alone(service):
    """A late reply's ABORT may come after the place was given back and taken again."""
    client = service.client()
    old = client.reserve(1)
    service.call(Abort(client=client.id, placements=old))
    new = client.reserve(2)
    assert new[0].slot == old[0].slot
    service.call(Abort(client=client.id, placements=old))
    assert service.call(Commit(client=client.id, placements=new)).committed == 1
    again = client.reserve(3)
    service.call(Abort(client=client.id, placements=old))
    client.die()
    service.pass_time(1)
    assert service.storage.l1.num_reserved == 0, f"{again} is owned by nobody any more"


@pytest.mark.parametrize("change", [{"offset": 4096}, {"length": 1}, {"length": MAX_CHUNK_BYTES}, {"generation": 1}])
def test_a_placement_that_is_not_what_was_given_is_not_committed(service, change):
    client = service.client()
    [place] = client.reserve(1)
    forged = msgspec.structs.replace(place, **change)
    reply = service.call(Commit(client=client.id, placements=[forged]))
    assert (reply.committed, reply.rejected) == (0, [place.slot])
    assert service.value("stored_bytes") == 0
    assert service.storage.l1.num_reserved == 1


def test_a_placement_given_twice_is_committed_and_counted_once(service):
    client = service.client()
    [place] = client.reserve(1)
    assert service.call(Commit(client=client.id, placements=[place, place])).committed == 1
    assert service.value("stored_chunks") == 1
    assert service.value("stored_bytes") == PAGE_BYTES


def test_a_reply_that_cannot_be_sent_takes_back_what_it_granted(service):
    client = service.client()
    client.store(1)
    service.send(Store(client=client.id, chunk_bytes=PAGE_BYTES), [keys(2, 3)], delivered=False)
    service.call(Lookup(client=client.id, request_id="r"), [keys(1)])
    service.send(Lookup(client=client.id, request_id="r"), [keys(1)], delivered=False)
    assert service.pins == 1
    service.call(FreeLookupLocks(client=client.id, request_id="r"))
    service.send(Lookup(client=client.id, request_id="r"), [keys(1)], delivered=False)
    service.send(Retrieve(client=client.id, request_id="r"), [keys(1)], delivered=False)
    service.send(Get(client=client.id), [keys(1)], delivered=False)
    service.send(Hello(kind="lost"), delivered=False)
    assert service.pins == service.storage.l1.num_reserved == 0
    assert [known.id for known in service.sessions.clients.values()] == [client.id]
    assert service.sessions.num_sessions == 0
    assert service.value("replies_dropped") == 6


def test_lookups_whose_pins_are_all_free_are_forgotten_while_their_request_goes_on(service):
    client = service.client()
    client.store(1, 2)
    service.call(Lookup(client=client.id, request_id="r"), [keys(1, 2)])
    for delivered, request in [(True, FreeLookupLocks(client=client.id, request_id="r", end=1))] * 3 + [(False, Noop())] * 3:
        service.send(Lookup(client=client.id, request_id="r"), [keys(1)], delivered=delivered)
        service.call(request)
    [session] = service.sessions.clients[client.id].sessions.values()
    assert (service.pins, len(session.lookups)) == (1, 1)


# -- the inline path --------------------------------------------------------------------------------------------------


def test_chunks_put_inline_are_read_inline_and_mapped_alike(service):
    remote, local = service.client(mapped=False), service.client()
    chunks = [content(number, 5000) for number in (1, 2)]
    reply = service.call(Put(client=remote.id, checksums=[7, 8]), [keys(1, 2), *chunks])
    assert reply.outcomes == [StoreOutcome.RESERVED] * 2
    [answer] = service.send(Get(client=remote.id), [keys(1, 2, 3)])
    assert [bytes(frame) for frame in answer.payload] == chunks
    assert as_builtins(answer.reply) == {"lengths": [5000, 5000], "checksums": [7, 8]}
    answer.done()
    places = service.call(Retrieve(client=local.id), [keys(1, 2)]).placements
    assert [bytes(service.pool.data[place.offset : place.offset + place.length]) for place in places] == chunks
    assert [place.checksum for place in places] == [7, 8]


def test_chunks_on_their_way_to_a_reader_stay_until_the_socket_lets_go(service):
    client = service.client(mapped=False)
    service.call(Put(client=client.id), [keys(1), content(1, 100)])
    [answer] = service.send(Get(client=client.id), [keys(1)])
    assert service.storage.l1.num_pins == 1
    assert service.call(Clear()).kept_objects == 1
    answer.done()
    assert service.storage.l1.num_pins == 0


def test_a_reader_cannot_write_the_pool_through_what_it_gets(service):
    client = service.client(mapped=False)
    service.call(Put(client=client.id), [keys(1), b"x"])
    [answer] = service.send(Get(client=client.id), [keys(1)])
    assert answer.payload[0].readonly
    answer.done()


def test_one_get_carries_a_bounded_number_of_bytes_and_at_least_one_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("lmcache.server.service.MAX_GET_BYTES", 10_000)
    assert MAX_GET_BYTES >= 32 << 20
    with service_in(tmp_path, monkeypatch) as service:
        client = service.client(mapped=False)
        service.call(Put(client=client.id), [keys(1, 2, 3, 4), bytes(20_000), *[bytes(4000)] * 3])
        for numbers, count in (((1, 2, 3, 4), 1), ((2, 3, 4), 2), ((4,), 1)):
            assert len(service.call(Get(client=client.id), [keys(*numbers)]).lengths) == count
        assert service.value("retrieved_bytes") == 20_000 + 8000 + 4000


@pytest.mark.parametrize(
    ("payload", "checksums", "code"),
    [
        ([], [], "bad_keys"),
        ([b"x" * 31], [], "bad_keys"),
        ([keys(1)], [], "bad_keys"),
        ([keys(1), b"a", b"b"], [], "bad_keys"),
        ([keys(1, 2), b"a", b"b"], [1], "bad_keys"),
        ([keys(1), b""], [], "oversized"),
        ([keys(1, 2), b"a", b""], [], "oversized"),
    ],
)
def test_a_put_whose_parts_disagree_stores_nothing(service, payload, checksums, code):
    client = service.client(mapped=False)
    assert service.code_of(Put(client=client.id, checksums=checksums), payload) == code
    assert service.storage.l1.used_pages == 0


@pytest.mark.parametrize("request_", [Lookup(), Store(client="", chunk_bytes=1), Retrieve(client=""), Get(client="")])
def test_keys_that_are_missing_partial_or_too_many_are_refused(service, request_):
    if not isinstance(request_, Lookup):
        request_ = msgspec.structs.replace(request_, client=service.client().id)
    for payload, code in (([], "bad_keys"), ([b"x"], "bad_keys"), ([bytes(32 * (MAX_CHUNKS + 1))], "oversized")):
        assert service.code_of(request_, payload) == code
    assert service.storage.l1.used_pages == 0


# -- pins -------------------------------------------------------------------------------------------------------------


def test_a_lookup_pins_what_it_found_for_all_ranks_and_without_a_client_nothing(service):
    client = service.client()
    client.store(1, 2)
    client.store(1, 2, rank=1)
    service.call(Lookup(world_size=2), [keys(1, 2, 3)])
    assert service.pins == 0
    reply = service.call(Lookup(client=client.id, request_id="r", world_size=2), [keys(1, 2, 3)])
    assert (reply.hit_chunks, reply.l1_chunks, reply.l2_chunks, reply.status.value) == (2, 2, 0, "HIT")
    assert service.pins == 4
    assert service.call(Lookup(client=client.id, request_id="r"), [keys(9)]).status.value == "MISS"
    assert service.call(EndSession(client=client.id, request_id="r")).released == 4


def test_a_lookup_tells_a_mapped_client_that_asks_where_the_chunks_of_each_rank_lie(service):
    client, remote = service.client(), service.client(mapped=False)
    stored = [client.store(1, 2, rank=rank) for rank in range(2)]
    lookup = Lookup(client=client.id, request_id="r", world_size=2, places=True)
    reply = service.call(lookup, [keys(1, 2, 3)])
    assert reply.placements == [stored[0][0], stored[1][0], stored[0][1], stored[1][1]]
    for other in (
        msgspec.structs.replace(lookup, places=False),
        msgspec.structs.replace(lookup, client=None),
        msgspec.structs.replace(lookup, client=remote.id),
    ):
        reply = service.call(other, [keys(1, 2, 3)])
        assert (reply.hit_chunks, reply.placements) == (2, [])


def test_a_lookup_tells_all_places_or_none_where_they_are_too_many(service, monkeypatch):
    monkeypatch.setattr("lmcache.server.service.MAX_PLACES", 3)
    client = service.client()
    client.store(*range(4))
    lookup = Lookup(client=client.id, request_id="r", places=True)
    assert len(service.call(lookup, [keys(0, 1, 2)]).placements) == 3
    reply = service.call(lookup, [keys(0, 1, 2, 3)])
    assert (reply.hit_chunks, reply.placements) == (4, [])


def test_what_an_engine_read_at_the_places_of_its_lookup_is_counted_as_retrieved(service):
    def counted():
        return [service.value(f"retrieved_{what}") for what in ("chunks", "bytes", "tokens")]

    first, second, stranger = service.client(), service.client(), service.client()
    first.register(world_size=2)
    second.register(rank=1, world_size=2)
    service.call(Report(client=first.id, loaded_chunks=3))
    assert counted() == [3, 3 * PAGE_BYTES, 3 * CHUNK_SIZE]
    service.call(Report(client=second.id, loaded_chunks=2))
    assert counted() == [5, 5 * PAGE_BYTES, 3 * CHUNK_SIZE]
    service.call(Report(client=stranger.id, loaded_chunks=1))
    assert counted() == [6, 5 * PAGE_BYTES, 3 * CHUNK_SIZE]
    service.call(Report(client=first.id, loaded_chunks=MAX_CHUNKS))
    assert counted()[1] == 5 * PAGE_BYTES + service.pool.header.capacity_bytes, "a made-up count adds no more than there is"


def unpinned(service):
    service.service.update_gauges()
    return service.metrics.registry.get_sample_value("lmcache_unpinned_bytes")


def test_what_gpus_could_not_pin_is_added_up_and_goes_with_its_engine(service):
    engines = [service.client() for _ in range(3)]
    for engine in engines:
        engine.register()
        pins = PinReport(pool_bytes=100, pinned_bytes=60, unpinned_bytes=40, unpinned_copied_bytes=5)
        service.call(Report(client=engine.id, pins=pins))
    assert (unpinned(service), service.value("unpinned_copied_bytes")) == (120, 15)
    service.call(Report(client=engines[0].id, decode_chunks=1))
    assert unpinned(service) == 120, "a report without news of it changes nothing"
    service.call(Report(client=engines[0].id, pins=PinReport(pool_bytes=100, pinned_bytes=100, unpinned_copied_bytes=7)))
    assert (unpinned(service), service.value("unpinned_copied_bytes")) == (80, 17)
    [shown, *_] = [client for client in service.status()["clients"] if client["id"] == engines[1].id]
    assert shown["gpu_pins"] == {"pool_bytes": 100, "pinned_bytes": 60, "unpinned_bytes": 40, "unpinned_copied_bytes": 5}
    engines[1].die()
    service.pass_time(1)
    assert unpinned(service) == 40
    service.call(UnregisterKVCache(client=engines[2].id))
    assert unpinned(service) == 0
    assert all(client["gpu_pins"] is None for client in service.status()["clients"] if client["rank"] is None)
    assert service.value("unpinned_copied_bytes") == 17


def test_a_made_up_report_of_what_was_copied_adds_no_more_than_a_gpu_could(service):
    engine = service.client()
    for copied_bytes in (2**62, 3, 2**62):
        service.call(Report(client=engine.id, pins=PinReport(unpinned_copied_bytes=copied_bytes)))
    assert service.value("unpinned_copied_bytes") == 2 * MAX_COPIED_BYTES
    too_much = PinReport(pool_bytes=9, pinned_bytes=5, unpinned_bytes=5)
    assert service.code_of(Report(client=engine.id, pins=too_much)) == "bad_field"
    assert service.status()


def test_a_models_layout_and_what_moves_its_bytes_are_shown(service):
    first, second, third = (service.client() for _ in range(3))
    first.register(world_size=3, backend="cuda, Triton")
    second.register(rank=1, world_size=3, backend="cuda, PyTorch (slower)")
    third.register(rank=2, world_size=3)  # one that does not say
    (model,) = service.status()["models"]
    assert model["layout"] == msgspec.to_builtins(LAYOUT)
    assert model["transfer_backends"] == ["cuda, PyTorch (slower)", "cuda, Triton"]
    first.leave()
    (model,) = service.status()["models"]
    assert model["transfer_backends"] == ["cuda, PyTorch (slower)"]


@pytest.mark.parametrize(("start", "end", "released"), [(0, 4, 8), (1, 3, 4), (3, 1, 0), (2, 2**62, 4), (9, 10, 0)])
def test_a_range_of_a_lookups_pins_is_freed_chunk_by_chunk_for_all_ranks(service, start, end, released):
    client = service.client()
    for rank in range(2):
        client.store(*range(4), rank=rank)
    service.call(Lookup(client=client.id, request_id="r", world_size=2), [keys(*range(4))])
    reply = service.call(FreeLookupLocks(client=client.id, request_id="r", start=start, end=end))
    assert reply.released == released
    assert service.pins == 8 - released
    for number in range(4):
        is_free = start <= number < end
        assert service.storage.l1.is_pinned(service.storage.l1.find(key(number), 1)) != is_free
    assert service.call(FreeLookupLocks(client=client.id, request_id="r", start=start, end=end)).released == 0


def test_a_release_frees_one_pin_of_each_place_and_only_ones_own(service):
    one, other = service.client(), service.client()
    places = one.store(1, 2)
    for _ in range(2):
        service.call(Retrieve(client=one.id, request_id="r"), [keys(1, 2)])
    assert service.call(Release(client=other.id, request_id="r", placements=places)).released == 0
    assert service.call(Release(client=one.id, request_id="another", placements=places)).released == 0
    forged = [Placement(2**62, 0, 1, 0), Placement(9, 0, 1, 0)]
    assert service.call(Release(client=one.id, request_id="r", placements=forged)).released == 0
    assert service.pins == 4
    assert service.call(Release(client=one.id, request_id="r", placements=places * 3)).released == 4
    assert service.sessions.num_sessions == 0


def test_freeing_lookup_locks_leaves_the_pins_of_a_retrieve(service):
    client = service.client()
    client.store(1)
    service.call(Lookup(client=client.id, request_id="r"), [keys(1)])
    service.call(Retrieve(client=client.id, request_id="r"), [keys(1)])
    assert service.call(FreeLookupLocks(client=client.id, request_id="r")).released == 1
    assert service.pins == 1
    assert service.call(EndSession(client=client.id, request_id="r")).released == 1


def test_ending_a_session_reaches_one_client_or_all_and_no_other_request(service):
    clients = [service.client() for _ in range(3)]
    clients[0].store(1)
    for client in clients:
        for request_id in ("r", "s"):
            service.call(Lookup(client=client.id, request_id=request_id), [keys(1)])
    assert service.call(EndSession(client=clients[0].id, request_id="r")).released == 1
    assert service.call(EndSession(request_id="r")).released == 2
    assert service.call(EndSession(request_id="never")).released == 0
    assert service.pins == 3


def test_pins_held_too_long_without_a_word_are_released_and_counted(service):
    client = service.client()
    client.store(1, 2)
    service.call(Lookup(client=client.id, request_id="old"), [keys(1, 2)])
    service.pass_time(PIN_TIMEOUT_SECONDS - 1)
    service.call(Lookup(client=client.id, request_id="new"), [keys(1)])
    service.pass_time(2)
    assert service.pins == 1
    assert service.value("expired_pins") == 2
    service.pass_time(PIN_TIMEOUT_SECONDS)
    assert service.pins == 0


def test_a_request_that_is_heard_of_again_keeps_all_its_pins(service):
    client = service.client()
    client.store(1, 2)
    for request in (Lookup(client=client.id, request_id="r"), Retrieve(client=client.id, request_id="r")):
        service.call(request, [keys(1)])
        service.pass_time(PIN_TIMEOUT_SECONDS - 1)
    assert service.pins == 2
    service.pass_time(2)
    assert service.pins == 0


def test_who_held_pins_too_long_is_told_with_for_how_long_the_limit_and_its_flag(service, caplog):
    client = service.client()
    client.store(1, 2)
    service.call(Lookup(client=client.id, request_id="req-7"), [keys(1, 2)])
    service.pass_time(PIN_TIMEOUT_SECONDS + 1)
    [told] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told == (
        f"request 'req-7' of client {client.id[:8]} (test, pid {os.getpid()}) held 2 pins for {PIN_TIMEOUT_SECONDS + 1:g} s"
        f" without a word, at most {PIN_TIMEOUT_SECONDS:g} s are allowed; they were released;"
        " hint: raise --pin-timeout-seconds if it was still at work"
    )


# -- who is gone ------------------------------------------------------------------------------------------------------


def test_a_dead_clients_pins_and_reservations_are_freed_at_once(service):
    """Whether it lives is the kernel's word: no lease has to run out."""
    client, witness = service.client(), service.client()
    client.store(1)
    client.reserve(2, 3)
    service.call(Lookup(client=client.id, request_id="r"), [keys(1)])
    service.call(Retrieve(client=client.id, request_id="r"), [keys(1)])
    service.pass_time(1)
    assert service.pins == 2
    client.die()
    service.pass_time(1)
    assert service.pins == service.storage.l1.num_reserved == 0
    assert service.value("dead_clients") == 1
    assert service.value("aborted_reservations") == 2
    assert not service.pool.client_path(client.id).exists()
    assert witness.id in service.sessions.clients
    assert service.code_of(Noop(client=client.id)) == "unknown_client"


def test_many_clients_that_die_together_are_two_lines_that_say_how_many(service, caplog):
    first, *others = (service.client() for _ in range(20))
    first.die()
    service.pass_time(1)
    for client in others:
        client.die()
        service.pass_time(GONE_LOG_SECONDS / 40)
    service.pass_time(GONE_LOG_SECONDS / 2)
    service.pass_time(GONE_LOG_SECONDS)
    assert service.value("dead_clients") == 20
    names = [f"{client.id[:8]} (test, pid {os.getpid()})" for client in [first, *others]]
    assert [record.message for record in caplog.records if "gone" in record.message] == [
        f"client {names[0]} is gone",
        f"19 clients are gone: {', '.join(names[1:4])} and 16 more",
    ]


def test_a_mapped_client_that_is_silent_for_ever_stays_while_its_process_lives(service):
    client = service.client()
    client.store(1)
    service.call(Retrieve(client=client.id, request_id="r"), [keys(1)])
    service.pass_time(LEASE_SECONDS * 10)
    assert service.pins == 1
    service.call(EndSession(client=client.id, request_id="r"))


def test_a_remote_client_is_gone_when_its_lease_ran_out_and_any_request_renews_it(service):
    client = service.client(mapped=False)
    service.call(Put(client=client.id), [keys(1), b"x"])
    for request in (Noop(client=client.id), Lookup(client=client.id, request_id="r")):
        service.pass_time(LEASE_SECONDS - 1)
        service.call(request, [keys(1)])
    service.pass_time(LEASE_SECONDS - 1)
    assert service.pins == 1
    service.pass_time(2)
    assert service.pins == 0
    assert service.value("dead_clients") == 1
    assert service.code_of(Get(client=client.id), [keys(1)]) == "unknown_client"


@pytest.mark.parametrize("how", ["its session is ended by another", "its time is up", "it has died"])
def test_what_is_unpinned_against_its_holders_will_stays_for_a_moment_and_the_holder_can_tell(service, how):
    holder, other = service.client(), service.client()
    holder.store(1, 2)
    [place] = service.call(Lookup(client=holder.id, request_id="r", places=True), [keys(1)]).placements
    if how == "its session is ended by another":
        service.call(EndSession(request_id="r"))
    elif how == "its time is up":
        service.pass_time(PIN_TIMEOUT_SECONDS + 1)
    else:
        holder.die()
        service.pass_time(1)
    assert service.pins == 0
    assert service.storage.l1.pool.generation(place.slot) == taken_generation(place.generation)
    assert as_builtins(service.call(Clear()))["kept_objects"] == 1
    [again] = service.call(Lookup(client=other.id, request_id="s", places=True), [keys(1)]).placements
    assert again.generation == taken_generation(place.generation)
    service.call(FreeLookupLocks(client=other.id, request_id="s"))
    service.pass_time(KEPT_SECONDS)
    assert as_builtins(service.call(Clear()))["objects"] == 1


@pytest.mark.parametrize("how", ["FREE_LOOKUP_LOCKS", "END_SESSION", "GOODBYE"])
def test_what_its_holder_gives_back_can_go_at_once(service, how):
    holder = service.client()
    holder.store(1)
    [place] = service.call(Lookup(client=holder.id, request_id="r", places=True), [keys(1)]).placements
    if how == "FREE_LOOKUP_LOCKS":
        service.call(FreeLookupLocks(client=holder.id, request_id="r"))
    elif how == "END_SESSION":
        service.call(EndSession(client=holder.id, request_id="r"))
    else:
        holder.leave()
    assert service.storage.l1.pool.generation(place.slot) == place.generation
    assert service.call(Clear()).objects == 1


def test_who_needs_the_room_does_not_get_what_rests(service):
    holder, writer = service.client(), service.client()
    num_pages = service.storage.l1.capacity_pages
    holder.store(*range(num_pages))
    service.call(Lookup(client=holder.id, request_id="r"), [keys(*range(num_pages))])
    service.call(EndSession(request_id="r"))
    request = Store(client=writer.id, chunk_bytes=PAGE_BYTES)
    assert service.call(request, [keys(num_pages)]).outcomes == [StoreOutcome.FULL]
    service.pass_time(KEPT_SECONDS)
    assert service.call(request, [keys(num_pages)]).outcomes == [StoreOutcome.RESERVED]
    writer.die()


# -- removing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(service):
    """Chunks 0 to 4 of model "a", 5 to 9 of "b", one page each; 3 and 7 pinned by request "r"."""
    writer = service.client()
    for model, numbers in (("a", range(5)), ("b", range(5, 10))):
        writer.register(model)
        writer.store(*numbers, namespace_id=namespace(model).id)
    for number in (3, 7):
        service.call(Retrieve(client=writer.id, request_id="r"), [keys(number)])
    service.release = lambda: service.call(EndSession(client=writer.id, request_id="r"))
    return service


def present(service) -> set[int]:
    return {number for number in range(10) if service.storage.l1.find(key(number), 0) is not None}


def test_a_clear_removes_all_but_the_pinned_and_counts_both(stored):
    expected = {
        "objects": 8,
        "removed_bytes": 8 * PAGE_BYTES,
        "kept_objects": 2,
        "kept_bytes": 2 * PAGE_BYTES,
        "remaining_objects": 0,
        "seconds": 0,
        "tiers": [],
    }
    assert as_builtins(stored.call(Clear(dry_run=True))) == expected
    assert as_builtins(stored.call(Clear(dry_run=True, force=True))) == expected
    assert present(stored) == set(range(10))
    assert as_builtins(stored.call(Clear())) == expected
    assert present(stored) == {3, 7}
    assert stored.call(Lookup(), [keys(0, 1)]).hit_chunks == 0


def test_a_forced_clear_waits_for_pins_and_counts_what_went_meanwhile(stored):
    answers = stored.send(Clear(force=True, timeout_seconds=5))
    assert answers == []
    assert present(stored) == {3, 7}
    stored.pass_time(2)
    assert answers == []
    stored.release()
    stored.pass_time(1)
    expected = {"objects": 10, "removed_bytes": 10 * PAGE_BYTES, "kept_objects": 0, "kept_bytes": 0}
    assert [as_builtins(answer.reply) for answer in answers] == [
        {**expected, "remaining_objects": 0, "seconds": 3, "tiers": []}
    ]
    assert present(stored) == set()


def test_a_forced_clear_answers_at_its_deadline_with_what_it_kept(stored):
    answers = stored.send(Clear(force=True, timeout_seconds=5))
    stored.pass_time(4.9)
    assert answers == []
    stored.pass_time(0.2)
    assert [(answer.reply.objects, answer.reply.kept_objects) for answer in answers] == [(8, 2)]
    assert present(stored) == {3, 7}
    stored.pass_time(100)
    assert len(answers) == 1


def test_a_forced_clear_that_waits_leaves_alone_what_is_stored_meanwhile(stored):
    """Else an engine at work, which always has something pinned, would be without a cache until the deadline."""
    answers = stored.send(Clear(force=True, timeout_seconds=5))
    client = stored.client()
    client.store(20, 21)
    stored.call(Lookup(client=client.id, request_id="new"), [keys(20)])
    stored.pass_time(1)
    assert answers == []
    stored.release()
    stored.pass_time(1)
    assert [(answer.reply.objects, answer.reply.kept_objects) for answer in answers] == [(10, 0)]
    assert stored.call(Lookup(), [keys(20, 21)]).hit_chunks == 2


def test_a_forced_clear_without_pins_or_without_time_answers_at_once(stored):
    assert stored.call(Clear(force=True, timeout_seconds=0)).kept_objects == 2
    stored.release()
    assert as_builtins(stored.call(Clear(force=True)))["objects"] == 2


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({"num_bytes": 1}, {4}),
        ({"num_bytes": 2 * PAGE_BYTES}, {4, 2}),
        ({"num_bytes": 0}, set()),
        ({"ratio": 2 / 32}, {4, 2}),
        ({"ratio": 1.0}, set(range(10)) - {3, 7}),
        ({"ratio": 1.0, "num_bytes": PAGE_BYTES}, {4}),
        ({"model": "b"}, {5, 6, 8, 9}),
        ({"model": "b", "num_bytes": 1}, {9}),
    ],
)
def test_an_evict_removes_what_all_its_conditions_select(stored, fields, gone):
    dry = stored.call(Evict(dry_run=True, **fields))
    assert present(stored) == set(range(10))
    reply = stored.call(Evict(**fields))
    assert present(stored) == set(range(10)) - gone
    assert as_builtins(reply) == as_builtins(dry)
    assert (reply.objects, reply.removed_bytes) == (len(gone), len(gone) * PAGE_BYTES)


def test_an_evict_of_keys_removes_them_once_and_nothing_else(stored):
    reply = stored.call(Evict(), [keys(1, 3, 1, 77)])
    assert (reply.objects, reply.kept_objects) == (1, 1)
    assert present(stored) == set(range(10)) - {1}


def test_an_evict_by_age_spares_what_was_used_since(stored, monkeypatch):
    monkeypatch.setattr(type(stored.storage.l1), "idle_seconds", lambda self, slot: 100.0 - slot)
    stored.call(Evict(older_than_seconds=99))
    assert present(stored) == set(range(2, 10))


def test_chunks_of_more_ranks_than_can_be_looked_up_at_once_are_refused(stored, monkeypatch):
    monkeypatch.setattr("lmcache.server.service.MAX_VALUES", 6)
    stored.client().store(0, rank=1)
    assert stored.call(Lookup(world_size=2), [keys(0, 1, 2)]).hit_chunks == 1
    assert stored.code_of(Lookup(world_size=2), [keys(0, 1, 2, 3)]) == "bad_field"
    assert stored.code_of(Evict(), [keys(0, 1, 2, 4)]) == "bad_field"
    assert present(stored) == set(range(10))
    assert stored.call(Evict(), [keys(0, 1, 2)]).objects == 4


def test_an_evict_that_selects_nothing_is_refused(stored):
    assert stored.code_of(Evict()) == "bad_field"
    with pytest.raises(RemoteError, match="no engine registered model 'c'") as caught:
        stored.call(Evict(model="c"))
    assert caught.value.hint == "registered: a, b"
    assert present(stored) == set(range(10))


# -- removing much ----------------------------------------------------------------------------------------------------

NUM_MANY = 2 * MAX_ENTRIES_PER_SLICE + 100


@pytest.fixture
def crowded(tmp_path, monkeypatch):
    """So many chunks that no slice has them all; the client has registered model "m"."""
    with service_in(tmp_path, monkeypatch, num_pages=NUM_MANY + 10, num_slots=NUM_MANY + 10) as service:
        service.writer = service.client()
        service.writer.register()
        service.writer.store(*range(NUM_MANY), namespace_id=namespace("m").id)
        yield service


@pytest.mark.parametrize("request_", [Clear(), Evict(model="m"), Evict(ratio=1.0), Evict(older_than_seconds=0)], ids=repr)
def test_a_long_removal_lets_others_have_their_turn_and_leaves_alone_what_they_store(crowded, request_):
    told = []
    crowded.storage._on_removed = lambda reason, num_chunks, num_bytes: told.append(num_chunks)
    answers = crowded.send(request_)
    assert answers == []
    assert len(crowded.storage.l1) == NUM_MANY - MAX_ENTRIES_PER_SLICE
    # The end of the prompt went first; it is stored again, in slots that the removal has yet to come to or has been at.
    crowded.writer.store(*range(NUM_MANY - 300, NUM_MANY), namespace_id=namespace("m").id)
    while not answers:
        assert crowded.service.tick() == 0 or answers
    assert (answers[0].reply.objects, answers[0].reply.remaining_objects) == (NUM_MANY, 0)
    assert told == [MAX_ENTRIES_PER_SLICE, MAX_ENTRIES_PER_SLICE, 100]
    left = [number for number in range(NUM_MANY) if crowded.storage.l1.find(key(number), 0) is not None]
    assert left == [*range(NUM_MANY - 300, NUM_MANY)]
    assert crowded.service.tick() > 0


def test_a_slot_that_is_used_again_before_the_removal_comes_to_it_is_left_alone(crowded):
    first = crowded.storage.l1.find(key(0), 0)
    answers = crowded.send(Clear())
    crowded.call(Evict(), [keys(0)])  # which the clear would have come to last
    [place] = crowded.writer.store(5000)
    assert place.slot == first
    while not answers:
        crowded.service.tick()
    assert answers[0].reply.objects == NUM_MANY - 1
    assert {*crowded.storage.l1.slots()} == {first}


def test_a_removal_whose_time_is_up_says_what_is_left_and_goes_on(crowded):
    answers = crowded.send(Clear(timeout_seconds=1.0))
    crowded.pass_time(2.0)
    [answer] = answers
    removed = 2 * MAX_ENTRIES_PER_SLICE
    assert (answer.reply.objects, answer.reply.remaining_objects) == (removed, NUM_MANY - removed)
    crowded.service.tick()
    assert (len(answers), len(crowded.storage.l1)) == (1, 0)
    assert crowded.service.tick() > 0


def test_a_long_dry_run_removes_nothing_and_ends_with_its_time(crowded):
    answers = crowded.send(Clear(dry_run=True))
    while not answers:
        crowded.service.tick()
    assert (answers[0].reply.objects, answers[0].reply.remaining_objects) == (NUM_MANY, 0)
    [answer] = crowded.send(Evict(dry_run=True, ratio=1.0, timeout_seconds=0))
    assert (answer.reply.objects, answer.reply.remaining_objects) == (MAX_ENTRIES_PER_SLICE, NUM_MANY - MAX_ENTRIES_PER_SLICE)
    assert crowded.service.tick() > 0
    assert len(crowded.storage.l1) == NUM_MANY


def test_a_forced_clear_removes_many_pinned_chunks_as_they_are_let_go(crowded):
    crowded.call(Lookup(client=crowded.writer.id, request_id="a"), [keys(*range(NUM_MANY - 1))])
    crowded.call(Lookup(client=crowded.writer.id, request_id="b"), [keys(NUM_MANY - 1)])
    answers = crowded.send(Clear(force=True, timeout_seconds=5))
    for _ in range(10):
        crowded.service.tick()
    crowded.call(EndSession(client=crowded.writer.id, request_id="a"))
    for _ in range(10):
        crowded.service.tick()
    assert (answers, len(crowded.storage.l1)) == ([], 1)
    crowded.pass_time(6)
    assert [(answer.reply.objects, answer.reply.kept_objects) for answer in answers] == [(NUM_MANY - 1, 1)]


@pytest.mark.parametrize("ended", ["a", "b"])
def test_a_forced_clear_comes_back_to_all_that_it_kept_also_where_more_than_a_slice_stays_pinned(crowded, ended):
    half = NUM_MANY // 2
    for request_id, numbers in (("a", range(half)), ("b", range(half, NUM_MANY))):
        crowded.call(Lookup(client=crowded.writer.id, request_id=request_id), [keys(*numbers)])
    answers = crowded.send(Clear(force=True, timeout_seconds=5))
    for _ in range(10):
        crowded.service.tick()
    crowded.call(EndSession(client=crowded.writer.id, request_id=ended))
    for _ in range(10):
        crowded.service.tick()
    assert (answers, len(crowded.storage.l1)) == ([], half)
    crowded.pass_time(6)
    assert [(answer.reply.objects, answer.reply.kept_objects) for answer in answers] == [(half, half)]


def test_several_removals_share_a_slice(crowded):
    clears = [crowded.send(Clear(dry_run=True, timeout_seconds=100)) for _ in range(4)]
    for _ in range(4):
        crowded.service.tick()
    assert not any(clears)
    while not all(clears):
        crowded.service.tick()
    assert {answers[0].reply.objects for answers in clears} == {NUM_MANY}


# -- versions ---------------------------------------------------------------------------------------------------------


def test_a_server_of_the_next_version_serves_clients_of_this_one(tmp_path, monkeypatch):
    """VER-1: N and N+1 interoperate."""
    with service_in(tmp_path, monkeypatch, versions=(1, 2)) as service:
        client = service.client()
        client.store(1)
        assert service.call(Lookup(), [keys(1)]).hit_chunks == 1
        assert (service.call(Noop()).min_protocol, service.call(Noop()).max_protocol) == (1, 2)
        assert service.call(msgspec.structs.replace(Lookup(), v=2), [keys(1)]).hit_chunks == 1


@pytest.mark.parametrize(("versions", "side"), [((2, 3), "client"), ((0, 0), "server")])
def test_versions_that_do_not_meet_are_one_sentence_on_both_sides(tmp_path, monkeypatch, capfd, versions, side):
    from lmcache.log import configure_logging

    configure_logging("INFO")
    with service_in(tmp_path, monkeypatch, versions=versions) as service:
        with pytest.raises(RemoteError) as caught:
            service.call(Hello(kind="engine"))
        sentence = f"the client speaks protocol 1, the server speaks {versions[0]} to {versions[1]}"
        assert (caught.value.message, caught.value.code) == (sentence, "version_mismatch")
        assert caught.value.hint == f"upgrade lmcache on the {side}'s side"
        for _ in range(50):
            service.code_of(Noop())
    assert capfd.readouterr().err.count(sentence) == 1, "told in the server's log too, and not fifty times"
    configure_logging()


# -- bad requests, bugs and maintenance -------------------------------------------------------------------------------


def test_bytes_that_are_no_request_are_answered_with_an_error_and_counted(service):
    for raw in (b"", b"junk", b"\x91" * 10_000):
        [answer] = service.send_raw(raw)
        assert answer.reply.error.code == "bad_header"
    assert service.value("requests", "invalid", "error") == 3


def test_a_connector_of_another_project_is_told_what_this_is_and_how_an_engine_finds_its_own(service, capfd):
    """VER-3: also in the server's log, because such a peer may not understand the reply."""
    from lmcache.log import configure_logging

    configure_logging("INFO")
    for _ in range(50):
        [answer] = service.send_raw(msgspec.msgpack.encode(7))
    hint = answer.reply.error.hint
    assert "this is an lmcache server" in hint
    assert '--kv-transfer-config \'{"kv_connector":"LMCacheMPConnector"' in hint
    assert capfd.readouterr().err.count(hint) == 1
    configure_logging()


def test_a_bug_in_a_handler_costs_its_request_an_error_and_the_server_nothing(service, monkeypatch):
    service.service._handlers[Noop] = lambda request, payload: 1 // 0
    with pytest.raises(RemoteError, match="NOOP failed in the server: ZeroDivisionError") as caught:
        service.call(Noop())
    assert caught.value.code == "internal"
    assert service.call(GetChunkSize()).chunk_size == CHUNK_SIZE


def test_failing_maintenance_is_a_problem_until_it_works_again(service, monkeypatch):
    monkeypatch.setattr(service.storage, "run_pass", lambda: 1 // 0)
    service.pass_time(1)
    assert service.call(Noop()).problems == ["maintenance fails: ZeroDivisionError('integer division or modulo by zero')"]
    monkeypatch.undo()
    service.service.tick()
    assert service.call(Noop()).problems == []


def test_wrong_books_are_found_when_idle_and_never_forgotten(service):
    client = service.client()
    client.store(1)
    service.storage.l1.committed_pages += 1
    service.pass_time(0.5)
    assert service.service.problems() == []
    service.pass_time(2)
    service.pass_time(2)
    [problem] = service.service.problems()
    assert problem.startswith("the pool's accounting is wrong: ")
    service.storage.l1.committed_pages -= 1
    service.service._accounting_error = ""


def test_a_client_that_floods_hello_is_forgotten_when_its_leases_run_out(service):
    for _ in range(1000):
        service.call(Hello(kind="flood"))
    service.pass_time(LEASE_SECONDS + 1)
    assert service.sessions.clients == {}


def test_no_service_needs_a_thread(service):
    assert wait_until(lambda: not service.storage.residency.is_running) is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lmcache")]


# -- engines ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_says_nothing_for_twenty_minutes_stays_registered(service):
    """LIV-1, LIV-4: it warms up, or nobody asks it anything; the kernel says that its process lives."""
    engine = service.client(kind="engine-worker")
    engine.register()
    service.pass_time(20 * 60)
    (known,) = [client for client in service.status()["clients"] if client["id"] == engine.id]
    assert known["model"] == "m"
    assert service.status()["healthy"]
    assert engine.store(1)


def test_workers_are_found_by_their_own_process_and_by_their_parent(service):
    ranks = [service.client() for _ in range(2)]
    for rank, client in reversed(list(enumerate(ranks))):
        service.call(
            RegisterKVCache(
                client=client.id,
                namespace=namespace(world_size=2),
                layout=LAYOUT,
                rank=rank,
                world_size=2,
                processes=[f"worker {rank}", "core"],
            )
        )
    scheduler = service.client(kind="engine-scheduler")

    def found(process):
        return [known.rank for known in service.call(FindWorkers(client=scheduler.id, process=process)).registrations]

    assert (found("core"), found("worker 1"), found("another")) == ([0, 1], [1], [])
    ranks[0].die()
    service.pass_time(1)
    assert found("core") == [1]


def test_an_engine_that_differs_is_told_in_what(service, caplog):
    """COR-3: otherwise nobody knows why there are no hits."""
    service.client().register()
    other = msgspec.structs.replace(namespace(), dtype="float16", revision="2")
    service.call(RegisterKVCache(client=service.client().id, namespace=other, layout=LAYOUT))
    assert "m is registered with another revision ('', now '2'), dtype ('" in caplog.text


def test_of_a_digest_that_differs_the_log_names_what_it_was_made_of(service, caplog):
    """COR-3."""
    wider = msgspec.structs.replace(LAYOUT, block_size=8, block_bytes=LAYOUT.block_bytes // 2)

    def register(layout=LAYOUT, **parts):
        caplog.clear()
        named = msgspec.structs.replace(namespace(), layout=layout.fingerprint, revision=str(sorted(parts.items())))
        client = service.client()
        service.call(RegisterKVCache(client=client.id, namespace=named, layout=layout, revision_parts=parts))
        assert service.sessions.clients[client.id].registration.revision_parts == {}
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        return told[0].partition(" another ")[2].partition(": it shares")[0] if told else ""

    register(kv_cache_dtype="auto", weights="1")
    assert register(kv_cache_dtype="fp8", weights="1") == "revision.kv_cache_dtype ('auto', now 'fp8')"
    assert register(kv_cache_dtype="fp8", weights="1") == ""
    assert register(wider, kv_cache_dtype="auto", weights="1") == (
        f"layout.block_bytes ({LAYOUT.block_bytes}, now {wider.block_bytes}), layout.block_size (16, now 8)"
    )
    assert register().startswith("revision (")  # a client that does not tell its parts
    assert register(**{str(number): "" for number in range(20)}).endswith(" and 14 more")


def test_a_client_says_what_it_is_made_of(service):
    service.call(Hello(kind="engine-worker", software="lmcache 9, vllm 8"))
    assert [client["software"] for client in service.status()["clients"]] == ["lmcache 9, vllm 8"]
