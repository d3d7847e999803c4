"""Stops asking a tier that fails, and tries again by itself. One for reads and one for writes of each tier. Owner thread only.

    CLOSED ---- MAX_FAILURES in a row ----> OPEN ---- back-off is over ----> PROBING
      ^                                       ^------- the probe fails ---------+
      +------------------------------ the probe succeeds -----------------------+

After a probe has succeeded one failure opens it again, with a longer back-off, until something real has succeeded.
"""

from __future__ import annotations

import time
from enum import Enum

MAX_FAILURES = 5
MIN_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0


class BreakerState(str, Enum):
    """Whether a tier is asked; PROBING asks one cheap question and nothing else."""

    CLOSED = "closed"
    OPEN = "open"
    PROBING = "probing"


class Breaker:
    """Counts failures in a row."""

    def __init__(self) -> None:
        self.state = BreakerState.CLOSED
        self._failures = 0
        self._backoff_seconds = MIN_BACKOFF_SECONDS
        self._probe_at = 0.0

    @property
    def is_closed(self) -> bool:
        """Whether work may be given to the tier."""
        return self.state is BreakerState.CLOSED

    def succeeded(self) -> None:
        """Note that work was done."""
        if self.is_closed:
            self._failures = 0
            self._backoff_seconds = MIN_BACKOFF_SECONDS

    def failed(self) -> bool:
        """Note a failure; True when it opened the breaker. What was under way when it opened changes nothing."""
        if not self.is_closed:
            return False
        self._failures += 1
        if self._failures < MAX_FAILURES:
            return False
        self._open()
        return True

    def take_probe(self) -> bool:
        """Whether a probe is due now; the caller then makes it and reports with `probed`."""
        if self.state is not BreakerState.OPEN or time.monotonic() < self._probe_at:
            return False
        self.state = BreakerState.PROBING
        return True

    def probed(self, is_good: bool) -> None:
        """Note the outcome of the probe."""
        if is_good:
            self.state = BreakerState.CLOSED
            self._failures = MAX_FAILURES - 1
        else:
            self._open()

    def _open(self) -> None:
        self.state = BreakerState.OPEN
        self._probe_at = time.monotonic() + self._backoff_seconds
        self._backoff_seconds = min(2 * self._backoff_seconds, MAX_BACKOFF_SECONDS)
