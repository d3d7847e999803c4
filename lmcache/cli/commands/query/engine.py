"""`lmcache query engine`: one prompt, its answer timed, and what of it came from the cache.

Comes in: `--prompt` and its companions. Goes out: token counts, TTFT, TPOT, latency, and with `--kvcache-url` what the cache
server handed out meanwhile; with `--verify` a verdict (`verify.py`). Next: `lmcache/cli/generation.py` sends the request.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import replace
from typing import Any

from lmcache.cli.base import engine_url, positive_int
from lmcache.cli.corpora import Prompt, corpus_option, expand_prompt
from lmcache.cli.counters import CacheReader, CacheUse, cache_use
from lmcache.cli.engine import ServedModel, Unknown, find_tokenize, select_served, served_models
from lmcache.cli.generation import Generation, Question, generate
from lmcache.cli.http import ENGINE, HttpClient
from lmcache.cli.output import Result, format_bytes, report
from lmcache.cli.prompts import TokenizedPrompt, engine_encoder, tokenize
from lmcache.errors import LMCacheError, UnreachableError, UsageError
from lmcache.numerals import plain_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lmcache.cli.base import CommandParser

DEFAULT_MAX_TOKENS = 128
# A cold prompt of a hundred thousand tokens takes minutes on a slow engine, and until then it says nothing.
DEFAULT_PATIENCE_SECONDS = 300.0


def add_options(parser: CommandParser) -> None:
    """Add the options of `query engine`."""
    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", metavar="TEXT", help="the prompt; {name} stands for a corpus, '{{' for a brace")
    group.add_argument("--corpus", type=corpus_option, action="append", metavar="NAME=PATH", help="a corpus of your own")
    group.add_argument("--model", metavar="M", help="a model that the engine serves (default: the only one)")
    group.add_argument("--chat", action="store_true", help="send it as a chat message, to /v1/chat/completions")
    group.add_argument("--cache-salt", default="", metavar="SALT", help="share cached KV only with requests of this salt")
    group = parser.add_argument_group("answer")
    group.add_argument(
        "--max-tokens",
        type=positive_int,
        default=DEFAULT_MAX_TOKENS,
        metavar="N",
        help="at most so many (default: %(default)s)",
    )
    group.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="0 takes the likeliest token each time (default: 0)"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on to --max-tokens, where the engine knows how")
    group = parser.add_argument_group("KV cache")
    group.add_argument("--kvcache-url", metavar="URL", help="the cache server: show what it handed out for the request")
    group.add_argument(
        "--verify",
        action="store_true",
        help="ask cold, again, and with the KV loaded from the cache server; compare the answers. "
        "Exit code 1 when they differ, 4 when nothing was loaded",
    )


def temperature(text: str) -> float:
    """Parse a temperature, 0 to 2."""
    try:
        value = plain_number(float, text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2")
    return value


def query_engine(args: Namespace) -> int:
    """Send the prompt and report."""
    url = engine_url(args)
    prompt = read_prompt(args)
    cache = CacheReader(args.kvcache_url, args.timeout)
    if args.kvcache_url is not None:
        cache.check()
    with HttpClient(url, args.timeout, ENGINE) as client:
        model = find_model(client, args.model)
        question = question_of(args, model, prompt)
        counts = count_tokens(client, question, prompt)
        asked = Asked(client, question, counts, patience_of(args), model.max_model_len)
        if args.verify:
            from lmcache.cli.commands.query.verify import verify

            # An address that was not given may be of a server that this engine does not use.
            return report(verify(asked, cache, trusts_server=cache.is_given), args)
        return report(ask(asked, cache if args.kvcache_url is not None else None), args)


def patience_of(args: Namespace) -> float:
    """Return how long a token may take: `--timeout`, whose default is for answers that need no computing."""
    return float(args.timeout) if args.has_timeout else DEFAULT_PATIENCE_SECONDS


# -- before the request ----------------------------------------------------------------------------


def read_prompt(args: Namespace) -> Prompt:
    """Return the prompt in full.

    Raises: UsageError when there is none, or it goes with another option badly.
    """
    if not args.prompt:
        raise UsageError("--prompt is missing or empty", f"see '{args.parser.prog} --help'")
    if args.verify and args.cache_salt:
        raise UsageError("--verify uses a cache salt of its own", "leave --cache-salt out")
    if args.verify and args.temperature:
        raise UsageError("--verify compares answers, which vary with --temperature", "leave --temperature out")
    prompt = expand_prompt(args.prompt, dict(args.corpus or ()))
    if not prompt.text:
        raise UsageError("the prompt is empty", "its corpora are")
    return prompt


def find_model(client: HttpClient, wanted: str | None) -> ServedModel:
    """Return the model that will answer.

    Raises: UnreachableError; LMCacheError that lists the models when none or several fit.
    """
    models = served_models(client)
    if not isinstance(models, Unknown):
        return select_served(models, wanted)
    if wanted is None:
        raise LMCacheError(f"{models.because}, so the model is not known", "pass --model", "unknown_model")
    return ServedModel(wanted)


def question_of(args: Namespace, model: ServedModel, prompt: Prompt) -> Question:
    """Return what will be sent."""
    return Question(
        model=model.id,
        prompt=prompt.text,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        is_chat=args.chat,
        ignore_eos=args.ignore_eos,
        cache_salt=args.cache_salt,
    )


class TokenCounts:
    """How many tokens the prompt has, by its parts; `template` is what a chat puts around it, None without one."""

    def __init__(self, prompt: TokenizedPrompt, template: int | Unknown | None) -> None:
        self.total = template if isinstance(template, Unknown) else len(prompt.token_ids) + (template or 0)
        self.corpora = prompt.corpora
        self.query = prompt.query_tokens
        self.template = template


class UnknownCounts(Unknown):
    """Why the parts cannot be counted, and which they are."""

    def __init__(self, because: str, corpora: list[str]) -> None:
        super().__init__(because)
        self.corpora = corpora


def count_tokens(client: HttpClient, question: Question, prompt: Prompt) -> TokenCounts | UnknownCounts:
    """Return the counts by the engine's own tokenizer.

    Raises: UnreachableError
    """
    corpora = list(dict.fromkeys(span.name for span in prompt.spans))
    path = find_tokenize(client, question.model)
    if isinstance(path, Unknown):
        return UnknownCounts(path.because, corpora)
    fields = {"add_special_tokens": False} if question.is_chat else {}
    try:
        plain = tokenize(prompt, engine_encoder(client, path, model=question.model, **fields))
    except UnreachableError:
        raise
    except LMCacheError as exc:
        return UnknownCounts(exc.message, corpora)
    return TokenCounts(plain, count_template(client, path, question, len(plain.token_ids)) if question.is_chat else None)


def count_template(client: HttpClient, path: str, question: Question, plain_tokens: int) -> int | Unknown:
    """Return how many tokens the chat has besides those of the prompt.

    Raises: UnreachableError
    """
    try:
        whole = client.request("POST", path, json={"model": question.model, "messages": question.messages}).get("count")
    except UnreachableError:
        raise
    except LMCacheError as exc:
        return Unknown(exc.message)
    return whole - plain_tokens if type(whole) is int else Unknown(f"{client.url}{path} gave no count of a chat")


# -- the request -----------------------------------------------------------------------------------


class Asked:
    """A question on its way: to whom, and what is known of it already."""

    def __init__(
        self,
        client: HttpClient,
        question: Question,
        counts: TokenCounts | UnknownCounts,
        patience: float,
        max_context: int | None,
    ) -> None:
        self.client = client
        self.question = question
        self.counts = counts
        self._patience = patience
        self._max_context = max_context

    def send(self, cache_salt: str | None = None) -> Generation:
        """Return the engine's answer.

        Raises: RemoteError, UnreachableError, ProtocolError.
        """
        question = self.question if cache_salt is None else replace(self.question, cache_salt=cache_salt)
        return generate(self.client, question, self._patience, self._max_context)


def ask(asked: Asked, cache: CacheReader | None) -> Result:
    """Return the report on one request; with `cache`, on what the cache server did meanwhile, too.

    Raises: RemoteError, UnreachableError, ProtocolError.
    """
    before = cache.read() if cache else None
    answer = asked.send()
    result = Result("Query Engine Result", width=41)
    add_counts(result, asked.counts, answer)
    result.section("Latency Metrics")
    add_latency(result, answer)
    if cache is not None and before is not None:
        _add_use(result, cache_use(before, cache.read()))
    result.put("model", asked.question.model)
    result.put("text", answer.text)
    result.put("finish_reason", answer.finish_reason)
    result.put("url", asked.client.url.text)
    return result


# -- report ----------------------------------------------------------------------------------------


def add_counts(result: Result, counts: TokenCounts | UnknownCounts, answer: Generation) -> None:
    """Add how many tokens went in and came out."""
    result.put("usage_prompt_tokens", answer.prompt_tokens)
    total = counts if isinstance(counts, UnknownCounts) else counts.total
    if isinstance(total, Unknown):
        because = f"{total.because}, the stream gave no usage"
        _add_number(result, "Prompt tokens", "prompt_tokens", answer.prompt_tokens, because)
    else:
        result.row("Prompt tokens", total, key="prompt_tokens")
    if isinstance(counts, UnknownCounts):
        _add_unknown_parts(result, counts)
    else:
        _add_parts(result, counts)
    if not isinstance(total, Unknown) and answer.prompt_tokens not in (None, total):
        result.row("By its usage", answer.prompt_tokens, indent=2)
    _add_number(result, "Output tokens", "output_tokens", answer.output_tokens, "the stream gave no usage")


def _add_parts(result: Result, counts: TokenCounts) -> None:
    result.put("corpora_tokens", counts.corpora)
    for name, count in counts.corpora.items():
        result.row(f"Corpus {name!r}", count, indent=2)
    if counts.corpora or counts.template is not None:
        result.row("Query", counts.query, indent=2)
    result.put("query_tokens", counts.query)
    if isinstance(counts.template, Unknown):
        result.unknown("Chat template", counts.template.because, key="template_tokens", indent=2)
    elif counts.template is not None:
        result.row("Chat template", counts.template, key="template_tokens", indent=2)


def _add_unknown_parts(result: Result, counts: UnknownCounts) -> None:
    result.put("corpora_tokens", dict.fromkeys(counts.corpora))
    result.put("query_tokens", None)
    for name in counts.corpora:
        result.unknown(f"Corpus {name!r}", counts.because, indent=2)


def add_latency(result: Result, answer: Generation) -> None:
    """Add the times; those for each token need the engine's count."""
    tpot, rate = answer.tpot_seconds, answer.tokens_per_second
    _add_milliseconds(result, "TTFT (ms)", "ttft_ms", answer.ttft_seconds)
    if tpot is None:
        result.unknown("TPOT (ms/token)", answer.no_tpot_because, key="tpot_ms")
    else:
        _add_milliseconds(result, "TPOT (ms/token)", "tpot_ms", tpot)
    _add_milliseconds(result, "Total latency (ms)", "latency_ms", answer.latency_seconds)
    if rate is None:
        result.unknown("Throughput (tokens/s)", "the stream gave no usage", key="throughput_tokens_per_second")
    else:
        result.row("Throughput (tokens/s)", round(rate, 4), key="throughput_tokens_per_second", text=f"{rate:.1f}")


def _add_use(result: Result, use: CacheUse | Unknown) -> None:
    """The server counts for all its clients: with other requests in flight these are not only ours."""
    result.section("KV Cache")
    if isinstance(use, Unknown):
        result.unknown("Retrieved tokens", use.because, key="retrieved_tokens")
        return
    result.row("Retrieved tokens", use.retrieved_tokens, key="retrieved_tokens")
    result.row("Retrieved", use.read_bytes, key="retrieved_bytes", text=format_bytes(use.read_bytes))
    result.row("Stored", use.written_bytes, key="stored_bytes", text=format_bytes(use.written_bytes))


def _add_number(result: Result, label: str, key: str, value: Any, because: str) -> None:
    if value is None:
        result.unknown(label, because, key=key)
    else:
        result.row(label, value, key=key)


def _add_milliseconds(result: Result, label: str, key: str, seconds: float) -> None:
    result.row(label, round(seconds * 1000, 4), key=key, text=f"{seconds * 1000:.1f}")
