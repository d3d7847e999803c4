"""The few calls of NVIDIA's driver that PyTorch does not offer: pinning memory that is mapped already, copies by address.

Comes in: addresses and stream handles. Goes out: copies under way. The driver is loaded when it is first used and its interface
is stable, so nothing here depends on a CUDA runtime's version. Calls that may take their time release the GIL.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

from lmcache.errors import LMCacheError

LIBRARY = "libcuda.so.1"
# Usable from every context of this process.
_PORTABLE = 1
# CU_STREAM_CAPTURE_MODE_RELAXED
_CAPTURE_RELAXED = 2


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
            "cuThreadExchangeStreamCaptureMode": [ctypes.POINTER(ctypes.c_int)],
            "cuGetErrorName": [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)],
            "cuDriverGetVersion": [ctypes.POINTER(ctypes.c_int)],
        }.items():
            function = getattr(self._lib, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        # Handing over a copy of pinned memory takes 3 µs: less than to get the GIL back from an engine that computes.
        quick = ctypes.PyDLL(LIBRARY)
        self._copies: dict[tuple[str, bool], Any] = {}
        for name in ("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"):
            for is_pinned, lib in ((False, self._lib), (True, quick)):
                function = getattr(lib, name)
                function.argtypes, function.restype = getattr(self._lib, name).argtypes, ctypes.c_int
                self._copies[name, is_pinned] = function

    def _check(self, status: int, what: str) -> None:
        if status:
            name = ctypes.c_char_p()
            self._lib.cuGetErrorName(status, ctypes.byref(name))
            raise CudaError(f"{what} failed: {(name.value or b'?').decode()} ({status})")

    def cuda_version(self) -> str:
        """Return the latest CUDA that the driver supports, such as "13.0"; needs no context."""
        number = ctypes.c_int()
        self._check(self._lib.cuDriverGetVersion(ctypes.byref(number)), "cuDriverGetVersion")
        return f"{number.value // 1000}.{number.value % 1000 // 10}"

    def current_context(self) -> Any:
        """Return the calling thread's context; a thread of its own must take it over before it calls the driver."""
        context = ctypes.c_void_p()
        self._check(self._lib.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        return context

    def use_context(self, context: Any) -> None:
        """Make the calling thread use a context, also while another thread records a CUDA graph.

        Otherwise pinning, or asking for an event, would spoil the graph: the driver takes it for a part of what is recorded.
        """
        self._check(self._lib.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        self._check(self._lib.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")

    def register(self, address: int, num_bytes: int) -> None:
        """Pin pages that are mapped here, so that copies go at the speed of the wire and are asynchronous."""
        self._check(self._lib.cuMemHostRegister_v2(address, num_bytes, _PORTABLE), f"pinning {num_bytes} bytes")

    def unregister(self, address: int) -> None:
        """Undo `register`; no copy may be under way."""
        self._check(self._lib.cuMemHostUnregister(address), "unpinning")

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int, is_pinned: bool = False) -> None:
        """Start a copy from host memory; done on return where that is not pinned."""
        status = self._copies["cuMemcpyHtoDAsync_v2", is_pinned](target, source, num_bytes, stream)
        self._check(status, f"a copy of {num_bytes} bytes to the device")

    def copy_to_host(self, target: int, source: int, num_bytes: int, stream: int, is_pinned: bool = False) -> None:
        """Start a copy to host memory; done on return where that is not pinned."""
        status = self._copies["cuMemcpyDtoHAsync_v2", is_pinned](target, source, num_bytes, stream)
        self._check(status, f"a copy of {num_bytes} bytes from the device")


@lru_cache(maxsize=1)
def driver() -> CudaDriver:
    """Return the driver, loaded once.

    Raises: CudaError.
    """
    return CudaDriver()
