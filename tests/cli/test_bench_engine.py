"""`lmcache bench engine` without vLLM: figures from counters, hooks in a stand-in for vLLM's benchmark, exit codes."""

import asyncio
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from lmcache import __version__
from lmcache.cli.base import http_url
from lmcache.cli.commands.bench import phases, section
from lmcache.cli.commands.bench.engine import name_model, start_hint
from lmcache.cli.commands.bench.phases import AnswerCheck, Calibration, Verifier, calibrate
from lmcache.cli.commands.bench.section import CacheRun
from lmcache.cli.commands.bench.serve import RULE, ServeBench, engine_key, make_parser, parse
from lmcache.cli.counters import (
    CacheCounters,
    CacheStatus,
    CacheUse,
    EngineCounters,
    LookupCounters,
    TokenOrigins,
    cache_use,
    parse_engine,
    token_origins,
)
from lmcache.cli.engine import Unknown
from tests.cli.conftest import Cli
from tests.cli.peers import EngineHandler, engine_peer, http_peer
from tests.server_process import LmcacheServer, clean_environment, free_port

FAKE_VLLM = Path(__file__).parent / "fake_vllm"
METRICS = """\
# HELP vllm:prompt_tokens_by_source_total Number of prompt tokens by source.
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 10.0
vllm:prompt_tokens_by_source_total{engine="1",model_name="m",source="local_compute"} 5.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_cache_hit"} 20.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 30.0
# HELP vllm:request_success_total Count of successfully processed requests.
# TYPE vllm:request_success_total counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 2.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 3.0
# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.
# TYPE process_start_time_seconds gauge
process_start_time_seconds 1000.0
"""


# -- counters -----------------------------------------------------------------------------------------------------------


def engine(computed, own, external, finished=0, started_at=1.0):
    tokens = {"local_compute": computed, "local_cache_hit": own, "external_kv_transfer": external}
    return EngineCounters(tokens, finished, started_at)


def status(boot="a", hit=0, miss=0, stored=0, retrieved=0, tokens=0):
    return CacheStatus(boot=boot, counters=CacheCounters(LookupCounters(hit, miss), stored, retrieved, tokens))


def test_counters_of_all_engines_are_summed():
    assert parse_engine(METRICS) == engine(15.0, 20.0, 30.0, 5.0, 1000.0)


@pytest.mark.parametrize("page", ["", "nothing here", "a{ 1\n", METRICS.replace("by_source", "by_sauce")])
def test_a_page_without_the_counters_is_unknown_and_not_zero(page):
    found = parse_engine(page)
    assert isinstance(found, Unknown)
    assert found.because


@pytest.mark.parametrize("count", ["NaN", "-1", "1e308", "1" + "0" * 400])
@pytest.mark.parametrize("counted", ["10.0", "3.0"])
def test_counts_that_nobody_can_have_counted_are_unknown(counted, count):
    found = parse_engine(METRICS.replace(f" {counted}\n", f" {count}\n"))
    assert isinstance(found, Unknown)
    assert "the engine's /metrics cannot be read: vllm:" in found.because


def test_only_what_was_counted_between_the_readings_counts():
    assert token_origins(engine(100, 200, 300, 4), engine(101, 202, 303, 8)) == TokenOrigins(2, 3, 1, 4)
    used = cache_use(status("a", 10, 10, 100, 100, 10), status("a", 13, 11, 150, 170, 30))
    assert used == CacheUse(3, 1, 70, 50, 20, has_l2=False, num_engines=0)


@pytest.mark.parametrize("after", [engine(1, 1, 1, started_at=2.0), engine(0, 9, 9)])
def test_a_restarted_engine_makes_its_counts_unknown(after):
    assert isinstance(token_origins(engine(1, 1, 1), after), Unknown)


def test_a_restarted_cache_server_makes_its_counts_unknown():
    assert isinstance(cache_use(status("a"), status("b")), Unknown)


# -- figures ------------------------------------------------------------------------------------------------------------


def make_run(**changes):
    values = {
        "tokens": TokenOrigins(engine_cache=0, external=3000, computed=1000, finished_requests=10),
        "cache": CacheUse(3, 1, 2 * 10**9, 10**9, 3000, has_l2=False, num_engines=1, chunk_size=300),
        "calibration": Calibration(1000, 1.1, 250, 0.35),
        "duration": 10.0,
        "num_requests": 10,
        "answered": 10,
        "mean_ttft": 0.3,
    }
    return CacheRun(**{**values, **changes})


