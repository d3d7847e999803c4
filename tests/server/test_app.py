"""Starting and stopping: what is refused before anything is made, what is adopted, and that nothing is left."""

import errno
import os
import signal
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import PoolSizeError, UsageError
from lmcache.metrics import Metrics
from lmcache.pool import PAGE_BYTES, PoolFile, PoolView, Presence
from lmcache.server.app import StopRequest, main, start_server, wait_for_room
from lmcache.storage import sizing
from lmcache.storage.sizing import Limit
from tests.pools import content, file_system_in_memory, keys, make_config, server_in, status_of, wait_until
from tests.server_process import LmcacheServer, free_port

KEPT = {"pool_name": "kept", "leaves_pool": True}


def kept_pool(directory):
    return directory / "lmcache-pool-kept"


def store(server, *numbers):
    with KVCacheClient(server.endpoints.zmq) as client:
        assert client.store(keys(*numbers), [content(number, PAGE_BYTES) for number in numbers]) == [0] * len(numbers)


def hits(server, *numbers):
    with KVCacheClient(server.endpoints.zmq) as client:
        return client.lookup(keys(*numbers), pin=False).hit_chunks


def test_two_servers_fit_in_one_process_and_share_nothing(tmp_path):
    with server_in(tmp_path, leaves_pool=True) as one, server_in(tmp_path, leaves_pool=True) as other:
        store(one, 1, 2)
        assert (hits(one, 1, 2), hits(other, 1, 2)) == (2, 0)
        assert status_of(one)["boot"] != status_of(other)["boot"]
        assert status_of(other)["counters"]["stored_chunks"] == 0


def test_an_unnamed_pool_goes_with_its_server(tmp_path):
    with server_in(tmp_path) as server:
        assert status_of(server)["l1"]["persistent"] is False
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_named_pool_is_served_again_by_the_next_server(tmp_path):
    with server_in(tmp_path, **KEPT) as server:
        store(server, 1, 2)
        first = status_of(server)
    with server_in(tmp_path, **KEPT) as server:
        second = status_of(server)
        assert (second["l1"]["adopted_chunks"], second["l1"]["persistent"]) == (2, True)
        assert second["boot"] != first["boot"]
        assert hits(server, 1, 2, 3) == 2
    kept_pool(tmp_path).unlink()


def test_an_adopted_pool_keeps_its_size_and_is_not_measured_again(tmp_path, monkeypatch):
    with server_in(tmp_path, l1_size_gb=1 / 256, **KEPT):
        pass
    monkeypatch.setattr("lmcache.storage.sizing.limits", lambda directory: [Limit("nothing", 0)])
    with server_in(tmp_path, l1_size_gb=1 / 64, **KEPT) as server:
        assert status_of(server)["l1"]["capacity_bytes"] == 4 << 20
    kept_pool(tmp_path).unlink()


def test_a_pool_in_use_is_one_usage_error_and_is_left_alone(tmp_path):
    with server_in(tmp_path, **KEPT) as server:
        store(server, 1)
        with pytest.raises(UsageError, match="in use by another server") as caught:
            start_server(make_config(tmp_path, pool_name="kept"))
        assert "--pool-name" in caught.value.hint
        assert hits(server, 1) == 1
    kept_pool(tmp_path).unlink()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EMFILE, errno.ENOMEM])
