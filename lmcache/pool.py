"""The pool: one file in shared memory that the server owns and every client on the host maps.

    [header and the resident part, one page][slot table, 128 bytes a slot][data, extents of whole pages]

Comes in: a path and sizes. Goes out: `PoolFile` (the server's, writes everything) and `PoolView` (a client's: reads the
header and the table, reads and writes data). Next on the data path: `storage/l1.py` on the server, `transfer/` on an engine.

The slot table is the truth about what the pool holds; what the server keeps in its own memory is built from it. A reader
compares a slot's generation after its copy with the one it was told before: the server changes it *before* it gives the
extent to anyone else, so an unchanged generation means that the bytes are the chunk's. Its low half counts that; the high half
counts the pins that were taken from their holders. So a chunk whose holder has seen the generation unchanged, and then the boot
id, stays readable for KEPT_SECONDS, whatever becomes of the pin and of the server, and so long the low half stays as it is.
(Aligned 8-byte loads and stores, in program order on x86; a port to a weaker memory model needs a fence in `generation` and
`write`.)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import socket
import stat
import struct
import time
import weakref
import zlib
from enum import IntEnum
from pathlib import Path

import msgspec

from lmcache.errors import PoolError

PAGE_BYTES = 4096
FORMAT_VERSION = 2
MAGIC = b"LMCPOOL\0"
NAME_PREFIX = "lmcache-pool-"
CLIENT_SUFFIX = ".client-"
NO_OWNER = bytes(16)
# An engine that goes on while its GPU still reads a chunk counts on it. A GPU takes some 10 ms for what is left then.
KEPT_SECONDS = 0.25
_HALF = 1 << 32
# Another user's, or this process or machine has reached a limit.
_NOT_THE_FILES_FAULT = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
LOCK_TRIES = 20
LOCK_PAUSE_SECONDS = 0.01

# magic, format, record bytes, boot id, cookie, capacity, number of slots, data offset, persistent, kernel boot id, crc
_HEADER = struct.Struct("<8sII16s16sQQQI36sI")
_BOOT_ID = slice(16, 32)
# Behind the header, in the same page: how much of the data area is resident, from its start on. It only grows.
_RESIDENT_WORD = 2048 // 8
# Unmapping keeps the process's other threads from mapping memory: 6 GiB at once for 0.16 s, in such steps for 1 ms.
_UNMAP_STEP_BYTES = 64 << 20
# key, namespace id, owner, offset, length, generation, order, checksum, rank, state; then the checksum of these bytes
_RECORD = struct.Struct("<32sQ16sQQQQQHB5x")
_CRC = struct.Struct("<I")
RECORD_BYTES = 128
_RECORD_PADDING = bytes(RECORD_BYTES - _RECORD.size - _CRC.size)
_GENERATION_WORD = 72 // 8
_WORDS_PER_RECORD = RECORD_BYTES // 8


class SlotState(IntEnum):
    """What a slot's record says; the life of an entry is drawn in `storage/l1.py`."""

    FREE = 0
    RESERVED = 1
    COMMITTED = 2


class PoolHeader(msgspec.Struct, frozen=True, kw_only=True):
    """Identity and geometry. `boot_id` names one server process's life, `cookie` this file; both are 16 random bytes."""

    boot_id: bytes
    cookie: bytes
    capacity_bytes: int
    num_slots: int
    persistent: bool
    kernel_boot_id: str

    @property
    def data_offset(self) -> int:
        """Where the data area starts in the file: a whole page after the table."""
        return PAGE_BYTES + pages_of(self.num_slots * RECORD_BYTES) * PAGE_BYTES

    @property
    def file_bytes(self) -> int:
        """Length of the whole file."""
        return self.data_offset + self.capacity_bytes

    def pack(self) -> bytes:
        """Return the header's bytes, checksummed."""
        body = _HEADER.pack(
            MAGIC,
            FORMAT_VERSION,
            RECORD_BYTES,
            self.boot_id,
            self.cookie,
            self.capacity_bytes,
            self.num_slots,
            self.data_offset,
            self.persistent,
            self.kernel_boot_id.encode().ljust(36)[:36],
            0,
        )
        return body[:-4] + _CRC.pack(zlib.crc32(body[:-4]))


class SlotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One slot of the table. `order` is the commit's sequence number, `owner` the client that reserved it."""

    key: bytes = bytes(32)
    namespace_id: int = 0
    owner: bytes = NO_OWNER
    offset: int = 0
    length: int = 0
    generation: int = 0
    order: int = 0
    checksum: int = 0
    rank: int = 0
    state: SlotState = SlotState.FREE


def pages_of(num_bytes: int) -> int:
    """Return how many pages hold `num_bytes`."""
    return -(-num_bytes // PAGE_BYTES)


def kernel_boot_id() -> str:
    """Return an id of this boot of the kernel: memory does not outlive it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def unpack_header(raw: bytes, path: Path) -> PoolHeader:
    """Return the header in `raw`.

    Raises: PoolError when it is not a pool of this format.
    """
    if len(raw) < _HEADER.size or raw[:8] != MAGIC:
        raise PoolError(f"{path} is not a KV-cache pool", hint="remove the file, or choose another name")
    fields = _HEADER.unpack_from(raw)
    if fields[1:3] != (FORMAT_VERSION, RECORD_BYTES):
        raise PoolError(
            f"{path} has pool format {fields[1]}, this version reads {FORMAT_VERSION}",
            hint="remove the file: its entries cannot be carried over",
        )
    if zlib.crc32(raw[: _HEADER.size - 4]) != fields[10]:
        raise PoolError(
            f"{path} has a damaged header",
            hint="remove the file: its entries cannot be carried over",
        )
    return PoolHeader(
        boot_id=fields[3],
        cookie=fields[4],
        capacity_bytes=fields[5],
        num_slots=fields[6],
        persistent=bool(fields[8]),
        kernel_boot_id=fields[9].decode("ascii", "replace").strip(),
    )


def _read_header(fd: int, path: Path) -> PoolHeader:
    """Return the header of an open file whose length agrees with it."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise PoolError(f"{path} is not a regular file", hint="remove it, or choose another name")
    header = unpack_header(os.pread(fd, _HEADER.size, 0), path)
    if status.st_size != header.file_bytes:
        raise PoolError(
            f"{path} has {status.st_size} bytes, its header says {header.file_bytes}",
            hint="remove the file: its entries cannot be carried over",
        )
    return header


def try_lock(fd: int) -> bool:
    """Take the exclusive lock of an open file; False when a live process holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_soon(fd: int) -> bool:
    """Like `try_lock`, but outlast a server that only looks whether the file is a leftover: it holds the lock for a moment."""
    for _ in range(LOCK_TRIES):
        if try_lock(fd):
            return True
        time.sleep(LOCK_PAUSE_SECONDS)
    return False


def _create_locked(path: Path, mode: int) -> int:
    """Return a new file, locked. Until then a server that starts may take it for a leftover and remove it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        if _lock_soon(fd) and os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


class PoolFile:
    """The server's end: creates or adopts the file, holds its lock, writes the table.

    Closing removes the file unless the pool is persistent. Not thread-safe; `data_address` may be used by any thread.
    """

    def __init__(self, path: Path, fd: int, header: PoolHeader, adopted: bool) -> None:
        self.path = path
        self.header = header
        self.adopted = adopted
        self._fd = fd
        self._map = mmap.mmap(fd, header.file_bytes)
        self._view = memoryview(self._map)
        self._first_page = self._view[:PAGE_BYTES].cast("Q")
        self._words = self._view[PAGE_BYTES : header.data_offset].cast("Q")
        self.data = self._view[header.data_offset :]

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        capacity_bytes: int,
        num_slots: int,
        persistent: bool = False,
        mode: int = 0o600,
    ) -> PoolFile:
        """Create the file; its pages are not resident yet.

        Raises: PoolError when the file exists or cannot be created.
        """
        header = PoolHeader(
            boot_id=secrets.token_bytes(16),
            cookie=secrets.token_bytes(16),
            capacity_bytes=pages_of(capacity_bytes) * PAGE_BYTES,
            num_slots=num_slots,
            persistent=persistent,
            kernel_boot_id=kernel_boot_id(),
        )
        try:
            fd = _create_locked(path, mode)
        except OSError as exc:
            raise PoolError(f"cannot create {path}: {exc.strerror}", hint="see --pool-dir and --pool-name") from exc
        try:
            os.fchmod(fd, mode)
            os.ftruncate(fd, header.file_bytes)
            os.pwrite(fd, header.pack(), 0)
            return cls(path, fd, header, adopted=False)
        except OSError as exc:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise PoolError(
                f"cannot size {path} to {header.file_bytes} bytes: {exc.strerror}",
                hint="use a smaller --l1-size-gb",
            ) from exc

    @classmethod
    def adopt(cls, path: Path) -> PoolFile:
        """Take over a pool whose server is gone. The boot id is new, the cookie and the entries are the old ones.

        Nothing may be given away for KEPT_SECONDS: the last server's pins are gone, and who saw that they were there may still
        be reading.

        Raises: PoolError with the code `pool_in_use` when another server holds it, `pool_unavailable` when it may be good and
            cannot be had now, another one when the file is no pool of this format and this kernel boot.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise _no_pool(exc, f"cannot open {path}", "see --pool-dir and --pool-name") from exc
        try:
            if not (_lock_soon(fd) and os.fstat(fd).st_nlink):
                raise PoolError(
                    f"{path} is in use by another server",
                    hint="stop it, or choose another --pool-name",
                    code="pool_in_use",
                )
            header = _read_header(fd, path)
            if header.kernel_boot_id != kernel_boot_id():
                raise PoolError(f"{path} is from before the machine's last start", hint="remove the file")
            header = msgspec.structs.replace(header, boot_id=secrets.token_bytes(16))
            os.pwrite(fd, header.pack(), 0)
            return cls(path, fd, header, adopted=True)
        except (OSError, ValueError) as exc:
            os.close(fd)
            raise _no_pool(exc, f"cannot map {path}", "remove the file") from exc
        except PoolError:
            os.close(fd)
            raise

    def read(self, slot: int) -> SlotRecord | None:
        """Return a slot's record, or None when its checksum is wrong (a write was cut short)."""
        at = PAGE_BYTES + slot * RECORD_BYTES
        raw = bytes(self._view[at : at + RECORD_BYTES])
        if raw == _UNUSED:
            return _FREE_RECORD
        body = raw[: _RECORD.size]
        fields = _RECORD.unpack(body)
        if zlib.crc32(body) != _CRC.unpack_from(raw, _RECORD.size)[0] or fields[9] > SlotState.COMMITTED:
            return None
        return SlotRecord(
            key=fields[0],
            namespace_id=fields[1],
            owner=fields[2],
            offset=fields[3],
            length=fields[4],
            generation=fields[5],
            order=fields[6],
            checksum=fields[7],
            rank=fields[8],
            state=_STATES[fields[9]],
        )

    def write(self, slot: int, record: SlotRecord) -> None:
        """Replace a slot's record. One memory copy: a reader in another process sees each 8-byte word old or new."""
        body = _RECORD.pack(
            record.key,
            record.namespace_id,
            record.owner,
            record.offset,
            record.length,
            record.generation,
            record.order,
            record.checksum,
            record.rank,
            record.state,
        )
        at = PAGE_BYTES + slot * RECORD_BYTES
        self._view[at : at + RECORD_BYTES] = body + _CRC.pack(zlib.crc32(body)) + _RECORD_PADDING

    def generation(self, slot: int) -> int:
        """Return a slot's generation as it is in the file, also where the record is damaged."""
        return self._words[slot * _WORDS_PER_RECORD + _GENERATION_WORD]

    def tell_resident(self, num_bytes: int) -> None:
        """Let clients know that so much of the data area is resident; any thread, one at a time.

        What an adopted pool's last server has told stays true.
        """
        self._first_page[_RESIDENT_WORD] = max(num_bytes, self._first_page[_RESIDENT_WORD])

    def client_path(self, client_id: str) -> Path:
        """Return where a client of this pool keeps its presence file."""
        return client_path(self.path, client_id)

    @property
    def address(self) -> mmap.mmap:
        """The whole mapping, for the threads that make it resident."""
        return self._map

    def fileno(self) -> int:
        """The open file."""
        return self._fd

    @property
    def is_removed(self) -> bool:
        """Whether nobody can map it any more, because somebody has removed the file."""
        return not os.fstat(self._fd).st_nlink

    def close(self, *, keep: bool = False) -> None:
        """Unmap; remove the file and its clients' files unless `keep` or the pool is persistent."""
        if not (keep or self.header.persistent):
            self.path.unlink(missing_ok=True)
            remove_client_files(self.path)
        self._first_page.release()
        self._words.release()
        # A reply that is still being sent keeps the pages mapped until it goes: then nothing here may refer to them.
        with contextlib.suppress(BufferError):
            self.data.release()
            self._view.release()
            self._map.close()
        del self.data, self._view, self._map
        fcntl.flock(self._fd, fcntl.LOCK_UN)  # the mapping has a descriptor of its own that would keep the lock
        os.close(self._fd)


