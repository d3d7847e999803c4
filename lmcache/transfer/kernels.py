"""One launch that moves blocks of many chunks and layers between an engine's KV and a contiguous buffer, on the device.

Comes in: the byte planes of an engine's KV, block ids, a buffer. Goes out: the buffer, or the blocks, filled, in stream
order. The buffer's layout is `base.py`'s: [chunk][plane][block]. Triton does it in one launch; without Triton PyTorch does it
in one a plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from lmcache.log import init_logger

logger = init_logger(__name__)

SKIPPED = -1  # a block id that stands for "leave this block alone"


class BlockMover:
    """Moves blocks of some planes; all launches go to the current stream.

    Args:
        planes: [num_blocks, block bytes] uint8 each, in chunk order; strided, and all of the same shape.
        uses_triton: None takes Triton where it is installed.
    """

    def __init__(self, planes: Sequence[torch.Tensor], uses_triton: bool | None = None) -> None:
        self._planes = list(planes)
        self._block_bytes = planes[0].shape[1]
        device = planes[0].device
        self._addresses = torch.tensor([plane.data_ptr() for plane in planes], dtype=torch.int64, device=device)
        self._strides = torch.tensor([plane.stride(0) for plane in planes], dtype=torch.int64, device=device)
        self._word_bytes = _word_bytes(planes)
        self._tables: dict[range, tuple[torch.Tensor, torch.Tensor]] = {}
        self.uses_triton = find_spec("triton") is not None if uses_triton is None else uses_triton
        if not self.uses_triton:
            logger.warning("Triton is not installed: KV blocks are gathered by PyTorch, one launch a layer, which is slower")

    def gather(self, block_ids: torch.Tensor, buffer: torch.Tensor, planes: range, blocks_per_chunk: int) -> None:
        """Fill `buffer` from the blocks; none of them is SKIPPED.

        Args:
            block_ids: [num_chunks * blocks_per_chunk] int64 on the planes' device.
            buffer: contiguous uint8, at least as long as what is moved.
            planes: which planes, without gaps.
        """
        self._move(block_ids, buffer, planes, blocks_per_chunk, gathers=True)

    def scatter(self, block_ids: torch.Tensor, buffer: torch.Tensor, planes: range, blocks_per_chunk: int) -> None:
        """Fill the blocks that are not SKIPPED from `buffer`."""
        self._move(block_ids, buffer, planes, blocks_per_chunk, gathers=False)

    def _move(
        self, block_ids: torch.Tensor, buffer: torch.Tensor, planes: range, blocks_per_chunk: int, *, gathers: bool
    ) -> None:
        if self.uses_triton:
            from lmcache.transfer.triton_kernel import move_blocks

            addresses, strides = self._table(planes)
            move_blocks(addresses, strides, block_ids, buffer, blocks_per_chunk, self._block_bytes, self._word_bytes, gathers)
            return
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

    def _table(self, planes: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where some planes begin, and their strides."""
        if planes not in self._tables:
            span = slice(planes.start, planes.stop)
            self._tables[planes] = self._addresses[span], self._strides[span]
        return self._tables[planes]


def _word_bytes(planes: Sequence[torch.Tensor]) -> int:
    """Return the widest word in which all blocks can be moved; 8 only where 16-byte accesses are aligned."""
    lengths = [number for plane in planes for number in (plane.shape[1], plane.stride(0), plane.data_ptr())]
    for word, alignment in ((8, 16), (4, 4), (2, 2)):
        if all(length % alignment == 0 for length in lengths):
            return word
    return 1
