"""Makes the pool's pages resident in the background, lowest offsets first, so that the server answers at once.

First touch dominates a store into new pages (1 GB/s against 6 to 10 on the 2-core machine), and a full file system shows
itself as SIGBUS there. `MADV_POPULATE_WRITE` reports it as an error instead; where the kernel lacks it, allocating the file's
blocks does. A piece that fails ends the growth: what lies above it is never handed out. Clients are told, in the file, how far
it is: so a GPU's driver pins no page first, which would be counted as the engine's memory instead of ours.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time

from lmcache.log import init_logger
from lmcache.pages import MADV_POPULATE_WRITE, advise
from lmcache.pool import PAGE_BYTES, PoolFile

logger = init_logger(__name__)

PIECE_BYTES = 64 << 20
STEP_BYTES = 8 << 20
MAX_THREADS = 4
# Between two lines about how far it is: a pool that takes longer is big enough to be asked about.
PROGRESS_SECONDS = 5.0


class Residency:
    """Threads that populate a pool's data area, and the frontier below which all of it is resident."""

    def __init__(self, pool: PoolFile) -> None:
        self._pool = pool
        self._capacity_bytes = pool.header.capacity_bytes
        self._anchor = (ctypes.c_char * 1).from_buffer(pool.address)
        self._base = ctypes.addressof(self._anchor)
        self._next = 0
        self._lock = threading.Lock()
        self._done_above: set[int] = set()
        self._frontier = 0
        self._stop = threading.Event()
        self.failure = ""
        self._threads: list[threading.Thread] = []
        self._started_at = self._told_at = time.monotonic()

    def start(self) -> None:
        """Populate the table and the first piece now, the rest in the background.

        Raises: OSError when not even that much memory is to be had.
        """
        try:
            os.posix_fallocate(self._pool.fileno(), 0, self._pool.header.data_offset)
            first = self._claim()
            if first is not None:
                self._populate(first)
                self._note_done(first)
        except OSError:
            self.close()  # the pool cannot be closed while its mapping is held here
            raise
        count = min(MAX_THREADS, os.cpu_count() or 1)
        self._threads = [
            threading.Thread(target=self._run, name=f"lmcache-residency-{index}", daemon=True) for index in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def frontier_pages(self) -> int:
        """Return the page below which everything is resident; any thread."""
        return min(self._frontier * PIECE_BYTES, self._capacity_bytes) // PAGE_BYTES

    def _note_done(self, piece: int) -> None:
        with self._lock:
            self._done_above.add(piece)
            while self._frontier in self._done_above:
                self._done_above.remove(self._frontier)
                self._frontier += 1
            resident_bytes = self.frontier_pages() * PAGE_BYTES
            self._pool.tell_resident(resident_bytes)
            self._log_progress(resident_bytes)

    def _log_progress(self, resident_bytes: int) -> None:
        now, whole = time.monotonic(), self._capacity_bytes
        if resident_bytes == whole:
            logger.info("made %.2f GiB of the pool resident in %.1f s", whole / 2**30, now - self._started_at)
        elif now - self._told_at >= PROGRESS_SECONDS:
            self._told_at = now
            logger.info("making the pool resident: %d %% of %.2f GiB", 100 * resident_bytes // whole, whole / 2**30)

    @property
    def is_running(self) -> bool:
        """Whether pages are still being made resident."""
        return any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """Stop after the pieces in work, and let go of the mapping."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=30)
        del self._anchor

    def _run(self) -> None:
        while not self._stop.is_set():
            piece = self._claim()
            if piece is None:
                return
            try:
                self._populate(piece)
            except OSError as exc:
                self._stop.set()
                self.failure = f"the pool stops growing at {piece * PIECE_BYTES >> 20} MiB: {exc.strerror}"
                logger.warning("%s; hint: use a smaller --l1-size-gb", self.failure)
                return
            self._note_done(piece)

    def _claim(self) -> int | None:
        with self._lock:
            piece, self._next = self._next, self._next + 1
        return piece if piece * PIECE_BYTES < self._capacity_bytes else None

    def _populate(self, piece: int) -> None:
        start = self._pool.header.data_offset + piece * PIECE_BYTES
        length = min(PIECE_BYTES, self._pool.header.file_bytes - start)
        error = advise(self._base + start, length, MADV_POPULATE_WRITE, STEP_BYTES)
        if not error:
            return
        if error == errno.EINVAL:
            os.posix_fallocate(self._pool.fileno(), start, length)
        else:
            # EFAULT stands for the SIGBUS that a touch would have raised: the file system is full.
            raise OSError(
                error,
                "no space on the file system" if error == errno.EFAULT else os.strerror(error),
            )
