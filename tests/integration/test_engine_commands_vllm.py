"""`ping`, `describe` and `query engine` against a real vLLM that uses a real server."""

import pytest

from tests.cli.conftest import Cli
from tests.server_process import LmcacheServer
from tests.vllm_process import MODEL_NAME, VllmServer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

CHUNK_SIZE = 256
MAX_CONTEXT = 8192


class Bed:
    """vLLM with its own prefix cache and a way to empty it, the server that it uses, and the command for both."""

    def __init__(self, vllm: VllmServer, server: LmcacheServer, corpus: str) -> None:
        self.vllm = vllm
        self.server = server
        self.cli = Cli(server.zmq_url)
        self.prompt = ["--prompt", "{own} What follows?", "--corpus", f"own={corpus}"]

    def ask(self, *words: str, code: int = 0):
        return self.cli.json("query", "engine", "--url", self.vllm.url, *words, code=code)


@pytest.fixture(scope="module")
def bed(tmp_path_factory, engine, cache_server):
    corpus = tmp_path_factory.mktemp("engine") / "own.txt"
    # So many that prompts end less than a block after a whole chunk: see test_vllm.
    corpus.write_text("".join(f"Line {number} of a text of our own says little. " for number in range(42)))
    return Bed(engine, cache_server, str(corpus))


def test_ping_is_ok(bed):
    found = bed.cli.json("ping", "engine", "--url", bed.vllm.url, "--count", "3", "--interval", "0")
    assert (found["status"], found["count"]) == ("OK", 3)


def test_describe_knows_everything(bed):
    bed.ask("--prompt", "hello", "--max-tokens", "2")
    found = bed.cli.json("describe", "engine", "--url", bed.vllm.url)
    assert (found["model"], found["max_context_tokens"], found["status"]) == (MODEL_NAME, MAX_CONTEXT, "healthy")
    assert (found["running_requests"], found["waiting_requests"]) == (0, 0)
    assert found["engine_version"]
    assert all(0 <= found[f"{key}_ratio"] <= 1 for key in ("kv_cache_usage", "prefix_cache_hit", "external_cache_hit"))


def test_tokens_are_counted_as_the_models_tokenizer_does(bed, tiny_model_dir):
    from transformers import AutoTokenizer

    encode = AutoTokenizer.from_pretrained(str(tiny_model_dir)).encode
    found = bed.ask("--prompt", "Say {{it} and stop. {own}", *bed.prompt[2:], "--max-tokens", "4", "--ignore-eos")
    with open(bed.prompt[3].partition("=")[2]) as corpus:
        assert found["prompt_tokens"] == len(encode("Say {it} and stop. " + corpus.read()))
    assert found["usage_prompt_tokens"] == found["prompt_tokens"]
    assert found["corpora_tokens"]["own"] + found["query_tokens"] == found["prompt_tokens"]
    assert found["output_tokens"] == 4
    assert 0 < found["ttft_ms"] <= found["latency_ms"]


def test_a_chat_is_counted_with_its_template(bed):
    found = bed.ask(*bed.prompt, "--chat", "--max-tokens", "4")
    assert found["usage_prompt_tokens"] == found["prompt_tokens"]
    assert found["template_tokens"] > 0
    assert found["corpora_tokens"]["own"] + found["query_tokens"] + found["template_tokens"] == found["prompt_tokens"]


def test_what_one_request_stored_and_another_retrieved_is_shown(bed):
    words = [*bed.prompt, "--cache-salt", "shown", "--max-tokens", "4", "--kvcache-url", bed.server.zmq_url]
    cold = bed.ask(*words)
    assert (cold["retrieved_tokens"], cold["retrieved_bytes"]) == (0, 0)
    assert cold["stored_bytes"] > 0
    reset_prefix_cache(bed)
    warm = bed.ask(*words)
    whole_chunks = (warm["prompt_tokens"] - 1) // CHUNK_SIZE * CHUNK_SIZE
    assert (warm["retrieved_tokens"], warm["stored_bytes"]) == (whole_chunks, 0)


def reset_prefix_cache(bed):
    from lmcache.cli.base import parse_url
    from lmcache.cli.engine import reset_prefix_cache

    reset_prefix_cache(parse_url(bed.vllm.url), 10.0)


def test_the_engine_tokenizes_for_a_look_into_the_cache(bed):
    prompt_tokens = bed.ask(*bed.prompt, "--max-tokens", "1")["prompt_tokens"]
    found = bed.cli.json("query", "kvcache", *bed.prompt, "--tokenize-with", bed.vllm.url)
    assert (found["prompt_tokens"], found["cache_status"]) == (prompt_tokens, "HIT")
    assert found["cached_tokens"] == prompt_tokens // CHUNK_SIZE * CHUNK_SIZE


@pytest.mark.parametrize("words", [[], ["--chat"]], ids=["completion", "chat"])
@pytest.mark.parametrize("named", [True, False], ids=["by the server's counter", "by the engine's"])
def test_loaded_kv_gives_the_same_answer(bed, words, named):
    urls = ["--kvcache-url", bed.server.http_url] if named else []
    # Without an address the engine's counters decide, so the default address must not be this server's.
    cli = bed.cli if named else Cli("")
    found = cli.json(
        "query", "engine", "--url", bed.vllm.url, *bed.prompt, *words, "--verify", "--max-tokens", "16", "--ignore-eos", *urls
    )
    assert (found["verdict"], found["is_same"], found["compared_with"]) == ("OK", True, "the engine's own prefix cache")
    assert found["cold"]["retrieved_tokens"] == 0
    assert found["retrieved_tokens"] == found["loaded"]["retrieved_tokens"] >= CHUNK_SIZE


def test_a_prompt_shorter_than_a_chunk_proves_nothing(bed):
    found = bed.ask("--prompt", "hello", "--verify", "--max-tokens", "4", "--ignore-eos", code=4)
    assert found["verdict"] == "INCONCLUSIVE"
    assert "nothing was retrieved" in found["error"]["message"]


def test_a_prompt_that_is_too_long_is_the_engines_message(bed):
    error = bed.cli.refused("query", "engine", "--url", bed.vllm.url, "--prompt", "{ffmpeg}{paul_graham}", code=1)
    assert "maximum context length is 8192 tokens" in error
    assert "hint: the model's context is 8192 tokens" in error
