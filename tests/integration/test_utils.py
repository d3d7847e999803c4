"""What is read of vLLM's configuration and requests: settings, identity, and what is refused."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmcache.errors import LayoutMismatchError, UsageError
from lmcache.integration.vllm.utils import (
    Adapters,
    ConnectorConfig,
    identify_engine,
    media_are_hashed,
    request_namespace,
    software,
)
from lmcache.integration.vllm.worker import is_replicated, read_layout
from lmcache.keys import Namespace, chunk_keys
from lmcache.layout import KVLayout
from lmcache.protocol import RegisterKVCache, decode_request, encode
from lmcache.transfer.driver import CudaDriver

ENGINE = Namespace(model="m", chunk_size=4)
BYTES = KVLayout(num_layers=1, num_planes=1, block_bytes=1, block_size=1, dtype="u8")


def test_settings_have_the_documented_defaults():
    assert ConnectorConfig.read({}) == ConnectorConfig("tcp://localhost:5555", 2.0, 1.0)


@pytest.mark.parametrize(
    ("extra", "url"),
    [
        ({"lmcache.mp.host": "tcp://10.0.0.1", "lmcache.mp.port": 7000}, "tcp://10.0.0.1:7000"),
        ({"lmcache.mp.host": "cache", "lmcache.mp.port": "7000"}, "tcp://cache:7000"),
        ({"lmcache.mp.url": "ipc:///run/cache.sock"}, "ipc:///run/cache.sock"),
        ({"lmcache.mp.url": "cache:7000", "lmcache.mp.port": 1}, "tcp://cache:7000"),
        ({"another.plugin": 1}, "tcp://localhost:5555"),
    ],
)
def test_the_address_is_put_together_from_what_is_given(extra, url):
    assert ConnectorConfig.read(extra).url == url


def test_a_deadline_is_never_longer_than_the_engine_can_bear():
    config = ConnectorConfig.read({"lmcache.mp.mq_timeout": 300.0, "lmcache.mp.heartbeat_interval": 0.5})
    assert (config.timeout_seconds, config.heartbeat_seconds) == (30.0, 0.5)


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"lmcache.mp.prot": 5555}, "did you mean 'lmcache.mp.port'"),
        ({"lmcache.chunk_size": 256}, "known: lmcache.mp.url"),
        ({"lmcache.mp.port": 0}, "1 to 65535"),
        ({"lmcache.mp.port": "http"}, "1 to 65535"),
        ({"lmcache.mp.port": True}, "1 to 65535"),
        ({"lmcache.mp.host": 5}, "text such as"),
        ({"lmcache.mp.host": ""}, "text such as"),
        ({"lmcache.mp.url": "http://cache:8080"}, "ZMQ address"),
        ({"lmcache.mp.url": "cache"}, "ZMQ address"),
        ({"lmcache.mp.host": "tcp://cache:5555"}, "ZMQ address"),
        ({"lmcache.mp.host": "a cache"}, "ZMQ address"),
        ({"lmcache.mp.mq_timeout": "soon"}, "seconds above 0"),
        ({"lmcache.mp.mq_timeout": float("nan")}, "seconds above 0"),
        ({"lmcache.mp.heartbeat_interval": 0}, "seconds above 0"),
    ],
)
def test_a_setting_that_cannot_be_used_is_named_with_what_can(extra, told):
    with pytest.raises(UsageError) as info:
        ConnectorConfig.read(extra)
    assert told in f"{info.value} {info.value.hint}"
    assert next(iter(extra)) in str(info.value)


def make_request(lora=None, media=(), salt=None):
    return SimpleNamespace(
        lora_request=lora and SimpleNamespace(lora_name=lora[0], lora_path=lora[1]),
        mm_features=[
            SimpleNamespace(identifier=name, mm_position=SimpleNamespace(offset=offset, length=length))
            for name, offset, length in media
        ],
        cache_salt=salt,
    )


text = st.text(max_size=3)
requests = st.tuples(
    st.none() | st.tuples(text, text),
    st.lists(st.tuples(text, st.integers(0, 3), st.integers(1, 3)), max_size=2),
    st.none() | text,
)


@example((("", "~0"), [], None), (None, [], None))  # the home of somebody that there is not
@given(requests, requests)
def test_requests_of_another_adapter_medium_or_tenant_never_share_a_key(one, other):
    adapters = Adapters()
    keys = [chunk_keys(request_namespace(ENGINE, make_request(*r), adapters), [1, 2, 3, 4]) for r in (one, other)]
    same = (one[0], one[1], one[2] or "") == (other[0], other[1], other[2] or "")
    assert (keys[0] == keys[1]) is same


def make_adapter(folder, weights=bytes(1 << 12), rank=8):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return folder


def engine_of_tomorrow(monkeypatch):
    """Return what tells adapters apart in an engine that starts when all files here are old."""
    with monkeypatch.context() as patch:
        patch.setattr("lmcache.integration.vllm.utils.time.time", lambda: time.time_ns() / 1e9 + 86_400)
        return Adapters()


def label(adapters, folder):
    return adapters.label(SimpleNamespace(lora_name="a", lora_path=str(folder)))


@pytest.mark.parametrize("change", [{"weights": bytes((1 << 12) - 1) + b"\1"}, {"rank": 16}])
def test_an_adapter_that_was_trained_anew_in_place_is_another_one(tmp_path, monkeypatch, change):
    """COR-3. Its name and its place are the same."""
    make_adapter(tmp_path / "a")
    labels = [label(engine_of_tomorrow(monkeypatch), tmp_path / "a") for _ in range(2)]
    adapters = engine_of_tomorrow(monkeypatch)
    assert label(adapters, tmp_path / "a") == labels[0] == labels[1]
    make_adapter(tmp_path / "a", **change)
    assert len({labels[0], label(adapters, tmp_path / "a"), label(engine_of_tomorrow(monkeypatch), tmp_path / "a")}) == 2


def test_an_adapter_that_is_newer_than_its_engine_or_unreadable_is_that_engines_only(tmp_path):
    """The engine may have loaded what was there before."""
    one, other = Adapters(), Adapters()
    for folder in (tmp_path / "nowhere", make_adapter(tmp_path / "a")):
        assert label(one, folder) == label(one, folder) != label(other, folder)


def test_an_adapter_of_a_repository_is_known_by_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ref = tmp_path / "models--org--a" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("c0ffee")
    assert "c0ffee" in label(engine_of_tomorrow(monkeypatch), "org/a")


def make_vllm_config(folder, num_ranks=1, cache=None, load=None, lora=None, engine="e", rope=1, commit=None, **changes):
    model = {
        "model": str(folder),
        "revision": None,
        "dtype": "bfloat16",
        "quantization": None,
        "hf_config": SimpleNamespace(to_dict=lambda: {"rope_theta": rope}, _commit_hash=commit),
        "multimodal_config": None,
        "seed": 0,
        **changes,
    }
    return SimpleNamespace(
        model_config=SimpleNamespace(**model),
        parallel_config=SimpleNamespace(world_size=num_ranks),
        cache_config=SimpleNamespace(**{"cache_dtype": "auto", "enable_prefix_caching": True, **(cache or {})}),
        load_config=SimpleNamespace(
            **{"load_format": "auto", "model_loader_extra_config": {}, "download_dir": None, **(load or {})}
        ),
        lora_config=lora,
        kv_transfer_config=SimpleNamespace(engine_id=engine),
        instance_id="i",
    )


def engine_namespace(*args, **fields):
    return identify_engine(*args, **fields).namespace


@pytest.mark.parametrize(
    ("changes", "is_replicated", "revision"),
    [
        ({}, False, "abc#9f378cf391430191"),
        ({}, True, "abc#ebf7f71e8dbe5c3f"),
        (
            {
                "quantization": "fp8",
                "original_max_model_len": 8192,
                "cache": {"cache_dtype": "fp8_e5m2"},
                "load": {"load_format": "dummy"},
                "lora": SimpleNamespace(target_modules=["o_proj"]),
            },
            False,
            "abc#13de90f2c0ed9484",
        ),
    ],
)
def test_a_revision_is_what_it_was_in_the_first_version(changes, is_replicated, revision):
    """What engines have stored before an upgrade stays theirs."""
    assert (
        engine_namespace(make_vllm_config("org/model", 2, commit="abc", **changes), BYTES, is_replicated).revision == revision
    )


def test_what_a_revision_is_made_of_is_told_by_name_and_briefly(tmp_path):
    """COR-3. The server's log names what has changed, with both values where they are short."""
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 18))
    config = make_vllm_config(
        tmp_path, cache={"cache_dtype": "fp8_e5m2"}, original_max_model_len=8192, quantization_config={"ignore": ["é"] * 99}
    )
    config.model_config.hf_config.to_dict = lambda: {
        "rope_theta": 1,
        "\ud800" * 99: "\ud800",
        **dict.fromkeys(map(str, range(999))),
    }
    parts = identify_engine(config, BYTES).revision_parts
    told = {name: parts[name] for name in ("dtype", "kv_cache_dtype", "max_model_len", "config.rope_theta", "lora")}
    assert list(told.values()) == ["bfloat16", "fp8_e5m2", "8192", "1", "null"]
    assert len(parts["weights"]) == len(parts["quantization"]) == 16
    request = RegisterKVCache(
        client="0" * 32, namespace=Namespace(model="m", chunk_size=16), layout=BYTES, revision_parts=parts
    )
    assert decode_request(encode(request)).revision_parts == parts


