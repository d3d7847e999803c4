"""The ceiling: plain copies between private and shared memory, of the same chunks, timed between the operations.

Because the copies are spread over the run, a machine that slows down or speeds up moves both figures alike.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence

# Large enough that a chunk has left the nearest caches when its place comes round again, as in a real pool.
MAX_REGION_BYTES = 256 << 20


class RawCopy:
    """Shared memory of our own, from the same kernel pages as the pool, with nobody else in it.

    Args:
        prompt_bytes: how much one copy moves.
        region_bytes: how much memory the copies go round in.
    """

    def __init__(self, prompt_bytes: int, region_bytes: int) -> None:
        self._num_places = max(1, min(region_bytes, MAX_REGION_BYTES) // prompt_bytes)
        self._prompt_bytes = prompt_bytes
        self._next = 0
        size = self._num_places * prompt_bytes
        fd = os.memfd_create("lmcache-bench")
        try:
            os.ftruncate(fd, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self._touch(size)

    def _touch(self, size: int) -> None:
        """First use of a page costs ten times the copy; it is not what is measured."""
        zeros = memoryview(bytes(min(size, 1 << 20)))
        for at in range(0, size, len(zeros)):
            end = min(at + len(zeros), size)
            self._view[at:end] = zeros[: end - at]

    def write(self, chunks: Sequence[memoryview]) -> float:
        """Copy private chunks into shared memory; return the seconds."""
        places = self._places(chunks)
        started = time.perf_counter()
        for place, chunk in zip(places, chunks, strict=True):
            place[:] = chunk
        return time.perf_counter() - started

    def read(self, chunks: Sequence[memoryview]) -> float:
        """Copy shared memory into private chunks; return the seconds."""
        places = self._places(chunks)
        started = time.perf_counter()
        for place, chunk in zip(places, chunks, strict=True):
            chunk[:] = place
        return time.perf_counter() - started

    def _places(self, chunks: Sequence[memoryview]) -> list[memoryview]:
        at = self._next * self._prompt_bytes
        self._next = (self._next + 1) % self._num_places
        places = []
        for chunk in chunks:
            places.append(self._view[at : at + len(chunk)])
            at += len(chunk)
        return places

    def close(self) -> None:
        """Give the memory back."""
        self._view.release()
        self._map.close()
