"""`lmcache describe engine` against peers that answer as vLLM, SGLang and others do."""

import json
import re

from lmcache.cli.engine import parse_metrics
from tests.cli.conftest import Cli
from tests.cli.peers import engine_peer, tcp_peer
from tests.cli.test_describe import fields
from tests.server_process import LmcacheServer, free_port, running_lmcache

VLLM_METRICS = """
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a {b} c"} 2.0
vllm:num_requests_running{engine="1",model_name="a {b} c"} 1.0
vllm:num_requests_waiting{engine="0"} 4.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.75
vllm:prefix_cache_queries_total{engine="0"} 1000.0
vllm:prefix_cache_hits_total{engine="0"} 250.0
vllm:external_prefix_cache_queries_total{engine="0"} 0.0
vllm:external_prefix_cache_hits_total{engine="0"} 0.0
vllm:prompt_tokens_total{engine="0"} 1e+3
vllm:generation_tokens_total{engine="0"} 100.0
"""
VLLM = {
    "/health": (200, ""),
    "/version": (200, {"version": "0.32.0"}),
    "/v1/models": (
        200,
        {
            "object": "list",
            "data": [
                {"id": "org/model", "root": "/models/m", "parent": None, "max_model_len": 131072},
                {"id": "adapter", "root": "/loras/a", "parent": "org/model", "max_model_len": None},
            ],
        },
    ),
    "/metrics": (200, VLLM_METRICS),
}
SGLANG = {
    "/health": (200, ""),
    "/get_server_info": (200, {"version": "0.5.9"}),
    "/v1/models": (200, {"data": [{"id": "org/model", "object": "model"}]}),
    "/metrics": (200, 'sglang:num_running_reqs{tp_rank="0"} 7.0\nsglang:cache_hit_rate 0.5\nsglang:token_usage NaN\n'),
}


def describe(routes):
    with engine_peer(routes) as engine:
        return Cli("").json("describe", "engine", "--url", engine.url)


def test_the_page_starts_with_the_promised_rows():
    with engine_peer(VLLM) as engine:
        done = Cli("")("describe", "engine", "--url", engine.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "================ Inference Engine ================",
        "Model:                                org/model",
        "Adapter of org/model:                   adapter",
        "Max context (tokens):                    131072",
        "Status:                                 healthy",
        "Running requests:                             3",
        "Waiting requests:                             4",
        "KV cache usage:                           50.0%",
        "Prefix cache hit rate:                    25.0%",
        "External cache hit rate:    n/a (no prompt yet)",
        "Engine version:                          0.32.0",
        "==================================================",
    ]


def test_json_has_numbers_and_null_with_the_reason():
    document = describe(VLLM)
    assert (document["model"], document["max_context_tokens"], document["status"]) == ("org/model", 131072, "healthy")
    assert (document["running_requests"], document["waiting_requests"]) == (3, 4)
    assert (document["kv_cache_usage_ratio"], document["prefix_cache_hit_ratio"]) == (0.5, 0.25)
    assert document["external_cache_hit_ratio"] is None
    assert document["external_cache_hit_ratio_unknown_because"] == "no prompt yet"
    assert [model["id"] for model in document["models"]] == ["org/model", "adapter"]


def test_an_engine_of_another_kind_has_what_it_tells_and_na_for_the_rest():
    document = describe(SGLANG)
    assert (document["running_requests"], document["prefix_cache_hit_ratio"], document["engine_version"]) == (7, 0.5, "0.5.9")
    unknown = {key: document[f"{key}_unknown_because"] for key, value in document.items() if value is None}
    assert unknown == {
        "max_context_tokens": "/v1/models has no max_model_len",
        "waiting_requests": "/metrics has no vllm:num_requests_waiting",
        "kv_cache_usage_ratio": "/metrics has no vllm:kv_cache_usage_perc",
        "external_cache_hit_ratio": "/metrics has no vllm:external_prefix_cache_hits_total",
    }


def test_models_alone_are_enough():
    document = describe({"/v1/models": SGLANG["/v1/models"]})
    assert document["model"] == "org/model"
    assert document["status"] is None
    assert document["running_requests_unknown_because"] == "the engine has no /metrics"


