"""Values that a message should not hold: of the wrong type, beyond a bound that its schema states, or plain odd."""

import random
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec.inspect import BytesType, FloatType, IntType, ListType, StrType, StructType, Type, UnionType

from lmcache.protocol import REQUESTS

ODD: list[Any] = [
    None, True, False, -1, 0, 1, 255, 2**31, 2**53, 2**62, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63),
    0.0, -0.0, 0.5, -1.5, 1e308, 5e-324, float("nan"), float("inf"), float("-inf"),
    "", "x", "\0", "\n", "é\u202e\U0001f4a5", "x" * 513, "f" * 32, "0" * 32 + "\n", "../../etc/passwd", "%s%n{0}",
    b"", b"\0", bytes(16), bytes(32), bytes(33), b"\xff" * 5000,
    [], [None], [[]], [0] * 300, [[0, 0, 1, 0, 0]], [[2**62, 2**62, 2**28, 2**64 - 1, 2**64 - 1]], [[0, 0, 0, 0]],
    {}, {"v": 1}, {"": {}}, {"a": [{"b": b"c"}]},
    msgspec.msgpack.Ext(5, b"ext"), msgspec.msgpack.Ext(-1, b"\xff" * 12),
]  # fmt: skip


def nested(depth: int) -> Any:
    """Lists in lists."""
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


def beyond_bounds(schema: Type) -> Iterator[Any]:
    """The last good and the first bad values of each bound that a type states."""
    if isinstance(schema, UnionType):
        for part in schema.types:
            yield from beyond_bounds(part)
    elif isinstance(schema, (IntType, FloatType)):
        for bound in (schema.ge, schema.gt, schema.le, schema.lt):
            if bound is not None:
                yield from (bound - 1, bound, bound + 1)
    elif isinstance(schema, (StrType, BytesType)):
        unit: Any = "x" if isinstance(schema, StrType) else b"x"
        for length in (schema.min_length, schema.max_length):
            if length is not None:
                yield from (unit * max(0, length - 1), unit * length, unit * (length + 1))
    elif isinstance(schema, ListType) and schema.max_length is not None:
        yield [0] * schema.max_length
        yield [0] * (schema.max_length + 1)


def mutate_fields(rng: random.Random, op: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return a request's fields with one or two of them changed, taken away or added."""
    mutated = dict(fields)
    schema = msgspec.inspect.type_info(REQUESTS[op])
    assert isinstance(schema, StructType)
    types = {field.encode_name: field.type for field in schema.fields}
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(list(types))
        kind = rng.random()
        bounds = list(beyond_bounds(types[name]))
        if kind < 0.15:
            mutated.pop(name, None)
        elif kind < 0.25:
            mutated[f"unknown{rng.randrange(3)}"] = rng.choice(ODD)
        elif kind < 0.30:
            mutated[name] = nested(rng.choice((10, 500)))
        elif kind < 0.60 and bounds:
            mutated[name] = rng.choice(bounds)
        elif kind < 0.80 and isinstance(mutated.get(name), (dict, list)):
            mutated[name] = _mutate_inside(rng, mutated[name])
        else:
            mutated[name] = rng.choice(ODD)
    return mutated


def _mutate_inside(rng: random.Random, value: Any) -> Any:
    if isinstance(value, dict) and value:
        return {**value, rng.choice(list(value)): rng.choice(ODD)}
    if isinstance(value, list) and value:
        copy = list(value)
        at = rng.randrange(len(copy))
        kind = rng.randrange(4)
        if kind == 0:
            copy[at] = _mutate_inside(rng, copy[at]) if isinstance(copy[at], list) else _near(rng, copy[at])
        elif kind == 1:
            copy *= rng.choice((2, 3, 100))
        elif kind == 2:
            rng.shuffle(copy)
        else:
            del copy[at]
        return copy
    return rng.choice(ODD)


def _near(rng: random.Random, value: Any) -> Any:
    if isinstance(value, int) and rng.random() < 0.7:
        return value + rng.choice((-4096, -1, 1, 2, 4096))
    return rng.choice(ODD)


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with a few places changed, cut, doubled or filled in."""
    mutated = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(mutated) + 1)
        length = rng.choice((1, 1, 2, 8, 64))
        kind = rng.randrange(6)
        if kind == 0 and at < len(mutated):
            mutated[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(mutated):
            mutated[at] = rng.choice((0x00, 0x7F, 0x80, 0xC1, 0xC6, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFF))
        elif kind == 2:
            del mutated[at : at + length]
        elif kind == 3:
            mutated[at:at] = rng.randbytes(length)
        elif kind == 4:
            mutated[at:at] = mutated[at : at + length]
        else:
            del mutated[at:]
    return bytes(mutated)


def mutate_frames(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """Return a message's frames with one of them changed, dropped, doubled, moved, or a foreign one among them."""
    mutated = list(frames)
    at = rng.randrange(len(mutated)) if mutated else 0
    kind = rng.randrange(7)
    if kind == 0 and mutated:
        mutated[at] = mutate_bytes(rng, mutated[at])
    elif kind == 1 and mutated:
        del mutated[at]
    elif kind == 2 and mutated:
        mutated.insert(at, mutated[at])
    elif kind == 3:
        rng.shuffle(mutated)
    elif kind == 4:
        mutated.insert(at, rng.randbytes(rng.choice((0, 1, 31, 32, 33, 64, 4096, 100_000))))
    elif kind == 5 and mutated:
        mutated[at] = mutated[at] * rng.choice((2, 100))
    else:
        mutated += [b""] * rng.choice((1, 100))
    return mutated
