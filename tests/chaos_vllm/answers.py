"""What vLLM must answer, and what of an answer rounding may decide.

A prompt is computed in steps that depend on what is cached of it and on who else is there, and each split of the same sums
rounds otherwise: a logit of this model moves by one unit of bf16 in the last place, 1/64 at its size. So a token is right

- when it is the reference's and its log probability differs by at most TOLERANCE, or
- when it is one of those that the reference finds likely within TOLERANCE of the best. What follows it has no reference.

One other chunk in the prompt changes more than that. So does one changed byte in each of its chunks, tried by hand, in five
prompts of six; in one of these only the log probability tells.

A prompt is used when its first token cannot be such a toss-up, and when all its references are right by that rule: computed
alone, computed among others, and continued from vLLM's own prefix cache at the boundaries of chunks.
"""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tests.chaos_vllm.completion import Completion

CHUNK_SIZE = 64
MAX_CHUNKS = 12
# In nats. The largest difference seen between splits of one prompt is 1/64, in 5,334 comparisons; one other chunk in the prompt
# changes the first token, or its log probability by more than 0.2.
TOLERANCE = 0.05
OUTPUT_TOKENS = 24
MIN_PROMPTS = 15
MAX_STEMS = 20
LENGTHS = (1, 2, 3, 4, 6, 12)

Ask = Callable[..., Completion]


@dataclass(frozen=True)
class Reference:
    """A prompt and its answer."""

    prompt: tuple[int, ...]
    answer: Completion

    def fault_of(self, completion: Completion) -> str:
        """Return what is wrong with the tokens that came, all or the first of them; "" when nothing is."""
        right = self.answer
        for at, token in enumerate(completion.tokens):
            likely = right.likely[at]
            if max(likely.values()) - likely.get(token, -1e9) > TOLERANCE:
                return f"token {at} is {token}, not {right.tokens[at]} ({likely})"
            if token != right.tokens[at]:
                return ""
            if abs(completion.logprobs[at] - right.logprobs[at]) > TOLERANCE:
                return f"token {at} has log probability {completion.logprobs[at]}, not {right.logprobs[at]}"
        return ""

    @property
    def is_sure(self) -> bool:
        """Whether the first token is no toss-up."""
        first, second, *_ = sorted(self.answer.likely[0].values(), reverse=True)
        return first - second > 2 * TOLERANCE


def make_prompts(generator: random.Random) -> list[tuple[int, ...]]:
    """Return prompts of 1 to MAX_CHUNKS chunks and a tail that begin alike."""
    stem = _tokens(generator, MAX_CHUNKS * CHUNK_SIZE)
    prompts = []
    for num_chunks in LENGTHS:
        branch_at = num_chunks * CHUNK_SIZE - generator.choice([0, 0, generator.randrange(CHUNK_SIZE)])
        prompts.append((*stem[:branch_at], *_tokens(generator, generator.randrange(1, 2 * CHUNK_SIZE))))
    return prompts


def _tokens(generator: random.Random, count: int) -> list[int]:
    return [generator.randrange(10, 8000) for _ in range(count)]


def make_references(ask: Ask, generator: random.Random, num_threads: int, boundaries: int) -> list[Reference]:
    """Return the prompts that can be used, with their answers. No cache server may be in reach of vLLM meanwhile.

    Args:
        ask: asks vLLM; takes a prompt, a number of tokens and a `cache_salt`.
        boundaries: at how many chunk boundaries to continue each prompt from vLLM's own cache.
    """
    sure: list[Reference] = []
    for num_stems in range(MAX_STEMS):
        if len(sure) >= MIN_PROMPTS:
            break
        for number, prompt in enumerate(make_prompts(generator)):
            reference = Reference(prompt, ask(prompt, OUTPUT_TOKENS, cache_salt=f"alone {num_stems} {number}"))
            if reference.is_sure:
                sure.append(reference)
    generator.shuffle(sure)

    def in_company(numbered: tuple[int, Reference]) -> str:
        return numbered[1].fault_of(ask(numbered[1].prompt, OUTPUT_TOKENS, cache_salt=f"company {numbered[0]}"))

    def continued(numbered: tuple[int, Reference]) -> str:
        number, reference = numbered
        faults = ""
        for num_chunks in _some(generator, len(reference.prompt) // CHUNK_SIZE, boundaries):
            salt = f"continued {number} {num_chunks}"
            ask(reference.prompt[: num_chunks * CHUNK_SIZE + 1], 1, cache_salt=salt)
            faults += reference.fault_of(ask(reference.prompt, OUTPUT_TOKENS, cache_salt=salt))
        return faults

    with ThreadPoolExecutor(num_threads) as pool:
        faults = list(pool.map(in_company, enumerate(sure)))
    faults = [a + b for a, b in zip(faults, map(continued, enumerate(sure)), strict=True)]
    stable = [reference for reference, fault in zip(sure, faults, strict=True) if not fault]
    print(f"\nreferences: {len(sure)} prompts with a sure first token, {len(stable)} stable", *filter(None, faults))
    assert len(stable) > MIN_PROMPTS // 2, "too few prompts have one answer"
    return stable


def _some(generator: random.Random, count: int, limit: int) -> Sequence[int]:
    return generator.sample(range(1, count + 1), min(count, limit))
