"""Two servers share one L2, and either is killed at any moment: no wrong byte, no hang."""

import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import LMCacheError, UnreachableError
from tests.chaos.content import chunk_key, chunk_keys, content
from tests.chaos.waiting import wait_until
from tests.l2_servers import ACCESS, BUCKET, redis_server, s3_server
from tests.server_process import LmcacheServer

CHUNK_BYTES = 64 << 10
PROMPT_CHUNKS = 4
NUM_PROMPTS = 200
NUM_KILLS = 25
L1_CHUNKS = 64
JOIN_SECONDS = 60.0
# A fake S3 on a busy machine is slower than any engine.
L2_FLAGS = ["--l2-drain-seconds", "1", "--l2-lookup-timeout-seconds", "30", "--l2-min-tokens-per-second", "0"]


def flags(pool_dir: Path, adapter: str) -> list[str]:
    """Of a server whose L1 holds a twelfth of the prompts."""
    return ["--pool-dir", str(pool_dir), "--l2-adapter", adapter, "--client-lease-seconds", "1", *L2_FLAGS]


@contextlib.contextmanager
def two_servers(pool_dir: Path, adapter: str) -> Iterator[list[LmcacheServer]]:
    size = L1_CHUNKS * CHUNK_BYTES / 2**30
    with (
        LmcacheServer(flags(pool_dir, adapter), http=False, l1_size_gb=size) as one,
        LmcacheServer(flags(pool_dir, adapter), http=False, l1_size_gb=size) as other,
    ):
        yield [one, other]


def prompt(number: int) -> range:
    return range(number * PROMPT_CHUNKS, (number + 1) * PROMPT_CHUNKS)


def right_bytes(index: int) -> bytes:
    return content(chunk_key(index), CHUNK_BYTES)


class Worker:
    """One client in a thread: stores prompts, looks others up, and checks every byte that comes.

    Args:
        stores: whether it stores what it does not find.
    """

    def __init__(self, url: str, seed: int, stores: bool) -> None:
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._url = url
        self._random = random.Random(seed)
        self._stores = stores
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-worker")
        self._thread.start()

    def _run(self) -> None:
        with KVCacheClient(self._url, timeout_seconds=2.0) as client:
            while not self._stop.is_set():
                try:
                    self._turn(client, prompt(self._random.randrange(NUM_PROMPTS)))
                except UnreachableError:
                    self.counts["unreachable"] += 1
                    time.sleep(0.02)
                except LMCacheError as exc:
                    self.counts[f"failed: {exc.code}"] += 1

    def _turn(self, client: KVCacheClient, indices: range) -> None:
        keys = chunk_keys(indices)
        reply = client.lookup(keys, "r")
        self.counts["from L2"] += reply.l2_chunks
        buffers = [bytearray(CHUNK_BYTES) for _ in range(reply.hit_chunks)]
        num_read = client.retrieve(keys[: 32 * reply.hit_chunks], buffers, "r", check_content=True)
        client.end_session("r")
        for index, buffer in zip(indices, buffers[:num_read], strict=False):
            self.counts["read"] += 1
            if bytes(buffer) != right_bytes(index):
                self.wrong.append(f"chunk {index}")
        if self._stores and num_read < len(indices):
            client.store(keys, [right_bytes(index) for index in indices])
            self.counts["stored"] += 1

    def end(self) -> None:
        """Stop and wait."""
        self._stop.set()
        self._thread.join(JOIN_SECONDS)
        assert not self._thread.is_alive(), "a client hangs"


@pytest.fixture(params=["fs", "redis", "s3"])
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An L2 of each kind, on a real back end."""
    if request.param == "fs":
        yield f"fs://{tmp_path}/l2?capacity-gb=1"
    elif request.param == "redis":
        with redis_server(tmp_path / "redis") as port:
            yield f"redis://127.0.0.1:{port}?timeout-seconds=60"
    else:
        with s3_server(tmp_path) as port:
            yield f"s3://{BUCKET}/l2?endpoint=http://127.0.0.1:{port}&{ACCESS}&timeout-seconds=60"


def test_what_one_server_stores_the_other_serves(pool_dir: Path, adapter: str):
    with two_servers(pool_dir, adapter) as (one, other):
        with KVCacheClient(one.zmq_url, timeout_seconds=60) as writer:
            for number in range(20):
                writer.store(chunk_keys(prompt(number)), [right_bytes(index) for index in prompt(number)], with_checksums=True)
                wait_until(lambda: not one.status()["l2"][0]["queued_chunks"], "the writes")
        with KVCacheClient(other.zmq_url, timeout_seconds=60) as reader:
            for number in range(20):
                keys = chunk_keys(prompt(number))
                assert reader.lookup(keys, "r").hit_chunks == PROMPT_CHUNKS
                buffers = [bytearray(CHUNK_BYTES) for _ in prompt(number)]
                assert reader.retrieve(keys, buffers, "r", check_content=True) == PROMPT_CHUNKS
                reader.end_session("r")
                assert buffers == [right_bytes(index) for index in prompt(number)]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["fs", "redis"], indirect=True)
def test_servers_that_share_a_tier_are_killed_at_any_moment(pool_dir: Path, adapter: str):
    choices = random.Random()
    with two_servers(pool_dir, adapter) as servers:
        workers = [Worker(server.zmq_url, seed, seed % 2 == 0) for server in servers for seed in range(2)]
        try:
            for _ in range(NUM_KILLS):
                time.sleep(choices.uniform(0.0, 0.2))
                victim = choices.choice(servers)
                victim.kill()
                victim.start()
        finally:
            for worker in workers:
                worker.end()
        totals = sum((worker.counts for worker in workers), Counter[str]())
        assert not [wrong for worker in workers for wrong in worker.wrong]
        assert totals["read"] > 0
        assert totals["from L2"] > 0, totals
        for server in servers:
            wait_until(lambda server=server: server.status()["l1"]["pins"] == 0, "no pins are left")
            assert server.status()["healthy"]
