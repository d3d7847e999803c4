"""What does the connector cost a step of vLLM's scheduler, with 1 and with 500 requests waiting?

vLLM's real scheduler in this process, without a connector (the floor), with one that does nothing, and with ours against a
real server, taking turns. 8 seats are taken by requests that decode; the others wait with prompts of 1,024 tokens. A step is
schedule() and, with an invented token for each request, update_from_output(). Wanted: ours at most 50 us above the floor.
Then the same with a server that is stopped (SIGSTOP), and with 256 seats. Last the worst case: the server is stopped when
500 requests arrive and seats are free, so that all ask in every step until their lookups' time is up. Run: python
benchmarks/scheduler_step.py [--steps 1000]
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from common import percentile, report, server, wait_resident
from engines import load_average, make_prompt, make_tiny_model, transfer_config
from vllm.config import KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from lmcache.client.kvcache import KVCacheClient
from lmcache.integration.vllm.lmcache_mp_connector import HelloMetadata
from lmcache.integration.vllm.steps import WorkerHello
from lmcache.integration.vllm.utils import identify_engine
from lmcache.layout import KVLayout

L1_GIB = 0.0625
BLOCK_SIZE = 128
NUM_BLOCKS = 16384
NUM_SEATS = 8
MANY_SEATS = 256
PROMPT_TOKENS = 1024
KINDS = ("floor", "idle", "ours")
STEP_SECONDS = 3e-3  # what the model would take: the heartbeat gets its turn, and a lookup its time
WARM_STEPS = 50
SHARES = {"p50": 0.5, "p99": 0.99}
LAYOUT = KVLayout(num_layers=4, num_planes=1, block_bytes=BLOCK_SIZE * 4 * 64 * 2 * 2, block_size=BLOCK_SIZE, dtype="bfloat16")


class Engine:
    """A scheduler, and what its engine core would do with it.

    Args:
        kind: "floor", "idle" or "ours".
        url: the cache server.
        num_seats: how many requests may run at once.
    """

    def __init__(self, kind: str, model: Path, url: str, num_seats: int) -> None:
        config = engine_config(kind, model, url, num_seats)
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=4, head_size=64, dtype=torch.bfloat16)
        config.cache_config.num_gpu_blocks = NUM_BLOCKS
        self.scheduler = config.scheduler_config.get_scheduler_cls()(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            log_stats=True,
        )
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self._block_hasher = get_request_block_hasher(BLOCK_SIZE, hash_fn)
        self._report = KVConnectorOutput() if kind != "floor" else None
        if kind == "ours":
            namespace = identify_engine(config, LAYOUT).namespace
            with KVCacheClient(url, kind="benchmark") as client:
                client.register(namespace, LAYOUT)
            self.scheduler.connector.set_xfer_handshake_metadata({0: HelloMetadata(WorkerHello(namespace, LAYOUT))})

    def requests(self, name: str, count: int, max_tokens: int) -> list[Request]:
        """Return new requests, not yet queued."""
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        prompts = {f"{name} {number}": make_prompt(f"{name} {number}", PROMPT_TOKENS) for number in range(count)}
        return [Request(id_, prompt, params, None, block_hasher=self._block_hasher) for id_, prompt in prompts.items()]

    def add(self, requests: list[Request]) -> list[float]:
        """Queue requests; return the us that each takes."""
        taken = []
        for request in requests:
            started = time.perf_counter()
            self.scheduler.add_request(request)
            taken.append((time.perf_counter() - started) * 1e6)
        return taken

    def step(self) -> tuple[float, int]:
        """Return the seconds of a step, and how many requests it admitted."""
        started = time.perf_counter()
        output = self.scheduler.schedule()
        middle = time.perf_counter()
        result = invented_result(output, self._report)
        resumed = time.perf_counter()
        self.scheduler.update_from_output(output, result)
        return middle - started + time.perf_counter() - resumed, len(output.scheduled_new_reqs)

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        return len(self.scheduler.waiting)

    def close(self) -> None:
        """Leave the server."""
        self.scheduler.shutdown()


def engine_config(kind: str, model: Path, url: str, num_seats: int) -> VllmConfig:
    idle = {"kv_connector": "IdleConnector", "kv_connector_module_path": "connectors"} if kind == "idle" else {}
    transfer = KVTransferConfig(**transfer_config(url, **idle)) if kind != "floor" else None
    return EngineArgs(
        model=str(model),
        dtype="bfloat16",
        max_model_len=8192,
        max_num_seqs=num_seats,
        enforce_eager=True,
        block_size=BLOCK_SIZE,
        kv_transfer_config=transfer,
        disable_hybrid_kv_cache_manager=True,
    ).create_engine_config()


def invented_result(output: Any, report: KVConnectorOutput | None) -> ModelRunnerOutput:
    """Return one token for each scheduled request. A request's prompt fits into a step, so each is due one."""
    ids = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
        sampled_token_ids=[[7] for _ in ids],
        kv_connector_output=report,
    )


