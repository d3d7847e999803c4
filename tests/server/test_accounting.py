"""Counters that equal a known workload exactly, and pins that belong to exactly one request of one client."""

import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache.metrics import FAILURE_REASONS, SPECS, Kind, label_combinations
from lmcache.pool import KEPT_SECONDS, PAGE_BYTES
from lmcache.protocol import (
    Abort,
    Clear,
    Commit,
    EndSession,
    Evict,
    FreeLookupLocks,
    Get,
    GetChunkSize,
    Lookup,
    Noop,
    PinReport,
    Put,
    Release,
    Report,
    Retrieve,
    Store,
)
from tests.pools import key, keys
from tests.server.harness import CHUNK_SIZE, LEASE_SECONDS, PIN_TIMEOUT_SECONDS, service_in


def test_a_workload_with_a_known_answer_is_counted_exactly(tmp_path, monkeypatch):
    """OBS-1: 8 pages, 8 slots. Every counter of every series is compared, those that must stay 0 among them."""
    with service_in(tmp_path, monkeypatch, num_pages=8, num_slots=8) as service:
        engine, other, remote = service.client(), service.client(), service.client(mapped=False)  # 3 HELLO, 2 ATTACH

        engine.store(0, 1, 2, 3)  # STORE, COMMIT: 4 chunks
        held = engine.reserve(4)  # STORE
        store = Store(client=other.id, chunk_bytes=PAGE_BYTES)
        reply = service.call(store, [keys(0, 4, 5)])  # exists, busy, reserved
        rejected = service.call(Commit(client=engine.id, placements=reply.placements))  # 1 rejected
        assert rejected.rejected == [reply.placements[0].slot]
        service.call(Abort(client=other.id, placements=reply.placements))  # 1 aborted
        service.call(Commit(client=engine.id, placements=held))  # 1 chunk

        lookup = Lookup(client=engine.id, request_id="r")
        assert service.call(lookup, [keys(0, 1, 2, 9, 3)]).hit_chunks == 3  # 3 hits, 2 misses
        assert service.call(Lookup(), [keys(9, 8)]).hit_chunks == 0  # no client: it does not count
        service.call(FreeLookupLocks(client=engine.id, request_id="r"))

        places = service.call(Retrieve(client=engine.id, request_id="r"), [keys(0, 1, 7)]).placements  # 2 read, 1 missing
        service.call(Release(client=engine.id, request_id="r", placements=places))
        service.call(Put(client=remote.id), [keys(6), bytes(PAGE_BYTES)])  # 1 chunk
        service.call(Put(client=remote.id, rank=1), [keys(6), b"x" * 10])  # 1 chunk of 10 bytes
        service.call(Get(client=remote.id), [keys(6)])  # 1 read
        service.call(Get(client=remote.id, rank=1), [keys(6, 5)])  # 1 read of 10 bytes, 1 missing, no token: rank 1

        # 7 slots are in use; the second chunk more evicts the oldest, and pins on all make the next store full.
        engine.store(10)
        engine.store(11)
        assert service.call(Lookup(), [keys(3)]).hit_chunks == 0  # no client: it does not count
        service.call(Retrieve(client=engine.id, request_id="hold"), [keys(10)])  # 1 read
        for number in (0, 1, 2, 4, 11):
            service.call(Lookup(client=engine.id, request_id="hold"), [keys(number)])  # 5 hits
        service.call(Lookup(client=engine.id, request_id="hold", world_size=2), [keys(6)])  # 1 hit
        assert service.call(store, [keys(12)]).outcomes == [3]  # full
        service.call(EndSession(client=engine.id, request_id="hold"))

        pins = PinReport(pool_bytes=4096, pinned_bytes=1024, unpinned_bytes=1024, unpinned_copied_bytes=77)
        report = Report(
            client=engine.id, failed_blocks={"stale": 3}, failed_lookups={"deadline": 1}, decode_chunks=2, pins=pins
        )
        service.call(report)
        service.call(Evict(num_bytes=1))  # 1 by request: chunk 10, whose last hit is the oldest
        service.call(Evict(num_bytes=1, dry_run=True))
        service.send(Noop(), delivered=False)
        service.send_raw(b"junk")
        assert service.code_of(Evict()) == "bad_field"
        service.call(Lookup(client=other.id, request_id="old"), [keys(11)])  # 1 hit
        service.pass_time(PIN_TIMEOUT_SECONDS + 1)  # 1 expired; the remote client's lease runs out
        other.die()
        service.pass_time(1)
        service.pass_time(1)  # what it had pinned has rested
        service.call(Clear(dry_run=True))
        left = len(service.storage.l1)
        left_bytes = sum(service.storage.l1.record(slot).length for slot in service.storage.l1.slots())
        service.call(Clear())  # the rest

        stored_bytes = 8 * PAGE_BYTES + 10
        evicted = {"demand": 1, "watermark": 0, "request": 1, "clear": left}
        assert left == 9 - 2
        expected = {
            "lookup_chunks": {"hit": 3 + 5 + 1 + 1, "miss": 2},
            "stored_chunks": 4 + 1 + 2 + 2,
            "stored_bytes": stored_bytes,
            "store_rejected_chunks": {"exists": 1, "busy": 1, "full": 1},
            "commit_rejected_chunks": 1,
            "retrieved_chunks": 2 + 2 + 1,
            "retrieved_bytes": 4 * PAGE_BYTES + 10,
            "retrieved_tokens": 4 * CHUNK_SIZE,
            "retrieve_missing_chunks": 1 + 1,
            "retrieve_failed": {**dict.fromkeys(FAILURE_REASONS, 0), "stale": 3},
            "lookup_failed": {**dict.fromkeys(FAILURE_REASONS, 0), "deadline": 1},
            "stored_decode_chunks": 2,
            "unpinned_copied_bytes": 77,
            "evicted_chunks": evicted,
            "aborted_reservations": 1,
            "expired_pins": 1,
            "dead_clients": 2,
            "replies_dropped": 1,
            "l2_promoted_chunks": 0,
            "l2_lookups_past_deadline": 0,
            "l2_unpromoted_chunks": dict.fromkeys(
                ("full", "busy", "missing", "corrupt", "failed", "deadline", "unreachable"), 0
            ),
        }
        status = service.status()
        counters = dict(status["counters"])
        evicted_bytes = counters.pop("evicted_bytes")
        assert counters == expected
        assert sum(evicted_bytes.values()) == stored_bytes
        assert evicted_bytes["clear"] == left_bytes
        assert status["hit_rate"] == 10 / 12
        calls = {
            ("HELLO", "ok"): 3,
            ("REPORT", "ok"): 1,
            ("ATTACH", "ok"): 2,
            ("STORE", "ok"): 6,
            ("COMMIT", "ok"): 5,
            ("ABORT", "ok"): 1,
            ("LOOKUP", "ok"): 3 + 5 + 1 + 1,
            ("FREE_LOOKUP_LOCKS", "ok"): 1,
            ("RETRIEVE", "ok"): 2,
            ("RELEASE", "ok"): 1,
            ("PUT", "ok"): 2,
            ("GET", "ok"): 2,
            ("END_SESSION", "ok"): 1,
            ("EVICT", "ok"): 2,
            ("EVICT", "error"): 1,
            ("NOOP", "ok"): 1,
            ("invalid", "error"): 1,
            ("CLEAR", "ok"): 2,
            ("STATUS", "ok"): 1,
        }
        [requests] = [spec for spec in SPECS if spec.name == "lmcache_requests"]
        for labels in label_combinations(requests):
            assert service.value("requests", *labels) == calls.get(labels, 0), labels
        for metric in service.metrics.registry.collect():
            if metric.name == "lmcache_request_duration_seconds":
                counts = {s.labels["op"]: s.value for s in metric.samples if s.name.endswith("_count")}
        assert {op: count for op, count in counts.items() if count} == {
            op: sum(number for (name, _), number in calls.items() if name == op) for op, _ in calls
        }


