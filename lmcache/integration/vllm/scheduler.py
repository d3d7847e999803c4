"""The scheduler's half of the plug-in: which prompt prefixes are cached, what to load and store.

Comes in: vLLM's requests and scheduling decisions. Goes out: the `StepPlan` of each step. Next on
the data path: `worker.py`.

Keys are computed here, and travel with the plan: the worker hashes nothing. The namespace comes the
other way, from the worker (`WorkerHello`), because only the worker sees the KV tensors whose layout
is part of it; vLLM's `kv_cache_config` says less to the scheduler than to the worker (specs are
merged) and nothing about strides or the attention backend. Until the worker has spoken, nothing is
looked up.

The scheduler does not wait for the server, but for LINGER_SECONDS a step. A lookup starts when vLLM
takes the request into its queue and is read when vLLM asks for the answer; frees are sent and
forgotten; introductions are made by the client's heartbeat. What is not there in time is a miss.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from lmcache.client.kvcache import KVCacheClient, PendingLookup, failure_reason
from lmcache.errors import LMCacheError
from lmcache.integration.vllm.steps import (
    ChunkSpan,
    StepPlan,
    StepReport,
    StoreSpan,
    WorkerHello,
)
from lmcache.integration.vllm.utils import Adapters, ConnectorConfig, is_cacheable, must_compute, request_namespace
from lmcache.keys import KEY_BYTES, ChunkHasher, Namespace
from lmcache.layout import KVLayout
from lmcache.log import RateLimitedLog, init_logger
from lmcache.protocol import MAX_CHUNKS, Placement

logger = init_logger(__name__)


UNKNOWN = sys.maxsize
# A lookup takes 0.2 to 0.5 ms, a step without it 3 ms and more: so much of each step may be spent on waiting for replies.
LINGER_SECONDS = 1e-3


@dataclass
class TrackedRequest:
    """What is known of one request that vLLM has asked about.

    `tokens` are vLLM's own and grow; `keys` covers their whole chunks, up to the last time somebody
    needed them. `lookup` is under way; its answer for the admission to come is `hit_chunks`, which lie
    at `places`, valid in the server life `hit_boot` and pinned beyond `lasts_until`. While it `may_hold_pins`, a lookup of it
    has pinned something, or may yet. Chunks before `stored_chunks` need not be offered for storing; the last plan that stores
    any has the number `last_store`. The KV of its tokens up to `computed` rests on no load of a plan after `rests_on`. It waits
    for its load: `is_loading` lasts until it is computed; one whose load `has_failed` loads no more. One that `is_outdated`
    neither loads nor stores any more.
    """

    request_id: str
    namespace: Namespace
    blocks_per_chunk: int
    hasher: ChunkHasher
    num_prompt_tokens: int
    tokens: Sequence[int]
    keys: bytes = b""
    lookup: PendingLookup | None = None
    hit_chunks: int = 0
    places: list[Placement] = field(default_factory=list)
    hit_boot: str = ""
    lasts_until: float = 0.0
    may_hold_pins: bool = False
    matched_from: int = 0
    block_ids: list[int] = field(default_factory=list)
    stored_chunks: int = 0
    last_store: int = 0
    computed: int = 0
    rests_on: int = 0
    is_loading: bool = False
    has_failed: bool = False
    is_outdated: bool = False

    @property
    def block_size(self) -> int:
        """Tokens of one engine block."""
        return self.namespace.chunk_size // self.blocks_per_chunk

    def extend_keys(self) -> None:
        """Hash the tokens that have come since the last time."""
        self.keys = self.hasher.extend_to(self.tokens)

    def key_span(self, start: int, end: int) -> bytes:
        """Return the keys of chunks [start, end)."""
        return self.keys[start * KEY_BYTES : end * KEY_BYTES]


class SchedulerHalf:
    """One per engine, in vLLM's EngineCore process; main thread only.

    What talks to the server may raise `LMCacheError`: the caller goes on without the cache.

    Args:
        client: this process's own.
        can_load, can_store: what vLLM's `kv_role` allows.
        saves_decode: also store chunks that hold generated tokens.
        passes_places: the plans go to the workers, so that these need not ask where the chunks of a load lie.
        media_are_hashed: identifiers of media stand for their contents; requests with others are not cached.
        lookup_timeout_seconds: how long a request waits in vLLM's queue for what is cached of it.
    """

    def __init__(
        self,
        client: KVCacheClient,
        *,
        can_load: bool = True,
        can_store: bool = True,
        saves_decode: bool = False,
        passes_places: bool = True,
        media_are_hashed: bool = True,
        lookup_timeout_seconds: float = ConnectorConfig.lookup_timeout_seconds,
    ) -> None:
        self._client = client
        self._can_load = can_load
        self._can_store = can_store
        self._saves_decode = saves_decode
        self._passes_places = passes_places
        self._media_are_hashed = media_are_hashed
        self._adapters = Adapters()
        self._lookup_timeout_seconds = lookup_timeout_seconds
        self._namespace: Namespace | None = None
        self._epoch = ""
        self._layout: KVLayout | None = None
        self._tracked: dict[str, TrackedRequest] = {}
        self._loads: list[ChunkSpan] = []
        self._linger_seconds = LINGER_SECONDS
        self._num_plans = 0
        self._num_ranks = 1
        # The requests that each plan loads for, until all ranks have loaded it; up to which plan each rank has; the last one.
        self._loading: dict[int, list[str]] = {}
        self._loaded_up_to: dict[int, int] = {}
        self._last_load_plan = 0
        # Ended requests whose stores still wait for the ranks to have loaded what they rest on.
        self._ended: dict[str, TrackedRequest] = {}
        # Where workers store later: the plan up to which each rank has, and the requests whose blocks vLLM keeps for that.
        self._stored_up_to: dict[int, int] | None = None
        self._held: set[str] = set()
        # Requests that ended while they were loaded, until a plan says so.
        self._given_up: set[str] = set()
        self._log = RateLimitedLog(logger)

    def hear(self, hellos: Sequence[WorkerHello]) -> None:
        """Start to work as the workers say; one that refuses, or is missing, keeps the cache off."""
        refusal = _reason_against(hellos)
        if refusal:
            logger.error("serving without the KV cache: %s", refusal)
            self._namespace = self._layout = None
            return
        self._namespace, self._layout = hellos[0].namespace, hellos[0].layout
        self._num_ranks = len(hellos)
        self._loaded_up_to = dict.fromkeys(range(len(hellos)), 0)
        self._stored_up_to = dict.fromkeys(range(len(hellos)), 0) if any(h.copies_later for h in hellos) else None
        self._client.mq.connect()

    @property
    def awaits_loads(self) -> bool:
        """Whether loads are under way that only further steps bring to their end, be it that nobody wants them any more."""
        return bool(self._loading)

    # -- before a step ----------------------------------------------------------------------------

    def announced(self, request: Any) -> None:
        """Start to find out what is cached of a request that vLLM takes into its queue.

        Raises: LMCacheError.
        """
        tracked = self._track(request)
        if tracked is not None and not must_compute(request):
            self._start_lookup(tracked)

    def match(self, request: Any, num_computed_tokens: int) -> int | None:
        """Return how many tokens after those computed can be loaded; at least one stays to compute.

        None: not known yet, ask again in the next step. vLLM also asks again when it has no room for
        the request, so the answer is kept.

        Raises: LMCacheError; the answer is then 0.
        """
        tracked = self._track(request)
        if tracked is None or must_compute(request):
            return 0
        chunk_size = tracked.namespace.chunk_size
        if tracked.is_loading:  # nothing is left of its load, or vLLM would not ask again
            tracked.has_failed = True
        if (
            not self._can_load
            or tracked.has_failed
            or tracked.is_outdated
            or self._usable_chunks(tracked) * chunk_size <= num_computed_tokens
        ):
            return 0
        hit_chunks = self._hit_chunks(tracked)
        if hit_chunks is None:
            return None
        tracked.matched_from = num_computed_tokens
        return max(0, hit_chunks * chunk_size - num_computed_tokens)

    def _track(self, request: Any) -> TrackedRequest | None:
        """Return the request's entry; None when it cannot be cached."""
        if self._namespace is None or self._layout is None or not is_cacheable(request):
            return None
        if request.mm_features and not self._media_are_hashed:
            return None
        chunk_size = self._client.present().chunk_size
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.namespace.chunk_size != chunk_size:
            revision = self._namespace.revision + self._epoch
            engine = msgspec.structs.replace(self._namespace, chunk_size=chunk_size, revision=revision)
            namespace = request_namespace(engine, request, self._adapters)
            tracked = TrackedRequest(
                request.request_id,
                namespace,
                self._layout.blocks_per_chunk(chunk_size),
                ChunkHasher(namespace),
                request.num_prompt_tokens,
                request.all_token_ids,
            )
            tracked.extend_keys()  # what cannot be hashed is not tracked
            self._tracked[request.request_id] = tracked
        return tracked

    def _usable_chunks(self, tracked: TrackedRequest) -> int:
        """Return how many chunks could be loaded: the engine must compute one token at least."""
        return (len(tracked.tokens) - 1) // tracked.namespace.chunk_size

    def _start_lookup(self, tracked: TrackedRequest) -> None:
        usable = self._usable_chunks(tracked)
        if usable <= 0 or not self._can_load:
            return
        tracked.extend_keys()
        tracked.lasts_until = time.monotonic() + self._client.present().pin_timeout_seconds / 2
        tracked.lookup = self._client.start_lookup(
            tracked.key_span(0, usable),
            tracked.request_id,
            tracked.namespace.world_size,
            self._lookup_timeout_seconds,
            places=self._passes_places,
        )

    def _hit_chunks(self, tracked: TrackedRequest) -> int | None:
        """Return the lookup's answer if it has come, after starting one where there is none for this life of the server."""
        is_outlasted = tracked.hit_chunks > 0 and time.monotonic() >= tracked.lasts_until
        if tracked.lookup is None and (is_outlasted or tracked.hit_boot != self._client.present().boot):
            self._start_lookup(tracked)
        if tracked.lookup is not None:
            if not self._has_come(tracked.lookup):
                return None
            lookup, tracked.lookup = tracked.lookup, None
            tracked.hit_chunks, tracked.places = 0, []  # should it have failed
            tracked.hit_boot = self._client.present().boot
            try:
                reply = lookup.result()
            except LMCacheError as exc:
                tracked.may_hold_pins = True
                self._client.tally.add(failed_lookups={failure_reason(exc): 1})
                raise
            tracked.hit_chunks, tracked.hit_boot = reply.l1_chunks, reply.boot
            if len(reply.placements) == reply.l1_chunks * tracked.namespace.world_size:
                tracked.places = reply.placements
            tracked.may_hold_pins |= reply.l1_chunks > 0
            if reply.l1_chunks and time.monotonic() >= tracked.lasts_until:  # read so late that it may be pinned no more
                self._start_lookup(tracked)
                return None
        return min(tracked.hit_chunks, self._usable_chunks(tracked))

    def _has_come(self, lookup: PendingLookup) -> bool:
        """Look for replies as long as this step's time for that lasts; afterwards asking again costs nothing."""
        if self._linger_seconds > 0 and not lookup.is_settled:
            started_at = time.monotonic()
            lookup.wait(self._linger_seconds)
            self._linger_seconds -= time.monotonic() - started_at
        return lookup.is_settled

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """Take note that vLLM admits a request and expects `num_external_tokens` to be loaded."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        if tracked.lookup is not None:
            self._end_lookup(tracked, tracked.lookup)
        tracked.block_ids = list(block_ids)
        if tracked.is_loading:  # its load is over, and it is computed now
            tracked.is_loading = False
            return
        tracked.last_store = 0  # of blocks that it had before it was preempted
        tracked.stored_chunks = tracked.hit_chunks
        if num_external_tokens > 0:
            self._loads.append(self._span_to_load(tracked, num_external_tokens))
            tracked.is_loading = True
        tracked.hit_chunks, tracked.places, tracked.hit_boot = 0, [], ""  # another admission looks again

    def _end_lookup(self, tracked: TrackedRequest, lookup: PendingLookup) -> None:
        """vLLM goes on without the answer. If it is there all the same, what the server has need not be offered to it again."""
        tracked.lookup = None
        tracked.may_hold_pins = True
        if not lookup.wait(0.0):
            lookup.abandon()
            return
        with contextlib.suppress(LMCacheError):
            tracked.hit_chunks = lookup.result().l1_chunks

    def _span_to_load(self, tracked: TrackedRequest, num_tokens: int) -> ChunkSpan:
        chunk_size, block_size = tracked.namespace.chunk_size, tracked.block_size
        start, end = tracked.matched_from, tracked.matched_from + num_tokens
        first_chunk, end_chunk = start // chunk_size, -(-end // chunk_size)
        num_shards = tracked.namespace.world_size
        lasts = time.monotonic() < tracked.lasts_until  # longer than a load takes; else the worker pins it anew
        return ChunkSpan(
            tracked.request_id,
            tracked.key_span(first_chunk, end_chunk),
            tracked.block_ids[start // block_size : -(-end // block_size)],
            tracked.blocks_per_chunk,
            skip_blocks=(start - first_chunk * chunk_size) // block_size,
            places=tracked.places[first_chunk * num_shards : end_chunk * num_shards] if lasts else [],
            boot=tracked.hit_boot,
        )

    def begin_step(self) -> None:
        """A step is over, or about to begin: there is time to linger again."""
        self._linger_seconds = LINGER_SECONDS

    def plan_loads(self) -> StepPlan:
        """Return the plan of a step, with the loads of the requests that it admits."""
        self.begin_step()
        loads, self._loads = self._loads, []
        self._num_plans += 1
        if loads:
            self._last_load_plan = self._num_plans
            self._loading[self._num_plans] = [load.request_id for load in loads]
        held, self._held = frozenset(self._held), set()
        given_up, self._given_up = frozenset(self._given_up), set()
        return StepPlan(loads, held=held, given_up=given_up, number=self._num_plans)

    def plan_stores(self, plan: StepPlan, scheduler_output: Any) -> None:
        """Add the chunks that the step will complete."""
        plan.preempted = frozenset(scheduler_output.preempted_req_ids or ())
        scheduled = scheduler_output.num_scheduled_tokens
        plan.is_idle = not scheduled
        going_on: list[TrackedRequest] = []
        for request_id, block_ids, is_all, computed in _scheduled_requests(scheduler_output):
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            if is_all:
                tracked.block_ids.clear()
                # Admitted now: what it has not computed itself, this plan or one before has loaded, for it or for another.
                tracked.rests_on = self._last_load_plan if computed else 0
                # Of a load that has failed vLLM keeps what came before the failure.
                tracked.stored_chunks = min(tracked.stored_chunks, computed // tracked.namespace.chunk_size)
            tracked.block_ids += block_ids
            tracked.computed = computed + scheduled[request_id]
            going_on.append(tracked)
        for tracked in going_on:  # last: whatever fails here, no request's blocks have been passed over
            self._plan_store(plan, tracked)
        self._plan_stores_of_ended(plan)

    def _plan_store(self, plan: StepPlan, tracked: TrackedRequest) -> None:
        store = self._span_to_store(tracked) if self._is_proven(tracked) else None
        if store is not None:
            tracked.stored_chunks += store.num_chunks
            tracked.last_store = plan.number
            plan.stores.append(store)

    def _is_proven(self, tracked: TrackedRequest) -> bool:
        """Tell whether the scheduler has heard, from each rank, of all loads that the request's KV rests on.

        Ranks compute together: where a load that was named early turns out bad on one, what all of them compute is worthless,
        and only that one knows. The only rank of an engine sees to it itself, and need not wait.
        """
        return self._num_ranks == 1 or tracked.rests_on <= self._all_loaded_up_to()

    def _all_loaded_up_to(self) -> int:
        return min(self._loaded_up_to.values())

    def _plan_stores_of_ended(self, plan: StepPlan) -> None:
        """Add what ended requests had to wait with; the workers let go of their blocks when that is stored."""
        for request_id in [id_ for id_, ended in self._ended.items() if self._is_proven(ended)]:
            self._plan_store(plan, self._ended.pop(request_id))
            plan.held |= {request_id}

    def _span_to_store(self, tracked: TrackedRequest) -> StoreSpan | None:
        """Return the chunks not yet offered that are complete once the request has computed what it is to compute now.

        Those that hold generated tokens are left out unless they were asked for: they are hardly ever
        needed again, and would push out those that are.
        """
        first = tracked.stored_chunks
        # Beyond the tokens known so far are those that a step in flight is about to choose, or drafts.
        num_tokens = len(tracked.tokens) if self._saves_decode else tracked.num_prompt_tokens
        last = min(tracked.computed, num_tokens) // tracked.namespace.chunk_size
        num_blocks = last * tracked.blocks_per_chunk
        blocks = tracked.block_ids[:num_blocks]
        if not self._can_store or tracked.is_outdated or last <= first or len(blocks) < num_blocks:
            return None
        if last * KEY_BYTES > len(tracked.keys):
            tracked.extend_keys()
        return StoreSpan(
            tracked.request_id,
            tracked.key_span(first, last),
            blocks[first * tracked.blocks_per_chunk :],
            tracked.blocks_per_chunk,
            namespace_id=self._registered_id(tracked),
            parent=tracked.key_span(first - 1, first) if first else b"",
            num_prompt_chunks=max(0, tracked.num_prompt_tokens // tracked.namespace.chunk_size - first),
        )

    def _registered_id(self, tracked: TrackedRequest) -> int:
        """Return the id of the engine's namespace as the server knows it, whatever the epoch."""
        assert self._namespace is not None
        return msgspec.structs.replace(tracked.namespace, revision=self._namespace.revision).id

    # -- after a step -----------------------------------------------------------------------------

    def hear_report(self, report: StepReport) -> None:
        """Let go of what has been loaded."""
        if self._stored_up_to is not None:
            self._stored_up_to.update(report.stored_up_to)
        self._loaded_up_to.update(report.loaded_up_to)
        over = [number for number in self._loading if number <= self._all_loaded_up_to()]
        for request_id in [request_id for number in over for request_id in self._loading.pop(number)]:
            try:
                self._free_loaded(request_id)
            except LMCacheError as exc:  # the server has gone, and its pins with it, or they go when their time is up
                self.note_failure(exc)

    def _free_loaded(self, request_id: str) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is None:  # it has ended meanwhile
            self._client.post_end_session(request_id)
        elif tracked.lookup is None and not tracked.hit_boot:  # else it was preempted, and looks for its next load
            self.free_pins(request_id)

    def hold_blocks(self, request_id: str, block_ids: Sequence[int]) -> bool:
        """Tell whether vLLM must keep the blocks of a request that ends; the workers then report when they have read them."""
        tracked = self._tracked.get(request_id)
        if tracked is None or tracked.is_loading:  # vLLM itself keeps the blocks until the load is over
            return False
        if not self._is_proven(tracked) and block_ids:
            tracked.block_ids = list(block_ids)
            self._ended[request_id] = tracked
            return True
        if self._stored_up_to is None or tracked.last_store <= min(self._stored_up_to.values()):
            return False
        self._held.add(request_id)
        return True

    def finished(self, request_id: str) -> None:
        """Forget a request.

        Raises: LMCacheError after it was forgotten; its pins then last until their time is up.
        """
        tracked = self._tracked.pop(request_id, None)
        if tracked is not None:
            if tracked.lookup is not None:
                tracked.lookup.abandon()
                tracked.may_hold_pins = True
            if self._is_being_loaded(request_id):  # the device may still read what is pinned
                self._given_up.add(request_id)
            elif tracked.may_hold_pins:
                self._client.post_end_session(request_id)

    def free_pins(self, request_id: str, end_tokens: int = UNKNOWN) -> None:
        """Let go of what the request's lookup pinned, up to a token; not while it is being loaded.

        Raises: LMCacheError; it is tried again when the request is finished.
        """
        tracked = self._tracked.get(request_id)
        if tracked is not None and tracked.may_hold_pins and not self._is_being_loaded(request_id):
            end = min(end_tokens // tracked.namespace.chunk_size, MAX_CHUNKS)
            self._client.post_free_lookup_locks(request_id, end)
            tracked.may_hold_pins = end < MAX_CHUNKS

    def start_anew(self) -> None:
        """Load nothing any more that was stored so far: from now on KV means something else, as when weights were replaced.

        Requests that are known by now may have KV of both kinds.
        """
        self._epoch = f"!{secrets.token_hex(8)}"
        for tracked in (*self._tracked.values(), *self._ended.values()):
            tracked.is_outdated = True

    def _is_being_loaded(self, request_id: str) -> bool:
        """Tell whether a rank may not have loaded all that was planned for a request. vLLM may let it go on already."""
        return any(request_id in loading for loading in self._loading.values())

    def note_failure(self, exc: Exception) -> None:
        """Log that the cache was of no use for once, at most once per interval and kind."""
        hint = f" ({exc.hint})" if isinstance(exc, LMCacheError) and exc.hint else ""
        self._log.warning(type(exc).__name__, f"serving without the KV cache: {exc}{hint}")

    def close(self) -> None:
        """Leave the server."""
        self._client.close()


def _reason_against(hellos: Sequence[WorkerHello]) -> str:
    """Return why these workers cannot share a cache; "" when they can."""
    if not hellos:
        return "no worker of this plug-in has answered"
    for hello in hellos:
        if hello.refusal or hello.namespace is None:
            return hello.refusal
    namespaces = {hello.namespace for hello in hellos}
    if len(namespaces) != 1:
        return f"{len(hellos)} workers described {len(namespaces)} different KV caches"
    ranks, num_ranks = sorted(hello.rank for hello in hellos), hellos[0].num_ranks
    if ranks != list(range(num_ranks)):
        return f"of the engine's {num_ranks} ranks, {', '.join(map(str, ranks))} answered"
    return ""


def only_group(block_ids: Sequence[Sequence[int]]) -> list[int]:
    """Return the blocks of the one KV group of an engine that is cached; of others there may be none, or several."""
    return list(block_ids[0]) if block_ids else []


def _scheduled_requests(output: Any) -> Iterable[tuple[str, list[int], bool, int]]:
    """Yield (request id, block ids, whether these are all its blocks, tokens computed before)."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, only_group(new.block_ids), True, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    for request_id, new_blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
        blocks = only_group(new_blocks or ())
        yield request_id, blocks, request_id in cached.resumed_req_ids, computed