def test_an_engine_that_is_not_well_is_shown_and_exits_with_1():
    with engine_peer({**VLLM, "/health": (503, "")}) as engine:
        document = Cli("").json("describe", "engine", "--url", engine.url, code=1)
    assert (document["status"], document["error"]["code"]) == ("unhealthy", "unhealthy")
    assert document["running_requests"] == 3


def test_a_cache_server_is_told_apart(server: LmcacheServer):
    error = Cli("").refused("describe", "engine", "--url", server.http_url, code=1)
    assert "does not answer like an inference engine: it has no /v1/models" in error
    assert f"hint: for an lmcache server: 'lmcache describe kvcache --url {server.http_url}'" in error


def test_nonsense_is_no_list_of_models():
    with engine_peer({**VLLM, "/v1/models": (200, {"data": [{"name": 1}]})}) as engine:
        assert "is not a list of models" in Cli("").refused("describe", "engine", "--url", engine.url, code=1)


def test_nobody_and_silence_are_exit_code_3():
    for words in ([], ["--watch"]):
        Cli("").refused("describe", "engine", *words, "--url", f"http://localhost:{free_port()}", code=3)
        with tcp_peer(b"") as port:
            url = f"http://localhost:{port}"
            assert "within 0.5 s" in Cli("").refused("describe", "engine", *words, "--timeout", "0.5", "--url", url, code=3)


def watch(url: str, *words: str):
    return running_lmcache("describe", "engine", "--watch", "0.05", "--url", url, *words)


def test_watch_prints_a_line_a_sample_with_rates_since_the_one_before():
    with engine_peer(VLLM) as engine:
        with watch(engine.url) as process:
            lines = [process.stdout.readline() for _ in range(3)]
        with watch(engine.url, "--format", "json") as process:
            documents = [json.loads(process.stdout.readline()) for _ in range(2)]
    line = r"\d\d:\d\d:\d\d  healthy  running 3  waiting 4  KV cache 50.0%  prefix hits 25.0%  external hits n/a"
    assert re.fullmatch(line + "\n", lines[0])
    assert re.fullmatch(line + "  prompt 0.0 tokens/s  output 0.0 tokens/s\n", lines[2])
    assert all(document["ok"] for document in documents)


def test_metrics_that_are_no_numbers_are_left_out():
    assert parse_metrics('a 1\nb{x="} 2"} 3\nc NaN\nd +Inf\ne\n# f 4\ng{h="i"} 5 1700000000\nj {}\n') == {
        "a": [1.0],
        "b": [3.0],
        "g": [5.0],
    }


def test_counts_and_shares_that_cannot_be_are_unknown():
    metrics = """
vllm:num_requests_running{engine="0"} 1e308
vllm:num_requests_running{engine="1"} 1e308
vllm:num_requests_waiting NaN
vllm:kv_cache_usage_perc 1.5
vllm:prefix_cache_queries_total 10
vllm:prefix_cache_hits_total 11
sglang:cache_hit_rate 2
"""
    document = describe({**VLLM, "/metrics": (200, metrics)})
    figures = ("running_requests", "waiting_requests", "kv_cache_usage_ratio", "prefix_cache_hit_ratio")
    assert [document[name] for name in figures] == [None] * 4
    assert document["running_requests_unknown_because"] == "/metrics has no vllm:num_requests_running"
    told = "/metrics has a share of 1.5 for vllm:kv_cache_usage_perc"
    assert document["kv_cache_usage_ratio_unknown_because"] == told


def test_a_length_beyond_64_bits_is_no_document():
    models = '{"data": [{"id": "m", "max_model_len": 1' + "0" * 400 + "}]}"
    with engine_peer({**VLLM, "/v1/models": (200, models)}) as engine:
        error = Cli("").refused("describe", "engine", "--url", engine.url, code=1)
    assert "/v1/models did not answer with a JSON object" in error


def test_text_and_json_agree():
    with engine_peer(SGLANG) as engine:
        found = fields(Cli("")("describe", "engine", "--url", engine.url).stdout)
    assert found["Running requests"] == "7"
    assert found["Max context (tokens)"] == "n/a (/v1/models has no max_model_len)"
