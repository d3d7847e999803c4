"""When an engine launches its steps, for what nothing can be launched beside.

vLLM launches a step while the device still computes the one before, and then waits for that. What holds up the driver does no
harm there; beside a launch it does, as soon as the device has nothing more to compute.
"""

from __future__ import annotations

import threading
import time

# Steps follow each other faster than that, also those of long prompts.
COMPUTING_SECONDS = 1.0


class LaunchClock:
    """One thread tells; any may ask."""

    def __init__(self) -> None:
        self._last_step_at = float("-inf")
        self._has_launched = threading.Event()
        self._has_launched.set()

    def begin_step(self) -> None:
        """A step is about to be launched."""
        self._last_step_at = time.monotonic()

    def end_launch(self) -> None:
        """It has been."""
        if not self._has_launched.is_set():
            self._has_launched.set()

    def is_computing(self) -> bool:
        """Whether there was a step a moment ago."""
        return time.monotonic() - self._last_step_at < COMPUTING_SECONDS

    def wait_for_gap(self, seconds: float) -> None:
        """Return when a launch has just ended, or after so long; at once where nothing is computed."""
        if self.is_computing():
            self._has_launched.clear()
            self._has_launched.wait(seconds)
