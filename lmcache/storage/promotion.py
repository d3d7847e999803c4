"""The way up: what a lookup misses in L1 is asked of the tiers, and what they have is loaded into L1. Owner thread only.

                begin         a gap, the end, or half    the threads are done, or the deadline passed
    (lookup) ----------> FINDING -----------------> LOADING ------------------------------------> ANSWERED
                            |      the time is used                                                   |
                            |  deadline passed, no leading chunk known               last thread done v
                            +---------------------------------------------------> ANSWERED          gone

FINDING asks for one batch of leading chunks after the other, each twice as large as the one before; of each batch, every tier
for what those before it lack. It ends at the first chunk that nobody has, and when half of the time is used up and some leading
chunks are known, so that there is time to load them: the question under way is cancelled then, and its answer ignored.

Comes in: the keys of a lookup and what L1 has of them. Goes out: `Found`, once. Next on the data path: `l2/tier.py`.

An extent that a thread fills stays RESERVED, whatever happens, until that thread's job has come back: neither the deadline, nor
a clear, nor the client's death frees it, so a late write can touch nobody else's chunk. Only then the chunk is committed, or
its place given back. Of one lookup's chunks only the leading ones that are good are committed: the rest could not be hit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import msgspec

from lmcache.keys import split_keys
from lmcache.metrics import Metrics
from lmcache.protocol import MAX_CHUNK_BYTES, Placement, StoreOutcome
from lmcache.storage.l2.jobs import MAX_KEYS_PER_CALL, FindJob, Outcome, ReadJob, Transfer
from lmcache.storage.l2.tier import Tier, TierConfig
from lmcache.storage.l2.value import value_key
from lmcache.storage.manager import StorageManager

# So many lookups wait for an answer at most, and of so many there are jobs at one tier.
MAX_PROMOTIONS = 256
# Of one lookup so many chunks, one for each rank, are asked for: a million tokens of one rank, and some ms of the owner's time.
MAX_ENTRIES = 4096
# The share of a lookup's time after which it loads what it knows of, and asks for no more.
FINDING_SHARE = 0.5
# One job reads so many bytes in a row, or fewer when that gives every thread of the tier something to do.
MAX_JOB_BYTES = 8 << 20
MIN_JOB_BYTES = 1 << 20
# A tier that is too slow gets one lookup in so many seconds to show that it became faster.
RETRY_SLOW_SECONDS = 10.0


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What a lookup found.

    `l1_chunks`: leading chunks that L1 had when it was asked. Only where nothing was loaded: `hit_chunks`, leading chunks in
    any tier, and `tiers`, how many of those each tier holds.
    """

    l1_chunks: int
    hit_chunks: int = 0
    tiers: dict[str, int] = {}


class Entry(msgspec.Struct, eq=False):
    """One rank's chunk that L1 lacks, and which tier has how many bytes of it."""

    key: bytes
    rank: int
    parent: bytes = b""
    tier: Tier | None = None
    length: int = 0


class Load(msgspec.Struct, eq=False):
    """One entry's place in L1 while it is filled."""

    entry: Entry
    placement: Placement
    transfer: Transfer


Done = Callable[[Found], None]


class Promotion:
    """One lookup that waits for the tiers, and afterwards its loads until all threads are done with them."""

    def __init__(self, entries: list[Entry], world_size: int, l1_slots: list[int], seconds: float, done: Done) -> None:
        self.entries = entries
        self.world_size = world_size
        self.l1_chunks = len(l1_slots) // world_size
        self.questions: Iterator[tuple[Tier, list[Entry]]] = iter(())
        self.began_at = self.asked_at = time.monotonic()
        self.find_until = self.began_at + FINDING_SHARE * seconds
        self.deadline = self.began_at + seconds
        self.done = done
        self.pinned = list(l1_slots)
        self.loads: list[Load] = []
        self.num_committed = 0
        self.jobs: dict[FindJob | ReadJob, Tier] = {}
        self.trials: list[Tier] = []
        self.waits_for: set[Promotion] = set()
        self.waiters: set[Promotion] = set()
        self.loading_since = 0.0
        self.is_answered = False
        self.is_cancelled = False

    @property
    def is_waiting(self) -> bool:
        """Whether there are threads, or another's loads, to wait for. What was cancelled is not waited for."""
        return bool(self.waits_for) or not all(job.is_cancelled for job in self.jobs)

    def loaded_bytes(self, tier: Tier) -> int:
        """Bytes of the chunks that a tier has delivered."""
        loads = (load for load in self.loads if load.entry.tier is tier)
        return sum(load.placement.length for load in loads if load.transfer.outcome is Outcome.DONE)


