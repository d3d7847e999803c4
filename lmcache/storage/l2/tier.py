"""One tier below L1: an adapter, the threads that wait for it, two breakers, and what it was measured to do. Owner thread only.

Comes in: jobs from `writeback.py` and `promotion.py`. Goes out: the same jobs, done, with the tier's books kept. Reads and
writes have threads and a breaker each: a tier that is full or read-only still serves, and a queue of writes delays no read.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec

from lmcache.log import RateLimitedLog, init_logger
from lmcache.metrics import L2_FAILURE_REASONS, Metrics
from lmcache.storage.l2.base import L2Adapter, Usage
from lmcache.storage.l2.breaker import Breaker
from lmcache.storage.l2.jobs import (
    VALUE_CODES,
    FindJob,
    Job,
    Outcome,
    ProbeJob,
    ReadJob,
    TouchJob,
    UsageJob,
    WriteJob,
)
from lmcache.storage.l2.workers import Completions, Workers

logger = init_logger(__name__)

USAGE_SECONDS = 10.0
# Uses that wait to be noted, a lookup each; more than that are not noted: the next lookup of a prompt notes it again.
MAX_TOUCHES = 4
# Writes have time, an engine that copies has not. Where all cores are busy, L1 keeps 0.95 to 0.97 of its speed beside writes of
# 1 GB/s, at 0 it keeps 0.7 (2 cores, benchmarks/l2_beside_l1.py). The owner waits longer for the interpreter when such a thread
# is put aside while holding it: the 99th percentile of a NOOP is then 6 to 19 ms, at niceness 0 it is 8.
WRITER_NICENESS = 19
# How much of the past counts when a new figure comes.
DECAY = 0.75


class Speed:
    """Amount per second, of late: old amounts and seconds fade together, so a long transfer weighs more than a short one."""

    def __init__(self) -> None:
        self._amount = 0.0
        self._seconds = 0.0

    def add(self, amount: float, seconds: float) -> None:
        """Take a measurement in."""
        self._amount = DECAY * self._amount + amount
        self._seconds = DECAY * self._seconds + max(seconds, 1e-9)

    @property
    def per_second(self) -> float | None:
        """The figure; None before the first measurement."""
        return self._amount / self._seconds if self._seconds else None

    @property
    def seconds_each(self) -> float | None:
        """Its inverse."""
        return self._seconds / self._amount if self._amount else None


class TierConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the tiers have in common.

    `min_tokens_per_second`: a hit that a tier is expected to deliver more slowly is not waited for.
    """

    chunk_size: int = 256
    lookup_timeout_seconds: float = 1.0
    min_tokens_per_second: float = 1000.0
    inflight_ratio: float = 0.5
    write_on_evict: bool = False
    read_threads: int = 4
    write_threads: int = 2


