"""The section that `bench engine` adds to vLLM's table: figures, warnings and verdict of one run.

Comes in: a `CacheRun`, all that was seen. Goes out: lines in vLLM's own format, a document, and the error that decides the exit
code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from lmcache.cli.commands.bench.phases import AnswerCheck, Calibration
from lmcache.cli.counters import CacheUse, TokenOrigins
from lmcache.cli.engine import Unknown
from lmcache.cli.output import format_ratio, printable
from lmcache.errors import InconclusiveError, LMCacheError

TITLE = "LMCache KV Cache Performance"
WIDTH = 50
LABEL_WIDTH = 40
# More than this share of prompt tokens from a cache, and a run is not cold.
MAX_COLD_HIT_RATIO = 0.01
# The estimate is suspect when requests were answered in less than this share of what their computed tokens cost one by one.
SUSPECT_SHARE = 0.5
METHOD = (
    "1 - mean TTFT / (mean TTFT + tokens saved per request x seconds per token computed, from two prompts sent cold and alone)"
)

Figure = float | int | Unknown


@dataclass
class CacheRun:
    """All that was seen of one benchmark.

    Args:
        answered: requests of the run that were answered in full.
        answered_probes: what vLLM sent beside them (`--probe-request-rate`); the engine counts these too.
        mean_ttft: their mean time to the first token, in seconds.
        first_error: what was wrong with the first request that was not.
        meaning_of_hits: what it means when tokens came from a cache, where none should have; else nothing.
        circumstances: by which settings, of which versions and where; for JSON only.
    """

    tokens: TokenOrigins | Unknown
    cache: CacheUse | Unknown
    calibration: Calibration | Unknown
    check: AnswerCheck | None = None
    duration: float = 0.0
    num_requests: int = 0
    answered: int = 0
    short_requests: int = 0
    failed_warm_ups: int = 0
    answered_probes: int = 0
    mean_ttft: float = 0.0
    first_error: str = ""
    meaning_of_hits: str = ""
    notes: list[str] = field(default_factory=list)
    circumstances: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TtftEstimate:
    """What the mean TTFT would have been without the cache server, by `METHOD`."""

    without_cache_seconds: float
    saved_ratio: float
    is_suspect: bool


# -- figures ------------------------------------------------------------------------------------------------------------


def l1_hit_ratio(run: CacheRun) -> Figure:
    """Return the share of the chunks looked up that L1 had."""
    if isinstance(run.cache, Unknown):
        return run.cache
    asked = run.cache.hit_chunks + run.cache.missed_chunks
    return run.cache.hit_chunks / asked if asked else Unknown("the engine looked nothing up")


def l2_hit_ratio(run: CacheRun) -> Figure:
    """Return the share of what L1 lacked that L2 had."""
    if isinstance(run.cache, Unknown):
        return run.cache
    if not run.cache.has_l2:
        return Unknown("the server has no L2 tier")
    missed = run.cache.missed_chunks
    return run.cache.promoted_chunks / missed if missed else Unknown("L1 lacked nothing")


def bytes_per_second(run: CacheRun, name: str) -> Figure:
    """Return what was read from or written to L1, over the time of the whole run."""
    if isinstance(run.cache, Unknown):
        return run.cache
    return getattr(run.cache, name) / run.duration if run.duration > 0 else Unknown("the run took no time")


def saved_tokens(run: CacheRun) -> Figure:
    """Return the tokens that an answered request had from the cache server, on average."""
    if isinstance(run.tokens, Unknown):
        return run.tokens
    return run.tokens.external / run.answered if run.answered else Unknown("no request was answered")


def ttft_estimate(run: CacheRun) -> TtftEstimate | Unknown:
    """Return by how much the cache server shortened the mean TTFT."""
    saved = saved_tokens(run)
    if isinstance(saved, Unknown):
        return saved
    if not run.mean_ttft:
        return Unknown("no request had a first token")
    if not saved:
        return TtftEstimate(run.mean_ttft, 0.0, is_suspect=False)
    if isinstance(run.calibration, Unknown):
        return run.calibration
    assert isinstance(run.tokens, TokenOrigins)
    cost = run.calibration.seconds_per_token
    without = run.mean_ttft + saved * cost
    least = SUSPECT_SHARE * cost * run.tokens.computed / run.answered
    return TtftEstimate(without, 1 - run.mean_ttft / without, is_suspect=run.mean_ttft < least)


# -- what is wrong ------------------------------------------------------------------------------------------------------


def warnings(run: CacheRun) -> list[str]:
    """Return what the reader should know before believing the figures, each with what to do."""
    found = list(run.notes)
    if run.failed_warm_ups:
        found.append(f"{run.failed_warm_ups} requests failed before the run proper, warming up")
    if isinstance(run.tokens, TokenOrigins) and run.tokens.total:
        found += _origin_warnings(run, run.tokens)
    estimate = ttft_estimate(run)
    if isinstance(estimate, TtftEstimate) and estimate.is_suspect:
        found.append(
            f"suspect: a mean TTFT of {run.mean_ttft * 1000:.1f} ms is less than the computed tokens alone should take; "
            "the speed-up is above the possible: measure again without other load"
        )
    return found


def _origin_warnings(run: CacheRun, tokens: TokenOrigins) -> list[str]:
    found = []
    if run.meaning_of_hits and tokens.cached_ratio >= MAX_COLD_HIT_RATIO:
        found.append(f"{format_ratio(tokens.cached_ratio)} of the prompt tokens came from a cache: {run.meaning_of_hits}")
    if not run.meaning_of_hits and not tokens.external:
        found.append(_no_external(run, tokens))
    extra = tokens.finished_requests - run.num_requests - run.answered_probes
    if extra > 0:
        found.append(f"the engine finished {extra} more requests than this run sent: the figures include other clients'")
    if isinstance(run.cache, CacheUse):
        if run.cache.num_engines > 1:
            found.append(f"{run.cache.num_engines} engines use the cache server: hit rate and bandwidth are of all of them")
        elif _has_moved_more(run.cache, tokens):
            found.append(
                f"the cache server handed out {run.cache.retrieved_tokens} tokens and took {run.cache.written_bytes} bytes, "
                f"the engine counts {tokens.external} tokens: hit rate and bandwidth include other clients'"
            )
        if tokens.external > run.cache.retrieved_tokens:
            found.append(
                f"suspect: the engine counts {tokens.external} tokens loaded, the cache server handed out "
                f"{run.cache.retrieved_tokens}: is --kvcache-url the engine's server?"
            )
    return found


def _has_moved_more(cache: CacheUse, tokens: TokenOrigins) -> bool:
    """Whether the server moved bytes that the engine did not ask for; of those written, where no engine is connected."""
    if not cache.num_engines and not tokens.external:
        return bool(cache.read_bytes or cache.written_bytes)
    # The engine's own cache may hold the beginning of the first chunk that is loaded for a request.
    return cache.retrieved_tokens - tokens.external > cache.chunk_size * tokens.finished_requests


def _no_external(run: CacheRun, tokens: TokenOrigins) -> str:
    if isinstance(run.cache, CacheUse) and not run.cache.num_engines:
        return (
            "no token came from the cache server, to which no engine is connected: start vLLM with "
            '--kv-transfer-config \'{"kv_connector":"LMCacheMPConnector","kv_role":"kv_both"}\''
        )
    if tokens.engine_cache:
        return (
            f"no token came from the cache server: the engine's own prefix cache served {tokens.engine_cache}; "
            "use more prompts than it holds, or pass --reset-prefix-cache"
        )
    return "no token came from the cache server: nothing of these prompts was cached; run it again to measure hits"


def verdict(run: CacheRun, failed: int, allow_failures: bool) -> LMCacheError | None:
    """Return the error that decides the exit code, or nothing when all is good."""
    if failed and not allow_failures:
        reason = f": {run.first_error}" if run.first_error else ""
        return LMCacheError(
            f"{failed} of {run.num_requests} requests failed{reason}",
            "see the engine's log; --allow-failures makes this exit code 0",
            "failed_requests",
        )
    check = run.check
    if check is not None and check.inconclusive_because:
        return InconclusiveError(
            f"nothing was verified: {check.inconclusive_because}",
            "the engine must use the cache server, and the prompts be longer than a chunk",
            "inconclusive",
        )
    if check is not None and not check.is_good:
        num_wrong = check.num_prompts - check.num_same
        return LMCacheError(
            f"{num_wrong} of {check.num_prompts} answers differ from those of the engine's own prefix cache",
            "the KV that was loaded is not what was stored, or the engine's answers are not repeatable: report it",
            "verify",
        )
    return None


# -- renderings ---------------------------------------------------------------------------------------------------------


def lines(run: CacheRun) -> list[str]:
    """Return the section as vLLM writes its own."""
    read, write = bytes_per_second(run, "read_bytes"), bytes_per_second(run, "written_bytes")
    estimate = ttft_estimate(run)
    savings = estimate if isinstance(estimate, Unknown) else estimate.saved_ratio
    mark = " (suspect)" if isinstance(estimate, TtftEstimate) and estimate.is_suspect else ""
    return [
        TITLE.center(WIDTH, "-"),
        _row("KV cache hit rate (L1)", l1_hit_ratio(run), "{:.1%}"),
        _row("KV cache hit rate (L2)", l2_hit_ratio(run), "{:.1%}"),
        _row("L1 read bandwidth", _scaled(read, 1e-9), "{:.4g} GB/s"),
        _row("L1 write bandwidth", _scaled(write, 1e-9), "{:.4g} GB/s"),
        _row("Avg tokens saved by cache (per req)", saved_tokens(run), "{:.0f}"),
        _row("Cache-assisted TTFT savings (est.)", savings, "{:.1%}" + mark),
        *_origin_lines(run.tokens),
        *([_row("Short answers (counted as failed)", run.short_requests, "{}")] if run.short_requests else []),
        *_check_lines(run.check),
    ]


def _row(label: str, value: Figure, template: str) -> str:
    text = f"n/a ({value.because})" if isinstance(value, Unknown) else template.format(value)
    return f"{label + ':':<{LABEL_WIDTH}} {printable(text):<10}"


def _scaled(value: Figure, factor: float) -> Figure:
    return value if isinstance(value, Unknown) else value * factor


def _origin_lines(tokens: TokenOrigins | Unknown) -> list[str]:
    if isinstance(tokens, Unknown):
        return [_row("Prompt tokens by origin", tokens, "")]
    counts = {
        "Prompt tokens from engine's own cache": tokens.engine_cache,
        "Prompt tokens from external cache (L1)": tokens.external,
        "Prompt tokens computed": tokens.computed,
    }
    total = tokens.total or 1
    return [_row(label, count, f"{{}} ({format_ratio(count / total)})") for label, count in counts.items()]


def _check_lines(check: AnswerCheck | None) -> list[str]:
    if check is None:
        return []
    same = f"{check.num_same}/{check.num_prompts} same, {check.loaded_tokens} tokens loaded"
    value: Figure = Unknown(check.inconclusive_because) if check.inconclusive_because else 0
    return [_row("Verified answers", value, same)]


def document(run: CacheRun) -> dict[str, Any]:
    """Return the section for JSON: ratios from 0 to 1, and null with a reason for what is unknown."""
    found: dict[str, Any] = {}

    def put(key: str, value: Figure) -> None:
        found[key] = None if isinstance(value, Unknown) else value
        if isinstance(value, Unknown):
            found[f"{key}_unknown_because"] = value.because

    put("l1_hit_ratio", l1_hit_ratio(run))
    put("l2_hit_ratio", l2_hit_ratio(run))
    for name in ("read_bytes", "written_bytes"):
        put(f"l1_{name}", run.cache if isinstance(run.cache, Unknown) else getattr(run.cache, name))
        put(f"l1_{name}_per_second", bytes_per_second(run, name))
    put("saved_tokens_per_request", saved_tokens(run))
    estimate = ttft_estimate(run)
    put("ttft_savings_ratio", estimate if isinstance(estimate, Unknown) else estimate.saved_ratio)
    put("ttft_without_cache_ms", estimate if isinstance(estimate, Unknown) else estimate.without_cache_seconds * 1000)
    found["ttft_savings_is_suspect"] = isinstance(estimate, TtftEstimate) and estimate.is_suspect
    found["ttft_savings_method"] = METHOD
    found["calibration"] = None if isinstance(run.calibration, Unknown) else asdict(run.calibration)
    if isinstance(run.calibration, Unknown):
        found["calibration_unknown_because"] = run.calibration.because
    for origin in ("engine_cache", "external", "computed"):
        put(f"{origin}_prompt_tokens", run.tokens if isinstance(run.tokens, Unknown) else getattr(run.tokens, origin))
    found["short_requests"] = run.short_requests
    found["failed_warm_ups"] = run.failed_warm_ups
    found["verify"] = None if run.check is None else asdict(run.check)
    found["warnings"] = warnings(run)
    found.update(run.circumstances)
    return found
