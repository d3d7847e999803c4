"""A new server on an old pool: what it serves again, in which order, and what it must never serve."""

import os
import struct

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.keys import split_keys
from lmcache.pool import NO_OWNER, PAGE_BYTES, RECORD_BYTES, PoolFile, SlotRecord, SlotState
from lmcache.protocol import StoreOutcome
from lmcache.storage.residency import Residency
from tests.pools import OTHER, OWNER, adopt_manager, content, crash, create_manager, key, keys, pool_path, reserve, store


@pytest.fixture
def reborn(tmp_path):
    """Make a pool, let the test change it while no server runs, and give the manager that adopts it."""
    opened = []

    def make(fill=lambda manager: None, damage=lambda file: None, num_pages=16, num_slots=8):
        manager = create_manager(tmp_path, num_pages, num_slots)
        fill(manager)
        crash(manager)
        with pool_path(tmp_path).open("r+b") as file:
            damage(file)
        opened.append(adopt_manager(tmp_path))
        return opened[-1]

    yield make
    for manager in opened:
        manager.l1.check()
        manager.close()


def write_record(file, slot: int, record: SlotRecord) -> None:
    """Forge a record with a right checksum."""
    with_pool = PoolFile.__new__(PoolFile)
    with_pool._view = memoryview(bytearray(PAGE_BYTES + (slot + 1) * RECORD_BYTES))
    with_pool.write(slot, record)
    file.seek(PAGE_BYTES + slot * RECORD_BYTES)
    file.write(with_pool._view[PAGE_BYTES + slot * RECORD_BYTES :])


def committed(number: int, offset_pages: int, num_pages: int = 1, **more) -> SlotRecord:
    fields = {"order": number, "length": num_pages * PAGE_BYTES, "offset": offset_pages * PAGE_BYTES, **more}
    return SlotRecord(key=key(number), state=SlotState.COMMITTED, **fields)


def victims(manager) -> list[int]:
    return list(manager.l1.policy.victims())


def test_chunks_come_back_with_key_rank_bytes_checksum_generation_and_namespace(reborn):
    def fill(manager):
        store(manager, 1, 2, num_bytes=5000)
        manager.l1.delete(manager.l1.find(key(2), 0))
        _, [place] = reserve(manager, 3, num_bytes=700, rank=2, namespace_id=2**64 - 1)
        manager.l1.pool.data[place.offset : place.offset + 700] = content(3, 700)
        manager.l1.commit([msgspec.structs.replace(place, checksum=2**64 - 1)], OWNER)

    manager = reborn(fill)
    assert manager.l1.adopted_chunks == len(manager.l1) == 2
    assert manager.l1.find(key(2), 0) is None
    assert manager.l1.find(key(3), 0) is None
    for number, rank, length, generation in ((1, 0, 5000, 0), (3, 2, 700, 1)):
        place = manager.l1.placement(manager.l1.find(key(number), rank))
        assert (place.length, place.generation) == (length, generation)
        assert bytes(manager.l1.pool.data[place.offset : place.offset + length]) == content(number, length)
    record = manager.l1.record(manager.l1.find(key(3), 2))
    assert (record.checksum, record.namespace_id) == (2**64 - 1, 2**64 - 1)


def test_the_order_of_going_comes_back_oldest_commit_first_and_suffix_first(reborn):
    slots = {}

    def fill(manager):
        slots["one"] = store(manager, 1, 2)
        slots["two"] = store(manager, 3, 4)

    manager = reborn(fill)
    assert victims(manager) == slots["one"][::-1] + slots["two"][::-1]
    new = store(manager, 5)
    assert victims(manager)[-1:] == new


def test_commits_after_an_adoption_are_newer_than_those_before_it_also_at_the_next_one(tmp_path):
    manager = create_manager(tmp_path, 16, 8)
    expected = store(manager, 1, 2)[::-1]
    for number in (3, 4, 5):
        crash(manager)
        manager = adopt_manager(tmp_path)
        assert victims(manager) == expected
        expected += store(manager, number)
    manager.close()


