"""The life of an entry: states, pins, generations, and what the books say."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.pool import PAGE_BYTES, SlotState
from lmcache.protocol import Placement, StoreOutcome
from lmcache.storage.l1 import AccountingError
from tests.pools import OTHER, OWNER, content, key, keys, manager_in, reserve, store


@pytest.fixture
def manager(tmp_path):
    with manager_in(tmp_path, num_pages=32, num_slots=16) as manager:
        yield manager


def test_a_reservation_is_invisible_until_its_commit(manager):
    _, [placement] = reserve(manager, 1)
    assert manager.l1.find(key(1), 0) is None
    assert manager.l1.find_prefix(keys(1), 1) == []
    assert len(manager.l1) == 0
    assert (manager.l1.reserved_pages, manager.l1.committed_pages) == (1, 0)
    assert manager.l1.commit([placement], OWNER) == [placement.slot]
    assert manager.l1.find(key(1), 0) == placement.slot
    assert (manager.l1.reserved_pages, manager.l1.committed_pages) == (0, 1)


def test_a_placement_names_the_committed_bytes_and_their_checksum(manager):
    _, [placement] = reserve(manager, 1, num_bytes=5000)
    filled = msgspec.structs.replace(placement, checksum=77)
    [slot] = manager.l1.commit([filled], OWNER)
    assert manager.l1.placement(slot) == filled
    assert manager.l1.used_pages == 2


def test_a_chunk_that_is_stored_or_being_written_gets_no_second_place(manager):
    store(manager, 1)
    _, [held] = reserve(manager, 2)
    outcomes, placements = reserve(manager, 1, 2, 3, owner=OTHER)
    assert outcomes == [StoreOutcome.EXISTS, StoreOutcome.BUSY, StoreOutcome.RESERVED]
    assert len(placements) == 1
    manager.l1.abort([held], OWNER)
    assert reserve(manager, 2, owner=OTHER)[0] == [StoreOutcome.RESERVED]


def test_the_same_key_twice_in_one_request_gets_one_place(manager):
    outcomes, placements = reserve(manager, 1, 1)
    assert outcomes == [StoreOutcome.RESERVED, StoreOutcome.BUSY]
    assert len(placements) == 1


def test_only_its_owner_can_commit_or_abort_a_reservation(manager):
    _, placements = reserve(manager, 1)
    assert manager.l1.commit(placements, OTHER) == []
    assert manager.l1.abort(placements, OTHER) == 0
    assert manager.l1.num_reserved == 1
    assert manager.l1.commit(placements, OWNER) != []


def test_an_old_generation_can_neither_commit_nor_abort(manager):
    _, [old] = reserve(manager, 1)
    manager.l1.abort([old], OWNER)
    _, [new] = reserve(manager, 1)
    assert (new.slot, new.generation) == (old.slot, old.generation + 1)
    assert manager.l1.commit([old], OWNER) == []
    assert manager.l1.abort([old], OWNER) == 0
    assert manager.l1.commit([new], OWNER) == [new.slot]


@pytest.mark.parametrize("slot", [3, 15, 16, 2**31, 2**62])
def test_a_slot_never_handed_out_can_neither_be_committed_nor_aborted(manager, slot):
    reserve(manager, 1)
    forged = [Placement(slot, 0, PAGE_BYTES, 0)]
    assert manager.l1.commit(forged, OWNER) == []
    assert manager.l1.abort(forged, OWNER) == 0


def test_a_commit_happens_once(manager):
    _, placements = reserve(manager, 1)
    assert manager.l1.commit(placements * 3, OWNER) == [placements[0].slot]
    assert manager.l1.commit(placements, OWNER) == []
    assert manager.l1.abort(placements, OWNER) == 0
    assert len(manager.l1) == 1


def test_the_generation_rises_with_every_way_to_become_free(manager):
    seen = []
    for _ in range(3):
        _, [placement] = reserve(manager, 1)
        seen.append(placement.generation)
        manager.l1.abort([placement], OWNER)
        [slot] = store(manager, 1)
        seen.append(manager.l1.placement(slot).generation)
        assert manager.l1.pool.generation(slot) == seen[-1], "committing and pinning leave it as it is"
        manager.l1.delete(slot)
    assert seen == list(range(6))
    assert manager.l1.pool.generation(0) == 6


def test_the_generation_has_changed_before_the_extent_can_be_had_again(manager, monkeypatch):
    [slot] = store(manager, 1)
    before = manager.l1.pool.generation(slot)
    seen = []
    free = manager.l1.allocator.free
    monkeypatch.setattr(
        manager.l1.allocator, "free", lambda *args: (seen.append(manager.l1.pool.generation(slot)), free(*args))
    )
    manager.l1.delete(slot)
    assert seen == [before + 1]


def test_pins_are_counted_and_keep_an_entry_until_the_last_is_gone(manager):
    [slot] = store(manager, 1, num_bytes=2 * PAGE_BYTES)
    manager.l1.pin([slot, slot])
    manager.l1.pin([slot])
    assert (manager.l1.num_pins, manager.l1.pinned_pages) == (3, 2)
    for left in (2, 1):
        manager.l1.unpin([slot])
        assert (manager.l1.num_pins, manager.l1.pinned_pages) == (left, 2)
        with pytest.raises(AccountingError, match="pinned"):
            manager.l1.delete(slot)
    manager.l1.unpin([slot])
    assert (manager.l1.num_pins, manager.l1.pinned_pages) == (0, 0)
    assert manager.l1.delete(slot) == 2 * PAGE_BYTES


def test_a_slot_freed_and_used_again_starts_without_pins(manager):
    [slot] = store(manager, 1)
    manager.l1.pin([slot])
    manager.l1.unpin([slot])
    manager.l1.delete(slot)
    assert store(manager, 2) == [slot]
    assert not manager.l1.is_pinned(slot)


@settings(max_examples=30)
@given(
    world_size=st.integers(1, 4),
    present=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=5, max_size=5),
)
def test_a_prefix_ends_at_the_first_chunk_that_some_rank_lacks(tmp_path_factory, world_size, present):
    """COR-5: what one rank lacks, no rank may use."""
    with manager_in(tmp_path_factory.mktemp("pool"), num_pages=32, num_slots=32) as manager:
        slots = {}
        for number, ranks in enumerate(present):
            for rank, is_there in enumerate(ranks):
                if is_there:
                    [slots[number, rank]] = store(manager, number, rank=rank)
        length = next((n for n, ranks in enumerate(present) if not all(ranks[:world_size])), len(present))
        expected = [slots[number, rank] for number in range(length) for rank in range(world_size)]
        assert manager.l1.find_prefix(keys(*range(5)), world_size) == expected


def test_ranks_of_one_key_are_entries_of_their_own(manager):
    first, second = store(manager, 1)[0], store(manager, 1, rank=1)[0]
    assert (manager.l1.find(key(1), 0), manager.l1.find(key(1), 1), manager.l1.find(key(1), 2)) == (first, second, None)
    manager.l1.delete(first)
    assert (manager.l1.find(key(1), 0), manager.l1.find(key(1), 1)) == (None, second)


def test_all_ranks_are_found_last_chunk_first_and_each_once(manager):
    slots = {(number, rank): store(manager, number, rank=rank)[0] for number in (1, 2) for rank in (0, 2)}
    assert manager.l1.find_all_ranks(keys(1, 2, 2, 9, 1)) == [slots[1, 0], slots[1, 2], slots[2, 0], slots[2, 2]]


# -- the order of going -----------------------------------------------------------------------------------------------


def victims(manager) -> list[int]:
    """The policy's order, not longer than twice what is stored: a broken list would have no end."""
    limit = 2 * len(manager.l1) + 1
    return [slot for slot, _ in zip(manager.l1.policy.victims(), range(limit), strict=False)]


