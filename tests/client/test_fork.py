"""Processes forked from a client's: what is the client's stays the client's."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lmcache.server.app import RunningServer
from tests.fakes import STOP_SECONDS
from tests.pools import server_in, status_of, wait_until

MAKE_CLIENT = """
import os, signal, sys, time
from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import UnreachableError
from lmcache.protocol import Noop
signal.alarm(60)
client = KVCacheClient(sys.argv[1], heartbeat=True, timeout_seconds=60)
while client._attachment is None:
    time.sleep(0.01)
reservation = client.reserve(bytes(32), 4096)
"""
USE_IN_CHILD = """
child = os.fork()
if child == 0:
    signal.alarm(60)
    for use in (client.mq.connect, lambda: client.lookup(bytes(32)), lambda: client.mq.call(Noop())):
        try:
            use()
        except UnreachableError as error:
            print(error, flush=True)
    reservation.abort()
    client.close()
    os._exit(0)
print(os.waitpid(child, 0)[1], flush=True)
sys.stdin.readline()
print(reservation.commit(), flush=True)
client.close()
"""
LIVE_ON_IN_CHILD = """
if os.fork() == 0:
    print("child", flush=True)
sys.stdin.read()
os._exit(0)
"""


@contextmanager
def running(server: RunningServer, code: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", MAKE_CLIENT + code, server.endpoints.zmq]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.stdin is not None:
                process.stdin.close()  # what is left of it ends
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def test_a_client_is_of_no_use_in_a_forked_process_and_goes_on_in_its_own(tmp_path):
    with server_in(tmp_path) as server, running(server, USE_IN_CHILD) as process:
        for _ in range(3):
            assert "belongs to the process that this one was forked from" in process.stdout.readline()
        assert process.stdout.readline() == "0\n"
        assert len(list(tmp_path.glob("*.client-*"))) == 1
        assert status_of(server)["l1"]["reserved_bytes"] > 0
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1\n"


def test_what_a_killed_client_held_is_freed_though_a_process_forked_from_it_lives(tmp_path):
    with server_in(tmp_path) as server, running(server, LIVE_ON_IN_CHILD) as process:
        assert process.stdout.readline() == "child\n"
        assert status_of(server)["l1"]["reserved_bytes"] > 0
        process.kill()
        wait_until(lambda: status_of(server)["clients"] == [] and status_of(server)["l1"]["reserved_bytes"] == 0)
