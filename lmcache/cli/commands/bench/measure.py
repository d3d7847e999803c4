"""Runs one benchmark of the cache server and returns what it measured; needs no terminal.

Comes in: an address and `BenchSettings`. Goes out: a `BenchRun`: figures of this run only, what was wrong, and every setting
that took effect. Next on the path: `worker.py`, one process a worker; the figures are made from their reports below.

The server's counters are read before and after. They are compared with what the workers counted themselves: the server
having counted less means that one of the two is wrong, more means that someone else used it meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

import lmcache
from lmcache.cli.commands.bench.messages import (
    CopyTally,
    Correctness,
    DeviceReport,
    Failures,
    FillTally,
    Finished,
    LaneReport,
    Message,
    Plan,
    Progress,
    Refusal,
    Tally,
    Waiting,
)
from lmcache.cli.commands.bench.worker import remove_prompts
from lmcache.cli.commands.bench.workload import (
    FILL_PROMPTS_FROM,
    KeptSet,
    OperationKind,
    Workload,
    fill_prompt,
    lane_item,
    lane_size,
)
from lmcache.cli.output import format_bytes, percentile
from lmcache.cli.status import EVICTED_BY_POLICY
from lmcache.client.mq import MessageQueueClient, check_reachable
from lmcache.errors import InconclusiveError, LMCacheError, RemoteError, UnreachableError, UsageError
from lmcache.protocol import MAX_CHUNK_BYTES, MAX_CHUNKS, PROTOCOL_VERSION, Status

GB = 10**9
MIN_CHUNK_BYTES = 1024
MAX_CONCURRENCY = 256
DEFAULT_WORKING_SET_BYTES = 1 << 30
# Nothing that goes through the cache can be faster than the same copy without it; above this it was measured wrong.
SUSPECT_ABOVE = 1.02
SILENCE_SECONDS = 30.0
# What a device may take more: to import PyTorch and to compile kernels, or to find that a copy is stuck.
DEVICE_SILENCE_SECONDS = 120.0
STOP_SECONDS = 10.0

OnProgress = Callable[[str, float], None]


class BenchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What to run. The mix is by weight; `working_set_bytes` None: what fits beside what is in the cache.

    The run ends after `duration_seconds` or `max_operations`, whichever comes first; `verify_only` ends by itself.
    `paged_on`: the device, by PyTorch's name, on which chunks lie as an engine's paged KV; None: in private memory.
    """

    chunk_bytes: int = 1 << 20
    chunks_per_prompt: int = 8
    working_set_bytes: int | None = None
    fill_ratio: float = 0.0
    concurrency: int = 1
    mix: dict[OperationKind, float] = msgspec.field(
        default_factory=lambda: {OperationKind.STORE: 1, OperationKind.RETRIEVE: 3, OperationKind.LOOKUP: 6}
    )
    seed: int = 0
    warmup_seconds: float = 1.0
    duration_seconds: float | None = 30.0
    max_operations: int | None = None
    paged_on: str | None = None
    inline: bool = False
    check: bool = True
    verify_only: bool = False
    keep: bool = False
    reuse: KeptSet | None = None
    timeout_seconds: float = 5.0


