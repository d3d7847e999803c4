"""How much later does the first token of a fully cached prompt come because its KV is loaded?

3,840 cached tokens (15 MiB) and 16 new ones, on a tiny model and a real vLLM on the CPU, one request at a time, four ways that
take turns:

- floor: our connector finds the prompt, and the worker loads nothing. Same process as `ours`.
- ours: our connector. Wanted: at most 10 ms above the floor.
- built-in: vLLM's own connector class with our adapters, vLLM's CUDA events replaced by placeholders.
- own: no connector, vLLM's own prefix cache.

Also: the load beside one memcpy of as many bytes in the worker's own process (wanted: 0.8 x), where the time of a warm request
goes, and the first request after an engine was restarted. vLLM's own prefix cache is off, but for `own`. Needs 8 GB of memory.
On a small machine the engines that wait disturb the one that is asked: `--one-engine` leaves out `built-in` and `own`.
Run: python benchmarks/engine_ttft.py [--one-engine] [--rounds 30] [--restarts 3]
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path

from common import percentile, report, server, wait_resident
from connectors import STAMPS
from engines import (
    PLACEHOLDERS,
    Answer,
    Engine,
    end_on_sigterm,
    idle_load,
    load_average,
    make_prompt,
    make_tiny_model,
    python_path,
    read_stamps,
    transfer_flags,
)

from lmcache.client.mq import MessageQueueClient
from lmcache.protocol import Status

L1_GIB = 0.25
CACHED_TOKENS = 3840
NEW_TOKENS = 16
NUM_PROMPTS = 4  # two ways never load the same bytes right after one another
KINDS = ("floor", "ours", "built-in", "own")
KINDS_OF_ONE_ENGINE = KINDS[:2]
WARM_ROUNDS = 3
NO_OWN_CACHE = ["--no-enable-prefix-caching"]
TIMELINE = {
    "api_received": "the API server has the request",
    "on_new_request": "the engine core queues it",
    "lookup_sent": "the lookup is on its way",
    "match_asked": "the scheduler asks what is cached",
    "match_answered": "it knows",
    "meta_built": "the step is planned",
    "load_begin": "the worker begins to load",
    "load_end": "the load is done",
    "first_layer": "the forward pass is at the first attention layer",
    "forward_end": "the forward pass is done",
    "step_heard": "the engine core has the step's result",
    "api_first_token": "the API server sends the first token",
    "client_first_token": "the client has it",
}


class Bench:
    """The engines, and what was measured."""

    def __init__(self, folder: Path, url: str, kinds: tuple[str, ...]) -> None:
        self.kinds = kinds
        model = make_tiny_model(folder / "model")
        self.stamps_path = folder / "stamps"
        timed = transfer_flags(url, kv_connector="TimedConnector", kv_connector_module_path="connectors")
        here = Path(__file__).resolve().parent
        self.ours = Engine(
            "ours",
            model,
            folder,
            [*NO_OWN_CACHE, *timed, "--middleware", "connectors.StampMiddleware"],
            {"PYTHONPATH": python_path(here), STAMPS: str(self.stamps_path)},
        )
        self.built_in = Engine(
            "built-in",
            model,
            folder,
            [*NO_OWN_CACHE, *transfer_flags(url)],
            {"PYTHONPATH": python_path(PLACEHOLDERS), "LMCACHE_USE_UPSTREAM_MP": "1"},
        )
        self.own = Engine("own", model, folder, [])
        engines = {"floor": self.ours, "ours": self.ours, "built-in": self.built_in, "own": self.own}
        self.engines = {kind: engines[kind] for kind in kinds}
        self.prompts = [make_prompt(n, CACHED_TOKENS + NEW_TOKENS) for n in range(NUM_PROMPTS)]
        self.answers: dict[str, Answer] = {}

    def ask(self, kind: str, prompt: int, name: str) -> float:
        """Return the TTFT in ms of a warm prompt."""
        request_id = f"{kind}-{name}"
        answer = self.engines.get(kind, self.ours).ask(self.prompts[prompt], request_id=request_id)
        assert answer.cached_tokens == CACHED_TOKENS, (kind, answer)
        self.answers[request_id] = answer
        return answer.ttft_ms

    def warm_up(self) -> None:
        """Compute each prompt once where that is needed."""
        for engine in {self.engines.get(kind) for kind in ("ours", "own")} - {None}:
            for prompt in self.prompts:
                engine.ask(prompt)

    def take_turns(self, rounds: int) -> dict[str, list[float]]:
        """Return TTFTs in ms by kind, after some rounds that do not count."""
        taken: dict[str, list[float]] = {kind: [] for kind in self.kinds}
        for number in range(-WARM_ROUNDS, rounds):
            for index in range(len(self.kinds)):
                kind = self.kinds[(number + index) % len(self.kinds)]
                prompt = (number + self.kinds.index(kind)) % NUM_PROMPTS
                ttft_ms = self.ask(kind, prompt, f"{number}x")
                if number >= 0:
                    taken[kind].append(ttft_ms)
        return taken

    def stamps(self, prefix: str) -> list[dict[str, float]]:
        """Return what all processes noted of the requests whose id begins so, one dictionary a request."""
        wanted = {request_id: answer for request_id, answer in self.answers.items() if request_id.startswith(prefix)}
        return list(read_stamps(self.stamps_path, wanted).values())

    def timeline(self, prefix: str) -> dict[str, float]:
        """Return ms after the request was sent, medians."""
        found = [stamps for stamps in self.stamps(prefix) if stamps.keys() >= TIMELINE.keys()]
        return {name: round(median([s[name] - s["sent"] for s in found]) * 1e3, 2) for name in TIMELINE}

    def loads_beside_memcpy(self, rounds: int) -> dict[str, dict[str, float]]:
        """Return figures of the loads as they are, and of such whose worker asks the server for the places first."""
        kinds = ("memcpy", "asking-memcpy")
        for number in range(-WARM_ROUNDS, rounds):
            for kind in kinds[:: 1 if number % 2 else -1]:
                self.ask(kind, number % NUM_PROMPTS, f"{number}x")
        return {kind: self._load_figures(kind) for kind in kinds}

    def _load_figures(self, kind: str) -> dict[str, float]:
        """Return medians in ms of the load, of the copies in it, and of memcpy, and the latter's ratio to the load."""
        found = [s for s in self.stamps(f"{kind}-") if "memcpy_seconds" in s][WARM_ROUNDS:]
        load, copy, memcpy = (median([s[f"{n}_seconds"] for s in found]) * 1e3 for n in ("load", "copy", "memcpy"))
        return {
            "load_ms": round(load, 2),
            "copies_ms": round(copy, 2),
            "memcpy_ms": round(memcpy, 2),
            "mib": found[0]["load_bytes"] / 2**20,
            "ratio": round(median([s["memcpy_seconds"] / s["load_seconds"] for s in found]), 3),
        }

    def restart(self, restarts: int) -> dict[str, list[float]]:
        """Return TTFTs in ms of the first and the later requests after restarts, the kinds taking turns."""
        taken: dict[str, list[float]] = {f"{when}_{kind}": [] for kind in ("floor", "ours") for when in ("first", "later")}
        for number in range(2 * restarts):
            kind = ("floor", "ours")[number % 2]
            self.ours.close()
            self.ours.start()
            times = [self.ask(kind, n % NUM_PROMPTS, f"restart{number}-{n}x") for n in range(9)]
            taken[f"first_{kind}"].append(times[0])
            taken[f"later_{kind}"] += times[1:]
        return taken


