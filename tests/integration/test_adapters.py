"""The adapters behind vLLM's own connector class, called as it calls them, with a real server."""

import gc
import random
import time
import weakref
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from lmcache.client.kvcache import KVCacheClient  # noqa: E402
from lmcache.integration.vllm import vllm_multi_process_adapter as adapters  # noqa: E402
from lmcache.integration.vllm.vllm_multi_process_adapter import (  # noqa: E402
    LMCacheMPSchedulerAdapter,
    LMCacheMPWorkerAdapter,
    LoadStoreOp,
    ParallelStrategy,
)
from lmcache.protocol import Clear  # noqa: E402
from tests.chaos.waiting import wait_until  # noqa: E402
from tests.server_process import LmcacheServer  # noqa: E402

BLOCK_SIZE = 4
CHUNK_SIZE = 2 * BLOCK_SIZE
NUM_BLOCKS = 32
BLOCK_ELEMENTS = 8
LAYERS = ("layer.0", "layer.1")


class FullAttentionSpec:
    """What the worker reads of vLLM's, whose name it goes by."""

    block_size = BLOCK_SIZE
    unpadded_page_size_bytes = BLOCK_ELEMENTS * 2

    def __eq__(self, other):
        return isinstance(other, FullAttentionSpec)

    __hash__ = None


class MLAAttentionSpec(FullAttentionSpec):
    """What all ranks hold the same of."""


class Layer:
    attn_backend = None

    def get_kv_cache_spec(self, vllm_config):
        return MLAAttentionSpec() if vllm_config.model_config.use_mla else FullAttentionSpec()


def make_vllm_config(model_dir, rank=0, num_ranks=1, **changes):
    model = {
        "model": str(model_dir),
        "revision": None,
        "dtype": "bfloat16",
        "quantization": None,
        "hf_config": SimpleNamespace(to_dict=dict),
        "is_multimodal_model": False,
        "enable_prompt_embeds": False,
        "use_mla": False,
    }
    model.update({name: changes.pop(name) for name in list(changes) if name in model})
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(
            world_size=num_ranks, tensor_parallel_size=num_ranks, decode_context_parallel_size=1, rank=rank
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        scheduler_config=SimpleNamespace(async_scheduling=changes.pop("async_scheduling", False)),
        compilation_config=SimpleNamespace(static_forward_context={name: Layer() for name in LAYERS}),
        kv_transfer_config=SimpleNamespace(
            kv_connector=changes.pop("kv_connector", "LMCacheMPConnector"),
            kv_load_failure_policy="recompute",
            kv_connector_extra_config=changes.pop("extra", {}),
            engine_id="e",
        ),
        instance_id="i",
        lora_config=changes.pop("lora_config", None),
        speculative_config=changes.pop("speculative_config", None),
    )


@pytest.fixture(scope="module")
def server():
    with LmcacheServer(["--chunk-size", str(CHUNK_SIZE)]) as server:
        yield server


