"""Making the pool resident: the frontier, and a file system that turns out to be full."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmcache.errors import PoolSizeError
from lmcache.pool import PAGE_BYTES, PoolFile, PoolView
from lmcache.protocol import StoreOutcome
from lmcache.server.app import start_server
from lmcache.storage import residency
from lmcache.storage.residency import Residency
from tests.pools import create_manager, file_system_in_memory, make_config, pool_path, reserve, store, wait_until

PIECE = 8 * PAGE_BYTES


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(residency, "PIECE_BYTES", PIECE)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolFile]:
    made = PoolFile.create(pool_path(tmp_path), capacity_bytes=10 * PIECE + 3 * PAGE_BYTES, num_slots=8)
    yield made
    made.close()


@pytest.fixture
def full_directory(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    with file_system_in_memory(tmp_path / "small", "1m") as directory:
        yield directory


def blocks_of(path: Path) -> int:
    """How many bytes of a file have memory behind them."""
    return path.stat().st_blocks * 512


def test_all_of_the_pool_becomes_resident_and_its_bytes_stay_as_they_are(pool: PoolFile):
    pool.data[5:10] = b"hello"
    made = Residency(pool)
    made.start()
    wait_until(lambda: not made.is_running)
    assert made.frontier_pages() == pool.header.capacity_bytes // PAGE_BYTES
    assert blocks_of(pool.path) >= pool.header.file_bytes
    assert bytes(pool.data[5:10]) == b"hello"
    assert made.failure == ""
    made.close()


def test_the_first_piece_is_resident_when_start_returns(pool: PoolFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(residency, "MAX_THREADS", 0)
    made = Residency(pool)
    made.start()
    assert made.frontier_pages() == PIECE // PAGE_BYTES
    made.close()


@pytest.mark.parametrize("done", [[1, 2, 0, 4, 3], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [3, 0, 4, 1, 2]])
def test_the_frontier_stands_before_the_first_piece_that_is_not_done(pool: PoolFile, done: list[int]):
    made, view = Residency(pool), PoolView(pool.path)
    for position, piece in enumerate(done):
        made._note_done(piece)
        finished = set(done[: position + 1])
        expected = next(piece for piece in range(6) if piece not in finished)
        assert made.frontier_pages() == expected * PIECE // PAGE_BYTES
        assert view.resident_bytes == expected * PIECE
    made.close()
    view.close()


def test_a_pool_that_takes_long_tells_how_far_it_is_now_and_then_and_every_pool_when_it_is_done(
    pool: PoolFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    now = [100.0]
    monkeypatch.setattr(residency, "time", SimpleNamespace(monotonic=lambda: now[0]))
    made = Residency(pool)
    for piece in range(11):
        now[0] += 2
        made._note_done(piece)
    assert [record.message for record in caplog.records] == [
        "making the pool resident: 28 % of 0.00 GiB",  # after 6 s
        "making the pool resident: 57 % of 0.00 GiB",
        "making the pool resident: 86 % of 0.00 GiB",
        "made 0.00 GiB of the pool resident in 22.0 s",
    ]
    made.close()


def test_a_piece_that_fails_is_reported_and_nothing_above_it_is_ever_handed_out(tmp_path, monkeypatch):
    real = Residency._populate

    def populate(self: Residency, piece: int) -> None:
        if piece == 3:
            raise OSError(errno.ENOSPC, "no space on the file system")
        real(self, piece)

    monkeypatch.setattr(Residency, "_populate", populate)
    manager = create_manager(tmp_path, 80, 80)
    manager.run_pass()
    assert manager.l1.allocator.extents() == [(0, 24)]
    assert manager.problems() == ["the pool stops growing at 0 MiB: no space on the file system"]
    for number in range(60):
        store(manager, number)
    assert max(manager.l1.placement(slot).offset for slot in manager.l1.slots()) < 3 * PIECE
    assert reserve(manager, 99, num_bytes=25 * PAGE_BYTES)[0] == [StoreOutcome.FULL]
    manager.l1.check()
    manager.close()


def test_after_a_failure_no_further_piece_is_begun(pool: PoolFile, monkeypatch: pytest.MonkeyPatch):
    """The memory above it could never be handed out."""
    made = Residency(pool)
    begun = []

    def populate(self: Residency, piece: int) -> None:
        begun.append(piece)
        if piece == 1:
            raise OSError(errno.ENOSPC, "no space on the file system")
        if piece > 1:
            wait_until(lambda: made.failure)

    monkeypatch.setattr(Residency, "_populate", populate)
    monkeypatch.setattr(residency.os, "cpu_count", lambda: 2)
    made.start()
    wait_until(lambda: not made.is_running)
    assert set(begun) <= {0, 1, 2}
    assert made.frontier_pages() == PIECE // PAGE_BYTES
    made.close()


def test_a_file_system_that_fills_up_is_reported_and_its_last_piece_never_handed_out(full_directory: Path):
    """Touching such a page would be SIGBUS in whoever touches it."""
    manager = create_manager(full_directory, 2 * (1 << 20) // PAGE_BYTES, 64)
    try:
        manager.run_pass()
        [problem] = manager.problems()
        assert "no space on the file system" in problem or "No space left" in problem
        usable = manager.l1.allocator.free_pages
        assert 0 < usable < (1 << 20) // PAGE_BYTES
        outcomes, [place] = reserve(manager, 1, num_bytes=usable * PAGE_BYTES)
        assert outcomes == [StoreOutcome.RESERVED]
        manager.l1.pool.data[place.offset : place.offset + place.length] = bytes(place.length)
        manager.l1.check()
    finally:
        manager.close()


def test_a_file_system_without_room_for_the_table_is_one_error_and_leaves_nothing(full_directory: Path, monkeypatch):
    monkeypatch.setattr("lmcache.storage.sizing.check_size", lambda *args: None)
    (full_directory / "other").write_bytes(bytes((1 << 20) - 2 * PAGE_BYTES))
    with pytest.raises(PoolSizeError, match="cannot allocate the pool") as caught:
        start_server(make_config(full_directory))
    assert "--l1-size-gb" in caught.value.hint
    assert os.listdir(full_directory) == ["other"]


@pytest.mark.parametrize("fails", ["table", "first piece"])
def test_a_pool_that_cannot_even_begin_is_one_error_and_leaves_nothing(tmp_path, monkeypatch, fails):
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "table":
        monkeypatch.setattr(residency.os, "posix_fallocate", refuse)
    else:
        monkeypatch.setattr(Residency, "_populate", refuse)
    with pytest.raises(PoolSizeError, match="No space left on device"):
        start_server(make_config(tmp_path, metrics_port=0))
    assert list(tmp_path.iterdir()) == []


def test_where_the_kernel_cannot_populate_the_files_blocks_are_allocated(pool: PoolFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(residency, "MADV_POPULATE_WRITE", 9999)  # EINVAL, as an old kernel says
    made = Residency(pool)
    made.start()
    wait_until(lambda: not made.is_running)
    assert made.failure == ""
    assert blocks_of(pool.path) >= pool.header.file_bytes
    made.close()


def test_closing_in_the_middle_ends_the_threads(pool: PoolFile, monkeypatch: pytest.MonkeyPatch):
    made = Residency(pool)
    real = Residency._populate
    monkeypatch.setattr(Residency, "_populate", lambda self, piece: (piece and made._stop.wait(300), real(self, piece)))
    made.start()
    made.close()
    assert not made.is_running
    assert made.frontier_pages() < pool.header.capacity_bytes // PAGE_BYTES
