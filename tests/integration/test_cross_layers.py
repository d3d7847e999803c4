"""Blocks that hold all layers: read as vLLM 0.25 and 0.32 lay them out, asked for by a setting, refused where they differ."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")
pytest.importorskip("vllm", reason="needs vLLM: make setup-vllm")

from lmcache.errors import LayoutMismatchError  # noqa: E402
from lmcache.integration.vllm.worker import layers_of, read_layout  # noqa: E402
from lmcache.transfer.cpu import CpuCopier  # noqa: E402

# What vLLM imports warns of itself.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NUM_LAYERS, NUM_BLOCKS, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE = 4, 6, 16, 2, 8
NAMES = [f"model.layers.{number}.attn" for number in range(NUM_LAYERS)]
PAGE_BYTES = 2 * BLOCK_SIZE * NUM_HEADS * HEAD_SIZE * 2


class FullAttentionSpec:
    """What the worker reads of vLLM 0.25's, whose name it goes by."""

    block_size = BLOCK_SIZE
    real_page_size_bytes = PAGE_BYTES


class MLAAttentionSpec:
    """The same, of a latent vector."""

    block_size = BLOCK_SIZE
    real_page_size_bytes = BLOCK_SIZE * HEAD_SIZE * 2


class Backend:
    """An attention backend of vLLM 0.25, as far as it says where its axes lie."""

    def __init__(self, shape, order):
        self.shape, self.order = shape, order

    def get_name(self):
        return "A_BACKEND"

    def get_kv_cache_stride_order(self, include_num_layers_dimension):
        assert include_num_layers_dimension
        if self.order is None:
            raise NotImplementedError
        return self.order


FULL = (NUM_BLOCKS, 2, BLOCK_SIZE, NUM_HEADS, HEAD_SIZE)
IN_PARTS = (2 * NUM_BLOCKS, 2, BLOCK_SIZE // 2, NUM_HEADS, HEAD_SIZE)
LATENT = (NUM_BLOCKS, BLOCK_SIZE, HEAD_SIZE)
BACKENDS = {
    "FlashAttention, NHD": Backend(FULL, (1, 0, 2, 3, 4, 5)),
    "FlashAttention, HND": Backend(FULL, (1, 4, 0, 2, 3, 5)),
    "FlashInfer, HND": Backend(FULL, (1, 2, 4, 0, 3, 5)),
    "FlexAttention": Backend(FULL, (1, 0, 3, 2, 4, 5)),
    "a kernel with smaller blocks": Backend(IN_PARTS, (1, 0, 2, 3, 4, 5)),
    "MLA": Backend(LATENT, (1, 0, 2, 3)),
}


def allocate(backend):
    """Return the tensor of all layers, as `allocate_uniform_kv_caches` of vLLM 0.25.1 makes it."""
    shape = (NUM_LAYERS, *backend.shape)
    order = backend.order or range(len(shape))
    return torch.zeros([shape[axis] for axis in order], dtype=torch.bfloat16)


def kv_cache_config(spec=FullAttentionSpec, names=NAMES):
    return SimpleNamespace(
        num_blocks=NUM_BLOCKS,
        kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec(), layer_names=names, is_eagle_group=False)],
        kv_cache_tensors=[SimpleNamespace(shared_by=[name]) for name in names],
    )


def vllm_config(backend, extra=None):
    return SimpleNamespace(
        parallel_config=SimpleNamespace(world_size=1, tensor_parallel_size=1, decode_context_parallel_size=1, rank=0),
        model_config=SimpleNamespace(
            model="m", revision=None, dtype="bfloat16", quantization=None, hf_config=SimpleNamespace(to_dict=dict)
        ),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        compilation_config=SimpleNamespace(
            static_forward_context={name: SimpleNamespace(attn_backend=backend) for name in NAMES}
        ),
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra or {}, engine_id="e"),
        instance_id="i",
    )


def read(backend, tensor, spec=FullAttentionSpec):
    config = kv_cache_config(spec)
    return read_layout(layers_of(tensor, backend, config), vllm_config(backend), config)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_tensor_of_all_layers_is_one_plane_whatever_the_order_of_its_axes(name):
    backend = BACKENDS[name]
    spec = MLAAttentionSpec if name == "MLA" else FullAttentionSpec
    tensor = allocate(backend)
    tensor.view(torch.int16).copy_(torch.arange(tensor.numel()).view(tensor.shape))
    layout, planes = read(backend, tensor, spec)
    assert (layout.num_layers, layout.num_planes, layout.layers_per_block) == (1, 1, NUM_LAYERS)
    assert layout.block_bytes == NUM_LAYERS * spec.real_page_size_bytes == layout.bytes_per_block
    chunk = memoryview(bytearray(2 * layout.block_bytes))
    CpuCopier(layout, planes).gather([4, 1], [chunk])
    by_block = tensor.view(torch.uint8).reshape(NUM_BLOCKS, -1)
    assert bytes(chunk) == bytes(by_block[[4, 1]].flatten().tolist())


