"""Every way to move blocks equals the reference on whatever layout an engine may have: by strides, not by name."""

import os
import random
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")
pytest.importorskip("triton", reason="needs Triton: make setup-vllm")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lmcache.errors import LayoutMismatchError  # noqa: E402
from lmcache.transfer.cpu import CpuCopier, block_plane, joined_plane  # noqa: E402
from lmcache.transfer.kernels import SKIPPED, BlockMover  # noqa: E402
from tests.transfer.layouts import KINDS, random_kv  # noqa: E402


def changed_bytes(before, after):
    return int((before != after).sum())


def check_layout(kind, seed, uses_triton):
    """Move some blocks of one engine into another, from which a part is missing, and compare what both read."""
    rng = random.Random(seed)
    source, target, copy = (random_kv(seed, kind, content) for content in (1, 2, 2))
    layout = source.layout()
    mover, reference = BlockMover(source.planes(), uses_triton), CpuCopier(layout, source.planes())
    size = rng.randint(1, source.num_blocks // 2)
    num_chunks = source.num_blocks // size
    ids = rng.sample(range(source.num_blocks), num_chunks * size)
    chunk_bytes = size * layout.bytes_per_block
    extents = [memoryview(bytearray(chunk_bytes)) for _ in range(num_chunks)]
    before = source.memory.clone()
    reference.gather(ids, extents)
    packed = torch.full((num_chunks * chunk_bytes + 16,), 0xEE, dtype=torch.uint8)
    mover.gather(torch.tensor(ids), packed, range(len(source.planes())), size)
    assert bytes(packed[:-16].tolist()) == b"".join(extents)
    assert bytes(packed[-16:].tolist()) == b"\xee" * 16
    assert torch.equal(source.memory, before)

    skip = rng.randint(0, size)
    end = rng.randint(skip, len(ids))
    places = rng.sample(range(target.num_blocks), end - skip)
    untouched = target.memory.clone()
    CpuCopier(layout, target.planes()).scatter(extents, places, skip)
    for read, expected in zip(target.blocks(places), source.blocks(ids[skip:end]), strict=True):
        assert torch.equal(read, expected)
    others = [block for block in range(target.num_blocks) if block not in places]
    for read, expected in zip(target.blocks(others), copy.blocks(others), strict=True):
        assert torch.equal(read, expected)
    # Nothing of what is nobody's, either.
    moved = sum(read.numel() for read in target.blocks(places))
    assert changed_bytes(untouched, target.memory) <= moved

    padded = [SKIPPED] * skip + places + [SKIPPED] * (len(ids) - end)
    BlockMover(copy.planes(), uses_triton).scatter(torch.tensor(padded), packed, range(len(copy.planes())), size)
    assert torch.equal(copy.memory, target.memory)


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
def test_pytorch_and_the_reference_agree_on_every_layout(kind, seed):
    check_layout(kind, seed, uses_triton=False)


def check_with_triton():
    for number, kind in enumerate(KINDS * 6):
        check_layout(kind, 1000 + number, uses_triton=True)


def test_triton_and_the_reference_agree_on_every_layout():
    """In a process of its own: Triton decides when it is imported whether its interpreter runs."""
    code = "from tests.transfer.test_layouts import check_with_triton; check_with_triton()"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


def test_a_block_of_all_layers_of_llama_8b_is_one_piece_of_2_mib():
    memory = torch.zeros((5, 32, 2, 16, 8, 128), dtype=torch.bfloat16)
    plane = joined_plane(memory.unbind(1), 5)
    assert plane is not None
    assert tuple(plane.shape) == (5, 2 << 20)
    plane[3] = 1
    assert [bool((memory[block].view(torch.uint8) == 1).all()) for block in range(5)] == [False] * 3 + [True, False]


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(lambda m: m.unbind(1)[:1], id="one layer"),
        pytest.param(lambda m: m.unbind(1)[::-1], id="in another order"),
        pytest.param(lambda m: [m[:, 0], m[:, 1], m[:, 3]], id="uneven"),
        pytest.param(lambda m: m.unbind(1)[::2], id="with others between them"),
        pytest.param(lambda m: [m[:, 0], m[:, 1].clone()], id="of two memories"),
        pytest.param(lambda m: [m[:, 0], m[:, 1].flatten(1)], id="of two shapes"),
        pytest.param(lambda m: [m[:, 0], m[:, 1].view(torch.float16)], id="of two types"),
        pytest.param(lambda m: m.transpose(0, 1).contiguous().unbind(0), id="layer by layer"),
        pytest.param(lambda m: m[:, :, :, :2].unbind(1), id="with gaps within a block"),
    ],
)
def test_layers_that_do_not_lie_together_are_not_joined(layers):
    memory = torch.zeros((6, 4, 3, 5), dtype=torch.bfloat16)
    assert joined_plane(memory.unbind(1), 6) is not None
    assert joined_plane(layers(memory), 6) is None


def test_heads_outside_of_the_layers_are_one_block_too():
    """FlashAttention's HND in vLLM 0.25: [blocks, heads, layers, 2, tokens, values]; by layer no block is in one piece."""
    layers = torch.zeros((6, 2, 4, 2, 16, 8)).permute(2, 0, 3, 4, 1, 5).unbind(0)
    plane = joined_plane(layers, 6)
    assert plane is not None
    assert tuple(plane.shape) == (6, 2 * 4 * 2 * 16 * 8 * 4)
    with pytest.raises(LayoutMismatchError, match="does not keep the bytes"):
        block_plane(layers[0], 6)
