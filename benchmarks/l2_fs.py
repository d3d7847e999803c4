"""How close does a folder below L1 come to its disk?

Ceiling: one sequential file written and read in blocks of the same size from the same memory, as `dd bs=8M` does, with the same
directness, in the same directory and run, taking turns with ours. Ours is one object of a header and a chunk in a file of its
own, renamed when it is whole; reading includes opening it by its key. Neither syncs. With --buffered both go through the page
cache, and reading is a copy from memory. Checksums are the server's and are not part of it.
Run: python benchmarks/l2_fs.py [--directory DIR] [--object-mib 8] [--batch-mib 256] [--seconds 10] [--buffered]
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import percentile, report

from lmcache.storage.l2.base import L2Adapter
from lmcache.storage.l2.spec import make_adapter, parse_adapter
from lmcache.storage.l2.value import HEADER_BYTES


def timed(action: Callable[[], None]) -> float:
    """Return the seconds an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


class Floor:
    """One file, written and read from start to end."""

    def __init__(self, directory: str, chunks: list[memoryview], flags: int) -> None:
        self._path = f"{directory}/raw"
        self._chunks = chunks
        self._flags = flags

    def write(self) -> None:
        """Write a new file."""
        fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self._flags)
        for number, chunk in enumerate(self._chunks):
            assert os.pwritev(fd, [chunk], number * len(chunk)) == len(chunk)
        os.close(fd)

    def read(self) -> None:
        """Read it into the same memory."""
        fd = os.open(self._path, os.O_RDONLY | self._flags)
        for number, chunk in enumerate(self._chunks):
            assert os.preadv(fd, [chunk], number * len(chunk)) == len(chunk)
        os.close(fd)

    def remove(self) -> None:
        """Make room for the next round."""
        os.unlink(self._path)


class Ours:
    """One object for each chunk."""

    def __init__(self, adapter: L2Adapter, chunks: list[memoryview]) -> None:
        self._adapter = adapter
        self._header = memoryview(bytearray(HEADER_BYTES))
        self._chunks = chunks
        self._keys = [f"{number:064x}-0" for number in range(len(chunks))]

    def write(self) -> None:
        """Put every chunk."""
        for key, chunk in zip(self._keys, self._chunks, strict=True):
            self._adapter.put(key, [self._header, chunk])

    def read(self) -> None:
        """Get every chunk."""
        for key, chunk in zip(self._keys, self._chunks, strict=True):
            assert self._adapter.get(key, [self._header, chunk])

    def remove(self) -> None:
        """Make room for the next round."""
        self._adapter.clear()


def measure(directory: str, object_bytes: int, batch_bytes: int, seconds: float, direct: bool) -> dict[str, float]:
    """Return GB/s (1e9 bytes) of ours and of raw I/O, medians, and their ratios."""
    memory = memoryview(mmap.mmap(-1, batch_bytes))
    memory[:] = os.urandom(1 << 20) * (batch_bytes >> 20)
    chunks = [memory[at : at + object_bytes] for at in range(0, batch_bytes - object_bytes + 1, object_bytes)]
    adapter = make_adapter(parse_adapter(f"fs://{directory}/l2?capacity-gb={3 * batch_bytes / 2**30}&direct-io={int(direct)}"))
    ours, floor = Ours(adapter, chunks), Floor(directory, chunks, os.O_DIRECT if direct else 0)
    taken: dict[str, list[float]] = {"write": [], "raw_write": [], "read": [], "raw_read": []}
    deadline = time.monotonic() + seconds
    is_warm = False
    is_ours_first = True
    while time.monotonic() < deadline or len(taken["write"]) < 3:
        pairs = (("", ours), ("raw_", floor)) if is_ours_first else (("raw_", floor), ("", ours))
        figures = {f"{name}write": timed(one.write) for name, one in pairs}
        figures |= {f"{name}read": timed(one.read) for name, one in pairs}
        for _, one in pairs:
            one.remove()
        for name, value in figures.items():
            if is_warm:
                taken[name].append(value)
        is_warm, is_ours_first = True, not is_ours_first
    adapter.close()
    total = object_bytes * len(chunks)
    speed = {name: total / percentile(values, 0.5) / 1e9 for name, values in taken.items()}
    return {
        **{f"{name}_gb_per_s": round(value, 3) for name, value in speed.items()},
        "write_ratio": round(speed["write"] / speed["raw_write"], 3),
        "read_ratio": round(speed["read"] / speed["raw_read"], 3),
        "rounds": len(taken["write"]),
    }


def main() -> None:
    """Print the figures and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--object-mib", type=int, default=8)
    parser.add_argument("--batch-mib", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--buffered", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="lmcache-benchmark-") as directory:
        figures = measure(directory, args.object_mib << 20, args.batch_mib << 20, args.seconds, not args.buffered)
    for name in ("write", "read"):
        ours, raw, ratio = figures[f"{name}_gb_per_s"], figures[f"raw_{name}_gb_per_s"], figures[f"{name}_ratio"]
        print(f"{name}: {ours} of {raw} GB/s ({ratio:.2f} x)")
    report("l2_fs", object_mib=args.object_mib, is_direct=not args.buffered, **figures)


if __name__ == "__main__":
    main()
