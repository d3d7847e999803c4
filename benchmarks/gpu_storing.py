"""What does storing cost the request that is stored?

A vLLM with our connector, which stores some prompts only (`connectors.py`), and a plain one on the same GPU. Prompts that
nobody has seen, of three kinds in turns: stored, unstored (looked up like any other) and plain. Two processes may launch at two
speeds for minutes, so what storing costs is told within one: stored beside unstored (wanted: TTFT <= 1.01 x, TPOT of the lone
request <= 1.03 x). What the lookup and vLLM's own part of a connector cost is unstored beside plain, and says less.
Last, short prompts for two tokens without a pause, ours and plain in turns, as `gpu_pinning.py` asks: a series that is not
stored and one that is, twice; medians in ms.
Of each kind means in ms; of `storing` and `connector` the mean difference, its standard error, and the ratio of the means.
Run, with vLLM's flags for the model behind `--`:
python benchmarks/gpu_storing.py --model DIR [--lengths 512 2048 8192] [--repeats 30] -- [VLLM FLAGS]
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from common import report, server
from connectors import UNSTORED
from engines import Engine, end_on_sigterm, make_prompt, python_path, transfer_flags
from gpu_engine import IDLE_SECONDS, OUTPUT_TOKENS, Cache, engine_env, make_parser, start_both, tpot_ms

from lmcache.client.mq import MessageQueueClient

KINDS = ("stored", UNSTORED, "plain")
SERIES_TOKENS, SERIES_PROMPTS = 512, 60


def measure(engines: Mapping[str, Engine], num_tokens: int, repeats: int) -> dict[str, object]:
    """Ask for prompts of one length and return what is to be said of each kind."""
    ttft: dict[str, list[float]] = {kind: [] for kind in KINDS}
    tpot: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(repeats + 1):
        for kind in random.sample(KINDS, len(KINDS)):
            prompt = make_prompt((num_tokens, repeat, kind, time.time()), num_tokens)
            answer = engines[kind].ask(prompt, OUTPUT_TOKENS, f"{kind}-{num_tokens}-{repeat}")
            if repeat:
                ttft[kind].append(answer.ttft_ms)
                tpot[kind].append(tpot_ms(answer))
            time.sleep(IDLE_SECONDS)
    figures = {"ttft": compared(ttft), "tpot": compared(tpot)}
    print(f"{num_tokens} tokens: {figures}", flush=True)
    return figures


def compared(taken: Mapping[str, Sequence[float]]) -> dict[str, object]:
    """Return each kind's mean, and what the first of two has more."""
    figures: dict[str, object] = {kind: round(statistics.fmean(values), 3) for kind, values in taken.items()}
    for name, (one, other) in {"storing": ("stored", UNSTORED), "connector": (UNSTORED, "plain")}.items():
        differences = [a - b for a, b in zip(taken[one], taken[other], strict=True)]
        figures[name] = {
            "added_ms": round(statistics.fmean(differences), 3),
            "standard_error_ms": round(statistics.stdev(differences) / len(differences) ** 0.5, 3),
            "ratio": round(statistics.fmean(taken[one]) / statistics.fmean(taken[other]), 4),
        }
    return figures


def measure_series(engines: Mapping[str, Engine], kind: str) -> dict[str, object]:
    """Ask for prompts of one kind and plain ones in turns, without a pause."""
    taken: dict[str, list[float]] = {kind: [], "plain": []}
    for number in range(SERIES_PROMPTS):
        prompt = make_prompt((kind, number, time.time()), SERIES_TOKENS)
        for name, values in taken.items():
            values.append(engines[name].ask(prompt, 2, f"{name}-series-{number}").ttft_ms)
    figures: dict[str, object] = {name: round(statistics.median(values), 2) for name, values in taken.items()}
    print(f"without a pause: {figures}", flush=True)
    return figures


def main() -> None:
    """Print the figures and the JSON line."""
    parser = make_parser(__doc__)
    parser.set_defaults(lengths=[512, 2048, 8192], repeats=30)
    args = parser.parse_args()
    end_on_sigterm()
    with ExitStack() as stack:
        folder = args.log_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        url, _ = stack.enter_context(server("--l1-size-gb", str(args.l1_gib)))
        cache = Cache(stack.enter_context(MessageQueueClient(url)))
        selective = transfer_flags(url, kv_connector="SelectiveConnector", kv_connector_module_path="connectors")
        flags = ["--max-model-len", "16384", "--no-enforce-eager", *args.vllm_flags]
        path = python_path(Path(__file__).resolve().parent)
        ours, plain = (
            Engine(name, args.model, folder, [*flags, *more], {**engine_env(name, folder), "PYTHONPATH": path})
            for name, more in (("ours", selective), ("plain", []))
        )
        start_both(ours, plain, stack)
        engines = {"stored": ours, UNSTORED: ours, "plain": plain}
        figures = {}
        for length in args.lengths:
            before = cache.counter("stored_chunks")
            figures[str(length)] = measure(engines, length, args.repeats)
            figures[str(length)]["stored_chunks"] = cache.counter("stored_chunks") - before
            cache.clear()
        series = [measure_series(engines, kind) for kind in (UNSTORED, "stored") * 2]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    report("gpu_storing", device=device, repeats=args.repeats, lengths=figures, without_pause=series)


if __name__ == "__main__":
    main()
