"""`lmcache ping kvcache` against a real server, and against one that is not well."""

import re
import time
from argparse import Namespace

import pytest

from lmcache.cli.commands import ping as ping_module
from lmcache.errors import UnreachableError
from tests.cli.conftest import Cli
from tests.cli.peers import http_peer, unhealthy, zmq_peer
from tests.server_process import LmcacheServer, free_port, run_lmcache, running_lmcache

BOX = re.compile(
    r"={7} Ping KV Cache ={8}\n"
    r"Status:                  OK\n"
    r"Round trip time \(ms\):    \d+\.\d+\n"
    r"={30}\n"
)


def test_text_is_the_published_box(cli: Cli):
    done = cli("ping", "kvcache")
    assert (done.returncode, done.stderr) == (0, "")
    assert BOX.fullmatch(done.stdout), done.stdout


def test_json_has_the_round_trip_as_a_number(cli: Cli):
    document = cli.json("ping", "kvcache")
    assert document["status"] == "OK"
    assert document["problems"] == []
    assert document["url"] == cli.url
    assert document["round_trip_ms"] > 0


def test_several_pings_show_their_spread(cli: Cli):
    document = cli.json("ping", "kvcache", "--count", "5", "--interval", "0")
    spread = document["spread_ms"]
    assert document["count"] == 5
    assert 0 < spread["min"] <= spread["median"] <= spread["p99"] <= spread["max"]
    assert document["round_trip_ms"] == spread["median"]
    text = cli("ping", "kvcache", "--count", "3", "--interval", "0").stdout
    assert [line.split(":")[0] for line in text.splitlines()[1:-1]] == [
        "Status",
        "Pings",
        "-----Round trip time (ms)-----",
        "Min",
        "Median",
        "p99",
        "Max",
    ]


def test_quiet_says_it_with_the_exit_code(cli: Cli):
    done = cli("ping", "kvcache", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = Cli(f"localhost:{free_port()}")("ping", "kvcache", "-q")
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_the_default_address_is_that_of_the_variable_and_the_flag_wins(server: LmcacheServer):
    assert run_lmcache("ping", "kvcache", env={"LMCACHE_URL": server.zmq_url}).returncode == 0
    wrong = {"LMCACHE_URL": f"localhost:{free_port()}"}
    assert run_lmcache("ping", "kvcache", "--url", server.zmq_url, env=wrong).returncode == 0
    assert run_lmcache("ping", "kvcache", env=wrong).returncode == 3


def test_output_goes_to_the_file_and_not_to_stdout(cli: Cli, tmp_path):
    done = cli("ping", "kvcache", "--output", str(tmp_path / "result"))
    assert (done.returncode, done.stdout) == (0, "")
    assert BOX.fullmatch((tmp_path / "result").read_text())


def test_a_server_with_problems_is_fail_with_the_reason_over_zmq():
    with zmq_peer(unhealthy("L1 cannot allocate: every page is lost")) as port:
        check_fail(Cli(f"localhost:{port}"))


def test_a_server_with_problems_is_fail_with_the_reason_over_http():
    with http_peer(503, b'{"status": "fail", "problems": ["L1 cannot allocate: every page is lost"]}') as port:
        check_fail(Cli(f"http://localhost:{port}"))


def check_fail(cli: Cli) -> None:
    done = cli("ping", "kvcache")
    assert done.returncode == 1
    assert "Status:                  FAIL\n" in done.stdout
    assert "Problem:                 L1 cannot allocate: every page is lost\n" in done.stdout
    assert done.stderr.startswith("error: ")
    document = cli.json("ping", "kvcache", code=1)
    assert document["status"] == "FAIL"
    assert document["problems"] == ["L1 cannot allocate: every page is lost"]
    assert document["error"]["code"] == "unhealthy"


def test_wait_returns_when_the_server_has_come():
    late = LmcacheServer()
    with running_lmcache("ping", "kvcache", "--wait", "120", "--url", late.zmq_url) as waiting, late:
        out, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, err
    assert BOX.fullmatch(out)


@pytest.mark.parametrize("scheme", ["tcp", "http"])
def test_wait_ends_with_the_last_error(scheme):
    error = Cli(f"{scheme}://localhost:{free_port()}").refused("ping", "kvcache", "--wait", "0.5", code=3)
    assert "cannot connect to" in error


def test_wait_ends_with_the_last_fail():
    with zmq_peer(unhealthy("no")) as port:
        assert Cli(f"localhost:{port}")("ping", "kvcache", "--wait", "0.5").returncode == 1


@pytest.mark.parametrize("status", [404, 502, 503])
def test_wait_goes_on_while_a_proxy_answers_for_the_server(status):
    with http_peer(status, b"<html>not yet</html>", "text/html") as port:
        url = f"http://localhost:{port}"
        started_at = time.monotonic()
        assert Cli(url)("ping", "kvcache", "--wait", "2").returncode == 1
        assert time.monotonic() - started_at > 1.5
    assert Cli(url)("ping", "kvcache", "--wait", "0.5").returncode == 3


class Clock:
    """The time module of a `ping` whose tries take as long as they may."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("wait", "tries"), [(10.0, [5.0, 4.8]), (0.0, [5.0]), (1.0, [2.0]), (5.5, [5.0, 2.0])])
def test_wait_does_not_begin_a_try_after_its_end(monkeypatch, wait, tries):
    clock, seen = Clock(), []
    monkeypatch.setattr(ping_module, "time", clock)

    def fail(timeout: float) -> ping_module.Ping:
        seen.append(timeout)
        clock.now += timeout
        raise UnreachableError("nobody")

    with pytest.raises(UnreachableError):
        ping_module.until_ok(fail, Namespace(timeout=5.0, wait=wait))
    assert seen == pytest.approx(tries)


def test_one_bad_answer_of_several_is_fail():
    answers = iter([unhealthy(), unhealthy("full")])  # the first opens the connection
    with zmq_peer(lambda frames: next(answers, unhealthy())(frames)) as port:
        document = Cli(f"localhost:{port}").json("ping", "kvcache", "--count", "3", "--interval", "0", code=1)
    assert (document["status"], document["problems"], document["count"]) == ("FAIL", ["full"], 3)
