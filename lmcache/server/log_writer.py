"""The server's log, written by a thread of its own: no thread that serves waits for whoever reads stderr."""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import threading

# Lines that wait for a reader that stands still; further ones are dropped.
MAX_LINES = 4096
CLOSE_SECONDS = 2.0


class LogWriter(logging.handlers.QueueHandler):
    """A handler that never blocks. What it drops it counts, in the log itself.

    Args:
        descriptor: where lines go. Not a stream: the interpreter, as it ends, waits for one that a thread is in.
    """

    def __init__(self, descriptor: int) -> None:
        # Logging may be interrupted by the collector, which may log: a SimpleQueue bears that, and has no bound of its own.
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        super().__init__(self._lines)
        self._descriptor = descriptor
        self._num_dropped = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="lmcache-log", daemon=True)
        self._thread.start()

    def enqueue(self, record: logging.LogRecord) -> None:
        """Take a line, which is formatted already, or drop it. Called with the handler's lock."""
        if self._is_closed or self._lines.qsize() >= MAX_LINES:
            self._num_dropped += 1
            return
        self._tell_dropped()
        self._lines.put(record.getMessage())

    def close(self) -> None:
        """Write what is there, as long as somebody reads it, and end the thread; nothing is written any more."""
        with self.lock:  # type: ignore[union-attr]
            if self._is_closed:
                return
            self._is_closed = True
            self._tell_dropped()
            self._lines.put(None)
        self._thread.join(CLOSE_SECONDS)
        super().close()

    def _tell_dropped(self) -> None:
        if self._num_dropped:
            message = f"{self._num_dropped} lines were dropped here: nobody has read the log"
            self._num_dropped = 0
            self._lines.put(self.format(logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, None, None)))

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            self._write(f"{line}\n".encode(errors="backslashreplace"))

    def _write(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            return  # the reader is gone, or the disk is full: there is nowhere to tell
