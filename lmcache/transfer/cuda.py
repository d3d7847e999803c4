"""Copies between an engine's KV on a GPU and chunks in the mapped pool, at the speed of the wire.

Comes in: an engine's KV tensors and extents of the pool. Goes out: `CudaCopier`. A kernel (`kernels.py`) gathers the blocks
of a piece, all its layers, into one of some slots of device memory; the copy engine takes the slot to the extents while the
kernel fills the next. Loads go the other way, through slots of their own, so that both directions run at once:

    store   compute --event--> | gather into slot 0 | gather into slot 1 | ... wait for copy 0, gather into slot 0
                               .....................| copy slot 0 to host| copy slot 1 to host ...
    load    | copy to slot 0 | copy to slot 1 | ... wait for scatter 0, copy to slot 0
            .................| scatter slot 0 | scatter slot 1 ... --event--> compute

Nothing runs in a stream's callback. Every wait of the host has a deadline; one that passes leaves a copy that may still
write: that is a `StuckTransferError`, after which the extents must not be given back to the server while this process lives.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from lmcache.errors import LayoutMismatchError
from lmcache.layout import KVLayout
from lmcache.pool import PoolView
from lmcache.transfer.base import (
    TRANSFER_SECONDS,
    CancelledTransferError,
    ChunkCopier,
    Extent,
    Pinning,
    StuckTransferError,
    Transfer,
)
from lmcache.transfer.driver import driver
from lmcache.transfer.kernels import SKIPPED, BlockMover
from lmcache.transfer.pinning import PoolPinner, address_of

# In each direction: one is on the wire while the kernel works on the other. Four of half the size were no faster (H100).
NUM_SLOTS = 2
# As long as copies to host wait in a queue, a sampled token's copy does not get its turn: at 8k tokens the first token came
# 13 ms late (H100). So beside an engine that computes, a store fills its slots, lets the queue run dry, and only then goes on.
WIRE_BYTES_PER_SECOND = 60e9
FIRST_POLL_SECONDS = 20e-6
LAST_POLL_SECONDS = 100e-6
# For what takes as long as a step: each look costs the engine's own thread the GIL.
STEP_POLL_SECONDS = 1e-3


class Pinned(Protocol):
    """What `CudaCopier` asks of the mapping that extents lie in: `pinning.PoolPinner` answers."""

    def is_pinned(self, address: int, num_bytes: int) -> bool:
        """Tell whether copies of this range are asynchronous and fast."""

    def split(self, address: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield the parts that one copy may cover."""


