"""What the benchmarks with a real vLLM share: starting one on the CPU, and asking it with a stopwatch in hand."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.tiny_model import make_tiny_model  # noqa: E402
from tests.vllm_process import MODEL_NAME, VllmServer  # noqa: E402

PLACEHOLDERS = REPOSITORY / "tests" / "cuda_placeholders"
REQUEST_SECONDS = 300.0
START_SECONDS = 600.0


def make_prompt(seed: object, num_tokens: int) -> list[int]:
    """Return token ids that share no prefix with those of another seed."""
    generator = random.Random(str(seed))
    return [generator.randrange(10, 8000) for _ in range(num_tokens)]


def transfer_config(url: str, **more: str) -> dict[str, Any]:
    """Return what --kv-transfer-config says to use the cache server at `url`."""
    host, _, port = url.rpartition(":")
    return {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lmcache.mp.host": host, "lmcache.mp.port": int(port)},
        **more,
    }


def transfer_flags(url: str, **more: str) -> list[str]:
    """Return the flags that make vLLM use the cache server at `url`."""
    return ["--kv-transfer-config", json.dumps(transfer_config(url, **more))]


def python_path(*folders: Path) -> str:
    """Return a PYTHONPATH with these folders first."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass
class Answer:
    """One streamed completion; times are those of time.monotonic()."""

    sent_at: float
    first_token_at: float
    ended_at: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int

    @property
    def ttft_ms(self) -> float:
        """From before the request is sent until the first token is read."""
        return (self.first_token_at - self.sent_at) * 1e3


class Engine(VllmServer):
    """A vLLM that tells how many tokens of a prompt were cached."""

    def __init__(self, name: str, model_dir: Path, log_dir: Path, flags: list[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        super().__init__(model_dir, log_dir / f"{name}.log", ["--enable-prompt-tokens-details", *flags], env, START_SECONDS)

    def ask(
        self, prompt: list[int], max_tokens: int = 2, request_id: str = "", on_token: Callable[[], None] = lambda: None
    ) -> Answer:
        """Stream a completion. Connecting is not timed; vLLM closes a connection that was not used for 5 s."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=REQUEST_SECONDS)
        connection.connect()
        try:
            return stream(connection, prompt, max_tokens, request_id, on_token)
        finally:
            connection.close()

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its processes so far."""
        times = [member.cpu_times() for member in self.members()]
        return sum(t.user + t.system for t in times)


def stream(
    connection: http.client.HTTPConnection,
    prompt: list[int],
    max_tokens: int,
    request_id: str = "",
    on_token: Callable[[], None] = lambda: None,
) -> Answer:
    """Send a prompt and read the answer to its end; `on_token` is called for each piece of it."""
    body = json.dumps(
        {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    headers = {"Content-Type": "application/json", **({"X-Request-Id": request_id} if request_id else {})}
    sent_at = time.monotonic()
    connection.request("POST", "/v1/completions", body, headers)
    response = connection.getresponse()
    first_token_at = 0.0
    usage: dict[str, Any] = {}
    while line := response.readline():
        if line.startswith(b"data: {"):
            first_token_at = first_token_at or time.monotonic()
            piece = json.loads(line[6:])
            usage = piece.get("usage") or usage
            if piece.get("choices"):
                on_token()
    ended_at = time.monotonic()
    assert response.status == 200, response.status
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Answer(sent_at, first_token_at, ended_at, usage["prompt_tokens"], cached, usage["completion_tokens"])


def read_stamps(path: Path, answers: Mapping[str, Answer]) -> dict[str, dict[str, float]]:
    """Return what all processes noted of requests (see `connectors.py`), by the id that the client gave them."""
    merged: dict[str, dict[str, float]] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        noted_as = values.pop("request")
        for request_id, answer in answers.items():
            if request_id in noted_as:
                found = merged.setdefault(request_id, {"sent": answer.sent_at, "client_first_token": answer.first_token_at})
                found.update(values)
    return merged


def start_side_by_side(engines: Iterable[Engine], stack: ExitStack) -> None:
    """Start engines that are healthy on return, and end with `stack`; one that is told to end meanwhile waits for none."""
    engines = list(engines)
    for engine in engines:
        stack.callback(engine.close)
        engine.launch()
    for engine in engines:
        engine.wait_until_healthy()


def end_on_sigterm() -> None:
    """Make SIGTERM end this process as Ctrl-C does: with the engines that it has started. More of them change nothing then."""

    def end(number: int, frame: object) -> None:
        if not _is_exiting():  # the first one's exit is lost if it comes within a destructor
            sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _is_exiting() -> bool:
    """Whether this thread unwinds for an exit, or handles what failed meanwhile."""
    exc = sys.exc_info()[1]
    while exc and not isinstance(exc, SystemExit):
        exc = exc.__context__
    return exc is not None


def idle_load(engines: list[Engine], seconds: float = 2.0) -> float:
    """Return the share of one core that engines use while nobody asks them anything."""
    before = sum(engine.cpu_seconds() for engine in engines)
    time.sleep(seconds)
    return (sum(engine.cpu_seconds() for engine in engines) - before) / seconds


def load_average() -> float:
    """Return how many processes wanted to run in the last minute."""
    return round(os.getloadavg()[0], 2)


__all__ = [
    "PLACEHOLDERS",
    "Answer",
    "Engine",
    "end_on_sigterm",
    "idle_load",
    "load_average",
    "make_prompt",
    "make_tiny_model",
    "python_path",
    "read_stamps",
    "start_side_by_side",
    "stream",
    "transfer_config",
    "transfer_flags",
]
