"""Do L1's figures stay what they are while chunks are written to L2 behind them?

Floor: the same stores and retrieves on a server without L2. Both servers run in the same run, and take turns in short rounds:
a round of the one without begins when the other has nothing left to write; in a round of the other its threads write all the
time, as it stores faster than a disk takes. L1 is full in both, so each store evicts. Beside it the control: the server without
L2 while another process writes files as fast as it can, which shows what the machine's cores and memory alone cost.
Run: python benchmarks/l2_beside_l1.py [--folder DIR] [--rounds 12] [--chunk-mib 8]
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

from common import percentile, report, server, wait_resident

from lmcache.client.kvcache import KVCacheClient
from lmcache.client.mq import MessageQueueClient
from lmcache.keys import Namespace, chunk_keys
from lmcache.protocol import Status

L1_GIB = 1.0
BATCH_BYTES = 64 << 20
ROUND_SECONDS = 2.0
DRAIN_SECONDS = 60.0


class Lane:
    """One client that stores a batch and reads it back, again and again."""

    def __init__(self, url: str, chunk_bytes: int) -> None:
        self.url = url
        self._client = KVCacheClient(url, timeout_seconds=30)
        self._chunks = [os.urandom(chunk_bytes) for _ in range(BATCH_BYTES // chunk_bytes)]
        self._buffers = [bytearray(chunk_bytes) for _ in self._chunks]
        self._namespace = Namespace(model=f"benchmark-{os.urandom(4).hex()}", chunk_size=1)
        self._number = 0

    def fill(self) -> None:
        """Store until L1 is full."""
        for _ in range(int(L1_GIB * 2**30) // BATCH_BYTES + 1):
            self.turn()

    def turn(self) -> tuple[float, float]:
        """Return the seconds of one store and of one retrieve."""
        self._number += 1
        keys = chunk_keys(self._namespace, [self._number, *range(len(self._chunks) - 1)])
        started_at = time.perf_counter()
        self._client.store(keys, self._chunks)
        stored_at = time.perf_counter()
        found = self._client.retrieve(keys, self._buffers)
        retrieved_at = time.perf_counter()
        assert found == len(self._chunks), found
        return stored_at - started_at, retrieved_at - stored_at

    def round(self) -> tuple[float, float]:
        """Return the medians of a round."""
        taken = []
        deadline = time.monotonic() + ROUND_SECONDS
        while time.monotonic() < deadline:
            taken.append(self.turn())
        return percentile([s for s, _ in taken], 0.5), percentile([r for _, r in taken], 0.5)

    def tier(self) -> dict[str, int]:
        """What the server says of its tier."""
        with MessageQueueClient(self.url) as mq:
            tiers: list[dict[str, int]] = mq.call(Status()).status["l2"]
        return tiers[0]

    def drain(self) -> None:
        """Wait until nothing is left to write."""
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.tier()["queued_chunks"] and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """Leave."""
        self._client.close()


def write_files(folder: str, stop: Event) -> None:
    """Write a file of 64 MiB again and again."""
    data = os.urandom(8 << 20)
    while not stop.is_set():
        with open(Path(folder) / "control", "wb") as file:
            for _ in range(8):
                file.write(data)
            os.fsync(file.fileno())


@contextlib.contextmanager
def other_writer(folder: str) -> Iterator[None]:
    """Another process that writes."""
    stop = multiprocessing.Event()
    process = multiprocessing.Process(target=write_files, args=(folder, stop))
    process.start()
    try:
        yield
    finally:
        stop.set()
        process.join(30)


def measure(chunk_bytes: int, folder: str, rounds: int) -> dict[str, float]:
    """Return the figures of one chunk size."""
    seconds: dict[str, list[tuple[float, float]]] = {"without": [], "with_l2": [], "control": []}
    size = ("--l1-size-gb", str(L1_GIB))
    adapter = f"fs://{folder}/l2?capacity-gb=4"
    with (
        server(*size) as (plain_url, plain_pid),
        server(*size, "--l2-adapter", adapter, "--l2-drain-seconds", "0") as (url, pid),
    ):
        wait_resident(plain_pid, int(L1_GIB * 2**30))
        wait_resident(pid, int(L1_GIB * 2**30))
        plain, tiered = Lane(plain_url, chunk_bytes), Lane(url, chunk_bytes)
        with contextlib.closing(plain), contextlib.closing(tiered):
            plain.fill()
            tiered.fill()
            written = 0.0
            for _ in range(rounds):
                tiered.drain()
                seconds["without"].append(plain.round())
                before, started_at = tiered.tier()["written_bytes"], time.monotonic()
                seconds["with_l2"].append(tiered.round())
                written += (tiered.tier()["written_bytes"] - before) / (time.monotonic() - started_at) / rounds
                tiered.drain()
                with other_writer(folder):
                    seconds["control"].append(plain.round())
    figures: dict[str, float] = {"l2_write_gb_per_s": round(written / 1e9, 2)}
    for index, name in enumerate(("store", "retrieve")):
        median = {kind: percentile([pair[index] for pair in pairs], 0.5) for kind, pairs in seconds.items()}
        for kind, value in median.items():
            figures[f"{name}_{kind}_gb_per_s"] = round(BATCH_BYTES / value / 1e9, 2)
        figures[f"{name}_ratio"] = round(median["without"] / median["with_l2"], 3)
        figures[f"{name}_control_ratio"] = round(median["without"] / median["control"], 3)
    return figures


def main() -> None:
    """Print a table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="/var/tmp", help="on the disk that L2 is to use")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--chunk-mib", type=int, nargs="+", default=[8])
    args = parser.parse_args()
    results = {}
    for mib in args.chunk_mib:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            figures = results[f"{mib}_mib"] = measure(mib << 20, folder, args.rounds)
        for name in ("store", "retrieve"):
            print(
                f"{mib} MiB: {name} {figures[f'{name}_without_gb_per_s']} GB/s without L2,"
                f" {figures[f'{name}_with_l2_gb_per_s']} with it ({figures[f'{name}_ratio']:.2f} x),"
                f" {figures[f'{name}_control_gb_per_s']} beside another writer ({figures[f'{name}_control_ratio']:.2f} x)"
            )
        print(f"{mib} MiB: written to L2 meanwhile: {figures['l2_write_gb_per_s']} GB/s")
    report("l2_beside_l1", **results)


if __name__ == "__main__":
    main()
