"""The class that vLLM picks by itself for `"kv_connector": "LMCacheMPConnector"`.

Comes in: vLLM's calls, in the scheduler's and in the worker's process. Goes out: nothing that could
stop vLLM: whatever fails in here is a miss. Next on the data path: `scheduler.py` and `worker.py`.

The interface is that of vLLM 0.25, 0.32 and 0.33, `vllm/distributed/kv_transfer/kv_connector/v1/base.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
)

from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import LMCacheError, UsageError
from lmcache.integration.vllm.scheduler import SchedulerHalf, only_group
from lmcache.integration.vllm.steps import StepPlan, StepReport, WorkerHello
from lmcache.integration.vllm.utils import (
    ConnectorConfig,
    layout_of_joined_layers,
    media_are_hashed,
    software,
    uses_multi_connector,
)
from lmcache.integration.vllm.worker import WorkerHalf
from lmcache.log import init_logger

logger = init_logger(__name__)

LAYERS_APART = (
    "vLLM keeps the layers of a block apart all the same, and so they are copied; hint: vLLM 0.25 joins them with"
    " VLLM_USE_V2_MODEL_RUNNER=0 only, and no version for every attention backend"
)
MEDIA_NOT_HASHED = (
    "with --no-enable-prefix-caching and --mm-processor-cache-gb 0 vLLM names them by a running number; hint: leave one of the"
    " two out"
)

ONE_OF_MANY = UsageError(
    "what the other connectors of a MultiConnector load may be wrong without our knowing, and would be stored",
    hint="name LMCacheMPConnector alone in --kv-transfer-config",
)


class PlanMetadata(KVConnectorMetadata):
    """A `StepPlan` as vLLM carries it from the scheduler to the worker."""

    def __init__(self, plan: StepPlan) -> None:
        self.plan = plan
        self.is_stored = False


class ReportMetadata(KVConnectorWorkerMetadata):
    """A `StepReport` as vLLM carries it back."""

    def __init__(self, report: StepReport) -> None:
        self.report = report

    def aggregate(self, other: ReportMetadata) -> ReportMetadata:
        """Return both workers' reports as one."""
        return ReportMetadata(self.report.merge(other.report))


class HelloMetadata(KVConnectorHandshakeMetadata):
    """A `WorkerHello` as vLLM carries it to the scheduler at start."""

    def __init__(self, hello: WorkerHello) -> None:
        self.hello = hello


