"""Where a worker's chunks lie while they are not in the cache: in private memory, or as paged KV on a device.

Comes in: content, and extents of the pool. Goes out: copies of it, and the plain copies that they are compared with. `store`,
`load` and the raw copies are what `worker.py` times; the rest happens between. Next on the path: `client/kvcache.py`, and
`cli/paged.py` for a device.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lmcache.cli.commands.bench.messages import DeviceReport, Plan
from lmcache.cli.commands.bench.rawcopy import RawCopy
from lmcache.cli.commands.bench.workload import Content, PromptBuffer, raw_prompt
from lmcache.cli.paged import open_paged_kv
from lmcache.client.kvcache import KVCacheClient, Reservation
from lmcache.errors import DeadlineError, LMCacheError
from lmcache.protocol import PinReport

if TYPE_CHECKING:
    from lmcache.transfer.paged import PagedKV


class ChunkMemory(ABC):
    """One prompt's chunks to store, and room for one prompt to load.

    `content` is what is stored once `place` was called; `landing` is what was loaded once `fetch` was called.
    """

    # Whether a copy did not come to an end: nothing may follow it.
    is_stuck = False

    def __init__(self, plan: Plan) -> None:
        self._workload = plan.workload
        self.content = Content(plan.workload)
        self.landing = PromptBuffer(plan.workload, bytes(plan.workload.chunk_bytes))

    def open(self, keep_waiting: Callable[[float], bool]) -> None:  # noqa: B027 - private memory is there
        """Get ready; `keep_waiting` is told how far that is, and returns False to end it.

        Raises: UsageError when it cannot be had here; LMCacheError.
        """

    def place(self) -> None:  # noqa: B027 - content is stored from where it is
        """Make what `content` holds ready to be stored."""

    @abstractmethod
    def store(self, reservation: Reservation) -> None:
        """Copy the reserved ones of the chunks into their extents; done on return."""

    def blot(self) -> None:
        """Make every page that is loaded into wrong for every key, so that a copy that did not happen is seen."""
        self.landing.blot()

    @abstractmethod
    def load(self, extents: Sequence[memoryview]) -> None:
        """Copy the extents of the first chunks, all of a chunk's length; done on return."""

    def fetch(self) -> None:  # noqa: B027 - it landed there
        """Bring what was loaded into `landing`."""

    @abstractmethod
    def open_raw(self, region_bytes: int) -> None:
        """Prepare the raw copies; they may go round in so much memory."""

    @abstractmethod
    def raw_write(self) -> float:
        """Copy a prompt's bytes as `store` does, without the cache; return the seconds."""

    @abstractmethod
    def raw_read(self) -> float:
        """The same as `load` does."""

    def report(self) -> DeviceReport | None:
        """Return what is to be known of the device, if there is one."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give back what `open_raw` took."""


def make_memory(plan: Plan, client: KVCacheClient) -> ChunkMemory:
    """Return where the plan wants its chunks; not opened yet."""
    return HostMemory(plan) if plan.paged_on is None else PagedMemory(plan, client, plan.paged_on)


