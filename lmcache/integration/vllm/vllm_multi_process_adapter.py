"""The adapters through which vLLM's own connector class, `LMCacheMPConnectorUpstream`, uses the cache.

vLLM takes our class in `lmcache_mp_connector.py` by itself, and its own one where somebody asks for it with
LMCACHE_USE_UPSTREAM_MP. Comes in: that class's calls. Goes out: the same lookups, loads and stores, through the same
`scheduler.py` and `worker.py`, under the same keys: both classes share what is stored.

Its calls say less than vLLM's own to a connector, so more is refused here:

- A request is its tokens and its salt, without LoRA adapter or media. An engine that could have either is refused.
- The scheduler's adapter does not hear from the worker, nor see the KV. It asks the server what the worker registered.
- A hit counts as computed for the class, also when its load has failed. Of such a request nothing more is stored. That a load
  has failed on another rank nobody tells: an engine of several ranks stores nothing more of any request that has loaded.
- vLLM frees a request that was aborted within the step of its load when the load is reported, and once more when its end
  is, and dies of the second. That report is left out for a request that ends right after its load.

Source: vLLM 0.32, vllm/distributed/kv_transfer/kv_connector/v1/lmcache_mp_connector.py.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import LMCacheError, UsageError
from lmcache.integration.vllm.scheduler import SchedulerHalf
from lmcache.integration.vllm.steps import ChunkSpan, StoreSpan, WorkerHello
from lmcache.integration.vllm.utils import ConnectorConfig, process_token, software, uses_multi_connector
from lmcache.integration.vllm.worker import WorkerHalf
from lmcache.keys import KEY_BYTES, ChunkHasher, Namespace
from lmcache.log import init_logger

logger = init_logger(__name__)

# What the class passes where nobody set them; the first would let an engine wait for 300 s.
UPSTREAM_MQ_TIMEOUT = 300.0
UPSTREAM_HEARTBEAT_INTERVAL = 10.0
# The unit of the class's loads and stores while the server's chunk size is not known; ours are cut anew anyway.
ASSUMED_CHUNK_SIZE = 256
# With asynchronous scheduling vLLM hands in the same finished request in two steps; these are remembered.
MAX_REMEMBERED_ENDS = 4096


class ParallelStrategy(NamedTuple):
    """How the engine's ranks are arranged; `kv_*` counts what differs in its KV."""

    use_mla: bool
    kv_world_size: int
    kv_worker_id: int
    actual_world_size: int
    actual_worker_id: int
    tp_size: int
    pp_size: int


@dataclass
class LoadStoreOp:
    """Tokens [start, end) of a request, and the engine blocks that hold their KV."""

    token_ids: list[int]
    block_ids: list[int]
    start: int
    end: int
    skip_first_n_tokens: int = 0

    def __len__(self) -> int:
        return len(self.block_ids)


def _settings(server_url: str, mq_timeout: float, heartbeat_interval: float) -> ConnectorConfig:
    """Return what the class was told, with its own defaults replaced by ours."""
    extra: dict[str, Any] = {"lmcache.mp.url": server_url}
    if mq_timeout != UPSTREAM_MQ_TIMEOUT:
        extra["lmcache.mp.mq_timeout"] = mq_timeout
    if heartbeat_interval != UPSTREAM_HEARTBEAT_INTERVAL:
        extra["lmcache.mp.heartbeat_interval"] = heartbeat_interval
    return ConnectorConfig.read(extra)


@dataclass
class _BareRequest:
    """What the class tells of a request, as `SchedulerHalf` reads it of vLLM's."""

    request_id: str
    all_token_ids: Sequence[int]
    cache_salt: str
    lora_request: None = None
    mm_features: tuple[()] = ()
    prompt_embeds: None = None
    resumable: bool = False

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        return self.all_token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.all_token_ids)


