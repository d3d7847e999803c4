"""`lmcache query engine --verify`: is the answer the same when the prompt's KV comes from the cache server?

Comes in: a question. Goes out: a verdict: the same (exit code 0), not the same (1), or nothing to judge by (4).

The prompt is asked three times with a cache salt of its own, so that the first time no cache knows it. The second answer may
come from the engine's own prefix cache; that is then emptied, so that the third can only be loaded. The third is compared with
the second if that used the engine's own cache, else with the first: a full computation sums in another order, so that for rare
prompts even an engine's own cache gives another answer.
"""

from __future__ import annotations

import secrets

from lmcache.cli.commands.query.engine import Asked, add_counts, add_latency
from lmcache.cli.counters import (
    CacheReader,
    CacheUse,
    TokenOrigins,
    cache_use,
    read_engine,
    settled_origins,
    settled_use,
)
from lmcache.cli.engine import Unknown, reset_prefix_cache
from lmcache.cli.generation import Generation
from lmcache.cli.output import Result
from lmcache.errors import InconclusiveError, LMCacheError, UnreachableError

OWN_CACHE = "the engine's own prefix cache"
COMPUTATION = "a full computation"


class Pass:
    """One of the answers, and where the prompt's tokens came from.

    `retrieved` is what the cache server handed out, by its own counter where its address was given, else by the engine's.
    """

    def __init__(
        self, answer: Generation, origins: TokenOrigins | Unknown, use: CacheUse | Unknown, trusts_server: bool
    ) -> None:
        self.answer = answer
        self.from_own_cache = origins.engine_cache if isinstance(origins, TokenOrigins) else 0
        self.retrieved: int | Unknown
        if isinstance(use, CacheUse) and (trusts_server or isinstance(origins, Unknown)):
            self.retrieved = use.retrieved_tokens
        elif isinstance(origins, TokenOrigins) and not trusts_server:
            self.retrieved = origins.external
        else:
            self.retrieved = use if isinstance(use, Unknown) else Unknown("nobody counts it")


def verify(asked: Asked, cache: CacheReader, trusts_server: bool) -> Result:
    """Return the verdict and what it rests on.

    Raises: RemoteError, UnreachableError, ProtocolError.
    """
    salt = secrets.token_hex(8)
    cold = _ask(asked, salt, cache, trusts_server)
    again = _ask(asked, salt, cache, trusts_server)
    not_reset = _reset(asked)
    loaded = _ask(asked, salt, cache, trusts_server)
    has_own = again.from_own_cache > 0 and again.retrieved == 0
    expected, reference = (again, OWN_CACHE) if has_own else (cold, COMPUTATION)
    result = _result(asked, cold, loaded, expected, reference)
    doubt = _doubt(cold, loaded, not_reset)
    if doubt is not None:
        _conclude(result, "INCONCLUSIVE")
        result.error = doubt
    elif loaded.answer.text != expected.answer.text:
        _conclude(result, "FAIL")
        result.fail(*_difference(loaded.answer.text, expected.answer.text, reference), code="mismatch")
    else:
        _conclude(result, "OK")
    return result


def _ask(asked: Asked, salt: str, cache: CacheReader, trusts_server: bool) -> Pass:
    url, timeout = asked.client.url, asked.client.timeout
    engine_before, cache_before = read_engine(url, timeout), cache.read()
    answer = asked.send(cache_salt=salt)
    origins = settled_origins(engine_before, lambda: read_engine(url, timeout), num_answered=1)
    return Pass(answer, origins, settled_use(origins, lambda: cache_use(cache_before, cache.read())), trusts_server)


def _reset(asked: Asked) -> LMCacheError | None:
    """Empty the engine's own prefix cache; return why that did not work. An engine that has none needs no emptying."""
    try:
        reset_prefix_cache(asked.client.url, asked.client.timeout)
    except UnreachableError:
        raise
    except LMCacheError as exc:
        return exc
    return None


def _doubt(cold: Pass, loaded: Pass, not_reset: LMCacheError | None) -> InconclusiveError | None:
    """Return why the answers, equal or not, prove nothing."""
    if isinstance(loaded.retrieved, Unknown):
        hint = "pass --kvcache-url with the address of the cache server that the engine uses"
        return InconclusiveError(f"it is not known whether anything was retrieved: {loaded.retrieved.because}", hint)
    if cold.from_own_cache or (isinstance(cold.retrieved, int) and cold.retrieved):
        hint = "the engine must know cache_salt, and nobody else may use it meanwhile"
        return InconclusiveError("the first answer was not cold: part of the prompt came from a cache", hint)
    if not loaded.retrieved:
        if not_reset is not None and loaded.from_own_cache:
            return InconclusiveError(f"the engine's own prefix cache answered: {not_reset.message}", not_reset.hint)
        hint = "is the prompt longer than a chunk, and does the engine use this cache server? see 'lmcache describe kvcache'"
        return InconclusiveError("nothing was retrieved from the cache server", hint)
    if not loaded.answer.text:
        return InconclusiveError("the answer is empty", "pass --ignore-eos, or another prompt")
    return None


def _difference(found: str, expected: str, reference: str) -> tuple[str, str]:
    """Return the message and the hint for answers that differ."""
    position = next((i for i, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other), -1)
    position = min(len(found), len(expected)) if position < 0 else position
    message = f"with KV from the cache the answer differs from that of {reference} at character {position + 1}"
    if reference == OWN_CACHE:
        return message, "the engine was given wrong KV: please report it, with 'lmcache describe kvcache --format json'"
    return message, (
        "sums in another order may differ, too: to compare with the engine's own prefix cache, "
        "start vLLM with prefix caching and VLLM_SERVER_DEV_MODE=1"
    )


# -- report ----------------------------------------------------------------------------------------


def _result(asked: Asked, cold: Pass, loaded: Pass, expected: Pass, reference: str) -> Result:
    result = Result("Query Engine Result (verify)", width=41)
    add_counts(result, asked.counts, loaded.answer)
    for title, key, one in (("Cold", "cold", cold), ("Loaded", "loaded", loaded)):
        result.section(title, key=key)
        add_latency(result, one.answer)
        result.put("text", one.answer.text)
        if isinstance(one.retrieved, Unknown):
            result.unknown("Retrieved tokens", one.retrieved.because, key="retrieved_tokens")
        else:
            result.row("Retrieved tokens", one.retrieved, key="retrieved_tokens")
    result.section("Answers")
    is_same = loaded.answer.text == expected.answer.text
    result.row("Compared with", reference, key="compared_with")
    result.put("expected_text", expected.answer.text)
    result.row("Text", is_same, key="is_same", text="the same" if is_same else "not the same")
    result.put("retrieved_tokens", loaded.retrieved if isinstance(loaded.retrieved, int) else None)
    result.put("model", asked.question.model)
    result.put("url", asked.client.url.text)
    return result


def _conclude(result: Result, verdict: str) -> None:
    result.row("Verified", verdict, key="verdict")
