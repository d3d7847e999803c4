"""The pool's file: identity, locks, the slot table, and what happens to files that are no pool of ours."""

import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache import pool as pool_module
from lmcache.errors import PoolError
from lmcache.pool import (
    PAGE_BYTES,
    PoolFile,
    PoolView,
    Presence,
    SlotRecord,
    SlotState,
    is_client_alive,
    remove_stale_pools,
    unpack_header,
)
from tests.leaks import nothing_left
from tests.pools import pool_path

CLIENT = "0123456789abcdef" * 2
WORDS = 2**64 - 1


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    with nothing_left(tmp_path):
        yield


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolFile]:
    made = PoolFile.create(pool_path(tmp_path), capacity_bytes=8 * PAGE_BYTES, num_slots=8)
    yield made
    made.close()


def leave(directory: Path, *, persistent: bool = True, num_slots: int = 8) -> Path:
    """A pool whose server was killed."""
    made = PoolFile.create(pool_path(directory), capacity_bytes=4 * PAGE_BYTES, num_slots=num_slots, persistent=persistent)
    made.data[:PAGE_BYTES] = b"x" * PAGE_BYTES
    made.close(keep=True)
    return made.path


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_new_pool_is_as_large_as_its_parts_and_readable_by_its_owner_alone(pool: PoolFile):
    status = pool.path.stat()
    assert status.st_size == PAGE_BYTES + PAGE_BYTES + 8 * PAGE_BYTES
    assert status.st_mode & 0o777 == 0o600
    assert len(pool.data) == 8 * PAGE_BYTES


def test_permissions_are_those_asked_for_whatever_the_umask(tmp_path: Path):
    before = os.umask(0o077)
    try:
        made = PoolFile.create(pool_path(tmp_path), capacity_bytes=PAGE_BYTES, num_slots=1, mode=0o660)
    finally:
        os.umask(before)
    assert made.path.stat().st_mode & 0o777 == 0o660
    made.close()


def test_closing_removes_the_file_and_its_clients_files_but_keeps_a_persistent_pool(tmp_path: Path):
    made = PoolFile.create(pool_path(tmp_path), capacity_bytes=PAGE_BYTES, num_slots=1)
    presence = Presence(made.path, CLIENT)
    made.close()
    assert list(tmp_path.iterdir()) == []
    presence.close()
    kept = leave(tmp_path)
    PoolFile.adopt(kept).close()
    assert kept.exists()
    kept.unlink()


def test_the_boot_id_is_new_for_each_server_and_the_cookie_stays_with_the_file(tmp_path: Path):
    path = leave(tmp_path)
    first = unpack_header(path.read_bytes(), path)
    view = PoolView(path)
    adopted = PoolFile.adopt(path)
    assert adopted.header.cookie == first.cookie
    assert adopted.header.boot_id != first.boot_id
    assert unpack_header(path.read_bytes(), path) == adopted.header
    assert bytes(adopted.data[:4]) == b"xxxx"
    assert (view.header.boot_id, view.boot_id) == (first.boot_id, adopted.header.boot_id)
    view.close()
    adopted.close()
    path.unlink()


def test_a_pool_in_use_can_be_neither_created_nor_adopted(pool: PoolFile):
    with pytest.raises(PoolError, match="File exists"):
        PoolFile.create(pool.path, capacity_bytes=PAGE_BYTES, num_slots=1)
    with pytest.raises(PoolError, match="in use by another server") as caught:
        PoolFile.adopt(pool.path)
    assert caught.value.code == "pool_in_use"
    assert pool.path.exists()


def test_closing_while_someone_still_reads_the_data_frees_the_descriptor(tmp_path: Path):
    made = PoolFile.create(pool_path(tmp_path), capacity_bytes=PAGE_BYTES, num_slots=1)
    reader = made.data[:16]
    made.close()
    assert not made.path.exists()
    assert bytes(reader) == bytes(16)
    reader.release()
    del reader  # `made` is still here: the mapping goes with its last reader, not with the pool's object
    assert str(made.path) not in Path("/proc/self/maps").read_text()


