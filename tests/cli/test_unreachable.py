"""Whatever is at the address: the right exit code, one message, never a traceback, never a hang.

A command that hangs runs into the limit of `run_lmcache`, which is far above the deadlines given here.
"""

import os
from collections.abc import Iterator

import msgspec
import pytest

from lmcache.protocol import ErrorInfo, Reply
from tests.cli.conftest import Cli
from tests.cli.peers import http_peer, tcp_peer, zmq_peer
from tests.server_process import LmcacheServer, free_port

COMMANDS = [
    ["ping", "kvcache"],
    ["describe", "kvcache"],
    ["describe", "kvcache", "--config"],
    ["describe", "kvcache", "--watch"],
    ["query", "kvcache", "--round-trip"],
    ["query", "kvcache", "--tokens", os.devnull, "--model", "m"],
    ["kvcache", "clear", "-y"],
    ["kvcache", "end-session", "request"],
    ["kvcache", "evict", "--ratio", "0.5"],
    ["kvcache", "evict", "--model", "m"],
]
every_command = pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
some_commands = pytest.mark.parametrize("words", [COMMANDS[0], COMMANDS[1], COMMANDS[4]], ids=" ".join)


@pytest.fixture(scope="module")
def frozen() -> Iterator[LmcacheServer]:
    with LmcacheServer() as server:
        server.freeze()
        yield server
        server.thaw()


@every_command
def test_nobody_listens(words):
    error = Cli(f"localhost:{free_port()}").refused(*words, code=3)
    assert "cannot connect to tcp://localhost:" in error
    assert "hint: start it with 'lmcache server', or pass --url" in error


@some_commands
def test_nobody_listens_for_http(words):
    assert "cannot connect to http://localhost:" in Cli(f"http://localhost:{free_port()}").refused(*words, code=3)


@some_commands
def test_the_name_does_not_exist(words):
    assert "cannot resolve 'no.such.host.invalid'" in Cli("no.such.host.invalid:5555").refused(*words, code=3)
    assert "cannot resolve 'no.such.host.invalid'" in Cli("http://no.such.host.invalid").refused(*words, code=3)


@every_command
def test_the_server_is_frozen(words, frozen):
    error = Cli(frozen.zmq_url).refused(*words, "--timeout", "0.5", code=3)
    assert f"no reply from {frozen.zmq_url} within 0.5 s" in error


@some_commands
def test_the_server_is_frozen_over_http(words, frozen):
    error = Cli(frozen.http_url).refused(*words, "--timeout", "0.5", code=3)
    assert f"no reply from {frozen.http_url} within 0.5 s" in error


@some_commands
def test_the_port_is_silent(words):
    with tcp_peer(b"") as port:
        assert "no reply from" in Cli(f"localhost:{port}").refused(*words, "--timeout", "0.5", code=3)
        assert "no reply from" in Cli(f"http://localhost:{port}").refused(*words, "--timeout", "0.5", code=3)


@every_command
def test_the_port_speaks_http(words, server):
    error = told(words, f"localhost:{server.http_port}", "speaks HTTP")
    assert f"tcp://localhost:{server.http_port} speaks HTTP, not ZMQ" in error
    assert f"hint: use --url http://localhost:{server.http_port}" in error


@some_commands
def test_the_port_speaks_zmq_and_http_was_asked_for(words, server):
    error = told(words, f"http://localhost:{server.port}", "speaks ZMQ")
    assert f"http://localhost:{server.port} speaks ZMQ, not HTTP" in error
    assert f"hint: use --url tcp://localhost:{server.port}" in error


def told(words, url, wanted):
    """What a command says of a peer that speaks another protocol; a busy one may take too long to show that it does."""
    for _ in range(20):
        error = Cli(url).refused(*words, "--timeout", "1", code=3)
        if wanted in error:
            break
    return error


@some_commands
@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00" * 64, b"\xff" * 64, os.urandom(4096)])
def test_the_port_speaks_something_else(words, greeting):
    with tcp_peer(greeting) as port:
        Cli(f"localhost:{port}").refused(*words, "--timeout", "0.5", code=3)


@some_commands
@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00" * 64, b"HTTP/1.1 200 OK\r\n\r\n"])
def test_the_port_speaks_something_else_than_http(words, greeting):
    with tcp_peer(greeting) as port:
        Cli(f"http://localhost:{port}").refused(*words, "--timeout", "0.5", code=3)


@some_commands
@pytest.mark.parametrize("header", [b"", b"\xc1garbage", b"\x80", b"\x93\x01\x02\x03", b"\xff" * 1000], ids=repr)
def test_a_zmq_peer_answers_garbage(words, header):
    with zmq_peer(lambda frames: [frames[0], header]) as port:
        error = Cli(f"localhost:{port}").refused(*words, code=1)
    assert "the reply is not one of this protocol" in error
    assert "hint: is this an lmcache server of another version" in error


@some_commands
def test_a_zmq_peer_answers_frames_that_belong_to_no_request(words):
    with zmq_peer(lambda frames: [b"x" * 100, b"y", b"z"]) as port:
        assert "no reply from" in Cli(f"localhost:{port}").refused(*words, "--timeout", "0.5", code=3)


@every_command
def test_a_server_refuses(words):
    reply = Reply(boot="0" * 32, error=ErrorInfo("version_mismatch", "the versions differ", "upgrade"))
    with zmq_peer(lambda frames: [frames[0], msgspec.msgpack.encode(reply)]) as port:
        assert Cli(f"localhost:{port}").refused(*words, code=1) == "error: the versions differ\nhint: upgrade\n"


@some_commands
@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>"), (200, b"[]"), (200, b"{}"), (200, b"[" * 100_000), (404, b"{}"), (302, b""), (500, b"\xff")],
    ids=lambda value: repr(value)[:12],
)
def test_another_web_server_answers(words, status, body):
    with http_peer(status, body) as port:
        error = Cli(f"http://localhost:{port}").refused(*words, code=1)
    assert f"http://localhost:{port} does not answer like an lmcache server" in error


def test_an_http_server_that_refuses_is_quoted():
    with http_peer(400, b'{"error": {"code": "c", "message": "m happened", "hint": "do h"}}') as port:
        assert Cli(f"http://localhost:{port}").refused("kvcache", "clear", "-y", code=1) == "error: m happened\nhint: do h\n"
    with http_peer(403, b'{"detail": "not from here"}') as port:
        assert "HTTP 403: not from here" in Cli(f"http://localhost:{port}").refused("kvcache", "clear", "-y", code=1)


@pytest.mark.parametrize("words", [["ping", "kvcache"], ["kvcache", "end-session", "x"]], ids=" ".join)
def test_a_socket_file_that_does_not_exist(words, tmp_path):
    Cli(f"ipc://{tmp_path}/missing").refused(*words, "--timeout", "0.5", code=3)