class LMCacheMPSchedulerAdapter:
    """What vLLM's own class uses in the scheduler's process; main thread only. Its methods do not raise."""

    def __init__(
        self,
        *,
        server_url: str,
        vllm_block_size: int,
        mq_timeout: float = UPSTREAM_MQ_TIMEOUT,
        heartbeat_interval: float = UPSTREAM_HEARTBEAT_INTERVAL,
        **_: Any,
    ) -> None:
        config = _settings(server_url, mq_timeout, heartbeat_interval)
        self._block_size = vllm_block_size
        self._process = process_token(os.getpid())
        self._hellos: list[WorkerHello] = []
        self._is_heard = False
        self._blocks_per_unit = 0
        self._requests: dict[str, _BareRequest] = {}
        self._answers: dict[str, int] = {}
        self._admitted: set[str] = set()
        self._client = KVCacheClient(
            config.url,
            kind="engine-scheduler",
            timeout_seconds=config.timeout_seconds,
            heartbeat=True,
            heartbeat_seconds=config.heartbeat_seconds,
            software=software("LMCacheMPConnectorUpstream"),
            on_beat=_call_weakly(self._find_workers),
        )
        self._client.mq.connect()
        # The class's operations have no room for places: its workers ask for themselves.
        self._half = SchedulerHalf(self._client, passes_places=False, lookup_timeout_seconds=config.lookup_timeout_seconds)
        # The class tells the scheduler's adapter nothing of the end: it is that of the adapter, or the process's.
        weakref.finalize(self, self._half.close)
        logger.info("KV cache server: %s", config.url)

    def _find_workers(self, client: KVCacheClient) -> None:
        """Heartbeat thread: ask until the workers of this engine are known."""
        if not self._hellos:
            self._hellos = [
                WorkerHello(
                    msgspec.structs.replace(found.namespace, chunk_size=0),
                    found.layout,
                    rank=found.rank,
                    num_ranks=found.world_size,
                )
                for found in client.find_workers(self._process)
            ]

    def maybe_submit_lookup_request(self, request_id: str, token_ids: list[int], cache_salt: str = "") -> None:
        """Start to look up what is cached of the tokens, once a request."""
        if self._hellos and not self._is_heard:
            self._is_heard = True
            self._half.hear(self._hellos)
        if request_id in self._requests or request_id in self._admitted:
            return
        request = self._requests[request_id] = _BareRequest(request_id, token_ids, cache_salt)
        try:
            self._half.announced(request)
        except LMCacheError as exc:
            self._half.note_failure(exc)

    def check_lookup_result(self, request_id: str) -> int | None:
        """Return how many tokens can be loaded, in whole units of `num_blocks_per_chunk`; None while that is not known.

        The same request asks again after its load has failed: then there is nothing to load.
        """
        if request_id in self._admitted or request_id not in self._requests:
            return 0
        if request_id not in self._answers:
            hit_tokens: int | None = 0
            try:
                hit_tokens = self._half.match(self._requests[request_id], 0)
            except LMCacheError as exc:
                self._half.note_failure(exc)
            if hit_tokens is None:
                return None
            unit = self.num_blocks_per_chunk() * self._block_size
            self._answers[request_id] = hit_tokens // unit * unit
        return self._answers[request_id]

    def num_blocks_per_chunk(self) -> int:
        """Return the unit of the class's loads and stores in blocks. It stays what it was when first asked for.

        vLLM asks in every step, and in none twice as often when the server is slow: a good place to begin one.
        """
        self._half.begin_step()
        if not self._blocks_per_unit:
            try:
                chunk_size = self._client.present().chunk_size
            except LMCacheError:
                chunk_size = ASSUMED_CHUNK_SIZE
            self._blocks_per_unit = chunk_size // self._block_size if chunk_size % self._block_size == 0 else 1
        return self._blocks_per_unit

    def cleanup_lookup_result(self, request_id: str) -> None:
        """vLLM has taken the request up, with or without what was found."""
        self._answers.pop(request_id, None)
        if self._requests.pop(request_id, None) is not None:
            self._half.allocated(request_id, [], 0)
            self._admitted.add(request_id)

    def free_lookup_locks(self, token_ids: list[int], start: int, end: int, request_id: str) -> None:
        """Unpin what lies before token `end`: it need not be loaded."""
        try:
            self._half.free_pins(request_id, end)
        except LMCacheError as exc:
            self._half.note_failure(exc)

    def end_session(self, request_id: str) -> None:
        """Forget a request."""
        self._requests.pop(request_id, None)
        self._answers.pop(request_id, None)
        self._admitted.discard(request_id)
        try:
            self._half.finished(request_id)
        except LMCacheError as exc:
            self._half.note_failure(exc)

    def report_block_allocations(self, records: Sequence[Any]) -> None:
        """Return: what vLLM does with its own blocks is not needed here."""


def _call_weakly(method: Callable[[KVCacheClient], None]) -> Callable[[KVCacheClient], None]:
    """Return what calls a method as long as its object lives, and does not keep it alive."""
    find = weakref.WeakMethod(method)

    def call(client: KVCacheClient) -> None:
        found = find()
        if found is not None:
            found(client)

    return call


