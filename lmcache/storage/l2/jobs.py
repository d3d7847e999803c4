"""What worker threads do for a tier: one job, some blocking calls of its adapter.

Comes in: a job that the owner thread filled in. Goes out: the same job with its outcome, which the owner reads in `done`.
A job touches the adapter and the memory that it was given, nothing else of the server. Next on the data path: the adapter.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum

import msgspec

from lmcache.keys import split_keys
from lmcache.storage.l2.base import L2Adapter, L2Error, Reason, Usage
from lmcache.storage.l2.value import HEADER_BYTES, ValueHeader, check_value, unpack_header, value_checksum, value_key

# One call asks for the lengths of at most so many values.
MAX_KEYS_PER_CALL = 512
# Errors of one value; the tier itself works.
VALUE_CODES = frozenset({Reason.CORRUPT.value, Reason.FORMAT.value})


class Outcome(str, Enum):
    """What became of one chunk of a job."""

    PENDING = "pending"
    DONE = "done"
    EXISTS = "exists"
    """Was in the tier already: not written again."""
    MISSING = "missing"
    """Went from the tier between asking for it and reading it."""
    BAD = "bad"
    """Was there, but not as it was stored; it is deleted."""
    FAILED = "failed"
    CANCELLED = "cancelled"


class Transfer(msgspec.Struct, kw_only=True, eq=False):
    """One rank's chunk between L1 and a tier. The owner sees to it that `extent` is nobody else's until the job is done."""

    key: bytes
    rank: int
    slot: int
    extent: memoryview
    namespace_id: int = 0
    checksum: int = 0
    outcome: Outcome = Outcome.PENDING

    @property
    def name(self) -> str:
        """The key in the tier."""
        return value_key(self.key, self.rank)


class Job(ABC):
    """One piece of work. `error` is the tier's failure, if it failed; `done` is called by the owner thread afterwards."""

    operation = ""
    is_write = True
    """Which of the tier's threads run it."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.done = done
        self.error: L2Error | None = None
        self.seconds = 0.0
        self.is_cancelled = False

    def run(self, adapter: L2Adapter, header: memoryview) -> None:
        """Do it, in a worker thread. `header` is the worker's own page.

        Raises: L2Error.
        """
        started_at = time.perf_counter()
        try:
            self._run(adapter, header)
        finally:
            self.seconds = time.perf_counter() - started_at

    @abstractmethod
    def _run(self, adapter: L2Adapter, header: memoryview) -> None: ...


class FindJob(Job):
    """Which values are there, and how long are the chunks in them?"""

    operation = "find"
    is_write = False

    def __init__(self, names: Sequence[str], done: Callable[[], None]) -> None:
        super().__init__(done)
        self.names = names
        self.chunk_lengths: list[int | None] = []

    @property
    def has_done_something(self) -> bool:
        """Whether the tier has told of any value while somebody waits for it; any thread."""
        return bool(self.chunk_lengths) and not self.is_cancelled

    def _run(self, adapter: L2Adapter, header: memoryview) -> None:
        for start in range(0, len(self.names), MAX_KEYS_PER_CALL):
            if self.is_cancelled:
                return
            lengths = adapter.lengths(self.names[start : start + MAX_KEYS_PER_CALL])
            self.chunk_lengths += [_chunk_length(length) for length in lengths]


def _chunk_length(value_length: int | None) -> int | None:
    return None if value_length is None or value_length <= HEADER_BYTES else value_length - HEADER_BYTES


class ReadJob(Job):
    """Chunks from the tier into reserved extents."""

    operation = "read"
    is_write = False

    def __init__(self, transfers: Sequence[Transfer], done: Callable[[], None]) -> None:
        super().__init__(done)
        self.transfers = transfers

    @property
    def has_done_something(self) -> bool:
        """Whether the tier has delivered any value, which fills L1 also when it comes late; any thread."""
        return any(transfer.outcome is Outcome.DONE for transfer in self.transfers)

    def _run(self, adapter: L2Adapter, header: memoryview) -> None:
        for transfer in self.transfers:
            transfer.outcome = Outcome.CANCELLED if self.is_cancelled else self._read(adapter, header, transfer)

    def _read(self, adapter: L2Adapter, header: memoryview, transfer: Transfer) -> Outcome:
        try:
            if not adapter.get(transfer.name, [header, transfer.extent]):
                return Outcome.MISSING
            found = unpack_header(header)
            check_value(found, transfer.key, transfer.rank, transfer.extent)
        except L2Error as exc:
            if exc.code not in VALUE_CODES:
                raise
            self.error = exc
            with suppress(L2Error):
                adapter.delete([transfer.name])
            return Outcome.BAD
        transfer.namespace_id, transfer.checksum = found.namespace_id, found.checksum
        return Outcome.DONE


class WriteJob(Job):
    """Chunks from pinned extents to the tier; what is there already is not written again."""

    operation = "write"

    def __init__(self, transfers: Sequence[Transfer], done: Callable[[], None]) -> None:
        super().__init__(done)
        self.transfers = transfers

    def _run(self, adapter: L2Adapter, header: memoryview) -> None:
        lengths = adapter.lengths([transfer.name for transfer in self.transfers])
        for transfer, length in zip(self.transfers, lengths, strict=True):
            if self.is_cancelled:
                transfer.outcome = Outcome.CANCELLED
            elif length == HEADER_BYTES + len(transfer.extent):
                transfer.outcome = Outcome.EXISTS
            else:
                transfer.outcome = self._write(adapter, transfer)

    def _write(self, adapter: L2Adapter, transfer: Transfer) -> Outcome:
        found = value_checksum(transfer.extent)
        # Of a client that told a checksum (0: none; it stores 1 for 0): what no longer matches must not outlive L1.
        if transfer.checksum not in (0, found or 1):
            self.error = L2Error("a chunk in L1 differs from its checksum and was not written", code=Reason.CORRUPT)
            return Outcome.BAD
        header = ValueHeader(
            key=transfer.key,
            rank=transfer.rank,
            namespace_id=transfer.namespace_id,
            length=len(transfer.extent),
            checksum=found,
        )
        adapter.put(transfer.name, [memoryview(header.pack()), transfer.extent])
        return Outcome.DONE


class ProbeJob(Job):
    """Does it work again? For finds by asking for a value that is not there, for writes by the adapter's own ping."""

    operation = "probe"

    def __init__(self, is_write: bool, done: Callable[[], None]) -> None:
        super().__init__(done)
        self.is_write = is_write

    def _run(self, adapter: L2Adapter, header: memoryview) -> None:
        if self.is_write:
            adapter.ping()
        else:
            adapter.lengths([value_key(bytes(32), 0)])


