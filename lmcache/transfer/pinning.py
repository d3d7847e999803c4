"""Pins the mapped pool for a GPU: piece by piece, lowest offsets first, in the background.

Comes in: the mapping of one attachment to a server. Goes out: which of its bytes can be copied at the speed of the wire. What
is not pinned, yet or at all, is copied all the same, slower and counted; that is told once, with the likely cause.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from lmcache.log import init_logger
from lmcache.protocol import PinReport
from lmcache.transfer.driver import CudaDriver, CudaError

logger = init_logger(__name__)

# Short enough that closing never waits long. An H100's host pins a GiB in 0.03 s once this process has it in its page table;
# entering it there takes one thread 0.14 s, so several do that first.
PIECE_BYTES = 1 << 30
POPULATE_BYTES = 64 << 20
MAX_THREADS = 8
MADV_POPULATE_WRITE = 23
CLOSE_SECONDS = 30.0
# Between two lines about how far it is: a pool that takes longer is big enough to be asked about.
PROGRESS_SECONDS = 5.0


class PoolPinner:
    """The pinned part of one mapping.

    Args:
        driver, context: of the device whose copies want it. A context is the process's, so any thread may use it.
        address, num_bytes: the mapping; it outlives this object's `close`.
    """

    def __init__(self, driver: CudaDriver, context: Any, address: int, num_bytes: int, piece_bytes: int = PIECE_BYTES) -> None:
        self._driver = driver
        self._context = context
        self._address = address
        self._num_bytes = num_bytes
        self._piece_bytes = piece_bytes
        self._num_pieces = -(-num_bytes // piece_bytes)
        self._pinned: set[int] = set()
        self._failed: set[int] = set()
        self._stop = threading.Event()
        self._libc = ctypes.CDLL(None)
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "lmcache-populate")
        self._thread = threading.Thread(target=self._pin_all, name="lmcache-pin", daemon=True)

    def start(self) -> None:
        """Begin to pin, in a thread of its own."""
        self._thread.start()

    @property
    def pinned_bytes(self) -> int:
        """How much is pinned by now."""
        return sum(self._length(index) for index in tuple(self._pinned))

    @property
    def unpinned_bytes(self) -> int:
        """How much could not be pinned."""
        return sum(self._length(index) for index in tuple(self._failed))

    @property
    def is_done(self) -> bool:
        """Whether every piece has been tried."""
        return len(self._pinned) + len(self._failed) == self._num_pieces

    def report(self, copied_bytes: int) -> PinReport:
        """Return how far it is; `copied_bytes` were copied through what was not pinned."""
        return PinReport(
            pool_bytes=self._num_bytes,
            pinned_bytes=self.pinned_bytes,
            unpinned_bytes=self.unpinned_bytes,
            unpinned_copied_bytes=copied_bytes,
        )

    def is_pinned(self, address: int, num_bytes: int) -> bool:
        """Tell whether all of a range is pinned."""
        first, last = self._piece_at(address), self._piece_at(address + num_bytes - 1)
        return all(index in self._pinned for index in range(first, last + 1))

    def split(self, address: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield a range in parts that lie in one piece each: the driver refuses copies across two."""
        end = address + num_bytes
        while address < end:
            piece_end = self._address + (self._piece_at(address) + 1) * self._piece_bytes
            yield address, min(end, piece_end) - address
            address = piece_end

    def close(self) -> None:
        """Unpin everything; no copy may be under way. Never raises."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=CLOSE_SECONDS)
        try:
            self._driver.use_context(self._context)
            while self._pinned:
                self._driver.unregister(self._address + self._pinned.pop() * self._piece_bytes)
        except CudaError as exc:
            logger.debug("unpinning the pool: %s", exc)

    def _piece_at(self, address: int) -> int:
        return (address - self._address) // self._piece_bytes

    def _length(self, index: int) -> int:
        return min(self._piece_bytes, self._num_bytes - index * self._piece_bytes)

    def _populate(self, index: int) -> list[Future[None]]:
        """Begin to enter a piece in the page table; where that fails, pinning says why, or does it slower."""
        start = self._address + index * self._piece_bytes

        def populate(offset: int) -> None:
            if not self._stop.is_set():
                length = min(POPULATE_BYTES, self._length(index) - offset)
                self._libc.madvise(ctypes.c_void_p(start + offset), ctypes.c_size_t(length), MADV_POPULATE_WRITE)

        return [self._threads.submit(populate, offset) for offset in range(0, self._length(index), POPULATE_BYTES)]

    def _pin(self, index: int) -> None:
        self._driver.register(self._address + index * self._piece_bytes, self._length(index))
        self._pinned.add(index)

    def _pin_all(self) -> None:
        with self._threads:
            self._pin_pieces()

    def _pin_pieces(self) -> None:
        failure: CudaError | None = None
        told_at = time.monotonic()
        try:
            self._driver.use_context(self._context)
        except CudaError as exc:
            failure = exc
        entering = self._populate(0)
        for index in range(self._num_pieces):
            wait(entering, timeout=CLOSE_SECONDS)
            if self._stop.is_set():
                return
            try:
                if failure is None:
                    entering = self._populate(index + 1)  # while this one is pinned
                    self._pin(index)
            except CudaError as exc:
                failure = exc
            if failure is not None:
                self._failed.add(index)
            elif time.monotonic() - told_at >= PROGRESS_SECONDS:
                told_at = time.monotonic()
                done_bytes, whole = self.pinned_bytes, self._num_bytes
                logger.info("pinning the pool: %d %% of %.2f GiB", 100 * done_bytes // whole, whole / 2**30)
        if failure is None:
            logger.info("pinned %.2f GiB of the pool for the GPU", self.pinned_bytes / 2**30)
        else:
            logger.warning(
                "%.2f of %.2f GiB of the pool cannot be pinned and are copied slower: %s; %s",
                self.unpinned_bytes / 2**30,
                self._num_bytes / 2**30,
                failure,
                _likely_cause(self._num_bytes),
            )


def address_of(memory: memoryview) -> int:
    """Return where memory lies in this process, writable or not."""
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0])


def _likely_cause(num_bytes: int) -> str:
    """Say which limit of the process stands in the way of pinning, if one does."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and limit < num_bytes:
        return f"hint: the limit on locked memory is {limit} bytes; raise it (ulimit -l, LimitMEMLOCK=, --ulimit memlock=-1)"
    return "hint: a container's memory limit may leave no room for pinned pages, or the host has no more of them"
