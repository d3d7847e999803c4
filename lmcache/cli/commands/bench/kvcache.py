"""`lmcache bench kvcache`: flags in, a box of figures out; the measuring is `measure.run_benches`."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import signal
import sys
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import msgspec

from lmcache.cli.base import byte_size, connect, duration_seconds, kvcache_url, positive_int, positive_seconds, share
from lmcache.cli.commands.bench.measure import MAX_CONCURRENCY, BenchRun, BenchSettings, run_benches
from lmcache.cli.commands.bench.messages import Correctness, DeviceReport
from lmcache.cli.commands.bench.worker import PIN
from lmcache.cli.commands.bench.workload import KeptSet, OperationKind
from lmcache.cli.output import Result, error_object, format_bytes, format_ratio, report
from lmcache.cli.paged import PinNotice, kv_layout
from lmcache.errors import LMCacheError, UsageError
from lmcache.numerals import plain_number

DEFAULTS = BenchSettings()
MAX_SEED = (1 << 63) - 1
MAX_FILL_RATIO = 100.0
TERMINATED = 128 + signal.SIGTERM
BAR_WIDTH = 30
TEXT_WIDTH = 78
FIGURES = ("operations", "hit_rate", "bandwidth", "measured_seconds", "operation_share")
VERIFY_ONLY_EXCLUDES = ("duration", "operations", "mix", "warmup", "fill")
REUSE_EXCLUDES = ("chunk_bytes", "chunks_per_prompt", "working_set", "seed")


# -- flags ------------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags; their defaults are those of `BenchSettings`, and None here, so that a conflict can be seen."""
    _add_work(parser)
    _add_sizes(parser)
    _add_checking(parser)


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to do")
    group.add_argument(
        "--duration",
        type=positive_seconds,
        metavar="SECONDS",
        help=f"measure for so long (default: {DEFAULTS.duration_seconds:g}, or until --operations are done)",
    )
    group.add_argument("--operations", type=positive_int, metavar="N", help="end after N operations of all workers together")
    group.add_argument(
        "--warmup",
        type=duration_seconds,
        metavar="SECONDS",
        help=f"work for so long before measuring (default: {DEFAULTS.warmup_seconds:g})",
    )
    group.add_argument(
        "--concurrency",
        type=worker_counts,
        default=[DEFAULTS.concurrency],
        metavar="N[,N...]",
        help="worker processes, each a client of its own as an engine's worker is; 1 shows what one client gets, "
        f"several numbers are measured one after the other (default: {DEFAULTS.concurrency})",
    )
    group.add_argument(
        "--mix",
        type=operation_mix,
        metavar="KIND=WEIGHT,...",
        help=f"how often each operation comes (default: {_mix_text(DEFAULTS.mix)})",
    )
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the chunks are: in host memory, or in a GPU's as an engine's paged KV, copied as an engine does; needs "
        "PyTorch and the server's pool mapped (default: cpu)",
    )
    group.add_argument("--inline", action="store_true", help="send chunks over the socket even where the pool can be mapped")


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sizes")
    group.add_argument(
        "--chunk-bytes",
        type=chunk_sizes,
        metavar="SIZE[,SIZE...]",
        help="bytes of a chunk, such as 1MiB; several are measured one after the other "
        f"(default: {format_bytes(DEFAULTS.chunk_bytes)})",
    )
    group.add_argument(
        "--chunks-per-prompt",
        type=positive_int,
        metavar="N",
        help=f"chunks that one operation moves (default: {DEFAULTS.chunks_per_prompt})",
    )
    group.add_argument(
        "--working-set",
        type=byte_size,
        metavar="SIZE",
        help="bytes kept in the cache by all workers together; may exceed L1, and then evicts what is there "
        "(default: half of what is free in L1, at most 1 GiB)",
    )
    group.add_argument(
        "--fill",
        type=fill_ratio,
        metavar="PERCENT",
        help="store so much of L1's capacity before measuring, such as 150%%: evicts what is there",
    )
    group.add_argument(
        "--seed",
        type=seed_number,
        metavar="N",
        help="decides contents and the order of operations (default: another one each time, and reported)",
    )


