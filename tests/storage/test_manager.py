"""Making room: what goes, what stays, and that a store fails only when pins and reservations leave no room."""

import random
import time
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.pool import PAGE_BYTES
from lmcache.protocol import StoreOutcome
from lmcache.storage.l1 import L1Cache
from lmcache.storage.manager import MAX_EVICTED_PER_PASS, RemovalReason, Selection
from tests.pools import OTHER, OWNER, key, keys, manager_in, present, remove, reserve, store

FULL, RESERVED = StoreOutcome.FULL, StoreOutcome.RESERVED


# -- evicting on demand -----------------------------------------------------------------------------------------------


def test_filling_to_150_percent_without_pause_fails_no_store_and_drops_the_oldest(tmp_path):
    """EVI-3."""
    removed = []
    with manager_in(tmp_path, num_pages=200, num_slots=400, on_removed=lambda *what: removed.append(what)) as manager:
        for number in range(300):
            store(manager, number)
            assert manager.l1.used_pages <= 200
        assert present(manager, range(300)) == set(range(100, 300))
        assert removed == [(RemovalReason.DEMAND, 1, PAGE_BYTES)] * 100


def test_pinned_chunks_stay_while_all_others_go(tmp_path):
    with manager_in(tmp_path, num_pages=50, num_slots=100) as manager:
        slots = store(manager, *range(50))
        pinned = slots[::5]
        manager.l1.pin(pinned)
        for number in range(50, 150):
            store(manager, number)
        assert set(range(0, 50, 5)) <= present(manager, range(150))
        assert present(manager, range(150)) - set(range(0, 50, 5)) == set(range(110, 150))
        manager.l1.unpin(pinned)


class CountingArray(array):
    """The links of the eviction order: every step along it reads one."""

    num_reads = 0

    def __getitem__(self, index):
        self.num_reads += 1
        return super().__getitem__(index)


def test_many_pinned_chunks_at_the_old_end_are_walked_over_once_and_not_by_each_eviction(tmp_path):
    """With 100,000 of them a store of 128 chunks took 5 s."""
    with manager_in(tmp_path, num_pages=1100, num_slots=1200) as manager:
        pinned = store(manager, *range(1000))
        store(manager, *range(1000, 1100))
        manager.l1.pin(pinned)
        links = manager.l1.policy._next = CountingArray("I", manager.l1.policy._next)
        store(manager, *range(2000, 2100))
        assert links.num_reads < 10_000
        assert present(manager, range(2100)) == {*range(1000), *range(2000, 2100)}
        manager.l1.unpin(pinned)


def test_what_was_pinned_while_others_went_goes_first_and_from_its_end(tmp_path):
    with manager_in(tmp_path, num_pages=10) as manager:
        slots = store(manager, *range(6))
        store(manager, *range(6, 10))
        manager.l1.pin(slots)
        store(manager, 10, 11)  # evicts 9 and 8: the others are pinned
        manager.l1.touch(slots[:2])
        manager.l1.unpin(slots)
        store(manager, 12, 13, 14)
        assert present(manager, range(10)) == {0, 1, 2, 6, 7}


def test_a_chunk_stored_after_a_pinned_one_can_be_evicted(tmp_path):
    with manager_in(tmp_path, num_pages=4) as manager:
        slots = store(manager, 0, 1)
        store(manager, 2, 3)
        manager.l1.pin(slots)
        store(manager, 4, parent=key(1))  # evicts 3; its predecessor has been passed over since
        store(manager, 5)
        assert present(manager, range(6)) == {0, 1, 2, 5}
        manager.l1.unpin(slots)


def test_what_is_taken_from_a_dead_holder_can_be_evicted_once_it_has_rested(tmp_path, monkeypatch):
    with manager_in(tmp_path, num_pages=4) as manager:
        slots = store(manager, 0, 1)
        store(manager, 2, 3)
        manager.l1.pin(slots)
        store(manager, 4)  # evicts 3
        manager.l1.take_back(slots)
        store(manager, 5)
        assert present(manager, range(6)) == {0, 1, 4, 5}
        now = time.monotonic() + 10
        monkeypatch.setattr(time, "monotonic", lambda: now)
        store(manager, 6, 7)
        assert present(manager, range(8)) == {4, 5, 6, 7}