def test_every_order_of_axes_has_a_fingerprint_of_its_own_also_that_by_layer():
    prints = [read(backend, allocate(backend))[0].fingerprint for name, backend in BACKENDS.items() if name != "MLA"]
    by_layer = {name: torch.zeros(FULL, dtype=torch.bfloat16) for name in NAMES}
    layout, _ = read_layout(by_layer, vllm_config(BACKENDS["FlashAttention, NHD"]), kv_cache_config())
    assert (layout.num_layers, layout.layers_per_block) == (NUM_LAYERS, 1)
    assert layout.bytes_per_block == NUM_LAYERS * PAGE_BYTES
    assert len({layout.fingerprint, *prints}) == 1 + len(prints)


def test_a_backend_that_keeps_layers_outermost_is_read_layer_by_layer():
    backend = Backend(FULL, None)
    layout, planes = read(backend, allocate(backend))
    assert (layout.num_layers, layout.layers_per_block, len(planes)) == (NUM_LAYERS, 1, NUM_LAYERS)


@pytest.mark.parametrize(
    ("backend", "tensor", "told"),
    [
        pytest.param(BACKENDS["FlashAttention, NHD"], torch.zeros(6, 5, 2, 16, 2, 8), "of 4 layers", id="another layer"),
        pytest.param(BACKENDS["MLA"], torch.zeros(6, 4, 2, 16, 2, 8), r"in the order \[1, 0, 2, 3\]", id="other axes"),
        pytest.param(Backend(FULL, (1, 0, 2, 3, 4, 4)), torch.zeros(6, 4, 2, 16, 2, 8), "in the order", id="no order"),
        pytest.param(BACKENDS["FlashAttention, NHD"], torch.zeros(6, 4, 2, 16, 2, 8), "8192 bytes, .* says 4096", id="size"),
        pytest.param(BACKENDS["FlashAttention, NHD"], torch.zeros(7, 4, 2, 16, 2, 8), "6 blocks together", id="blocks"),
    ],
)
def test_a_tensor_that_is_not_what_the_configuration_says_is_refused(backend, tensor, told):
    with pytest.raises(LayoutMismatchError, match=told):
        read(backend, tensor)


# -- vLLM 0.32 -------------------------------------------------------------------------------------


def allocate_as_vllm(layout_name):
    """Return the tensors that vLLM 0.32 itself makes in one of its layouts, and its configuration of them."""
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        KVCacheTensor,
        compute_layout_strides,
    )
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

    layout = KVCacheLayout[layout_name]
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=NUM_HEADS, head_size=HEAD_SIZE, dtype=torch.bfloat16)
    layer_stride, block_stride, *_ = compute_layout_strides(spec, NUM_BLOCKS, NUM_LAYERS, layout)
    place = KVCacheTensor(NUM_LAYERS * NUM_BLOCKS * spec.page_size_bytes, NAMES, layer_stride, block_stride)
    config = KVCacheConfig(NUM_BLOCKS, [place], [KVCacheGroupSpec(NAMES, spec)])
    return allocate_kv_cache(config, torch.device("cpu"), layout), config


