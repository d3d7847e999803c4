"""What do the command line and the server cost before they do anything?

Whole processes, taking turns with their floors: `lmcache ping kvcache` beside `python -c "import zmq, msgpack"`,
`lmcache --help` beside `python -c "import argparse"`, `lmcache query kvcache --prompt` beside the import of transformers.
Byte code must be cached, as after an installation. The server: seconds from start until a NOOP is answered for an 8 GiB L1, and
resident memory outside the pool (RssAnon + RssFile) once HTTP answers too. Needs msgpack for the floor.
Run: python benchmarks/startup.py [--runs 15]
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from common import free_port, memory_kib, percentile, report, server, wait_ready

from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import Namespace
from lmcache.layout import KVLayout

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.tiny_model import make_tiny_tokenizer

BIN = Path(sys.executable).parent
L1_GIB = "8"


def seconds_of(command: list[str]) -> float:
    """Return how long a process takes; it must succeed. Given a timeout, `subprocess` would poll for the end."""
    started = time.perf_counter()
    code = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).wait()
    taken = time.perf_counter() - started
    assert code == 0, (command, code)
    return taken


def compare(ours: list[str], floor: list[str], runs: int) -> dict[str, float]:
    """Return medians in ms of two commands that take turns, and their ratio."""
    seconds_of(ours), seconds_of(floor)
    taken = [(seconds_of(ours), seconds_of(floor)) for _ in range(runs)]
    our_ms, floor_ms = (percentile([pair[i] for pair in taken], 0.5) * 1e3 for i in (0, 1))
    return {"ms": round(our_ms, 1), "floor_ms": round(floor_ms, 1), "ratio": round(our_ms / floor_ms, 3)}


def compare_tokenizing(url: str, runs: int) -> dict[str, float]:
    """Return medians in ms of a query for a short prompt and of the import that it takes, and their ratio."""
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=16, block_size=16, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder, KVCacheClient(url) as client:
        make_tiny_tokenizer(Path(folder))
        client.register(Namespace(model=folder, dtype=layout.dtype, layout=layout.fingerprint, chunk_size=256), layout)
        query = [str(BIN / "lmcache"), "query", "kvcache", "--url", url, "--timeout", "60", "--prompt", "hello"]
        return compare(query, [sys.executable, "-c", "import transformers"], runs)


def start_server() -> dict[str, float]:
    """Return the seconds until the first answer, and MiB outside the pool when HTTP answers as well."""
    port, http_port = free_port(), free_port()
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(BIN / "lmcache"), "server", "--l1-size-gb", L1_GIB, "--port", str(port), "--http-port", str(http_port)],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_ready(f"tcp://127.0.0.1:{port}")
        answered = time.perf_counter() - started
        transport = httpx.HTTPTransport(retries=20)
        with httpx.Client(transport=transport, timeout=10) as client:
            while True:
                try:
                    client.get(f"http://127.0.0.1:{http_port}/readyz").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.05)
            client.get(f"http://127.0.0.1:{http_port}/metrics").raise_for_status()
        rss_mib = (memory_kib(process.pid, "RssAnon") + memory_kib(process.pid, "RssFile")) / 1024
        return {"seconds": answered, "rss_outside_pool_mib": rss_mib}
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)


def main() -> None:
    """Print a line for each, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    args = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    python, lmcache = [sys.executable, "-c"], str(BIN / "lmcache")
    with server("--l1-size-gb", "0.0625") as (url, _):
        ping = compare([lmcache, "ping", "kvcache", "--url", url], [*python, "import zmq, msgpack"], args.runs)
        query = compare_tokenizing(url, args.runs)
    help_ = compare([lmcache, "--help"], [*python, "import argparse"], args.runs)
    starts = [start_server() for _ in range(5)]
    seconds = percentile([start["seconds"] for start in starts], 0.5)
    rss_mib = max(start["rss_outside_pool_mib"] for start in starts)
    print(f"ping kvcache {ping['ms']} ms, import zmq, msgpack {ping['floor_ms']} ms: {ping['ratio']} x")
    print(f"--help {help_['ms']} ms, import argparse {help_['floor_ms']} ms: {help_['ratio']} x")
    print(f"query kvcache --prompt {query['ms']} ms, import transformers {query['floor_ms']} ms: {query['ratio']} x")
    print(f"server with {L1_GIB} GiB answers after {seconds:.2f} s, {rss_mib:.0f} MiB outside the pool")
    report("startup", ping=ping, help=help_, query=query, server_seconds=round(seconds, 3), server_rss_mib=round(rss_mib, 1))


if __name__ == "__main__":
    main()