def test_an_engine_with_another_draft_model_has_other_kv(tmp_path):
    """The layers of a draft lie in the same blocks. One without layers of its own is named as the model itself."""
    for name in ("model", "draft", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode() * 100)

    def revision(draft):
        config = make_vllm_config(tmp_path / "model")
        named = draft and SimpleNamespace(model=str(tmp_path / draft), revision=None, hf_config=SimpleNamespace())
        config.speculative_config = SimpleNamespace(draft_model_config=named)
        return engine_namespace(config, BYTES).revision

    assert revision(None) == revision("model") == engine_namespace(make_vllm_config(tmp_path / "model"), BYTES).revision
    revisions = {revision(draft) for draft in (None, "draft", "other")}
    (tmp_path / "draft" / "model.safetensors").write_bytes(b"again" * 100)
    assert len(revisions | {revision("draft")}) == 4


def test_another_checkpoint_in_the_same_folder_is_another_model(tmp_path):
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=1, block_size=1, dtype="u8")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(1 << 18))
    first = engine_namespace(make_vllm_config(tmp_path), layout)
    assert engine_namespace(make_vllm_config(tmp_path), layout) == first
    for change in (
        {"rope": 2},
        {"dtype": "float16"},
        {"quantization": "fp8"},
        {"quantization_config": {"ignore": ["lm_head"]}},
        {"revision": "v2"},
        {"original_max_model_len": 8192},  # LongRoPE takes other factors from some length on
        {"load": {"load_format": "dummy"}},
        {"load": {"model_loader_extra_config": {"tensorizer_uri": "s3://b/v2"}}},
        {"model_weights": "s3://b/v2"},
        {"lora": SimpleNamespace(target_modules=["o_proj"])},
        {"multimodal_config": SimpleNamespace(mm_processor_kwargs={"num_crops": 4})},
    ):
        changed = engine_namespace(make_vllm_config(tmp_path, **change), layout)
        assert changed.revision != first.revision
    weights.write_bytes(bytes((1 << 18) - 1) + b"\1")
    assert engine_namespace(make_vllm_config(tmp_path), layout).revision != first.revision


