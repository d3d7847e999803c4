"""The few calls of NVIDIA's driver that PyTorch does not offer: pinning memory that is mapped already, copies by address.

Comes in: addresses and stream handles. Goes out: copies under way. The driver is loaded when it is first used and its interface
is stable, so nothing here depends on a CUDA runtime's version. Each call releases the GIL.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from lmcache.errors import LMCacheError

LIBRARY = "libcuda.so.1"
# Usable from every context of this process.
_PORTABLE = 1


class CudaError(LMCacheError):
    """A call of the driver failed."""

    code = "cuda"


class CudaDriver:
    """The driver's functions.

    Raises: CudaError when the library is not there, as on a machine without a GPU.
    """

    def __init__(self) -> None:
        try:
            self._lib = ctypes.CDLL(LIBRARY)
        except OSError as exc:
            raise CudaError(f"{LIBRARY} cannot be loaded: {exc}", "install NVIDIA's driver") from exc
        address, size, handle = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
        for name, arguments in {
            "cuMemHostRegister_v2": [handle, size, ctypes.c_uint],
            "cuMemHostUnregister": [handle],
            "cuMemcpyHtoDAsync_v2": [address, handle, size, handle],
            "cuMemcpyDtoHAsync_v2": [handle, address, size, handle],
            "cuCtxGetCurrent": [ctypes.POINTER(handle)],
            "cuCtxSetCurrent": [handle],
            "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
        }.items():
            function = getattr(self._lib, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._to_device = self._lib.cuMemcpyHtoDAsync_v2
        self._to_host = self._lib.cuMemcpyDtoHAsync_v2

    def _check(self, status: int, what: str) -> None:
        if status:
            name = ctypes.c_char_p()
            self._lib.cuGetErrorName(status, ctypes.byref(name))
            raise CudaError(f"{what} failed: {(name.value or b'?').decode()} ({status})")

    def current_context(self) -> Any:
        """Return the calling thread's context; a thread of its own must take it over before it calls the driver."""
        context = ctypes.c_void_p()
        self._check(self._lib.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        return context

    def use_context(self, context: Any) -> None:
        """Make the calling thread use a context."""
        self._check(self._lib.cuCtxSetCurrent(context), "cuCtxSetCurrent")

    def register(self, address: int, num_bytes: int) -> None:
        """Pin pages that are mapped here, so that copies go at the speed of the wire and are asynchronous."""
        self._check(self._lib.cuMemHostRegister_v2(address, num_bytes, _PORTABLE), f"pinning {num_bytes} bytes")

    def unregister(self, address: int) -> None:
        """Undo `register`; no copy may be under way."""
        self._check(self._lib.cuMemHostUnregister(address), "unpinning")

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Start a copy from host memory."""
        self._check(self._to_device(target, source, num_bytes, stream), f"a copy of {num_bytes} bytes to the device")

    def copy_to_host(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """Start a copy to host memory."""
        self._check(self._to_host(target, source, num_bytes, stream), f"a copy of {num_bytes} bytes from the device")


@lru_cache(maxsize=1)
def driver() -> CudaDriver:
    """Return the driver, loaded once.

    Raises: CudaError.
    """
    return CudaDriver()
