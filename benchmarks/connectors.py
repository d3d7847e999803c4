"""Connectors that vLLM loads in benchmarks by `kv_connector_module_path`, and a middleware for its API server.

`IdleConnector` does nothing: what vLLM itself does more where there is a connector. `SelectiveConnector` is ours, and stores
nothing of a request whose X-Request-Id says `unstored`. `TimedConnector` is ours with a clock, `GpuTimedConnector` is that for
KV on a GPU. It and the middleware note time.monotonic(), which all processes of a host share, and append JSON lines to the file
that ENGINE_STAMPS names. What a request's X-Request-Id says decides what happens in the worker:

- `floor`: nothing is loaded, and no message is sent for it.
- `memcpy`: the load is timed, and so is one memcpy of as many bytes; they take turns to be first.
- `asking`: the worker asks the server where the chunks lie, although the scheduler's lookup has told it.
- anything else: as in the product, with its copy timed.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import time
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector

STAMPS = "ENGINE_STAMPS"
UNSTORED = "unstored"


def write_line(request_id: str, values: dict[str, float]) -> None:
    """Append what is known of a request; one write, because several processes do it."""
    file = os.open(os.environ[STAMPS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, json.dumps({"request": request_id, **values}).encode() + b"\n")
    os.close(file)


class StampMiddleware:
    """ASGI: when the API server got a request, and when it sent the first piece of the answer."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request_id = dict(scope.get("headers", ())).get(b"x-request-id", b"").decode()
        if not request_id:
            await self.app(scope, receive, send)
            return
        stamps = {"api_received": time.monotonic()}

        async def stamped_send(message: Any) -> None:
            if message["type"] == "http.response.body" and message.get("body"):
                stamps.setdefault("api_first_token", time.monotonic())
            await send(message)

        await self.app(scope, receive, stamped_send)
        write_line(request_id, stamps)


class MemcpyFloor:
    """Memory like the load's: a shared mapping to read, private memory to write, both touched, neither touched lately."""

    def __init__(self, num_bytes: int) -> None:
        self._shared = memoryview(mmap.mmap(-1, num_bytes))
        self._private = memoryview(bytearray(num_bytes))
        self._shared[:] = b"\1" * num_bytes

    def copy(self) -> float:
        """Return the seconds of one copy."""
        started = time.monotonic()
        self._private[:] = self._shared
        return time.monotonic() - started


class IdleConnector(KVConnectorBase_V1):
    """Finds nothing, loads nothing, stores nothing."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return KVConnectorMetadata()


class SelectiveConnector(LMCacheMPConnector):
    """The product's connector, which is not offered what some requests have computed."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        if self._scheduler is not None:
            span_of = self._scheduler._span_to_store
            self._scheduler._span_to_store = lambda tracked: None if UNSTORED in tracked.request_id else span_of(tracked)


