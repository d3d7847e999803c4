"""A simulated engine that goes on until its time is up, as a process of its own: `test_soak.py` starts several.

    python -m tests.integration.soak_engine URL SEED SECONDS COPIER

COPIER is one of `gpu`, the product's; `simulated`, the same on a simulated GPU, which does all at once; `later`, a fake of it
that takes its time. All requests that end are verified, byte by byte. Prints one JSON line at the end; a wrong byte is an
AssertionError.
"""

import json
import random
import sys
import time
from collections import deque

import pytest
import torch

from lmcache.client.kvcache import KVCacheClient
from lmcache.integration.vllm.scheduler import SchedulerHalf
from lmcache.integration.vllm.worker import WorkerHalf
from lmcache.keys import Namespace
from lmcache.protocol import Noop
from lmcache.transfer.base import ChunkCopier
from lmcache.transfer.cuda import CudaCopier
from tests.integration.later_copier import LaterCopier
from tests.integration.simulated_engine import BLOCK_BYTES, LAYOUT, NUM_LAYERS, SimEngine, SimRequest
from tests.transfer.simulated_cuda import Driver, simulate

NUM_BLOCKS = 256
NUM_RUNNING = 12
NUM_STEMS, STEM_TOKENS = 60, 64
STAGING_BYTES = 1 << 20
STALL_SECONDS = 5.0


def make_copier(name: str, planes: list[torch.Tensor]) -> ChunkCopier:
    """Return the copier of that name."""
    if name == "later":
        return LaterCopier(LAYOUT, planes, pause_seconds=1e-3)
    if name == "simulated":
        driver = Driver()
        driver.calls = deque(maxlen=1)
        simulate(pytest.MonkeyPatch(), driver)
    return CudaCopier(LAYOUT, planes, STAGING_BYTES, uses_triton=None if name == "gpu" else False)


def client(url: str, kind: str) -> KVCacheClient:
    """Return one that is connected: unlike vLLM's class, nothing here takes a lookup that cannot be sent at once for a miss."""
    connected = KVCacheClient(url, kind=kind, timeout_seconds=30, heartbeat=True)
    connected.attach()
    connected.mq.call(Noop())
    return connected


class Soak:
    """The engine, and what has become of its requests."""

    def __init__(self, url: str, seed: int, copier: str) -> None:
        self.generator = random.Random(seed)
        self.counts = {"requests": 0, "aborted": 0, "preempted": 0, "steps": 0, "stalls": 0}
        self.slowest_step = 0.0
        self._name = f"s{seed}"
        self._worker, self._scheduler = WorkerHalf(client(url, "engine-worker")), SchedulerHalf(client(url, "engine-scheduler"))
        shape = (NUM_BLOCKS, BLOCK_BYTES)
        device = "cuda" if copier == "gpu" else "cpu"
        planes = [torch.full(shape, 0xEE, dtype=torch.uint8, device=device) for _ in range(NUM_LAYERS)]
        self._worker.start(make_copier(copier, planes), Namespace(model="soak", layout=LAYOUT.fingerprint, chunk_size=0))
        self._scheduler.hear([self._worker.hello])
        self.engine = SimEngine(self._scheduler, [self._worker], [planes], lag=1)

    def close(self) -> None:
        """Leave the server."""
        self._worker.close()
        self._scheduler.close()

    def add(self) -> None:
        """A client comes; many have asked for the same before, of this engine or another."""
        stem = random.Random(self.generator.randrange(NUM_STEMS)).choices(range(1000), k=STEM_TOKENS)
        tail = self.generator.choices(range(1000), k=self.generator.randrange(1, 20))
        prompt = stem[: self.generator.randrange(8, STEM_TOKENS)] + tail
        self.counts["requests"] += 1
        name = f"{self._name}-{self.counts['requests']}"
        self.engine.add(SimRequest(name, prompt, max_tokens=self.generator.randrange(0, 12)))

    def step(self) -> None:
        """Something may happen to a request; then all go on."""
        engine, generator = self.engine, self.generator
        if engine.running and generator.random() < 0.02:
            engine.preempt(generator.choice(engine.running))
            self.counts["preempted"] += 1
        admitted = engine.running + [request for request in engine.waiting if request.is_loading]
        if admitted and generator.random() < 0.03:
            engine.abort(generator.choice(admitted))
            self.counts["aborted"] += 1
        started_at = time.monotonic()
        engine.step()
        seconds = time.monotonic() - started_at
        self.slowest_step = max(self.slowest_step, seconds)
        self.counts["stalls"] += seconds > STALL_SECONDS
        self.counts["steps"] += 1


def main() -> None:
    """Go on for so long, then let what runs come to its end."""
    url, seed, seconds, copier = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
    soak = Soak(url, seed, copier)
    end_at = time.monotonic() + seconds
    while time.monotonic() < end_at or soak.engine.has_work:
        if time.monotonic() < end_at and len(soak.engine.running) + len(soak.engine.waiting) < NUM_RUNNING:
            soak.add()
        soak.step()
    soak.close()
    loaded = soak.engine.num_loaded_tokens
    print(json.dumps({**soak.counts, "slowest_step": round(soak.slowest_step, 3), "loaded_tokens": loaded}), flush=True)


if __name__ == "__main__":
    main()
