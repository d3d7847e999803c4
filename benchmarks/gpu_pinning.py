"""What does it cost the requests of a running engine that a large pool is pinned for its GPU?

A vLLM with our connector runs without a cache server. While it answers one long request a server is started, whose pool the
engine then maps and pins in the background. Inter-token latency before, meanwhile and after: it grows with the context, so
meanwhile it should be at most 3 % above the mean of before and after; meanwhile the server makes the pool's memory resident,
and once it has the engine only pins. How long it takes until the server has made the pool resident, and until the engine has
pinned it. Then the server ends, and the engine lets go of that pool: latency meanwhile. When its memory is free again the
server is started once more while short prompts are asked for, one after the other: TTFT without a server, while the pool is
pinned, and afterwards, each beside that of a plain vLLM on the same GPU, the two taking turns, as the host may change its
speed (wanted: not delayed meanwhile). Last, with the engines gone, this process pins a pool of --alone-gib that is resident
already (wanted: 64 GiB in 5 s). Needs as much shared memory as these say. Run, with vLLM's flags behind `--`:
python benchmarks/gpu_pinning.py --model DIR [--l1-gib 32] [--alone-gib 64] -- [VLLM FLAGS]
"""

from __future__ import annotations

import http.client
import itertools
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import torch
from common import free_port, percentile, report, server, wait_resident
from engines import REQUEST_SECONDS, Engine, end_on_sigterm, make_prompt, stream, transfer_flags
from gpu_engine import engine_env, make_parser, start_both
from pins import GIB, pinned_pool

from lmcache.client.kvcache import KVCacheClient
from lmcache.client.mq import MessageQueueClient
from lmcache.pool import NAME_PREFIX
from lmcache.protocol import PinReport, Status

OUTPUT_TOKENS = 24_000
PROMPT_TOKENS = 512
BASELINE_SECONDS = 3.0
PINNING_SECONDS = 150.0
LET_GO_SECONDS, LET_GO_SECONDS_PER_GIB = 20.0, 3.0
POLL_SECONDS = 0.02
AFTER_REQUESTS = 60


def note_tokens(port: int, path: Path) -> None:
    """Ask for one long answer and write down when each of its tokens came."""
    prompt = make_prompt(("clock", time.time()), PROMPT_TOKENS)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_SECONDS)
    with path.open("w", buffering=1) as file:
        stream(connection, prompt, OUTPUT_TOKENS, on_token=lambda: print(time.monotonic(), file=file))


