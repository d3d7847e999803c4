"""Clients in a process of their own that store and read at random and check every byte; run as `python -m tests.chaos.load`.

Whatever else happens, a read that `verify` accepts has the bytes that follow from the key. Errors are expected only while the
server is away; they are counted by name. The process runs until its standard input is closed, and then prints its counts.
"""

import contextlib
import json
import random
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import LMCacheError, StaleReadError
from lmcache.protocol import Evict, StoreOutcome
from tests.chaos.content import chunk_key, chunk_keys, content
from tests.fakes import PATIENCE_SECONDS

REPORT_SECONDS = 2 * PATIENCE_SECONDS
ENOUGH_HITS = 250
SIZES = (4096, 12288, 20000, 65536)
MAX_RUN = 6


class Load:
    """The test's end. Leaving the `with` block kills the process if it still runs.

    Args:
        url: the server.
        seed: what the run follows.
        num_keys: how many different chunks there are; the more, the more evictions.
        writes_ratio: share of the operations that store.
        num_threads: clients in the process.
        options: more for `KVCacheClient`; without a deadline each call may take as long as a busy machine needs.
    """

    def __init__(self, url: str, seed: int, num_keys: int, writes_ratio: float, num_threads: int = 1, **options: Any) -> None:
        options = {"timeout_seconds": PATIENCE_SECONDS, **options}
        arguments = [url, *map(str, (seed, num_keys, writes_ratio, num_threads)), json.dumps(options)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.load", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )

    def wait_until_it_runs(self) -> None:
        """Return when all its clients are attached."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"running\n"

    def wait_until_it_has_done_enough(self) -> None:
        """Return when it has stored something and read ENOUGH_HITS chunks, however long the server was away; call it once."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], REPORT_SECONDS)
        assert ready, "it does not get to read anything"
        assert self._process.stdout.readline() == b"enough\n"

    def finish(self) -> Counter[str]:
        """End it and return its counts."""
        output, _ = self._process.communicate(timeout=REPORT_SECONDS)
        assert self._process.returncode == 0
        return Counter(json.loads(output.splitlines()[-1]))

    def __enter__(self) -> "Load":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


class _Worker:
    """One client and what it counted."""

    def __init__(self, client: KVCacheClient, seed: int, num_keys: int, writes_ratio: float) -> None:
        self.counts: Counter[str] = Counter()
        self._client = client
        self._random = random.Random(seed)
        self._num_keys = num_keys
        self._writes_ratio = writes_ratio
        self._num_requests = 0

    def run(self, stop: threading.Event) -> None:
        """Go on until told to stop."""
        while not stop.is_set():
            try:
                self._step()
            except LMCacheError as exc:
                self.counts[f"error {type(exc).__name__}"] += 1
                stop.wait(0.01)

    def _step(self) -> None:
        indices = self._choose()
        if self._random.random() < self._writes_ratio:
            self._write(indices)
        else:
            meanwhile = (self._nothing, self._nap, self._unpin, self._evict)
            self._read(indices, *self._random.choices(meanwhile, weights=(4, 4, 2, 1)))

    def _choose(self) -> list[int]:
        """A run of chunks of one size: the size follows from the number."""
        size = self._random.randrange(len(SIZES))
        # Small numbers more often: they are read again and stay, the others push each other out.
        first = int(self._random.random() ** 3 * self._num_keys)
        return [(first + step) * len(SIZES) + size for step in range(self._random.randint(1, MAX_RUN))]

    def _write(self, indices: list[int]) -> None:
        num_bytes = SIZES[indices[0] % len(SIZES)]
        with self._client.reserve(chunk_keys(indices), num_bytes) as reservation:
            self._nap(indices, "")  # a server may die, or be another one, before the bytes are written
            for position, extent in zip(reservation.reserved_indices(), reservation.extents, strict=True):
                extent[:] = content(chunk_key(indices[position]), num_bytes)
            self._nap(indices, "")
            if self._random.random() < 0.9:
                self.counts["stored"] += reservation.commit(with_checksums=self._random.random() < 0.5)
            self.counts["full"] += reservation.outcomes.count(StoreOutcome.FULL)

    def _read(self, indices: list[int], meanwhile: Any) -> None:
        self._num_requests += 1
        request_id = f"{id(self)}-{self._num_requests}"
        if self._random.random() < 0.3:
            self.counts["found"] += self._client.lookup(chunk_keys(indices), request_id).hit_chunks
        try:
            with self._client.pin(chunk_keys(indices), request_id) as pinned:
                meanwhile(indices, request_id)
                copies = [bytes(extent) for extent in pinned.extents]
                pinned.verify(check_content=self._random.random() < 0.5)
        except StaleReadError:
            self.counts["stale"] += 1
            return
        finally:
            self._client.end_session(request_id)
        self.counts["hits"] += len(copies)
        self.counts["misses"] += len(indices) - len(copies)
        for index, copy in zip(indices, copies, strict=False):
            if copy != content(chunk_key(index), SIZES[index % len(SIZES)]):
                self.counts["wrong"] += 1
                print(f"chunk {index} has {len(copy)} wrong bytes: {copy[:32].hex()}", file=sys.stderr, flush=True)

    def _nothing(self, indices: list[int], request_id: str) -> None:
        pass

    def _nap(self, indices: list[int], request_id: str) -> None:
        time.sleep(self._random.random() ** 4 * 0.02)

    def _unpin(self, indices: list[int], request_id: str) -> None:
        """The pins go before the copy, so that the chunks can be evicted under it: `verify` must notice."""
        self._client.end_session(request_id)  # given back, not taken: nothing is kept for a while
        self.counts["unpinned reads"] += 1
        self._nap(indices, request_id)

    def _evict(self, indices: list[int], request_id: str) -> None:
        """So do the chunks, and what was freed last is given out first."""
        self._unpin(indices, request_id)
        self._client.mq.call(Evict(), [chunk_keys(indices)])
        self._nap(indices, request_id)


def tell_when_it_is_enough(workers: list[_Worker], stop: threading.Event) -> None:
    def total(name: str) -> int:
        return sum(worker.counts[name] for worker in workers)

    while total("hits") < ENOUGH_HITS or not total("stored"):
        if stop.wait(0.02):
            return
    print("enough", flush=True)


def main() -> None:
    url, seed, num_keys, writes_ratio, num_threads, options = sys.argv[1:]
    stop = threading.Event()
    with contextlib.ExitStack() as clients:
        workers = []
        for number in range(int(num_threads)):
            client = clients.enter_context(KVCacheClient(url, kind="load", **json.loads(options)))
            client.attach()
            workers.append(_Worker(client, int(seed) * 1000 + number, int(num_keys), float(writes_ratio)))
        threads = [threading.Thread(target=worker.run, args=(stop,)) for worker in workers]
        for thread in threads:
            thread.start()
        print("running", flush=True)
        told = threading.Thread(target=tell_when_it_is_enough, args=(workers, stop))
        told.start()
        sys.stdin.read()
        stop.set()
        told.join()
        for thread in threads:
            thread.join()
    print(json.dumps(sum((worker.counts for worker in workers), Counter())))


if __name__ == "__main__":
    main()