class LMCacheMPConnector(KVConnectorBase_V1):
    """One half of the plug-in: vLLM makes one for its scheduler and one for each worker."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        config = _read_config(transfer.kv_connector_extra_config)
        is_worker = role == KVConnectorRole.WORKER
        client = KVCacheClient(
            config.url,
            kind="engine-worker" if is_worker else "engine-scheduler",
            timeout_seconds=config.timeout_seconds,
            heartbeat=True,
            heartbeat_seconds=config.heartbeat_seconds,
            software=software("LMCacheMPConnector", is_worker),
        )
        self._joins_layers = config.cross_layer_blocks
        self._worker: WorkerHalf | None = None
        self._scheduler: SchedulerHalf | None = None
        if is_worker:
            self._worker = WorkerHalf(client, config)
            self._is_one_of_many = _is_one_of_many()
        else:
            has_hashed_media = media_are_hashed(vllm_config)
            self._scheduler = SchedulerHalf(
                client,
                can_load=transfer.is_kv_consumer,
                can_store=transfer.is_kv_producer,
                saves_decode=config.saves_decode,
                media_are_hashed=has_hashed_media,
                lookup_timeout_seconds=config.lookup_timeout_seconds,
            )
            if not has_hashed_media:
                logger.warning("requests with images or sounds are not cached: %s", MEDIA_NOT_HASHED)
            logger.info("KV cache server: %s", config.url)
            if transfer.kv_load_failure_policy == "fail":
                logger.warning(
                    'a load that fails will fail its request; add "kv_load_failure_policy": "recompute" to --kv-transfer-config'
                )

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """No. Where vLLM uses CUDA graphs it asks at once, so a bad setting is told before the model is loaded."""
        _read_config(extra_config)
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        """Return the layout that keeps all layers of a block side by side, if that is wanted; vLLM 0.32 may leave it.

        vLLM 0.25 has no name for it, and asks `prefer_cross_layer_blocks` instead.
        """
        config = _read_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        return layout_of_joined_layers() if config.cross_layer_blocks else None

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        """Whether all layers of a block shall lie side by side. Asked by vLLM 0.25, which may not be able to."""
        return self._joins_layers

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config: Any) -> bool:
        """No: while vLLM sleeps its KV has no memory, and stores may be reading it. Asked by vLLM 0.33."""
        return False

    # -- worker: start and end --------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take over vLLM's KV tensors."""
        self._register(kv_caches)

    def register_cross_layers_kv_cache(self, kv_cache: Any, attn_backend: Any) -> None:
        """Take over the one tensor in which vLLM 0.25 keeps all layers, if `prefer_cross_layer_blocks`."""
        self._register(kv_cache, attn_backend)

    def _register(self, kv_caches: Any, attn_backend: Any = None) -> None:
        assert self._worker is not None
        if self._is_one_of_many:
            self._worker.refuse(ONE_OF_MANY)
            return
        self._worker.register(kv_caches, self._vllm_config, self._kv_cache_config, attn_backend)
        layout = self._worker.hello.layout
        if self._joins_layers and layout is not None and layout.num_layers > 1:
            logger.warning("lmcache.mp.cross_layer_blocks: %s", LAYERS_APART)

    def get_handshake_metadata(self) -> HelloMetadata | None:
        """Return what the scheduler's half must know before it can start."""
        return HelloMetadata(self._worker.hello) if self._worker is not None else None

    def shutdown(self) -> None:
        """Leave the server; its pins and reservations go."""
        for half in (self._worker, self._scheduler):
            if half is not None:
                half.close()

    # -- worker: one step -------------------------------------------------------------------------

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Let this step write to blocks of preempted requests only after stores have read them, or given up."""
        if self._worker is not None and isinstance(kv_connector_metadata, PlanMetadata):
            self._worker.give_up(kv_connector_metadata.plan.preempted)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """Take over the plan of a step that begins. Each version calls it before the forward pass, unlike `start_load_kv`."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin_step()

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Load what this step's forward pass needs, done on return; or begin to, where requests wait for that."""
        if self._worker is not None and self._connector_metadata is not None:
            self._worker.load(self._connector_metadata.plan)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return: `start_load_kv` has loaded all layers."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Return: `wait_for_save` stores all layers at once."""

    def wait_for_save(self) -> None:
        """Store the chunks that this step completes: done on return, or later, by a thread of our own."""
        meta = self._connector_metadata
        if self._worker is not None and meta is not None and not meta.is_stored:
            meta.is_stored = True
            self._worker.store(meta.plan)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Return, each once, the ended requests whose blocks have been read, of those that `request_finished` kept, and the
        requests that need not wait for their loads any more."""
        if self._worker is None:
            return None, None
        meta = self._connector_metadata
        is_idle = meta is not None and meta.plan.is_idle
        # vLLM 0.25 leaves it out in a step that computes nothing. Where drafts follow, vLLM waits with it until their KV is
        # there, as must what is copied at once; other stores begin later, and from now on keep their blocks.
        if is_idle or self._worker.copies_later:
            self.wait_for_save()
        if is_idle:
            self._worker.linger()
        return self._worker.take_released() or None, self._worker.take_received(is_idle) or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Return the blocks that loads which are over did not fill; vLLM computes them."""
        return self._worker.take_failed_blocks() if self._worker is not None else set()

    def build_connector_worker_meta(self) -> ReportMetadata | None:
        """Return the report on this step's loads."""
        report = self._worker.take_report() if self._worker is not None else None
        return ReportMetadata(report) if report is not None else None

    # -- scheduler --------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: Mapping[Any, Any]) -> None:
        """Start to work as the workers say."""
        if self._scheduler is not None:
            hellos = [m.hello for m in metadata.values() if isinstance(m, HelloMetadata)]
            self._scheduler.hear(hellos)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: Mapping[Any, Any]) -> None:
        """Start to work as the workers say; the base class takes no pipeline ranks."""
        self.set_xfer_handshake_metadata(metadata)

    def on_new_request(self, request: Any) -> None:
        """Start to look up what is cached of a request that enters vLLM's queue."""
        scheduler = self._scheduler_half()
        with _as_a_miss(scheduler):
            scheduler.announced(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Return how many tokens can be loaded, None while that is being looked up; and that the request waits for that.

        Loaded within the step that computes from it, all requests of the step would wait; and when such a load fails, vLLM's
        model runner V2 computes nonsense: it takes no request back to a token before. V1 lets the first request that shares the
        blocks compute them again for all, who then answer wrongly if that one is aborted before (vLLM 0.32).
        """
        scheduler = self._scheduler_half()
        num_tokens: int | None = 0
        with _as_a_miss(scheduler):
            num_tokens = scheduler.match(request, num_computed_tokens)
        return num_tokens, bool(num_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of `num_external_tokens`, if any, into the request's blocks."""
        scheduler = self._scheduler_half()
        # Not guarded: vLLM counts on the load from here on. It is bookkeeping that cannot fail.
        scheduler.allocated(request.request_id, only_group(blocks.get_block_ids()), num_external_tokens)
        if not num_external_tokens:
            with _as_a_miss(scheduler):
                scheduler.free_pins(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> PlanMetadata:
        """Return the plan of this step."""
        scheduler = self._scheduler_half()
        plan = scheduler.plan_loads()
        with _as_a_miss(scheduler):
            scheduler.plan_stores(plan, scheduler_output)
        return PlanMetadata(plan)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take note of how a step's loads went."""
        scheduler = self._scheduler_half()
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, ReportMetadata):
            with _as_a_miss(scheduler):
                scheduler.hear_report(meta.report)

    def has_pending_push_work(self) -> bool:
        """Whether vLLM shall go on stepping without requests, until a load whose request has gone is over. vLLM 0.32 asks."""
        return self._scheduler is not None and self._scheduler.awaits_loads

    def reset_cache(self) -> bool:
        """Load nothing any more that was stored so far; vLLM asks for it where its weights were replaced. True: it is done."""
        self._scheduler_half().start_anew()
        logger.info("the cache was reset: this engine loads nothing any more that was stored so far, and others nothing of it")
        return True

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget the request; True when vLLM must keep its blocks, which are being stored, until `get_finished` names it."""
        scheduler = self._scheduler_half()
        holds_blocks = scheduler.hold_blocks(request.request_id, block_ids)
        with _as_a_miss(scheduler):
            scheduler.finished(request.request_id)
        return holds_blocks, None

    def _scheduler_half(self) -> SchedulerHalf:
        assert self._scheduler is not None, "vLLM called a scheduler's method on a worker"
        return self._scheduler


def _read_config(extra_config: Mapping[str, Any]) -> ConnectorConfig:
    """Return our settings; a bad one stops vLLM at start, as its own bad settings do."""
    try:
        return ConnectorConfig.read(extra_config)
    except LMCacheError as exc:
        raise ValueError(exc.with_hint) from exc


def _is_one_of_many() -> bool:
    """Tell whether vLLM makes this connector for a MultiConnector; it sets its configuration while it makes a worker's."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and uses_multi_connector(config)


@contextmanager
def _as_a_miss(scheduler: SchedulerHalf) -> Iterator[None]:
    """Let no failure through to vLLM; one that we did not foresee is logged with its traceback."""
    try:
        yield
    except LMCacheError as exc:
        scheduler.note_failure(exc)
    except Exception:
        logger.exception("the KV cache plug-in failed; the request goes on without")