def _add_checking(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checking")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--verify-only",
        action="store_true",
        help="store the working set once, read all of it once from another worker, check every byte; no figures",
    )
    either.add_argument("--no-verify", action="store_true", help="do not check contents: pure throughput")
    group.add_argument(
        "--keep",
        action=argparse.BooleanOptionalAction,
        help="with --verify-only: leave the chunks in the cache and print what --reuse takes (default with --reuse)",
    )
    group.add_argument(
        "--reuse",
        type=str,
        metavar="KEPT",
        help="with --verify-only: check the chunks that a run with --keep left, for example before a restart",
    )


def chunk_sizes(text: str) -> list[int]:
    """Parse `64KiB,1MiB`."""
    return [byte_size(part) for part in text.split(",")]


def worker_counts(text: str) -> list[int]:
    """Parse `1,2,4`."""
    counts = [positive_int(part) for part in text.split(",")]
    if max(counts) > MAX_CONCURRENCY:
        raise argparse.ArgumentTypeError(f"{max(counts)} workers are more than {MAX_CONCURRENCY}")
    return counts


def fill_ratio(text: str) -> float:
    """Parse `150%` or `1.5`."""
    try:
        ratio = share(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share of L1 such as 150%") from None
    if not 0 < ratio <= MAX_FILL_RATIO:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most {MAX_FILL_RATIO * 100:g}%")
    return ratio


def seed_number(text: str) -> int:
    """Parse a number from 0 to 2**63 - 1."""
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {MAX_SEED}")
    return int(text)


def operation_mix(text: str) -> dict[OperationKind, float]:
    """Parse `store=1,retrieve=3,lookup=6`; kinds that are not named do not occur."""
    mix: dict[OperationKind, float] = {}
    for part in text.split(","):
        name, _, weight_text = part.partition("=")
        try:
            kind, weight = OperationKind(name.strip()), plain_number(float, weight_text)
        except ValueError:
            known = ", ".join(OperationKind)
            raise argparse.ArgumentTypeError(f"{part!r} is not KIND=WEIGHT; kinds: {known}") from None
        if kind in mix or not 0 <= weight <= 1e6:
            raise argparse.ArgumentTypeError(f"{part!r}: each kind once, weights from 0 to a million")
        mix[kind] = weight
    if not sum(mix.values()) > 0:
        raise argparse.ArgumentTypeError(f"{text!r} has no weight above 0")
    return mix


def _mix_text(mix: dict[OperationKind, float]) -> str:
    return ",".join(f"{kind.value}={weight:g}" for kind, weight in mix.items())


def settings_from_args(args: Namespace) -> list[BenchSettings]:
    """Return the settings of each run, one for each chunk size and number of workers.

    Raises: UsageError for flags that contradict each other.
    """
    _check_conflicts(args)
    kept = KeptSet.parse(args.reuse) if args.reuse is not None else None
    has_end = args.duration is not None or args.operations is not None
    given = {
        "chunks_per_prompt": args.chunks_per_prompt,
        "working_set_bytes": args.working_set,
        "fill_ratio": args.fill,
        "mix": args.mix,
        "warmup_seconds": args.warmup,
    }
    sizes = args.chunk_bytes or [DEFAULTS.chunk_bytes]
    if args.device == "cuda":
        for size in sizes if kept is None else [kept.workload.chunk_bytes]:
            kv_layout(size)
    common = BenchSettings(
        **{name: value for name, value in given.items() if value is not None},
        duration_seconds=args.duration if has_end else DEFAULTS.duration_seconds,
        max_operations=args.operations,
        seed=secrets.randbits(32) if args.seed is None else args.seed,
        paged_on=args.device if args.device != "cpu" else None,
        inline=args.inline,
        check=not args.no_verify,
        verify_only=args.verify_only,
        keep=kept is not None if args.keep is None else args.keep,
        reuse=kept,
        timeout_seconds=args.timeout,
    )
    return [
        msgspec.structs.replace(common, chunk_bytes=size, concurrency=concurrency)
        for size in sizes
        for concurrency in args.concurrency
    ]


def _check_conflicts(args: Namespace) -> None:
    if args.device == "cuda" and args.inline:
        raise UsageError(
            "--device cuda copies between the GPU and the mapped pool, --inline goes over the socket",
            "drop --inline, or use --device cpu",
        )
    if args.verify_only:
        _refuse(args, VERIFY_ONLY_EXCLUDES, "--verify-only does a fixed amount of work and measures nothing")
    elif args.keep or args.reuse is not None:
        raise UsageError("--keep and --reuse are for checking", "add --verify-only")
    if args.reuse is not None:
        _refuse(args, REUSE_EXCLUDES, "--reuse says what the kept chunks are")


def _refuse(args: Namespace, names: tuple[str, ...], reason: str) -> None:
    for name in names:
        if getattr(args, name) is not None:
            raise UsageError(reason, f"drop --{name.replace('_', '-')}")


# -- running ----------------------------------------------------------------------------------------------------------


def run(args: Namespace) -> int:
    """Measure, one run after the other, and report."""
    all_settings = settings_from_args(args)
    with connect(kvcache_url(args), args.timeout) as client:
        url = client.url
    with _sigterm_as_exit(), ProgressBar(is_shown=sys.stderr.isatty(), is_quiet=args.quiet) as bar:
        runs, ended_by = run_benches(url, all_settings, bar.show)
    return report(bench_result(runs, url, ended_by), args)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: what was stored is removed."""

    def leave(*_: object) -> None:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class ProgressBar:
    """One line on a terminal's stderr that is gone at the end; elsewhere only what takes unexpectedly long is told."""

    def __init__(self, is_shown: bool, is_quiet: bool) -> None:
        self._is_shown = is_shown and not is_quiet
        self._notice = None if is_shown or is_quiet else PinNotice()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_: object) -> None:
        self._write("")

    def show(self, phase: str, share: float) -> None:
        """Draw the phase's name and how much of it is done."""
        if phase == PIN and self._notice is not None:
            self._notice.show(share)
        done = "#" * round(share * BAR_WIDTH)
        self._write(f"{phase:8} [{done:{BAR_WIDTH}}] {share * 100:3.0f}%")

    def _write(self, text: str) -> None:
        if self._is_shown:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# -- report -----------------------------------------------------------------------------------------------------------


