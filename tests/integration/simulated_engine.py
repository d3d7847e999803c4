"""An engine small enough to reason about, driving both halves of the plug-in as vLLM's scheduler does.

The KV of a full block is a digest of the KV of the block before it, as it lies in the memory of all ranks, and of the
block's own tokens: what is computed from garbage is garbage on every rank, and shows. Modelled on vLLM 0.32:
admission, chunked prefill, decoding, preemption, aborts, its own prefix cache, asynchronous scheduling (a
step is planned before the one before it was heard of), tensor parallel ranks that execute a step one after the other, loads
within a step or while the request waits, and the `recompute` policy for failed loads.
"""

import functools
import hashlib
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from types import SimpleNamespace

from lmcache.integration.vllm.steps import StepReport
from lmcache.layout import KVLayout

BLOCK_SIZE = 4
BLOCK_BYTES = 16
NUM_LAYERS = 2
CHUNK_SIZE = 2 * BLOCK_SIZE
STEP_TOKENS = 3 * BLOCK_SIZE
LAYOUT = KVLayout(num_layers=NUM_LAYERS, num_planes=1, block_bytes=BLOCK_BYTES, block_size=BLOCK_SIZE, dtype="u8")


def block_kv(layer, shard, previous, tokens):
    """`previous`: the block before, of each rank."""
    return hashlib.sha256(repr((layer, shard, previous, list(tokens))).encode()).digest()[:BLOCK_BYTES]


def expected_kv(tokens, shards=(0,), shard=0):
    """[num_layers][num_full_blocks] of what a flawless engine computes for these tokens.

    `shards`: which shard each rank has.
    """
    layers = []
    for layer in range(NUM_LAYERS):
        blocks, previous = [], [bytes(BLOCK_BYTES) for _ in shards]
        for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
            previous = [block_kv(layer, own, previous, tokens[start : start + BLOCK_SIZE]) for own in shards]
            blocks.append(previous[shards.index(shard)])
        layers.append(blocks)
    return layers


@dataclass
class SimRequest:
    """What the plug-in reads of vLLM's `Request`, and what this engine notes beside it."""

    request_id: str
    prompt_token_ids: list[int]
    max_tokens: int
    cache_salt: str = ""
    lora_request: None = None
    mm_features: tuple = ()
    prompt_embeds: None = None
    resumable: bool = False
    all_token_ids: list[int] = field(default_factory=list)
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    was_preempted: bool = False
    is_loading: bool = False
    is_received: bool = False
    has_failed: bool = False
    life: int = 0

    def __post_init__(self):
        self.all_token_ids = list(self.prompt_token_ids)

    @property
    def num_tokens(self):
        return len(self.all_token_ids)

    @property
    def num_prompt_tokens(self):
        return len(self.prompt_token_ids)


@dataclass
class Work:
    """One request's part in a step."""

    request: SimRequest
    start: int
    end: int
    tokens: list[int]
    block_ids: list[int]
    life: int


