"""A GPU in host memory, for what of its copier needs no real one: whatever a stream is handed is done at once."""

import contextlib
import ctypes
import threading

import torch

from lmcache.transfer.driver import CudaError


class Event:
    """One that has happened."""

    def record(self, stream=None):
        pass

    def query(self):
        return True

    def synchronize(self):
        pass


class Stream:
    """One on which nothing is left to do."""

    cuda_stream = 7

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass

    def record_event(self, event=None):
        return event or Event()

    def query(self):
        return True

    def synchronize(self):
        pass


class Driver:
    """The calls of NVIDIA's driver: it pins no piece that `may_pin` says no to, and takes nothing for pinned that is not.

    `calls` has (address, bytes, whether it was said to be pinned) of each copy, but for those of PyTorch's own pinned tensors.
    `bounced_bytes` were copied from the device to such tensors.
    """

    def __init__(self, may_pin=lambda number: True):
        self._may_pin = may_pin
        self.registered = {}
        self.pinned_tensors = []
        self.calls = []
        self.bounced_bytes = 0
        self.num_tried = 0
        self._thread = threading.local()
        self.use_context("context")

    def current_context(self):
        return getattr(self._thread, "context", None)

    def use_context(self, context):
        self._thread.context = context

    def register(self, address, num_bytes):
        if self.current_context() is None:
            raise CudaError("pinning failed: CUDA_ERROR_INVALID_CONTEXT (201)")
        self.num_tried += 1
        if not self._may_pin(self.num_tried - 1):
            raise CudaError(f"pinning {num_bytes} bytes failed: CUDA_ERROR_OUT_OF_MEMORY (2)")
        self.registered[address] = num_bytes

    def unregister(self, address):
        del self.registered[address]

    def copy_to_device(self, target, source, num_bytes, stream, is_pinned=False):
        self._note(source, num_bytes, is_pinned)
        ctypes.memmove(target, source, num_bytes)

    def copy_to_host(self, target, source, num_bytes, stream, is_pinned=False):
        self.bounced_bytes += num_bytes if self._is_tensor(target) else 0
        self._note(target, num_bytes, is_pinned)
        ctypes.memmove(target, source, num_bytes)

    def _is_tensor(self, address):
        return any(0 <= address - tensor.data_ptr() < tensor.nbytes for tensor in self.pinned_tensors)

    def _note(self, address, num_bytes, is_pinned):
        if self._is_tensor(address):
            return
        self.calls.append((address, num_bytes, is_pinned))
        pieces = [start for start, length in self.registered.items() if start <= address < start + length]
        assert bool(pieces) or not is_pinned, "a copy counts on pinned memory that is not"
        # The driver refuses a copy that begins in one piece and ends in another.
        assert all(address + num_bytes <= start + self.registered[start] for start in pieces)


def simulate(monkeypatch, driver):
    """Let `CudaCopier` work on tensors in host memory."""
    monkeypatch.setattr("lmcache.transfer.cuda.driver", lambda: driver)
    # Not by name: who has imported the classes, or made them a default, gets ours too.
    for real, ours in ((torch.cuda.Event, Event), (torch.cuda.Stream, Stream)):
        monkeypatch.setattr(real, "__new__", lambda cls, *args, ours=ours, **options: ours())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: driver.pinned_tensors.append(self) or self)
