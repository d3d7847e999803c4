"""Does the GPU path hold, and what are its figures? All checks and benchmarks of it, in one command.

Faults around a real vLLM (`tests/chaos_vllm`), two tensor parallel ranks where there are two GPUs, eight simulated engines that
go on for a while, and the copies under compute-sanitizer go first and side by side, as nothing in them is timed. Then come
`pytest -m gpu` and the benchmarks, one by one, each with its own floor. A part that takes longer than it may is ended. All that
it printed, and what its vLLM logged, is in the folder `--out`.
The JSON line at the end has of each part its exit status (null: ended at its deadline), its seconds and its own JSON line.
Takes about 23 minutes where nothing has been compiled yet. Run, with vLLM's flags for the model behind `--`:
python benchmarks/gpu_all.py --model DIR --out DIR [--parts chaos engine ...] [--chaos-seconds 60] -- [VLLM FLAGS]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from common import report
from engines import REPOSITORY, end_on_sigterm, python_path

POLL_SECONDS = 0.2
# A vLLM that is asked to end takes some of it.
END_SECONDS = 90.0
# Small models beside each other: chaos has the first GPU, and the ranks share it with the second.
ONE_VLLM_FLAGS = "--gpu-memory-utilization 0.3 --kv-cache-memory-bytes 1073741824"
RANKS_VLLM_FLAGS = "--gpu-memory-utilization 0.1 --kv-cache-memory-bytes 1073741824 --disable-custom-all-reduce"

# The tests of copies that a checker slows down to minutes, not to hours. Under initcheck a launch waits for the one before it,
# so no store is handed over ahead of its step; under memcheck loads are handed over too late to hold anything back.
SANITIZED = {
    "memcheck": "cancelled or producer or read_them or mix or reference",
    "initcheck": "cancelled or producer or mix or reference",
}


@dataclass(frozen=True)
class Part:
    """One command, and how long it may take; `may_share`: it may run beside others; `tool`: what must be installed."""

    name: str
    command: Sequence[str]
    max_seconds: float
    may_share: bool = False
    min_gpus: int = 1
    tool: str = ""
    env: dict[str, str] = field(default_factory=dict)


def sanitizer(tool: str, command: Sequence[str]) -> Part:
    """Return a run of NVIDIA's checker of memory accesses; without PyTorch's cache each tensor is an allocation of its own."""
    checker = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(tool, [*checker, *command], 300, may_share=True, env=env, tool=checker[0])


def parts_of(args: argparse.Namespace) -> list[Part]:
    """Return all parts, as they are asked for."""

    def pytest(*more: str) -> list[str]:
        return [sys.executable, "-m", "pytest", "-q", "-W", "ignore", *more]  # vLLM and its libraries warn of much

    def benchmark(name: str, *more: str) -> list[str]:
        return [sys.executable, str(REPOSITORY / "benchmarks" / f"{name}.py"), *more]

    soak = ["--soak-seconds", str(args.soak_seconds)]
    chaos = ["--chaos-seconds", str(args.chaos_seconds), "--chaos-clients", str(args.chaos_clients)]
    pinning = ["--model", str(args.model), "--", *args.vllm_flags]
    engine = ["--model", str(args.model), "--l1-gib", str(args.l1_gib), "--", *args.vllm_flags]
    return [
        Part(
            "chaos",
            pytest("-s", "tests/chaos_vllm", *chaos),
            300 + 2 * args.chaos_seconds,
            may_share=True,
            env={"LMCACHE_TEST_VLLM_FLAGS": ONE_VLLM_FLAGS},
        ),
        Part(
            "ranks",
            pytest("tests/integration/test_ranks_vllm.py"),
            300,
            may_share=True,
            min_gpus=2,
            env={"LMCACHE_TEST_VLLM_FLAGS": RANKS_VLLM_FLAGS, "VLLM_ALLREDUCE_USE_SYMM_MEM": "0"},
        ),
        Part("soak", pytest("-s", "tests/integration/test_soak.py", *soak), 200 + args.soak_seconds, may_share=True),
        *(sanitizer(tool, pytest("tests/transfer/test_cuda.py", "-k", tests)) for tool, tests in SANITIZED.items()),
        # Some fill the GPU.
        Part("tests", pytest("-m", "gpu"), 500, env={"LMCACHE_TEST_VLLM_FLAGS": ONE_VLLM_FLAGS}),
        Part("copy", benchmark("gpu_copy"), 200),
        Part("lanes", benchmark("gpu_lanes"), 120, min_gpus=2),
        Part("engine", benchmark("gpu_engine", *engine), 600),
        Part("storing", benchmark("gpu_storing", *engine), 400),
        Part("timeline", benchmark("gpu_timeline", *engine), 400),
        Part("pinning", benchmark("gpu_pinning", *pinning), 500),
    ]


class Running:
    """A part that has been started; at the end of `with` nothing of it is left."""

    def __init__(self, part: Part, out: Path) -> None:
        self.part = part
        self._out = out
        self._log_path = out / f"{part.name}.log"
        self._scratch = tempfile.TemporaryDirectory(prefix="gpu-all-", ignore_cleanup_errors=True)
        self._started_at = time.monotonic()
        with self._log_path.open("w") as log:
            self._process = subprocess.Popen(
                part.command,
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONPATH": python_path(REPOSITORY), "TMPDIR": self._scratch.name, **part.env},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it, if it runs, and keep what its children logged."""
        self._end()
        for found in Path(self._scratch.name).rglob("*.log"):
            shutil.copy(found, self._out / f"{self.part.name}-{found.name}")
        self._scratch.cleanup()

    def is_over(self) -> bool:
        """Whether it has ended, or should have."""
        return self._process.poll() is not None or time.monotonic() - self._started_at > self.part.max_seconds

    def outcome(self) -> dict[str, Any]:
        """Return what the closing line says of it."""
        status, seconds = self._process.poll(), time.monotonic() - self._started_at
        how = "ended at its deadline" if status is None else f"exit status {status}"
        print(f"{self.part.name}: {how} after {seconds:.0f} s", flush=True)
        return {"status": status, "seconds": round(seconds, 1), "result": _last_json(self._log_path)}

    def _end(self) -> None:
        """Interrupt it, so that it ends what it has started, and kill in the end what is left."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid).children(recursive=True)
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_SECONDS)
                self._process.kill()
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        self._process.wait()


def run_beside_each_other(parts: Sequence[Part], out: Path) -> dict[str, Any]:
    """Run parts at the same time and return what is to be said of each, in their order."""
    results: dict[str, Any] = {part.name: None for part in parts}
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(Running(part, out)) for part in parts]
        while running:
            for one in [one for one in running if one.is_over()]:
                running.remove(one)
                results[one.part.name] = one.outcome()
                one.close()
            time.sleep(POLL_SECONDS)
    return results


def run_all(parts: Sequence[Part], out: Path) -> dict[str, Any]:
    """Run the parts that may share the GPU side by side, then the others one by one."""
    results = run_beside_each_other([part for part in parts if part.may_share], out)
    for part in parts:
        if not part.may_share:
            results |= run_beside_each_other([part], out)
    return results


def _last_json(log_path: Path) -> Any:
    """Return the last line that is JSON, as a benchmark ends with; None where there is none."""
    found = None
    for line in log_path.read_text(errors="replace").splitlines():
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
    return found


def parse_args() -> argparse.Namespace:
    """Return the command line, `parts` being those asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs")
    parser.add_argument("--parts", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--l1-gib", type=float, default=24.0)
    parser.add_argument("--chaos-seconds", type=int, default=60)
    parser.add_argument("--chaos-clients", type=int, default=50)
    parser.add_argument("--soak-seconds", type=int, default=60)
    parser.add_argument("vllm_flags", nargs="*")
    args = parser.parse_args()
    known = parts_of(args)
    names = [part.name for part in known]
    if unknown := set(args.parts) - set(names):
        parser.error(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    args.parts = [part for part in known if not args.parts or part.name in args.parts]
    return args


def main() -> int:
    """Print the JSON line; 1 when a part failed or there is no GPU."""
    import torch

    args = parse_args()
    end_on_sigterm()
    # A shell that starts this in the background has it ignore Ctrl-C, and each part with it, which is ended so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    num_gpus = torch.cuda.device_count()
    parts = [part for part in args.parts if part.min_gpus <= num_gpus and (not part.tool or shutil.which(part.tool))]
    left_out = [part.name for part in args.parts if part not in parts]
    print(f"{num_gpus} GPUs; left out: {', '.join(left_out) or 'nothing'}", flush=True)
    results = run_all(parts, args.out)
    report("gpu_all", gpus=num_gpus, left_out=left_out, parts=results)
    return 0 if parts and all(result["status"] == 0 for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
