"""What does the cache give and cost a real vLLM on a GPU?

Two engines of one model on one GPU take turns: with our connector, and plain. Per prompt (unique, LENGTH + 8 tokens, 32 out):

- cold: never seen; ours stores meanwhile. Wanted: TTFT <= 1.01 x plain's, TPOT of the lone request <= 1.03 x.
- hbm: again at once, from vLLM's own prefix cache: no byte is moved.
- tier: again after vLLM's own cache was emptied: all whole chunks come from the cache server. Floor: hbm + bytes / the speed of
  a pinned copy in the same run. Wanted: <= floor + 4 ms up to 8k tokens, + 8 ms at 32k.

Then the same beside others: some requests decode while prompts come back that vLLM's own cache had no room for. TTFT from the
server and from vLLM's own cache, and the longest gap between two tokens of the others meanwhile (wanted: no longer for a load).
Then prompts of mixed length: the text after a load beside the text over vLLM's own cache (wanted: all equal; the same tokens
are computed over the same KV), and the server's count of loaded tokens. Then no reuse, 16 requests in flight: throughput beside
plain (wanted: 0.99 x). Then how soon a killed engine's GPU memory is free.
Needs 80 GB of GPU memory for an 8B model. Run, with vLLM's flags for the model behind `--`:
python benchmarks/gpu_engine.py --model DIR [--l1-gib 40] [--repeats 5] [--mixed 100] -- [VLLM FLAGS]
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from common import percentile, report, server
from engines import REQUEST_SECONDS, Answer, Engine, end_on_sigterm, make_prompt, start_side_by_side, transfer_flags

from lmcache.client.mq import MessageQueueClient
from lmcache.protocol import Clear, Status

CHUNK_TOKENS = 256
NEW_TOKENS = 8
OUTPUT_TOKENS = 32
LOAD_PROMPT_TOKENS, LOAD_OUTPUT_TOKENS, LOAD_IN_FLIGHT = 4096, 128, 16
# More prompts than vLLM's own cache holds, and no more than L1 does.
BESIDE_PROMPT_TOKENS, BESIDE_OTHERS, BESIDE_OTHERS_TOKENS = 8192, 8, 8000
BESIDE_QUIET_SECONDS = 0.3
SETTLE_SECONDS = 10.0
# After it the GPU's clocks, and the caches of the engine's CPU, are no longer those of a prefill.
IDLE_SECONDS = 0.1


def pinned_gb_per_s() -> float:
    """Return the speed of a plain pinned copy to the device, GB/s."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    taken = []
    for _ in range(8):
        torch.cuda.synchronize()
        started = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    del device
    torch.cuda.empty_cache()
    return host.numel() / min(taken) / 1e9