def test_free_space_and_free_slots_are_what_is_left(reborn):
    def fill(manager):
        store(manager, *range(6), num_bytes=2 * PAGE_BYTES)
        for number in (1, 4):
            manager.l1.delete(manager.l1.find(key(number), 0))

    manager = reborn(fill)
    assert manager.l1.allocator.extents() == [(2, 2), (8, 2), (12, 4)]
    assert reserve(manager, 10, 11, 12, 13, num_bytes=2 * PAGE_BYTES)[0] == [StoreOutcome.RESERVED] * 4
    assert not manager.l1.has_free_slot()


def test_gaps_are_handed_out_as_they_become_resident_in_parts_and_several_at_once(reborn, monkeypatch):
    def fill(manager):
        store(manager, *range(6), num_bytes=2 * PAGE_BYTES)
        for number in (1, 4):
            manager.l1.delete(manager.l1.find(key(number), 0))
        monkeypatch.setattr(Residency, "frontier_pages", lambda self: 0)

    manager = reborn(fill, num_pages=17)
    for page, extents in ((2, []), (3, [(2, 1)]), (9, [(2, 2), (8, 1)]), (14, [(2, 2), (8, 2), (12, 2)])):
        manager.l1.grow_to(page)
        manager.l1.check()
        assert manager.l1.allocator.extents() == extents
    manager.l1.grow_to(17)
    assert manager.l1.allocator.extents() == [(2, 2), (8, 2), (12, 5)]


def test_only_reservations_remain_with_their_owners_and_no_one_else_gets_their_place(reborn):
    def fill(manager):
        reserve(manager, 1, 2, owner=OWNER)
        reserve(manager, 3, owner=OTHER)

    manager = reborn(fill)
    assert manager.l1.adopted_chunks == 0
    assert manager.l1.num_reserved == manager.l1.dropped_reservations == 3
    assert reserve(manager, 1)[0] == [StoreOutcome.BUSY]
    held = manager.l1.reservations()
    for number in range(10, 40):
        store(manager, number)
    assert {place.offset for _, place in held} & {manager.l1.placement(slot).offset for slot in manager.l1.slots()} == set()
    for owner, place in held:
        assert manager.l1.abort([place], owner) == 1
    assert manager.l1.reserved_pages == 0


def test_a_generation_never_comes_back_across_servers(tmp_path):
    manager = create_manager(tmp_path, 16, 8)
    seen = []
    for number in range(5):
        [slot] = store(manager, number)
        seen.append((slot, manager.l1.placement(slot).generation))
        manager.l1.delete(slot)
        crash(manager)
        manager = adopt_manager(tmp_path)
    assert len(set(seen)) == 5
    manager.close()


# -- damage -----------------------------------------------------------------------------------------------------------


def test_a_record_with_any_byte_flipped_is_not_served_and_its_neighbours_are(tmp_path):
    """Also the bytes of the generation, in any way: a reader that held the old one must see another."""
    manager = create_manager(tmp_path, 8, 4)
    slots = store(manager, 1, 2, 3)
    crash(manager)
    path = pool_path(tmp_path)
    whole = path.read_bytes()
    at = PAGE_BYTES + slots[1] * RECORD_BYTES
    for byte in range(RECORD_BYTES - 20):
        for flip in (0xFF, 0x01):
            raw = bytearray(whole)
            raw[at + byte] ^= flip
            path.write_bytes(raw)
            manager = adopt_manager(tmp_path)
            assert [manager.l1.find(key(number), 0) for number in (1, 2, 3)] == [slots[0], None, slots[2]]
            assert manager.l1.pool.generation(slots[1]) != 0
            manager.l1.check()
            manager.close(keep=True)
    path.unlink()


