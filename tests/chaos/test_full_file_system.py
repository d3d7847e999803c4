"""Pools on a file system without enough room: what cannot be had is reported, and nobody gets a SIGBUS."""

import subprocess
from pathlib import Path

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.pool import NAME_PREFIX, PoolFile
from lmcache.protocol import StoreOutcome
from tests.chaos.actor import Actor
from tests.chaos.content import chunk_key, content
from tests.chaos.waiting import wait_until
from tests.server_process import LmcacheServer, free_port, run_lmcache

MIB = 1 << 20
CHUNK_BYTES = MIB
FLAGS = ["--pool-name", "kept", "--pool-dir"]


@pytest.fixture
def mount(tmp_path):
    """Mounts memory file systems of a given size and takes them down after the test."""
    mounted: list[Path] = []

    def mount_one(options: str) -> Path:
        path = tmp_path / f"mount{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "lmcache-test", str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"mounting a file system is not permitted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount_one
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def leave_pool(directory: Path, capacity_bytes: int) -> None:
    """Leave a pool that takes no room yet, as a server does that was killed before it had grown."""
    pool = PoolFile.create(directory / f"{NAME_PREFIX}kept", capacity_bytes=capacity_bytes, num_slots=1024, persistent=True)
    pool.close()


def fill_up(directory: Path) -> None:
    def write_for_ever() -> None:
        while True:
            filler.write(bytes(MIB))

    with (directory / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        write_for_ever()


def store_and_check(client: KVCacheClient, first: int, num_chunks: int) -> None:
    for index in range(first, first + num_chunks):
        key = chunk_key(index)
        assert client.store(key, [content(key, CHUNK_BYTES)]) == [StoreOutcome.RESERVED]
        with client.pin(key) as pinned:
            assert pinned.extents[0] == content(key, CHUNK_BYTES)


def test_a_pool_larger_than_the_file_system_is_refused_also_with_overcommit(mount):
    directory = mount("size=16m")
    done = run_lmcache(
        "server", "--no-http", "--port", str(free_port()), "--l1-size-gb", "0.03125", "--pool-dir", str(directory),
        "--allow-overcommit",
    )  # fmt: skip
    assert done.returncode == 2
    assert f"the space left in {directory} is" in done.stderr
    assert "use --l1-size-gb 0.01 or less" in done.stderr
    assert list(directory.iterdir()) == []


def test_a_pool_that_cannot_grow_any_more_serves_what_it_has_and_says_so(mount):
    directory = mount("size=160m")
    leave_pool(directory, 256 * MIB)
    with LmcacheServer([*FLAGS, str(directory)], http=False, leaves_pool=True) as server:
        wait_until(lambda: server.status()["problems"], "the server notices")
        status = server.status()
        assert not status["healthy"]
        assert "the pool stops growing at" in status["problems"][0]
        # Pieces of 64 MiB are populated side by side; two that share the last room both fail.
        assert status["l1"]["resident_bytes"] in (64 * MIB, 128 * MIB)
        with KVCacheClient(server.zmq_url) as client:
            store_and_check(client, 0, 140)
        assert server.status()["l1"]["used_bytes"] <= 128 * MIB


def test_an_adopted_pool_without_room_for_its_first_pages_is_refused_and_kept(mount):
    directory = mount("size=32m")
    leave_pool(directory, 256 * MIB)
    done = run_lmcache("server", "--no-http", "--port", str(free_port()), *FLAGS, str(directory))
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: cannot allocate the pool")
    assert [path.name for path in directory.iterdir()] == [f"{NAME_PREFIX}kept"]


def test_a_file_system_that_fills_up_later_takes_nothing_from_the_pool(mount):
    directory = mount("size=32m")
    flags = ["--pool-dir", str(directory)]
    with LmcacheServer(flags, http=False, l1_size_gb=16 / 1024) as server:
        wait_until(lambda: server.status()["l1"]["resident_bytes"] == 16 * MIB, "the pool is resident")
        fill_up(directory)
        with KVCacheClient(server.zmq_url) as client:
            store_and_check(client, 0, 32)
            assert not client.is_inline


def test_a_client_that_finds_no_room_for_its_presence_file_uses_the_socket(mount):
    directory = mount("size=32m,nr_inodes=2")
    with LmcacheServer(["--pool-dir", str(directory)], http=False, l1_size_gb=16 / 1024) as server:
        with KVCacheClient(server.zmq_url) as client:
            store_and_check(client, 0, 4)
            assert client.is_inline
        with Actor(server.zmq_url) as actor:
            assert actor.tell("pin", indices=[0, 1]) == 2
            assert actor.tell("read") == "right"
