"""L1: the entries in the pool's slot table, and the view of them that makes finding one fast.

                 commit                    pin                 unpin (last)
    FREE -> RESERVED ------> COMMITTED <---------> COMMITTED, pinned n
      ^        | abort,         | evict, delete
      |        | owner died     | (only when not pinned)
      +--------+----------------+   each arrow into FREE raises the slot's generation

A pin that is taken from its holder, who has not given it back, raises the generation too, by another step, and keeps the entry
for KEPT_SECONDS more (`take_back`).
A reservation is invisible until its commit. Comes in: keys and page counts from `manager.py`. Goes out: `Placement`s, whose
bytes the clients write and read. Everything here belongs to the owner thread; nothing blocks.
"""

from __future__ import annotations

import math
import mmap
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from lmcache.keys import KEY_BYTES, split_keys
from lmcache.pool import (
    KEPT_SECONDS,
    NO_OWNER,
    PAGE_BYTES,
    PoolFile,
    SlotRecord,
    SlotState,
    freed_generation,
    pages_of,
    taken_generation,
)
from lmcache.protocol import Placement, StoreOutcome
from lmcache.storage.eviction.base import EvictionPolicy
from lmcache.storage.extents import ExtentAllocator

NOT_EVICTABLE = math.inf


class AccountingError(AssertionError):
    """The pool's pages do not add up: a bug in this package."""


