"""What an inference engine says about itself over HTTP, whichever it is: vLLM, SGLang, or another with OpenAI's routes.

Comes in: an `HttpClient` for an engine. Goes out: its health, the models that it serves, its version and metrics. What it does
not tell is `Unknown`, with the reason; only silence and nonsense are errors.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

import msgspec

from lmcache.cli.base import Url, did_you_mean
from lmcache.cli.http import ENGINE, HttpAnswer, HttpClient, wrong_peer
from lmcache.errors import LMCacheError

MODELS_PATH = "/v1/models"
METRICS_PATH = "/metrics"
VERSION_PATHS = ("/version", "/get_server_info")  # vLLM's and SGLang's
TOKENIZE_PATHS = ("/tokenize", "/v1/tokenize")
RESET_PATH = "/reset_prefix_cache"
RESET_RETRY_SECONDS = 0.1
MAX_COUNT = 2**53  # above it a double holds not every whole number
ABSENT = (404, 405, 501)
_SAMPLE = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{.*\})?[ \t]+(\S+)", re.MULTILINE)


class Unknown:
    """A fact that cannot be known, and why."""

    __slots__ = ("because",)

    def __init__(self, because: str) -> None:
        self.because = because


class ServedModel(msgspec.Struct):
    """One model of `/v1/models`. `root` is where its weights are, `parent` what an adapter builds on."""

    id: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class _ModelList(msgspec.Struct):
    data: list[ServedModel]


def served_models(client: HttpClient) -> list[ServedModel] | Unknown:
    """Return the models that the engine serves, in its order.

    Raises: UnreachableError, LMCacheError.
    """
    answer = client.send("GET", MODELS_PATH)
    if answer.status in ABSENT:
        return Unknown(f"the engine has no {MODELS_PATH}")
    document = client.document(MODELS_PATH, answer)
    try:
        return msgspec.convert(document, _ModelList).data
    except msgspec.ValidationError as exc:
        raise wrong_peer(client.url, f"{MODELS_PATH} is not a list of models: {exc}", client.peer) from exc


def select_served(models: Sequence[ServedModel], wanted: str | None) -> ServedModel:
    """Return the model that is called `wanted`, or the only one that is no adapter.

    Raises: LMCacheError that lists the models.
    """
    listed = ", ".join(model.id for model in models) or "none"
    if wanted is not None:
        found = [model for model in models if model.id == wanted]
        if not found:
            hint = did_you_mean(wanted, [model.id for model in models]) or "pass one of these as --model"
            raise LMCacheError(f"the engine serves no model {wanted!r}; it serves: {listed}", hint, "unknown_model")
        return found[0]
    found = [model for model in models if model.parent is None] or list(models)
    if not found:
        raise LMCacheError("the engine serves no model", "see its log", "unknown_model")
    if len(found) > 1:
        raise LMCacheError(f"the engine serves several models: {listed}", "pass one of these as --model", "ambiguous_model")
    return found[0]


def engine_version(client: HttpClient) -> str | Unknown:
    """Return the engine's version.

    Raises: UnreachableError
    """
    for path in VERSION_PATHS:
        answer = client.send("GET", path)
        document = answer.document if answer.status == 200 else None
        if isinstance(document, dict) and isinstance(document.get("version"), str):
            return str(document["version"])
    return Unknown(f"the engine has no {VERSION_PATHS[0]}")


def read_metrics(client: HttpClient) -> dict[str, list[float]] | Unknown:
    """Return the values of each metric, one for each of its series.

    Raises: UnreachableError
    """
    answer = client.send("GET", METRICS_PATH)
    if answer.status in ABSENT:
        return Unknown(f"the engine has no {METRICS_PATH}")
    if answer.status != 200:
        return Unknown(f"the engine's {METRICS_PATH} answered HTTP {answer.status}")
    return parse_metrics(answer.body.decode(errors="replace"))


def parse_metrics(text: str) -> dict[str, list[float]]:
    """Return the values of each metric on a page in Prometheus's format; what is no number, or beyond counting, is left out."""
    found: dict[str, list[float]] = {}
    for name, text_of_value in _SAMPLE.findall(text):
        try:
            value = float(text_of_value)
        except ValueError:
            continue
        if abs(value) <= MAX_COUNT:
            found.setdefault(name, []).append(value)
    return found


# -- health ----------------------------------------------------------------------------------------

HEALTH_PATHS = ("/health", "/api/healthcheck")  # vLLM's and SGLang's; ours


def find_health(client: HttpClient) -> tuple[str, HttpAnswer] | Unknown:
    """Return the path of the engine's health page and what it says now.

    Raises: UnreachableError
    """
    for path in HEALTH_PATHS:
        answer = client.send("GET", path)
        if answer.status != 404:
            return path, answer
    return Unknown(f"it has neither {' nor '.join(HEALTH_PATHS)}")


def health_problems(client: HttpClient, path: str, answer: HttpAnswer) -> list[str]:
    """Return what a health page complains about; nothing when all is well.

    Raises: LMCacheError for an answer that is neither good nor bad news.
    """
    if 200 <= answer.status < 300:
        return []
    if answer.status < 500:
        raise client.refusal(path, answer)
    document = answer.document
    problems = document.get("problems") if isinstance(document, dict) else None
    if isinstance(problems, list) and problems:
        return [str(problem) for problem in problems]
    told = answer.error.get("message") or answer.error.get("detail")
    reason = f"{path} answered HTTP {answer.status}"
    return [f"{reason}: {told}" if told else reason]


# -- tokens ----------------------------------------------------------------------------------------


def find_tokenize(client: HttpClient, model: str) -> str | Unknown:
    """Return the path at which the engine tokenizes; one that refuses the model has one.

    Raises: UnreachableError
    """
    for path in TOKENIZE_PATHS:
        answer = client.send("POST", path, json={"model": model, "prompt": "a"})
        document = answer.document
        if answer.status not in ABSENT or (isinstance(document, dict) and document.get("error") is not None):
            return path
    return Unknown(f"the engine has no {TOKENIZE_PATHS[0]}")


# -- the engine's own prefix cache ---------------------------------------------------------------


def reset_prefix_cache(url: Url, timeout: float) -> None:
    """Empty the engine's own prefix cache.

    Raises: UnreachableError; LMCacheError when the engine offers no reset, or still holds blocks at the deadline.
    """
    deadline = time.monotonic() + timeout
    with HttpClient(url, timeout, ENGINE) as client:
        while True:
            answer = client.send("POST", RESET_PATH)
            if answer.status in ABSENT:
                raise LMCacheError(
                    f"{url} has no {RESET_PATH}", "start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment", "no_reset"
                )
            if answer.status != 200:
                raise client.refusal(RESET_PATH, answer)
            document = answer.document
            if not isinstance(document, dict) or document.get("success") is not False:
                return
            if time.monotonic() > deadline:
                raise LMCacheError(f"{url} did not reset its prefix cache: requests hold its blocks", code="no_reset")
            time.sleep(RESET_RETRY_SECONDS)
