"""Loggers that write to stderr, and a limiter for lines that would otherwise repeat."""

from __future__ import annotations

import json
import logging
import os
import sys
import time

ROOT_NAME = "lmcache"
LEVEL_VARIABLE = "LMCACHE_LOG_LEVEL"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (seconds since the epoch), level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        fields: dict[str, object] = {
            "time": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def configure_logging(level: str = "", json_lines: bool = False, handler: logging.Handler | None = None) -> None:
    """Send this package's log to stderr, or to `handler`; calling it again replaces what was set before."""
    root = logging.getLogger(ROOT_NAME)
    handler = handler or logging.StreamHandler(sys.stderr)
    if json_lines:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(_level(level or os.environ.get(LEVEL_VARIABLE, "INFO")))


def init_logger(name: str) -> logging.Logger:
    """Return a logger under `lmcache`, which writes to stderr unless the program set it up otherwise."""
    if not logging.getLogger(ROOT_NAME).handlers:
        configure_logging()
    return logging.getLogger(name if name.startswith(ROOT_NAME) else f"{ROOT_NAME}.{name}")


def _level(name: str) -> str:
    return name.upper() if name.upper() in LEVELS else "INFO"


class RateLimitedLog:
    """Logs each cause at most once per interval and says how often it happened since.

    Args:
        logger: where the lines go.
        interval_seconds: the shortest time between two lines of one cause.
    """

    def __init__(self, logger: logging.Logger, interval_seconds: float = 10.0) -> None:
        self._logger = logger
        self._interval_seconds = interval_seconds
        self._last: dict[str, float] = {}
        self._suppressed: dict[str, int] = {}

    def warning(self, cause: str, message: str) -> None:
        """Log `message` unless `cause` was logged less than the interval ago."""
        now = time.monotonic()
        if now - self._last.get(cause, -self._interval_seconds) < self._interval_seconds:
            self._suppressed[cause] = self._suppressed.get(cause, 0) + 1
            return
        self._last[cause] = now
        repeated = self._suppressed.pop(cause, 0)
        suffix = f" ({repeated} more since the last such line)" if repeated else ""
        self._logger.warning("%s%s", message, suffix)
