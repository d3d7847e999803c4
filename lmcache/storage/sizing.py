"""How large a pool may be: asked before anything is allocated."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from lmcache.errors import PoolSizeError
from lmcache.pool import PAGE_BYTES, RECORD_BYTES, pages_of

GIB = 1 << 30
CGROUP_ROOT = Path("/sys/fs/cgroup")
# One slot for each 64 KiB: small models' chunks have at least that, and the table costs 0.2 % of the pool.
BYTES_PER_SLOT = 64 << 10
MIN_SLOTS = 1024
# Page tables and the like of a pool's own count too: 0.5 % of it; and the index of its chunks takes some more.
CGROUP_SHARE = 0.99
# What the host keeps for everything else: 5 % of its memory, between 512 MiB and 8 GiB.
RESERVE_RATIO = 0.05
MIN_RESERVE_BYTES = 512 << 20
MAX_RESERVE_BYTES = 8 * GIB
DEFAULT_SHARE = 0.25
DEFAULT_MAX_BYTES = 64 * GIB
DEFAULT_PIECE_BYTES = 64 << 20
# Where a quarter is less than that, such as in the 64 MiB of a container's /dev/shm, a pool may take nearly all of it.
SMALL_SHARE = 0.9


class Limit(msgspec.Struct, frozen=True):
    """One thing that bounds the pool."""

    name: str
    num_bytes: int


def default_slots(capacity_bytes: int) -> int:
    """Return how many slots a pool gets unless told otherwise."""
    return max(MIN_SLOTS, capacity_bytes // BYTES_PER_SLOT)


def file_bytes(capacity_bytes: int, num_slots: int) -> int:
    """Return what a pool of this size takes in all."""
    return PAGE_BYTES * (1 + pages_of(num_slots * RECORD_BYTES) + pages_of(capacity_bytes))


def limits(directory: Path) -> list[Limit]:
    """Return what bounds a pool in `directory`, in bytes of the whole file."""
    found = []
    meminfo = _meminfo()
    if "MemAvailable" in meminfo:
        reserve = min(max(int(meminfo["MemTotal"] * RESERVE_RATIO), MIN_RESERVE_BYTES), MAX_RESERVE_BYTES)
        found.append(
            Limit(
                "the host's available memory less a reserve",
                max(0, meminfo["MemAvailable"] - reserve),
            )
        )
    cgroup = _cgroup_available()
    if cgroup is not None:
        found.append(
            Limit("the cgroup's memory limit less what it uses", max(0, int((cgroup - MIN_RESERVE_BYTES) * CGROUP_SHARE)))
        )
    status = os.statvfs(directory)
    found.append(Limit(f"the space left in {directory}", status.f_bavail * status.f_frsize))
    return found


def check_size(capacity_bytes: int, num_slots: int, directory: Path, allow_overcommit: bool = False) -> None:
    """Return if a pool of this size fits.

    Raises: PoolSizeError that names what is too small and the largest size that fits.
    """
    tightest = _tightest(directory, allow_overcommit)
    if file_bytes(capacity_bytes, num_slots) > tightest.num_bytes:
        raise PoolSizeError(
            f"an L1 of {capacity_bytes / GIB:.2f} GiB does not fit: {tightest.name} is {tightest.num_bytes / GIB:.2f} GiB",
            hint=_size_hint(tightest, _largest_that_fits(tightest.num_bytes, capacity_bytes, num_slots)),
        )


def lacking_bytes(capacity_bytes: int, num_slots: int, directory: Path, allow_overcommit: bool = False) -> int:
    """Return how much more must be free for a pool of this size; 0 when it fits."""
    return max(0, file_bytes(capacity_bytes, num_slots) - _tightest(directory, allow_overcommit).num_bytes)


def _tightest(directory: Path, allow_overcommit: bool) -> Limit:
    binding = [limit for limit in limits(directory) if _is_file_system(limit) or not allow_overcommit]
    return min(binding, key=lambda limit: limit.num_bytes)


def held_bytes(directory: Path) -> int:
    """Return what files take that were removed and are still mapped: pools that engines have not let go of yet.

    0 where that cannot be told: the folder is not the root of a tmpfs, or some of it cannot be read.
    """

    def give_up(exc: OSError) -> None:
        raise exc

    found = {}
    try:
        if not _is_tmpfs(directory):
            return 0
        status = os.statvfs(directory)
        for folder, _, names in os.walk(directory, onerror=give_up):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    one = os.lstat(Path(folder, name))
                    found[one.st_ino] = one.st_blocks * 512
    except OSError:
        return 0
    return max(0, (status.f_blocks - status.f_bfree) * status.f_frsize - sum(found.values()))


def _is_tmpfs(directory: Path) -> bool:
    """Tell whether a tmpfs is mounted here, all of it."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, file_system = line.partition(" - ")
        if mount.split()[3:5] == ["/", str(directory.resolve())] and file_system.split()[0] == "tmpfs":
            return True
    return False


