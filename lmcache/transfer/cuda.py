"""Copies between an engine's KV on a GPU and chunks in the mapped pool, at the speed of the wire.

Comes in: an engine's KV tensors and extents of the pool. Goes out: `CudaCopier`. A kernel (`kernels.py`) gathers the blocks of
a piece, all its layers, into a slot of device memory, and the copy engine takes the slot to the extents. Loads go the other
way, through slots of their own, so that both directions run at once:

    store, the wire all ours   | gather into slot 0 | gather into slot 1 | ... after copy 0, gather into slot 0
                               .....................| copy slot 0 to host| copy slot 1 to host ...
    store, beside an engine    compute --event--> | gather | copy to host | gather | copy to host ...
    load                       | copy to slot 0 | copy to slot 1 | ... after scatter 0, copy to slot 0
                               .................| scatter slot 0 | scatter slot 1 ...

Beside an engine a store is handed over at once, ahead of the GPU: it waits for nothing that would have to be looked for. But
what goes to extents that are not pinned, yet or at all, takes a way through pinned memory of ours, and is waited for.

Nothing runs in a stream's callback. Every wait of the host has a deadline; one that passes leaves a copy that may still
write: that is a `StuckTransferError`, after which the extents must not be given back to the server while this process lives.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from lmcache.errors import LayoutMismatchError
from lmcache.layout import KVLayout
from lmcache.pool import PoolView
from lmcache.protocol import PinReport
from lmcache.transfer.base import (
    TRANSFER_SECONDS,
    CancelledTransferError,
    ChunkCopier,
    Extent,
    StuckTransferError,
    Transfer,
)
from lmcache.transfer.driver import CudaDriver, driver
from lmcache.transfer.kernels import SKIPPED, BlockMover
from lmcache.transfer.launches import LaunchClock
from lmcache.transfer.pinning import PoolPinner, address_of

# In each direction: one is on the wire while the kernel works on the other. Four of half the size were no faster (H100).
NUM_SLOTS = 2
# While nothing else goes on, an event is looked at without a pause for so long; a GiB takes 20 ms.
SPIN_SECONDS = 0.1
POLL_SECONDS = 100e-6
# Beside an engine: each look costs the engine's own thread the GIL.
CALM_POLL_SECONDS = 1e-3
# When a store begins and when a load ends, the kernel works while the wire has nothing to do. So that piece is cut if it is as
# long as this: the kernel takes 27 µs for 32 MiB (H100).
MIN_CUT_BYTES = 16 << 20
MIN_BLOCK_IDS = 4096
# Pinned memory through which stores go to extents that are not: as much as a chunk of an 8B model.
BOUNCE_BYTES = 32 << 20
SLOT_ALIGNMENT = 512


class Pinned(Protocol):
    """What `CudaCopier` asks of the mapping that extents lie in: `pinning.PoolPinner` answers."""

    def covers(self, address: int) -> bool:
        """Tell whether the mapping has this address."""

    def parts(self, address: int, num_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (address, bytes, whether copies are asynchronous and fast) of the parts that one copy may cover."""

    def report(self, copied_bytes: int) -> PinReport:
        """Return how much is pinned; `copied_bytes` were copied through what was not."""


class Pageable:
    """Memory that is not pinned at all."""

    def covers(self, address: int) -> bool:
        """Yes."""
        return True

    def parts(self, address: int, num_bytes: int) -> Iterator[tuple[int, int, bool]]:
        """Yield the whole range."""
        yield address, num_bytes, False

    def report(self, copied_bytes: int) -> PinReport:
        """Nothing."""
        return PinReport(unpinned_copied_bytes=copied_bytes)


PAGEABLE = Pageable()