class Cache:
    """The cache server, asked for its counters."""

    def __init__(self, mq: MessageQueueClient) -> None:
        self._mq = mq

    def counter(self, name: str) -> int:
        """Return one of its counters."""
        return int(self._mq.call(Status()).status["counters"][name])

    def wait_until_stored(self, num_chunks: int) -> None:
        """Return when so many chunks have been stored, or when it is no use to wait."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self.counter("stored_chunks") < num_chunks and time.monotonic() < deadline:
            time.sleep(0.02)

    def clear(self) -> None:
        """Empty it."""
        self._mq.call(Clear())


def engine_env(name: str, log_dir: Path) -> dict[str, str]:
    """Return what an engine's environment has to say; each has its own folder for compiled code."""
    return {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CACHE_ROOT": f"{os.environ.get('VLLM_CACHE_ROOT', log_dir)}/{name}"}


def start_both(ours: Engine, plain: Engine, stack: ExitStack) -> None:
    """Start both side by side, until the end of `stack`; each has answered once on return."""
    start_side_by_side((ours, plain), stack)
    for engine in (ours, plain):
        engine.ask(make_prompt("warm up", 512), 16)


def tpot_ms(answer: Answer) -> float:
    """Return the time of each output token after the first."""
    return (answer.ended_at - answer.first_token_at) * 1e3 / max(1, answer.output_tokens - 1)


def measure_ttft(ours: Engine, plain: Engine, cache: Cache, num_tokens: int, repeats: int, wire: float) -> dict[str, float]:
    """TTFT and TPOT of one prompt length, medians in ms; the first prompt warms up."""
    taken: dict[str, list[float]] = defaultdict(list)
    for repeat in range(repeats + 1):
        prompt = make_prompt((num_tokens, repeat, time.time()), num_tokens + NEW_TOKENS)
        answers = {}
        expected = cache.counter("stored_chunks") + num_tokens // CHUNK_TOKENS
        turns = ((ours, "ours"), (plain, "plain")) if repeat % 2 else ((plain, "plain"), (ours, "ours"))
        for engine, name in turns:
            answers[f"{name}_cold"] = engine.ask(prompt, OUTPUT_TOKENS)
        cache.wait_until_stored(expected)
        for engine, name in turns:
            time.sleep(IDLE_SECONDS)
            answers[f"{name}_hbm"] = engine.ask(prompt, OUTPUT_TOKENS)
        ours.forget()
        time.sleep(IDLE_SECONDS)
        before = cache.counter("retrieved_tokens")
        answers["ours_tier"] = ours.ask(prompt, OUTPUT_TOKENS)
        if repeat:
            for name, answer in answers.items():
                taken[f"{name}_ttft"].append(answer.ttft_ms)
                taken[f"{name}_tpot"].append(tpot_ms(answer))
            taken["loaded_tokens"].append(cache.counter("retrieved_tokens") - before)
    cache.clear()
    figures = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    moved_ms = num_tokens // CHUNK_TOKENS * CHUNK_TOKENS * KV_BYTES_PER_TOKEN / wire / 1e6
    figures["floor_ttft"] = round(figures["ours_hbm_ttft"] + moved_ms, 2)
    figures["above_floor_ms"] = round(figures["ours_tier_ttft"] - figures["floor_ttft"], 2)
    figures["own_cache_added_ms"] = round(figures["ours_hbm_ttft"] - figures["plain_hbm_ttft"], 2)
    figures["cold_ratio"] = round(figures["ours_cold_ttft"] / figures["plain_cold_ttft"], 4)
    figures["cold_tpot_ratio"] = round(figures["ours_cold_tpot"] / figures["plain_cold_tpot"], 4)
    print(f"{num_tokens} tokens: {figures}", flush=True)
    return figures


# Of a Llama 3.1 8B in bf16; the floor of another model needs another figure.
KV_BYTES_PER_TOKEN = 131072


class Others:
    """Requests that decode until the end of `with`, and when their tokens came."""

    def __init__(self, engine: Engine, count: int, output_tokens: int) -> None:
        self._times: list[list[float]] = [[] for _ in range(count)]
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._decode, args=(engine, number, output_tokens), daemon=True) for number in range(count)
        ]

    def __enter__(self) -> Others:
        for thread in self._threads:
            thread.start()
        while not all(self._times):
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(REQUEST_SECONDS)

    @property
    def are_all_there(self) -> bool:
        """Whether none has ended yet."""
        return all(thread.is_alive() for thread in self._threads)

    def longest_gap_ms(self, start: float, end: float) -> float:
        """Return the longest gap between two tokens of any of them, of which the second came in [start, end)."""
        pairs = [pair for times in self._times for pair in itertools.pairwise(list(times)) if start <= pair[1] < end]
        return max(((after - before) * 1e3 for before, after in pairs), default=(end - start) * 1e3)

    def _decode(self, engine: Engine, number: int, output_tokens: int) -> None:
        with contextlib.suppress(StopDecodingError):
            engine.ask(make_prompt(("other", number, time.time()), 64), output_tokens, on_token=lambda: self._note(number))

    def _note(self, number: int) -> None:
        self._times[number].append(time.monotonic())
        if self._is_over.is_set():
            raise StopDecodingError