class SimEngine:
    """Runs requests to their end.

    Args:
        workers, planes: each rank's; its planes are the KV memory, one [num_blocks, BLOCK_BYTES] a layer.
        shards: which shard of the KV each rank has.
        lag: how many steps are planned ahead of the last one heard of: 0, or 1 as with vLLM's
            asynchronous scheduling.
        has_prefix_cache: whether requests share blocks inside the engine.
        max_part: how many tokens of one request a step computes at most.
        loads_last: begin loads that requests wait for after what the step computes, as vLLM 0.32 does and 0.25 does not.
    """

    def __init__(
        self,
        scheduler,
        workers,
        planes,
        shards=(0,),
        lag=0,
        has_prefix_cache=False,
        max_part=STEP_TOKENS,
        loads_last=False,
    ):
        self.scheduler = scheduler
        self.workers = workers
        self.planes = planes
        self.shards = shards
        self.lag = lag
        self.max_part = max_part
        self.has_prefix_cache = has_prefix_cache
        self.loads_last = loads_last
        self.free = deque(range(len(planes[0][0])))
        self.users = {block: 0 for block in self.free}
        self.cached = {}
        self.waiting = deque()
        self.running = []
        self.in_flight = deque()
        self.held = {}
        self.num_releases = Counter()
        self.ended_loading = {}
        self.num_receipts = Counter()
        self.preempted = set()
        self.num_loaded_tokens = 0
        self.num_failed_loads = 0

    def add(self, request):
        self.waiting.append(request)
        self.scheduler.announced(request)

    @property
    def has_work(self):
        return bool(self.waiting or self.running or self.in_flight or self.held or self.ended_loading)

    def step(self):
        work, output = self._schedule()
        if self.has_work and not work:
            time.sleep(1e-3)  # what goes on in the background takes its time
        output.preempted_req_ids, self.preempted = self.preempted, set()
        plan = self.scheduler.plan_loads()
        self.scheduler.plan_stores(plan, output)
        self.in_flight.append((work, self._execute(plan, work)))
        while len(self.in_flight) > self.lag or (self.in_flight and not work):
            self._update(*self.in_flight.popleft())

    # -- the scheduler's process ---------------------------------------------------------------

    def _schedule(self):
        budget, work, output = STEP_TOKENS, [], _empty_output()
        for request in list(self.running):
            count = min(budget, self.max_part, request.num_tokens - request.num_computed)
            if count == 0 or request not in self.running:
                continue
            new_blocks = self._grow(request, request.num_computed + count)
            if new_blocks is None:
                continue
            budget -= count
            cached = output.scheduled_cached_reqs
            cached.req_ids.append(request.request_id)
            cached.new_block_ids.append((new_blocks,) if new_blocks else None)
            cached.num_computed_tokens.append(request.num_computed)
            work.append(self._commit(request, count, output))
        for request in sorted(self.waiting, key=lambda request: not request.block_ids):  # those that keep blocks
            if not budget:
                break
            if request.is_loading and not self._promote(request):
                continue
            external, local = 0, []
            if not request.num_computed:
                local = self._local_hit(request)
                external = self.scheduler.match(request, len(local) * BLOCK_SIZE)
                if external is None:
                    break
            start = request.num_computed or len(local) * BLOCK_SIZE + external
            waits = external > 0
            count = 0 if waits else min(budget, self.max_part, request.num_tokens - start)
            if waits and not self._may_wait(request, local):
                break
            if not self._admit(request, local, start, start + count):
                break
            self.scheduler.allocated(request.request_id, request.block_ids, external)
            if not external:
                self.scheduler.free_pins(request.request_id)
            self.num_loaded_tokens += external
            if waits:
                request.is_loading, request.is_received, request.has_failed = True, False, False
                continue
            budget -= count
            self.waiting.remove(request)
            self.running.append(request)
            if request.was_preempted:
                cached = output.scheduled_cached_reqs
                cached.req_ids.append(request.request_id)
                cached.resumed_req_ids.add(request.request_id)
                cached.new_block_ids.append((list(request.block_ids),))
                cached.num_computed_tokens.append(start)
            else:
                output.scheduled_new_reqs.append(
                    SimpleNamespace(
                        req_id=request.request_id,
                        block_ids=(list(request.block_ids),),
                        num_computed_tokens=start,
                    )
                )
            work.append(self._commit(request, count, output))
        return work, output

    def _may_wait(self, request, local):
        """Whether a request may keep blocks while it waits: if all of it, and of all others that wait, will fit."""

        def missing(request, num_blocks):
            return -(-request.num_tokens // BLOCK_SIZE) - num_blocks

        reserved = sum(missing(other, len(other.block_ids)) for other in self.waiting if other.is_loading)
        return missing(request, len(local)) <= len(self.free) - reserved

    def _promote(self, request):
        """Take a request out of its wait, if its load is over."""
        if not request.is_received:
            return False
        request.is_loading = False
        if request.has_failed and not request.num_computed:
            self._release(request)
        return True

    def _commit(self, request, count, output):
        output.num_scheduled_tokens[request.request_id] = count
        start, request.num_computed = request.num_computed, request.num_computed + count
        if self.has_prefix_cache:
            for index in range(request.num_computed // BLOCK_SIZE):
                prefix = tuple(request.all_token_ids[: (index + 1) * BLOCK_SIZE])
                key = (request.cache_salt, prefix)
                self.cached.setdefault(key, request.block_ids[index])
        return Work(
            request,
            start,
            request.num_computed,
            list(request.all_token_ids),
            list(request.block_ids),
            request.life,
        )

    def _local_hit(self, request):
        blocks = []
        while (len(blocks) + 1) * BLOCK_SIZE < request.num_tokens:
            prefix = tuple(request.all_token_ids[: (len(blocks) + 1) * BLOCK_SIZE])
            block = self.cached.get((request.cache_salt, prefix))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def _admit(self, request, local, computed, end):
        if not request.num_computed:
            for block in local:
                self._use(block)
            request.block_ids = list(local)
        if self._allocate(request, end) is None:
            if not request.num_computed:
                self._release(request)
            return False
        request.num_computed = computed
        return True

    def _grow(self, request, end):
        """Allocate for a running request; preempt the others from the last on if need be."""
        while (new_blocks := self._allocate(request, end)) is None:
            victim = self.running[-1]
            self.preempt(victim)
            if victim is request:
                return None
        return new_blocks

    def preempt(self, request):
        self.running.remove(request)
        self.preempted.add(request.request_id)
        self._release(request)
        request.num_computed, request.was_preempted = 0, True
        request.life += 1  # what is in flight of it is stale
        self.waiting.appendleft(request)

    def _allocate(self, request, end):
        missing = -(-end // BLOCK_SIZE) - len(request.block_ids)
        if missing > len(self.free):
            return None
        new_blocks = []
        for _ in range(missing):
            block = self.free[0]
            self._use(block)
            self.cached = {key: b for key, b in self.cached.items() if b != block}
            new_blocks.append(block)
        request.block_ids += new_blocks
        return new_blocks

    def _use(self, block):
        if self.users[block] == 0:
            self.free.remove(block)
        self.users[block] += 1

    def _release(self, request):
        for block in reversed(request.block_ids):
            self.users[block] -= 1
            if self.users[block] == 0:
                self.free.append(block)
        request.block_ids = []

    def _update(self, work, result):
        failed, report, released, received = result
        self.num_releases.update(released)
        for request_id in [id_ for id_, count in self.num_releases.items() if count == len(self.workers)]:
            del self.num_releases[request_id]
            self._release(self.held.pop(request_id))
        if failed:
            self.num_failed_loads += 1
            self._cut_loads(failed)
        self._receive(received)
        for part in work:
            request = part.request
            is_stale = request not in self.running or part.life != request.life
            if is_stale or part.end < request.num_tokens:
                continue
            generated = request.num_tokens - request.num_prompt_tokens
            if generated < request.max_tokens:
                request.all_token_ids.append(1000 + generated)
            else:
                self._finish(request)
        if report is not None:
            self.scheduler.hear_report(report)

    def _cut_loads(self, failed):
        """What a waiting request has loaded ends before its first invalid block."""
        for request in (*self.waiting, *self.ended_loading.values()):
            at = [index for index, block in enumerate(request.block_ids) if block in failed]
            if request.is_loading and at and at[0] * BLOCK_SIZE < request.num_computed:
                request.num_computed, request.has_failed = at[0] * BLOCK_SIZE, True

    def _receive(self, received):
        self.num_receipts.update(received)
        for request_id in [id_ for id_, count in self.num_receipts.items() if count == len(self.workers)]:
            del self.num_receipts[request_id]
            if request_id in self.ended_loading:
                self._release(self.ended_loading.pop(request_id))
            else:
                (request,) = [r for r in self.waiting if r.request_id == request_id and r.is_loading]
                request.is_received = True

    def abort(self, request):
        """The client has gone."""
        (self.running if request in self.running else self.waiting).remove(request)
        self._end(request)

    def _finish(self, request):
        self.running.remove(request)
        self.on_finish(request)
        self._end(request)

    def _end(self, request):
        holds = self.scheduler.hold_blocks(request.request_id, request.block_ids)
        if request.is_loading and not request.is_received:
            assert not holds  # vLLM would hear of it twice
            self.ended_loading[request.request_id] = request
        elif holds:
            self.held[request.request_id] = request
        else:
            self._release(request)
        self.scheduler.finished(request.request_id)

    def on_finish(self, request):
        if self.has_prefix_cache and self.num_failed_loads:
            return  # vLLM itself lets others read a shared block before it is computed again
        for planes, shard in zip(self.planes, self.shards, strict=True):
            tokens = request.all_token_ids[: request.num_computed]
            for layer, blocks in enumerate(expected_kv(tokens, self.shards, shard)):
                for block, expected in zip(request.block_ids, blocks, strict=False):
                    assert bytes(planes[layer][block].tolist()) == expected

    # -- the workers' processes ----------------------------------------------------------------

    def _execute(self, plan, work):
        """Return all ranks' results as one, as vLLM's `KVOutputAggregator` does."""
        for worker in self.workers:
            worker.give_up(plan.preempted)
            worker.begin_step()
            if not self.loads_last:
                worker.load(plan)
        for part in work:
            for index in range(part.start // BLOCK_SIZE, part.end // BLOCK_SIZE):
                self._compute(part.block_ids, index, part.tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
        for worker in self.workers:
            if self.loads_last:
                worker.load(plan)
            worker.store(plan)
        released = Counter(id_ for worker in self.workers for id_ in worker.take_released())
        received = Counter(id_ for worker in self.workers for id_ in worker.take_received())
        failed = set().union(*(worker.take_failed_blocks() for worker in self.workers))
        reports = [report for worker in self.workers if (report := worker.take_report()) is not None]
        return failed, functools.reduce(StepReport.merge, reports) if reports else None, released, received

    def _compute(self, block_ids, index, tokens):
        for layer in range(NUM_LAYERS):
            planes = [planes[layer] for planes in self.planes]
            previous = [bytes(plane[block_ids[index - 1]].tolist()) if index else bytes(BLOCK_BYTES) for plane in planes]
            for plane, shard in zip(planes, self.shards, strict=True):
                plane[block_ids[index]] = plane.new_tensor(list(block_kv(layer, shard, previous, tokens)))


def _empty_output():
    return SimpleNamespace(
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()),
        num_scheduled_tokens={},
        preempted_req_ids=None,
    )
