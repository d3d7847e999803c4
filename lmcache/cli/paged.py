"""Chunks that lie as an engine's paged KV on a device: `--device cuda` of `bench kvcache` and `query kvcache --round-trip`.

Comes in: a client, sizes, a device. Goes out: a `PagedKV` whose copies to and from the client's pool may be timed. The path is
the engine's: the copier that `transfer.make_copier` chooses, and the pool that the client maps and the copier pins. Nothing
here imports PyTorch before it is asked to. Next on the path: `transfer/paged.py`.
"""

from __future__ import annotations

import math
import sys
import time

from lmcache.errors import DeadlineError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from lmcache.client.kvcache import KVCacheClient
    from lmcache.layout import KVLayout
    from lmcache.pool import PoolView
    from lmcache.transfer.paged import PagedKV

# A Llama 3.1 8B's: keys and values of a head and token are 2 x 128 numbers of 2 bytes; 8 heads, blocks of 16 tokens.
MAX_LAYERS = 32
HEAD_TOKEN_BYTES = 512
MAX_BLOCK_BYTES = 8 * 16 * HEAD_TOKEN_BYTES
MIN_BLOCK_BYTES = 8 * HEAD_TOKEN_BYTES
BLOCK_TOKENS = 16
# An H100's host pins a GiB in 0.1 s; one whose memory is not resident yet, or is short, takes longer.
PIN_SECONDS = 60.0
PIN_SECONDS_PER_GIB = 1.0
PIN_POLL_SECONDS = 0.01
# A server makes a GiB resident in 0.3 s. One that is short of memory stops.
GROW_SECONDS = 5.0
PIN_NOTICE_SECONDS = 5.0
GIB = 1 << 30


def kv_layout(chunk_bytes: int) -> KVLayout:
    """Return paged KV whose blocks fill a chunk: up to 32 layers, blocks of up to 64 KiB in each.

    Raises: UsageError for a size that no such blocks fill; the hint names sizes nearby.
    """
    from lmcache.layout import KVLayout

    pieces, rest = divmod(chunk_bytes, HEAD_TOKEN_BYTES)
    num_layers = math.gcd(MAX_LAYERS, pieces)
    layer_pieces = pieces // num_layers if pieces else 0
    sizes = range(min(layer_pieces, MAX_BLOCK_BYTES // HEAD_TOKEN_BYTES), 0, -1)
    block_pieces = next((size for size in sizes if layer_pieces % size == 0), 0)
    block_bytes = block_pieces * HEAD_TOKEN_BYTES
    if rest or not pieces or (block_pieces < layer_pieces and block_bytes < MIN_BLOCK_BYTES):
        raise UsageError(
            f"chunks of {chunk_bytes} bytes are not whole blocks of an engine's KV: up to {MAX_LAYERS} layers, with blocks of "
            f"a multiple of {HEAD_TOKEN_BYTES} and at most {MAX_BLOCK_BYTES} bytes in each",
            f"use {_sizes_nearby(chunk_bytes)} bytes",
            "chunk_bytes",
        )
    return KVLayout(num_layers=num_layers, num_planes=1, block_bytes=block_bytes, block_size=BLOCK_TOKENS, dtype="bfloat16")


def _sizes_nearby(chunk_bytes: int) -> str:
    step = HEAD_TOKEN_BYTES if chunk_bytes < MAX_BLOCK_BYTES else MAX_LAYERS * MIN_BLOCK_BYTES
    below = chunk_bytes // step * step
    return " or ".join(str(size) for size in (below, below + step) if size > 0)


def open_paged_kv(
    client: KVCacheClient, chunk_bytes: int, num_chunks: int, device: str, keep_waiting: Callable[[float], bool]
) -> PagedKV:
    """Return paged KV for so many chunks, when all is ready to be timed: the pool is pinned as far as it can be.

    Args:
        device: "cuda" or "cpu", by PyTorch's name.
        keep_waiting: told now and then which share of the pool is pinned; False ends the wait.
    Raises: UsageError when it cannot be had here; DeadlineError when the pool is not pinned in time; LMCacheError.
    """
    if client.is_inline:
        raise UsageError(
            f"chunks go between the device and the mapped pool, and the pool of {client.mq.url} cannot be mapped here",
            "run this on the server's host, as its user and with its /dev/shm, or use --device cpu",
            "not_mapped",
        )
    layout = kv_layout(chunk_bytes)
    kv = _load_paged_kv()(layout, chunk_bytes // layout.bytes_per_block, num_chunks, device)
    client.watch_mapping(kv.copier.pin_pool)
    view = client.attach().view
    assert view is not None, "a client that is not inline has mapped the pool"
    _wait_until_pinned(kv, view, keep_waiting)
    return kv


def _load_paged_kv() -> type[PagedKV]:
    try:
        from lmcache.transfer.paged import PagedKV
    except (ImportError, OSError) as exc:  # OSError: one of PyTorch's own libraries is missing
        raise UsageError(
            f"--device cuda needs PyTorch, which cannot be imported here: {exc}",
            "run this with the engine's Python, or install torch; or use --device cpu",
            "device",
        ) from exc
    return PagedKV


def _wait_until_pinned(kv: PagedKV, view: PoolView, keep_waiting: Callable[[float], bool]) -> None:
    from lmcache.transfer.pinning import PIECE_BYTES

    pool_bytes = view.data.nbytes
    seconds = PIN_SECONDS + PIN_SECONDS_PER_GIB * pool_bytes / GIB
    give_up_at = time.monotonic() + seconds
    resident_bytes, grew_at = 0, 0.0
    while (state := kv.copier.pin_report()) is not None and not state.is_done:
        if view.resident_bytes > resident_bytes:
            resident_bytes, grew_at = view.resident_bytes, time.monotonic()
        is_waiting = state.pinned_bytes + state.unpinned_bytes + PIECE_BYTES > resident_bytes
        if is_waiting and time.monotonic() - grew_at > GROW_SECONDS:
            return  # what is not resident by now is used by nobody
        if not keep_waiting(state.pinned_bytes / pool_bytes):
            return
        if time.monotonic() > give_up_at:
            raise DeadlineError(
                f"{state.pinned_bytes / GIB:.1f} of {pool_bytes / GIB:.1f} GiB of the pool are pinned after {seconds:.0f} s",
                "is the host short of memory? start the server with a smaller --l1-size-gb",
                "pin",
            )
        time.sleep(PIN_POLL_SECONDS)


class PinNotice:
    """Says on stderr, now and then, that the pool is being pinned, once that has taken a while."""

    def __init__(self) -> None:
        self._said_at: float | None = None

    def show(self, share: float) -> None:
        """Take in how far it is."""
        now = time.monotonic()
        if self._said_at is None:
            self._said_at = now
        elif now - self._said_at >= PIN_NOTICE_SECONDS:
            self._said_at = now
            print(f"pinning the pool for the GPU: {share:.0%}", file=sys.stderr, flush=True)
