"""The header in front of each chunk in L2: what it is, and how to tell that it still is.

Comes in: a chunk's identity and bytes. Goes out: HEADER_BYTES that every tier stores unread. Values outlive servers and
versions and are shared by machines, so nothing of them is believed before it was compared.
"""

from __future__ import annotations

import struct
import zlib

import msgspec
import xxhash

from lmcache.storage.l2.base import L2Error, Reason

MAGIC = b"LMCKVAL\x01"
FORMAT_VERSION = 1
# Page-sized, so that the chunk behind it is aligned for direct I/O.
HEADER_BYTES = 4096
_FIELDS = struct.Struct("<8sII32sIIQQQ")  # magic, format, header bytes, key, rank, reserved, namespace, length, checksum
_CRC = struct.Struct("<I")


class ValueHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The identity of a value: the full 32-byte chunk key and rank, what was stored and its XXH3."""

    key: bytes
    rank: int
    namespace_id: int
    length: int
    checksum: int

    def pack(self) -> bytes:
        """Return HEADER_BYTES."""
        body = _FIELDS.pack(
            MAGIC, FORMAT_VERSION, HEADER_BYTES, self.key, self.rank, 0, self.namespace_id, self.length, self.checksum
        )
        return (body + _CRC.pack(zlib.crc32(body))).ljust(HEADER_BYTES, b"\0")


def unpack_header(raw: memoryview | bytes) -> ValueHeader:
    """Return the header in `raw`.

    Raises: L2Error, code "corrupt", when it is damaged; code "format" when another version wrote it.
    """
    raw = bytes(raw[: _FIELDS.size + _CRC.size])
    if len(raw) < _FIELDS.size + _CRC.size or raw[: len(MAGIC)] != MAGIC:
        raise L2Error("a value does not begin with a value header", code=Reason.CORRUPT)
    body = raw[: _FIELDS.size]
    fields = _FIELDS.unpack(body)
    if zlib.crc32(body) != _CRC.unpack_from(raw, _FIELDS.size)[0]:
        raise L2Error("a value's header is damaged", code=Reason.CORRUPT)
    if fields[1:3] != (FORMAT_VERSION, HEADER_BYTES):
        raise L2Error(f"a value has format {fields[1]}, this version reads {FORMAT_VERSION}", code=Reason.FORMAT)
    return ValueHeader(key=fields[3], rank=fields[4], namespace_id=fields[6], length=fields[7], checksum=fields[8])


def value_checksum(data: memoryview | bytes) -> int:
    """Return the XXH3 (64 bits) that a value's header carries; it releases the GIL."""
    return xxhash.xxh3_64_intdigest(data)


def check_value(header: ValueHeader, key: bytes, rank: int, data: memoryview) -> None:
    """Return if `data` is the chunk that was asked for, all of it and unchanged.

    Raises: L2Error, code "corrupt".
    """
    if (header.key, header.rank, header.length) != (key, rank, len(data)):
        raise L2Error("a value is another chunk's", code=Reason.CORRUPT)
    if value_checksum(data) != header.checksum:
        raise L2Error("a value's bytes differ from what was stored", code=Reason.CORRUPT)


def value_key(key: bytes, rank: int) -> str:
    """Return the name under which a tier keeps one rank's chunk: the key says model, layout, tenant and tokens."""
    return f"{key.hex()}-{rank}"