@pytest.mark.parametrize("generation", [2**64 - 1, 2**63, 0])
def test_a_damaged_generation_at_either_end_of_its_range_stops_no_server(reborn, generation):
    def damage(file):
        file.seek(PAGE_BYTES + 72)
        file.write(struct.pack("<Q", generation) + b"damage")

    manager = reborn(lambda manager: store(manager, 1), damage)
    assert len(manager.l1) == 0
    assert manager.l1.pool.generation(0) == (generation + 1) % 2**64
    store(manager, 2)


def test_records_that_overlap_are_both_refused(reborn):
    def damage(file):
        write_record(file, 0, committed(1, 0, 4))
        write_record(file, 1, committed(2, 3, 2))
        write_record(file, 2, committed(3, 8, 1))

    manager = reborn(damage=damage)
    assert [manager.l1.find(key(number), 0) for number in (1, 2, 3)] == [None, None, 2]
    assert manager.l1.allocator.free_pages == 15


def test_two_slots_with_one_key_are_both_refused(reborn):
    def damage(file):
        write_record(file, 0, committed(1, 0))
        write_record(file, 1, committed(1, 1))
        write_record(file, 2, committed(1, 2, rank=1))

    manager = reborn(damage=damage)
    assert manager.l1.find(key(1), 0) is None
    assert manager.l1.find(key(1), 1) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 100},
        {"offset": 16 * PAGE_BYTES},
        {"offset": 15 * PAGE_BYTES, "length": PAGE_BYTES + 1},
        {"offset": 2**63},
        {"length": 0},
        {"length": 2**63},
    ],
)
def test_a_record_with_an_impossible_place_is_refused(reborn, changes):
    manager = reborn(damage=lambda file: write_record(file, 3, msgspec.structs.replace(committed(1, 0), **changes)))
    assert len(manager.l1) == 0
    assert manager.l1.allocator.free_pages == 16


@settings(max_examples=60)
@given(data=st.data())
def test_no_damage_to_the_table_breaks_the_books_or_serves_a_key_that_nobody_stored(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("pool")
    manager = create_manager(directory, 16, 8)
    store(manager, 1, 2, 3)
    reserve(manager, 4)
    crash(manager)
    table = st.integers(PAGE_BYTES, PAGE_BYTES + 8 * RECORD_BYTES - 1)
    with pool_path(directory).open("r+b") as file:
        for at, junk in data.draw(st.lists(st.tuples(table, st.binary(min_size=1, max_size=40)), max_size=5)):
            file.seek(at)
            file.write(junk[: PAGE_BYTES + 8 * RECORD_BYTES - at])
    manager = adopt_manager(directory)
    manager.l1.check()
    stored = keys(1, 2, 3)
    assert {manager.l1.record(slot).key for slot in manager.l1.slots()} <= set(split_keys(stored))
    for number in (1, 2, 3):
        slot = manager.l1.find(key(number), 0)
        if slot is not None:
            place = manager.l1.placement(slot)
            assert bytes(manager.l1.pool.data[place.offset : place.offset + place.length]) == content(number, place.length)
    for number in range(10, 40):
        outcomes, places = reserve(manager, number)
        assert outcomes == [StoreOutcome.RESERVED]
        manager.l1.commit(places, OWNER)
    manager.l1.check()
    manager.close()


def test_a_table_written_at_a_crash_between_commit_and_reply_is_served(reborn):
    """COMMIT was done, its client was not told: the chunk is whole and may be served."""
    manager = reborn(lambda manager: store(manager, 1))
    assert manager.l1.record(manager.l1.find(key(1), 0)).owner == NO_OWNER


def test_a_pool_cut_short_is_refused_before_anything_is_mapped(tmp_path):
    crash(create_manager(tmp_path, 16, 8))
    os.truncate(pool_path(tmp_path), 3 * PAGE_BYTES)
    with pytest.raises(Exception, match="its header says"):
        adopt_manager(tmp_path)
    pool_path(tmp_path).unlink()
