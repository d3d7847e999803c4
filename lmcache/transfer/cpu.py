"""The reference copier, for KV in host memory: every other copier is compared with it.

Comes in: an engine's KV tensors. Goes out: `CpuCopier`, which vLLM on a CPU uses, and the byte
planes that any copier starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lmcache.errors import LayoutMismatchError
from lmcache.layout import KVLayout
from lmcache.transfer.base import ChunkCopier, Extent, Transfer


def joined_plane(tensors: Sequence[torch.Tensor], num_blocks: int) -> torch.Tensor | None:
    """Return the KV of all layers as one plane, [num_blocks, bytes of a block of all layers]; None where they lie apart.

    Args:
        tensors: one a layer, blocks first. They lie together when they are parts of one memory, at even distances in the
            order given, and a block of all of them is one run of bytes, in whatever order its axes are.
    """
    first = tensors[0]
    starts = [tensor.storage_offset() for tensor in tensors]
    step = starts[1] - starts[0] if len(tensors) > 1 else 0
    is_even = step > 0 and starts == [*range(starts[0], starts[0] + step * len(starts), step)]
    if not is_even or any(_shape_in_memory(tensor) != _shape_in_memory(first) for tensor in tensors):
        return None
    size, strides = list(first.shape), list(first.stride())
    together = first.as_strided([size[0], len(tensors), *size[1:]], [strides[0], step, *strides[1:]], starts[0])
    try:
        return block_plane(together, num_blocks)
    except LayoutMismatchError:
        return None


def _shape_in_memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def block_planes(tensor: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
    """Return one layer's KV as bytes, one plane or several, [num_blocks, block bytes] each, in the tensor's own memory.

    Args:
        tensor: blocks first, or planes first and blocks next, as where keys and values lie apart.
    Raises: LayoutMismatchError when the bytes of a block do not lie together.
    """
    if tensor.shape[0] % num_blocks and tensor.dim() > 2 and tensor.shape[1] % num_blocks == 0:
        return [block_plane(part, num_blocks) for part in tensor.unbind(0)]
    return [block_plane(tensor, num_blocks)]


def block_plane(tensor: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """Return one layer's KV as bytes, [num_blocks, block bytes], in the tensor's own memory.

    Args:
        tensor: blocks first. Its first dimension may be a multiple of `num_blocks`: the attention
            kernel then works on equal parts of a block, which lie one after the other.
    Raises: LayoutMismatchError when the bytes of a block do not lie together.
    """
    parts, rest = divmod(tensor.shape[0], num_blocks)
    part_elements, is_dense = 1, parts > 0 and not rest
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        is_dense = is_dense and (size == 1 or stride == part_elements)
        part_elements *= size
    stride = tensor.stride(0)
    if not is_dense or stride < part_elements or (parts > 1 and stride != part_elements):
        raise LayoutMismatchError(
            f"a KV tensor of shape {list(tensor.shape)} and strides {list(tensor.stride())} does "
            f"not keep the bytes of each of its {num_blocks} blocks together",
            hint="set VLLM_KV_CACHE_LAYOUT to one with H and N inside B, e.g. LBNHC",
        )
    item = tensor.element_size()
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return storage.set_(tensor.untyped_storage()).as_strided(
        (num_blocks, parts * part_elements * item),
        (parts * stride * item, 1),
        tensor.storage_offset() * item,
    )


class CpuCopier(ChunkCopier):
    """Copies on the calling thread, one library call a plane and chunk.

    Args:
        planes: one for each plane of each layer, as `block_planes` returns them.
        staging_bytes: not needed here.
    Raises: LayoutMismatchError when they are not what the layout says, or not in host memory.
    """

    def __init__(self, layout: KVLayout, planes: Sequence[torch.Tensor], staging_bytes: int = 0) -> None:
        super().__init__(layout, planes[0].shape[0] if planes else 0)
        num_planes = layout.num_layers * layout.num_planes
        shape = (self.num_blocks, layout.block_bytes)
        for plane in planes:
            if len(planes) != num_planes or tuple(plane.shape) != shape or plane.device.type != "cpu":
                raise LayoutMismatchError(
                    f"{len(planes)} planes, one of them {list(plane.shape)} on {plane.device}, are "
                    f"not the layout's {num_planes} of {list(shape)} in host memory"
                )
        self._planes = list(planes)
        self._arrays = [plane.numpy() for plane in planes]

    def gather(
        self,
        block_ids: Sequence[int],
        extents: Sequence[Extent],
        after: Any = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Copy whole chunks from engine blocks into writable extents."""
        if not extents and not block_ids:
            return
        size = self.check(block_ids, extents)
        if len(block_ids) != size * len(extents):
            raise LayoutMismatchError(f"{len(block_ids)} block ids do not fill {len(extents)} extents of {size} blocks")
        ids = torch.tensor(block_ids, dtype=torch.int64).view(len(extents), size)
        for chunk_ids, extent in zip(ids, extents, strict=True):
            chunk = torch.frombuffer(extent, dtype=torch.uint8)
            targets = chunk.view(len(self._planes), size, -1)
            for plane, target in zip(self._planes, targets, strict=True):
                torch.index_select(plane, 0, chunk_ids, out=target)

    def scatter(self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0) -> None:
        """Copy chunks, or what of them `block_ids` have room for, into engine blocks."""
        if not block_ids:
            return
        size = self.check(block_ids, extents, skip_blocks)
        ids = np.asarray(block_ids, dtype=np.int64)
        for index, extent in enumerate(extents):
            # This chunk's blocks are ids[at : at + size], as far as those exist.
            at = index * size - skip_blocks
            first, last = max(at, 0), min(at + size, len(ids))
            if first >= last:
                continue
            # numpy: torch takes no read-only buffer, and its index_copy_ moves bytes one by one
            # (128 KiB blocks on the 2-core machine: 1.6 GB/s against 19).
            chunk = np.frombuffer(extent, dtype=np.uint8)
            sources = chunk.reshape(len(self._arrays), size, -1)[:, first - at : last - at]
            blocks = ids[first:last]
            for array, source in zip(self._arrays, sources, strict=True):
                array[blocks] = source

    def flat_copier(self, memory: torch.Tensor, extents: Sequence[Extent]) -> Callable[[bool], Transfer]:
        """Return what copies between contiguous memory and extents; done on return."""
        ends = np.cumsum([extent.nbytes for extent in extents])
        places = np.split(memory.numpy()[: ends[-1]], ends[:-1])
        chunks = [np.frombuffer(extent, dtype=np.uint8) for extent in extents]

        def begin(to_host: bool) -> Transfer:
            for place, chunk in zip(places, chunks, strict=True):
                np.copyto(*((chunk, place) if to_host else (place, chunk)))
            return Transfer()

        return begin
