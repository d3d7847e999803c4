"""`lmcache query kvcache`: what of one prompt is cached, and do bytes come back as they went in?"""

from __future__ import annotations

import os
import time
from argparse import Namespace

from lmcache.cli.base import add_prompt_options, byte_size, positive_int

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    from lmcache.cli.base import Answer, CommandParser, Url
    from lmcache.cli.output import Result
    from lmcache.cli.prompts import TokenizedPrompt
    from lmcache.cli.status import ModelView, View
    from lmcache.client.kvcache import Buffer, KVCacheClient
    from lmcache.protocol import StoreOutcome
    from lmcache.transfer.paged import PagedKV

    T = TypeVar("T")

DEFAULT_ROUND_TRIP_CHUNKS = 4
DEFAULT_CHUNK_BYTES = 1 << 20
MAX_ROUND_TRIP_BYTES = 1 << 30
CLEAN_UP_SECONDS = 1.0


def add_options(parser: CommandParser) -> None:
    """Add the options of `query kvcache`."""
    add_prompt_options(parser)
    group = parser.add_argument_group("round trip")
    group.add_argument(
        "--round-trip",
        action="store_true",
        help="store, retrieve, compare, clean up; what is cached stays: refused where L1 has no room beside it",
    )
    group.add_argument(
        "--chunks", type=positive_int, default=DEFAULT_ROUND_TRIP_CHUNKS, metavar="N", help="how many (default: %(default)s)"
    )
    group.add_argument(
        "--chunk-bytes", type=byte_size, default=DEFAULT_CHUNK_BYTES, metavar="SIZE", help="of each (default: 1MiB)"
    )
    group.add_argument("--inline", action="store_true", help="over the socket, also where the pool could be mapped")
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where the bytes are: in host memory, or in a GPU's as an engine's paged KV; needs PyTorch (default: cpu)",
    )


def query_kvcache(args: Namespace) -> int:
    """Look up, or make the round trip, and report."""
    from lmcache.cli.base import kvcache_url
    from lmcache.cli.output import report

    check_round_trip_options(args)
    url = kvcache_url(args)
    return report(round_trip(url, args) if args.round_trip else lookup(url, args), args)


def check_round_trip_options(args: Namespace) -> None:
    """Refuse what contradicts itself.

    Raises: UsageError
    """
    from lmcache.cli.base import PROMPT_OPTIONS, prompt_options_given
    from lmcache.errors import UsageError

    given = prompt_options_given(args, PROMPT_OPTIONS)
    if args.round_trip and given:
        raise UsageError(
            f"a round trip stores random bytes; {', '.join(given)} would do nothing", "leave it out, or leave --round-trip out"
        )
    if args.device == "cuda" and not args.round_trip:
        raise UsageError("--device says where a round trip's bytes are; a lookup moves none", "add --round-trip")
    if args.device == "cuda" and args.inline:
        raise UsageError(
            "--device cuda copies between the GPU and the mapped pool, --inline goes over the socket",
            "drop --inline, or use --device cpu",
        )


# -- lookup ----------------------------------------------------------------------------------------


def lookup(url: Url, args: Namespace) -> Result:
    """Return what one LOOKUP of the prompt finds.

    Raises: UsageError, UnreachableError, RemoteError, LMCacheError.
    """
    from lmcache.cli.base import send_request
    from lmcache.cli.prompts import check_prompt_options, keys_of, read_prompt, select_model
    from lmcache.cli.status import fetch_status
    from lmcache.protocol import Lookup

    check_prompt_options(args)
    model = select_model(fetch_status(url, args.timeout)[1].models, args.model)
    prompt = read_prompt(args, model)
    keys = keys_of(args, model, prompt.token_ids)
    answer = send_request(url, Lookup(world_size=model.namespace.world_size), [keys], args.timeout)
    return lookup_result(model, prompt, answer)