_UNUSED = bytes(RECORD_BYTES)
_FREE_RECORD = SlotRecord()
_STATES = tuple(SlotState)


def _no_pool(exc: Exception, what: str, hint: str) -> PoolError:
    """Return the error for a pool that cannot be had; whether that is the file's fault is in its code."""
    number, text = (exc.errno, exc.strerror) if isinstance(exc, OSError) else (0, str(exc))
    return PoolError(f"{what}: {text}", hint=hint, code="pool_unavailable" if number in _NOT_THE_FILES_FAULT else "")


def freed_generation(generation: int) -> int:
    """Return a slot's generation once its extent is given up. A damaged record's may be anything: it wraps around."""
    return (generation + 1) % _HALF**2


def taken_generation(generation: int) -> int:
    """Return a slot's generation once a pin is taken from its holder; the chunk is still there."""
    return (generation + _HALF) % _HALF**2


def is_same_chunk(generation: int, other: int) -> bool:
    """Tell whether a slot's extent was not given up between two looks at its generation."""
    return (generation - other) % _HALF == 0


def client_path(pool_path: Path, client_id: str) -> Path:
    """Return the presence file of a client: the client holds its lock as long as it lives."""
    return pool_path.with_name(pool_path.name + CLIENT_SUFFIX + client_id)


