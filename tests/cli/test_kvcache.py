"""`lmcache kvcache` against a real server."""

import os
import pty
from pathlib import Path

import pytest

from lmcache.cli.commands.kvcache import add_tiers, removal_result
from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import chunk_keys
from lmcache.protocol import RemovalReply, TierRemoval
from tests.cli.conftest import CHUNK_BYTES, MODEL, Cli, namespace
from tests.server_process import LMCACHE, LmcacheServer, clean_environment, running_lmcache


@pytest.fixture
def keys(engine: KVCacheClient) -> bytes:
    """Eight chunks in the cache."""
    keys = chunk_keys(namespace(), list(range(8 * 256)))
    engine.store(keys, [bytes(CHUNK_BYTES)] * 8, namespace().id)
    return keys


def num_chunks(server: LmcacheServer) -> int:
    return int(server.status()["l1"]["chunks"])


# -- clear -----------------------------------------------------------------------------------------


def test_clear_removes_everything_and_reports(cli: Cli, keys: bytes, server: LmcacheServer):
    document = cli.json("kvcache", "clear", "-y")
    assert document["status"] == "OK"
    assert (document["objects"], document["removed_bytes"]) == (8, 8 * CHUNK_BYTES)
    assert (document["kept_objects"], document["kept_bytes"], document["dry_run"]) == (0, 0, False)
    assert document["seconds"] >= 0
    assert num_chunks(server) == 0


def test_clears_box_is_the_published_one(cli: Cli, keys: bytes):
    lines = cli("kvcache", "clear", "-y").stdout.splitlines()
    assert lines[:3] == [
        "========== KV Cache Clear ==========",
        "Status:                          OK",
        "Objects removed:                  8",
    ]
    assert lines[-1] == "=" * 36


def test_a_dry_run_removes_nothing(cli: Cli, keys: bytes, server: LmcacheServer):
    document = cli.json("kvcache", "clear", "--dry-run")
    assert (document["objects"], document["removed_bytes"], document["dry_run"]) == (8, 8 * CHUNK_BYTES, True)
    assert num_chunks(server) == 8


def test_a_removal_that_goes_on_is_no_success():
    result = removal_result("KV Cache Clear", RemovalReply(objects=5, remaining_objects=7), dry_run=False)
    assert (result.document()["remaining_objects"], result.ok) == (7, False)
    assert result.document()["error"]["message"] == "7 objects were not looked at yet"
    assert "it goes on" in result.document()["error"]["hint"]


def test_what_a_tier_does_not_know_is_not_nothing():
    removal = RemovalReply(tiers=[TierRemoval(name="redis", objects=None, done=True)])
    result = removal_result("KV Cache Clear", removal, dry_run=True)
    add_tiers(result, removal, dry_run=True)
    assert result.document()["tiers"] == [{"name": "redis", "objects": None, "removed_bytes": None, "error": None}]
    assert [row.value for row in result.sections[-1].rows] == ["n/a (the tier cannot tell)"] * 2


def test_without_a_terminal_clear_wants_yes(cli: Cli, keys: bytes, server: LmcacheServer):
    error = cli.refused("kvcache", "clear")
    assert "hint: pass -y, or --dry-run to look first" in error
    assert num_chunks(server) == 8


@pytest.mark.parametrize(
    ("answer", "code", "left"), [("y", 0, 0), ("YES", 0, 0), ("n", 1, 8), ("", 1, 8), ("\x04", 1, 8), ("\x03", 130, 8)]
)
def test_at_a_terminal_clear_asks(keys: bytes, server: LmcacheServer, answer, code, left):
    returncode, shown = at_a_terminal(answer, "kvcache", "clear", "--url", server.zmq_url)
    assert returncode == code
    assert f"Remove 8 objects (512.0 KiB) from {server.zmq_url}? [y/N]" in shown
    assert num_chunks(server) == left


