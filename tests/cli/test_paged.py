"""`--device cuda` as far as it needs no GPU: the same path over paged KV in host memory, and how it is refused."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.cli import paged
from lmcache.cli.commands.bench.kvcache import ProgressBar, bench_result
from lmcache.cli.commands.bench.measure import BenchSettings, run_bench
from lmcache.cli.commands.bench.messages import DeviceReport, Plan
from lmcache.cli.commands.bench.worker import PIN, Lane
from lmcache.cli.commands.bench.workload import KeptSet, OperationKind, Workload
from lmcache.cli.commands.query.kvcache import PagedBuffers, paged_round_trip
from lmcache.cli.paged import HEAD_TOKEN_BYTES, MAX_BLOCK_BYTES, MAX_LAYERS, kv_layout, open_paged_kv
from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import DeadlineError, LMCacheError, UsageError
from lmcache.layout import KVLayout
from lmcache.pool import PoolView
from lmcache.protocol import PinReport
from lmcache.transfer.base import StuckTransferError
from tests.cli.conftest import Cli
from tests.server_process import LmcacheServer

KIB, MIB = 1 << 10, 1 << 20
SMALL = {"chunk_bytes": 64 * KIB, "chunks_per_prompt": 4, "warmup_seconds": 0.0, "timeout_seconds": 60.0, "seed": 5}
GEOMETRY = {"staging_bytes": 128 * MIB, "num_layers": 32, "blocks_per_chunk": 1, "block_bytes": 2 * KIB}


@pytest.fixture
def needs_torch():
    pytest.importorskip("torch", reason="needs torch: make setup-vllm")


def run_on_cpu(server, **settings):
    return run_bench(server.zmq_url, BenchSettings(paged_on="cpu", **{**SMALL, **settings}))


# -- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk_bytes", "layers", "blocks", "block_bytes"),
    [
        (32 * MIB, 32, 16, 64 * KIB),  # a Llama 3.1 8B's chunk of 256 tokens
        (2 * MIB, 32, 1, 64 * KIB),
        (1 * MIB, 32, 1, 32 * KIB),
        (3 * MIB, 32, 2, 48 * KIB),
        (64 * KIB, 32, 1, 2 * KIB),
        (100 * KIB, 8, 1, 12800),
        (1024, 2, 1, 512),
    ],
)
def test_a_chunk_is_whole_blocks_like_a_real_models(chunk_bytes, layers, blocks, block_bytes):
    layout = kv_layout(chunk_bytes)
    assert (layout.num_layers, layout.block_bytes) == (layers, block_bytes)
    assert blocks * layout.bytes_per_block == chunk_bytes


@given(st.integers(1, 256 * MIB // HEAD_TOKEN_BYTES).map(lambda pieces: pieces * HEAD_TOKEN_BYTES) | st.integers(1, 256 * MIB))
def test_what_does_not_fit_is_refused_with_sizes_that_do(chunk_bytes):
    try:
        layouts, sizes = [kv_layout(chunk_bytes)], [chunk_bytes]
    except UsageError as exc:
        sizes = [int(word) for word in exc.hint.split() if word.isdigit()]
        layouts = [kv_layout(size) for size in sizes]
    assert sizes
    for size, layout in zip(sizes, layouts, strict=True):
        assert size % layout.bytes_per_block == 0
        assert layout.num_layers <= MAX_LAYERS
        assert layout.block_bytes <= MAX_BLOCK_BYTES


# -- the path over paged KV, in host memory ---------------------------------------------------------------------------


@pytest.mark.usefixtures("needs_torch")
def test_a_run_stores_and_loads_through_blocks_and_leaves_nothing(server: LmcacheServer):
    run = run_on_cpu(server, max_operations=120, duration_seconds=None)
    assert run.problem() is None
    completed = {kind: figures.completed for kind, figures in run.operations.items()}
    assert sum(completed.values()) == 120
    assert run.correctness.ok == 4 * completed[OperationKind.RETRIEVE] > 0
    assert (run.correctness.bad, run.correctness.missing) == (0, 0)
    for name in ("l1_read", "l1_write"):
        assert run.bandwidth[name].gb_per_second > 0
        assert run.bandwidth[name].raw_copy_gb_per_second > 0
    for check in run.counter_checks.values():
        assert check.workers == check.server
    assert run.device == DeviceReport(
        name="host memory", pool_pinned_bytes=0, pool_unpinned_bytes=0, kv_bytes=2 * 4 * 64 * KIB, **GEOMETRY
    )
    status = server.status()
    assert (status["l1"]["chunks"], status["l1"]["used_bytes"], status["clients"]) == (0, 0, [])


@pytest.mark.usefixtures("needs_torch")
def test_a_flipped_byte_is_found_on_the_way_through_blocks(server: LmcacheServer):
    flags = {"verify_only": True, "working_set_bytes": 2 * MIB, "concurrency": 2}
    kept = run_on_cpu(server, keep=True, **flags)
    assert (kept.problem(), kept.correctness.ok) == (None, 32)
    reuse = KeptSet.parse(kept.kept)
    plain = run_bench(server.zmq_url, BenchSettings(verify_only=True, keep=True, reuse=reuse, timeout_seconds=60))
    assert (plain.problem(), plain.correctness.ok) == (None, 32)  # the same bytes, whichever way they came
    key = reuse.workload.keys(3)[:32]
    view = PoolView(Path(server.pool_path))
    try:
        view.data[bytes(view.data).index(key[:8]) + 5000] ^= 0xFF
    finally:
        view.close()
    run = run_on_cpu(server, verify_only=True, reuse=reuse)
    assert run.problem().code == "checksum"
    assert (run.correctness.ok, run.correctness.bad, run.correctness.missing) == (31, 1, 0)
    (bad,) = run.correctness.bad_chunks
    assert (bad.prompt, bad.chunk, bad.byte) == (3, 0, 5000)
    assert server.status()["l1"]["chunks"] == 0


@pytest.mark.usefixtures("needs_torch")
def test_the_fill_and_a_working_set_beyond_l1_evict_without_failures(server: LmcacheServer):
    run = run_on_cpu(
        server, chunk_bytes=MIB, working_set_bytes=96 * MIB, fill_ratio=1.2, max_operations=60, duration_seconds=None
    )
    assert run.evicted_chunks > 0
    assert run.failures.by_code == {}
    assert run.correctness.bad == 0
    assert server.status()["l1"]["used_bytes"] == 0


@pytest.mark.usefixtures("needs_torch")
def test_a_round_trip_goes_through_blocks(server: LmcacheServer):
    with KVCacheClient(server.zmq_url) as client:
        result = paged_round_trip(client, num_chunks=3, chunk_bytes=128 * KIB, device="cpu")
    assert result.ok
    assert (result.data["good_chunks"], result.data["removed_chunks"], result.data["path"]) == (3, 3, "shared memory")
    assert (result.data["device_name"], result.data["pool_unpinned_bytes"]) == ("host memory", 0)
    assert server.status()["l1"]["used_bytes"] == 0


@pytest.mark.usefixtures("needs_torch")
def test_a_round_trip_whose_load_did_nothing_fails(server: LmcacheServer, monkeypatch: pytest.MonkeyPatch):
    from lmcache.transfer.cpu import CpuCopier

    monkeypatch.setattr(CpuCopier, "scatter", lambda *_: None)
    with KVCacheClient(server.zmq_url) as client:
        result = paged_round_trip(client, num_chunks=3, chunk_bytes=128 * KIB, device="cpu")
    assert (result.ok, result.data["good_chunks"]) == (False, 0)
    assert server.status()["l1"]["used_bytes"] == 0


@pytest.mark.usefixtures("needs_torch")
def test_the_box_names_the_device_and_what_is_pinned(server: LmcacheServer):
    run = run_on_cpu(server, max_operations=20, duration_seconds=None)
    run.device = DeviceReport(name="A GPU", pool_pinned_bytes=3 * MIB, pool_unpinned_bytes=MIB, kv_bytes=4 * MIB, **GEOMETRY)
    text = bench_result([run], server.zmq_url).text()
    for line in ("A GPU", "32 layers x 1 x 2.0 KiB", "3.0 MiB", "4.0 MiB KV, 128.0 MiB staging", "Share of a raw pinned copy"):
        assert line in text


# -- a copy that does not end -----------------------------------------------------------------------------------------


class StuckKV:
    """A fake whose copies do not come to an end."""

    def store(self, extents: list, indices: list) -> None:
        raise StuckTransferError("a transfer did not end within 20 s")

    def load(self, extents: list) -> None:
        raise StuckTransferError("a transfer did not end within 20 s")

    def fill(self, content: memoryview) -> None:
        pass


class Places:
    """A fake reservation that notes whether it was kept."""

    def __init__(self) -> None:
        self.extents: list = []
        self.calls: list[str] = []

    def reserved_indices(self) -> list[int]:
        return []

    def keep_for_ever(self) -> None:
        self.calls.append("keep")

    def abort(self) -> None:
        self.calls.append("abort")

    def __enter__(self) -> "Places":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("copy", ["store", "load"])
def test_a_stuck_copy_ends_the_work_and_gives_no_place_away(copy: str):
    workload = Workload(salt="0" * 16, seed=1, chunk_bytes=64 * KIB, chunks_per_prompt=2)
    plan = Plan(
        url="tcp://127.0.0.1:1",
        timeout_seconds=1,
        inline=False,
        paged_on="cuda",
        workload=workload,
        lane=0,
        num_lanes=1,
        num_prompts=1,
    )
    lane = Lane(plan, None, None)
    memory, stored, raw = lane._memory, Places(), Places()
    memory._kv, memory._raw_places = StuckKV(), raw
    with pytest.raises(StuckTransferError) as caught:
        memory.store(stored) if copy == "store" else memory.load([])
    assert stored.calls == (["keep"] if copy == "store" else [])
    assert not lane._may_answer_again(caught.value)
    memory.close()
    assert raw.calls == ["keep"]


def test_a_stuck_store_of_a_round_trip_gives_no_place_away():
    places = Places()
    client = SimpleNamespace(reserve=lambda keys, chunk_bytes: places)
    with pytest.raises(StuckTransferError):
        PagedBuffers(StuckKV(), 1, 64 * KIB).store(client, bytes(32))
    assert places.calls == ["keep"]


# -- refusals ---------------------------------------------------------------------------------------------------------

COMMANDS = {
    "bench": ("bench", "kvcache", "--device", "cuda", "--verify-only", "--timeout", "120"),
    "query": ("query", "kvcache", "--round-trip", "--device", "cuda"),
}
each_command = pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)


@each_command
def test_without_torch_it_says_what_to_do(zmq_cli: Cli, server: LmcacheServer, tmp_path: Path, words):
    (tmp_path / "torch.py").write_text("raise ImportError('no module named torch')")
    error = zmq_cli.refused(*words, PYTHONPATH=str(tmp_path))
    assert error.startswith("error: --device cuda needs PyTorch, which cannot be imported here: no module named torch\nhint: ")
    assert server.status()["clients"] == []


@each_command
@pytest.mark.usefixtures("needs_torch")
def test_without_a_gpu_it_says_what_to_do(zmq_cli: Cli, server: LmcacheServer, words):
    error = zmq_cli.refused(*words, CUDA_VISIBLE_DEVICES="")
    assert error.startswith("error: no NVIDIA GPU can be used here: ")
    assert "leave the chunks in host memory" in error
    assert (server.status()["l1"]["used_bytes"], server.status()["clients"]) == (0, [])


def test_a_pool_that_is_not_mapped_is_refused(server: LmcacheServer):
    message = f"the pool of {server.zmq_url} cannot be mapped here"
    with pytest.raises(UsageError, match=message):
        run_on_cpu(server, inline=True, verify_only=True)
    with KVCacheClient(server.zmq_url, inline=True) as client, pytest.raises(UsageError, match=message):
        paged_round_trip(client, 1, MIB, "cpu")


def test_two_prompts_a_worker_must_fit_l1(server: LmcacheServer):
    with pytest.raises(UsageError, match="two prompts for each of 1 workers"):
        run_on_cpu(server, chunk_bytes=10 * MIB)


# -- pinning ----------------------------------------------------------------------------------------------------------


class SlowPinning:
    """A fake client and its copier: the pool is never pinned, or after some looks."""

    def __init__(self, pinned_after: float) -> None:
        self.looks = 0
        self._pinned_after = pinned_after
        self.is_inline = False
        self.copier = self
        self.pin_pool = None

    def watch_mapping(self, watch: object) -> None:
        pass

    def attach(self) -> SimpleNamespace:
        return SimpleNamespace(view=SimpleNamespace(data=memoryview(bytes(10)), resident_bytes=10))

    def pin_report(self) -> PinReport:
        self.looks += 1
        return PinReport(pool_bytes=10, pinned_bytes=10 if self.looks > self._pinned_after else 5)

    def __call__(self, layout: KVLayout, blocks_per_chunk: int, num_chunks: int, device: str) -> "SlowPinning":
        return self


def open_slowly(monkeypatch: pytest.MonkeyPatch, pinned_after: float, keep_waiting) -> None:
    fake = SlowPinning(pinned_after)
    monkeypatch.setattr(paged, "_load_paged_kv", lambda: fake)
    monkeypatch.setattr(paged, "PIN_POLL_SECONDS", 0.0)
    monkeypatch.setattr("lmcache.transfer.pinning.PIECE_BYTES", 1)
    open_paged_kv(fake, MIB, 1, "cuda", keep_waiting)


def test_the_wait_for_pinning_tells_its_share_and_can_be_ended(monkeypatch: pytest.MonkeyPatch):
    shares = []
    open_slowly(monkeypatch, 3, lambda share: not shares.append(share))
    assert shares == [0.5] * 3
    open_slowly(monkeypatch, float("inf"), lambda share: len(shares) < 10 and not shares.append(share))
    assert len(shares) == 10


def test_the_wait_for_pinning_ends_where_the_pool_has_stopped_growing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paged, "GROW_SECONDS", 0.1)
    monkeypatch.setattr(
        SlowPinning, "attach", lambda self: SimpleNamespace(view=SimpleNamespace(data=memoryview(bytes(10)), resident_bytes=5))
    )
    shares = []
    open_slowly(monkeypatch, float("inf"), lambda share: not shares.append(share))
    assert set(shares) == {0.5}


def test_the_wait_for_pinning_has_a_deadline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(paged, "PIN_SECONDS", 0.0)
    with pytest.raises(DeadlineError, match="of the pool are pinned after") as caught:
        open_slowly(monkeypatch, float("inf"), lambda share: True)
    assert (caught.value.exit_code, caught.value.code) == (3, "pin")
    assert isinstance(caught.value, LMCacheError)


@pytest.mark.parametrize(("is_quiet", "text"), [(False, "pinning the pool for the GPU: 25%\n"), (True, "")])
def test_a_long_wait_for_pinning_is_told_where_no_bar_is_seen(monkeypatch: pytest.MonkeyPatch, capsys, is_quiet, text):
    monkeypatch.setattr(paged, "PIN_NOTICE_SECONDS", 0.0)
    bar = ProgressBar(is_shown=False, is_quiet=is_quiet)
    bar.show(PIN, 0.1)  # from here on it may take a while
    bar.show(PIN, 0.25)
    assert capsys.readouterr().err == text
