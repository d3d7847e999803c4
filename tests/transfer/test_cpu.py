"""The reference copier gathers the documented bytes, and scattering changes nothing else."""

import pytest

from lmcache.errors import LayoutMismatchError
from lmcache.layout import KVLayout

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lmcache.transfer.cpu import CpuCopier, block_plane, block_planes  # noqa: E402

DTYPES = [torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64]


class Engine:
    """Random KV: pieces of odd sizes, with bytes between them that are nobody's to touch."""

    def __init__(self, num_layers, num_planes, num_blocks, piece_bytes, gap_bytes, seed):
        generator = torch.Generator().manual_seed(seed)
        row = piece_bytes + gap_bytes
        self.raw = torch.randint(
            0,
            256,
            (num_layers * num_planes, num_blocks, row),
            dtype=torch.uint8,
            generator=generator,
        )
        self.layout = KVLayout(
            num_layers=num_layers,
            num_planes=num_planes,
            block_bytes=piece_bytes,
            block_size=16,
            dtype="uint8",
        )
        self.copier = CpuCopier(self.layout, [plane[:, :piece_bytes] for plane in self.raw])


@st.composite
def engines_and_blocks(draw):
    engine = Engine(
        num_layers=draw(st.integers(1, 4)),
        num_planes=draw(st.integers(1, 2)),
        num_blocks=draw(st.integers(1, 24)),
        piece_bytes=draw(st.integers(1, 67)),
        gap_bytes=draw(st.sampled_from([0, 0, 3])),
        seed=draw(st.integers(0, 2**31)),
    )
    blocks_per_chunk = draw(st.integers(1, engine.copier.num_blocks))
    ids = draw(st.permutations(range(engine.copier.num_blocks)))
    num_chunks = draw(st.integers(1, engine.copier.num_blocks // blocks_per_chunk))
    return engine, blocks_per_chunk, ids[: num_chunks * blocks_per_chunk]


def new_extents(engine, blocks_per_chunk, num_blocks):
    length = blocks_per_chunk * engine.layout.bytes_per_block
    return [memoryview(bytearray(length)) for _ in range(num_blocks // blocks_per_chunk)]


def expected_chunk(engine, chunk_ids):
    """The layout as `transfer/base.py` states it, byte by byte."""
    size = engine.layout.block_bytes
    return b"".join(bytes(plane[block, :size].tolist()) for plane in engine.raw for block in chunk_ids)


@settings(deadline=None, max_examples=60)
@given(engines_and_blocks(), st.data())
def test_gather_yields_the_documented_layout_and_scatter_brings_it_back(case, data):
    engine, blocks_per_chunk, ids = case
    before = engine.raw.clone()
    extents = new_extents(engine, blocks_per_chunk, len(ids))
    engine.copier.gather(ids, extents)
    for index, extent in enumerate(extents):
        assert extent.tobytes() == expected_chunk(engine, ids[index * blocks_per_chunk : (index + 1) * blocks_per_chunk])
    assert torch.equal(engine.raw, before)

    skip = data.draw(st.integers(0, len(ids)), label="skip")
    end = data.draw(st.integers(skip, len(ids)), label="end")
    written = ids[skip:end]
    for plane in engine.raw:
        plane[written, : engine.layout.block_bytes] ^= 0xFF
    engine.copier.scatter([extent.toreadonly() for extent in extents], written, skip)
    assert torch.equal(engine.raw, before)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(DTYPES),
    st.permutations([1, 2, 3]),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 6),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_plane_is_the_tensors_own_memory_in_any_order_of_inner_axes(dtype, order, sizes, blocks, parts, block_outer):
    if block_outer:
        parts = 1
    physical = torch.zeros((2, blocks * parts, *sizes), dtype=dtype)
    if block_outer:
        physical = physical.transpose(0, 1).contiguous().transpose(0, 1)
    layer = physical[1].permute(0, *order)
    plane = block_plane(layer, blocks)
    assert plane.shape == (blocks, layer.numel() * layer.element_size() // blocks)
    block = blocks - 1
    plane[block] = 1
    touched = layer.clone(memory_format=torch.contiguous_format).view(torch.uint8).reshape(blocks, -1)
    assert bool((touched[block] == 1).all())
    assert int((physical.contiguous().flatten().view(torch.uint8) == 1).sum()) == plane.shape[1]


def test_a_plane_needs_each_blocks_bytes_together():
    heads_outside_blocks = torch.zeros(4, 6, 16, 8).transpose(0, 1)
    with pytest.raises(LayoutMismatchError, match="6 blocks together"):
        block_plane(heads_outside_blocks, 6)
    with pytest.raises(LayoutMismatchError, match="4 blocks together"):
        block_plane(torch.zeros(6, 2), 4)
    split_and_padded = torch.zeros(8, 20)[:, :16]
    with pytest.raises(LayoutMismatchError, match="4 blocks together"):
        block_plane(split_and_padded, 4)


@pytest.mark.parametrize(
    ("ids", "lengths", "skip"),
    [
        ([0, 1], [19, 19], 0),
        ([0, 1], [40, 20], 0),
        ([0, 1, 2], [40], 0),
        ([0, 1], [40], 1),
        ([0, 9], [40], 0),
        ([-1, 0], [40], 0),
        ([0], [], 0),
    ],
)
def test_what_does_not_fit_is_refused_and_copies_nothing(ids, lengths, skip):
    engine = Engine(num_layers=2, num_planes=1, num_blocks=9, piece_bytes=10, gap_bytes=0, seed=1)
    before = engine.raw.clone()
    extents = [memoryview(bytearray(b"\x55" * length)) for length in lengths]
    with pytest.raises(LayoutMismatchError):
        engine.copier.scatter(extents, ids, skip)
    if skip == 0:
        with pytest.raises(LayoutMismatchError):
            engine.copier.gather(ids, extents)
    assert torch.equal(engine.raw, before)
    assert all(set(extent) <= {0x55} for extent in extents)


def test_planes_that_are_not_the_layouts_are_refused():
    layout = KVLayout(num_layers=2, num_planes=1, block_bytes=8, block_size=16, dtype="uint8")
    with pytest.raises(LayoutMismatchError, match="1 planes"):
        CpuCopier(layout, [torch.zeros(4, 8, dtype=torch.uint8)])
    with pytest.raises(LayoutMismatchError, match=r"\[4, 9\]"):
        CpuCopier(layout, [torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 9, dtype=torch.uint8)])


def test_keys_and_values_that_lie_apart_are_two_planes():
    kv = torch.arange(2 * 5 * 3 * 4, dtype=torch.int16).view(2, 5, 3, 4)
    planes = block_planes(kv, 5)
    assert [tuple(plane.shape) for plane in planes] == [(5, 24), (5, 24)]
    assert all(bytes(planes[part][2].tolist()) == kv[part, 2].numpy().tobytes() for part in range(2))
    assert len(block_planes(kv.transpose(0, 1).contiguous(), 5)) == 1
