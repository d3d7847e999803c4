"""Engines that are killed within stores and loads leave nothing on the GPU and no pin in the server. Needs a GPU."""

import subprocess
import sys
import time

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from lmcache.client.mq import MessageQueueClient  # noqa: E402
from lmcache.protocol import Status  # noqa: E402
from tests.server_process import LmcacheServer  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
ROUNDS, ENGINES = 4, 5  # 20 crashes
MIB = 1 << 20
WAIT_SECONDS = 60.0
# An engine without vLLM: KV on the GPU, the pool pinned, stores and loads one after the other.
ENGINE = """
import itertools, sys, torch
from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import Namespace, chunk_keys
from lmcache.layout import KVLayout
from lmcache.transfer.cuda import CudaCopier
url, number = sys.argv[1:]
layout = KVLayout(num_layers=8, num_planes=1, block_bytes=65536, block_size=16, dtype="bfloat16")
kv = torch.randint(0, 256, (8, 512, 65536), dtype=torch.uint8, device="cuda")
copier = CudaCopier(layout, list(kv), 64 << 20)
with KVCacheClient(url, kind="engine-worker", timeout_seconds=30, heartbeat=True) as client:
    client.watch_mapping(copier.pin_pool)
    namespace = Namespace(model="crash", layout=layout.fingerprint, chunk_size=256)
    client.register(namespace, layout)
    ids = list(range(512))
    for turn in itertools.count():
        keys = chunk_keys(namespace, range(turn, turn + 32 * 256))
        with client.reserve(keys, 8 * 16 * 65536) as reservation:
            size = 16 * len(reservation.extents)
            copier.gather(ids[:size], reservation.extents, copier.fence())
            reservation.commit()
        with client.pin(keys, f"{number}-{turn}") as pinned:
            transfer = copier.begin_scatter(pinned.extents, ids[: 16 * len(pinned.extents)])
            if turn == 3:
                print("working", flush=True)
            transfer.wait(30)
"""


def gpu_memory_mib():
    """What the GPU's processes hold in all."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(int, subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()))


def wait_until(condition):
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_twenty_killed_engines_leave_no_gpu_memory_and_no_pins():
    torch.cuda.init()
    with LmcacheServer(l1_size_gb=1.0) as server, MessageQueueClient(server.zmq_url, timeout_seconds=30) as mq:
        before = gpu_memory_mib()
        for _ in range(ROUNDS):
            engines = [
                subprocess.Popen([sys.executable, "-c", ENGINE, server.zmq_url, str(number)], stdout=subprocess.PIPE, text=True)
                for number in range(ENGINES)
            ]
            try:
                for engine in engines:
                    assert engine.stdout is not None
                    assert engine.stdout.readline() == "working\n"
                assert gpu_memory_mib() > before + ENGINES * 256
            finally:
                for engine in engines:
                    engine.kill()
                for engine in engines:
                    engine.wait(timeout=30)
                    engine.stdout.close()
            wait_until(lambda: gpu_memory_mib() <= before + 64)
            wait_until(lambda: mq.call(Status()).status["l1"]["pins"] == 0)
            wait_until(lambda: not [c for c in mq.call(Status()).status["clients"] if c["kind"] == "engine-worker"])