def _is_file_system(limit: Limit) -> bool:
    return limit.name.startswith("the space left")


def _size_hint(limit: Limit, largest_bytes: int) -> str:
    hundredths = largest_bytes * 100 // GIB
    smaller = f"use --l1-size-gb {hundredths / 100:.2f} or less" if hundredths else "free some of it"
    return smaller + (", or choose another --pool-dir" if _is_file_system(limit) else ", or pass --allow-overcommit")


def _largest_that_fits(available: int, capacity_bytes: int, num_slots: int) -> int:
    """The slot table shrinks with the pool unless its size was asked for."""
    table = file_bytes(capacity_bytes, num_slots) - capacity_bytes
    if num_slots == default_slots(capacity_bytes):
        table = file_bytes(available, default_slots(available)) - available
    return max(0, available - table)


def default_capacity_bytes(directory: Path) -> int:
    """Return a size that fits this machine: a quarter of what is to be had, at most 64 GiB, whole 64 MiB."""
    available = min(limit.num_bytes for limit in limits(directory))
    share = int(min(available * DEFAULT_SHARE, DEFAULT_MAX_BYTES)) // DEFAULT_PIECE_BYTES * DEFAULT_PIECE_BYTES
    small = int(min(available * SMALL_SHARE, DEFAULT_PIECE_BYTES)) // PAGE_BYTES * PAGE_BYTES
    return max(share, small, PAGE_BYTES)


def _meminfo() -> dict[str, int]:
    found = {}
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            found[name] = int(rest.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return {}
    return found


def _cgroup_available() -> int | None:
    """Return limit - usage, without page cache, of the tightest cgroup we are in (v2, then v1); None without one."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            names = ("memory.max", "memory.current", "inactive_file")
            found += [_room(group, *names) for group in _ancestors(CGROUP_ROOT, path)]
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += [_room(group, *names) for group in _ancestors(CGROUP_ROOT / "memory", path)]
    return min((room for room in found if room is not None), default=None)


def _ancestors(root: Path, path: str) -> list[Path]:
    group = root / path.lstrip("/")
    return [group, *(parent for parent in group.parents if parent.is_relative_to(root))]


def _room(group: Path, limit_name: str, usage_name: str, cache_name: str) -> int | None:
    try:
        limit = (group / limit_name).read_text().strip()
        usage = int((group / usage_name).read_text())
    except (OSError, ValueError):
        return None
    if not limit.isdigit() or int(limit) >= 1 << 60:
        return None
    return max(0, int(limit) - max(0, usage - _page_cache(group, cache_name)))


def _page_cache(group: Path, name: str) -> int:
    """Return what the kernel gives back before it kills anything, as kubelet counts it; files in a tmpfs are no part of it."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.split()[:1] == [name]), 0)
    except (OSError, ValueError, IndexError):
        return 0
