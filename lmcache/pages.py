"""Makes pages of a mapping resident, or lets go of them, without holding up whoever maps memory beside it.

Comes in: an address range. Goes out: the kernel's answer. Each call lets the GIL go and, while it lasts, keeps every other
thread of the process from mapping or unmapping memory; an allocator does that all the time. So a long range is taken in steps.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
from functools import lru_cache
from typing import Any

MADV_DONTNEED = 4
MADV_POPULATE_WRITE = 23


@lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def advise(address: int, num_bytes: int, advice: int, step_bytes: int) -> int:
    """Give the kernel one of the MADV values above for whole pages, step by step.

    Returns: 0, or the errno of the first step that failed; those after it were left out.
    """
    for offset in range(0, num_bytes, step_bytes):
        length = min(step_bytes, num_bytes - offset)
        if _libc().madvise(ctypes.c_void_p(address + offset), ctypes.c_size_t(length), advice):
            return ctypes.get_errno() or errno.EINVAL
    return 0


def address_of(mapping: mmap.mmap) -> int:
    """Return where memory is mapped writable; it can be unmapped all the same."""
    return ctypes.addressof((ctypes.c_char * 1).from_buffer(mapping))
