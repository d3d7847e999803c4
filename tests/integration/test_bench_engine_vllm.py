"""`lmcache bench engine` against a real vLLM that uses a real server, compared with `vllm bench serve` against the same."""

import json
import re
import subprocess
import sys

import pytest

from lmcache.cli.main import add_commands, build_parser
from tests.server_process import LMCACHE, clean_environment
from tests.vllm_process import MODEL_NAME

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

CHUNK_SIZE = 256
NUM_PROMPTS = 4
CACHED = CHUNK_SIZE
PROMPT_TOKENS = CACHED + 50  # as asked for; vLLM's random texts may have one or two more
COMMAND_SECONDS = 600
TITLE = "============ Serving Benchmark Result ============"
RULE = "=" * 50


class Bench:
    """Runs the same benchmark with vLLM's command and with ours."""

    def __init__(self, vllm, server, model_dir, folder):
        self.vllm = vllm
        self.server = server
        self.folder = folder
        # fmt: off
        self.flags = [
            "--model", str(model_dir), "--served-model-name", MODEL_NAME,
            "--input-len", str(PROMPT_TOKENS), "--output-len", "4", "--num-prompts", str(NUM_PROMPTS),
            "--temperature", "0", "--percentile-metrics", "ttft,tpot,itl,e2el", "--max-concurrency", "2",
        ]
        # fmt: on

    def vllms(self, *words):
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", self.vllm.url]
        return run([*command, *self.flags, "--dataset-name", "random", *words])

    def ours(self, *words, data_set=("--dataset-name", "random")):
        command = [*LMCACHE, "bench", "engine", "--url", self.vllm.url, "--kvcache-url", self.server.zmq_url]
        return run([*command, *self.flags, *data_set, *words])

    def saved(self, words):
        """Return the rows of the table that a command prints and the keys of the result that it saves."""
        path = self.folder / "result.json"
        done = words("--save-result", "--result-dir", str(self.folder), "--result-filename", path.name)
        assert done.returncode == 0, done
        lines = done.stdout.splitlines()
        table = lines[lines.index(TITLE) : lines.index(RULE) + 1]
        return [line[:40].strip() for line in table], json.loads(path.read_text())


def run(command):
    return subprocess.run(
        command,
        env={**clean_environment(), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )


@pytest.fixture(scope="module")
def bench(tiny_model_dir, tmp_path_factory, engine, cache_server):
    """One vLLM with its own prefix cache, one cache server, and the benchmarks of them."""
    return Bench(engine, cache_server, tiny_model_dir, tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def both(bench):
    """What vLLM's command and then ours show and save; ours finds in the cache what vLLM's has left there."""
    return bench.saved(bench.vllms), bench.saved(lambda *words: bench.ours(*words, "--reset-prefix-cache"))


def test_our_table_is_vllms_with_one_section_before_the_closing_rule(both):
    (theirs, _), (ours, _) = both
    assert ours[: len(theirs) - 1] == theirs[:-1]
    assert ours[-1] == theirs[-1]
    assert ours[len(theirs) - 1 : -1] == [
        "-----------LMCache KV Cache Performance-",
        "KV cache hit rate (L1):",
        "KV cache hit rate (L2):",
        "L1 read bandwidth:",
        "L1 write bandwidth:",
        "Avg tokens saved by cache (per req):",
        "Cache-assisted TTFT savings (est.):",
        "Prompt tokens from engine's own cache:",
        "Prompt tokens from external cache (L1):",
        "Prompt tokens computed:",
    ]


def test_our_result_has_vllms_keys_in_their_order_and_one_more(both):
    (_, theirs), (_, ours) = both
    assert list(ours) == [*theirs, "lmcache"]
    assert {key: type(value) for key, value in ours.items() if key != "lmcache"} == {
        key: type(value) for key, value in theirs.items()
    }


def test_the_origin_of_every_prompt_token_is_counted(both):
    saved = both[1][1]
    found = saved["lmcache"]
    assert found["external_prompt_tokens"] == NUM_PROMPTS * CACHED
    assert found["computed_prompt_tokens"] == saved["total_input_tokens"] - NUM_PROMPTS * CACHED
    assert found["engine_cache_prompt_tokens"] == 0
    assert found["saved_tokens_per_request"] == CACHED
    assert (found["l1_hit_ratio"], found["l2_hit_ratio"]) == (1.0, None)
    assert found["l1_read_bytes"] > found["l1_written_bytes"] == 0
    assert 0 < found["ttft_savings_ratio"] < 1
    assert found["warnings"] == []


def test_a_cold_run_hits_nothing_its_warm_up_does_not_count_and_its_answers_are_verified(bench, both):
    done = bench.ours("--cold", "--num-warmups", "2", "--verify", "2", "--format", "json")
    assert done.returncode == 0, done
    document = json.loads(done.stdout)
    found = document["lmcache"]
    assert document["benchmark"]["completed"] == NUM_PROMPTS
    assert (found["external_prompt_tokens"], found["engine_cache_prompt_tokens"]) == (0, 0)
    assert found["computed_prompt_tokens"] == document["benchmark"]["total_input_tokens"]
    assert (found["l1_hit_ratio"], found["saved_tokens_per_request"], found["ttft_savings_ratio"]) == (0, 0, 0)
    assert found["verify"] == {
        "num_prompts": 2,
        "num_same": 2,
        "loaded_tokens": 2 * CACHED,
        "inconclusive_because": "",
    }


def test_random_prompts_that_were_sent_before_are_told(bench, both):
    done = bench.ours()
    assert done.returncode == 0, done
    assert "of the prompt tokens came from a cache: random prompts share nothing" in done.stderr
    assert "Serving Benchmark Result" in done.stdout


def test_nothing_is_verified_where_nothing_can_be_loaded(bench, both):
    done = bench.ours("--prompt", "A prompt shorter than a chunk.", "--verify", "1", "--format", "json", data_set=())
    assert done.returncode == 4, done
    document = json.loads(done.stdout)
    assert document["error"]["code"] == "inconclusive"
    assert document["benchmark"]["completed"] == NUM_PROMPTS


def test_a_model_that_the_engine_does_not_serve_fails_every_request(bench, both):
    done = bench.ours("--served-model-name", "unknown", "--format", "json")
    assert done.returncode == 1, done
    document = json.loads(done.stdout)
    assert document["error"]["code"] == "failed_requests"
    assert document["benchmark"]["failed"] == NUM_PROMPTS


def test_none_of_our_flags_is_one_of_vllms(bench):
    parser = build_parser()
    add_commands(parser, "bench")
    ours = child(child(parser, "bench"), "engine")
    ours.populate()
    done = bench.ours("--help-vllm")
    theirs = set(re.findall(r"^ +(--[a-z-]+)", done.stdout, re.MULTILINE))
    assert "--num-prompts" in theirs
    assert not theirs & set(ours.options())


def child(parser, name):
    """Return the parser of a command or target."""
    parser.populate()
    (action,) = [action for action in parser._actions if isinstance(action.choices, dict)]
    return action.choices[name]
