"""The thread that carries stores out, and what becomes of them when it cannot."""

import threading

from lmcache.integration.vllm.background import BackgroundStores
from lmcache.integration.vllm.steps import StoreSpan
from lmcache.keys import KEY_BYTES
from tests.pools import wait_until


def spans_of(*requests: str) -> list[StoreSpan]:
    """One chunk of each request."""
    return [StoreSpan(request, bytes(KEY_BYTES), [0], 1) for request in requests]


def test_stores_that_their_own_thread_closes_are_given_up():
    """As garbage collection does, which finalizes an engine in whatever thread it begins."""
    started, closed = [], threading.Event()

    def close_within(job):
        started.append(job.span.request_id)
        stores.close(3600.0)
        closed.set()

    stores = BackgroundStores(close_within)
    stores.submit(1, spans_of("a", "b"), None)
    assert closed.wait(60)
    wait_until(lambda: not stores._thread.is_alive())
    assert (started, stores.done_up_to) == (["a"], 1)


def test_a_thread_that_cannot_begin_keeps_no_blocks(caplog):
    go, started = threading.Event(), []

    def prepare() -> None:
        assert go.wait(60)
        raise RuntimeError("no context")

    stores = BackgroundStores(started.append, prepare)
    stores.submit(1, spans_of("a", "b"), None)
    assert (stores.is_reading("a"), stores.done_up_to) == (True, 0)
    go.set()
    wait_until(lambda: not stores.is_reading("a"))
    stores.submit(2, spans_of("c"), None)
    assert (stores.is_reading("c"), stores.done_up_to, started) == (False, 2, [])
    assert "no context" in caplog.text
    assert "1 chunks were not stored" in caplog.text
    stores.close(60.0)
