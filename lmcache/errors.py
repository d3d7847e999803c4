"""Every error that this package raises on purpose, with the exit code that the command line gives it.

LMCacheError
├── UsageError            2  a flag, URL, file or environment variable is not acceptable
│   └── PoolSizeError     2  the pool asked for does not fit this machine
├── UnreachableError      3  nothing that speaks our protocol answers at the address
│   └── DeadlineError     3  no answer within the deadline
├── ProtocolError         1  the peer answered with bytes that we cannot read
├── RemoteError           1  the server answered with an error
├── PoolError             1  the pool file is missing, foreign or damaged
├── StaleReadError        1  the bytes read were given to another chunk during the copy
├── SpoiledLoadError      1  a request was let go on, and then its load turned out to be worthless
├── LayoutMismatchError   1  an engine's KV tensors disagree with the registered layout
├── ChecksumError         1  bytes read differ from bytes stored
└── InconclusiveError     4  a check ran and could decide nothing
"""

from __future__ import annotations


class LMCacheError(Exception):
    """What happened, in one sentence with values; `hint` says what to do next."""

    exit_code = 1
    code = "error"

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if code:
            self.code = code

    @property
    def with_hint(self) -> str:
        """Both in one line, for a log."""
        return f"{self.message}; hint: {self.hint}" if self.hint else self.message


class UsageError(LMCacheError):
    """The caller asked for something that cannot be asked for."""

    exit_code = 2
    code = "usage"


class PoolSizeError(UsageError):
    """The pool does not fit the host, the cgroup or the shared-memory file system."""

    code = "pool_size"


class UnreachableError(LMCacheError):
    """No server that speaks our protocol is at the address."""

    exit_code = 3
    code = "unreachable"


class DeadlineError(UnreachableError):
    """The deadline passed before the answer came."""

    code = "deadline"


class ProtocolError(LMCacheError):
    """The peer's bytes are not a message of this protocol."""

    code = "protocol"


class RemoteError(LMCacheError):
    """The server refused the request; `code` is the server's."""

    code = "remote"


class PoolError(LMCacheError):
    """The pool file cannot be used."""

    code = "pool"


class SpoiledLoadError(LMCacheError):
    """The engine must not go on: what it computes now is worthless, and nothing can take it back."""

    code = "spoiled_load"


class StaleReadError(LMCacheError):
    """The extent was freed while it was read; the bytes must be thrown away."""

    code = "stale_read"


class LayoutMismatchError(LMCacheError):
    """KV tensors disagree with the registered layout; nothing was copied."""

    code = "layout_mismatch"


class ChecksumError(LMCacheError):
    """Bytes came back different from what was stored."""

    code = "checksum"


class InconclusiveError(LMCacheError):
    """The check says neither good nor bad, for example because nothing came from the cache."""

    exit_code = 4
    code = "inconclusive"
