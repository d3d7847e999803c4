"""Clients of vLLM that ask, wait, read along or hang up, and compare what they get.

Comes in: references. Goes out: `Tally`.
"""

import http.client
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType

from tests.chaos_vllm.answers import OUTPUT_TOKENS, Reference
from tests.chaos_vllm.completion import Completion, complete

JOIN_SECONDS = 600.0
# How a request goes on, and how often: the first two are read to their end.
MANNERS = {"waits": 5, "reads along": 4, "hangs up at once": 1, "hangs up waiting": 3, "hangs up reading": 2}
ABORTS = [manner for manner in MANNERS if manner.startswith("hangs")]
LONGEST_PATIENCE_SECONDS = 3.0


@dataclass
class Tally:
    """What became of the requests."""

    manners: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    checked_tokens: int = 0
    longest_seconds: float = 0.0

    @property
    def num_requests(self) -> int:
        return self.manners.total()

    @property
    def num_aborts(self) -> int:
        return sum(self.manners[manner] for manner in ABORTS)

    @property
    def num_5xx(self) -> int:
        return sum(count for status, count in self.statuses.items() if status >= 500)


class Clients:
    """Threads that ask until the `with` block ends; each has a seed of its own."""

    def __init__(self, port: int, references: list[Reference], num_threads: int, generator: random.Random) -> None:
        self.tally = Tally()
        self._port = port
        self._references = references
        self._stop = threading.Event()
        self._lock = threading.Lock()
        seeds = [generator.randrange(2**32) for _ in range(num_threads)]
        self._threads = [threading.Thread(target=self._run, args=(random.Random(seed),), daemon=True) for seed in seeds]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        deadline = time.monotonic() + JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        assert not any(thread.is_alive() for thread in self._threads), "a request hangs"

    def _run(self, generator: random.Random) -> None:
        while not self._stop.is_set():
            self._one_request(generator)

    def _one_request(self, generator: random.Random) -> None:
        # The first ones more often: they are there again before they are evicted.
        reference = self._references[int(len(self._references) * generator.random() ** 2)]
        (manner,) = generator.choices(list(MANNERS), weights=list(MANNERS.values()))
        max_tokens = generator.randint(1, OUTPUT_TOKENS)
        started_at = time.monotonic()
        try:
            completion = self._ask(generator, reference, manner, max_tokens)
        except (OSError, http.client.HTTPException) as exc:
            with self._lock:
                self.tally.manners[manner] += 1
                self.tally.errors.append(f"{manner}: {exc!r} after {time.monotonic() - started_at:.1f} s")
            self._stop.wait(0.5)  # vLLM may be gone
            return
        fault = reference.fault_of(completion)
        if completion.is_whole and len(completion.tokens) != max_tokens:
            fault = f"{len(completion.tokens)} tokens, not {max_tokens}"
        with self._lock:
            tally = self.tally
            tally.manners[manner] += 1
            tally.checked_tokens += len(completion.tokens)
            tally.longest_seconds = max(tally.longest_seconds, time.monotonic() - started_at)
            if completion.status:
                tally.statuses[completion.status] += 1
            if completion.status not in (0, 200):
                tally.errors.append(f"{manner}: HTTP {completion.status} {completion.error}")
            if fault:
                tally.wrong.append(f"prompt of {len(reference.prompt)} tokens, {manner}: {fault}")

    def _ask(self, generator: random.Random, reference: Reference, manner: str, max_tokens: int) -> Completion:
        prompt = reference.prompt
        if manner == "waits":
            return complete(self._port, prompt, max_tokens)
        if manner == "reads along":
            return complete(self._port, prompt, max_tokens, streams=True)
        if manner == "hangs up at once":
            return complete(self._port, prompt, max_tokens, is_enough=lambda _: True)
        if manner == "hangs up reading":
            num_tokens = generator.randint(1, max_tokens)
            return complete(
                self._port, prompt, max_tokens, streams=True, is_enough=lambda completion: len(completion.tokens) >= num_tokens
            )
        # Small more often: that is while the lookup and the load go on.
        patience = 0.002 + LONGEST_PATIENCE_SECONDS * generator.random() ** 3
        return complete(self._port, prompt, max_tokens, streams=generator.random() < 0.5, patience_seconds=patience)
