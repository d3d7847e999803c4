"""`lmcache server` as a process: flags, refusals and its end."""

import signal
import socket

import pytest

from tests.server_process import LmcacheServer, free_port, run_lmcache


def test_it_serves_until_sigterm_or_sigint_and_leaves_nothing():
    for number in (signal.SIGTERM, signal.SIGINT):
        with LmcacheServer() as server:
            assert f"ZMQ {server.zmq_url}" in server.log_text()
            assert server.shared_files() != []
            assert server.stop(number) == 0
            assert server.shared_files() == []


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
        ["--pool-dir", "/nonexistent"],
        ["--no-such-flag"],
    ],
)
def test_values_out_of_range_are_one_error_before_anything_is_allocated(words):
    done = run_lmcache("server", "--port", str(free_port()), "--no-http", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 2


def test_a_port_in_use_is_one_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for words in (["--port", port, "--no-http"], ["--port", str(free_port()), "--http-port", port]):
            done = run_lmcache("server", "--l1-size-gb", "0.03", *words)
            assert done.returncode != 0
            assert port in done.stderr
            assert "Traceback" not in done.stderr


def test_help_shows_every_group_of_flags():
    out = run_lmcache("server", "--help").stdout
    assert all(flag in out for flag in ("--l1-size-gb", "--no-http", "--eviction-policy", "--log-level", "--metrics-port"))
