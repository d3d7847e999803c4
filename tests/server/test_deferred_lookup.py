"""A lookup that waits for a tier: who gets the answer, and who holds the pins afterwards."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache.metrics import Metrics
from lmcache.pool import PAGE_BYTES
from lmcache.protocol import Clear, ClearTier, EndSession, Evict, FreeLookupLocks, Lookup, TierRemoval
from lmcache.server.service import Answer
from lmcache.storage.l2.base import Reason, Usage
from lmcache.storage.l2.tier import TierConfig
from lmcache.storage.tiers import NamedAdapter, Tiers
from tests.fakes import FakeTier
from tests.pools import content, keys, wait_until
from tests.server.harness import CHUNK_SIZE, ServiceHarness, service_in
from tests.storage.tiered import name_of, put_value


class Tiered:
    """A service with a fake tier, driven by the test."""

    def __init__(self, harness: ServiceHarness, **settings: object) -> None:
        self.harness = harness
        self.fake = FakeTier()
        harness.metrics = harness.service.metrics = Metrics(["fake"])
        config = TierConfig(chunk_size=CHUNK_SIZE, lookup_timeout_seconds=60.0, inflight_ratio=1.0, **settings)
        adapters = [NamedAdapter("fake", "fake://", self.fake)]
        self.tiers = harness.service.tiers = Tiers(adapters, harness.storage, config, harness.metrics, lambda: None)

    def until_answered(self, answers: list[Answer]) -> Answer:
        wait_until(lambda: (self.harness.service.tick(), answers)[1], "the answer")
        [answer] = answers
        return answer

    def look_up(self, client_id: str | None, *numbers: int, delivered: bool = True, **fields: object) -> list[Answer]:
        return self.harness.send(Lookup(client=client_id, request_id="r", **fields), [keys(*numbers)], delivered=delivered)


@pytest.fixture
def tiered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiered]:
    with service_in(tmp_path, monkeypatch) as harness:
        tiered = Tiered(harness)
        try:
            yield tiered
            tiered.fake.go()
            wait_until(lambda: (tiered.tiers.tick(), not tiered.tiers.num_moving)[1], "an idle tier")
        finally:
            tiered.fake.go()
            tiered.tiers.close(0.0)
        harness.service.tiers = None


def test_the_answer_pins_what_came_up_for_the_request(tiered: Tiered):
    client = tiered.harness.client()
    put_value(tiered.fake, 0, 1)
    answer = tiered.until_answered(tiered.look_up(client.id, 0, 1, 2))
    assert (answer.reply.hit_chunks, answer.reply.l1_chunks, answer.reply.l2_chunks) == (2, 2, 2)
    assert tiered.harness.pins == 2
    assert tiered.harness.value("lookup_chunks", "miss") == 3
    assert tiered.harness.value("l2_promoted_chunks") == 2
    assert tiered.harness.call(FreeLookupLocks(client=client.id, request_id="r")).released == 2


def test_what_l1_has_in_full_is_answered_at_once(tiered: Tiered):
    client = tiered.harness.client()
    client.store(0, 1)
    [answer] = tiered.look_up(client.id, 0, 1)
    assert answer.reply.hit_chunks == 2
    tiered.harness.call(EndSession(request_id="r"))


def test_a_client_that_left_meanwhile_holds_no_pins(tiered: Tiered):
    client = tiered.harness.client()
    put_value(tiered.fake, 0)
    tiered.fake.stop("get")
    answers = tiered.look_up(client.id, 0)
    wait_until(lambda: (tiered.tiers.tick(), tiered.fake.num_waiting)[1])
    client.leave()
    tiered.fake.go()
    answer = tiered.until_answered(answers)
    assert answer.reply.error is not None
    assert answer.reply.error.code == "unknown_client"
    assert tiered.harness.pins == 0


@pytest.mark.parametrize(
    "letting_go",
    [
        lambda client: FreeLookupLocks(client=client.id, request_id="r"),
        lambda client: FreeLookupLocks(client=client.id, request_id="r", end=2),
        lambda client: EndSession(client=client.id, request_id="r"),
        lambda client: EndSession(request_id="r"),
    ],
    ids=["free", "free-all-it-may-find", "end", "end-by-an-operator"],
)
def test_a_request_that_let_go_before_it_was_answered_holds_no_pins(tiered: Tiered, letting_go):
    """An engine that had the prefix itself may never read the late answer, and could not give back what that grants."""
    client = tiered.harness.client()
    put_value(tiered.fake, 0, 1)
    tiered.fake.stop("get")
    answers = tiered.look_up(client.id, 0, 1)
    wait_until(lambda: (tiered.tiers.tick(), tiered.fake.num_waiting)[1])
    assert tiered.harness.call(letting_go(client)).released == 0
    tiered.fake.go()
    assert tiered.until_answered(answers).reply.hit_chunks == 0
    assert (tiered.harness.pins, tiered.harness.sessions.num_sessions) == (0, 0)
    assert tiered.until_answered(tiered.look_up(client.id, 0, 1)).reply.hit_chunks == 2  # the next one is another matter
    tiered.harness.call(EndSession(request_id="r"))


@pytest.mark.parametrize(
    "other",
    [{"request_id": "another"}, {"request_id": "r", "start": 1}, {"request_id": "r", "end": 1}],
    ids=["another-request", "not-the-first", "not-the-last"],
)
def test_what_a_request_has_not_let_go_of_is_pinned_for_it(tiered: Tiered, other):
    client, stranger = tiered.harness.client(), tiered.harness.client()
    put_value(tiered.fake, 0, 1)
    tiered.fake.stop("get")
    answers = tiered.look_up(client.id, 0, 1)
    wait_until(lambda: (tiered.tiers.tick(), tiered.fake.num_waiting)[1])
    tiered.harness.call(FreeLookupLocks(client=client.id, **other))
    tiered.harness.call(FreeLookupLocks(client=stranger.id, request_id="r"))
    tiered.fake.go()
    assert tiered.until_answered(answers).reply.hit_chunks == 2
    assert tiered.harness.call(EndSession(client=client.id, request_id="r")).released == 2


def test_an_answer_that_cannot_be_delivered_holds_no_pins(tiered: Tiered):
    client = tiered.harness.client()
    put_value(tiered.fake, 0)
    tiered.until_answered(tiered.look_up(client.id, 0, delivered=False))
    assert tiered.harness.pins == 0


def test_a_tier_that_hangs_delays_a_lookup_by_the_share_of_the_senders_patience(tiered: Tiered):
    client = tiered.harness.client()
    client.store(0)
    put_value(tiered.fake, 1)
    tiered.fake.stop("lengths")
    answers = tiered.look_up(client.id, 0, 1, timeout_seconds=0.1)
    assert not answers
    assert tiered.until_answered(answers).reply.hit_chunks == 1
    tiered.harness.call(EndSession(request_id="r"))


def test_an_unknown_client_is_told_so_at_once(tiered: Tiered):
    put_value(tiered.fake, 0)
    [answer] = tiered.look_up("0" * 32, 0)
    assert answer.reply.error is not None
    assert answer.reply.error.code == "unknown_client"


def test_requests_are_answered_while_a_lookup_waits(tiered: Tiered):
    client = tiered.harness.client()
    put_value(tiered.fake, 0)
    tiered.fake.stop("lengths")
    answers = tiered.look_up(client.id, 0)
    client.store(5)
    assert not answers
    tiered.fake.go()
    tiered.until_answered(answers)
    tiered.harness.call(EndSession(request_id="r"))


def test_a_clear_answers_the_lookup_that_waits_and_leaves_nothing(tiered: Tiered):
    """EVI-7."""
    client = tiered.harness.client()
    client.store(0)
    put_value(tiered.fake, 1)
    tiered.fake.stop("get")
    answers = tiered.look_up(client.id, 0, 1)
    wait_until(lambda: (tiered.tiers.tick(), tiered.fake.num_waiting)[1])
    cleared = tiered.harness.send(Clear(timeout_seconds=60.0))
    assert [answer.reply.hit_chunks for answer in answers] == [1]
    tiered.harness.call(EndSession(client=client.id, request_id="r"))
    tiered.fake.go()
    answer = tiered.until_answered(cleared)
    assert answer.reply.objects == 1
    assert answer.reply.tiers[0].done
    assert tiered.until_answered(tiered.look_up(None, 0, 1)).reply.hit_chunks == 0
    assert len(tiered.harness.storage.l1) == 0


@pytest.mark.parametrize(("objects", "num_bytes"), [(3, 100), (None, None)])
def test_a_dry_run_tells_of_a_tier_what_it_knows(tiered: Tiered, objects, num_bytes):
    [tier] = tiered.tiers._tiers
    tier.usage = Usage(used_bytes=100, objects=objects)
    reply = tiered.harness.call(Clear(dry_run=True))
    assert reply.tiers == [TierRemoval(name="fake", objects=objects, removed_bytes=num_bytes, done=True)]


def test_a_clear_that_takes_too_long_says_so(tiered: Tiered):
    tiered.fake.stop("clear")
    cleared = tiered.harness.send(Clear(timeout_seconds=1.0))
    assert not cleared
    tiered.harness.pass_time(2.0)
    [answer] = cleared
    assert (answer.reply.tiers[0].done, answer.reply.tiers[0].error) == (False, "not done yet")


def test_what_a_clear_has_not_come_to_yet_is_not_written_to_a_tier_that_is_empty_already(tmp_path: Path, monkeypatch):
    """A server with write-on-evict has too much in L1, and would write the oldest."""
    monkeypatch.setattr("lmcache.server.service.MAX_ENTRIES_PER_SLICE", 2)
    with service_in(tmp_path, monkeypatch) as harness:
        harness.storage._low_pages = 10  # begins to write below it
        tiered = Tiered(harness, write_on_evict=True)
        harness.client().store(*range(30))
        wait_until(lambda: (tiered.tiers.tick(), tiered.tiers._is_drained() and tiered.fake.values)[1])
        cleared = harness.send(Clear(tier=ClearTier.ALL, timeout_seconds=60.0))
        wait_until(lambda: (tiered.tiers.collect(), not tiered.fake.values)[1])
        while not cleared:
            harness.service.tick()
        tiered.tiers.tick()
        wait_until(lambda: (tiered.tiers.tick(), tiered.tiers._is_drained())[1])
        assert cleared[0].reply.objects == 30
        assert not tiered.fake.values
        tiered.tiers.close(0.0)
        harness.service.tiers = None


def test_chunks_of_an_engines_ranks_are_evicted_from_the_tier_although_none_was_stored_here(tiered: Tiered):
    """The server was restarted: of what lies in the tiers it knows the ranks from who registers."""
    tiered.harness.client().register(world_size=3)
    for rank in range(3):
        put_value(tiered.fake, 0, 1, rank=rank)
    answer = tiered.until_answered(tiered.harness.send(Evict(timeout_seconds=60.0), [keys(0)]))
    assert (answer.reply.tiers, len(tiered.fake.values)) == ([TierRemoval(name="fake", objects=3, done=True)], 3)


def test_an_eviction_that_a_tier_refuses_says_so(tiered: Tiered):
    put_value(tiered.fake, 0)
    tiered.fake.errors = {"delete": Reason.READ_ONLY}
    answer = tiered.until_answered(tiered.harness.send(Evict(timeout_seconds=60.0), [keys(0)]))
    assert answer.reply.tiers == [TierRemoval(name="fake", done=True, error="fake delete failed")]


def test_an_eviction_that_takes_too_long_says_so(tiered: Tiered):
    tiered.fake.stop("delete")
    evicted = tiered.harness.send(Evict(timeout_seconds=1.0), [keys(0)])
    assert not evicted
    tiered.harness.pass_time(2.0)
    [answer] = evicted
    assert answer.reply.tiers == [TierRemoval(name="fake", error="not done yet")]


def test_a_forged_rank_makes_no_eviction_long(tiered: Tiered):
    client = tiered.harness.client()
    client.store(3, rank=65535)
    put_value(tiered.fake, 0)
    tiered.until_answered(tiered.harness.send(Evict(timeout_seconds=60.0), [keys(*range(16384))]))
    assert not tiered.fake.values
    for rank in range(1, 40):
        client.store(3, rank=rank)
    assert tiered.harness.code_of(Evict(), [keys(*range(16384))]) == "bad_field"
    tiered.until_answered(tiered.harness.send(Clear()))


@pytest.mark.parametrize("is_evicting", [True, False])
def test_what_a_lookup_finds_in_l1_is_used_in_a_tier_that_evicts_with_its_end_first(tiered: Tiered, monkeypatch, is_evicting):
    """Else the beginnings of prompts, which L1 answers, are the oldest in the tier, go first, and the rest is worthless."""
    touched = []
    monkeypatch.setattr(FakeTier, "is_evicting", is_evicting)
    monkeypatch.setattr(tiered.fake, "touch", touched.extend)
    client = tiered.harness.client()
    client.store(0, 1)
    put_value(tiered.fake, 2)
    for numbers, expected in (((0, 1, 9), [1, 0]), ((0, 1, 2, 9), [2, 1, 0])):
        touched.clear()
        tiered.until_answered(tiered.look_up(client.id, *numbers))
        tiered.until_answered(tiered.look_up(None, *numbers))
        wait_until(lambda: (tiered.tiers.tick(), not tiered.tiers.num_moving)[1], "an idle tier")
        if is_evicting:
            wait_until(lambda: touched == [name_of(number) for number in expected], "it is touched")  # noqa: B023
        assert touched == [name_of(number) for number in expected] * is_evicting
    tiered.harness.call(EndSession(request_id="r"))


def test_a_stored_chunk_reaches_the_tier_as_it_was_stored(tiered: Tiered):
    client = tiered.harness.client()
    client.store(3, namespace_id=11)
    wait_until(lambda: (tiered.tiers.tick(), tiered.fake.values)[1])
    [value] = tiered.fake.values.values()
    assert value.endswith(content(3, PAGE_BYTES))