def bench_result(runs: list[BenchRun], url: str, ended_by: LMCacheError | None = None) -> Result:
    """Return the report of all runs; the first that is not good decides the exit code, then what ended the one after them."""
    result = Result(f"Bench KV Cache Result ({_how_long(runs[-1])})", width=48)
    result.put("url", url)
    result.put("runs", [_document(run) for run in runs])
    result.put("ended_by", None if ended_by is None else error_object(ended_by))
    for run in runs:
        size, concurrency = run.settings["chunk_bytes"], run.settings["concurrency"]
        prefix = f"{format_bytes(size)} x {concurrency}: " if len(runs) > 1 else ""
        if not run.settings["verify_only"]:
            _add_figures(result, run, prefix)
        _add_correctness(result, run, prefix)
        _add_settings(result, run, prefix)
    if ended_by is not None:
        result.section("Ended early")
        _add_lines(result, f"after run {len(runs)}: {ended_by.message}")
    result.error = next((problem for run in runs if (problem := run.problem()) is not None), ended_by)
    return result


def _document(run: BenchRun) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(run)
    if run.settings["verify_only"]:
        for name in FIGURES:
            del document[name]
    return document


def _how_long(run: BenchRun) -> str:
    if run.settings["verify_only"]:
        return "verify only"
    if run.refusal is None and run.settings["max_operations"] is None:
        return f"{run.settings['duration_seconds']:g}s"
    return f"{run.measured_seconds:.1f}s"


def _add_figures(result: Result, run: BenchRun, prefix: str) -> None:
    result.section(f"{prefix}Operations (ops/s)")
    for kind, figures in run.operations.items():
        rate = figures.ops_per_second if run.settings["mix"].get(kind) else None
        _add_known(result, kind.value.capitalize(), rate, "{:.1f}", "not in the mix")
    result.section(f"{prefix}Hit Rate")
    for tier, hits in run.hit_rate.items():
        _add_known(result, tier.upper(), hits.ratio, "{:.1%}", hits.unknown_because)
    result.section(f"{prefix}Bandwidth (GB/s)")
    for name, bandwidth in run.bandwidth.items():
        mark = "{:.2f} (suspect)" if bandwidth.is_suspect else "{:.2f}"
        _add_known(result, _bandwidth_label(name), bandwidth.gb_per_second, mark, bandwidth.unknown_because)
    shares = {name: bandwidth for name, bandwidth in run.bandwidth.items() if bandwidth.share_of_raw_copy is not None}
    if shares:
        result.section(f"{prefix}Share of a raw copy" if run.device is None else f"{prefix}Share of a raw pinned copy")
    for name, bandwidth in shares.items():
        text = f"{bandwidth.share_of_raw_copy:.1%} of {bandwidth.raw_copy_gb_per_second:.2f} GB/s"
        result.row(_bandwidth_label(name), text)
    result.section(f"{prefix}Latency p50/p90/p99/p99.9 (ms)")
    for kind, figures in run.operations.items():
        if figures.latency_seconds is not None:
            milliseconds = [figures.latency_seconds[name] * 1000 for name in ("p50", "p90", "p99", "p99_9")]
            result.row(kind.value.capitalize(), " / ".join(f"{value:.2f}" for value in milliseconds))


