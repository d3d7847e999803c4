"""What a GPU's copier does that needs no GPU: cutting transfers into pieces, and keeping count of what is pinned."""

import ctypes
import itertools
import mmap
import threading
import time
from bisect import bisect

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from lmcache.transfer.cuda import cut_first, cut_last, pieces, runs  # noqa: E402
from lmcache.transfer.driver import CudaError  # noqa: E402
from lmcache.transfer.launches import LaunchClock  # noqa: E402
from lmcache.transfer.pinning import REST_RATIO, PoolPinner, address_of  # noqa: E402

MIB = 1 << 20


@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 200))
def test_pieces_fit_a_slot_and_cover_each_block_of_each_plane_once_in_order(chunks, size, planes, per_slot):
    seen = []
    for piece in pieces(chunks, size, planes, per_slot):
        assert 0 < len(piece.chunks) * len(piece.planes) * len(piece.blocks) <= per_slot
        assert len(piece.chunks) == 1 or (len(piece.planes), len(piece.blocks)) == (planes, size)
        assert len(piece.planes) == 1 or len(piece.blocks) == size
        seen += [(chunk, plane, block) for chunk in piece.chunks for plane in piece.planes for block in piece.blocks]
    assert seen == [(chunk, plane, block) for chunk in range(chunks) for plane in range(planes) for block in range(size)]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 200), st.integers(0, 100))
def test_the_first_or_the_last_piece_is_cut_in_two_that_follow_each_other(chunks, size, planes, per_slot, min_blocks):
    def blocks(found):
        return [
            (chunk, plane, block)
            for piece in found
            for chunk in piece.chunks
            for plane in piece.planes
            for block in piece.blocks
        ]

    whole = list(pieces(chunks, size, planes, per_slot))
    last_cut, first_cut = list(cut_last(iter(whole), min_blocks)), list(cut_first(iter(whole), min_blocks))
    assert last_cut[: len(whole) - 1] == whole[:-1]
    assert first_cut[len(first_cut) - len(whole) + 1 :] == whole[1:]
    for found, cut, small in ((last_cut, whole[-1], last_cut[-1]), (first_cut, whole[0], first_cut[0])):
        assert blocks(found) == blocks(whole)
        assert all(piece.num_blocks for piece in found)
        is_cut = cut.num_blocks >= max(2, min_blocks)
        assert len(found) == len(whole) + is_cut
        assert small.num_blocks <= cut.num_blocks / (2 if is_cut else 1)
    for piece in last_cut + first_cut:  # as `pieces` makes them
        assert len(piece.chunks) == 1 or (len(piece.planes), len(piece.blocks)) == (planes, size)
        assert len(piece.planes) == 1 or len(piece.blocks) == size
        assert list(piece.span(size)) == sorted({chunk * size + block for chunk, _, block in blocks([piece])})


def test_neighbours_are_one_copy():
    assert list(runs([100, 110, 120, 200, 210], 10)) == [(100, 30), (200, 20)]
    assert list(runs([5], 7)) == [(5, 7)]


class FakeDriver:
    """A fake of the driver that keeps a list instead of pinning, and fails from some address on."""

    def __init__(self, fails_from=1 << 63, gate=None):
        self.registered = {}
        self._fails_from = fails_from
        self._gate = gate

    def use_context(self, context):
        assert context == "context"

    def register(self, address, num_bytes):
        if self._gate is not None:
            assert self._gate.wait(timeout=30)
        if address + num_bytes > self._fails_from:
            raise CudaError("pinning failed: CUDA_ERROR_OUT_OF_MEMORY (2)")
        self.registered[address] = num_bytes

    def unregister(self, address):
        del self.registered[address]


def pinner_for(driver, num_bytes):
    pool = memoryview(mmap.mmap(-1, num_bytes))
    return pool, PoolPinner(driver, "context", address_of(pool), num_bytes, piece_bytes=2 * MIB)


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wait_until_done(pinner):
    wait_until(lambda: pinner.is_done)


def test_the_pool_is_pinned_lowest_offsets_first_and_nothing_stays_pinned():
    driver = FakeDriver()
    pool, pinner = pinner_for(driver, 10 * MIB)
    start = address_of(pool)
    pinner.start()
    wait_until_done(pinner)
    assert driver.registered == {start: 8 * MIB, start + 8 * MIB: 2 * MIB}
    assert (pinner.pinned_bytes, pinner.unpinned_bytes) == (10 * MIB, 0)
    assert list(pinner.parts(start + 3 * MIB, 6 * MIB)) == [(start + 3 * MIB, 5 * MIB, True), (start + 8 * MIB, MIB, True)]
    pinner.close()
    assert not driver.registered