class OperationFigures(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of operation. `ops_per_second` is per second that the workers spent in operations of any kind."""

    completed: int
    ops_per_second: float
    latency_seconds: dict[str, float] | None


class BandwidthFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per second spent in the operation, workers added up; and the same copy without the cache.

    None where it is not known, with the reason in `unknown_because`.
    """

    gb_per_second: float | None = None
    raw_copy_gb_per_second: float | None = None
    share_of_raw_copy: float | None = None
    is_suspect: bool = False
    unknown_because: str = ""


class HitRate(msgspec.Struct, frozen=True, kw_only=True):
    """Which share of the chunks asked of a tier it had; L2 is asked for what L1 lacks."""

    ratio: float | None = None
    hit_chunks: int | None = None
    asked_chunks: int | None = None
    unknown_because: str = ""


class CounterCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What the workers counted, and by how much the server's counter rose."""

    workers: int
    server: int


class BenchRun(msgspec.Struct, kw_only=True):
    """What one run found out. `refusal`: why it ended early, if it did; `kept`: what `reuse` takes, if chunks were left."""

    settings: dict[str, Any]
    versions: dict[str, Any]
    environment: dict[str, Any]
    is_inline: bool
    device: DeviceReport | None
    measured_seconds: float
    operation_share: float
    operations: dict[OperationKind, OperationFigures]
    hit_rate: dict[str, HitRate]
    bandwidth: dict[str, BandwidthFigures]
    correctness: Correctness
    failures: Failures
    refusal: Refusal | None
    fill: FillTally
    evicted_chunks: int | None
    missing_explained: bool
    counter_checks: dict[str, CounterCheck]
    removed_chunks: int | None
    kept: str | None
    notes: list[str]

    def problem(self) -> LMCacheError | None:
        """Return the worst thing that was found wrong, or None when the run is good."""
        correct, failed = self.correctness, sum(self.failures.by_code.values())
        if correct.bad:
            return LMCacheError(
                f"{correct.bad} of {correct.ok + correct.bad} chunks came back with wrong bytes",
                "keep the output: it names the chunks; check the host's memory and the server's log",
                "checksum",
            )
        if self.refusal is not None:
            kind = UnreachableError if self.refusal.exit_code == UnreachableError.exit_code else LMCacheError
            return kind(f"the run ended early: {self.refusal.message}", self.refusal.hint, self.refusal.code)
        if failed:
            causes = "; ".join(f"{count} {code}" for code, count in self.failures.by_code.items())
            first = next(iter(self.failures.messages.values()))
            return LMCacheError(f"{failed} operations failed ({causes}): {first}", "see the server's log", "failures")
        if correct.missing and not self.missing_explained:
            return LMCacheError(
                f"{correct.missing} chunks are not there, and nothing was evicted in this run",
                "were they cleared or evicted, or was the pool not kept, since they were stored?",
                "missing",
            )
        if self.settings["verify_only"] and correct.missing:
            return InconclusiveError(
                f"{correct.missing} of {correct.ok + correct.missing} chunks were evicted before they were read",
                "use a smaller --working-set, or a larger --l1-size-gb",
            )
        if self.settings["verify_only"] and not correct.ok:
            return LMCacheError("nothing was verified: no chunk was found", "use a smaller --working-set", "vacuous")
        return None


# -- all runs ---------------------------------------------------------------------------------------------------------


def run_benches(
    url: str, all_settings: Sequence[BenchSettings], on_progress: OnProgress = lambda phase, share: None
) -> tuple[list[BenchRun], LMCacheError | None]:
    """Run one benchmark after the other; return those that ended by themselves, and what ended the next one, if anything did.

    Raises: as `run_bench` for the first; UsageError, before anything is stored, when one of them does not fit the server.
    """
    _check_all_fit(url, all_settings)
    runs: list[BenchRun] = []
    for settings in all_settings:
        try:
            runs.append(run_bench(url, settings, on_progress))
        except LMCacheError as exc:
            if not runs:
                raise
            return runs, exc
        if runs[-1].refusal is not None:
            break
    return runs, None


def _check_all_fit(url: str, all_settings: Sequence[BenchSettings]) -> None:
    with MessageQueueClient(url, all_settings[0].timeout_seconds) as control:
        l1 = control.call(Status()).status["l1"]
    for settings in all_settings:
        _workload(settings, l1)


# -- one run ----------------------------------------------------------------------------------------------------------


def run_bench(url: str, settings: BenchSettings, on_progress: OnProgress = lambda phase, share: None) -> BenchRun:
    """Run one benchmark against the server at a ZMQ address and remove what it stored.

    An exception, KeyboardInterrupt too, also ends the workers and removes their chunks before it goes on.

    Raises: UsageError for settings that do not fit the server or this machine; UnreachableError, RemoteError.
    """
    with MessageQueueClient(url, settings.timeout_seconds) as control:
        at_start = control.call(Status()).status
        plans = make_plans(url, settings, at_start["l1"], has_l2=bool(at_start["l2"]))
        workload = plans[0].workload
        fleet = Fleet(plans, on_progress)
        removed: int | None = None
        try:
            with fleet:
                prepared = fleet.prepare()
                before = control.call(Status()).status if prepared else at_start
                if prepared:
                    fleet.measure()
            after = _status_if_reachable(control, settings.timeout_seconds)
        finally:
            if not settings.keep:
                removed = _remove_all(control, workload, fleet, settings.timeout_seconds)
    return _figures(settings, plans, fleet.reports(), at_start, before, after, removed)


def _status_if_reachable(control: MessageQueueClient, timeout_seconds: float) -> dict[str, Any] | None:
    try:
        check_reachable(control.url, timeout_seconds)
        return control.call(Status()).status
    except (UnreachableError, RemoteError):
        return None


def _remove_all(control: MessageQueueClient, workload: Workload, fleet: Fleet, timeout_seconds: float) -> int | None:
    """Return how many chunks were removed; None when the server cannot be asked."""
    try:
        check_reachable(control.url, timeout_seconds)
        return remove_prompts(control, workload, fleet.stored_prompts())
    except (UnreachableError, RemoteError):
        return None


def make_plans(url: str, settings: BenchSettings, l1: dict[str, Any], has_l2: bool = False) -> list[Plan]:
    """Return the work of each worker.

    Raises: UsageError when the settings do not fit the server's L1.
    """
    workload, num_prompts = _workload(settings, l1)
    lanes = settings.concurrency
    fill_bytes = settings.fill_ratio * int(l1["capacity_bytes"])
    return [
        Plan(
            url=url,
            timeout_seconds=settings.timeout_seconds,
            inline=settings.inline,
            has_l2=has_l2,
            paged_on=settings.paged_on,
            workload=workload,
            lane=lane,
            num_lanes=lanes,
            num_prompts=num_prompts,
            num_fill_prompts=-int(-fill_bytes // workload.prompt_bytes),
            verify_only=settings.verify_only,
            reuse=settings.reuse is not None,
            keep=settings.keep,
            check=settings.check,
            mix=settings.mix,
            warmup_seconds=settings.warmup_seconds,
            duration_seconds=settings.duration_seconds,
            max_operations=(None if settings.max_operations is None else lane_size(settings.max_operations, lane, lanes)),
        )
        for lane in range(lanes)
    ]


def _workload(settings: BenchSettings, l1: dict[str, Any]) -> tuple[Workload, int]:
    if settings.reuse is not None:
        workload, num_prompts = settings.reuse.workload, settings.reuse.num_prompts
    else:
        workload = Workload(
            salt=secrets.token_hex(8),
            seed=settings.seed,
            chunk_bytes=settings.chunk_bytes,
            chunks_per_prompt=settings.chunks_per_prompt,
        )
        num_prompts = 0
    _check_sizes(workload, settings, int(l1["capacity_bytes"]))
    if settings.reuse is None:
        num_prompts = _num_prompts(settings, workload, l1)
    return workload, num_prompts


def _check_sizes(workload: Workload, settings: BenchSettings, capacity_bytes: int) -> None:
    if not MIN_CHUNK_BYTES <= workload.chunk_bytes <= MAX_CHUNK_BYTES:
        raise UsageError(
            f"chunks of {workload.chunk_bytes} bytes cannot be measured",
            f"use {MIN_CHUNK_BYTES} to {MAX_CHUNK_BYTES} bytes",
            "chunk_bytes",
        )
    if not 1 <= workload.chunks_per_prompt <= MAX_CHUNKS:
        raise UsageError(
            f"a prompt cannot have {workload.chunks_per_prompt} chunks", f"use 1 to {MAX_CHUNKS}", "chunks_per_prompt"
        )
    # All workers may hold a prompt pinned or reserved at the same time, each page-aligned, and one more for raw copies.
    has_raw_places = settings.paged_on is not None and not settings.verify_only
    count = "two prompts" if has_raw_places else "one prompt"
    needed = settings.concurrency * (1 + has_raw_places) * workload.chunks_per_prompt * _page_aligned(workload.chunk_bytes)
    if needed > capacity_bytes:
        raise UsageError(
            f"{count} for each of {settings.concurrency} workers takes {needed} bytes, L1 has {capacity_bytes}",
            "use a smaller --chunk-bytes, --chunks-per-prompt or --concurrency, or a larger --l1-size-gb",
            "too_large",
        )


def _page_aligned(num_bytes: int) -> int:
    return -(-num_bytes // 4096) * 4096


def _num_prompts(settings: BenchSettings, workload: Workload, l1: dict[str, Any]) -> int:
    """How many prompts the working set has: what was asked for, or what fits beside the entries that are there."""
    least = settings.concurrency
    if settings.working_set_bytes is not None:
        num_prompts = settings.working_set_bytes // workload.prompt_bytes
        if num_prompts < least:
            raise UsageError(
                f"a working set of {settings.working_set_bytes} bytes does not hold a prompt for each worker",
                f"use at least {least * workload.prompt_bytes} bytes, or smaller chunks",
                "working_set",
            )
        if num_prompts > FILL_PROMPTS_FROM:
            raise UsageError(
                f"a working set of {num_prompts} prompts is more than {FILL_PROMPTS_FROM}", "use larger chunks", "working_set"
            )
        return num_prompts
    room = min(DEFAULT_WORKING_SET_BYTES, int(l1["free_bytes"]) // 2)
    aligned_prompt_bytes = workload.chunks_per_prompt * _page_aligned(workload.chunk_bytes)
    room_chunks = int(l1.get("max_chunks", MAX_CHUNKS)) // 2
    return max(least, min(room // aligned_prompt_bytes, room_chunks // workload.chunks_per_prompt))


# -- the workers ------------------------------------------------------------------------------------------------------


class WorkerProcess:
    """The parent's end of one worker: its process, what it said last, and its report in the end."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.progress = Progress("start", 0.0, 0, 0)
        self.is_waiting = False
        self.is_dead = False
        self.report: LaneReport | None = None
        self.heard_at = time.monotonic()
        self._unread = b""
        self._decoder = msgspec.json.Decoder(Message)
        root = str(Path(lmcache.__file__).parent.parent)
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        # Its own session: Ctrl-C reaches us alone, and we tell it. Its stdin ends when we do, and so does it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lmcache.cli.commands.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self.say(msgspec.json.encode(plan))

    def fileno(self) -> int:
        """Where its messages come from."""
        return self._stdout.fileno()

    def say(self, word: bytes) -> None:
        """Write one line to it."""
        self.heard_at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(word + b"\n")

    def read(self) -> None:
        """Take in what it said.

        Raises: LMCacheError when it ended without a report.
        """
        data = os.read(self.fileno(), 1 << 20)
        if not data:
            self.is_dead = True
            raise LMCacheError(
                f"worker {self.plan.lane} ended with {self._process.wait(STOP_SECONDS)} before it had reported",
                "see what it wrote above; was it killed for want of memory?",
                "worker",
            )
        self.heard_at = time.monotonic()
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in lines:
            message = self._decoder.decode(line)
            if isinstance(message, Progress):
                self.progress = message
            elif isinstance(message, Waiting):
                self.is_waiting = True
            elif isinstance(message, Finished):
                self.report = message.report

    @property
    def allowed_silence_seconds(self) -> float:
        """How long one operation can take: each of its messages has a deadline, and each copy on a device."""
        num_messages = 4 + (self.plan.workload.chunks_per_prompt if self.plan.inline else 0)
        extra = DEVICE_SILENCE_SECONDS if self.plan.paged_on is not None else 0.0
        return SILENCE_SECONDS + extra + num_messages * self.plan.timeout_seconds

    def end(self) -> None:
        """Return when the process is gone; one that does not go is killed."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._stdout.close()


class Fleet:
    """All workers of a run. Leaving the `with` block stops them, and leaves none behind.

    Args:
        plans: one for each worker.
        on_progress: told the phase and the workers' mean share of it.
    """

    def __init__(self, plans: Sequence[Plan], on_progress: OnProgress) -> None:
        self._plans = plans
        self._on_progress = on_progress
        self._workers: list[WorkerProcess] = []
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> Fleet:
        try:
            for plan in self._plans:
                self._workers.append(WorkerProcess(plan))
                self._selector.register(self._workers[-1], selectors.EVENT_READ)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def prepare(self) -> bool:
        """Return when all workers are prepared: True, or False when one has given up.

        Raises: UsageError when one cannot do here what it is to do.
        """
        self._pump(lambda worker: worker.is_waiting or worker.report is not None)
        for refusal in refusals(self.reports()):
            if refusal.exit_code == UsageError.exit_code:
                raise UsageError(refusal.message, refusal.hint, refusal.code)
        return all(worker.report is None for worker in self._workers)

    def measure(self) -> None:
        """Let the workers go at the same time; return when all have reported."""
        for worker in self._workers:
            worker.say(b"go")
        self._pump(lambda worker: worker.report is not None)

    def reports(self) -> list[LaneReport]:
        """Return what the workers found out; those that were stopped early have reported too."""
        return [worker.report for worker in self._workers if worker.report is not None]

    def stored_prompts(self) -> Iterator[int]:
        """Yield every prompt that may be in the cache."""
        for worker in self._workers:
            plan, progress = worker.plan, worker.progress
            if plan.reuse:
                first, end = 0, lane_size(plan.num_prompts, plan.lane, plan.num_lanes)
            else:
                first, end = progress.first, progress.claimed
            for number in range(first, end):
                yield lane_item(number, plan.lane, plan.num_lanes)
            for number in range(lane_size(plan.num_fill_prompts, plan.lane, plan.num_lanes)):
                yield fill_prompt(lane_item(number, plan.lane, plan.num_lanes))

    def _pump(self, is_there: Callable[[WorkerProcess], bool]) -> None:
        """Read messages until every worker is where it should be.

        Raises: LMCacheError for a worker that died or fell silent.
        """
        while awaited := [worker for worker in self._workers if not is_there(worker)]:
            for key, _ in self._selector.select(0.5):
                worker = key.fileobj
                assert isinstance(worker, WorkerProcess)
                try:
                    worker.read()
                finally:
                    if worker.report is not None or worker.is_dead:
                        self._selector.unregister(worker)
            for worker in awaited:
                silence = time.monotonic() - worker.heard_at
                if not is_there(worker) and silence > worker.allowed_silence_seconds:
                    raise LMCacheError(f"worker {worker.plan.lane} has said nothing for {silence:.0f} s", code="worker")
            phase = self._workers[0].progress.phase
            shares = [worker.progress.share for worker in self._workers if worker.progress.phase == phase]
            self._on_progress(phase, sum(shares) / len(self._workers))

    def _stop(self) -> None:
        """Ask the workers to report what they have, then end them."""
        for worker in self._workers:
            worker.say(b"stop")
        with contextlib.suppress(LMCacheError):
            self._pump(lambda worker: worker.report is not None or worker.is_dead)
        for worker in self._workers:
            worker.end()
        self._selector.close()


# -- figures ----------------------------------------------------------------------------------------------------------


def _figures(
    settings: BenchSettings,
    plans: Sequence[Plan],
    reports: Sequence[LaneReport],
    at_start: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any] | None,
    removed: int | None,
) -> BenchRun:
    workload, num_prompts = plans[0].workload, plans[0].num_prompts
    run = BenchRun(
        settings=_effective_settings(settings, workload, num_prompts),
        versions=versions(at_start["version"]),
        environment=_environment(at_start),
        is_inline=any(report.is_inline for report in reports),
        device=max(
            (report.device for report in reports if report.device is not None),
            key=lambda device: device.pool_unpinned_bytes,
            default=None,
        ),
        measured_seconds=max((report.measured_seconds for report in reports), default=0.0),
        operation_share=_ratio(
            sum(report.operation_seconds for report in reports), sum(report.measured_seconds for report in reports)
        )
        or 0.0,
        operations={kind: _operation_figures(kind, reports) for kind in OperationKind},
        hit_rate=_hit_rates(reports, has_l2=bool(at_start["l2"])),
        bandwidth=_bandwidths(reports, _l2_bandwidths(reports, before, after)),
        correctness=_total_correctness(reports),
        failures=_total_failures(reports),
        refusal=next(iter(refusals(reports)), None),
        fill=_total_fill(reports),
        evicted_chunks=None,
        missing_explained=False,
        counter_checks={},
        removed_chunks=removed,
        kept=str(KeptSet(workload, num_prompts)) if settings.keep and not _is_gone(reports) else None,
        notes=[],
    )
    _compare_with_server(run, reports, at_start, before, after)
    run.notes += _notes(run, at_start, after)
    return run


def refusals(reports: Sequence[LaneReport]) -> list[Refusal]:
    """Return why workers stopped early."""
    return [report.gave_up for report in reports if report.gave_up is not None]


def _operation_figures(kind: OperationKind, reports: Sequence[LaneReport]) -> OperationFigures:
    seconds = sorted(second for tally in _tallies(kind, reports) for second in tally.seconds)
    rates = [len(report.operations[kind].seconds) / report.operation_seconds for report in reports if report.operation_seconds]
    return OperationFigures(completed=len(seconds), ops_per_second=sum(rates), latency_seconds=latencies(seconds))


def _tallies(kind: OperationKind, reports: Sequence[LaneReport]) -> list[Tally]:
    return [report.operations[kind] for report in reports]


def latencies(ordered: Sequence[float]) -> dict[str, float] | None:
    """Return the distribution of ascending values; None of none."""
    if not ordered:
        return None
    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99_9": 0.999, "max": 1.0}
    return {name: percentile(ordered, share) for name, share in shares.items()}


NO_L2 = "the server has no L2 tier"


def _hit_rates(reports: Sequence[LaneReport], has_l2: bool) -> dict[str, HitRate]:
    lookups, retrieves = _tallies(OperationKind.LOOKUP, reports), _tallies(OperationKind.RETRIEVE, reports)
    asked = sum(t.asked_chunks for t in [*lookups, *retrieves])
    # What a retrieve got of L2 was read from L1 as well, and did not hit there.
    l1_hits = sum(t.l1_chunks for t in lookups) + sum(t.l1_chunks - t.l2_chunks for t in retrieves)
    l2_hits = sum(t.l2_chunks for t in [*lookups, *retrieves])
    return {
        "l1": _hit_rate(l1_hits, asked),
        "l2": _hit_rate(l2_hits, asked - l1_hits) if has_l2 else HitRate(unknown_because=NO_L2),
    }


def _hit_rate(hit_chunks: int, asked_chunks: int) -> HitRate:
    return HitRate(
        ratio=_ratio(hit_chunks, asked_chunks),
        hit_chunks=hit_chunks,
        asked_chunks=asked_chunks,
        unknown_because="" if asked_chunks else "no chunk was asked for",
    )


def _l2_bandwidths(
    reports: Sequence[LaneReport], before: dict[str, Any], after: dict[str, Any] | None
) -> dict[str, BandwidthFigures]:
    """What the server counted of its tiers while the workers measured, by that time: it reads and writes behind them."""
    names = {"l2_read": "read_bytes", "l2_write": "written_bytes"}
    seconds = max((report.measured_seconds for report in reports), default=0.0)
    if not before["l2"]:
        return {name: BandwidthFigures(unknown_because=NO_L2) for name in names}
    if after is None or after["boot"] != before["boot"] or not seconds:
        return {name: BandwidthFigures(unknown_because="the server's counters are not of this run alone") for name in names}
    figures = {}
    for name, counter in names.items():
        moved = sum(tier[counter] for tier in after["l2"]) - sum(tier[counter] for tier in before["l2"])
        figures[name] = BandwidthFigures(
            gb_per_second=moved / seconds / GB if moved else None, unknown_because="" if moved else "no byte was moved"
        )
    return figures


def _bandwidths(reports: Sequence[LaneReport], l2: dict[str, BandwidthFigures]) -> dict[str, BandwidthFigures]:
    return {
        "l1_read": bandwidth_figures(_tallies(OperationKind.RETRIEVE, reports), [report.raw_reads for report in reports]),
        "l1_write": bandwidth_figures(_tallies(OperationKind.STORE, reports), [report.raw_writes for report in reports]),
        **l2,
    }


def bandwidth_figures(tallies: Sequence[Tally], copies: Sequence[CopyTally]) -> BandwidthFigures:
    """Each worker's bytes by its own time, added up: they work side by side."""
    rate = sum(t.num_bytes / sum(t.seconds) / GB for t in tallies if t.num_bytes) or None
    raw = sum(c.num_bytes / c.seconds / GB for c in copies if c.num_bytes) or None
    share = None if rate is None or raw is None else rate / raw
    return BandwidthFigures(
        gb_per_second=rate,
        raw_copy_gb_per_second=raw,
        share_of_raw_copy=share,
        is_suspect=share is not None and share > SUSPECT_ABOVE,
        unknown_because="" if rate is not None else "no byte was copied",
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _total_correctness(reports: Sequence[LaneReport]) -> Correctness:
    parts = [report.correctness for report in reports]
    return Correctness(
        ok=sum(part.ok for part in parts),
        bad=sum(part.bad for part in parts),
        missing=sum(part.missing for part in parts),
        bad_chunks=[chunk for part in parts for chunk in part.bad_chunks],
    )


def _is_gone(reports: Sequence[LaneReport]) -> bool:
    """Whether every worker looked, and none found a chunk."""
    found, failures = _total_correctness(reports), _total_failures(reports)
    return bool(found.missing) and not (found.ok or found.bad or failures.by_code or refusals(reports))


def _total_failures(reports: Sequence[LaneReport]) -> Failures:
    total = Failures()
    for part in (report.failures for report in reports):
        for code, count in part.by_code.items():
            total.by_code[code] = total.by_code.get(code, 0) + count
            total.messages.setdefault(code, part.messages[code])
    return total


def _total_fill(reports: Sequence[LaneReport]) -> FillTally:
    parts = [report.fill for report in reports]
    return FillTally(
        num_chunks=sum(part.num_chunks for part in parts),
        num_bytes=sum(part.num_bytes for part in parts),
        seconds=max((part.seconds for part in parts), default=0.0),
        longest_store_seconds=max((part.longest_store_seconds for part in parts), default=0.0),
    )


# -- the server's side ------------------------------------------------------------------------------------------------


def _rise(before: dict[str, Any], after: dict[str, Any], name: str, label: str = "") -> int:
    """By how much one of the server's counters rose."""

    def value(status: dict[str, Any]) -> int:
        found = status["counters"].get(name, 0)
        return int(found.get(label, 0) if isinstance(found, dict) else found)

    return value(after) - value(before)


def _compare_with_server(
    run: BenchRun,
    reports: Sequence[LaneReport],
    at_start: dict[str, Any],
    before: dict[str, Any],
    after: dict[str, Any] | None,
) -> None:
    """Fill in what the server says about the run, unless its counters began anew or cannot be had."""
    if after is None:
        run.notes.append("the server's counters could not be read at the end: nothing is compared with them")
        return
    if after["boot"] != at_start["boot"]:
        run.notes.append("the server was restarted during the run: nothing is compared with its counters")
        return
    policy = sum(_rise(at_start, after, "evicted_chunks", label) for label in EVICTED_BY_POLICY)
    cleared = _rise(at_start, after, "evicted_chunks", "clear")
    by_others = _rise(at_start, after, "evicted_chunks", "request") - sum(r.removed_chunks for r in reports)
    run.evicted_chunks = policy
    # What a kept set lacks is lost, whatever else happened meanwhile.
    run.missing_explained = policy + cleared + by_others > 0 and run.settings["reuse"] is None
    stores, retrieves, _ = (_tallies(kind, reports) for kind in OperationKind)
    since = at_start if run.settings["verify_only"] else before
    run.counter_checks = {
        "stored_chunks": CounterCheck(workers=sum(t.asked_chunks for t in stores), server=_rise(since, after, "stored_chunks")),
        "retrieved_chunks": CounterCheck(
            workers=sum(t.l1_chunks for t in retrieves), server=_rise(since, after, "retrieved_chunks")
        ),
        "lookup_hit_chunks": CounterCheck(
            # Of lookups that pin, as those before a retrieve do: the server counts no others.
            workers=sum(t.l1_chunks - t.l2_chunks for t in retrieves) * bool(at_start["l2"]),
            server=_rise(since, after, "lookup_chunks", "hit"),
        ),
    }


def _notes(run: BenchRun, at_start: dict[str, Any], after: dict[str, Any] | None) -> list[str]:
    """Return what a reader of the figures must know."""
    notes = []
    capacity = int(at_start["l1"]["capacity_bytes"])
    for name, figures in run.bandwidth.items():
        if figures.is_suspect:
            notes.append(f"suspect: {name} is faster than a raw copy; run longer, on a quieter machine")
    for name, check in run.counter_checks.items():
        if check.server < check.workers:
            notes.append(f"suspect: {name}: the workers counted {check.workers}, the server {check.server}")
        elif check.server > check.workers and not run.failures.by_code:
            notes.append(f"others used the server meanwhile: {name} rose by {check.server - check.workers} more")
    if not run.settings["verify_only"] and run.evicted_chunks == 0 and run.refusal is None:
        notes.append(
            f"nothing was evicted: the working set is {format_bytes(run.settings['working_set_bytes'])},"
            f" L1 holds {format_bytes(capacity)};"
            " use --fill 150% or a larger --working-set to measure a full cache"
        )
    if run.correctness.missing and run.missing_explained:
        notes.append(f"{run.correctness.missing} chunks had been evicted when they were asked for")
    if run.settings["concurrency"] > run.environment["num_cpus"]:
        notes.append(f"more workers than the {run.environment['num_cpus']} CPUs: they also wait for each other")
    if run.device is not None and run.device.pool_unpinned_bytes:
        notes.append(
            f"{format_bytes(run.device.pool_unpinned_bytes)} of the pool could not be pinned, and are copied slower:"
            " see 'ulimit -l' and the container's memory limit"
        )
    if run.is_inline and not run.settings["inline"]:
        notes.append("the pool could not be mapped: all chunks went over the socket")
    if run.removed_chunks is None and not run.settings["keep"]:
        notes.append("what was stored could not all be removed: it goes when L1 needs the room")
    if after is not None and after["problems"]:
        notes.append("the server is not healthy: " + "; ".join(after["problems"]))
    return notes


def _effective_settings(settings: BenchSettings, workload: Workload, num_prompts: int) -> dict[str, Any]:
    """Return every setting as it took effect."""
    effective: dict[str, Any] = msgspec.to_builtins(settings)
    effective.update(
        seed=workload.seed,
        salt=workload.salt,
        chunk_bytes=workload.chunk_bytes,
        chunks_per_prompt=workload.chunks_per_prompt,
        working_set_bytes=num_prompts * workload.prompt_bytes,
        working_set_prompts=num_prompts,
        reuse=str(settings.reuse) if settings.reuse is not None else None,
        device=effective.pop("paged_on") or "cpu",
    )
    return effective


def versions(server: str | None) -> dict[str, Any]:
    """Return both sides' versions, and of the libraries that the figures depend on."""
    return {
        "client": lmcache.__version__,
        "server": server,
        "protocol": PROTOCOL_VERSION,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("msgspec", "pyzmq", "xxhash")},
    }


def _environment(status: dict[str, Any]) -> dict[str, Any]:
    """Return the machine, and the server's pool and configuration."""
    l1 = status["l1"]
    return {
        **machine(),
        "l1_capacity_bytes": l1["capacity_bytes"],
        "l1_used_bytes_at_start": l1["used_bytes"],
        "eviction_policy": l1["eviction_policy"],
        "pool_path": l1["pool_path"],
        "server_config": server_config(status.get("config", {})),
    }


def machine() -> dict[str, Any]:
    """Return what this machine is."""
    return {"platform": platform.platform(), "cpu": _cpu_model(), "num_cpus": len(os.sched_getaffinity(0))}


def server_config(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the value of each of the server's settings."""
    return {name: entry.get("value") for name, entry in config.items()}


def _cpu_model() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
