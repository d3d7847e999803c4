"""What a test must not leave behind in this process: threads, descriptors, mapped pools, files beside a pool."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

GRACE_SECONDS = 30.0


@contextmanager
def nothing_left(directory: Path | None = None) -> Iterator[None]:
    """Fail when what is opened inside is still open shortly after; `directory` must hold no pool's files either."""
    start_zmq_collector()
    before = (set(threading.enumerate()), _descriptors(), _mappings())
    yield
    deadline = time.monotonic() + GRACE_SECONDS
    while problems := _left(*before, directory):
        assert time.monotonic() < deadline, "left behind: " + "; ".join(problems)
        time.sleep(0.005)


def start_zmq_collector() -> None:
    """pyzmq keeps one thread for the whole process once a frame was sent without copying: start it before counting."""
    from zmq.utils.garbage import gc

    if gc.thread is None:
        with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
            one.bind("inproc://start-the-collector")
            other.connect("inproc://start-the-collector")
            one.send(bytes(1 << 17), copy=False)
            other.recv()


def _left(
    threads: set[threading.Thread], descriptors: set[tuple[str, str]], mappings: set[str], directory: Path | None
) -> list[str]:
    left = [f"thread {thread.name}" for thread in set(threading.enumerate()) - threads]
    left += [f"descriptor {number} -> {target}" for number, target in _descriptors() - descriptors]
    left += [f"mapping {line}" for line in _mappings() - mappings]
    if directory is not None:
        left += [f"file {path}" for path in directory.glob("lmcache-pool-*")]
    return left


def _mappings() -> set[str]:
    return {line for line in Path("/proc/self/maps").read_text().splitlines() if "/lmcache-pool-" in line}


def _descriptors() -> set[tuple[str, str]]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
        except OSError:
            continue  # the listing's own descriptor
    return found
