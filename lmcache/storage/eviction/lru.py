"""Least recently used, suffix first: within one prefix the later chunks go before the earlier ones.

A chunk without its predecessors can never be hit again, so evicting from the end keeps what remains useful.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence


class LRUPolicy:
    """A doubly linked list in two arrays, 8 bytes a slot, invisible to the garbage collector.

    Position 0 is the list's head and tail; slot s lives at s + 1. From the head: oldest to newest.
    """

    def __init__(self) -> None:
        self._next = array("I", [0])
        self._previous = array("I", [0])

    def add(self, slots: Sequence[int], older_than: int | None = None) -> None:
        """Insert a run: as the newest, or behind its predecessor, so that a prompt stored in steps is still suffix first."""
        missing = max(slots) + 2 - len(self._next)
        if missing > 0:
            self._next.extend([0] * missing)
            self._previous.extend([0] * missing)
        newer = 0 if older_than is None else older_than + 1
        for slot in slots:
            newer = self._link(slot + 1, slot + 1, newer)

    def touch(self, slots: Sequence[int]) -> None:
        """Make a prefix the newest, its first chunk newest of all. Runs that already lie in this order move as one."""
        following, previous = self._next, self._previous
        index = len(slots) - 1
        while index >= 0:
            first = last = slots[index] + 1
            index -= 1
            while index >= 0 and following[last] == slots[index] + 1:
                last = slots[index] + 1
                index -= 1
            before, after = previous[first], following[last]
            following[before] = after
            previous[after] = before
            self._link(first, last, 0)

    def remove(self, slot: int) -> None:
        """Unlink a slot."""
        position = slot + 1
        before, after = self._previous[position], self._next[position]
        self._next[before] = after
        self._previous[after] = before

    def victims(self) -> Iterator[int]:
        """Yield slots from the oldest to the newest."""
        position = self._next[0]
        while position:
            following = self._next[position]
            yield position - 1
            position = following

    def _link(self, first: int, last: int, newer: int) -> int:
        """Put the run first..last, already linked inside, right before `newer`; return its oldest position."""
        older = self._previous[newer]
        self._next[older] = first
        self._previous[first] = older
        self._next[last] = newer
        self._previous[newer] = last
        return first
