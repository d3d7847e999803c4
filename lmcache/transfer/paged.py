"""Paged KV without an engine: the command line measures and checks an engine's path to the cache with it.

Comes in: the bytes of some chunks, and extents of the pool. Goes out: the same bytes, by way of blocks in random order on a
device. PyTorch's own indexing puts content into the blocks and takes it out again, so that no copier's mistake can undo
itself. Next on the data path: the device's copier, `cuda.py` for a GPU.
"""

from __future__ import annotations

import contextlib
import random
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from lmcache.errors import LMCacheError, UsageError
from lmcache.layout import KVLayout
from lmcache.transfer import make_copier
from lmcache.transfer.base import STAGING_BYTES, TRANSFER_SECONDS, Extent
from lmcache.transfer.driver import CudaError, driver

# How much larger the memory is than what the chunks take: their blocks have others between them.
SPREAD = 2
# No byte of a chunk's, and of every block: what a copy did not reach is found.
BLOT = 0xEE


class DeviceMemoryError(LMCacheError):
    """The device has no room."""

    code = "device_memory"


class PagedKV:
    """Blocks for some chunks, and the copier for them. One thread.

    Args:
        layout: of one plane; `layout.bytes_per_block` times `blocks_per_chunk` is a chunk.
        device: "cuda" or "cpu", by PyTorch's name.
        staging_bytes: memory of the device that copies may go through.
    Raises: UsageError where PyTorch has no such device; DeviceMemoryError, CudaError.
    """

    def __init__(
        self, layout: KVLayout, blocks_per_chunk: int, num_chunks: int, device: str, staging_bytes: int = STAGING_BYTES
    ) -> None:
        self.layout = layout
        self.blocks_per_chunk = blocks_per_chunk
        self.staging_bytes = staging_bytes
        self._device = open_device(device)
        self._shape = (num_chunks, layout.num_layers, blocks_per_chunk, layout.block_bytes)
        self._num_used = num_chunks * blocks_per_chunk
        self._random = random.Random(1)
        with errors_of_torch():
            shape = (layout.num_layers, SPREAD * self._num_used, layout.block_bytes)
            self._kv = torch.full(shape, BLOT, dtype=torch.uint8, device=self._device)
            self.copier = make_copier(layout, list(self._kv), staging_bytes=staging_bytes)
            self._choose_blocks()

    @property
    def device_name(self) -> str:
        """What the device is called."""
        return torch.cuda.get_device_name(self._device) if self._is_gpu else "host memory"

    @property
    def num_bytes(self) -> int:
        """The device memory that the blocks take, without the staging memory."""
        return int(self._kv.nbytes)

    @property
    def _is_gpu(self) -> bool:
        return bool(self._device.type == "cuda")

    def _choose_blocks(self) -> None:
        """Take other blocks for the chunks, in random order."""
        self._ids = self._random.sample(range(SPREAD * self._num_used), self._num_used)
        self._index = torch.tensor(self._ids, device=self._device)

    def _settle(self) -> None:
        """Return when the device has nothing to do."""
        if self._is_gpu:
            torch.cuda.synchronize(self._device)

    # -- content: not what is measured --------------------------------------------------------------------------------

    def fill(self, content: memoryview) -> None:
        """Put all chunks, which lie in `content` one after the other, into blocks chosen anew."""
        with errors_of_torch():
            self._choose_blocks()
            chunks = torch.frombuffer(content, dtype=torch.uint8).view(self._shape).to(self._device)
            self._kv[:, self._index] = chunks.transpose(0, 1).reshape(self.layout.num_layers, self._num_used, -1)
            self._settle()

    def blot(self) -> None:
        """Make every byte of every block wrong, and choose blocks anew, to load into."""
        with errors_of_torch():
            self._choose_blocks()
            self._kv.fill_(BLOT)
            self._settle()

    def fetch(self, content: memoryview) -> None:
        """Bring what the chunks' blocks hold to host memory: one chunk after the other."""
        num_chunks, num_layers, size, block_bytes = self._shape
        with errors_of_torch():
            chunks = self._kv[:, self._index].view(num_layers, num_chunks, size, block_bytes).transpose(0, 1)
            torch.frombuffer(content, dtype=torch.uint8).view(self._shape).copy_(chunks.contiguous())

    # -- copies: what is measured -------------------------------------------------------------------------------------

    def store(self, extents: Sequence[Extent], indices: Sequence[int]) -> None:
        """Gather the chunks with these indices into extents; done on return.

        Raises: StuckTransferError: the extents may be written at any time from now on.
        """
        size = self.blocks_per_chunk
        block_ids = [block for index in indices for block in self._ids[index * size : (index + 1) * size]]
        with errors_of_torch():
            self.copier.gather(block_ids, extents)

    def load(self, extents: Sequence[Extent]) -> None:
        """Scatter extents into the blocks of the first chunks; the device has completed on return.

        Raises: StuckTransferError.
        """
        with errors_of_torch():
            self.copier.scatter(extents, self._ids[: len(extents) * self.blocks_per_chunk])

    def flat_copier(self, extents: Sequence[Extent]) -> Callable[[bool], None]:
        """Return what makes a plain copy between the same memory and extents; done on return. It spoils the content.

        The function is told whether to copy to the host.
        """
        begin = self.copier.flat_copier(self._kv.view(-1), extents)

        def copy(to_host: bool) -> None:
            with errors_of_torch():
                begin(to_host).wait(TRANSFER_SECONDS)

        return copy


def open_device(name: str) -> torch.device:
    """Return a device that can be used.

    Raises: UsageError with the reason why not; DeviceMemoryError.
    """
    if name == "cuda":
        _open_gpu()
    return torch.device(name)


def _open_gpu() -> None:
    if torch.version.cuda is None:
        raise _no_gpu(f"PyTorch {torch.__version__} is built without CUDA", "install a build of PyTorch for CUDA")
    try:
        driver()
    except CudaError as exc:
        raise _no_gpu(exc.message, exc.hint) from exc
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they say what the error says
            torch.zeros(1, device="cuda")
    except RuntimeError as exc:
        if "out of memory" in str(exc):
            raise _no_room(exc) from exc
        raise _no_gpu(_first_line(exc), "see 'nvidia-smi' and CUDA_VISIBLE_DEVICES") from exc


def _no_gpu(reason: str, hint: str) -> UsageError:
    return UsageError(f"no NVIDIA GPU can be used here: {reason}", f"{hint}; or leave the chunks in host memory", "device")


def _no_room(exc: RuntimeError) -> DeviceMemoryError:
    return DeviceMemoryError(
        f"the device has no room for the blocks: {_first_line(exc)}",
        "use fewer or smaller chunks or fewer workers, or stop what else is on the GPU; see 'nvidia-smi'",
    )


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().partition("\n")[0] or type(exc).__name__


@contextlib.contextmanager
def errors_of_torch() -> Iterator[None]:
    """Make ours of what PyTorch and Triton raise.

    Raises: DeviceMemoryError, CudaError.
    """
    try:
        yield
    except torch.cuda.OutOfMemoryError as exc:
        raise _no_room(exc) from exc
    except (RuntimeError, OSError, subprocess.SubprocessError) as exc:  # the last two: Triton finds no compiler
        raise CudaError(f"PyTorch: {_first_line(exc)}", "does another program of PyTorch and Triton run on this GPU?") from exc
