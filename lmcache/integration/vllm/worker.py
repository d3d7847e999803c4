"""The worker's half of the plug-in: carries out the loads and stores of each step's plan.

Comes in: vLLM's KV tensors and `StepPlan`s. Goes out: bytes, through `client/kvcache.py` (places in
the pool) and `transfer/` (the copies).

A request waits in vLLM's queue for its load until `take_received` has named it. For KV in host memory loads and stores are done
within their step: a request goes on in the next one. On a GPU both go on beside the steps, stores in the background
(`background.py`), and a load that is nearly over is named already:

    handed over ----> named: nearly over, and its chunks are still kept ----> over, and verified: settled
                      vLLM lets the request go on, which takes it 3 ms       before the step that may need it is over

What the device is given after the naming comes after the load. Should that not be over within KEPT_SECONDS, for which the
chunks are sure to stay, and one of them have gone, the engine ends: vLLM cannot take back what it computes from them.

What fails costs time, never an answer: a load reports every block that it did not fill before its request may go on, so that
nothing is ever computed from such blocks. Within a step that computes from them vLLM would let one request mend them for all
that share them, and be wrong where that one is aborted first. Of a load that was named early and turns out bad on another rank
the scheduler takes care: it plans no store before it has heard of the loads that it rests on.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache.client.kvcache import KVCacheClient, PinnedChunks, failure_reason
from lmcache.errors import LayoutMismatchError, LMCacheError, SpoiledLoadError, UsageError
from lmcache.integration.vllm.background import BackgroundStores, StoreJob
from lmcache.integration.vllm.steps import (
    ChunkSpan,
    StepPlan,
    StepReport,
    StoreSpan,
    WorkerHello,
)
from lmcache.integration.vllm.utils import ConnectorConfig, identify_engine, mla_enabled, process_token
from lmcache.keys import Namespace
from lmcache.layout import SUPPORTED_DEVICES, SUPPORTED_KV_GROUPS, KVLayout
from lmcache.log import RateLimitedLog, init_logger
from lmcache.protocol import FailureReason, StoreOutcome
from lmcache.transfer.base import TRANSFER_SECONDS, CancelledTransferError, ChunkCopier, StuckTransferError, Transfer
from lmcache.transfer.launches import LaunchClock

logger = init_logger(__name__)

CLOSE_SECONDS = 5.0
# A step that computes nothing may take so long for a load that is nearly over. Between such steps vLLM pauses for 1 ms; a load
# that one of them missed cost the first token 1.3 ms more (2k tokens, vLLM 0.32 on a CPU).
IDLE_LINGER_SECONDS = 2e-3
LINGER_POLL_SECONDS = 50e-6
# A load is named when so much of it is left: 5 ms of PCIe 5.0. The next step's forward pass waits for it.
LEAD_BYTES = 256 << 20
# Where no step has anything to compute: 12 ms. vLLM takes 3 ms to hear of it, and 10 ms to launch the request's forward pass.
IDLE_LEAD_BYTES = 640 << 20
NOT_NATIVE = (
    "lmcache.mp.require_native: KV blocks would be gathered by PyTorch, which is slower;"
    " hint: the log says what is wrong with Triton"
)
REFUSAL_HINT = "leave out --kv-transfer-config for this model"
DEFAULT_CONFIG = ConnectorConfig()


@dataclass
class LoadUnderWay:
    """A load handed to the copier: the first blocks of `span`, from chunks that stay pinned until it has been looked at."""

    span: ChunkSpan
    num_blocks: int
    pinned: PinnedChunks
    transfer: Transfer
    plan_number: int
    started_at: float
    is_named: bool = False
    """Whether vLLM was told that it may go on."""
    holds_back: bool = False
    is_given_up: bool = False

    @property
    def is_over(self) -> bool:
        """Whether there is nothing to wait for any more."""
        return self.transfer.is_done or self._is_overdue

    @property
    def _is_overdue(self) -> bool:
        return time.monotonic() - self.started_at > TRANSFER_SECONDS

    @property
    def may_be_named(self) -> bool:
        """Whether all blocks will be filled with the right bytes, as far as can be known before the last one has come."""
        return self.num_blocks == len(self.span.block_ids) and self.pinned.are_kept

    def finish(self) -> None:
        """Return when the last byte is where it should be.

        Raises: StuckTransferError.
        """
        if self._is_overdue and not self.transfer.is_done:
            raise StuckTransferError(f"a load did not end within {TRANSFER_SECONDS:g} s", "restart the engine; see its log")
        self.transfer.wait(TRANSFER_SECONDS)


class WorkerHalf:
    """One per worker process; main thread only. Its methods do not raise, but `register` may, and those that say so.

    Args:
        client: this process's own.
        config: of it `staging_bytes`, `requires_native` and `verifies_content`.
    """

    def __init__(self, client: KVCacheClient, config: ConnectorConfig = DEFAULT_CONFIG) -> None:
        self._client = client
        self._config = config
        self._copier: ChunkCopier | None = None
        self._background: BackgroundStores | None = None
        self._held: set[str] = set()
        self._reported_up_to = 0
        self._loading: list[LoadUnderWay] = []
        self._is_stuck = False
        self._failed_blocks: set[int] = set()
        self._received: set[str] = set()
        self._last_load_plan = 0  # handed to the copier
        self._loaded_up_to = 0  # and looked at
        self._reported_loads_up_to = 0
        self.launches = LaunchClock()
        self._log = RateLimitedLog(logger)
        self.hello = WorkerHello(refusal="no KV caches were registered")

    def register(self, kv_caches: Any, vllm_config: Any, kv_cache_config: Any | None, attn_backend: Any = None) -> None:
        """Take over vLLM's KV tensors, or remember why that cannot be.

        Args:
            kv_caches: one tensor a layer, by the layer's name; with `attn_backend` one tensor of all layers.
            kv_cache_config: vLLM's; without it the layers are asked for what they keep.
        Raises: ValueError, which stops vLLM at start, if the configuration `requires_native`.
        """
        from lmcache.transfer import make_copier

        try:
            check_engine(vllm_config)
            if attn_backend is not None:
                kv_caches = layers_of(kv_caches, attn_backend, kv_cache_config)
            config = kv_cache_config or ask_layers(kv_caches, vllm_config)
            layout, planes = read_layout(kv_caches, vllm_config, config)
            copier = make_copier(layout, planes, staging_bytes=self._config.staging_bytes)
            identity = identify_engine(vllm_config, layout, is_replicated(vllm_config, config))
        except Exception as exc:  # an engine that we do not understand serves on without us
            self.refuse(exc)
        else:
            if self._config.requires_native and not copier.is_native:
                raise ValueError(NOT_NATIVE)
            parallel = vllm_config.parallel_config
            self.start(copier, identity.namespace, parallel.rank, parallel.world_size, identity.revision_parts)

    def refuse(self, exc: Exception) -> None:
        """Serve on without the cache, and say why."""
        if isinstance(exc, LMCacheError):
            reason, unforeseen = exc.with_hint, None
        else:
            reason, unforeseen = f"a bug: {exc!r}", exc
        self.hello = WorkerHello(refusal=reason)
        logger.error("serving without the KV cache: %s", reason, exc_info=unforeseen)

    def start(
        self,
        copier: ChunkCopier,
        namespace: Namespace,
        rank: int = 0,
        num_ranks: int = 1,
        revision_parts: Mapping[str, str] | None = None,
    ) -> None:
        """Begin to work, perhaps anew and with other tensors; the server is told now, or as soon as it is there."""
        self._end_transfers()
        self._copier = copier
        self.hello = WorkerHello(namespace, copier.layout, copies_later=copier.copies_later, rank=rank, num_ranks=num_ranks)
        self._background = BackgroundStores(self._store_job, copier.prepare_thread()) if copier.copies_later else None
        try:
            self._client.watch_mapping(lambda view: copier.pin_pool(view, self.launches))
            self._client.watch_pins(copier.pin_report)
            processes = [token for token in map(process_token, (os.getpid(), os.getppid())) if token]
            reply = self._client.register(
                namespace, copier.layout, rank, num_ranks, processes, backend=copier.backend, revision_parts=revision_parts
            )
            logger.info(
                "KV cache server found: %.1f KiB a token, L1 holds %d tokens",
                reply.bytes_per_token / 1024,
                reply.l1_tokens,
            )
        except LMCacheError as exc:
            self._log.warning("register", f"no KV cache for now: {exc.with_hint}")

    # -- one step ---------------------------------------------------------------------------------

    def give_up(self, preempted: frozenset[str]) -> None:
        """Let vLLM use the blocks of preempted requests anew, from this step on."""
        if self._background is not None and self._copier is not None and preempted:
            self._background.cancel(preempted)
            self._copier.protect_blocks()

    def begin_step(self) -> None:
        """Let what this step computes wait for the loads that were named before it."""
        self.launches.begin_step()
        for load in self._loading:
            if load.is_named and not load.holds_back:
                load.transfer.hold_back()
                load.holds_back = True

    def load(self, plan: StepPlan) -> None:
        """Fill the blocks of the plan's loads, or begin to; those that could not be filled are remembered."""
        self._held |= plan.held
        for load in self._loading:
            load.is_given_up = load.is_given_up or load.span.request_id in plan.given_up
        if self._background is not None and self._background.is_gated and self._copier is not None:
            self._background.begin_step(self._copier.fence())
        for span in plan.loads:
            self._begin_load(span, plan.number, is_awaited=True)
        if plan.loads:
            self._last_load_plan = plan.number
        if not self.copies_later:
            self._received.update(load.span.request_id for load in self._loading)
            self.settle_loads()

    def load_span(self, span: ChunkSpan) -> bool:
        """Fill the blocks of one load; tell whether all of them hold what they should."""
        self._begin_load(span)
        return self.settle_loads()

    @property
    def copies_later(self) -> bool:
        """Whether loads and stores go on beside the steps."""
        return self.hello.copies_later

    def _begin_load(self, span: ChunkSpan, plan_number: int = 0, is_awaited: bool = False) -> None:
        """Hand a load over. If vLLM awaits it, no step will need its blocks before it is named by `take_received`."""
        started_at = time.monotonic()
        try:
            self._loading.append(self._start_transfer(span, plan_number, holds_back=not is_awaited))
        except Exception as exc:  # whatever it is, vLLM must hear which blocks are not filled
            self._note_failure("load", span, started_at, exc)
            self._end_load(span, 0, failure_reason(exc))
            if is_awaited:
                self._received.add(span.request_id)

    def _start_transfer(self, span: ChunkSpan, plan_number: int, holds_back: bool) -> LoadUnderWay:
        copier = self._ready_copier()
        pinned = self._pin(span)
        try:
            _check_lengths(pinned.extents, span.blocks_per_chunk * copier.layout.bytes_per_block)
            if self._config.verifies_content:  # before any of it is on its way: a load may be named before it is over
                pinned.compare(with_content=True)
            available = len(pinned.extents) * span.blocks_per_chunk - span.skip_blocks
            block_ids = span.block_ids[: max(0, available)]
            transfer = copier.begin_scatter(pinned.extents, block_ids, span.skip_blocks, holds_back)
        except BaseException:
            pinned.release()
            raise
        return LoadUnderWay(span, len(block_ids), pinned, transfer, plan_number, time.monotonic())

    def _pin(self, span: ChunkSpan) -> PinnedChunks:
        """Return the span's chunks: where the lookup said that they lie, or as the server finds them now."""
        shard = self.hello.shard
        borrowed = self._client.borrow(span.places_of(shard), span.boot)
        if borrowed is not None and borrowed.are_kept:
            return borrowed
        if borrowed is not None:
            borrowed.release()
        return self._client.pin(span.keys, span.request_id, shard)

    def settle_loads(self) -> bool:
        """Wait for the loads under way, look at what they brought, and remember what did not; True when all did."""
        loading, self._loading = self._loading, []
        is_good = all([self._settle(load) for load in loading])
        self._loaded_up_to = self._last_load_plan
        return is_good

    def linger(self, seconds: float = IDLE_LINGER_SECONDS) -> None:
        """There is nothing to compute: wait a moment until a load can be named, if one is under way."""
        give_up_at = time.monotonic() + seconds
        while self._awaits_a_load() and time.monotonic() < give_up_at:
            time.sleep(LINGER_POLL_SECONDS)

    def _awaits_a_load(self) -> bool:
        has_unnamed = any(not load.is_named for load in self._loading)
        return has_unnamed and not self._loading[0].is_over and self._next_to_name(IDLE_LEAD_BYTES) is None

    def take_received(self, is_idle: bool = False) -> set[str]:
        """Return, once each, the requests whose awaited loads are over, or nearly; what did not arrive is remembered.

        Args:
            is_idle: no forward pass has to wait for a load that is not over.
        Raises: SpoiledLoadError.
        """
        while self._loading and self._loading[0].is_over:
            self._settle_first()
        while (load := self._next_to_name(IDLE_LEAD_BYTES if is_idle else LEAD_BYTES)) is not None:
            load.is_named = True
            self._received.add(load.span.request_id)
        self._loaded_up_to = self._loading[0].plan_number - 1 if self._loading else self._last_load_plan
        received, self._received = self._received, set()
        return received

    def _next_to_name(self, bytes_left: int) -> LoadUnderWay | None:
        """Return the first load that is not named, if no more than so much is left of it and of those before it."""
        for load in self._loading:
            bytes_left -= load.transfer.bytes_left
            if not load.is_named:
                return load if bytes_left >= 0 and load.may_be_named else None
        return None

    def _settle_first(self) -> None:
        """End the first load, which was named or is named now."""
        load = self._loading.pop(0)
        failed_before = set(self._failed_blocks)
        is_good = self._settle(load)
        if not load.is_named:
            self._received.add(load.span.request_id)
        elif not is_good and load.is_given_up:
            self._failed_blocks = failed_before  # by now its blocks are somebody else's
        elif not is_good:
            raise SpoiledLoadError(
                f"{load.span.request_id} goes on without what was loaded for it (the log has why), and cannot be taken back",
                hint="restart the engine, and report it with the server's log",
            )

    def _settle_named(self) -> None:
        """What a step computes may rest on loads that were named before it: return when these are good."""
        while self._loading and self._loading[0].holds_back:
            self._settle_first()

    def _settle(self, load: LoadUnderWay) -> bool:
        try:
            load.finish()
            with load.pinned:
                load.pinned.verify()
        except Exception as exc:  # whatever it is, vLLM must hear which blocks are not filled
            if isinstance(exc, StuckTransferError):  # the chunks stay pinned: the device may still read them
                load.transfer.hold_back()
            self._note_failure("load", load.span, load.started_at, exc)
            return self._end_load(load.span, 0, failure_reason(exc))
        if load.num_blocks < len(load.span.block_ids):
            self._log.warning(
                "missing",
                f"{len(load.pinned.placements)} of {load.span.num_chunks} chunks were still there to load;"
                " vLLM computes the rest",
            )
        return self._end_load(load.span, load.num_blocks, FailureReason.MISSING)

    def _end_load(self, span: ChunkSpan, num_filled: int, reason: FailureReason) -> bool:
        """Remember the blocks after the first `num_filled` as failed; True when there are none."""
        num_failed = len(span.block_ids) - num_filled
        if num_failed:
            self._failed_blocks.update(span.block_ids[num_filled:])
            self._client.tally.add(failed_blocks={reason: num_failed})
        return not num_failed

    def store(self, plan: StepPlan) -> None:
        """Store the plan's chunks.

        Raises: SpoiledLoadError.
        """
        if not plan.is_idle:
            self._settle_named()
        stores = plan.stores if self.hello.is_storing else []
        if self._background is None:
            for span in stores:
                self.store_span(span)
        elif plan.stores and self._copier is not None:
            # Also when there is nothing to do for this rank: the scheduler waits until all ranks are past the plan.
            self._background.submit(plan.number, stores, self._copier.fence())
        self.launches.end_launch()

    def store_span(self, span: StoreSpan) -> None:
        """Store one request's chunks, if it is this rank that does; done on return."""
        if self.hello.is_storing:
            self._store_job(StoreJob(0, span, None))

    def _store_job(self, job: StoreJob) -> None:
        started_at = time.monotonic()
        try:
            self._store(job)
        except CancelledTransferError as exc:
            logger.debug("%s", exc)
        except Exception as exc:  # a store that fails is a chunk that is not there next time
            self._note_failure("store", job.span, started_at, exc)

    def _store(self, job: StoreJob) -> None:
        span, copier = job.span, self._ready_copier()
        if self._is_stuck:
            raise StuckTransferError("an earlier store did not end; nothing is stored any more", "restart the engine")
        size = span.blocks_per_chunk
        with self._client.reserve(
            span.keys,
            size * copier.layout.bytes_per_block,
            span.namespace_id,
            self.hello.shard,
            span.parent,
        ) as reservation:
            block_ids = [
                block for index in reservation.reserved_indices() for block in span.block_ids[index * size : (index + 1) * size]
            ]
            try:
                copier.gather(block_ids, reservation.extents, job.fence, lambda: job.is_cancelled)
            except StuckTransferError:
                self._is_stuck = True
                reservation.keep_for_ever()
                raise
            reservation.commit(with_checksums=self._config.verifies_content)
            self._client.tally.add(decode_chunks=_num_stored_from(reservation.outcomes, span.num_prompt_chunks))
            if StoreOutcome.FULL in reservation.outcomes:
                self._log.warning("full", "L1 is full of what is in use: a chunk was not stored")

    def _ready_copier(self) -> ChunkCopier:
        if self._copier is None:
            raise LMCacheError(self.hello.refusal)
        return self._copier

    def _note_failure(self, what: str, span: ChunkSpan, started_at: float, exc: Exception) -> None:
        """Log at most once per interval and kind; what is no error of ours, with its traceback."""
        seconds = time.monotonic() - started_at
        of_what = f"a {what} of {span.num_chunks} chunks for request {span.request_id}"
        if isinstance(exc, LMCacheError):
            self._log.warning(type(exc).__name__, f"{of_what} failed after {seconds:.3f} s: {exc.with_hint}")
        else:
            logger.error("%s failed unexpectedly after %.3f s", of_what, seconds, exc_info=exc)

    # -- after a step -----------------------------------------------------------------------------

    def take_failed_blocks(self) -> set[int]:
        """Return, once, the blocks that loads did not fill."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_released(self) -> set[str]:
        """Return, once each, the requests that have ended and of whose blocks nothing is left to read."""
        released = {id_ for id_ in self._held if self._background is None or not self._background.is_reading(id_)}
        self._held -= released
        return released

    def take_report(self) -> StepReport | None:
        """Return, once, what the scheduler should know of this step's loads, and of the stores."""
        stored_up_to = self._background.done_up_to if self._background is not None else 0
        if self._loaded_up_to == self._reported_loads_up_to and stored_up_to == self._reported_up_to:
            return None
        # Not right after the load, where it would delay the forward pass; but before vLLM hears of the step, so that
        # who has an answer finds it counted.
        self._client.post_report()
        self._reported_loads_up_to, self._reported_up_to = self._loaded_up_to, stored_up_to
        rank = self.hello.rank
        return StepReport(
            {rank: self._loaded_up_to},
            {rank: stored_up_to} if self._background is not None else {},
        )

    def close(self) -> None:
        """Leave the server, after what is under way."""
        self._end_transfers()
        self._client.close()

    def _end_transfers(self) -> None:
        self.settle_loads()
        if self._background is not None:
            self._background.close(CLOSE_SECONDS)


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
    return LayerGroups(groups, first.nbytes // _page_bytes(groups[0].kv_cache_spec))


def _page_bytes(spec: Any) -> int:
    """Return the bytes of one layer's block without padding; vLLM before 0.32 has another name for it."""
    return int(getattr(spec, "unpadded_page_size_bytes", None) or spec.real_page_size_bytes)


def read_layout(kv_caches: dict[str, Any], vllm_config: Any, kv_cache_config: Any) -> tuple[KVLayout, list[Any]]:
    """Return how the engine's KV is cut, and its byte planes, layer by layer.

    Raises: UsageError for a model or an engine that cannot be cached; LayoutMismatchError for
        tensors that are not what vLLM's configuration says.
    """
    from lmcache.transfer.cpu import block_planes, joined_plane

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
    num_blocks = kv_cache_config.num_blocks
    joined = joined_plane(tensors, num_blocks)
    planes = [plane for tensor in tensors for plane in block_planes(tensor, num_blocks)] if joined is None else [joined]
    layers_per_block = 1 if joined is None else len(tensors)
    num_layers = len(tensors) // layers_per_block
    layout = KVLayout(
        num_layers=num_layers,
        num_planes=len(planes) // num_layers,
        block_bytes=planes[0].shape[1],
        block_size=spec.block_size,
        dtype=str(tensors[0].dtype).removeprefix("torch."),
        order=_order(tensors, layer_names, vllm_config, is_joined=joined is not None),
        layers_per_block=layers_per_block,
    )
    expected = _page_bytes(spec) * layers_per_block
    if layout.num_planes * layout.block_bytes != expected:
        raise LayoutMismatchError(
            f"a block has {layout.num_planes} x {layout.block_bytes} bytes, vLLM's configuration says {expected}"
        )
    return layout, planes


def layers_of(kv_cache: Any, attn_backend: Any, kv_cache_config: Any) -> dict[str, Any]:
    """Return each layer's part of the one tensor in which vLLM keeps all layers, as it would register them one by one.

    Args:
        kv_cache: its axes in the order in which they lie in memory, which the backend knows.
    Raises: LayoutMismatchError when it has not the axes that the backend names, or other layers than the configuration.
    Source: vLLM 0.25.1, `allocate_uniform_kv_caches` in v1/worker/kv_connector_model_runner_mixin.py.
    """
    try:
        order = list(attn_backend.get_kv_cache_stride_order(include_num_layers_dimension=True))
    except (AttributeError, NotImplementedError):  # vLLM takes that for: as they are counted
        order = list(range(kv_cache.dim()))
    parts = kv_cache_config.kv_cache_tensors
    if sorted(order) != list(range(kv_cache.dim())) or kv_cache.shape[order.index(0)] != len(parts):
        raise LayoutMismatchError(
            f"the tensor of all layers has the shape {list(kv_cache.shape)}, not axes in the order {order},"
            f" the one called 0 of {len(parts)} layers",
            hint="leave out lmcache.mp.cross_layer_blocks",
        )
    layers = kv_cache.permute([order.index(axis) for axis in range(kv_cache.dim())])
    return {name: layer for layer, part in zip(layers, parts, strict=True) for name in part.shared_by}


def check_engine(vllm_config: Any) -> None:
    """Return if a prompt's beginning may be left out of what the engine computes.

    Raises: UsageError.
    Source: vLLM 0.25.1 and 0.32, `ModelConfig.is_prefix_caching_supported`; models without attention are told from their KV.
    """
    model = vllm_config.model_config
    if getattr(model, "pooler_config", None) is not None and not model.is_prefix_caching_supported:
        raise UsageError(
            "this pooling model needs all of a prompt computed at once; vLLM does not cache prefixes of it either",
            hint=REFUSAL_HINT,
        )


def is_replicated(vllm_config: Any, kv_cache_config: Any) -> bool:
    """Tell whether all tensor parallel ranks hold the same KV: MLA has one latent vector a token, which is not split."""
    spec, _ = _only_group(kv_cache_config)
    return mla_enabled(vllm_config.model_config) and type(spec).__name__ == "MLAAttentionSpec"


def _only_group(kv_cache_config: Any) -> tuple[Any, list[str]]:
    """Return the spec and the layers of the one KV group there may be."""
    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) == 1 and getattr(groups[0].kv_cache_spec, "non_causal", False):
        raise UsageError("KV that depends on later tokens cannot be cached", hint=REFUSAL_HINT)
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


def _order(tensors: Sequence[Any], layer_names: Sequence[str], vllm_config: Any, is_joined: bool) -> str:
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
    together = f" {tensors[1].storage_offset() - first.storage_offset()} apart in a block" if is_joined else ""
    backend_name = backend.get_name() if backend else "?"
    return f"{first.device.type} {backend_name} vllm {vllm_version} block axes {inner} layers{together} {names}"


def _num_stored_from(outcomes: Sequence[StoreOutcome], first: int) -> int:
    return list(outcomes[first:]).count(StoreOutcome.RESERVED)


def _check_lengths(extents: Sequence[memoryview], expected: int) -> None:
    for extent in extents:
        if extent.nbytes != expected:
            raise LayoutMismatchError(f"a stored chunk has {extent.nbytes} bytes, this engine's have {expected}")