class UsageJob(Job):
    """How full is it?"""

    operation = "usage"
    is_write = False

    def __init__(self, done: Callable[[], None]) -> None:
        super().__init__(done)
        self.usage = Usage()

    def _run(self, adapter: L2Adapter, header: memoryview) -> None:
        self.usage = adapter.usage()


class TouchJob(Job):
    """A prompt was found in L1: what the tier has of it was used, its beginning last, so that its end is evicted first."""

    operation = "touch"

    def __init__(self, keys: bytes, world_size: int, done: Callable[[], None]) -> None:
        super().__init__(done)
        self.keys = keys
        self.world_size = world_size

    def _run(self, adapter: L2Adapter, header: memoryview) -> None:
        ranks = range(self.world_size)
        adapter.touch([value_key(key, rank) for key in reversed(split_keys(self.keys)) for rank in ranks])


class RemovalJob(Job):
    """Takes values out: `objects` so far; `removed_bytes` is None where the tier cannot tell exactly."""

    def __init__(self, done: Callable[[], None]) -> None:
        super().__init__(done)
        self.objects = 0
        self.removed_bytes: int | None = None


class DeleteJob(RemovalJob):
    """Takes named values out."""

    operation = "delete"

    def __init__(self, names: Sequence[str], done: Callable[[], None]) -> None:
        super().__init__(done)
        self.names = names

    def _run(self, adapter: L2Adapter, header: memoryview) -> None:
        for start in range(0, len(self.names), MAX_KEYS_PER_CALL):
            self.objects += adapter.delete(self.names[start : start + MAX_KEYS_PER_CALL])


class ClearJob(RemovalJob):
    """Takes everything out; `removed_bytes` is what the tier said that it held before."""

    operation = "clear"

    def _run(self, adapter: L2Adapter, header: memoryview) -> None:
        before = Usage()
        with suppress(L2Error):
            before = adapter.usage()
        self.objects = adapter.clear()
        if before.objects == self.objects:  # else others' values are in it, or came and went meanwhile
            self.removed_bytes = before.used_bytes
