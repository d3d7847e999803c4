"""One completion request over a socket of its own, which the client may drop at any moment.

Comes in: a prompt. Goes out: the status, the tokens, and the log probabilities of each and of those that were nearly chosen.
"""

import http.client
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.vllm_process import MODEL_NAME

# Longer than a request takes on a busy machine; one that is not answered by then hangs.
HANG_SECONDS = 300.0


@dataclass
class Completion:
    """What came back, all of it or as much as the client waited for."""

    status: int = 0
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likely: list[dict[str, float]] = field(default_factory=list)
    is_whole: bool = False
    error: str = ""

    def add(self, choice: dict[str, Any]) -> None:
        """Append the tokens of a response or of one streamed event."""
        found = choice["logprobs"]
        if found is not None:
            self.tokens += found["tokens"]
            self.logprobs += found["token_logprobs"]
            self.likely += found["top_logprobs"]


def complete(
    port: int,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    streams: bool = False,
    is_enough: Callable[[Completion], bool] = lambda completion: False,
    patience_seconds: float = HANG_SECONDS,
    **extra: object,
) -> Completion:
    """Ask for the greedy continuation of `prompt`; drop the connection when `is_enough` or when patience ends.

    Raises: OSError, http.client.HTTPException when the server breaks the connection; TimeoutError after HANG_SECONDS.
    """
    body = {
        "model": MODEL_NAME,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "logprobs": 4,
        "return_tokens_as_token_ids": True,
        "stream": streams,
        **extra,
    }
    completion = Completion()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG_SECONDS)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if is_enough(completion):
            return completion
        assert connection.sock is not None
        connection.sock.settimeout(patience_seconds)
        try:
            _read(connection, completion, streams, is_enough)
        except TimeoutError:
            if patience_seconds >= HANG_SECONDS:
                raise
    finally:
        connection.close()
    return completion


def _read(
    connection: http.client.HTTPConnection, completion: Completion, streams: bool, is_enough: Callable[[Completion], bool]
) -> None:
    response = connection.getresponse()
    completion.status = response.status
    if response.status != 200:
        completion.error = response.read().decode(errors="replace")
    elif not streams:
        completion.add(json.loads(response.read())["choices"][0])
        completion.is_whole = True
    else:
        for event in _events(response):
            if "choices" not in event:  # vLLM says 200 before it knows of an error
                completion.status, completion.error = event.get("error", {}).get("code", 500), json.dumps(event)
                return
            completion.add(event["choices"][0])
            if is_enough(completion):
                return
        completion.is_whole = True


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    for line in response:
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data: "):
            yield json.loads(text.removeprefix("data: "))
    raise http.client.IncompleteRead(b"")