def rows(run):
    title, *rest = section.lines(run)
    assert title == "-----------LMCache KV Cache Performance-----------"
    assert all(line[40] == " " for line in rest)
    return {line[:40].strip(): line[40:].strip() for line in rest}


def test_the_section_has_the_promised_rows_in_their_order():
    assert list(rows(make_run()).items()) == [
        ("KV cache hit rate (L1):", "75.0%"),
        ("KV cache hit rate (L2):", "n/a (the server has no L2 tier)"),
        ("L1 read bandwidth:", "0.2 GB/s"),
        ("L1 write bandwidth:", "0.1 GB/s"),
        ("Avg tokens saved by cache (per req):", "300"),
        ("Cache-assisted TTFT savings (est.):", "50.0%"),
        ("Prompt tokens from engine's own cache:", "0 (0.0%)"),
        ("Prompt tokens from external cache (L1):", "3000 (75.0%)"),
        ("Prompt tokens computed:", "1000 (25.0%)"),
    ]
    assert section.warnings(make_run()) == []


@pytest.mark.parametrize(
    ("missed", "promoted", "shown"), [(8, 6, "75.0%"), (8, 0, "0.0%"), (0, 0, "n/a (L1 lacked nothing)")], ids=str
)
def test_l2s_hit_rate_is_of_what_l1_lacked(missed: int, promoted: int, shown: str):
    use = CacheUse(3, missed, 2 * 10**9, 10**9, 3000, has_l2=True, num_engines=1, promoted_chunks=promoted)
    assert rows(make_run(cache=use))["KV cache hit rate (L2):"] == shown


def test_what_is_unknown_is_shown_with_its_reason_and_never_as_zero():
    run = make_run(tokens=Unknown("no tokens"), cache=Unknown("no server"), calibration=Unknown("no calibration"))
    assert {value for value in rows(run).values()} == {"n/a (no tokens)", "n/a (no server)"}
    document = section.document(run)
    for key in ("l1_hit_ratio", "l1_read_bytes", "saved_tokens_per_request", "ttft_savings_ratio", "external_prompt_tokens"):
        assert document[key] is None
        assert document[f"{key}_unknown_because"]
    json.dumps(document, allow_nan=False)


def test_savings_need_a_calibration_only_where_something_was_saved():
    unknown = Unknown("no calibration")
    assert rows(make_run(calibration=unknown))["Cache-assisted TTFT savings (est.):"] == "n/a (no calibration)"
    nothing = TokenOrigins(0, 0, 4000, 10)
    assert rows(make_run(calibration=unknown, tokens=nothing))["Cache-assisted TTFT savings (est.):"] == "0.0%"


def test_a_speed_up_above_the_possible_is_suspect():
    run = make_run(mean_ttft=0.01)
    assert rows(run)["Cache-assisted TTFT savings (est.):"].endswith("(suspect)")
    assert any("suspect" in warning for warning in section.warnings(run))
    assert section.document(run)["ttft_savings_is_suspect"] is True


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tokens": TokenOrigins(4000, 0, 0, 10)}, "--reset-prefix-cache"),
        ({"tokens": TokenOrigins(0, 0, 4000, 10)}, "run it again"),
        ({"tokens": TokenOrigins(0, 0, 9, 10), "cache": CacheUse(0, 0, 0, 0, 0, False, 0)}, "--kv-transfer-config"),
        ({"meaning_of_hits": "--cold was given"}, "75.0% of the prompt tokens came from a cache: --cold was given"),
        ({"tokens": TokenOrigins(0, 3000, 1, 12)}, "2 more requests"),
        ({"tokens": TokenOrigins(0, 3001, 1, 10)}, "--kvcache-url"),
        ({"cache": CacheUse(3, 1, 1, 1, 3000, False, 2)}, "2 engines"),
        ({"cache": CacheUse(3, 1, 1, 1, 6001, False, 1, chunk_size=300)}, "handed out 6001 tokens"),
        (
            {"cache": CacheUse(3, 1, 0, 7, 0, False, 0), "tokens": TokenOrigins(0, 0, 9, 10), "meaning_of_hits": "cold"},
            "took 7 bytes",
        ),
        ({"failed_warm_ups": 3}, "3 requests failed"),
    ],
)
def test_what_makes_the_figures_doubtful_is_told_with_what_to_do(changes, expected):
    found = section.warnings(make_run(**changes))
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(("cached", "is_told"), [(10, True), (9, False)])
def test_one_percent_of_hits_is_not_cold(cached, is_told):
    run = make_run(tokens=TokenOrigins(cached, 0, 1000 - cached, 10), meaning_of_hits="random prompts share nothing")
    assert bool(section.warnings(run)) is is_told


