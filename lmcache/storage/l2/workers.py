"""The threads that wait for a tier, so that the owner thread never does.

Comes in: jobs, from the owner thread. Goes out: the same jobs, done, through `Completions` and a wake-up of the owner.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from lmcache.log import init_logger
from lmcache.storage.l2.base import L2Adapter, L2Error, Reason
from lmcache.storage.l2.jobs import Job
from lmcache.storage.l2.value import HEADER_BYTES

logger = init_logger(__name__)

# An adapter's calls end within its own timeout, some seconds; a worker that is at one job for so long will not come back.
STUCK_SECONDS = 120.0


class Completions:
    """Jobs that are done. Workers append and wake the owner; the owner collects."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._jobs: deque[Job] = deque()
        self._wake = wake

    def add(self, job: Job) -> None:
        """Hand a job back; any thread."""
        self._jobs.append(job)
        self._wake()

    def collect(self) -> int:
        """Let the owner of each job see it; return how many there were. Owner thread."""
        num_jobs = 0
        while self._jobs:
            self._jobs.popleft().done()
            num_jobs += 1
        return num_jobs


class Workers:
    """Threads that run jobs in the order in which they came.

    Args:
        name: for people: of the threads, and in problems.
        niceness: how much the threads stand back behind others that want a core.
    """

    def __init__(self, name: str, num_threads: int, adapter: L2Adapter, completions: Completions, niceness: int = 0) -> None:
        self.name = name
        self._adapter = adapter
        self._completions = completions
        self._niceness = niceness
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        # Since when each thread is at its job; 0 while it waits for one.
        self._busy_since = [0.0] * num_threads
        self._threads = [
            threading.Thread(target=self._run, args=(index,), name=f"lmcache-l2-{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def num_threads(self) -> int:
        """How many jobs run side by side."""
        return len(self._threads)

    def submit(self, job: Job) -> None:
        """Run a job as soon as a thread is free; `job.done` is called by whoever collects."""
        self._jobs.put(job)

    def problems(self) -> list[str]:
        """Return what is wrong with the threads; [] when each waits or works."""
        found = []
        now = time.monotonic()
        for thread, since in zip(self._threads, self._busy_since, strict=True):
            if not thread.is_alive():
                found.append(f"thread {thread.name} ended")
            elif since and now - since > STUCK_SECONDS:
                found.append(f"thread {thread.name} has been at one call for {now - since:.0f} s")
        return found

    def end(self) -> None:
        """Let each thread end when it has done what it was given so far."""
        for _ in self._threads:
            self._jobs.put(None)

    def join(self, deadline: float) -> list[str]:
        """Wait for the threads' end; return the names of those that are still at a job at `deadline`."""
        for thread in self._threads:
            thread.join(timeout=max(0.0, deadline - time.monotonic()))
        return [thread.name for thread in self._threads if thread.is_alive()]

    def _run(self, index: int) -> None:
        if self._niceness:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        # A page of its own: direct I/O wants the header aligned as the chunks are.
        page = mmap.mmap(-1, HEADER_BYTES)
        with page, memoryview(page) as header:
            while (job := self._jobs.get()) is not None:
                self._busy_since[index] = time.monotonic() if job.operation != "clear" else 0.0  # that may take long
                self._run_job(job, header)
                self._busy_since[index] = 0.0
                self._completions.add(job)
                del job  # it holds views of the pool

    def _run_job(self, job: Job, header: memoryview) -> None:
        try:
            job.run(self._adapter, header)
        except L2Error as exc:
            job.error = exc
        except Exception as exc:  # a bug in an adapter, or an error of its library that it does not know, costs one job
            logger.exception("%s: a %s failed", self.name, job.operation)
            job.error = L2Error(f"{job.operation} failed: {exc!r}", code=Reason.ERROR)
