"""The GPU's copier equals the reference, orders itself with the model's stream, and stops where it is told to. Needs a GPU."""

import mmap
import threading
import time
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lmcache.layout import KVLayout  # noqa: E402
from lmcache.transfer.base import CancelledTransferError, StuckTransferError  # noqa: E402
from lmcache.transfer.cpu import CpuCopier  # noqa: E402
from lmcache.transfer.cuda import CudaCopier, wait_for  # noqa: E402
from lmcache.transfer.driver import CudaError, driver  # noqa: E402
from lmcache.transfer.pinning import PoolPinner, address_of  # noqa: E402
from tests.transfer.layouts import KINDS, random_kv  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MIB = 1 << 20


class Case:
    """The same random KV on the device and in host memory, and extents in a shared mapping."""

    def __init__(self, num_planes, num_blocks, block_bytes, gap_bytes, size, seed, staging_bytes=1 * MIB, uses_triton=None):
        generator = torch.Generator().manual_seed(seed)
        shape = (num_planes, num_blocks, block_bytes + gap_bytes)
        self.host = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        self.device = self.host.cuda()
        self.layout = KVLayout(num_layers=num_planes, num_planes=1, block_bytes=block_bytes, block_size=16, dtype="uint8")
        self.size = size
        self.num_chunks = num_blocks // size
        self.ids = torch.randperm(num_blocks, generator=generator)[: self.num_chunks * size].tolist()
        self.copier = CudaCopier(self.layout, [plane[:, :block_bytes] for plane in self.device], staging_bytes, uses_triton)
        self.reference = CpuCopier(self.layout, [plane[:, :block_bytes] for plane in self.host])
        self.chunk_bytes = size * self.layout.bytes_per_block
        self.pool = memoryview(mmap.mmap(-1, self.chunk_bytes * self.num_chunks * 2 + 4096))

    def extents(self, spread):
        """Extents that are neighbours, or not."""
        step = self.chunk_bytes * (2 if spread else 1)
        return [self.pool[number * step : number * step + self.chunk_bytes] for number in range(self.num_chunks)]

    def expected(self):
        extents = [memoryview(bytearray(self.chunk_bytes)) for _ in range(self.num_chunks)]
        self.reference.gather(self.ids, extents)
        return extents


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_gather_and_scatter_equal_the_reference(data):
    draw = data.draw
    num_blocks = draw(st.integers(1, 40))
    case = Case(
        num_planes=draw(st.integers(1, 6)),
        num_blocks=num_blocks,
        block_bytes=draw(st.sampled_from([1, 6, 7, 20, 64, 4096, 65536, 70000])),
        gap_bytes=draw(st.sampled_from([0, 0, 16, 3])),
        size=draw(st.integers(1, min(num_blocks, 8))),
        seed=draw(st.integers(0, 2**31)),
        staging_bytes=draw(st.sampled_from([4 * 70000 * 8, 8 * MIB])),
        uses_triton=draw(st.booleans()),
    )
    extents, before = case.extents(draw(st.booleans())), case.device.clone()
    case.copier.gather(case.ids, extents)
    assert [bytes(extent) for extent in extents] == [bytes(extent) for extent in case.expected()]
    assert torch.equal(case.device, before)

    skip = draw(st.integers(0, case.size))
    ids = case.ids[skip : draw(st.integers(skip, len(case.ids)))]
    case.device.fill_(0xEE)
    case.host.fill_(0xEE)
    case.copier.scatter([extent.toreadonly() for extent in extents], ids, skip)
    case.reference.scatter(extents, ids, skip)
    assert torch.equal(case.device.cpu(), case.host)


def wait_until_pinned(pinner):
    deadline = time.monotonic() + 30
    while not pinner.is_done:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(KINDS), st.integers(0, 2**31), st.booleans(), st.data())
