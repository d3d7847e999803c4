"""All tiers below L1, as the service sees them: what it tells them, and what it asks. Owner thread only; nothing blocks.

Comes in: commits, removals, lookups, clears. Goes out: writes (`l2/writeback.py`), loads (`promotion.py`) and answers, when
`collect` or `tick` is called. The order of the tiers is their priority: a lookup asks the first one first, a commit is written
to all. A chunk that a lower tier delivered is written to those above it.
"""

from __future__ import annotations

import functools
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from lmcache.keys import split_keys
from lmcache.log import init_logger
from lmcache.metrics import Metrics
from lmcache.pool import NO_OWNER, Presence
from lmcache.protocol import TierRemoval
from lmcache.storage.l2.base import L2Adapter
from lmcache.storage.l2.jobs import ClearJob, RemovalJob
from lmcache.storage.l2.tier import Tier, TierConfig
from lmcache.storage.l2.workers import Completions
from lmcache.storage.l2.writeback import WriteAhead, Writeback
from lmcache.storage.manager import RemovalReason, StorageManager
from lmcache.storage.promotion import Found, Promoter

logger = init_logger(__name__)

JOIN_SECONDS = 15.0
DRAIN_STEP_SECONDS = 0.005


class NamedAdapter(msgspec.Struct, frozen=True):
    """An adapter, its label, and how it was configured, without secrets."""

    name: str
    shown: str
    adapter: L2Adapter


class TierRemovals:
    """A clear, or a removal of some chunks, under way: one entry for each tier, `done` once its tier has answered."""

    def __init__(self, tiers: Sequence[Tier]) -> None:
        self.removals = [TierRemoval(name=tier.name, error="not done yet") for tier in tiers]

    @property
    def is_done(self) -> bool:
        """Whether every tier has answered."""
        return all(removal.done for removal in self.removals)

    def note(self, index: int, job: RemovalJob) -> None:
        """Take in what one tier did."""
        self.removals[index] = TierRemoval(
            name=self.removals[index].name,
            objects=job.objects,
            removed_bytes=job.removed_bytes,
            done=True,
            error="" if job.error is None else str(job.error),
        )