def _bandwidth_label(name: str) -> str:
    tier, _, direction = name.partition("_")
    return f"{tier.upper()} {direction}"


def _add_known(result: Result, label: str, value: float | None, template: str, reason: str) -> None:
    if value is None:
        result.unknown(label, reason)
    else:
        result.row(label, template.format(value))


def _add_correctness(result: Result, run: BenchRun, prefix: str) -> None:
    correct = run.correctness
    result.section(f"{prefix}Correctness")
    if run.settings["check"]:
        result.row("Checksums", _checksums_text(correct))
    else:
        result.unknown("Checksums", "--no-verify")
    if correct.missing:
        result.row("Missing chunks", correct.missing)
    result.row("Failed operations", sum(run.failures.by_code.values()))
    for chunk in correct.bad_chunks:
        _add_lines(result, f"bad: {chunk}")
    for code, message in run.failures.messages.items():
        _add_lines(result, f"failed: {run.failures.by_code[code]} x {code}: {message}")


def _checksums_text(correct: Correctness) -> str:
    total = correct.ok + correct.bad
    if not total:
        return "n/a (no chunk was read)"
    return f"{correct.ok}/{total} " + ("OK" if not correct.bad else f"OK, {correct.bad} BAD")


def _add_settings(result: Result, run: BenchRun, prefix: str) -> None:
    settings, fill = run.settings, run.fill
    result.section(f"{prefix}Run")
    result.row("Chunks", f"{settings['chunks_per_prompt']} x {format_bytes(settings['chunk_bytes'])} a prompt")
    result.row("Working set", format_bytes(settings["working_set_bytes"]))
    result.row("Workers", f"{settings['concurrency']}, {'inline' if run.is_inline else 'mapped pool'}")
    result.row("Seed", settings["seed"])
    if run.device is not None:
        _add_device(result, run.device)
    if not settings["verify_only"]:
        result.row("Time in operations", f"{format_ratio(run.operation_share)} of {run.measured_seconds:.2f} s")
    if fill.num_chunks:
        result.row("Fill", f"{format_bytes(fill.num_bytes)} in {fill.seconds:.2f} s")
        result.row("Longest store of the fill (ms)", f"{fill.longest_store_seconds * 1000:.1f}")
    if run.evicted_chunks is not None:
        result.row("Evicted chunks", run.evicted_chunks)
    result.row("Version", f"{run.versions['client']}, server {run.versions['server']}")
    for note in run.notes:
        _add_lines(result, f"note: {note}")
    if run.kept is not None:
        result.line("kept; to check it again:")
        result.line(f"lmcache bench kvcache --verify-only --reuse {run.kept}", indent=2)


def _add_device(result: Result, device: DeviceReport) -> None:
    result.row("Device", device.name)
    blocks = f"{device.num_layers} layers x {device.blocks_per_chunk} x {format_bytes(device.block_bytes)}"
    result.row("Blocks of a chunk", blocks)
    result.row("Pool pinned", format_bytes(device.pool_pinned_bytes))
    result.row("Pool not pinned", format_bytes(device.pool_unpinned_bytes))
    result.row("Device memory a worker", f"{format_bytes(device.kv_bytes)} KV, {format_bytes(device.staging_bytes)} staging")


def _add_lines(result: Result, text: str) -> None:
    for line in textwrap.wrap(text, TEXT_WIDTH, subsequent_indent="  "):
        result.line(line)