def test_reserved_places_stay_while_all_others_go(tmp_path):
    with manager_in(tmp_path, num_pages=10) as manager:
        _, held = reserve(manager, 1, 2, 3)
        for number in range(10, 60):
            store(manager, number)
        assert len(manager.l1.commit(held, OWNER)) == 3
        assert present(manager, range(60)) == {1, 2, 3, *range(53, 60)}


def test_a_reservation_in_a_slot_that_held_an_old_chunk_is_not_taken_for_that_chunk(tmp_path):
    """Its neighbours are evicted around it; it is as young as can be."""
    with manager_in(tmp_path, num_pages=4) as manager:
        slots = store(manager, 0, 1, 2, 3)
        manager.l1.delete(slots[1])
        _, held = reserve(manager, 10)
        assert held[0].slot == slots[1]
        manager.l1.pin([slots[3]])
        assert reserve(manager, 20, num_bytes=2 * PAGE_BYTES)[0] == [FULL]
        assert len(manager.l1.commit(held, OWNER)) == 1
        manager.l1.unpin([slots[3]])


def test_a_store_is_full_only_when_pins_and_reservations_leave_no_room(tmp_path):
    with manager_in(tmp_path, num_pages=10) as manager:
        slots = store(manager, *range(6))
        manager.l1.pin(slots)
        _, held = reserve(manager, 6, 7, 8)
        assert reserve(manager, 9, 10)[0] == [RESERVED, FULL]
        manager.l1.unpin(slots[2:3])
        assert reserve(manager, 10)[0] == [RESERVED]
        assert present(manager, range(9)) == {0, 1, 3, 4, 5}
        manager.l1.abort(held[:1], OWNER)
        assert reserve(manager, 11)[0] == [RESERVED]
        manager.l1.unpin([slot for slot in slots if slot != slots[2]])


def test_a_full_slot_table_evicts_although_bytes_are_free(tmp_path):
    with manager_in(tmp_path, num_pages=100, num_slots=4) as manager:
        slots = store(manager, 0, 1, 2, 3)
        manager.l1.pin(slots[3:])
        assert reserve(manager, 4)[0] == [RESERVED]
        assert present(manager, range(4)) == {0, 1, 3}
        manager.l1.pin(slots[:2])
        assert reserve(manager, 5)[0] == [FULL]
        assert manager.problems() == ["L1 is full: all 4 slots are pinned or reserved; see --max-chunks"]
        manager.l1.unpin(slots[:2])
        assert manager.problems() == []
        assert reserve(manager, 5)[0] == [RESERVED]
        manager.l1.unpin(slots[3:])


def test_what_can_never_fit_evicts_nothing(tmp_path):
    with manager_in(tmp_path, num_pages=10) as manager:
        store(manager, *range(10))
        assert reserve(manager, 99, num_bytes=11 * PAGE_BYTES)[0] == [FULL]
        assert len(manager.l1) == 10


def test_a_full_slot_table_without_room_for_the_size_evicts_nothing(tmp_path):
    with manager_in(tmp_path, num_pages=12, num_slots=12) as manager:
        slots = store(manager, *range(12))
        manager.l1.pin([slots[6]])
        assert reserve(manager, 99, num_bytes=7 * PAGE_BYTES)[0] == [FULL]
        assert len(manager.l1) == 12
        manager.l1.unpin([slots[6]])


def test_room_that_pins_cut_into_pieces_evicts_nothing(tmp_path):
    with manager_in(tmp_path, num_pages=12) as manager:
        slots = store(manager, *range(12))
        manager.l1.pin([slots[3], slots[7]])
        assert reserve(manager, 99, num_bytes=5 * PAGE_BYTES)[0] == [FULL]
        assert len(manager.l1) == 12
        assert reserve(manager, 98, num_bytes=4 * PAGE_BYTES)[0] == [RESERVED]
        assert len(manager.l1) == 8
        manager.l1.unpin([slots[3], slots[7]])


