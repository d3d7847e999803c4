"""Do the ranks of an engine copy at once, each at its own GPU's speed?

One process a GPU, as vLLM's tensor parallel workers are, all attached to one server: each stores 1 GiB of paged KV into its
own extents and loads it back, first one rank after the other, then all at once. Wanted (HNG-5): all at once at 0.8 x the sum of
what each does alone. No flag chooses a number of lanes: each rank has its own. Time is until the device has completed.
Run on a machine with several GPUs: python benchmarks/gpu_lanes.py [--l1-gib 8] [--repeats 10]
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from common import percentile, report, server, wait_resident
from gpu_copy import BLOCK_BYTES, CHUNK_BYTES, NUM_LAYERS, Engine
from pins import GIB, pinned_pool

from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import Namespace, chunk_keys
from lmcache.transfer.pinning import PoolPinner

NUM_CHUNKS = 32
WAIT_SECONDS = 120.0


def rank(number: int, url: str, repeats: int, barrier: Any, results: Connection) -> None:
    """One rank: take part in each phase and send (phase, seconds of each transfer)."""
    torch.cuda.set_device(number)
    with KVCacheClient(url, timeout_seconds=30) as client, pinned_pool(client) as (pinner, _):
        keys = chunk_keys(Namespace(model=f"rank {number}", chunk_size=256), range(NUM_CHUNKS * 256))
        with client.reserve(keys, CHUNK_BYTES) as reservation:
            take_part(number, reservation.extents, pinner, repeats, barrier, results)


def take_part(
    number: int, extents: Sequence[memoryview], pinner: PoolPinner, repeats: int, barrier: Any, results: Connection
) -> None:
    """Wait for each phase, and copy in those that are this rank's."""
    engine = Engine(NUM_LAYERS, BLOCK_BYTES, 2 * GIB // (NUM_LAYERS * BLOCK_BYTES), pinner)
    engine.check(extents)
    actions = {"store": lambda: engine.store(extents), "load": lambda: engine.load(extents)}
    for phase in (*range(torch.cuda.device_count()), "all"):
        for name, action in actions.items():
            barrier.wait(WAIT_SECONDS)
            if phase in (number, "all"):
                results.send((f"{name}_{'all' if phase == 'all' else 'alone'}", timed(action, repeats)))
    barrier.wait(WAIT_SECONDS)


def timed(action: Callable[[], None], repeats: int) -> list[float]:
    """Return the seconds of each of some transfers, one right after the other."""
    action()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        taken.append(time.perf_counter() - started)
    return taken


def main() -> None:
    """Print the figures and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--l1-gib", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    num_ranks = torch.cuda.device_count()
    context = multiprocessing.get_context("spawn")
    speeds: dict[str, list[float]] = {}
    with server("--l1-size-gb", str(args.l1_gib)) as (url, pid):
        wait_resident(pid, int(args.l1_gib * GIB))
        barrier = context.Barrier(num_ranks)
        pipes = [context.Pipe(duplex=False) for _ in range(num_ranks)]
        ranks = [
            context.Process(target=rank, args=(number, url, args.repeats, barrier, pipes[number][1]), daemon=True)
            for number in range(num_ranks)
        ]
        for process in ranks:
            process.start()
        for number, (receiver, _) in enumerate(pipes):
            for _ in range(4):
                assert receiver.poll(WAIT_SECONDS), f"rank {number} says nothing"
                name, taken = receiver.recv()
                speeds.setdefault(name, []).append(NUM_CHUNKS * CHUNK_BYTES / percentile(taken, 0.5) / 1e9)
        for process in ranks:
            process.join(WAIT_SECONDS)
    figures = {name: [round(value, 2) for value in values] for name, values in speeds.items()}
    ratios = {name: round(sum(speeds[f"{name}_all"]) / sum(speeds[f"{name}_alone"]), 3) for name in ("store", "load")}
    print(f"{num_ranks} ranks, GB/s each: {figures}; all at once : the sum of each alone: {ratios}")
    report("gpu_lanes", device=torch.cuda.get_device_name(), ranks=num_ranks, gb_per_s=figures, ratios=ratios)


if __name__ == "__main__":
    main()
