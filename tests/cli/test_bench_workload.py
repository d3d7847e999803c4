"""What `bench kvcache` stores and how its figures are made; no server takes part."""

import argparse
import itertools

import pytest

from lmcache.cli.commands.bench.kvcache import chunk_sizes, fill_ratio, operation_mix
from lmcache.cli.commands.bench.measure import (
    DEFAULT_WORKING_SET_BYTES,
    BenchSettings,
    bandwidth_figures,
    latencies,
    make_plans,
)
from lmcache.cli.commands.bench.messages import CopyTally, Tally
from lmcache.cli.commands.bench.rawcopy import RawCopy
from lmcache.cli.commands.bench.workload import (
    Content,
    KeptSet,
    OperationKind,
    PromptBuffer,
    Workload,
    first_difference,
    lane_item,
    lane_size,
    operations,
)
from lmcache.client.kvcache import checksum
from lmcache.errors import UsageError
from lmcache.keys import split_keys

WORKLOAD = Workload(salt="0" * 16, seed=7, chunk_bytes=3 * 4096 + 100, chunks_per_prompt=2)
PAGE = 4096
GIB = 1 << 30


def pages_of(chunk):
    return [bytes(chunk[at : at + PAGE]) for at in range(0, len(chunk), PAGE)]


def content_of(prompt, workload=WORKLOAD):
    content = Content(workload)
    content.become(workload.keys(prompt))
    return [bytes(chunk) for chunk in content.chunks]


# -- contents ---------------------------------------------------------------------------------------------------------


def test_every_page_of_every_chunk_is_different():
    pages = [page for prompt in range(20) for chunk in content_of(prompt) for page in pages_of(chunk)]
    assert len(pages) == 20 * 2 * 4
    assert len(set(pages)) == len(pages)


def test_content_is_decided_by_seed_and_key_alone():
    content = Content(WORKLOAD)
    content.become(WORKLOAD.keys(5))
    content.become(WORKLOAD.keys(3))
    assert [bytes(chunk) for chunk in content.chunks] == content_of(3)
    other_seed = Workload(salt="0" * 16, seed=8, chunk_bytes=WORKLOAD.chunk_bytes, chunks_per_prompt=2)
    assert content_of(3, other_seed) != content_of(3)


def test_checksums_are_those_of_the_content():
    content = Content(WORKLOAD)
    content.become(WORKLOAD.keys(3))
    assert content.checksums() == [checksum(chunk) for chunk in content_of(3)]


def test_two_runs_have_no_key_in_common():
    other = Workload(salt="1" * 16, seed=7, chunk_bytes=WORKLOAD.chunk_bytes, chunks_per_prompt=2)
    keys = [key for workload in (WORKLOAD, other) for prompt in range(50) for key in split_keys(workload.keys(prompt))]
    assert len(set(keys)) == len(keys) == 200


def test_a_blotted_buffer_is_wrong_in_every_page():
    workload = WORKLOAD
    buffer = PromptBuffer(workload, content_of(0)[0])
    buffer.blot()
    for chunk, right in zip(buffer.chunks, content_of(0), strict=True):
        assert all(is_now != was for is_now, was in zip(pages_of(chunk), pages_of(right), strict=True))


@pytest.mark.parametrize("at", [0, 1, 4095, 4096, 9999])
def test_the_first_difference_is_found(at):
    left, right = bytearray(10_000), bytearray(10_000)
    right[at:] = b"\1" * (10_000 - at)
    assert first_difference(memoryview(left), memoryview(right)) == at
    assert first_difference(memoryview(left), memoryview(left)) is None


# -- who does what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "lanes"), [(1, 1), (10, 3), (3, 3), (7, 2)])
def test_lanes_share_everything_and_nothing_twice(total, lanes):
    dealt = [lane_item(n, lane, lanes) for lane in range(lanes) for n in range(lane_size(total, lane, lanes))]
    assert sorted(dealt) == list(range(total))


def test_the_order_of_operations_is_decided_by_the_seed():
    mix = {OperationKind.STORE: 1.0, OperationKind.RETRIEVE: 3.0, OperationKind.LOOKUP: 0.0}

    def first(seed, lane):
        return list(itertools.islice(operations(mix, seed, lane), 1000))

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(2, 0)
    assert first(1, 0) != first(1, 1)
    assert OperationKind.LOOKUP not in first(1, 0)
    assert 150 < first(1, 0).count(OperationKind.STORE) < 350


# -- plans ------------------------------------------------------------------------------------------------------------


def l1(capacity_bytes=8 * GIB, free_bytes=8 * GIB, max_chunks=1 << 20):
    return {"capacity_bytes": capacity_bytes, "free_bytes": free_bytes, "max_chunks": max_chunks}


