"""The worker's half of the plug-in: carries out the loads and stores of each step's plan.

Comes in: vLLM's KV tensors and `StepPlan`s. Goes out: bytes, through `client/kvcache.py` (places in
the pool) and `transfer/` (the copies).

All of it is synchronous: a load is done before the forward pass that needs it, a store after the
one that computed it, and vLLM reuses no block meanwhile. What fails costs time, never an answer: a
load reports every block that it did not fill, and from then on nothing is stored until the
scheduler has heard of it, because what is computed from such blocks is worthless.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache.client.kvcache import KVCacheClient, PinnedChunks, failure_reason
from lmcache.errors import LayoutMismatchError, LMCacheError, UsageError
from lmcache.integration.vllm.steps import (
    ChunkSpan,
    StepPlan,
    StepReport,
    StoreSpan,
    WorkerHello,
)
from lmcache.integration.vllm.utils import engine_namespace, process_token
from lmcache.keys import Namespace
from lmcache.layout import SUPPORTED_DEVICES, SUPPORTED_KV_GROUPS, KVLayout
from lmcache.log import RateLimitedLog, init_logger
from lmcache.protocol import FailureReason, StoreOutcome
from lmcache.transfer.base import ChunkCopier

logger = init_logger(__name__)

REFUSAL_HINT = "leave out --kv-transfer-config for this model"


class WorkerHalf:
    """One per worker process; main thread only. Its methods do not raise.

    Args:
        client: this process's own.
    """

    def __init__(self, client: KVCacheClient) -> None:
        self._client = client
        self._copier: ChunkCopier | None = None
        self._failed_blocks: set[int] = set()
        self._ended_loads: set[str] = set()
        self._load_failures = 0
        self._rank = 0
        self._log = RateLimitedLog(logger)
        self.hello = WorkerHello(refusal="no KV caches were registered")

    def register(self, kv_caches: dict[str, Any], vllm_config: Any, kv_cache_config: Any | None) -> None:
        """Take over vLLM's KV tensors, or remember why that cannot be.

        Args:
            kv_cache_config: vLLM's; without it the layers are asked for what they keep.
        """
        from lmcache.transfer.cpu import CpuCopier

        try:
            config = kv_cache_config or ask_layers(kv_caches, vllm_config)
            layout, planes = read_layout(kv_caches, vllm_config, config)
            copier, namespace = CpuCopier(layout, planes), engine_namespace(vllm_config, layout)
        except Exception as exc:  # an engine that we do not understand serves on without us
            self.refuse(exc)
        else:
            self.start(copier, namespace, vllm_config.parallel_config.rank)

    def refuse(self, exc: Exception) -> None:
        """Serve on without the cache, and say why."""
        if isinstance(exc, LMCacheError):
            reason, unforeseen = _with_hint(exc), None
        else:
            reason, unforeseen = f"a bug: {exc!r}", exc
        self.hello = WorkerHello(refusal=reason)
        logger.error("serving without the KV cache: %s", reason, exc_info=unforeseen)

    def start(self, copier: ChunkCopier, namespace: Namespace, rank: int = 0) -> None:
        """Begin to work; the server is told now, or as soon as it is there."""
        self._copier = copier
        self._rank = rank
        self.hello = WorkerHello(namespace, copier.layout)
        try:
            processes = [token for token in map(process_token, (os.getpid(), os.getppid())) if token]
            reply = self._client.register(namespace, copier.layout, rank, namespace.world_size, processes)
            logger.info(
                "KV cache server found: %.1f KiB a token, L1 holds %d tokens",
                reply.bytes_per_token / 1024,
                reply.l1_tokens,
            )
        except LMCacheError as exc:
            self._log.warning("register", f"no KV cache for now: {_with_hint(exc)}")

    # -- one step ---------------------------------------------------------------------------------

    def load(self, plan: StepPlan) -> None:
        """Fill the blocks of the plan's loads; those that could not be filled are remembered."""
        for span in plan.loads:
            self.load_span(span)

    def load_span(self, span: ChunkSpan) -> bool:
        """Fill the blocks of one load; tell whether all of them hold what they should."""
        num_filled, reason = self._load(span)
        num_failed = len(span.block_ids) - num_filled
        if num_failed:
            self._load_failures += 1
            self._failed_blocks.update(span.block_ids[num_filled:])
            self._client.tally.add(failed_blocks={reason: num_failed})
        self._ended_loads.add(span.request_id)
        return not num_failed

    def _load(self, span: ChunkSpan) -> tuple[int, FailureReason]:
        """Return how many of the span's blocks, counted from its start, hold what they should, and why not the others."""
        try:
            copier = self._ready_copier()
            with self._pin(span) as pinned:
                _check_lengths(pinned.extents, span.blocks_per_chunk * copier.layout.bytes_per_block)
                available = len(pinned.extents) * span.blocks_per_chunk - span.skip_blocks
                block_ids = span.block_ids[: max(0, available)]
                copier.scatter(pinned.extents, block_ids, span.skip_blocks)
                pinned.verify()
        except Exception as exc:  # whatever it is, vLLM must hear which blocks are not filled
            self._note_failure("load", exc)
            return 0, failure_reason(exc)
        if len(block_ids) < len(span.block_ids):
            self._log.warning(
                "missing",
                f"{len(pinned.placements)} of {span.num_chunks} chunks were still there to load; vLLM computes the rest",
            )
        return len(block_ids), FailureReason.MISSING

    def _pin(self, span: ChunkSpan) -> PinnedChunks:
        """Return the span's chunks: where the lookup said that they lie, or as the server finds them now."""
        borrowed = self._client.borrow(span.places_of(self._rank), span.boot)
        return borrowed or self._client.pin(span.keys, span.request_id, self._rank)

    def store(self, plan: StepPlan) -> None:
        """Store the plan's chunks, unless one of them may come from a load that failed."""
        if plan.known_load_failures.get(self._rank, 0) == self._load_failures:
            for span in plan.stores:
                self.store_span(span)

    def store_span(self, span: StoreSpan) -> None:
        """Store one request's chunks."""
        try:
            self._store(span)
        except Exception as exc:  # a store that fails is a chunk that is not there next time
            self._note_failure("store", exc)

    def _store(self, span: StoreSpan) -> None:
        copier = self._ready_copier()
        size = span.blocks_per_chunk
        with self._client.reserve(
            span.keys,
            size * copier.layout.bytes_per_block,
            span.namespace_id,
            self._rank,
            span.parent,
        ) as reservation:
            block_ids = [
                block for index in reservation.reserved_indices() for block in span.block_ids[index * size : (index + 1) * size]
            ]
            copier.gather(block_ids, reservation.extents)
            reservation.commit()
            self._client.tally.add(decode_chunks=_num_stored_from(reservation.outcomes, span.num_prompt_chunks))
            if StoreOutcome.FULL in reservation.outcomes:
                self._log.warning("full", "L1 is full of what is in use: a chunk was not stored")

    def _ready_copier(self) -> ChunkCopier:
        if self._copier is None:
            raise LMCacheError(self.hello.refusal)
        return self._copier

    def _note_failure(self, what: str, exc: Exception) -> None:
        """Log at most once per interval and kind; what is no error of ours, with its traceback."""
        if isinstance(exc, LMCacheError):
            self._log.warning(type(exc).__name__, f"a {what} failed: {_with_hint(exc)}")
        else:
            logger.error("a %s failed unexpectedly", what, exc_info=exc)

    # -- after a step -----------------------------------------------------------------------------

    def take_failed_blocks(self) -> set[int]:
        """Return, once, the blocks that loads did not fill."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_report(self) -> StepReport | None:
        """Return, once, what the scheduler should know of this step's loads."""
        if not self._ended_loads:
            return None
        # Not right after the load, where it would delay the forward pass; but before vLLM hears of the step, so that
        # who has an answer finds it counted.
        self._client.post_report()
        ended, self._ended_loads = frozenset(self._ended_loads), set()
        return StepReport(ended, {self._rank: self._load_failures})

    def close(self) -> None:
        """Leave the server."""
        self._client.close()