GOOD = AnswerCheck(2, 2, 512)


@pytest.mark.parametrize(
    ("check", "failed", "allow_failures", "code"),
    [
        (None, 0, False, 0),
        (None, 1, False, 1),
        (None, 1, True, 0),
        (GOOD, 0, False, 0),
        (AnswerCheck(2, 1, 512), 0, False, 1),
        (AnswerCheck(inconclusive_because="no token was loaded"), 0, False, 4),
        (AnswerCheck(inconclusive_because="no token was loaded"), 1, True, 4),
    ],
)
def test_the_verdict_decides_the_exit_code(check, failed, allow_failures, code):
    error = section.verdict(make_run(check=check), failed, allow_failures)
    assert (error.exit_code if error else 0) == code


# -- hooks --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve() -> ModuleType:
    """The stand-in for vLLM's module, fresh."""
    spec = importlib.util.spec_from_file_location("fake_serve", FAKE_VLLM / "vllm/benchmarks/serve.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_serve"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fake_serve"]


class Observer:
    """Notes what it is called for."""

    def __init__(self, module, is_vllm=True):
        self.module = module
        self.is_vllm = is_vllm
        self.calls = []
        self.bench = None

    def starts(self):
        self.calls.append(("starts", len(self.module.SENT)))

    def ended(self, num_answered):
        self.calls.append(("ended", num_answered))

    async def after(self, bench, result):
        self.bench = bench
        return ["our line"], {"seen": len(bench.sent)}


def arguments(**changes):
    values = {
        "backend": "openai",
        "num_prompts": 3,
        "num_warmups": 0,
        "ignore_eos": True,
        "model": None,
        "custom_output_len": 4,
        "request_id_prefix": "x-",
        "lora_modules": None,
        "probe_request_rate": 0.0,
    }
    return SimpleNamespace(**{**values, **changes})


def test_our_lines_come_before_the_closing_rule_and_the_document_into_the_result(serve, capsys):
    result = ServeBench(serve, Observer(serve)).run(arguments())
    assert capsys.readouterr().out.splitlines()[-4:] == [
        f"{'Successful requests:':<40} 3         ",
        "our line",
        RULE,
        "Stopping profiler...",
    ]
    assert result["lmcache"] == {"seen": 3}


def test_the_table_goes_into_a_list_if_wanted(serve, capsys):
    lines = []
    ServeBench(serve, Observer(serve), table_lines=lines).run(arguments())
    assert "Serving Benchmark Result" in lines[0]
    assert lines[-2:] == ["our line", RULE]
    assert RULE not in capsys.readouterr().out


def test_vllms_module_is_as_before_after_a_run_and_after_an_error(serve):
    before = dict(vars(serve))
    ServeBench(serve, Observer(serve), prompts=["a"]).run(arguments())
    assert vars(serve) == before
    with pytest.raises(ValueError, match="unknown"):
        ServeBench(serve, Observer(serve)).run(arguments(model="unknown"))
    assert vars(serve) == before


def test_counters_are_read_after_the_warm_up_whose_requests_have_a_salt_of_their_own(serve):
    observer = Observer(serve)
    ServeBench(serve, observer).run(arguments(num_warmups=2))
    assert observer.calls == [("starts", 2), ("ended", 3)]
    salts = [request.extra_body.get("cache_salt") for request in serve.SENT]
    assert salts[0]
    assert salts == [salts[0], salts[0], None, None, None]
    assert len(observer.bench.sent) == 3


def test_a_cold_run_has_a_salt_and_another_than_its_warm_up(serve):
    ServeBench(serve, Observer(serve), salt="run").run(arguments(num_warmups=1))
    salts = [request.extra_body.get("cache_salt") for request in serve.SENT]
    assert salts[1:] == ["run"] * 3
    assert salts[0] not in ("run", None)


@pytest.mark.parametrize(("backend", "is_vllm"), [("other", True), ("openai", False)])
def test_no_salt_is_sent_to_who_may_not_know_it(serve, backend, is_vllm):
    ServeBench(serve, Observer(serve, is_vllm), salt="run").run(arguments(num_warmups=1, backend=backend))
    assert not any("cache_salt" in request.extra_body for request in serve.SENT)


def test_a_benchmark_that_does_not_announce_its_start_is_watched_from_the_beginning(serve):
    async def silent(**given):
        outputs = [await serve.ASYNC_REQUEST_FUNCS["openai"](serve.Input("a", 4, True, {}), None) for _ in range(2)]
        return {"completed": len(outputs)}

    serve.benchmark = silent
    observer = Observer(serve)
    result = ServeBench(serve, observer).run(arguments())
    assert observer.calls == [("starts", 0), ("ended", 2)]
    assert result["lmcache"] == {"seen": 2}


def test_prompts_are_sent_in_turn(serve):
    ServeBench(serve, Observer(serve), prompts=["a", "b"]).run(arguments())
    assert [request.prompt for request in serve.SENT] == ["a", "b", "a"]


def test_short_answers_count_as_failed(serve):
    observer = Observer(serve)
    result = ServeBench(serve, observer, prompts=["good", "short"]).run(arguments())
    assert (result["completed"], result["failed"]) == (2, 1)
    assert result["errors"] == ["", "short answer: 1 of 4 tokens", ""]


def test_an_answer_may_be_short_where_the_end_of_the_text_ends_it(serve):
    result = ServeBench(serve, Observer(serve), prompts=["short"]).run(arguments(ignore_eos=False))
    assert result["failed"] == 0


def test_vllms_probes_are_no_requests_of_the_run(serve):
    observer = Observer(serve)
    result = ServeBench(serve, observer).run(arguments(probe_request_rate=1.0))
    assert len(serve.SENT) == 4
    assert observer.calls[-1] == ("ended", 4)
    assert (result["lmcache"]["seen"], observer.bench.answered_probes) == (3, 1)


def test_vllms_probes_are_no_other_clients_requests():
    run = make_run(tokens=TokenOrigins(0, 3000, 1000, 12), answered_probes=2)
    assert section.warnings(run) == []


def test_an_answer_of_vllm_without_usage_has_failed(serve):
    observer = Observer(serve)
    result = ServeBench(serve, observer, prompts=["good", "broken"]).run(arguments(ignore_eos=False))
    assert (result["completed"], result["errors"]) == (2, ["", "the stream ended without usage", ""])
    assert observer.calls[-1] == ("ended", 2)


@pytest.mark.parametrize(("backend", "is_vllm"), [("other", True), ("openai", False)])
def test_usage_is_not_asked_of_who_may_send_none(serve, backend, is_vllm):
    bench = ServeBench(serve, Observer(serve, is_vllm), prompts=["broken"])
    assert bench.run(arguments(backend=backend))["completed"] == 3


def test_a_broken_answer_to_warm_up_or_to_calibrate_has_failed_too(serve):
    observer = Calibrating(serve)
    bench = ServeBench(serve, observer, prompts=["broken"])
    bench.run(arguments(num_warmups=1))
    assert bench.failed_warm_ups == 1
    assert observer.found.because == "a request for the estimate failed: the stream ended without usage"


class Again(Observer):
    async def after(self, bench, result):
        for request in [*bench.requests, self.module.SampleRequest("not of the run", 4)]:
            for _ in range(2):
                await bench.again([request])
        return [], {}


def test_a_request_sent_again_goes_to_the_adapter_that_it_had(serve):
    ServeBench(serve, Again(serve)).run(arguments(num_warmups=1, lora_modules=["a", "b"]))
    assert [request.model for request in serve.SENT[1:4]] == ["b", "a", "b"]
    assert [request.model for request in serve.SENT[4:]] == ["b", "b", "a", "a", "b", "b", "a", "a"]


def test_without_salts_nothing_is_calibrated_or_verified(serve):
    bench = ServeBench(serve, Observer(serve, is_vllm=False))
    bench.run(arguments())
    assert isinstance(asyncio.run(calibrate(bench)), Unknown)
    assert asyncio.run(Verifier(bench, None, 1.0, 256).check(2)).inconclusive_because


class Calibrating(Observer):
    async def after(self, bench, result):
        self.found = await calibrate(bench)
        return [], {}


def test_prompts_too_short_to_measure_give_no_calibration_and_each_try_has_its_salt(serve, capsys):
    observer = Calibrating(serve)
    ServeBench(serve, observer).run(arguments())
    assert "too short" in observer.found.because
    salts = [request.extra_body["cache_salt"] for request in serve.SENT[3:]]
    assert len(set(salts)) == len(salts) >= 2
    assert capsys.readouterr().out.count("Serving Benchmark Result") == 1


@pytest.mark.parametrize(
    ("token", "key", "seen"),
    [("token", None, "token"), ("token", "", "token"), ("token", "key", "key"), ("", None, None), ("", "key", "key")],
)
def test_vllm_has_the_engines_token_as_its_key_while_it_runs(monkeypatch, token, key, seen):
    monkeypatch.setenv("LMCACHE_ENGINE_TOKEN", token)
    if key is None:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with engine_key():
        assert os.environ.get("OPENAI_API_KEY") == seen
    assert os.environ.get("OPENAI_API_KEY") == key


@pytest.mark.parametrize(
    ("words", "body"),
    [
        (["--extra-body.top_k", "5"], {"top_k": 5}),
        (
            ["--extra_body.a.b=0.5", "--extra-body.a.c", "x.y=z", "--extra-body.d", "null"],
            {"a": {"b": 0.5, "c": "x.y=z"}, "d": None},
        ),
        (["--extra-body.stop+", "a,b", "--extra-body.stop+=c"], {"stop": ["a", "b", "c"]}),
        (["--extra-body", '{"a.b": 1}'], {"a.b": 1}),
    ],
)
def test_json_is_taken_key_by_key_as_vllm_takes_it(serve, words, body):
    args = parse(make_parser(serve, "bench engine"), ["--num-prompts", "2", *words, "--model", "a.b"], [])
    assert (args.extra_body, args.num_prompts, args.model) == (body, 2, "a.b")


# -- answers ------------------------------------------------------------------------------------------------------------


@dataclass
class Request:
    prompt: list[int]
    prompt_len: int = 0
    expected_output_len: int = 8
    multi_modal_data: None = None
    request_overrides: dict | None = None


class ScriptedBench:
    """An engine whose answers to whole prompts, and counts of each, are given: first loaded, then its own, and so on."""

    can_salt = takes_token_ids = True

    def __init__(self, prompts, answers):
        self.requests = [Request(prompt) for prompt in prompts]
        self.asked = []
        self._answers = iter(answers)
        self._counted = engine(0, 0, 0)

    def token_ids(self, prompt):
        return prompt

    def extra_body(self, **fields):
        return fields

    def read(self, *_):
        return self._counted

    async def again(self, requests, extra_body):
        (request,) = requests
        self.asked.append((len(request.prompt), request.request_overrides["cache_salt"]))
        text, own, external = ("", 0, 0) if request.expected_output_len == 1 else next(self._answers)
        tokens = self._counted.tokens_by_source
        self._counted = engine(1, tokens["local_cache_hit"] + own, tokens["external_kv_transfer"] + external)
        return {"ttfts": [0.1], "errors": [text if text == "error" else ""], "generated_texts": [text]}


def check_answers(monkeypatch, prompts, answers, num_prompts=8):
    bench = ScriptedBench(prompts, answers)
    resets = []
    monkeypatch.setattr(phases, "read_engine", bench.read)
    monkeypatch.setattr(phases, "reset_prefix_cache", lambda *_: resets.append(len(bench.asked)))
    return asyncio.run(Verifier(bench, None, 1.0, 4).check(num_prompts)), bench, resets


PROMPTS = [list(range(10)), list(range(20, 29))]
LOADED, OWN = ("text", 0, 8), ("text", 8, 0)


def test_answers_are_compared_after_the_same_steps(monkeypatch):
    found, bench, resets = check_answers(monkeypatch, PROMPTS, [LOADED, OWN, LOADED, ("other", 8, 0)])
    assert found == AnswerCheck(num_prompts=2, num_same=1, loaded_tokens=16)
    assert [tokens for tokens, _ in bench.asked] == [8, 10, 8, 10, 8, 9, 8, 9]
    assert len({salt for _, salt in bench.asked}) == 4
    assert resets == [1, 5]


@pytest.mark.parametrize(
    ("prompts", "answers", "reason"),
    [
        ([[1, 2, 3, 4]], [], "longer than a chunk of 4"),
        (PROMPTS, [("text", 8, 0), OWN], "no token was loaded"),
        (PROMPTS, [LOADED, ("other", 0, 8)], "answers differ, and the engine's own prefix cache gave 0 tokens"),
        (PROMPTS, [LOADED, OWN, ("", 0, 8), ("", 8, 0)], "both answers to a prompt are empty"),
        (PROMPTS, [("error", 0, 0)], "a request for the check failed: error"),
    ],
)
def test_what_could_not_be_compared_is_inconclusive(monkeypatch, prompts, answers, reason):
    found, _, _ = check_answers(monkeypatch, prompts, answers)
    assert reason in found.inconclusive_because


def test_equal_answers_are_equal_whatever_their_steps(monkeypatch):
    found, _, _ = check_answers(monkeypatch, PROMPTS, [LOADED, ("text", 0, 8)], num_prompts=1)
    assert found == AnswerCheck(num_prompts=1, num_same=1, loaded_tokens=8)


# -- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine_cli(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """`lmcache` with the stand-in for vLLM, and an engine that has vLLM's counters."""
    with http_peer(200, METRICS.encode(), "text/plain") as port:
        monkeypatch.setenv("PYTHONPATH", str(FAKE_VLLM))
        cli = Cli("")
        cli.engine_url = f"http://127.0.0.1:{port}"
        yield cli


def test_text_has_one_table_and_json_one_document(engine_cli, server: LmcacheServer):
    words = ["bench", "engine", "--url", engine_cli.engine_url, "--kvcache-url", server.zmq_url, "--num_prompts=2"]
    done = engine_cli(*words)
    assert done.returncode == 0, done
    assert done.stdout.count("LMCache KV Cache Performance") == done.stdout.count(RULE + "\n") == 1
    document = engine_cli.json(*words)
    assert list(document) == ["ok", "schema_version", "benchmark", "lmcache"]
    assert document["benchmark"]["completed"] == 2
    assert document["benchmark"]["rtfx"] is None
    assert document["lmcache"]["l1_hit_ratio_unknown_because"] == "the engine looked nothing up"


def test_json_says_by_which_settings_and_versions_it_was_measured(engine_cli, server: LmcacheServer):
    """BEN-10."""
    routes = {"/health": (200, ""), "/metrics": (200, METRICS), "/version": (200, {"version": "0.32.0"})}
    with engine_peer(routes) as peer:
        words = ["bench", "engine", "--url", peer.url, "--num_prompts=3", "--header", "Authorization=Bearer a-secret", "--cold"]
        text = engine_cli(*words, "--kvcache-url", server.zmq_url, "--format", "json").stdout
    found = json.loads(text)["lmcache"]
    settings = found["settings"]
    assert (settings["num_prompts"], settings["custom_output_len"], settings["base_url"]) == (3, 4, peer.url)
    assert (settings["cold"], settings["verify"], settings["kvcache_url"]) == (True, None, server.zmq_url)
    assert settings["request_rate"] == "inf"
    assert settings["header"] == ["Authorization=..."]
    assert "a-secret" not in text
    versions = found["versions"]
    assert versions["client"] == versions["server"] == __version__
    assert (versions["engine"], versions["vllm"]) == ("0.32.0", "fake")
    assert found["environment"]["server_config"]["chunk_size"] == 256
    assert found["environment"]["num_cpus"] > 0


def test_quiet_prints_nothing_and_output_takes_the_table(engine_cli, tmp_path):
    words = ["bench", "engine", "--url", engine_cli.engine_url]
    done = engine_cli(*words, "-q")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = engine_cli(*words, "--output", str(tmp_path / "table"))
    lines = (tmp_path / "table").read_text().splitlines()
    assert "Serving Benchmark Result" in lines[0]
    assert lines[-1] == RULE
    assert RULE not in done.stdout


def test_no_cache_server_at_the_default_address_makes_its_figures_unknown(engine_cli):
    words = ("bench", "engine", "--url", engine_cli.engine_url)
    document = engine_cli.json(*words, LMCACHE_URL="")
    assert "--kvcache-url" in document["lmcache"]["l1_hit_ratio_unknown_because"]
    assert document["lmcache"]["versions"]["server"] is document["lmcache"]["environment"]["server_config"] is None
    assert "cannot connect" in engine_cli.refused(*words, "--kvcache-url", f"localhost:{free_port()}", code=3)


def test_failed_requests_decide_the_exit_code_unless_they_are_allowed(engine_cli):
    words = ["bench", "engine", "--url", engine_cli.engine_url, "--prompt", "fail", "--prompt", "good", "--num-prompts", "4"]
    document = engine_cli.json(*words, code=1)
    assert document["error"]["message"] == "2 of 4 requests failed: ServerDown: gone"
    assert document["benchmark"]["failed"] == 2
    assert engine_cli.json(*words, "--allow-failures")["benchmark"]["failed"] == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--num-promts", "2"], "did you mean '--num-prompts'?"),
        (["--kvcache-ulr", "x"], "did you mean '--kvcache-url'?"),
        (["--num-prompts", "two"], "invalid int value"),
        (["--extra-body.top_k"], "--extra-body.top_k: expected one argument"),
        (["--dataset-name", "randm"], "did you mean 'random'?"),
        (["--url", "http://127.0.0.1:1", "--port", "1"], "both say where the engine is"),
        (["--prompt", "a", "--dataset-name", "random"], "in the place of a data set"),
        (["--prompt", "{nothing}"], "unknown corpus"),
        (["--corpus", "a=b"], "--corpus names a text for --prompt"),
        (["--url", "localhost:5555"], "did you mean 'lmcache bench kvcache --url localhost:5555'?"),
        (["--verify", "0"], "not a whole number above 0"),
        (["--backend", "other", "--cold"], "--cold needs vLLM"),
    ],
)
def test_what_cannot_be_done_is_refused_with_one_message(engine_cli, words, expected):
    text = engine_cli.refused("bench", "engine", *words, LMCACHE_ENGINE_URL=engine_cli.engine_url)
    assert expected in text
    assert "hint: " in text