class Piece(NamedTuple):
    """What goes through a slot at once: some whole chunks, some planes of one chunk, or some blocks of one plane."""

    chunks: range
    planes: range
    blocks: range

    @property
    def num_blocks(self) -> int:
        """How many blocks, counted in each plane."""
        return len(self.chunks) * len(self.planes) * len(self.blocks)

    def span(self, blocks_per_chunk: int) -> range:
        """Which of the transfer's block ids."""
        first, last = self.chunks.start * blocks_per_chunk, (self.chunks.stop - 1) * blocks_per_chunk
        return range(first + self.blocks.start, last + self.blocks.stop)

    def cut(self, quarters: int) -> tuple[Piece, ...]:
        """Return it in two, the first about so many quarters of it; whole where it cannot be cut."""
        for name, whole in zip(self._fields, self, strict=True):
            if len(whole) > 1:
                at = whole.start + min(len(whole) - 1, max(1, len(whole) * quarters // 4))
                return self._replace(**{name: range(whole.start, at)}), self._replace(**{name: range(at, whole.stop)})
        return (self,)


class Slot:
    """Device memory for one piece."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self.buffer = buffer
        self.is_filled = torch.cuda.Event()
        self.is_free = torch.cuda.Event()


class BlockIds:
    """Block ids on their way to the device, for one transfer at a time; never freed, as the device may read them late."""

    def __init__(self, device: torch.device, capacity: int) -> None:
        self.capacity = capacity
        self.user: CudaTransfer | None = None
        self._on_host = torch.empty(capacity, dtype=torch.int64).pin_memory()
        self._view = self._on_host.numpy()
        self._on_device = torch.empty(capacity, dtype=torch.int64, device=device)

    @property
    def is_free(self) -> bool:
        """Whether the last transfer that used them is done."""
        return self.user is None or self.user.is_done

    def upload(self, block_ids: Sequence[int], driver: CudaDriver, stream: torch.cuda.Stream) -> torch.Tensor:
        """Return them on the device, there in the order of `stream`: on another, the copy could wait behind a GiB."""
        self._view[: len(block_ids)] = block_ids
        source, target = self._on_host.data_ptr(), self._on_device.data_ptr()
        driver.copy_to_device(target, source, 8 * len(block_ids), stream.cuda_stream, is_pinned=True)
        return self._on_device


class Lane:
    """The streams and the device memory of one direction: two slots, or one of twice the size in their place."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        # Kernels of a few µs: ahead of the model's, where both are ready.
        self.kernels = torch.cuda.Stream(device, priority=-1)
        self.copies = torch.cuda.Stream(device)
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.slots = itertools.cycle([Slot(part) for part in buffer.chunk(NUM_SLOTS)])
        self.whole = itertools.repeat(Slot(buffer))
        self._device = device
        self._ids = [BlockIds(device, MIN_BLOCK_IDS)]

    def ids_for(self, transfer: CudaTransfer, num_blocks: int) -> BlockIds:
        """Return room for a transfer's block ids."""
        for ids in self._ids:
            if ids.capacity >= num_blocks and ids.is_free:
                break
        else:
            ids = BlockIds(self._device, max(MIN_BLOCK_IDS, 1 << (num_blocks - 1).bit_length()))
            self._ids.append(ids)
        ids.user = transfer
        return ids


class CudaTransfer(Transfer):
    """A transfer that the device has been handed; keeps alive what it needs."""

    def __init__(self, device: torch.device, kept: Sequence[Any] = ()) -> None:
        self._device = device
        self._done = torch.cuda.Event()
        self._kept = kept
        self._bytes_left = 0
        self._pieces: deque[tuple[int, torch.cuda.Event]] = deque()

    def begin(self, num_bytes: int) -> None:
        """So much is going to be handed over."""
        self._bytes_left = num_bytes

    def handed_over(self, bytes_left: int, stream: torch.cuda.Stream) -> None:
        """When this stream has got here, no more than `bytes_left` is left."""
        event = torch.cuda.Event()
        event.record(stream)
        self._pieces.append((bytes_left, event))

    def end(self, stream: torch.cuda.Stream) -> None:
        """All of it has been handed to this stream, or streams that it waits for."""
        self._done.record(stream)

    def hold_back(self) -> None:
        """Let what comes next on the current stream wait for the transfer."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    @property
    def bytes_left(self) -> int:
        """How much has still to be copied, at most."""
        while self._pieces and self._pieces[0][1].query():
            self._bytes_left = self._pieces.popleft()[0]
        return self._bytes_left

    @property
    def is_done(self) -> bool:
        """Whether the last byte is where it should be."""
        return bool(self._done.query())

    def wait(self, seconds: float, is_calm: bool = False) -> None:
        """Return when the last byte is where it should be.

        Raises: StuckTransferError.
        """
        wait_for(self._done, seconds, is_calm)
        self._kept = ()


def wait_for(event: torch.cuda.Event, seconds: float, is_calm: bool = False) -> None:
    """Return when an event has happened, without holding the GIL meanwhile.

    Args:
        is_calm: look at it as seldom as an engine that computes beside us would like.
    Raises: StuckTransferError.
    """
    started_at = time.monotonic()
    while not event.query():
        waited = time.monotonic() - started_at
        if waited > seconds:
            raise StuckTransferError(f"a transfer did not end within {seconds:g} s", "restart the engine; see its log")
        time.sleep(CALM_POLL_SECONDS if is_calm else 0 if waited < SPIN_SECONDS else POLL_SECONDS)


class CudaCopier(ChunkCopier):
    """Copies through a ring of staging slots on the planes' device.

    Stores and loads may run at once, each on one thread at a time.

    Args:
        planes: one for each plane of each layer, as `cpu.block_planes` returns them.
        staging_bytes: device memory for the slots of both directions, taken now, as are BOUNCE_BYTES of host memory.
        uses_triton: None takes Triton where it is installed and works.
    Raises: LayoutMismatchError when the planes are not what the layout says; CudaError without a driver.
    """

    copies_later = True

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
        slot_bytes = staging_bytes // (2 * NUM_SLOTS) // SLOT_ALIGNMENT * SLOT_ALIGNMENT
        if slot_bytes < layout.block_bytes:
            raise LayoutMismatchError(
                f"{staging_bytes} bytes of staging memory hold no {2 * NUM_SLOTS} blocks of {layout.block_bytes} bytes",
                hint="raise lmcache.mp.staging_mib",
            )
        self._stores = Lane(self._device, NUM_SLOTS * slot_bytes)
        self._loads = Lane(self._device, NUM_SLOTS * slot_bytes)
        self._slot_bytes = slot_bytes
        self._min_cut_blocks = MIN_CUT_BYTES // layout.block_bytes
        self._reading = threading.Lock()
        self._have_read = torch.cuda.Event()
        # The mapping of the pool, last; before it those of servers that have gone, through which chunks are still copied.
        self.mappings: tuple[Pinned, ...] = ()
        self._changing_mappings = threading.Lock()
        self.unpinned_bytes = 0
        self._bounce = torch.empty(BOUNCE_BYTES, dtype=torch.uint8).pin_memory()
        self._has_bounced = torch.cuda.Event()
        self._warm_up()
        # This thread has one. In a new thread PyTorch takes the first device for chosen already, and makes none current.
        with torch.cuda.device(self._device):
            self._context = self._driver.current_context()

    def fence(self) -> torch.cuda.Event:
        """Return an event after all that the current stream was given so far."""
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def prepare_thread(self) -> Callable[[], None]:
        """Let a thread work on this device, also while the engine records CUDA graphs."""
        return functools.partial(self._driver.use_context, self._context)

    def pin_pool(self, view: PoolView, launches: LaunchClock | None = None) -> Callable[[], None]:
        """Pin a mapped pool in the background; any thread."""
        address, num_bytes = address_of(view.data), view.data.nbytes
        pinner = PoolPinner(self._driver, self._context, address, num_bytes, lambda: view.resident_bytes, launches)
        pinner.start()
        with self._changing_mappings:
            self.mappings = (*self.mappings, pinner)

        def undo() -> None:
            with self._changing_mappings:
                self.mappings = tuple(other for other in self.mappings if other is not pinner)
            pinner.close()

        return undo

    @property
    def backend(self) -> str:  # type: ignore[override]
        """What moves the bytes, for people."""
        return "cuda, Triton" if self.is_native else "cuda, PyTorch (slower)"

    @property
    def is_native(self) -> bool:  # type: ignore[override]
        """Whether it is the fast way of this device that moves them."""
        return self._mover.uses_triton

    def pin_report(self) -> PinReport:
        """Return how much of the mapped pool is pinned, and what was copied without."""
        mappings = self.mappings
        return (mappings[-1] if mappings else PAGEABLE).report(self.unpinned_bytes)

    def _mapping_of(self, address: int) -> Pinned:
        return next((mapping for mapping in self.mappings if mapping.covers(address)), PAGEABLE)

    # -- device to host -----------------------------------------------------------------------------------------------

    def gather(
        self,
        block_ids: Sequence[int],
        extents: Sequence[Extent],
        after: Any = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Copy whole chunks from engine blocks into writable extents; done on return.

        Args:
            after: the event from which on the blocks hold what is to be copied, while the engine goes on: its own copies get
                their turn between ours. None: all that was launched until now, and the wire is ours.
            is_cancelled: asked before each piece is handed over, under the lock of `protect_blocks`.
        Raises: CancelledTransferError: the extents hold garbage. StuckTransferError: they may be written at any time.
        """
        if not extents and not block_ids:
            return
        size = self.check(block_ids, extents)
        if len(block_ids) != size * len(extents):
            raise LayoutMismatchError(f"{len(block_ids)} block ids do not fill {len(extents)} extents of {size} blocks")
        lane, transfer, is_beside_engine = self._stores, CudaTransfer(self._device), after is not None
        after = after or self.fence()
        starts = [address_of(extent) for extent in extents]
        slots: Iterator[Slot]
        found: Iterator[Piece]
        if is_beside_engine:
            # One stream for both leaves the copy engine free for 50 µs between two copies, which a sampled token's own copy
            # needs: behind a queue that never runs dry it came 13 ms late at 8k tokens, with pieces of 2 MiB as well (H100).
            copies, slots = lane.kernels, lane.whole
            found = self._pieces(len(extents), size, NUM_SLOTS * self._slot_bytes)
        else:
            copies, slots = lane.copies, lane.slots
            found = cut_first(self._pieces(len(extents), size, self._slot_bytes), self._min_cut_blocks)
        try:
            lane.kernels.wait_event(after)
            ids = lane.ids_for(transfer, len(block_ids)).upload(block_ids, self._driver, lane.kernels)
            for piece, slot in zip(found, slots):  # noqa: B905 - slots never end
                lane.kernels.wait_event(slot.is_free)
                with self._reading:
                    if is_cancelled():
                        raise CancelledTransferError("a store was cancelled: its blocks are used anew")
                    span = piece.span(size)
                    self._mover.gather(ids, slot.buffer, piece.planes, len(piece.blocks), span, lane.kernels)
                    slot.is_filled.record(lane.kernels)
                    # Recorded anew for the slot's next piece, later on the same stream, it still comes after this one.
                    self._have_read = slot.is_filled
                copies.wait_event(slot.is_filled)
                self._copy_to_host(piece, size, starts, slot, copies, is_beside_engine)
                slot.is_free.record(copies)
        finally:  # whatever happened, nothing writes to the extents when this returns
            transfer.end(copies)
            wait_for(after, TRANSFER_SECONDS, is_beside_engine)
            transfer.wait(TRANSFER_SECONDS, is_beside_engine)

    def protect_blocks(self) -> None:
        """Let what the current stream is given next wait until blocks that stores are reading have been read."""
        with self._reading:
            torch.cuda.current_stream(self._device).wait_event(self._have_read)

    # -- host to device -----------------------------------------------------------------------------------------------

    def scatter(self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0) -> None:
        """Copy chunks, or what of them `block_ids` have room for, into engine blocks; done on return."""
        self.begin_scatter(extents, block_ids, skip_blocks).wait(TRANSFER_SECONDS)

    def begin_scatter(
        self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0, holds_back: bool = True
    ) -> CudaTransfer:
        """Start to copy chunks into engine blocks, after what the current stream was given.

        The caller keeps the extents readable until the transfer is done.

        Args:
            holds_back: let what the current stream is given next wait for it.
        """
        transfer = CudaTransfer(self._device, extents)
        before = self.fence()
        if block_ids:
            size = self.check(block_ids, extents, skip_blocks)
            padded = [SKIPPED] * skip_blocks + list(block_ids)
            used = -(-len(padded) // size)
            padded += [SKIPPED] * (used * size - len(padded))
            try:
                self._load_pieces(padded, size, extents[:used], before, transfer)
            except BaseException:  # of what was launched nothing may come after what the caller does next
                transfer.end(self._loads.kernels)
                transfer.hold_back()
                raise
            transfer.end(self._loads.kernels)
            if holds_back:
                transfer.hold_back()
        return transfer

    def _load_pieces(
        self, block_ids: list[int], size: int, extents: Sequence[Extent], before: torch.cuda.Event, transfer: CudaTransfer
    ) -> None:
        lane, ids = self._loads, None
        starts = [address_of(extent) for extent in extents]
        found = cut_last(self._pieces(len(extents), size, self._slot_bytes), self._min_cut_blocks)
        bytes_left = len(extents) * size * self.layout.bytes_per_block
        transfer.begin(bytes_left)
        for piece, slot in zip(found, lane.slots):  # noqa: B905 - slots never end
            lane.copies.wait_event(slot.is_free)
            self._copy_to_device(piece, size, starts, slot, lane.copies)
            bytes_left -= piece.num_blocks * self.layout.block_bytes
            transfer.handed_over(bytes_left, lane.copies)
            if ids is None:  # the wire is busy by now
                ids = lane.ids_for(transfer, len(block_ids)).upload(block_ids, self._driver, lane.copies)
                lane.kernels.wait_event(before)
            slot.is_filled.record(lane.copies)
            lane.kernels.wait_event(slot.is_filled)
            self._mover.scatter(ids, slot.buffer, piece.planes, len(piece.blocks), piece.span(size), lane.kernels)
            slot.is_free.record(lane.kernels)

    # -- pieces -------------------------------------------------------------------------------------------------------

    def _pieces(self, num_chunks: int, blocks_per_chunk: int, slot_bytes: int) -> Iterator[Piece]:
        return pieces(num_chunks, blocks_per_chunk, self._num_planes, slot_bytes // self.layout.block_bytes)

    def _copy_to_host(
        self, piece: Piece, blocks_per_chunk: int, starts: Sequence[int], slot: Slot, stream: torch.cuda.Stream, is_calm: bool
    ) -> None:
        """Hand the copy engine what goes from a slot to the extents at `starts`; what is not pinned there is copied on return.

        To such memory the driver would copy itself, and nothing could be launched meanwhile: first tokens were 19 ms late while
        each prompt's 64 MiB went there, and 10 ms in this way (two H100s).

        Raises: StuckTransferError.
        """
        bounced: list[tuple[int, int, int]] = []
        bounce, used = self._bounce.data_ptr(), 0
        for host, device, num_bytes, is_pinned in self._parts_of(piece, blocks_per_chunk, starts, slot):
            if is_pinned:
                self._driver.copy_to_host(host, device, num_bytes, stream.cuda_stream, is_pinned=True)
                continue
            while num_bytes:
                if used == BOUNCE_BYTES:
                    self._take_over(bounced, stream, is_calm)
                    bounced, used = [], 0
                length = min(num_bytes, BOUNCE_BYTES - used)
                self._driver.copy_to_host(bounce + used, device, length, stream.cuda_stream, is_pinned=True)
                bounced.append((host, bounce + used, length))
                used, host, device, num_bytes = used + length, host + length, device + length, num_bytes - length
        if bounced:
            self._take_over(bounced, stream, is_calm)

    def _take_over(self, bounced: Sequence[tuple[int, int, int]], stream: torch.cuda.Stream, is_calm: bool) -> None:
        """Copy (target, source, bytes) in host memory, without the GIL, when the stream has got here."""
        self._has_bounced.record(stream)
        wait_for(self._has_bounced, TRANSFER_SECONDS, is_calm)
        for target, source, num_bytes in bounced:
            ctypes.memmove(target, source, num_bytes)

    def _copy_to_device(
        self, piece: Piece, blocks_per_chunk: int, starts: Sequence[int], slot: Slot, stream: torch.cuda.Stream
    ) -> None:
        """Hand the copy engine what goes from the extents at `starts` to a slot; the driver has read what is not pinned."""
        for host, device, num_bytes, is_pinned in self._parts_of(piece, blocks_per_chunk, starts, slot):
            self._driver.copy_to_device(device, host, num_bytes, stream.cuda_stream, is_pinned)

    def _parts_of(
        self, piece: Piece, blocks_per_chunk: int, starts: Sequence[int], slot: Slot
    ) -> Iterator[tuple[int, int, int, bool]]:
        """Yield (address in the pool, on the device, bytes, is pinned) of a piece's copies: neighbours in the pool as one."""
        length = len(piece.planes) * len(piece.blocks) * self.layout.block_bytes
        offset = (piece.planes.start * blocks_per_chunk + piece.blocks.start) * self.layout.block_bytes
        at = slot.buffer.data_ptr()
        for address, num_bytes, is_pinned in self._wire_parts([starts[chunk] + offset for chunk in piece.chunks], length):
            if not is_pinned:
                self.unpinned_bytes += num_bytes
            yield address, at, num_bytes, is_pinned
            at += num_bytes

    def _wire_parts(self, starts: Sequence[int], length: int) -> Iterator[tuple[int, int, bool]]:
        """Yield (address, bytes, is pinned) of the copies that the driver takes for ranges of one mapping."""
        mapping = self._mapping_of(starts[0])
        for address, num_bytes in runs(starts, length):
            yield from mapping.parts(address, num_bytes)

    def flat_copier(self, memory: torch.Tensor, extents: Sequence[Extent]) -> Callable[[bool], CudaTransfer]:
        """Return what hands the copy engine plain copies between contiguous memory and extents, all of one length."""
        stream = torch.cuda.Stream(self._device)
        parts = list(self._wire_parts([address_of(extent) for extent in extents], extents[0].nbytes))

        def begin(to_host: bool) -> CudaTransfer:
            at = memory.data_ptr()
            with torch.cuda.device(self._device):
                transfer = CudaTransfer(self._device, extents)
                for address, num_bytes, is_pinned in parts:
                    if to_host:
                        self._driver.copy_to_host(address, at, num_bytes, stream.cuda_stream, is_pinned)
                    else:
                        self._driver.copy_to_device(at, address, num_bytes, stream.cuda_stream, is_pinned)
                    at += num_bytes
                transfer.end(stream)
            return transfer

        return begin

    def _warm_up(self) -> None:
        """Have everything compiled and loaded now, not within the first request; moves nothing that anybody needs."""
        nothing = torch.full((1,), SKIPPED, dtype=torch.int64, device=self._device)
        self._mover.scatter(nothing, next(self._loads.slots).buffer, range(1), 1)
        self._mover.gather(torch.zeros_like(nothing), next(self._stores.slots).buffer, range(1), 1)
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


def cut_first(found: Iterator[Piece], min_blocks: int) -> Iterator[Piece]:
    """Yield pieces, the first one in two if it has `min_blocks`: about a quarter of it comes first."""
    first = next(found)
    yield from first.cut(1) if first.num_blocks >= min_blocks else (first,)
    yield from found


def cut_last(found: Iterator[Piece], min_blocks: int) -> Iterator[Piece]:
    """Yield pieces, the last one in two if it has `min_blocks`: about a quarter of it comes last."""
    last = next(found)
    for piece in found:
        yield last
        last = piece
    yield from last.cut(3) if last.num_blocks >= min_blocks else (last,)


def runs(starts: Sequence[int], length: int) -> Iterator[tuple[int, int]]:
    """Yield (address, bytes) of ranges of one length, neighbours joined."""
    first, end = starts[0], starts[0] + length
    for start in starts[1:]:
        if start != end:
            yield first, end - first
            first = start
        end = start + length
    yield first, end - first


def _parts(whole: range, size: int) -> Iterator[range]:
    """Yield a range in parts of at most `size`."""
    for start in range(whole.start, whole.stop, size):
        yield range(start, min(start + size, whole.stop))
