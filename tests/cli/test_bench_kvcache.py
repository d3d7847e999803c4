"""`lmcache bench kvcache` as a user runs it, against a real server."""

import contextlib
import json
import signal
from pathlib import Path

import psutil
import pytest

from lmcache.cli.commands.bench import measure
from lmcache.cli.commands.bench.workload import KeptSet
from lmcache.cli.main import main
from lmcache.client.kvcache import KVCacheClient
from lmcache.client.mq import MessageQueueClient
from lmcache.pool import PoolView
from lmcache.protocol import Clear
from tests.chaos.waiting import wait_until
from tests.server_process import LmcacheServer, free_port, run_lmcache, running_lmcache

SMALL = ("--chunk-bytes", "64KiB", "--chunks-per-prompt", "4", "--warmup", "0")
SMALL_CHECK = SMALL[:-2]
WAIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def server():
    with LmcacheServer() as running:
        yield running


def bench(server, *flags, code=0):
    """Run it and return the JSON document, after a look at the exit code."""
    found = run_lmcache("bench", "kvcache", "--url", server.zmq_url, "--format", "json", "--timeout", "60", *flags)
    assert found.returncode == code, found.stderr + found.stdout
    assert "Traceback" not in found.stderr
    return json.loads(found.stdout)


def only_run(document):
    (run,) = document["runs"]
    return run


@contextlib.contextmanager
def running_bench(server, *flags):
    """A benchmark that has begun to read; it and its workers are gone afterwards."""
    before = server.status()["counters"]["retrieved_chunks"]
    workers = []
    try:
        with running_lmcache("bench", "kvcache", "--url", server.zmq_url, *SMALL, *flags) as process:
            wait_until(lambda: server.status()["counters"]["retrieved_chunks"] > before, "the benchmark reads")
            workers = psutil.Process(process.pid).children(recursive=True)
            yield process
    finally:
        wait_until(lambda: not any(worker.is_running() for worker in workers), "its workers are gone")


# -- a good run -------------------------------------------------------------------------------------------------------


def test_a_run_reports_every_figure_and_removes_what_it_stored(server):
    before = server.status()["l1"]["chunks"]
    document = bench(server, *SMALL, "--operations", "300", "--seed", "5")
    run = only_run(document)
    assert document["ok"] is True
    assert document["schema_version"] == 1
    completed = {name: figures["completed"] for name, figures in run["operations"].items()}
    assert sum(completed.values()) == 300
    for figures in run["operations"].values():
        latency = figures["latency_seconds"]
        assert figures["ops_per_second"] > 0
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["p99_9"] <= latency["max"]
    for name in ("l1_read", "l1_write"):
        assert run["bandwidth"][name]["gb_per_second"] > 0
        assert run["bandwidth"][name]["raw_copy_gb_per_second"] > 0
    assert run["hit_rate"]["l1"]["ratio"] == 1.0
    assert run["correctness"] == {"ok": 4 * completed["retrieve"], "bad": 0, "missing": 0, "bad_chunks": []}
    assert run["failures"]["by_code"] == {}
    assert run["settings"]["seed"] == 5
    assert run["versions"]["server"] == run["versions"]["client"]
    assert server.status()["l1"]["chunks"] == before
    assert server.status()["clients"] == []


def test_the_counts_are_of_this_run_only_and_agree_with_the_servers(server):
    for _ in range(2):
        run = only_run(bench(server, *SMALL, "--operations", "100"))
        for check in run["counter_checks"].values():
            assert check["workers"] == check["server"]
        assert run["counter_checks"]["stored_chunks"]["workers"] == 4 * run["operations"]["store"]["completed"]


def test_what_a_tier_that_is_not_there_would_do_is_unknown(server):
    run = only_run(bench(server, *SMALL, "--operations", "20"))
    assert run["hit_rate"]["l2"]["ratio"] is None
    assert run["hit_rate"]["l2"]["unknown_because"] == "the server has no L2 tier"
    for name in ("l2_read", "l2_write"):
        assert run["bandwidth"][name]["gb_per_second"] is None
        assert run["bandwidth"][name]["unknown_because"]


