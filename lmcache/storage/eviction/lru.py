"""Least recently used, suffix first: within one prefix the later chunks go before the earlier ones.

A chunk without its predecessors can never be hit again, so evicting from the end keeps what remains useful.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

# Positions in the list: its head and tail, the mark behind those that are set aside, and the first slot's.
ENDS, MARK, FIRST = 0, 1, 2


class LRUPolicy:
    """A doubly linked list in two arrays, 8 bytes a slot, invisible to the garbage collector.

    Slot s lives at s + FIRST. From the head, oldest to newest: the slots that are set aside, the mark, all others.
    """

    def __init__(self) -> None:
        self._next = array("I", [MARK, ENDS])
        self._previous = array("I", [MARK, ENDS])
        self._aside: set[int] = set()

    def add(self, slots: Sequence[int], older_than: int | None = None) -> None:
        """Insert a run: as the newest, or behind its predecessor, so that a prompt stored in steps is still suffix first."""
        missing = max(slots) + FIRST + 1 - len(self._next)
        if missing > 0:
            self._next.extend([0] * missing)
            self._previous.extend([0] * missing)
        newer = ENDS if older_than is None else older_than + FIRST
        if older_than in self._aside:
            newer = self._next[MARK]
        for slot in slots:
            newer = self._link(slot + FIRST, slot + FIRST, newer)

    def touch(self, slots: Sequence[int]) -> None:
        """Make a prefix the newest, its first chunk newest of all. Runs that already lie in this order move as one."""
        if self._aside:
            self._aside.difference_update(slots)
        following = self._next
        index = len(slots) - 1
        while index >= 0:
            first = last = slots[index] + FIRST
            index -= 1
            while index >= 0 and following[last] == slots[index] + FIRST:
                last = slots[index] + FIRST
                index -= 1
            self._unlink(first, last)
            self._link(first, last, ENDS)

    def remove(self, slot: int) -> None:
        """Unlink a slot."""
        self._aside.discard(slot)
        self._unlink(slot + FIRST, slot + FIRST)

    def set_aside(self, slot: int) -> None:
        """Move a slot to just before the mark: `candidates` begins behind it."""
        self._aside.add(slot)
        self._move(slot, MARK)

    def bring_back(self, slots: Iterable[int]) -> None:
        """Make those that were set aside the oldest of the others: what was used before them has gone, or was older."""
        for slot in slots if self._aside else ():
            if slot in self._aside:
                self._aside.remove(slot)
                self._move(slot, self._next[MARK])

    def victims(self) -> Iterator[int]:
        """Yield all slots from the oldest to the newest."""
        return self._after(ENDS)

    def candidates(self) -> Iterator[int]:
        """Yield those that are not set aside, from the oldest to the newest."""
        return self._after(MARK)

    def _after(self, start: int) -> Iterator[int]:
        position = self._next[start]
        while position:
            following = self._next[position]
            if position != MARK:
                yield position - FIRST
            position = following

    def _move(self, slot: int, newer: int) -> None:
        self._unlink(slot + FIRST, slot + FIRST)
        self._link(slot + FIRST, slot + FIRST, newer)

    def _unlink(self, first: int, last: int) -> None:
        before, after = self._previous[first], self._next[last]
        self._next[before] = after
        self._previous[after] = before

    def _link(self, first: int, last: int, newer: int) -> int:
        """Put the run first..last, already linked inside, right before `newer`; return its oldest position."""
        older = self._previous[newer]
        self._next[older] = first
        self._previous[first] = older
        self._next[last] = newer
        self._previous[newer] = last
        return first