def test_what_vllm_refuses_is_a_usage_error_with_its_first_line(engine_cli):
    words = ["bench", "engine", "--url", engine_cli.engine_url, "--model", "unknown"]
    error = engine_cli.json(*words, code=2)["error"]
    assert error["message"] == "vLLM's benchmark did not start: no tokenizer for unknown"
    assert "--tokenizer" in error["hint"]


@pytest.mark.parametrize(
    ("exc", "hint"),
    [
        (ModuleNotFoundError("No module named 'pandas'"), "pip install 'lmcache[vllm]'"),
        (FileNotFoundError(2, "No such file or directory", "prompts.jsonl"), "check --dataset-path"),
        (ArgumentTypeError("Invalid format found for service level objectives."), "correct the flag"),
        (ValueError("Cannot use 'random' dataset with --dataset-path."), "correct the flag"),
        (OSError("x is not a local folder"), "pass --model"),
    ],
)
def test_the_hint_is_about_what_kept_the_benchmark_from_its_start(exc, hint):
    assert start_hint(exc, Namespace(dataset_path="prompts.jsonl")).startswith(hint)


def test_the_extra_that_the_hint_names_has_what_vllms_data_sets_need():
    assert '\nvllm = ["vllm[bench]>=' in (Path(__file__).parents[2] / "pyproject.toml").read_text()