def test_every_layout_is_copied_as_the_reference_does(kind, seed, uses_triton, data):
    kv = random_kv(seed, kind)
    layout, planes, memory = kv.layout(), kv.planes(), kv.memory.cuda()
    on_device = [memory.as_strided(plane.shape, plane.stride(), plane.storage_offset()) for plane in planes]
    copier, reference = CudaCopier(layout, on_device, 1 * MIB, uses_triton), CpuCopier(layout, planes)
    size = data.draw(st.integers(1, kv.num_blocks // 2), label="size")
    ids = data.draw(st.permutations(range(kv.num_blocks)), label="ids")[: kv.num_blocks // size * size]
    extents, expected = (
        [memoryview(bytearray(size * layout.bytes_per_block)) for _ in range(len(ids) // size)] for _ in range(2)
    )
    reference.gather(ids, expected)
    copier.gather(ids, extents)
    assert [bytes(extent) for extent in extents] == [bytes(extent) for extent in expected]
    skip = data.draw(st.integers(0, size), label="skip")
    end = data.draw(st.integers(skip, len(ids)), label="end")
    memory.fill_(0xEE)
    kv.memory.fill_(0xEE)
    copier.scatter(extents, ids[skip:end], skip)
    reference.scatter(expected, ids[skip:end], skip)
    assert torch.equal(memory.cpu(), kv.memory)


def busy(milliseconds):
    """Keep the current stream busy for about so long."""
    torch.cuda._sleep(int(milliseconds * 1.8e6))


def test_a_store_waits_for_the_producer_and_a_load_for_the_user_of_its_blocks():
    case = Case(4, 64, 65536, 0, 4, seed=1, staging_bytes=8 * MIB)
    extents = case.extents(spread=False)
    for number in range(5):
        busy(20)
        case.device.fill_(number)  # after the delay, on the model's stream
        case.copier.gather(case.ids, extents, after=case.copier.fence() if number % 2 else None)
        assert all(bytes(extent) == bytes([number]) * case.chunk_bytes for extent in extents)
    # A step that still reads the blocks, delayed; then a load into them; then a step that reads what was loaded.
    busy(20)
    seen_before = case.device.clone()
    for extent in extents:
        extent[:] = b"\x77" * case.chunk_bytes
    transfer = case.copier.begin_scatter(extents, case.ids)
    seen_after = case.device.clone()
    transfer.wait(30)
    assert torch.all(seen_before == 4)
    assert torch.all(seen_after[:, case.ids] == 0x77)


def test_blocks_are_used_anew_only_after_a_store_that_still_waits_for_its_step_has_read_them():
    case = Case(4, 64, 65536, 0, 4, seed=6, staging_bytes=4 * MIB)
    extents, expected = case.extents(spread=False), case.expected()
    num_pieces = len(list(case.copier._pieces(case.num_chunks, case.size, 2 * MIB)))
    handed_over, failures = [], []
    pinner = PoolPinner(driver(), driver().current_context(), address_of(case.pool), len(case.pool))
    pinner.start()
    wait_until_pinned(pinner)
    case.copier.mappings = (pinner,)  # where it is not, the store waits for its step
    case.copier.gather(case.ids, extents)  # nothing is compiled or allocated any more
    for extent in extents:
        extent[:] = bytes(case.chunk_bytes)

    def store():
        try:
            case.copier.gather(case.ids, extents, fence, is_cancelled=lambda: bool(handed_over.append(None)))
        except BaseException as exc:
            failures.append(exc)

    busy(200)
    fence = case.copier.fence()
    thread = threading.Thread(target=store)
    thread.start()
    while len(handed_over) < num_pieces and thread.is_alive():
        time.sleep(0.0001)
    assert not fence.query()  # the step is still under way, the whole store is handed over
    time.sleep(0.01)  # until the last piece's launch is over, too
    case.copier.protect_blocks()
    case.device.fill_(0xEE)
    thread.join(timeout=60)
    pinner.close()
    assert not failures
    assert [bytes(extent) for extent in extents] == [bytes(extent) for extent in expected]


def test_loads_and_stores_at_once_do_not_mix():
    case = Case(8, 256, 32768, 0, 8, seed=2, staging_bytes=8 * MIB)
    half = case.num_chunks // 2
    extents = case.extents(spread=False)
    case.copier.gather(case.ids, extents)
    expected = [bytes(extent) for extent in extents]
    stored = [memoryview(bytearray(case.chunk_bytes)) for _ in range(half)]
    copies = 20
    failures = []

    def store():
        try:
            for _ in range(copies):
                case.copier.gather(case.ids[: half * case.size], stored)
                assert [bytes(extent) for extent in stored] == expected[:half]
        except BaseException as exc:
            failures.append(exc)

    thread = threading.Thread(target=store)
    thread.start()
    for _ in range(copies):
        case.copier.begin_scatter(extents[half:], case.ids[half * case.size :]).wait(30)
    thread.join(timeout=60)
    assert not failures
    assert torch.equal(case.device.cpu(), case.host)


def test_a_load_tells_what_is_left_and_holds_back_what_comes_after_it():
    case = Case(4, 64, 65536, 0, 4, seed=7, staging_bytes=4 * MIB)
    extents, compute = case.extents(False), torch.cuda.Stream()
    pinner = PoolPinner(driver(), driver().current_context(), address_of(case.pool), len(case.pool))
    pinner.start()
    wait_until_pinned(pinner)
    case.copier.mappings = (pinner,)  # copies of what is not pinned are not handed over, but made
    for number, extent in enumerate(extents):
        extent[:] = bytes([number + 1]) * case.chunk_bytes
    with torch.cuda.stream(case.copier._loads.copies):
        busy(300)  # the wire is another's
    with torch.cuda.stream(compute):
        transfer = case.copier.begin_scatter(extents, case.ids, holds_back=False)
        assert transfer.bytes_left == len(extents) * case.chunk_bytes
        case.device.clone()  # nothing holds this back
        compute.synchronize()
        assert not transfer.is_done
        transfer.hold_back()
        seen_after = case.device.clone()
        compute.synchronize()
    assert transfer.is_done
    assert transfer.bytes_left == 0
    transfer.wait(30)
    pinner.close()
    assert torch.equal(seen_after, case.device)
    assert set(seen_after[:, case.ids].unique().tolist()) == {number + 1 for number in range(len(extents))}


def test_a_cancelled_store_reads_no_block_any_more():
    case = Case(4, 64, 65536, 0, 4, seed=3, staging_bytes=4 * MIB)
    asked = []
    with pytest.raises(CancelledTransferError):
        case.copier.gather(case.ids, case.extents(False), is_cancelled=lambda: bool(asked.append(None)) or len(asked) > 3)
    assert len(asked) == 4
    case.copier.protect_blocks()
    case.device.fill_(1)
    torch.cuda.synchronize()


def test_a_transfer_that_does_not_end_is_an_error_at_its_deadline():
    busy(400)
    event = torch.cuda.Event()
    event.record()
    with pytest.raises(StuckTransferError, match="did not end within"):
        wait_for(event, 0.05)
    torch.cuda.synchronize()


def test_the_pool_is_pinned_in_pieces_and_copied_across_their_borders():
    pool = memoryview(mmap.mmap(-1, 10 * MIB))
    pinner = PoolPinner(driver(), driver().current_context(), address_of(pool), len(pool), piece_bytes=1 * MIB)
    pinner.start()
    wait_until_pinned(pinner)
    try:
        assert (pinner.pinned_bytes, pinner.unpinned_bytes) == (10 * MIB, 0)
        case = Case(4, 64, 65536, 0, 4, seed=4, staging_bytes=8 * MIB)
        case.copier.mappings = (pinner,)
        extents = [pool[at : at + case.chunk_bytes] for at in range(3 * MIB, 3 * MIB + 6 * case.chunk_bytes, case.chunk_bytes)]
        case.copier.gather(case.ids[: 6 * case.size], extents)
        assert [bytes(extent) for extent in extents] == [bytes(extent) for extent in case.expected()[:6]]
        assert case.copier.unpinned_bytes == 0
    finally:
        pinner.close()
    assert pinner.pinned_bytes == 0


class PartlyPinning:
    """The real driver, but for a limit: only the first pieces can be pinned."""

    def __init__(self):
        self._num_pinned = 0

    def __getattr__(self, name):
        return getattr(driver(), name)

    def register(self, address, num_bytes):
        if self._num_pinned:
            raise CudaError("pinning failed: CUDA_ERROR_OUT_OF_MEMORY (2)")
        self._num_pinned += 1
        driver().register(address, num_bytes)


def test_a_pool_of_which_only_a_part_can_be_pinned_is_copied_right_and_counted():
    pool = memoryview(mmap.mmap(-1, 10 * MIB))
    limited = PartlyPinning()
    pinner = PoolPinner(limited, limited.current_context(), address_of(pool), len(pool), piece_bytes=1 * MIB)
    pinner.start()
    pinner._thread.join(timeout=30)
    try:
        case = Case(4, 64, 65536, 0, 4, seed=6, staging_bytes=8 * MIB)
        case.copier.mappings = (pinner,)
        extents = [pool[at : at + case.chunk_bytes] for at in range(2 * MIB, 2 * MIB + 6 * case.chunk_bytes, case.chunk_bytes)]
        case.copier.gather(case.ids[: 6 * case.size], extents)
        assert [bytes(extent) for extent in extents] == [bytes(extent) for extent in case.expected()[:6]]
        pins = case.copier.pin_report()
        assert (pins.pool_bytes, pins.pinned_bytes, pins.unpinned_bytes) == (10 * MIB, 4 * MIB, 6 * MIB)
        assert 4 * MIB <= pins.unpinned_copied_bytes <= 6 * MIB
        expected = case.device.clone()
        case.device[:, case.ids[: 6 * case.size]] = 0xEE
        case.copier.scatter(extents, case.ids[: 6 * case.size])
        assert torch.equal(case.device, expected)
    finally:
        pinner.close()


def test_pinning_and_storing_spoil_no_graph_that_the_engine_records():
    case = Case(4, 64, 65536, 0, 4, seed=5, staging_bytes=8 * MIB)
    pool = memoryview(mmap.mmap(-1, 512 * MIB))
    pinner = PoolPinner(driver(), driver().current_context(), address_of(pool), len(pool), piece_bytes=4 * MIB)
    extents = case.extents(spread=False)
    failures = []

    def store():
        try:
            prepare()
            for _ in range(20):
                case.copier.gather(case.ids, extents, after=fence)
        except BaseException as exc:
            failures.append(exc)

    prepare, fence = case.copier.prepare_thread(), case.copier.fence()
    source = torch.ones(1000, device="cuda")
    torch.cuda.synchronize()
    thread = threading.Thread(target=store)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pinner.start()
        thread.start()
        target = source * 2
        thread.join(timeout=60)
        wait_until_pinned(pinner)
    graph.replay()
    torch.cuda.synchronize()
    unpinned_bytes = pinner.unpinned_bytes
    pinner.close()
    assert not failures
    assert unpinned_bytes == 0
    assert torch.all(target == 2)
    assert [bytes(extent) for extent in extents] == [bytes(extent) for extent in case.expected()]


def test_a_pool_that_a_new_thread_maps_is_pinned():
    """As the heartbeat does when the server comes after the engine, or comes back."""
    case = Case(4, 64, 65536, 0, 4, seed=7)
    undo = []
    view = SimpleNamespace(data=case.pool, resident_bytes=len(case.pool))
    thread = threading.Thread(target=lambda: undo.append(case.copier.pin_pool(view)))
    thread.start()
    thread.join(timeout=60)
    (pinner,) = case.copier.mappings
    wait_until_pinned(pinner)
    pinned_bytes = pinner.pinned_bytes
    undo[0]()
    assert pinned_bytes == len(case.pool)
