"""MEM-4: a driver that pins only some of the pool costs speed, which is counted and shown, and no byte. On a simulated GPU."""

import contextlib
import functools
import signal

import httpx
import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

from lmcache.client.kvcache import KVCacheClient  # noqa: E402
from lmcache.errors import UnreachableError  # noqa: E402
from lmcache.keys import Namespace  # noqa: E402
from lmcache.layout import KVLayout  # noqa: E402
from lmcache.transfer.base import StuckTransferError  # noqa: E402
from lmcache.transfer.cuda import CudaCopier  # noqa: E402
from lmcache.transfer.pinning import IDLE_PIECES, PoolPinner  # noqa: E402
from tests.chaos.waiting import wait_until  # noqa: E402
from tests.cli.conftest import Cli  # noqa: E402
from tests.cli.test_describe import fields  # noqa: E402
from tests.fakes import PATIENCE_SECONDS  # noqa: E402
from tests.pools import keys  # noqa: E402
from tests.server_process import LmcacheServer  # noqa: E402
from tests.transfer.simulated_cuda import Driver, Event, simulate  # noqa: E402

MIB = 1 << 20
NUM_LAYERS, NUM_BLOCKS, BLOCK_BYTES, BLOCKS_PER_CHUNK = 4, 64, 64 << 10, 16
LAYOUT = KVLayout(num_layers=NUM_LAYERS, num_planes=1, block_bytes=BLOCK_BYTES, block_size=16, dtype="uint8")
CHUNK_BYTES = NUM_LAYERS * BLOCKS_PER_CHUNK * BLOCK_BYTES
PINNED_AT_ONCE = 6 * MIB
PIECE_BYTES = PINNED_AT_ONCE // IDLE_PIECES
POOL_BYTES = 64 * MIB


class Engine:
    """A worker on a simulated GPU, with KV that fills four chunks, attached to a server, or to one that is to come."""

    def __init__(self, monkeypatch, url, may_pin, waits=True):
        self.driver = Driver(may_pin)
        simulate(monkeypatch, self.driver)
        monkeypatch.setattr("lmcache.transfer.cuda.PoolPinner", functools.partial(PoolPinner, piece_bytes=PIECE_BYTES))
        monkeypatch.setattr("lmcache.transfer.cuda.BOUNCE_BYTES", 3 * MIB // 2 + 512)
        self.kv = torch.randint(0, 256, (NUM_LAYERS, NUM_BLOCKS, BLOCK_BYTES), dtype=torch.uint8)
        self.copier = CudaCopier(LAYOUT, list(self.kv), staging_bytes=8 * MIB, uses_triton=False)
        seconds = PATIENCE_SECONDS if waits else 0.5
        self.client = KVCacheClient(url, kind="engine-worker", timeout_seconds=seconds, heartbeat=True, heartbeat_seconds=0.02)
        self.client.watch_mapping(self.copier.pin_pool)
        self.client.watch_pins(self.copier.pin_report)
        namespace = Namespace(model="m", chunk_size=0, layout=LAYOUT.fingerprint)
        with contextlib.nullcontext() if waits else pytest.raises(UnreachableError):
            self.client.register(namespace, LAYOUT, backend=self.copier.backend)
        if waits:
            self.wait()

    def wait(self):
        wait_until(self.has_tried, "every piece was tried")

    def has_tried(self):
        pins = self.copier.pin_report()
        return pins.pool_bytes == pins.pinned_bytes + pins.unpinned_bytes > 0

    def store_and_load(self, is_beside_engine=False):
        """Store all blocks, forget them, load them into other places, and return whether each is what it was."""
        before = self.kv.clone()
        ids = torch.randperm(NUM_BLOCKS).tolist()
        with self.client.reserve(keys(0, 1, 2, 3), CHUNK_BYTES) as reservation:
            self.copier.gather(ids, reservation.extents, self.copier.fence() if is_beside_engine else None)
            reservation.commit()
        self.kv.fill_(0)
        others = torch.randperm(NUM_BLOCKS).tolist()
        with self.client.pin(keys(0, 1, 2, 3)) as pinned:
            self.copier.scatter(pinned.extents, others)
            pinned.verify()
        return torch.equal(self.kv[:, others], before[:, ids])


@pytest.fixture
def server():
    with LmcacheServer() as server:
        yield server


def metric(server, name):
    """A metric without labels, as Prometheus would scrape it."""
    lines = httpx.get(f"{server.http_url}/metrics", timeout=30).text.splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"{name} ")]
    return float(value)