class TimedConnector(LMCacheMPConnector):
    """The product's connector; private names of it are used where a benchmark has to look inside."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._stamps: dict[str, dict[str, float]] = {}
        self._loading: dict[int, list[str]] = {}
        self._request_id = ""
        self._floor: MemcpyFloor | None = None
        self._memcpy_first = False
        self._copy_seconds = 0.0

    def _stamp(self, request_id: str, name: str) -> None:
        self._stamps.setdefault(request_id, {}).setdefault(name, time.monotonic())

    def _flush(self, request_id: str) -> None:
        stamps = self._stamps.pop(request_id, None)
        if stamps:
            write_line(request_id, stamps)

    # -- scheduler --------------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        self._stamp(request.request_id, "on_new_request")
        super().on_new_request(request)
        self._stamp(request.request_id, "lookup_sent")

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        self._stamp(request.request_id, "match_asked")
        answer = super().get_num_new_matched_tokens(request, num_computed_tokens)
        stamps = self._stamps[request.request_id]
        stamps["match_calls"] = stamps.get("match_calls", 0) + 1
        if answer[0] is not None:
            self._stamp(request.request_id, "match_answered")
        return answer

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        for load in meta.plan.loads:
            self._stamp(load.request_id, "meta_built")
        self._loading[meta.plan.number] = [load.request_id for load in meta.plan.loads]
        return meta

    def update_connector_output(self, connector_output: Any) -> None:
        report = getattr(connector_output.kv_connector_worker_meta, "report", None)
        for up_to in report.loaded_up_to.values() if report is not None else ():
            for number in [number for number in self._loading if number <= up_to]:
                for request_id in self._loading.pop(number):
                    self._stamp(request_id, "step_heard")
        super().update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        answer = super().request_finished(request, block_ids)
        self._flush(request.request_id)
        return answer

    # -- worker -----------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        super().register_kv_caches(kv_caches)
        copier = self._worker._copier
        scatter = copier.scatter

        def timed_scatter(*args: Any) -> None:
            started = time.monotonic()
            scatter(*args)
            self._copy_seconds += time.monotonic() - started

        copier.scatter = timed_scatter

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        loads = self._connector_metadata.plan.loads
        if not loads:
            super().start_load_kv(forward_context, **kwargs)
            return
        self._request_id = request_id = loads[0].request_id
        if "asking" in request_id:
            loads[:] = [dataclasses.replace(load, places=[]) for load in loads]
        self._stamp(request_id, "load_begin")
        if "floor" in request_id:
            self._worker._last_load_plan = self._connector_metadata.plan.number
            self._worker._received.add(request_id)
        elif "memcpy" in request_id:
            self._load_beside_memcpy(forward_context, loads)
        else:
            self._copy_seconds = 0.0
            super().start_load_kv(forward_context, **kwargs)
            self._stamps[request_id]["copy_seconds"] = self._copy_seconds
        self._stamp(request_id, "load_end")

    def _load_beside_memcpy(self, forward_context: Any, loads: list[Any]) -> None:
        num_bytes = sum(len(load.block_ids) for load in loads) * self._worker._copier.layout.bytes_per_block
        if self._floor is None:
            self._floor = MemcpyFloor(num_bytes)
        stamps = self._stamps[self._request_id]
        self._memcpy_first = not self._memcpy_first
        if self._memcpy_first:
            stamps["memcpy_seconds"] = self._floor.copy()
        started, self._copy_seconds = time.monotonic(), 0.0
        super().start_load_kv(forward_context)
        stamps.update(load_seconds=time.monotonic() - started, copy_seconds=self._copy_seconds, load_bytes=num_bytes)
        if not self._memcpy_first:
            stamps["memcpy_seconds"] = self._floor.copy()

    def wait_for_layer_load(self, layer_name: str) -> None:
        if self._request_id:
            self._stamp(self._request_id, "first_layer")
        super().wait_for_layer_load(layer_name)

    def wait_for_save(self) -> None:
        if self._request_id and not self._connector_metadata.plan.is_idle:
            self._stamp(self._request_id, "forward_end")
        super().wait_for_save()

    def build_connector_worker_meta(self) -> Any:
        meta = super().build_connector_worker_meta()
        if not self._stamps.get(self._request_id, {}).keys().isdisjoint(("forward_end", "load_settled")):
            self._flush(self._request_id)
            self._request_id = ""
        return meta


class GpuTimedConnector(TimedConnector):
    """The same for KV on a GPU, where requests wait for their loads; one request at a time."""

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        for request in scheduler_output.scheduled_new_reqs:
            self._stamp(request.req_id, "scheduled")
        return super().build_connector_meta(scheduler_output)

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        import torch

        LMCacheMPConnector.register_kv_caches(self, kv_caches)
        copier = self._worker._copier
        begin = copier.begin_scatter
        self._first, self._last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed_begin(*args: Any) -> Any:
            self._first.record(copier._loads.copies)
            transfer = begin(*args)
            self._last.record(copier._loads.kernels)
            return transfer

        copier.begin_scatter = timed_begin
        settle = self._worker._settle

        def timed_settle(load: Any) -> bool:
            is_good = settle(load)
            request_id = load.span.request_id
            self._stamp(request_id, "load_settled")
            self._stamps[request_id]["copy_seconds"] = self._first.elapsed_time(self._last) / 1e3
            self._request_id = request_id
            return bool(is_good)

        self._worker._settle = timed_settle

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        loads = self._connector_metadata.plan.loads
        for load in loads:
            self._stamp(load.request_id, "load_begin")
        LMCacheMPConnector.start_load_kv(self, forward_context, **kwargs)
        for load in loads:
            self._stamp(load.request_id, "load_end")

    def wait_for_save(self) -> None:
        if not self._connector_metadata.plan.is_idle:
            for load in self._worker._loading:
                self._stamp(load.span.request_id, "forward_launched")
        LMCacheMPConnector.wait_for_save(self)

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        released, received = super().get_finished(finished_req_ids)
        for request_id in received or ():
            self._stamp(request_id, "load_named")
        return released, received
