"""A fake of a GPU's copier, in host memory: loads and stores go on in the background, slowly."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from lmcache.transfer.base import CancelledTransferError, Extent, Transfer
from lmcache.transfer.cpu import CpuCopier

# What --kv-transfer-config says for `later_connector.py`.
LATER = {"kv_connector": "LaterConnector", "kv_connector_module_path": "tests.integration.later_connector"}


class LaterTransfer(Transfer):
    """A load that a thread of its own carries out after a while; `num_bytes` are left until it is over."""

    def __init__(self, scatter: Callable[[], None], pause_seconds: float, num_bytes: int) -> None:
        self._scatter = scatter
        self._num_bytes = num_bytes
        self._thread = threading.Timer(pause_seconds, scatter)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether the thread has ended."""
        return not self._thread.is_alive()

    @property
    def bytes_left(self) -> int:
        """All, or nothing."""
        return 0 if self.is_done else self._num_bytes

    def end_now(self) -> None:
        """Do not wait any longer."""
        self._thread.cancel()
        self._thread.join()
        self._scatter()

    def hold_back(self) -> None:
        """Wait for it: what comes next is not given to a device, but is done."""
        self._thread.join()

    def wait(self, seconds: float) -> None:
        """Return when it has."""
        self._thread.join(seconds)
        assert self.is_done


class LaterCopier(CpuCopier):
    """Waits before each chunk that it stores, where it may be cancelled, and before each load.

    Args:
        load_bytes: what a load seems to have left: 0 for one that is as good as over, and is named at once.
    """

    copies_later = True

    def __init__(self, *args: Any, pause_seconds: float = 0.0, load_bytes: int = 1 << 40) -> None:
        super().__init__(*args)
        self.pause_seconds = pause_seconds
        self.load_bytes = load_bytes
        self._reading = threading.Lock()

    def gather(
        self,
        block_ids: Sequence[int],
        extents: Sequence[Extent],
        after: Any = None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Store chunk by chunk."""
        size = len(block_ids) // max(1, len(extents))
        for index, extent in enumerate(extents):
            time.sleep(self.pause_seconds)
            with self._reading:
                if is_cancelled():
                    raise CancelledTransferError("cancelled")
                super().gather(block_ids[index * size : (index + 1) * size], [extent])

    def begin_scatter(
        self, extents: Sequence[Extent], block_ids: Sequence[int], skip_blocks: int = 0, holds_back: bool = True
    ) -> Transfer:
        """Load, now or later."""
        self.check(block_ids, extents, skip_blocks)
        if holds_back:
            return super().begin_scatter(extents, block_ids, skip_blocks)
        scatter = functools.partial(self.scatter, extents, block_ids, skip_blocks)
        return LaterTransfer(scatter, self.pause_seconds, self.load_bytes)

    def protect_blocks(self) -> None:
        """Return when the chunk that is being read has been read."""
        with self._reading:
            pass
