"""A cache server that dies and comes back at the same address, with its old pool or with a new one."""

import random
from pathlib import Path
from typing import Any

from tests.server_process import LmcacheServer

POOL_NAME = "chaos"


class MortalServer:
    """One address, many lives. `now` is the server of this life.

    Args:
        flags: of both kinds of server.
        pool_dir: an empty directory in shared memory.
        l1_size_gb: size of each pool.
    """

    def __init__(self, flags: list[str], pool_dir: Path, l1_size_gb: float) -> None:
        self._pool_dir = pool_dir
        flags = [*flags, "--pool-dir", str(pool_dir)]
        self._fresh = LmcacheServer(flags, l1_size_gb=l1_size_gb, leaves_pool=True)
        same = ["--port", str(self._fresh.port), "--http-port", str(self._fresh.http_port), "--pool-name", POOL_NAME]
        self._keeping = LmcacheServer([*flags, *same], l1_size_gb=l1_size_gb, leaves_pool=True)
        self._keeping.port, self._keeping.zmq_url = self._fresh.port, self._fresh.zmq_url
        self._keeping.http_port, self._keeping.http_url = self._fresh.http_port, self._fresh.http_url
        self.now = self._fresh
        self.adopted_chunks = 0
        self._counters_before: list[dict[str, Any]] = []

    def start(self, keeps_pool: bool = False) -> None:
        """Start the next life: with the pool of the last one that kept it, or with an empty one that dies with it."""
        self.now = self._keeping if keeps_pool else self._fresh
        self.now.start()
        self.adopted_chunks += self.now.status()["l1"]["adopted_chunks"]

    def kill(self) -> None:
        """End this life with SIGKILL."""
        self._counters_before.append(self.now.status()["counters"])
        self.now.kill()

    def kill_frozen(self) -> None:
        """End a life that is frozen: it cannot tell its counters any more."""
        self.now.kill()

    def total(self, name: str) -> int:
        """Return a counter, a name or `name.label`, summed over all lives."""
        return sum(_read(counters, name) for counters in [*self._counters_before, self.now.status()["counters"]])

    def close(self) -> None:
        """Stop, and check that nothing but the pool that was to be kept is left in the directory."""
        self.now.stop()
        left = {path.name for path in self._pool_dir.iterdir()}
        for server in (self._fresh, self._keeping):
            server.close()
        for path in self._pool_dir.iterdir():
            path.unlink()
        kept = {Path(self._keeping.pool_path).name} if self._keeping.pool_path else set()
        assert left <= kept, f"left in shared memory: {left - kept}"


def _read(counters: Any, name: str) -> int:
    for part in name.split("."):
        counters = counters[part]
    return int(sum(counters.values()) if isinstance(counters, dict) else counters)


def make_seed(option: str | None) -> int:
    """Return the seed that was asked for, or a new one."""
    return random.SystemRandom().randrange(2**32) if option is None else int(option)