def test_gauges_show_the_books_of_this_moment(tmp_path, monkeypatch):
    with service_in(tmp_path, monkeypatch, num_pages=8, num_slots=8) as service:
        client = service.client()
        client.store(1, 2)
        client.reserve(3)
        service.call(Retrieve(client=client.id, request_id="r"), [keys(1)])
        service.call(Retrieve(client=client.id, request_id="s"), [keys(1)])
        service.clock.now += 5
        service.service.update_gauges()
        gauges = {
            spec.name: service.metrics._series[(spec.name,)]._value.get()
            for spec in SPECS
            if spec.kind is Kind.GAUGE and not spec.labels
        }
        assert gauges == {
            "lmcache_l1_capacity_bytes": 8 * PAGE_BYTES,
            "lmcache_l1_resident_bytes": 8 * PAGE_BYTES,
            "lmcache_l1_used_bytes": 3 * PAGE_BYTES,
            "lmcache_l1_reserved_bytes": PAGE_BYTES,
            "lmcache_l1_pinned_bytes": PAGE_BYTES,
            "lmcache_unpinned_bytes": 0,
            "lmcache_l1_largest_free_bytes": 5 * PAGE_BYTES,
            "lmcache_l1_chunks": 2,
            "lmcache_pins": 2,
            "lmcache_sessions": 2,
            "lmcache_clients": 1,
            "lmcache_healthy": 1,
            "lmcache_uptime_seconds": 5,
        }
        l1 = service.status()["l1"]
        assert {name: l1[name] for name in ("used_bytes", "reserved_bytes", "free_bytes", "chunks", "pins", "max_chunks")} == {
            "used_bytes": 3 * PAGE_BYTES,
            "reserved_bytes": PAGE_BYTES,
            "free_bytes": 5 * PAGE_BYTES,
            "chunks": 2,
            "pins": 2,
            "max_chunks": 8,
        }