class HostMemory(ChunkMemory):
    """Private memory of the worker."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._raw: RawCopy | None = None

    def store(self, reservation: Reservation) -> None:
        """Copy the reserved ones of the chunks into their extents."""
        for extent, index in zip(reservation.extents, reservation.reserved_indices(), strict=True):
            extent[:] = self.content.chunks[index]

    def load(self, extents: Sequence[memoryview]) -> None:
        """Copy the extents of the first chunks."""
        for chunk, extent in zip(self.landing.chunks, extents):  # noqa: B905 - a miss ends the shorter one
            chunk[:] = extent

    def open_raw(self, region_bytes: int) -> None:
        """Take shared memory of our own."""
        self._raw = RawCopy(self._workload.prompt_bytes, region_bytes)

    def raw_write(self) -> float:
        """Copy into shared memory."""
        assert self._raw is not None
        return self._raw.write(self.content.chunks)

    def raw_read(self) -> float:
        """Copy from shared memory."""
        assert self._raw is not None
        return self._raw.read(self.landing.chunks)

    def close(self) -> None:
        """Give the shared memory back."""
        if self._raw is not None:
            self._raw.close()


class PagedMemory(ChunkMemory):
    """Paged KV on a device, on the engine's path: the copier of the device, and the mapped pool, pinned.

    The raw copies go between the same device memory and places of the same pool, which are reserved for them.

    Args:
        device: by PyTorch's name.
    """

    def __init__(self, plan: Plan, client: KVCacheClient, device: str) -> None:
        super().__init__(plan)
        self._client = client
        self._device = device
        self._lane = plan.lane
        self._kv: PagedKV | None = None
        self._raw_places: Reservation | None = None
        self._raw_copy: Callable[[bool], None] = lambda to_host: None

    @property
    def _open_kv(self) -> PagedKV:
        assert self._kv is not None
        return self._kv

    def open(self, keep_waiting: Callable[[float], bool]) -> None:
        """Take the device's memory and pin the pool."""
        workload = self._workload
        self._kv = open_paged_kv(self._client, workload.chunk_bytes, workload.chunks_per_prompt, self._device, keep_waiting)

    def place(self) -> None:
        """Put the content into blocks."""
        self._open_kv.fill(self.content.whole)

    def store(self, reservation: Reservation) -> None:
        """Gather the reserved ones of the chunks into their extents."""
        try:
            self._open_kv.store(reservation.extents, reservation.reserved_indices())
        except DeadlineError:  # the device may write there at any time from now on
            reservation.keep_for_ever()
            self.is_stuck = True
            raise

    def blot(self) -> None:
        """Make every block wrong, and the host's memory too."""
        super().blot()
        self._open_kv.blot()

    def load(self, extents: Sequence[memoryview]) -> None:
        """Scatter the extents of the first chunks."""
        try:
            self._open_kv.load(extents)
        except DeadlineError:
            self.is_stuck = True
            raise

    def fetch(self) -> None:
        """Bring the blocks to host memory."""
        self._open_kv.fetch(self.landing.whole)

    def open_raw(self, region_bytes: int) -> None:
        """Reserve places for one prompt, which is never committed.

        Raises: LMCacheError when L1 has no room for it.
        """
        workload = self._workload
        keys = workload.keys(raw_prompt(self._lane))
        self._raw_places = self._client.reserve(keys, workload.chunk_bytes, workload.namespace.id)
        if len(self._raw_places.extents) < workload.chunks_per_prompt:
            raise LMCacheError(
                f"L1 has room for {len(self._raw_places.extents)} of {workload.chunks_per_prompt} chunks of the raw copy",
                "use smaller chunks or fewer, or see 'lmcache describe kvcache' for who holds L1",
                "store_full",
            )
        self._raw_copy = self._open_kv.flat_copier(self._raw_places.extents)

    def raw_write(self) -> float:
        """Copy from the device to the pool, by the copy engine alone."""
        return self._time_raw(to_host=True)

    def raw_read(self) -> float:
        """Copy from the pool to the device."""
        return self._time_raw(to_host=False)

    def _time_raw(self, to_host: bool) -> float:
        started = time.perf_counter()
        try:
            self._raw_copy(to_host)
        except DeadlineError:
            self.is_stuck = True
            raise
        return time.perf_counter() - started

    def report(self) -> DeviceReport | None:
        """Return the device, what of the pool is pinned, and the memory taken."""
        if self._kv is None:
            return None
        kv, pins = self._kv, self._kv.copier.pin_report() or PinReport()
        return DeviceReport(
            name=kv.device_name,
            pool_pinned_bytes=pins.pinned_bytes,
            pool_unpinned_bytes=pins.unpinned_bytes,
            staging_bytes=kv.staging_bytes,
            kv_bytes=kv.num_bytes,
            num_layers=kv.layout.num_layers,
            blocks_per_chunk=kv.blocks_per_chunk,
            block_bytes=kv.layout.block_bytes,
        )

    def close(self) -> None:
        """Give the places of the raw copies back, unless the device may still write there."""
        if self._raw_places is not None:
            if self.is_stuck:
                self._raw_places.keep_for_ever()
            else:
                self._raw_places.abort()
