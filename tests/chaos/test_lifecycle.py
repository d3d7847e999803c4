"""What a start leaves when it fails, and what an end leaves at all."""

import contextlib
import resource
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.pool import NAME_PREFIX, PoolFile
from lmcache.protocol import StoreOutcome
from lmcache.server.app import start_server
from lmcache.server.args import HttpFrontendSettings, MPServerSettings, ServerConfig, StorageManagerSettings
from tests.chaos.actor import Actor
from tests.chaos.content import PAGE, chunk_key, chunk_keys, content
from tests.chaos.load import Load
from tests.chaos.waiting import assert_adds_up, wait_until
from tests.server_process import LMCACHE, LmcacheServer, clean_environment, free_port

SMALL_GIB = 8 / 1024
NUM_IN_PROCESS = 40
NUM_PROCESSES = 10


def flags(pool_dir: Path, *more: str) -> list[str]:
    return ["--pool-dir", str(pool_dir), *more]


# -- nothing stays ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_with_0_and_leaves_nothing_although_clients_are_attached(pool_dir, number):
    with LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB) as server, Actor(server.zmq_url) as client:
        client.tell("reserve", indices=[0], chunk_bytes=PAGE)
        client.tell("pin", indices=[1])
        assert server.stop(number) == 0
        assert list(pool_dir.iterdir()) == []
        assert "Traceback" not in server.log_text()


def test_a_server_stopped_at_any_moment_under_load_leaves_nothing(pool_dir):
    with contextlib.ExitStack() as running:
        server = running.enter_context(LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB))
        options = {"num_keys": 200, "writes_ratio": 0.5, "timeout_seconds": 0.5, "heartbeat": True}
        load = running.enter_context(Load(server.zmq_url, seed=1, num_threads=4, **options))
        load.wait_until_it_runs()
        for turn in range(5):
            time.sleep(0.15 * turn)
            assert server.stop() == 0
            assert "Traceback" not in server.log_text()
            server.start()
        load.wait_until_it_has_done_enough()
        counts = load.finish()
        assert counts["wrong"] == 0
        assert counts["stored"] > 0
        assert server.stop() == 0


def test_what_a_killed_server_and_its_killed_clients_left_goes_at_the_next_start(pool_dir):
    with LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB) as server:
        with Actor(server.zmq_url) as client:
            client.tell("reserve", indices=[0], chunk_bytes=PAGE)
            server.kill()
            client.signal(signal.SIGKILL)
        left = list(pool_dir.iterdir())
        assert len(left) == 2
        server.start()
        assert list(pool_dir.iterdir()) == [Path(server.pool_path)]
        assert Path(server.pool_path) not in left


def test_a_presence_file_whose_pool_is_gone_goes_at_the_next_start(pool_dir):
    orphan = pool_dir / f"{NAME_PREFIX}gone.client-{'0' * 32}"
    orphan.touch()
    with LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB) as server:
        assert list(pool_dir.iterdir()) == [Path(server.pool_path)]


def test_forty_servers_one_after_another_in_one_process_leave_nothing(pool_dir):
    config = ServerConfig(
        server=MPServerSettings(port=0),
        storage=StorageManagerSettings(l1_size_gb=SMALL_GIB, pool_dir=str(pool_dir)),
        http=HttpFrontendSettings(no_http=True),
    )
    num_threads = threading.active_count()
    for _ in range(NUM_IN_PROCESS):
        server = start_server(config)
        with KVCacheClient(server.endpoints.zmq) as client:
            assert client.store(chunk_key(0), [bytes(PAGE)]) == [StoreOutcome.RESERVED]
        server.stop()
        assert list(pool_dir.iterdir()) == []
    assert threading.active_count() == num_threads


def test_ten_server_processes_side_by_side_and_killed_in_every_way_leave_nothing(pool_dir):
    ways = (signal.SIGTERM, signal.SIGINT, signal.SIGKILL)
    with contextlib.ExitStack() as running:
        processes = [
            running.enter_context(server_process(pool_dir, "--no-http", "--port", str(free_port())))
            for _ in range(NUM_PROCESSES)
        ]
        wait_until(lambda: len(list(pool_dir.iterdir())) == NUM_PROCESSES, "all have their pools")
        wait_until(lambda: all(is_ready(process) for process in processes), "all are ready")
        for index, process in enumerate(processes):
            process.send_signal(ways[index % len(ways)])
        for process in processes:
            process.wait(60.0)
    with LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB) as server:
        assert list(pool_dir.iterdir()) == [Path(server.pool_path)]


@contextlib.contextmanager
def server_process(pool_dir: Path, *more: str):
    command = [*LMCACHE, "server", "--pool-dir", str(pool_dir), "--l1-size-gb", str(SMALL_GIB), *more]
    with subprocess.Popen(command, env=clean_environment(), stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def is_ready(process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None
    assert process.stderr is not None
    return any(b"is ready" in line for line in process.stderr)


# -- two servers ------------------------------------------------------------------------------------------------------


def test_two_unnamed_servers_run_side_by_side_on_pools_of_their_own(pool_dir):
    with (
        LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB) as one,
        LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB) as other,
        KVCacheClient(one.zmq_url) as client_of_one,
        KVCacheClient(other.zmq_url) as client_of_other,
    ):
        assert one.pool_path != other.pool_path
        client_of_one.store(chunk_key(0), [content(chunk_key(0), PAGE)])
        assert client_of_other.lookup(chunk_key(0)).hit_chunks == 0
        one.kill()
        one.start()
        assert client_of_other.store(chunk_key(0), [content(chunk_key(0), PAGE)]) == [StoreOutcome.RESERVED]
        assert client_of_one.lookup(chunk_key(0)).hit_chunks == 0