def test_a_page_is_touched_and_pinned_only_once_the_server_has_made_it_resident():
    driver, resident = FakeDriver(), [5 * MIB]
    pool = memoryview(mmap.mmap(-1, 12 * MIB))
    pinner = PoolPinner(driver, "context", address_of(pool), len(pool), lambda: resident[0], piece_bytes=4 * MIB)
    pinner.start()
    wait_until(lambda: pinner.pinned_bytes == 4 * MIB)
    time.sleep(0.1)
    assert (pinner.pinned_bytes, num_resident(pool)) == (4 * MIB, 4 * MIB)
    resident[0] = len(pool)
    wait_until(lambda: pinner.is_done)
    assert (pinner.pinned_bytes, num_resident(pool)) == (12 * MIB, 12 * MIB)
    pinner.close()
    assert not driver.registered


def test_closing_ends_a_pinner_that_waits_for_the_server():
    driver = FakeDriver()
    pool = memoryview(mmap.mmap(-1, 12 * MIB))
    pinner = PoolPinner(driver, "context", address_of(pool), len(pool), lambda: 4 * MIB, piece_bytes=4 * MIB)
    pinner.start()
    wait_until(lambda: pinner.pinned_bytes == 4 * MIB)
    pinner.close()
    assert not pinner._thread.is_alive()
    assert not driver.registered


class SlowDriver(FakeDriver):
    """Takes a while for each piece, and keeps the times."""

    def __init__(self):
        super().__init__()
        self.begun, self.ended = [], []

    def register(self, address, num_bytes):
        self._take_a_while()
        super().register(address, num_bytes)

    def unregister(self, address):
        self._take_a_while()
        super().unregister(address)

    def _take_a_while(self):
        self.begun.append(time.monotonic())
        time.sleep(0.01)
        self.ended.append(time.monotonic())


class Engine(LaunchClock):
    """One that computes, or not, each time that somebody asks; always, unless told."""

    def __init__(self, computes=None):
        super().__init__()
        self._computes = computes or itertools.repeat(True)

    def is_computing(self):
        return next(self._computes, False)


def test_beside_an_engine_that_computes_the_driver_rests_after_each_piece_and_after_some_that_it_unpins(monkeypatch):
    monkeypatch.setattr("lmcache.transfer.pinning.UNPIN_PIECES", 2)
    driver = SlowDriver()
    pool = memoryview(mmap.mmap(-1, 12 * MIB))
    pinner = PoolPinner(driver, "context", address_of(pool), len(pool), launches=Engine(), piece_bytes=4 * MIB)
    pinner.start()
    wait_until_done(pinner)
    pinner.close()
    rests = [begun - ended for begun, ended in zip(driver.begun[1:], driver.ended, strict=False)]
    assert all(rest >= REST_RATIO * 0.01 for rest in rests[:2])
    assert rests[3] < REST_RATIO * 0.01, "two are unpinned together"
    assert rests[4] >= REST_RATIO * 0.02
    assert not driver.registered


