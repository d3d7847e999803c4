"""What must stay as it is while a server is fed with nonsense: its process, its memory, its descriptors, its answers."""

import statistics
import time
from pathlib import Path

from lmcache.client.kvcache import KVCacheClient
from lmcache.protocol import Clear, Noop
from tests.chaos.content import chunk_key, content
from tests.chaos.waiting import assert_adds_up, wait_until
from tests.server_process import LmcacheServer

SAMPLE_SECONDS = 0.25
PING_SECONDS = 60.0
# Of the samples, in order of time: what is left out because malloc's pools still fill, and what is compared.
WARM_UP_SHARE = 0.3
COMPARED_SHARE = 0.2
MAX_GROWTH_BYTES = 32 << 20
MAX_MORE_DESCRIPTORS = 8
CANARY_BYTES = 20_000
PINNED, RESERVED, RENEWED = 10**9, 10**9 + 1, 10**9 + 2


class Watch:
    """Pings after each step, samples, and keeps chunks that nobody may touch: one pinned, one reserved, one renewed."""

    def __init__(self, server: LmcacheServer) -> None:
        self.num_steps = 0
        self._server = server
        self._pid = server.pid
        self._samples: list[int] = []
        self._next_sample_at = 0.0
        self._num_descriptors = self._descriptors()
        self._client = KVCacheClient(server.zmq_url, kind="watch", timeout_seconds=PING_SECONDS)
        key = chunk_key(PINNED)
        self._client.store(key, [content(key, CANARY_BYTES)])
        self._pinned = self._client.pin(key, "watch")
        self._reservation = self._client.reserve(chunk_key(RESERVED), CANARY_BYTES)

    def step(self) -> None:
        """The server answers, and the canaries are alive."""
        self.num_steps += 1
        self._client.mq.call(Noop(client=self._client.attach().client_id))
        if time.monotonic() >= self._next_sample_at:
            self._next_sample_at = time.monotonic() + SAMPLE_SECONDS
            self._samples.append(self._anonymous_bytes())
            self._check_canaries()

    def finish(self) -> str:
        """Check what remains when everyone else has gone; return the figures."""
        extent, key = self._reservation.extents[0], chunk_key(RESERVED)
        extent[:] = content(key, CANARY_BYTES)
        assert self._reservation.commit() == 1
        with self._client.pin(key) as pinned:
            assert bytes(pinned.extents[0]) == content(key, CANARY_BYTES)
        self._pinned.release()
        self._client.mq.call(Clear(force=True))
        assert self._server.status()["l1"]["chunks"] == 0, "chunks are left that no eviction finds"
        self._client.close()
        assert_adds_up(self._server)
        assert self._server.pid == self._pid
        assert "Traceback" not in self._server.log_text(), self._server.log_text()[-5000:]
        allowed = self._num_descriptors + MAX_MORE_DESCRIPTORS
        wait_until(lambda: self._descriptors() <= allowed, f"at most {allowed} descriptors are open")
        before, after = self._compared()
        assert after - before < MAX_GROWTH_BYTES, f"memory grew from {before} to {after} bytes: {self._samples}"
        return f"{self.num_steps} steps; anonymous memory {before / 2**20:.1f} -> {after / 2**20:.1f} MiB"

    def close(self) -> None:
        """Let go of everything, also after a failure."""
        self._client.close()

    def _check_canaries(self) -> None:
        assert bytes(self._pinned.extents[0]) == content(chunk_key(PINNED), CANARY_BYTES)
        self._pinned.verify()
        key = chunk_key(RENEWED)
        self._client.store(key, [content(key, CANARY_BYTES)])
        with self._client.pin(key) as pinned:
            copies = [bytes(extent) for extent in pinned.extents]
            pinned.verify()
        assert copies in ([], [content(key, CANARY_BYTES)])

    def _compared(self) -> tuple[float, float]:
        count = max(1, int(len(self._samples) * COMPARED_SHARE))
        start = int(len(self._samples) * WARM_UP_SHARE)
        return statistics.median(self._samples[start : start + count]), statistics.median(self._samples[-count:])

    def _anonymous_bytes(self) -> int:
        for line in Path(f"/proc/{self._pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("the kernel does not tell RssAnon")

    def _descriptors(self) -> int:
        return len(list(Path(f"/proc/{self._pid}/fd").iterdir()))
