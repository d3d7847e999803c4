"""How close do store and retrieve come to a plain memory copy?

Ceiling: memcpy of the same bytes between private memory and a shared mapping of their own, touched beforehand, in the same run,
taking turns with ours. Content checksums (XXH3, made at store, compared at retrieve) and inline (over the socket) are measured
the same way. Time is until the last byte is copied and the chunk is committed or verified.
Run: python benchmarks/chunks.py [--chunk-mib 1 8] [--seconds 3]
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from collections.abc import Callable

from common import percentile, report, server, wait_resident

from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import Namespace, chunk_keys

L1_GIB = 4.0
# The KV of a 2,000-token prompt of an 8B model (128 KiB a token).
BATCH_BYTES = 256 << 20


class Floor:
    """memcpy between private memory and a shared mapping as large as L1, walking through it as stores do."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = chunks
        self._shared = memoryview(mmap.mmap(-1, int(L1_GIB * 2**30)))
        self._private = [bytearray(len(chunk)) for chunk in chunks]
        self._at = 0
        while self._at < len(self._shared):
            self.write()
            self._at += BATCH_BYTES
        self._at = 0
        self.read()

    def advance(self) -> None:
        """Go on to the next part of the mapping."""
        self._at = (self._at + BATCH_BYTES) % len(self._shared)

    def write(self) -> None:
        """Copy all chunks to the shared mapping."""
        at = self._at
        for chunk in self._chunks:
            self._shared[at : at + len(chunk)] = chunk
            at += len(chunk)

    def read(self) -> None:
        """Copy them back."""
        at = self._at
        for buffer in self._private:
            memoryview(buffer)[:] = self._shared[at : at + len(buffer)]
            at += len(buffer)


class Ours:
    """Store and retrieve of a batch; every store uses new keys, and the batch before is evicted by hand, untimed."""

    def __init__(self, client: KVCacheClient, chunks: list[bytes], checksums: bool) -> None:
        self._client = client
        self._checksums = checksums
        self._chunks = chunks
        self._buffers = [bytearray(len(chunk)) for chunk in chunks]
        self._namespace = Namespace(model=f"benchmark-{os.urandom(4).hex()}", chunk_size=1)
        self._number = 0
        self._keys = b""

    def next_keys(self) -> None:
        """Choose keys that were never used."""
        self._number += 1
        self._keys = chunk_keys(self._namespace, [self._number, *range(len(self._chunks) - 1)])

    def write(self) -> None:
        """Store the batch."""
        self._client.store(self._keys, self._chunks, with_checksums=self._checksums)

    def read(self) -> None:
        """Retrieve and verify it."""
        found = self._client.retrieve(self._keys, self._buffers, check_content=self._checksums)
        assert found == len(self._chunks), found

    def check(self) -> None:
        """Compare every byte, once."""
        assert all(bytes(buffer) == chunk for buffer, chunk in zip(self._buffers, self._chunks, strict=True))


def timed(action: Callable[[], None]) -> float:
    """Return the seconds an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(url: str, chunk_bytes: int, path: str, seconds: float) -> dict[str, float]:
    """Return GB/s (1e9 bytes) of ours and of memcpy, medians, and their ratios."""
    chunks = [os.urandom(chunk_bytes) for _ in range(BATCH_BYTES // chunk_bytes)]
    taken: dict[str, list[float]] = {"store": [], "retrieve": [], "memcpy_write": [], "memcpy_read": []}
    with KVCacheClient(url, inline=path == "inline", timeout_seconds=30) as client:
        ours, floor = Ours(client, chunks, path == "pool_checksums"), Floor(chunks)
        deadline = time.monotonic() + seconds + 1
        warm_at = time.monotonic() + 1
        while time.monotonic() < deadline:
            ours.next_keys()
            floor.advance()
            figures = {
                "store": timed(ours.write),
                "memcpy_write": timed(floor.write),
                "retrieve": timed(ours.read),
                "memcpy_read": timed(floor.read),
            }
            if time.monotonic() > warm_at:
                for name, value in figures.items():
                    taken[name].append(value)
        ours.check()
    total = chunk_bytes * len(chunks)
    speed = {name: total / percentile(values, 0.5) / 1e9 for name, values in taken.items()}
    return {
        **{f"{name}_gb_per_s": round(value, 2) for name, value in speed.items()},
        "store_ratio": round(speed["store"] / speed["memcpy_write"], 3),
        "retrieve_ratio": round(speed["retrieve"] / speed["memcpy_read"], 3),
    }


def main() -> None:
    """Print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=3.0)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with server("--l1-size-gb", str(L1_GIB)) as (url, pid):
        wait_resident(pid, int(L1_GIB * 2**30))
        for path in ("pool", "pool_checksums", "inline"):
            for mib in args.chunk_mib:
                name = f"{path}_{mib}_mib"
                figures = results[name] = measure(url, mib << 20, path, args.seconds)
                print(
                    f"{name}: store {figures['store_gb_per_s']} of {figures['memcpy_write_gb_per_s']} GB/s"
                    f" ({figures['store_ratio']:.2f} x), retrieve {figures['retrieve_gb_per_s']} of"
                    f" {figures['memcpy_read_gb_per_s']} GB/s ({figures['retrieve_ratio']:.2f} x)"
                )
    report("chunks", **results)


if __name__ == "__main__":
    main()
