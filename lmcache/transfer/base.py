"""The one interface for moving KV: gather blocks into chunk extents, scatter them back.

Comes in: block ids, and extents that `client/kvcache.py` reserved or pinned. Goes out: bytes in the pool or in the engine's
tensors, raw, without interpretation. The last module on the data path; `cpu.py` and `cuda.py` do it.

The bytes of one chunk, which every copier produces and the layout's fingerprint vouches for:

    chunk = [layer 0 | layer 1 | ...]   layers in the order in which the engine registered them
    layer = [plane 0 | plane 1 | ...]   one plane where keys and values of a block lie together
    plane = [block 0 | block 1 | ...]   blocks in token order, `block_bytes` each, as in the engine

Block b of plane p of layer l thus starts at
`((l * num_planes + p) * blocks_per_chunk + b) * block_bytes`. Layers that the engine keeps side by side in each block
are one layer here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from lmcache.errors import DeadlineError, LayoutMismatchError, LMCacheError
from lmcache.layout import KVLayout
from lmcache.pool import PoolView
from lmcache.protocol import PinReport
from lmcache.transfer.launches import LaunchClock

Extent = memoryview
# Of the device, for each rank: two slots of 32 MiB for each direction.
STAGING_BYTES = 128 << 20
# A transfer of 4 GiB to or from a GPU takes 80 ms; one that takes this long will not come to an end.
TRANSFER_SECONDS = 20.0


class StuckTransferError(DeadlineError):
    """A copy did not come to an end: what it writes to may be written at any time until this process ends."""

    code = "stuck_transfer"


class CancelledTransferError(LMCacheError):
    """A store was given up; its extents are not to be committed."""

    code = "cancelled_transfer"


class Transfer:
    """A transfer to the engine's blocks that may still be under way; this one is done."""

    @property
    def is_done(self) -> bool:
        """Whether the last byte is where it should be."""
        return True

    @property
    def bytes_left(self) -> int:
        """How much has still to be copied, at most."""
        return 0

    def hold_back(self) -> None:
        """Let whatever the engine's device is given next, for blocks, come after the transfer."""

    def wait(self, seconds: float) -> None:
        """Return when the last byte is where it should be.

        Raises: StuckTransferError.
        """


class ChunkCopier(ABC):
    """Copies between one rank's KV and chunks.

    An extent holds one chunk: `blocks_per_chunk * layout.bytes_per_block` bytes. Nothing is copied
    when an argument does not fit. One thread at a time.
    """

    # Whether copies take longer than an engine's step should wait: then a store belongs on a thread of its own, and a request
    # waits for its load while others compute.
    copies_later = False
    # What moves the bytes, for people.
    backend = "cpu"
    # Whether that is the fast way of the device.
    is_native = True

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        self.layout = layout
        self.num_blocks = num_blocks

    @abstractmethod
    def gather(
        self,
        block_ids: Sequence[int],
        extents: Sequence[Extent],
        after: Any = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Copy whole chunks from engine blocks into writable extents; done on return.

        Args:
            block_ids: the blocks of all chunks in token order. The engine writes none of them
                meanwhile.
            after: a `fence` after which the blocks hold what is to be copied; None: they do now.
            is_cancelled: asked before each piece is read.
        Raises: LayoutMismatchError; CancelledTransferError, the extents hold garbage;
            StuckTransferError, they may be written at any time from now on.
        """

    @abstractmethod
    def scatter(self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0) -> None:
        """Copy chunks into engine blocks; done on return.

        Args:
            block_ids: where block `skip_blocks` of the first chunk goes, and those after it. They
                may end inside the last chunk. The engine touches none of them meanwhile.
        Raises: LayoutMismatchError.
        """

    def begin_scatter(
        self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0, holds_back: bool = True
    ) -> Transfer:
        """Start to `scatter`, after whatever the engine's device was given before.

        The caller keeps the extents readable until the transfer is done.

        Args:
            holds_back: let what the device is given next wait for it.
        """
        self.scatter(extents, block_ids, skip_blocks)
        return Transfer()

    def fence(self) -> Any:
        """Return what stands for all that the calling thread has given the engine's device until now."""
        return None

    def prepare_thread(self) -> Callable[[], None]:
        """Return what a thread of its own has to call once before it stores."""
        return lambda: None

    def protect_blocks(self) -> None:  # noqa: B027 - nothing to do where stores are done on return
        """Let what the device is given next wait until blocks that stores are reading have been read."""

    def pin_pool(self, view: PoolView, launches: LaunchClock | None = None) -> Callable[[], None]:
        """Prepare a mapped pool for copies, in the background; return how to undo that before it is unmapped.

        Args:
            launches: those of an engine that should not be held up.
        """
        return lambda: None

    def pin_report(self) -> PinReport | None:
        """Return how much of the mapped pool is pinned, and what was copied without; None where nothing needs to be pinned.

        Any thread may ask. What was copied is counted since this copier was made.
        """
        return None

    @abstractmethod
    def flat_copier(self, memory: Any, extents: Sequence[Extent]) -> Callable[[bool], Transfer]:
        """Return what starts a plain copy of as many bytes, without blocks: the ceiling of `gather` and `scatter`.

        The function is told whether to copy from the device to the extents, or back.

        Args:
            memory: a contiguous uint8 tensor on the device, as long as all extents.
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
