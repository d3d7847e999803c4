"""The way down: which chunks of L1 are written to a tier, and when. Owner thread only.

Comes in: slots that were committed, are evicted next, or are gone. Goes out: `WriteJob`s. Next on the data path: `tier.py`.

A chunk that waits for its turn is not pinned: it may be evicted, and then it is dropped from the queue and counted. Only what a
thread is at is pinned, at most a batch for each thread. So nothing that L1 needs ever waits for a tier, and the queue is
bounded by the number of chunks in L1.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from lmcache.storage.l1 import L1Cache
from lmcache.storage.l2.jobs import DeleteJob, Job, Outcome, Transfer, WriteJob
from lmcache.storage.l2.tier import Tier
from lmcache.storage.l2.value import value_key

# A job takes as many chunks as have so many bytes, at least one: few wake-ups for small chunks, short pins for large ones.
BATCH_BYTES = 8 << 20
MAX_BATCH_CHUNKS = 64
# What L1 holds is queued again in slices of so many slots: 0.4 ms each, where a million at once take 0.2 s. The next one has
# its turn when fewer chunks than that wait, so new ones do not wait behind all old ones.
SLICE_SLOTS = 4096
# All batches together pin at most about this share of L1.
MAX_PINNED_SHARE = 1 / 8


class Writeback:
    """The write queue of one tier, oldest first."""

    def __init__(self, tier: Tier, l1: L1Cache) -> None:
        self.tier = tier
        self._l1 = l1
        self._queue: dict[int, None] = {}
        self._rest = range(0)  # slots whose chunks are still to be queued again
        self._in_flight: set[WriteJob] = set()
        self._exclusive: deque[Job] = deque()
        self._exclusive_running = False
        self._is_closed = False
        capacity = l1.pool.header.capacity_bytes
        self._batch_bytes = min(BATCH_BYTES, int(capacity * MAX_PINNED_SHARE / tier.num_writers))

    def __len__(self) -> int:
        return len(self._queue) + len(self._rest)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is queued or under way."""
        return not (self._queue or self._rest or self._in_flight or self._exclusive or self._exclusive_running)

    @property
    def num_in_flight(self) -> int:
        """Chunks that threads are at."""
        return sum(len(job.transfers) for job in self._in_flight)

    def offer(self, slots: Iterable[int]) -> None:
        """Queue committed chunks."""
        self._queue.update(dict.fromkeys(slots))
        self.dispatch()

    def start_over(self) -> None:
        """The tier was emptied and L1 was not: what L1 holds now is to be written again, a slice after the other."""
        self._rest = range(self._l1.num_used_slots)

    def offer_rest(self) -> None:
        """Queue what is left of that at once: nobody waits for the owner thread any more."""
        while self._rest:
            self._offer_slice()

    def _offer_slice(self) -> None:
        chosen, self._rest = self._rest[:SLICE_SLOTS], self._rest[SLICE_SLOTS:]
        self._queue.update(dict.fromkeys(self._l1.slots_in(chosen)))

    def forget(self, slot: int, reason: str) -> None:
        """A chunk goes from L1; if it was queued, it is dropped."""
        if self._queue.pop(slot, self) is not self:
            self.tier.count("dropped_chunks", reason, by=1)

    def drop_all(self, reason: str) -> int:
        """Drop what is queued and stop what is under way after the current chunk; return how many chunks that were."""
        num_dropped = len(self._queue)
        self._queue.clear()
        self._rest = range(0)
        self.tier.count("dropped_chunks", reason, by=num_dropped)
        for job in self._in_flight:
            job.is_cancelled = True
        return num_dropped + self.num_in_flight

    def holds(self, slot: int) -> bool:
        """Whether a chunk is queued."""
        return slot in self._queue

    def run_alone(self, job: Job) -> None:
        """Run a job when no write is under way, before any other begins: a clear or a delete must be the last word."""
        self._exclusive.append(job)
        self.dispatch()

    def delete(self, keys: Sequence[bytes], ranks: Iterable[int], done: Callable[[DeleteJob], None]) -> None:
        """Take chunks out of the tier, after writes of them that are under way; then `done` is called."""
        job = DeleteJob([value_key(key, rank) for key in keys for rank in ranks], lambda: done(job))
        being_written = {transfer.name for write in self._in_flight for transfer in write.transfers}
        if being_written.isdisjoint(job.names):
            self.tier.submit(job)
        else:
            self.run_alone(job)

    def close(self) -> None:
        """Begin no more work."""
        self._is_closed = True

    def dispatch(self) -> None:
        """Give work to threads that have none."""
        if self._exclusive or self._exclusive_running:
            self._dispatch_exclusive()
            return
        if self._rest and len(self._queue) < SLICE_SLOTS:
            self._offer_slice()
        while (
            self._queue and len(self._in_flight) < self.tier.num_writers and self.tier.writes.is_closed and not self._is_closed
        ):
            self._dispatch_batch()

    def _dispatch_exclusive(self) -> None:
        if self._in_flight or self._exclusive_running:
            return
        job = self._exclusive.popleft()
        self._exclusive_running = True
        done = job.done

        def finish() -> None:
            self._exclusive_running = False
            done()
            self.dispatch()

        job.done = finish
        self.tier.submit(job)

    def _dispatch_batch(self) -> None:
        transfers: list[Transfer] = []
        num_bytes = 0
        for slot in self._queue:
            record = self._l1.record(slot)
            if (transfers and num_bytes + record.length > self._batch_bytes) or len(transfers) == MAX_BATCH_CHUNKS:
                break
            num_bytes += record.length
            transfers.append(
                Transfer(
                    key=record.key,
                    rank=record.rank,
                    slot=slot,
                    extent=self._l1.pool.data[record.offset : record.offset + record.length],
                    namespace_id=record.namespace_id,
                    checksum=record.checksum,
                )
            )
        slots = [transfer.slot for transfer in transfers]
        for slot in slots:
            del self._queue[slot]
        self._l1.pin(slots)
        job = WriteJob(transfers, lambda: self._finish(job))
        self._in_flight.add(job)
        self.tier.submit(job)

    def _finish(self, job: WriteJob) -> None:
        self._in_flight.discard(job)
        self._l1.unpin([transfer.slot for transfer in job.transfers])
        self._queue_again(job)
        outcomes = [transfer.outcome for transfer in job.transfers]
        self.tier.count("existing_chunks", by=outcomes.count(Outcome.EXISTS))
        lost = (Outcome.BAD, Outcome.FAILED)
        self.tier.count("dropped_chunks", "failed", by=sum(outcome in lost for outcome in outcomes))
        self.tier.count("dropped_chunks", "removed", by=outcomes.count(Outcome.CANCELLED))
        self.dispatch()

    def _queue_again(self, job: WriteJob) -> None:
        """A job that failed has come to the first of those that are pending; the others have their turn again, and first."""
        pending = [transfer for transfer in job.transfers if transfer.outcome is Outcome.PENDING]
        if job.is_cancelled:
            for transfer in pending:
                transfer.outcome = Outcome.CANCELLED
        elif pending:
            pending[0].outcome = Outcome.FAILED
            self._queue = dict.fromkeys([*(transfer.slot for transfer in pending[1:]), *self._queue])


