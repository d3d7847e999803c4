"""Stops asking a tier that fails, and tries again by itself. One for reads and one for writes of each tier. Owner thread only.

    CLOSED -- MAX_FAILURES of an operation in a row --> OPEN ---- back-off is over ----> PROBING
      ^                                                   ^------- the probe fails ---------+
      +------------------------------ the probe succeeds -----------------------------------+

The probe is one cheap question, but where reads failed, which may fail where questions do not: then it is one real lookup, and
the read that it makes decides. One that finds nothing to read leaves the breaker OPEN, for the next lookup to probe.

After a cheap probe has succeeded one failure opens it again, with a longer back-off, until something real has succeeded.
"""

from __future__ import annotations

import time
from enum import Enum

MAX_FAILURES = 5
# The operation that no cheap question shows to work.
REAL_WORK = "read"
MIN_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0


class BreakerState(str, Enum):
    """Whether a tier is asked; PROBING asks one thing and nothing else."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """Counts failures of each operation in a row: that values are found does not show that they can be read."""

    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self._failures: dict[str, int] = {}
        self._cause = ""
        self._backoff_seconds = MIN_BACKOFF_SECONDS
        self._probe_at = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether work may be given to the tier."""
        return self.state is BreakerState.CLOSED

    @property
    def takes_questions(self) -> bool:
        """Whether cheap questions may be asked: also where nothing but reads has failed."""
        return self.is_closed or self._cause == REAL_WORK

    def succeeded(self, operation: str = "") -> bool:
        """Note that work was done; True when it closed the breaker."""
        has_closed = self._is_on_trial and operation == REAL_WORK
        if has_closed:
            self.state = BreakerState.CLOSED
        if self.is_closed:
            self._failures.pop(operation, None)
            if not self._failures:
                self._backoff_seconds = MIN_BACKOFF_SECONDS
        return has_closed

    def failed(self, operation: str = "") -> bool:
        """Note a failure; True when it opened the breaker. What was under way when it opened changes nothing."""
        if self._is_on_trial:
            self._open()
        if not self.is_closed:
            return False
        self._failures[operation] = self._failures.get(operation, 0) + 1
        if self._failures[operation] < MAX_FAILURES:
            return False
        self._cause = operation
        self._open()
        return True

    def take_probe(self) -> bool:
        """Whether a cheap probe is due now; the caller then makes it and reports with `probed`."""
        return self._cause != REAL_WORK and self._take()

    def probed(self, is_good: bool) -> None:
        """Note the outcome of the probe."""
        if is_good:
            self.state = BreakerState.CLOSED
            self._failures[self._cause] = MAX_FAILURES - 1
        else:
            self._open()

    def take_trial(self) -> bool:
        """Whether the lookup that asks may be the probe; then `succeeded` or `failed` follows, and `end_trial` in any case."""
        return self._cause == REAL_WORK and self._take()

    def end_trial(self) -> None:
        """The lookup is over. If it has shown nothing, the next one may."""
        if self._is_on_trial:
            self.state = BreakerState.OPEN

    @property
    def _is_on_trial(self) -> bool:
        return self._cause == REAL_WORK and self.state is BreakerState.PROBING

    def _take(self) -> bool:
        if self.state is not BreakerState.OPEN or time.monotonic() < self._probe_at:
            return False
        self.state = BreakerState.PROBING
        return True

    def _open(self) -> None:
        self.state = BreakerState.OPEN
        self._probe_at = time.monotonic() + self._backoff_seconds
        self._backoff_seconds = min(2 * self._backoff_seconds, MAX_BACKOFF_SECONDS)
