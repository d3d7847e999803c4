"""Both halves of the plug-in under a simulated engine and a real server: no wrong byte, ever."""

import contextlib
import functools
import logging
import mmap
import os
import pickle
import random
import threading
import time
from types import SimpleNamespace

import msgspec
import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lmcache.client.kvcache import KVCacheClient  # noqa: E402
from lmcache.errors import DeadlineError, SpoiledLoadError, StaleReadError, UnreachableError, UsageError  # noqa: E402
from lmcache.integration.vllm import background  # noqa: E402
from lmcache.integration.vllm.scheduler import SchedulerHalf  # noqa: E402
from lmcache.integration.vllm.steps import (  # noqa: E402
    ChunkSpan,
    StepPlan,
    StepReport,
    StoreSpan,
    WorkerHello,
)
from lmcache.integration.vllm.utils import ConnectorConfig  # noqa: E402
from lmcache.integration.vllm.worker import DEFAULT_CONFIG, IDLE_LEAD_BYTES, LEAD_BYTES, WorkerHalf  # noqa: E402
from lmcache.keys import KEY_BYTES, Namespace, chunk_keys, split_keys  # noqa: E402
from lmcache.pool import KEPT_SECONDS, PoolView  # noqa: E402
from lmcache.protocol import Clear, EndSession, Evict  # noqa: E402
from lmcache.transfer.base import StuckTransferError  # noqa: E402
from lmcache.transfer.cpu import CpuCopier  # noqa: E402
from tests.chaos.waiting import wait_until  # noqa: E402
from tests.fakes import PATIENCE_SECONDS  # noqa: E402
from tests.integration.later_copier import LaterCopier, LaterTransfer  # noqa: E402
from tests.integration.simulated_engine import (  # noqa: E402
    BLOCK_BYTES,
    BLOCK_SIZE,
    CHUNK_SIZE,
    LAYOUT,
    NUM_LAYERS,
    STEP_TOKENS,
    SimEngine,
    SimRequest,
    expected_kv,
)
from tests.server_process import LmcacheServer  # noqa: E402

# The last one is none: what is pinned stays.
FAULTS = ["lost", "fewer", "stale", "taken before the copy", "taken after the copy", "others taken after the copy"]
CHUNK_BYTES = LAYOUT.chunk_bytes(CHUNK_SIZE)