def test_the_box_has_every_section(server):
    found = run_lmcache("bench", "kvcache", "--url", server.zmq_url, *SMALL, "--duration", "0.5")
    assert found.returncode == 0
    assert found.stderr == ""
    for text in (
        " Bench KV Cache Result (0.5s) ",
        "-Operations (ops/s)-",
        "-Hit Rate-",
        "-Bandwidth (GB/s)-",
        "-Share of a raw copy-",
        "-Latency p50/p90/p99/p99.9 (ms)-",
        "-Correctness-",
        "n/a (the server has no L2 tier)",
        "nothing was evicted",
    ):
        assert text in found.stdout
    assert found.stdout.splitlines()[1].startswith("-")
    checksums = next(line for line in found.stdout.splitlines() if line.startswith("Checksums:"))
    assert checksums.endswith(" OK")


def test_several_sizes_and_numbers_of_workers_are_several_runs(server):
    flags = ("--chunk-bytes", "5000,64KiB", "--concurrency", "1,2", "--operations", "50", "--warmup", "0")
    document = bench(server, *flags)
    done = [(run["settings"]["chunk_bytes"], run["settings"]["concurrency"]) for run in document["runs"]]
    assert done == [(5000, 1), (5000, 2), (65536, 1), (65536, 2)]
    assert all(run["correctness"]["ok"] > 0 for run in document["runs"])


def test_several_workers_and_a_server_named_by_its_http_address(server):
    found = run_lmcache(
        "bench", "kvcache", "--url", server.http_url, "--format", "json", *SMALL, "--operations", "90", "--concurrency", "3"
    )
    assert found.returncode == 0, found.stderr
    run = only_run(json.loads(found.stdout))
    assert sum(figures["completed"] for figures in run["operations"].values()) == 90
    assert run["removed_chunks"] > 0


def test_chunks_over_the_socket_are_checked_and_removed_too(server):
    before = server.status()["l1"]["chunks"]
    run = only_run(bench(server, *SMALL, "--operations", "60", "--inline", "--mix", "store=1,retrieve=1"))
    assert run["is_inline"] is True
    assert run["correctness"]["ok"] == 4 * run["operations"]["retrieve"]["completed"] > 0
    assert run["operations"]["lookup"]["completed"] == 0
    assert server.status()["l1"]["chunks"] == before


def test_without_verification_nothing_is_checked(server):
    run = only_run(bench(server, *SMALL, "--operations", "50", "--no-verify"))
    assert run["correctness"]["ok"] == 0
    assert run["operations"]["retrieve"]["completed"] > 0


def test_a_working_set_beyond_l1_is_evicted_without_failures(server):
    run = only_run(bench(server, "--chunk-bytes", "1MiB", "--working-set", "96MiB", "--operations", "200"))
    assert run["evicted_chunks"] > 0
    assert run["failures"]["by_code"] == {}
    assert run["correctness"]["bad"] == 0
    assert 0 < run["hit_rate"]["l1"]["ratio"] < 1


def test_the_fill_forces_eviction(server):
    run = only_run(bench(server, *SMALL, "--fill", "150%", "--operations", "50"))
    assert run["fill"]["num_bytes"] >= 1.5 * run["environment"]["l1_capacity_bytes"]
    assert run["evicted_chunks"] > 0
    assert not [note for note in run["notes"] if "nothing was evicted" in note]
    assert server.status()["l1"]["chunks"] == 0


def test_entries_of_others_are_left_alone(server):
    key = b"k" * 32
    with KVCacheClient(server.zmq_url) as client:
        client.store(key, [b"mine" * 1024])
        bench(server, *SMALL, "--operations", "100")
        buffer = bytearray(4096)
        assert client.retrieve(key, [buffer]) == 1
        assert buffer == b"mine" * 1024
    with MessageQueueClient(server.zmq_url) as mq:
        assert mq.call(Clear()).objects == 1


# -- checking ---------------------------------------------------------------------------------------------------------


def test_verify_only_checks_every_chunk_once_and_shows_no_figures(server):
    found = run_lmcache(
        "bench",
        "kvcache",
        "--url",
        server.zmq_url,
        *SMALL_CHECK,
        "--working-set",
        "8MiB",
        "--verify-only",
        "--concurrency",
        "2",
    )
    assert found.returncode == 0, found.stderr
    assert "128/128 OK" in found.stdout
    assert "ops/s" not in found.stdout
    assert server.status()["l1"]["chunks"] == 0


