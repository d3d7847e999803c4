"""The kernel of `kernels.py` in Triton; imported only where it is used.

One program moves up to 64 KiB of one block of one plane, in rounds of coalesced accesses. It runs on the CPU under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from lmcache.log import init_logger

logger = init_logger(__name__)

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


class TritonMover:
    """The kernel for one engine's planes.

    On a GPU it is compiled and loaded now, not within the first request, and launched by its handle, which takes the host half
    of the time that `_move_blocks[grid]` does (9 and 18 µs).

    Args:
        addresses, strides: [num_planes] int64 on the planes' device.
    """

    def __init__(self, addresses: torch.Tensor, strides: torch.Tensor, block_bytes: int, word_bytes: int) -> None:
        self._addresses, self._strides = addresses, strides
        self._num_words = block_bytes // word_bytes
        rounds = min(ROUNDS, -(-self._num_words // ROUND_WORDS))
        self._parts = -(-self._num_words // (ROUND_WORDS * rounds))
        self._constants = {
            gathers: {"WORD": word_bytes, "GATHERS": gathers, "ROUND": ROUND_WORDS, "NUM_ROUNDS": rounds}
            for gathers in (True, False)
        }
        self._compiled: dict[bool, Any] = {}
        if addresses.is_cuda:
            self._compile()

    def _compile(self) -> None:
        nothing = torch.full((1,), -1, dtype=torch.int64, device=self._addresses.device)
        stream = torch.cuda.current_stream(nothing.device)
        try:
            for gathers, constants in self._constants.items():
                pointers = torch.int64, torch.int64, torch.int64, torch.uint8
                self._compiled[gathers] = _move_blocks.warmup(*pointers, 1, 1, 1, **constants, num_warps=NUM_WARPS, grid=(1,))
                self.move(nothing, nothing.view(torch.uint8), range(1), range(1), 1, gathers, stream)
        except TypeError as exc:  # what a handle wants to be given is Triton's own business, and has changed before
            logger.debug("Triton %s launches kernels in another way: %s", triton.__version__, exc)
            self._compiled = {}

    def move(
        self,
        block_ids: torch.Tensor,
        buffer: torch.Tensor,
        span: range,
        planes: range,
        blocks_per_chunk: int,
        gathers: bool,
        stream: torch.cuda.Stream | None,
    ) -> None:
        """Launch the kernel; see `kernels.BlockMover`."""
        grid: Any = (len(span), len(planes), self._parts)
        sizes, constants = (len(planes), blocks_per_chunk, self._num_words), self._constants[gathers]
        kernel = self._compiled.get(gathers)
        if kernel is not None and stream is not None:
            table, at = (self._addresses.data_ptr(), self._strides.data_ptr()), 8 * planes.start
            pointers = *(start + at for start in table), block_ids.data_ptr() + 8 * span.start, buffer.data_ptr()
            kernel[grid](*pointers, *sizes, *constants.values(), stream=stream.cuda_stream)
            return
        part = slice(planes.start, planes.stop)
        tensors = self._addresses[part], self._strides[part], block_ids[span.start : span.stop], buffer
        with torch.cuda.stream(stream) if stream is not None else nullcontext():
            _move_blocks[grid](*tensors, *sizes, **constants, num_warps=NUM_WARPS)
