"""The metrics: every series is there at 0 before anything has happened, and counting one touches no other."""

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lmcache.metrics import L2_FAILURE_REASONS, SPECS, TIER, Kind, Metrics, label_combinations
from lmcache.protocol import REQUESTS
from lmcache.storage.l2.base import Reason

UNITS = ("_bytes", "_seconds", "_chunks", "_tokens", "_ratio")


def series_of(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample as a scraper sees it, without the buckets of histograms."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(metrics.registry).decode()):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def expected_series(tiers: tuple[str, ...] = ()) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    expected = set()
    for spec in SPECS:
        names = [f"{spec.name}_{part}" for part in ("count", "sum")] if spec.kind is Kind.HISTOGRAM else [spec.exported_name]
        for values in label_combinations(spec, tiers):
            labels = tuple(sorted(zip(spec.labels, values, strict=True)))
            expected |= {(name, labels) for name in names}
    return expected


def test_all_series_exist_at_zero_from_the_start():
    """OBS-3."""
    series = series_of(Metrics())
    assert set(series) == expected_series()
    assert set(series.values()) == {0.0}


def test_each_tier_has_its_series_from_the_start():
    series = series_of(Metrics(["fs", "redis"]))
    assert set(series) == expected_series(("fs", "redis"))
    assert set(series.values()) == {0.0}


def test_every_reason_of_a_tiers_failure_is_a_label():
    assert set(L2_FAILURE_REASONS) == {reason.value for reason in Reason} | {"deadline"}


def test_a_failing_exporter_is_counted_and_raises_nothing(monkeypatch: pytest.MonkeyPatch):
    metrics = Metrics()
    for series in metrics._series.values():
        for method in ("inc", "set", "observe"):
            monkeypatch.setattr(series, method, lambda value: 1 / 0, raising=False)
    metrics.count("lmcache_dead_clients")
    metrics.set("lmcache_healthy", 1)
    metrics.observe("lmcache_request_duration_seconds", "NOOP", value=0.1)
    assert metrics.num_failures == 3
    assert metrics.value("lmcache_dead_clients") == 1


def test_names_are_unique_and_carry_the_prefix_and_a_help():
    names = [spec.name for spec in SPECS]
    assert len(set(names)) == len(names)
    for spec in SPECS:
        assert spec.name.startswith("lmcache_")
        assert not spec.name.endswith("_total")
        assert spec.help.endswith(".")
        if spec.kind is Kind.HISTOGRAM:
            assert spec.name.endswith("_seconds")


def test_every_operation_has_its_series():
    [requests] = [spec for spec in SPECS if spec.name == "lmcache_requests"]
    assert set(requests.labels["op"]) == {*REQUESTS, "invalid"}


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.kind is Kind.COUNTER], ids=lambda spec: spec.name)
def test_counting_one_series_counts_that_one_alone(spec):
    metrics = Metrics(["a", "b"])
    combinations = label_combinations(spec, ["a", "b"])
    for by, values in enumerate(combinations, 1):
        metrics.count(spec.name, *values, by=by)
        metrics.count(spec.name, *values, by=0)
    counted = {key: value for key, value in series_of(metrics).items() if value}
    assert counted == {
        (spec.exported_name, tuple(sorted(zip(spec.labels, values, strict=True)))): float(by)
        for by, values in enumerate(combinations, 1)
    }
    for by, values in enumerate(combinations, 1):
        assert metrics.value(spec.name, *values) == by


def test_a_series_that_is_not_declared_cannot_be_counted():
    metrics = Metrics()
    for wrong in (
        ("lmcache_typo",),
        ("lmcache_requests", "NOOP", "maybe"),
        ("lmcache_lookup_chunks",),
        ("lmcache_stored_chunks", "x"),
    ):
        with pytest.raises(KeyError):
            metrics.count(*wrong)
    assert set(series_of(metrics)) == expected_series()


def test_two_servers_in_one_process_count_apart():
    one, other = Metrics(), Metrics()
    one.count("lmcache_stored_chunks")
    assert (one.value("lmcache_stored_chunks"), other.value("lmcache_stored_chunks")) == (1, 0)
    assert sum(series_of(other).values()) == 0


def test_the_counters_of_the_status_view_are_those_of_metrics():
    metrics = Metrics()
    metrics.count("lmcache_lookup_chunks", "hit", by=3)
    metrics.count("lmcache_stored_bytes", by=10)
    counters = metrics.counters()
    plain = {
        spec.name.removeprefix("lmcache_")
        for spec in SPECS
        if spec.kind is Kind.COUNTER and len(spec.labels) < 2 and TIER not in spec.labels
    }
    assert set(counters) == plain
    assert counters["lookup_chunks"] == {"hit": 3, "miss": 0}
    assert counters["stored_bytes"] == 10
