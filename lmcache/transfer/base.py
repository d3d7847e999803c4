"""The one interface for moving KV: gather blocks into chunk extents, scatter them back.

Comes in: block ids, and extents that `client/kvcache.py` reserved or pinned. Goes out: bytes in the
pool or in the engine's tensors, raw, without interpretation. The last module on the data path.

The bytes of one chunk, which every copier produces and the layout's fingerprint vouches for:

    chunk = [layer 0 | layer 1 | ...]   layers in the order in which the engine registered them
    layer = [plane 0 | plane 1 | ...]   one plane where keys and values of a block lie together
    plane = [block 0 | block 1 | ...]   blocks in token order, `block_bytes` each, as in the engine

Block b of plane p of layer l thus starts at
`((l * num_planes + p) * blocks_per_chunk + b) * block_bytes`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lmcache.errors import LayoutMismatchError
from lmcache.layout import KVLayout

Extent = memoryview


class ChunkCopier(ABC):
    """Copies between one rank's KV and chunks.

    An extent holds one chunk: `blocks_per_chunk * layout.bytes_per_block` bytes. Nothing is copied
    when an argument does not fit. One thread at a time.
    """

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks

    @abstractmethod
    def gather(self, block_ids: Sequence[int], extents: Sequence[Extent]) -> None:
        """Copy whole chunks from engine blocks into writable extents; done on return.

        Args:
            block_ids: the blocks of all chunks in token order. The engine writes none of them
                meanwhile.
        Raises: LayoutMismatchError.
        """

    @abstractmethod
    def scatter(self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0) -> None:
        """Copy chunks into engine blocks; done on return.

        Args:
            block_ids: where block `skip_blocks` of the first chunk goes, and those after it. They
                may end inside the last chunk. The engine touches none of them meanwhile.
        Raises: LayoutMismatchError.
        """

    def check(self, block_ids: Sequence[int], extents: Sequence[Extent], skip_blocks: int = 0) -> int:
        """Return the blocks of one extent, if all ids are the engine's and fit after those skipped.

        Raises: LayoutMismatchError.
        """
        lengths = {extent.nbytes for extent in extents}
        size, rest = divmod(max(lengths, default=0), self.layout.bytes_per_block)
        if len(lengths) != 1 or rest or not size:
            raise LayoutMismatchError(
                f"extents of {sorted(lengths)} bytes do not hold whole blocks of {self.layout.bytes_per_block} bytes",
                hint="the chunks were stored by an engine with another KV layout",
            )
        if skip_blocks < 0 or skip_blocks + len(block_ids) > len(extents) * size:
            raise LayoutMismatchError(
                f"{len(block_ids)} block ids after {skip_blocks} skipped ones do not fit "
                f"{len(extents)} extents of {size} blocks"
            )
        if block_ids and (min(block_ids) < 0 or max(block_ids) >= self.num_blocks):
            raise LayoutMismatchError(
                f"block ids {min(block_ids)} to {max(block_ids)} are not all from 0 to {self.num_blocks - 1}, the engine's"
            )
        return size
