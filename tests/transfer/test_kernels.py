"""Triton's kernel, run by its interpreter, and PyTorch's way move blocks as the reference does."""

import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")
pytest.importorskip("triton", reason="needs Triton: make setup-vllm")

from lmcache.layout import KVLayout  # noqa: E402
from lmcache.transfer.cpu import CpuCopier  # noqa: E402
from lmcache.transfer.kernels import SKIPPED, BlockMover  # noqa: E402

# (layers, blocks, bytes of a block, bytes between blocks, blocks a chunk): words of 8, 4, 2 and 1 bytes, and several rounds.
SHAPES = [
    (3, 9, 64, 0, 2),
    (2, 7, 48, 16, 3),
    (4, 6, 20, 4, 1),
    (1, 5, 6, 2, 5),
    (2, 8, 7, 0, 4),
    (2, 5, 16 << 10, 0, 2),
    (1, 3, 80 << 10, 0, 1),
]


def planes_of(num_layers, num_blocks, block_bytes, gap_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (num_layers, num_blocks, block_bytes + gap_bytes), dtype=torch.uint8, generator=generator)
    return raw, [layer[:, :block_bytes] for layer in raw]


def check_like_the_reference(uses_triton):
    """Gather and scatter some blocks, whole chunks and parts of them, all planes and some, and compare with `CpuCopier`."""
    for seed, (num_layers, num_blocks, block_bytes, gap_bytes, size) in enumerate(SHAPES):
        raw, planes = planes_of(num_layers, num_blocks, block_bytes, gap_bytes, seed)
        layout = KVLayout(num_layers=num_layers, num_planes=1, block_bytes=block_bytes, block_size=16, dtype="uint8")
        mover, copier = BlockMover(planes, uses_triton), CpuCopier(layout, planes)
        num_chunks = num_blocks // size
        ids = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed))[: num_chunks * size]
        extents = [memoryview(bytearray(layout.chunk_bytes(16 * size))) for _ in range(num_chunks)]
        copier.gather(ids.tolist(), extents)

        buffer = torch.full((num_chunks * len(extents[0]) + 32,), 0xEE, dtype=torch.uint8)
        mover.gather(ids, buffer, range(num_layers), size)
        assert bytes(buffer[:-32].tolist()) == b"".join(extents)
        assert bytes(buffer[-32:].tolist()) == b"\xee" * 32
        plane_bytes = size * block_bytes
        for layer in range(num_layers):
            mover.gather(ids[:size], buffer, range(layer, layer + 1), size)
            assert bytes(buffer[:plane_bytes].tolist()) == bytes(extents[0][layer * plane_bytes :][:plane_bytes])

        wanted = [block if number % 3 else SKIPPED for number, block in enumerate(ids.tolist())]
        target_raw, target = planes_of(num_layers, num_blocks, block_bytes, gap_bytes, seed + 100)
        expected = target_raw.clone()
        for block in wanted:
            if block != SKIPPED:
                expected[:, block, :block_bytes] = raw[:, block, :block_bytes]
        packed = torch.frombuffer(bytearray(b"".join(extents)), dtype=torch.uint8)
        BlockMover(target, uses_triton).scatter(torch.tensor(wanted), packed, range(num_layers), size)
        assert torch.equal(target_raw, expected)


def test_pytorch_moves_blocks_as_the_reference_does():
    check_like_the_reference(uses_triton=False)


def test_triton_moves_blocks_as_the_reference_does():
    """In a process of its own: Triton decides when it is imported whether its interpreter runs."""
    code = "from tests.transfer.test_kernels import check_like_the_reference; check_like_the_reference(True)"
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("exc", "told"),
    [
        (RuntimeError("Failed to find C compiler"), "does not work here (RuntimeError('Failed to find C compiler'))"),
        (ModuleNotFoundError("No module named 'triton'"), "is not installed"),
    ],
)
def test_where_triton_does_not_work_pytorch_takes_over_and_that_is_told(monkeypatch, caplog, exc, told):
    def fail(*args):
        raise exc

    monkeypatch.setattr("lmcache.transfer.triton_kernel.TritonMover", fail)
    check_like_the_reference(uses_triton=None)
    assert {record.getMessage() for record in caplog.records} == {
        f"Triton {told}: KV blocks are gathered by PyTorch, one launch a layer, which is slower"
    }
    with pytest.raises(type(exc)):
        BlockMover([torch.zeros(1, 16, dtype=torch.uint8)], uses_triton=True)
