"""Token ids -> chunk keys, and what makes two KV caches interchangeable.

Comes in: token ids and a `Namespace`. Goes out: 32-byte chunk keys, concatenated. Next on the path: `protocol.py`.

    key[-1] = sha256(namespace)        key[i] = sha256(key[i-1] || tokens[i] as little-endian uint32)

Nothing but these bytes takes part, so keys agree between processes, restarts and machines.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

KEY_BYTES = 32
TOKEN_BYTES = 4

Label = Annotated[str, Meta(max_length=4096)]
ChunkTokens = Annotated[int, Meta(ge=1, le=1 << 20)]


class Namespace(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that makes two KV caches differ although the tokens are the same.

    `layout` is `KVLayout.fingerprint`. The last three fields belong to a request, the others to an engine.
    """

    model: Label
    revision: Label = ""
    dtype: Label = ""
    layout: Label = ""
    chunk_size: ChunkTokens
    world_size: Annotated[int, Meta(ge=1, lt=1 << 16)] = 1
    lora: Label = ""
    multimodal: Label = ""
    cache_salt: Label = ""

    def for_request(self, lora: str = "", multimodal: str = "", cache_salt: str = "") -> Namespace:
        """Return this engine's namespace narrowed to one adapter, one set of images and one tenant."""
        return msgspec.structs.replace(self, lora=lora, multimodal=multimodal, cache_salt=cache_salt)

    def root(self) -> bytes:
        """Return key[-1]: 32 bytes. Fields are length-delimited, so no two namespaces encode alike."""
        return _sha256(b"lmcache-namespace-1\0" + msgspec.msgpack.encode(self))

    @property
    def id(self) -> int:
        """The first 8 bytes of the *engine's* root: what the slot table stores to tell models apart."""
        return int.from_bytes(self.for_request().root()[:8], "little")


class ChunkHasher:
    """Hashes one request's growing token list, each token once.

    Args:
        namespace: what the KV of these tokens depends on.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._chunk_size = namespace.chunk_size
        self._last = namespace.root()
        self._keys = bytearray()

    @property
    def num_chunks(self) -> int:
        """How many whole chunks were hashed so far."""
        return len(self._keys) // KEY_BYTES

    def extend_to(self, token_ids: Sequence[int]) -> bytes:
        """Return the keys of every whole chunk of `token_ids`, whose start must be what was hashed before."""
        size = self._chunk_size
        packed = _pack(token_ids[self.num_chunks * size : len(token_ids) // size * size])
        for at in range(0, len(packed), size * TOKEN_BYTES):
            self._last = _sha256(self._last + packed[at : at + size * TOKEN_BYTES])
            self._keys += self._last
        return bytes(self._keys)


def chunk_keys(namespace: Namespace, token_ids: Sequence[int]) -> bytes:
    """Return the keys of the whole chunks of `token_ids`, concatenated: [num_chunks * 32] bytes.

    Raises: ValueError for a token id that is not a uint32.
    """
    return ChunkHasher(namespace).extend_to(token_ids)


def split_keys(keys: bytes) -> list[bytes]:
    """Return concatenated keys one by one."""
    return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]


def _pack(token_ids: Sequence[int]) -> bytes:
    """All at once: chunk by chunk 32k tokens took a quarter longer."""
    if isinstance(token_ids, (bytes, bytearray)):
        token_ids = list(token_ids)  # array() would take four of these bytes for one token
    try:
        packed = array("I", token_ids)
    except (OverflowError, TypeError) as exc:
        raise ValueError(f"token ids must be integers from 0 to 2**32 - 1: {exc}") from exc
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _sha256(data: bytes) -> bytes:
    """hashlib brings OpenSSL, 3 ms that a ping does not need; importing it again costs 0.2 us."""
    from hashlib import sha256

    return sha256(data).digest()
