"""`lmcache ping engine` against peers that answer as engines do."""

import re
import time

import pytest

from lmcache.cli import http
from lmcache.cli.base import parse_url
from lmcache.cli.http import ENGINE, HttpClient
from lmcache.errors import ProtocolError
from tests.cli.conftest import Cli
from tests.cli.peers import engine_peer, http_peer, tcp_peer
from tests.server_process import LmcacheServer, free_port, run_lmcache

BOX = re.compile(
    r"={8} Ping Engine ={9}\n"
    r"Status:                  OK\n"
    r"Round trip time \(ms\):    \d+\.\d+\n"
    r"={30}\n"
)


def ping(url: str, *words: str, **env: str):
    return run_lmcache("ping", "engine", "--url", url, *words, env=env)


def test_an_engine_with_health_is_ok():
    with engine_peer({"/health": (200, "")}) as engine:
        done = ping(engine.url)
        document = Cli("").json("ping", "engine", "--url", engine.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert BOX.fullmatch(done.stdout), done.stdout
    assert (document["status"], document["problems"], document["url"]) == ("OK", [], engine.url)
    assert document["round_trip_ms"] > 0


def test_without_health_the_other_page_is_asked(server: LmcacheServer):
    assert BOX.fullmatch(ping(server.http_url).stdout)


def test_only_the_last_requests_are_timed_and_the_first_one_opens_the_connection():
    with engine_peer({"/health": (200, "")}) as engine:
        document = Cli("").json("ping", "engine", "--count", "3", "--interval", "0", "--url", engine.url)
    assert document["count"] == 3
    assert set(document["spread_ms"]) == {"min", "median", "p99", "max"}
    assert [path for _, path, _ in engine.requests] == ["/health"] * 4


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("", "/health answered HTTP 503"),
        ({"detail": "engine is dead"}, "/health answered HTTP 503: engine is dead"),
        ({"error": {"message": "no worker"}}, "/health answered HTTP 503: no worker"),
    ],
)
def test_an_engine_that_is_not_well_is_fail_with_the_reason(body, problem):
    with engine_peer({"/health": (503, body)}) as engine:
        document = Cli("").json("ping", "engine", "--url", engine.url, code=1)
        done = ping(engine.url)
    assert (document["status"], document["problems"]) == ("FAIL", [problem])
    assert document["error"]["code"] == "unhealthy"
    assert f"Problem:                 {problem}\n" in done.stdout


def test_wait_goes_on_while_the_engine_starts():
    answers = iter([(503, ""), (503, "")])

    def health(handler):
        handler.reply(*next(answers, (200, "")))

    with engine_peer({"/health": health}) as engine:
        assert ping(engine.url, "--wait", "30", "-q").returncode == 0


def test_a_zmq_address_names_the_command_that_it_fits():
    error = Cli("").refused("ping", "engine", "--url", "tcp://localhost:5555")
    assert "an inference engine speaks HTTP, and tcp://localhost:5555 is a ZMQ address" in error
    assert "did you mean 'lmcache ping kvcache --url tcp://localhost:5555'?" in error


def test_the_default_address_is_that_of_the_variable():
    with engine_peer({"/health": (200, "")}) as engine:
        assert run_lmcache("ping", "engine", env={"LMCACHE_ENGINE_URL": engine.url}).returncode == 0
    assert run_lmcache("ping", "engine", env={"LMCACHE_ENGINE_URL": "localhost:8000"}).returncode == 2


def test_the_address_may_end_as_those_of_openais_clients_do():
    with engine_peer({"/health": (200, "")}) as engine:
        assert ping(engine.url + "/v1/").returncode == 0


def test_an_engines_token_is_its_own():
    seen = []

    def health(handler):
        seen.append(handler.headers.get("authorization"))
        handler.reply(200 if seen[-1] == "Bearer key" else 401, "")

    with engine_peer({"/health": health}) as engine:
        assert ping(engine.url, LMCACHE_ENGINE_TOKEN="key", LMCACHE_HTTP_TOKEN="the server's").returncode == 0
        done = ping(engine.url, LMCACHE_HTTP_TOKEN="the server's")
    assert (done.returncode, seen[-1]) == (1, None)
    assert "wants a token\nhint: set LMCACHE_ENGINE_TOKEN" in done.stderr


@pytest.mark.parametrize(("token", "sent"), [(" key\n", "Bearer key"), ("sékret", "Bearer sékret")])
def test_a_token_is_sent_without_the_spaces_around_it_and_in_utf_8(token, sent):
    seen = []

    def health(handler):
        seen.append(handler.headers.get("authorization").encode("latin-1").decode())
        handler.reply(200, "")

    with engine_peer({"/health": health}) as engine:
        assert ping(engine.url, LMCACHE_ENGINE_TOKEN=token).returncode == 0
    assert set(seen) == {sent}


