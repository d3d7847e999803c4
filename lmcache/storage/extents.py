"""Free space of the pool's data area: best fit with coalescing, in pages.

Comes in: sizes in pages. Goes out: first pages of extents. Not thread-safe: the owner thread's.
"""

from __future__ import annotations

from bisect import bisect_left, insort


class ExtentAllocator:
    """Hands out runs of pages. Of the extents that fit best, the one freed last goes first: its pages are warm.

    All operations are O(log distinct sizes).
    """

    def __init__(self) -> None:
        self._size_at: dict[int, int] = {}
        self._start_before: dict[int, int] = {}
        # A dict keeps insertion order, so popitem() is the extent freed last.
        self._starts_of: dict[int, dict[int, None]] = {}
        self._sizes: list[int] = []
        self.free_pages = 0

    def allocate(self, num_pages: int) -> int | None:
        """Return the first page of a free run, or None when no free extent is long enough."""
        index = bisect_left(self._sizes, num_pages)
        if index == len(self._sizes):
            return None
        size = self._sizes[index]
        start = next(reversed(self._starts_of[size]))
        self._remove(start, size)
        if size > num_pages:
            self._insert(start + num_pages, size - num_pages)
        return start

    def free(self, start: int, num_pages: int) -> None:
        """Take pages back and merge them with their free neighbours."""
        left = self._start_before.get(start)
        if left is not None:
            size = self._size_at[left]
            self._remove(left, size)
            start, num_pages = left, num_pages + size
        right = self._size_at.get(start + num_pages)
        if right is not None:
            self._remove(start + num_pages, right)
            num_pages += right
        self._insert(start, num_pages)

    def free_run_at(self, start: int) -> int:
        """Return the length of the free extent that begins at `start`, else 0."""
        return self._size_at.get(start, 0)

    def free_run_before(self, end: int) -> int:
        """Return the length of the free extent that ends right before `end`, else 0."""
        first = self._start_before.get(end)
        return 0 if first is None else self._size_at[first]

    @property
    def largest_free_pages(self) -> int:
        """Length of the longest free extent."""
        return self._sizes[-1] if self._sizes else 0

    def extents(self) -> list[tuple[int, int]]:
        """Return (start, length) of every free extent, by start."""
        return sorted(self._size_at.items())

    def _insert(self, start: int, size: int) -> None:
        starts = self._starts_of.get(size)
        if starts is None:
            starts = self._starts_of[size] = {}
            insort(self._sizes, size)
        starts[start] = None
        self._size_at[start] = size
        self._start_before[start + size] = start
        self.free_pages += size

    def _remove(self, start: int, size: int) -> None:
        starts = self._starts_of[size]
        del starts[start]
        if not starts:
            del self._starts_of[size]
            del self._sizes[bisect_left(self._sizes, size)]
        del self._size_at[start]
        del self._start_before[start + size]
        self.free_pages -= size
