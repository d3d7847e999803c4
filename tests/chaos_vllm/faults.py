"""What goes wrong in a chaos run, one thing after the other, in an order that follows from a seed.

All kinds are drawn before one is drawn again.
"""

import random
import time
from collections import Counter
from collections.abc import Callable

import httpx

from lmcache.client.kvcache import KVCacheClient, Reservation
from lmcache.errors import LMCacheError
from lmcache.keys import KEY_BYTES
from lmcache.protocol import StoreOutcome
from tests.chaos_vllm.answers import CHUNK_SIZE
from tests.chaos_vllm.cache_server import MortalServer
from tests.integration.conftest import Engine
from tests.server_process import run_lmcache

CHUNK_BYTES = CHUNK_SIZE * 4096
PAUSE_SECONDS = (0.2, 4.0)
AWAY_SECONDS = (0.0, 3.0)
FROZEN_SECONDS = (0.1, 6.0)
FULL_SECONDS = (0.2, 2.0)
COMMAND_SECONDS = 60.0


class Faults:
    """Causes them; `counts` says how many of each kind."""

    def __init__(self, engine: Engine, server: MortalServer, generator: random.Random) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self.longest_return_seconds = 0.0
        self.waits_for_room = 0
        self._engine = engine
        self._server = server
        self._generator = generator
        self.kinds: dict[str, Callable[[], None]] = {
            "kill": self._kill,
            "kill, pool kept": self._kill_and_keep,
            "freeze": self._freeze,
            "freeze and kill": self._freeze_and_kill,
            "clear": self._clear,
            "full L1": self._fill,
            "forget": self._forget,
        }
        self._order: list[str] = []

    def cause_for(self, seconds: float) -> None:
        """Cause faults for a time, and all of the kinds at least once."""
        end = time.monotonic() + seconds
        while time.monotonic() < end or self._order:
            self._order = self._order or self._generator.sample(list(self.kinds), len(self.kinds))
            kind = self._order.pop()
            self.kinds[kind]()
            self.counts[kind] += 1
            time.sleep(self._generator.uniform(*PAUSE_SECONDS))

    def _kill(self, keeps_pool: bool = False) -> None:
        self._server.kill()
        self._come_back(keeps_pool)

    def _kill_and_keep(self) -> None:
        """From the second time on, the pool that the last such life left is taken over; the first may follow a fresh pool."""
        self._kill(keeps_pool=True)
        if self._generator.random() < 0.7:  # let it fill, and take it over
            time.sleep(self._generator.uniform(1.0, 4.0))
            self._kill(keeps_pool=True)

    def _freeze_and_kill(self) -> None:
        self._server.now.freeze()
        time.sleep(self._generator.uniform(*FROZEN_SECONDS))
        self._server.kill_frozen()
        self._come_back(self._generator.random() < 0.5)

    def _come_back(self, keeps_pool: bool) -> None:
        time.sleep(self._generator.uniform(*AWAY_SECONDS))
        self._server.start(keeps_pool)
        self._engine.server = self._server.now
        if self._generator.random() < 0.5:
            started_at = time.monotonic()
            self._engine.wait_for_cache()
            self.longest_return_seconds = max(self.longest_return_seconds, time.monotonic() - started_at)

    def _freeze(self) -> None:
        self._server.now.freeze()
        time.sleep(self._generator.uniform(*FROZEN_SECONDS))
        self._server.now.thaw()

    def _clear(self) -> None:
        ran = run_lmcache("kvcache", "clear", "--force", "--yes", "--url", self._server.now.zmq_url, "--timeout", "20")
        if ran.returncode not in (0, 1):  # 1: something stayed pinned all the time
            self.failures.append(f"clear: {ran.returncode} {ran.stderr}")

    def _fill(self) -> None:
        """Reserve all of L1 that is not pinned, so that nothing can be stored; then publish it or give it back."""
        try:
            with KVCacheClient(self._server.now.zmq_url, kind="flood") as client, self._reserve_room(client) as reservation:
                time.sleep(self._generator.uniform(*FULL_SECONDS))
                if self._generator.random() < 0.5:
                    for extent in reservation.extents:
                        extent[:] = b"\x3f" * len(extent)
                    reservation.commit()
        except LMCacheError as exc:
            self.failures.append(f"flood: {exc!r}")

    def _reserve_room(self, client: KVCacheClient) -> Reservation:
        """Where many requests wait, all of L1 may be pinned for them, but not for long."""
        l1 = self._server.now.status()["l1"]
        keys = self._generator.randbytes(KEY_BYTES * (l1["capacity_bytes"] // CHUNK_BYTES))
        deadline = time.monotonic() + COMMAND_SECONDS
        while True:
            reservation = client.reserve(keys, CHUNK_BYTES)
            if StoreOutcome.RESERVED in reservation.outcomes:
                return reservation
            l1 = self._server.now.status()["l1"]
            reservation.abort()
            if time.monotonic() > deadline:
                held = {name: l1[name] for name in ("chunks", "pins", "reserved_bytes")}
                raise LMCacheError(f"no room in L1: {Counter(reservation.outcomes)}, {held}")
            self.waits_for_room += 1
            time.sleep(0.05)

    def _forget(self) -> None:
        """vLLM refuses as long as a request has blocks, which it often has."""
        httpx.post(f"{self._engine.url}/reset_prefix_cache", timeout=COMMAND_SECONDS)