@pytest.mark.parametrize("request_", [Noop(), GetChunkSize()])
def test_asking_after_its_health_is_counted_as_nothing_else(tmp_path, monkeypatch, request_):
    with service_in(tmp_path, monkeypatch) as service:
        before = service.status()["counters"]
        service.call(request_)
        assert service.status()["counters"] == before


class PinsMachine(RuleBasedStateMachine):
    """EVI-1: three clients with two requests each hold pins on the same six chunks, in any interleaving.

    The model: for each (client, request) the lookups with the chunks that are still pinned, and a count for each retrieve.
    """

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.patch = pytest.MonkeyPatch()
        self.context = service_in(Path(self.directory.name), self.patch, num_pages=16, num_slots=16)
        self.service = self.context.__enter__()
        self.clients = [self.service.client() for _ in range(3)]
        self.places = self.clients[0].store(*range(6))
        self.lookups: dict[tuple[str, str], list[set[int]]] = {}
        self.retrieved: dict[tuple[str, str], Counter[int]] = {}

    def teardown(self) -> None:
        if hasattr(self, "service"):
            try:
                self.context.__exit__(None, None, None)
            finally:
                self.patch.undo()
                self.directory.cleanup()

    who = st.tuples(st.integers(0, 2), st.sampled_from(["r", "s"]))

    def ids(self, who: tuple[int, str]) -> tuple[str, str]:
        return self.clients[who[0]].id, who[1]

    @rule(who=who, count=st.integers(0, 8))
    def lookup(self, who: tuple[int, str], count: int) -> None:
        client, request_id = self.ids(who)
        reply = self.service.call(Lookup(client=client, request_id=request_id), [keys(*range(count))])
        assert reply.hit_chunks == min(count, 6)
        if reply.hit_chunks:
            self.lookups.setdefault((client, request_id), []).append(set(range(reply.hit_chunks)))

    @rule(who=who, numbers=st.lists(st.integers(0, 6), max_size=4))
    def retrieve(self, who: tuple[int, str], numbers: list[int]) -> None:
        client, request_id = self.ids(who)
        reply = self.service.call(Retrieve(client=client, request_id=request_id), [keys(*numbers)])
        leading = numbers[: numbers.index(6)] if 6 in numbers else numbers
        assert len(reply.placements) == len(leading)
        self.retrieved.setdefault((client, request_id), Counter()).update(leading)

    @rule(who=who, start=st.integers(0, 7), end=st.integers(0, 7))
    def free_lookup_locks(self, who: tuple[int, str], start: int, end: int) -> None:
        client, request_id = self.ids(who)
        reply = self.service.call(FreeLookupLocks(client=client, request_id=request_id, start=start, end=end))
        freed = 0
        for lookup in self.lookups.get((client, request_id), []):
            gone = lookup & set(range(start, end))
            lookup -= gone
            freed += len(gone)
        assert reply.released == freed

    @rule(who=who, numbers=st.lists(st.integers(0, 5), max_size=6))
    def release(self, who: tuple[int, str], numbers: list[int]) -> None:
        client, request_id = self.ids(who)
        placements = [self.places[number] for number in numbers]
        reply = self.service.call(Release(client=client, request_id=request_id, placements=placements))
        held = self.retrieved.get((client, request_id), Counter())
        gone = held & Counter(numbers)
        held.subtract(gone)
        assert reply.released == gone.total()

    @rule(who=who)
    def end_session(self, who: tuple[int, str]) -> None:
        client, request_id = self.ids(who)
        expected = self.held_by(client, request_id)
        assert self.service.call(EndSession(client=client, request_id=request_id)).released == expected
        self.forget(client, request_id)

    @rule(request_id=st.sampled_from(["r", "s"]))
    def end_session_of_all(self, request_id: str) -> None:
        expected = sum(self.held_by(client.id, request_id) for client in self.clients)
        assert self.service.call(EndSession(request_id=request_id)).released == expected
        for client in self.clients:
            self.forget(client.id, request_id)

    @precondition(lambda self: len({client.id for client in self.clients}) == 3)
    @rule(index=st.integers(0, 2))
    def die_and_come_back(self, index: int) -> None:
        gone = self.clients[index]
        gone.die()
        self.service.pass_time(1)
        for request_id in ("r", "s"):
            self.forget(gone.id, request_id)
        self.service.clients.remove(gone)
        self.clients[index] = self.service.client()

    @rule()
    def clear(self) -> None:
        """What anyone holds stays; what nobody holds, and did not until just now, goes, and is stored again."""
        self.service.pass_time(2 * KEPT_SECONDS)
        held = {number for number in range(6) if self.pins_on(number)}
        reply = self.service.call(Clear())
        assert (reply.objects, reply.kept_objects) == (6 - len(held), len(held))
        for number in set(range(6)) - held:
            [self.places[number]] = self.clients[0].store(number)

    @rule(seconds=st.floats(0, LEASE_SECONDS))
    def time_passes(self, seconds: float) -> None:
        self.service.pass_time(seconds / 100)

    def held_by(self, client: str, request_id: str) -> int:
        lookups = sum(len(lookup) for lookup in self.lookups.get((client, request_id), []))
        return lookups + sum(self.retrieved.get((client, request_id), Counter()).values())

    def forget(self, client: str, request_id: str) -> None:
        self.lookups.pop((client, request_id), None)
        self.retrieved.pop((client, request_id), None)

    def pins_on(self, number: int) -> int:
        lookups = sum(number in lookup for held in self.lookups.values() for lookup in held)
        return lookups + sum(held[number] for held in self.retrieved.values())

    @invariant()
    def each_chunk_has_the_pins_that_were_taken_and_not_given_back(self) -> None:
        if not hasattr(self, "service"):
            return
        l1 = self.service.storage.l1
        assert [l1._pins[l1.find(key(number), 0)] for number in range(6)] == [self.pins_on(number) for number in range(6)]
        assert self.service.pins == sum(self.pins_on(number) for number in range(6))

    @invariant()
    def a_session_is_open_exactly_while_it_holds_something(self) -> None:
        if hasattr(self, "service"):
            names = {*self.lookups, *self.retrieved}
            holding = sum(1 for client, request_id in names if self.held_by(client, request_id))
            assert self.service.sessions.num_sessions == holding


TestPinsMachine = PinsMachine.TestCase
TestPinsMachine.settings = settings(max_examples=40, stateful_step_count=25)