def test_each_stretch_between_pins_is_searched_once_however_many_chunks_ask(tmp_path, monkeypatch):
    """Many small chunks with pins between them, and a prompt of larger ones: the search must not multiply."""
    calls = []
    real = L1Cache.evictable_run
    monkeypatch.setattr(L1Cache, "evictable_run", lambda *args: (calls.append(1), real(*args))[1])
    with manager_in(tmp_path, num_pages=256, num_slots=300) as manager:
        slots = store(manager, *range(256))
        manager.l1.pin(slots[::16])
        assert set(reserve(manager, *range(1000, 1100), num_bytes=20 * PAGE_BYTES)[0]) == {FULL}
        assert len(calls) == 16
        outcomes, _ = manager.reserve(keys(2, 2000, 2001, 2002), 0, [80000, 80000, 90000, PAGE_BYTES], 0, OWNER, b"")
        assert outcomes == [StoreOutcome.EXISTS, FULL, FULL, RESERVED]
        assert len(calls) == 16 + 16 + 1, "the last one needs a single page: its first victim is enough"
        manager.l1.unpin(slots[::16])


def test_a_store_of_many_large_chunks_compares_no_more_than_one_of_a_few(tmp_path, monkeypatch):
    found = []
    real = L1Cache.evictable_run

    def evictable_run(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(L1Cache, "evictable_run", evictable_run)
    monkeypatch.setattr("lmcache.storage.manager.MAX_CHUNKS_COMPARED", 35)
    with manager_in(tmp_path, num_pages=256, num_slots=300) as manager:
        for _ in range(2):
            store(manager, *range(256))
            found.clear()
            store(manager, *range(1000, 1010), num_bytes=10 * PAGE_BYTES)
            assert len(found) == 4 + 9, "the first chunk looks at four runs, the others take the first"
            for slot in [*manager.l1.slots()]:
                manager.l1.delete(slot)


def test_a_run_of_old_neighbours_goes_before_newer_ones(tmp_path):
    with manager_in(tmp_path, num_pages=40, num_slots=80) as manager:
        slots = store(manager, *range(40))
        for number in range(20):  # hit: chunks 0 to 19 are used later than 20 to 39
            manager.l1.touch([slots[number]])
        store(manager, 100, num_bytes=10 * PAGE_BYTES)
        assert set(range(20)) <= present(manager, range(40))


# -- sizes that differ ------------------------------------------------------------------------------------------------

# Two models, three chunk sizes, in pages: none divides another.
SIZES = (3, 7, 10)


def fill_at_random(manager, seed: int, num_stores: int) -> None:
    rng = random.Random(seed)
    for number in range(num_stores):
        size = rng.choice(SIZES) * PAGE_BYTES - rng.randrange(PAGE_BYTES)
        store(manager, seed * 10_000 + number, num_bytes=size)
        if rng.random() < 0.3:
            slots = sorted(manager.l1.slots())
            manager.l1.touch([rng.choice(slots)])
        if rng.random() < 0.1:
            manager.l1.delete(rng.choice(sorted(manager.l1.slots())))


@settings(max_examples=15)
@given(seed=st.integers(0, 99), share=st.floats(0.01, 0.9))
def test_of_free_bytes_in_pieces_nine_tenths_can_be_had_as_one(tmp_path_factory, seed, share):
    """EVI-6: what is free lies scattered; neighbours go, and not many more than are needed."""
    with manager_in(tmp_path_factory.mktemp("pool"), num_pages=256, num_slots=256) as manager:
        fill_at_random(manager, seed, 120)
        for number, slot in enumerate(sorted(manager.l1.slots())):
            if number % 2:
                manager.l1.delete(slot)
        free = manager.l1.allocator.free_pages
        wanted = max(1, int(free * share))
        before = manager.l1.committed_pages
        assert reserve(manager, 10**7, num_bytes=wanted * PAGE_BYTES)[0] == [RESERVED]
        assert before - manager.l1.committed_pages < wanted + max(SIZES)


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_mixed_sizes_never_fail_to_store_and_use_most_of_the_pool(tmp_path_factory, seed):
    with manager_in(tmp_path_factory.mktemp("pool"), num_pages=256, num_slots=256) as manager:
        fill_at_random(manager, seed, 300)
        assert manager.l1.used_pages > 128
        manager.l1.check()


@pytest.mark.parametrize("num_pages", [1, 2, 50, 255, 256])
def test_any_size_up_to_the_pool_can_be_had_when_nothing_is_held(tmp_path, num_pages):
    with manager_in(tmp_path, num_pages=256, num_slots=256) as manager:
        fill_at_random(manager, 5, 200)
        assert reserve(manager, 10**7, num_bytes=num_pages * PAGE_BYTES)[0] == [RESERVED]


# -- the watermark ----------------------------------------------------------------------------------------------------


def test_no_pass_is_wanted_while_all_that_is_above_the_watermark_is_pinned(tmp_path):
    with manager_in(tmp_path, num_pages=10, watermark=0.5, ratio=0.1) as manager:
        slots = store(manager, *range(8))
        assert manager.is_above_watermark
        manager.l1.pin(slots)
        manager.run_pass()
        assert not manager.is_above_watermark
        manager.l1.unpin(slots)
        manager.run_pass()
        assert manager.l1.used_pages == 4
        store(manager, *range(20, 24))
        assert manager.is_above_watermark


def test_a_pass_above_the_watermark_frees_down_to_the_low_one_oldest_first(tmp_path):
    removed = []
    settings_ = {"watermark": 0.8, "ratio": 0.3, "on_removed": lambda *what: removed.append(what)}
    with manager_in(tmp_path, num_pages=100, num_slots=100, **settings_) as manager:
        for number in range(80):
            store(manager, number)
        manager.run_pass()
        assert (len(manager.l1), manager.wants_pass_soon) == (80, False)
        store(manager, 80)
        manager.run_pass()
        assert present(manager, range(81)) == set(range(31, 81))
        assert removed == [(RemovalReason.WATERMARK, 31, 31 * PAGE_BYTES)]
        manager.run_pass()
        assert not manager.wants_pass_soon


def test_a_pass_removes_a_bounded_number_and_the_next_goes_on(tmp_path):
    total = 2 * MAX_EVICTED_PER_PASS
    with manager_in(tmp_path, num_pages=total, num_slots=total, watermark=0.9, ratio=0.9) as manager:
        for first in range(0, total, 64):
            store(manager, *range(first, first + 64))
        manager.run_pass()
        assert len(manager.l1) == total - MAX_EVICTED_PER_PASS
        assert manager.wants_pass_soon
        manager.run_pass()
        manager.run_pass()
        assert len(manager.l1) == 0
        assert not manager.wants_pass_soon


def test_a_pass_that_finds_only_pinned_chunks_gives_up_until_the_next(tmp_path):
    with manager_in(tmp_path, num_pages=10, watermark=0.5, ratio=0.5) as manager:
        slots = store(manager, *range(8))
        manager.l1.pin(slots)
        manager.run_pass()
        assert (len(manager.l1), manager.wants_pass_soon) == (8, False)
        manager.l1.unpin(slots)
        manager.run_pass()
        assert len(manager.l1) == 0


# -- removing on request ----------------------------------------------------------------------------------------------


@pytest.fixture
def filled(tmp_path):
    """Chunks 0 to 9 of one page; 0 to 4 of namespace 1, the others of 2; 3 and 7 pinned."""
    with manager_in(tmp_path, num_pages=16, num_slots=16) as manager:
        slots = store(manager, *range(5), namespace_id=1) + store(manager, *range(5, 10), namespace_id=2)
        manager.l1.pin([slots[3], slots[7]])
        yield manager
        manager.l1.unpin([slots[3], slots[7]])


def removed_by(manager, **selection) -> tuple[set[int], int, int, int, int]:
    """Which chunks went, and the reply's four numbers. A dry run first must count the same and remove nothing."""
    before = present(manager, range(10))
    wanted = Selection(**selection)
    dry = remove(manager, wanted, RemovalReason.REQUEST, dry_run=True)
    assert present(manager, range(10)) == before
    removal = remove(manager, wanted, RemovalReason.REQUEST, dry_run=False)
    assert removal == dry
    gone = before - present(manager, range(10))
    assert (len(gone), len(gone) * PAGE_BYTES) == (removal.objects, removal.removed_bytes)
    return gone, removal.objects, removal.removed_bytes, removal.kept_objects, removal.kept_bytes


def test_removing_everything_keeps_and_counts_what_is_pinned(filled):
    assert removed_by(filled) == (set(range(10)) - {3, 7}, 8, 8 * PAGE_BYTES, 2, 2 * PAGE_BYTES)
    assert filled.l1.find_prefix(keys(*range(10)), 1) == []


def test_removing_leaves_reservations_alone(filled):
    _, held = reserve(filled, 50)
    removed_by(filled)
    assert len(filled.l1.commit(held, OWNER)) == 1


@pytest.mark.parametrize(("num_bytes", "gone"), [(0, set()), (1, {4}), (PAGE_BYTES, {4}), (PAGE_BYTES + 1, {4, 2})])
def test_removing_bytes_goes_by_age_and_stops_when_it_is_enough(filled, num_bytes, gone):
    assert removed_by(filled, max_bytes=num_bytes)[0] == gone


def test_removing_one_namespace_leaves_the_other(filled):
    assert removed_by(filled, namespace_ids=frozenset([2]))[0] == {5, 6, 8, 9}
    assert removed_by(filled, namespace_ids=frozenset())[0] == set()


def test_removing_by_age_spares_what_was_used_since(filled, monkeypatch):
    ages = {filled.l1.find(key(number), 0): 100.0 - number for number in range(10)}
    monkeypatch.setattr(L1Cache, "idle_seconds", lambda self, slot: ages[slot])
    assert removed_by(filled, older_than_seconds=98)[0] == {0, 1, 2}
    assert removed_by(filled, older_than_seconds=92, namespace_ids=frozenset([2]))[0] == {5, 6, 8}


def test_removing_keys_takes_all_ranks_of_them_once_and_nothing_else(filled):
    store(filled, 2, rank=3)
    removal = remove(filled, Selection(keys=keys(2, 7, 2, 77)), RemovalReason.REQUEST, dry_run=False)
    assert (removal.objects, removal.kept_objects) == (2, 1)
    assert present(filled, range(10)) == set(range(10)) - {2}
    assert filled.l1.find(key(2), 3) is None


def test_each_removal_is_told_with_its_reason_and_bytes(tmp_path):
    told = []
    with manager_in(tmp_path, num_pages=8, on_removed=lambda *what: told.append(what)) as manager:
        store(manager, 1, num_bytes=5000)
        remove(manager, Selection(), RemovalReason.CLEAR, dry_run=False)
    assert told == [(RemovalReason.CLEAR, 1, 5000)]


# -- health -----------------------------------------------------------------------------------------------------------


def test_a_manager_that_can_store_has_no_problems_and_asking_changes_nothing(tmp_path):
    with manager_in(tmp_path, num_pages=4) as manager:
        for number in range(8):
            before = manager.l1.allocator.extents()
            assert manager.problems() == []
            assert manager.l1.allocator.extents() == before
            store(manager, number)


def test_a_pool_that_is_pinned_and_reserved_all_over_says_so(tmp_path):
    with manager_in(tmp_path, num_pages=4) as manager:
        slots = store(manager, 1, 2, 3)
        manager.l1.pin(slots)
        reserve(manager, 4, owner=OTHER)
        assert manager.problems() == [f"L1 is full: {3 * PAGE_BYTES} bytes pinned, {PAGE_BYTES} reserved, nothing evictable"]
        manager.l1.unpin(slots)
        assert manager.problems() == []
