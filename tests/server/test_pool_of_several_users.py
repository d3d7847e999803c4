"""A pool whose permissions let other users in: `--pool-mode`, as containers with a user each need it."""

import os
import stat
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest

from lmcache.errors import UsageError
from lmcache.pool import PoolFile, Presence, is_client_alive
from lmcache.server.args import config_from_args
from tests.server_process import LmcacheServer, clean_environment

OTHER_USER = 65533
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of other users")

# Both change their user after their imports: the interpreter may lie in a folder that only root can enter.
CLIENT = """
import os, sys
from lmcache.client.kvcache import KVCacheClient
os.setresuid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2]))
with KVCacheClient(sys.argv[1]) as client:
    print("inline" if client.is_inline else "mapped", flush=True)
    if sys.argv[3:] == ["die"]:
        os._exit(0)  # without a goodbye
"""


def run_client(url, user, *words):
    return subprocess.run(
        [sys.executable, "-c", CLIENT, url, str(user), *words],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize(("pool_mode", "expected"), [(0o600, 0o600), (0o660, 0o644), (0o666, 0o644)])
def test_presence_file_can_be_asked_by_a_server_of_another_user_if_the_pool_is_shared(tmp_path, pool_mode, expected):
    pool = PoolFile.create(tmp_path / "lmcache-pool-x", capacity_bytes=4096, num_slots=1, mode=pool_mode)
    presence = Presence(pool.path, "0" * 32)
    path = pool.client_path("0" * 32)
    assert stat.S_IMODE(path.stat().st_mode) == expected
    assert is_client_alive(path)
    presence.close()
    pool.close()


def test_folder_that_this_user_cannot_write_to_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    arguments = Namespace(pool_dir=str(tmp_path))
    with pytest.raises(UsageError, match="cannot be written to by this user"):
        config_from_args(arguments, {})


@pytest.fixture
def sticky_folder():
    """A folder like /dev/shm: everyone can create files, only its owner can remove one."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o1777)
        yield folder


@needs_root
@pytest.mark.parametrize(("mode", "expected"), [("0666", "mapped"), ("0600", "inline")])
def test_client_of_another_user_maps_the_pool_only_if_its_mode_allows(sticky_folder, mode, expected):
    with LmcacheServer(["--pool-dir", sticky_folder, "--pool-mode", mode]) as server:
        assert run_client(server.zmq_url, OTHER_USER) == expected


@needs_root
def test_server_without_privileges_serves_other_users_and_survives_their_death(sticky_folder):
    command = [sys.executable, "-c", SERVER, sticky_folder, str(OTHER_USER)]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            assert run_client(url, OTHER_USER + 1, "die") == "mapped"
            assert server.stdout.readline().strip() == "gone, problems: []"
        finally:
            server.terminate()


SERVER = """
import os, sys, time
import encodings.idna, prometheus_client
import lmcache.storage.eviction.lru
from lmcache.client.mq import MessageQueueClient
from lmcache.protocol import Noop, Status
from lmcache.server.app import start_server
from lmcache.server.args import HttpFrontendSettings, MPServerSettings, ServerConfig, StorageManagerSettings
os.setresuid(int(sys.argv[2]), int(sys.argv[2]), int(sys.argv[2]))
storage = StorageManagerSettings(l1_size_gb=0.0625, pool_dir=sys.argv[1], pool_mode=0o666)
server = start_server(ServerConfig(MPServerSettings(port=0), storage, http=HttpFrontendSettings(no_http=True)))
print(server.endpoints.zmq, flush=True)
with MessageQueueClient(server.endpoints.zmq) as client:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if client.call(Status()).status["counters"]["dead_clients"]:
            break
        time.sleep(0.05)
    time.sleep(0.2)  # one more maintenance pass
    print("gone, problems:", client.call(Noop()).problems, flush=True)
server.stop()
"""
