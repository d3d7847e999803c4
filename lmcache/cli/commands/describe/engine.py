"""`lmcache describe engine`: an inference engine's model, state and load on one page.

Comes in: `/health`, `/v1/models`, `/version` and `/metrics`, as far as the engine has them. Goes out: the page, in which
everything else is n/a, with the reason.
"""

from __future__ import annotations

import time
from argparse import Namespace

from lmcache.cli.base import Url, engine_url
from lmcache.cli.commands.describe.watch import Sample, describe
from lmcache.cli.engine import (
    HEALTH_PATHS,
    METRICS_PATH,
    ServedModel,
    Unknown,
    engine_version,
    find_health,
    health_problems,
    read_metrics,
    served_models,
)
from lmcache.cli.http import ENGINE, HttpClient, wrong_peer
from lmcache.cli.output import Result, format_ratio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# What engines call the same thing: vLLM, vLLM until 0.10, SGLang.
RUNNING = ("vllm:num_requests_running", "sglang:num_running_reqs")
WAITING = ("vllm:num_requests_waiting", "sglang:num_queue_reqs")
KV_USAGE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc", "sglang:token_usage")
PROMPT_TOKENS = ("vllm:prompt_tokens_total", "sglang:prompt_tokens_total")
OUTPUT_TOKENS = ("vllm:generation_tokens_total", "sglang:generation_tokens_total")
PREFIX_HITS = ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total")
EXTERNAL_HITS = ("vllm:external_prefix_cache_hits_total", "vllm:external_prefix_cache_queries_total")
PREFIX_HIT_RATE = ("sglang:cache_hit_rate",)
OF_AN_ENGINE = (*RUNNING, *PROMPT_TOKENS)


def describe_engine(args: Namespace) -> int:
    """Ask the engine and report, once or until interrupted."""
    url = engine_url(args)
    return describe(lambda: take_sample(url, args.timeout), args)


def take_sample(url: Url, timeout: float) -> EngineSample:
    """Return what the engine tells now; each request has `timeout` seconds.

    Raises: UnreachableError, LMCacheError when it is no engine.
    """
    with HttpClient(url, timeout, ENGINE) as client:
        health = find_health(client)
        models = served_models(client)
        metrics = read_metrics(client)
        if isinstance(models, Unknown) and (isinstance(metrics, Unknown) or not any(map(metrics.get, OF_AN_ENGINE))):
            error = wrong_peer(url, models.because.replace("the engine", "it"), ENGINE)
            if not isinstance(health, Unknown) and health[0] == HEALTH_PATHS[1]:
                error.hint = f"for an lmcache server: 'lmcache describe kvcache --url {url}'"
            raise error
        problems = health if isinstance(health, Unknown) else health_problems(client, *health)
        return EngineSample(url, problems, models, engine_version(client), metrics)