def test_an_absent_engine_is_not_reachable(engine_cli):
    for where in (["--url", f"http://127.0.0.1:{free_port()}"], ["--port", str(free_port())]):
        engine_cli.refused("bench", "engine", *where, code=3)


def test_base_url_is_left_to_vllm_as_it_was_written(engine_cli):
    with engine_peer({"/health": (200, ""), "/metrics": (200, METRICS)}) as peer:
        done = engine_cli("bench", "engine", "--base-url", f"{peer.url}/v1")
        assert f"base_url='{peer.url}/v1'," in done.stdout
        paths = {path for _, path, _ in peer.requests}
        assert paths >= {"/health", "/metrics"}
        assert not any(path.startswith("/v1") for path in paths)
        assert f"base_url='{peer.url}'," in engine_cli("bench", "engine", "--url", f"{peer.url}/v1").stdout


@pytest.mark.parametrize("status", [404, 503])
def test_an_engine_without_good_health_is_measured_with_a_warning(engine_cli, status):
    with engine_peer({"/health": (status, ""), "/metrics": (200, METRICS)}) as peer:
        document = engine_cli.json("bench", "engine", "--url", peer.url)
    assert f"/health of {peer.url} answered HTTP {status}" in document["lmcache"]["warnings"]


def test_insecure_holds_for_our_own_questions_too(engine_cli, certificate):
    _, context = certificate
    routes = {"/health": (200, ""), "/metrics": (200, METRICS), "/reset_prefix_cache": (200, "")}
    with engine_peer(routes, context) as peer:
        words = ["bench", "engine", "--reset-prefix-cache", "--url", peer.url.replace("http:", "https:")]
        assert engine_cli.json(*words, "--insecure")["lmcache"]["computed_prompt_tokens"] == 0
        assert "hint: set SSL_CERT_FILE" in engine_cli.refused(*words, code=3)