def lookup_result(model: ModelView, prompt: TokenizedPrompt, answer: Answer) -> Result:
    """Return the report of a lookup."""
    from lmcache.cli.output import Result

    result = Result("Query KV Cache Result", width=41)
    num_tokens = len(prompt.token_ids)
    result.row("Prompt tokens", num_tokens, key="prompt_tokens")
    result.put("corpora_tokens", prompt.corpora)
    if prompt.corpora:
        for name, count in prompt.corpora.items():
            result.row(f"Corpus '{name}'", count, indent=2)
        result.row("Query", prompt.query_tokens, key="query_tokens", indent=2)
    _add_hit(result, num_tokens, model.namespace.chunk_size, answer.reply)
    result.put("lookup_ms", round(answer.round_trip_seconds * 1000, 4))
    result.put("model", model.namespace.model)
    result.put("namespace_id", model.namespace_id)
    return result


def _add_hit(result: Result, num_tokens: int, chunk_size: int, reply: Any) -> None:
    from lmcache.cli.output import format_ratio

    total, hit = num_tokens // chunk_size, reply.hit_chunks
    ratio = hit / total if total else None
    text = f"{hit}/{total}" + ("" if ratio is None else f" ({format_ratio(ratio)})")
    status = "MISS" if hit == 0 else "HIT" if hit == total else "HIT (partial)"
    result.row("Cached chunks", hit, key="cached_chunks", text=text)
    result.row("Cached tokens", hit * chunk_size, key="cached_tokens", text=f"{hit * chunk_size}/{num_tokens}")
    result.row("In L1", reply.l1_chunks, key="l1_chunks", text=f"{reply.l1_chunks} chunks", indent=2)
    result.row("In L2 only", hit - reply.l1_chunks, key="l2_only_chunks", text=f"{hit - reply.l1_chunks} chunks", indent=2)
    for name, count in reply.tiers.items():
        result.row(f"In L2 {name}", f"{count} chunks", indent=2)
    result.row("Cache status", status, key="cache_status")
    result.put("total_chunks", total)
    result.put("cached_ratio", ratio)
    result.put("l2_chunks", reply.l2_chunks)
    result.put("tiers", reply.tiers)
    result.put("chunk_size", chunk_size)


# -- round trip ------------------------------------------------------------------------------------


def round_trip(url: Url, args: Namespace) -> Result:
    """Store random chunks under keys that nobody else has, read them back, compare, and remove them.

    Raises: UsageError, UnreachableError, RemoteError; LMCacheError, also when they would displace what is cached.
    """
    from lmcache.cli.base import zmq_url
    from lmcache.cli.status import fetch_status
    from lmcache.client.kvcache import KVCacheClient
    from lmcache.errors import UsageError
    from lmcache.log import LEVEL_VARIABLE, configure_logging
    from lmcache.protocol import MAX_CHUNK_BYTES

    if args.chunk_bytes > MAX_CHUNK_BYTES or args.chunks * args.chunk_bytes > MAX_ROUND_TRIP_BYTES:
        raise UsageError(
            f"{args.chunks} chunks of {args.chunk_bytes} bytes are too much for a check",
            f"at most {MAX_CHUNK_BYTES} bytes a chunk and {MAX_ROUND_TRIP_BYTES} in all; see 'lmcache bench kvcache'",
        )
    url = zmq_url(url, args.timeout)
    _, status = fetch_status(url, args.timeout)  # says who else may be there, and does not wait twice
    check_room(status, args.chunks, args.chunk_bytes)
    with KVCacheClient(url.text, kind="cli", timeout_seconds=args.timeout, inline=args.inline) as client:
        if args.device == "cpu":
            result = _round_trip(client, HostBuffers(args.chunks, args.chunk_bytes))
        else:
            configure_logging(os.environ.get(LEVEL_VARIABLE, "WARNING"))  # the copier's news are an engine's
            result = paged_round_trip(client, args.chunks, args.chunk_bytes, args.device, args.quiet)
    # A pool that is almost full makes room beyond its watermark, for whoever stores.
    num_evicted = max(0, fetch_status(url, args.timeout)[1].counters.num_evicted - status.counters.num_evicted)
    result.put("evicted_chunks", num_evicted)
    if num_evicted:
        result.row("Evicted meanwhile", f"{num_evicted} chunks")
    return result


