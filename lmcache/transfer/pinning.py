"""Pins the mapped pool for a GPU: piece by piece, lowest offsets first, in the background, as the server makes it resident.

Comes in: the mapping of one attachment to a server. Goes out: which of its bytes can be copied at the speed of the wire. What
is not pinned, yet or at all, is copied all the same, slower and counted; that is told once, with the likely cause.

The engine goes on meanwhile, so each step is short: entering pages in the page table keeps all other threads of the process
from mapping memory, and while the driver pins, nothing can be launched. So it pins while the engine waits for its device, right
after a step has been launched. And no page is touched here first: that would take far longer, and the kernel would count it as
the engine's memory instead of the server's.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from lmcache.log import init_logger
from lmcache.pages import MADV_POPULATE_WRITE, advise
from lmcache.protocol import PinReport
from lmcache.transfer.driver import CudaDriver, CudaError
from lmcache.transfer.launches import LaunchClock

logger = init_logger(__name__)

# An H100's host pins a GiB in 0.06 s once this process has it in its page table; entering it there takes one thread 0.14 s, so
# several do that first, some pieces ahead. 32 MiB take the driver 2 to 2.7 ms, more than vLLM's launches have to spare on some
# hosts: there a token took 4 % longer (H200). So beside an engine it gets one piece at a time, and more where none computes.
PIECE_BYTES = 16 << 20
IDLE_PIECES = 4
STEP_BYTES = 4 << 20
MAX_THREADS = 8
PIECES_AHEAD = 128
RESIDENT_POLL_SECONDS = 0.02
# Steps that take longer to come wait for the device.
MAX_GAP_SECONDS = 0.05
# While an engine computes, the driver is left to it for so many times as long as it was used. Then pinning takes 1 s a GiB, and
# a token 0.4 to 2 % longer.
REST_RATIO = 9
# The driver unpins when all that the device was given is done, two steps later: 8 ms, and the device is idle until the next
# launch. Then 16 MiB take it 0.35 ms. So several pieces wait for that together: 1 s a GiB, and a token 5 % longer; one by one
# it was 1.8 s and 12 % (H200).
UNPIN_PIECES = 8
CLOSE_SECONDS = 30.0
# Between two lines about how far it is: a pool that takes longer is big enough to be asked about.
PROGRESS_SECONDS = 5.0


class PoolPinner:
    """The pinned part of one mapping.

    Args:
        driver, context: of the device whose copies want it. A context is the process's, so any thread may use it.
        address, num_bytes: the mapping; it outlives this object's `close`.
        resident_bytes: tells how much of it is resident, from its start on; None where all of it may be touched.
        launches: those of an engine that should not be held up.
    """

    def __init__(
        self,
        driver: CudaDriver,
        context: Any,
        address: int,
        num_bytes: int,
        resident_bytes: Callable[[], int] | None = None,
        launches: LaunchClock | None = None,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._driver = driver
        self._context = context
        self._address = address
        self._num_bytes = num_bytes
        self._resident_bytes = resident_bytes or (lambda: num_bytes)
        self._launches = launches or LaunchClock()
        self._piece_bytes = piece_bytes
        self._num_pieces = -(-num_bytes // piece_bytes)
        self._ends: list[int] = []  # how many pieces were pinned, each time that the driver had pinned some
        self._num_failed = 0
        self._stop = threading.Event()
        self._threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "lmcache-populate")
        self._thread = threading.Thread(target=self._pin_all, name="lmcache-pin", daemon=True)

    def start(self) -> None:
        """Begin to pin, in a thread of its own."""
        self._thread.start()

    @property
    def pinned_bytes(self) -> int:
        """How much is pinned by now."""
        return self._offset(self._num_pinned)

    @property
    def unpinned_bytes(self) -> int:
        """How much could not be pinned."""
        return self._num_bytes - self._offset(self._num_pieces - self._num_failed)

    @property
    def is_done(self) -> bool:
        """Whether every piece has been tried."""
        return self._num_pinned + self._num_failed == self._num_pieces

    def report(self, copied_bytes: int) -> PinReport:
        """Return how far it is; `copied_bytes` were copied through what was not pinned."""
        return PinReport(
            pool_bytes=self._num_bytes,
            pinned_bytes=self.pinned_bytes,
            unpinned_bytes=self.unpinned_bytes,
            unpinned_copied_bytes=copied_bytes,
        )

    def covers(self, address: int) -> bool:
        """Tell whether the mapping has this address."""
        return self._address <= address < self._address + self._num_bytes

    def parts(self, address: int, num_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (address, bytes, whether it is pinned) of a range, cut where the driver refuses copies across.

        That is between what was pinned at once, and between pieces that are not pinned: they may be, until they are copied.
        """
        end = address + num_bytes
        while address < end:
            piece, num_ends = (address - self._address) // self._piece_bytes, len(self._ends)
            at = bisect_right(self._ends, piece, 0, num_ends)
            is_pinned = at < num_ends
            next_piece = self._ends[at] if is_pinned else piece + 1
            part_end = min(end, self._address + next_piece * self._piece_bytes)
            yield address, part_end - address, is_pinned
            address = part_end

    def close(self) -> None:
        """Unpin everything; no copy may be under way. Never raises."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout=CLOSE_SECONDS)
        try:
            self._driver.use_context(self._context)
            while self._ends:
                with self._beside_engine(lambda seconds: time.sleep(seconds if self._ends else 0)):
                    self._unpin_from(self._num_pinned - UNPIN_PIECES)
        except CudaError as exc:
            logger.debug("unpinning the pool: %s", exc)

    @property
    def _num_pinned(self) -> int:
        return next(iter(self._ends[-1:]), 0)  # `close` may take the last one meanwhile

    def _offset(self, index: int) -> int:
        return min(index * self._piece_bytes, self._num_bytes)

    def _entered(self) -> Iterator[int]:
        """Yield below which piece all are resident and entered in the page table, when they are due, until we are closed."""
        next_piece = 0
        while next_piece < self._num_pieces and not self._stop.is_set():
            window = range(next_piece, min(next_piece + PIECES_AHEAD, self._num_resident()))
            for index, _ in zip(window, self._threads.map(self._enter, window), strict=True):
                if self._stop.is_set():
                    return
                is_due = self._launches.is_computing() or (index + 1) % IDLE_PIECES == 0
                if is_due or index == window[-1]:
                    yield index + 1
            next_piece += len(window)
            if not window:
                self._stop.wait(RESIDENT_POLL_SECONDS)

    def _num_resident(self) -> int:
        """Return how many pieces, from the first one on, are resident."""
        resident_bytes = self._resident_bytes()
        return self._num_pieces if resident_bytes >= self._num_bytes else resident_bytes // self._piece_bytes

    def _enter(self, index: int) -> None:
        """Enter a piece in the page table; where that fails, pinning says why, or does it slower."""
        if not self._stop.is_set():
            start, end = self._offset(index), self._offset(index + 1)
            advise(self._address + start, end - start, MADV_POPULATE_WRITE, STEP_BYTES)

    def _pin_below(self, num_pieces: int) -> None:
        """Pin all pieces below that are not pinned yet."""
        start, end = self._offset(self._num_pinned), self._offset(num_pieces)
        with self._beside_engine(self._stop.wait):
            self._driver.register(self._address + start, end - start)
            self._ends.append(num_pieces)

    def _unpin_from(self, piece: int) -> None:
        """Unpin this piece, all behind it, and what was pinned together with it."""
        while self._num_pinned > max(piece, 0):
            self._ends.pop()
            self._driver.unregister(self._address + self._offset(self._num_pinned))

    @contextmanager
    def _beside_engine(self, rest: Callable[[float], object]) -> Iterator[None]:
        """Hold up the driver while an engine waits for its device, and leave it to the engine for a while afterwards."""
        self._launches.wait_for_gap(MAX_GAP_SECONDS)
        started_at = time.monotonic()
        yield
        if self._launches.is_computing():
            rest(REST_RATIO * (time.monotonic() - started_at))

    def _pin_all(self) -> None:
        with self._threads:
            self._pin_pieces()

    def _pin_pieces(self) -> None:
        told_at = time.monotonic()
        try:
            self._driver.use_context(self._context)
            for num_pieces in self._entered():
                self._pin_below(num_pieces)
                if time.monotonic() - told_at >= PROGRESS_SECONDS:
                    told_at = time.monotonic()
                    done_bytes, whole = self.pinned_bytes, self._num_bytes
                    logger.info("pinning the pool: %d %% of %.2f GiB", 100 * done_bytes // whole, whole / 2**30)
        except (CudaError, RuntimeError) as exc:  # or no thread is to be had
            self._num_failed = self._num_pieces - self._num_pinned
            logger.warning(
                "%.2f of %.2f GiB of the pool cannot be pinned and are copied slower: %s; %s",
                self.unpinned_bytes / 2**30,
                self._num_bytes / 2**30,
                exc,
                _likely_cause(self._num_bytes),
            )
        else:
            if self.is_done:
                logger.info("pinned %.2f GiB of the pool for the GPU", self.pinned_bytes / 2**30)


def address_of(memory: memoryview) -> int:
    """Return where memory lies in this process, writable or not."""
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0])


def _likely_cause(num_bytes: int) -> str:
    """Say what keeps drivers from pinning, and which limit may: the driver 580 heeds none on locked memory (H100)."""
    hint = "hint: a container's memory limit may leave no room for pinned pages, or the host has no more of them"
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and limit < num_bytes:
        hint += f"; some drivers heed the limit on locked memory, {limit} bytes (ulimit -l, LimitMEMLOCK=, --ulimit memlock=-1)"
    return hint
