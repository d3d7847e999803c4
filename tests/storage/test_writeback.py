"""The way down to a tier: what is written, what is dropped, and that L1 never waits for it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmcache.pool import PAGE_BYTES
from lmcache.storage.l2.base import L2Error, Parts, Reason
from lmcache.storage.l2.breaker import MAX_FAILURES
from lmcache.storage.l2.value import HEADER_BYTES, check_value, unpack_header
from lmcache.storage.l2.writeback import WriteAhead
from lmcache.storage.manager import RemovalReason, Selection
from tests.pools import content, key, present, remove, wait_until
from tests.storage.tiered import name_of, put_value, tiered_in


def test_a_committed_chunk_is_written_with_its_header(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.store(0, 1, namespace_id=9)
        tiered.settle()
        value = memoryview(tiered.fake.values[name_of(1)])
        header = unpack_header(value)
        check_value(header, key(1), 0, value[HEADER_BYTES:])
        assert header.namespace_id == 9
        assert bytes(value[HEADER_BYTES:]) == content(1, PAGE_BYTES)
        assert (tiered.value("written_chunks"), tiered.value("written_bytes")) == (2, 2 * PAGE_BYTES)


def test_each_tier_gets_every_chunk(tmp_path: Path):
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        tiered.store(0, 1)
        tiered.settle()
        assert [set(fake.values) for fake in tiered.fakes] == [{name_of(0), name_of(1)}] * 2


def test_what_the_tier_has_is_not_written_again(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        tiered.store(0, 1)
        tiered.settle()
        assert tiered.fake.calls.count("put") == 1
        assert tiered.value("existing_chunks") == 1


def test_what_was_loaded_is_not_written_back(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        assert tiered.look_up(0) == 1
        tiered.settle()
        assert "put" not in tiered.fake.calls


def test_a_full_l1_drops_queued_writes_and_stores_at_once(tmp_path: Path):
    """EVI-4: the tier hangs, and ten times L1 is stored all the same."""
    with tiered_in(tmp_path, num_pages=32, write_threads=1) as tiered:
        tiered.fake.stop("put", "lengths")
        for number in range(0, 320, 4):
            tiered.store(*range(number, number + 4))
        in_flight = tiered.tiers.num_moving
        assert 0 < in_flight <= 4
        assert tiered.manager.l1.num_pins == in_flight
        assert tiered.value("dropped_chunks", "evicted") == 320 - 32
        tiered.fake.go()
        tiered.settle()
        assert tiered.value("written_chunks") == 32
        assert {name_of(number) for number in present(tiered.manager, range(320))} <= set(tiered.fake.values)


def test_a_chunk_that_is_being_written_is_not_evicted(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=16, write_threads=1) as tiered:
        tiered.fake.stop("put")
        tiered.store(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        for number in range(1, 40):
            tiered.store(number)
        assert tiered.bytes_of(0) == content(0, PAGE_BYTES)
        tiered.fake.go()
        tiered.settle()
        assert tiered.fake.values[name_of(0)][HEADER_BYTES:] == content(0, PAGE_BYTES)


def test_a_chunk_that_changed_in_l1_is_not_written(tmp_path: Path):
    """Its writer told a checksum, and something has written to the pool since."""
    with tiered_in(tmp_path) as tiered:
        put_value(tiered.fake, 0)
        assert tiered.look_up(0) == 1
        slot = tiered.manager.l1.find(key(0), 0)
        assert slot is not None
        tiered.fake.values.clear()
        tiered.manager.l1.pool.data[tiered.manager.l1.record(slot).offset] ^= 1
        tiered.tiers.note_committed([slot])
        tiered.settle()
        assert not tiered.fake.values
        assert tiered.value("failures", "write", "corrupt") == 1


def test_writes_stop_while_the_tier_fails_and_go_on_by_themselves(tmp_path: Path):
    with tiered_in(tmp_path, write_threads=1) as tiered:
        tiered.fake.errors["put"] = Reason.FULL
        tiered.fake.errors["ping"] = Reason.FULL
        for number in range(MAX_FAILURES + 3):
            tiered.store(number)
            tiered.settle()
        assert not tiered.tier.writes.is_closed
        assert tiered.tier.reads.is_closed  # a full tier still serves
        assert tiered.value("failures", "write", "full") == MAX_FAILURES
        tiered.fake.errors.clear()
        tiered.until(lambda: tiered.tier.writes.is_closed, "the probe's success")
        tiered.settle()
        assert len(tiered.fake.values) == 3  # those that had waited


@pytest.mark.parametrize("policy", ["write-through", "write-on-evict"])
def test_what_a_failed_write_had_not_come_to_is_written_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str):
    """Else one lost connection would leave a hole of a whole batch in a prompt."""
    with tiered_in(tmp_path, write_threads=1, write_on_evict=policy == "write-on-evict", watermark=0.1) as tiered:
        put, failures = tiered.fake.put, []

        def fail_once(key: str, parts: Parts) -> None:
            if not failures and len(tiered.fake.values) == 2:
                failures.append(key)
                raise L2Error("the connection was reset", code=Reason.UNREACHABLE)
            put(key, parts)

        monkeypatch.setattr(tiered.fake, "put", fail_once)
        tiered.store(*range(6))
        if policy == "write-on-evict":
            tiered.tiers._ahead.offer_all()
        tiered.settle()
        assert len(failures) == 1
        assert len(tiered.fake.values) == 5
        assert tiered.value("dropped_chunks", "failed") == 1


def test_after_a_clear_of_the_tiers_nothing_counts_as_written(tmp_path: Path):
    with tiered_in(tmp_path, write_threads=1, write_on_evict=True) as tiered:
        slots = tiered.store(*range(6))
        tiered.tiers._ahead.offer_all()
        tiered.settle()
        assert all(tiered.tiers._ahead.is_written(slot) for slot in slots)
        clearing = tiered.tiers.clear()
        tiered.until(lambda: clearing.is_done)
        assert not any(tiered.tiers._ahead.is_written(slot) for slot in slots)
        tiered.tiers._ahead.offer_all()
        tiered.settle()
        assert len(tiered.fake.values) == 6
        tiered.tiers.stop_moving()
        remove(tiered.manager, Selection(), RemovalReason.CLEAR, dry_run=False)
        assert tiered.value("dropped_chunks", "removed") == 0  # all are in the tier


def test_removal_on_request_takes_chunks_out_of_the_queue(tmp_path: Path):
    with tiered_in(tmp_path, write_threads=1) as tiered:
        tiered.fake.stop("lengths")
        tiered.store(0)
        tiered.store(1, 2)
        remove(tiered.manager, Selection(), RemovalReason.CLEAR, dry_run=False)
        tiered.fake.go()
        tiered.settle()
        assert set(tiered.fake.values) == {name_of(0)}
        assert tiered.value("dropped_chunks", "removed") == 2


def test_delete_comes_after_the_write_that_is_under_way(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.fake.stop("put")
        tiered.store(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        tiered.tiers.delete(key(0), [0])
        tiered.fake.go()
        tiered.until(lambda: "delete" in tiered.fake.calls and not tiered.fake.values)


def test_clear_comes_after_the_write_that_is_under_way(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.fake.stop("put")
        tiered.store(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        clearing = tiered.tiers.clear()
        tiered.fake.go()
        tiered.until(lambda: clearing.is_done)
        assert not tiered.fake.values
        assert clearing.removals[0].objects == 1


def test_what_l1_keeps_is_written_again_after_a_clear_of_the_tiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lmcache.storage.l2.writeback.SLICE_SLOTS", 4)
    with tiered_in(tmp_path, num_tiers=2) as tiered:
        tiered.store(*range(30))
        tiered.settle()
        remove(tiered.manager, Selection(keys=key(7)), RemovalReason.REQUEST, dry_run=False)
        clearing = tiered.tiers.clear(keeps_l1=True)
        tiered.until(lambda: clearing.is_done)
        tiered.settle()
        assert [removal.objects for removal in clearing.removals] == [30, 30]
        assert [set(fake.values) for fake in tiered.fakes] == [{name_of(n) for n in range(30) if n != 7}] * 2
        assert tiered.tiers.status()[0]["queued_chunks"] == 0
        clearing = tiered.tiers.clear()
        tiered.until(lambda: clearing.is_done)
        tiered.settle()
        assert [len(fake.values) for fake in tiered.fakes] == [0, 0]


def test_what_is_to_be_written_again_goes_in_slices_and_new_chunks_wait_for_one_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lmcache.storage.l2.writeback.SLICE_SLOTS", 4)
    with tiered_in(tmp_path, write_threads=1) as tiered:
        tiered.store(*range(60))
        tiered.settle()
        tiered.fake.stop("lengths")
        tiered.tiers.clear(keeps_l1=True)
        tiered.until(lambda: tiered.fake.num_waiting)
        assert len(tiered.tiers._writebacks[0]._queue) <= 4
        tiered.store(60)
        tiered.fake.go()
        tiered.settle()
        names = list(tiered.fake.values)
        assert set(names) == {name_of(number) for number in range(61)}
        assert names.index(name_of(60)) <= 12


@pytest.mark.parametrize("ends", ["close", "clear"])
def test_the_end_writes_what_is_to_be_written_again_and_a_clear_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
):
    monkeypatch.setattr("lmcache.storage.l2.writeback.SLICE_SLOTS", 4)
    with tiered_in(tmp_path, write_threads=1) as tiered:
        tiered.store(*range(30))
        tiered.settle()
        clearing = tiered.tiers.clear(keeps_l1=True)
        tiered.fake.stop("put")
        tiered.until(lambda: clearing.is_done and tiered.fake.num_waiting)
        tiered.fake.go()
        if ends == "close":
            tiered.tiers.close(60.0)
            assert len(tiered.fake.values) == 30
        else:
            clearing = tiered.tiers.clear()
            tiered.until(lambda: clearing.is_done)
            tiered.settle()
            assert not tiered.fake.values


def test_a_clear_that_fails_says_so(tmp_path: Path):
    with tiered_in(tmp_path) as tiered:
        tiered.fake.errors["clear"] = Reason.DENIED
        clearing = tiered.tiers.clear()
        tiered.until(lambda: clearing.is_done)
        assert "failed" in clearing.removals[0].error


# -- write-on-evict ---------------------------------------------------------------------------------------------------


def test_write_on_evict_writes_nothing_while_there_is_room(tmp_path: Path):
    with tiered_in(tmp_path, watermark=0.9, ratio=0.1, write_on_evict=True) as tiered:
        tiered.store(*range(30))
        tiered.settle()
        assert not tiered.fake.values


def test_write_on_evict_writes_what_is_evicted_next(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=100, watermark=0.9, ratio=0.1, write_on_evict=True) as tiered:
        for number in range(80):
            tiered.store(number)
        tiered.settle()
        assert set(tiered.fake.values) == {name_of(number) for number in range(10)}


def test_write_on_evict_writes_what_is_evicted_next_however_many_before_it_are_pinned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(WriteAhead, "MAX_LOOKED_AT", 20)
    with tiered_in(tmp_path, num_pages=100, watermark=0.9, ratio=0.1, write_on_evict=True) as tiered:
        slots = [slot for number in range(60) for slot in tiered.store(number)]
        tiered.manager.l1.pin(slots[:50])
        assert next(tiered.manager.l1.evictable()) == slots[50]  # an eviction has walked past those that are pinned
        for number in range(60, 80):
            tiered.store(number)
        tiered.settle()
        assert set(tiered.fake.values) == {name_of(number) for number in range(50, 60)}
        tiered.manager.l1.unpin(slots[:50])


def test_a_pass_evicts_only_what_was_written(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=100, watermark=0.9, ratio=0.1, write_on_evict=True) as tiered:
        tiered.fake.stop("put")
        for number in range(95):
            tiered.store(number)
        tiered.tiers.tick()
        tiered.manager.run_pass()
        assert len(tiered.manager.l1) == 95
        tiered.fake.go()

        def is_low() -> bool:
            tiered.manager.run_pass()
            return len(tiered.manager.l1) <= 90

        tiered.until(is_low)
        assert {name_of(number) for number in range(95)} - {name_of(n) for n in present(tiered.manager, range(95))} <= set(
            tiered.fake.values
        )
        assert tiered.value("dropped_chunks", "evicted") == 0


def test_eviction_on_demand_waits_for_no_write(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=32, watermark=0.9, ratio=0.1, write_on_evict=True) as tiered:
        tiered.fake.stop("put")
        for number in range(100):
            tiered.store(number)
        assert tiered.value("dropped_chunks", "evicted") > 0
        tiered.fake.go()


def test_a_tier_that_is_down_does_not_stop_eviction(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=100, watermark=0.9, ratio=0.1, write_on_evict=True) as tiered:
        for _ in range(MAX_FAILURES):
            tiered.tier.writes.failed()
        tiered.fake.errors["ping"] = Reason.UNREACHABLE
        for number in range(95):
            tiered.store(number)
        tiered.manager.run_pass()
        assert len(tiered.manager.l1) == 80


def test_one_tier_that_is_down_holds_up_no_eviction_of_what_the_other_has(tmp_path: Path):
    with tiered_in(tmp_path, num_pages=100, num_tiers=2, watermark=0.9, ratio=0.1, write_on_evict=True) as tiered:
        for _ in range(MAX_FAILURES):
            tiered.tier.writes.failed()
        tiered.fake.errors["ping"] = Reason.READ_ONLY
        for number in range(95):
            tiered.store(number)

        def is_low() -> bool:
            tiered.manager.run_pass()
            return len(tiered.manager.l1) <= 90

        tiered.until(is_low)
        assert tiered.value("dropped_chunks", "failed", tier="fake-2") == 0
        tiered.fake.errors.clear()


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write_on_evict", [False, True])
def test_the_end_writes_what_is_queued(tmp_path: Path, write_on_evict: bool):
    with tiered_in(tmp_path, write_on_evict=write_on_evict) as tiered:
        tiered.store(*range(20))
        tiered.tiers.close(60.0)
        assert len(tiered.fake.values) == 20


def test_the_end_says_what_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tiered_in(tmp_path, write_threads=1) as tiered:
        tiered.fake.stop("put")
        tiered.store(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        tiered.store(1, 2)
        tiered.fake.held = set()
        monkeypatch.setattr("lmcache.storage.tiers.JOIN_SECONDS", 0.0)
        tiered.tiers.close(0.0)
        assert tiered.value("dropped_chunks", "shutdown") == 2
        tiered.fake.go()
        tiered.until(lambda: not any(thread.is_alive() for thread in tiered.tier._writers._threads))


def test_the_end_comes_to_an_idle_tier_while_another_is_at_a_call(tmp_path: Path):
    with tiered_in(tmp_path, num_tiers=2) as tiered, ThreadPoolExecutor(1) as helper:
        idle = tiered.tiers._tiers[1]
        threads = [*idle._readers._threads, *idle._writers._threads]
        tiered.fake.stop("put")
        tiered.store(0)
        tiered.until(lambda: tiered.fake.num_waiting)

        def free() -> None:
            wait_until(lambda: not any(thread.is_alive() for thread in threads), "the end of the idle tier")
            tiered.fake.go()

        freed = helper.submit(free)
        tiered.tiers.close(0.0)
        assert all(fake.is_closed for fake in tiered.fakes)
        freed.result()


# -- health -----------------------------------------------------------------------------------------------------------


def test_a_thread_that_is_stuck_is_a_problem_and_a_tier_that_is_down_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """LIV-3."""
    with tiered_in(tmp_path) as tiered:
        for _ in range(MAX_FAILURES):
            tiered.tier.reads.failed()
        assert tiered.tiers.problems() == []
        tiered.fake.stop("put")
        tiered.store(0)
        tiered.until(lambda: tiered.fake.num_waiting)
        assert tiered.tiers.problems() == []
        monkeypatch.setattr("lmcache.storage.l2.workers.STUCK_SECONDS", 0.0)
        [problem] = tiered.tiers.problems()
        assert "lmcache-l2-fake-1-write" in problem
        tiered.fake.go()


def test_a_failing_exporter_fails_no_transfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with tiered_in(tmp_path) as tiered:

        def broken(*_: object) -> None:
            raise RuntimeError("no metrics today")

        series = dict(tiered.metrics._series)
        for one in series:
            tiered.metrics._series[one] = type("Broken", (), {"inc": broken, "set": broken, "observe": broken})()
        put_value(tiered.fake, 5)
        tiered.store(0, 1)
        tiered.settle()
        assert tiered.look_up(5) == 1
        assert {name_of(0), name_of(1)} <= set(tiered.fake.values)
        assert tiered.metrics.num_failures > 0
        tiered.metrics._series.update(series)
        tiered.metrics.num_failures = 0