def test_kinds_of_kv_whose_tensors_look_alike_are_not_shared(tmp_path):
    """COR-3. vLLM keeps all of these in tensors of bytes, with the same shape."""
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=1, block_size=1, dtype="uint8")
    kinds = ("auto", "fp8_e4m3", "fp8_e5m2", "nvfp4", "nvfp4_4over6")
    configs = [make_vllm_config(tmp_path, cache={"cache_dtype": kind}) for kind in kinds]
    assert len({engine_namespace(config, layout).id for config in configs}) == len(kinds)


def test_kv_whose_scales_only_its_engine_knows_is_refused(tmp_path):
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=1, block_size=1, dtype="uint8")
    with pytest.raises(UsageError, match="calculate_kv_scales"):
        engine_namespace(make_vllm_config(tmp_path, cache={"calculate_kv_scales": True}), layout)


def test_kv_that_all_ranks_hold_is_one_shard_and_shared_only_by_as_many_ranks(tmp_path):
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=1, block_size=1, dtype="u8")
    split = [engine_namespace(make_vllm_config(tmp_path, ranks), layout) for ranks in (1, 2)]
    same = [engine_namespace(make_vllm_config(tmp_path, ranks), layout, is_replicated=True) for ranks in (1, 2, 4)]
    assert [namespace.world_size for namespace in (*split, *same)] == [1, 2, 1, 1, 1]
    assert same[0] == split[0]
    assert len({namespace.revision for namespace in same}) == 3


