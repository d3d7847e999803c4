"""Read and write whole files from memory that others own, past the page cache where the file system can.

Comes in: a path and memory. Goes out: bytes in a file. Direct I/O wants addresses, offsets and lengths that are multiples of a
block; the pool's extents and the header in front of a value are pages, so they go to the device as they lie. What is not
aligned (a tail, a `bytes` object) is copied through an aligned buffer, one for each thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

from lmcache.storage.l2.base import Parts

ALIGNMENT = 4096
BOUNCE_BYTES = 1 << 20
MAX_VECTORS = 512  # of the kernel's 1024

_Call = Callable[[int, list[memoryview], int], int]


class _Run(NamedTuple):
    """What one system call moves: aligned memory in the file's order, and which of it stands for memory that is not aligned."""

    vectors: list[memoryview]
    copies: list[tuple[memoryview, memoryview]]  # aligned, caller's


class DirectIO:
    """Files opened with O_DIRECT until one refuses it; from then on without. Threads: any."""

    def __init__(self, is_wanted: bool) -> None:
        self.is_direct = is_wanted
        self._local = threading.local()

    def open(self, path: str, flags: int) -> int:
        """Return a descriptor; a new file is private to its user.

        Raises: OSError.
        """
        if self.is_direct:
            try:
                return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o600)
            except OSError as exc:
                if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                self.is_direct = False
                if flags & os.O_EXCL:  # some file systems make the file before they refuse the flag
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def write(self, fd: int, parts: Parts, length: int) -> None:
        """Make the file the concatenated parts, which have `length` bytes; it is empty before.

        Raises: OSError.
        """
        at = 0
        for run in self._runs(fd, parts):
            for aligned, given in run.copies:
                aligned[:] = given
            at += self._move(os.pwritev, fd, run.vectors, at)
        if at != length:
            os.ftruncate(fd, length)

    def read(self, fd: int, parts: Parts) -> int:
        """Fill the parts from the file's start; return how many bytes came, at most what the parts hold.

        Raises: OSError.
        """
        at = 0
        for run in self._runs(fd, parts):
            at += self._move(os.preadv, fd, run.vectors, at)
            for aligned, given in run.copies:
                given[:] = aligned
        return min(at, sum(part.nbytes for part in parts))

    def _runs(self, fd: int, parts: Parts) -> Iterator[_Run]:
        views = [part.cast("B") for part in parts if part.nbytes]
        if not _is_direct(fd):
            for first in range(0, len(views), MAX_VECTORS):
                yield _Run(views[first : first + MAX_VECTORS], [])
            return
        yield from _aligned_runs(views, self._bounce())

    def _bounce(self) -> memoryview:
        if not hasattr(self._local, "bounce"):
            self._local.bounce = memoryview(mmap.mmap(-1, BOUNCE_BYTES))
        bounce: memoryview = self._local.bounce
        return bounce

    def _move(self, call: _Call, fd: int, vectors: list[memoryview], at: int) -> int:
        """Read or write all of the vectors, or up to the file's end; return the number of bytes."""
        moved = 0
        vectors = list(vectors)
        while vectors:
            try:
                count = call(fd, vectors, at + moved)
            except OSError as exc:
                if exc.errno != errno.EINVAL or not _is_direct(fd):
                    raise
                self.is_direct = False  # opened with O_DIRECT, and refuses it now: another alignment is wanted
                _make_buffered(fd)
                continue
            if count == 0:
                break
            moved += count
            while vectors and count >= len(vectors[0]):
                count -= len(vectors.pop(0))
            if count:
                vectors[0] = vectors[0][count:]
            if moved % ALIGNMENT and vectors and _is_direct(fd):
                _make_buffered(fd)
        return moved


def _aligned_runs(views: list[memoryview], bounce: memoryview) -> Iterator[_Run]:
    """Cut the views into runs for direct I/O. Each run but the last is whole pages; the last may end after the views' end."""
    run = _Run([], [])
    start = end = 0  # of the part of `bounce` that is not among the run's vectors yet
    for view in views:
        while len(view):
            count = min(len(view), -end % ALIGNMENT or BOUNCE_BYTES - end)
            if end % ALIGNMENT == 0 and len(view) >= ALIGNMENT and _is_aligned(view):
                count = len(view) // ALIGNMENT * ALIGNMENT
                if end > start:
                    run.vectors.append(bounce[start:end])
                    start = end
                run.vectors.append(view[:count])
            else:
                run.copies.append((bounce[end : end + count], view[:count]))
                end += count
            view = view[count:]
            if end == BOUNCE_BYTES or (len(run.vectors) >= MAX_VECTORS - 2 and end % ALIGNMENT == 0):
                if end > start:
                    run.vectors.append(bounce[start:end])
                yield run
                run = _Run([], [])
                start = end = 0
    if end > start:
        run.vectors.append(bounce[start : -(-end // ALIGNMENT) * ALIGNMENT])
    if run.vectors:
        yield run


def _is_aligned(view: memoryview) -> bool:
    """Whether memory starts at a page; what is read-only tells no address."""
    return not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % ALIGNMENT == 0


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def _make_buffered(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)
