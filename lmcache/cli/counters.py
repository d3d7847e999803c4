"""What the engine and the cache server counted between two moments: where prompt tokens came from, and what the cache moved.

Comes in: vLLM's `/metrics` and our server's status, each read before and after a run. Goes out: `TokenOrigins` and `CacheUse`,
differences of that run only, or `Unknown` with the reason. Next: `bench engine` and `query engine` make figures of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from lmcache.cli.base import DEFAULT_URL, URL_VARIABLE, Url, parse_url
from lmcache.cli.engine import MAX_COUNT, Unknown
from lmcache.cli.http import ENGINE, HttpClient
from lmcache.cli.status import fetch_status
from lmcache.errors import LMCacheError

TOKENS_METRIC = "vllm:prompt_tokens_by_source"
FINISHED_METRIC = "vllm:request_success"
STARTED_METRIC = "process_start_time_seconds"
ENGINE_CACHE, EXTERNAL, COMPUTED = "local_cache_hit", "external_kv_transfer", "local_compute"
SCHEDULER_KIND = "engine-scheduler"
# An engine counts an answer after it has sent it.
SETTLE_SECONDS = 1.0
SETTLE_STEP_SECONDS = 0.05
# It tells the server what it has loaded without waiting for it, with the next heartbeat at the latest, a second later.
CACHE_SETTLE_SECONDS = 2.0


# -- the engine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineCounters:
    """vLLM's counters at one moment, summed over its engines and models."""

    tokens_by_source: dict[str, float]
    finished_requests: float
    started_at: float


@dataclass(frozen=True)
class TokenOrigins:
    """Where the prompt tokens of a run came from: the engine's own prefix cache, the KV cache server, or computation."""

    engine_cache: int
    external: int
    computed: int
    finished_requests: int

    @property
    def total(self) -> int:
        """All prompt tokens."""
        return self.engine_cache + self.external + self.computed

    @property
    def cached_ratio(self) -> float:
        """The share that no engine computed in this run."""
        return 1 - self.computed / self.total if self.total else 0.0


def read_engine(url: Url, timeout: float) -> EngineCounters | Unknown:
    """Return the engine's counters, or why there are none."""
    try:
        with HttpClient(url, timeout, ENGINE) as client:
            answer = client.send("GET", "/metrics")
    except LMCacheError as exc:
        return Unknown(f"the engine's /metrics: {exc.message}")
    if answer.status != 200:
        return Unknown(f"the engine's /metrics answered HTTP {answer.status}")
    return parse_engine(answer.body.decode(errors="replace"))


def parse_engine(text: str) -> EngineCounters | Unknown:
    """Return the counters in a page of Prometheus metrics."""
    from prometheus_client.parser import text_string_to_metric_families

    tokens: dict[str, float] = {}
    finished = started_at = 0.0
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"{TOKENS_METRIC}_total":
                    source = sample.labels.get("source", "")
                    tokens[source] = tokens.get(source, 0.0) + _count(sample.name, sample.value)
                elif sample.name == f"{FINISHED_METRIC}_total":
                    finished += _count(sample.name, sample.value)
                elif sample.name == STARTED_METRIC:
                    started_at = sample.value
    except ValueError as exc:
        return Unknown(f"the engine's /metrics cannot be read: {exc}")
    if not {ENGINE_CACHE, EXTERNAL, COMPUTED} <= tokens.keys():
        return Unknown(f"the engine's /metrics has no {TOKENS_METRIC}")
    return EngineCounters(tokens, finished, started_at)


def _count(name: str, value: float) -> float:
    """Raises: ValueError for what nobody has counted."""
    if not 0 <= value <= MAX_COUNT:
        raise ValueError(f"{name} is no count")
    return value


def token_origins(before: EngineCounters | Unknown, after: EngineCounters | Unknown) -> TokenOrigins | Unknown:
    """Return what was counted between two readings."""
    for reading in (before, after):
        if isinstance(reading, Unknown):
            return reading
    assert isinstance(before, EngineCounters)
    assert isinstance(after, EngineCounters)
    grown = {source: after.tokens_by_source[source] - count for source, count in before.tokens_by_source.items()}
    if before.started_at != after.started_at or min(grown.values()) < 0:
        return Unknown("the engine was restarted during the run")
    return TokenOrigins(
        engine_cache=int(grown[ENGINE_CACHE]),
        external=int(grown[EXTERNAL]),
        computed=int(grown[COMPUTED]),
        finished_requests=int(after.finished_requests - before.finished_requests),
    )


