"""The folder's own matters: capacity, the index over restarts, several servers in one folder, writers that are killed."""

import errno
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmcache.storage.l2 import fs as fs_module
from lmcache.storage.l2.base import L2Error, Reason
from lmcache.storage.l2.direct import ALIGNMENT, BOUNCE_BYTES, DirectIO
from tests.storage.l2.test_contract import content, empty_parts, fetch, parts_of

MIB = 1 << 20
START_SECONDS = 60.0
NUM_KILLS = 12
WRITER_NAME = "0123456789abcdef"


def url(directory: Path, mib: float = 64, **settings: object) -> str:
    more = "".join(f"&{name.replace('_', '-')}={value}" for name, value in settings.items())
    return f"fs://{directory}/l2?capacity-gb={mib / 1024}{more}"


def put(adapter, key: str, num_bytes: int = MIB) -> None:
    adapter.put(key, [memoryview(content(key, num_bytes))])


def files_in(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*") if path.is_file()}


def age(directory: Path, key: str, seconds: float) -> None:
    [path] = directory.rglob(f"{key}.kv")
    used_at = time.time() - seconds
    os.utime(path, (used_at, used_at))


def test_the_least_recently_used_value_goes_first(tmp_path, make):
    adapter = make(url(tmp_path, mib=4))
    for key in "abcd":
        put(adapter, key)
    assert fetch(adapter, "a", MIB) == content("a", MIB)
    put(adapter, "e")
    put(adapter, "f")
    assert adapter.lengths(list("abcdef")) == [MIB, None, None, MIB, MIB, MIB]
    usage = adapter.usage()
    assert (usage.used_bytes, usage.capacity_bytes, usage.objects) == (4 * MIB, 4 * MIB, 4)


def test_what_is_touched_stays_and_the_last_one_longest(tmp_path, make):
    adapter = make(url(tmp_path, mib=4))
    for key in "abcd":
        put(adapter, key)
    adapter.touch(["b", "nothing", "a"])
    for key in "efg":
        put(adapter, key)
    assert adapter.lengths(list("abcdefg")) == [MIB, None, None, None, MIB, MIB, MIB]


def test_a_touch_is_noted_on_disk_when_the_last_one_is_old(tmp_path, make):
    put(make(url(tmp_path, mib=4)), "a")
    put(make(url(tmp_path, mib=4)), "b")
    age(tmp_path, "a", 1000)
    age(tmp_path, "b", 500)
    first = make(url(tmp_path, mib=4))
    first.usage()
    first.touch(["a"])
    second = make(url(tmp_path, mib=2))
    put(second, "c")
    assert second.lengths(["a", "b", "c"]) == [MIB, None, MIB]


def test_what_is_touched_all_the_time_is_noted_on_disk_now_and_then(tmp_path, make, monkeypatch):
    clock = time.time()
    monkeypatch.setattr(fs_module.time, "time", lambda: clock)
    adapter = make(url(tmp_path, mib=4))
    put(adapter, "a")
    [path] = tmp_path.rglob("a.kv")
    noted = set()
    for _ in range(12):
        clock += fs_module.USE_GRAIN_SECONDS * 0.8
        adapter.touch(["a"])
        noted.add(path.stat().st_mtime)
    assert len(noted) in (6, 7)
    assert clock - path.stat().st_mtime <= fs_module.USE_GRAIN_SECONDS


def test_the_order_of_last_uses_outlives_the_server(tmp_path, make):
    first = make(url(tmp_path, mib=4))
    for key in "abcd":
        put(first, key)
    for key, seconds in (("a", 1000), ("b", 4000), ("c", 3000), ("d", 2000)):
        age(tmp_path, key, seconds)
    assert fetch(first, "c", MIB) is not None  # noted on disk: the last note is old
    first.close()
    second = make(url(tmp_path, mib=4))
    assert second.usage().used_bytes == 4 * MIB
    put(second, "e")
    put(second, "f")
    assert second.lengths(list("abcdef")) == [MIB, None, MIB, None, MIB, MIB]


def test_a_smaller_capacity_holds_from_the_next_put_on(tmp_path, make):
    for number in range(8):
        put(make(url(tmp_path, mib=8)), str(number))
    smaller = make(url(tmp_path, mib=3))
    put(smaller, "new")
    assert smaller.usage().used_bytes <= 3 * MIB
    assert smaller.lengths(["new"]) == [MIB]


def test_a_value_larger_than_the_capacity_evicts_nothing(tmp_path, make):
    adapter = make(url(tmp_path, mib=2))
    put(adapter, "a")
    with pytest.raises(L2Error, match="larger than") as caught:
        put(adapter, "b", 3 * MIB)
    assert caught.value.code == "full"
    assert adapter.lengths(["a", "b"]) == [MIB, None]


def test_without_a_capacity_four_fifths_of_the_free_space_are_used(tmp_path, make):
    adapter = make(f"fs://{tmp_path}/l2")
    put(adapter, "a")
    disk = os.statvfs(tmp_path)
    assert adapter.usage().capacity_bytes == pytest.approx(disk.f_bavail * disk.f_frsize * 0.8, rel=0.1)


def has_4_mib_free(path: str) -> SimpleNamespace:
    return SimpleNamespace(f_bavail=1024, f_frsize=4096)


def failing_first(real: Callable, number: int, times: int = 1) -> Callable:
    """What `real` does, but for the first calls: those fail with this errno."""
    errors = [OSError(number, os.strerror(number)) for _ in range(times)]

    def call(path: str) -> object:
        if errors:
            raise errors.pop()
        return real(path)

    return call


def test_a_reading_that_fails_does_not_make_the_default_capacity_smaller(tmp_path, make, monkeypatch):
    first = make(url(tmp_path))
    for key in "abcdefgh":
        put(first, key)
    monkeypatch.setattr(os, "statvfs", has_4_mib_free)
    monkeypatch.setattr(os, "scandir", failing_first(os.scandir, errno.ESTALE))
    adapter = make(f"fs://{tmp_path}/l2")
    with pytest.raises(L2Error):
        adapter.usage()
    adapter._next_scan_at = 0.0  # as if the time had passed
    put(adapter, "i")
    usage = adapter.usage()
    assert (usage.objects, usage.capacity_bytes) == (9, 8 * MIB + int(4 * MIB * 0.8))


def test_what_is_put_before_the_default_capacity_is_known_is_kept(tmp_path, make, monkeypatch):
    """Another thread is at the first reading, on a mount that is slow to answer."""
    adapter = make(f"fs://{tmp_path}/l2")
    real = os.statvfs

    def statvfs(path: str) -> os.statvfs_result:
        monkeypatch.setattr(os, "statvfs", real)
        put(adapter, "b")
        assert adapter.usage().capacity_bytes is None
        return real(path)

    monkeypatch.setattr(os, "statvfs", statvfs)
    adapter.usage()
    assert adapter.lengths(["b"]) == [MIB]
    assert adapter.usage().capacity_bytes


def test_before_the_default_capacity_is_known_what_is_free_is_the_bound(tmp_path, make, monkeypatch):
    monkeypatch.setattr(os, "statvfs", has_4_mib_free)
    adapter = make(f"fs://{tmp_path}/l2")
    adapter._is_scanning = True  # another thread
    put(adapter, "a", 3 * MIB)
    with pytest.raises(L2Error, match="larger than") as caught:
        put(adapter, "b", 4 * MIB)
    assert caught.value.code == "full"


def test_two_servers_share_a_folder_and_keep_it_within_its_capacity(tmp_path, make, monkeypatch):
    monkeypatch.setattr(fs_module, "RESCAN_SECONDS", 0.0)
    one, other = make(url(tmp_path, mib=6)), make(url(tmp_path, mib=6))
    for number in range(20):
        put(one if number % 2 else other, f"{number}")
        one._next_scan_at = other._next_scan_at = 0.0  # as if the time had passed
    assert one.usage().used_bytes == other.usage().used_bytes <= 6 * MIB
    assert sum(length is not None for length in one.lengths([str(number) for number in range(20)])) <= 6
    assert fetch(one, "18", MIB) == content("18", MIB)


def test_what_another_server_used_lately_is_not_evicted_as_old(tmp_path, make):
    one, other = make(url(tmp_path, mib=3)), make(url(tmp_path, mib=3))
    for key in "abc":
        put(one, key)
        age(tmp_path, key, 1000)
    one._index.clear()
    one._used, one._next_scan_at = 0, 0.0
    one.usage()  # the index knows the old times now
    assert fetch(other, "a", MIB) is not None
    put(one, "d")
    assert [length is not None for length in one.lengths(list("abcd"))].count(True) == 3
    assert one.lengths(["a", "d"]) == [MIB, MIB]


def order_of(adapter) -> str:
    """The keys of the index, the next to go first."""
    assert adapter._used == sum(entry.size for entry in adapter._index.values())
    return "".join(adapter._index)


@pytest.mark.parametrize("slice_values", [1, 2, 100])
def test_reading_again_takes_in_what_others_wrote_used_and_removed(tmp_path, make, monkeypatch, slice_values):
    monkeypatch.setattr(fs_module, "SLICE_VALUES", slice_values)
    one, other = make(url(tmp_path)), make(url(tmp_path))
    for number, key in enumerate("abcdef"):
        put(other, key)
        age(tmp_path, key, 1000 - number)
    one.usage()
    assert order_of(one) == "abcdef"
    other.delete(["c", "f"])
    put(other, "new")
    age(tmp_path, "new", 200)
    put(other, "a", 2 * MIB)
    age(tmp_path, "a", 100)
    put(one, "x")
    one._next_scan_at = 0.0  # as if the time had passed
    assert one.usage().objects == 6
    assert order_of(one) == "bdexnewa"


def test_what_is_used_while_the_folder_is_first_read_is_the_newest(tmp_path, make, monkeypatch):
    first = make(url(tmp_path))
    for number, key in enumerate("abcd"):
        put(first, key)
        age(tmp_path, key, 1000 - number)
    adapter = make(url(tmp_path))
    real = os.scandir

    def scandir(path: str) -> object:
        monkeypatch.setattr(os, "scandir", real)
        put(adapter, "new")
        fetch(adapter, "b", MIB)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert adapter.usage().objects == 5
    assert order_of(adapter) == "acdnewb"


def test_the_index_is_not_kept_from_others_for_longer_than_a_slice_takes(tmp_path, make, monkeypatch):
    adapter, other = make(url(tmp_path)), make(url(tmp_path))
    for number in range(20):
        put(other, str(number), 1)
    monkeypatch.setattr(fs_module, "SLICE_VALUES", 3)
    looked_at: list[int] = []  # in each time that the mutex was held

    class Index(OrderedDict):
        def get(self, key: str) -> object:
            looked_at[-1] += 1
            return super().get(key)

    class Mutex:
        def __enter__(self) -> None:
            looked_at.append(0)

        def __exit__(self, *args: object) -> None:
            pass

    adapter._index, adapter._mutex = Index(), Mutex()
    for objects in (20, 19):
        adapter._next_scan_at = 0.0
        assert adapter.usage().objects == objects
        other.delete(["7"])
    assert sum(looked_at) >= 4 * 19
    assert max(looked_at) == 3


def test_a_value_that_vanishes_is_a_miss(tmp_path, make):
    adapter, other = make(url(tmp_path)), make(url(tmp_path))
    put(adapter, "a")
    assert other.delete(["a"]) == 1
    assert fetch(adapter, "a", MIB) is None
    assert adapter.delete(["a"]) == 0
    assert adapter.usage().used_bytes == 0


def test_a_value_that_is_evicted_while_it_is_read_is_read_to_its_end(tmp_path, make, monkeypatch):
    adapter = make(url(tmp_path))
    put(adapter, "a", 3 * MIB)
    real = DirectIO.read

    def read(self, fd, parts):
        adapter.delete(["a"])
        return real(self, fd, parts)

    monkeypatch.setattr(DirectIO, "read", read)
    assert fetch(adapter, "a", 3 * MIB) == content("a", 3 * MIB)


def test_the_folder_may_be_removed_and_comes_back(tmp_path, make):
    adapter = make(url(tmp_path))
    put(adapter, "a")
    (tmp_path / "l2").rename(tmp_path / "gone")
    assert fetch(adapter, "a", MIB) is None
    put(adapter, "a")
    assert fetch(adapter, "a", MIB) == content("a", MIB)


def test_a_ping_makes_folders_anew_that_somebody_removed(tmp_path, make):
    """It is what closes the breaker after an operator has emptied a full disk."""
    adapter = make(url(tmp_path))
    put(adapter, "a")
    (tmp_path / "l2").rename(tmp_path / "gone")
    adapter.ping()
    put(adapter, "a")
    assert fetch(adapter, "a", MIB) == content("a", MIB)


def test_files_that_are_no_values_are_neither_counted_nor_served_nor_removed(tmp_path, make):
    adapter = make(url(tmp_path))
    put(adapter, "a")
    [value] = (tmp_path / "l2").rglob("a.kv")
    (value.parent / "notes.txt").write_text("mine")
    (value.parent / "wrong-folder.kv").write_text("mine")
    (value.parent / "folder.kv").mkdir()
    (tmp_path / "l2" / "README").write_text("mine")
    (value.parent / "link.kv").symlink_to(tmp_path / "l2" / "README")
    again = make(url(tmp_path))
    assert again.usage().objects == 1
    assert again.lengths(["notes", "notes.txt", "README"]) == [None] * 3
    assert again.clear() == 1
    assert {"notes.txt", "wrong-folder.kv", "README", "link.kv"} <= files_in(tmp_path)


def test_only_its_user_can_read_a_value(tmp_path, make):
    put(make(url(tmp_path)), "a")
    for path in [tmp_path / "l2", *(tmp_path / "l2").rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


# -- damage ----------------------------------------------------------------------------------------


def failing_at(real: Callable, path: Path, number: int) -> Callable:
    """What `real` does, but for one path: that fails with this errno."""

    def call(asked: str, *args: object, **settings: object) -> object:
        if asked == str(path):
            raise OSError(number, os.strerror(number), asked)
        return real(asked, *args, **settings)

    return call


@pytest.mark.parametrize("number", [errno.EIO, errno.EUCLEAN, errno.EBADMSG])
def test_a_file_that_cannot_be_looked_at_is_a_miss_and_the_others_are_found(tmp_path, make, monkeypatch, number):
    adapter = make(url(tmp_path))
    put(adapter, "a")
    put(adapter, "b")
    [path] = tmp_path.rglob("a.kv")
    monkeypatch.setattr(os, "stat", failing_at(os.stat, path, number))
    assert adapter.lengths(["a", "b"]) == [None, MIB]


def test_a_file_system_that_is_away_is_no_miss(tmp_path, make, monkeypatch):
    """A soft NFS mount says EIO of each file: its breaker must open."""
    adapter = make(url(tmp_path))
    put(adapter, "a")
    [path] = tmp_path.rglob("a.kv")
    monkeypatch.setattr(os, "stat", failing_at(os.stat, path, errno.EIO))
    monkeypatch.setattr(os, "scandir", failing_at(os.scandir, path.parent, errno.EIO))
    monkeypatch.setattr(os, "statvfs", failing_first(os.statvfs, errno.EIO, times=3))
    adapter._next_scan_at = 0.0
    with pytest.raises(L2Error):
        adapter.lengths(["a"])
    with pytest.raises(L2Error):
        adapter.usage()
    assert adapter._index


def test_of_a_folder_that_cannot_be_read_only_its_values_are_missed(tmp_path, make, monkeypatch, caplog):
    first = make(url(tmp_path))
    for key in "abc":
        put(first, key)
    [path] = tmp_path.rglob("a.kv")
    monkeypatch.setattr(os, "scandir", failing_at(os.scandir, path.parent, errno.EUCLEAN))
    adapter = make(url(tmp_path))
    assert adapter.usage().objects == 2
    assert adapter.clear() == 2
    assert caplog.text.count(str(path.parent)) == 1


@pytest.mark.parametrize("what", ["file", "loop"])
def test_what_is_no_folder_between_the_others_is_passed_over(tmp_path, make, what):
    first = make(url(tmp_path))
    for key in "abc":
        put(first, key)
    [path] = tmp_path.rglob("a.kv")
    path.parent.rename(tmp_path / "gone")
    if what == "file":
        path.parent.write_text("")
    else:
        path.parent.symlink_to(path.parent)
    adapter = make(url(tmp_path))
    assert adapter.lengths(["a", "b", "c"]) == [None, MIB, MIB]
    put(adapter, "b")
    assert adapter.usage().objects == 2


def test_a_reading_that_took_long_and_failed_is_not_repeated_by_every_write(tmp_path, make, monkeypatch):
    clock = time.monotonic()
    monkeypatch.setattr(fs_module.time, "monotonic", lambda: clock)
    calls = []

    def scandir(path: str) -> None:
        nonlocal clock
        clock += 1.0
        calls.append(path)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    adapter = make(url(tmp_path))
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(L2Error):
        put(adapter, "a")
    put(adapter, "a")
    assert len(calls) == 1
    clock += fs_module.RESCAN_SECONDS
    with pytest.raises(L2Error):
        put(adapter, "a")
    assert len(calls) == 2


# -- direct I/O ------------------------------------------------------------------------------------


def test_aligned_memory_goes_to_the_file_as_it_lies(tmp_path, monkeypatch):
    """What is page-aligned is handed to the kernel itself; only the rest is copied."""
    moved = []
    real = os.pwritev

    def pwritev(fd, vectors, at):
        moved.extend(vectors)
        return real(fd, vectors, at)

    monkeypatch.setattr(os, "pwritev", pwritev)
    chunk = memoryview(mmap.mmap(-1, 2 * MIB))
    chunk[:] = content("chunk", 2 * MIB)
    io = DirectIO(True)
    fd = io.open(str(tmp_path / "file"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        if not io.is_direct:
            pytest.skip(f"{tmp_path} is on a file system without direct I/O")
        io.write(fd, [memoryview(bytes(ALIGNMENT)), chunk, memoryview(b"tail")], ALIGNMENT + 2 * MIB + 4)
    finally:
        os.close(fd)
    assert [len(vector) for vector in moved] == [ALIGNMENT, 2 * MIB, ALIGNMENT]
    assert moved[1].obj is chunk.obj
    assert (tmp_path / "file").read_bytes() == bytes(ALIGNMENT) + bytes(chunk) + b"tail"


@pytest.mark.parametrize("seed", range(20))
def test_any_parts_survive_direct_io(tmp_path, seed):
    random_ = random.Random(seed)
    lengths = [random_.choice([1, 77, 4095, 4096, 8192, 12289, BOUNCE_BYTES, BOUNCE_BYTES + 1]) for _ in range(12)]
    value = random_.randbytes(sum(lengths))
    cuts = [sum(lengths[:number]) for number in range(1, len(lengths))]
    io = DirectIO(True)
    fd = io.open(str(tmp_path / "file"), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    io.write(fd, parts_of(value, *cuts), len(value))
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == value
    random_.shuffle(lengths)
    parts = empty_parts(len(value), *(sum(lengths[:number]) for number in range(1, len(lengths))))
    fd = io.open(str(tmp_path / "file"), os.O_RDONLY)
    assert io.read(fd, parts) == len(value)
    os.close(fd)
    assert b"".join(parts) == value


# -- writers that are killed -----------------------------------------------------------------------

WRITER = """
import sys
from lmcache.storage.l2.spec import make_adapter, parse_adapter
from tests.storage.l2.test_contract import content, parts_of
adapter = make_adapter(parse_adapter(sys.argv[1]))
values = [content(number, 2 << 20) for number in range(4)]
parts = [parts_of(value, 4096) for value in values]
print("ready", flush=True)
while True:
    for number in range(4):
        adapter.put(str(number), parts[number])
"""


def test_a_killed_writer_leaves_whole_values_and_nothing_else(tmp_path, make):
    random_ = random.Random()
    reader = make(url(tmp_path))
    for _ in range(NUM_KILLS):
        child = subprocess.Popen([sys.executable, "-c", WRITER, url(tmp_path)], stdout=subprocess.PIPE, cwd=Path.cwd())
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + random_.uniform(0, 0.1)
            while time.monotonic() < deadline:
                check_values(reader)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(START_SECONDS)
            child.stdout.close()
        check_values(reader)
    again = make(url(tmp_path))
    again.ping()
    assert {name for name in files_in(tmp_path / "l2" / "tmp") if not name.endswith(".lock")} == set()
    assert again.usage().objects == len(check_values(again))


def check_values(adapter) -> list[str]:
    """Each value is the one that was put, or it is not there."""
    found = []
    for number in range(4):
        value = fetch(adapter, str(number), 2 * MIB, 4096)
        assert value in (None, content(number, 2 * MIB))
        found += [str(number)] if value is not None else []
    return found


def test_only_what_a_writer_left_is_removed_from_the_folder_for_temporary_files(tmp_path, make):
    """Others may have had a folder `tmp` there before."""
    folder = tmp_path / "l2" / "tmp"
    folder.mkdir(parents=True)
    ours = {f"{WRITER_NAME}.lock", f"{WRITER_NAME}-0", f"{WRITER_NAME}-17", "f" * 16 + "-3"}
    others = {
        "backup-2026-11-01.tar",
        "poetry.lock",
        "model-1",
        ".lock",
        f"{WRITER_NAME}-",
        f"{WRITER_NAME}-1.txt",
        f"{WRITER_NAME}-1\n",
        f"{WRITER_NAME}0-1",
        f"{WRITER_NAME}0.lock",
        f"{WRITER_NAME.upper()}-1",
    }
    for name in ours | others:
        (folder / name).write_text("")
    adapter = make(url(tmp_path))
    adapter.ping()
    adapter.close()
    assert files_in(folder) == others


def test_a_living_writers_file_is_left_alone(tmp_path, make, monkeypatch):
    """Another server starts while a value is written."""
    one, other = make(url(tmp_path)), make(url(tmp_path))
    real = DirectIO.write

    def write(self, fd, parts, length):
        monkeypatch.setattr(DirectIO, "write", real)
        other.ping()  # cleans up as its first use of the folder
        real(self, fd, parts, length)

    monkeypatch.setattr(DirectIO, "write", write)
    put(one, "a")
    assert fetch(other, "a", MIB) == content("a", MIB)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_keeps_values_and_nobodys_temporary_file_is_removed(tmp_path, make, monkeypatch, number):
    def refuse(fd: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("lmcache.pool.fcntl.flock", refuse)
    first = make(url(tmp_path))
    put(first, "a")
    other = next(tmp_path.rglob("tmp")) / f"{WRITER_NAME}-1"
    other.write_bytes(b"another server is at it")
    other.with_name(f"{WRITER_NAME}.lock").write_bytes(b"")
    second = make(url(tmp_path))
    put(second, "b")
    assert fetch(second, "a", MIB) == content("a", MIB)
    assert other.exists()


def test_a_lock_that_fails_for_another_reason_is_an_error_and_no_endless_loop(tmp_path, make, monkeypatch):
    def refuse(fd: int, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("lmcache.pool.fcntl.flock", refuse)
    with pytest.raises(L2Error):
        put(make(url(tmp_path)), "a")


def test_a_value_on_a_bad_spot_of_the_disk_counts_as_changed(tmp_path, make, monkeypatch):
    """So it is deleted and written anew: it is one value, not the tier."""
    adapter = make(url(tmp_path))
    put(adapter, "a")

    def fail(fd: int, parts: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(adapter._io, "read", fail)
        with pytest.raises(L2Error) as caught:
            fetch(adapter, "a", MIB)
    assert caught.value.code == Reason.CORRUPT.value
    assert fetch(adapter, "a", MIB) == content("a", MIB)
