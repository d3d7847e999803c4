"""How an engine's KV tensors are cut into blocks, and what one chunk of them weighs.

Comes in: an engine's geometry. Goes out: sizes in bytes and the fingerprint that enters the namespace.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from lmcache.errors import UsageError

# What can be cached: one group of layers whose KV is kept for every token and found through one block table, by vLLM's name.
SUPPORTED_KV_GROUPS = ("FullAttentionSpec", "MLAAttentionSpec")
SUPPORTED_DEVICES = ("cpu", "cuda")
# Lengths of a session by which people size a cache, in units of 1024 tokens.
SESSION_K_TOKENS = (32, 128)

Layers = Annotated[int, Meta(ge=1, le=1 << 16)]
PieceBytes = Annotated[int, Meta(ge=1, le=1 << 40)]
BlockTokens = Annotated[int, Meta(ge=1, le=1 << 30)]
Label = Annotated[str, Meta(max_length=512)]


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """One rank's KV: `num_layers` tensors, each logically planes x blocks x bytes.

    `num_planes` counts the separate pieces of one block in one layer (2 where keys and values lie apart, else 1);
    `block_bytes` is the length of one such piece; `block_size` is in tokens; `order` names the order of axes inside
    a piece, because equal sizes with another order are other bytes. Where the engine keeps all layers of a block side by
    side they are one tensor: then `layers_per_block` of the model's layers lie in each of its blocks, else 1.
    """

    num_layers: Layers
    num_planes: Layers
    block_bytes: PieceBytes
    block_size: BlockTokens
    dtype: Label
    order: Label = ""
    layers_per_block: Layers = 1

    @property
    def bytes_per_block(self) -> int:
        """One block over all layers and planes."""
        return self.num_layers * self.num_planes * self.block_bytes

    @property
    def bytes_per_token(self) -> int:
        """KV of one token on this rank; rounded down where a block holds padding."""
        return self.bytes_per_block // self.block_size

    @property
    def fingerprint(self) -> str:
        """16 hex digits that differ whenever any field differs."""
        from hashlib import sha256

        fields = msgspec.to_builtins(self)
        if self.layers_per_block == 1:  # as before there was this field: what is stored stays usable
            del fields["layers_per_block"]
        return sha256(msgspec.msgpack.encode(fields)).hexdigest()[:16]

    def blocks_per_chunk(self, chunk_size: int) -> int:
        """Return the whole number of blocks in a chunk.

        Raises: UsageError when the block size does not divide the chunk size; the hint names the nearest valid sizes.
        """
        if chunk_size < self.block_size or chunk_size % self.block_size:
            below = chunk_size // self.block_size * self.block_size
            valid = [size for size in (below, below + self.block_size) if size > 0]
            raise UsageError(
                f"chunk_size {chunk_size} is not a multiple of the engine's block_size {self.block_size}",
                hint="use --chunk-size " + " or ".join(str(size) for size in valid),
                code="chunk_size",
            )
        return chunk_size // self.block_size

    def chunk_bytes(self, chunk_size: int) -> int:
        """Return the bytes of one chunk on this rank."""
        return self.blocks_per_chunk(chunk_size) * self.bytes_per_block


def shown_sessions(num_tokens: int) -> str:
    """Return for how many long sessions so many tokens are enough: `2.0 sessions of 32K or 0.5 of 128K tokens`."""
    short, long = (f"{num_tokens / (k << 10):.1f}" for k in SESSION_K_TOKENS)
    return f"{short} sessions of {SESSION_K_TOKENS[0]}K or {long} of {SESSION_K_TOKENS[1]}K tokens"
