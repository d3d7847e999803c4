"""Small pools, managers and in-process servers that tests open, with what they must look like afterwards."""

import hashlib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmcache.client.mq import MessageQueueClient
from lmcache.keys import KEY_BYTES
from lmcache.pool import NAME_PREFIX, PAGE_BYTES, PoolFile
from lmcache.protocol import Placement, Status, StoreOutcome
from lmcache.server.app import RunningServer, start_server
from lmcache.server.args import (
    HttpFrontendSettings,
    MPServerSettings,
    PrometheusSettings,
    ServerConfig,
    StorageManagerSettings,
    TelemetrySettings,
)
from lmcache.storage.manager import Removal, RemovalReason, Selection, StorageManager

OWNER = bytes(range(16))
OTHER = bytes(range(100, 116))
WAIT_SECONDS = 120.0


def key(number: int) -> bytes:
    """One chunk key for each number."""
    return hashlib.sha256(b"test %d" % number).digest()


def keys(*numbers: int) -> bytes:
    """Their keys, concatenated."""
    return b"".join(key(number) for number in numbers)


def pool_path(directory: Path, name: str = "test") -> Path:
    """Where a test's pool lies."""
    return directory / f"{NAME_PREFIX}{name}"


@contextmanager
def file_system_in_memory(directory: Path, size: str) -> Iterator[Path]:
    """A real one, mounted on a new folder; the test is skipped where that is not permitted."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)  # also after a failure that left a pool mapped


def wait_until(condition: Callable[[], Any], what: str = "the condition") -> None:
    """Return when `condition` is true; a deadline, not a measurement."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true in {WAIT_SECONDS:g} s"
        time.sleep(0.005)


def open_manager(
    pool: PoolFile,
    *,
    watermark: float = 1.0,
    ratio: float = 0.05,
    on_removed: Callable[[RemovalReason, int, int], None] = lambda reason, num_chunks, num_bytes: None,
) -> StorageManager:
    """A manager whose whole pool is resident. At a watermark of 1 only demand evicts."""
    manager = StorageManager(
        pool, policy_name="LRU", high_watermark_ratio=watermark, eviction_ratio=ratio, on_removed=on_removed
    )
    wait_until(lambda: not manager.residency.is_running, "residency")
    manager.l1.grow_to(manager.residency.frontier_pages())
    return manager


def create_manager(directory: Path, num_pages: int = 64, num_slots: int = 64, **settings: Any) -> StorageManager:
    """A manager of a new pool."""
    pool = PoolFile.create(pool_path(directory), capacity_bytes=num_pages * PAGE_BYTES, num_slots=num_slots)
    return open_manager(pool, **settings)


def adopt_manager(directory: Path, **settings: Any) -> StorageManager:
    """A manager of the pool that `crash` left."""
    return open_manager(PoolFile.adopt(pool_path(directory)), **settings)


def crash(manager: StorageManager) -> None:
    """End a manager as SIGKILL would: the file stays as it is."""
    manager.close(keep=True)


@contextmanager
def manager_in(directory: Path, num_pages: int = 64, num_slots: int = 64, **settings: Any) -> Iterator[StorageManager]:
    """A manager whose books are checked at the end."""
    manager = create_manager(directory, num_pages, num_slots, **settings)
    try:
        yield manager
        manager.l1.check()
    finally:
        manager.close()


def reserve(
    manager: StorageManager, *numbers: int, num_bytes: int = PAGE_BYTES, rank: int = 0, owner: bytes = OWNER, **more: Any
) -> tuple[list[StoreOutcome], list[Placement]]:
    """Reserve a place of `num_bytes` for each numbered key."""
    values = {"namespace_id": 0, "parent": b"", **more}
    return manager.reserve(keys(*numbers), rank, [num_bytes] * len(numbers), owner=owner, **values)


def store(manager: StorageManager, *numbers: int, num_bytes: int = PAGE_BYTES, rank: int = 0, **more: Any) -> list[int]:
    """Reserve, write the key all over each extent, commit; return the slots."""
    outcomes, placements = reserve(manager, *numbers, num_bytes=num_bytes, rank=rank, **more)
    assert outcomes == [StoreOutcome.RESERVED] * len(numbers)
    for number, placement in zip(numbers, placements, strict=True):
        manager.l1.pool.data[placement.offset : placement.offset + num_bytes] = content(number, num_bytes)
    slots = manager.l1.commit(placements, OWNER)
    assert slots == [placement.slot for placement in placements]
    return slots


def content(number: int, num_bytes: int) -> bytes:
    """The bytes that `store` writes for a numbered key."""
    return (key(number) * (num_bytes // KEY_BYTES + 1))[:num_bytes]


def present(manager: StorageManager, numbers: range) -> set[int]:
    """Which numbered keys can be found."""
    return {number for number in numbers if manager.l1.find(key(number), 0) is not None}


# -- servers ----------------------------------------------------------------------------------------------------------


def make_config(directory: Path, token: str = "", **settings: Any) -> ServerConfig:
    """Settings of a small server on free ports; `settings` go to whichever group has them."""
    groups: dict[str, Any] = {
        "server": MPServerSettings(port=0, chunk_size=16),
        "storage": StorageManagerSettings(l1_size_gb=1 / 256, pool_dir=str(directory)),
        "prometheus": PrometheusSettings(),
        "telemetry": TelemetrySettings(status_interval_seconds=0),
        "http": HttpFrontendSettings(no_http=True, http_port=0),
    }
    for name, value in settings.items():
        group = next(group for group in groups if hasattr(groups[group], name))
        groups[group] = replace(groups[group], **{name: value})
    return ServerConfig(**groups, http_token=token)


def status_of(server: RunningServer) -> dict[str, Any]:
    """What the server says about itself."""
    with MessageQueueClient(server.endpoints.zmq) as mq:
        return mq.call(Status()).status


@contextmanager
def server_in(directory: Path, *, leaves_pool: bool = False, **settings: Any) -> Iterator[RunningServer]:
    """A server in this process; its books are checked after its end."""
    server = start_server(make_config(directory, **settings))
    try:
        wait_until(lambda: not server.service.storage.residency.is_running, "residency")
        yield server
    finally:
        books = server.service.storage.l1
        server.stop()
        books.check()
        left = list(directory.glob(f"{NAME_PREFIX}*"))
        assert leaves_pool or not left, f"left behind: {left}"


def remove(manager: StorageManager, selection: Selection, reason: RemovalReason, dry_run: bool) -> Removal:
    """Remove what is selected, slice after slice, as the owner thread does with others' requests in between."""
    sweep = manager.begin_removal(selection, reason, dry_run)
    while sweep.num_left:
        manager.advance(sweep)
    return sweep.removal