def measure_full(engines: dict[str, Engine], num_steps: int) -> dict[str, float]:
    """Return us a step while all seats are taken."""
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(-WARM_STEPS, num_steps):
        for index in range(len(KINDS)):
            name = KINDS[(number + index) % len(KINDS)]
            seconds, num_admitted = engines[name].step()
            assert not num_admitted, "a seat was free"
            if number >= 0:
                taken[name].append(seconds * 1e6)
        time.sleep(STEP_SECONDS)
    return summary(taken)


def summary(taken: dict[str, list[float]]) -> dict[str, float]:
    figures = {f"{name}_{label}_us": percentile(v, share) for name, v in taken.items() for label, share in SHARES.items()}
    for label in SHARES:
        figures[f"added_{label}_us"] = figures[f"ours_{label}_us"] - figures[f"floor_{label}_us"]
    return {name: round(value, 1) for name, value in figures.items()}


def in_words(figures: dict[str, float]) -> str:
    parts = []
    for label in SHARES:
        values = ", ".join(f"{kind} {figures[f'{kind}_{label}_us']}" for kind in KINDS)
        parts.append(f"{label} us: {values} ({figures[f'added_{label}_us']:+})")
    return "; ".join(parts)


def full_seats(model: Path, url: str, pid: int, num_seats: int, num_waiting: int, num_steps: int) -> dict[str, Any]:
    """Return figures with a server that answers, and with one that is stopped."""
    engines = {kind: Engine(kind, model, url, num_seats) for kind in KINDS}
    queued: dict[str, list[float]] = {name: [] for name in engines}
    for name, engine in engines.items():
        engine.add(engine.requests(f"running {num_seats} {num_waiting}", num_seats, 7000))
        while engine.num_waiting:
            engine.step()
            time.sleep(STEP_SECONDS)
        queued[name] = engine.add(engine.requests(f"waiting {num_seats} {num_waiting}", num_waiting, 16))
    gc.collect()
    gc.freeze()
    try:
        answering = measure_full(engines, num_steps)
        os.kill(pid, signal.SIGSTOP)
        try:
            stopped = measure_full(engines, num_steps)
        finally:
            os.kill(pid, signal.SIGCONT)
    finally:
        for engine in engines.values():
            engine.close()
        gc.unfreeze()
    figures = {"answering": answering, "stopped": stopped}
    return {**figures, "queue_a_request": summary(queued)} if num_waiting > 1 else figures


def free_seats(model: Path, url: str, pid: int, num_waiting: int) -> dict[str, float]:
    """Return how long steps take while all requests wait for answers that do not come."""
    engine = Engine("ours", model, url, num_waiting + 1)
    steps: list[float] = []
    requests = engine.requests("free", num_waiting, 1)
    os.kill(pid, signal.SIGSTOP)
    try:
        started = time.perf_counter()
        engine.add(requests)
        queued_seconds = time.perf_counter() - started
        num_admitted = 0
        while not num_admitted and time.perf_counter() - started < 30:
            seconds, num_admitted = engine.step()
            steps.append(seconds * 1e6)
            time.sleep(STEP_SECONDS)
        waited = time.perf_counter() - started
    finally:
        os.kill(pid, signal.SIGCONT)
        engine.close()
    return {
        "p50_us": round(percentile(steps, 0.5), 1),
        "p99_us": round(percentile(steps, 0.99), 1),
        "steps": len(steps),
        "queueing_ms": round(queued_seconds * 1e3, 1),
        "first_admitted_after_ms": round(waited * 1e3, 1),
    }


def main() -> None:
    """Print a line for each case, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--waiting", type=int, nargs="+", default=[1, 500])
    args = parser.parse_args()
    load_before = load_average()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, server("--l1-size-gb", str(L1_GIB)) as (url, pid):
        wait_resident(pid, int(L1_GIB * 2**30))
        model = make_tiny_model(Path(folder) / "model")
        cases = [*((NUM_SEATS, num_waiting) for num_waiting in args.waiting), (MANY_SEATS, args.waiting[-1])]
        for num_seats, num_waiting in cases:
            figures = full_seats(model, url, pid, num_seats, num_waiting, args.steps)
            results[f"running_{num_seats}_waiting_{num_waiting}"] = figures
            for case, f in figures.items():
                print(f"{num_seats:3} run, {num_waiting:3} wait, {case}: {in_words(f)}")
        free = results["free_seats_stopped"] = free_seats(model, url, pid, args.waiting[-1])
    print(
        f"{args.waiting[-1]} ask in every step, server stopped: p50 {free['p50_us']} us, p99 {free['p99_us']} us a step;"
        f" the first is admitted after {free['first_admitted_after_ms']:.0f} ms"
    )
    print(f"load average {load_before} before, {load_average()} after")
    report("scheduler_step", load_average=[load_before, load_average()], **results)


if __name__ == "__main__":
    main()