def test_an_engine_that_only_a_proxy_reaches_is_measured_without_its_counters(engine_cli):
    words = ["bench", "engine", "--url", f"http://127.0.0.1:{free_port()}"]
    document = engine_cli.json(*words, http_proxy=engine_cli.engine_url, no_proxy="")
    assert any("go through a proxy" in warning for warning in document["lmcache"]["warnings"])
    assert document["lmcache"]["computed_prompt_tokens"] is None
    engine_cli.refused(*words, code=3, http_proxy=engine_cli.engine_url, no_proxy="127.0.0.1")


def test_an_engine_that_cannot_reset_its_cache_is_told_how_to(engine_cli):
    with http_peer(404, b"{}") as port:
        error = engine_cli.refused("bench", "engine", "--url", f"http://127.0.0.1:{port}", "--reset-prefix-cache", code=1)
    assert "VLLM_SERVER_DEV_MODE=1" in error


def test_vllms_flags_are_shown_on_demand(engine_cli):
    done = engine_cli("bench", "engine", "--help-vllm")
    assert done.returncode == 0
    assert "--num-prompts" in done.stdout


# Appended to the stand-in: requests that go to the engine, with the key and the model as vLLM 0.32 takes them.
SENDING = """
import os
import urllib.request

ARGS = None
FIRST_MAIN = main


def get(path):
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return urllib.request.urlopen(urllib.request.Request(ARGS.base_url + path, headers=headers)).read()


async def send_to_engine(request_func_input, session, pbar=None):
    get("/v1/completions?model=" + ARGS.served_model_name)
    return Output(output_tokens=request_func_input.output_len)


ASYNC_REQUEST_FUNCS = {"openai": send_to_engine, "other": send_to_engine}


def main(args):
    global ARGS
    ARGS = args
    if args.model is None:
        raise RuntimeError("vLLM would ask for the models without the token")
    return {**FIRST_MAIN(args), "model_id": args.model}
"""


