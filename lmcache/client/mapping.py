"""A pool that is mapped into this process, shared by all lives of a client in which it is the same file.

Comes in: the pool's path. Goes out: its `PoolView`, pinned once, as long as somebody uses it. A server that was restarted over
its pool, or was only silent for a while, is a new life for its clients; to pin 64 GiB anew for that would take a minute.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from lmcache.pool import PoolView

# What is done with a pool that was mapped; returns how that is undone before it is unmapped.
WatchMapping = Callable[[PoolView], Callable[[], None]]


class Shared(ABC):
    """What has users: whoever makes it is the first, and the last one to release it closes it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # garbage collection closes clients in any thread
        self._num_users = 1

    def try_acquire(self) -> bool:
        """Keep it open until the matching `release`; False when it is closed already."""
        with self._lock:
            self._num_users += self._num_users > 0
            return self._num_users > 0

    def release(self) -> None:
        """Undo one `try_acquire`, or the construction."""
        with self._lock:
            self._num_users -= 1
            is_last = self._num_users == 0
        if is_last:
            self._close()

    @abstractmethod
    def _close(self) -> None:
        """Nobody uses it any more."""


class PoolMapping(Shared):
    """Unpinning and unmapping 64 GiB takes up to a minute, and the last user may be an engine's main thread: so a thread of its
    own does that.

    Raises: PoolError when it cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.view = PoolView(path)
        self._watch: WatchMapping | None = None
        self._unwatch: Callable[[], None] = lambda: None
        self._undone = threading.Event()
        self._undoing_thread = 0

    def watch(self, watch: WatchMapping) -> None:
        """Tell of it, while the caller uses it, if that was not done; what `watch` returns is called before it goes, or before
        somebody else is told.
        """
        if self._watch is not watch:
            unwatch, self._unwatch, self._watch = self._unwatch, lambda: None, None
            unwatch()
            self._unwatch = watch(self.view)
            self._watch = watch

    def is_of(self, path: Path) -> bool:
        """Whether it is this file that is mapped, and not one that has been put in its place."""
        try:
            status = os.stat(path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.view.file_id

    def may_be_served_again(self, is_gone: bool) -> bool:
        """Whether a server may offer this file: the one that did, unless it `is_gone`, or the next one over a kept pool."""
        return self.is_of(self.view.path) and (self.view.header.persistent or not is_gone)

    def join(self, seconds: float) -> None:
        """Wait until it is unmapped, if the last user has released it, and it is not the calling thread that does it."""
        if self._num_users == 0 and self._undoing_thread != threading.get_ident():
            self._undone.wait(seconds)

    @property
    def is_undone(self) -> bool:
        """Whether nothing is left of it."""
        return self._undone.is_set()

    def _close(self) -> None:
        if not self._begin_to_undo():
            self._undo()

    def _begin_to_undo(self) -> bool:
        if sys.is_finalizing():  # a thread would never begin, and Python 3.11 waits for that
            return False
        with contextlib.suppress(RuntimeError):  # no thread is to be had
            threading.Thread(target=self._undo, name="lmcache-unmap", daemon=True).start()
            return True
        return False

    def _undo(self) -> None:
        self._undoing_thread = threading.get_ident()
        try:
            self._unwatch()
            self.view.close()
        finally:
            self._undone.set()
