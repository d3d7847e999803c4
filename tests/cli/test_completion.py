"""Completion scripts: accepted by the shell, and complete what the parsers know."""

import re
import shlex
import shutil
import subprocess

import pytest

from tests.cli.conftest import Cli
from tests.server_process import LMCACHE, clean_environment, run_lmcache


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("completion") / "lmcache.bash"
    done = run_lmcache("completion", "bash", "--output", str(path))
    assert done.returncode == 0, done.stderr
    return str(path)


def complete(script: str, line: str) -> list[str]:
    """What bash offers at the end of the line."""
    words = line.split(" ")
    program = (
        f'source "{script}"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lmcache; '
        'for word in "${COMPREPLY[@]}"; do echo "$word"; done'
    )
    done = subprocess.run(["bash", "-c", program, "bash", *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(("shell", "check"), [("bash", ["bash", "-n"]), ("zsh", ["zsh", "-n"]), ("fish", ["fish", "-n"])])
def test_the_shell_accepts_its_script(shell, check, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    (tmp_path / "script").write_text(run_lmcache("completion", shell).stdout)
    subprocess.run([*check, str(tmp_path / "script")], check=True)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lmcache p", ["ping"]),
        ("lmcache ping k", ["kvcache"]),
        ("lmcache --format json ping k", ["kvcache"]),
        ("lmcache ping kvcache --co", ["--count"]),
        ("lmcache ping kvcache --format ", ["text", "json"]),
        ("lmcache ping kvcache --format j", ["json"]),
        ("lmcache kvcache ", ["clear", "end-session", "evict"]),
        ("lmcache kvcache clear --dr", ["--dry-run"]),
        ("lmcache server --l1", ["--l1-size-gb"]),
        ("lmcache completion z", ["zsh"]),
        ("lmcache nonsense p", ["ping"]),
    ],
)
def test_bash_completes(bash_script, line, offered):
    assert [word for word in complete(bash_script, line) if not (line.endswith(" ") and word.startswith("-"))] == offered


def test_bash_completes_files(bash_script, tmp_path, monkeypatch):
    (tmp_path / "tokens.json").touch()
    assert complete(bash_script, f"lmcache query kvcache --tokens {tmp_path}/tok") == [f"{tmp_path}/tokens.json"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_know_the_same_words(shell):
    script = run_lmcache("completion", shell).stdout
    assert all(word in script for word in ("ping kvcache", "end-session", "text json", "l1-size-gb", "zsh"))


@pytest.mark.parametrize(
    ("shell", "file"),
    [
        ("bash", ".local/share/bash-completion/completions/lmcache"),
        ("fish", ".config/fish/completions/lmcache.fish"),
    ],
)
def test_what_help_says_installs_the_script_in_an_empty_home(tmp_path, shell, file):
    text = run_lmcache("completion", "--help", env={"COLUMNS": "200"}).stdout.partition("To install it:")[2]
    told = re.search(rf"^{shell}: ((?:.+\n)(?: +.+\n)*)", text, re.MULTILINE)
    assert told is not None
    program = f'set -e\nlmcache() {{ {shlex.join(LMCACHE)} "$@"; }}\n{told[1]}'
    subprocess.run(["bash", "-c", program], env={**clean_environment(), "HOME": str(tmp_path)}, check=True)
    assert (tmp_path / file).read_text().startswith(f"# {shell} completion for lmcache")


def test_json_carries_the_script():
    document = Cli("").json("completion", "bash")
    assert document["shell"] == "bash"
    assert document["script"].startswith("# bash completion for lmcache")
