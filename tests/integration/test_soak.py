"""Engines side by side, requests aborted and preempted, chunks evicted and cleared at any time: no stall, no wrong byte."""

import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from lmcache.client.mq import MessageQueueClient  # noqa: E402
from lmcache.protocol import Clear, Status  # noqa: E402
from tests.integration.simulated_engine import CHUNK_SIZE  # noqa: E402
from tests.server_process import LmcacheServer  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
SHORT_SECONDS, SHORT_ENGINES = 3.0, 2
# What goes on when its time is up takes a moment, and torch a while to be imported on a busy machine.
GRACE_SECONDS = 180.0
CLEAR_SECONDS = 2.0
# Fewer chunks than the engines ask for.
POOL_BYTES = 128 << 10


def start(url: str, copier: str, seconds: float) -> "subprocess.Popen[str]":
    """One engine."""
    seed = random.randrange(1 << 30)
    command = [sys.executable, "-m", "tests.integration.soak_engine", url, str(seed), str(seconds), copier]
    return subprocess.Popen(command, cwd=REPOSITORY, env=dict(os.environ), stdout=subprocess.PIPE, text=True)


def test_engines_side_by_side_neither_stall_nor_read_a_wrong_byte(pytestconfig, capsys):
    long_seconds = pytestconfig.getoption("--soak-seconds")
    seconds = long_seconds or SHORT_SECONDS
    num_engines = pytestconfig.getoption("--soak-engines") if long_seconds else SHORT_ENGINES
    copiers = itertools.cycle(["gpu"] if torch.cuda.is_available() else ["later", "simulated"])
    flags = ["--chunk-size", str(CHUNK_SIZE)]
    with (
        LmcacheServer(flags, l1_size_gb=POOL_BYTES / 1e9) as server,
        MessageQueueClient(server.zmq_url, timeout_seconds=30) as mq,
    ):
        engines = [start(server.zmq_url, copier, seconds) for copier in itertools.islice(copiers, num_engines)]
        try:
            give_up_at = time.monotonic() + seconds + GRACE_SECONDS
            while any(engine.poll() is None for engine in engines):
                assert time.monotonic() < give_up_at, "an engine does not come to its end"
                time.sleep(CLEAR_SECONDS)
                mq.call(Clear())
            found = [engine.communicate()[0] for engine in engines]
        finally:
            for engine in engines:
                engine.kill()
                engine.wait(timeout=30)
        assert [engine.returncode for engine in engines] == [0] * num_engines
        figures = [json.loads(text) for text in found]
        status = mq.call(Status()).status
        retrieved, evicted = (status["counters"][name] for name in ("retrieved_chunks", "evicted_chunks"))
        with capsys.disabled():
            print(f"\n{num_engines} engines, {seconds:g} s: {figures}; {retrieved} chunks retrieved, {evicted} evicted")
        assert all(each["aborted"] and each["loaded_tokens"] for each in figures)
        if long_seconds:
            assert not any(each["stalls"] for each in figures)
            assert evicted["demand"] + evicted["watermark"]
        assert (status["l1"]["pins"], status["l1"]["reserved_bytes"]) == (0, 0)