class Engine:
    """The adapters of one engine, as vLLM's class makes them: workers first. `worker` and `kv` are the first rank's."""

    def __init__(self, server, monkeypatch, model_dir, num_ranks=1, is_mla=False, **changes):
        pytest.importorskip("vllm", reason="its version is part of the layout: make setup-vllm")
        patience = {"lmcache.mp.mq_timeout": 30.0, "lmcache.mp.lookup_timeout": 30.0}  # the most that can be asked for
        extra = {"lmcache.mp.port": server.port, **patience, **changes.pop("extra", {})}
        common = {
            "server_url": f"tcp://localhost:{server.port}",
            "context": None,
            "model_name": str(model_dir),
            "vllm_block_size": BLOCK_SIZE,
            "parallel_strategy": ParallelStrategy(is_mla, num_ranks, 0, num_ranks, 0, num_ranks, 1),
            "mq_timeout": 300.0,
            "heartbeat_interval": 10.0,
        }
        self.kvs, self.workers = [], []
        for rank in range(num_ranks):
            config = make_vllm_config(model_dir, rank, num_ranks, extra=extra, use_mla=is_mla, **changes)
            monkeypatch.setattr(adapters, "current_vllm_config", lambda config=config: config)
            self.kvs.append({name: torch.zeros(NUM_BLOCKS, BLOCK_ELEMENTS, dtype=torch.bfloat16) for name in LAYERS})
            self.workers.append(LMCacheMPWorkerAdapter(**common))
            self.workers[rank].register_kv_caches(self.kvs[rank])
        self.kv, self.worker = self.kvs[0], self.workers[0]
        self.scheduler = LMCacheMPSchedulerAdapter(**common)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.scheduler._half.close()
        for worker in self.workers:
            worker.shutdown()

    def wait_for_workers(self):
        wait_until(lambda: self.scheduler._hellos, "the workers are known", 60)

    def fill(self, block_ids, rank=0):
        for kv in self.kvs[rank].values():
            kv[block_ids] = torch.rand(len(block_ids), BLOCK_ELEMENTS).to(torch.bfloat16)

    def blocks(self, block_ids, rank=0):
        return [kv[block_ids].clone() for kv in self.kvs[rank].values()]

    def lookup(self, request_id, tokens, salt=""):
        """Ask until it is known, as vLLM does, a step at a time."""
        deadline = time.monotonic() + 60
        self.scheduler.maybe_submit_lookup_request(request_id, token_ids=tokens, cache_salt=salt)
        while (hit := self.scheduler.check_lookup_result(request_id)) is None:
            assert time.monotonic() < deadline
            self.scheduler.num_blocks_per_chunk()
        return hit

    def store(self, request_id, tokens, block_ids, start=0, salt=""):
        op = LoadStoreOp(token_ids=tokens, block_ids=block_ids, start=start, end=start + len(block_ids) * BLOCK_SIZE)
        for worker in self.workers:
            worker.batched_submit_store_requests([request_id], [op], None, cache_salts=[salt])

    def load(self, request_id, tokens, block_ids, start=0, salt="", skip=0):
        op = LoadStoreOp(
            token_ids=tokens,
            block_ids=block_ids,
            start=start,
            end=start + len(block_ids) * BLOCK_SIZE,
            skip_first_n_tokens=skip,
        )
        for worker in self.workers:
            worker.batched_submit_retrieve_requests([request_id], [op], None, cache_salts=[salt])


@pytest.fixture
def engine(server, monkeypatch, tmp_path):
    with KVCacheClient(server.zmq_url) as client:
        client.mq.call(Clear())
    with Engine(server, monkeypatch, tmp_path) as engine:
        engine.wait_for_workers()
        yield engine
    status = server.status()
    assert (status["l1"]["pins"], status["sessions"], status["l1"]["reserved_bytes"]) == (0, 0, 0)


def prompt_of(seed, num_tokens):
    return random.Random(seed).choices(range(100), k=num_tokens)


def test_what_is_stored_is_found_and_loaded_into_other_blocks(engine):
    tokens = prompt_of(1, 30)
    assert engine.lookup("a", tokens) == 0
    engine.scheduler.cleanup_lookup_result("a")
    engine.fill([9, 3, 7, 1, 5, 2])
    stored = engine.blocks([9, 3, 7, 1, 5, 2])
    engine.store("a", tokens, [9, 3, 7, 1, 5, 2])
    engine.scheduler.end_session("a")
    assert engine.worker.get_finished({"a"}) == ({"a"}, None)
    assert engine.lookup("b", tokens) == 24
    assert engine.lookup("b", tokens) == 24  # asked again: the same
    engine.scheduler.cleanup_lookup_result("b")
    engine.load("b", tokens, [20, 21, 22, 23, 24, 25])
    assert engine.worker.get_block_ids_with_load_errors() == set()
    assert engine.worker.get_finished(set()) == (None, {"b"})
    assert all(torch.equal(x, y) for x, y in zip(engine.blocks([20, 21, 22, 23, 24, 25]), stored, strict=True))
    engine.scheduler.end_session("b")


def test_blocks_that_vllm_has_are_neither_loaded_nor_written(engine):
    tokens = prompt_of(2, 17)
    engine.fill([0, 1, 2, 3])
    stored = engine.blocks([0, 1, 2, 3])
    engine.store("a", tokens, [0, 1, 2, 3])
    engine.fill([10])
    kept = engine.blocks([10])
    assert engine.lookup("b", tokens) == 16
    engine.load("b", tokens, [10, 11, 12, 13], skip=BLOCK_SIZE)
    assert all(torch.equal(x, y) for x, y in zip(engine.blocks([10]), kept, strict=True))
    assert all(torch.equal(x, y[1:]) for x, y in zip(engine.blocks([11, 12, 13]), stored, strict=True))
    engine.scheduler.end_session("b")


def test_two_salts_never_share(engine):
    tokens = prompt_of(3, 20)
    engine.store("a", tokens, [0, 1, 2, 3], salt="one")
    assert engine.lookup("b", tokens, salt="two") == 0
    assert engine.lookup("c", tokens) == 0
    assert engine.lookup("d", tokens, salt="one") == 16
    engine.load("d", tokens, [4, 5, 6, 7], salt="two")
    assert engine.worker.get_block_ids_with_load_errors() == {4, 5, 6, 7}
    for request_id in "bcd":
        engine.scheduler.end_session(request_id)