@dataclass
class LayerGroup:
    """Layers of one kind, as vLLM's `kv_cache_config` lists them."""

    kv_cache_spec: Any
    layer_names: list[str]
    is_eagle_group: bool = False


@dataclass
class LayerGroups:
    """As much of vLLM's `kv_cache_config` as a layout is read from."""

    kv_cache_groups: list[LayerGroup]
    num_blocks: int


def ask_layers(kv_caches: Mapping[str, Any], vllm_config: Any) -> LayerGroups:
    """Return what the layers say that they keep. Draft layers look like the others: their engines are to be refused before."""
    layers = vllm_config.compilation_config.static_forward_context
    groups: list[LayerGroup] = []
    for name in kv_caches:
        spec = layers[name].get_kv_cache_spec(vllm_config)
        group = next((group for group in groups if group.kv_cache_spec == spec), None)
        if group is None:
            groups.append(LayerGroup(spec, [name]))
        else:
            group.layer_names.append(name)
    if not groups:
        raise LayoutMismatchError("vLLM registered no KV tensors", hint=REFUSAL_HINT)
    first = kv_caches[groups[0].layer_names[0]]
    return LayerGroups(groups, first.nbytes // groups[0].kv_cache_spec.unpadded_page_size_bytes)


def read_layout(kv_caches: dict[str, Any], vllm_config: Any, kv_cache_config: Any) -> tuple[KVLayout, list[Any]]:
    """Return how the engine's KV is cut, and its byte planes, layer by layer.

    Raises: UsageError for a model or an engine that cannot be cached; LayoutMismatchError for
        tensors that are not what vLLM's configuration says.
    """
    from lmcache.transfer.cpu import block_plane

    parallel = vllm_config.parallel_config
    if parallel.world_size != parallel.tensor_parallel_size or parallel.decode_context_parallel_size != 1:
        raise UsageError(
            f"an engine of {parallel.world_size} ranks that are not all tensor parallel cannot be cached by this version",
            hint="use pipeline and context parallel size 1",
        )
    spec, layer_names = _only_group(kv_cache_config)
    tensors = _distinct_tensors([kv_caches[name] for name in layer_names if name in kv_caches])
    if not tensors:
        raise LayoutMismatchError("vLLM registered no KV tensors", hint=REFUSAL_HINT)
    if tensors[0].device.type not in SUPPORTED_DEVICES:
        raise UsageError(f"KV on {tensors[0].device} cannot be copied by this version", hint=REFUSAL_HINT)
    planes = [block_plane(tensor, kv_cache_config.num_blocks) for tensor in tensors]
    layout = KVLayout(
        num_layers=len(planes),
        num_planes=1,
        block_bytes=planes[0].shape[1],
        block_size=spec.block_size,
        dtype=str(tensors[0].dtype).removeprefix("torch."),
        order=_order(tensors, layer_names, vllm_config),
    )
    if layout.block_bytes != spec.unpadded_page_size_bytes:
        raise LayoutMismatchError(
            f"a block has {layout.block_bytes} bytes, vLLM's configuration says {spec.unpadded_page_size_bytes}"
        )
    return layout, planes


def _only_group(kv_cache_config: Any) -> tuple[Any, list[str]]:
    """Return the spec and the layers of the one KV group there may be."""
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1 or kinds[0] not in SUPPORTED_KV_GROUPS or groups[0].is_eagle_group:
        drafts = " with draft layers" if any(group.is_eagle_group for group in groups) else ""
        raise UsageError(
            f"KV groups {', '.join(kinds) or 'none'}{drafts} cannot be cached; this version takes "
            f"one group of {' or '.join(SUPPORTED_KV_GROUPS)}",
            hint=REFUSAL_HINT,
        )
    return groups[0].kv_cache_spec, list(groups[0].layer_names)


def _distinct_tensors(tensors: Sequence[Any]) -> list[Any]:
    """Layers may share their KV; it is copied once."""
    return list({tensor.data_ptr(): tensor for tensor in tensors}.values())


def _order(tensors: Sequence[Any], layer_names: Sequence[str], vllm_config: Any) -> str:
    """Return what, beside the sizes, decides which byte of a block means what.

    A backend may pack a block as it likes and change that from version to version, so both names
    are part of it: an upgrade starts cold.
    """
    from vllm import __version__ as vllm_version

    layers = vllm_config.compilation_config.static_forward_context
    backend = getattr(layers.get(layer_names[0]), "attn_backend", None)
    first = tensors[0]
    inner = [*zip(first.shape[1:], first.stride()[1:], strict=True)]
    names = hashlib.sha256("\0".join(layer_names).encode()).hexdigest()[:16]
    return f"{first.device.type} {backend.get_name() if backend else '?'} vllm {vllm_version} block axes {inner} layers {names}"


def _num_stored_from(outcomes: Sequence[StoreOutcome], first: int) -> int:
    return list(outcomes[first:]).count(StoreOutcome.RESERVED)


def _check_lengths(extents: Sequence[memoryview], expected: int) -> None:
    for extent in extents:
        if extent.nbytes != expected:
            raise LayoutMismatchError(f"a stored chunk has {extent.nbytes} bytes, this engine's have {expected}")


def _with_hint(exc: LMCacheError) -> str:
    return f"{exc}; hint: {exc.hint}" if exc.hint else str(exc)