@pytest.mark.parametrize(
    ("kind", "use_mla", "expected"),
    [("MLAAttentionSpec", True, True), ("FullAttentionSpec", True, False), ("MLAAttentionSpec", False, False)],
)
def test_ranks_hold_the_same_only_where_both_the_model_and_its_kv_say_so(kind, use_mla, expected):
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(use_mla=use_mla))
    assert is_replicated(vllm_config, SimpleNamespace(kv_cache_groups=[make_group(kind)])) is expected


def test_a_length_that_vllm_fits_to_the_free_memory_is_no_other_model(tmp_path):
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=1, block_size=1, dtype="u8")
    configs = [make_vllm_config(tmp_path, original_max_model_len=-1, max_model_len=fitted) for fitted in (9000, 9016)]
    assert len({engine_namespace(config, layout).id for config in configs}) == 1


def test_weights_that_are_made_up_are_those_of_their_seed(tmp_path):
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=1, block_size=1, dtype="u8")
    dummies = [make_vllm_config(tmp_path, load={"load_format": "dummy"}, seed=seed) for seed in (0, 0, 1)]
    real = [make_vllm_config(tmp_path, seed=seed) for seed in (0, 1)]
    assert len({engine_namespace(config, layout).id for config in dummies}) == 2
    assert len({engine_namespace(config, layout).id for config in real}) == 1