def test_after_a_load_that_failed_the_request_is_told_of_no_hit_and_stores_nothing(engine, server):
    """vLLM's class counts what it meant to load as computed: what it then offers may be garbage."""
    tokens = prompt_of(4, 33)
    engine.store("a", tokens, list(range(8)))
    assert engine.lookup("b", tokens) == 32
    engine.scheduler.cleanup_lookup_result("b")
    engine.scheduler.free_lookup_locks(token_ids=tokens, start=0, end=32, request_id="b")
    wait_until(lambda: server.status()["l1"]["pins"] == 0, "the pins are gone", 60)
    with KVCacheClient(server.zmq_url) as client:
        client.mq.call(Clear())
    engine.load("b", tokens, list(range(10, 18)))
    assert engine.worker.get_block_ids_with_load_errors() == set(range(10, 18))
    assert engine.worker.get_block_ids_with_load_errors() == set()
    assert engine.worker.get_finished(set()) == (None, {"b"})
    assert engine.lookup("b", tokens) == 0
    engine.store("b", tokens, list(range(10, 18)))
    assert engine.lookup("c", tokens) == 0
    engine.scheduler.end_session("b")
    engine.scheduler.end_session("c")


def test_each_end_is_told_once_and_none_right_after_a_load(engine):
    worker, tokens = engine.worker, prompt_of(5, 9)
    assert worker.get_finished({"x", "y"}) == ({"x", "y"}, None)
    assert worker.get_finished({"x"}) == (None, None)
    engine.load("r", tokens, [0, 1])
    assert worker.get_finished(set()) == (None, {"r"})
    # vLLM aborted it while the load was under way, and freed it when it heard of its end.
    assert worker.get_finished({"r"}) == (None, None)
    engine.load("s", tokens, [0, 1])
    assert worker.get_finished(set()) == (None, {"s"})
    assert worker.get_finished(set()) == (None, None)
    assert worker.get_finished({"s"}) == ({"s"}, None)


def test_generated_tokens_are_left_out_unless_asked_for(server, monkeypatch, tmp_path):
    for saves_decode, expected in ((False, 16), (True, 32)):
        extra = {"lmcache.mp.save_decode_cache": saves_decode}
        with Engine(server, monkeypatch, tmp_path / str(saves_decode), extra=extra) as engine:
            engine.wait_for_workers()
            tokens = prompt_of(6, 33)
            engine.store("a", tokens[:17], [0, 1, 2, 3])
            engine.store("a", tokens, [4, 5, 6, 7], start=16)
            assert engine.lookup("b", tokens) == expected
            engine.scheduler.end_session("b")


def test_an_operation_that_is_cut_otherwise_than_the_servers_chunks_stores_its_whole_chunks(engine):
    tokens = prompt_of(7, 33)
    engine.store("a", tokens, [0])
    engine.store("a", tokens, [1, 2, 3, 4], start=4)
    assert engine.lookup("b", tokens) == 0  # the first chunk was never offered whole
    engine.store("c", tokens, [0, 1, 2, 3, 4])
    assert engine.lookup("d", tokens) == 16
    engine.load("d", tokens, [8, 9, 10], start=4)
    assert engine.worker.get_block_ids_with_load_errors() == set()
    engine.load("d", tokens, [8, 9, 10, 11, 12])  # the third chunk is not there
    assert engine.worker.get_block_ids_with_load_errors() == {12}
    for request_id in "bd":
        engine.scheduler.end_session(request_id)


def test_an_operation_that_does_not_fit_the_layout_is_not_carried_out(engine):
    tokens = prompt_of(8, 33)
    engine.worker.batched_submit_store_requests(["a"], [LoadStoreOp(tokens, [0, 1, 2], 0, 32)], None)
    assert engine.lookup("b", tokens) == 0
    engine.worker.batched_submit_retrieve_requests(["b"], [LoadStoreOp(tokens, [5, 6], 0, 32)], None)
    assert engine.worker.get_block_ids_with_load_errors() == {5, 6}
    engine.scheduler.end_session("b")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_config": object()}, "which LoRA adapter"),
        ({"is_multimodal_model": True}, "which images or sounds"),
        ({"enable_prompt_embeds": True}, "prompt embeddings"),
        ({"speculative_config": object()}, "which tokens are drafts"),
        ({"kv_connector": "MultiConnector"}, "which connector"),
    ],
)
def test_what_the_calls_do_not_identify_keeps_the_cache_off(server, monkeypatch, tmp_path, changes, told, caplog):
    with Engine(server, monkeypatch, tmp_path, **changes) as engine:
        assert told in engine.worker._half.hello.refusal
        assert "unset LMCACHE_USE_UPSTREAM_MP" in caplog.text
        wait_until(lambda: engine.scheduler._client._attachment, "it is introduced", 60)
        engine.store("a", prompt_of(9, 17), [0, 1, 2, 3])
        assert engine.lookup("b", prompt_of(9, 17)) == 0
        engine.load("b", prompt_of(9, 17), [0, 1, 2, 3])
        assert engine.worker.get_block_ids_with_load_errors() == {0, 1, 2, 3}
        engine.scheduler.end_session("b")