def test_the_driver_gets_one_piece_at_a_time_while_an_engine_computes_and_more_while_it_is_idle():
    driver, engine = FakeDriver(), Engine(iter([True] * 5))  # asked for each piece, and before and after what is pinned
    pool = memoryview(mmap.mmap(-1, 32 * MIB))
    start = address_of(pool)
    pinner = PoolPinner(driver, "context", start, len(pool), launches=engine, piece_bytes=2 * MIB)
    pinner.start()
    wait_until_done(pinner)
    lengths = {(address - start) // MIB: num_bytes // MIB for address, num_bytes in driver.registered.items()}
    assert lengths == {0: 2, 2: 2, 4: 4, 8: 8, 16: 8, 24: 8}
    assert list(pinner.parts(start, 20 * MIB)) == [
        (start, 2 * MIB, True),
        (start + 2 * MIB, 2 * MIB, True),
        (start + 4 * MIB, 4 * MIB, True),
        (start + 8 * MIB, 8 * MIB, True),
        (start + 16 * MIB, 4 * MIB, True),
    ]
    pinner.close()
    assert not driver.registered
    assert pinner.pinned_bytes == 0


class DriverBesideLaunches(FakeDriver):
    """Notes whether the engine launched something meanwhile."""

    def __init__(self):
        super().__init__()
        self.is_launching, self.found = False, []
        self.was_used = threading.Event()

    def register(self, address, num_bytes):
        self._note()
        super().register(address, num_bytes)

    def unregister(self, address):
        super().unregister(address)
        self._note()

    def _note(self):
        self.found.append(self.is_launching)
        self.was_used.set()


def test_the_driver_pins_and_unpins_only_while_the_engine_waits_for_its_device(monkeypatch):
    monkeypatch.setattr("lmcache.transfer.pinning.MAX_GAP_SECONDS", 30.0)
    monkeypatch.setattr("lmcache.transfer.pinning.REST_RATIO", 0)
    monkeypatch.setattr("lmcache.transfer.pinning.UNPIN_PIECES", 1)
    driver, launches = DriverBesideLaunches(), LaunchClock()
    pool = memoryview(mmap.mmap(-1, 10 * MIB))
    pinner = PoolPinner(driver, "context", address_of(pool), len(pool), launches=launches, piece_bytes=2 * MIB)
    launches.begin_step()
    pinner.start()
    closing = threading.Thread(target=pinner.close)
    for step in range(10):
        driver.is_launching = True
        launches.begin_step()
        if step == 5:
            closing.start()
        time.sleep(0.02)
        driver.is_launching = False
        driver.was_used.clear()
        wait_until(lambda: not launches._has_launched.is_set())
        launches.end_launch()
        assert driver.was_used.wait(timeout=30)
    closing.join(timeout=30)
    assert driver.found == [False] * 10
    assert not driver.registered


@given(st.lists(st.integers(1, 5), max_size=6), st.integers(0, 40 * 7 - 1), st.data())
def test_a_range_is_cut_where_it_leaves_what_was_pinned_at_once_or_a_piece_that_is_not_pinned(at_once, start, data):
    num_bytes = data.draw(st.integers(1, 40 * 7 - start))
    pinner = PoolPinner(None, "context", 1000, 40 * 7, piece_bytes=7)
    pinner._ends = ends = list(itertools.accumulate(at_once))
    seen = []
    for address, length, is_pinned in pinner.parts(1000 + start, num_bytes):
        first, last = (address - 1000) // 7, (address + length - 1 - 1000) // 7
        assert is_pinned == (last < pinner._num_pinned)
        assert bisect(ends, first) == bisect(ends, last) if is_pinned else first == last
        seen += range(address - 1000, address - 1000 + length)
    assert seen == list(range(start, start + num_bytes))


def test_closing_does_not_wait_for_the_drivers_rest(monkeypatch):
    monkeypatch.setattr("lmcache.transfer.pinning.REST_RATIO", 1e6)
    driver = SlowDriver()
    pool = memoryview(mmap.mmap(-1, 12 * MIB))
    pinner = PoolPinner(driver, "context", address_of(pool), len(pool), launches=Engine(), piece_bytes=4 * MIB)
    pinner.start()
    wait_until(lambda: pinner.pinned_bytes)
    pinner.close()
    assert not pinner._thread.is_alive()
    assert not driver.registered


def test_of_a_mapping_each_address_is_known_and_none_beside_it():
    pool, pinner = pinner_for(FakeDriver(), 10 * MIB)
    start = address_of(pool)
    assert [pinner.covers(start + offset) for offset in (-1, 0, 10 * MIB - 1, 10 * MIB)] == [False, True, True, False]
    pinner.close()


def num_resident(pool):
    """How many bytes of a mapping have memory behind them."""
    vector = (ctypes.c_ubyte * (len(pool) // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address_of(pool)), ctypes.c_size_t(len(pool)), vector) == 0
    return sum(vector) * mmap.PAGESIZE


def test_what_cannot_be_pinned_is_counted_and_told_once_with_the_likely_cause(caplog):
    pool, pinner = pinner_for(None, 10 * MIB)
    start = address_of(pool)
    pinner._driver = FakeDriver(fails_from=start + 8 * MIB)
    pinner.start()
    wait_until_done(pinner)
    pinner._thread.join(timeout=30)
    assert (pinner.pinned_bytes, pinner.unpinned_bytes) == (8 * MIB, 2 * MIB)
    assert list(pinner.parts(start + 7 * MIB, 2 * MIB)) == [(start + 7 * MIB, MIB, True), (start + 8 * MIB, MIB, False)]
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "0.00 of 0.01 GiB of the pool cannot be pinned" in told
    assert "hint: " in told
    pinner.close()
    assert not pinner._driver.registered


def test_closing_while_pages_are_being_pinned_leaves_none_pinned():
    gate = threading.Event()
    driver = FakeDriver(gate=gate)
    _, pinner = pinner_for(driver, 64 * MIB)
    pinner.start()
    threading.Timer(0.05, gate.set).start()
    pinner.close()
    assert not driver.registered
    assert pinner.pinned_bytes == 0


@pytest.mark.parametrize(("seconds", "shares"), [(0.0, [80, 100]), (60.0, [])])
def test_pinning_that_takes_long_says_how_far_it_is(monkeypatch, caplog, seconds, shares):
    monkeypatch.setattr("lmcache.transfer.pinning.PROGRESS_SECONDS", seconds)
    caplog.set_level("INFO")
    _, pinner = pinner_for(FakeDriver(), 10 * MIB)
    pinner.start()
    pinner._thread.join(timeout=30)
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        *[f"pinning the pool: {share} % of 0.01 GiB" for share in shares],
        "pinned 0.01 GiB of the pool for the GPU",
    ]
    pinner.close()


def test_what_is_reported_never_exceeds_the_pool_while_it_is_being_pinned():
    pool, pinner = pinner_for(None, 64 * MIB)
    pinner._driver = FakeDriver(fails_from=address_of(pool) + 32 * MIB)
    pinner.start()
    done = False
    while not done:
        done = pinner.is_done
        pins = pinner.report(copied_bytes=3)
        assert pins.pinned_bytes + pins.unpinned_bytes <= pins.pool_bytes == 64 * MIB
    assert (pins.pinned_bytes, pins.unpinned_bytes, pins.unpinned_copied_bytes) == (32 * MIB, 32 * MIB, 3)
    pinner.close()
    assert pinner.report(0).unpinned_bytes == 32 * MIB
