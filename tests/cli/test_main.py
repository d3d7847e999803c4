"""The boundary: where commands come from, and what becomes of errors, interrupts and closed pipes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest

import lmcache
from lmcache.cli import main as main_module
from tests.cli.conftest import Cli
from tests.server_process import LMCACHE, LmcacheServer, clean_environment, free_port, run_lmcache, running_lmcache

COMMAND = '''
"""A command that someone dropped in."""


def register_command(subparsers):
    parser = subparsers.add_parser("say-hello", help="be polite")
    parser.add_argument("--name", default="you")
    parser.set_defaults(func=say_hello)


def say_hello(args):
    if args.name == "bug":
        raise RuntimeError("nobody thought of this")
    print(f"hello {args.name}, {args.format}")
    return 7
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package into which one file was dropped; what runs there imports it."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(Path(lmcache.__file__).parent, folder / "lmcache", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "lmcache/cli/commands/say_hello.py").write_text(COMMAND)
    return folder


def test_a_file_dropped_into_commands_is_a_command(copy):
    done = run_lmcache("say-hello", "--name", "Ada", "--format", "json", cwd=copy)
    assert (done.returncode, done.stdout, done.stderr) == (7, "hello Ada, json\n", "")
    assert "say-hello           be polite" in run_lmcache("--help", cwd=copy).stdout
    assert "did you mean 'say-hello'?" in run_lmcache("say-helo", cwd=copy).stderr
    assert "did you mean '--name'?" in run_lmcache("say-hello", "--nmae", "x", cwd=copy).stderr


def test_an_unforeseen_error_is_one_line_and_exit_1(copy):
    done = run_lmcache("say-hello", "--name", "bug", cwd=copy)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        "error: RuntimeError: nobody thought of this; this is a bug in lmcache",
        "hint: run it again with LMCACHE_DEBUG=1 and report what it prints",
    ]
    done = run_lmcache("say-hello", "--name", "bug", "--format", "json", cwd=copy)
    assert json.loads(done.stdout)["error"]["code"] == "bug"


def test_the_traceback_is_there_for_those_who_ask(copy):
    done = run_lmcache("say-hello", "--name", "bug", env={"LMCACHE_DEBUG": "1"}, cwd=copy)
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.splitlines()[-2].startswith("error: RuntimeError")


def test_an_error_in_json_goes_to_the_output_file_and_its_text_to_stderr(tmp_path):
    words = ["ping", "kvcache", "--url", f"localhost:{free_port()}", "--format", "json"]
    done = run_lmcache(*words, "--output", str(tmp_path / "result"))
    assert (done.returncode, done.stdout) == (3, "")
    assert json.loads((tmp_path / "result").read_text())["error"]["code"] == "unreachable"
    assert done.stderr.startswith("error: cannot connect")


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_done(server: LmcacheServer):
    error = Cli(server.zmq_url).refused("kvcache", "clear", "-y", "--output", "/nonexistent/file")
    assert error.startswith("error: cannot write '/nonexistent/file'")


def test_an_unknown_variable_stops_any_command():
    done = run_lmcache("ping", "kvcache", env={"LMCACHE_ULR": "x"})
    assert done.returncode == 2
    assert done.stderr == "error: unknown environment variable LMCACHE_ULR\nhint: did you mean 'LMCACHE_URL'?\n"
    assert run_lmcache("--help", env={"LMCACHE_ULR": "x"}).returncode == 0


def test_a_misspelt_prefix_is_warned_of(server: LmcacheServer):
    done = run_lmcache("ping", "kvcache", "--url", server.zmq_url, env={"LM_CACHE_URL": "x"})
    assert done.returncode == 0
    assert done.stderr == "warning: LM_CACHE_URL is not read; the name is LMCACHE_URL\n"


def test_main_returns_the_exit_code_and_never_exits(capsys):
    assert main_module.main(["ping", "kvcache", "--url", "nonsense"]) == 2
    assert main_module.main(["--help"]) == 0
    assert capsys.readouterr().err.startswith("error: 'nonsense' is not an address")


# -- interrupts ------------------------------------------------------------------------------------


# With `python -m`, Python ends by the signal itself if the interrupt has come while it ran text, as a dataclass is made of,
# whoever caught it.
INSTALLED = [str(Path(sysconfig.get_path("scripts"), "lmcache"))]


def check_interrupted(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err == ""


def test_ctrl_c_while_watching_is_130(server: LmcacheServer):
    with running_lmcache("describe", "kvcache", "--watch", "--url", server.zmq_url, command=INSTALLED) as process:
        assert process.stdout is not None
        process.stdout.readline()
        check_interrupted(process)


@pytest.mark.parametrize(
    "words", [["ping", "kvcache"], ["query", "kvcache", "--round-trip"], ["ping", "kvcache", "--wait", "60"]]
)
@pytest.mark.parametrize("transport", ["zmq", "http"])
def test_ctrl_c_while_a_frozen_server_is_waited_for_is_130(words, transport):
    with LmcacheServer() as server:
        server.freeze()
        url, port = (server.zmq_url, server.port) if transport == "zmq" else (server.http_url, server.http_port)
        with running_lmcache(*words, "--timeout", "120", "--url", url, command=INSTALLED) as process:
            wait_for_connection(process, port)
            check_interrupted(process)
        server.thaw()


def wait_for_connection(process: subprocess.Popen[str], port: int) -> None:
    watched = psutil.Process(process.pid)
    while not any(c.raddr and c.raddr.port == port for c in watched.net_connections()):
        assert process.poll() is None


@pytest.mark.parametrize("slow", ["time.sleep(60)", "exec('time.sleep(60)')"], ids=["module", "text"])
def test_ctrl_c_during_imports_is_130(tmp_path, slow):
    (tmp_path / "zmq.py").write_text(f"import time\nprint('importing', flush=True)\n{slow}\n")
    with running_lmcache("ping", "kvcache", env={"PYTHONPATH": str(tmp_path)}, command=INSTALLED) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        check_interrupted(process)


# -- stdout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["ping", "kvcache"], ["describe", "kvcache", "--watch", "0.01"], ["--version"]])
def test_a_reader_that_has_gone_is_no_error(server: LmcacheServer, words):
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [*LMCACHE, *words],
            env={**clean_environment(), "LMCACHE_URL": server.zmq_url},
            stdout=write_end,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("is_json", [True, False])
@pytest.mark.parametrize("broken", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_a_failure_is_told_by_the_exit_code_although_its_reader_has_gone(is_json, broken):
    read_end, write_end = os.pipe()
    os.close(read_end)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **dict.fromkeys(broken, write_end)}
    words = ["ping", "kvcache", "--url", f"localhost:{free_port()}", *(["--format", "json"] if is_json else [])]
    try:
        assert subprocess.run([*LMCACHE, *words], env=clean_environment(), **streams, timeout=60, check=False).returncode == 3
    finally:
        os.close(write_end)


def test_a_closed_stdin_and_words_that_are_no_text_are_wrong_calls(server: LmcacheServer):
    command = f"{sys.executable} -m lmcache.cli.main kvcache clear --url {server.zmq_url}"
    done = subprocess.run(["sh", "-c", f"{command} <&-"], env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "-y" in done.stderr
    words = [*LMCACHE, "kvcache", "end-session", b"\xff", "--url", server.zmq_url]
    done = subprocess.run(words, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "is not UTF-8" in done.stderr


def test_a_full_disk_under_stdout_is_one_error(server: LmcacheServer):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*LMCACHE, "ping", "kvcache", "--url", server.zmq_url],
            env=clean_environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: cannot write to standard output: No space left on device"


def to_full_disk(*words: str) -> subprocess.CompletedProcess[str]:
    """Run it with a stdout that takes nothing, and buffers as it does unless told otherwise."""
    env = {name: value for name, value in clean_environment().items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        streams = {"stdout": full, "stderr": subprocess.PIPE}
        return subprocess.run([*LMCACHE, *words], env=env, **streams, text=True, timeout=60, check=False)


def test_an_error_in_json_that_cannot_be_written_is_said_on_stderr_with_its_exit_code(server: LmcacheServer, tmp_path: Path):
    ping = ["ping", "kvcache", "--format", "json", "--url"]
    full = "error: cannot write to standard output: No space left on device\nhint: pass another --output\n"
    done = to_full_disk(*ping, server.zmq_url)
    assert (done.returncode, done.stderr) == (1, full)
    done = to_full_disk(*ping, f"localhost:{free_port()}")
    assert done.returncode == 3
    assert done.stderr.startswith("error: cannot connect to")
    assert done.stderr.endswith(full)
    assert len(done.stderr.splitlines()) == 4
    done = to_full_disk(*ping, "nonsense", "--output", str(tmp_path / "none" / "file"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write '")
    assert done.stderr.endswith(full)


@pytest.mark.parametrize("words", [["--help"], ["ping", "kvcache", "--help"], ["--version"]])
def test_help_that_cannot_be_written_is_no_success(words):
    done = to_full_disk(*words)
    assert done.returncode == 1
    assert done.stderr == "error: cannot write to standard output: No space left on device\nhint: pass another --output\n"


def test_a_closed_stdout_is_survived(server: LmcacheServer):
    command = f"{sys.executable} -m lmcache.cli.main ping kvcache --url {server.zmq_url} >&-"
    done = subprocess.run(["sh", "-c", command], env=clean_environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_that_the_terminal_cannot_show_are_escaped(server: LmcacheServer):
    env = {"PYTHONIOENCODING": "ascii", "LMCACHE_URL": server.zmq_url}
    done = run_lmcache("kvcache", "end-session", "request-ü-中", env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert "request-\\xfc-\\u4e2d" in done.stdout


# -- the old name ----------------------------------------------------------------------------------


def test_the_old_server_command_warns_and_runs_the_new_one():
    body = "import sys; from lmcache.cli.main import deprecated_server_main; sys.exit(deprecated_server_main())"
    done = subprocess.run(
        [sys.executable, "-c", body, "--port", "x"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "warning: lmcache_server is deprecated and goes in version 0.3.0; use 'lmcache server'"
    )
    assert "--port 'x'" in done.stderr