def test_the_default_working_set_takes_at_most_half_of_what_is_free():
    for free_bytes in (8 * GIB, GIB, 64 << 20):
        plan = make_plans("tcp://127.0.0.1:1", BenchSettings(), l1(free_bytes=free_bytes))[0]
        taken = plan.num_prompts * plan.workload.prompt_bytes
        assert 0 < taken <= min(DEFAULT_WORKING_SET_BYTES, free_bytes // 2)


def test_the_fill_is_a_share_of_the_capacity():
    plan = make_plans("tcp://127.0.0.1:1", BenchSettings(fill_ratio=1.5), l1(capacity_bytes=GIB))[0]
    assert plan.num_fill_prompts * plan.workload.prompt_bytes == 3 * GIB // 2


def test_operations_are_shared_among_the_workers():
    plans = make_plans("tcp://127.0.0.1:1", BenchSettings(max_operations=100, concurrency=3), l1())
    assert sum(plan.max_operations for plan in plans) == 100


def test_each_run_has_a_name_of_its_own():
    salts = {make_plans("tcp://127.0.0.1:1", BenchSettings(), l1())[0].workload.salt for _ in range(5)}
    assert len(salts) == 5


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        (BenchSettings(chunk_bytes=100), "chunk_bytes"),
        (BenchSettings(chunk_bytes=1 << 29), "chunk_bytes"),
        (BenchSettings(chunks_per_prompt=1 << 15, chunk_bytes=1024), "chunks_per_prompt"),
        (BenchSettings(chunk_bytes=64 << 20, concurrency=64), "too_large"),
        (BenchSettings(working_set_bytes=1 << 20), "working_set"),
        (BenchSettings(working_set_bytes=1 << 60), "working_set"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, code):
    with pytest.raises(UsageError) as caught:
        make_plans("tcp://127.0.0.1:1", settings, l1())
    assert caught.value.code == code


def test_a_kept_set_survives_its_text():
    kept = KeptSet(WORKLOAD, 12)
    assert KeptSet.parse(str(kept)) == kept


@pytest.mark.parametrize(
    "text", ["", "x", "0" * 16, f"{'0' * 16}-1-0x8x4096", f"{'0' * 16}-1-9999999999x8x4096", f"{'g' * 16}-1-1x1x1024"]
)
def test_what_is_no_kept_set_is_refused(text):
    with pytest.raises(UsageError):
        KeptSet.parse(text)


# -- flags ------------------------------------------------------------------------------------------------------------


def test_flags_are_read():
    assert chunk_sizes("64KiB,1MiB") == [65536, 1 << 20]
    assert fill_ratio("150%") == fill_ratio("1.5") == 1.5
    assert operation_mix("store=1,lookup=2.5") == {OperationKind.STORE: 1.0, OperationKind.LOOKUP: 2.5}


# -- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ["1_0", "٣", "x"])
def test_numbers_are_plain_ones(number):
    for parse, text in ((fill_ratio, number), (fill_ratio, f"{number}%"), (operation_mix, f"store={number}")):
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


def test_percentiles_interpolate_as_numpy_does():
    numpy = pytest.importorskip("numpy")
    values = sorted(numpy.random.default_rng(1).exponential(size=1234).tolist())
    found = latencies(values)
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99), ("p99_9", 99.9), ("max", 100)):
        assert found[name] == pytest.approx(float(numpy.percentile(values, percent)))


def test_no_operation_has_no_latency():
    assert latencies([]) is None


def test_bandwidth_is_bytes_by_the_time_of_the_operations():
    tallies = [Tally(seconds=[0.5, 0.5], num_bytes=2 * 10**9), Tally(seconds=[1.0], num_bytes=3 * 10**9)]
    copies = [CopyTally(num_bytes=10**10, seconds=1.0), CopyTally(num_bytes=10**10, seconds=1.0)]
    figures = bandwidth_figures(tallies, copies)
    assert figures.gb_per_second == pytest.approx(5.0)
    assert figures.raw_copy_gb_per_second == pytest.approx(20.0)
    assert figures.share_of_raw_copy == pytest.approx(0.25)
    assert not figures.is_suspect


def test_faster_than_a_raw_copy_is_suspect():
    figures = bandwidth_figures([Tally(seconds=[1.0], num_bytes=103)], [CopyTally(num_bytes=100, seconds=1.0)])
    assert figures.is_suspect
    figures = bandwidth_figures([Tally(seconds=[1.0], num_bytes=101)], [CopyTally(num_bytes=100, seconds=1.0)])
    assert not figures.is_suspect


def test_unknown_bandwidth_is_none_with_a_reason():
    figures = bandwidth_figures([Tally()], [CopyTally()])
    assert figures.gb_per_second is None
    assert figures.unknown_because


def test_the_raw_copy_moves_the_bytes():
    workload = WORKLOAD
    raw = RawCopy(workload.prompt_bytes, 0)
    content, landing = Content(workload), PromptBuffer(workload, bytes(workload.chunk_bytes))
    content.become(workload.keys(1))
    assert raw.write(content.chunks) > 0
    assert raw.read(landing.chunks) > 0
    raw.close()
    assert [bytes(chunk) for chunk in landing.chunks] == content_of(1)
