"""`lmcache server` as a process: flags, refusals and its end."""

import argparse
import logging
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lmcache.server.args import add_arguments, config_from_args
from tests.chaos.waiting import wait_until
from tests.server_process import LmcacheServer, free_port, run_lmcache, running_lmcache


@pytest.fixture
def hangup() -> Iterator[Callable[[signal.Handlers], object]]:
    """What the processes that are started do of a SIGHUP, whatever those of the tests do."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda action: signal.signal(signal.SIGHUP, action)
    signal.signal(signal.SIGHUP, before)


def test_it_serves_until_a_signal_asks_for_its_end_and_leaves_nothing(hangup):
    hangup(signal.SIG_DFL)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        with LmcacheServer() as server:
            # It answers a moment before it says so.
            wait_until(lambda server=server: f"ZMQ {server.zmq_url}" in server.log_text(), "it says where it listens")
            assert server.shared_files() != []
            assert server.stop(number) == 0
            assert server.log_text().endswith(" INFO lmcache.server.app: stopped\n")
            assert server.shared_files() == []


def test_it_outlives_its_terminal_where_it_was_told_to(hangup):
    hangup(signal.SIG_IGN)  # as by `nohup`
    with LmcacheServer(http=False) as server:
        ignored = re.search(r"SigIgn:\t(\w+)", Path(f"/proc/{server.pid}/status").read_text())
        assert ignored
        assert int(ignored[1], 16) & 1 << signal.SIGHUP - 1


def test_it_needs_no_flag():
    """CFG-4. The variables only keep it from the ports and the memory of others."""
    port = free_port()
    env = {"LMCACHE_PORT": str(port), "LMCACHE_HTTP_PORT": str(free_port()), "LMCACHE_L1_SIZE_GB": "0.03"}
    with running_lmcache("server", env=env) as server:
        asked = run_lmcache("ping", "kvcache", "--wait", "120", "--url", f"localhost:{port}")
        assert asked.returncode == 0, asked.stderr
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=60)
    assert server.returncode == 0, log


def test_without_http_there_is_only_zmq():
    with LmcacheServer(http=False) as server:
        assert server.status()["http_endpoint"] == ""
        assert run_lmcache("ping", "kvcache", "--url", f"http://localhost:{server.http_port}").returncode == 3


@pytest.mark.parametrize(
    "words",
    [
        ["--port", "70000"],
        ["--port", "five"],
        ["--l1-size-gb", "-1"],
        ["--l1-size-gb", "1000000"],
        ["--eviction-policy", "RANDOM"],
        ["--engine-type", "blend"],
        ["--chunk-size", "0"],
        ["--chunk-size", "1_0"],
        ["--l1-size-gb", "\u0661"],
        ["--pool-mode", "0_600"],
        ["--pool-dir", "/nonexistent"],
        ["--no-such-flag"],
    ],
)
def test_values_out_of_range_are_one_error_before_anything_is_allocated(words):
    done = run_lmcache("server", "--port", str(free_port()), "--no-http", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 2


def test_ranges_are_written_out():
    assert "expected 1 to 1048576\n" in run_lmcache("server", "--chunk-size", "0").stderr
    assert "expected 0.01 to 3600\n" in run_lmcache("server", "--l2-adapter", "redis://host?timeout-seconds=0").stderr


def test_a_port_in_use_is_one_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words in (["--port", port, "--no-http"], ["--port", str(free_port()), "--http-port", port]):
            done = run_lmcache("server", "--l1-size-gb", "0.03", *words)
            assert done.returncode != 0
            assert port in done.stderr
            assert "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["nan", "192.0.2.1", "x" * 300])
def test_a_host_that_is_not_this_machine_is_told_from_a_port_in_use(host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for flags, used, is_own in (
            (["--no-http", "--port", "0", "--host"], "--port", "--host must be an address of this machine"),
            (
                ["--port", "0", "--http-port", "0", "--http-host"],
                "--http-port",
                "--http-host must be an address of this machine",
            ),
        ):
            error = run_lmcache("server", "--l1-size-gb", "0.03", *flags, host).stderr
            assert f"hint: {is_own}" in error
            assert "another server" not in error
            error = run_lmcache("server", "--l1-size-gb", "0.03", *flags, "127.0.0.1", used, port).stderr
            assert f"hint: is another server running? choose another {used}" in error


def test_a_host_for_metrics_without_a_port_is_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lmcache"), "propagate", True)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    config_from_args(parser.parse_args(["--metrics-host", "0.0.0.0", "--metrics-port", "9100"]), {})
    config_from_args(parser.parse_args([]), {})
    assert caplog.text == ""
    config_from_args(parser.parse_args([]), {"LMCACHE_METRICS_HOST": "0.0.0.0"})
    assert "--metrics-host does nothing without --metrics-port" in caplog.text


def test_help_shows_every_group_of_flags():
    out = run_lmcache("server", "--help").stdout
    assert all(flag in out for flag in ("--l1-size-gb", "--no-http", "--eviction-policy", "--log-level", "--metrics-port"))