def test_a_prompt_goes_from_its_end(manager):
    slots = store(manager, 1, 2, 3)
    assert victims(manager) == slots[::-1]


def test_a_prompt_stored_in_steps_goes_from_its_end(manager):
    first = store(manager, 1, 2)
    between = store(manager, 7)
    rest = store(manager, 3, 4, parent=key(2))
    assert victims(manager) == [*rest[::-1], *first[::-1], *between]


def test_steps_committed_together_keep_their_order(manager):
    _, first = reserve(manager, 1, 2)
    _, second = reserve(manager, 3, 4, parent=key(2))
    slots = manager.l1.commit(first + second, OWNER)
    assert victims(manager) == slots[::-1]


def test_a_parent_that_is_gone_makes_the_step_the_newest(manager):
    [first] = store(manager, 1)
    _, step = reserve(manager, 2, parent=key(1))
    manager.l1.delete(first)
    [other] = store(manager, 9)
    assert victims(manager) == [other]
    slots = manager.l1.commit(step, OWNER)
    assert victims(manager) == [other, *slots]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0], [2, 0, 1]])
def test_chunks_committed_in_any_order_leave_the_list_whole(manager, order):
    """A chunk's parent may come into the list by the very commit that looks for it."""
    [old] = store(manager, 9)
    _, placements = reserve(manager, 1, 2, 3)
    slots = manager.l1.commit([placements[index] for index in order], OWNER)
    assert sorted(victims(manager)) == sorted([old, *slots])
    assert len(victims(manager)) == 4


def test_a_chunk_that_calls_itself_its_parent_leaves_the_list_whole(manager):
    [slot] = store(manager, 1, parent=key(1))
    [other] = store(manager, 2)
    assert victims(manager) == [slot, other]


def test_a_hit_makes_a_prefix_the_newest_its_first_chunk_last_to_go(manager):
    one, other = store(manager, 1, 2, 3), store(manager, 4, 5)
    manager.l1.touch(one[:2])
    assert victims(manager) == [one[2], *other[::-1], one[1], one[0]]
    assert manager.l1.idle_seconds(one[0]) <= manager.l1.idle_seconds(other[0])