class TokenClock:
    """One long streamed answer, and when each of its tokens came; in a process of its own, which nothing else holds up."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._path = path
        self._process = multiprocessing.get_context("spawn").Process(target=note_tokens, args=(engine.port, path), daemon=True)
        self._process.start()

    @property
    def times(self) -> list[float]:
        """When the tokens came that are there by now."""
        lines = self._path.read_text().splitlines(keepends=True) if self._path.exists() else []
        return [float(line) for line in lines if line.endswith("\n")]

    @property
    def is_running(self) -> bool:
        """Whether more tokens are to come."""
        return self._process.is_alive()

    def hang_up(self) -> None:
        """Want no more of the answer."""
        self._process.kill()
        self._process.join(REQUEST_SECONDS)

    def latencies_ms(self, start: float, end: float) -> dict[str, float]:
        """Return what is to be said of the gaps before tokens that came in [start, end)."""
        times = self.times
        pairs = [pair for pair in itertools.pairwise(times) if start <= pair[1] < end]
        gaps = [(after - before) * 1e3 for before, after in pairs]
        if not gaps:
            return {"tokens": 0}
        slowest_at = max(pairs, key=lambda pair: pair[1] - pair[0])[1]
        figures = {
            "mean": statistics.fmean(gaps),
            "median": statistics.median(gaps),
            "p99": percentile(gaps, 0.99),
            "max": max(gaps),
            "max_after_seconds": slowest_at - start,
        }
        return {"tokens": len(gaps), **{name: round(value, 3) for name, value in figures.items()}}


class Pinning:
    """A server that is started now, and how far an engine has come with pinning its pool."""

    def __init__(self, mq: MessageQueueClient, started_at: float) -> None:
        self.started_at = started_at
        self.began_at = self.resident_at = self.ended_at = 0.0
        self.report = PinReport()
        self._mq = mq

    def is_over(self) -> bool:
        """Ask the server, which the engine tells with each heartbeat; note when it began and when it ended."""
        status = self._mq.call(Status()).status
        clients: list[dict[str, Any]] = status["clients"]
        pins = next((client["gpu_pins"] for client in clients if client["gpu_pins"]), None)
        now = time.monotonic()
        if status["l1"]["resident_bytes"] == status["l1"]["capacity_bytes"]:
            self.resident_at = self.resident_at or now
        if pins is not None:
            self.began_at = self.began_at or now
            self.report = msgspec.convert(pins, PinReport)
            if self.report.is_done:
                self.ended_at = now
        return bool(self.ended_at) or now - self.started_at > PINNING_SECONDS

    def figures(self) -> dict[str, Any]:
        """Return how it went, in seconds after the server was started."""
        return {
            "seconds_until_seen": round(self.began_at - self.started_at, 2) if self.began_at else None,
            "seconds_until_resident": round(self.resident_at - self.started_at, 2) if self.resident_at else None,
            "seconds_until_done": round(self.ended_at - self.started_at, 2) if self.ended_at else None,
            "pinned_gib": round(self.report.pinned_bytes / GIB, 2),
            "failed_gib": round(self.report.unpinned_bytes / GIB, 2),
        }

    @property
    def end(self) -> float:
        """When it was over, or given up."""
        return self.ended_at or time.monotonic()


@contextmanager
def pinning(port: int, l1_gib: float) -> Iterator[Pinning]:
    """Start a server; the engine finds it within a heartbeat."""
    started_at = time.monotonic()
    with server("--l1-size-gb", str(l1_gib), port=port) as (url, _), MessageQueueClient(url) as mq:
        yield Pinning(mq, started_at)


def measure_latency(engine: Engine, port: int, l1_gib: float, folder: Path) -> dict[str, Any]:
    """Inter-token latency before, while and after the pool is made and pinned."""
    clock = TokenClock(engine, folder / "tokens")
    while not (times := clock.times):
        assert clock.is_running, "no answer"
        time.sleep(POLL_SECONDS)
    began_at, available = times[0], psutil.virtual_memory().available
    time.sleep(BASELINE_SECONDS)
    with pinning(port, l1_gib) as pool:
        while not pool.is_over():
            time.sleep(POLL_SECONDS)
        ended_at = pool.end
        time.sleep(BASELINE_SECONDS)
    let_go_at = time.monotonic()
    wait_until_let_go(engine, available, LET_GO_SECONDS + LET_GO_SECONDS_PER_GIB * l1_gib)
    has_outlasted, over_at = clock.is_running, time.monotonic()
    clock.hang_up()
    figures: dict[str, Any] = {
        "before": clock.latencies_ms(began_at, pool.started_at),
        "meanwhile": clock.latencies_ms(pool.started_at, ended_at),
        "meanwhile_until_resident": clock.latencies_ms(pool.started_at, pool.resident_at or ended_at),
        "meanwhile_once_resident": clock.latencies_ms(pool.resident_at or ended_at, ended_at),
        "after": clock.latencies_ms(ended_at, let_go_at),
        "while_letting_go": clock.latencies_ms(let_go_at, over_at),
        "pinning": pool.figures(),
        "seconds_until_let_go": round(over_at - let_go_at, 2),
        "answer_outlasted_it": has_outlasted,
    }
    if figures["after"]["tokens"]:
        for name in ("mean", "median"):
            beside = figures["before"][name] + figures["after"][name]
            figures[f"{name}_ratio"] = round(2 * figures["meanwhile"][name] / beside, 4)
    print(f"inter-token latency: {figures}", flush=True)
    return figures


def wait_until_let_go(engine: Engine, available: int, seconds: float) -> None:
    """Return when the engine has unmapped the pool of the server that has ended and its memory is free: two may not fit."""
    deadline = time.monotonic() + seconds
    while (
        any(NAME_PREFIX in path for member in engine.members() for path in mapped_paths(member.pid))
        or psutil.virtual_memory().available < 0.98 * available
    ):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the engine still has the pool of a server that ended {seconds:g} s ago")
        time.sleep(0.2)  # each look holds the engine up for a moment


def mapped_paths(pid: int) -> list[str]:
    """Return what a process has mapped; nothing once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []
    return [line.split(maxsplit=5)[5] for line in lines if line.count("/")]