def test_a_token_that_is_none_is_the_callers_fault_and_not_shown():
    with engine_peer({"/health": (200, "")}) as engine:
        done = ping(engine.url, LMCACHE_ENGINE_TOKEN="sec\nret")
    assert done.returncode == 2
    assert "LMCACHE_ENGINE_TOKEN is not one line of printable characters" in done.stderr
    assert "sec" not in done.stderr.replace("second", "")


def test_what_is_no_engine_is_said():
    with http_peer(404, b"") as port:
        error = Cli("").refused("ping", "engine", "--url", f"http://localhost:{port}", code=1)
    assert "does not answer like an inference engine: it has neither /health nor /api/healthcheck" in error


def test_nobody_and_silence_are_exit_code_3():
    error = Cli("").refused("ping", "engine", "--url", f"http://localhost:{free_port()}", code=3)
    assert "cannot connect to" in error
    assert "hint: start the engine" in error
    with tcp_peer(b"") as port:
        error = Cli("").refused("ping", "engine", "--timeout", "0.5", "--url", f"http://localhost:{port}", code=3)
    assert "within 0.5 s" in error


def test_a_page_that_comes_a_byte_at_a_time_runs_into_the_deadline():
    def health(handler):
        handler.start_stream()
        for _ in range(200):
            handler.send_line(".")
            time.sleep(0.05)

    with engine_peer({"/health": health}) as engine:
        assert "within 0.5 s" in Cli("").refused("ping", "engine", "--timeout", "0.5", "--url", engine.url, code=3)


def test_an_engine_that_hangs_up_is_exit_code_3():
    with engine_peer({"/health": lambda handler: handler.hang_up()}) as engine:
        error = Cli("").refused("ping", "engine", "--url", engine.url, code=3)
    assert "closed the connection without an answer" in error


@pytest.mark.parametrize("words", [["ping", "engine"], ["query", "engine", "--prompt", "x"], ["describe", "engine"]])
def test_a_zmq_port_written_as_http_names_a_command_that_takes_it(server: LmcacheServer, words):
    url = f"http://localhost:{server.port}"
    for _ in range(20):  # a busy server may take too long to show what it speaks
        error = Cli("").refused(*words, "--timeout", "1", "--url", url, code=3)
        if "speaks ZMQ" in error:
            break
    assert f"hint: for an lmcache server: 'lmcache ping kvcache --url tcp://localhost:{server.port}'" in error
    assert Cli("")("ping", "kvcache", "--url", f"tcp://localhost:{server.port}").returncode == 0


def test_an_answer_that_ceases_to_be_http_is_exit_code_1():
    def health(handler):
        handler.start_stream()
        handler.wfile.write(b"zz\r\n")
        handler.hang_up()

    with engine_peer({"/health": health}) as engine:
        error = Cli("").refused("ping", "engine", "--url", engine.url, code=1)
    assert f"the answer of {engine.url} cannot be read: " in error
    assert "does not speak HTTP" not in error
    assert "hint: see the engine's log" in error


def test_a_body_that_is_too_large_is_exit_code_1(monkeypatch):
    monkeypatch.setattr(http, "MAX_BODY_BYTES", 1000)
    with engine_peer({"/health": (200, "x" * 1001)}) as engine, HttpClient(parse_url(engine.url), 60, ENGINE) as client:
        with pytest.raises(ProtocolError, match="an answer of more than 1000 bytes"):
            client.send("GET", "/health")
        assert client.send("GET", "/other").status == 404  # on another connection


def test_a_certificate_is_trusted_when_it_is_named_and_not_otherwise(certificate):
    file, context = certificate
    with engine_peer({"/health": (200, "")}, context) as engine:
        url = engine.url.replace("http://127.0.0.1", "https://localhost")
        done = ping(url, "--count", "2", "--interval", "0", SSL_CERT_FILE=file)
        assert done.returncode == 0, done.stderr
        error = Cli("").refused("ping", "engine", "--url", url, code=3)
        assert "CERTIFICATE_VERIFY_FAILED" in error
        assert "hint: set SSL_CERT_FILE" in error
    with engine_peer({"/health": (200, "")}) as engine:
        error = Cli("").refused("ping", "engine", "--url", engine.url.replace("http://", "https://"), code=3)
        assert "cannot connect to https://" in error
