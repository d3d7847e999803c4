"""Where do the milliseconds of a warm request go on a GPU?

One vLLM with our connector and a clock in it (`connectors.py`), one request at a time. Each prompt is asked for three times:
cold; again at once, from vLLM's own prefix cache; and again after that was emptied, so that all whole chunks come from the
cache server. The table gives for the last two when each stage was reached, ms after the client sent the request, medians; and
how long the device took for the copies, beside a raw pinned copy of as many bytes.
Run, with vLLM's flags for the model behind `--`:
python benchmarks/gpu_timeline.py --model DIR [--lengths 2048 8192 32768] [--repeats 5] -- [VLLM FLAGS]
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from common import percentile, report, server
from connectors import STAMPS
from engines import Answer, Engine, end_on_sigterm, make_prompt, python_path, read_stamps, transfer_flags
from gpu_engine import (
    CHUNK_TOKENS,
    IDLE_SECONDS,
    KV_BYTES_PER_TOKEN,
    NEW_TOKENS,
    Cache,
    engine_env,
    make_parser,
    pinned_gb_per_s,
)

from lmcache.client.mq import MessageQueueClient

TIMELINE = {
    "api_received": "the API server has the request",
    "on_new_request": "the engine core queues it",
    "lookup_sent": "the lookup is on its way",
    "match_asked": "the scheduler asks what is cached",
    "match_answered": "it knows",
    "meta_built": "the step is planned",
    "load_begin": "the worker begins to hand the copies over",
    "load_end": "all copies are handed over",
    "load_named": "the load is nearly over, and vLLM is told",
    "scheduled": "the step that computes the rest is planned",
    "forward_launched": "the forward pass is launched",
    "load_settled": "the KV is in the GPU's blocks, and verified",
    "api_first_token": "the API server sends the first token",
    "client_first_token": "the client has it",
}
KINDS = ("own", "tier")


class Timeline:
    """The engine, and when its requests reached which stage."""

    def __init__(self, engine: Engine, cache: Cache, stamps_path: Path) -> None:
        self._engine = engine
        self._cache = cache
        self._stamps_path = stamps_path
        self._answers: dict[str, Answer] = {}

    def _ask(self, prompt: list[int], request_id: str) -> None:
        self._answers[request_id] = self._engine.ask(prompt, 2, request_id)

    def ask(self, num_tokens: int, repeats: int) -> None:
        """Ask for some prompts of one length in each way."""
        for repeat in range(repeats + 1):
            prompt = make_prompt((num_tokens, repeat, time.time()), num_tokens + NEW_TOKENS)
            expected = self._cache.counter("stored_chunks") + num_tokens // CHUNK_TOKENS
            name = f"{num_tokens}-{repeat}x" if repeat else "warm-up"
            self._engine.ask(prompt, 2)
            self._cache.wait_until_stored(expected)
            time.sleep(IDLE_SECONDS)
            self._ask(prompt, f"own-{name}")
            self._engine.forget()
            time.sleep(IDLE_SECONDS)
            self._ask(prompt, f"tier-{name}")
        self._cache.clear()

    def table(self, num_tokens: int, wire: float) -> dict[str, dict[str, float | None]]:
        """Return and print the medians of one length."""
        stamps = read_stamps(self._stamps_path, self._answers)
        found = {kind: [s for id_, s in stamps.items() if id_.startswith(f"{kind}-{num_tokens}-")] for kind in KINDS}
        figures = {
            kind: {name: _median_ms([s[name] - s["sent"] for s in found[kind] if name in s]) for name in TIMELINE}
            for kind in KINDS
        }
        figures["tier"]["copies_on_device"] = _median_ms([s["copy_seconds"] for s in found["tier"]])
        figures["tier"]["raw_copy"] = round(num_tokens // CHUNK_TOKENS * CHUNK_TOKENS * KV_BYTES_PER_TOKEN / wire / 1e6, 2)
        print(f"{num_tokens} tokens; ms after the request was sent: from vLLM's own cache, from the server")
        for name, meaning in TIMELINE.items():
            print("", *(f"{figures[kind][name] or '':>8}" for kind in KINDS), meaning, sep="  ")
        print(
            f"  the copies took the device {figures['tier']['copies_on_device']} ms, raw ones {figures['tier']['raw_copy']} ms"
        )
        return figures


def _median_ms(seconds: list[float]) -> float | None:
    return round(percentile(seconds, 0.5) * 1e3, 2) if seconds else None


def main() -> None:
    """Print the tables and the JSON line."""
    args = make_parser(__doc__).parse_args()
    end_on_sigterm()
    wire = pinned_gb_per_s()
    with ExitStack() as stack:
        folder = args.log_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        url, _ = stack.enter_context(server("--l1-size-gb", str(args.l1_gib)))
        cache, stamps_path = Cache(stack.enter_context(MessageQueueClient(url))), folder / "stamps"
        timed = transfer_flags(url, kv_connector="GpuTimedConnector", kv_connector_module_path="connectors")
        flags = ["--max-model-len", "40960", "--no-enforce-eager", *args.vllm_flags, *timed]
        env = {
            **engine_env("ours", folder),
            "PYTHONPATH": python_path(Path(__file__).resolve().parent),
            STAMPS: str(stamps_path),
        }
        engine = Engine("timed", args.model, folder, [*flags, "--middleware", "connectors.StampMiddleware"], env)
        stack.enter_context(engine)
        timeline = Timeline(engine, cache, stamps_path)
        for length in args.lengths:
            timeline.ask(length, args.repeats)
        figures = {str(length): timeline.table(length, wire) for length in args.lengths}
    report("gpu_timeline", device=torch.cuda.get_device_name(), pinned_gb_per_s=round(wire, 2), timeline_ms=figures)


if __name__ == "__main__":
    main()
