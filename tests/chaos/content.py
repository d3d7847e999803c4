"""Chunks whose bytes follow from their key, so that every reader can tell on its own whether it got the right ones."""

import hashlib

PAGE = 4096


def chunk_key(index: int) -> bytes:
    """The key of the chunk with this number."""
    return hashlib.sha256(b"chunk %d" % index).digest()


def chunk_keys(indices: range | list[int]) -> bytes:
    """Their keys, concatenated."""
    return b"".join(chunk_key(index) for index in indices)


def content(key: bytes, num_bytes: int) -> bytes:
    """The only right bytes of this key."""
    return hashlib.shake_128(key).digest(num_bytes)