class LMCacheMPWorkerAdapter:
    """What vLLM's own class uses in a worker's process; main thread only. Its methods do not raise, but the constructor does.

    Raises: ValueError for a setting that cannot be used.
    """

    def __init__(self, *, parallel_strategy: ParallelStrategy, **_: Any) -> None:
        self._vllm_config = current_vllm_config()
        transfer = self._vllm_config.kv_transfer_config
        try:
            config = ConnectorConfig.read(transfer.kv_connector_extra_config)
        except LMCacheError as exc:
            raise ValueError(exc.with_hint) from exc
        self.use_mla = parallel_strategy.use_mla
        # Every rank gets what is to be stored; which of them does is decided where it is for our own class.
        self.is_first_rank_of_pp_group = True
        self._num_ranks = parallel_strategy.actual_world_size
        self._saves_decode = config.saves_decode
        self._client = KVCacheClient(
            config.url,
            kind="engine-worker",
            timeout_seconds=config.timeout_seconds,
            heartbeat=True,
            heartbeat_seconds=config.heartbeat_seconds,
            software=software("LMCacheMPConnectorUpstream", is_worker=True),
        )
        self._half = WorkerHalf(self._client, config)
        self._streams: dict[str, _TokenStream] = {}
        # Requests whose loads ended in this step, in the last one, and, with asynchronous scheduling, in that before.
        window = 2 if self._vllm_config.scheduler_config.async_scheduling else 1
        self._loaded: deque[set[str]] = deque([set()], maxlen=1 + window)
        self._ended: dict[str, None] = {}
        if transfer.kv_load_failure_policy == "fail":
            logger.warning(
                'a load that fails will fail its request; add "kv_load_failure_policy": "recompute" to --kv-transfer-config'
            )

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take over vLLM's KV tensors."""
        reason = reason_against(self._vllm_config)
        if reason:
            self._half.refuse(
                UsageError(f"vLLM's own connector class does not say {reason}", hint="unset LMCACHE_USE_UPSTREAM_MP")
            )
        else:
            self._half.register(kv_caches, self._vllm_config, None)

    def batched_submit_retrieve_requests(
        self, request_ids: Sequence[str], ops: Sequence[LoadStoreOp], event: Any, cache_salts: Sequence[str] = ()
    ) -> None:
        """Load; done on return. Blocks that could not be filled are reported with the step's errors."""
        for request_id, op, salt in _zip(request_ids, ops, cache_salts):
            stream = self._stream(request_id, op, salt)
            if not self._half.load_span(stream.span_to_load(op)) or self._num_ranks > 1:
                stream.can_store = False
            self._client.post_report()
            self._loaded[-1].add(request_id)

    def batched_submit_store_requests(
        self, request_ids: Sequence[str], ops: Sequence[LoadStoreOp], event: Any, cache_salts: Sequence[str] = ()
    ) -> None:
        """Store the whole chunks; done on return."""
        for request_id, op, salt in _zip(request_ids, ops, cache_salts):
            span = self._stream(request_id, op, salt).span_to_store(op, self._saves_decode)
            if span is not None:
                self._half.store_span(span)

    def _stream(self, request_id: str, op: LoadStoreOp, salt: str) -> _TokenStream:
        chunk_size = self._chunk_size()
        stream = self._streams.get(request_id)
        if stream is None or stream.chunk_size != chunk_size:
            hello = self._half.hello
            can_store = stream is None or stream.can_store
            stream = self._streams[request_id] = _TokenStream(request_id, hello, chunk_size, salt, len(op.token_ids), can_store)
        return stream

    def _chunk_size(self) -> int:
        """0 while there is nothing to load from or to store to."""
        try:
            return self._client.present().chunk_size
        except LMCacheError:
            return 0

    def get_finished(self, finished_request_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return the ended requests whose blocks may be freed, each once, and the requests whose loads ended in this step."""
        self._half.begin_step()  # of the class's calls this is the one in every step
        self._half.launches.end_launch()
        loaded_lately = set().union(*self._loaded)
        ended = {id_ for id_ in finished_request_ids if id_ not in self._ended}
        for request_id in ended:
            self._ended[request_id] = None
            self._streams.pop(request_id, None)
        while len(self._ended) > MAX_REMEMBERED_ENDS:
            del self._ended[next(iter(self._ended))]
        loaded = self._loaded[-1]
        self._loaded.append(set())
        return ended - loaded_lately or None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return, once, the blocks that loads did not fill."""
        return self._half.take_failed_blocks()

    def shutdown(self) -> None:
        """Leave the server."""
        self._half.close()


class _TokenStream:
    """One request as the worker sees it: its keys, and what of its chunks an operation covers."""

    def __init__(
        self, request_id: str, hello: WorkerHello, chunk_size: int, salt: str, num_prompt_tokens: int, can_store: bool
    ) -> None:
        self.chunk_size = chunk_size
        # Nothing more is stored after a load has failed, or may have: the class counts its blocks as computed.
        self.can_store = can_store
        self._request_id = request_id
        # As long as at the first operation. That comes before the first generated token, unless the prompt is shorter
        # than a chunk: the chunk in which it ends then counts as one of the prompt.
        self._num_prompt_tokens = num_prompt_tokens
        self._namespace: Namespace | None = None
        self._blocks_per_chunk = 1
        if hello.namespace is not None and hello.layout is not None and chunk_size:
            engine = msgspec.structs.replace(hello.namespace, chunk_size=chunk_size)
            self._namespace = engine.for_request(cache_salt=salt)
            self._blocks_per_chunk = hello.layout.blocks_per_chunk(chunk_size)
            self._block_size = hello.layout.block_size
            self._hasher = ChunkHasher(self._namespace)

    def _keys(self, op: LoadStoreOp, first: int, last: int) -> bytes:
        keys = self._hasher.extend_to(op.token_ids[: last * self.chunk_size])
        return keys[first * KEY_BYTES : last * KEY_BYTES]

    def _fits(self, op: LoadStoreOp) -> bool:
        """Whether the class means the same by a block as the registered layout does."""
        return self._namespace is not None and len(op.block_ids) * self._block_size == op.end - op.start <= len(op.token_ids)

    def span_to_load(self, op: LoadStoreOp) -> ChunkSpan:
        """Return the chunks that cover what is to be loaded; none, so that all its blocks fail, where that cannot be."""
        if not self._fits(op):
            return ChunkSpan(self._request_id, b"", op.block_ids, 1)
        num_skipped = op.skip_first_n_tokens // self._block_size
        start = op.start + num_skipped * self._block_size
        first = start // self.chunk_size
        return ChunkSpan(
            self._request_id,
            self._keys(op, first, -(-op.end // self.chunk_size)),
            op.block_ids[num_skipped:],
            self._blocks_per_chunk,
            skip_blocks=(start - first * self.chunk_size) // self._block_size,
        )

    def span_to_store(self, op: LoadStoreOp, saves_decode: bool) -> StoreSpan | None:
        """Return the whole chunks of the operation; None when there are none to store."""
        if self._namespace is None or not self.can_store or not self._fits(op):
            return None
        end = op.end if saves_decode else min(op.end, self._num_prompt_tokens)
        first, last = -(-op.start // self.chunk_size), end // self.chunk_size
        if last <= first:
            return None
        at = (first * self.chunk_size - op.start) // self._block_size
        return StoreSpan(
            self._request_id,
            self._keys(op, first, last),
            op.block_ids[at : at + (last - first) * self._blocks_per_chunk],
            self._blocks_per_chunk,
            namespace_id=self._namespace.id,
            parent=self._keys(op, first - 1, first) if first else b"",
            num_prompt_chunks=max(0, self._num_prompt_tokens // self.chunk_size - first),
        )


def _zip(
    request_ids: Sequence[str], ops: Sequence[LoadStoreOp], cache_salts: Sequence[str]
) -> list[tuple[str, LoadStoreOp, str]]:
    return list(zip(request_ids, ops, cache_salts or [""] * len(ops), strict=True))


def current_vllm_config() -> Any:
    """Return what vLLM has set while it makes the workers' connectors."""
    from vllm.config import get_current_vllm_config

    return get_current_vllm_config()


def reason_against(vllm_config: Any) -> str:
    """Return what of an engine's requests the class's calls leave out, though their KV depends on it; "" if nothing."""
    model = vllm_config.model_config
    reasons = {
        "which LoRA adapter a request uses": vllm_config.lora_config is not None,
        "which images or sounds a request holds": model.is_multimodal_model,
        "what a request's prompt embeddings are": model.enable_prompt_embeds,
        "which tokens are drafts": vllm_config.speculative_config is not None,
        "which connector loads a request": uses_multi_connector(vllm_config),
    }
    return next((reason for reason, applies in reasons.items() if applies), "")