class Promoter:
    """All promotions.

    Args:
        owner: of the reservations; as with a client's, its presence file is locked as long as threads may write.
        on_promoted: told of the slots that were filled from a tier.
    """

    def __init__(
        self,
        storage: StorageManager,
        tiers: Sequence[Tier],
        config: TierConfig,
        metrics: Metrics,
        owner: bytes,
        on_promoted: Callable[[Sequence[int], Tier], None] = lambda slots, tier: None,
    ) -> None:
        self._storage = storage
        self._l1 = storage.l1
        self._tiers = tiers
        self._config = config
        self._metrics = metrics
        self._on_promoted = on_promoted
        self._owner = owner
        self._promotions: set[Promotion] = set()
        self._loading: dict[tuple[bytes, int], Promotion] = {}
        self._in_flight_bytes = 0
        self._max_in_flight_bytes = int(config.inflight_ratio * storage.l1.pool.header.capacity_bytes)
        self._retry_slow_at: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._promotions)

    # -- beginning ----------------------------------------------------------------------------------------------------

    def begin(self, keys: bytes, world_size: int, l1_slots: list[int], timeout_seconds: float, done: Done) -> bool:
        """Load what the tiers have of a prefix and call `done`, now or later; False when they are not to be asked.

        Until `done` has returned, all that was found is pinned.
        """
        num_known = len(l1_slots) // world_size
        wanted = split_keys(keys)
        missing = range(num_known, min(len(wanted), num_known + MAX_ENTRIES // world_size))
        tiers = self._askable(lambda tier: tier.reads.is_closed or tier.reads.take_trial()) if missing else []
        if not tiers:
            return False
        entries = [Entry(wanted[i], rank, wanted[i - 1] if i else b"") for i in missing for rank in range(world_size)]
        self._l1.pin(l1_slots)
        promotion = Promotion(entries, world_size, l1_slots, timeout_seconds, done)
        promotion.questions = self._questions(promotion, tiers)
        promotion.trials = [tier for tier in tiers if not tier.reads.is_closed]
        self._promotions.add(promotion)
        self._find(promotion)
        return True

    def _askable(self, is_up: Callable[[Tier], bool]) -> list[Tier]:
        """The tiers that are up, if one more lookup may wait for them."""
        found: list[Tier] = []
        num_waiting = sum(not promotion.is_answered for promotion in self._promotions)
        for tier in self._tiers:
            # Answered ones too: in a tier that hangs the jobs of those whose deadline has passed queue up, and in no other.
            num_at_tier = sum(tier in promotion.jobs.values() for promotion in self._promotions)
            if max(num_waiting, num_at_tier) >= MAX_PROMOTIONS:
                tier.count("skipped_lookups", "busy")
            elif tier.num_clears:
                tier.count("skipped_lookups", "cleared")
            elif not is_up(tier):
                tier.count("skipped_lookups", "down")
            else:
                found.append(tier)
        return found

    def _questions(self, promotion: Promotion, tiers: list[Tier]) -> Iterator[tuple[Tier, list[Entry]]]:
        """What to ask next, and whom: it depends on the answers so far."""
        for batch in _batches(promotion.entries, promotion.world_size, tiers):
            for tier in tiers:
                lacking = self._lacking(batch)
                if lacking:
                    yield tier, lacking
            if self._lacking(batch):
                return

    def _lacking(self, entries: Sequence[Entry]) -> list[Entry]:
        """What nobody is known to have."""
        return [e for e in entries if e.tier is None and self._l1.find(e.key, e.rank) is None]

    def _find(self, promotion: Promotion) -> None:
        """Ask the next question; load when there is none, or when it is time to."""
        question = None if self._is_time_to_load(promotion) else next(promotion.questions, None)
        if question is None:
            self._load(promotion)
            return
        tier, entries = question

        def found() -> None:
            promotion.jobs.pop(job)
            if job.is_cancelled:
                self._drop_if_over(promotion)
                return
            if job.error is None:
                note_found(tier, entries, job.chunk_lengths)
            promotion.asked_at = time.monotonic()
            self._find(promotion)

        job = FindJob([value_key(e.key, e.rank) for e in entries], found)
        promotion.jobs[job] = tier
        tier.submit(job)

    def _is_time_to_load(self, promotion: Promotion) -> bool:
        first = promotion.entries[: promotion.world_size]
        return bool(first) and time.monotonic() >= promotion.find_until and not self._lacking(first)

    # -- loading ------------------------------------------------------------------------------------------------------

    def _load(self, promotion: Promotion) -> None:
        """Reserve places for the leading chunks that are to be had, and send the threads to fill them."""
        self._skip_slow(promotion)
        for chunk in _chunks(promotion):
            if not self._reserve_chunk(promotion, chunk):
                break
        promotion.loading_since = time.monotonic()
        for tier in self._tiers:
            self._submit(promotion, tier, [load.transfer for load in promotion.loads if load.entry.tier is tier])
        self._finish_if_loaded(promotion)

    def _skip_slow(self, promotion: Promotion) -> None:
        """Leave out what a tier is expected to deliver more slowly than an engine computes it.

        Expected from what recent lookups got of the tier, waiting included: bytes per second from the first read to the last.
        """
        now = time.monotonic()
        for tier in self._tiers:
            leading = [e for chunk in _leading(promotion) for e in chunk if e.tier is tier]
            rate = tier.read_speed.per_second
            if not leading or rate is None:
                continue
            tokens = len(leading) / promotion.world_size * self._config.chunk_size
            if tokens * rate >= self._config.min_tokens_per_second * sum(e.length for e in leading):
                continue
            if now >= self._retry_slow_at.get(tier.name, 0.0):
                self._retry_slow_at[tier.name] = now + RETRY_SLOW_SECONDS
                continue
            tier.count("skipped_lookups", "slow")
            for entry in promotion.entries:
                if entry.tier is tier:
                    entry.tier = None

    def _reserve_chunk(self, promotion: Promotion, chunk: list[Entry]) -> bool:
        """Reserve a place for each rank's part that is not there yet; False, and nothing kept, when the prefix ends here."""
        loads: list[Load] = []
        for entry in chunk:
            slot = self._l1.find(entry.key, entry.rank)
            if slot is not None:
                self._l1.pin([slot])
                promotion.pinned.append(slot)
                continue
            other = self._loading.get((entry.key, entry.rank))
            if other is promotion:
                continue
            if other is not None and not other.is_answered:
                promotion.waits_for.add(other)
                other.waiters.add(promotion)
                continue
            load = self._reserve(promotion, entry)
            if load is None:
                for undone in loads:
                    self._abort(undone)
                    undone.transfer.extent.release()
                return False
            loads.append(load)
        promotion.loads += loads
        return True

    def _reserve(self, promotion: Promotion, entry: Entry) -> Load | None:
        if entry.tier is None:
            return None
        if self._in_flight_bytes + entry.length > self._max_in_flight_bytes:
            self._metrics.count("lmcache_l2_unpromoted_chunks", "busy")
            return None
        [outcome], places = self._storage.reserve(entry.key, entry.rank, [entry.length], 0, self._owner, entry.parent)
        if outcome is not StoreOutcome.RESERVED:
            self._metrics.count("lmcache_l2_unpromoted_chunks", "full" if outcome is StoreOutcome.FULL else "busy")
            return None
        [place] = places
        self._in_flight_bytes += entry.length
        self._loading[entry.key, entry.rank] = promotion
        extent = self._l1.pool.data[place.offset : place.offset + place.length]
        return Load(entry, place, Transfer(key=entry.key, rank=entry.rank, slot=place.slot, extent=extent))

    def _submit(self, promotion: Promotion, tier: Tier, transfers: list[Transfer]) -> None:
        """Cut what one tier has into jobs, first chunks first."""
        total = sum(len(transfer.extent) for transfer in transfers)
        job_bytes = min(MAX_JOB_BYTES, max(MIN_JOB_BYTES, total // tier.num_readers))
        batch: list[Transfer] = []
        num_bytes = 0
        for transfer in transfers:
            if batch and num_bytes + len(transfer.extent) > job_bytes:
                self._submit_job(promotion, tier, batch)
                batch, num_bytes = [], 0
            batch.append(transfer)
            num_bytes += len(transfer.extent)
        if batch:
            self._submit_job(promotion, tier, batch)

    def _submit_job(self, promotion: Promotion, tier: Tier, transfers: list[Transfer]) -> None:
        job = ReadJob(transfers, lambda: self._note_read(promotion, tier, job))
        promotion.jobs[job] = tier
        tier.submit(job)

    # -- ending -------------------------------------------------------------------------------------------------------

    def _note_read(self, promotion: Promotion, tier: Tier, job: ReadJob) -> None:
        promotion.jobs.pop(job)
        num_bytes = promotion.loaded_bytes(tier)
        if num_bytes and tier not in promotion.jobs.values():
            tier.read_speed.add(num_bytes, time.monotonic() - promotion.loading_since)
        self._finish_if_loaded(promotion)

    def _finish_if_loaded(self, promotion: Promotion) -> None:
        if promotion.is_waiting:
            return
        self._answer(promotion)
        self._drop_if_over(promotion)

    def _answer(self, promotion: Promotion) -> None:
        """Commit what leads and is good, and tell the lookup; only the first time."""
        if promotion.is_answered:
            return
        promotion.pinned += self._commit_leading(promotion)
        promotion.is_answered = True
        for tier in promotion.trials:
            tier.reads.end_trial()
        for waiter in promotion.waiters:
            waiter.waits_for.discard(promotion)
        try:
            promotion.done(Found(l1_chunks=promotion.l1_chunks))
        finally:
            self._l1.unpin(promotion.pinned)
            promotion.pinned = []
        for waiter in promotion.waiters:
            self._finish_if_loaded(waiter)
        promotion.waiters = set()

    def _commit_leading(self, promotion: Promotion) -> list[int]:
        """Commit the good loads that have no other before them, as one run; return their slots, pinned."""
        if promotion.is_cancelled:
            return []
        good: list[Load] = []
        for load in promotion.loads[promotion.num_committed :]:
            if load.transfer.outcome is not Outcome.DONE:
                break
            good.append(load)
        promotion.num_committed += len(good)
        slots: list[int] = []
        for rank in range(promotion.world_size):  # each rank's chunks follow each other, as when an engine stores them
            run = [load for load in good if load.entry.rank == rank]
            placements = [msgspec.structs.replace(load.placement, checksum=load.transfer.checksum or 1) for load in run]
            slots += self._l1.commit(placements, self._owner, [load.transfer.namespace_id for load in run])
        self._l1.pin(slots)
        for load in good:
            self._forget(load)
        for tier in self._tiers:
            of_tier = [g.placement.slot for g in good if g.entry.tier is tier]
            if of_tier:
                self._on_promoted(of_tier, tier)
        return slots

    def _drop_if_over(self, promotion: Promotion) -> None:
        """The last thread is done: commit what came late and leads, give the other places back."""
        if promotion.jobs or not promotion.is_answered or promotion not in self._promotions:
            return
        self._promotions.discard(promotion)
        self._l1.unpin(self._commit_leading(promotion))
        for load in promotion.loads[promotion.num_committed :]:
            self._metrics.count("lmcache_l2_unpromoted_chunks", _why(load.transfer.outcome))
            self._abort(load)

    def _abort(self, load: Load) -> None:
        self._l1.abort([load.placement], self._owner)
        self._forget(load)

    def _forget(self, load: Load) -> None:
        self._in_flight_bytes -= load.placement.length
        self._loading.pop((load.entry.key, load.entry.rank), None)

    # -- time passes --------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Answer the lookups whose deadline has passed with what is in L1 by now; load for those that have asked for long."""
        now = time.monotonic()
        for promotion in [p for p in self._promotions if not p.is_answered]:
            if promotion.deadline <= now:
                self._metrics.count("lmcache_l2_lookups_past_deadline")
                self._judge(promotion)
                self._stop(promotion)
            elif not promotion.loading_since and self._is_time_to_load(promotion):
                self._judge(promotion)
                _cancel_jobs(promotion)
                self._load(promotion)

    def _judge(self, promotion: Promotion) -> None:
        """A tier that has delivered works; one that had nothing to show when its time was up has failed.

        One that is busy for others, or was asked late because those before it took most of the time, is not judged.
        """
        is_loading = promotion.loading_since > 0
        operation, since = ("read", promotion.loading_since) if is_loading else ("find", promotion.began_at)
        if promotion.asked_at - since > time.monotonic() - promotion.asked_at:
            return
        jobs_of: dict[Tier, list[FindJob | ReadJob]] = {}
        for job, tier in promotion.jobs.items():
            if not job.is_cancelled:
                jobs_of.setdefault(tier, []).append(job)
        for tier, jobs in jobs_of.items():
            if any(job.has_done_something for job in jobs):
                tier.succeed(operation, tier.reads)
            elif tier.last_progress_at[operation] < since:
                tier.fail(operation, "deadline", "a lookup's deadline passed with nothing done", tier.reads)

    def cancel_all(self) -> None:
        """The chunks are unwanted: answer every lookup with what is in L1; what threads are still filling is given back."""
        for promotion in list(self._promotions):
            promotion.is_cancelled = True
            self._stop(promotion)

    def _stop(self, promotion: Promotion) -> None:
        """Answer, and let threads begin no further chunk of it."""
        _cancel_jobs(promotion)
        for other in promotion.waits_for:
            other.waiters.discard(promotion)
        promotion.waits_for.clear()
        self._answer(promotion)
        self._drop_if_over(promotion)

    # -- looking without loading --------------------------------------------------------------------------------------

    def begin_query(self, keys: bytes, world_size: int, l1_slots: list[int], timeout_seconds: float, done: Done) -> bool:
        """Find out what each tier holds of a prefix, load nothing, and call `done`; False when no tier can be asked."""
        tiers = self._askable(lambda tier: tier.reads.takes_questions)
        names = split_keys(keys)[: MAX_ENTRIES // world_size]
        if not names or not tiers:
            return False
        entries = [Entry(key, rank) for key in names for rank in range(world_size)]
        query = Query(self, entries, world_size, len(l1_slots) // world_size, [tier.name for tier in tiers], done)
        promotion = Promotion([], world_size, [], timeout_seconds, query.finish)
        self._promotions.add(promotion)
        for tier in tiers:
            self._ask(promotion, query, tier, _batches(entries, world_size, tiers))
        return True

    def _ask(self, promotion: Promotion, query: Query, tier: Tier, batches: Iterator[list[Entry]]) -> None:
        """Ask a tier for one batch after the other, however far the other tiers are, until the prefix is known to end."""
        batch = next(batches, [])
        if not batch or query.has_gap():
            self._finish_if_loaded(promotion)
            return

        def found() -> None:
            promotion.jobs.pop(job)
            if job.error is None and not job.is_cancelled:
                query.note(tier, [length is not None for length in job.chunk_lengths])
                self._ask(promotion, query, tier, batches)
            else:
                self._finish_if_loaded(promotion)

        job = FindJob([value_key(e.key, e.rank) for e in batch], found)
        promotion.jobs[job] = tier
        tier.submit(job)

    def is_in_l1(self, entry: Entry) -> bool:
        """Whether L1 has one rank's chunk now."""
        return self._l1.find(entry.key, entry.rank) is not None


class Query:
    """A lookup that nobody loads for: which tier holds what."""

    def __init__(
        self, promoter: Promoter, entries: list[Entry], world_size: int, l1_chunks: int, tiers: Iterable[str], done: Done
    ) -> None:
        self.entries = entries
        self._promoter = promoter
        self._world_size = world_size
        self._l1_chunks = l1_chunks
        self._done = done
        self._held: dict[str, list[bool]] = {tier: [] for tier in tiers}

    def note(self, tier: Tier, is_there: list[bool]) -> None:
        """Take in a tier's answer about the entries that follow those of its answers so far."""
        self._held[tier.name] += is_there

    def has_gap(self) -> bool:
        """Whether all tiers have been asked for an entry that nobody has."""
        return not all(any(found) for found in zip(*self._held.values(), self._here(), strict=False))

    def finish(self, _: Found) -> None:
        """Add up what is known and answer."""
        anywhere = [any(found) for found in zip_longest(self._here(), *self._held.values(), fillvalue=False)]
        hit_chunks = next((i for i, chunk in enumerate(self._by_chunk(anywhere)) if not all(chunk)), self._num_chunks)
        tiers = {name: sum(map(all, self._by_chunk(held)[:hit_chunks])) for name, held in self._held.items() if held}
        self._done(Found(l1_chunks=self._l1_chunks, hit_chunks=hit_chunks, tiers=tiers))

    def _here(self) -> Iterable[bool]:
        return map(self._promoter.is_in_l1, self.entries)

    @property
    def _num_chunks(self) -> int:
        return len(self.entries) // self._world_size

    def _by_chunk(self, flags: list[bool]) -> list[list[bool]]:
        return [flags[i : i + self._world_size] for i in range(0, len(flags), self._world_size)]


def note_found(tier: Tier, entries: Sequence[Entry], chunk_lengths: Sequence[int | None]) -> None:
    """Write down which entries a tier has."""
    num_hits = 0
    for entry, length in zip(entries, chunk_lengths, strict=True):
        if length is not None and length <= MAX_CHUNK_BYTES:
            entry.tier, entry.length = tier, length
            num_hits += 1
    tier.count("lookup_chunks", "hit", by=num_hits)
    tier.count("lookup_chunks", "miss", by=len(entries) - num_hits)


def _batches(entries: list[Entry], world_size: int, tiers: Sequence[Tier]) -> Iterator[list[Entry]]:
    """Cut entries into batches of whole chunks, small first: a prefix that ends early costs few questions."""
    start, size = 0, min(MAX_KEYS_PER_CALL, *(tier.keys_at_once for tier in tiers))
    while start < len(entries):
        end = start + max(1, size // world_size) * world_size
        yield entries[start:end]
        start, size = end, min(2 * size, MAX_KEYS_PER_CALL)


def _cancel_jobs(promotion: Promotion) -> None:
    for job in promotion.jobs:
        job.is_cancelled = True


def _chunks(promotion: Promotion) -> Iterable[list[Entry]]:
    size = promotion.world_size
    return (promotion.entries[i : i + size] for i in range(0, len(promotion.entries), size))


def _leading(promotion: Promotion) -> Iterable[list[Entry]]:
    for chunk in _chunks(promotion):
        if any(entry.tier is None for entry in chunk):
            return
        yield chunk


def _why(outcome: Outcome) -> str:
    """The reason in metrics why a place was given back; good ones had a bad one before them, or were unwanted."""
    reasons = {Outcome.MISSING: "missing", Outcome.BAD: "corrupt", Outcome.FAILED: "failed", Outcome.CANCELLED: "deadline"}
    return reasons.get(outcome, "unreachable")