class WriteAhead:
    """Write-on-evict: the chunks that would be evicted next are written before they are, while L1 is nearly full.

    A chunk counts as written once it was offered to the tiers and is in no queue any more. One that must go before it was
    written is dropped: eviction on demand waits for nobody.
    """

    # Of the chunks next in line so many are looked at each time, which takes about 1 ms.
    MAX_LOOKED_AT = 2048

    def __init__(self, writebacks: Sequence[Writeback], l1: L1Cache, start_pages: int, ahead_pages: int) -> None:
        self._writebacks = writebacks
        self._l1 = l1
        self._start_pages = start_pages
        self._ahead_pages = max(1, ahead_pages)
        self._offered: set[int] = set()
        self._offered_before: set[int] = set()  # a clear: they were counted, and are to be written again

    def note_stored(self, slots: Iterable[int]) -> None:
        """These chunks came from a tier: they need not be written."""
        self._offered.update(slots)

    def start_over(self) -> None:
        """The tiers were cleared, or what was queued was dropped: nothing counts as written any more."""
        self._offered_before |= self._offered
        self._offered.clear()

    def forget(self, slot: int) -> bool:
        """A chunk goes from L1; False when it had never been offered."""
        was_offered = slot in self._offered or slot in self._offered_before
        self._offered.discard(slot)
        self._offered_before.discard(slot)
        return was_offered

    def offer_all(self) -> None:
        """Offer everything, what was used last and the beginnings of prompts first: there will be no L1."""
        chosen = [slot for slot in self._l1.policy.victims() if slot not in self._offered][::-1]
        self._offered.update(chosen)
        for writeback in self._writebacks:
            writeback.offer(chosen)

    def is_written(self, slot: int) -> bool:
        """Whether evicting the chunk loses nothing that would soon be written."""
        working = [writeback for writeback in self._writebacks if writeback.tier.writes.is_closed]
        return not working or (slot in self._offered and not any(writeback.holds(slot) for writeback in working))

    def offer_next(self) -> None:
        """Offer those that are next in line."""
        l1 = self._l1
        if l1.used_pages <= self._start_pages:
            return
        ahead = 0
        chosen = []
        for slot in itertools.islice(l1.policy.candidates(), self.MAX_LOOKED_AT):
            if ahead >= self._ahead_pages:
                break
            ahead += l1.num_pages(slot)
            if slot not in self._offered:
                chosen.append(slot)
        self._offered.update(chosen)
        for writeback in self._writebacks:
            writeback.offer(chosen)