def test_a_named_pool_in_use_is_refused_and_goes_on_working(pool_dir):
    named = flags(pool_dir, "--pool-name", "kept")
    with (
        LmcacheServer(named, http=False, l1_size_gb=SMALL_GIB, leaves_pool=True) as server,
        KVCacheClient(server.zmq_url) as client,
    ):
        client.store(chunk_key(0), [content(chunk_key(0), PAGE)])
        refused = run_refused(pool_dir, "--no-http", "--port", str(free_port()), "--pool-name", "kept")
        assert "is in use by another server" in refused
        with client.pin(chunk_key(0)) as pinned:
            assert pinned.extents[0] == content(chunk_key(0), PAGE)


@pytest.mark.parametrize("is_there", [False, True])
def test_of_servers_started_at_once_on_one_named_pool_one_runs(pool_dir, is_there):
    path = pool_dir / f"{NAME_PREFIX}kept"
    if is_there:
        PoolFile.create(path, capacity_bytes=8 << 20, num_slots=1024, persistent=True).close()
    with contextlib.ExitStack() as running:
        more = ("--no-http", "--port", "0", "--pool-name", "kept")
        processes = [running.enter_context(server_process(pool_dir, *more)) for _ in range(4)]
        wait_until(lambda: sum(process.poll() is not None for process in processes) == 3, "three gave up")
        (left,) = (process for process in processes if process.poll() is None)
        assert is_ready(left)
        left.terminate()
        assert sorted(process.wait(60.0) for process in processes) == [0, 2, 2, 2]
    path.unlink()


# -- starts that fail -------------------------------------------------------------------------------------------------


def run_refused(pool_dir: Path, *more: str) -> str:
    """Start a server that cannot start; return its one error line. It must end by itself and leave nothing."""
    before = sorted(pool_dir.iterdir())
    command = [*LMCACHE, "server", "--pool-dir", str(pool_dir), "--l1-size-gb", str(SMALL_GIB), *more]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=120.0, check=False)
    assert sorted(pool_dir.iterdir()) == before
    assert done.returncode == 2, done
    assert done.stdout == ""
    first, *rest = done.stderr.splitlines()
    assert first.startswith("error: "), done.stderr
    assert all(line.startswith("hint: ") for line in rest), done.stderr
    return first


@pytest.fixture
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield str(listener.getsockname()[1])


@pytest.mark.parametrize(
    ("flag", "more"),
    [
        ("--port", ["--no-http"]),
        ("--http-port", ["--port", "0"]),
        ("--metrics-port", ["--port", "0", "--no-http"]),
    ],
)
def test_a_port_in_use_is_named(pool_dir, taken_port, flag, more):
    assert taken_port in run_refused(pool_dir, *more, flag, taken_port)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--l1-size-gb", "1000000"], "does not fit"),
        (["--l1-size-gb", "nan"], "--l1-size-gb 'nan'"),
        (["--l1-size-gb", "-1"], "--l1-size-gb '-1'"),
        (["--l1-size-gb", "1e-9"], "--l1-size-gb"),
        (["--max-chunks", str(1 << 28)], "does not fit"),
        (["--host", "256.256.256.256"], "256.256.256.256"),
        (["--host", "a..b"], "a..b"),
        (["--http-host", "a..b"], "a..b"),
        (["--metrics-port", "1", "--metrics-host", "a..b"], "a..b"),
        (["--metrics-port", "1", "--metrics-host", "a..b", "--pool-name", "new"], "a..b"),
        (["--host", "no-such-host.invalid"], "no-such-host.invalid"),
        (["--port", "65536"], "--port '65536'"),
        (["--pool-name", "../x"], "--pool-name '../x'"),
        (["--pool-mode", "0777777"], "--pool-mode"),
        (["--eviction-policy", "none"], "--eviction-policy 'none'"),
        (["--engine-type", "blend"], "blend"),
    ],
)
def test_a_value_that_cannot_be_is_named(pool_dir, words, named):
    assert named in run_refused(pool_dir, "--port", "0", "--http-port", "0", *words)


def test_a_pool_directory_that_is_none_is_named(pool_dir):
    assert "/no/such/dir" in run_refused(pool_dir, "--no-http", "--port", "0", "--pool-dir", "/no/such/dir")


# -- no descriptors left ----------------------------------------------------------------------------------------------


def test_a_server_may_open_as_many_descriptors_as_it_is_allowed_to(pool_dir):
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, allowed[0]), allowed[1]))
    try:
        with LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB) as server:
            assert resource.prlimit(server.pid, resource.RLIMIT_NOFILE) == (allowed[1], allowed[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, allowed)


def test_a_server_without_descriptors_takes_nobody_for_dead(pool_dir):
    """It cannot open presence files then; a reservation given to someone else would mean wrong bytes."""
    with (
        LmcacheServer(flags(pool_dir), http=False, l1_size_gb=SMALL_GIB) as server,
        KVCacheClient(server.zmq_url) as client,
        KVCacheClient(server.zmq_url) as other,
        contextlib.ExitStack() as idle,
    ):
        reservation = client.reserve(chunk_keys([0, 1]), PAGE)
        other.attach()
        num_open = len(list(Path(f"/proc/{server.pid}/fd").iterdir()))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (num_open + 20, num_open + 20))
        for _ in range(60):
            idle.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", server.port))))
        time.sleep(1.5)  # the server looks twice a second who is still there
        assert other.store(chunk_keys([0, 1]), [bytes(PAGE)] * 2) == [StoreOutcome.BUSY] * 2
        idle.close()
        for index, extent in enumerate(reservation.extents):
            extent[:] = content(chunk_key(index), PAGE)
        assert reservation.commit() == 2
        client.close()
        other.close()
        assert_adds_up(server)