def test_a_flipped_byte_is_found_and_named(server):
    flags = (*SMALL_CHECK, "--working-set", "4MiB", "--verify-only", "--keep")
    kept = only_run(bench(server, *flags))["kept"]
    assert server.status()["l1"]["chunks"] == 64
    run = only_run(bench(server, "--verify-only", "--reuse", kept))
    assert run["correctness"]["ok"] == 64
    assert not {"operations", "bandwidth", "hit_rate"} & run.keys()
    key = KeptSet.parse(kept).workload.keys(3)[:32]
    view = PoolView(Path(server.pool_path))
    try:
        chunk_at = bytes(view.data).index(key[:8])
        view.data[chunk_at + 5000] ^= 0xFF
    finally:
        view.close()
    document = bench(server, "--verify-only", "--reuse", kept, "--no-keep", code=1)
    assert document["ok"] is False
    assert document["error"]["code"] == "checksum"
    correctness = only_run(document)["correctness"]
    assert (correctness["ok"], correctness["bad"], correctness["missing"]) == (63, 1, 0)
    (bad,) = correctness["bad_chunks"]
    assert (bad["prompt"], bad["chunk"], bad["key"], bad["byte"]) == (3, 0, key.hex(), 5000)
    assert bad["pool_offset"] == chunk_at
    assert bad["found"] == bad["expected"] ^ 0xFF
    assert server.status()["l1"]["chunks"] == 0


def test_kept_chunks_that_are_gone_are_no_success(server):
    kept = only_run(bench(server, *SMALL_CHECK, "--working-set", "4MiB", "--verify-only", "--keep"))["kept"]
    with MessageQueueClient(server.zmq_url) as mq:
        mq.call(Clear())
    document = bench(server, "--verify-only", "--reuse", kept, code=1)
    assert document["error"]["code"] == "missing"
    assert only_run(document)["correctness"]["missing"] == 64
    assert only_run(document)["kept"] is None
    assert (
        "to check it again"
        not in run_lmcache("bench", "kvcache", "--verify-only", "--reuse", kept, "--url", server.zmq_url).stdout
    )


def test_a_working_set_of_which_a_part_was_evicted_is_not_verified(server):
    document = bench(server, *SMALL_CHECK, "--working-set", "128MiB", "--verify-only", code=4)
    correctness = only_run(document)["correctness"]
    assert correctness["missing"] > 0
    assert correctness["ok"] + correctness["missing"] == 2048
    message = f"{correctness['missing']} of 2048 chunks were evicted before they were read"
    assert (document["error"]["code"], document["error"]["message"]) == ("inconclusive", message)
    assert "use a smaller --working-set" in document["error"]["hint"]
    assert server.status()["l1"]["chunks"] == 0


def test_a_cache_that_survived_its_server_is_verified():
    name = f"bench-{free_port()}"
    with LmcacheServer(["--pool-name", name], leaves_pool=True) as first:
        kept = only_run(bench(first, *SMALL_CHECK, "--working-set", "4MiB", "--verify-only", "--keep"))["kept"]
        first.stop(signal.SIGKILL)
        with LmcacheServer(["--pool-name", name], leaves_pool=True) as second:
            run = only_run(bench(second, "--verify-only", "--reuse", kept))
            assert run["correctness"]["ok"] == 64


# -- trouble ----------------------------------------------------------------------------------------------------------


def test_a_server_that_dies_ends_the_run_with_a_message():
    with LmcacheServer() as server, running_bench(server, "--duration", "600", "--timeout", "2") as process:
        server.stop(signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 3
        assert "the run ended early" in stderr
        assert "Traceback" not in stderr
        assert "Checksums:" in stdout


@pytest.fixture
def goes_after_first_run(monkeypatch):
    """A server that is killed when the first run is done."""
    run_bench = measure.run_bench

    def run_then_kill(*args):
        run = run_bench(*args)
        server.stop(signal.SIGKILL)
        return run

    with LmcacheServer() as server:
        monkeypatch.setattr(measure, "run_bench", run_then_kill)
        yield server


SWEEP = ("--concurrency", "1,2", "--operations", "50", "--timeout", "3")


def test_figures_of_finished_runs_outlive_the_server(goes_after_first_run, capsys):
    assert main(["bench", "kvcache", "--url", goes_after_first_run.zmq_url, *SMALL, *SWEEP]) == 3
    captured = capsys.readouterr()
    assert "-Operations (ops/s)-" in captured.out
    assert "-Ended early-" in captured.out
    assert "after run 1: " in captured.out
    assert captured.err.startswith("error: no ")  # reply or connection


def test_the_document_of_a_sweep_that_ended_early_has_the_finished_runs(goes_after_first_run, capsys):
    flags = (*SMALL, *SWEEP, "--format", "json")
    assert main(["bench", "kvcache", "--url", goes_after_first_run.zmq_url, *flags]) == 3
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["ok"] is False
    assert set(document["error"]) == {"code", "message", "hint"}
    assert document["ended_by"] == document["error"]
    assert only_run(document)["correctness"]["ok"] > 0
    assert captured.err == ""


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--chunk-bytes", "64KiB,32MiB"], "too_large"),
        (["--chunk-bytes", "1MiB", "--concurrency", "1,64"], "too_large"),
        (["--chunk-bytes", "64KiB,512"], "chunk_bytes"),
        (["--chunk-bytes", "64KiB", "--working-set", "1MiB", "--concurrency", "1,8"], "working_set"),
    ],
)
def test_a_sweep_of_which_one_run_does_not_fit_is_refused_before_the_first(server, flags, code):
    before = server.status()["counters"]["stored_chunks"]
    assert bench(server, *flags, "--operations", "20", code=2)["error"]["code"] == code
    assert server.status()["counters"]["stored_chunks"] == before


