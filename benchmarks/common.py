"""What the benchmarks share: a server process, percentiles, the closing JSON line."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lmcache import __version__
from lmcache.client.mq import MessageQueueClient
from lmcache.errors import LMCacheError
from lmcache.protocol import Noop

READY_DEADLINE_SECONDS = 30.0
RESIDENT_DEADLINE_SECONDS = 120.0


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` (0 to 1) of the sorted values lie, nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def free_port() -> int:
    """Return a port that was free a moment ago."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(*flags: str, http: bool = False, port: int = 0) -> Iterator[tuple[str, int]]:
    """Run `lmcache server` as a process, at a free port unless one is given; yields its ZMQ address and pid."""
    port = port or free_port()
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--port", str(port), "--log-level", "WARNING", *flags]
    command += ["--http-port", "0"] if http else ["--no-http"]
    process = subprocess.Popen(command)
    url = f"tcp://127.0.0.1:{port}"
    try:
        wait_ready(url)
        yield url, process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def wait_ready(url: str) -> None:
    """Return when the server answers a NOOP.

    Raises: TimeoutError.
    """
    deadline = time.monotonic() + READY_DEADLINE_SECONDS
    with MessageQueueClient(url, timeout_seconds=1.0) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(LMCacheError):
                client.call(Noop())
                return
    raise TimeoutError(f"no server at {url}")


def wait_resident(pid: int, num_bytes: int) -> None:
    """Return when this much of a server's shared memory is resident.

    Raises: TimeoutError.
    """
    deadline = time.monotonic() + RESIDENT_DEADLINE_SECONDS
    while memory_kib(pid, "RssShmem") * 1024 < num_bytes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"not {num_bytes} bytes of the server {pid} are resident")
        time.sleep(0.1)


def memory_kib(pid: int, field: str) -> int:
    """Return a memory figure of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


def report(question: str, **figures: object) -> None:
    """Print the closing JSON line."""
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"benchmark": question, "lmcache": __version__, **machine, **figures}))