def check_room(status: View, num_chunks: int, chunk_bytes: int) -> None:
    """Return if so many chunks fit beside what is cached.

    Raises: LMCacheError that says how many do, and below the watermark, above which the server evicts ahead of need.
    """
    from lmcache.cli.output import format_bytes
    from lmcache.errors import LMCacheError
    from lmcache.pool import PAGE_BYTES

    l1, aligned_bytes = status.l1, -(-chunk_bytes // PAGE_BYTES) * PAGE_BYTES
    if num_chunks * aligned_bytes > l1.free_bytes:
        num_fitting = max(0, int(status.watermark_ratio * l1.capacity_bytes) - l1.used_bytes) // aligned_bytes
        raise LMCacheError(
            f"{num_chunks} chunks of {format_bytes(chunk_bytes)} would evict what is cached:"
            f" {format_bytes(l1.free_bytes)} of L1 are free",
            f"pass --chunks {num_fitting}"
            if num_fitting
            else "pass a smaller --chunk-bytes, or make room with 'lmcache kvcache evict'",
            "no_room",
        )


def paged_round_trip(client: KVCacheClient, num_chunks: int, chunk_bytes: int, device: str, is_quiet: bool = False) -> Result:
    """Make the round trip from and to paged KV on a device, by PyTorch's name, as an engine does.

    Raises: UsageError, UnreachableError, RemoteError, LMCacheError.
    """
    from lmcache.cli.output import format_bytes
    from lmcache.cli.paged import PinNotice, open_paged_kv
    from lmcache.protocol import PinReport

    notice = PinNotice()

    def keep_waiting(share: float) -> bool:
        if not is_quiet:
            notice.show(share)
        return True

    kv = open_paged_kv(client, chunk_bytes, num_chunks, device, keep_waiting)
    result = _round_trip(client, PagedBuffers(kv, num_chunks, chunk_bytes))
    pins = kv.copier.pin_report() or PinReport()
    result.row("Device", kv.device_name, key="device_name")
    result.row("Pool pinned", pins.pinned_bytes, key="pool_pinned_bytes", text=format_bytes(pins.pinned_bytes))
    result.row("Pool not pinned", pins.unpinned_bytes, key="pool_unpinned_bytes", text=format_bytes(pins.unpinned_bytes))
    result.row("Staging memory", kv.staging_bytes, key="staging_bytes", text=format_bytes(kv.staging_bytes))
    return result


class HostBuffers:
    """Random chunks in private memory, and room for them to come back."""

    def __init__(self, num_chunks: int, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        self.sent = [os.urandom(chunk_bytes) for _ in range(num_chunks)]
        self._received = [bytearray(chunk_bytes) for _ in range(num_chunks)]

    def store(self, client: KVCacheClient, keys: bytes) -> list[StoreOutcome]:
        """Store all chunks; return what became of each."""
        return client.store(keys, self.sent, with_checksums=True)

    def blot(self) -> None:
        """Do nothing: what comes back lands in memory of its own, which is empty."""

    def retrieve(self, client: KVCacheClient, keys: bytes) -> int:
        """Retrieve the chunks; return how many came."""
        return client.retrieve(keys, self._received)

    def received(self, count: int) -> Sequence[Buffer]:
        """Return the first chunks that came back."""
        return self._received[:count]


class PagedBuffers:
    """Random chunks as paged KV on a device."""

    def __init__(self, kv: PagedKV, num_chunks: int, chunk_bytes: int) -> None:
        self.chunk_bytes = chunk_bytes
        whole = memoryview(bytearray(os.urandom(num_chunks * chunk_bytes)))
        self.sent = self._split(whole)
        self._kv = kv
        kv.fill(whole)

    def _split(self, whole: memoryview) -> list[memoryview]:
        return [whole[at : at + self.chunk_bytes] for at in range(0, len(whole), self.chunk_bytes)]

    def store(self, client: KVCacheClient, keys: bytes) -> list[StoreOutcome]:
        """Gather the chunks into the pool; return what became of each."""
        from lmcache.errors import DeadlineError

        with client.reserve(keys, self.chunk_bytes) as reservation:
            try:
                self._kv.store(reservation.extents, reservation.reserved_indices())
            except DeadlineError:  # the device may write there at any time from now on
                reservation.keep_for_ever()
                raise
            reservation.commit()
            return reservation.outcomes

    def blot(self) -> None:
        """Make every block wrong."""
        self._kv.blot()

    def retrieve(self, client: KVCacheClient, keys: bytes) -> int:
        """Scatter the chunks into other blocks; return how many came."""
        with client.pin(keys) as pinned:
            self._kv.load(pinned.extents)
            pinned.verify()
            return len(pinned.extents)

    def received(self, count: int) -> Sequence[Buffer]:
        """Return the first chunks that came back."""
        whole = memoryview(bytearray(len(self.sent) * self.chunk_bytes))
        self._kv.fetch(whole)
        return self._split(whole)[:count]


def _round_trip(client: KVCacheClient, buffers: HostBuffers | PagedBuffers) -> Result:
    from lmcache.errors import UnreachableError

    num_chunks = len(buffers.sent)
    keys = unique_keys(num_chunks)
    is_inline = client.is_inline
    try:
        store_seconds = timed(lambda: check_stored(buffers.store(client, keys)))[1]
        buffers.blot()
        num_received, retrieve_seconds = timed(lambda: buffers.retrieve(client, keys))
        received = buffers.received(num_received)
    except UnreachableError:
        raise  # nobody is there to clean up, and waiting for the same silence twice helps nobody
    except BaseException:
        remove(client, keys)
        raise
    removed = remove(client, keys)
    result = round_trip_result(buffers.sent, received, store_seconds, retrieve_seconds)
    result.row("Path", "socket" if is_inline else "shared memory", key="path")
    result.row("Cleaned up", removed, key="removed_chunks", text=f"{removed}/{num_chunks} chunks")
    return result


def timed(action: Callable[[], T]) -> tuple[T, float]:
    """Return what an action returns, and the seconds that it took."""
    started = time.perf_counter()
    found = action()
    return found, time.perf_counter() - started


def unique_keys(count: int) -> bytes:
    """Return the keys of `count` chunks in a namespace that exists only now."""
    from lmcache.keys import Namespace as KeyNamespace
    from lmcache.keys import chunk_keys

    namespace = KeyNamespace(model="lmcache-query-round-trip", cache_salt=os.urandom(16).hex(), chunk_size=1)
    return chunk_keys(namespace, range(count))


def check_stored(outcomes: list[StoreOutcome]) -> None:
    """Return if all chunks were stored.

    Raises: LMCacheError when the server has no room for one.
    """
    from lmcache.errors import LMCacheError
    from lmcache.protocol import StoreOutcome

    refused = [outcome for outcome in outcomes if outcome is not StoreOutcome.RESERVED]
    if refused:
        raise LMCacheError(
            f"the server took {len(outcomes) - len(refused)} of {len(outcomes)} chunks; the others: {refused[0].name}",
            "pass a smaller --chunk-bytes, or see 'lmcache describe kvcache' for who holds L1",
            "store_refused",
        )


def remove(client: KVCacheClient, keys: bytes) -> int:
    """Evict the chunks; return how many went. One that still leaves over the socket is pinned for a moment."""
    from lmcache.protocol import Evict

    give_up_at = time.monotonic() + CLEAN_UP_SECONDS
    removed = 0
    while True:
        reply = client.mq.call(Evict(), [keys])
        removed += reply.objects
        if not reply.kept_objects or time.monotonic() > give_up_at:
            return removed
        time.sleep(CLEAN_UP_SECONDS / 100)


def round_trip_result(
    sent: Sequence[Buffer], received: Sequence[Buffer], store_seconds: float, retrieve_seconds: float
) -> Result:
    """Return the report: good when every byte came back."""
    from lmcache.cli.output import Result

    num_good = sum(one == other for one, other in zip(sent, received, strict=False))
    result = Result("Query KV Cache Result (round-trip)", width=44)
    result.row("Store latency (ms)", _ms(store_seconds), key="store_ms", text=f"{store_seconds * 1000:.2f}")
    result.row("Retrieve latency (ms)", _ms(retrieve_seconds), key="retrieve_ms", text=f"{retrieve_seconds * 1000:.2f}")
    result.row("Checksum", "OK" if num_good == len(sent) else "FAIL", key="checksum")
    result.row("Chunks", len(sent), key="chunks", text=f"{num_good}/{len(sent)} OK")
    result.put("good_chunks", num_good)
    result.put("chunk_bytes", len(sent[0]))
    if num_good < len(sent):
        result.fail(
            f"{len(received)} of {len(sent)} chunks came back, {num_good} of them as they were stored",
            "chunks may be evicted meanwhile; bytes may not change: report it",
            "checksum",
        )
    return result


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 4)
