"""The kernel of `kernels.py` in Triton; imported only where it is used.

One program moves up to 64 KiB of one block of one plane, in rounds of coalesced accesses. It runs on the CPU under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

# 8-byte words: 4 rounds of 16 KiB.
ROUND_WORDS = 2048
ROUNDS = 4
NUM_WARPS = 8


# One variant for all sizes: compiling takes a tenth of a second, which no request shall wait for.
@triton.jit(do_not_specialize=["addresses", "strides", "block_ids", "num_planes", "blocks_per_chunk", "num_words"])
def _move_blocks(  # type: ignore[no-untyped-def]
    addresses,
    strides,
    block_ids,
    buffer,
    num_planes,
    blocks_per_chunk,
    num_words,
    WORD: tl.constexpr,
    GATHERS: tl.constexpr,
    ROUND: tl.constexpr,
    NUM_ROUNDS: tl.constexpr,
):
    at, plane, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = tl.load(block_ids + at)
    if block >= 0:
        address = tl.load(addresses + plane) + block * tl.load(strides + plane)
        chunk, index = at // blocks_per_chunk, at % blocks_per_chunk
        row = ((chunk * num_planes + plane) * blocks_per_chunk + index).to(tl.int64)
        if WORD == 8:
            paged = tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16)
            packed = tl.multiple_of(buffer.to(tl.pointer_type(tl.int64)) + row * num_words, 16)
        elif WORD == 4:
            paged = address.to(tl.pointer_type(tl.int32))
            packed = buffer.to(tl.pointer_type(tl.int32)) + row * num_words
        elif WORD == 2:
            paged = address.to(tl.pointer_type(tl.int16))
            packed = buffer.to(tl.pointer_type(tl.int16)) + row * num_words
        else:
            paged = address.to(tl.pointer_type(tl.int8))
            packed = buffer.to(tl.pointer_type(tl.int8)) + row * num_words
        for number in tl.static_range(NUM_ROUNDS):
            words = (part * NUM_ROUNDS + number) * ROUND + tl.arange(0, ROUND)
            is_inside = words < num_words
            if GATHERS:
                tl.store(packed + words, tl.load(paged + words, mask=is_inside), mask=is_inside)
            else:
                tl.store(paged + words, tl.load(packed + words, mask=is_inside), mask=is_inside)


def move_blocks(
    addresses: torch.Tensor,
    strides: torch.Tensor,
    block_ids: torch.Tensor,
    buffer: torch.Tensor,
    blocks_per_chunk: int,
    block_bytes: int,
    word_bytes: int,
    gathers: bool,
) -> None:
    """Launch the kernel on the current stream; see `kernels.MoveBlocks`."""
    num_words = block_bytes // word_bytes
    rounds = min(ROUNDS, -(-num_words // ROUND_WORDS))
    grid: Any = (block_ids.numel(), addresses.numel(), -(-num_words // (ROUND_WORDS * rounds)))
    _move_blocks[grid](
        addresses,
        strides,
        block_ids,
        buffer,
        addresses.numel(),
        blocks_per_chunk,
        num_words,
        WORD=word_bytes,
        GATHERS=gathers,
        ROUND=ROUND_WORDS,
        NUM_ROUNDS=rounds,
        num_warps=NUM_WARPS,
    )