class L1Cache:
    """Entries of the pool: index, pins, reservations, page accounting.

    Args:
        pool: a new or adopted pool file. Of an adopted one, entries that validate are served again.
        policy: the order in which entries are evicted.
    """

    def __init__(self, pool: PoolFile, policy: EvictionPolicy) -> None:
        self.pool = pool
        self.policy = policy
        self.capacity_pages = pool.header.capacity_bytes // PAGE_BYTES
        self.allocator = ExtentAllocator()
        self.reserved_pages = 0
        self.committed_pages = 0
        self.pinned_pages = 0
        self.num_pins = 0
        self.adopted_chunks = 0
        self.dropped_reservations = 0
        self._index: dict[bytes, int] = {}
        self._reserved: dict[bytes, int] = {}
        self._parents: dict[int, bytes] = {}
        self._free_slots: list[int] = []
        self._next_slot = 0
        self._order = 0
        self._ranks: set[int] = set()
        # Per slot, grown as slots come into use: pins held, pages of the extent, when a committed entry was last used.
        self._pins = array("I")
        self._pages = array("I")
        self._used_at = array("d")
        # Until when a slot rests whose pin was taken from its holder.
        self._rests_until = array("d")
        # Per slot: the key in the index (b"" unless committed), and the slot + 1 of the chunk that was stored after it: a hint.
        self._key_at: list[bytes] = []
        self._after = array("I")
        # Per page: the slot + 1 whose extent begins or ends there. Anonymous memory: pages never written cost nothing.
        self._slot_at_page = memoryview(mmap.mmap(-1, self.capacity_pages * 4)).cast("I")
        # Page ranges that are neither in use nor resident yet, ascending.
        self._not_resident = deque([(0, self.capacity_pages)])
        if pool.adopted:
            self._adopt()

    # -- reading ------------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_reserved(self) -> int:
        """Reservations that are neither committed nor aborted."""
        return len(self._reserved)

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks that have stored anything."""
        return frozenset(self._ranks)

    @property
    def used_pages(self) -> int:
        """Pages that hold a committed chunk or are reserved for one."""
        return self.committed_pages + self.reserved_pages

    @property
    def last_commit(self) -> int:
        """The highest `order` that a committed entry has; later commits get higher ones."""
        return self._order

    def find_prefix(self, keys: bytes, world_size: int) -> list[int]:
        """Return the slots of the leading chunks that are committed for all ranks: chunk by chunk, rank by rank."""
        if world_size > len(self._ranks):
            return []
        get, after, key_at = self._index.get, self._after, self._key_at
        slots: list[int] = []
        suffixes = [_rank_suffix(rank) for rank in range(1, world_size)]
        slot: int | None = None
        for at in range(0, len(keys), KEY_BYTES):
            key = keys[at : at + KEY_BYTES]
            # The chunk stored after the last one is nearly always the next: neighbours in memory, where the index of a million
            # chunks is a cache miss for each.
            hint = -1 if slot is None else after[slot] - 1
            slot = hint if hint >= 0 and key_at[hint] == key else get(key)
            if slot is None:
                break
            if suffixes:
                others = [get(key + suffix) for suffix in suffixes]
                if None in others:
                    break
                slots += [slot, *others]  # type: ignore[list-item]
            else:
                slots.append(slot)
        return slots

    def find(self, key: bytes, rank: int) -> int | None:
        """Return the committed slot of one rank's chunk."""
        return self._index.get(_entry_key(key, rank))

    def find_all_ranks(self, keys: bytes) -> list[int]:
        """Return every committed slot of these chunks once, whichever rank's, the last chunk first."""
        found = [self.find(key, rank) for key in dict.fromkeys(reversed(split_keys(keys))) for rank in sorted(self._ranks)]
        return [slot for slot in found if slot is not None]

    def record(self, slot: int) -> SlotRecord:
        """Return the record of a slot that is in use."""
        record = self.pool.read(slot)
        if record is None:
            raise AccountingError(f"the record of slot {slot} was damaged while the server ran")
        return record

    def placement(self, slot: int) -> Placement:
        """Return where a slot's chunk lies."""
        record = self.record(slot)
        return Placement(slot, record.offset, record.length, record.generation, record.checksum)

    def is_committed(self, slot: int) -> bool:
        """Whether the slot holds an entry that can be found."""
        return bool(self._key_at[slot])

    def num_pages(self, slot: int) -> int:
        """Return the pages of a slot's extent."""
        return self._pages[slot]

    def is_pinned(self, slot: int) -> bool:
        """Whether someone was promised that the entry stays, or was until just now."""
        return self._pins[slot] > 0 or self._rests_until[slot] > time.monotonic()

    def idle_seconds(self, slot: int) -> float:
        """Seconds since the entry was committed or last hit."""
        return time.monotonic() - self._used_at[slot]

    def slots(self) -> Iterable[int]:
        """Return the committed slots, in no particular order."""
        return self._index.values()

    @property
    def num_used_slots(self) -> int:
        """Slots below this number have been in use; none above."""
        return self._next_slot

    def slots_in(self, numbers: range) -> list[int]:
        """Return the committed slots among these numbers, all below `num_used_slots`."""
        return [slot for slot in numbers if self._key_at[slot]]

    # -- the life of an entry -----------------------------------------------------------------------------------------

    def outcome_if_known(self, key: bytes, rank: int) -> StoreOutcome | None:
        """Tell why a chunk needs no place: it EXISTS, or someone is writing it (BUSY)."""
        entry_key = _entry_key(key, rank)
        if entry_key in self._index:
            return StoreOutcome.EXISTS
        return StoreOutcome.BUSY if entry_key in self._reserved else None

    def has_free_slot(self) -> bool:
        """Whether the slot table has room."""
        return bool(self._free_slots) or self._next_slot < self.pool.header.num_slots

    def reserve(self, key: bytes, rank: int, length: int, namespace_id: int, owner: bytes, parent: bytes) -> Placement | None:
        """Return a place of `length` bytes, owned by `owner`; None when no free extent or slot is left."""
        if not self.has_free_slot():
            return None
        num_pages = pages_of(length)
        start = self.allocator.allocate(num_pages)
        if start is None:
            return None
        slot = self._take_slot()
        generation = self.pool.generation(slot)
        record = SlotRecord(
            key=key,
            namespace_id=namespace_id,
            owner=owner,
            offset=start * PAGE_BYTES,
            length=length,
            generation=generation,
            rank=rank,
            state=SlotState.RESERVED,
        )
        self.pool.write(slot, record)
        self._reserved[_entry_key(key, rank)] = slot
        self._ranks.add(rank)
        if parent:
            self._parents[slot] = parent
        self._occupy(slot, start, num_pages)
        self.reserved_pages += num_pages
        return Placement(slot, record.offset, length, generation)

    def commit(self, placements: Sequence[Placement], owner: bytes, namespace_ids: Sequence[int] | None = None) -> list[int]:
        """Publish reservations of `owner`, given in token order; return the slots that became visible.

        `namespace_ids`: one for each, where they were not known when the places were reserved.
        """
        committed = []
        now = time.monotonic()
        # The first chunk gets the highest number: an adopting server reads the order back suffix first.
        self._order += len(placements)
        for index, placement in enumerate(placements):
            record = self._reservation(placement, owner)
            if record is None:
                continue
            self.pool.write(
                placement.slot,
                msgspec.structs.replace(
                    record,
                    state=SlotState.COMMITTED,
                    owner=NO_OWNER,
                    order=self._order - index,
                    checksum=placement.checksum,
                    namespace_id=record.namespace_id if namespace_ids is None else namespace_ids[index],
                ),
            )
            entry_key = _entry_key(record.key, record.rank)
            del self._reserved[entry_key]
            self._index[entry_key] = placement.slot
            self._key_at[placement.slot] = entry_key
            self.reserved_pages -= self._pages[placement.slot]
            self.committed_pages += self._pages[placement.slot]
            self._used_at[placement.slot] = now
            committed.append(placement.slot)
        if committed:
            self._order_by_age(committed)
        return committed

    def abort(self, placements: Sequence[Placement], owner: bytes) -> int:
        """Free reservations of `owner`; return how many there were."""
        aborted = 0
        for placement in placements:
            record = self._reservation(placement, owner)
            if record is not None:
                del self._reserved[_entry_key(record.key, record.rank)]
                self._parents.pop(placement.slot, None)
                self.reserved_pages -= self._pages[placement.slot]
                self._free(placement.slot, record)
                aborted += 1
        return aborted

    def pin(self, slots: Iterable[int]) -> None:
        """Promise that these entries stay until as many `unpin`s."""
        pins, pages = self._pins, self._pages
        for slot in slots:
            if not pins[slot]:
                self.pinned_pages += pages[slot]
            pins[slot] += 1
            self.num_pins += 1

    def unpin(self, slots: Iterable[int]) -> None:
        """Take back one promise for each slot, in token order; the caller holds it."""
        pins, pages = self._pins, self._pages
        freed = []
        for slot in slots:
            pins[slot] -= 1
            self.num_pins -= 1
            if not pins[slot]:
                self.pinned_pages -= pages[slot]
                freed.append(slot)
        self.policy.bring_back(freed)

    def take_back(self, slots: Iterable[int]) -> None:
        """Take back promises that their holder, who is silent or gone, may still count on. It may be reading at this moment."""
        taken = list(slots)
        self.unpin(taken)
        for slot in set(taken):
            record = self.record(slot)
            self.pool.write(slot, msgspec.structs.replace(record, generation=taken_generation(record.generation)))
            self._rests_until[slot] = time.monotonic() + KEPT_SECONDS

    def touch(self, slots: Sequence[int]) -> None:
        """Note a hit on a prefix, in token order."""
        self.policy.touch(slots)
        now, used_at = time.monotonic(), self._used_at
        for slot in slots:
            used_at[slot] = now

    def delete(self, slot: int) -> int:
        """Free a committed slot that is not pinned; return its bytes."""
        record = self.record(slot)
        if self.is_pinned(slot):
            raise AccountingError(f"slot {slot} is pinned and cannot be freed")
        del self._index[_entry_key(record.key, record.rank)]
        self._key_at[slot] = b""
        self.policy.remove(slot)
        self.committed_pages -= self._pages[slot]
        self._free(slot, record)
        return record.length

    # -- space --------------------------------------------------------------------------------------------------------

    def grow_to(self, page: int) -> None:
        """Make what lies below `page`, and is resident now, allocatable."""
        while self._not_resident and self._not_resident[0][0] < page:
            start, end = self._not_resident.popleft()
            usable = min(end, page)
            self.allocator.free(start, usable - start)
            if usable < end:
                self._not_resident.appendleft((usable, end))

    def evictable_run(self, slot: int, num_pages: int) -> tuple[list[int], bool]:
        """Return the slots to delete, `slot` among them, so that `num_pages` in a row become free, and True.

        Where that cannot be: all slots between the two that must stay, and False; it can be for none of them.

        Evicting by age alone could empty the whole pool before two neighbours are gone, when sizes differ. Of two neighbours
        the one used longer ago is taken.
        """
        start = self.record(slot).offset // PAGE_BYTES
        end = start + self._pages[slot]
        run = [slot]
        while True:
            start -= self.allocator.free_run_before(start)
            end += self.allocator.free_run_at(end)
            if end - start >= num_pages:
                return run, True
            left, left_used_at = self._evictable_at(start - 1)
            right, right_used_at = self._evictable_at(end)
            if min(left_used_at, right_used_at) == NOT_EVICTABLE:
                return run, False
            if left_used_at < right_used_at:
                start -= self._pages[left]
                run.append(left)
            else:
                end += self._pages[right]
                run.append(right)

    def evictable(self) -> Iterator[int]:
        """Yield the entries that may go now, the policy's best victim first. The caller may delete the one just yielded.

        Pinned ones that it meets are set aside until they are unpinned: else each eviction would walk over all of them again,
        40 ms for each chunk with 100,000 at the old end of the order. What rests does so for a moment and stays in its place.
        """
        for slot in self.policy.candidates():
            if self._pins[slot]:
                self.policy.set_aside(slot)
            elif not self.is_pinned(slot):
                yield slot

    def last_use(self, slots: Iterable[int]) -> float:
        """Return when the most recently used of these entries was used, on the monotonic clock."""
        return max(self._used_at[slot] for slot in slots)

    def check(self, deep: bool = True) -> None:
        """Re-add the page totals and, when `deep`, every entry.

        Raises: AccountingError when free + reserved + committed pages are not the capacity, or the views disagree.
        """
        not_resident = sum(end - start for start, end in self._not_resident)
        free = self.allocator.free_pages
        total = free + self.reserved_pages + self.committed_pages + not_resident
        if total != self.capacity_pages:
            raise AccountingError(
                f"free {free} + reserved {self.reserved_pages} + committed {self.committed_pages}"
                f" + not resident {not_resident} = {total} pages, the pool has {self.capacity_pages}"
            )
        if not deep:
            return
        for name, index, pages in (
            ("committed", self._index, self.committed_pages),
            ("reserved", self._reserved, self.reserved_pages),
        ):
            added = sum(self._pages[slot] for slot in index.values())
            if added != pages:
                raise AccountingError(f"{name} entries add up to {added} pages, not {pages}")
        pins = sum(self._pins)
        if pins != self.num_pins:
            raise AccountingError(f"pins add up to {pins}, not {self.num_pins}")
        pinned = sum(self._pages[slot] for slot in self._index.values() if self._pins[slot])
        if pinned != self.pinned_pages:
            raise AccountingError(f"pinned entries add up to {pinned} pages, not {self.pinned_pages}")

    # -- parts --------------------------------------------------------------------------------------------------------

    def _order_by_age(self, committed: list[int]) -> None:
        parent = self._parents.pop(committed[0], b"")
        for slot in committed[1:]:
            self._parents.pop(slot, None)
        before = self._index.get(parent) if parent else None
        for earlier, following in zip([before, *committed], committed):  # noqa: B905 - the last has no follower yet
            if earlier is not None:
                self._after[earlier] = following + 1
        # A client may commit in any order: a parent of this very commit is not in the policy's order yet.
        self.policy.add(committed, None if before in committed else before)

    def _reservation(self, placement: Placement, owner: bytes) -> SlotRecord | None:
        """The record, if it is a reservation of this owner and exactly the one that the placement describes."""
        if placement.slot >= self._next_slot:
            return None
        record = self.record(placement.slot)
        if record.state is not SlotState.RESERVED or record.owner != owner:
            return None
        described = (placement.offset, placement.length, placement.generation)
        return record if (record.offset, record.length, record.generation) == described else None

    def _take_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        slot = self._next_slot
        self._grow_slots(slot + 1)
        return slot

    def _grow_slots(self, num_slots: int) -> None:
        missing = num_slots - self._next_slot
        self._pins.extend([0] * missing)
        self._pages.extend([0] * missing)
        self._used_at.extend([NOT_EVICTABLE] * missing)
        self._rests_until.extend([0.0] * missing)
        self._after.extend([0] * missing)
        self._key_at.extend([b""] * missing)
        self._next_slot = num_slots

    def _occupy(self, slot: int, start: int, num_pages: int) -> None:
        self._pages[slot] = num_pages
        self._slot_at_page[start] = slot + 1
        self._slot_at_page[start + num_pages - 1] = slot + 1

    def _free(self, slot: int, record: SlotRecord) -> None:
        """The generation changes before the extent can be handed out again: late readers depend on it."""
        self.pool.write(slot, SlotRecord(generation=freed_generation(record.generation)))
        start, num_pages = record.offset // PAGE_BYTES, self._pages[slot]
        self._slot_at_page[start] = 0
        self._slot_at_page[start + num_pages - 1] = 0
        self._used_at[slot] = NOT_EVICTABLE
        self.allocator.free(start, num_pages)
        self._free_slots.append(slot)

    def _evictable_at(self, page: int) -> tuple[int, float]:
        """The slot whose extent begins or ends at `page`, and when it was last used: NOT_EVICTABLE if it must stay."""
        slot = self._slot_at_page[page] - 1 if 0 <= page < self.capacity_pages else -1
        if slot < 0 or self.is_pinned(slot):
            return slot, NOT_EVICTABLE
        return slot, self._used_at[slot]

    # -- adoption -----------------------------------------------------------------------------------------------------

    def _adopt(self) -> None:
        """Rebuild the view from the table. What does not validate is freed; a live owner's reservation stays until it ends."""
        kept: list[tuple[SlotRecord, int]] = []
        last_used = -1
        for slot, record in self._used_slots():
            last_used = slot
            if record is not None and self._is_valid(record):
                kept.append((record, slot))
            else:
                self._discard(slot)
        self._grow_slots(last_used + 1)
        kept = self._without_overlaps(kept)
        used = {slot for _, slot in kept}
        self._free_slots = [slot for slot in range(self._next_slot - 1, -1, -1) if slot not in used]
        for record, slot in kept:
            self._readmit(slot, record)
        self._not_resident = deque(self._gaps(kept))

    def _used_slots(self) -> Iterator[tuple[int, SlotRecord | None]]:
        for slot in range(self.pool.header.num_slots):
            record = self.pool.read(slot)
            if record is None or record.state is not SlotState.FREE or record.generation:
                yield slot, record

    def _is_valid(self, record: SlotRecord) -> bool:
        if record.state is SlotState.FREE or record.length <= 0 or record.offset % PAGE_BYTES:
            return False
        return record.offset + record.length <= self.pool.header.capacity_bytes

    def _discard(self, slot: int) -> None:
        self.pool.write(slot, SlotRecord(generation=freed_generation(self.pool.generation(slot))))

    def _without_overlaps(self, kept: list[tuple[SlotRecord, int]]) -> list[tuple[SlotRecord, int]]:
        """Two records can claim the same pages, or two slots one key, only in a damaged table: believe neither."""
        kept.sort(key=lambda item: item[0].offset)
        bad: set[int] = set()
        seen: dict[bytes, int] = {}
        end, end_slot = 0, -1
        for record, slot in kept:
            if record.offset < end:
                bad |= {slot, end_slot}
            if record.offset + record.length > end:
                end, end_slot = record.offset + pages_of(record.length) * PAGE_BYTES, slot
            other = seen.setdefault(_entry_key(record.key, record.rank), slot)
            if other != slot:
                bad |= {slot, other}
        for slot in bad:
            self._discard(slot)
        return sorted((item for item in kept if item[1] not in bad), key=lambda item: item[0].order)

    def _readmit(self, slot: int, record: SlotRecord) -> None:
        num_pages = pages_of(record.length)
        self._occupy(slot, record.offset // PAGE_BYTES, num_pages)
        entry_key = _entry_key(record.key, record.rank)
        self._ranks.add(record.rank)
        if record.state is SlotState.COMMITTED:
            self._index[entry_key] = slot
            self._key_at[slot] = entry_key
            self._used_at[slot] = time.monotonic()
            self.committed_pages += num_pages
            self.policy.add([slot])
            self._order = max(self._order, record.order)
            self.adopted_chunks += 1
        else:
            self._reserved[entry_key] = slot
            self.reserved_pages += num_pages
            self.dropped_reservations += 1

    def reservations(self) -> list[tuple[bytes, Placement]]:
        """Return (owner, placement) of every open reservation."""
        records = [(slot, self.record(slot)) for slot in self._reserved.values()]
        return [(r.owner, Placement(slot, r.offset, r.length, r.generation)) for slot, r in records]

    def _gaps(self, kept: list[tuple[SlotRecord, int]]) -> Iterator[tuple[int, int]]:
        at = 0
        for record, _ in sorted(kept, key=lambda item: item[0].offset):
            start = record.offset // PAGE_BYTES
            if start > at:
                yield at, start
            at = start + pages_of(record.length)
        if at < self.capacity_pages:
            yield at, self.capacity_pages


def _rank_suffix(rank: int) -> bytes:
    return rank.to_bytes(2, "little")


def _entry_key(key: bytes, rank: int) -> bytes:
    return key + _rank_suffix(rank) if rank else key
