"""L2 in a folder: one file a value, written beside and renamed, and an index of last uses that keeps it within its capacity.

    <folder>/<2 hex digits>/<key>.kv     a value; its modification time is its last use
    <folder>/tmp/<writer>-<n>            one being written, by the adapter that holds the lock on tmp/<writer>.lock

Comes in: keys and memory. Goes out: files. The files are the truth: a value is looked up in the folder, never in the index, so
several servers can share one, and a file that vanishes is a miss. The index only says what to evict. It is built by reading the
folder, at first use and now and then later because others write too.

A value becomes visible by its rename, all of it. A writer that is killed leaves a file under `tmp/`, which the next adapter
removes: the kernel has dropped the writer's lock. Nothing is synced: after a power failure a value may be short or other bytes,
and readers compare length and checksum anyway.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import os
import re
import secrets
import stat
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from lmcache.log import RateLimitedLog, init_logger
from lmcache.pool import try_lock
from lmcache.storage.l2.base import L2Adapter, L2Error, Parts, Reason, Usage, check_length
from lmcache.storage.l2.direct import DirectIO
from lmcache.storage.l2.spec import AdapterSpec, FsSettings

logger = init_logger(__name__)

T = TypeVar("T")

SUFFIX = ".kv"
TEMP_FOLDER = "tmp"
LOCK_SUFFIX = ".lock"
WRITER_BYTES = 8
# What writers leave in tmp/, and nothing else there is ours to remove.
_LOCK_NAME = re.compile(rf"([0-9a-f]{{{2 * WRITER_BYTES}}}){re.escape(LOCK_SUFFIX)}")
_TEMP_NAME = re.compile(rf"([0-9a-f]{{{2 * WRITER_BYTES}}})-[0-9]+")
# No file of this file system can be locked: Lustre without `-o flock`, NFS whose lock manager is away.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
# One file cannot be read, where others can.
_DAMAGED = (errno.EIO, errno.EUCLEAN, errno.EBADMSG)
# One file or folder is not what it was or cannot be looked at.
_NOT_THERE = (*_DAMAGED, errno.ENOTDIR, errno.ELOOP)
PAGE_BYTES = 4096
NUM_FOLDERS = 256
# So many values of the index are looked at while others wait for it: some milliseconds.
SLICE_VALUES = 2048
# What other servers wrote is seen after this long, or after a hundred times what reading the folder took if that is longer; a
# reading that failed is tried again after the shorter of both.
RESCAN_SECONDS = 60.0
# How much older than now a last use on disk may be: each noting of it is a write of metadata.
USE_GRAIN_SECONDS = 60.0
# Between the uses of one touch, so that their order is kept where only the times are.
TOUCH_STEP_SECONDS = 1e-6
DEFAULT_SHARE_OF_FREE = 0.8

_REASONS = {
    errno.ENOSPC: Reason.FULL,
    errno.EDQUOT: Reason.FULL,
    errno.EFBIG: Reason.FULL,
    errno.EACCES: Reason.DENIED,
    errno.EPERM: Reason.DENIED,
    errno.EROFS: Reason.READ_ONLY,
    errno.ENOENT: Reason.UNREACHABLE,
    errno.ENOTDIR: Reason.UNREACHABLE,
    errno.ENODEV: Reason.UNREACHABLE,
    errno.ENOTCONN: Reason.UNREACHABLE,
    errno.ESTALE: Reason.UNREACHABLE,
    errno.ETIMEDOUT: Reason.TIMEOUT,
}


class _Entry(msgspec.Struct):
    """One value in the index: the bytes it takes on disk, and the time of its last use, also as it is noted on disk.

    `reading`: number of the last reading of the folder that found it, or during which it was used.
    """

    size: int
    used_at: float
    noted_at: float
    reading: int


_News = tuple[float, str, int]  # last use, key and size of a value that another server wrote or used


class FsAdapter(L2Adapter):
    """One folder."""

    keys_at_once = 64  # each is a call of its own, on a mount a round trip
    is_evicting = True

    def __init__(self, spec: AdapterSpec) -> None:
        assert isinstance(spec.settings, FsSettings)
        self._root = spec.settings.path
        self._capacity = int(spec.settings.capacity_gb * 2**30)  # 0 until the folder was read, where it depends on that
        self._io = DirectIO(spec.settings.direct_io)
        self._mutex = threading.Lock()
        self._index: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._used = 0
        self._reserved = 0  # of values being written
        self._next_scan_at = 0.0
        self._num_readings = 0
        self._is_read = False
        self._is_scanning = False
        self._writer = secrets.token_hex(WRITER_BYTES)
        self._lock_fd: int | None = None
        self._numbers = itertools.count()
        self._log = RateLimitedLog(logger)

    # -- the contract ------------------------------------------------------------------------------

    def put(self, key: str, parts: Parts) -> None:
        """See the contract. Least recently used values go until there is room."""
        length = sum(part.nbytes for part in parts)
        with _as_l2_error("write", self._root):
            self._scan_if_due()
            with self._reservation(_on_disk(length)):
                try:
                    self._with_folders(lambda: self._write(key, parts, length))
                except OSError as exc:
                    # Others fill the disk too: what the capacity allows may not be there.
                    if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._evict(2 * _on_disk(length)):
                        raise
                    self._write(key, parts, length)
            self._note(key, _on_disk(length), time.time())

    def get(self, key: str, parts: Parts) -> bool:
        """See the contract."""
        with _as_l2_error("read", self._root):
            try:
                fd = self._io.open(self._path(key), os.O_RDONLY)
            except FileNotFoundError:
                return False
            try:
                found = os.fstat(fd)
                check_length(key, found.st_size, sum(part.nbytes for part in parts))
                check_length(key, self._read(key, fd, parts), found.st_size)
                is_due = time.time() - found.st_mtime > USE_GRAIN_SECONDS
                self._note(key, _on_disk(found.st_size), time.time() if is_due else found.st_mtime)
                if is_due:
                    with contextlib.suppress(OSError):  # read-only, or another user's: it then ages as if unused
                        os.utime(fd)
            finally:
                os.close(fd)
        return True

    def _read(self, key: str, fd: int, parts: Parts) -> int:
        """Read a value. One that lies on a bad spot of the disk is as good as changed: it goes, and is written anew."""
        try:
            return self._io.read(fd, parts)
        except OSError as exc:
            if exc.errno in _DAMAGED:
                raise L2Error(f"{key} in {self._root} cannot be read: {exc.strerror}", code=Reason.CORRUPT) from exc
            raise

    def lengths(self, keys: Sequence[str]) -> list[int | None]:
        """See the contract."""
        with _as_l2_error("look up", self._root):
            return [self._length(key) for key in keys]

    def touch(self, keys: Sequence[str]) -> None:
        """See the contract: at once in the index, and on disk, for other servers and the next start, when that is due."""
        now = time.time()
        due: list[tuple[str, float]] = []
        with self._mutex:
            for number, key in enumerate(keys):
                entry = self._index.get(key)
                if entry is not None:
                    used_at = now + number * TOUCH_STEP_SECONDS
                    if used_at - entry.noted_at > USE_GRAIN_SECONDS:
                        due.append((key, used_at))
                        entry.noted_at = used_at
                    entry.used_at = used_at
                    self._index.move_to_end(key)
        for key, used_at in due:
            with contextlib.suppress(OSError):  # gone, read-only, or another user's
                os.utime(self._path(key), (used_at, used_at))

    def delete(self, keys: Sequence[str]) -> int:
        """See the contract."""
        with _as_l2_error("delete", self._root):
            return sum(self._remove(key) for key in keys)

    def clear(self) -> int:
        """See the contract. Values of other servers in the same folder go too; files that are no values stay."""
        with _as_l2_error("clear", self._root):
            return sum(self._remove(key) for key, _ in list(self._files()))

    def usage(self) -> Usage:
        """See the contract. What other servers wrote counts from the next reading of the folder on."""
        with _as_l2_error("read", self._root):
            self._scan_if_due()
        with self._mutex:
            return Usage(used_bytes=self._used, capacity_bytes=self._capacity or None, objects=len(self._index))

    def ping(self) -> None:
        """Write a page and remove it."""
        with _as_l2_error("write", self._root):
            self._with_folders(self._write_page)

    def close(self) -> None:
        """See the contract."""
        self._forget_writer()

    # -- files -------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._root}/{zlib.crc32(key.encode()) & 0xFF:02x}/{key}{SUFFIX}"

    def _length(self, key: str) -> int | None:
        path = self._path(key)
        try:
            return os.stat(path).st_size
        except OSError as exc:
            self._pass_over(path, exc)
        return None

    def _pass_over(self, path: str, exc: OSError) -> None:
        """Return if a file or folder is gone or damaged; raise the error when it is not of this one only."""
        if isinstance(exc, FileNotFoundError):
            return
        if exc.errno not in _NOT_THERE:
            raise exc
        os.statvfs(f"{self._root}/")  # an NFS server that is away is EIO, too, and then this fails as well
        self._log.warning("damaged", f"L2 fs: {path} counts as not there: {exc.strerror}")

    def _write(self, key: str, parts: Parts, length: int) -> None:
        path, temp = self._path(key), self._new_temp()
        try:
            fd = self._io.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                self._io.write(fd, parts, length)
            finally:
                os.close(fd)
            try:
                os.rename(temp, path)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                os.rename(temp, path)
        except OSError:
            _unlink(temp)
            raise

    def _write_page(self) -> None:
        temp = self._new_temp()
        try:
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.write(fd, bytes(PAGE_BYTES))
            finally:
                os.close(fd)
        finally:
            _unlink(temp)

    def _with_folders(self, write: Callable[[], None]) -> None:
        """Write; where somebody removed our folders, make them anew and write once more."""
        try:
            write()
        except FileNotFoundError:
            self._forget_writer()
            write()

    def _remove(self, key: str) -> bool:
        is_there = _unlink(self._path(key))
        with self._mutex:
            entry = self._index.pop(key, None)
            self._used -= entry.size if entry else 0
        return is_there

    def _files(self) -> Iterator[tuple[str, os.stat_result]]:
        """Return the key and the state of each file that is named as a value is."""
        return itertools.chain.from_iterable(map(self._files_of, range(NUM_FOLDERS)))

    def _files_of(self, number: int) -> Iterator[tuple[str, os.stat_result]]:
        folder = f"{self._root}/{number:02x}"
        try:
            yield from self._files_in(folder, number)
        except OSError as exc:
            self._pass_over(folder, exc)

    def _files_in(self, folder: str, number: int) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(folder) as files:
            for file in files:
                key = file.name.removesuffix(SUFFIX)
                if key == file.name or zlib.crc32(key.encode(errors="replace")) & 0xFF != number:
                    continue
                try:
                    found = file.stat(follow_symlinks=False)
                except OSError as exc:
                    self._pass_over(file.path, exc)
                    continue
                if stat.S_ISREG(found.st_mode):
                    yield key, found

    # -- one writer's temporary files --------------------------------------------------------------

    def _new_temp(self) -> str:
        """Return a path that nobody else uses, and that is removed when this process has died."""
        folder = f"{self._root}/{TEMP_FOLDER}"
        with self._mutex:
            if self._lock_fd is None:
                os.makedirs(folder, mode=0o700, exist_ok=True)
                _remove_temps_of_the_dead(folder)
                self._lock_fd = _lock_file(f"{folder}/{self._writer}{LOCK_SUFFIX}")
        return f"{folder}/{self._writer}-{next(self._numbers)}"

    def _forget_writer(self) -> None:
        with self._mutex:
            fd, self._lock_fd = self._lock_fd, None
            if fd is not None:
                with contextlib.suppress(OSError):
                    os.unlink(f"{self._root}/{TEMP_FOLDER}/{self._writer}{LOCK_SUFFIX}")
                os.close(fd)

    # -- the index ---------------------------------------------------------------------------------

    def _note(self, key: str, size: int, noted_at: float) -> None:
        """Make a value the most recently used; the file has `noted_at`."""
        with self._mutex:
            self._insert(key, _Entry(size, time.time(), noted_at, self._num_readings))

    def _insert(self, key: str, entry: _Entry) -> None:
        """Put a value at the end of the index, and not where it was. The mutex is held."""
        known = self._index.pop(key, None)
        self._used += entry.size - (known.size if known else 0)
        self._index[key] = entry

    @contextlib.contextmanager
    def _reservation(self, size: int) -> Iterator[None]:
        """Evict until a value of this size fits; its place is taken while it is written."""
        if size > (limit := self._capacity or self._share_of_free()):
            message = f"a value of {size} bytes is larger than the {limit} that {self._root} may take"
            raise L2Error(message, "raise capacity-gb, or make room", Reason.FULL)
        with self._mutex:
            self._reserved += size
        try:
            while (excess := self._excess()) > 0 and self._evict(excess):
                pass
            yield
        finally:
            with self._mutex:
                self._reserved -= size

    def _excess(self) -> int:
        """Return by how many bytes the values take too much. Before the capacity is known only what is free is a bound."""
        if not self._capacity:
            return self._reserved - self._share_of_free()
        return self._used + self._reserved - self._capacity

    def _share_of_free(self) -> int:
        os.makedirs(self._root, mode=0o700, exist_ok=True)
        disk = os.statvfs(self._root)
        return int(disk.f_bavail * disk.f_frsize * DEFAULT_SHARE_OF_FREE)

    def _evict(self, num_bytes: int) -> int:
        """Remove least recently used values until so many bytes are gone or none is left; return how many went."""
        gone = 0
        while gone < num_bytes:
            with self._mutex:
                if not self._index:
                    break
                key, entry = self._index.popitem(last=False)
                self._used -= entry.size
            with contextlib.suppress(FileNotFoundError):
                used_at = os.stat(self._path(key)).st_mtime
                if used_at > entry.used_at + USE_GRAIN_SECONDS:  # another server uses it
                    with self._mutex:
                        if key not in self._index:
                            self._insert(key, _Entry(entry.size, used_at, used_at, self._num_readings))
                    continue
            _unlink(self._path(key))
            gone += entry.size
        return gone

    def _scan_if_due(self) -> None:
        """Read the folder into the index, unless that was done lately or another thread is at it."""
        with self._mutex:
            if self._is_scanning or time.monotonic() < self._next_scan_at:
                return
            self._is_scanning = True
        started = time.monotonic()
        try:
            os.makedirs(self._root, mode=0o700, exist_ok=True)
            self._read_folder()
            if not self._capacity:
                room = self._share_of_free()
                with self._mutex:
                    self._capacity = self._used + room
            self._next_scan_at = time.monotonic() + max(RESCAN_SECONDS, 100 * (time.monotonic() - started))
        except OSError:
            self._next_scan_at = time.monotonic() + min(RESCAN_SECONDS, 100 * (time.monotonic() - started))
            raise
        finally:
            self._is_scanning = False

    def _read_folder(self) -> None:
        """Bring the index up to date with the files.

        A slice of it at a time and without long calls in C: others wait for the mutex, and all threads for the interpreter.
        With 1,000,000 values they wait up to 0.2 s, which is the garbage collector's pass over the index; for an index made
        anew and sorted it was 5 s (2 cores).
        """
        self._num_readings += 1
        # At first what is found goes to the front, the oldest last: what was used meanwhile is newer. Later it goes to the end,
        # the oldest first: others used it since the last reading.
        is_first = not self._is_read
        news = [sorted(self._news(number), reverse=is_first) for number in range(NUM_FOLDERS)]
        for some in _slices(heapq.merge(*news, reverse=is_first)):
            with self._mutex:
                self._take_in(some, is_first)
        self._is_read = True
        with self._mutex:
            known = list(dict.keys(self._index))  # in no order, and 30 times faster than in that of use
        for keys in _slices(iter(known)):
            with self._mutex:
                self._drop_missing(keys)

    def _news(self, number: int) -> Iterator[_News]:
        """Yield what a subfolder has and the index lacks, or what another server used later than the index knows."""
        for some in _slices(self._files_of(number)):
            with self._mutex:
                news = [found for key, state in some if (found := self._compare(key, state))]
            yield from news

    def _compare(self, key: str, state: os.stat_result) -> _News | None:
        """Note that a file is there; return it where it is news. The mutex is held, as in what follows."""
        size, entry = _on_disk(state.st_size), self._index.get(key)
        if entry is None:
            return (state.st_mtime, key, size)
        entry.reading = self._num_readings
        entry.noted_at = state.st_mtime
        self._used += size - entry.size
        entry.size = size
        return (state.st_mtime, key, size) if state.st_mtime > entry.used_at + USE_GRAIN_SECONDS else None

    def _take_in(self, news: Sequence[_News], is_first: bool) -> None:
        for used_at, key, size in news:
            known = self._index.get(key)
            if known is None or known.used_at < used_at:  # else it was used here meanwhile
                self._insert(key, _Entry(size, used_at, used_at, self._num_readings))
                self._index.move_to_end(key, last=not is_first)

    def _drop_missing(self, keys: Sequence[str]) -> None:
        for key in keys:
            entry = self._index.get(key)
            if entry is not None and entry.reading < self._num_readings:
                del self._index[key]
                self._used -= entry.size


def _slices(items: Iterator[T]) -> Iterator[list[T]]:
    while some := list(itertools.islice(items, SLICE_VALUES)):
        yield some


def _on_disk(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def _lock_file(path: str) -> int:
    """Return a descriptor of a new locked file. Whoever locks it between its making and our lock removes it: then anew."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if _lock_if_possible(fd) and os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock_if_possible(fd: int) -> bool:
    """Lock a file, or take it for locked where nothing can be: there nobody can find its holder dead."""
    try:
        return try_lock(fd)
    except OSError as exc:
        if exc.errno in _NO_LOCKS:
            return True
        raise


def _remove_temps_of_the_dead(folder: str) -> None:
    """Remove what writers left that hold no lock any more."""
    names = os.listdir(folder)
    locks = [match for name in names if (match := _LOCK_NAME.fullmatch(name))]
    living = {match[1] for match in locks if not _remove_if_unlocked(f"{folder}/{match[0]}")}
    for name in names:
        match = _TEMP_NAME.fullmatch(name)
        if match and match[1] not in living:
            with contextlib.suppress(OSError):
                _unlink(f"{folder}/{name}")


def _remove_if_unlocked(path: str) -> bool:
    """Remove a lock file that nobody holds, and tell whether that is so; False where it cannot be known."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        return exc.errno == errno.ENOENT
    try:
        if not try_lock(fd):
            return False
        _unlink(path)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@contextlib.contextmanager
def _as_l2_error(action: str, root: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        reason = _REASONS.get(exc.errno or 0, Reason.ERROR)
        raise L2Error(f"cannot {action} in {root}: {exc.strerror or exc}", code=reason) from exc
