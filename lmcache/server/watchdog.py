"""Notices that the owner thread is stuck, and says so with what every thread is at. Main thread only."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable

from lmcache.log import init_logger

logger = init_logger(__name__)

LOOK_SECONDS = 0.5
# Health is off after 2 s. The longest that the owner thread should ever be at one thing are some 0.2 s.
STUCK_SECONDS = 5.0


class Watchdog:
    """Watches a count that goes up as long as the owner thread goes on. Each look is `LOOK_SECONDS` after the last one.

    It counts its own looks instead of asking a clock: where the whole process was frozen, there were none.

    Args:
        num_steps: tells the count; it may not wait for the owner thread.
        exit_seconds: how long the owner thread may be stuck until the process should end; 0: for ever.
    """

    def __init__(self, num_steps: Callable[[], int], exit_seconds: float = 0.0) -> None:
        self._num_steps = num_steps
        self._exit_seconds = exit_seconds
        self._seen = -1
        self._silent_seconds = 0.0
        self._is_told = False

    def is_time_to_exit(self) -> bool:
        """Look once, log what there is to tell, and say whether the process should end."""
        seen, self._seen = self._seen, self._num_steps()
        if seen != self._seen:
            if self._is_told:
                logger.warning("the owner thread goes on, after %.0f s; everything is answered again", self._silent_seconds)
            self._silent_seconds, self._is_told = 0.0, False
            return False
        self._silent_seconds += LOOK_SECONDS
        must_exit = 0 < self._exit_seconds <= self._silent_seconds
        if (must_exit or self._silent_seconds >= STUCK_SECONDS) and not self._is_told:
            self._is_told = True
            logger.error(
                "the owner thread has answered nothing for %.0f s; engines compute without the cache meanwhile; hint: if it"
                " stays so, restart the server (--exit-when-stuck-seconds leaves that to a supervisor), and report where it is"
                " stuck:\n%s",
                self._silent_seconds,
                _stacks(),
            )
        if must_exit:
            logger.error("ending with status 1 after %.0f s: --exit-when-stuck-seconds", self._silent_seconds)
        return must_exit


def _stacks() -> str:
    """Return where each thread is. In the log's one record, unlike what `faulthandler` writes, and with the threads' names."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
