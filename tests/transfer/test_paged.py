"""Paged KV without an engine holds what it was given, and tells of copies that did not happen; on each device that is here."""

import os
import random

import pytest

from lmcache.errors import UsageError
from lmcache.layout import KVLayout

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lmcache.transfer import paged  # noqa: E402
from lmcache.transfer.driver import CudaError, driver  # noqa: E402
from lmcache.transfer.paged import BLOT, DeviceMemoryError, PagedKV, errors_of_torch, open_device  # noqa: E402

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])


def make_kv(device, num_layers=3, block_bytes=64, blocks_per_chunk=4, num_chunks=3):
    layout = KVLayout(num_layers=num_layers, num_planes=1, block_bytes=block_bytes, block_size=16, dtype="bfloat16")
    return PagedKV(layout, blocks_per_chunk, num_chunks, device, staging_bytes=1 << 20)


def chunk_bytes_of(kv):
    return kv.blocks_per_chunk * kv.layout.bytes_per_block


def split(whole, size):
    return [whole[at : at + size] for at in range(0, len(whole), size)]


def fetched(kv, num_chunks):
    whole = memoryview(bytearray(num_chunks * chunk_bytes_of(kv)))
    kv.fetch(whole)
    return whole


@on_each_device
@settings(max_examples=30)
@given(st.data())
def test_chunks_go_through_blocks_to_extents_and_back(device, data):
    num_chunks = data.draw(st.integers(1, 4))
    kv = make_kv(
        device,
        data.draw(st.integers(1, 4)),
        data.draw(st.sampled_from([1, 7, 64, 4096])),
        data.draw(st.integers(1, 5)),
        num_chunks,
    )
    size = chunk_bytes_of(kv)
    content = memoryview(bytearray(random.Random(data.draw(st.integers(0, 99))).randbytes(num_chunks * size)))
    indices = data.draw(st.lists(st.sampled_from(range(num_chunks)), min_size=1, unique=True))
    kv.fill(content)
    extents = [memoryview(bytearray(size)) for _ in indices]
    kv.store(extents, indices)
    assert [bytes(extent) for extent in extents] == [bytes(content[i * size : (i + 1) * size]) for i in indices]

    kv.blot()
    num_loaded = len(indices)
    kv.load([extent.toreadonly() for extent in extents])
    back = split(fetched(kv, num_chunks), size)
    assert [bytes(chunk) for chunk in back[:num_loaded]] == [bytes(extent) for extent in extents]
    assert all(bytes(chunk) == bytes([BLOT]) * size for chunk in back[num_loaded:])


@on_each_device
def test_blocks_are_in_random_order_and_chosen_anew_each_time(device):
    kv = make_kv(device, blocks_per_chunk=16)
    seen = set()
    for _ in range(5):
        kv.fill(memoryview(bytearray(3 * chunk_bytes_of(kv))))
        assert len(set(kv._ids)) == len(kv._ids)
        assert kv._ids != sorted(kv._ids)
        seen.add(tuple(kv._ids))
    assert len(seen) == 5


@on_each_device
def test_a_load_that_does_nothing_leaves_wrong_bytes(device):
    kv = make_kv(device)
    kv.fill(memoryview(bytearray(3 * chunk_bytes_of(kv))))
    kv.blot()
    kv.load([])
    assert set(fetched(kv, 3)) == {BLOT}


@on_each_device
def test_plain_copies_go_both_ways(device):
    kv = make_kv(device)
    size = chunk_bytes_of(kv)
    extents = [memoryview(bytearray(os.urandom(size))) for _ in range(3)]
    before = [bytes(extent) for extent in extents]
    copy = kv.flat_copier(extents)
    copy(False)
    for extent in extents:
        extent[:] = bytes(size)
    copy(True)
    assert [bytes(extent) for extent in extents] == before


def test_nothing_is_pinned_for_host_memory():
    assert make_kv("cpu").copier.pin_report() is None


# -- a device that cannot be used -------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built for CUDA")
def test_a_torch_without_cuda_is_named():
    with pytest.raises(UsageError, match=r"no NVIDIA GPU can be used here: PyTorch .* is built without CUDA") as caught:
        open_device("cuda")
    assert "install a build of PyTorch for CUDA" in caught.value.hint


def has_driver():
    try:
        driver()
    except CudaError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="NVIDIA's driver is here")
def test_a_missing_driver_is_named(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UsageError, match=r"libcuda\.so\.1 cannot be loaded") as caught:
        open_device("cuda")
    assert "install NVIDIA's driver" in caught.value.hint


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_machine_without_a_gpu_is_told_apart_from_a_full_one(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(paged, "driver", lambda: None)

    def fail(text):
        def zeros(*_, **__):
            raise RuntimeError(text)

        monkeypatch.setattr(torch, "zeros", zeros)

    fail("No CUDA GPUs are available\nmore")
    with pytest.raises(UsageError, match=r"No CUDA GPUs are available$") as caught:
        open_device("cuda")
    assert "CUDA_VISIBLE_DEVICES" in caught.value.hint
    fail("CUDA error: out of memory")
    with pytest.raises(DeviceMemoryError, match="no room"):
        open_device("cuda")


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (
            torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore"),
            DeviceMemoryError,
            "Tried to allocate",
        ),
        (RuntimeError("CUDA error: an illegal memory access"), CudaError, "an illegal memory access"),
        (FileNotFoundError(2, "No such file", "cc"), CudaError, "cc"),
    ],
)
def test_what_pytorch_raises_becomes_ours(raised, expected, text):
    with pytest.raises(expected, match=text) as caught, errors_of_torch():
        raise raised
    assert "more" not in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 1