def remove_client_files(pool_path: Path) -> None:
    """Remove the presence files beside a pool that is gone; their clients notice that the server is."""
    for path in pool_path.parent.glob(f"{pool_path.name}{CLIENT_SUFFIX}*"):
        remove_client_file(path)


def remove_client_file(path: Path) -> None:
    """Remove a presence file, unless it is another user's in a folder that protects it: it is empty, and its client is gone."""
    with contextlib.suppress(OSError):
        path.unlink()


def is_client_alive(path: Path) -> bool:
    """Tell whether a live process holds the presence file: the kernel's answer, in any PID namespace.

    So it is taken to be where the file is there and cannot be opened (no descriptor left, another user's): to take a live
    client for a dead one would give away memory that it still writes.
    """
    try:
        watch = PresenceWatch(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    try:
        return watch.is_alive
    finally:
        watch.close()


class PresenceWatch:
    """Looks after the client that holds a presence file, also when the file is removed: whoever cleans up ends no life.

    Raises: OSError when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)

    @property
    def is_alive(self) -> bool:
        """Whether a live process holds the lock. Where none does we hold it from now on."""
        return not try_lock(self._fd)

    def close(self) -> None:
        """Look no more."""
        os.close(self._fd)


def remove_stale_pools(directory: Path) -> list[Path]:
    """Remove what killed processes left in `directory`: pools that nobody meant to keep, and dead clients' presence files.

    Returns: the paths of the pools.
    """
    removed = []
    for path in directory.glob(f"{NAME_PREFIX}*"):
        is_pool = CLIENT_SUFFIX not in path.name
        with contextlib.suppress(OSError, PoolError):
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if try_lock(fd) and not (is_pool and _is_kept(fd, path)):
                    path.unlink()
                    if is_pool:
                        remove_client_files(path)
                        removed.append(path)
            finally:
                os.close(fd)
    return removed


def _is_kept(fd: int, path: Path) -> bool:
    """A pool that cannot be adopted, whatever its name, is only memory that nobody can use."""
    try:
        header = _read_header(fd, path)
    except PoolError:
        return False
    return header.persistent and header.kernel_boot_id == kernel_boot_id()


class Presence:
    """A client's proof of life: a small file beside the pool, locked until `close` or the process's death.

    A process forked from the client gives its copy of the descriptor up at once: only the client's own life counts.
    """

    def __init__(self, pool_path: Path, client_id: str) -> None:
        self._path = client_path(pool_path, client_id)
        try:
            is_shared = bool(pool_path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
            self._fd = _create_locked(self._path, 0o600)
        except OSError as exc:
            raise PoolError(f"cannot create {self._path}: {exc.strerror}") from exc
        if is_shared:
            os.fchmod(self._fd, 0o644)  # the pool is shared between users: a server of another one asks for this lock
        self._is_anothers = False
        _presences.add(self)

    def leave_to_parent(self) -> None:
        """In a forked process: the lock and the file are the parent's, and stay."""
        self._is_anothers = True
        os.close(self._fd)

    def close(self) -> None:
        """Give the lock up and remove the file."""
        _presences.discard(self)
        if not self._is_anothers:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)


