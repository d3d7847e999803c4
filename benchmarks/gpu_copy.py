"""How close do store and load on a GPU come to a raw pinned copy of the same bytes?

Ceiling: one cudaMemcpyAsync after the other of the same bytes between device memory and the same pinned pool, in the same
run, taking turns with ours; and, for each page size, the pages copied one by one by the copy engine (what a store without a
gather would do). Time is until the device has completed, seen by the host. The KV is a Llama 3.1 8B's unless the page size is
swept: 32 layers, blocks of 16 tokens, 64 KiB each, 32 MiB a chunk; blocks are in random order. The pool is a real server's.
Run on a machine with a GPU: python benchmarks/gpu_copy.py [--l1-gib 24] [--repeats 7] [--no-pages]
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from common import report, server, wait_resident
from pins import GIB, pinned_pool

from lmcache.client.kvcache import KVCacheClient
from lmcache.integration.vllm.utils import ConnectorConfig
from lmcache.keys import Namespace, chunk_keys
from lmcache.layout import KVLayout
from lmcache.transfer.cuda import CudaCopier
from lmcache.transfer.driver import driver
from lmcache.transfer.pinning import PoolPinner, address_of

MIB = 1 << 20
CHUNK_BYTES = 32 * MIB
NUM_LAYERS = 32
BLOCK_BYTES = 64 << 10
RAW_COPY_BYTES = 32 * MIB


def wait(event: torch.cuda.Event) -> None:
    """Return as soon as the event has happened."""
    while not event.query():
        time.sleep(0)


class Raw:
    """Plain copies of a run of extents."""

    def __init__(self, extents: Sequence[memoryview]) -> None:
        self._addresses = [address_of(extent) for extent in extents]
        self._length = len(extents[0])
        self._device = torch.empty(len(extents) * self._length, dtype=torch.uint8, device="cuda")
        self._stream = torch.cuda.Stream()

    def begin(self, to_host: bool) -> torch.cuda.Event:
        """Start them; the event tells when the last byte is there."""
        at = self._device.data_ptr()
        for number, address in enumerate(self._addresses):
            place = at + number * self._length
            if to_host:
                driver().copy_to_host(address, place, self._length, self._stream.cuda_stream)
            else:
                driver().copy_to_device(place, address, self._length, self._stream.cuda_stream)
        event = torch.cuda.Event()
        event.record(self._stream)
        return event


def timed(action: Callable[[], object]) -> float:
    """Return the seconds an action takes, from an idle device."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def medians(actions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Run the actions in turns; return the median seconds of each."""
    taken: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name, action in actions.items():
            seconds = timed(action)
            if repeat:
                taken[name].append(seconds)
    return {name: statistics.median(values) for name, values in taken.items()}


class Engine:
    """Paged KV on the device, and the copier for it."""

    def __init__(self, num_layers: int, block_bytes: int, num_blocks: int, pinner: PoolPinner) -> None:
        self.layout = KVLayout(num_layers=num_layers, num_planes=1, block_bytes=block_bytes, block_size=16, dtype="bfloat16")
        self.kv = torch.randint(0, 256, (num_layers, num_blocks, block_bytes), dtype=torch.uint8, device="cuda")
        self.copier = CudaCopier(self.layout, list(self.kv), ConnectorConfig.staging_bytes)
        self.copier.mappings = (pinner,)
        self.ids = random.Random(1).sample(range(num_blocks), num_blocks)

    def store(self, extents: Sequence[memoryview], first: int = 0, is_beside_engine: bool = False) -> None:
        """Store one chunk for each extent."""
        size = len(extents[0]) // self.layout.bytes_per_block
        after = self.copier.fence() if is_beside_engine else None
        self.copier.gather(self.ids[first * size : (first + len(extents)) * size], extents, after)

    def load(self, extents: Sequence[memoryview], first: int = 0) -> None:
        """Load one chunk from each extent."""
        size = len(extents[0]) // self.layout.bytes_per_block
        transfer = self.copier.begin_scatter(extents, self.ids[first * size : (first + len(extents)) * size])
        while not transfer.is_done:
            time.sleep(0)  # the GIL is another thread's too

    def check(self, extents: Sequence[memoryview]) -> None:
        """Store, wipe, load: every byte of every block used must be back."""
        self.store(extents)
        size = len(extents[0]) // self.layout.bytes_per_block
        used = torch.tensor(self.ids[: len(extents) * size], device="cuda")
        before = self.kv[:, used].clone()
        self.kv.zero_()
        self.load(extents)
        torch.cuda.synchronize()
        assert torch.equal(self.kv[:, used], before), "wrong bytes"


def measure_sizes(engine: Engine, extents: Sequence[memoryview], repeats: int) -> dict[str, dict[str, float]]:
    """Store and load of some sizes beside raw copies, and both ways at once."""
    results: dict[str, dict[str, float]] = {}
    for num_chunks in (1, 8, 32, 128):
        part = list(extents[:num_chunks])
        engine.check(part)
        raw, total = Raw(part), num_chunks * len(part[0])
        seconds = medians(
            {
                "store": lambda: engine.store(part),  # noqa: B023
                "store_beside_engine": lambda: engine.store(part, is_beside_engine=True),  # noqa: B023
                "raw_store": lambda: wait(raw.begin(True)),  # noqa: B023
                "load": lambda: engine.load(part),  # noqa: B023
                "raw_load": lambda: wait(raw.begin(False)),  # noqa: B023
            },
            repeats,
        )
        figures = {f"{name}_gb_per_s": round(total / value / 1e9, 2) for name, value in seconds.items()}
        figures["store_ratio"] = round(seconds["raw_store"] / seconds["store"], 3)
        figures["store_beside_engine_ratio"] = round(seconds["raw_store"] / seconds["store_beside_engine"], 3)
        figures["load_ratio"] = round(seconds["raw_load"] / seconds["load"], 3)
        results[f"{total // MIB}_mib"] = figures
        print(f"{total // MIB} MiB: {figures}", flush=True)
    return results


