"""What `measure.py` and its worker processes tell each other: a plan down, messages up, each one line of JSON."""

from __future__ import annotations

import msgspec

from lmcache.cli.commands.bench.workload import OperationKind, Workload
from lmcache.errors import LMCacheError


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker has to do. Prompts are dealt out: worker `lane` of `num_lanes` has every `num_lanes`-th.

    `num_prompts` and `num_fill_prompts` are those of all workers, `max_operations` is this worker's. `paged_on`: the device, by
    PyTorch's name, on which chunks lie as an engine's paged KV; None: they lie in private memory.
    """

    url: str
    timeout_seconds: float
    inline: bool
    has_l2: bool = False
    paged_on: str | None = None
    workload: Workload
    lane: int
    num_lanes: int
    num_prompts: int
    num_fill_prompts: int = 0
    verify_only: bool = False
    reuse: bool = False
    keep: bool = False
    check: bool = True
    mix: dict[OperationKind, float] = {}
    warmup_seconds: float = 0.0
    duration_seconds: float | None = None
    max_operations: int | None = None


class BadChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One chunk that came back different: which one, where it lay, and the first wrong byte."""

    prompt: int
    chunk: int
    key: str
    pool_offset: int | None
    byte: int | None
    expected: int | None
    found: int | None

    def __str__(self) -> str:
        place = f", at pool offset {self.pool_offset}" if self.pool_offset is not None else ""
        what = f"byte {self.byte} is {self.found:#04x} instead of {self.expected:#04x}" if self.byte is not None else ""
        return f"chunk {self.chunk} of prompt {self.prompt} (key {self.key[:16]}{place}): {what}"


class Tally(msgspec.Struct):
    """What was done in one kind of operation; `seconds` has one entry each.

    `l1_chunks` were read from L1, or found there by a lookup. `l2_chunks`: of a lookup, those in L2 only; of a retrieve, those
    of its `l1_chunks` that L2 had to deliver first.
    """

    seconds: list[float] = []
    num_bytes: int = 0
    asked_chunks: int = 0
    l1_chunks: int = 0
    l2_chunks: int = 0


class CopyTally(msgspec.Struct):
    """Raw copies in one direction."""

    num_bytes: int = 0
    seconds: float = 0.0


class Correctness(msgspec.Struct):
    """Chunks that came back right, came back wrong, or did not come back."""

    ok: int = 0
    bad: int = 0
    missing: int = 0
    bad_chunks: list[BadChunk] = []


class FillTally(msgspec.Struct):
    """Stores before the measurement."""

    num_chunks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    longest_store_seconds: float = 0.0


class Failures(msgspec.Struct):
    """Operations that failed: how many by code, and one message for each code."""

    by_code: dict[str, int] = {}
    messages: dict[str, str] = {}

    def add(self, exc: LMCacheError) -> None:
        """Count one."""
        self.by_code[exc.code] = self.by_code.get(exc.code, 0) + 1
        self.messages.setdefault(exc.code, exc.message)


class Refusal(msgspec.Struct, frozen=True):
    """Why a worker stopped before its work was done; `exit_code` is the error's."""

    code: str
    message: str
    hint: str
    exit_code: int


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """The device that the chunks lay on as paged KV: which one, how much of the pool is pinned for it, and what it had to hold.

    `staging_bytes` and `kv_bytes` are device memory of one worker.
    """

    name: str
    pool_pinned_bytes: int
    pool_unpinned_bytes: int
    staging_bytes: int
    kv_bytes: int
    num_layers: int
    blocks_per_chunk: int
    block_bytes: int


class LaneReport(msgspec.Struct):
    """Everything that one worker found out."""

    operations: dict[OperationKind, Tally] = {}
    raw_writes: CopyTally = msgspec.field(default_factory=CopyTally)
    raw_reads: CopyTally = msgspec.field(default_factory=CopyTally)
    correctness: Correctness = msgspec.field(default_factory=Correctness)
    failures: Failures = msgspec.field(default_factory=Failures)
    fill: FillTally = msgspec.field(default_factory=FillTally)
    measured_seconds: float = 0.0
    operation_seconds: float = 0.0
    removed_chunks: int = 0
    is_inline: bool = False
    device: DeviceReport | None = None
    gave_up: Refusal | None = None


class Progress(msgspec.Struct, tag=True, frozen=True):
    """How far a phase is (0 to 1), and which of the worker's prompts [first, claimed) may be in the cache."""

    phase: str
    share: float
    first: int
    claimed: int


class Waiting(msgspec.Struct, tag=True, frozen=True):
    """Prepared; the next phase starts at the word `go`."""


class Finished(msgspec.Struct, tag=True, frozen=True):
    """The last message."""

    report: LaneReport


Message = Progress | Waiting | Finished