_presences: weakref.WeakSet[Presence] = weakref.WeakSet()


def _leave_presences_to_parent() -> None:
    for presence in _presences:
        presence.leave_to_parent()


os.register_at_fork(after_in_child=_leave_presences_to_parent)


def _out_of_reach(path: Path, exc: OSError) -> PoolError:
    """Return the error of a client that cannot open what the server named, with the usual causes as they look from here."""
    message = f"cannot open {path}: {exc.strerror}"
    if exc.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR):
        return PoolError(message)
    try:
        status = path.lstat()
        file = f"the file is user {status.st_uid}'s and group {status.st_gid}'s with mode {stat.S_IMODE(status.st_mode):04o}"
    except OSError as unseen:
        file = f"the file is not seen from here: {unseen.strerror}"
    namespaces = ", ".join(_namespace(kind) for kind in ("ipc", "mnt"))
    return PoolError(
        f"{message}; the usual causes: another user (this process is user {os.geteuid()} of group {os.getegid()}, {file}),"
        f" another IPC namespace or another mount of {path.parent} (this process is in {namespaces}),"
        f" another host (this one is {socket.gethostname()})",
        "run both as one user or the server with --pool-mode 0660 or 0666; mount one volume in memory at --pool-dir in both"
        " containers; to a server of another host there is only the socket",
    )


def _namespace(kind: str) -> str:
    """Return this process's namespace as the kernel names it, to compare with the server's: `ls -l /proc/PID/ns`."""
    try:
        return os.readlink(f"/proc/self/ns/{kind}")
    except OSError:
        return f"{kind}:unknown"


class PoolView:
    """A client's end: the data area to read and write, the header and the slot table to read.

    Raises: PoolError when the file cannot be mapped or is no pool of this format.
    """

    def __init__(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise _out_of_reach(path, exc) from exc
        try:
            self.header = _read_header(fd, path)
            status = os.fstat(fd)
            self.file_id = (status.st_dev, status.st_ino)
            offset = self.header.data_offset
            self._table = mmap.mmap(fd, offset, prot=mmap.PROT_READ)
            self._data = mmap.mmap(fd, self.header.capacity_bytes, offset=offset)
        except (OSError, ValueError) as exc:
            raise PoolError(f"cannot map {path}: {exc}") from exc
        finally:
            os.close(fd)
        self.path = path
        self.data = memoryview(self._data)
        self._first_page = memoryview(self._table)[:PAGE_BYTES].cast("Q")
        self._words = memoryview(self._table)[PAGE_BYTES:].cast("Q")

    @property
    def resident_bytes(self) -> int:
        """How much of the data area is resident, from its start on, as the server has told."""
        return min(self._first_page[_RESIDENT_WORD], self.header.capacity_bytes)

    @property
    def boot_id(self) -> bytes:
        """Which server's life the file belongs to now; `header` has what it was."""
        return self._table[_BOOT_ID]

    def generation(self, slot: int) -> int:
        """Return a slot's generation as it is now: compare it after a copy with the one told before."""
        return self._words[slot * _WORDS_PER_RECORD + _GENERATION_WORD]

    def extent(self, offset: int, length: int) -> memoryview:
        """Return the bytes of one chunk, writable; valid until `close`.

        Raises: PoolError when the range is outside the data area.
        """
        if offset < 0 or length <= 0 or offset + length > self.header.capacity_bytes:
            raise PoolError(f"extent [{offset}, {offset + length}) is outside the pool")
        return self.data[offset : offset + length]

    def close(self) -> None:
        """Unmap; views of the data that callers still hold keep their pages mapped until they go.

        Takes 0.03 s a GiB, and 0.2 s where nobody else has the file any more.
        """
        from lmcache.pages import MADV_DONTNEED, address_of, advise

        self._first_page.release()
        self._words.release()
        self._table.close()
        advise(address_of(self._data), len(self._data), MADV_DONTNEED, _UNMAP_STEP_BYTES)
        with contextlib.suppress(BufferError):
            self.data.release()
            self._data.close()
        del self.data, self._data
