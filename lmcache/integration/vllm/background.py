"""Stores that go on while the engine computes: what KV on a GPU needs, where a copy to the host takes longer than a step.

Comes in: the stores of each step, and an event after which the blocks hold what is to be stored. Goes out: the same stores, one
after the other, on a thread of their own:

    step 1, its stores are queued | step 2 begins: its tokens have been   | step 3 begins: they have left for the client, so
                                  | sampled, and their copy to the host   | that our Python holds up nothing that leads to
                                  | will wait for none of ours            | them; the stores may begin

Until a store has read its blocks they must stay what they are:

    the request runs       the engine does not write to the blocks of tokens that are computed
    the request has ended  the scheduler keeps its blocks (`StepPlan.held`) until `is_reading` says no
    it is preempted        `cancel`: what was not handed to the device is given up, and the engine's stream waits for the rest

A plan's number stands for all its stores: `done_up_to` tells the scheduler for which requests there is nothing to wait for.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmcache.integration.vllm.steps import StoreSpan
from lmcache.log import RateLimitedLog, init_logger

logger = init_logger(__name__)

# Of an 8B model this is 16 GiB: 0.3 s on the wire. More than that waits only when the wire or the server is stuck; then chunks
# are dropped, so that an ended request's blocks are soon free again.
MAX_PENDING_CHUNKS = 512
IDLE_SECONDS = 0.5
# vLLM launches a step before it fetches the tokens of the one before. A store's Python beside that launch cost a first token
# 0.9 ms at 512 tokens (H200).
LATER_STEPS = 2
# Where those steps do not begin within so long, vLLM has nothing to launch, and waits for the GPU or for requests.
MAX_GATED_SECONDS = 0.05


class StoreJob:
    """One request's chunks of one step."""

    def __init__(self, plan_number: int, span: StoreSpan, fence: Any) -> None:
        self.plan_number = plan_number
        self.span = span
        self.fence = fence
        self.num_later_steps = 0  # that have begun
        self.may_start_at = time.monotonic() + MAX_GATED_SECONDS
        self.is_cancelled = False  # the blocks are no longer the request's

    @property
    def is_gated(self) -> bool:
        """Whether it waits for a step to begin."""
        return self.num_later_steps < LATER_STEPS


class BackgroundStores:
    """A queue of stores and the thread that carries them out. Its methods are the main thread's and do not wait.

    Args:
        store: carries out one job; it raises nothing and looks at `is_cancelled` before each piece that it reads.
        prepare_thread: called in the thread before the first job; where it fails nothing is stored.
    """

    def __init__(self, store: Callable[[StoreJob], None], prepare_thread: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._prepare_thread = prepare_thread
        self._jobs: deque[StoreJob] = deque()  # the first one is in work
        self._num_pending_chunks = 0
        self._last_plan = 0
        self._changed = threading.Condition()
        self._is_closing = False
        self._failure = ""
        self._log = RateLimitedLog(logger)
        self._thread = threading.Thread(target=self._run, name="lmcache-store", daemon=True)
        self._thread.start()

    def submit(self, plan_number: int, spans: Sequence[StoreSpan], fence: Any) -> None:
        """Queue a plan's stores; those for which too many wait already are dropped."""
        num_dropped = 0
        with self._changed:
            self._last_plan = plan_number
            for span in spans:
                is_full = self._num_pending_chunks + span.num_chunks > MAX_PENDING_CHUNKS and bool(self._jobs)
                if is_full or self._failure:
                    num_dropped += span.num_chunks
                    continue
                self._jobs.append(StoreJob(plan_number, span, fence))
                self._num_pending_chunks += span.num_chunks
            self._changed.notify()
        if num_dropped:
            reason = self._failure or "stores do not keep up"
            self._log.warning("dropped", f"{reason}: {num_dropped} chunks were not stored")

    @property
    def is_gated(self) -> bool:
        """Whether stores wait for a step to begin."""
        with self._changed:
            return any(job.is_gated for job in self._jobs)

    def begin_step(self, fence: Any) -> None:
        """A step begins; `fence` is an event after all of the step before, and what that one queued waits for it."""
        with self._changed:
            for job in self._jobs:
                if not job.num_later_steps:
                    job.fence = fence
                job.num_later_steps += 1
            if self._jobs and not self._jobs[0].is_gated:  # else the thread would be woken up beside the launch for nothing
                self._changed.notify()

    @property
    def done_up_to(self) -> int:
        """The number of the last plan with stores of which, and of all plans before it, nothing is left to read."""
        with self._changed:
            return self._jobs[0].plan_number - 1 if self._jobs else self._last_plan

    def is_reading(self, request_id: str) -> bool:
        """Whether blocks of the request are still to be read."""
        with self._changed:
            return any(job.span.request_id == request_id for job in self._jobs)

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Give up what has not been read of these requests."""
        wanted = set(request_ids)
        with self._changed:
            for job in self._jobs:
                job.is_cancelled = job.is_cancelled or job.span.request_id in wanted

    def close(self, seconds: float) -> None:
        """Carry out what is queued for so long at most, give up the rest and end the thread."""
        deadline = time.monotonic() + seconds
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        if self._thread is not threading.current_thread():  # as a finalizer it runs where garbage collection begins
            self._thread.join(timeout=max(0.0, deadline - time.monotonic()))
        with self._changed:
            for job in self._jobs:
                job.is_cancelled = True

    def _run(self) -> None:
        try:
            self._prepare_thread()
        except Exception as exc:  # vLLM must get back the blocks of ended requests that wait to be stored
            self._give_up(exc)
            return
        while True:
            with self._changed:
                while (wait_seconds := self._seconds_to_wait()) > 0:
                    self._changed.wait(timeout=wait_seconds)
                if not self._jobs:
                    return
                job = self._jobs[0]
            if not job.is_cancelled:
                self._store(job)
            with self._changed:
                self._jobs.popleft()
                self._num_pending_chunks -= job.span.num_chunks

    def _give_up(self, exc: Exception) -> None:
        """Drop what is queued, and what will be."""
        logger.error("the engine stores nothing: %s", exc, exc_info=exc)
        with self._changed:
            self._failure = f"the store thread could not begin ({exc})"
            self._jobs.clear()
            self._num_pending_chunks = 0

    def _seconds_to_wait(self) -> float:
        """Return how long there is nothing to do; 0 for the first job, or for the end."""
        if self._is_closing:
            return 0.0
        if not self._jobs:
            return IDLE_SECONDS
        job = self._jobs[0]
        return max(0.0, job.may_start_at - time.monotonic()) if job.is_gated else 0.0