def test_a_server_that_hangs_ends_the_run_with_a_message(server):
    with running_bench(server, "--duration", "600", "--timeout", "1") as process:
        server.freeze()
        try:
            _, stderr = process.communicate(timeout=WAIT_SECONDS)
        finally:
            server.thaw()
        assert process.returncode == 3
        assert "no reply" in stderr
    with MessageQueueClient(server.zmq_url) as mq:
        wait_until(lambda: not server.status()["clients"], "its clients are gone")
        mq.call(Clear(force=True))  # what they were reading is kept for a moment


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_removes_what_it_stored(server, number, code):
    with running_bench(server, "--duration", "600", "--concurrency", "2") as process:
        process.send_signal(number)
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == code
        assert "Traceback" not in stderr
    assert server.status()["l1"]["chunks"] == 0


def test_workers_whose_parent_was_killed_remove_what_they_stored(server):
    with running_bench(server, "--duration", "600", "--concurrency", "2") as process:
        process.kill()
        process.wait()
    assert server.status()["l1"]["chunks"] == 0


def test_nobody_there_is_not_reachable():
    found = run_lmcache("bench", "kvcache", "--url", f"127.0.0.1:{free_port()}", "--duration", "1")
    assert found.returncode == 3
    assert "cannot connect" in found.stderr
    assert found.stdout == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--device", "cuda", "--inline"], "--device cuda copies between the GPU and the mapped pool"),
        (["--device", "cuda", "--chunk-bytes", "64KiB,5000"], "chunks of 5000 bytes are not whole blocks"),
        (
            ["--device", "cuda", "--verify-only", "--reuse", f"{'0' * 16}-1-1x8x5000"],
            "chunks of 5000 bytes are not whole blocks",
        ),
        (["--device", "cuda:1"], "--device"),
        (["--reuse", "x"], "--keep and --reuse"),
        (["--keep"], "--keep and --reuse"),
        (["--verify-only", "--reuse", "x"], "does not name a set"),
        (["--verify-only", "--reuse", f"{'0' * 16}-1-1x8x4096", "--seed", "1"], "--reuse says"),
        (["--verify-only", "--duration", "3"], "--verify-only does"),
        (["--verify-only", "--no-verify"], "not allowed"),
        (["--mix", "store"], "KIND=WEIGHT"),
        (["--mix", "store=0"], "no weight"),
        (["--mix", "store=nan"], "weights"),
        (["--fill", "0"], "--fill"),
        (["--seed", "-1"], "--seed"),
        (["--concurrency", "2,1000"], "more than 256"),
        (["--chunk-bytes", "1GiB"], "cannot be measured"),
        (["--chunk-bytes", "64KiB,"], "--chunk-bytes"),
        (["--chunk-bytes", "32MiB"], "L1 has"),
        (["--working-set", "1MiB"], "a working set"),
        (["--duration", "0"], "--duration"),
    ],
)
def test_flags_that_make_no_sense_are_usage_errors(server, flags, message):
    found = run_lmcache("bench", "kvcache", "--url", server.zmq_url, *flags)
    assert found.returncode == 2
    assert found.stdout == ""
    assert message in found.stderr
    assert found.stderr.startswith("error: ")
    assert "hint: " in found.stderr