def settled_origins(
    before: EngineCounters | Unknown, read: Callable[[], EngineCounters | Unknown], num_answered: int
) -> TokenOrigins | Unknown:
    """Return what was counted since `before`, once that has so many answers in it, or after a second."""
    give_up_at = time.monotonic() + SETTLE_SECONDS
    while True:
        origins = token_origins(before, read())
        is_settled = not isinstance(origins, TokenOrigins) or origins.finished_requests >= num_answered
        if is_settled or time.monotonic() > give_up_at:
            return origins
        time.sleep(SETTLE_STEP_SECONDS)


# -- the cache server ---------------------------------------------------------------------------------------------------


class LookupCounters(msgspec.Struct):
    """Chunks that lookups found or did not find."""

    hit: int = 0
    miss: int = 0


class CacheCounters(msgspec.Struct):
    """What of the server's counters is used here."""

    lookup_chunks: LookupCounters
    stored_bytes: int
    retrieved_bytes: int
    retrieved_tokens: int
    l2_promoted_chunks: int = 0


class ClientKind(msgspec.Struct):
    """What kind of client it is."""

    kind: str = ""


class CacheStatus(msgspec.Struct):
    """The server's status at one moment."""

    boot: str
    counters: CacheCounters
    chunk_size: int = 0
    version: str = ""
    config: dict[str, dict[str, Any]] = {}
    l2: list[dict[str, Any]] = []
    clients: list[ClientKind] = []

    @property
    def num_engines(self) -> int:
        """How many engines are connected."""
        return sum(client.kind == SCHEDULER_KIND for client in self.clients)


@dataclass(frozen=True)
class CacheUse:
    """What the server did in a run, for all its clients."""

    hit_chunks: int
    missed_chunks: int
    read_bytes: int
    written_bytes: int
    retrieved_tokens: int
    has_l2: bool
    num_engines: int
    promoted_chunks: int = 0
    chunk_size: int = 0


def settled_use(origins: TokenOrigins | Unknown, read: Callable[[], CacheUse | Unknown]) -> CacheUse | Unknown:
    """Return what the server counts, once it knows of all that the engine says it has loaded, or after two seconds."""
    loaded = origins.external if isinstance(origins, TokenOrigins) else 0
    give_up_at = time.monotonic() + CACHE_SETTLE_SECONDS
    while isinstance(use := read(), CacheUse) and use.retrieved_tokens < loaded and time.monotonic() < give_up_at:
        time.sleep(SETTLE_STEP_SECONDS)
    return use


class CacheReader:
    """Reads the server's status.

    Args:
        url: as given; without one it is LMCACHE_URL or the default address, where nobody need listen.
    """

    def __init__(self, url: str | None, timeout: float) -> None:
        given = url or os.environ.get(URL_VARIABLE)
        self.url = parse_url(given or DEFAULT_URL)
        self.is_given = bool(given)
        self._timeout = timeout

    def check(self) -> None:
        """Return if the address was not given, or a server answers there.

        Raises: UnreachableError, LMCacheError.
        """
        if self.is_given:
            fetch_status(self.url, self._timeout)

    def read(self) -> CacheStatus | Unknown:
        """Return the status, or why there is none."""
        try:
            document, _ = fetch_status(self.url, self._timeout)
            return msgspec.convert(document, CacheStatus)
        except LMCacheError as exc:
            return Unknown(exc.message if self.is_given else f"no cache server at {self.url}; pass --kvcache-url")
        except msgspec.ValidationError as exc:
            return Unknown(f"the status of {self.url} is not one that this version reads: {exc}")


def cache_use(before: CacheStatus | Unknown, after: CacheStatus | Unknown) -> CacheUse | Unknown:
    """Return what happened between two readings."""
    for reading in (before, after):
        if isinstance(reading, Unknown):
            return reading
    assert isinstance(before, CacheStatus)
    assert isinstance(after, CacheStatus)
    if before.boot != after.boot:
        return Unknown("the cache server was restarted during the run")
    then, now = before.counters, after.counters
    return CacheUse(
        hit_chunks=now.lookup_chunks.hit - then.lookup_chunks.hit,
        missed_chunks=now.lookup_chunks.miss - then.lookup_chunks.miss,
        read_bytes=now.retrieved_bytes - then.retrieved_bytes,
        written_bytes=now.stored_bytes - then.stored_bytes,
        retrieved_tokens=now.retrieved_tokens - then.retrieved_tokens,
        has_l2=bool(after.l2),
        num_engines=after.num_engines,
        promoted_chunks=now.l2_promoted_chunks - then.l2_promoted_chunks,
        chunk_size=after.chunk_size,
    )
