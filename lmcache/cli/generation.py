"""One prompt sent to an inference engine, its answer streamed and timed.

Comes in: an `HttpClient` for an engine and a `Question`. Goes out: a `Generation`: the text, what the engine counted, and when
tokens came, by the monotonic clock at the socket.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lmcache.cli.engine import MAX_COUNT
from lmcache.cli.http import MAX_BODY_BYTES, HttpClient, RefusedError, strict_json
from lmcache.errors import DeadlineError, LMCacheError, ProtocolError, RemoteError, UnreachableError

COMPLETIONS_PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"
DONE = b"[DONE]"
# Of an event of a stream the data is the answer; these fields and comments are not.
OTHER_FIELDS = (b":", b"event:", b"id:", b"retry:")
SHOWN_BYTES = 80
# How engines say that prompt and answer do not fit into the model's context.
TOO_LONG = (400, 413)
LENGTH_WORDS = "context|length|token"


@dataclass(frozen=True)
class Question:
    """What is asked of which model, and how."""

    model: str
    prompt: str
    max_tokens: int
    temperature: float = 0.0
    is_chat: bool = False
    ignore_eos: bool = False
    cache_salt: str = ""

    @property
    def path(self) -> str:
        """The route that answers it."""
        return CHAT_PATH if self.is_chat else COMPLETIONS_PATH

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as a conversation."""
        return [{"role": "user", "content": self.prompt}]

    def body(self) -> dict[str, Any]:
        """Return the request's document; what not every engine knows is only in it when asked for."""
        body: dict[str, Any] = {
            "model": self.model,
            **({"messages": self.messages} if self.is_chat else {"prompt": self.prompt}),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.cache_salt:
            body["cache_salt"] = self.cache_salt
        return body


@dataclass
class Generation:
    """An answer. `ttft_seconds` is from the request's sending to the first token, `latency_seconds` to the last.

    `text_seconds` is to the last piece that is not empty. The counts are the engine's own and None where it gave none: pieces
    of a stream are not tokens.
    """

    text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    ttft_seconds: float = 0.0
    latency_seconds: float = 0.0
    text_seconds: float = 0.0
    num_pieces: int = 0

    @property
    def no_tpot_because(self) -> str:
        """Why there is no time per output token; empty where there is."""
        if self.output_tokens is None:
            return "the stream gave no usage"
        if self.output_tokens < 2:
            return "one output token" if self.output_tokens else "no output token"
        # An empty last piece may tell nothing but the end.
        has_end_alone = self.text_seconds <= self.ttft_seconds and self.output_tokens > self.num_pieces
        return "the answer came in one piece" if has_end_alone or self.latency_seconds <= self.ttft_seconds else ""

    @property
    def tpot_seconds(self) -> float | None:
        """Time per output token after the first; None where that is no number."""
        if self.output_tokens is None or self.no_tpot_because:
            return None
        return (self.latency_seconds - self.ttft_seconds) / (self.output_tokens - 1)

    @property
    def tokens_per_second(self) -> float | None:
        """Output tokens of each second, the wait for the first included."""
        if self.output_tokens is None or self.latency_seconds <= 0:
            return None
        return self.output_tokens / self.latency_seconds


def generate(client: HttpClient, question: Question, patience: float, max_context: int | None = None) -> Generation:
    """Return the engine's answer; the first token, and each after another, may take `patience` seconds.

    Raises: RemoteError with the engine's words when it refuses; DeadlineError; UnreachableError when it goes away meanwhile;
        ProtocolError when what comes is no stream of tokens.
    """
    answer = Generation()
    try:
        for event, seconds in _events(client, question, patience, answer):
            _add(answer, event, seconds)
    except DeadlineError as exc:
        hint = "see the engine's log, or raise --timeout"
        raise DeadlineError(f"no token from {client.url} within {patience:g} s, {_so_far(answer)}", hint) from exc
    except UnreachableError as exc:
        if exc.code != "connection_lost":
            raise
        message = f"{client.url} ended the connection within its answer, {_so_far(answer)}"
        raise UnreachableError(message, "see the engine's log", exc.code) from exc
    except RefusedError as exc:
        if not exc.hint and max_context and exc.status in TOO_LONG and re.search(LENGTH_WORDS, exc.message, re.IGNORECASE):
            exc.hint = f"the model's context is {max_context} tokens, prompt and answer together; see also --max-tokens"
        raise
    if not answer.num_pieces or answer.finish_reason is None:
        raise ProtocolError(
            f"the answer of {client.url} ended without finish_reason, {_so_far(answer)}", "see the engine's log"
        )
    return answer


def _so_far(answer: Generation) -> str:
    return f"after {answer.num_pieces} pieces of the answer"


def _events(
    client: HttpClient, question: Question, patience: float, answer: Generation
) -> Iterator[tuple[dict[str, Any], float]]:
    """Yield the stream's documents with the seconds since the request was sent.

    Raises: also DeadlineError when lines come and `answer` does not grow.
    """
    lines = client.lines(question.path, question.body(), patience)
    _, sent_at = next(lines)
    last_at, length = sent_at, 0
    for line, arrived_at in lines:
        length += len(line)
        if length > MAX_BODY_BYTES:
            raise ProtocolError(f"the answer of {client.url} has more than {MAX_BODY_BYTES} bytes", "lower --max-tokens")
        data = _data(client, line.strip())
        if data == DONE:
            return
        num_pieces = answer.num_pieces
        if data:
            yield _document(client, data), arrived_at - sent_at
        if answer.num_pieces > num_pieces:
            last_at = arrived_at
        elif arrived_at - last_at > patience:
            raise DeadlineError("nothing of the answer came")


def _data(client: HttpClient, line: bytes) -> bytes:
    """Return what a line of the stream carries; nothing for what is none of the answer."""
    if line.startswith(b"data:"):
        return line[len(b"data:") :].strip()
    if not line or line.startswith(OTHER_FIELDS):
        return b""
    raise _no_stream(client, line)


def _document(client: HttpClient, data: bytes) -> dict[str, Any]:
    try:
        document = strict_json(data)
    except (ValueError, RecursionError) as exc:
        raise _no_stream(client, data) from exc
    if not isinstance(document, dict):
        raise _no_stream(client, data)
    return document


def _no_stream(client: HttpClient, found: bytes) -> ProtocolError:
    shown = ascii(found[:SHOWN_BYTES].decode(errors="replace"))[1:-1]
    return ProtocolError(
        f"{client.url} did not answer with a stream of tokens: {shown}", "check the address; see the engine's log"
    )


def _add(answer: Generation, event: dict[str, Any], seconds: float) -> None:
    """Take over what one document says.

    Raises: LMCacheError when it says that the engine failed.
    """
    if event.get("error") is not None:
        raise _failure(event["error"])
    usage = event.get("usage")
    if isinstance(usage, dict):
        answer.prompt_tokens = _count(usage.get("prompt_tokens"), answer.prompt_tokens)
        answer.output_tokens = _count(usage.get("completion_tokens"), answer.output_tokens)
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return
    reason = choices[0].get("finish_reason")
    text = _text(choices[0])
    answer.finish_reason = reason if isinstance(reason, str) else answer.finish_reason
    if text is None:
        return
    if not answer.num_pieces:
        answer.ttft_seconds = seconds
    answer.num_pieces += 1
    answer.latency_seconds = seconds
    if text:
        answer.text_seconds = seconds
    answer.text += text


def _text(choice: dict[str, Any]) -> str | None:
    """Return a choice's piece of the answer; None for one that only opens the turn in a chat."""
    if "delta" not in choice:
        return str(choice.get("text") or "")
    delta = choice["delta"] if isinstance(choice["delta"], dict) else {}
    pieces = [delta[name] for name in ("reasoning_content", "reasoning", "content") if isinstance(delta.get(name), str)]
    is_opening = "role" in delta and not any(pieces) and choice.get("finish_reason") is None
    return None if is_opening else "".join(pieces)


def _count(found: Any, known: int | None) -> int | None:
    return found if type(found) is int and 0 <= found <= MAX_COUNT else known


def _failure(error: Any) -> LMCacheError:
    told = error.get("message") if isinstance(error, dict) else error
    return RemoteError(f"the engine failed while it answered: {told}", "see the engine's log", "engine_failed")