@pytest.mark.parametrize(
    ("layout_name", "layers_per_block"), [("LBNHC", 1), ("LBHNC", 1), ("BLNHC", 4), ("BLHNC", 4), ("BHLNC", 4)]
)
def test_each_layout_of_vllm_is_read_by_its_strides(layout_name, layers_per_block):
    tensors, config = allocate_as_vllm(layout_name)
    for number, tensor in enumerate(tensors.values()):
        tensor.fill_(number + 1)
    layout, planes = read_layout(tensors, vllm_config(BACKENDS["MLA"]), config)
    assert (layout.layers_per_block, layout.num_layers, layout.num_planes) == (layers_per_block, 4 // layers_per_block, 1)
    assert layout.block_bytes == PAGE_BYTES * layers_per_block
    for plane in planes:
        plane[3] = 0
    for number, tensor in enumerate(tensors.values()):
        values = tensor.float().flatten(1).mean(1).tolist()
        assert values == [0 if block == 3 else number + 1 for block in range(NUM_BLOCKS)]


def test_a_layout_whose_blocks_are_in_pieces_is_refused_with_one_that_works():
    tensors, config = allocate_as_vllm("LHBNC")
    with pytest.raises(LayoutMismatchError, match="6 blocks together") as caught:
        read_layout(tensors, vllm_config(BACKENDS["MLA"]), config)
    assert "VLLM_KV_CACHE_LAYOUT" in caught.value.hint


@pytest.mark.parametrize(
    ("extra", "supported", "resolved"),
    [
        pytest.param({"lmcache.mp.cross_layer_blocks": True}, ["LBNHC", "LBHNC", "BLNHC"], "BLNHC", id="asked for"),
        pytest.param({"lmcache.mp.cross_layer_blocks": True}, ["LBHNC"], "LBHNC", id="not offered, as on a CPU"),
        pytest.param({}, ["LBNHC", "LBHNC", "BLNHC"], "LBNHC", id="not asked for"),
    ],
)
def test_vllm_joins_layers_where_that_is_asked_for_and_a_backend_can(monkeypatch, extra, supported, resolved):
    from vllm.config import KVTransferConfig
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    transfer = KVTransferConfig(kv_connector="LMCacheMPConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    config = SimpleNamespace(cache_config=SimpleNamespace(kv_cache_layout=None), kv_transfer_config=transfer)
    assert resolve_kv_cache_layout(config, [supported]).name == resolved


def test_vllm_for_the_cpu_reads_no_blocks_that_hold_all_layers():
    """Why no test with a real engine runs on them here."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert [layout.name for layout in CPUAttentionBackend.supported_kv_cache_layouts()] == ["LBHNC"]


class Client:
    """A fake of the connection to a server, which the worker tells what it has registered."""

    def __init__(self, *args, **options):
        self.layout = None

    def watch_mapping(self, watch):
        pass

    def watch_pins(self, ask):
        assert ask() is None

    def register(self, namespace, layout, *args, **options):
        assert namespace.layout == layout.fingerprint
        self.layout, self.revision_parts = layout, options["revision_parts"]
        return SimpleNamespace(bytes_per_token=1024, l1_tokens=1)


def make_connector(monkeypatch, extra):
    """The worker's half of the connector."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

    from lmcache.integration.vllm import lmcache_mp_connector

    monkeypatch.setattr(lmcache_mp_connector, "KVCacheClient", Client)
    config = vllm_config(BACKENDS["FlashAttention, NHD"], extra)
    return lmcache_mp_connector.LMCacheMPConnector(config, KVConnectorRole.WORKER, kv_cache_config())


@pytest.mark.parametrize("extra", [{}, {"lmcache.mp.cross_layer_blocks": False}, {"lmcache.mp.cross_layer_blocks": True}])
def test_the_setting_is_what_vllm_is_told(monkeypatch, extra):
    connector = make_connector(monkeypatch, extra)
    is_wanted = any(extra.values())
    assert connector.prefer_cross_layer_blocks is is_wanted
    assert connector.get_required_kvcache_layout(vllm_config(None, extra)) == ("BLNHC" if is_wanted else None)


WANTED = {"lmcache.mp.cross_layer_blocks": True}


def test_the_tensor_of_all_layers_is_registered_with_the_server(monkeypatch, caplog):
    connector, backend = make_connector(monkeypatch, WANTED), BACKENDS["FlashAttention, NHD"]
    connector.register_cross_layers_kv_cache(allocate(backend), backend)
    layout = connector._worker._client.layout
    assert (layout.layers_per_block, layout.block_bytes) == (NUM_LAYERS, NUM_LAYERS * PAGE_BYTES)
    assert connector._worker._client.revision_parts["kv_cache_dtype"] == "auto"
    assert "cross_layer_blocks" not in caplog.text


@pytest.mark.parametrize("extra", [{}, WANTED])
def test_layers_that_vllm_keeps_apart_are_cached_all_the_same_and_told_of_if_that_was_not_wanted(monkeypatch, caplog, extra):
    connector = make_connector(monkeypatch, extra)
    connector.register_kv_caches({name: torch.zeros(FULL, dtype=torch.bfloat16) for name in NAMES})
    assert connector._worker._client.layout.num_layers == NUM_LAYERS
    told = [record.getMessage() for record in caplog.records if "cross_layer_blocks" in record.getMessage()]
    assert len(told) == len(extra)


def test_an_engine_whose_tensor_of_all_layers_is_not_understood_serves_without_the_cache(monkeypatch, caplog):
    connector, backend = make_connector(monkeypatch, WANTED), BACKENDS["FlashAttention, NHD"]
    connector.register_cross_layers_kv_cache(allocate(backend)[:, :3], backend)
    assert connector._worker._client.layout is None
    assert "of 4 layers" in connector.get_handshake_metadata().hello.refusal
    assert "serving without the KV cache: the tensor of all layers" in caplog.text


@pytest.mark.parametrize("is_native", [True, False])
def test_an_engine_that_requires_the_fast_way_does_not_start_without_it(monkeypatch, is_native):
    """INS-2. The copier is the CPU's; that it is the slow one is made up."""
    monkeypatch.setattr(CpuCopier, "is_native", is_native)
    connector = make_connector(monkeypatch, {"lmcache.mp.require_native": True})
    kv_caches = {name: torch.zeros(FULL, dtype=torch.bfloat16) for name in NAMES}
    if is_native:
        connector.register_kv_caches(kv_caches)
        assert connector._worker._client.layout is not None
    else:
        with pytest.raises(ValueError, match=r"lmcache\.mp\.require_native: .* hint: "):
            connector.register_kv_caches(kv_caches)
        assert connector._worker._client.layout is None