class EngineSample(Sample):
    """What an engine told at one moment; `problems` is empty when it is healthy."""

    def __init__(
        self,
        url: Url,
        problems: list[str] | Unknown,
        models: list[ServedModel] | Unknown,
        version: str | Unknown,
        metrics: dict[str, list[float]] | Unknown,
    ) -> None:
        self.url = url
        self.problems = problems
        self.models = models
        self.version = version
        self.metrics = metrics
        self.taken_at = time.monotonic()

    # -- figures -----------------------------------------------------------------------------------

    def total(self, names: Sequence[str]) -> float | Unknown:
        """Return the sum over all series of the first metric that the engine has."""
        series = self._series(names)
        return series if isinstance(series, Unknown) else sum(series)

    def share(self, names: Sequence[str]) -> float | Unknown:
        """Return the mean over all series of the first metric that the engine has, 0 to 1."""
        series = self._series(names)
        return series if isinstance(series, Unknown) else _share(sum(series) / len(series), names[0])

    def hit_ratio(self, hits_and_queries: tuple[str, str], ready_made: Sequence[str] = ()) -> float | Unknown:
        """Return the share of tokens that were found since the engine started."""
        hits, queries = (self.total([name]) for name in hits_and_queries)
        if isinstance(hits, Unknown) or isinstance(queries, Unknown):
            return self.share(ready_made or hits_and_queries[:1])
        return _share(hits / queries, hits_and_queries[0]) if queries else Unknown("no prompt yet")

    def _series(self, names: Sequence[str]) -> list[float] | Unknown:
        if isinstance(self.metrics, Unknown):
            return self.metrics
        found = next((self.metrics[name] for name in names if name in self.metrics), None)
        return Unknown(f"{METRICS_PATH} has no {names[0]}") if found is None else found

    # -- page --------------------------------------------------------------------------------------

    def result(self) -> Result:
        result = Result("Inference Engine", width=50, value_end=47)
        result.put("url", self.url.text)
        _add_models(result, self.models)
        self._add_status(result)
        _add_count(result, "Running requests", "running_requests", self.total(RUNNING))
        _add_count(result, "Waiting requests", "waiting_requests", self.total(WAITING))
        _add_ratio(result, "KV cache usage", "kv_cache_usage_ratio", self.share(KV_USAGE))
        _add_ratio(result, "Prefix cache hit rate", "prefix_cache_hit_ratio", self.hit_ratio(PREFIX_HITS, PREFIX_HIT_RATE))
        _add_ratio(result, "External cache hit rate", "external_cache_hit_ratio", self.hit_ratio(EXTERNAL_HITS))
        _add(result, "Engine version", "engine_version", self.version)
        return result

    def _add_status(self, result: Result) -> None:
        if isinstance(self.problems, Unknown):
            result.unknown("Status", self.problems.because, key="status")
            return
        result.put("problems", self.problems)
        result.row("Status", self._state(), key="status")
        for problem in self.problems:
            result.row("Problem", problem, indent=2)
        if self.problems:
            result.fail(f"{self.url} answers and is not healthy: {'; '.join(self.problems)}", code="unhealthy")

    def _state(self) -> str:
        if isinstance(self.problems, Unknown):
            return "n/a"
        return "unhealthy" if self.problems else "healthy"

    # -- line --------------------------------------------------------------------------------------

    def line(self, before: Sample | None) -> str:
        fields = [
            time.strftime("%H:%M:%S"),
            self._state(),
            f"running {_short(self.total(RUNNING))}",
            f"waiting {_short(self.total(WAITING))}",
            f"KV cache {_percent(self.share(KV_USAGE))}",
            f"prefix hits {_percent(self.hit_ratio(PREFIX_HITS, PREFIX_HIT_RATE))}",
            f"external hits {_percent(self.hit_ratio(EXTERNAL_HITS))}",
        ]
        if isinstance(before, EngineSample):
            fields += self._rates(before)
        return "  ".join(fields)

    def _rates(self, before: EngineSample) -> list[str]:
        """Counters that fell are those of another process."""
        seconds = max(1e-3, self.taken_at - before.taken_at)
        rates = []
        for label, names in (("prompt", PROMPT_TOKENS), ("output", OUTPUT_TOKENS)):
            now, then = self.total(names), before.total(names)
            if not isinstance(now, Unknown) and not isinstance(then, Unknown) and now >= then:
                rates.append(f"{label} {(now - then) / seconds:.1f} tokens/s")
        return rates


def _share(value: float, name: str) -> float | Unknown:
    return value if 0 <= value <= 1 else Unknown(f"{METRICS_PATH} has a share of {value:g} for {name}")


def _add_models(result: Result, models: list[ServedModel] | Unknown) -> None:
    if isinstance(models, Unknown) or not models:
        because = models.because if isinstance(models, Unknown) else "it serves none"
        result.unknown("Model", because, key="model")
        result.unknown("Max context (tokens)", because, key="max_context_tokens")
        return
    base = next((model for model in models if model.parent is None), models[0])
    result.row("Model", base.id, key="model")
    for model in models:
        if model is not base:
            result.row("Also served" if model.parent is None else f"Adapter of {model.parent}", model.id)
    length = Unknown("/v1/models has no max_model_len") if base.max_model_len is None else base.max_model_len
    _add(result, "Max context (tokens)", "max_context_tokens", length)
    result.put(
        "models", [{"id": m.id, "root": m.root, "parent": m.parent, "max_context_tokens": m.max_model_len} for m in models]
    )


def _add(result: Result, label: str, key: str, value: str | int | Unknown) -> None:
    if isinstance(value, Unknown):
        result.unknown(label, value.because, key=key)
    else:
        result.row(label, value, key=key)


def _add_count(result: Result, label: str, key: str, value: float | Unknown) -> None:
    _add(result, label, key, value if isinstance(value, Unknown) else int(value))


def _add_ratio(result: Result, label: str, key: str, value: float | Unknown) -> None:
    if isinstance(value, Unknown):
        result.unknown(label, value.because, key=key)
    else:
        result.row(label, round(value, 6), key=key, text=format_ratio(value))


def _short(value: float | Unknown) -> str:
    return "n/a" if isinstance(value, Unknown) else f"{value:.0f}"


def _percent(value: float | Unknown) -> str:
    return "n/a" if isinstance(value, Unknown) else format_ratio(value)
