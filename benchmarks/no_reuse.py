"""What does the cache cost where nothing is ever used again?

Two vLLMs on the CPU with a tiny model, one without a connector (the floor) and one with ours, take turns: each gets the same
batch of prompts that nobody has sent before, at once. L1 is full from the start, so every store evicts; over the run the
prompts hold twice what L1 holds. Wanted: 0.97 x of the floor's throughput, and a TTFT of which the floor's is 0.97 x.
Ratios are medians over the batches. Needs 6 GB of memory.
Run: python benchmarks/no_reuse.py [--prompt-tokens 1024] [--output-tokens 32] [--batch 4] [--l1-mib 64]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from common import percentile, report, server, wait_resident
from engines import Engine, end_on_sigterm, idle_load, load_average, make_prompt, make_tiny_model, transfer_flags

from lmcache.client.kvcache import KVCacheClient
from lmcache.client.mq import MessageQueueClient
from lmcache.keys import KEY_BYTES, Namespace, chunk_keys
from lmcache.protocol import Status

BYTES_PER_TOKEN = 4096
WARM_BATCHES = 1


def fill(url: str, num_bytes: int) -> None:
    """Fill L1 with chunks as large as the engine's, so that it has to evict from its first store on."""
    with KVCacheClient(url, kind="benchmark") as client:
        chunk = bytes(client.attach().chunk_size * BYTES_PER_TOKEN)
        keys = chunk_keys(Namespace(model="filler", chunk_size=1), range(num_bytes // len(chunk)))
        for at in range(0, len(keys), KEY_BYTES):
            client.store(keys[at : at + KEY_BYTES], [chunk])


def counters(url: str) -> dict[str, float]:
    """Return what the server has counted."""
    with MessageQueueClient(url) as client:
        status = client.call(Status()).status
    return {
        "stored": status["counters"]["stored_chunks"],
        "evicted": sum(status["counters"]["evicted_chunks"].values()),
        "used_ratio": status["l1"]["used_bytes"] / status["l1"]["capacity_bytes"],
    }


def ask_batch(engine: Engine, prompts: list[list[int]], output_tokens: int) -> dict[str, float]:
    """Send all prompts at once; return the tokens a second, read and written, and the TTFTs' median in ms."""
    started = time.monotonic()
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: engine.ask(prompt, output_tokens), prompts))
    seconds = max(answer.ended_at for answer in answers) - started
    assert not any(answer.cached_tokens for answer in answers), "a prompt was reused"
    tokens = sum(answer.prompt_tokens + answer.output_tokens for answer in answers)
    return {"tokens_per_s": tokens / seconds, "ttft_ms": percentile([answer.ttft_ms for answer in answers], 0.5)}


def main() -> None:
    """Print the ratios and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--l1-mib", type=int, default=64)
    args = parser.parse_args()
    end_on_sigterm()
    batch_bytes = args.batch * args.prompt_tokens * BYTES_PER_TOKEN
    num_batches = -(-2 * (args.l1_mib << 20) // batch_bytes)
    load_before = load_average()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="no-reuse-")))
        url, pid = stack.enter_context(server("--l1-size-gb", str(args.l1_mib / 1024)))
        wait_resident(pid, args.l1_mib << 20)
        fill(url, args.l1_mib << 20)
        model = make_tiny_model(folder / "model")
        engines = {"floor": Engine("floor", model, folder, []), "ours": Engine("ours", model, folder, transfer_flags(url))}
        for engine in engines.values():
            stack.enter_context(engine)
        idle = idle_load(list(engines.values()))
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        for number in range(-WARM_BATCHES, num_batches):
            prompts = [make_prompt((number, index), args.prompt_tokens) for index in range(args.batch)]
            if number == 0:
                before = counters(url)
            for name, engine in sorted(engines.items(), reverse=number % 2 == 0):
                figures = ask_batch(engine, prompts, args.output_tokens)
                if number >= 0:
                    taken[name].append(figures)
        after = counters(url)
    pairs = list(zip(taken["ours"], taken["floor"], strict=True))
    throughput = sorted(ours["tokens_per_s"] / floor["tokens_per_s"] for ours, floor in pairs)
    ttft = sorted(floor["ttft_ms"] / ours["ttft_ms"] for ours, floor in pairs)
    medians = {
        name: {key: round(percentile([figures[key] for figures in found], 0.5), 1) for key in found[0]}
        for name, found in taken.items()
    }
    stored, evicted = (after[key] - before[key] for key in ("stored", "evicted"))
    print(f"two idle engines use {idle:.0%} of a core; load average {load_before} before, {load_average()} after")
    print(
        f"{num_batches} batches of {args.batch}: {stored} chunks stored, {evicted} evicted, L1 {after['used_ratio']:.0%} full"
    )
    for what, ratios, unit in (("throughput", throughput, "tokens_per_s"), ("TTFT", ttft, "ttft_ms")):
        quartiles = percentile(ratios, 0.25), percentile(ratios, 0.75)
        print(
            f"{what}: ours {medians['ours'][unit]}, floor {medians['floor'][unit]} {unit}: {percentile(ratios, 0.5):.3f} x"
            f" (quartiles {quartiles[0]:.3f} to {quartiles[1]:.3f})"
        )
    report(
        "no_reuse",
        throughput_ratio=round(percentile(throughput, 0.5), 3),
        ttft_ratio=round(percentile(ttft, 0.5), 3),
        batches=num_batches,
        stored_chunks=stored,
        evicted_chunks=evicted,
        load_average=[load_before, load_average()],
        **medians,
    )


if __name__ == "__main__":
    main()
