"""Random KV as engines keep it: by layer, keys and values apart, one latent vector, all layers of a block together, padded."""

import random

import torch

from lmcache.layout import KVLayout
from lmcache.transfer.cpu import block_planes, joined_plane

DTYPES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
KINDS = ("by layer", "keys and values apart", "latent", "together", "together, latent", "spread within a block")
BLOCK_SIZE = 16


class RandomKV:
    """One engine's KV: `tensors`, one a layer, parts of one `memory`, as vLLM registers them; `rng` decides how they lie.

    Bytes before the first block, between padded blocks, and between the layers of a block are nobody's.
    """

    def __init__(self, kind: str, rng: random.Random, content_seed: int) -> None:
        self.num_layers, self.num_blocks = rng.randint(2, 4), rng.randint(4, 9)
        self.dtype = rng.choice(DTYPES)
        self.has_planes = kind == "keys and values apart"
        self.is_joined = kind.startswith("together")
        # A kernel may work on parts of a block, which vLLM then registers as so many blocks.
        self.parts = rng.choice((1, 1, 2))
        inner = {"heads": rng.randint(1, 3), "tokens": rng.randint(1, 4), "values": rng.randint(1, 5)}
        if "latent" in kind:
            del inner["heads"]
        elif not self.has_planes:
            inner["keys or values"] = 2
        self._inner = list(inner)
        sizes = {"layers": self.num_layers, "planes": 2, "blocks": self.num_blocks * self.parts, **inner}
        gap = rng.choice((0, 0, 1, 5))
        gaps = {"blocks": 0} if self.parts > 1 else {"blocks": gap}
        inside = rng.sample(self._inner, len(self._inner))
        if self.is_joined:
            inside.insert(rng.randint(0, len(inside)), "layers")
            physical = ["blocks", *inside]
        elif kind == "spread within a block":
            self.parts, gaps = 1, {"layers": gap + 1}
            sizes["blocks"] = self.num_blocks
            physical = ["blocks", "layers", *inside]
        else:
            physical = ["layers", *(["planes"] if self.has_planes else []), "blocks", *inside]
        self._lay_out(physical, sizes, gaps, rng.choice((0, 16, 3)), content_seed)

    def _lay_out(self, physical: list[str], sizes: dict[str, int], gaps: dict[str, int], start: int, content_seed: int) -> None:
        strides, numel = {}, 1
        for axis in reversed(physical):
            strides[axis] = numel + gaps.get(axis, 0)
            numel = strides[axis] * sizes[axis]
        generator = torch.Generator().manual_seed(content_seed)
        num_bytes = (start + numel) * self.dtype.itemsize
        self.memory = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)
        axes = [*(["planes"] if self.has_planes else []), "blocks", *self._inner]
        typed = self.memory.view(self.dtype)
        self.tensors = [
            typed.as_strided([sizes[a] for a in axes], [strides[a] for a in axes], start + layer * strides["layers"])
            for layer in range(self.num_layers)
        ]

    def planes(self) -> list[torch.Tensor]:
        """The byte planes, as an engine's worker finds them."""
        joined = joined_plane(self.tensors, self.num_blocks)
        assert (joined is not None) == self.is_joined
        if joined is not None:
            return [joined]
        return [plane for tensor in self.tensors for plane in block_planes(tensor, self.num_blocks)]

    def layout(self) -> KVLayout:
        """The layout of `planes`."""
        planes, num_layers = self.planes(), 1 if self.is_joined else self.num_layers
        return KVLayout(
            num_layers=num_layers,
            num_planes=len(planes) // num_layers,
            block_bytes=planes[0].shape[1],
            block_size=BLOCK_SIZE,
            dtype=str(self.dtype),
            layers_per_block=self.num_layers // num_layers,
        )

    def blocks(self, ids: list[int]) -> list[torch.Tensor]:
        """What an attention kernel reads in these blocks, layer by layer: a copy, as bytes."""
        read = []
        for tensor in self.tensors:
            blocks_first = tensor.movedim(1, 0) if self.has_planes else tensor
            by_block = blocks_first.unflatten(0, (self.num_blocks, self.parts)).clone(memory_format=torch.contiguous_format)
            read.append(by_block.view(torch.uint8)[ids])
        return read


def random_kv(seed: int, kind: str, content_seed: int = 0) -> RandomKV:
    """KV of a kind; the same seed lies the same way, whatever its content."""
    return RandomKV(kind, random.Random(seed), content_seed)