def test_a_pool_that_cannot_be_had_now_is_one_usage_error_and_stays(tmp_path, monkeypatch, number):
    """It may be another user's, or good and only out of reach for the moment."""
    with server_in(tmp_path, **KEPT) as server:
        store(server, 1)
    open_ = os.open

    def refuse(path, *args, **more):
        if Path(path) == kept_pool(tmp_path):
            raise OSError(number, os.strerror(number), str(path))
        return open_(path, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr("lmcache.pool.os.open", refuse)
        with pytest.raises(UsageError, match=os.strerror(number)):
            start_server(make_config(tmp_path, pool_name="kept"))
    with server_in(tmp_path, **KEPT) as server:
        assert hits(server, 1) == 1
    kept_pool(tmp_path).unlink()


def test_a_pool_of_no_use_that_cannot_be_removed_is_one_usage_error(tmp_path, monkeypatch):

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    kept_pool(tmp_path).write_bytes(b"junk")
    with monkeypatch.context() as patch:
        patch.setattr("lmcache.server.app.Path.unlink", refuse)
        with pytest.raises(UsageError, match="Operation not permitted"):
            start_server(make_config(tmp_path, pool_name="kept"))
    kept_pool(tmp_path).unlink()


@pytest.mark.parametrize("damage", [b"", b"junk" * 5000, None])
def test_a_named_pool_that_is_of_no_use_is_replaced_by_an_empty_one(tmp_path, damage):
    with server_in(tmp_path, **KEPT) as server:
        store(server, 1)
    if damage is None:
        with kept_pool(tmp_path).open("r+b") as file:
            file.truncate(PAGE_BYTES)
    else:
        kept_pool(tmp_path).write_bytes(damage)
    with server_in(tmp_path, **KEPT) as server:
        assert hits(server, 1) == 0
        store(server, 1)
    kept_pool(tmp_path).unlink()


def test_what_a_killed_server_left_is_removed_by_the_next_start_in_the_folder(tmp_path):
    stale = PoolFile.create(tmp_path / "lmcache-pool-tmp-1", capacity_bytes=PAGE_BYTES, num_slots=1)
    presence = Presence(stale.path, "0" * 32)
    stale.close(keep=True)
    with server_in(tmp_path):
        assert not stale.path.exists()
    presence.close()


def test_presence_files_of_clients_that_died_while_no_server_ran_are_removed_and_those_of_the_living_stay(tmp_path):
    with server_in(tmp_path, **KEPT):
        pass
    living = Presence(kept_pool(tmp_path), "1" * 32)
    dead = kept_pool(tmp_path).with_name(kept_pool(tmp_path).name + ".client-" + "2" * 32)
    dead.write_bytes(b"")
    with server_in(tmp_path, **KEPT):
        names = {path.name for path in tmp_path.iterdir()}
        assert dead.name not in names
        assert kept_pool(tmp_path).name + ".client-" + "1" * 32 in names
    living.close()
    kept_pool(tmp_path).unlink()


def test_a_size_that_does_not_fit_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(PoolSizeError, match="does not fit"):
        start_server(make_config(tmp_path, l1_size_gb=100_000.0))
    assert list(tmp_path.iterdir()) == []


def test_more_than_the_memory_at_hand_is_taken_only_when_asked_for(tmp_path, monkeypatch):
    """MEM-5."""
    monkeypatch.setattr("lmcache.storage.sizing.limits", lambda directory: [Limit("the host", 1 << 20), room_in(directory)])
    with pytest.raises(PoolSizeError, match="the host is"):
        start_server(make_config(tmp_path))
    with server_in(tmp_path, allow_overcommit=True) as server:
        store(server, 1)


def test_an_adopted_pool_gets_the_mode_that_is_asked_for_and_what_it_cannot_get_is_told(tmp_path, caplog):
    with server_in(tmp_path, pool_mode=0o600, max_chunks=64, **KEPT):
        pass
    with server_in(tmp_path, pool_mode=0o660, max_chunks=128, **KEPT):
        assert stat.S_IMODE(kept_pool(tmp_path).stat().st_mode) == 0o660
    assert "keeps its 64 slots" in caplog.text
    kept_pool(tmp_path).unlink()


def test_a_server_whose_pools_file_was_removed_is_not_well(tmp_path):
    """Engines that start from now on could only use the socket."""
    with server_in(tmp_path) as server:
        assert status_of(server)["problems"] == []
        (pool,) = (path for path in tmp_path.iterdir() if path.name.startswith("lmcache-pool-") and ".client-" not in path.name)
        pool.unlink()
        (problem,) = status_of(server)["problems"]
        assert f"{pool} was removed" in problem


@pytest.mark.parametrize("ends_by", ["room", "stop", "time", "other reasons"])
def test_a_server_waits_for_the_last_ones_pool_that_engines_still_map(tmp_path, monkeypatch, caplog, ends_by):
    """Else it would refuse to start, and ask for a smaller pool, for the half minute that engines take to let go of 64 GiB."""
    caplog.set_level("INFO")
    held, stop, looks = [4 << 30], StopRequest(), []

    def look(directory):
        looks.append(directory)
        if len(looks) == 3 and ends_by == "room":
            held[0] = 0
        if len(looks) == 3 and ends_by == "stop":
            stop.set()
        return held[0]

    size = 1 << 30 if ends_by != "other reasons" else 100 << 30
    monkeypatch.setattr(
        "lmcache.storage.sizing.limits", lambda directory: [Limit("the host", (5 << 30) - held[0] - (512 << 20))]
    )
    monkeypatch.setattr("lmcache.storage.sizing.held_bytes", look)
    monkeypatch.setattr("lmcache.server.app.ROOM_POLL_SECONDS", 0.01)
    monkeypatch.setattr("lmcache.server.app.ROOM_SECONDS", 1.0 if ends_by == "time" else 60.0)
    monkeypatch.setattr("lmcache.server.app.ROOM_SECONDS_PER_GIB", 0.0)
    wait_for_room(make_config(tmp_path, l1_size_gb=size / 2**30), stop)
    told = [record.getMessage() for record in caplog.records if "waiting for room" in record.getMessage()]
    if ends_by == "other reasons":
        assert (len(looks), told) == (1, [])
    else:
        assert len(looks) == 3 if ends_by != "time" else len(looks) > 3
        assert len(told) == 1
        assert "removed files of 4.00 GiB" in told[0]


@pytest.fixture
def small_memory(tmp_path):
    """A real file system in memory, of 64 MiB."""
    with file_system_in_memory(tmp_path / "small", "64m") as directory:
        yield directory


def test_what_removed_files_still_take_is_known_of_a_file_system_in_memory_and_of_no_other_folder(small_memory, tmp_path):
    assert sizing.held_bytes(small_memory) == 0
    name = small_memory / "file"
    with name.open("w+b") as file:
        file.write(bytes(16 << 20))
        file.flush()
        assert sizing.held_bytes(small_memory) == 0, "it is there to be seen"
        name.unlink()
        assert sizing.held_bytes(small_memory) == 16 << 20
        (small_memory / "folder").mkdir()
        assert sizing.held_bytes(small_memory / "folder") == sizing.held_bytes(tmp_path) == 0
    assert sizing.held_bytes(small_memory) == 0


def test_a_part_of_a_file_system_says_nothing_of_the_rest(small_memory, tmp_path):
    (small_memory / "file").write_bytes(bytes(1 << 20))
    (small_memory / "part").mkdir()
    part = tmp_path / "part"
    part.mkdir()
    subprocess.run(["mount", "--bind", str(small_memory / "part"), str(part)], check=True)
    try:
        assert sizing.held_bytes(part) == 0
    finally:
        subprocess.run(["umount", str(part)], check=True)


def test_a_restarted_server_starts_when_an_engine_has_let_go_of_the_pool_before(small_memory):
    with LmcacheServer(["--pool-dir", str(small_memory)], l1_size_gb=40 / 1024) as server:
        wait_until(lambda: server.status()["l1"]["resident_bytes"] == 40 << 20)
        view = PoolView(Path(server.pool_path))
        server.stop(signal.SIGTERM)
        starting = threading.Thread(target=server.start)
        starting.start()
        wait_until(lambda: "waiting for room: removed files of 0.04 GiB" in server.log_text())
        view.close()
        starting.join(60)
        assert server.status()["l1"]["capacity_bytes"] == 40 << 20


def room_in(directory):
    return Limit(f"the space left in {directory}", 1 << 30)


def test_the_slot_table_has_the_size_asked_for(tmp_path):
    with server_in(tmp_path, max_chunks=7) as server:
        assert status_of(server)["l1"]["max_chunks"] == 7
        for number in range(20):
            store(server, number)
        assert status_of(server)["l1"]["chunks"] == 7
        assert hits(server, 19) == 1


def test_a_bug_while_starting_leaves_nothing(tmp_path, monkeypatch):
    """Whatever is raised, wherever: sockets, threads, descriptors and files are given back."""
    for target in (
        "lmcache.server.app.CacheService",
        "lmcache.server.app.StorageManager",
        "lmcache.server.app.Sessions",
        "lmcache.storage.manager.L1Cache",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, lambda *args, **kwargs: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                start_server(make_config(tmp_path, no_http=False))
            with pytest.raises(ZeroDivisionError):
                start_server(make_config(tmp_path, pool_name="kept"))
        assert list(tmp_path.iterdir()) == []


def test_a_bug_while_starting_leaves_a_pool_that_an_earlier_server_filled(tmp_path, monkeypatch):
    with server_in(tmp_path, **KEPT) as server:
        store(server, 1)
    with monkeypatch.context() as patch:
        patch.setattr("lmcache.server.app.CacheService", lambda *args, **kwargs: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            start_server(make_config(tmp_path, pool_name="kept"))
    with server_in(tmp_path, **KEPT) as server:
        assert hits(server, 1) == 1
    kept_pool(tmp_path).unlink()


def test_the_status_shows_each_setting_with_its_source(tmp_path):
    with server_in(tmp_path) as server:
        config = status_of(server)["config"]
        assert config["pool_dir"] == {"value": str(tmp_path), "source": "default"}
        assert config["pool_mode"]["value"] == "0600"
        assert "http_token" not in config


def test_the_module_runs_by_itself_and_says_what_is_wrong_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *args: None)
    assert main(["--chunk-size", "0"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --chunk-size '0': expected 1 to ")
    assert error.count("\n") == 2


def test_every_request_is_counted_on_the_metrics_of_its_own_server(tmp_path):
    with server_in(tmp_path) as server:
        assert isinstance(server.service.metrics, Metrics)
        status_of(server)
        assert server.service.metrics.value("lmcache_requests", "STATUS", "ok") == 1


@pytest.mark.parametrize(
    ("has_http", "has_port", "no_metrics", "expected"),
    [
        (True, False, False, "HTTP {http}, metrics {http}/metrics, L1"),
        (True, True, False, "HTTP {http}, metrics http://127.0.0.1:{port}/metrics, L1"),
        (False, True, False, "HTTP off, metrics http://127.0.0.1:{port}/metrics, L1"),
        (True, False, True, "HTTP {http}, metrics off, L1"),
        (False, False, False, "HTTP off, metrics off, L1"),
    ],
)
def test_the_line_at_the_start_says_where_to_scrape(tmp_path, caplog, has_http, has_port, no_metrics, expected):
    port = free_port()
    settings = {"no_http": not has_http, "metrics_port": port if has_port else 0, "no_metrics": no_metrics}
    with server_in(tmp_path, **settings) as server:
        http = server.endpoints.http
    [line] = [record.message for record in caplog.records if "is ready" in record.message]
    assert expected.format(http=http, port=port) in line
