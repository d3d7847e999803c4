"""Decides what is kept: makes room on demand, keeps below the watermark, clears and evicts when asked.

Comes in: the service's requests. Goes out: outcomes and placements. Next on the data path: `l1.py`. Owner thread only.
"""

from __future__ import annotations

import itertools
import math
import time
from array import array
from collections.abc import Callable
from enum import Enum

import msgspec

from lmcache.keys import split_keys
from lmcache.pool import PAGE_BYTES, PoolFile, pages_of
from lmcache.protocol import Placement, StoreOutcome
from lmcache.storage.eviction import make_policy
from lmcache.storage.l1 import L1Cache
from lmcache.storage.residency import Residency

# A periodic eviction pass frees at most this many chunks, so that no request waits long behind it (about 5 ms).
MAX_EVICTED_PER_PASS = 512
# So many entries a removal on request looks at before others have their turn: about 5 ms where all of them go.
MAX_ENTRIES_PER_SLICE = 512
# Only pools that hold chunks of several sizes compare at all; 16 runs of 128 small chunks take about 2 ms.
MAX_RUNS_COMPARED = 16
# So many small chunks one request looks at to compare, about 5 ms; after that it takes the first run that it finds.
MAX_CHUNKS_COMPARED = 4096
# The pool counts as unable to allocate when nothing of this size can be had.
PROBE_PAGES = 1


class RemovalReason(str, Enum):
    """Why a committed chunk went."""

    DEMAND = "demand"
    WATERMARK = "watermark"
    REQUEST = "request"
    CLEAR = "clear"


class Removal(msgspec.Struct):
    """What was removed, and what was kept because it is pinned."""

    objects: int = 0
    removed_bytes: int = 0
    kept_objects: int = 0
    kept_bytes: int = 0


class Selection(msgspec.Struct, frozen=True, kw_only=True):
    """What an EVICT selects: all conditions that are set must hold; `max_bytes` bounds how much goes."""

    max_bytes: int | None = None
    namespace_ids: frozenset[int] | None = None
    older_than_seconds: float | None = None
    keys: bytes | None = None


class Sweep:
    """A removal under way: of what was committed when it began, a slice at a time, in policy order.

    Args:
        remove: removes an entry; None: a dry run, which only counts.
    """

    def __init__(self, l1: L1Cache, selection: Selection, remove: Callable[[int], None] | None) -> None:
        self.removal = Removal()
        self._l1 = l1
        self._selection = selection
        self._remove = remove
        self._last_commit = l1.last_commit
        # 0.13 s for a million entries.
        self._slots = array("I", l1.policy.victims() if selection.keys is None else l1.find_all_ranks(selection.keys))
        self._at = 0
        self._kept: dict[int, int] = {}  # bytes of each

    @property
    def num_left(self) -> int:
        """Entries that it has not come to yet."""
        return len(self._slots) - self._at

    def begin_again(self) -> None:
        """Look once more at what was kept: it may not be pinned any more."""
        self._slots, self._at = array("I", self._kept), 0

    def step(self, max_entries: int) -> None:
        """Look at so many entries."""
        end = min(self._at + max_entries, len(self._slots))
        while self._at < end:
            if self._selection.max_bytes is not None and self.removal.removed_bytes >= self._selection.max_bytes:
                self._at = len(self._slots)
                break
            slot = self._slots[self._at]
            self._at += 1  # before: one that cannot be read must not be looked at for ever
            self._look_at(slot)

    def _look_at(self, slot: int) -> None:
        l1, removal = self._l1, self.removal
        if slot in self._kept:
            if l1.is_pinned(slot):
                return
            removal.kept_objects -= 1
            removal.kept_bytes -= self._kept.pop(slot)
        length = self._selected_bytes(slot)
        if length is None:
            return
        if l1.is_pinned(slot):
            self._kept[slot] = length
            removal.kept_objects += 1
            removal.kept_bytes += length
            return
        if self._remove is not None:
            self._remove(slot)
        removal.objects += 1
        removal.removed_bytes += length

    def _selected_bytes(self, slot: int) -> int | None:
        """The bytes of an entry; None when it is not selected, has gone, or is another one by now."""
        ids, seconds = self._selection.namespace_ids, self._selection.older_than_seconds
        if not self._l1.is_committed(slot) or (seconds is not None and self._l1.idle_seconds(slot) < seconds):
            return None
        record = self._l1.record(slot)
        if record.order > self._last_commit or (ids is not None and record.namespace_id not in ids):
            return None
        return record.length