class Tiers:
    """The tiers of one server.

    Args:
        wake: called by worker threads when the owner thread should `collect`.
    """

    def __init__(
        self,
        adapters: Sequence[NamedAdapter],
        storage: StorageManager,
        config: TierConfig,
        metrics: Metrics,
        wake: Callable[[], None],
    ) -> None:
        self._storage = storage
        self._config = config
        self._completions = Completions(wake)
        self._tiers = [Tier(a.name, a.shown, a.adapter, config, self._completions, metrics) for a in adapters]
        self._writebacks = [Writeback(tier, storage.l1) for tier in self._tiers]
        # Its reservations are a client's: should another server adopt the pool, it waits until this process is gone.
        self._owner = secrets.token_bytes(len(NO_OWNER))
        self._presence = Presence(storage.l1.pool.path, self._owner.hex())
        self._promoter = Promoter(storage, self._tiers, config, metrics, self._owner, self._note_promoted)
        self._is_closed = False
        # While a clear is at L1: the tiers may be empty already, and what it has not come to yet must not be written to them.
        self.is_l1_being_cleared = False
        self._ahead: WriteAhead | None = None
        if config.write_on_evict:
            # Begins one pass below where eviction stops, and stays one pass ahead of it.
            high, low = storage.watermarks
            self._ahead = WriteAhead(self._writebacks, storage.l1, 2 * low - high, high - low)
            storage.may_go = self._ahead.is_written
        else:
            self._offer(storage.l1.slots())
        storage.on_slot_removed = self._forget

    # -- down ---------------------------------------------------------------------------------------------------------

    def note_committed(self, slots: Iterable[int]) -> None:
        """Chunks were stored in L1: with write-through they are on their way now."""
        if self._ahead is None:
            self._offer(slots)

    def _offer(self, slots: Iterable[int]) -> None:
        slots = list(slots)
        for writeback in self._writebacks:
            writeback.offer(slots)

    def _note_promoted(self, slots: Sequence[int], source: Tier) -> None:
        if self._ahead is not None:
            self._ahead.note_stored(slots)
        for writeback in self._writebacks[: self._tiers.index(source)]:
            writeback.offer(slots)

    def _forget(self, slot: int, reason: RemovalReason) -> None:
        is_evicted = reason in (RemovalReason.DEMAND, RemovalReason.WATERMARK)
        label = "evicted" if is_evicted else "removed"
        for writeback in self._writebacks:
            writeback.forget(slot, label)
        if self._ahead is not None and not self._ahead.forget(slot):
            for tier in self._tiers:
                tier.count("dropped_chunks", label)

    # -- up -----------------------------------------------------------------------------------------------------------

    def look_up(
        self,
        keys: bytes,
        world_size: int,
        l1_slots: list[int],
        promotes: bool,
        max_seconds: float | None,
        done: Callable[[Found], None],
    ) -> bool:
        """Ask the tiers for what follows `l1_slots`; `done` is called once, at the latest at the deadline.

        False: no tier is to be asked, and `done` will not be called. A call within this one is possible.
        """
        seconds = min(self._config.lookup_timeout_seconds, max_seconds if max_seconds is not None else 1e9)
        begin = self._promoter.begin if promotes else self._promoter.begin_query
        return begin(keys, world_size, l1_slots, seconds, done)

    def note_used(self, keys: bytes, world_size: int) -> None:
        """An engine asked for a prompt, and L1 has these chunks of it now: they are in use in the tiers as well."""
        for tier in self._tiers:
            tier.note_used(keys, world_size)

    # -- removing -----------------------------------------------------------------------------------------------------

    def delete(self, keys: bytes, ranks: Sequence[int]) -> TierRemovals:
        """Take the chunks of these ranks out of every tier, soon."""
        removals = TierRemovals(self._tiers)
        for index, writeback in enumerate(self._writebacks):
            writeback.delete(split_keys(keys), ranks, functools.partial(removals.note, index))
        return removals

    def stop_moving(self) -> None:
        """What is on its way up is unwanted, and what is on its way down as well."""
        if self._ahead is not None:
            self._ahead.start_over()
        self._promoter.cancel_all()
        for writeback in self._writebacks:
            writeback.drop_all("removed")

    @property
    def num_moving(self) -> int:
        """Chunks that threads are at, in either direction: they cannot be removed yet."""
        return len(self._promoter) + sum(writeback.num_in_flight for writeback in self._writebacks)

    def clear(self, keeps_l1: bool = False) -> TierRemovals:
        """Remove everything from every tier; until a tier has done that, lookups find nothing in it.

        `keeps_l1`: L1 is not cleared with them, and what it holds then is written to them again.
        """
        self.stop_moving()
        removals = TierRemovals(self._tiers)
        for index, writeback in enumerate(self._writebacks):
            writeback.tier.num_clears += 1
            self._clear_tier(removals, index, writeback, keeps_l1 and self._ahead is None)
        return removals

    def _clear_tier(self, removals: TierRemovals, index: int, writeback: Writeback, starts_over: bool) -> None:
        def cleared() -> None:
            writeback.tier.num_clears -= 1
            writeback.tier.forget_usage()
            removals.note(index, job)
            if starts_over:
                writeback.start_over()

        job = ClearJob(cleared)
        writeback.run_alone(job)

    def would_remove(self) -> list[TierRemoval]:
        """Return what a clear would remove, as far as it is known. A tier that cannot count ours holds others' bytes, too."""
        usages = [(tier.name, tier.usage) for tier in self._tiers]
        return [
            TierRemoval(name=name, objects=u.objects, removed_bytes=None if u.objects is None else u.used_bytes, done=True)
            for name, u in usages
        ]

    # -- time passes --------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """See what the threads have done."""
        if self._completions.collect():
            self._write_ahead()

    def tick(self) -> None:
        """Do what is due: deadlines of lookups, probes, work for idle threads."""
        self.collect()
        self._promoter.tick()
        self._write_ahead()
        for tier, writeback in zip(self._tiers, self._writebacks, strict=True):
            tier.tick()
            writeback.dispatch()

    def _write_ahead(self) -> None:
        if self._ahead is not None and not self.is_l1_being_cleared:
            self._ahead.offer_next()

    @property
    def wants_tick_soon(self) -> bool:
        """Whether a lookup waits, whose deadline may pass."""
        return len(self._promoter) > 0

    def close(self, drain_seconds: float) -> None:
        """Write what is queued until the time is up, say what is left, and end the threads. The owner thread has ended.

        Once it has succeeded, doing it again does nothing.
        """
        if self._is_closed:
            return
        deadline = time.monotonic() + drain_seconds
        self._promoter.cancel_all()
        if self._ahead is not None and not (self._storage.l1.pool.header.persistent or self.is_l1_being_cleared):
            self._ahead.offer_all()
        for writeback in self._writebacks:
            writeback.offer_rest()
        while time.monotonic() < deadline and not self._is_drained():
            time.sleep(DRAIN_STEP_SECONDS)
            self.tick()
        for writeback in self._writebacks:
            writeback.close()
            left = writeback.drop_all("shutdown")
            if left:
                logger.warning("L2 %s: %d chunks were not written before the end", writeback.tier.name, left)
        for tier in self._tiers:  # all of them, before the deadline is used up by one that is stuck
            tier.end()
        deadline = time.monotonic() + JOIN_SECONDS
        stuck = [name for tier in self._tiers for name in tier.close(deadline)]
        self.collect()
        if stuck:
            logger.warning("L2: still at a call: %s", ", ".join(stuck))
        else:
            self._presence.close()
            self._is_closed = True

    def _is_drained(self) -> bool:
        return all(w.is_idle or not w.tier.writes.is_closed for w in self._writebacks)

    # -- what it looks like -------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Return what is wrong with the threads; a tier that is down is no problem of the server."""
        return [problem for tier in self._tiers for problem in tier.problems()]

    def update_gauges(self) -> None:
        """Bring the gauges up to date."""
        for tier, writeback in zip(self._tiers, self._writebacks, strict=True):
            tier.update_gauges(len(writeback) + writeback.num_in_flight)

    def status(self) -> list[dict[str, Any]]:
        """Return one entry for each tier."""
        return [t.status(len(w) + w.num_in_flight) for t, w in zip(self._tiers, self._writebacks, strict=True)]