@pytest.mark.parametrize("is_beside_engine", [False, True], ids=["alone", "beside an engine"])
@pytest.mark.parametrize(
    ("may_pin", "pinned_bytes"),
    [
        pytest.param(lambda number: number < 1, PINNED_AT_ONCE, id="all but the first pieces"),
        pytest.param(lambda number: number < 2, 2 * PINNED_AT_ONCE, id="some pieces"),
        pytest.param(lambda number: False, 0, id="every piece"),
    ],
)
def test_what_cannot_be_pinned_is_copied_right_counted_and_shown(
    monkeypatch, caplog, server, may_pin, pinned_bytes, is_beside_engine
):
    engine = Engine(monkeypatch, server.zmq_url, may_pin)
    failed_bytes = POOL_BYTES - pinned_bytes
    try:
        pins = engine.copier.pin_report()
        assert (pins.pool_bytes, pins.pinned_bytes, pins.unpinned_bytes) == (POOL_BYTES, pinned_bytes, failed_bytes)
        assert engine.store_and_load(is_beside_engine)
        loaded_bytes = sum(num_bytes for _, num_bytes, is_pinned in engine.driver.calls if not is_pinned)
        assert engine.driver.bounced_bytes == loaded_bytes > 0, "what is stored there goes through pinned memory"
        copied_bytes = engine.copier.unpinned_bytes
        assert copied_bytes == 2 * loaded_bytes
        assert sum(num_bytes for _, num_bytes, _ in engine.driver.calls) + loaded_bytes == 2 * 4 * CHUNK_BYTES

        wait_until(lambda: metric(server, "lmcache_unpinned_copied_bytes_total") == copied_bytes, "the server knows")
        assert metric(server, "lmcache_unpinned_bytes") == failed_bytes
        (shown,) = [c["gpu_pins"] for c in Cli(server.zmq_url).json("describe", "kvcache")["clients"] if c["gpu_pins"]]
        assert shown["unpinned_bytes"] == failed_bytes
        assert shown["unpinned_copied_bytes"] == copied_bytes
        page = fields(Cli(server.zmq_url)("describe", "kvcache").stdout)
        assert page["Transfer backend"] == "cuda, PyTorch (slower)"
        assert {"Pool pinned (GB)", "Pool not pinnable (GB)", "Copied unpinned (GB)"} <= set(page)
    finally:
        engine.client.close()
    assert metric(server, "lmcache_unpinned_bytes") == 0, "gone with its engine"
    assert metric(server, "lmcache_unpinned_copied_bytes_total") == copied_bytes
    assert not engine.driver.registered
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING" and "cannot be pinned" in r.getMessage()]
    assert len(told) == 1
    assert "CUDA_ERROR_OUT_OF_MEMORY" in told[0]
    assert "hint: " in told[0]


def test_a_pool_that_is_pinned_is_copied_without_a_byte_through_unpinned_memory(monkeypatch, server):
    engine = Engine(monkeypatch, server.zmq_url, lambda number: True)
    try:
        assert engine.store_and_load()
        assert engine.copier.unpinned_bytes == 0
        wait_until(lambda: [c["gpu_pins"]["pinned_bytes"] for c in server.status()["clients"]] == [POOL_BYTES], "it is told")
    finally:
        engine.client.close()
    assert metric(server, "lmcache_unpinned_copied_bytes_total") == 0


def test_a_copy_that_does_not_end_is_an_error_and_changes_no_byte_of_what_is_not_pinned(monkeypatch, server):
    engine = Engine(monkeypatch, server.zmq_url, lambda number: False)
    try:
        monkeypatch.setattr("lmcache.transfer.cuda.TRANSFER_SECONDS", 0.05)
        monkeypatch.setattr(Event, "query", lambda event: False)
        with engine.client.reserve(keys(0), CHUNK_BYTES) as reservation:
            reservation.extents[0][:] = b"\x77" * CHUNK_BYTES
            with pytest.raises(StuckTransferError):
                engine.copier.gather(list(range(BLOCKS_PER_CHUNK)), reservation.extents)
            assert bytes(reservation.extents[0]) == b"\x77" * CHUNK_BYTES
    finally:
        engine.client.close()


@pytest.mark.parametrize("limit_bytes", [1 << 20, -1])
def test_the_likely_cause_is_the_container_and_perhaps_a_limit_that_is_too_low(monkeypatch, caplog, server, limit_bytes):
    monkeypatch.setattr("lmcache.transfer.pinning.resource.getrlimit", lambda which: (limit_bytes, limit_bytes))
    Engine(monkeypatch, server.zmq_url, lambda number: False).client.close()
    assert "container's memory limit" in caplog.text
    assert ("limit on locked memory, 1048576 bytes" in caplog.text) == (limit_bytes > 0)


def test_the_pool_of_a_server_that_comes_later_is_pinned_as_well(monkeypatch):
    """The heartbeat maps it then, in a thread that has no context of its own."""
    server = LmcacheServer(l1_size_gb=POOL_BYTES / 2**30)
    engine = Engine(monkeypatch, server.zmq_url, lambda number: True, waits=False)
    try:
        with server:
            engine.wait()
            assert engine.copier.pin_report().pinned_bytes == POOL_BYTES
            server.stop(signal.SIGTERM)
            wait_until(lambda: not engine.driver.registered, "the pool that is gone is unpinned")
            server.start()
            engine.wait()
            assert engine.copier.pin_report().pinned_bytes == POOL_BYTES
    finally:
        engine.client.close()
    assert not engine.driver.registered