class Pageable:
    """Memory that is not pinned at all."""

    def is_pinned(self, address: int, num_bytes: int) -> bool:
        """No."""
        return False

    def split(self, address: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield the whole range."""
        yield address, num_bytes


@dataclass(frozen=True)
class Piece:
    """What goes through a slot at once: some whole chunks, some planes of one chunk, or some blocks of one plane."""

    chunks: range
    planes: range
    blocks: range


@dataclass
class Slot:
    """Device memory for one piece, and the event after which it may be filled again."""

    buffer: torch.Tensor
    is_free: torch.cuda.Event = field(default_factory=torch.cuda.Event)


class Lane:
    """The slots and streams of one direction."""

    def __init__(self, device: torch.device, slot_bytes: int) -> None:
        # Kernels of a few µs: ahead of the model's, where both are ready.
        self.kernels = torch.cuda.Stream(device, priority=-1)
        self.copies = torch.cuda.Stream(device)
        self._slots = [Slot(torch.empty(slot_bytes, dtype=torch.uint8, device=device)) for _ in range(NUM_SLOTS)]
        self._next = 0

    def last_slot(self) -> Slot:
        """Return the slot that was used last."""
        return self._slots[self._next]

    def next_slot(self) -> Slot:
        """Return the slot that was used longest ago."""
        self._next = (self._next + 1) % NUM_SLOTS
        return self._slots[self._next]


class CudaTransfer(Transfer):
    """A transfer that the device has been handed; keeps alive what it needs."""

    def __init__(self, kept: Sequence[Any] = ()) -> None:
        self._done = torch.cuda.Event()
        self._kept = kept

    def end(self, stream: torch.cuda.Stream) -> None:
        """All of it has been handed to this stream, or streams that it waits for."""
        self._done.record(stream)

    def hold_back(self, stream: torch.cuda.Stream) -> None:
        """Let what comes next on a stream wait for the transfer."""
        stream.wait_event(self._done)

    @property
    def is_done(self) -> bool:
        """Whether the last byte is where it should be."""
        return bool(self._done.query())

    def wait(self, seconds: float) -> None:
        """Return when the last byte is where it should be.

        Raises: StuckTransferError.
        """
        wait_for(self._done, seconds)
        self._kept = ()


def wait_for(event: torch.cuda.Event, seconds: float, last_pause: float = LAST_POLL_SECONDS) -> None:
    """Return when an event has happened, without holding the GIL meanwhile; looks at the latest every `last_pause` seconds.

    Raises: StuckTransferError.
    """
    deadline = time.monotonic() + seconds
    pause = FIRST_POLL_SECONDS
    while not event.query():
        if time.monotonic() > deadline:
            raise StuckTransferError(f"a transfer did not end within {seconds:g} s", "restart the engine; see its log")
        time.sleep(pause)
        pause = min(pause * 1.5, last_pause)


class CudaCopier(ChunkCopier):
    """Copies through a ring of staging slots on the planes' device.

    Stores and loads may run at once, each on one thread at a time.

    Args:
        planes: one for each plane of each layer, as `cpu.block_planes` returns them.
        staging_bytes: device memory for the slots of both directions, taken now.
        uses_triton: None takes Triton where it is installed.
    Raises: LayoutMismatchError when the planes are not what the layout says; CudaError without a driver.
    """

    stores_later = True

    def __init__(
        self,
        layout: KVLayout,
        planes: Sequence[torch.Tensor],
        staging_bytes: int,
        uses_triton: bool | None = None,
    ) -> None:
        super().__init__(layout, planes[0].shape[0] if planes else 0)
        shape = (self.num_blocks, layout.block_bytes)
        if len(planes) != layout.num_layers * layout.num_planes or any(tuple(plane.shape) != shape for plane in planes):
            raise LayoutMismatchError(
                f"{len(planes)} planes, not all of {list(shape)}, are not the layout's {layout.num_layers * layout.num_planes}"
            )
        self._driver = driver()
        self._device = planes[0].device
        self._num_planes = len(planes)
        self._mover = BlockMover(planes, uses_triton)
        self._slot_bytes = staging_bytes // (2 * NUM_SLOTS)
        if self._slot_bytes < layout.block_bytes:
            raise LayoutMismatchError(
                f"{staging_bytes} bytes of staging memory hold no {2 * NUM_SLOTS} blocks of {layout.block_bytes} bytes",
                hint="raise lmcache.mp.staging_mib",
            )
        self._stores = Lane(self._device, self._slot_bytes)
        self._loads = Lane(self._device, self._slot_bytes)
        self._reading = threading.Lock()
        # The pool's mapping; unpinned until somebody says otherwise.
        self.pinned: Pinned = Pageable()
        self.unpinned_bytes = 0
        self._warm_up()

    def fence(self) -> torch.cuda.Event:
        """Return an event after all that the current stream was given so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def prepare_thread(self) -> Callable[[], None]:
        """Let a thread work on this device, also while the engine records CUDA graphs."""
        return functools.partial(self._driver.use_context, self._context())

    def _context(self) -> Any:
        with torch.cuda.device(self._device):
            return self._driver.current_context()

    def pin_pool(self, view: PoolView) -> Callable[[], None]:
        """Pin a mapped pool in the background."""
        pinner = PoolPinner(self._driver, self._context(), address_of(view.data), view.data.nbytes)
        self.pinned = pinner
        pinner.start()

        def undo() -> None:
            if self.pinned is pinner:
                self.pinned = Pageable()
            pinner.close()

        return undo

    def pinning(self) -> Pinning:
        """Return how far the pinning of the pool has come."""
        pinner = self.pinned
        if not isinstance(pinner, PoolPinner):
            return Pinning(is_done=True)
        return Pinning(pinner.is_done, pinner.pinned_bytes, pinner.unpinned_bytes)

    # -- device to host -----------------------------------------------------------------------------------------------

    def gather(
        self,
        block_ids: Sequence[int],
        extents: Sequence[Extent],
        after: Any = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Copy whole chunks from engine blocks into writable extents; done on return.

        No more than the slots are under way at once, so that little is left to wait for.

        Args:
            after: the event from which on the blocks hold what is to be copied, while the engine goes on: its own copies get
                their turn between ours. None: all that was launched until now, and the wire is ours.
            is_cancelled: asked before each piece is read, under the lock of `protect_blocks`.
        Raises: CancelledTransferError: the extents hold garbage. StuckTransferError: they may be written at any time.
        """
        if not extents and not block_ids:
            return
        size = self.check(block_ids, extents)
        if len(block_ids) != size * len(extents):
            raise LayoutMismatchError(f"{len(block_ids)} block ids do not fill {len(extents)} extents of {size} blocks")
        leaves_gaps, after = after is not None, after or self.fence()
        if leaves_gaps:
            self._wait_for_step(after)
        lane, transfer = self._stores, CudaTransfer()
        with torch.cuda.device(self._device), torch.cuda.stream(lane.kernels):
            try:
                ids = self._to_device(block_ids)
                for number, piece in enumerate(self._pieces(len(extents), size)):
                    if leaves_gaps and number and number % NUM_SLOTS == 0:
                        time.sleep(NUM_SLOTS * self._slot_bytes / WIRE_BYTES_PER_SECOND)
                        wait_for(lane.last_slot().is_free, TRANSFER_SECONDS)
                    slot = lane.next_slot()
                    wait_for(slot.is_free, TRANSFER_SECONDS)
                    with self._reading:
                        if is_cancelled():
                            raise CancelledTransferError("a store was cancelled: its blocks are used anew")
                        lane.kernels.wait_event(after)
                        self._mover.gather(_span(ids, piece, size), slot.buffer, piece.planes, len(piece.blocks))
                    lane.copies.wait_stream(lane.kernels)
                    self._copy(piece, size, extents, slot, lane.copies, to_host=True)
                    slot.is_free.record(lane.copies)
            finally:  # whatever happened, nothing writes to the extents when this returns
                transfer.end(lane.copies)
                transfer.wait(TRANSFER_SECONDS)

    def _wait_for_step(self, after: torch.cuda.Event) -> None:
        try:
            wait_for(after, TRANSFER_SECONDS, STEP_POLL_SECONDS)
        except StuckTransferError as exc:  # nothing was begun yet
            raise CancelledTransferError(
                f"a store was given up: the step before it did not end within {TRANSFER_SECONDS:g} s"
            ) from exc

    def protect_blocks(self) -> None:
        """Let what the current stream is given next wait until blocks that stores are reading have been read."""
        with self._reading:
            torch.cuda.current_stream(self._device).wait_stream(self._stores.kernels)

    # -- host to device -----------------------------------------------------------------------------------------------

    def scatter(self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0) -> None:
        """Copy chunks, or what of them `block_ids` have room for, into engine blocks; done on return."""
        self.begin_scatter(extents, block_ids, skip_blocks).wait(TRANSFER_SECONDS)

    def begin_scatter(self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0) -> CudaTransfer:
        """Start to copy chunks into engine blocks, after what the current stream was given, and before what it is given next.

        The caller keeps the extents readable until the transfer's `wait` has returned.
        """
        lane = self._loads
        transfer = CudaTransfer(extents)
        compute = torch.cuda.current_stream(self._device)
        before = self.fence()
        if block_ids:
            size = self.check(block_ids, extents, skip_blocks)
            padded = [SKIPPED] * skip_blocks + list(block_ids)
            used = -(-len(padded) // size)
            padded += [SKIPPED] * (used * size - len(padded))
            try:
                self._load_pieces(lane, padded, used, size, extents, before)
            finally:  # of what was launched nothing may come after what the caller does next
                transfer.end(lane.kernels)
                transfer.hold_back(compute)
        return transfer

    def _load_pieces(
        self, lane: Lane, block_ids: list[int], num_chunks: int, size: int, extents: Sequence[Extent], before: torch.cuda.Event
    ) -> None:
        ids = None
        with torch.cuda.device(self._device), torch.cuda.stream(lane.kernels):
            for piece in self._pieces(num_chunks, size):
                slot = lane.next_slot()
                lane.copies.wait_event(slot.is_free)
                self._copy(piece, size, extents, slot, lane.copies, to_host=False)
                if ids is None:  # the wire is busy by now
                    ids = self._to_device(block_ids)
                    lane.kernels.wait_event(before)
                lane.kernels.wait_stream(lane.copies)
                self._mover.scatter(_span(ids, piece, size), slot.buffer, piece.planes, len(piece.blocks))
                slot.is_free.record(lane.kernels)

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _pieces(self, num_chunks: int, blocks_per_chunk: int) -> Iterator[Piece]:
        return pieces(num_chunks, blocks_per_chunk, self._num_planes, self._slot_bytes // self.layout.block_bytes)

    def _copy(
        self,
        piece: Piece,
        blocks_per_chunk: int,
        extents: Sequence[Extent],
        slot: Slot,
        stream: torch.cuda.Stream,
        to_host: bool,
    ) -> None:
        """Hand the copy engine what lies between a slot and its extents: neighbours in the pool as one copy."""
        length = len(piece.planes) * len(piece.blocks) * self.layout.block_bytes
        offset = (piece.planes.start * blocks_per_chunk + piece.blocks.start) * self.layout.block_bytes
        starts = [address_of(extents[chunk]) + offset for chunk in piece.chunks]
        at = slot.buffer.data_ptr()
        for address, num_bytes, is_pinned in self._wire_parts(starts, length):
            if not is_pinned:
                self.unpinned_bytes += num_bytes
            self._begin_copy(address, at, num_bytes, stream, is_pinned, to_host)
            at += num_bytes

    def _wire_parts(self, starts: Sequence[int], length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (address, bytes, is pinned) of the copies that the driver takes for ranges of the pool."""
        pinned = self.pinned
        for address, num_bytes in runs(starts, length):
            is_pinned = pinned.is_pinned(address, num_bytes)
            for part, part_bytes in pinned.split(address, num_bytes):
                yield part, part_bytes, is_pinned

    def _begin_copy(
        self, host: int, device: int, num_bytes: int, stream: torch.cuda.Stream, is_pinned: bool, to_host: bool
    ) -> None:
        if to_host:
            self._driver.copy_to_host(host, device, num_bytes, stream.cuda_stream, is_pinned)
        else:
            self._driver.copy_to_device(device, host, num_bytes, stream.cuda_stream, is_pinned)

    def flat_copier(self, memory: torch.Tensor, extents: Sequence[Extent]) -> Callable[[bool], CudaTransfer]:
        """Return what hands the copy engine plain copies between contiguous memory and extents, all of one length."""
        stream = torch.cuda.Stream(self._device)
        parts = list(self._wire_parts([address_of(extent) for extent in extents], extents[0].nbytes))

        def begin(to_host: bool) -> CudaTransfer:
            at = memory.data_ptr()
            with torch.cuda.device(self._device):
                transfer = CudaTransfer(extents)
                for address, num_bytes, is_pinned in parts:
                    self._begin_copy(address, at, num_bytes, stream, is_pinned, to_host)
                    at += num_bytes
                transfer.end(stream)
            return transfer

        return begin

    def _to_device(self, block_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(block_ids, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)

    def _warm_up(self) -> None:
        """Compile and load the kernels now, not within the first request; moves nothing."""
        none = torch.full((1,), SKIPPED, dtype=torch.int64, device=self._device)
        planes = range(self._num_planes)
        self._mover.scatter(none, self._loads.next_slot().buffer, range(1), 1)
        if self._slot_bytes >= self.layout.block_bytes * self._num_planes:
            first = torch.zeros(1, dtype=torch.int64, device=self._device)
            self._mover.gather(first, self._stores.next_slot().buffer, planes, 1)
        torch.cuda.synchronize(self._device)


def pieces(num_chunks: int, blocks_per_chunk: int, num_planes: int, blocks_per_slot: int) -> Iterator[Piece]:
    """Yield what fits a slot of `blocks_per_slot` blocks of one plane, in the order of the bytes in the extents."""
    planes_per_slot = blocks_per_slot // blocks_per_chunk
    chunks_per_slot = planes_per_slot // num_planes
    all_planes, all_blocks = range(num_planes), range(blocks_per_chunk)
    if chunks_per_slot:
        for chunks in _parts(range(num_chunks), chunks_per_slot):
            yield Piece(chunks, all_planes, all_blocks)
        return
    for chunk in range(num_chunks):
        for planes in _parts(all_planes, planes_per_slot or 1):
            for blocks in _parts(all_blocks, blocks_per_chunk if planes_per_slot else blocks_per_slot):
                yield Piece(range(chunk, chunk + 1), planes, blocks)


def runs(starts: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of ranges of one length, neighbours joined."""
    first, end = starts[0], starts[0] + length
    for start in starts[1:]:
        if start != end:
            yield first, end - first
            first = start
        end = start + length
    yield first, end - first


def _span(block_ids: torch.Tensor, piece: Piece, blocks_per_chunk: int) -> torch.Tensor:
    if len(piece.blocks) == blocks_per_chunk:
        return block_ids[piece.chunks.start * blocks_per_chunk : piece.chunks.stop * blocks_per_chunk]
    first = piece.chunks.start * blocks_per_chunk
    return block_ids[first + piece.blocks.start : first + piece.blocks.stop]


def _parts(whole: range, size: int) -> Iterator[range]:
    """Yield a range in parts of at most `size`."""
    for start in range(whole.start, whole.stop, size):
        yield range(start, min(start + size, whole.stop))
