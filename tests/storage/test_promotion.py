"""The way up from a tier: what a lookup gets, when, and that no late write touches another chunk."""

import time
from pathlib import Path

import pytest

from lmcache.pool import PAGE_BYTES, is_client_alive
from lmcache.protocol import StoreOutcome
from lmcache.storage.l2.base import Reason
from lmcache.storage.l2.breaker import MAX_FAILURES, BreakerState
from lmcache.storage.manager import RemovalReason, Selection
from lmcache.storage.promotion import MAX_ENTRIES
from tests.pools import OWNER, content, key, keys, remove, reserve, store
from tests.storage.tiered import name_of, put_value, tiered_in


def test_a_lookup_loads_what_l1_lacks(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.store(0, 1)
        put_value(tiered.fake, 2, 3, 4)
        assert tiered.look_up(0, 1, 2, 3, 4, 5) == 5
        assert tiered.found[0].l1_chunks == 2
        assert [tiered.bytes_of(number) for number in range(5)] == [content(number, PAGE_BYTES) for number in range(5)]
        slot = tiered.manager.l1.find(key(3), 0)
        assert slot is not None
        assert tiered.manager.l1.record(slot).namespace_id == 7
        assert (tiered.value("lookup_chunks", "hit"), tiered.value("lookup_chunks", "miss")) == (3, 1)
        assert (tiered.value("read_chunks"), tiered.value("read_bytes")) == (3, 3 * PAGE_BYTES)


def test_what_was_found_is_pinned_until_the_answer_was_given(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0, 1)
        pins: list[int] = []
        assert tiered.tiers.look_up(keys(0, 1), 1, [], True, None, lambda found: pins.append(tiered.manager.l1.num_pins))
        tiered.until(lambda: pins)
        assert pins == [2]
        assert tiered.manager.l1.num_pins == 0


def test_a_second_lookup_waits_for_the_first_ones_loads(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0, 1, 2)
        tiered.fake.stop("get")
        assert tiered.begin(0, 1)
        tiered.until(lambda: tiered.fake.num_waiting)
        assert tiered.begin(0, 1, 2)
        tiered.until(lambda: tiered.fake.num_waiting == 2)
        tiered.fake.go()
        tiered.until(lambda: len(tiered.found) == 2)
        assert len(tiered.manager.l1.find_prefix(keys(0, 1, 2), 1)) == 3
        assert tiered.fake.calls.count("get") == 3


def test_the_same_key_twice_in_one_lookup_is_loaded_once(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        assert tiered.look_up(0, 0) == 2
        assert tiered.fake.calls.count("get") == 1


def test_the_prefix_ends_where_a_rank_is_missing(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0, 1, 2)
        put_value(tiered.fake, 0, 1, rank=1)
        assert tiered.look_up(0, 1, 2, world_size=2) == 2
        assert tiered.fake.calls.count("get") == 4
        assert tiered.bytes_of(1, rank=1) == content(1, PAGE_BYTES)


def test_chunks_behind_a_gap_are_not_loaded(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 1, 2)
        assert tiered.look_up(0, 1, 2) == 0
        assert "get" not in tiered.fake.calls


def test_what_is_in_l1_behind_a_gap_is_not_loaded_again(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        store(tiered.manager, 1)
        put_value(tiered.fake, 0, 1, 2)
        assert tiered.look_up(0, 1, 2) == 3
        assert tiered.fake.calls.count("get") == 2


def test_a_corrupt_value_ends_the_prefix_and_is_deleted(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0, 1, 2)
        tiered.fake.flip(name_of(1))
        assert tiered.look_up(0, 1, 2) == 1
        assert name_of(1) not in tiered.fake.values
        assert tiered.value("failures", "read", "corrupt") == 1
        assert tiered.metrics.value("lmcache_l2_unpromoted_chunks", "corrupt") == 1
        assert tiered.metrics.value("lmcache_l2_unpromoted_chunks", "unreachable") == 1
        assert tiered.tier.reads.is_closed


def test_a_value_under_another_chunks_name_is_not_served(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0, 1)
        tiered.fake.values[name_of(0)] = tiered.fake.values[name_of(1)]
        assert tiered.look_up(0, 1) == 0


def test_the_deadline_answers_with_what_is_there_and_the_rest_comes_late(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.store(0)
        tiered.settle()
        put_value(tiered.fake, 1)
        tiered.fake.stop("get")
        assert tiered.look_up(0, 1, seconds=0.05) == 1
        assert tiered.metrics.value("lmcache_l2_lookups_past_deadline") == 1
        assert tiered.manager.l1.num_reserved == 1
        tiered.fake.go()
        tiered.settle()
        assert tiered.bytes_of(1) == content(1, PAGE_BYTES)


@pytest.mark.parametrize("ends_by", ["deadline", "clear"])
def test_a_late_write_never_touches_a_chunk_that_was_stored_meanwhile(tmp_path: Path, ends_by: str):
    """The thread writes into its extent long after nobody wants the chunk: all of L1 is stored anew in between."""
    with tiered_in(tmp_path, num_pages=8) as tiered:
        put_value(tiered.fake, 0)
        tiered.fake.stop("get")
        assert tiered.begin(0, seconds=0.05 if ends_by == "deadline" else None)
        tiered.until(lambda: tiered.fake.num_waiting)
        if ends_by == "clear":
            tiered.tiers.stop_moving()
        tiered.until(lambda: tiered.found)
        outcomes, placements = reserve(tiered.manager, *range(10, 18))
        assert outcomes == [StoreOutcome.RESERVED] * 7 + [StoreOutcome.FULL]
        for number, place in zip(range(10, 17), placements, strict=True):
            tiered.manager.l1.pool.data[place.offset : place.offset + PAGE_BYTES] = content(number, PAGE_BYTES)
        tiered.manager.l1.commit(placements, OWNER)
        tiered.fake.go()
        tiered.settle()
        for number in range(10, 17):
            assert tiered.bytes_of(number) == content(number, PAGE_BYTES)
        assert (tiered.manager.l1.find(key(0), 0) is None) == (ends_by == "clear")


def test_a_lookup_without_a_client_loads_nothing_and_tells_the_tiers(tmp_path: Path):
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        store(tiered.manager, 0)
        put_value(tiered.fakes[0], 0, 1)
        put_value(tiered.fakes[1], 1, 2, 4)
        assert tiered.look_up(0, 1, 2, 3, 4, promotes=False) == 1
        [found] = tiered.found
        assert (found.l1_chunks, found.hit_chunks, found.tiers) == (1, 3, {"fake-1": 2, "fake-2": 2})
        assert all("get" not in fake.calls for fake in tiered.fakes)


def test_the_next_tier_is_asked_for_what_the_first_lacks(tmp_path: Path):
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        put_value(tiered.fakes[0], 0)
        put_value(tiered.fakes[1], 0, 1)
        assert tiered.look_up(0, 1) == 2
        assert [fake.calls.count("get") for fake in tiered.fakes] == [1, 1]
        assert tiered.value("lookup_chunks", "miss", tier="fake-1") == 1
        tiered.settle()
        assert name_of(1) in tiered.fakes[0].values  # what the lower tier delivered goes to the one above


def test_no_more_than_the_share_of_l1_is_under_way(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=16, inflight_ratio=0.25) as tiered:
        put_value(tiered.fake, *range(8))
        assert tiered.look_up(*range(8)) == 4
        assert tiered.metrics.value("lmcache_l2_unpromoted_chunks", "busy") == 1


def test_loading_evicts_others_and_never_its_own_prefix(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=8) as tiered:
        store(tiered.manager, 0, 1)
        store(tiered.manager, *range(20, 26))
        put_value(tiered.fake, *range(2, 12))
        assert tiered.look_up(*range(12)) == 8
        assert tiered.metrics.value("lmcache_l2_unpromoted_chunks", "full") == 1


def test_loaded_chunks_are_evicted_from_the_end_of_the_prompt(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=16) as tiered:
        put_value(tiered.fake, *range(6))
        assert tiered.look_up(*range(6)) == 6
        victims = [tiered.manager.l1.record(slot).key for slot in tiered.manager.l1.policy.victims()]
        assert victims == [key(number) for number in range(5, -1, -1)]


def test_a_tier_that_fails_is_left_alone_and_tried_again_by_itself(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        tiered.fake.errors["lengths"] = Reason.UNREACHABLE
        for _ in range(MAX_FAILURES):
            assert tiered.look_up(0) == 0
        assert not tiered.tier.reads.is_closed
        assert not tiered.begin(0)
        assert tiered.value("skipped_lookups", "down") == 1
        assert tiered.value("failures", "find", "unreachable") == MAX_FAILURES
        del tiered.fake.errors["lengths"]
        tiered.until(lambda: tiered.tier.reads.is_closed, "the probe's success")
        assert tiered.look_up(0) == 1


def test_a_tier_that_hangs_is_left_alone_after_some_deadlines(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        tiered.fake.stop("lengths")
        for _ in range(MAX_FAILURES):
            assert tiered.look_up(0, seconds=0.01) == 0
        assert not tiered.begin(0)
        assert tiered.value("failures", "find", "deadline") == MAX_FAILURES


def test_a_tier_whose_reads_hang_is_left_alone_although_it_finds(tmp_path: Path):
    with tiered_in(tmp_path, read_threads=MAX_FAILURES) as tiered:
        put_value(tiered.fake, *range(MAX_FAILURES))
        tiered.fake.stop("get")
        for number in range(MAX_FAILURES):
            assert tiered.begin(number)
            tiered.until(lambda: tiered.fake.num_waiting > number)  # noqa: B023
            [promotion] = [one for one in tiered.tiers._promoter._promotions if not one.is_answered]
            promotion.deadline = 0.0
            tiered.until(lambda: len(tiered.found) > number)  # noqa: B023
        assert tiered.value("failures", "read", "deadline") == MAX_FAILURES
        assert not tiered.tier.reads.is_closed
        assert not tiered.begin(0)


def test_a_tier_whose_reads_failed_is_used_again_when_a_lookup_got_something(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        breaker = tiered.tier.reads
        put_value(tiered.fake, 0, 1, 2)
        tiered.fake.errors["get"] = Reason.ERROR
        for _ in range(MAX_FAILURES):
            assert tiered.look_up(0) == 0
        assert not breaker.is_closed
        assert tiered.value("failures", "read", "error") == MAX_FAILURES
        breaker._probe_at = 0.0
        tiered.tiers.tick()
        assert not breaker.is_closed
        assert tiered.look_up(9) == 0  # nothing there to read
        assert not breaker.is_closed
        assert tiered.look_up(0, promotes=False) == 0
        assert tiered.found[-1].hit_chunks == 1  # a description reads nothing
        assert tiered.look_up(0) == 0
        assert tiered.value("failures", "read", "error") == MAX_FAILURES + 1
        assert tiered.tier.reads.state is BreakerState.OPEN
        breaker._probe_at = 0.0
        tiered.fake.errors.clear()
        tiered.fake.stop("get")
        assert tiered.begin(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        assert not tiered.begin(1)  # one lookup at a time
        tiered.fake.go()
        tiered.until(lambda: breaker.is_closed, "the lookup's read")
        assert tiered.look_up(0, 1, 2) == 3


@pytest.mark.parametrize("hangs_at", ["lengths", "get"])
def test_a_tier_that_is_busy_for_others_has_not_failed(tmp_path: Path, hangs_at: str):
    """Its threads deliver, and this lookup's turn has not come by its deadline."""
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        tiered.fake.stop(hangs_at)
        assert tiered.begin(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        tiered.tier.last_progress_at["find" if hangs_at == "lengths" else "read"] = time.monotonic()
        [promotion] = tiered.tiers._promoter._promotions
        promotion.deadline = 0.0
        tiered.until(lambda: tiered.found)
        assert tiered.value("failures", "find", "deadline") == tiered.value("failures", "read", "deadline") == 0


def test_a_tier_that_always_answers_too_late_has_failed(tmp_path: Path):
    """One lookup after the other would wait in vain."""
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        for number in range(MAX_FAILURES):
            tiered.fake.stop("lengths")
            assert tiered.begin(0)
            tiered.until(lambda: tiered.fake.num_waiting > number)  # noqa: B023
            [promotion] = [one for one in tiered.tiers._promoter._promotions if not one.is_answered]
            promotion.deadline = 0.0
            tiered.until(lambda: len(tiered.found) > number)  # noqa: B023
            tiered.fake.go()
            tiered.until(lambda: not tiered.tiers.num_moving)
        assert not tiered.begin(0)
        assert tiered.value("failures", "find", "deadline") == MAX_FAILURES


def test_a_read_error_is_a_miss_of_what_follows(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0, 1)
        tiered.fake.errors["get"] = Reason.ERROR
        assert tiered.look_up(0, 1) == 0
        assert tiered.metrics.value("lmcache_l2_unpromoted_chunks", "failed") == 2


def test_a_bug_in_an_adapter_costs_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        monkeypatch.setattr(tiered.fake, "get", lambda key, parts: 1 / 0)
        assert tiered.look_up(0) == 0
        assert tiered.value("failures", "read", "error") == 1


def test_a_tier_slower_than_the_engine_is_not_waited_for(tmp_path: Path):
    with tiered_in(tmp_path, min_tokens_per_second=1000.0) as tiered:
        put_value(tiered.fake, *range(4))
        tiered.tier.read_speed.add(PAGE_BYTES, 1.0)  # 16 tokens a second
        assert tiered.look_up(0) == 1  # now and then one lookup measures again
        tiered.tier.read_speed.add(PAGE_BYTES, 100.0)
        assert tiered.look_up(1) == 0
        assert tiered.value("skipped_lookups", "slow") == 1


def test_without_a_threshold_any_speed_is_good(tmp_path: Path):
    with tiered_in(tmp_path, min_tokens_per_second=0.0) as tiered:
        put_value(tiered.fake, 0, 1)
        tiered.tier.read_speed.add(1, 1000.0)
        assert (tiered.look_up(0), tiered.look_up(1)) == (1, 1)


def test_a_chunk_that_a_client_is_storing_ends_the_prefix(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0, 1, 2)
        _, placements = reserve(tiered.manager, 1)
        assert tiered.look_up(0, 1, 2) == 1
        tiered.manager.l1.abort(placements, OWNER)


def test_a_tier_whose_clear_hangs_is_not_asked_and_the_others_are(tmp_path: Path):
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        for fake in tiered.fakes:
            put_value(fake, 0)
        tiered.fake.stop("clear")
        clearing = tiered.tiers.clear()
        tiered.until(lambda: clearing.removals[1].done)
        assert not clearing.is_done
        put_value(tiered.fakes[1], 0, 1)  # since then
        assert tiered.look_up(0, 1) == 2
        assert tiered.value("skipped_lookups", "cleared") == 1
        assert tiered.value("skipped_lookups", "cleared", tier="fake-2") == 0
        tiered.fake.go()
        tiered.until(lambda: clearing.is_done)
        put_value(tiered.fake, 2)
        assert tiered.look_up(2) == 1


def test_clear_leaves_no_promoted_chunk_behind(tmp_path: Path):
    """EVI-7."""
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0, 1)
        tiered.fake.stop("get")
        assert tiered.begin(0, 1)
        tiered.until(lambda: tiered.fake.num_waiting)
        clearing = tiered.tiers.clear()
        assert tiered.found[0].l1_chunks == 0
        assert not tiered.begin(0, 1)  # until it is done, nothing is asked
        tiered.fake.go()
        tiered.until(lambda: clearing.is_done and not tiered.tiers.num_moving)
        [removal] = clearing.removals
        assert (removal.objects, removal.done, removal.error) == (2, True, "")
        assert tiered.look_up(0, 1) == 0
        assert len(tiered.manager.l1) == 0


def test_removing_the_pinned_prefix_is_not_possible_while_a_lookup_waits(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.store(0)
        tiered.settle()
        put_value(tiered.fake, 1)
        tiered.fake.stop("get")
        assert tiered.begin(0, 1)
        assert remove(tiered.manager, Selection(), RemovalReason.CLEAR, dry_run=False).kept_objects == 1
        tiered.fake.go()
        tiered.until(lambda: tiered.found)


def test_a_world_too_large_to_be_asked_for_is_not_asked_for(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        assert not tiered.begin(0, world_size=MAX_ENTRIES + 1)


def test_no_more_lookups_wait_than_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmcache.storage.promotion.MAX_PROMOTIONS", 2)
    with tiered_in(tmp_path) as tiered:
        tiered.fake.stop("lengths")
        assert [tiered.begin(0), tiered.begin(1), tiered.begin(2)] == [True, True, False]
        assert tiered.value("skipped_lookups", "busy") == 1
        tiered.fake.go()


@pytest.mark.parametrize("promotes", [True, False])
def test_lookups_stuck_at_one_tier_switch_off_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promotes: bool):
    monkeypatch.setattr("lmcache.storage.promotion.MAX_PROMOTIONS", 2)
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        put_value(tiered.fakes[1], 2)
        tiered.fake.stop("lengths")
        for number in range(2):
            assert tiered.begin(number, promotes=promotes, seconds=0.01)
        tiered.until(lambda: len(tiered.found) == 2)
        assert tiered.look_up(2) == 1
        assert tiered.value("skipped_lookups", "busy") == 1
        assert tiered.value("skipped_lookups", "busy", tier="fake-2") == 0
        tiered.fake.go()


def test_a_long_prompt_is_asked_for_in_calls_of_512(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=1024) as tiered:
        put_value(tiered.fake, *range(600))
        assert tiered.look_up(*range(600)) == 600
        assert tiered.fake.calls.count("lengths") == 2


def test_a_tier_is_asked_for_twice_as_many_each_time_and_no_further_than_the_first_gap(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.fake.keys_at_once = 4
        put_value(tiered.fake, *range(8))
        put_value(tiered.fake, *range(9, 40))
        assert tiered.look_up(*range(40)) == 8
        assert tiered.fake.asked == [4, 8]
        assert tiered.look_up(*range(100, 140), world_size=3) == 0
        assert tiered.fake.asked[2:] == [3]  # whole chunks


def test_a_lower_tier_fills_a_gap_and_the_one_above_is_asked_for_what_follows(tmp_path: Path):
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        for fake in tiered.fakes:
            fake.keys_at_once = 1
        put_value(tiered.fakes[0], 0, 2, 3)
        put_value(tiered.fakes[1], 0, 1, 2, 3)
        assert tiered.look_up(0, 1, 2, 3, 4) == 4
        assert [fake.calls.count("get") for fake in tiered.fakes] == [3, 1]


@pytest.mark.parametrize("is_asked_late", [False, True])
def test_what_is_known_at_half_of_the_time_is_loaded(tmp_path: Path, is_asked_late: bool):
    """One tier has said what it has, and the next one hangs; it has failed if most of the time went to it."""
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        put_value(tiered.fakes[0], 0, 1)
        put_value(tiered.fakes[1], 2)
        tiered.fakes[1].stop("lengths")
        assert tiered.begin(0, 1, 2)
        tiered.until(lambda: tiered.fakes[1].num_waiting)
        [promotion] = tiered.tiers._promoter._promotions
        assert promotion.find_until < promotion.deadline
        promotion.began_at = promotion.asked_at - (1e6 if is_asked_late else 0.0)
        promotion.find_until = 0.0
        tiered.until(lambda: tiered.found)
        assert len(tiered.manager.l1.find_prefix(keys(0, 1, 2), 1)) == 2
        assert tiered.metrics.value("lmcache_l2_lookups_past_deadline") == 0
        assert tiered.value("failures", "find", "deadline", tier="fake-2") == (not is_asked_late)
        tiered.fakes[1].go()
        tiered.settle()
        assert "get" not in tiered.fakes[1].calls  # its answer came too late for this lookup


def test_a_lookup_that_knows_of_nothing_yet_waits_until_its_deadline(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        tiered.fake.stop("lengths")
        assert tiered.begin(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        [promotion] = tiered.tiers._promoter._promotions
        promotion.find_until = 0.0
        tiered.tiers.tick()
        assert not tiered.found
        tiered.fake.go()
        tiered.until(lambda: tiered.found)
        assert len(tiered.manager.l1.find_prefix(keys(0), 1)) == 1


def test_a_description_tells_what_is_known_by_the_deadline(tmp_path: Path):
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        tiered.fake.keys_at_once = 1
        put_value(tiered.fakes[0], 0, 1, 2)
        tiered.fakes[1].stop("lengths")
        assert tiered.begin(0, 1, 2, 3, promotes=False)
        tiered.until(lambda: sum(tiered.fake.asked) == 4)
        [promotion] = tiered.tiers._promoter._promotions
        tiered.until(lambda: len(promotion.jobs) == 1)
        promotion.deadline = 0.0
        tiered.until(lambda: tiered.found)
        [found] = tiered.found
        assert (found.hit_chunks, found.tiers) == (3, {"fake-1": 3})


def test_a_description_asks_no_further_than_the_first_gap(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.fake.keys_at_once = 2
        put_value(tiered.fake, 0, 1, 3)
        tiered.look_up(*range(40), promotes=False)
        assert tiered.fake.asked == [2, 4]
        [found] = tiered.found
        assert (found.hit_chunks, found.tiers) == (2, {"fake-1": 2})


def test_another_servers_reservations_stay_while_its_threads_may_write(tmp_path: Path):
    """Should a pool be adopted while a thread of the server before is still filling an extent."""
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        tiered.fake.stop("get")
        assert tiered.begin(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        [(owner, _)] = tiered.manager.l1.reservations()
        assert is_client_alive(tiered.manager.l1.pool.client_path(owner.hex()))
        tiered.fake.go()