class StopDecodingError(Exception):
    """The client hangs up."""


def measure_beside(ours: Engine, cache: Cache, count: int, num_tokens: int = BESIDE_PROMPT_TOKENS) -> dict[str, float]:
    """TTFT of prompts that come back while others decode, and what that does to the others; medians in ms."""
    prompts = [make_prompt(("beside", number, time.time()), num_tokens + NEW_TOKENS) for number in range(count)]
    for prompt in prompts:
        expected = cache.counter("stored_chunks") + num_tokens // CHUNK_TOKENS
        ours.ask(prompt, 2)
        cache.wait_until_stored(expected)
    taken: dict[str, list[float]] = defaultdict(list)
    with Others(ours, BESIDE_OTHERS, BESIDE_OTHERS_TOKENS) as others:
        for prompt in prompts:
            for name in ("quiet", "tier", "own"):
                before, started = cache.counter("retrieved_tokens"), time.monotonic()
                if name == "quiet":
                    time.sleep(BESIDE_QUIET_SECONDS)
                else:
                    answer = ours.ask(prompt, 2)
                    if cache.counter("retrieved_tokens") - before != (num_tokens if name == "tier" else 0):
                        continue  # vLLM's own cache still had some of it, or no longer
                    taken[f"{name}_ttft"].append(answer.ttft_ms)
                time.sleep(0.02)  # the others' next tokens
                taken[f"{name}_others_longest_gap"].append(others.longest_gap_ms(started, time.monotonic()))
        assert others.are_all_there, "the others ended too soon"
    cache.clear()
    figures = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    figures["loads"] = len(taken["tier_ttft"])
    print(f"beside {BESIDE_OTHERS} others: {figures}", flush=True)
    return figures


def measure_mixed(ours: Engine, cache: Cache, count: int) -> dict[str, int]:
    """Texts after loads beside texts over vLLM's own cache, which holds just as many tokens: the whole chunks."""
    generator = random.Random(11)
    equal = loaded = wanted = 0
    for number in range(count):
        num_chunks = generator.randrange(1, 12)
        num_tokens = num_chunks * CHUNK_TOKENS
        prompt = make_prompt(("mixed", number, time.time()), num_tokens + generator.randrange(1, CHUNK_TOKENS))
        expected = cache.counter("stored_chunks") + num_chunks
        text_of(ours, prompt[:num_tokens])
        cache.wait_until_stored(expected)
        over_own_cache = text_of(ours, prompt)
        ours.forget()
        before = cache.counter("retrieved_tokens")
        after_load = text_of(ours, prompt)
        loaded += cache.counter("retrieved_tokens") - before
        wanted += num_tokens
        equal += after_load == over_own_cache
    cache.clear()
    figures = {"prompts": count, "equal": equal, "loaded_tokens": loaded, "loadable_tokens": wanted}
    print(f"mixed prompts: {figures}", flush=True)
    return figures


def text_of(engine: Engine, prompt: list[int]) -> str:
    """Return a greedy answer's text."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 16, "temperature": 0.0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{engine.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return str(json.load(response)["choices"][0]["text"])


def measure_load(ours: Engine, plain: Engine, cache: Cache, count: int, rounds: int) -> dict[str, float]:
    """Throughput without any reuse."""
    taken: dict[str, list[float]] = defaultdict(list)
    for turn in range(rounds):
        for name, engine in (("ours", ours), ("plain", plain)) if turn % 2 else (("plain", plain), ("ours", ours)):
            prompts = [make_prompt(("load", name, turn, n, time.time()), LOAD_PROMPT_TOKENS) for n in range(count)]
            started = time.monotonic()
            with ThreadPoolExecutor(LOAD_IN_FLIGHT) as pool:
                answers = list(pool.map(lambda prompt: engine.ask(prompt, LOAD_OUTPUT_TOKENS), prompts))  # noqa: B023
            taken[f"{name}_tokens_per_s"].append(count * LOAD_OUTPUT_TOKENS / (time.monotonic() - started))
            taken[f"{name}_ttft_p50_ms"].append(percentile([answer.ttft_ms for answer in answers], 0.5))
        cache.clear()
    figures = {name: round(statistics.median(values), 1) for name, values in taken.items()}
    figures["throughput_ratio"] = round(figures["ours_tokens_per_s"] / figures["plain_tokens_per_s"], 4)
    print(f"no reuse: {figures}", flush=True)
    return figures


def gpu_memory_mib() -> dict[int, int]:
    """Return what each process holds of the GPU's memory."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    rows = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split("\n")
    return {int(pid): int(mib) for pid, _, mib in (row.partition(",") for row in rows if row.strip())}


