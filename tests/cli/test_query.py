"""`lmcache query kvcache` against a real server."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lmcache.cli.corpora import load_corpus
from lmcache.cli.main import main
from lmcache.cli.prompts import load_tokenizer, read_token_file
from lmcache.cli.status import View, fetch_status
from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import LMCacheError
from lmcache.keys import chunk_keys
from lmcache.weights import adapter_digest, adapter_label
from tests.cli.conftest import CHUNK_BYTES, CHUNK_TOKENS, LAYOUT, MODEL, Cli, namespace
from tests.cli.peers import engine_peer, letters, tcp_peer
from tests.server_process import LmcacheServer


def store(client: KVCacheClient, token_ids: list[int], **narrow: str) -> None:
    """Store every whole chunk of the tokens, as an engine does."""
    keys = chunk_keys(namespace().for_request(**narrow), token_ids)
    client.store(keys, [bytes(CHUNK_BYTES)] * (len(token_ids) // CHUNK_TOKENS))


def write_tokens(folder: Path, token_ids: list[int]) -> str:
    (folder / "tokens.json").write_text(json.dumps(token_ids))
    return str(folder / "tokens.json")


def test_a_partial_hit_is_the_published_box(cli: Cli, engine: KVCacheClient, tmp_path: Path):
    token_ids = list(range(8192))
    store(engine, token_ids[:7680])
    done = cli("query", "kvcache", "--tokens", write_tokens(tmp_path, token_ids), "--model", MODEL)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "========= Query KV Cache Result =========",
        "Prompt tokens:                       8192",
        "Cached chunks:              30/32 (93.8%)",
        "Cached tokens:                  7680/8192",
        "  In L1:                        30 chunks",
        "  In L2 only:                    0 chunks",
        "Cache status:               HIT (partial)",
        "=========================================",
    ]


def test_json_has_numbers(cli: Cli, engine: KVCacheClient, tmp_path: Path):
    store(engine, list(range(512)))
    document = cli.json("query", "kvcache", "--tokens", write_tokens(tmp_path, list(range(1000))))
    assert document["prompt_tokens"] == 1000
    assert (document["cached_chunks"], document["total_chunks"], document["cached_tokens"]) == (2, 3, 512)
    assert document["cached_ratio"] == pytest.approx(2 / 3)
    assert (document["l1_chunks"], document["l2_only_chunks"]) == (2, 0)
    assert document["cache_status"] == "HIT (partial)"
    assert document["model"] == MODEL
    assert document["lookup_ms"] > 0


@pytest.mark.parametrize(
    ("num_tokens", "status", "ratio"),
    [(512, "HIT", 1.0), (600, "HIT", 1.0), (100, "MISS", None), (3000, "HIT (partial)", 2 / 11)],
)
def test_status_counts_whole_chunks(zmq_cli: Cli, engine: KVCacheClient, tmp_path: Path, num_tokens, status, ratio):
    store(engine, list(range(512)))
    document = zmq_cli.json("query", "kvcache", "--tokens", write_tokens(tmp_path, list(range(num_tokens))))
    assert (document["cache_status"], document["cached_ratio"]) == (status, ratio)


def test_a_lookup_pins_nothing(zmq_cli: Cli, engine: KVCacheClient, server: LmcacheServer, tmp_path: Path):
    store(engine, list(range(512)))
    zmq_cli.json("query", "kvcache", "--tokens", write_tokens(tmp_path, list(range(512))))
    assert server.status()["l1"]["pins"] == 0


def test_tokens_may_be_numbers_with_white_space_and_come_from_stdin(zmq_cli: Cli, engine: KVCacheClient):
    store(engine, list(range(256)))
    done = zmq_cli("query", "kvcache", "--tokens", "-", stdin="\n".join(map(str, range(256))))
    assert "1/1 (100.0%)" in done.stdout


@pytest.mark.parametrize("text", ["\ufeff1 2 3", "\ufeff[1, 2, 3]"])
def test_a_token_file_may_begin_with_a_byte_order_mark(tmp_path: Path, text: str):
    (tmp_path / "tokens").write_text(text, encoding="utf-8")
    assert read_token_file(str(tmp_path / "tokens")) == [1, 2, 3]


def test_lora_and_salt_are_part_of_what_is_asked_for(zmq_cli: Cli, engine: KVCacheClient, tmp_path: Path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    label = adapter_label("adapter", str(folder), adapter_digest(folder))
    store(engine, list(range(256)), lora=label, cache_salt="tenant")
    words = ["query", "kvcache", "--tokens", write_tokens(tmp_path, list(range(256)))]
    assert zmq_cli.json(*words)["cache_status"] == "MISS"
    assert zmq_cli.json(*words, "--lora", f"adapter={folder}")["cache_status"] == "MISS"
    assert zmq_cli.json(*words, "--lora", f"adapter={folder}", "--cache-salt", "tenant")["cache_status"] == "HIT"
    (folder / "adapter_model.safetensors").write_bytes(b"trained")
    assert zmq_cli.json(*words, "--lora", f"adapter={folder}", "--cache-salt", "tenant")["cache_status"] == "MISS"


@pytest.mark.parametrize(("adapter", "told"), [("adapter", "is not NAME=PATH"), ("adapter=/nowhere", "cannot be read")])
def test_an_adapter_that_cannot_be_told_is_a_wrong_call(zmq_cli: Cli, engine: KVCacheClient, tmp_path: Path, adapter, told):
    words = ["query", "kvcache", "--tokens", write_tokens(tmp_path, list(range(256)))]
    done = zmq_cli(*words, "--lora", adapter)
    assert (done.returncode, told in done.stderr) == (2, True)


# -- prompts ---------------------------------------------------------------------------------------


def test_a_prompt_is_tokenized_and_its_corpora_are_counted(
    zmq_cli: Cli, engine: KVCacheClient, tiny_tokenizer_dir: Path, tmp_path: Path
):
    from transformers import PreTrainedTokenizerFast  # in this process AutoTokenizer would import torch

    encode = PreTrainedTokenizerFast.from_pretrained(str(tiny_tokenizer_dir)).encode
    (tmp_path / "own.txt").write_text("Words of my own. " * 200)
    token_ids = encode(load_corpus("ffmpeg") + " and " + "Words of my own. " * 200 + "What is this?")
    store(engine, token_ids)
    words = ["query", "kvcache", "--prompt", "{ffmpeg} and {own}What is this?", "--corpus", f"own={tmp_path}/own.txt"]
    done = zmq_cli(*words, "--tokenizer", str(tiny_tokenizer_dir))
    assert (done.returncode, done.stderr) == (0, "")
    rows = dict(line.split(":") for line in done.stdout.splitlines() if ":" in line)
    num_chunks = len(token_ids) // CHUNK_TOKENS
    assert list(rows)[:4] == ["Prompt tokens", "  Corpus 'ffmpeg'", "  Corpus 'own'", "  Query"]
    assert int(rows["Prompt tokens"]) == len(token_ids)
    assert int(rows["  Corpus 'ffmpeg'"]) == pytest.approx(len(encode(load_corpus("ffmpeg"))), abs=2)
    assert sum(int(rows[name]) for name in list(rows)[1:4]) == len(token_ids)
    assert rows["Cached chunks"].strip() == f"{num_chunks}/{num_chunks} (100.0%)"


@pytest.fixture
def transformers_with_torch() -> None:
    """Other tests make models in this process: a command that imported transformers first would do so without torch."""
    pytest.importorskip("transformers")


def test_the_tokenizer_is_by_default_that_of_the_model(transformers_with_torch, tiny_tokenizer_dir: Path, capsys):
    """In this process: transformers takes long to import, and other tests want it here too."""
    with LmcacheServer(http=False) as server, KVCacheClient(server.zmq_url) as client:
        client.register(namespace(str(tiny_tokenizer_dir)), LAYOUT)
        words = ["query", "kvcache", "--prompt", "hello", "--url", server.zmq_url, "--timeout", "120"]
        assert main([*words, "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] > 0


def test_an_engine_may_tokenize_and_is_asked_by_the_name_that_it_gives_the_model(zmq_cli: Cli, engine: KVCacheClient):
    store(engine, [ord(char) for char in "a b " * 75])
    models = {"data": [{"id": "adapter", "root": "/a"}, {"id": "served", "root": MODEL}]}
    with engine_peer({"/v1/models": (200, models), "/tokenize": letters}) as peer:
        document = zmq_cli.json("query", "kvcache", "--prompt", "a b " * 75, "--tokenize-with", peer.url)
    assert (document["prompt_tokens"], document["cache_status"]) == (300, "HIT")
    assert {body["model"] for _, path, body in peer.requests if path == "/tokenize"} == {"served"}


def test_an_engine_may_tokenize_a_prompt_that_begins_with_a_corpus(zmq_cli: Cli, engine: KVCacheClient, tmp_path: Path):
    (tmp_path / "own.txt").write_text("x" * 50)
    with engine_peer({"/tokenize": letters}) as peer:
        words = ["--prompt", "{own} why?", "--corpus", f"own={tmp_path}/own.txt", "--tokenize-with", peer.url]
        document = zmq_cli.json("query", "kvcache", *words)
    assert (document["corpora_tokens"], document["query_tokens"]) == ({"own": 50}, 5)


def test_an_engine_that_serves_another_model_does_not_tokenize(zmq_cli: Cli, engine: KVCacheClient):
    models = {"data": [{"id": "other", "root": "/models/other"}]}
    with engine_peer({"/v1/models": (200, models), "/tokenize": letters}) as peer:
        error = zmq_cli.refused("query", "kvcache", "--prompt", "any", "--tokenize-with", peer.url, code=1)
    assert f"serves other (/models/other); the model registered at the cache server is '{MODEL}'" in error


def test_an_engine_that_cannot_tokenize_is_named(zmq_cli: Cli, engine: KVCacheClient, server: LmcacheServer):
    words = ["query", "kvcache", "--prompt", "any", "--tokenize-with"]
    assert "does not answer like an inference engine: it has no /tokenize" in zmq_cli.refused(*words, server.http_url, code=1)
    with engine_peer({"/tokenize": (200, {"tokens": ["a"]})}) as peer:
        assert "'a' at position 0, which is no token id" in zmq_cli.refused(*words, peer.url)
    assert "an inference engine speaks HTTP" in zmq_cli.refused(*words, server.zmq_url)
    with tcp_peer(b"") as port:
        error = zmq_cli.refused(*words, f"http://localhost:{port}", "--timeout", "0.5", code=3)
    assert f"no reply from http://localhost:{port} within 0.5 s" in error


def test_a_missing_tokenizer_says_what_to_do(transformers_with_torch, tmp_path: Path):
    with pytest.raises(LMCacheError, match=f"no tokenizer for '{tmp_path}'") as missing:
        load_tokenizer(str(tmp_path))
    assert "--tokenize-with URL" in missing.value.hint


def test_a_broken_tokenizer_is_an_error_of_ours(transformers_with_torch, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{broken")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(LMCacheError, match="no tokenizer for"):
        load_tokenizer(str(tmp_path))


def test_missing_transformers_names_the_extra(zmq_cli: Cli, engine: KVCacheClient, tmp_path: Path):
    (tmp_path / "transformers.py").write_text("raise ImportError('not installed')")
    error = zmq_cli.refused("query", "kvcache", "--prompt", "x", code=1, PYTHONPATH=str(tmp_path))
    assert error.startswith("error: tokenizing needs the package transformers\nhint: pip install 'lmcache[tokenizer]'")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--tokens", "f"], "give one of --prompt and --tokens"),
        ([], "give one of --prompt and --tokens"),
        (["--prompt", "{nobody}"], "unknown corpus 'nobody'; known: ffmpeg, paul_graham"),
        (["--prompt", "a { b"], "starts no {corpus}"),
        (["--tokens", "/nonexistent"], "cannot read token ids from '/nonexistent'"),
        (["--tokens", "/dev/null"], "/dev/null has no list of token ids"),
        (["--round-trip", "--chunks", "5000"], "too much for a check"),
        (["--round-trip", "--chunk-bytes", "1GiB"], "too much for a check"),
        (["--round-trip", "--device", "cuda", "--inline"], "--device cuda copies between the GPU and the mapped pool"),
        (["--round-trip", "--device", "cuda", "--chunk-bytes", "100001"], "chunks of 100001 bytes are not whole blocks"),
        (["--round-trip", "--prompt", "x"], "a round trip stores random bytes; --prompt would do nothing"),
        (["--round-trip", "--model", MODEL, "--lora", "a=/b"], "--model, --lora would do nothing"),
        (["--tokens", "f", "--device", "cuda"], "--device says where a round trip's bytes are"),
    ],
)
def test_wrong_requests_are_refused(zmq_cli: Cli, engine: KVCacheClient, words, message):
    assert message in zmq_cli.refused("query", "kvcache", *words)


@pytest.mark.parametrize(
    "text",
    ["[1, 2", "[1, -2]", "[1.5]", "[true]", '["1"]', "[4294967296]", "1 two", "1_000", "١٢", "[1_0]", "{}", "\x00", "[[1]]"],
)
def test_files_that_are_no_tokens_are_refused(zmq_cli: Cli, engine: KVCacheClient, tmp_path: Path, text):
    (tmp_path / "tokens").write_text(text)
    assert "token id" in zmq_cli.refused("query", "kvcache", "--tokens", str(tmp_path / "tokens"))


# -- which model -----------------------------------------------------------------------------------


def test_the_model_is_found_by_name_or_by_its_last_part(zmq_cli: Cli, engine: KVCacheClient, tmp_path: Path):
    tokens = write_tokens(tmp_path, [1, 2, 3])
    for name in (MODEL, "tiny-model", "/models/tiny-model/", str(namespace().id)):
        assert zmq_cli.json("query", "kvcache", "--tokens", tokens, "--model", name)["model"] == MODEL


def test_an_unknown_model_lists_the_registered_ones(zmq_cli: Cli, engine: KVCacheClient, tmp_path: Path):
    error = zmq_cli.refused("query", "kvcache", "--tokens", write_tokens(tmp_path, [1]), "--model", "other", code=1)
    assert f"no registered model is 'other'; registered: {namespace().id} {MODEL} (dtype bfloat16, layout " in error


def test_several_models_must_be_told_apart(tmp_path: Path):
    tokens = write_tokens(tmp_path, [1, 2, 3])
    other = namespace("elsewhere/tiny-model")
    with (
        LmcacheServer(http=False) as server,
        KVCacheClient(server.zmq_url) as first,
        KVCacheClient(server.zmq_url) as second,
    ):
        first.register(namespace(), LAYOUT)
        second.register(other, LAYOUT)
        cli = Cli(server.zmq_url)
        for words in ([], ["--model", "tiny-model"]):
            error = cli.refused("query", "kvcache", "--tokens", tokens, *words, code=1)
            assert MODEL in error
            assert f"{other.id} elsewhere/tiny-model" in error
        found = cli.json("query", "kvcache", "--tokens", tokens, "--model", str(other.id))
        assert found["model"] == "elsewhere/tiny-model"


def test_no_model_at_all_is_said(tmp_path: Path):
    with LmcacheServer(http=False) as server:
        error = Cli(server.zmq_url).refused("query", "kvcache", "--tokens", write_tokens(tmp_path, [1]), code=1)
    assert error.startswith("error: no engine has registered a model at this server\n")


# -- round trip ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "path"), [([], "shared memory"), (["--inline"], "socket")])
def test_a_round_trip_returns_every_byte_and_leaves_nothing(cli: Cli, server: LmcacheServer, words, path):
    document = cli.json("query", "kvcache", "--round-trip", "--chunks", "3", "--chunk-bytes", "100001", *words)
    assert (document["checksum"], document["path"]) == ("OK", path)
    assert (document["good_chunks"], document["removed_chunks"], document["chunk_bytes"]) == (3, 3, 100001)
    assert document["store_ms"] > 0 < document["retrieve_ms"]
    status = server.status()
    assert (status["l1"]["chunks"], status["l1"]["pins"]) == (0, 0)


def test_the_round_trips_box_is_the_published_one(zmq_cli: Cli):
    lines = zmq_cli("query", "kvcache", "--round-trip").stdout.splitlines()
    assert lines[0] == "==== Query KV Cache Result (round-trip) ===="
    assert [line.partition(":")[0] for line in lines[1:4]] == ["Store latency (ms)", "Retrieve latency (ms)", "Checksum"]
    assert lines[3] == "Checksum:                                 OK"
    assert {len(line) for line in lines} == {44}


def test_one_changed_byte_is_found():
    from lmcache.cli.commands.query.kvcache import round_trip_result

    assert round_trip_result([b"ab", b"cd"], [bytearray(b"ab"), bytearray(b"cd")], 1, 1).ok
    assert not round_trip_result([b"ab", b"cd"], [bytearray(b"ab"), bytearray(b"cX")], 1, 1).ok
    assert not round_trip_result([b"ab", b"cd"], [bytearray(b"ab")], 1, 1).ok


def test_a_round_trip_that_would_displace_what_is_cached_says_what_fits(
    zmq_cli: Cli, engine: KVCacheClient, server: LmcacheServer
):
    store(engine, list(range(8 * 256)))
    words = ("query", "kvcache", "--round-trip", "--chunk-bytes")
    for count in ("64", "1000"):
        error = zmq_cli.refused(*words, "1MiB", "--chunks", count, code=1)
        assert f"{count} chunks of 1.0 MiB would evict what is cached: 63.5 MiB of L1 are free\nhint: pass --chunks 60" in error
    assert "pass a smaller --chunk-bytes, or make room" in zmq_cli.refused(*words, "64MiB", "--chunks", "1", code=1)
    document = zmq_cli.json(*words, "1MiB", "--chunks", "60")
    assert (document["checksum"], document["evicted_chunks"]) == ("OK", 0)
    assert server.status()["l1"]["chunks"] == 8


def test_a_round_trip_says_what_the_server_evicted_meanwhile(server: LmcacheServer, monkeypatch, capsys):
    counts = iter([{"demand": 1, "watermark": 2, "clear": 3}, {"demand": 2, "watermark": 4, "clear": 9}])

    def fetch(*args: Any) -> tuple[dict[str, Any], View]:
        document, view = fetch_status(*args)
        view.counters.evicted_chunks = next(counts)
        return document, view

    monkeypatch.setattr("lmcache.cli.status.fetch_status", fetch)
    assert main(["query", "kvcache", "--round-trip", "--url", server.zmq_url, "--timeout", "120"]) == 0
    assert re.search(r"^Evicted meanwhile: +3 chunks$", capsys.readouterr().out, re.MULTILINE)


def test_a_pool_without_room_is_said():
    from lmcache.cli.commands.query.kvcache import check_room, check_stored
    from lmcache.cli.status import L1View
    from lmcache.protocol import StoreOutcome

    with pytest.raises(LMCacheError, match="took 1 of 2 chunks; the others: FULL"):  # others were quicker
        check_stored([StoreOutcome.RESERVED, StoreOutcome.FULL])
    check_room(View(healthy=True, l1=L1View(capacity_bytes=8192, used_bytes=0)), 2, 4096)
    with pytest.raises(LMCacheError, match="0 bytes of L1 are free"):
        check_room(View(healthy=True, l1=L1View(capacity_bytes=8192, used_bytes=8192)), 1, 1)