class Tier:
    """One configured adapter.

    Args:
        name: its label in metrics, status and messages.
        shown: the adapter as configured, without secrets.
    """

    def __init__(
        self, name: str, shown: str, adapter: L2Adapter, config: TierConfig, completions: Completions, metrics: Metrics
    ) -> None:
        self.name = name
        self.reads, self.writes = Breaker(), Breaker()
        self.read_speed = Speed()
        self.usage = Usage()
        self.last_progress_at = {"find": 0.0, "read": 0.0}
        """When such a job last came back with something, on the monotonic clock."""
        self.num_clears = 0
        """Clears under way or to come: until they are over nothing that is found here counts."""
        self._shown = shown
        self._adapter = adapter
        self._metrics = metrics
        self._log = RateLimitedLog(logger)
        self._readers = Workers(f"{name}-read", config.read_threads, adapter, completions)
        self._writers = Workers(f"{name}-write", config.write_threads, adapter, completions, WRITER_NICENESS)
        self._write_speed = Speed()
        self._latency = {operation: Speed() for operation in ("find", "read", "write")}
        self._in_flight_bytes = {"read": 0, "write": 0}
        self._usage_at = 0.0
        self._is_asking_usage = False
        self._num_touches = 0
        self._last_error = ""

    # -- work ---------------------------------------------------------------------------------------------------------

    @property
    def keys_at_once(self) -> int:
        """For how many keys a question takes about as long as for one."""
        return self._adapter.keys_at_once

    @property
    def num_readers(self) -> int:
        """How many reads run side by side."""
        return self._readers.num_threads

    @property
    def num_writers(self) -> int:
        """How many writes run side by side."""
        return self._writers.num_threads

    def submit(self, job: Job) -> None:
        """Give a job to the threads for it; its `done` runs after the tier's own book-keeping."""
        done = job.done
        self._add_in_flight(job, 1)

        def finish() -> None:
            self._finish(job)
            done()

        job.done = finish
        (self._writers if job.is_write else self._readers).submit(job)

    def note_used(self, keys: bytes, world_size: int) -> None:
        """L1 had these chunks of a prompt when an engine asked."""
        if self._adapter.is_evicting and self.reads.takes_questions and self._num_touches < MAX_TOUCHES:
            self._num_touches += 1
            self.submit(TouchJob(keys, world_size, self._note_touched))

    def _note_touched(self) -> None:
        self._num_touches -= 1

    def fail(self, operation: str, code: str, message: str, breaker: Breaker | None) -> None:
        """Count a failure; to the engine it is a miss."""
        reason = code if code in L2_FAILURE_REASONS else "other"
        self._metrics.count("lmcache_l2_failures", self.name, operation, reason)
        self._last_error = message
        if breaker is not None and breaker.failed(operation):
            logger.warning(
                "L2 %s: no more %ss for now, after failures in a row: %s; it is tried again by itself",
                self.name,
                operation,
                message,
            )
        else:
            self._log.warning(f"{operation} {reason}", f"L2 {self.name}: a {operation} failed ({reason}): {message}")

    def succeed(self, operation: str, breaker: Breaker) -> None:
        """Note that the tier has done something for somebody who waited."""
        if breaker.succeeded(operation):
            self._log_recovery(breaker)

    def _log_recovery(self, breaker: Breaker) -> None:
        logger.info("L2 %s answers again: %ss go on", self.name, "write" if breaker is self.writes else "read")

    def _finish(self, job: Job) -> None:
        self._add_in_flight(job, -1)
        breaker = self._breaker_of(job)
        if job.error is not None:
            is_value = job.error.code in VALUE_CODES
            self.fail(job.operation, job.error.code, str(job.error), None if is_value else breaker)
        elif breaker is not None and not job.is_cancelled and (not isinstance(job, ReadJob) or job.has_done_something):
            self.succeed(job.operation, breaker)
        if job.operation in self._latency and job.error is None and not job.is_cancelled:
            self._latency[job.operation].add(1, job.seconds)
            self._metrics.observe("lmcache_l2_duration_seconds", self.name, job.operation, value=job.seconds)
        if isinstance(job, (ReadJob, WriteJob)):
            self._finish_transfers(job)
        if isinstance(job, (FindJob, ReadJob)) and job.has_done_something:
            self.last_progress_at[job.operation] = time.monotonic()

    def _breaker_of(self, job: Job) -> Breaker | None:
        if job.operation in ("find", "read"):
            return self.reads
        return self.writes if job.operation == "write" else None

    def _finish_transfers(self, job: ReadJob | WriteJob) -> None:
        """Let go of the pool, and count."""
        moved = [t for t in job.transfers if t.outcome is Outcome.DONE]
        num_bytes = sum(len(t.extent) for t in moved)
        verb = "read" if job.operation == "read" else "written"
        self._metrics.count(f"lmcache_l2_{verb}_chunks", self.name, by=len(moved))
        self._metrics.count(f"lmcache_l2_{verb}_bytes", self.name, by=num_bytes)
        if num_bytes and job.operation == "write":
            self._write_speed.add(num_bytes, job.seconds)
        for transfer in job.transfers:
            with contextlib.suppress(BufferError):  # somebody still looks at it: the pool's mapping stays until that ends
                transfer.extent.release()
            if job.operation == "read" and transfer.outcome is Outcome.PENDING:  # the job ended before its turn
                transfer.outcome = Outcome.FAILED

    def _add_in_flight(self, job: Job, sign: int) -> None:
        if isinstance(job, (ReadJob, WriteJob)):
            self._in_flight_bytes[job.operation] += sign * sum(len(t.extent) for t in job.transfers)

    # -- time passes --------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Probe what is open, and ask now and then how full the tier is."""
        for breaker in (self.reads, self.writes):
            if breaker.take_probe():
                self._probe(breaker)
        now = time.monotonic()
        if self.reads.takes_questions and not self._is_asking_usage and now - self._usage_at >= USAGE_SECONDS:
            self._usage_at, self._is_asking_usage = now, True
            job = UsageJob(lambda: self._note_usage(job))
            self.submit(job)

    def _probe(self, breaker: Breaker) -> None:
        def probed() -> None:
            breaker.probed(job.error is None)
            if breaker.is_closed:
                self._log_recovery(breaker)

        job = ProbeJob(breaker is self.writes, probed)
        self.submit(job)

    def _note_usage(self, job: UsageJob) -> None:
        self._is_asking_usage = False
        if job.error is None:
            self.usage = job.usage

    def forget_usage(self) -> None:
        """Ask again how full it is: it was cleared."""
        self._usage_at = 0.0

    # -- what it looks like -------------------------------------------------------------------------------------------

    def problems(self) -> list[str]:
        """Return what is wrong with the threads. A tier that is down is not among it: the server works without."""
        return [f"L2 {self.name}: {problem}" for problem in (*self._readers.problems(), *self._writers.problems())]

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add to one of this tier's counters."""
        self._metrics.count(f"lmcache_l2_{name}", self.name, *labels, by=by)

    def update_gauges(self, num_queued: int) -> None:
        """Bring the tier's gauges up to date."""
        for direction, breaker in (("read", self.reads), ("write", self.writes)):
            self._metrics.set("lmcache_l2_breaker_open", not breaker.is_closed, self.name, direction)
            self._metrics.set("lmcache_l2_in_flight_bytes", self._in_flight_bytes[direction], self.name, direction)
        self._metrics.set("lmcache_l2_used_bytes", self.usage.used_bytes or 0, self.name)
        self._metrics.set("lmcache_l2_capacity_bytes", self.usage.capacity_bytes or 0, self.name)
        self._metrics.set("lmcache_l2_queued_chunks", num_queued, self.name)
        self._metrics.set("lmcache_l2_read_bytes_per_second", self.read_speed.per_second or 0, self.name)

    def status(self, num_queued: int) -> dict[str, Any]:
        """Return the tier's part of the status view."""

        def value(name: str, *labels: str) -> int:
            return self._metrics.value(f"lmcache_l2_{name}", self.name, *labels)

        hits, misses = value("lookup_chunks", "hit"), value("lookup_chunks", "miss")
        return {
            "name": self.name,
            "adapter": self._shown,
            "read_breaker": self.reads.state.value,
            "write_breaker": self.writes.state.value,
            "used_bytes": self.usage.used_bytes,
            "capacity_bytes": self.usage.capacity_bytes,
            "objects": self.usage.objects,
            "hit_rate": hits / (hits + misses) if hits + misses else None,
            "hit_chunks": hits,
            "missed_chunks": misses,
            "read_chunks": value("read_chunks"),
            "read_bytes": value("read_bytes"),
            "written_chunks": value("written_chunks"),
            "written_bytes": value("written_bytes"),
            "read_bytes_per_second": self.read_speed.per_second,
            "write_bytes_per_second": self._write_speed.per_second,
            **{f"{operation}_seconds": speed.seconds_each for operation, speed in self._latency.items()},
            "queued_chunks": num_queued,
            "in_flight_read_bytes": self._in_flight_bytes["read"],
            "in_flight_write_bytes": self._in_flight_bytes["write"],
            "failures": sum(self._metrics.matching("lmcache_l2_failures", self.name).values()),
            "dropped_chunks": sum(self._metrics.matching("lmcache_l2_dropped_chunks", self.name).values()),
            "last_error": self._last_error or None,
        }

    def end(self) -> None:
        """Let the threads end."""
        self._readers.end()
        self._writers.end()

    def close(self, deadline: float) -> list[str]:
        """Let go of the adapter after the threads' `end`; return those that are still at a call at `deadline`."""
        stuck = self._readers.join(deadline) + self._writers.join(deadline)
        if not stuck:
            self._adapter.close()
        return stuck