def seconds_until_free(engine: Engine) -> float:
    """Kill an engine and return when the GPU knows nothing of it any more."""
    mine = {member.pid for member in engine.members()}
    started = time.monotonic()
    os.killpg(engine.group, signal.SIGKILL)
    while mine & gpu_memory_mib().keys() and time.monotonic() - started < 120:
        time.sleep(0.05)
    return time.monotonic() - started


def make_parser(description: str | None, l1_gib: float = 40.0) -> argparse.ArgumentParser:
    """Return a parser of what every benchmark with an engine on a GPU takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--l1-gib", type=float, default=l1_gib)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--log-dir", type=Path)
    parser.add_argument("vllm_flags", nargs="*")
    return parser


def main() -> None:
    """Print the figures and the JSON line."""
    parser = make_parser(__doc__)
    parser.add_argument("--beside", type=int, default=18)
    parser.add_argument("--mixed", type=int, default=100)
    parser.add_argument("--load", type=int, default=48)
    args = parser.parse_args()
    end_on_sigterm()
    wire = pinned_gb_per_s()
    with ExitStack() as stack:
        log_dir = args.log_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log_dir.mkdir(parents=True, exist_ok=True)
        url, server_pid = stack.enter_context(server("--l1-size-gb", str(args.l1_gib)))
        cache = Cache(stack.enter_context(MessageQueueClient(url)))
        flags = ["--max-model-len", "40960", "--no-enforce-eager", *args.vllm_flags]
        engines = {
            name: Engine(name, args.model, log_dir, [*flags, *more], engine_env(name, log_dir))
            for name, more in (("ours", transfer_flags(url)), ("plain", []))
        }
        started = time.monotonic()
        start_side_by_side(engines.values(), stack)
        print(f"both are healthy after {time.monotonic() - started:.0f} s", flush=True)
        ours, plain = engines["ours"], engines["plain"]
        memory = gpu_memory_mib()
        held = {name: sum(memory.get(member.pid, 0) for member in engine.members()) for name, engine in engines.items()}
        held["server"] = memory.get(server_pid, 0)
        print(f"GPU memory (MiB): {held}; a pinned copy: {wire:.1f} GB/s", flush=True)
        for engine in (ours, plain):
            engine.ask(make_prompt("warm up", 512), 16)
        ttft = {str(length): measure_ttft(ours, plain, cache, length, args.repeats, wire) for length in args.lengths}
        beside = measure_beside(ours, cache, args.beside) if args.beside else {}
        mixed = measure_mixed(ours, cache, args.mixed)
        load = measure_load(ours, plain, cache, args.load, 2) if args.load else {}
        free_seconds = seconds_until_free(ours)
        print(f"a killed engine's GPU memory was free after {free_seconds:.2f} s", flush=True)
    report(
        "gpu_engine",
        device=torch.cuda.get_device_name(),
        pinned_gb_per_s=round(wire, 2),
        gpu_memory_mib=held,
        ttft=ttft,
        beside=beside,
        mixed=mixed,
        no_reuse=load,
        seconds_until_free=round(free_seconds, 2),
    )


if __name__ == "__main__":
    main()