# -- space ------------------------------------------------------------------------------------------------------------


def test_extents_take_whole_pages_and_never_overlap(manager):
    lengths = [1, PAGE_BYTES - 1, PAGE_BYTES, PAGE_BYTES + 1, 3 * PAGE_BYTES]
    ranges = []
    for number, length in enumerate(lengths):
        _, [placement] = reserve(manager, number, num_bytes=length)
        assert placement.offset % PAGE_BYTES == 0
        assert placement.length == length
        ranges.append(range(placement.offset, placement.offset + -(-length // PAGE_BYTES) * PAGE_BYTES))
    for one in ranges:
        assert sum(len(range(max(one.start, other.start), min(one.stop, other.stop))) for other in ranges) == len(one)
    assert manager.l1.reserved_pages == 1 + 1 + 1 + 2 + 3


def test_the_extent_freed_last_is_handed_out_first(manager):
    slots = store(manager, *range(10))
    offsets = [manager.l1.placement(slot).offset for slot in slots]
    for slot in (slots[2], slots[6], slots[4]):
        manager.l1.delete(slot)
    found = [reserve(manager, number)[1][0].offset for number in (20, 21, 22)]
    assert found == [offsets[4], offsets[6], offsets[2]]


def test_stored_bytes_are_read_back(manager):
    slots = store(manager, 1, 2, 3, num_bytes=5000)
    for number, slot in zip((1, 2, 3), slots, strict=True):
        place = manager.l1.placement(slot)
        assert bytes(manager.l1.pool.data[place.offset : place.offset + place.length]) == content(number, 5000)


def test_nothing_that_is_not_resident_is_handed_out(tmp_path, monkeypatch):
    from lmcache.storage.residency import Residency

    monkeypatch.setattr(Residency, "frontier_pages", lambda self: 5)
    with manager_in(tmp_path, num_pages=32) as manager:
        assert manager.l1.allocator.extents() == [(0, 5)]
        outcomes, _ = reserve(manager, *range(6))
        assert outcomes == [StoreOutcome.RESERVED] * 5 + [StoreOutcome.FULL]
        monkeypatch.setattr(Residency, "frontier_pages", lambda self: 7)
        outcomes, placements = reserve(manager, *range(5, 8))
        assert outcomes == [StoreOutcome.RESERVED] * 2 + [StoreOutcome.FULL]
        assert [placement.offset // PAGE_BYTES for placement in placements] == [5, 6]


# -- the books --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["reserved_pages", "committed_pages", "pinned_pages", "num_pins"])
@pytest.mark.parametrize("error", [1, -1])
def test_a_wrong_total_is_found(manager, name, error):
    [slot] = store(manager, 1)
    reserve(manager, 2)
    manager.l1.pin([slot])
    manager.l1.check()
    setattr(manager.l1, name, getattr(manager.l1, name) + error)
    with pytest.raises(AccountingError):
        manager.l1.check()
    setattr(manager.l1, name, getattr(manager.l1, name) - error)
    manager.l1.unpin([slot])


def test_two_wrong_totals_that_cancel_out_are_found(manager):
    store(manager, 1)
    manager.l1.committed_pages -= 1
    manager.l1.reserved_pages += 1
    manager.l1.check(deep=False)
    with pytest.raises(AccountingError, match="entries add up"):
        manager.l1.check()
    manager.l1.committed_pages += 1
    manager.l1.reserved_pages -= 1


def test_a_page_lost_by_the_allocator_is_found(manager):
    start = manager.l1.allocator.allocate(1)
    with pytest.raises(AccountingError, match="the pool has 32"):
        manager.l1.check()
    manager.l1.allocator.free(start, 1)


def test_a_record_damaged_under_the_server_is_an_error_and_no_answer(manager):
    [slot] = store(manager, 1)
    good = manager.l1.record(slot)
    manager.l1.pool._words[slot * 16] ^= 1
    with pytest.raises(AccountingError, match="damaged"):
        manager.l1.placement(slot)
    manager.l1.pool.write(slot, good)
    assert good.state is SlotState.COMMITTED


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_prefix_is_found_chunk_by_chunk_whatever_was_stored_after_what(tmp_path_factory, data):
    with manager_in(tmp_path_factory.mktemp("hints"), num_pages=64, num_slots=12) as manager:
        numbers = st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True)
        for prompt in data.draw(st.lists(numbers, min_size=1, max_size=8)):
            manager.l1.commit(reserve(manager, *prompt)[1], OWNER)
            if data.draw(st.booleans()):
                manager.l1.delete(next(manager.l1.policy.victims()))
        for prompt in data.draw(st.lists(numbers, min_size=1, max_size=8)):
            slots = [manager.l1.find(key(number), 0) for number in prompt]
            hit = slots.index(None) if None in slots else len(slots)
            assert manager.l1.find_prefix(keys(*prompt), 1) == slots[:hit]
