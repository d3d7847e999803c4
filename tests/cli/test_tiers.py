"""The commands against a server with a folder below L1."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import chunk_keys
from tests.cli.conftest import CHUNK_BYTES, LAYOUT, MODEL, Cli, namespace
from tests.pools import wait_until
from tests.server_process import LmcacheServer

TOKENS = list(range(4 * 256))
KEYS = chunk_keys(namespace(), TOKENS)


@pytest.fixture(scope="module")
def tiered_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LmcacheServer]:
    folder = tmp_path_factory.mktemp("l2")
    flags = ("--l2-adapter", f"fs://{folder}?capacity-gb=1", "--l2-lookup-timeout-seconds", "30", "--l2-inflight-ratio", "1")
    with LmcacheServer(flags, l1_size_gb=1 / 64) as running:
        yield running


@pytest.fixture(params=["zmq", "http"])
def cli(request: pytest.FixtureRequest, tiered_server: LmcacheServer) -> Cli:
    return Cli(tiered_server.zmq_url if request.param == "zmq" else tiered_server.http_url)


@pytest.fixture(autouse=True)
def _stored(tiered_server: LmcacheServer) -> Iterator[None]:
    """Four chunks in both tiers."""
    with KVCacheClient(tiered_server.zmq_url, kind="test-engine", timeout_seconds=60) as client:
        client.register(namespace(), LAYOUT)
        client.store(KEYS, [bytes(CHUNK_BYTES)] * 4, namespace().id)
        wait_until(lambda: not tiered_server.status()["l2"][0]["queued_chunks"], "the writes")
        yield
    Cli(tiered_server.zmq_url)("kvcache", "clear", "-y")


def test_clear_reports_each_tier(cli: Cli):
    document = cli.json("kvcache", "clear", "-y")
    assert (document["objects"], document["tier"]) == (4, "all")
    [tier] = document["tiers"]
    assert (tier["name"], tier["objects"], tier["error"]) == ("fs", 4, None)
    assert tier["removed_bytes"] >= 4 * CHUNK_BYTES


def test_clear_of_one_tier_leaves_the_other(cli: Cli, tiered_server: LmcacheServer):
    assert cli.json("kvcache", "clear", "-y", "--tier", "l1")["tiers"] == []
    document = cli.json("kvcache", "clear", "-y", "--tier", "l2")
    assert (document["objects"], document["tiers"][0]["objects"]) == (0, 4)


def test_a_dry_run_of_l2_counts_and_leaves(cli: Cli):
    text = cli("kvcache", "clear", "--tier", "l2", "--dry-run").stdout
    assert "L2 fs" in text
    assert cli.json("kvcache", "clear", "-y", "--tier", "l2")["tiers"][0]["objects"] == 4


def test_evict_reports_each_tier_and_fails_where_one_keeps_the_values(cli: Cli, tiered_server: LmcacheServer, tmp_path: Path):
    tokens = tmp_path / "tokens"
    tokens.write_text(" ".join(map(str, TOKENS)))
    words = ("kvcache", "evict", "--tokens", str(tokens), "--model", MODEL)
    folder = Path(tiered_server.status()["l2"][0]["adapter"].removeprefix("fs://").partition("?")[0])
    away = folder.rename(tmp_path / "away")
    folder.write_text("not a folder")
    document = cli.json(*words, code=1)
    assert "L2 fs has not removed all of it" in document["error"]["message"]
    assert document["tiers"][0]["error"]
    folder.unlink()
    away.rename(folder)
    [tier] = cli.json(*words)["tiers"]
    assert (tier["objects"], tier["error"]) == (4, None)


def test_describe_shows_the_tier(cli: Cli):
    text = cli("describe", "kvcache").stdout
    for label in ("L2 fs", "Adapter:", "Read breaker:", "Used:", "Hit rate:", "Write (ms):", "Queued chunks:", "Last error:"):
        assert label in text
    [tier] = cli.json("describe", "kvcache")["l2"]
    assert tier["written_chunks"] >= 4
    assert tier["read_breaker"] == tier["write_breaker"] == "closed"


def test_query_shows_what_each_tier_holds(cli: Cli, tmp_path: Path):
    cli("kvcache", "clear", "-y", "--tier", "l1")
    tokens = tmp_path / "tokens"
    tokens.write_text(" ".join(map(str, TOKENS)))
    document = cli.json("query", "kvcache", "--tokens", str(tokens), "--model", MODEL)
    assert (document["cached_chunks"], document["l1_chunks"], document["l2_only_chunks"]) == (4, 0, 4)
    assert document["tiers"] == {"fs": 4}
    assert "  In L2 fs:" in cli("query", "kvcache", "--tokens", str(tokens), "--model", MODEL).stdout


def test_bench_beyond_l1_fills_the_rows_of_l2(tiered_server: LmcacheServer):
    """Four times L1, from the server's own counters; and nothing of it is left, in either tier."""
    cli = Cli(tiered_server.zmq_url)
    cli("kvcache", "clear", "-y")
    flags = ("--working-set", "64MiB", "--chunk-bytes", "256KiB", "--chunks-per-prompt", "4", "--operations", "400")
    document = cli.json("bench", "kvcache", *flags, "--timeout", "60", "--warmup", "0")
    [run] = document["runs"]
    assert 0 < run["hit_rate"]["l2"]["ratio"] <= 1
    assert run["bandwidth"]["l2_read"]["gb_per_second"] > 0
    assert run["bandwidth"]["l2_write"]["gb_per_second"] > 0
    assert run["correctness"]["bad"] == 0
    for name, check in run["counter_checks"].items():
        assert check["workers"] == check["server"], name
    status = tiered_server.status()
    assert status["l1"]["chunks"] == 0
    wait_until(lambda: not cli.json("kvcache", "clear", "-y", "--tier", "l2")["tiers"][0]["objects"], "an empty L2")


def test_settings_show_no_secret():
    flags = ("--l2-adapter", "redis://user:hunter2@127.0.0.1:1/0")
    with LmcacheServer(flags) as server:
        cli = Cli(server.zmq_url)
        assert "hunter2" not in cli("describe", "kvcache", "--config").stdout + cli("describe", "kvcache").stdout
        assert "hunter2" not in server.log_text()
