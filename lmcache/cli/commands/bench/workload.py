"""What a benchmark stores: which keys, with which bytes, in which order of operations.

Comes in: a seed and sizes. Goes out: keys, chunk contents and what their checksums must be. Nothing here has seen a server:
whether a chunk came back right is decided from (seed, key) alone. Next on the path: `worker.py`.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from enum import Enum

import msgspec

from lmcache.client.kvcache import checksum
from lmcache.errors import UsageError
from lmcache.keys import Namespace, chunk_keys, split_keys

MODEL = "lmcache-bench"
STAMP_BYTES = 8
STAMP_EVERY_BYTES = 4096
_WORDS_BETWEEN_STAMPS = STAMP_EVERY_BYTES // STAMP_BYTES
# Prompts from here on only fill L1; they are never read. Token ids, and so prompt numbers, are 32 bits wide.
FILL_PROMPTS_FROM = 1 << 31
# From here on places are reserved for raw copies; nothing is ever stored under these keys.
RAW_PROMPTS_FROM = (1 << 32) - (1 << 16)


class OperationKind(str, Enum):
    """What a worker does in one operation, always to one whole prompt."""

    STORE = "store"
    RETRIEVE = "retrieve"
    LOOKUP = "lookup"


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """A set of prompts of equal size. Equal fields mean equal keys and equal bytes, in any process.

    `salt` keeps one run's chunks apart from everything else in the cache.
    """

    salt: str
    seed: int
    chunk_bytes: int
    chunks_per_prompt: int

    @property
    def prompt_bytes(self) -> int:
        """All chunks of one prompt."""
        return self.chunk_bytes * self.chunks_per_prompt

    @property
    def namespace(self) -> Namespace:
        """One token a chunk: the keys are chained as a real prompt's are, and nothing needs a tokenizer."""
        return Namespace(
            model=MODEL,
            revision=str(self.seed),
            dtype="bytes",
            layout=str(self.chunk_bytes),
            chunk_size=1,
            cache_salt=self.salt,
        )

    def keys(self, prompt: int) -> bytes:
        """Return the keys of a prompt's chunks, concatenated."""
        return chunk_keys(self.namespace, [prompt, *range(1, self.chunks_per_prompt)])


class Content:
    """A buffer of one prompt's size that takes on the content of any prompt in a few microseconds.

    Every chunk is the same random block, derived from the seed, and every page of it carries the first 8 bytes of its
    chunk's key: two chunks differ in each page, two pages of a chunk differ, and changing the key rewrites 8 bytes a page.
    """

    def __init__(self, workload: Workload) -> None:
        block = hashlib.shake_128(b"lmcache bench" + workload.seed.to_bytes(8, "little"))
        self._buffer = PromptBuffer(workload, block.digest(workload.chunk_bytes))
        self._workload = workload

    @property
    def chunks(self) -> list[memoryview]:
        """The chunks of the prompt that `become` named last."""
        return self._buffer.chunks

    @property
    def whole(self) -> memoryview:
        """The same, one after the other."""
        return self._buffer.whole

    def become(self, keys: bytes) -> None:
        """Hold the content of the chunks with these keys."""
        self._buffer.stamp([key[:STAMP_BYTES] for key in split_keys(keys)])

    def checksums(self) -> list[int]:
        """Return what the checksum of each chunk must be."""
        return [checksum(chunk) for chunk in self.chunks]

    def checksums_of(self, prompt: int) -> list[int]:
        """Return what the checksum of each of the prompt's chunks must be."""
        self.become(self._workload.keys(prompt))
        return self.checksums()


class PromptBuffer:
    """Private memory for one prompt's chunks, one after the other.

    Args:
        block: what each chunk holds at first.
    """

    def __init__(self, workload: Workload, block: bytes) -> None:
        size = workload.chunk_bytes
        self.whole = view = memoryview(bytearray(block * workload.chunks_per_prompt))
        self.chunks = [view[at : at + size] for at in range(0, len(view), size)]
        whole_words = size // STAMP_BYTES * STAMP_BYTES
        self._stamps = [chunk[:whole_words].cast("Q")[::_WORDS_BETWEEN_STAMPS] for chunk in self.chunks]

    def stamp(self, words: list[bytes]) -> None:
        """Write one 8-byte word into each page of each chunk."""
        for stamps, word in zip(self._stamps, words, strict=True):
            stamps[:] = memoryview(word * len(stamps)).cast("Q")

    def blot(self) -> None:
        """Make every page wrong for every key, so that a copy that did not happen is seen."""
        self.stamp([bytes(STAMP_BYTES)] * len(self.chunks))


def first_difference(expected: memoryview, found: memoryview) -> int | None:
    """Return the offset of the first byte that differs, or None."""
    low, high = 0, len(expected)
    if bytes(expected) == bytes(found):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if bytes(expected[low:middle]) == bytes(found[low:middle]):
            low = middle
        else:
            high = middle
    return low


def operations(mix: dict[OperationKind, float], seed: int, lane: int) -> Iterator[OperationKind]:
    """Yield, without end, what a worker does next; the same for the same seed and worker."""
    kinds, weights = list(mix), list(mix.values())
    choices = random.Random(f"{seed}/{lane}/operations")
    while True:
        yield from choices.choices(kinds, weights, k=256)


def fill_prompt(number: int) -> int:
    """Return the `number`-th prompt that is stored only to fill L1."""
    return FILL_PROMPTS_FROM + number


def raw_prompt(lane: int) -> int:
    """Return the prompt under whose keys a worker reserves places for its raw copies."""
    return RAW_PROMPTS_FROM + lane


def lane_size(total: int, lane: int, num_lanes: int) -> int:
    """Return how many of `total` items belong to a lane when they are dealt out in turn."""
    return (total - lane + num_lanes - 1) // num_lanes


def lane_item(number: int, lane: int, num_lanes: int) -> int:
    """Return the lane's `number`-th item."""
    return lane + number * num_lanes


class KeptSet(msgspec.Struct, frozen=True):
    """Prompts 0 to `num_prompts` that a run left in the cache; its text form is what `--reuse` takes."""

    workload: Workload
    num_prompts: int

    def __str__(self) -> str:
        w = self.workload
        return f"{w.salt}-{w.seed}-{self.num_prompts}x{w.chunks_per_prompt}x{w.chunk_bytes}"

    @classmethod
    def parse(cls, text: str) -> KeptSet:
        """Return the set that a `--keep` run printed.

        Raises: UsageError
        """
        found = re.fullmatch(r"([0-9a-f]{16})-([0-9]{1,19})-([0-9]{1,10})x([0-9]{1,5})x([0-9]{1,10})", text)
        if found is None:
            raise UsageError(
                f"{text!r} does not name a set of kept chunks",
                hint="pass what a run with --keep printed",
                code="reuse",
            )
        seed, num_prompts, chunks_per_prompt, chunk_bytes = (int(field) for field in found.groups()[1:])
        if not (0 < num_prompts <= FILL_PROMPTS_FROM and chunks_per_prompt and chunk_bytes):
            raise UsageError(f"{text!r} names no possible set of chunks", hint="pass what a run with --keep printed")
        workload = Workload(salt=found[1], seed=seed, chunk_bytes=chunk_bytes, chunks_per_prompt=chunks_per_prompt)
        return cls(workload, num_prompts)
