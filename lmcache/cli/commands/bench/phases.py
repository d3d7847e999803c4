"""What `bench engine` sends besides the benchmark's own requests: to learn what a token costs, and to compare answers.

Comes in: a `ServeBench` whose run has ended. Goes out: a `Calibration` and an `AnswerCheck`. Next: `section.py` reports them.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmcache.cli.base import Url
from lmcache.cli.commands.bench.serve import ServeBench, last_line
from lmcache.cli.counters import TokenOrigins, read_engine, token_origins
from lmcache.cli.engine import Unknown, reset_prefix_cache
from lmcache.errors import LMCacheError

# The cost of a token is measured on a whole prompt and on its first quarter, the best of a few tries each.
SHORT_SHARE = 4
MAX_TRIES = 3
ENOUGH_SECONDS = 2.0
MIN_TOKENS = 64
GREEDY = {"temperature": 0.0, "seed": 0}


# -- what a token costs -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """TTFT of a prompt and of its beginning, sent alone, with nothing of them cached."""

    long_tokens: int
    long_seconds: float
    short_tokens: int
    short_seconds: float

    @property
    def seconds_per_token(self) -> float:
        """What one more token of a prompt adds to the TTFT."""
        return (self.long_seconds - self.short_seconds) / (self.long_tokens - self.short_tokens)


async def calibrate(bench: ServeBench) -> Calibration | Unknown:
    """Measure what the computation of a prompt's tokens costs on this engine, by the prompt of median length."""
    if not bench.can_salt:
        return Unknown("only vLLM's text backends can be asked for a prompt that no cache knows")
    prompts = sorted((request for request in bench.requests if _is_text(request)), key=lambda request: len(request.prompt))
    if not prompts:
        return Unknown("the prompts are no plain text")
    whole = prompts[len(prompts) // 2]
    begin = replace(whole, prompt=whole.prompt[: len(whole.prompt) // SHORT_SHARE])
    measured: list[tuple[int, float]] = []
    for request in (whole, begin):
        best = await _cold_ttft(bench, replace(request, expected_output_len=1))
        if isinstance(best, Unknown):
            return best
        measured.append(best)
    found = Calibration(*measured[0], *measured[1])
    if found.long_tokens - found.short_tokens < MIN_TOKENS:
        return Unknown(f"the prompts are too short: {found.long_tokens} tokens")
    if found.seconds_per_token <= 0:
        return Unknown("longer prompts did not take longer")
    return found


def _is_text(request: Any) -> bool:
    is_ids = isinstance(request.prompt, list) and all(isinstance(token, int) for token in request.prompt)
    has_more = request.multi_modal_data or getattr(request, "chat_messages", None)
    return (isinstance(request.prompt, str) or is_ids) and not has_more


async def _cold_ttft(bench: ServeBench, request: Any) -> tuple[int, float] | Unknown:
    """Return a prompt's tokens and its best TTFT; each try has a salt of its own, which no cache knows."""
    seconds: list[float] = []
    tokens = 0
    while len(seconds) < MAX_TRIES and sum(seconds) < ENOUGH_SECONDS:
        result = await bench.again([request], extra_body=bench.extra_body(cache_salt=secrets.token_hex(8)))
        failure = _failure(result)
        if failure:
            return Unknown(f"a request for the estimate failed: {failure}")
        seconds.append(result["ttfts"][0])
        tokens = result["input_lens"][0]
    return tokens, min(seconds)


def _failure(result: Mapping[str, Any]) -> str:
    """Return what was wrong with the first request that was not answered."""
    for error, ttft in zip(result["errors"], result["ttfts"], strict=True):
        if error or not ttft:
            return last_line(error) or "no token came"
    return ""


# -- answers ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerCheck:
    """How many answers were the same with KV loaded from the cache server as with the engine's own."""

    num_prompts: int = 0
    num_same: int = 0
    loaded_tokens: int = 0
    inconclusive_because: str = ""

    @property
    def is_good(self) -> bool:
        """Whether no answer differed."""
        return self.num_same == self.num_prompts


class InconclusiveCheckError(Exception):
    """What the check was made for did not happen."""


class Verifier:
    """Compares answers from loaded KV with answers from the engine's own prefix cache.

    A sum of numbers depends on how it is split, so a prompt's KV and answer depend, in rare last digits, on which of its tokens
    are computed together. So both answers are made in the same two steps: first the prompt's whole chunks alone, then the
    rest on top of them, once with the engine's cache emptied in between. Nothing else differs but where the KV came from.

    Args:
        url: of the engine.
        chunk_size: the cache server's.
    """

    def __init__(self, bench: ServeBench, url: Url, timeout: float, chunk_size: int) -> None:
        self._bench = bench
        self._url = url
        self._timeout = timeout
        self._chunk_size = chunk_size

    async def check(self, num_prompts: int) -> AnswerCheck:
        """Ask some of the benchmark's prompts, one by one: the size of a batch, too, changes how sums are split."""
        num_same = num_loaded = 0
        try:
            prompts = self._prompts(num_prompts)
            for request in prompts:
                is_same, loaded = await self._compare(request)
                num_same += is_same
                num_loaded += loaded
        except InconclusiveCheckError as exc:
            return AnswerCheck(inconclusive_because=str(exc))
        return AnswerCheck(len(prompts), num_same, num_loaded)

    def _prompts(self, num_prompts: int) -> list[Any]:
        """Return requests with token ids, the only way to send exactly a prompt's whole chunks."""
        if not self._bench.can_salt or not self._bench.takes_token_ids:
            raise InconclusiveCheckError("it needs vLLM and --backend openai or vllm")
        found: dict[str, Any] = {}
        for request in self._bench.requests:
            token_ids = self._bench.token_ids(request.prompt) if _is_text(request) else None
            if token_ids is not None and self._whole_chunks(token_ids):
                found.setdefault(str(token_ids), replace(request, prompt=token_ids, prompt_len=len(token_ids)))
        if not found:
            raise InconclusiveCheckError(f"no prompt is longer than a chunk of {self._chunk_size} tokens")
        return list(found.values())[:num_prompts]

    def _whole_chunks(self, token_ids: Sequence[int]) -> int:
        """Return how many leading tokens can be loaded; one token at least is computed."""
        return (len(token_ids) - 1) // self._chunk_size * self._chunk_size

    async def _compare(self, request: Any) -> tuple[bool, int]:
        """Return whether both answers to one prompt are the same, and how many tokens were loaded for it."""
        loaded_text, origins = await self._second_step(request, is_own=False)
        own_text, own_origins = await self._second_step(request, is_own=True)
        if not origins.external:
            raise InconclusiveCheckError("no token was loaded from the cache server")
        if not own_text and not loaded_text:
            raise InconclusiveCheckError("both answers to a prompt are empty; pass --ignore-eos, or other prompts")
        # Where the split was another, equal answers are still equal; others say nothing.
        if own_text != loaded_text and own_origins.engine_cache != origins.external:
            raise InconclusiveCheckError(
                f"answers differ, and the engine's own prefix cache gave {own_origins.engine_cache} tokens where "
                f"{origins.external} were loaded: it is off, or too small"
            )
        return own_text == loaded_text, origins.external

    async def _second_step(self, request: Any, is_own: bool) -> tuple[str, TokenOrigins]:
        """Send the prompt's whole chunks and then all of it, under a salt of their own; return the answer to the latter."""
        salted = _salted(request)
        start = salted.prompt[: self._whole_chunks(salted.prompt)]
        await self._ask(replace(salted, prompt=start, prompt_len=len(start), expected_output_len=1))
        if not is_own:
            self._reset()
        before = read_engine(self._url, self._timeout)
        text = await self._ask(salted)
        origins = token_origins(before, read_engine(self._url, self._timeout))
        if isinstance(origins, Unknown):
            raise InconclusiveCheckError(origins.because)
        return text, origins

    def _reset(self) -> None:
        try:
            reset_prefix_cache(self._url, self._timeout)
        except LMCacheError as exc:
            raise InconclusiveCheckError(f"{exc.message}; {exc.hint}" if exc.hint else exc.message) from exc

    async def _ask(self, request: Any) -> str:
        result = await self._bench.again([request], extra_body=self._bench.extra_body(**GREEDY))
        failure = _failure(result)
        if failure:
            raise InconclusiveCheckError(f"a request for the check failed: {failure}")
        return str(result["generated_texts"][0])


def _salted(request: Any) -> Any:
    """Return the request with a salt of its own."""
    overrides: Mapping[str, Any] = getattr(request, "request_overrides", None) or {}
    return replace(request, request_overrides={**overrides, "cache_salt": secrets.token_hex(8)})