def at_a_terminal(answer: str, *words: str) -> tuple[int, str]:
    """Run the command as the session of a new terminal, type the answer at the question, return what it showed."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(LMCACHE[0], [*LMCACHE, *words], clean_environment())
    shown = b""
    try:
        while b"[y/N]" not in shown:
            shown += os.read(terminal, 1000)
        os.write(terminal, (answer if answer in ("\x03", "\x04") else answer + "\n").encode())
        while piece := os.read(terminal, 1000):
            shown += piece
    except OSError:
        pass  # the last process has left the terminal
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    return os.waitstatus_to_exitcode(status), shown.decode()


def test_pinned_chunks_are_kept_and_said(cli: Cli, engine: KVCacheClient, keys: bytes, server: LmcacheServer):
    with engine.pin(keys[: 3 * 32]):
        document = cli.json("kvcache", "clear", "-y")
        assert (document["objects"], document["kept_objects"], document["kept_bytes"]) == (5, 3, 3 * CHUNK_BYTES)
        document = cli.json("kvcache", "clear", "-y", "--force", "--timeout", "15", code=1)
        assert document["kept_objects"] == 3
        assert document["error"]["message"] == "3 objects are still pinned"
    assert cli.json("kvcache", "clear", "-y", "--force")["objects"] == 3


def test_force_waits_for_pins_to_go(engine: KVCacheClient, keys: bytes, server: LmcacheServer):
    pinned = engine.pin(keys)
    words = ["kvcache", "clear", "-y", "--force", "--timeout", "120", "--url", server.zmq_url]
    with running_lmcache(*words) as process:
        pinned.release()
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "Objects removed:                  8" in out


def test_clear_over_http_wants_the_servers_token(tmp_path: Path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o600)
    with LmcacheServer(["--http-token-file", str(token)]) as server:
        cli = Cli(server.http_url)
        error = cli.refused("kvcache", "clear", "-y", code=1)
        assert "wants a token" in error
        assert "LMCACHE_HTTP_TOKEN" in error
        assert "wants another token" in cli.refused("kvcache", "clear", "-y", code=1, LMCACHE_HTTP_TOKEN="wrong")
        assert cli("kvcache", "clear", "-y", LMCACHE_HTTP_TOKEN="secret").returncode == 0


# -- end-session -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["request-1"], ["--request-id", "request-1"]])
def test_end_session_releases_the_requests_pins(cli: Cli, engine: KVCacheClient, keys: bytes, server, words):
    engine.lookup(keys, request_id="request-1")
    assert server.status()["l1"]["pins"] == 8
    done = cli("kvcache", "end-session", *words)
    assert done.returncode == 0
    assert done.stdout.splitlines()[:4] == [
        "======== KV Cache End Session ========",
        "Status:                           OK",
        "Request ID:                request-1",
        "Pins released:                     8",
    ]
    assert server.status()["l1"]["pins"] == 0


def test_ending_a_session_that_nobody_has_is_no_error(zmq_cli: Cli):
    document = zmq_cli.json("kvcache", "end-session", "nobody")
    assert (document["status"], document["request_id"], document["released_pins"]) == ("OK", "nobody", 0)


@pytest.mark.parametrize("words", [[], ["a", "--request-id", "b"], [""], ["x" * 513]])
def test_end_session_wants_one_request_id(zmq_cli: Cli, words):
    zmq_cli.refused("kvcache", "end-session", *words)


# -- evict -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "removed"),
    [
        (["--bytes", "128KiB"], 2),
        (["--bytes", "1"], 1),
        (["--ratio", "1"], 8),
        (["--ratio", "0"], 0),
        (["--older-than", "1d"], 0),
        (["--older-than", "0"], 8),
        (["--model", MODEL], 8),
        (["--model", "tiny-model", "--bytes", "64KiB"], 1),
    ],
)
def test_evict_removes_what_the_conditions_select(cli: Cli, keys: bytes, server: LmcacheServer, words, removed):
    assert cli.json("kvcache", "evict", *words, "--dry-run")["objects"] == removed
    assert num_chunks(server) == 8
    document = cli.json("kvcache", "evict", *words)
    assert (document["objects"], document["removed_bytes"]) == (removed, removed * CHUNK_BYTES)
    assert num_chunks(server) == 8 - removed


def test_evict_removes_a_prompts_chunks_only(cli: Cli, engine: KVCacheClient, keys: bytes, server, tmp_path: Path):
    (tmp_path / "tokens").write_text(" ".join(map(str, range(3 * 256))))
    assert cli.json("kvcache", "evict", "--tokens", str(tmp_path / "tokens"))["objects"] == 3
    assert num_chunks(server) == 5


def test_evicts_box_is_like_clears(zmq_cli: Cli, keys: bytes):
    lines = zmq_cli("kvcache", "evict", "--ratio", "1").stdout.splitlines()
    assert lines[:3] == [
        "========== KV Cache Evict ==========",
        "Status:                          OK",
        "Objects removed:                  8",
    ]


def test_evict_without_a_condition_is_refused(zmq_cli: Cli):
    assert "evict what? no condition was given" in zmq_cli.refused("kvcache", "evict")


@pytest.mark.parametrize(
    "words",
    [
        ["--ratio", "100%", "--cache-salt", "tenantA"],
        ["--model", MODEL, "--lora", "x=/y"],
        ["--older-than", "0", "--tokenizer", "/tmp"],
        ["--bytes", "1GiB", "--tokenize-with", "http://localhost:1"],
        ["--ratio", "1", "--corpus", "own=/dev/null"],
        ["--cache-salt", "tenantA"],
    ],
)
def test_evict_refuses_what_narrows_a_prompt_where_there_is_none(zmq_cli: Cli, keys: bytes, server: LmcacheServer, words):
    error = zmq_cli.refused("kvcache", "evict", *words)
    assert words[-2] in error.splitlines()[0]
    assert "add --prompt or --tokens" in error
    assert num_chunks(server) == 8


def test_an_empty_salt_such_as_an_unset_variable_is_refused(zmq_cli: Cli, keys: bytes, server: LmcacheServer):
    assert "'' is no salt" in zmq_cli.refused("kvcache", "evict", "--ratio", "100%", "--cache-salt", "")
    assert num_chunks(server) == 8


def test_evicting_an_unknown_model_lists_the_known_ones(zmq_cli: Cli, engine: KVCacheClient):
    assert MODEL in zmq_cli.refused("kvcache", "evict", "--model", "other", code=1)