def measure_both_ways(engine: Engine, extents: Sequence[memoryview], repeats: int) -> dict[str, float]:
    """A store of 1 GiB and a load of another 1 GiB at once, beside raw copies at once."""
    down, up = list(extents[:32]), list(extents[32:64])
    engine.store(down)
    engine.store(up, 32)
    raw_down, raw_up = Raw(down), Raw(up)

    def ours() -> None:
        thread = threading.Thread(target=engine.store, args=(down,))
        thread.start()
        engine.load(up, 32)
        thread.join()

    def raw() -> None:
        events = raw_down.begin(True), raw_up.begin(False)
        for event in events:
            wait(event)

    seconds = medians({"ours": ours, "raw": raw}, repeats)
    total = 64 * len(down[0])
    figures = {f"{name}_gb_per_s": round(total / value / 1e9, 2) for name, value in seconds.items()}
    figures["ratio"] = round(seconds["raw"] / seconds["ours"], 3)
    print(f"both ways: {figures}", flush=True)
    return figures


def measure_page(pinner: PoolPinner, extents: Sequence[memoryview], page: int, repeats: int) -> dict[str, float]:
    """256 MiB in pages of one size: ours, the copy engine page by page, and a raw copy."""
    total = sum(len(extent) for extent in extents)
    num_layers = min(NUM_LAYERS, CHUNK_BYTES // 16 // page) or 1
    engine, raw, stream = Engine(num_layers, page, total // page // num_layers, pinner), Raw(extents), torch.cuda.Stream()
    engine.check(extents)
    pages = [engine.kv[layer, block].data_ptr() for block in engine.ids[: 8192 // num_layers] for layer in range(num_layers)]
    hosts = [address_of(extent) + at for extent in extents for at in range(0, len(extent), page)][: len(pages)]

    def page_by_page(to_host: bool) -> None:
        for device, host in zip(pages, hosts, strict=True):
            if to_host:
                driver().copy_to_host(host, device, page, stream.cuda_stream)
            else:
                driver().copy_to_device(device, host, page, stream.cuda_stream)
        event = torch.cuda.Event()
        event.record(stream)
        wait(event)

    seconds = medians(
        {
            "store": lambda: engine.store(extents),
            "load": lambda: engine.load(extents),
            "raw_store": lambda: wait(raw.begin(True)),
            "raw_load": lambda: wait(raw.begin(False)),
            "pages_store": lambda: page_by_page(True),
            "pages_load": lambda: page_by_page(False),
        },
        repeats,
    )
    moved = {name: len(hosts) * page if name.startswith("pages") else total for name in seconds}
    return {f"{name}_gb_per_s": round(moved[name] / value / 1e9, 2) for name, value in seconds.items()}


def measure_pages(pinner: PoolPinner, extents: Sequence[memoryview], repeats: int) -> dict[str, dict[str, float]]:
    """The same for many page sizes."""
    results = {}
    for page_kib in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096):
        figures = results[f"{page_kib}_kib"] = measure_page(pinner, extents[:8], page_kib << 10, repeats)
        print(f"pages of {page_kib} KiB: {figures}", flush=True)
        torch.cuda.empty_cache()
    return results


def main() -> None:
    """Print the figures and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--l1-gib", type=float, default=24.0)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-pages", action="store_true", help="leave out the sweep over page sizes")
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    with ExitStack() as stack:
        url, pid = stack.enter_context(server("--l1-size-gb", str(args.l1_gib)))
        client = stack.enter_context(KVCacheClient(url, timeout_seconds=30))
        wait_resident(pid, int(args.l1_gib * GIB))
        pinner, pin_seconds = stack.enter_context(pinned_pool(client))
        print(
            f"pinned {pinner.pinned_bytes / GIB:.1f} GiB in {pin_seconds:.2f} s, {pinner.unpinned_bytes} bytes failed",
            flush=True,
        )
        namespace = Namespace(model="benchmark", chunk_size=256)
        keys = chunk_keys(namespace, range(128 * 256))
        with client.reserve(keys, CHUNK_BYTES) as reservation:
            extents = reservation.extents
            engine = Engine(NUM_LAYERS, BLOCK_BYTES, 4 * GIB // (NUM_LAYERS * BLOCK_BYTES), pinner)
            sizes = measure_sizes(engine, extents, args.repeats)
            both = measure_both_ways(engine, extents, args.repeats)
            del engine
            torch.cuda.empty_cache()
            pages = {} if args.no_pages else measure_pages(pinner, extents, max(3, args.repeats // 2))
            del extents
    report(
        "gpu_copy",
        device=device,
        pinned_gib=args.l1_gib,
        pin_seconds=round(pin_seconds, 2),
        staging_mib=ConnectorConfig.staging_bytes // MIB,
        sizes=sizes,
        both_ways=both,
        pages=pages,
    )


if __name__ == "__main__":
    main()
