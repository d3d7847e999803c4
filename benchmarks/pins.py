"""What the GPU benchmarks share: a server's pool, pinned whole for the current device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lmcache.client.kvcache import KVCacheClient
from lmcache.transfer.driver import driver
from lmcache.transfer.pinning import PoolPinner, address_of

GIB = 1 << 30
# 64 GiB took 5 s on an H100's host.
PINNING_SECONDS = 120.0


@contextmanager
def pinned_pool(client: KVCacheClient) -> Iterator[tuple[PoolPinner, float]]:
    """Pin the pool of a client's server, all of it; yields what pins it and the seconds that it took.

    Raises: TimeoutError.
    """
    torch.zeros(1, device="cuda")  # makes the context
    view = client.attach().view
    assert view is not None, "the server is not on this host"
    pinner = PoolPinner(driver(), driver().current_context(), address_of(view.data), len(view.data))
    started_at = time.monotonic()
    pinner.start()
    try:
        while not pinner.is_done:
            if time.monotonic() - started_at > PINNING_SECONDS:
                raise TimeoutError(f"{pinner.pinned_bytes / GIB:.1f} GiB were pinned within {PINNING_SECONDS:g} s")
            time.sleep(0.01)
        yield pinner, time.monotonic() - started_at
    finally:
        pinner.close()