def measure_first_tokens(ours: Engine, plain: Engine, port: int, l1_gib: float) -> dict[str, Any]:
    """TTFT of short prompts: no server, a pool that is made and pinned, one that is. With a server ours stores each."""
    stages = ("without", "meanwhile", "after")
    taken: dict[str, dict[str, list[float]]] = {stage: {"ours": [], "plain": []} for stage in stages}

    def ask(stage: str) -> None:
        values = taken[stage]
        prompt = make_prompt((stage, len(values["ours"]), time.time()), PROMPT_TOKENS)
        for engine in (ours, plain):
            values[engine.name].append(engine.ask(prompt, 2).ttft_ms)

    for _ in range(20):
        ask("without")
    with pinning(port, l1_gib) as pool:
        while not pool.is_over():
            ask("meanwhile")
        while pool.ended_at and len(taken["after"]["ours"]) < AFTER_REQUESTS:
            ask("after")
    figures: dict[str, Any] = {stage: compared(**values) for stage, values in taken.items() if values["ours"]}
    figures["pinning"] = pool.figures()
    print(f"TTFT: {figures}", flush=True)
    return figures


def compared(ours: list[float], plain: list[float]) -> dict[str, float]:
    """Return what is to be said of requests that two engines answered in turns."""
    ratios = [one / other for one, other in zip(ours, plain, strict=True)]
    figures = {
        "requests": len(ours),
        "median": statistics.median(ours),
        "plain_median": statistics.median(plain),
        "ratio": statistics.median(ratios),
        "max": max(ours),
        "plain_max": max(plain),
    }
    return {name: round(value, 3) for name, value in figures.items()}


def pin_alone(gib: float) -> dict[str, float]:
    """Pin a pool that is resident, with nothing else to do."""
    with server("--l1-size-gb", str(gib)) as (url, pid), KVCacheClient(url, timeout_seconds=30) as client:
        wait_resident(pid, int(gib * GIB))
        with pinned_pool(client) as (pinner, seconds):
            figures = {"pinned_gib": round(pinner.pinned_bytes / GIB, 2), "seconds": round(seconds, 2)}
    print(f"alone: {figures}", flush=True)
    return figures


def main() -> None:
    """Print the figures and the JSON line."""
    parser = make_parser(__doc__, l1_gib=32.0)
    parser.add_argument("--alone-gib", type=float, default=64.0)
    args = parser.parse_args()
    end_on_sigterm()
    with ExitStack() as stack:
        folder = args.log_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        flags = ["--max-model-len", "32768", "--no-enforce-eager", *args.vllm_flags]
        ours, plain = (
            Engine(name, args.model, folder, [*flags, *more], engine_env(name, folder))
            for name, more in (("ours", transfer_flags(f"tcp://127.0.0.1:{port}")), ("plain", []))
        )
        start_both(ours, plain, stack)
        latency = measure_latency(ours, port, args.l1_gib, folder)
        first_tokens = measure_first_tokens(ours, plain, port, args.l1_gib)
    has_gpu = torch.cuda.is_available()
    alone = pin_alone(args.alone_gib) if has_gpu else {}
    device = torch.cuda.get_device_name() if has_gpu else "none"
    report("gpu_pinning", device=device, l1_gib=args.l1_gib, inter_token_ms=latency, ttft_ms=first_tokens, alone=alone)


if __name__ == "__main__":
    main()
