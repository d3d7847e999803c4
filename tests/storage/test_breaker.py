"""The breaker: when a tier is left alone, and when it is tried again."""

from types import SimpleNamespace

import pytest

from lmcache.storage.l2.breaker import MAX_BACKOFF_SECONDS, MAX_FAILURES, MIN_BACKOFF_SECONDS, Breaker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes when told to."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("lmcache.storage.l2.breaker.time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def opened() -> Breaker:
    breaker = Breaker()
    assert [breaker.failed() for _ in range(MAX_FAILURES)] == [False] * (MAX_FAILURES - 1) + [True]
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not():
    breaker = Breaker()
    for _ in range(3):
        for _ in range(MAX_FAILURES - 1):
            breaker.failed()
        breaker.succeeded()
    assert breaker.is_closed
    assert not opened().is_closed


def test_it_is_probed_once_the_back_off_is_over(clock: SimpleNamespace):
    breaker = opened()
    assert not breaker.take_probe()
    clock.now += MIN_BACKOFF_SECONDS
    assert [breaker.take_probe(), breaker.take_probe()] == [True, False]
    breaker.probed(is_good=True)
    assert breaker.is_closed


def test_the_back_off_doubles_up_to_its_limit(clock: SimpleNamespace):
    breaker = opened()
    waits = []
    for _ in range(10):
        started_at = clock.now
        while not breaker.take_probe():
            clock.now += 0.5
        waits.append(clock.now - started_at)
        breaker.probed(is_good=False)
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert waits[-1] == MAX_BACKOFF_SECONDS


def test_after_a_probe_one_failure_opens_it_again_until_real_work_has_succeeded(clock: SimpleNamespace):
    breaker = opened()
    clock.now += MIN_BACKOFF_SECONDS
    assert breaker.take_probe()
    breaker.probed(is_good=True)
    assert breaker.failed()
    clock.now += 2 * MIN_BACKOFF_SECONDS
    assert breaker.take_probe()
    breaker.probed(is_good=True)
    breaker.succeeded()
    assert not breaker.failed()


def test_what_was_under_way_when_it_opened_changes_nothing():
    breaker = opened()
    breaker.succeeded()
    assert not breaker.failed()
    assert not breaker.is_closed


def test_what_was_found_does_not_make_up_for_reads_that_failed():
    breaker = Breaker()
    for _ in range(MAX_FAILURES):
        assert breaker.is_closed
        breaker.succeeded("find")
        breaker.failed("read")
    assert not breaker.is_closed
    assert breaker.takes_questions


def test_where_reads_failed_one_lookup_at_a_time_is_the_probe(clock: SimpleNamespace):
    breaker = Breaker()
    for _ in range(MAX_FAILURES):
        breaker.failed("read")
    assert not breaker.take_trial()
    clock.now += MIN_BACKOFF_SECONDS
    assert not breaker.take_probe()
    assert [breaker.take_trial(), breaker.take_trial()] == [True, False]
    assert not breaker.succeeded("find")
    breaker.end_trial()  # there was nothing to read
    assert not breaker.is_closed
    assert breaker.take_trial()
    assert not breaker.failed("read")
    breaker.end_trial()
    clock.now += MIN_BACKOFF_SECONDS
    assert not breaker.take_trial()  # the back-off is longer now
    clock.now += MIN_BACKOFF_SECONDS
    assert breaker.take_trial()
    assert breaker.succeeded("read")
    breaker.end_trial()
    assert breaker.is_closed
    assert not breaker.failed("read")
