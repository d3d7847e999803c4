"""Every metric that the server exports: name, kind, labels with all their values, help. `docs/metrics.md` is made from it.

Each series exists from the start, at 0: the values of every label are fixed here. Units are in the names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import TYPE_CHECKING

import msgspec

from lmcache.log import RateLimitedLog, init_logger
from lmcache.protocol import REQUESTS, FailureReason

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Kind(str, Enum):
    """Prometheus's kinds of metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class MetricSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One metric. `labels` maps a label to all values it can have."""

    name: str
    kind: Kind
    help: str
    labels: dict[str, tuple[str, ...]] = {}

    @property
    def exported_name(self) -> str:
        """The name on `/metrics`; Prometheus's client adds `_total` to counters."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name


OPS = (*REQUESTS, "invalid")
FAILURE_REASONS = tuple(reason.value for reason in FailureReason)
# Has the server's tiers as values, known when `Metrics` is made; without L2 there is no series.
TIER = "tier"
L2_OPERATIONS = ("find", "read", "write", "probe", "usage", "touch", "delete", "clear")
L2_FAILURE_REASONS = (
    "unreachable",
    "timeout",
    "full",
    "denied",
    "read_only",
    "corrupt",
    "format",
    "error",
    "deadline",
)
# Requests take from some µs (NOOP) to tens of ms (an inline PUT of 32 MiB).
DURATION_BUCKETS = (20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 50e-3, 0.2, 1.0)


def _counter(name: str, help_: str, **labels: tuple[str, ...]) -> MetricSpec:
    return MetricSpec(name=name, kind=Kind.COUNTER, help=help_, labels=labels)


def _gauge(name: str, help_: str, **labels: tuple[str, ...]) -> MetricSpec:
    return MetricSpec(name=name, kind=Kind.GAUGE, help=help_, labels=labels)


def _l2_counter(name: str, help_: str, **labels: tuple[str, ...]) -> MetricSpec:
    return _counter(name, help_, **{TIER: (), **labels})


def _l2_gauge(name: str, help_: str, **labels: tuple[str, ...]) -> MetricSpec:
    return _gauge(name, help_, **{TIER: (), **labels})


SPECS: tuple[MetricSpec, ...] = (
    _counter(
        "lmcache_requests",
        "Requests answered, by operation and outcome.",
        op=OPS,
        outcome=("ok", "error"),
    ),
    MetricSpec(
        name="lmcache_request_duration_seconds",
        kind=Kind.HISTOGRAM,
        help="Time in the server from reading a request to handing over its reply, deferred waiting included.",
        labels={"op": OPS},
    ),
    _counter(
        "lmcache_replies_dropped",
        "Replies that could not be handed over because the peer was gone or does not read.",
    ),
    _counter(
        "lmcache_lookup_chunks",
        "Chunks that clients asked for by LOOKUP, found in L1 at once or not. A LOOKUP without a client does not count.",
        result=("hit", "miss"),
    ),
    _counter("lmcache_stored_chunks", "Chunks committed."),
    _counter("lmcache_stored_bytes", "Bytes of the chunks committed."),
    _counter(
        "lmcache_store_rejected_chunks",
        "Chunks of STORE or PUT that got no place: exists, being written by another client (busy), or no room (full).",
        reason=("exists", "busy", "full"),
    ),
    _counter(
        "lmcache_commit_rejected_chunks",
        "Chunks of COMMIT whose reservation was gone or another client's.",
    ),
    _counter(
        "lmcache_retrieved_chunks", "Chunks handed out for reading by RETRIEVE or GET, or read where LOOKUP said that they lie."
    ),
    _counter("lmcache_retrieved_bytes", "Bytes of the chunks handed out for reading."),
    _counter("lmcache_retrieved_tokens", "Tokens of the chunks handed out for reading to rank 0."),
    _counter(
        "lmcache_retrieve_missing_chunks",
        "Chunks asked for by RETRIEVE or GET that were not there: misses to the caller.",
    ),
    _counter(
        "lmcache_retrieve_failed",
        "Engine blocks that a load did not fill, so that the engine computed them; reported by engines.",
        reason=FAILURE_REASONS,
    ),
    _counter(
        "lmcache_lookup_failed",
        "Lookups that became misses because no answer came; reported by engines once they reach the server.",
        reason=FAILURE_REASONS,
    ),
    _counter(
        "lmcache_stored_decode_chunks",
        "Chunks committed that hold generated tokens (save_decode_cache); reported by engines.",
    ),
    _counter(
        "lmcache_unpinned_copied_bytes",
        "Bytes that GPUs copied from or to memory of L1 that was not pinned, or not yet: slower; reported by engines.",
    ),
    _counter(
        "lmcache_evicted_chunks",
        "Chunks removed: for room on demand, above the watermark, by EVICT (request) or by CLEAR.",
        reason=("demand", "watermark", "request", "clear"),
    ),
    _counter(
        "lmcache_evicted_bytes",
        "Bytes of the chunks removed.",
        reason=("demand", "watermark", "request", "clear"),
    ),
    _counter(
        "lmcache_aborted_reservations",
        "Reservations given back by ABORT, or taken back from a client that died.",
    ),
    _counter(
        "lmcache_expired_pins",
        "Pins released because their request held them longer than --pin-timeout-seconds.",
    ),
    _counter("lmcache_dead_clients", "Clients that went without GOODBYE: process gone, or lease run out."),
    _gauge("lmcache_l1_capacity_bytes", "Size of L1."),
    _gauge("lmcache_l1_resident_bytes", "Bytes of L1 that are resident, and so may be handed out."),
    _gauge(
        "lmcache_l1_used_bytes",
        "Bytes of L1 that hold committed or reserved chunks, in whole pages.",
    ),
    _gauge("lmcache_l1_reserved_bytes", "Bytes of L1 that are reserved and not committed."),
    _gauge("lmcache_l1_pinned_bytes", "Bytes of L1 that are pinned."),
    _gauge(
        "lmcache_unpinned_bytes",
        "Bytes of L1 that connected GPUs could not pin and so copy slower, added up over the GPUs.",
    ),
    _gauge("lmcache_l1_largest_free_bytes", "Longest run of free bytes in L1."),
    _gauge("lmcache_l1_chunks", "Committed chunks in L1."),
    _gauge("lmcache_pins", "Pins held, counted one by one."),
    _gauge("lmcache_sessions", "Requests that hold pins."),
    _gauge("lmcache_clients", "Clients whose lease holds."),
    _counter(
        "lmcache_l2_promoted_chunks", "Chunks that a LOOKUP missed in L1 and that were loaded from L2 in time for its answer."
    ),
    _counter(
        "lmcache_l2_unpromoted_chunks",
        "Chunks that a tier had and that were not loaded, one for each rank: no place in L1 (full), too much under way or being"
        " stored (busy), gone meanwhile (missing), not as stored (corrupt), the tier failed, the deadline passed or it was"
        " cancelled by a clear (deadline), or one before them was not loaded (unreachable).",
        reason=("full", "busy", "missing", "corrupt", "failed", "deadline", "unreachable"),
    ),
    _counter("lmcache_l2_lookups_past_deadline", "Lookups answered before the tiers had delivered, because their time was up."),
    _l2_counter(
        "lmcache_l2_lookup_chunks",
        "Chunks that L1 lacked and the tier was asked for, one for each rank.",
        result=("hit", "miss"),
    ),
    _l2_counter(
        "lmcache_l2_skipped_lookups",
        "Lookups that did not wait for the tier: its breaker is open (down), it is slower than --l2-min-tokens-per-second"
        " (slow), too many wait, or are stuck in it, already (busy), or what it has is being cleared.",
        reason=("down", "slow", "busy", "cleared"),
    ),
    _l2_counter("lmcache_l2_read_chunks", "Chunks read from the tier and found good."),
    _l2_counter("lmcache_l2_read_bytes", "Bytes of the chunks read."),
    _l2_counter("lmcache_l2_written_chunks", "Chunks written to the tier."),
    _l2_counter("lmcache_l2_written_bytes", "Bytes of the chunks written."),
    _l2_counter("lmcache_l2_existing_chunks", "Chunks that were to be written and that the tier had already."),
    _l2_counter(
        "lmcache_l2_dropped_chunks",
        "Chunks that never got to the tier: evicted from L1 before their turn, removed on request, failed, or left at the end.",
        reason=("evicted", "removed", "failed", "shutdown"),
    ),
    _l2_counter(
        "lmcache_l2_failures",
        "Calls of the tier that failed; `deadline`: nothing had come when a lookup's time was up.",
        operation=L2_OPERATIONS,
        reason=L2_FAILURE_REASONS,
    ),
    MetricSpec(
        name="lmcache_l2_duration_seconds",
        kind=Kind.HISTOGRAM,
        help="Time of one job in a thread of the tier: one round of questions, or a batch of chunks of at most 8 MiB.",
        labels={TIER: (), "operation": ("find", "read", "write")},
    ),
    _l2_gauge(
        "lmcache_l2_breaker_open",
        "1 while the tier is left alone after failures in a row, until a probe succeeds; where reads failed, a lookup's read.",
        direction=("read", "write"),
    ),
    _l2_gauge(
        "lmcache_l2_in_flight_bytes", "Bytes that threads are reading or writing, or will next.", direction=("read", "write")
    ),
    _l2_gauge("lmcache_l2_queued_chunks", "Chunks that wait to be written."),
    _l2_gauge("lmcache_l2_used_bytes", "Bytes that the tier says it holds; 0 where it cannot tell."),
    _l2_gauge("lmcache_l2_capacity_bytes", "Bytes that the tier says it can hold; 0 where it cannot tell."),
    _l2_gauge("lmcache_l2_read_bytes_per_second", "What recent lookups got of the tier, waiting included."),
    _gauge("lmcache_healthy", "1 when the server can do its work, else 0."),
    _gauge("lmcache_uptime_seconds", "Seconds since the server started."),
)


def label_combinations(spec: MetricSpec, tiers: Sequence[str] = ()) -> list[tuple[str, ...]]:
    """Return every tuple of label values of a metric, in the order of its labels."""
    combinations: list[tuple[str, ...]] = [()]
    for label, fixed in spec.labels.items():
        values = tiers if label == TIER else fixed
        combinations = [(*combination, value) for combination in combinations for value in values]
    return combinations


class Metrics:
    """One server's metrics. Written by its owner thread, read by whoever scrapes.

    The exporter's library failing costs a figure, and no request: `num_failures` counts it.

    Args:
        tiers: the names of the server's L2 tiers.
    """

    def __init__(self, tiers: Sequence[str] = ()) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series for each, which nobody reads
        self.registry: CollectorRegistry = CollectorRegistry()
        self.num_failures = 0
        self._log = RateLimitedLog(init_logger(__name__))
        self._series: dict[tuple[str, ...], Counter | Gauge | Histogram] = {}
        for spec in SPECS:
            names = list(spec.labels)
            metric: Counter | Gauge | Histogram
            if spec.kind is Kind.COUNTER:
                metric = Counter(spec.name, spec.help, names, registry=self.registry)
            elif spec.kind is Kind.GAUGE:
                metric = Gauge(spec.name, spec.help, names, registry=self.registry)
            else:
                metric = Histogram(spec.name, spec.help, names, registry=self.registry, buckets=DURATION_BUCKETS)
            for combination in label_combinations(spec, tiers):
                series = (spec.name, *combination)
                self._series[series] = metric.labels(*combination) if names else metric
        # Plain numbers beside the series, for STATUS: prometheus_client gives no way to read a counter back.
        self._counts: dict[tuple[str, ...], int] = {
            (spec.name, *combination): 0
            for spec in SPECS
            if spec.kind is Kind.COUNTER
            for combination in label_combinations(spec, tiers)
        }

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add to a counter."""
        if by:
            key = (name, *labels)
            self._counts[key] += by
            self._export(self._series[key].inc, by)  # type: ignore[union-attr]

    def value(self, name: str, *labels: str) -> int:
        """Return a counter."""
        series = (name, *labels)
        return self._counts[series]

    def matching(self, name: str, *labels: str) -> dict[tuple[str, ...], int]:
        """Return a counter's values for all combinations that begin with `labels`."""
        prefix = (name, *labels)
        return {key: value for key, value in self._counts.items() if key[: len(prefix)] == prefix}

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        series = (name, *labels)
        self._export(self._series[series].set, value)  # type: ignore[union-attr]

    def observe(self, name: str, *labels: str, value: float) -> None:
        """Add a sample to a histogram."""
        series = (name, *labels)
        self._export(self._series[series].observe, value)  # type: ignore[union-attr]

    def _export(self, method: Callable[[float], object], value: float) -> None:
        try:
            method(value)
        except Exception as exc:  # a figure is lost; what it was about goes on
            self.num_failures += 1
            self._log.warning("export", f"a metric could not be exported: {exc!r}")

    def counters(self) -> dict[str, object]:
        """Return every counter but those by operation or tier: a number, or a map by its one label's value."""
        by_tier = {spec.name for spec in SPECS if TIER in spec.labels}
        found: dict[str, object] = {}
        for key, value in self._counts.items():
            if key[0] in by_tier:
                continue
            name = key[0].removeprefix("lmcache_")
            if len(key) == 1:
                found[name] = value
            elif len(key) == 2:
                by_label = found.setdefault(name, {})
                assert isinstance(by_label, dict)
                by_label[key[1]] = value
        return found