def test_a_repository_is_known_by_its_commit_or_revision_and_else_its_kv_is_one_engines(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    layout = KVLayout(num_layers=1, num_planes=1, block_bytes=1, block_size=1, dtype="u8")

    def revisions(**changes):
        configs = [make_vllm_config("org/model", engine=engine, **changes) for engine in "ab"]
        return {engine_namespace(config, layout).revision for config in configs}

    assert {revision.partition("#")[0] for revision in revisions(commit="abc")} == {"abc"}
    assert len(revisions(commit="abc")) == len(revisions(revision="v1")) == 1
    assert len(revisions()) == 2
    assert "no commit of org/model is known" in caplog.text
    ref = tmp_path / "models--org--model" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("c0ffee")
    assert {revision.partition("#")[0] for revision in revisions()} == {"c0ffee"}
    # The settings of one repository with the weights of another: only these count.
    assert {revision.partition("#")[0] for revision in revisions(commit="abc", hf_config_path="org/other")} == {"c0ffee"}


@pytest.mark.parametrize(
    ("cache_gb", "has_prefix_cache", "expected"), [(4, True, True), (4, False, True), (0, True, True), (0, False, False)]
)
def test_media_are_told_apart_by_content_unless_both_of_vllms_caches_are_off(tmp_path, cache_gb, has_prefix_cache, expected):
    media = SimpleNamespace(mm_processor_cache_gb=cache_gb)
    config = make_vllm_config(tmp_path, cache={"enable_prefix_caching": has_prefix_cache}, multimodal_config=media)
    assert media_are_hashed(config) is expected
    assert media_are_hashed(make_vllm_config(tmp_path, cache={"enable_prefix_caching": False}))


def make_parallel_config(world_size=1):
    return SimpleNamespace(world_size=world_size, tensor_parallel_size=1, decode_context_parallel_size=1)


def make_group(kind="FullAttentionSpec", is_eagle=False):
    spec = type(kind, (), {"block_size": 16})()
    return SimpleNamespace(kv_cache_spec=spec, layer_names=["layer"], is_eagle_group=is_eagle)


@pytest.mark.parametrize(
    ("groups", "world_size", "told"),
    [
        ([make_group()], 2, "engine of 2 ranks"),
        ([], 1, "KV groups none"),
        ([make_group(), make_group("MambaSpec")], 1, "FullAttentionSpec, MambaSpec"),
        ([make_group("SlidingWindowSpec")], 1, "SlidingWindowSpec"),
        ([make_group("UniformTypeKVCacheSpecs")], 1, "UniformTypeKVCacheSpecs"),
        ([make_group(is_eagle=True)], 1, "with draft layers"),
    ],
)
def test_what_cannot_be_cached_is_refused_by_name(groups, world_size, told):
    pytest.importorskip("torch")
    vllm_config = SimpleNamespace(parallel_config=make_parallel_config(world_size))
    with pytest.raises(UsageError, match=told) as info:
        read_layout({}, vllm_config, SimpleNamespace(kv_cache_groups=groups))
    assert info.value.hint


def test_an_engine_that_registers_no_tensors_is_refused():
    pytest.importorskip("torch")
    vllm_config = SimpleNamespace(parallel_config=make_parallel_config())
    config = SimpleNamespace(kv_cache_groups=[make_group()], num_blocks=4)
    with pytest.raises(LayoutMismatchError, match="no KV tensors"):
        read_layout({"another layer": None}, vllm_config, config)


@pytest.mark.parametrize(("version", "is_warned_of"), [("0.32.0", False), ("0.32.1+cpu", False), ("0.99.0", True)])
def test_a_version_of_vllm_that_was_never_run_is_warned_of_and_used(monkeypatch, caplog, version, is_warned_of):
    """VER-2."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__=version))
    assert software("LMCacheMPConnector") == [f"vllm {version}", "LMCacheMPConnector"]
    assert (f"vLLM {version} was not run with this version of lmcache" in caplog.text) == is_warned_of


class CudaLibrary:
    """A fake of NVIDIA's driver, which supports CUDA 13.2, and whose calls return `status`."""

    def __init__(self, status):
        self._status = status

    def __getattr__(self, name):
        def call(*args):
            if name == "cuDriverGetVersion":
                args[0]._obj.value = 13020
            return self._status

        setattr(self, name, call)
        return call


@pytest.mark.parametrize(
    ("built_for", "status", "expected"),
    [
        ("12.8", 0, ["CUDA 12.8", "driver for CUDA 13.2"]),
        ("12.8", 100, []),  # CUDA_ERROR_NO_DEVICE
        ("12.8", None, []),  # no driver
        (None, 0, []),  # PyTorch for the CPU
    ],
)
def test_a_worker_with_a_gpu_says_for_which_cuda_its_torch_and_its_driver_are(monkeypatch, built_for, status, expected):
    """VER-2."""

    def load(name):
        if status is None:
            raise OSError(f"{name}: cannot open shared object file")
        return CudaLibrary(status)

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.32.0"))
    monkeypatch.setattr(pytest.importorskip("torch").version, "cuda", built_for)
    with monkeypatch.context() as patch:
        patch.setattr("lmcache.transfer.driver.driver", CudaDriver)
        for kind in ("CDLL", "PyDLL"):
            patch.setattr(f"lmcache.transfer.driver.ctypes.{kind}", load)
        told = software("LMCacheMPConnector", is_worker=True)
        assert software("LMCacheMPConnector") == told[:2] == ["vllm 0.32.0", "LMCacheMPConnector"]
    assert told[2:] == expected
