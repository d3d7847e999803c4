"""One launch that moves blocks of many chunks and layers between an engine's KV and a contiguous buffer, on the device.

Comes in: the byte planes of an engine's KV, block ids, a buffer. Goes out: the buffer, or the blocks, filled, in stream
order. The buffer's layout is `base.py`'s: [chunk][plane][block]. Triton does it in one launch; without Triton PyTorch does it
in one a plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from lmcache.log import init_logger

if TYPE_CHECKING:
    from lmcache.transfer.triton_kernel import TritonMover

logger = init_logger(__name__)

SKIPPED = -1  # a block id that stands for "leave this block alone"


class BlockMover:
    """Moves blocks of some planes; launches go to a stream that is named, or to the current one.

    Args:
        planes: [num_blocks, block bytes] uint8 each, in chunk order; strided, and all of the same shape.
        uses_triton: None takes Triton where it is installed and works.
    """

    def __init__(self, planes: Sequence[torch.Tensor], uses_triton: bool | None = None) -> None:
        self._planes = list(planes)
        self._block_bytes = planes[0].shape[1]
        self._triton: TritonMover | None = None
        if uses_triton is None:
            self._triton = _triton_mover_if_it_works(planes)
        elif uses_triton:
            self._triton = _triton_mover(planes)

    @property
    def uses_triton(self) -> bool:
        """Whether one launch moves all planes."""
        return self._triton is not None

    def gather(
        self,
        block_ids: torch.Tensor,
        buffer: torch.Tensor,
        planes: range,
        blocks_per_chunk: int,
        span: range | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Fill `buffer` from the blocks; none of them is SKIPPED.

        Args:
            block_ids: [num_chunks * blocks_per_chunk] int64 on the planes' device.
            buffer: contiguous uint8, at least as long as what is moved.
            planes: which planes, without gaps.
            span: which of the block ids, if not all; whole chunks.
        """
        self._move(block_ids, buffer, planes, blocks_per_chunk, span, stream, gathers=True)

    def scatter(
        self,
        block_ids: torch.Tensor,
        buffer: torch.Tensor,
        planes: range,
        blocks_per_chunk: int,
        span: range | None = None,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        """Fill the blocks that are not SKIPPED from `buffer`."""
        self._move(block_ids, buffer, planes, blocks_per_chunk, span, stream, gathers=False)

    def _move(
        self,
        block_ids: torch.Tensor,
        buffer: torch.Tensor,
        planes: range,
        blocks_per_chunk: int,
        span: range | None,
        stream: torch.cuda.Stream | None,
        *,
        gathers: bool,
    ) -> None:
        span = range(block_ids.numel()) if span is None else span
        if self._triton is not None:
            self._triton.move(block_ids, buffer, span, planes, blocks_per_chunk, gathers, stream)
        else:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                self._move_by_torch(block_ids[span.start : span.stop], buffer, planes, blocks_per_chunk, gathers)

    def _move_by_torch(
        self, block_ids: torch.Tensor, buffer: torch.Tensor, planes: range, blocks_per_chunk: int, gathers: bool
    ) -> None:
        num_chunks = block_ids.numel() // blocks_per_chunk
        used = buffer[: num_chunks * len(planes) * blocks_per_chunk * self._block_bytes]
        packed = used.view(num_chunks, len(planes), blocks_per_chunk, self._block_bytes)
        is_wanted = block_ids != SKIPPED
        for index, plane in enumerate(self._planes[planes.start : planes.stop]):
            if gathers:
                packed[:, index] = plane[block_ids].view(num_chunks, blocks_per_chunk, self._block_bytes)
            else:
                rows = packed[:, index].reshape(-1, self._block_bytes)
                plane[block_ids[is_wanted]] = rows[is_wanted]


def _triton_mover(planes: Sequence[torch.Tensor]) -> TritonMover:
    from lmcache.transfer.triton_kernel import TritonMover

    numbers = [plane.data_ptr() for plane in planes], [plane.stride(0) for plane in planes]
    addresses, strides = torch.tensor(numbers, dtype=torch.int64, device=planes[0].device)
    return TritonMover(addresses, strides, planes[0].shape[1], _word_bytes(planes))


def _triton_mover_if_it_works(planes: Sequence[torch.Tensor]) -> TritonMover | None:
    """Triton may be missing, or find no C compiler, which it needs when it runs: that is told, and PyTorch does its work."""
    try:
        return _triton_mover(planes)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as exc:  # whatever else it is, there is another way
        reason = "is not installed" if isinstance(exc, ModuleNotFoundError) else f"does not work here ({exc!r})"
        logger.warning("Triton %s: KV blocks are gathered by PyTorch, one launch a layer, which is slower", reason)
        return None


def _word_bytes(planes: Sequence[torch.Tensor]) -> int:
    """Return the widest word in which all blocks can be moved; 8 only where 16-byte accesses are aligned."""
    lengths = [number for plane in planes for number in (plane.shape[1], plane.stride(0), plane.data_ptr())]
    for word, alignment in ((8, 16), (4, 4), (2, 2)):
        if all(length % alignment == 0 for length in lengths):
            return word
    return 1
