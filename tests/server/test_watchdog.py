"""A stuck owner thread is told, once, with where it is stuck; and a supervisor gets to restart it where that is asked for."""

import json
import sys

import pytest

from lmcache.client.mq import MessageQueueClient
from lmcache.errors import UnreachableError
from lmcache.protocol import Noop, Status
from lmcache.server.watchdog import LOOK_SECONDS, STUCK_SECONDS, Watchdog
from tests.pools import server_in, wait_until
from tests.server_process import free_port, running_lmcache

LOOKS_UNTIL_TOLD = int(STUCK_SECONDS / LOOK_SECONDS)

# A server that never gets over the question for its status.
STUCK = """
import sys, threading
from lmcache.server.app import main
from lmcache.server.service import CacheService
CacheService._status = lambda *_: threading.Event().wait()
sys.exit(main())
"""


class Steps:
    """A count that goes up when the test says so."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> int:
        return self.number


def look(watchdog, times):
    return [watchdog.is_time_to_exit() for _ in range(times)]


def test_a_stuck_owner_is_told_once_with_the_stacks_of_all_threads_and_so_is_its_return(caplog):
    steps = Steps()
    watchdog = Watchdog(steps)
    assert not any(look(watchdog, LOOKS_UNTIL_TOLD))
    assert caplog.records == []  # the first look only saw where it stood
    assert not any(look(watchdog, 3 * LOOKS_UNTIL_TOLD))
    [told] = caplog.records
    assert told.levelname == "ERROR"
    assert "answered nothing for 5 s" in told.message
    assert "restart the server (--exit" in told.message
    assert "thread MainThread:" in told.message
    assert "in test_a_stuck_owner" in told.message
    steps.number += 1
    assert not any(look(watchdog, 1))
    assert [record.message for record in caplog.records[1:]] == [
        "the owner thread goes on, after 20 s; everything is answered again"
    ]


def test_an_owner_that_goes_on_now_and_then_is_not_stuck(caplog):
    """After a freeze of the whole process, however long, it goes on before the watchdog has looked that often."""
    steps = Steps()
    watchdog = Watchdog(steps, exit_seconds=STUCK_SECONDS)
    for _ in range(4):
        steps.number += 1
        assert not any(look(watchdog, LOOKS_UNTIL_TOLD))
    assert caplog.records == []


@pytest.mark.parametrize("exit_seconds", [1.0, 2 * STUCK_SECONDS])
def test_it_is_time_to_exit_only_where_that_is_asked_for(caplog, exit_seconds):
    watchdog = Watchdog(Steps(), exit_seconds)
    looks = int(exit_seconds / LOOK_SECONDS)
    assert look(watchdog, looks + 1) == [False] * looks + [True]
    assert [record.message.partition(" after")[0].partition(" has")[0] for record in caplog.records] == [
        "the owner thread",
        "ending with status 1",
    ]


def test_the_owner_goes_on_also_where_nobody_asks_for_anything(tmp_path):
    with server_in(tmp_path) as server:
        before = server.num_steps
        wait_until(lambda: server.num_steps > before + 2)


def test_a_server_that_is_stuck_ends_with_1_and_one_line_of_json_says_where(tmp_path):
    port = free_port()
    flags = f"--port {port} --no-http --l1-size-gb 0.01 --log-format json --exit-when-stuck-seconds 2 --pool-dir".split()
    with running_lmcache(*flags, str(tmp_path), command=[sys.executable, "-c", STUCK]) as process:
        with MessageQueueClient(f"tcp://127.0.0.1:{port}", timeout_seconds=0.5) as client:
            wait_until(lambda: answers(client, Noop()))
            assert not answers(client, Status())
        _, log = process.communicate(timeout=60)
    assert process.returncode == 1
    [stuck, _] = [line for line in map(json.loads, log.splitlines()) if line["level"] == "ERROR"]
    assert "thread lmcache-owner:" in stuck["message"]
    assert "in handle" in stuck["message"]
    for left in tmp_path.iterdir():  # as of a server that was killed: the next one in this folder removes it
        left.unlink()


def answers(client, request):
    try:
        client.call(request)
    except UnreachableError:
        return False
    return True