def test_a_closed_pool_can_be_adopted_at_once_although_someone_still_reads_the_old_mapping(tmp_path: Path):
    path = leave(tmp_path)
    first = PoolFile.adopt(path)
    reader = first.data[:16]
    first.close()
    PoolFile.adopt(path).close()
    reader.release()
    path.unlink()


@pytest.mark.parametrize("content", [b"", b"x", b"LMCPOOL\0", b"\0" * 8192, b"not a pool at all" * 1000])
def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes):
    path = pool_path(tmp_path)
    path.write_bytes(content)
    for attempt in (PoolFile.adopt, PoolView):
        with pytest.raises(PoolError, match="is not a KV-cache pool") as caught:
            attempt(path)
        assert caught.value.hint or attempt is PoolView
    assert path.read_bytes() == content
    path.unlink()


@pytest.mark.parametrize("kind", ["missing", "directory", "symlink", "fifo"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, kind: str):
    path = pool_path(tmp_path)
    if kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        target = tmp_path / "elsewhere"
        leave(tmp_path).rename(target)
        path.symlink_to(target)
    elif kind == "fifo":
        os.mkfifo(path)
    for attempt in (PoolFile.adopt, PoolView):
        with pytest.raises(PoolError, match=r"cannot open|not a regular file"):
            attempt(path)
    if kind == "directory":
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def test_any_flipped_byte_of_the_header_is_found(tmp_path: Path):
    path = leave(tmp_path)
    whole = path.read_bytes()
    size = struct.calcsize("<8sII16s16sQQQI36sI")
    for at in range(size):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(PoolError):
            PoolFile.adopt(path)
        with pytest.raises(PoolError):
            PoolView(path)
    path.unlink()


@pytest.mark.parametrize("length", [0, 1, 100, PAGE_BYTES, 3 * PAGE_BYTES, 6 * PAGE_BYTES - 1, 6 * PAGE_BYTES + 1])
def test_a_file_of_another_length_than_its_header_says_is_refused(tmp_path: Path, length: int):
    path = leave(tmp_path)
    os.truncate(path, length)
    for attempt in (PoolFile.adopt, PoolView):
        with pytest.raises(PoolError, match=r"not a KV-cache pool|its header says|damaged header"):
            attempt(path)
    path.unlink()


def test_a_format_of_another_version_is_named(tmp_path: Path):
    path = leave(tmp_path)
    raw = bytearray(path.read_bytes())
    raw[8:12] = struct.pack("<I", 7)
    path.write_bytes(raw)
    with pytest.raises(PoolError, match=r"has pool format 7, this version reads 2"):
        PoolFile.adopt(path)
    path.unlink()


def test_a_pool_from_before_the_machines_last_start_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = leave(tmp_path)
    monkeypatch.setattr(pool_module, "kernel_boot_id", lambda: "another boot")
    with pytest.raises(PoolError, match="before the machine's last start"):
        PoolFile.adopt(path)
    path.unlink()


def test_a_header_that_claims_absurd_sizes_is_refused_although_its_checksum_is_right(tmp_path: Path):
    path = leave(tmp_path)
    header = unpack_header(path.read_bytes(), path)
    for claim in ({"num_slots": 2**56}, {"capacity_bytes": 2**63}, {"num_slots": 0}, {"capacity_bytes": 0}):
        forged = msgspec.structs.replace(header, **claim)
        raw = forged.pack()
        assert zlib.crc32(raw[:-4]) == struct.unpack("<I", raw[-4:])[0]
        with path.open("r+b") as file:
            file.write(raw)
        with pytest.raises(PoolError, match="its header says"):
            PoolFile.adopt(path)
    path.unlink()


def test_a_server_that_starts_meanwhile_cannot_remove_a_pool_between_its_creation_and_its_lock(tmp_path, monkeypatch):
    """The other one finds an empty file that nobody has locked yet, and takes it for a leftover."""
    real, calls = pool_module.try_lock, []

    def removed_first(fd: int) -> bool:
        calls.append(fd)
        if len(calls) == 1:
            pool_path(tmp_path).unlink()
        return real(fd)

    monkeypatch.setattr(pool_module, "try_lock", removed_first)
    made = PoolFile.create(pool_path(tmp_path), capacity_bytes=PAGE_BYTES, num_slots=1)
    assert made.path.stat().st_ino == os.fstat(made.fileno()).st_ino
    made.close()


def test_adopting_waits_for_a_server_that_only_looks_whether_the_pool_is_stale(tmp_path, monkeypatch):
    """`remove_stale_pools` of another server holds the lock for a moment; that is not "in use"."""
    path = leave(tmp_path)
    other = os.open(path, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr(pool_module.time, "sleep", lambda seconds: fcntl.flock(other, fcntl.LOCK_UN))
    PoolFile.adopt(path).close()
    os.close(other)
    path.unlink()


# -- the slot table ---------------------------------------------------------------------------------------------------

records = st.builds(
    SlotRecord,
    key=st.binary(min_size=32, max_size=32),
    namespace_id=st.integers(0, WORDS),
    owner=st.binary(min_size=16, max_size=16),
    offset=st.integers(0, WORDS),
    length=st.integers(0, WORDS),
    generation=st.integers(0, WORDS),
    order=st.integers(0, WORDS),
    checksum=st.integers(0, WORDS),
    rank=st.integers(0, 65535),
    state=st.sampled_from(SlotState),
)


def test_slots_never_written_are_free(pool: PoolFile):
    assert [pool.read(slot) for slot in range(8)] == [SlotRecord()] * 8


def test_records_are_read_as_written_and_neighbours_stay_untouched(tmp_path: Path):
    made = PoolFile.create(pool_path(tmp_path), capacity_bytes=PAGE_BYTES, num_slots=3)
    view = PoolView(made.path)

    @settings(max_examples=50)
    @given(record=records, before=records, after=records)
    def check(record: SlotRecord, before: SlotRecord, after: SlotRecord) -> None:
        for slot, one in ((0, before), (2, after), (1, record)):
            made.write(slot, one)
        assert [made.read(slot) for slot in range(3)] == [before, record, after]
        assert [view.generation(slot) for slot in range(3)] == [one.generation for one in (before, record, after)]
        assert made.generation(1) == record.generation

    check()
    view.close()
    made.close()


def test_any_flipped_bit_of_a_record_is_found(pool: PoolFile):
    record = SlotRecord(
        key=bytes(range(32)), namespace_id=1, offset=4096, length=100, generation=5, order=6, state=SlotState.COMMITTED
    )
    pool.write(3, record)
    used = struct.calcsize("<32sQ16sQQQQQHB5x") + 4
    raw = os.pread(pool.fileno(), pool_module.RECORD_BYTES, PAGE_BYTES + 3 * pool_module.RECORD_BYTES)
    for at in range(used):
        for bit in range(8):
            os.pwrite(pool.fileno(), bytes([raw[at] ^ 1 << bit]), PAGE_BYTES + 3 * pool_module.RECORD_BYTES + at)
            assert pool.read(3) is None
        os.pwrite(pool.fileno(), raw[at : at + 1], PAGE_BYTES + 3 * pool_module.RECORD_BYTES + at)
    assert pool.read(3) == record


def test_any_prefix_of_a_record_written_over_another_is_found_or_is_one_of_the_two(pool: PoolFile):
    """A server killed in the middle of `write` leaves the first words new and the others old."""
    old = SlotRecord(key=b"o" * 32, offset=4096, length=100, generation=5, state=SlotState.RESERVED, owner=b"o" * 16)
    new = SlotRecord(key=b"n" * 32, offset=8192, length=200, generation=6, order=9, state=SlotState.COMMITTED)
    raws = []
    for record in (old, new):
        pool.write(0, record)
        raws.append(os.pread(pool.fileno(), pool_module.RECORD_BYTES, PAGE_BYTES))
    for cut in range(0, pool_module.RECORD_BYTES + 1, 8):
        os.pwrite(pool.fileno(), raws[1][:cut] + raws[0][cut:], PAGE_BYTES)
        assert pool.read(0) in (None, old, new)


# -- a client's end ---------------------------------------------------------------------------------------------------


def test_a_view_sees_and_writes_the_servers_bytes(pool: PoolFile):
    view = PoolView(pool.path)
    view.extent(PAGE_BYTES, 5)[:] = b"hello"
    assert bytes(pool.data[PAGE_BYTES : PAGE_BYTES + 5]) == b"hello"
    assert view.header == pool.header
    view.close()


def test_closing_a_view_loses_nothing_that_was_written(pool: PoolFile, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_module, "_UNMAP_STEP_BYTES", 3 * PAGE_BYTES)
    view, whole = PoolView(pool.path), bytes(range(256)) * (8 * PAGE_BYTES // 256)
    view.data[:] = whole
    view.close()
    assert bytes(pool.data) == whole


def test_what_a_server_has_told_to_be_resident_stays_told_by_the_one_that_adopts_its_pool(tmp_path: Path):
    path = pool_path(tmp_path)
    first = PoolFile.create(path, capacity_bytes=8 * PAGE_BYTES, num_slots=8, persistent=True)
    view = PoolView(path)
    assert view.resident_bytes == 0
    first.tell_resident(5 * PAGE_BYTES)
    assert view.resident_bytes == 5 * PAGE_BYTES
    first.close()
    second = PoolFile.adopt(path)
    second.tell_resident(2 * PAGE_BYTES)
    assert view.resident_bytes == 5 * PAGE_BYTES
    second.tell_resident(8 * PAGE_BYTES)
    assert view.resident_bytes == 8 * PAGE_BYTES
    view.close()
    second.close()
    path.unlink()


@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (0, 0), (0, -1), (8 * PAGE_BYTES, 1), (0, 8 * PAGE_BYTES + 1), (2**62, 2**62), (1, 8 * PAGE_BYTES)],
)
def test_an_extent_outside_the_data_area_is_refused(pool: PoolFile, offset: int, length: int):
    view = PoolView(pool.path)
    with pytest.raises(PoolError, match="outside the pool"):
        view.extent(offset, length)
    view.close()


def test_a_client_cannot_write_the_table(pool: PoolFile):
    view = PoolView(pool.path)
    with pytest.raises(TypeError):
        view._words[0] = 1
    view.close()


def test_closing_a_view_whose_bytes_are_in_use_keeps_them_readable(pool: PoolFile):
    view = PoolView(pool.path)
    extent = view.extent(0, 4)
    extent[:] = b"kept"
    array = np.frombuffer(view.data, dtype=np.uint8)
    view.close()
    assert bytes(extent) == bytes(array[:4]) == b"kept"


# -- who lives --------------------------------------------------------------------------------------------------------


def test_a_client_lives_as_long_as_it_holds_its_lock(pool: PoolFile):
    path = pool.client_path(CLIENT)
    assert not is_client_alive(path)
    presence = Presence(pool.path, CLIENT)
    assert is_client_alive(path)
    assert is_client_alive(path), "asking does not end it"
    presence.close()
    assert not is_client_alive(path)
    assert not path.exists()


def test_a_file_that_nobody_locks_is_no_life(pool: PoolFile):
    pool.client_path(CLIENT).write_bytes(b"")
    assert not is_client_alive(pool.client_path(CLIENT))


def test_a_fifo_in_its_place_is_no_life_and_nobody_waits_for_its_writer(pool: PoolFile):
    os.mkfifo(pool.client_path(CLIENT))
    assert not is_client_alive(pool.client_path(CLIENT))


def test_a_killed_process_is_dead_at_once_although_its_file_is_there(pool: PoolFile):
    code = (
        "import sys; from pathlib import Path; from lmcache.pool import Presence;"
        "held = Presence(Path(sys.argv[1]), sys.argv[2]); print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(pool.path), CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert is_client_alive(pool.client_path(CLIENT))
        process.kill()
        process.wait(10)
    assert pool.client_path(CLIENT).exists()
    assert not is_client_alive(pool.client_path(CLIENT))


def test_two_clients_of_one_id_cannot_both_be(pool: PoolFile):
    presence = Presence(pool.path, CLIENT)
    with pytest.raises(PoolError, match="File exists"):
        Presence(pool.path, CLIENT)
    presence.close()


# -- what others left -------------------------------------------------------------------------------------------------


def test_stale_pools_go_and_kept_pools_pools_in_use_and_other_files_stay(tmp_path: Path):
    stale = leave(tmp_path, persistent=False).rename(pool_path(tmp_path, "stale"))
    (tmp_path / f"{stale.name}.client-{CLIENT}").write_bytes(b"")
    kept = leave(tmp_path).rename(pool_path(tmp_path, "kept"))
    in_use = PoolFile.create(pool_path(tmp_path, "used"), capacity_bytes=PAGE_BYTES, num_slots=1)
    presence = Presence(in_use.path, CLIENT)
    foreign = tmp_path / "something-else"
    foreign.write_bytes(b"x")
    assert remove_stale_pools(tmp_path) == [stale]
    assert sorted(tmp_path.iterdir()) == sorted([kept, in_use.path, in_use.client_path(CLIENT), foreign])
    presence.close()
    in_use.close()
    kept.unlink()


def test_a_persistent_pool_that_nobody_can_adopt_any_more_goes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = leave(tmp_path)
    monkeypatch.setattr(pool_module, "kernel_boot_id", lambda: "another boot")
    assert remove_stale_pools(tmp_path) == [path]


def test_a_directory_named_like_a_pool_does_not_stop_the_search(tmp_path: Path):
    pool_path(tmp_path, "a").mkdir()
    os.mkfifo(pool_path(tmp_path, "b"))
    stale = leave(tmp_path, persistent=False)
    assert stale in remove_stale_pools(tmp_path)
    pool_path(tmp_path, "a").rmdir()
    pool_path(tmp_path, "b").unlink(missing_ok=True)


# -- a client that cannot get at it -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "seen"),
    [
        (errno.EACCES, f"the file is user {os.geteuid()}'s and group {os.getegid()}'s with mode 0640"),
        (errno.ENOENT, "the file is not seen from here: No such file or directory"),
    ],
)
def test_a_client_that_cannot_open_the_pool_is_told_the_usual_causes_with_what_is_seen(tmp_path, monkeypatch, number, seen):
    path = pool_path(tmp_path)
    if number == errno.EACCES:
        path.touch()
        path.chmod(0o640)

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("lmcache.pool.os.open", refuse)
    with pytest.raises(PoolError, match=os.strerror(number)) as caught:
        PoolView(path)
    message = caught.value.message
    assert f"another user (this process is user {os.geteuid()} of group {os.getegid()}, {seen})" in message
    assert f"another mount of {tmp_path} (this process is in {os.readlink('/proc/self/ns/ipc')}, mnt:[" in message
    assert f"another host (this one is {socket.gethostname()})" in message
    assert "--pool-mode" in caught.value.hint
    path.unlink(missing_ok=True)


def test_a_client_that_has_no_descriptor_left_is_told_only_that(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("lmcache.pool.os.open", refuse)
    with pytest.raises(PoolError) as caught:
        PoolView(pool_path(tmp_path))
    assert caught.value.with_hint == f"cannot open {pool_path(tmp_path)}: Too many open files"
