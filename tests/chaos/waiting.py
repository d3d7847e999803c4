"""Waiting for what must come true, and what must hold whenever a server is at rest."""

import time
from collections.abc import Callable
from typing import Any

from tests.server_process import LmcacheServer

LIMIT_SECONDS = 120.0


def wait_until(is_true: Callable[[], object], what: str, seconds: float = LIMIT_SECONDS) -> None:
    """Return when `is_true`; fail after a while."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)


def wait_for_rest(server: LmcacheServer) -> dict[str, Any]:
    """Return the status once nobody holds anything; every byte must be accounted for."""

    def is_at_rest() -> bool:
        status = server.status()
        l1 = status["l1"]
        return not (status["clients"] or status["sessions"] or l1["pins"] or l1["reserved_bytes"])

    wait_until(is_at_rest, "clients, sessions, pins and reservations are gone")
    status = server.status()
    assert status["l1"]["used_bytes"] + status["l1"]["free_bytes"] == status["l1"]["capacity_bytes"]
    return status


def assert_adds_up(server: LmcacheServer) -> None:
    """Nobody holds anything, and the server's own count of every entry agrees.

    It counts when it has been idle for a second: asking too early keeps it from that.
    """
    wait_for_rest(server)
    time.sleep(1.5)
    status = server.status()
    assert status["healthy"], status["problems"]