class FaultyClient(KVCacheClient):
    """A worker's client whose loads fail in every way there is, at a given rate.

    Places that it was told are of no use where the server is `lost`, or has `fewer` of the chunks; it is asked then, and
    fails to answer.
    """

    def __init__(self, url, generator, fault_rate):
        super().__init__(url, kind="engine-worker")
        self._generator = generator
        self.fault_rate = fault_rate
        self.num_borrowed = 0
        self.num_taken = 0

    def borrow(self, placements, boot):
        fault = self._choose()
        if fault in ("lost", "fewer"):
            return None
        if fault == "taken before the copy":
            self._take_everything()
        borrowed = super().borrow(placements, boot)
        self.num_borrowed += borrowed is not None
        return self._spoil(borrowed, fault) if borrowed is not None else None

    def pin(self, keys, request_id="", rank=0):
        fault = self._choose()
        if fault == "lost":
            raise UnreachableError("the test lost the server")
        if fault == "fewer":
            keys = b"".join(split_keys(keys)[: len(keys) // 32 // 2])
        pinned = super().pin(keys, request_id, rank)
        if fault == "taken before the copy":
            self._take_everything()
        return self._spoil(pinned, fault)

    def _choose(self):
        fault = self._generator.choice(FAULTS)
        return fault if self._generator.random() < self.fault_rate else ""

    def _spoil(self, pinned, fault):
        verify = pinned.verify

        def stale(**_):
            raise StaleReadError("the test says so")

        def take_and_verify(**how):
            if fault == "taken after the copy":
                self._take_everything()
            else:
                take_everything(self.mq.url, [], waits=False)
            verify(**how)

        if fault == "stale":
            pinned.verify = stale
        elif fault.endswith("taken after the copy"):
            pinned.verify = take_and_verify
        return pinned

    def _take_everything(self):
        """End all sessions whatever they hold, evict all chunks, and have others written where they lay."""
        take_everything(self.mq.url, [f"r{number}" for number in range(20)])
        self.num_taken += 1


def take_everything(url, request_ids, waits=True):
    """Unpin what these requests hold, evict all chunks when these have rested, and write others where they lay."""
    with KVCacheClient(url) as thief:
        for request_id in request_ids:
            thief.mq.call(EndSession(request_id=request_id))
        deadline = time.monotonic() + 10 * KEPT_SECONDS
        while waits and thief.mq.call(Clear()).kept_objects and time.monotonic() < deadline:
            time.sleep(KEPT_SECONDS / 10)
        thief.mq.call(Clear())
        thief.store(os.urandom(64 * 32), [b"\xbb" * CHUNK_BYTES] * 64)


class OneFault(random.Random):
    """Chooses the same fault each time."""

    def __init__(self, fault):
        super().__init__(0)
        self._fault = fault

    def choice(self, seq):
        return self._fault


class PinsAreKept(random.Random):
    """Leaves out the faults that take chunks away although they are pinned."""

    def choice(self, seq):
        return super().choice([fault for fault in seq if fault not in ("stale", "taken after the copy")])


@pytest.fixture(scope="module")
def server():
    with LmcacheServer(["--chunk-size", str(CHUNK_SIZE)]) as server:
        yield server


def turns(seconds=120.0):
    """Steps for as long as something may take to come true; a step that hears nothing from a busy server is over at once."""
    deadline = time.monotonic() + seconds
    while True:
        yield
        assert time.monotonic() < deadline, f"not within {seconds:g} s"


# A copier whose loads seem to be nearly over as soon as they have begun.
EARLY = functools.partial(LaterCopier, load_bytes=0)
# Which shard of the KV each rank has.
ONE_RANK = (0,)
TWO_SHARDS = (0, 1)
MLA = (0, 0)


class Setup:
    """An engine with both halves attached to an emptied server. `worker`, `planes` and so on are the first rank's."""

    def __init__(
        self,
        server,
        num_blocks=48,
        faults=None,
        saves_decode=False,
        make_copier=CpuCopier,
        shards=ONE_RANK,
        config=DEFAULT_CONFIG,
        **engine,
    ):
        with KVCacheClient(server.zmq_url) as client:
            client.mq.call(Clear())
        self.shards = shards
        self.namespace = Namespace(
            model="simulated", layout=LAYOUT.fingerprint, chunk_size=0, world_size=len(set(shards)), revision=str(shards)
        )
        self.scheduler_client = KVCacheClient(server.zmq_url, kind="engine-scheduler")
        self.scheduler = SchedulerHalf(
            self.scheduler_client, saves_decode=saves_decode, lookup_timeout_seconds=PATIENCE_SECONDS
        )
        self.all_planes, self.clients, self.workers = [], [], []
        for rank in range(len(shards)):
            planes = [torch.full((num_blocks, BLOCK_BYTES), 0xEE, dtype=torch.uint8) for _ in range(NUM_LAYERS)]
            client = FaultyClient(server.zmq_url, *faults) if faults else KVCacheClient(server.zmq_url, kind="engine-worker")
            worker = WorkerHalf(client, config)
            worker.start(make_copier(LAYOUT, planes), self.namespace, rank, len(shards))
            self.all_planes.append(planes)
            self.clients.append(client)
            self.workers.append(worker)
        self.planes, self.worker_client, self.worker = self.all_planes[0], self.clients[0], self.workers[0]
        self.copier = self.worker._copier
        self.scheduler.hear([worker.hello for worker in self.workers])
        self.engine = SimEngine(self.scheduler, self.workers, self.all_planes, shards, **engine)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers:
            worker.close()
        self.scheduler.close()

    def run(self, *requests):
        for request in requests:
            self.engine.add(request)
        for _ in turns():
            if not self.engine.has_work:
                return
            self.engine.step()

    def plan_to_load(self, request_id, tokens, block_ids):
        """Return a plan to load these tokens' whole chunks, as the scheduler makes it: looked up, pinned, the places known."""
        request = SimRequest(request_id, [*tokens, 0], max_tokens=0)
        self.scheduler.announced(request)
        for _ in turns():
            num_tokens = self.scheduler.match(request, 0)
            if num_tokens is not None:
                break
            self.scheduler.begin_step()
        self.scheduler.allocated(request_id, block_ids, num_tokens)
        plan = self.scheduler.plan_loads()
        (span,) = plan.loads
        assert len(span.places) == span.num_chunks * len(set(self.shards)) == len(tokens) // CHUNK_SIZE * len(set(self.shards))
        return plan

    def loaded(self, block_ids, rank=0):
        """Return what lies in a rank's blocks, layer by layer."""
        return [[bytes(plane[block].tolist()) for block in block_ids] for plane in self.all_planes[rank]]

    def wait_for_stores(self):
        """Return when nothing is left to store."""
        deadline = time.monotonic() + 60
        while any(worker._background is not None and worker._background._jobs for worker in self.workers):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def chunk_namespace(self, cache_salt=""):
        return msgspec.structs.replace(self.namespace, chunk_size=CHUNK_SIZE, cache_salt=cache_salt)

    def stored_chunks(self, tokens, cache_salt="", shard=0):
        """Return the content of the leading chunks of these tokens that the server has."""
        keys = chunk_keys(self.chunk_namespace(cache_salt), tokens)
        with KVCacheClient(self.scheduler_client.mq.url) as client, client.pin(keys, rank=shard) as pinned:
            return [bytes(extent) for extent in pinned.extents]

    def check_stored(self, tokens, cache_salt=""):
        """Check the chunks of these tokens that the server has; return how many there are of all shards."""
        counts = []
        for shard in set(self.shards):
            stored = self.stored_chunks(tokens, cache_salt, shard)
            assert stored == expected_chunks(tokens, self.shards, shard)[: len(stored)]
            counts.append(len(stored))
        return min(counts)


def expected_chunks(tokens, shards=ONE_RANK, shard=0):
    layers, size = expected_kv(tokens, shards, shard), CHUNK_SIZE // BLOCK_SIZE
    return [
        b"".join(b"".join(blocks[at : at + size]) for blocks in layers)
        for at in range(0, len(tokens) // CHUNK_SIZE * size, size)
    ]


def make_requests(generator, count):
    """Requests that share prefixes of many lengths, some of them another tenant's."""
    stems = [[generator.randrange(3) for _ in range(60)] for _ in range(2)]
    requests = []
    for number in range(count):
        stem = generator.choice(stems)[: generator.randrange(1, 60)]
        tail = [generator.randrange(100) for _ in range(generator.randrange(1, 20))]
        requests.append(
            SimRequest(
                f"r{number}",
                stem + tail,
                max_tokens=generator.randrange(0, 12),
                cache_salt=generator.choice(["", "", "tenant"]),
            )
        )
    return requests


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    num_blocks=st.sampled_from([24, 30, 48]),
    lag=st.sampled_from([0, 1]),
    has_prefix_cache=st.booleans(),
    max_part=st.sampled_from([STEP_TOKENS, 6]),
    fault_rate=st.sampled_from([0.0, 0.0, 0.2, 0.6]),
    later=st.sampled_from([None, None, 0.0, 2e-3]),
    is_named_early=st.booleans(),
    loads_last=st.booleans(),
    shards=st.sampled_from([ONE_RANK, TWO_SHARDS, MLA]),
)
def test_whatever_fails_no_wrong_byte_is_used_or_stored(
    server, seed, num_blocks, lag, has_prefix_cache, max_part, fault_rate, later, is_named_early, loads_last, shards
):
    generator = random.Random(seed)
    faults = ((PinsAreKept if is_named_early else random.Random)(seed + 1), fault_rate)
    copier = CpuCopier if later is None else functools.partial(EARLY if is_named_early else LaterCopier, pause_seconds=later)
    settings = {"lag": lag, "has_prefix_cache": has_prefix_cache, "max_part": max_part, "loads_last": loads_last}
    with Setup(server, num_blocks, faults, make_copier=copier, shards=shards, **settings) as setup:
        requests = make_requests(generator, 12)
        waiting, aborted = list(requests), []
        for _ in turns():
            if waiting and generator.random() < 0.4:
                setup.engine.add(waiting.pop())
            if setup.engine.running and generator.random() < 0.1:
                setup.engine.preempt(generator.choice(setup.engine.running))
            admitted = setup.engine.running + [request for request in setup.engine.waiting if request.is_loading]
            if admitted and generator.random() < 0.05:
                aborted.append(generator.choice(admitted))
                setup.engine.abort(aborted[-1])
            setup.engine.step()
            if not waiting and not setup.engine.has_work:
                break
        assert not setup.engine.has_work
        setup.wait_for_stores()
        for request in requests:
            num_stored = setup.check_stored(request.prompt_token_ids, request.cache_salt)
            if not fault_rate and later is None and not aborted:  # a preempted request's stores are given up
                assert num_stored == len(request.prompt_token_ids) // CHUNK_SIZE
        wait_until(lambda: not server.status()["sessions"], "all sessions are over")
        status = server.status()
        assert (status["l1"]["pins"], status["l1"]["reserved_bytes"]) == (0, 0)


def prompt_of(seed, num_tokens):
    return random.Random(seed).choices(range(100), k=num_tokens)


def test_chunks_stored_by_one_engine_are_loaded_by_the_next(server):
    prompt = prompt_of(1, 50)
    with Setup(server) as first:
        first.run(SimRequest("a", prompt, max_tokens=3))
        assert first.stored_chunks(prompt) == expected_chunks(prompt)
        # Another block order in an engine of another size, which checks its KV at the end.
        second = SimEngine(first.scheduler, first.workers, first.all_planes)
        second.free.rotate(7)
        second.add(SimRequest("b", prompt, max_tokens=3))
        while second.has_work:
            second.step()
        assert second.num_loaded_tokens == 48


def test_blocks_that_the_engine_has_are_not_loaded_again(server):
    prompt = prompt_of(2, 50)
    with Setup(server, has_prefix_cache=True) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        # The engine loses all but an odd number of blocks, so the first chunk is loaded in part.
        kept = 3 * BLOCK_SIZE
        cached = setup.engine.cached
        setup.engine.cached = {key: b for key, b in cached.items() if len(key[1]) <= kept}
        setup.run(SimRequest("b", prompt, max_tokens=0))
        assert setup.engine.num_loaded_tokens == 48 - kept


def test_a_chunk_that_is_gone_costs_exactly_its_own_blocks_and_those_after(server):
    prompt = prompt_of(3, 50)
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        span = ChunkSpan("b", chunk_keys(setup.chunk_namespace(), prompt), list(range(20, 32)), 2)
        keys = split_keys(span.keys)
        with KVCacheClient(server.zmq_url) as client:
            client.mq.call(Evict(), [keys[4]])
        setup.worker.load(StepPlan([span], number=7))
        assert setup.worker.take_failed_blocks() == set(range(28, 32))
        assert setup.worker.take_failed_blocks() == set()
        assert setup.worker.take_report() == StepReport({0: 7})
        expected = expected_kv(prompt)
        for layer, plane in enumerate(setup.planes):
            loaded = [bytes(plane[block].tolist()) for block in range(20, 28)]
            assert loaded == expected[layer][:8]


def flip_a_bit(server, chunk):
    """Change one bit of a chunk in the pool, of which nobody is told."""
    with open(server.pool_path, "r+b") as file, mmap.mmap(file.fileno(), 0) as pool:
        pool[pool.find(chunk) + len(chunk) // 2] ^= 1


@pytest.mark.parametrize("make_copier", [CpuCopier, LaterCopier])
@pytest.mark.parametrize("knows_places", [True, False])
def test_where_content_is_verified_a_chunk_with_a_flipped_bit_is_not_loaded(
    server, monkeypatch, caplog, make_copier, knows_places
):
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    prompt, config = prompt_of(5, 41), ConnectorConfig(verifies_content=True)

    def num_counted():
        return server.status()["counters"]["retrieve_failed"]["checksum"]

    counted_before = num_counted()
    with Setup(server, make_copier=make_copier, config=config, has_prefix_cache=False) as setup:
        setup.run(SimRequest("first", prompt, max_tokens=1))
        setup.wait_for_stores()
        setup.run(SimRequest("second", prompt, max_tokens=1))
        assert (setup.engine.num_loaded_tokens, setup.engine.num_failed_loads) == (40, 0)
        flip_a_bit(server, setup.stored_chunks(prompt)[2])
        if not knows_places:
            monkeypatch.setattr(setup.worker_client, "borrow", lambda placements, boot: None)
        setup.run(SimRequest("third", prompt, max_tokens=1))  # compares what it computes from with what it should be
        assert setup.engine.num_failed_loads == 1
        wait_until(lambda: num_counted() == counted_before + 10, "the blocks are counted")
    assert "a load of 5 chunks for request third failed after 0." in caplog.text
    assert "differs from what was stored; hint: " in caplog.text


@pytest.mark.parametrize("fault", FAULTS[:-1])
def test_every_kind_of_failed_load_is_reported_and_its_request_need_not_wait(server, fault):
    prompt = prompt_of(4, 40)
    with Setup(server, faults=(OneFault(fault), 1.0)) as setup:
        keys = chunk_keys(setup.chunk_namespace(), prompt)
        load = ChunkSpan("r", keys, list(range(10)), 2)
        setup.worker.load(StepPlan([load]))
        assert setup.worker.take_received() == {"r"}
        assert setup.worker.take_failed_blocks() == set(range(10))
        assert setup.worker.take_received() == set()


@pytest.mark.parametrize("shards", [ONE_RANK, MLA])
def test_blocks_of_an_ended_request_are_kept_until_its_stores_have_read_them(server, shards):
    prompt = prompt_of(20, 40)
    with Setup(server, make_copier=functools.partial(LaterCopier, pause_seconds=0.02), shards=shards) as setup:
        setup.engine.add(SimRequest("a", prompt, max_tokens=0))
        was_held = False
        for _ in range(2000):
            setup.engine.step()
            was_held = was_held or "a" in setup.engine.held
            if not setup.engine.has_work:
                break
        assert was_held
        assert not setup.engine.held
        assert all(count == 0 for count in setup.engine.users.values())
        assert setup.check_stored(prompt) == 5


def test_a_preempted_request_gives_up_its_stores_and_stores_them_later(server):
    prompt = prompt_of(21, 40)
    with Setup(server, make_copier=functools.partial(LaterCopier, pause_seconds=0.05)) as setup:
        setup.engine.add(SimRequest("a", prompt, max_tokens=2))
        for _ in range(200):
            setup.engine.step()
            if setup.engine.running and setup.engine.running[0].num_computed >= 24:
                break
        setup.engine.preempt(setup.engine.running[0])
        setup.run()
        setup.wait_for_stores()
        stored = setup.stored_chunks(prompt)
        assert stored == expected_chunks(prompt)[: len(stored)]
        assert len(stored) == 5


def test_a_store_that_does_not_end_gives_its_places_never_back_and_is_the_last(server):
    """The device may still write to them: to hand them to somebody else would be the worst of all."""

    class StuckCopier(LaterCopier):
        def gather(self, *args):
            raise StuckTransferError("it does not end")

    prompt = prompt_of(22, 40)
    with Setup(server, make_copier=StuckCopier) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0), SimRequest("b", prompt_of(23, 40), max_tokens=0))
        setup.wait_for_stores()
        l1 = server.status()["l1"]
        assert l1["reserved_bytes"] > 0
        assert setup.stored_chunks(prompt) == []
        with KVCacheClient(server.zmq_url) as client:
            client.mq.call(Clear())
        setup.copier.gather = functools.partial(CpuCopier.gather, setup.copier)
        setup.run(SimRequest("c", prompt_of(24, 40), max_tokens=0))
        setup.wait_for_stores()
        assert setup.stored_chunks(prompt_of(24, 40)) == []
        attachment = setup.worker_client.attach()
    assert server.status()["l1"]["reserved_bytes"] == l1["reserved_bytes"]  # also when the engine has left
    attachment.release()  # as the end of the process would
    wait_until(lambda: not server.status()["l1"]["reserved_bytes"], "the places are free")


def test_stores_that_do_not_keep_up_are_dropped_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(background, "MAX_PENDING_CHUNKS", 2)
    with Setup(server, make_copier=functools.partial(LaterCopier, pause_seconds=0.2)) as setup:
        setup.run(*(SimRequest(f"r{number}", prompt_of(30 + number, 30), max_tokens=0) for number in range(4)))
        setup.wait_for_stores()
        stored = [setup.stored_chunks(prompt_of(30 + number, 30)) for number in range(4)]
        assert 0 < sum(map(len, stored)) < 12


def test_a_load_whose_places_are_known_asks_the_server_for_nothing_and_is_counted(server, monkeypatch):
    prompt, blocks = prompt_of(13, 48), list(range(20, 32))
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        plan = setup.plan_to_load("r1", prompt, blocks)
        before = server.status()["counters"]
        monkeypatch.setattr(setup.worker_client, "pin", None)
        setup.worker.load(plan)
        assert setup.worker.take_failed_blocks() == set()
        assert setup.loaded(blocks) == expected_kv(prompt)
        report = setup.worker.take_report()
        assert report == StepReport({0: plan.number})
        assert server.status()["l1"]["pins"] == 6
        setup.scheduler.hear_report(report)
        wait_until(lambda: not server.status()["l1"]["pins"], "the lookup's pins are gone")
        after = server.status()["counters"]
        grown = {name: after[f"retrieved_{name}"] - before[f"retrieved_{name}"] for name in ("chunks", "bytes", "tokens")}
        assert grown == {"chunks": 6, "bytes": 6 * CHUNK_BYTES, "tokens": 48}


def test_a_load_of_the_end_of_a_prefix_is_copied_from_the_places_of_its_own_chunks(server, monkeypatch):
    prompt = prompt_of(14, 50)
    with Setup(server, has_prefix_cache=True) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        kept = 3 * BLOCK_SIZE  # so the first of the chunks that are loaded is loaded in part
        setup.engine.cached = {key: b for key, b in setup.engine.cached.items() if len(key[1]) <= kept}
        monkeypatch.setattr(setup.worker_client, "pin", None)
        setup.run(SimRequest("b", prompt, max_tokens=0))
        assert (setup.engine.num_loaded_tokens, setup.engine.num_failed_loads) == (48 - kept, 0)


@pytest.mark.parametrize("fault", FAULTS[:-1])
def test_a_load_whose_places_are_known_reports_what_it_did_not_fill_whatever_happens(server, fault):
    prompt, blocks = prompt_of(15, 48), list(range(20, 32))
    with Setup(server, faults=(OneFault(fault), 0.0)) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        plan = setup.plan_to_load("r1", prompt, blocks)
        setup.worker_client.fault_rate = 1.0
        setup.worker.load(plan)
        filled = 6 if fault == "fewer" else 0
        assert setup.worker.take_failed_blocks() == set(blocks[filled:])
        assert setup.worker.take_report() == StepReport({0: plan.number})
        assert setup.loaded(blocks[:filled]) == [layer[:filled] for layer in expected_kv(prompt)]
        assert bool(setup.worker_client.num_borrowed) == (fault not in ("lost", "fewer"))
        setup.scheduler.finished("r1")


@pytest.mark.parametrize("who", ["the scheduler left", "its sessions were ended"])
def test_chunks_whose_pins_are_gone_are_loaded_right_or_not_at_all(server, who):
    prompt, blocks = prompt_of(16, 48), list(range(20, 32))
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        plan = setup.plan_to_load("r1", prompt, blocks)
        if who == "the scheduler left":
            setup.scheduler.close()
        else:
            with KVCacheClient(server.zmq_url) as client:
                client.mq.call(EndSession(request_id="r1"))
        setup.worker.load(plan)
        assert setup.worker.take_failed_blocks() == set()
        assert setup.loaded(blocks) == expected_kv(prompt)
        take_everything(server.zmq_url, [])
        setup.worker.load(plan)
        assert setup.worker.take_failed_blocks() == set(blocks)


def test_places_that_a_server_told_before_it_was_restarted_are_right_or_not_used():
    """The next server has the same pool and knows of no pins."""
    prompt, blocks = prompt_of(17, 48), list(range(20, 32))
    flags = ["--chunk-size", str(CHUNK_SIZE), "--pool-name", f"test-halves-{os.getpid()}"]
    with LmcacheServer(flags, leaves_pool=True) as server, Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        plan = setup.plan_to_load("r1", prompt, blocks)
        server.kill()
        setup.worker.load(plan)  # nobody is there, and nobody can have taken the places
        assert setup.worker.take_failed_blocks() == set()
        assert setup.loaded(blocks) == expected_kv(prompt)
        server.start()
        take_everything(server.zmq_url, [])
        setup.worker.load(plan)
        assert setup.worker.take_failed_blocks() == set(blocks)
        setup.worker_client.lookup(b"")  # introduces itself to the new server
        assert setup.worker_client.borrow(plan.loads[0].places, plan.loads[0].boot) is None
        setup.worker.load(plan)
        assert setup.worker.take_failed_blocks() == set(blocks)


def test_each_rank_loads_from_its_own_places(server, monkeypatch):
    prompt = prompt_of(18, 33)
    namespace = Namespace(model="two ranks", layout=LAYOUT.fingerprint, chunk_size=0, world_size=2)
    keys = chunk_keys(msgspec.structs.replace(namespace, chunk_size=CHUNK_SIZE), prompt)
    with contextlib.ExitStack() as stack:
        halves, planes = [], []
        for rank in range(2):
            client = stack.enter_context(KVCacheClient(server.zmq_url, kind="engine-worker"))
            planes.append([torch.randint(256, (16, BLOCK_BYTES), dtype=torch.uint8) for _ in range(NUM_LAYERS)])
            halves.append(WorkerHalf(client))
            halves[rank].start(CpuCopier(LAYOUT, planes[rank]), namespace, rank, 2)
            halves[rank].store(StepPlan(stores=[StoreSpan("a", keys, list(range(8)), 2)]))
            monkeypatch.setattr(client, "pin", None)
        scheduler = SchedulerHalf(stack.enter_context(KVCacheClient(server.zmq_url)), lookup_timeout_seconds=PATIENCE_SECONDS)
        scheduler.hear([half.hello for half in halves])
        request = SimRequest("b", prompt, max_tokens=0)
        scheduler.announced(request)
        for _ in turns():
            if scheduler.match(request, 0) is not None:
                break
            scheduler.begin_step()
        scheduler.allocated("b", list(range(8, 16)), 32)
        plan = scheduler.plan_loads()
        assert len(plan.loads[0].places) == 2 * 4
        for half, own in zip(halves, planes, strict=True):
            half.load(pickle.loads(pickle.dumps(plan)))  # as vLLM carries it
            assert half.take_failed_blocks() == set()
            assert all(torch.equal(plane[8:16], plane[:8]) for plane in own)
        assert not torch.equal(planes[0][0], planes[1][0])
        scheduler.finished("b")


COPIERS = [CpuCopier, functools.partial(LaterCopier, pause_seconds=0.0)]


@pytest.mark.parametrize("make_copier", COPIERS, ids=["within the step", "later"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("shards", [TWO_SHARDS, MLA])
@pytest.mark.parametrize("max_tokens", [0, 3])
def test_what_is_computed_after_a_load_failed_on_another_rank_is_not_stored(server, shards, lag, make_copier, max_tokens):
    """Ranks compute together: on the rank whose load was right, too, what follows is worthless until it is computed again."""
    stem, faults = prompt_of(40, 32), (OneFault("lost"), 0.0)
    prompt = [*stem, *prompt_of(41, 18)]
    with Setup(server, faults=faults, shards=shards, lag=lag, make_copier=make_copier) as setup:
        setup.run(SimRequest("a", stem, max_tokens=0))
        setup.wait_for_stores()
        assert setup.check_stored(stem) == 4
        setup.clients[1].fault_rate = 1.0
        setup.run(SimRequest("b", prompt, max_tokens=max_tokens))
        setup.wait_for_stores()
        assert setup.engine.num_failed_loads == 1
        assert setup.check_stored(prompt) == 6  # computed again, and then stored


@pytest.mark.parametrize("make_copier", COPIERS, ids=["within the step", "later"])
@pytest.mark.parametrize(("shards", "num_copies"), [(TWO_SHARDS, 2), (MLA, 1)])
def test_ranks_that_hold_the_same_store_it_once_and_all_load_it(server, shards, num_copies, make_copier):
    prompt = prompt_of(42, 48)
    with Setup(server, shards=shards, make_copier=make_copier) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        setup.wait_for_stores()
        l1 = server.status()["l1"]
        assert (l1["chunks"], l1["reserved_bytes"]) == (6 * num_copies, 0)
        plan = setup.plan_to_load("b", prompt, list(range(20, 32)))
        for rank, worker in enumerate(setup.workers):
            worker.load(plan)
            wait_until(lambda: worker.take_received() == {"b"}, "the load is over")  # noqa: B023 - at once
            assert worker.take_failed_blocks() == set()
            assert setup.loaded(range(20, 32), rank) == expected_kv(prompt, shards, shards[rank])
        setup.scheduler.finished("b")


def test_what_both_the_engines_own_cache_and_the_server_have_is_not_offered_again(server):
    prompt = prompt_of(55, 48)
    with Setup(server, has_prefix_cache=True) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        setup.engine.add(SimRequest("b", [*prompt, *prompt_of(56, 8)], max_tokens=0))
        assert setup.scheduler._tracked["b"].lookup.wait(60)
        offered, reserve = [], setup.worker_client.reserve
        setup.worker_client.reserve = lambda keys, *args: offered.append(len(keys) // KEY_BYTES) or reserve(keys, *args)
        setup.run()
        assert setup.engine.num_loaded_tokens == 0
        assert offered == [1]
        wait_until(lambda: server.status()["l1"]["pins"] == 0, "nothing is pinned")


def test_a_store_begins_when_the_tokens_of_its_step_have_left_or_when_no_step_follows(server, monkeypatch):
    monkeypatch.setattr(background, "MAX_GATED_SECONDS", 3600.0)
    started = []
    stores = background.BackgroundStores(lambda job: started.append((job.span.request_id, job.fence)))
    try:
        spans = [StoreSpan(name, bytes(KEY_BYTES), [0], 1) for name in "abc"]
        stores.submit(1, spans[:1], "after step 1")
        stores.submit(2, spans[1:2], "after step 2")
        assert (stores.is_gated, stores.done_up_to, stores.is_reading("a")) == (True, 0, True)
        stores.begin_step("sampled")
        time.sleep(0.05)
        assert (started, stores.is_gated) == ([], True)
        stores.submit(3, spans[2:], "after step 3")
        stores.begin_step("the step after")
        wait_until(lambda: stores.done_up_to == 2, "those of before have been carried out")
        assert started == [("a", "sampled"), ("b", "sampled")]
        time.sleep(0.05)
        assert (started[2:], stores.is_gated) == ([], True)
        stores.begin_step("yet another")
        wait_until(lambda: stores.done_up_to == 3, "so is this one, after an event of its own")
        assert (started[2:], stores.is_gated) == ([("c", "the step after")], False)
        monkeypatch.setattr(background, "MAX_GATED_SECONDS", 0.0)
        stores.submit(4, spans[:1], "after step 4")
        wait_until(lambda: stores.done_up_to == 4, "no step follows")
        assert started[3:] == [("a", "after step 4")]
    finally:
        stores.close(5.0)


class PinningCopier(LaterCopier):
    """Remembers which copier has a pool pinned."""

    def __init__(self, name, pinned):
        super().__init__(LAYOUT, [torch.zeros(1, BLOCK_BYTES, dtype=torch.uint8) for _ in range(NUM_LAYERS)])
        self.name, self.pinned = name, pinned

    def pin_pool(self, view, launches=None):
        self.pinned.append(self.name)
        return lambda: self.pinned.remove(self.name)


def test_a_worker_that_begins_anew_leaves_nothing_of_what_it_began_before(server):
    """As where the rest of an engine failed to start, and the program makes another one."""
    with KVCacheClient(server.zmq_url) as client:
        pinned, threads = [], []
        client.attach()
        half = WorkerHalf(client)
        for name in ("first", "second", "third"):
            half.start(PinningCopier(name, pinned), Namespace(model="a", dtype="u8", chunk_size=CHUNK_SIZE))
            threads.append(half._background._thread)
        assert pinned == ["third"]
        assert [thread.is_alive() for thread in threads] == [False, False, True]
        half.close()
    wait_until(lambda: pinned == [], "the pool is unpinned")


SLOW = functools.partial(LaterCopier, pause_seconds=0.05)


def step_until(setup, condition):
    for _ in turns():
        if condition():
            return
        setup.engine.step()


def test_others_compute_while_a_request_waits_for_its_load(server):
    prompt, other = prompt_of(50, 48), prompt_of(51, 40)
    with Setup(server, make_copier=SLOW) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        waiting, running = SimRequest("b", [*prompt, 1], max_tokens=2), SimRequest("c", other, max_tokens=3)
        setup.engine.add(waiting)
        step_until(setup, lambda: waiting.is_loading)
        setup.engine.add(running)
        step_until(setup, lambda: running.num_computed > 8)
        assert waiting.is_loading
        setup.run()
        assert setup.engine.num_loaded_tokens == 48
        assert setup.check_stored(other) == 5


@pytest.mark.parametrize("shards", [ONE_RANK, TWO_SHARDS, MLA])
@pytest.mark.parametrize("fault", ["lost", "stale"])
def test_a_request_whose_awaited_load_fails_computes_and_stores_and_does_not_try_again(server, shards, fault):
    prompt = prompt_of(52, 48)
    with Setup(server, faults=(OneFault(fault), 0.0), make_copier=SLOW, shards=shards) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        setup.wait_for_stores()
        setup.clients[-1].fault_rate = 1.0
        request = SimRequest("b", [*prompt, 1], max_tokens=0)
        setup.run(request)
        assert request.has_failed
        assert (setup.engine.num_failed_loads, setup.engine.num_loaded_tokens) == (1, 48)
        setup.wait_for_stores()
        assert setup.check_stored(prompt) == 6


def test_what_an_awaited_load_did_not_bring_is_computed_and_offered_again_and_nothing_else(server):
    prompt = prompt_of(58, 48)
    with Setup(server, make_copier=SLOW) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        setup.wait_for_stores()
        client, offered = setup.worker_client, []
        pin, reserve = client.pin, client.reserve
        client.borrow = lambda *args: None
        client.pin = lambda keys, *args: pin(keys[: 2 * KEY_BYTES], *args)
        client.reserve = lambda keys, *args: offered.append(len(keys) // KEY_BYTES) or reserve(keys, *args)
        request = SimRequest("b", [*prompt, 1], max_tokens=0)
        setup.run(request)
        assert request.has_failed
        assert setup.engine.num_failed_loads == 1
        setup.wait_for_stores()
        assert sum(offered) == 4, "of six chunks two were loaded"


def test_a_request_that_vllm_asks_about_again_does_not_load_again_though_no_report_named_its_blocks(server):
    """The report on a plan comes when all its loads are over, its failed blocks may have come before."""
    prompt = prompt_of(57, 48)
    with Setup(server, make_copier=SLOW) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        request = SimRequest("b", [*prompt, 1], max_tokens=0)
        setup.engine.add(request)
        step_until(setup, lambda: request.is_loading)
        assert setup.scheduler.match(request, 0) == 0
        setup.scheduler.allocated("b", [1, 2], 0)
        assert not setup.scheduler._tracked["b"].is_loading
        assert setup.scheduler.match(request, 0) == 0
        request.has_failed, request.num_computed = True, 0
        setup.run()


def test_the_blocks_of_a_request_that_is_aborted_while_it_waits_are_free_when_its_load_is_over(server):
    prompt = prompt_of(53, 48)
    with Setup(server, make_copier=SLOW) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        num_free = len(setup.engine.free)
        request = SimRequest("b", [*prompt, 1], max_tokens=0)
        setup.engine.add(request)
        step_until(setup, lambda: request.is_loading)
        setup.engine.abort(request)
        assert len(setup.engine.free) < num_free
        setup.run()
        assert len(setup.engine.free) == num_free
        wait_until(lambda: not server.status()["sessions"], "the session is over")
        assert server.status()["l1"]["pins"] == 0


def test_a_load_that_does_not_end_is_given_up_at_its_deadline(server, monkeypatch):
    monkeypatch.setattr("lmcache.integration.vllm.worker.TRANSFER_SECONDS", 0.05)
    given_up = []
    monkeypatch.setattr(LaterTransfer, "hold_back", lambda self: given_up.append(self))
    prompt = prompt_of(54, 48)
    with Setup(server, make_copier=functools.partial(LaterCopier, pause_seconds=1.0)) as setup:
        setup.copier.pause_seconds = 0.0
        setup.run(SimRequest("a", prompt, max_tokens=0))
        setup.copier.pause_seconds = 1.0
        plan = setup.plan_to_load("b", prompt, list(range(20, 32)))
        setup.worker.load(plan)
        assert setup.worker.take_received() == set()
        wait_until(lambda: setup.worker.take_received() == {"b"}, "the load is given up")
        assert setup.worker.take_failed_blocks() == set(range(20, 32))
        assert len(given_up) == 1
        setup.scheduler.finished("b")
        given_up[0]._thread.join(30)


def test_who_has_nothing_to_compute_lingers_until_a_load_is_over_and_not_where_there_is_none(server):
    prompt = prompt_of(59, 48)
    with Setup(server, make_copier=SLOW) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        setup.worker.linger(3600.0)
        setup.worker.load(setup.plan_to_load("b", prompt, list(range(20, 32))))
        setup.worker.linger(0.0)
        assert setup.worker.take_received() == set()
        setup.worker.linger(3600.0)
        assert setup.worker.take_received() == {"b"}
        setup.worker.linger(3600.0)
        setup.scheduler.finished("b")


@contextlib.contextmanager
def a_load_under_way(server, seconds=0.3, bytes_left=0):
    """Yield an engine whose worker loads six chunks into blocks 20 to 31; and the plan."""
    prompt = prompt_of(60, 48)
    with Setup(server, make_copier=LaterCopier) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        setup.wait_for_stores()
        setup.copier.pause_seconds, setup.copier.load_bytes = seconds, bytes_left
        plan = setup.plan_to_load("b", prompt, list(range(20, 32)))
        setup.worker.load(plan)
        yield setup, plan


def test_who_pins_the_pool_is_told_whether_steps_follow_each_other_and_when_one_has_been_launched(server, monkeypatch):
    clocks = []

    class PinningCopier(CpuCopier):
        def pin_pool(self, view, launches):
            clocks.append(launches)
            return lambda: None

    with Setup(server, make_copier=PinningCopier) as setup:
        (launches,) = clocks
        assert not launches.is_computing()
        setup.worker.begin_step()
        assert launches.is_computing()
        waiter = threading.Thread(target=launches.wait_for_gap, args=(PATIENCE_SECONDS,))
        waiter.start()
        wait_until(lambda: not launches._has_launched.is_set(), "it waits")
        assert waiter.is_alive()
        setup.worker.store(StepPlan())
        waiter.join(PATIENCE_SECONDS)
        assert not waiter.is_alive()
        monkeypatch.setattr("lmcache.transfer.launches.COMPUTING_SECONDS", 0.0)
        assert not launches.is_computing()
        launches.wait_for_gap(PATIENCE_SECONDS)
        assert launches._has_launched.is_set(), "nothing is waited for"


def test_a_load_that_is_nearly_over_is_named_and_the_next_step_waits_for_it(server):
    with a_load_under_way(server) as (setup, plan):
        (load,) = setup.worker._loading
        assert setup.worker.take_received() == {"b"}
        assert setup.worker.take_received() == set()  # once
        assert not load.transfer.is_done
        assert setup.worker.take_report().loaded_up_to == {0: plan.number - 1}  # its pins stay
        setup.worker.begin_step()
        assert load.transfer.is_done
        assert setup.loaded(range(20, 32)) == expected_kv(prompt_of(60, 48))
        setup.worker.store(StepPlan(number=plan.number + 1))
        assert setup.worker.take_received() == set()
        assert setup.worker.take_failed_blocks() == set()
        assert setup.worker.take_report().loaded_up_to == {0: plan.number}


def test_where_others_compute_a_load_is_named_later_than_where_nobody_does(server):
    with a_load_under_way(server, 60.0, IDLE_LEAD_BYTES) as (setup, _):
        (load,) = setup.worker._loading
        assert setup.worker.take_received(is_idle=False) == set()
        setup.worker.linger(3600.0)  # there is nothing to wait for
        assert setup.worker.take_received(is_idle=True) == {"b"}
        load.transfer.end_now()


def test_loads_are_named_in_the_order_in_which_the_device_has_them(server):
    with a_load_under_way(server, 60.0, LEAD_BYTES) as (setup, _):
        setup.worker.load(setup.plan_to_load("c", prompt_of(60, 48), list(range(8, 20))))
        first, second = setup.worker._loading
        assert setup.worker.take_received() == {"b"}
        assert setup.worker.take_received() == set()  # what is left of both is too much
        first.transfer.end_now()
        assert setup.worker.take_received() == {"c"}
        assert [load.span.request_id for load in setup.worker._loading] == ["c"]
        second.transfer.end_now()


@pytest.mark.parametrize("how", ["a pin was taken", "adopted by another server"])
def test_a_load_whose_chunks_may_have_been_taken_away_is_named_only_when_it_is_over(server, monkeypatch, how):
    with a_load_under_way(server) as (setup, _):
        (load,) = setup.worker._loading
        if how == "a pin was taken":
            with KVCacheClient(server.zmq_url) as operator:
                operator.mq.call(EndSession(request_id="b"))
        else:
            monkeypatch.setattr(PoolView, "boot_id", bytes(16))
        assert setup.worker.take_received() == set()
        wait_until(lambda: setup.worker.take_received() == {"b"}, "it is over")
        assert load.transfer.is_done
        assert setup.worker.take_failed_blocks() == set()  # nothing was evicted


def test_a_load_that_was_named_is_good_although_its_pins_were_taken_away_since(server):
    with a_load_under_way(server, seconds=60.0) as (setup, plan):
        assert setup.worker.take_received() == {"b"}
        setup.worker._loading[0].transfer.end_now()
        with KVCacheClient(server.zmq_url) as operator:
            assert operator.mq.call(EndSession(request_id="b")).released == 6
        setup.worker.begin_step()
        setup.worker.store(StepPlan(number=plan.number + 1))
        assert setup.worker.take_failed_blocks() == set()
        assert setup.loaded(range(20, 32)) == expected_kv(prompt_of(60, 48))


@pytest.mark.parametrize("is_idle", [True, False])
def test_an_engine_ends_rather_than_use_a_load_that_was_spoiled_after_it_had_been_named(server, is_idle):
    """Its pins were taken away, and the load took longer than the chunks stay all the same."""
    with a_load_under_way(server, seconds=2 * KEPT_SECONDS) as (setup, plan):
        assert setup.worker.take_received() == {"b"}
        take_everything(server.zmq_url, ["a", "b"])
        stores = StepPlan(number=plan.number + 1, is_idle=is_idle, stores=[None])
        setup.worker.begin_step()
        setup.worker._background.submit = lambda *_: pytest.fail("something was stored")
        with pytest.raises(SpoiledLoadError, match="b goes on without what was loaded for it"):
            setup.worker.store(stores) if not is_idle else setup.worker.take_received()


@pytest.mark.parametrize("settled_by", ["a step that computes", "an idle step"])
def test_a_named_load_whose_request_has_gone_may_be_spoiled(server, settled_by):
    """vLLM has no request left and makes no steps; until the next one the pins may run out, and its blocks become others'."""
    with a_load_under_way(server, seconds=60.0) as (setup, _):
        assert setup.worker.take_received() == {"b"}
        setup.scheduler.finished("b")
        assert setup.scheduler.awaits_loads
        take_everything(server.zmq_url, ["a", "b"])
        setup.worker._loading[0].transfer.end_now()
        following = setup.scheduler.plan_loads()
        following.is_idle = settled_by == "an idle step"
        setup.worker.begin_step()
        setup.worker.load(following)
        setup.worker.store(following)
        assert setup.worker.take_received(following.is_idle) == set()
        assert setup.worker.take_failed_blocks() == set()
        report = setup.worker.take_report()
        setup.scheduler.hear_report(report)
        assert not setup.scheduler.awaits_loads
        assert not setup.scheduler.plan_loads().given_up


def test_a_spoiled_load_of_a_request_that_has_gone_hides_no_failure_of_who_has_its_blocks_now(server, monkeypatch):
    """vLLM gives away first what was freed last; then the next request's load fails in the same step."""
    with a_load_under_way(server, seconds=60.0) as (setup, _):
        assert setup.worker.take_received() == {"b"}
        setup.scheduler.finished("b")
        take_everything(server.zmq_url, ["a", "b"])
        setup.worker._loading[0].transfer.end_now()
        span = ChunkSpan("c", bytes(KEY_BYTES), list(range(20, 22)), 2)
        following = setup.scheduler.plan_loads()
        following.loads.append(span)
        setup.worker_client.pin = lambda *_: (_ for _ in ()).throw(UnreachableError("the test says so"))
        setup.worker.begin_step()
        setup.worker.load(following)
        setup.worker.store(following)
        assert setup.worker.take_received() == {"c"}
        assert setup.worker.take_failed_blocks() == {20, 21}


def test_a_server_that_is_away_when_loads_are_over_leaves_none_behind(server):
    """vLLM would go on stepping for it."""
    prompt = prompt_of(67, 48)
    with Setup(server, make_copier=LaterCopier) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        for name in "bc":
            assert admit(setup, SimRequest(name, [*prompt, 0], max_tokens=0), list(range(12))) == 48
            plan = setup.scheduler.plan_loads()
        setup.scheduler.finished("b")
        assert setup.scheduler.awaits_loads
        present, setup.scheduler_client.present = (
            setup.scheduler_client.present,
            lambda: (_ for _ in ()).throw(UnreachableError("gone")),
        )
        setup.scheduler.hear_report(StepReport({0: plan.number}, {0: 0}))
        assert not setup.scheduler.awaits_loads
        setup.scheduler_client.present = present
        setup.scheduler.finished("c")


def test_a_request_that_ends_while_its_load_is_under_way_keeps_its_pins_until_that_is_over(server):
    with a_load_under_way(server) as (setup, plan):
        assert setup.worker.take_received() == {"b"}
        setup.scheduler.finished("b")
        setup.scheduler_client.lookup(b"")  # after what was posted
        assert server.status()["l1"]["pins"] == 6
        setup.worker.begin_step()
        setup.worker.store(StepPlan(number=plan.number + 1))
        setup.worker.take_received()
        setup.scheduler.hear_report(setup.worker.take_report())
        wait_until(lambda: not server.status()["sessions"], "the session is over")
        assert server.status()["l1"]["pins"] == 0


@pytest.mark.parametrize(("age_seconds", "are_known"), [(299.0, True), (301.0, False)])
def test_where_chunks_lie_is_not_told_when_their_pins_may_soon_be_over(server, monkeypatch, age_seconds, are_known):
    prompt = prompt_of(61, 48)
    with Setup(server) as setup:
        assert setup.scheduler_client.present().pin_timeout_seconds == 600
        setup.run(SimRequest("a", prompt, max_tokens=0))
        request = SimRequest("b", [*prompt, 0], max_tokens=0)
        setup.scheduler.announced(request)
        wait_until(lambda: setup.scheduler.match(request, 0) or setup.scheduler.begin_step(), "it is looked up")
        setup.scheduler._tracked["b"].lasts_until -= age_seconds
        setup.scheduler.allocated("b", list(range(12)), 48)
        (span,) = setup.scheduler.plan_loads().loads
        assert bool(span.places) is are_known
        assert setup.worker.load_span(span)  # the worker asks for them
        setup.scheduler.finished("b")


@pytest.mark.parametrize("was_read", [True, False])
def test_an_answer_that_its_pins_may_not_outlast_is_asked_for_again(server, was_read):
    """A request may wait in a long queue until what the server found is evicted; vLLM would count on a load of it."""
    prompt = prompt_of(67, 48)
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        request = SimRequest("b", [*prompt, 0], max_tokens=0)
        setup.scheduler.announced(request)
        tracked = setup.scheduler._tracked["b"]
        if was_read:
            wait_until(lambda: setup.scheduler.match(request, 0) or setup.scheduler.begin_step(), "it is looked up")
        tracked.lasts_until = 0.0
        wait_until(lambda: setup.scheduler.match(request, 0) or setup.scheduler.begin_step(), "it is looked up again")
        assert (tracked.hit_chunks, tracked.lasts_until > time.monotonic()) == (6, True)
        setup.scheduler.finished("b")
        assert num_pins(server, setup) == 0


def admit(setup, request, block_ids):
    """Let vLLM admit a request: look up, and plan its load; return how many tokens that brings."""
    for _ in turns():
        num_tokens = setup.scheduler.match(request, 0)
        if num_tokens is not None:
            break
        setup.scheduler.begin_step()
    setup.scheduler.allocated(request.request_id, block_ids, num_tokens)
    return num_tokens


def num_pins(server, setup):
    setup.scheduler_client.lookup(b"")  # after what was posted
    return server.status()["l1"]["pins"]


@pytest.mark.parametrize("waits_for_room", [True, False])
def test_the_end_of_a_load_leaves_the_pins_of_the_requests_next_one(server, waits_for_room):
    """Of two loads of one plan the first is over early; its request is preempted, and looks again before the other is over."""
    prompt = prompt_of(62, 48)
    with Setup(server, make_copier=LaterCopier) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        first, second = (SimRequest(name, [*prompt, 0], max_tokens=0) for name in ("b", "c"))
        assert admit(setup, first, list(range(12))) == admit(setup, second, list(range(12, 24))) == 48
        plan = setup.scheduler.plan_loads()
        setup.scheduler.allocated("b", list(range(12)), 0)
        setup.scheduler.free_pins("b")
        assert num_pins(server, setup) == 12
        wait_until(lambda: setup.scheduler.match(first, 0) or setup.scheduler.begin_step(), "it is looked up again")
        if not waits_for_room:
            setup.scheduler.allocated("b", list(range(12)), 48)
            setup.scheduler.plan_loads()
        setup.scheduler.hear_report(StepReport({0: plan.number}, {0: 0}))
        assert num_pins(server, setup) == 12  # of "b" of both lookups
        if waits_for_room:
            setup.scheduler.allocated("b", list(range(12)), 0)
            setup.scheduler.free_pins("b")
        else:
            setup.scheduler.hear_report(StepReport({0: plan.number + 1}, {0: 0}))
        assert num_pins(server, setup) == 0
        setup.scheduler.finished("b")
        setup.scheduler.finished("c")


def test_a_miss_does_not_forget_what_an_earlier_lookup_of_the_request_has_pinned(server):
    prompt = prompt_of(63, 48)
    with Setup(server, make_copier=LaterCopier) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        request = SimRequest("b", [*prompt, 0], max_tokens=0)
        assert admit(setup, request, list(range(12))) == 48
        plan = setup.scheduler.plan_loads()
        setup.scheduler.allocated("b", list(range(12)), 0)
        setup.scheduler._tracked["b"].keys = b"\1" * len(setup.scheduler._tracked["b"].keys)  # as if all were gone
        setup.scheduler._tracked["b"].hasher.extend_to = lambda tokens: b"\1" * 32 * 6
        assert admit(setup, request, list(range(12))) == 0
        setup.scheduler.hear_report(StepReport({0: plan.number}, {0: 0}))
        assert num_pins(server, setup) == 0
        setup.scheduler.finished("b")


def test_a_server_that_goes_between_the_answer_and_the_admission_stops_no_engine(server):
    """vLLM does not guard the call; where chunks lie is told all the same, and the worker finds out that they are gone."""
    prompt = prompt_of(64, 48)
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        request = SimRequest("b", [*prompt, 0], max_tokens=0)
        setup.scheduler.announced(request)
        wait_until(lambda: setup.scheduler.match(request, 0) or setup.scheduler.begin_step(), "it is looked up")
        setup.scheduler_client.present = lambda: (_ for _ in ()).throw(UnreachableError("gone"))
        setup.scheduler.allocated("b", list(range(12)), 48)
        (span,) = setup.scheduler.plan_loads().loads
        assert setup.worker.load_span(span)
        del setup.scheduler_client.present
        setup.scheduler.finished("b")


def test_after_a_reset_nothing_is_loaded_that_was_stored_before_it(server):
    """vLLM asks for one when it has replaced its weights. A request that it has preempted for that may hold KV of both."""
    prompt = prompt_of(65, 48)
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        waiting, running = SimRequest("b", [*prompt, 0], max_tokens=0), SimRequest("c", prompt_of(66, 48), max_tokens=30)
        setup.scheduler.announced(waiting)
        wait_until(lambda: setup.scheduler.match(waiting, 0) or setup.scheduler.begin_step(), "it is looked up")
        setup.engine.add(running)
        for _ in turns():
            setup.engine.step()
            if running.num_computed:
                break
        setup.scheduler.start_anew()
        assert setup.scheduler.match(waiting, 0) == 0
        setup.scheduler.allocated("b", list(range(36, 48)), 0)
        setup.scheduler.free_pins("b")
        assert num_pins(server, setup) == 0
        setup.scheduler.finished("b")
        setup.engine.preempt(running)
        stored_before = server.status()["counters"]["stored_chunks"]
        setup.run()
        assert server.status()["counters"]["stored_chunks"] == stored_before
        num_loaded = server.status()["counters"]["retrieved_chunks"]
        for name in ("d", "e"):  # of these the second loads what the first has stored
            setup.run(SimRequest(name, [*prompt, 0], max_tokens=0))
        assert server.status()["counters"]["retrieved_chunks"] == num_loaded + 6
        assert server.status()["counters"]["stored_chunks"] == stored_before + 6
        assert setup.check_stored(prompt) == 6  # for whoever has the old weights


def test_the_pins_of_a_load_go_when_the_last_rank_has_told_that_it_is_over(server):
    prompt = prompt_of(43, 48)
    with Setup(server, shards=MLA) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        plan = setup.plan_to_load("b", prompt, list(range(20, 32)))
        for worker, num_pins in zip(setup.workers, (6, 0), strict=True):
            worker.load(plan)
            setup.scheduler.hear_report(worker.take_report())
            setup.scheduler_client.lookup(b"")  # after what was posted
            assert server.status()["l1"]["pins"] == num_pins
        setup.scheduler.finished("b")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("shards", [TWO_SHARDS, MLA])
def test_what_an_ended_request_had_to_wait_with_is_stored_if_the_loads_were_good(server, shards, fails):
    """Its client leaves in the moment after the step that followed its load, be that over or not; vLLM keeps the blocks."""
    stem = prompt_of(44, 32)
    prompt = [*stem, *prompt_of(45, 18)]
    make_copier = functools.partial(LaterCopier, pause_seconds=0.02)
    with Setup(server, faults=(OneFault("lost"), 0.0), shards=shards, lag=1, make_copier=make_copier) as setup:
        setup.run(SimRequest("a", stem, max_tokens=0))
        setup.wait_for_stores()
        setup.clients[1].fault_rate = float(fails)
        request = SimRequest("b", prompt, max_tokens=9)
        setup.engine.add(request)
        while request not in setup.engine.running:
            setup.engine.step()
        setup.engine.abort(request)
        assert "b" in setup.engine.held
        setup.run()
        setup.wait_for_stores()
        assert not setup.engine.held
        assert setup.check_stored(prompt) == (4 if fails else 5)
        setup.clients[1].fault_rate = 0.0
        setup.run(SimRequest("c", prompt, max_tokens=9))
        setup.wait_for_stores()
        assert setup.check_stored(prompt) == 6


@pytest.mark.parametrize("ranks", [[0], [1], [0, 0], [0, 1, 1], [0, 1, 2]])
def test_an_engine_of_which_not_each_rank_has_answered_once_is_refused(server, ranks, caplog):
    with Setup(server) as setup:
        setup.scheduler.hear([WorkerHello(setup.namespace, LAYOUT, rank=rank, num_ranks=2) for rank in ranks])
        assert f"of the engine's 2 ranks, {', '.join(map(str, ranks))} answered" in caplog.text
        setup.run(SimRequest("a", prompt_of(46, 30), max_tokens=0))
        assert setup.stored_chunks(prompt_of(46, 30)) == []


def test_blocks_that_a_failed_load_left_are_nobodys_before_they_are_computed_again(server):
    """A's load fails; C, which begins as A does, takes A's blocks from the engine's own cache when A has computed them."""
    stem, tail = prompt_of(5, 48), prompt_of(6, 20)
    faults = OneFault("lost"), 0.0
    with Setup(server, 64, faults, has_prefix_cache=True, max_part=4) as setup:
        setup.run(SimRequest("first", stem, max_tokens=0))
        setup.engine.cached.clear()
        setup.worker_client.fault_rate = 1.0
        setup.engine.add(SimRequest("a", [*stem, 1], max_tokens=0))
        for _ in turns():
            setup.engine.step()  # nothing happens until the lookup is answered
            if setup.engine.num_failed_loads == 1:
                break
        setup.worker_client.fault_rate = 0.0
        setup.run(SimRequest("c", [*stem, *tail], max_tokens=20))
        stored = setup.stored_chunks([*stem, *tail])
        assert stored == expected_chunks([*stem, *tail])[: len(stored)]
        assert len(stored) == 8


@pytest.mark.parametrize("saves_decode", [True, False])
def test_generated_tokens_are_stored_only_when_that_was_asked_for(server, saves_decode):
    prompt = prompt_of(10, 30)
    with Setup(server, saves_decode=saves_decode) as setup:
        request = SimRequest("a", prompt, max_tokens=20)
        setup.run(request)
        num_tokens = 48 if saves_decode else 24
        assert setup.stored_chunks(request.all_token_ids) == expected_chunks(request.all_token_ids[:num_tokens])
        before = server.status()["counters"]["stored_decode_chunks"]
    after = server.status()["counters"]["stored_decode_chunks"]  # reported when the engine left
    assert after - before == (3 if saves_decode else 0)


def test_failures_are_counted_by_reason_and_reported_at_the_latest_when_the_engine_leaves(server):
    before = server.status()["counters"]["retrieve_failed"]
    with Setup(server, faults=(OneFault("lost"), 1.0)) as setup:
        setup.worker.load(StepPlan([ChunkSpan("r", bytes(64), [1, 2, 3, 4], 2)]))
    with Setup(server) as setup:
        setup.worker.load(StepPlan([ChunkSpan("r", bytes(64), [1, 2, 3, 4], 2)]))
    after = server.status()["counters"]["retrieve_failed"]
    grown = {reason: count - before[reason] for reason, count in after.items() if count != before[reason]}
    assert grown == {"unreachable": 4, "missing": 4}


@contextlib.contextmanager
def frozen(server):
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


def test_a_lookup_that_is_not_answered_is_asked_for_again_and_then_a_miss(server):
    prompt = prompt_of(11, 40)
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        scheduler, client = SchedulerHalf(setup.scheduler_client, lookup_timeout_seconds=1.0), setup.scheduler_client
        scheduler.hear([setup.worker.hello])
        with frozen(server):
            request = SimRequest("b", prompt, max_tokens=0)
            scheduler.announced(request)

            def ask_step_by_step():
                for _ in turns():
                    assert scheduler.match(request, 0) is None
                    scheduler.plan_loads()

            with pytest.raises(DeadlineError):
                ask_step_by_step()
            assert scheduler.match(request, 0) == 0
            scheduler.allocated("b", list(range(10)), 0)
            scheduler.free_pins("b")
            scheduler.finished("b")
        # What the server still answered after the deadline has been given back.
        assert client.lookup(chunk_keys(setup.chunk_namespace(), prompt)).hit_chunks == 5
        client.end_session("")
        status = server.status()
        assert (status["l1"]["pins"], status["sessions"]) == (0, 0)


def test_a_request_that_ends_in_the_queue_leaves_no_pins(server):
    prompt = prompt_of(12, 40)
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt, max_tokens=0))
        setup.scheduler.announced(SimRequest("b", prompt, max_tokens=0))
        setup.scheduler.finished("b")
        assert setup.scheduler_client.lookup(b"").hit_chunks == 0  # after what was posted
        status = server.status()
        assert (status["l1"]["pins"], status["sessions"]) == (0, 0)


def test_many_waiting_requests_are_asked_about_without_looking_at_the_socket_again(server):
    with Setup(server) as setup:
        setup.run(SimRequest("connects", prompt_of(0, 40), max_tokens=0))
        with frozen(server):
            requests = [SimRequest(f"r{number}", prompt_of(number, 40), max_tokens=0) for number in range(50)]
            for request in requests:
                setup.scheduler.announced(request)
            assert [setup.scheduler.match(request, 0) for request in requests] == [None] * 50
            channel = setup.scheduler_client.mq._channel()
            channel.read_until = None  # would be noticed
            assert [setup.scheduler.match(request, 0) for request in requests] == [None] * 50
            del channel.read_until


def test_a_refusal_keeps_the_cache_off(server):
    with Setup(server) as setup:
        setup.scheduler.hear([WorkerHello(refusal="two KV groups")])
        setup.run(SimRequest("a", prompt_of(7, 30), max_tokens=0))
        assert setup.stored_chunks(prompt_of(7, 30)) == []


def test_a_block_size_that_does_not_divide_the_chunk_names_those_that_do(server):
    with Setup(server) as setup:
        layout = msgspec.structs.replace(LAYOUT, block_size=3)
        setup.scheduler.hear([WorkerHello(setup.namespace, layout)])
        with pytest.raises(UsageError, match=r"chunk_size 8 is not a multiple .* block_size 3") as info:
            setup.scheduler.match(SimRequest("a", prompt_of(8, 30), max_tokens=0), 0)
        assert "6 or 9" in info.value.hint


@pytest.mark.parametrize("what", [{"prompt_embeds": "embeddings"}, {"resumable": True}, {"prompt_token_ids": None}])
def test_requests_whose_tokens_do_not_decide_their_kv_are_left_alone(server, what):
    with Setup(server) as setup:
        request = SimRequest("a", prompt_of(9, 30), max_tokens=0)
        for name, value in what.items():
            setattr(request, name, value)
        assert setup.scheduler.match(request, 0) == 0
        assert not setup.scheduler._tracked


def test_media_that_have_running_numbers_for_names_are_left_alone(server):
    with Setup(server) as setup:
        setup.scheduler._media_are_hashed = False
        request = SimRequest("a", prompt_of(9, 30), max_tokens=0)
        request.mm_features = (SimpleNamespace(identifier="renderer0-mm-1-image-0"),)
        assert setup.scheduler.match(request, 0) == 0
        assert not setup.scheduler._tracked


def test_a_request_that_wants_something_of_each_token_of_its_prompt_loads_none_and_is_stored(server):
    """vLLM 0.25 asks us all the same, and has no log probabilities of tokens that were loaded."""
    prompt = prompt_of(68, 48)
    with Setup(server) as setup:
        setup.run(SimRequest("a", prompt[:24], max_tokens=0))
        request = SimRequest("b", prompt, max_tokens=0)
        request.skip_reading_prefix_cache = True
        setup.run(request)
        assert setup.engine.num_loaded_tokens == 0
        assert setup.check_stored(prompt) == 6
        assert num_pins(server, setup) == 0


def test_a_request_whose_tokens_cannot_be_hashed_is_not_tracked(server):
    with Setup(server) as setup:
        request = SimRequest("a", [-1, *prompt_of(69, 30)], max_tokens=0)
        for ask in (setup.scheduler.announced, lambda asked: setup.scheduler.match(asked, 0)):
            with pytest.raises(ValueError, match="token ids"):
                ask(request)
        assert not setup.scheduler._tracked


def test_a_failure_while_stores_are_planned_costs_no_other_request_its_blocks(server, monkeypatch):
    """Else its list would be too short, and its KV be stored under the keys of other tokens."""
    with Setup(server, saves_decode=True) as setup:
        plan_stores, plan_store = setup.scheduler.plan_stores, setup.scheduler._plan_store

        def guarded(plan, output):
            with contextlib.suppress(RuntimeError):  # the plug-in lets none through to vLLM
                plan_stores(plan, output)

        def failing(plan, tracked):
            if tracked.request_id == "a":
                raise RuntimeError
            plan_store(plan, tracked)

        monkeypatch.setattr(setup.scheduler, "plan_stores", guarded)
        monkeypatch.setattr(setup.scheduler, "_plan_store", failing)
        requests = [
            SimRequest(name, prompt_of(number, 20), max_tokens=tokens) for name, number, tokens in (("a", 70, 8), ("b", 71, 40))
        ]
        setup.run(*requests)
        assert setup.check_stored(requests[1].all_token_ids) >= 6


def test_an_engine_without_a_server_goes_on_and_finds_it_when_it_comes():
    server = LmcacheServer(["--chunk-size", str(CHUNK_SIZE)])
    client = KVCacheClient(server.zmq_url, kind="engine-worker", timeout_seconds=0.2, heartbeat=True)
    planes = [torch.zeros(8, BLOCK_BYTES, dtype=torch.uint8) for _ in range(NUM_LAYERS)]
    worker = WorkerHalf(client)
    try:
        namespace = Namespace(model="simulated", layout=LAYOUT.fingerprint, chunk_size=0)
        worker.start(CpuCopier(LAYOUT, planes), namespace)
        worker.load(StepPlan([ChunkSpan("r", bytes(64), [3, 1, 2, 5], 2)]))
        assert worker.take_failed_blocks() == {1, 2, 3, 5}
        with server:
            client.mq.timeout_seconds = PATIENCE_SECONDS
            wait_until(lambda: server.status()["models"], "the engine is registered")
            worker.close()
    finally:
        worker.close()