class StorageManager:
    """L1 and the policy above it.

    Args:
        pool: the pool file; its pages become resident from now on.
        high_watermark_ratio: share of the capacity in use above which chunks are evicted before anyone needs the room.
        eviction_ratio: share of the capacity that such a pass frees.
        on_removed: told how many chunks policy or a request removed, and their bytes: once for each store, pass or slice.
    """

    def __init__(
        self,
        pool: PoolFile,
        *,
        policy_name: str,
        high_watermark_ratio: float,
        eviction_ratio: float,
        on_removed: Callable[[RemovalReason, int, int], None] = lambda reason, num_chunks, num_bytes: None,
    ) -> None:
        self.policy_name = policy_name
        self.l1 = L1Cache(pool, make_policy(policy_name))
        self.residency = Residency(pool)
        self.last_pass_at = time.monotonic()
        self._high_pages = int(self.l1.capacity_pages * high_watermark_ratio)
        self._low_pages = max(0, int(self.l1.capacity_pages * (high_watermark_ratio - eviction_ratio)))
        self._is_evicting = False
        self._is_blocked = False
        self._num_comparable = 0
        self._on_removed = on_removed
        self._untold = dict.fromkeys(RemovalReason, (0, 0))
        # Set where there are tiers below: told of each slot that goes, and asked before one goes that nobody needs the room of.
        self.on_slot_removed: Callable[[int, RemovalReason], None] | None = None
        self.may_go: Callable[[int], bool] | None = None
        self.residency.start()
        self.l1.grow_to(self.residency.frontier_pages())

    # -- storing ------------------------------------------------------------------------------------------------------

    def reserve(
        self,
        keys: bytes,
        rank: int,
        lengths: list[int],
        namespace_id: int,
        owner: bytes,
        parent: bytes,
    ) -> tuple[list[StoreOutcome], list[Placement]]:
        """Reserve a place for each chunk that is not stored yet, evicting as needed."""
        outcomes: list[StoreOutcome] = []
        placements: list[Placement] = []
        self._num_comparable = MAX_CHUNKS_COMPARED
        too_long = math.inf  # no room for this length: looking for it takes long, and this request frees nothing
        for key, length in zip(split_keys(keys), lengths, strict=True):
            outcome = self.l1.outcome_if_known(key, rank)
            if outcome is None:
                place = None
                if length < too_long:
                    place = self._reserve_evicting(key, rank, length, namespace_id, owner, parent)
                if place is None:
                    outcome, too_long = StoreOutcome.FULL, min(too_long, length)
                else:
                    outcome = StoreOutcome.RESERVED
                    placements.append(place)
            outcomes.append(outcome)
            parent = key
        self._tell_removed()
        return outcomes, placements

    def _reserve_evicting(
        self, key: bytes, rank: int, length: int, namespace_id: int, owner: bytes, parent: bytes
    ) -> Placement | None:
        placement = self.l1.reserve(key, rank, length, namespace_id, owner, parent)
        if placement is None and self.make_room(pages_of(length)):
            placement = self.l1.reserve(key, rank, length, namespace_id, owner, parent)
        return placement

    def make_room(self, num_pages: int) -> bool:
        """Evict until `num_pages` in a row and a slot are free; False when pins and reservations leave no such room."""
        self.l1.grow_to(self.residency.frontier_pages())
        l1 = self.l1
        evictable = l1.committed_pages - l1.pinned_pages
        if l1.allocator.free_pages + evictable < num_pages:
            return False
        if l1.allocator.largest_free_pages >= num_pages:
            return l1.has_free_slot() or self._evict_one()
        run = self._oldest_run(num_pages)
        for victim in run:
            self._remove(victim, RemovalReason.DEMAND)
        return bool(run)

    def _oldest_run(self, num_pages: int) -> list[int]:
        """The run of neighbours that was not used for longest, among those around the first victims of the policy."""
        best: list[int] = []
        num_found = 0
        hopeless: set[int] = set()
        for slot in self.l1.evictable():
            if slot in hopeless:
                continue
            run, is_enough = self.l1.evictable_run(slot, num_pages)
            self._num_comparable -= len(run)
            if not is_enough:
                hopeless.update(run)
                continue
            if len(run) == 1:
                return run
            num_found += 1
            if not best or self.l1.last_use(run) < self.l1.last_use(best):
                best = run
            if num_found == MAX_RUNS_COMPARED or self._num_comparable <= 0:
                break
        return best

    def _evict_one(self) -> bool:
        for slot in self.l1.evictable():
            self._remove(slot, RemovalReason.DEMAND)
            return True
        return False

    # -- keeping below the watermark ----------------------------------------------------------------------------------

    def run_pass(self) -> None:
        """Take in pages that became resident, and evict a bounded number of chunks when above the watermark."""
        self.l1.grow_to(self.residency.frontier_pages())
        used = self.l1.used_pages
        self._is_evicting = used > (self._low_pages if self._is_evicting else self._high_pages)
        if self._is_evicting:
            evicted = 0
            for slot in itertools.islice(self.l1.evictable(), MAX_EVICTED_PER_PASS):
                if self.l1.used_pages <= self._low_pages:
                    break
                if self.may_go is None or self.may_go(slot):
                    self._remove(slot, RemovalReason.WATERMARK)
                    evicted += 1
            self._tell_removed()
            self._is_blocked = not evicted
            if not evicted:
                self._is_evicting = False
        self.last_pass_at = time.monotonic()

    @property
    def watermarks(self) -> tuple[int, int]:
        """Pages in use above which a pass begins to evict, and below which it evicts nothing more."""
        return self._high_pages, self._low_pages

    @property
    def is_above_watermark(self) -> bool:
        """Whether a pass would evict now; False while all that could go is pinned, until a later pass has looked again."""
        return self.l1.used_pages > self._high_pages and not self._is_blocked

    @property
    def wants_pass_soon(self) -> bool:
        """Whether the next pass has work now: eviction under way, or pages becoming resident."""
        return self._is_evicting or self.residency.is_running

    # -- removing on request ------------------------------------------------------------------------------------------

    def begin_removal(self, selection: Selection, reason: RemovalReason, dry_run: bool) -> Sweep:
        """Return a removal of what is selected now, which `advance` carries out."""
        return Sweep(self.l1, selection, None if dry_run else lambda slot: self._remove(slot, reason))

    def advance(self, sweep: Sweep, max_entries: int = MAX_ENTRIES_PER_SLICE) -> None:
        """Do a slice of a removal."""
        sweep.step(max_entries)
        self._tell_removed()

    # -- health -------------------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Return why no chunk could be stored now, or not as it should be. Allocates nothing that it keeps."""
        found = []
        l1 = self.l1
        evictable = l1.committed_pages - l1.pinned_pages
        if l1.allocator.free_pages + evictable < PROBE_PAGES:
            found.append(
                f"L1 is full: {l1.pinned_pages * PAGE_BYTES} bytes pinned, {l1.reserved_pages * PAGE_BYTES} reserved,"
                " nothing evictable"
            )
        elif not (evictable or l1.has_free_slot()):
            found.append(f"L1 is full: all {l1.pool.header.num_slots} slots are pinned or reserved; see --max-chunks")
        else:
            start = l1.allocator.allocate(PROBE_PAGES)
            if start is not None:
                l1.allocator.free(start, PROBE_PAGES)
        if self.residency.failure:
            found.append(self.residency.failure)
        if l1.pool.is_removed:
            found.append(f"{l1.pool.path} was removed: engines that start from now on are slower; restart the server")
        return found

    def close(self, *, keep: bool = False) -> None:
        """Stop the background work and close the pool."""
        self.residency.close()
        self.l1.pool.close(keep=keep)

    def _remove(self, slot: int, reason: RemovalReason) -> None:
        if self.on_slot_removed is not None:
            self.on_slot_removed(slot, reason)
        num_chunks, num_bytes = self._untold[reason]
        self._untold[reason] = (num_chunks + 1, num_bytes + self.l1.delete(slot))

    def _tell_removed(self) -> None:
        """Tell of all at once: to count each chunk by itself takes a third of the time that removing it takes."""
        for reason, (num_chunks, num_bytes) in self._untold.items():
            if num_chunks:
                self._untold[reason] = (0, 0)
                self._on_removed(reason, num_chunks, num_bytes)
