"""From what a user types to chunk keys: prompt or token file -> token ids -> keys of a model.

Comes in: `--prompt`, `--tokens`, `--model` and their companions. Goes out: a `TokenizedPrompt`, the
registered model, and its keys. Next on the path: a LOOKUP or EVICT.
"""

from __future__ import annotations

import contextlib
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lmcache.cli.base import Url, http_url
from lmcache.cli.corpora import Prompt, expand_prompt
from lmcache.cli.status import ModelView
from lmcache.errors import LMCacheError, UsageError
from lmcache.keys import chunk_keys
from lmcache.numerals import plain_number
from lmcache.protocol import MAX_CHUNKS
from lmcache.weights import adapter_digest, adapter_label

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lmcache.cli.http import HttpClient

MAX_TOKEN_ID = 2**32 - 1
BYTE_ORDER_MARK = "\ufeff"  # editors on Windows begin a file with it
TOKENIZER_HINT = "name a local folder with --tokenizer, or ask an engine with --tokenize-with URL"

Encode = Callable[[str], list[int]]


class TokenizedPrompt:
    """Token ids, and how many of them each corpus of the prompt is; the rest is the query."""

    def __init__(self, token_ids: list[int], corpora: dict[str, int]) -> None:
        self.token_ids = token_ids
        self.corpora = corpora

    @property
    def query_tokens(self) -> int:
        """How many tokens are no corpus."""
        return len(self.token_ids) - sum(self.corpora.values())


def has_prompt(args: Namespace) -> bool:
    """Tell whether the command line says which tokens are meant."""
    return args.prompt is not None or args.tokens is not None


def check_prompt_options(args: Namespace) -> None:
    """Return if exactly one of `--prompt` and `--tokens` was given.

    Raises: UsageError
    """
    if (args.prompt is None) == (args.tokens is None):
        raise UsageError("give one of --prompt and --tokens", f"see '{args.parser.prog} --help'; --tokens FILE takes token ids")


def read_prompt(args: Namespace, model: ModelView) -> TokenizedPrompt:
    """Return the tokens that `--prompt` or `--tokens` means.

    Raises: UsageError, LMCacheError when there is no tokenizer, UnreachableError.
    """
    if args.tokens is not None:
        return TokenizedPrompt(read_token_file(args.tokens), {})
    prompt = expand_prompt(args.prompt, dict(args.corpus or ()))
    if args.tokenize_with is not None:
        return tokenize_with_engine(prompt, http_url(args.tokenize_with), model, args.timeout)
    return tokenize(prompt, load_tokenizer(args.tokenizer or args.model or model.namespace.model))


def tokenize(prompt: Prompt, encode: Encode) -> TokenizedPrompt:
    """Return the prompt's tokens. A corpus has those that the prompt grows by where it stands."""
    token_ids = encode(prompt.text)
    corpora: dict[str, int] = {}
    for span in prompt.spans:
        grown = len(encode(prompt.text[: span.end])) - len(encode(prompt.text[: span.start]))
        corpora[span.name] = corpora.get(span.name, 0) + grown
    return TokenizedPrompt(token_ids, corpora)


def tokenize_with_engine(prompt: Prompt, url: Url, model: ModelView, timeout: float) -> TokenizedPrompt:
    """Return the prompt's tokens as a running engine's `/tokenize` gives them.

    Raises: UnreachableError; LMCacheError when the engine does not tokenize, or not for this model.
    """
    from lmcache.cli.engine import Unknown, find_tokenize
    from lmcache.cli.http import ENGINE, HttpClient, wrong_peer

    with HttpClient(url, timeout, ENGINE) as client:
        name = served_name(client, model.namespace.model)
        path = find_tokenize(client, name)
        if isinstance(path, Unknown):
            raise wrong_peer(url, path.because.replace("the engine", "it"), ENGINE)
        return tokenize(prompt, engine_encoder(client, path, model=name))


def engine_encoder(client: HttpClient, path: str, **fields: Any) -> Encode:
    """Return an encoder that asks the engine; `fields` go into each request.

    It raises: UnreachableError, LMCacheError.
    """

    def encode(text: str) -> list[int]:
        answer = client.request("POST", path, json={**fields, "prompt": text})
        return check_token_ids(answer.get("tokens"), f"{client.url}{path}", may_be_empty=not text)

    return encode


