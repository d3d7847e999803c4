"""A client in a process of its own that does one thing at a time, as a test tells it; run as `python -m tests.chaos.actor`.

The test sends lines of JSON, `[verb, arguments]`, and gets one line for each: what the verb returned, or `{"error": name}`.
"""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from lmcache.client.kvcache import KVCacheClient, PinnedChunks, Reservation
from lmcache.errors import LMCacheError, StaleReadError
from tests.chaos.content import chunk_key, chunk_keys, content
from tests.fakes import PATIENCE_SECONDS

ANSWER_SECONDS = 2 * PATIENCE_SECONDS


class Actor:
    """The test's end. Leaving the `with` block kills the process if it still runs."""

    def __init__(self, url: str, **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.actor", url, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )

    def tell(self, verb: str, **arguments: Any) -> Any:
        """Let it do something and return the result."""
        self.begin(verb, **arguments)
        return self.answer()

    def begin(self, verb: str, **arguments: Any) -> None:
        """Let it do something; `answer` returns the result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, arguments]).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Return the result of the oldest thing that it was let do."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], ANSWER_SECONDS)
        assert ready, "the actor does not answer"
        return json.loads(self._process.stdout.readline())

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; after SIGKILL it is reaped."""
        os.kill(self._process.pid, number)
        if number == signal.SIGKILL:
            self._process.wait()

    def __enter__(self) -> "Actor":
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


class _Script:
    """The process's end: one method a verb."""

    def __init__(self, client: KVCacheClient) -> None:
        self._client = client
        self._reservation: Reservation | None = None
        self._pinned: PinnedChunks | None = None
        self._keys: list[bytes] = []

    def attach(self) -> str:
        """Introduce itself; returns the client id."""
        return self._client.attach().client_id

    def reserve(self, indices: list[int], chunk_bytes: int) -> list[int]:
        """Reserve places; returns the outcomes."""
        self._keys = [chunk_key(index) for index in indices]
        self._reservation = self._client.reserve(chunk_keys(indices), chunk_bytes)
        return [int(outcome) for outcome in self._reservation.outcomes]

    def write(self, fill: int | None = None) -> int:
        """Write the right bytes, or all of them `fill`; returns how many extents were written."""
        assert self._reservation is not None
        for extent, index in zip(self._reservation.extents, self._reservation.reserved_indices(), strict=True):
            extent[:] = content(self._keys[index], len(extent)) if fill is None else bytes([fill]) * len(extent)
        return len(self._reservation.extents)

    def commit(self) -> int:
        """Publish; returns how many became visible."""
        assert self._reservation is not None
        return self._reservation.commit()

    def pin(self, indices: list[int], request_id: str = "") -> int:
        """Pin for reading; returns how many are present."""
        self._keys = [chunk_key(index) for index in indices]
        self._pinned = self._client.pin(chunk_keys(indices), request_id)
        return len(self._pinned.extents)

    def read(self) -> str:
        """Copy what is pinned and check it: "right", "stale" or "wrong"."""
        assert self._pinned is not None
        copies = [bytes(extent) for extent in self._pinned.extents]
        try:
            self._pinned.verify()
        except StaleReadError:
            return "stale"
        pairs = zip(copies, self._keys, strict=False)
        return "right" if all(copy == content(key, len(copy)) for copy, key in pairs) else "wrong"

    def lookup(self, indices: list[int], request_id: str) -> int:
        """Look up and keep the pins; returns the hit."""
        return self._client.lookup(chunk_keys(indices), request_id).hit_chunks

    def close(self) -> None:
        """Leave in good order."""
        self._client.close()


def main() -> None:
    url, options = sys.argv[1], json.loads(sys.argv[2])
    script = _Script(KVCacheClient(url, kind="actor", **{"timeout_seconds": PATIENCE_SECONDS, **options}))
    for line in sys.stdin:
        verb, arguments = json.loads(line)
        try:
            answer = getattr(script, verb)(**arguments)
        except LMCacheError as exc:
            answer = {"error": type(exc).__name__, "code": exc.code}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
