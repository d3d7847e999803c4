"""What a tier below host memory must do: keep values by key, and give back exactly those bytes or nothing.

Comes in: an entry's key and the memory that holds it. Goes out: bytes in a file system, a Redis, an object store. A value is
the header of `value.py` and the chunk; adapters move both and look into neither. Next on the data path: the adapter by name.

An adapter blocks: `tier.py` calls it from worker threads, several at once, and never from the server's owner thread.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum

import msgspec

from lmcache.errors import LMCacheError

Parts = Sequence[memoryview]


class Reason(str, Enum):
    """Why a tier did not do what it was asked: `L2Error.code`, and the label in metrics."""

    UNREACHABLE = "unreachable"  # no connection, or it broke; a folder that is not there
    TIMEOUT = "timeout"  # no answer within the adapter's timeout
    FULL = "full"  # no room and nothing to evict
    DENIED = "denied"  # credentials or permissions
    READ_ONLY = "read_only"  # a read-only file system, a replica
    CORRUPT = "corrupt"  # bytes that are not the value: truncated, changed, foreign
    FORMAT = "format"  # a value that another version wrote
    ERROR = "error"  # anything else


class L2Error(LMCacheError):
    """A tier did not do what it was asked; to the engine that is a miss. `code` is the value of a `Reason`."""

    code = Reason.ERROR.value

    def __init__(self, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint, code and Reason(code).value)


class Usage(msgspec.Struct, frozen=True):
    """What a tier holds, as far as it can tell: None where only its operator knows."""

    used_bytes: int | None = None
    capacity_bytes: int | None = None
    objects: int | None = None


class L2Adapter(ABC):
    """One back end.

    The caller guarantees: keys are file-name safe ASCII of at most 128 characters; buffers stay as they are until the call is
    over; nobody else writes other bytes under the same key (equal keys mean equal chunks). Nothing blocks in `__init__`.
    Every call returns or raises `L2Error` within the adapter's own timeout and its retries; a local file system has none, and
    takes as long as the kernel does. Threads: any, several at once.
    """

    keys_at_once = 512
    """For how many keys `lengths` takes about as long as for one: a lookup asks for so many first."""
    is_evicting = False
    """Whether it decides itself what goes, by last use: then it is told of uses that it does not see."""

    @abstractmethod
    def put(self, key: str, parts: Parts) -> None:
        """Keep the concatenated parts under `key`; on return a `get` elsewhere finds all of it, after an error all or nothing.

        Raises: L2Error.
        """

    @abstractmethod
    def get(self, key: str, parts: Parts) -> bool:
        """Fill the writable parts with the value; False when there is none, and the parts are as they were or garbage.

        Raises: L2Error, also when the value is longer or shorter than the parts (`code` "corrupt").
        """

    @abstractmethod
    def lengths(self, keys: Sequence[str]) -> list[int | None]:
        """Return each value's length in bytes, None where there is none; one round trip where the back end can.

        Raises: L2Error.
        """

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> int:
        """Remove values; return how many there were.

        Raises: L2Error.
        """

    @abstractmethod
    def clear(self) -> int:
        """Remove every value that adapters with this configuration have put; return how many there were.

        Raises: L2Error.
        """

    def touch(self, keys: Sequence[str]) -> None:  # noqa: B027 - most leave eviction to their back end
        """Note a use of values, the last one as the latest. Only asked where it `is_evicting`.

        Raises: L2Error.
        """

    @abstractmethod
    def usage(self) -> Usage:
        """Return what is known without asking every value.

        Raises: L2Error.
        """

    @abstractmethod
    def ping(self) -> None:
        """Do the cheapest thing that shows that the back end works, writes included where that is cheap.

        Raises: L2Error.
        """

    def close(self) -> None:  # noqa: B027 - most adapters own a connection, some nothing
        """Release connections and files; no call runs or follows. Never raises."""


def check_length(key: str, found: int, expected: int) -> None:
    """Return if a value's length is the expected one.

    Raises: L2Error, code "corrupt".
    """
    if found != expected:
        raise L2Error(f"value {key} has {found} bytes, not {expected}", code=Reason.CORRUPT)
