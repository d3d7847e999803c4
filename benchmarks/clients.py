"""Does the server hold its throughput when many clients use it at once?

8 and 64 clients, spread over 4 processes (one thread a client), each in a loop of lookup, store and retrieve of 4 chunks of
256 KiB with every byte compared. Throughput is operations of all clients in the time between a common start and a common end;
the two counts take turns. Run: python benchmarks/clients.py [--seconds 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
import time
from multiprocessing.synchronize import Barrier

from common import report, server, wait_resident

from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import Namespace, chunk_keys

NUM_PROCESSES = 4
CHUNKS = 4
CHUNK_BYTES = 256 << 10
L1_GIB = 1.0
Result = tuple[int, int]


def run_client(url: str, name: str, seconds: float, start: threading.Barrier, results: list[Result]) -> None:
    """Loop until the time is up; append (operations, errors)."""
    operations = errors = number = 0
    with KVCacheClient(url, timeout_seconds=20) as client:
        namespace = Namespace(model=name, chunk_size=1)
        buffers = [bytearray(CHUNK_BYTES) for _ in range(CHUNKS)]
        client.attach()
        start.wait(timeout=60)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            number += 1
            keys = chunk_keys(namespace, [number, *range(1, CHUNKS)])
            chunks = [number.to_bytes(8, "little") * (CHUNK_BYTES // 8)] * CHUNKS
            client.lookup(keys, str(number), pin=False)
            client.store(keys, chunks)
            found = client.retrieve(keys, buffers, str(number))
            errors += found != CHUNKS or any(bytes(b) != c for b, c in zip(buffers, chunks, strict=True))
            operations += 3
    results.append((operations, errors))


def run_process(url: str, index: int, num_clients: int, seconds: float, start: Barrier, queue: object) -> None:
    """One process: `num_clients` threads that start together with those of the other processes."""
    results: list[Result] = []
    ready = threading.Barrier(num_clients, action=lambda: start.wait(timeout=60))
    threads = [
        threading.Thread(target=run_client, args=(url, f"{index}-{number}-{time.time()}", seconds, ready, results))
        for number in range(num_clients)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=seconds + 120)
    missing = num_clients - len(results)
    queue.put((sum(r[0] for r in results), sum(r[1] for r in results) + missing))  # type: ignore[attr-defined]


def measure(url: str, num_clients: int, seconds: float) -> Result:
    """Return operations a second and errors."""
    context = multiprocessing.get_context("spawn")
    start, queue = context.Barrier(NUM_PROCESSES), context.Queue()
    processes = [
        context.Process(target=run_process, args=(url, index, num_clients // NUM_PROCESSES, seconds, start, queue))
        for index in range(NUM_PROCESSES)
    ]
    for process in processes:
        process.start()
    results = [queue.get(timeout=seconds + 180) for _ in processes]
    for process in processes:
        process.join(timeout=30)
    return round(sum(r[0] for r in results) / seconds), sum(r[1] for r in results)


def main() -> None:
    """Print the two throughputs and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    speeds: dict[int, list[int]] = {8: [], 64: []}
    errors = 0
    with server("--l1-size-gb", str(L1_GIB)) as (url, pid):
        wait_resident(pid, int(L1_GIB * 2**30))
        for _ in range(args.rounds):
            for num_clients, found in speeds.items():
                speed, failed = measure(url, num_clients, args.seconds)
                found.append(speed)
                errors += failed
    median = {num_clients: sorted(found)[len(found) // 2] for num_clients, found in speeds.items()}
    print(f"8 clients {median[8]} ops/s, 64 clients {median[64]} ops/s ({median[64] / median[8]:.2f} x), {errors} errors")
    report("clients", ratio_64_to_8=round(median[64] / median[8], 3), errors=errors, ops_per_s=median, rounds=speeds)


if __name__ == "__main__":
    main()