def wants_token(status: int, document):
    """A page of an engine that was started with `--api-key a-secret`."""

    def page(handler: EngineHandler) -> None:
        is_known = handler.headers.get("authorization") == "Bearer a-secret"
        handler.reply(*((status, document) if is_known else (401, {"error": "Unauthorized"})))

    return page


@pytest.fixture
def keyed_cli(engine_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cli]:
    """As `engine_cli`, with requests that go to an engine that wants a token."""
    shutil.copytree(FAKE_VLLM, tmp_path / "vllm", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "vllm/vllm/benchmarks/serve.py").open("a") as file:
        file.write(SENDING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "vllm"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    routes = {
        "/health": (200, ""),
        "/metrics": (200, METRICS),
        "/v1/models": wants_token(200, {"data": [{"id": "served", "root": "/weights"}, {"id": "second"}]}),
        "/v1/completions": wants_token(200, {}),
    }
    with engine_peer(routes) as peer:
        engine_cli.engine_url = peer.url
        engine_cli.peer = peer
        yield engine_cli


def test_an_engine_that_wants_a_token_gets_it_and_names_its_model(keyed_cli, tmp_path):
    words = ["bench", "engine", "--url", keyed_cli.engine_url]
    document = keyed_cli.json(*words, LMCACHE_ENGINE_TOKEN="a-secret")
    assert (document["benchmark"]["completed"], document["benchmark"]["model_id"]) == (2, "/weights")
    asked = [path for _, path, _ in keyed_cli.peer.requests if path.startswith("/v1/")]
    assert asked == ["/v1/models"] + ["/v1/completions?model=served"] * 2
    done = keyed_cli(*words, LMCACHE_ENGINE_TOKEN="a-secret")
    assert "Namespace(" in done.stdout
    assert "a-secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("token", "given"),
    [("", {}), ("a-secret", {"model": "mine"}), ("a-secret", {"header": ["x=y", "authorization=Bearer other"]})],
    ids=["no token", "model", "header"],
)
def test_vllm_asks_for_the_model_itself_where_it_can(monkeypatch, token, given):
    monkeypatch.setenv("LMCACHE_ENGINE_TOKEN", token)
    vllm_args = Namespace(**{"model": None, "served_model_name": None, "header": None, **given})
    before = dict(vars(vllm_args))
    with engine_peer({}) as peer:
        name_model(vllm_args, http_url(peer.url), 10.0)
    assert (vars(vllm_args), peer.requests) == (before, [])


def test_a_wrong_token_is_the_engines_refusal(keyed_cli):
    words = ["bench", "engine", "--url", keyed_cli.engine_url]
    error = keyed_cli.refused(*words, code=1, LMCACHE_ENGINE_TOKEN="another")
    assert "/v1/models wants another token than that in LMCACHE_ENGINE_TOKEN" in error


def run_without_vllm(words, then="pass"):
    script = f"""
import sys
sys.modules["vllm"] = None
from lmcache.cli.main import main
code = main({words!r})
{then}
sys.exit(code)
"""
    return subprocess.run(
        [sys.executable, "-c", script], env=clean_environment(), capture_output=True, text=True, timeout=60, check=False
    )


def test_where_vllm_is_not_installed_one_error_names_the_extra():
    done = run_without_vllm(["bench", "engine", "--seed", "1"])
    assert (done.returncode, done.stdout) == (2, "")
    assert "lmcache[vllm]" in done.stderr
    assert done.stderr.count("\n") == 2


def test_help_needs_no_vllm():
    heavy = "{'torch', 'transformers', 'numpy', 'zmq', 'httpx', 'msgspec'}"
    done = run_without_vllm(["bench", "engine", "--help"], f"assert not {heavy} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
    assert "--kvcache-url" in done.stdout
