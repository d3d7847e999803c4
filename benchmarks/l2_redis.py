"""How close does Redis below L1 come to what its client can do at best, and what does a lookup of 512 keys cost?

Ceiling: redis-py (with hiredis) itself, one pipeline of SETs or GETs of the same bytes to the same server, in the same run,
taking turns with ours; what it gets is new bytes objects, ours arrives in the caller's memory. A lookup is compared with a
pipeline of STRLENs and with one PING. The server is a redis-server or valkey-server of its own on loopback, which shares the
machine's cores.
Run: python benchmarks/l2_redis.py [--object-mib 1 8] [--batch-mib 64] [--seconds 8]
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import redis
from common import free_port, percentile, report

from lmcache.errors import LMCacheError
from lmcache.storage.l2.base import L2Adapter
from lmcache.storage.l2.spec import make_adapter, parse_adapter
from lmcache.storage.l2.value import HEADER_BYTES

READY_DEADLINE_SECONDS = 30.0
LOOKUP_KEYS = 512
SMALL_TIMES = 20


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """Run a server that keeps nothing on disk; yields its port."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        raise SystemExit("needs valkey-server or redis-server: make setup-l2")
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", directory]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield port
        finally:
            process.kill()
            process.wait(30)


def wait_ready(adapter: L2Adapter) -> None:
    """Return when the server answers.

    Raises: TimeoutError.
    """
    deadline = time.monotonic() + READY_DEADLINE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(LMCacheError):
            adapter.ping()
            return
        time.sleep(0.01)
    raise TimeoutError("no answer from the server")


def timed(action: Callable[[], object]) -> float:
    """Return the seconds an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Bare:
    """redis-py's own pipeline."""

    def __init__(self, port: int, values: list[bytes]) -> None:
        self._client = redis.Redis(port=port, protocol=2)
        self._values = values

    def put(self) -> None:
        """Set all."""
        pipeline = self._client.pipeline(transaction=False)
        for number, value in enumerate(self._values):
            pipeline.set(f"bare-{number}", value)
        pipeline.execute()

    def get(self) -> None:
        """Get all."""
        pipeline = self._client.pipeline(transaction=False)
        for number in range(len(self._values)):
            pipeline.get(f"bare-{number}")
        assert all(pipeline.execute())

    def lookup(self) -> None:
        """Ask for 512 lengths."""
        pipeline = self._client.pipeline(transaction=False)
        for number in range(LOOKUP_KEYS):
            pipeline.strlen(f"bare-{number}")
        assert len(pipeline.execute()) == LOOKUP_KEYS

    def ping(self) -> None:
        """Do one round trip."""
        self._client.ping()


class Ours:
    """A header and a chunk in page-aligned memory, as the server has them."""

    def __init__(self, adapter: L2Adapter, chunks: list[bytes]) -> None:
        self._adapter = adapter
        self._keys = [f"{number:064x}-0" for number in range(len(chunks))]
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._chunks = []
        for chunk in chunks:
            memory = memoryview(mmap.mmap(-1, len(chunk)))
            memory[:] = chunk
            self._chunks.append(memory)
        self._lookup = [*self._keys, *(f"{number:064x}-1" for number in range(LOOKUP_KEYS - len(chunks)))]

    def put(self) -> None:
        """Put all."""
        for key, chunk in zip(self._keys, self._chunks, strict=True):
            self._adapter.put(key, [self._header, chunk])

    def get(self) -> None:
        """Get all."""
        for key, chunk in zip(self._keys, self._chunks, strict=True):
            assert self._adapter.get(key, [self._header, chunk])

    def lookup(self) -> None:
        """Ask for 512 keys at once."""
        assert len(self._adapter.lengths(self._lookup)) == LOOKUP_KEYS


def measure(port: int, object_bytes: int, batch_bytes: int, seconds: float) -> dict[str, float]:
    """Return GB/s (1e9 bytes) of both, medians, their ratios, and lookups in milliseconds."""
    chunks = [os.urandom(object_bytes) for _ in range(batch_bytes // object_bytes)]
    adapter = make_adapter(parse_adapter(f"redis://127.0.0.1:{port}"))
    wait_ready(adapter)
    ours, bare = Ours(adapter, chunks), Bare(port, [bytes(HEADER_BYTES) + chunk for chunk in chunks])
    actions: dict[str, Callable[[], object]] = {
        "put": ours.put,
        "bare_put": bare.put,
        "get": ours.get,
        "bare_get": bare.get,
        "lookup": ours.lookup,
        "bare_lookup": bare.lookup,
        "bare_ping": bare.ping,
    }
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for name, action in actions.items():
            # Small ones more often: what follows a large transfer finds the caches empty.
            taken[name] += [timed(action) for _ in range(1 if name.endswith(("put", "get")) else SMALL_TIMES)]
    adapter.clear()
    adapter.close()
    total = (object_bytes + HEADER_BYTES) * len(chunks)
    median = {name: percentile(values, 0.5) for name, values in taken.items()}
    return {
        **{f"{name}_gb_per_s": round(total / median[name] / 1e9, 3) for name in ("put", "bare_put", "get", "bare_get")},
        "put_ratio": round(median["bare_put"] / median["put"], 3),
        "get_ratio": round(median["bare_get"] / median["get"], 3),
        **{f"{name}_ms": round(median[name] * 1e3, 3) for name in ("lookup", "bare_lookup", "bare_ping")},
        "rounds": len(taken["put"]),
    }


def main() -> None:
    """Print the figures and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--object-mib", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch-mib", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.0)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with redis_server() as port:
        for mib in args.object_mib:
            figures = results[f"{mib}_mib"] = measure(port, mib << 20, args.batch_mib << 20, args.seconds)
            for name in ("put", "get"):
                mine, bare, ratio = (figures[f"{name}_gb_per_s"], figures[f"bare_{name}_gb_per_s"], figures[f"{name}_ratio"])
                print(f"{mib} MiB: {name} {mine} of {bare} GB/s ({ratio:.2f} x)")
            lookup, bare, ping = (figures[f"{name}_ms"] for name in ("lookup", "bare_lookup", "bare_ping"))
            print(f"lookup of {LOOKUP_KEYS} keys: {lookup} ms; a pipeline {bare} ms, one ping {ping} ms")
    report("l2_redis", **results)


if __name__ == "__main__":
    main()