def count_failures(url: str) -> int:
    """Return how many blocks were not loaded, and lookups not answered, that should have been."""
    with MessageQueueClient(url) as client:
        counters = client.call(Status()).status["counters"]
    return sum(counters["retrieve_failed"].values()) + sum(counters["lookup_failed"].values())


def median(values: list[float]) -> float:
    return percentile(values, 0.5)


def main() -> None:
    """Print the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--one-engine", action="store_true", help="only `floor` and `ours`, which are one")
    parser.add_argument("--logs", type=Path, help="keep vLLM's logs and all time stamps in this folder")
    args = parser.parse_args()
    end_on_sigterm()
    load_before = load_average()
    with ExitStack() as stack:
        folder = args.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-ttft-")))
        url, pid = stack.enter_context(server("--l1-size-gb", str(L1_GIB)))
        wait_resident(pid, int(L1_GIB * 2**30))
        bench = Bench(folder, url, KINDS_OF_ONE_ENGINE if args.one_engine else KINDS)
        engines = list(dict.fromkeys(bench.engines.values()))
        for engine in engines:
            stack.enter_context(engine)
        bench.warm_up()
        idle = idle_load(engines)
        taken = bench.take_turns(args.rounds)
        bench.built_in.close()
        bench.own.close()
        timelines = {kind: bench.timeline(f"{kind}-") for kind in ("floor", "ours")}
        loads = bench.loads_beside_memcpy(args.rounds)
        restarts = bench.restart(args.restarts)
        failures = count_failures(url)
    medians = {kind: round(median(values), 2) for kind, values in taken.items()}
    added = round(median([ours - floor for ours, floor in zip(taken["ours"], taken["floor"], strict=True)]), 2)
    print(f"{len(engines)} idle engines use {idle:.0%} of a core; load average {load_before} before, {load_average()} after")
    for kind, values in taken.items():
        p10, p50, p90 = (percentile(values, share) for share in (0.1, 0.5, 0.9))
        print(f"{kind:9} TTFT median {p50:6.2f} ms, p10 {p10:6.2f}, p90 {p90:6.2f}")
    print(f"ours - floor, median of the pairs: {added:.2f} ms")
    print("ms after the request was sent (medians), floor and ours:")
    for name, meaning in TIMELINE.items():
        print(f"  {timelines['floor'][name]:6.2f} {timelines['ours'][name]:6.2f}  {meaning}")
    for name, load in zip(("load", "load that asks for its places"), loads.values(), strict=True):
        print(
            f"{name} of {load['mib']:.0f} MiB {load['load_ms']} ms, the copies in it {load['copies_ms']} ms,"
            f" memcpy {load['memcpy_ms']} ms: {load['ratio']} x memcpy"
        )
    for name, values in restarts.items():
        print(f"after a restart, {name.replace('_', ' request(s), ')}: {', '.join(f'{v:.1f}' for v in sorted(values))} ms")
    print(f"{failures} blocks or lookups failed")
    report(
        "engine_ttft",
        ttft_ms=medians,
        ours_above_floor_ms=added,
        load=loads["memcpy"],
        load_that_asks=loads["asking-memcpy"],
        failures=failures,
        timeline_ms=timelines,
        restart_ms={name: round(median(values), 2) for name, values in restarts.items()} if args.restarts else {},
        load_average=[load_before, load_average()],
    )


if __name__ == "__main__":
    main()
