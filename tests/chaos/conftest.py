"""A directory in shared memory of their own for tests, so that what others do there is not mistaken for a leftover of ours."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmcache.client.mq import MessageQueueClient
from lmcache.protocol import Clear, Status
from tests.chaos.waiting import wait_until
from tests.server_process import LmcacheServer


@contextmanager
def directory_left_empty() -> Iterator[Path]:
    """An empty directory in /dev/shm; fails if it is not left empty."""
    path = Path(tempfile.mkdtemp(prefix="lmcache-test-", dir="/dev/shm"))
    try:
        yield path
        left = sorted(entry.name for entry in path.iterdir())
    finally:
        shutil.rmtree(path)
    assert not left, f"left in shared memory: {left}"


@pytest.fixture
def pool_dir() -> Iterator[Path]:
    """One for a single test."""
    with directory_left_empty() as path:
        yield path


@pytest.fixture(scope="module")
def shared_server() -> Iterator[LmcacheServer]:
    """One server for all tests of a file, in such a directory."""
    with directory_left_empty() as path:
        flags = ["--pool-dir", str(path), "--client-lease-seconds", "1"]
        with LmcacheServer(flags, http=False, l1_size_gb=8 / 1024) as server:
            yield server


@pytest.fixture
def server(shared_server: LmcacheServer) -> Iterator[LmcacheServer]:
    """That server, empty and without clients; a test may freeze it, or kill and start it."""
    with MessageQueueClient(shared_server.zmq_url) as client:
        wait_until(lambda: not client.call(Status()).status["clients"], "the clients of other tests are gone")
        client.call(Clear(force=True))  # what they had pinned rests for a moment
    yield shared_server
    shared_server.thaw()