def served_name(client: HttpClient, registered: str) -> str:
    """Return what the engine calls the model that is registered at the cache server by the name of its weights.

    Raises: UnreachableError; LMCacheError when it serves another: that would cut prompts otherwise.
    """
    from lmcache.cli.engine import ServedModel, Unknown, served_models

    models = served_models(client)
    if isinstance(models, Unknown):
        return registered
    tests: Sequence[Callable[[ServedModel], bool]] = (
        lambda served: registered in (served.root, served.id),
        lambda served: _last_component(registered) in (_last_component(served.root or ""), _last_component(served.id)),
    )
    for test in tests:
        for served in models:
            if test(served):
                return served.id
    listed = ", ".join(f"{served.id} ({served.root})" if served.root else served.id for served in models) or "nothing"
    raise LMCacheError(
        f"{client.url} serves {listed}; the model registered at the cache server is {registered!r}",
        "pass the address of an engine that serves it",
        "unknown_model",
    )


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Hide torch from transformers, which would import it whole and tokenizes as well without: 1.8 s instead of 6 (2 cores).

    It is hidden for good, so a process that has either already is left alone: it may want models.
    """
    if not sys.modules.keys().isdisjoint(("torch", "transformers")):
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def load_tokenizer(name: str) -> Encode:
    """Return the encoder of the tokenizer in a local folder or in the local model cache.

    Raises: LMCacheError. Nothing is downloaded: a command that answers in time cannot do that.
    """
    # Without an engine's libraries transformers warns that it can only tokenize: that is all we want.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with _without_torch():
            from transformers import AutoTokenizer
    except ImportError as exc:
        raise LMCacheError(
            "tokenizing needs the package transformers",
            "pip install 'lmcache[tokenizer]', or use --tokenize-with URL or --tokens FILE",
            "no_tokenizer",
        ) from exc
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as exc:  # the tokenizers library raises bare Exception for a file it cannot read
        reason = str(exc).strip().partition("\n")[0]
        raise LMCacheError(f"no tokenizer for {name!r}: {reason}", TOKENIZER_HINT, "no_tokenizer") from exc
    return lambda text: [int(token_id) for token_id in tokenizer.encode(text)]


def read_token_file(path: str) -> list[int]:
    """Return the ids in a file: a JSON list, or numbers with white space between; `-` is stdin.

    Raises: UsageError
    """
    import json

    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        text = text.removeprefix(BYTE_ORDER_MARK)
        found = json.loads(text) if text.lstrip().startswith("[") else _whole_numbers(text)
    except (OSError, ValueError, RecursionError) as exc:
        raise UsageError(
            f"cannot read token ids from {path!r}: {exc}",
            "expected a JSON list, or numbers with white space between",
            "tokens",
        ) from exc
    return check_token_ids(found, path)


def _whole_numbers(text: str) -> list[int]:
    return [plain_number(int, word) for word in text.split()]


def check_token_ids(found: object, source: str, may_be_empty: bool = False) -> list[int]:
    """Return `found` if it is a list of token ids.

    Raises: UsageError that names the first one that is none.
    """
    if not isinstance(found, list) or not (found or may_be_empty):
        raise UsageError(f"{source} has no list of token ids", "expected at least one id", "tokens")
    for position, token_id in enumerate(found):
        if type(token_id) is not int or not 0 <= token_id <= MAX_TOKEN_ID:
            raise UsageError(
                f"{source} has {token_id!r} at position {position}, which is no token id",
                f"expected whole numbers from 0 to {MAX_TOKEN_ID}",
                "tokens",
            )
    return found


# -- models ----------------------------------------------------------------------------------------


def select_model(models: Sequence[ModelView], wanted: str | None) -> ModelView:
    """Return the registered model: that of the exact name, else of the same last path component.

    Without a name there must be only one that has an engine. The number that stands before a model in the error's list
    also names it, since one name may be registered with several types or layouts.

    Raises: LMCacheError that lists the registered models when none or several fit.
    """
    found = _matching(models, wanted)
    if len(found) == 1:
        return found[0]
    listed = "; ".join(_one_line(model) for model in found or models)
    if not models:
        raise LMCacheError(
            "no engine has registered a model at this server",
            "start the engine first: keys depend on its type, layout and ranks",
            "unknown_model",
        )
    if not found:
        raise LMCacheError(
            f"no registered model is {wanted!r}; registered: {listed}",
            "pass one of these as --model",
            "unknown_model",
        )
    raise LMCacheError(
        f"{len(found)} registered models fit: {listed}",
        "pass --model with the name, or the number before it",
        "ambiguous_model",
    )


def model_name(models: Sequence[ModelView], wanted: str) -> str:
    """Return the registered name that is meant, which may be that of several models.

    Raises: LMCacheError that lists the registered models when none or several names fit.
    """
    names = {model.namespace.model for model in _matching(models, wanted)}
    return names.pop() if len(names) == 1 else select_model(models, wanted).namespace.model


def _matching(models: Sequence[ModelView], wanted: str | None) -> list[ModelView]:
    if wanted is None:
        return _connected(list(models))
    tests: Sequence[Callable[[ModelView], bool]] = (
        lambda model: model.namespace.model == wanted,
        lambda model: str(model.namespace_id) == wanted,
        lambda model: _last_component(model.namespace.model) == _last_component(wanted),
    )
    return _connected(next(filter(None, ([m for m in models if test(m)] for test in tests)), []))


def _connected(models: list[ModelView]) -> list[ModelView]:
    """The server also knows models whose engines have gone; they count only where no engine is there."""
    return [model for model in models if model.live] or models


def _last_component(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def _one_line(model: ModelView) -> str:
    namespace = model.namespace
    parts = {
        "revision": namespace.revision,
        "dtype": namespace.dtype,
        "layout": namespace.layout,
        "world size": namespace.world_size,
    }
    details = ", ".join(f"{name} {value}" for name, value in parts.items() if value)
    return f"{model.namespace_id} {namespace.model} ({details})"


def keys_of(args: Namespace, model: ModelView, token_ids: list[int]) -> bytes:
    """Return the keys of the prompt's whole chunks, in the namespace of one request.

    Raises: UsageError for more chunks than one message holds, or an adapter that cannot be read.
    """
    namespace = model.namespace.for_request(lora=_label_of(args.lora), cache_salt=args.cache_salt or "")
    if len(token_ids) // namespace.chunk_size > MAX_CHUNKS:
        raise UsageError(
            f"the prompt has {len(token_ids)} tokens, more than {MAX_CHUNKS} chunks",
            f"pass at most {MAX_CHUNKS * namespace.chunk_size} tokens",
            "tokens",
        )
    return chunk_keys(namespace, token_ids)


def _label_of(adapter: tuple[str, str] | None) -> str:
    """Return what stands for a LoRA adapter (name, path) in keys.

    Raises: UsageError.
    """
    if adapter is None:
        return ""
    name, path = adapter
    try:
        return adapter_label(name, path, adapter_digest(Path(path).expanduser()))
    except OSError as exc:
        raise UsageError(f"the adapter {name} cannot be read: {exc}", "give its folder as vLLM was given it", "lora") from exc