@pytest.mark.parametrize(("is_mla", "num_shards"), [(False, 2), (True, 1)])
def test_each_of_two_ranks_loads_its_shard_and_mla_has_one_for_both(server, monkeypatch, tmp_path, is_mla, num_shards):
    tokens, longer = prompt_of(11, 17), [*prompt_of(11, 17), *prompt_of(12, 16)]
    with Engine(server, monkeypatch, tmp_path, num_ranks=2, is_mla=is_mla) as engine:
        engine.wait_for_workers()
        (model,) = [m for m in server.status()["models"] if m["namespace"]["model"] == str(tmp_path)]
        assert (model["ranks"], model["world_size"], model["namespace"]["world_size"]) == ([0, 1], 2, num_shards)
        before = server.status()["counters"]
        engine.fill([0, 1, 2, 3])
        engine.fill([0, 1, 2, 3], rank=1)
        engine.store("a", tokens, [0, 1, 2, 3])
        assert engine.lookup("b", tokens) == 16
        engine.load("b", tokens, [10, 11, 12, 13])
        for rank, worker in enumerate(engine.workers):
            assert worker.get_block_ids_with_load_errors() == set()
            stored = engine.blocks([0, 1, 2, 3], rank=0 if is_mla else rank)
            assert all(map(torch.equal, engine.blocks([10, 11, 12, 13], rank), stored))
        after = server.status()["counters"]
        grown = {name: after[name] - before[name] for name in ("stored_chunks", "retrieved_chunks", "retrieved_tokens")}
        assert grown == {"stored_chunks": 2 * num_shards, "retrieved_chunks": 4, "retrieved_tokens": 16}
        # Whether the load was good on all ranks is nothing that a rank hears.
        engine.store("b", longer, [20, 21, 22, 23], start=16)
        assert engine.lookup("c", longer) == 16
        engine.store("d", longer, list(range(20, 28)))
        assert engine.lookup("e", longer) == 32
        for request_id in "abcde":
            engine.scheduler.end_session(request_id)


def test_an_unknown_setting_stops_the_engine_at_start(server, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=r"did you mean 'lmcache.mp.port'"):
        Engine(server, monkeypatch, tmp_path, extra={"lmcache.mp.prot": 1})


def test_without_a_server_nothing_is_waited_for(monkeypatch, tmp_path):
    server = LmcacheServer(["--chunk-size", str(CHUNK_SIZE)])
    extra = {"lmcache.mp.mq_timeout": 0.2}
    try:
        with Engine(server, monkeypatch, tmp_path, extra=extra) as engine:
            assert engine.scheduler.num_blocks_per_chunk() == 256 // BLOCK_SIZE
            assert engine.lookup("a", prompt_of(10, 300)) == 0
            engine.store("a", prompt_of(10, 300), list(range(16)))
            engine.scheduler.end_session("a")
            server.start()
            engine.wait_for_workers()
            engine.store("b", prompt_of(10, 300), list(range(16)))
            # vLLM's class goes on in units of 64 blocks, so less than one of them is no hit to it.
            assert engine.lookup("c", prompt_of(10, 300)) == 0
            engine.scheduler.end_session("c")
    finally:
        server.close()


def test_a_schedulers_adapter_that_nobody_uses_any_more_leaves_the_server(server):
    """The class tells it nothing of the end, and a process may make one engine after the other."""
    adapter = LMCacheMPSchedulerAdapter(server_url=server.zmq_url, vllm_block_size=BLOCK_SIZE)
    heartbeat = adapter._client._heartbeat
    wait_until(lambda: server.status()["clients"], "it is introduced")
    kept = weakref.ref(adapter)
    del adapter
    wait_until(lambda: gc.collect() >= 0 and kept() is None, "it is freed")  # a heartbeat may be asking for workers
    wait_until(lambda: not server.status()["clients"] and not heartbeat.is_alive(), "it has left")
