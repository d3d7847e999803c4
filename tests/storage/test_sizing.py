"""How large a pool may be, on machines that are described by files."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.errors import PoolSizeError
from lmcache.pool import PAGE_BYTES, PoolFile
from lmcache.storage import sizing
from lmcache.storage.sizing import CGROUP_SHARE, GIB, MIN_RESERVE_BYTES, Limit
from tests.pools import pool_path

MIB = 1 << 20
SHM = Path("/dev/shm")


class Machine:
    """What /proc, the cgroup file system and statvfs say."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cgroups = root / "cgroup"
        self.cgroups.mkdir()
        self.files = {"/proc/meminfo": "", "/proc/self/cgroup": ""}
        self.free_bytes = 1 << 60
        monkeypatch.setattr(sizing, "CGROUP_ROOT", self.cgroups)
        monkeypatch.setattr(sizing.os, "statvfs", lambda path: SimpleNamespace(f_bavail=self.free_bytes // 512, f_frsize=512))
        real = Path.read_text

        def read_text(path: Path, *args: object) -> str:
            return self.files[str(path)] if str(path) in self.files else real(path)

        monkeypatch.setattr(Path, "read_text", read_text)

    def has_memory(self, total: int, available: int) -> None:
        self.files["/proc/meminfo"] = f"MemTotal: {total >> 10} kB\nMemFree: 1 kB\nMemAvailable: {available >> 10} kB\n"

    def has_group(self, path: str, **values: object) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (folder / name.replace("__", ".")).write_text(f"{value}\n")

    def room(self) -> int | None:
        """What the cgroup leaves, before the reserve."""
        found = [limit.num_bytes for limit in sizing.limits(SHM) if "cgroup" in limit.name]
        return round(found[0] / CGROUP_SHARE / MIB) * MIB + MIN_RESERVE_BYTES if found else None


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


# -- what is to be had ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "available", "expected"),
    [
        (4 * GIB, 3 * GIB, 3 * GIB - 512 * MIB),  # 5 % would be too little
        (100 * GIB, 50 * GIB, 45 * GIB),
        (1000 * GIB, 900 * GIB, 892 * GIB),  # 5 % would be too much
        (4 * GIB, 100 * MIB, 0),
    ],
)
def test_the_host_keeps_a_reserve_of_its_available_memory(machine: Machine, total: int, available: int, expected: int):
    machine.has_memory(total, available)
    assert sizing.limits(SHM)[0] == Limit("the host's available memory less a reserve", expected)


def test_a_machine_that_tells_nothing_is_bounded_by_the_file_system_alone(machine: Machine):
    machine.free_bytes = 3 * GIB
    for text in ("", "nonsense", "MemAvailable:\n", "MemAvailable: x kB\n"):
        machine.files["/proc/meminfo"] = text
        assert sizing.limits(SHM) == [Limit("the space left in /dev/shm", 3 * GIB)]


def test_the_second_cgroup_version_bounds_by_its_tightest_ancestor(machine: Machine):
    machine.files["/proc/self/cgroup"] = "0::/pods/pod1/box\n"
    machine.has_group("pods/pod1/box", memory__max="max", memory__current=1 * GIB)
    assert machine.room() is None
    machine.has_group("pods/pod1", memory__max=8 * GIB, memory__current=1 * GIB)
    machine.has_group("pods", memory__max=10 * GIB, memory__current=6 * GIB)
    assert machine.room() == 4 * GIB


def test_the_second_version_in_a_container_reads_its_root(machine: Machine):
    machine.files["/proc/self/cgroup"] = "0::/\n"
    machine.has_group("", memory__max=2 * GIB, memory__current=GIB)
    assert machine.room() == GIB


def test_the_first_cgroup_version_bounds_too(machine: Machine):
    machine.files["/proc/self/cgroup"] = "12:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n1:name=systemd:/docker/x\n"
    machine.has_group("memory/docker/x", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=GIB)
    machine.has_group("memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=GIB)
    assert machine.room() == 2 * GIB


def test_the_first_version_in_a_container_reads_its_root_where_the_hosts_path_is_not_mounted(machine: Machine):
    machine.files["/proc/self/cgroup"] = "5:memory:/docker/0123456789abcdef\n0::/docker/0123456789abcdef\n"
    machine.has_group("memory", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=GIB)
    assert machine.room() == 2 * GIB


@pytest.mark.parametrize("lines", ["", "nonsense\n", "5:memory\n", "\n"])
def test_unknown_cgroup_lines_bound_nothing_and_stop_nothing(machine: Machine, lines: str):
    machine.files["/proc/self/cgroup"] = lines
    assert machine.room() is None


@pytest.mark.parametrize(
    ("lines", "group", "names", "cache_name"),
    [
        ("0::/box\n", "box", ("memory__max", "memory__current"), "inactive_file"),
        ("5:memory:/box\n", "memory/box", ("memory__limit_in_bytes", "memory__usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_page_cache_that_the_kernel_gives_back_is_room(
    machine: Machine, lines: str, group: str, names: tuple[str, str], cache_name: str
):
    machine.files["/proc/self/cgroup"] = lines
    for cache_bytes, room in ((13 * GIB, 14 * GIB), (20 * GIB, 16 * GIB), ("x", GIB)):
        stat = f"anon {GIB}\nshmem {GIB}\n\nmy_{cache_name} {GIB}\n{cache_name} {cache_bytes}\nactive_file {GIB}"
        machine.has_group(group, **dict(zip(names, (16 * GIB, 15 * GIB), strict=True)), memory__stat=stat)
        assert machine.room() == room


def test_usage_above_the_limit_leaves_nothing(machine: Machine):
    machine.files["/proc/self/cgroup"] = "0::/\n"
    machine.has_group("", memory__max=GIB, memory__current=2 * GIB)
    assert [limit.num_bytes for limit in sizing.limits(SHM) if "cgroup" in limit.name] == [0]


# -- what is refused --------------------------------------------------------------------------------------------------


def hinted_bytes(error: PoolSizeError) -> int:
    return int(float(error.hint.removeprefix("use --l1-size-gb ").split(" ")[0]) * GIB)


def check(capacity: int, allow_overcommit: bool = False) -> None:
    sizing.check_size(capacity, sizing.default_slots(capacity), SHM, allow_overcommit)


@settings(max_examples=60)
@given(host=st.integers(2, 4000), group=st.integers(2, 4000), free=st.integers(2, 4000), asked=st.integers(1, 10_000))
def test_the_size_in_the_hint_fits_every_bound_and_is_nearly_the_largest(host, group, free, asked):
    bounds = [Limit("host", host * GIB), Limit("cgroup", group * GIB), Limit("the space left in /dev/shm", free * GIB)]
    tightest = min(host, group, free)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sizing, "limits", lambda directory: bounds)
        if asked < 0.98 * tightest:
            check(asked * GIB)
            return
        with pytest.raises(PoolSizeError) as caught:
            check(max(asked, tightest) * GIB)  # the slot table takes a little
        assert f"{max(asked, tightest):.2f} GiB" in caught.value.message
        assert f"is {tightest:.2f} GiB" in caught.value.message
        check(hinted_bytes(caught.value))
        assert hinted_bytes(caught.value) > 0.98 * tightest * GIB


def test_more_than_the_host_has_is_refused_unless_asked_for(machine: Machine):
    """MEM-5: 100 GiB on a host of 94."""
    machine.has_memory(94 * GIB, 90 * GIB)
    with pytest.raises(PoolSizeError) as caught:
        check(100 * GIB)
    assert "an L1 of 100.00 GiB does not fit: the host's available memory less a reserve is 85.30 GiB" in str(caught.value)
    assert "--allow-overcommit" in caught.value.hint
    assert caught.value.exit_code == 2
    check(100 * GIB, allow_overcommit=True)


def test_the_file_system_cannot_be_overcommitted(machine: Machine):
    machine.has_memory(94 * GIB, 90 * GIB)
    machine.free_bytes = 64 * MIB
    with pytest.raises(PoolSizeError, match=r"the space left in /dev/shm is 0\.06 GiB") as caught:
        check(GIB, allow_overcommit=True)
    assert "--allow-overcommit" not in caught.value.hint
    check(hinted_bytes(caught.value), allow_overcommit=True)


def test_where_nothing_fits_the_hint_offers_no_size(machine: Machine):
    machine.has_memory(4 * GIB, 100 * MIB)
    with pytest.raises(PoolSizeError) as caught:
        check(GIB)
    assert caught.value.hint == "free some of it, or pass --allow-overcommit"


def test_what_is_lacking_is_what_would_have_to_be_free(machine: Machine):
    machine.has_memory(94 * GIB, 20 * GIB)
    with pytest.raises(PoolSizeError):
        sizing.check_size(40 * GIB, 1024, SHM)
    lacking = sizing.lacking_bytes(40 * GIB, 1024, SHM)
    assert 0 < lacking < 30 * GIB
    machine.has_memory(94 * GIB, 20 * GIB + lacking + PAGE_BYTES)  # told in KiB
    sizing.check_size(40 * GIB, 1024, SHM)
    assert sizing.lacking_bytes(40 * GIB, 1024, SHM) == 0


def test_a_pools_file_takes_what_was_checked(tmp_path: Path):
    for capacity, num_slots in ((PAGE_BYTES, 1), (10 * PAGE_BYTES, 33), (1 << 20, 1024)):
        made = PoolFile.create(pool_path(tmp_path), capacity_bytes=capacity, num_slots=num_slots)
        assert made.path.stat().st_size == sizing.file_bytes(capacity, num_slots)
        made.close()
