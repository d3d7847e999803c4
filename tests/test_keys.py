"""Chunk keys: the values themselves, and what they depend on."""

import hashlib
import struct
import subprocess
import sys

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.keys import KEY_BYTES, ChunkHasher, Namespace, chunk_keys, split_keys

NAMESPACE = Namespace(model="a/model", revision="main", dtype="bfloat16", layout="0123456789abcdef", chunk_size=4)
TOKENS = [1, 2, 3, 4, 5, 6, 7, 4294967295, 9]
# Values that stored caches depend on: a change here orphans every cache that anybody has.
ROOT = "467ab004da65c9e10807c25e06c4decdc88d9e94794dc1b5debdd754124c296a"
KEYS = (
    "7faf67865904409b0f12446ef8d75bd80f46e8635f11b86fe01c13faec2c0644",
    "5a030788bf92df297bd454c319569b637ec95c2bcc7ce23f739d3aa593280943",
)

labels = st.text(st.characters(codec="utf-8"), max_size=40)
namespaces = st.builds(
    Namespace,
    model=labels,
    revision=labels,
    dtype=labels,
    layout=labels,
    chunk_size=st.integers(1, 8),
    world_size=st.integers(1, 65535),
    lora=labels,
    multimodal=labels,
    cache_salt=labels,
)
token_lists = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def packed(value: str | int) -> bytes:
    """MessagePack by its specification, for the short strings and small integers of NAMESPACE."""
    if isinstance(value, int):
        assert value < 128
        return bytes([value])
    text = value.encode()
    assert len(text) < 32
    return bytes([0xA0 | len(text)]) + text


def expected_root(namespace: Namespace) -> bytes:
    names = ["model", "revision", "dtype", "layout", "chunk_size", "world_size", "lora", "multimodal", "cache_salt"]
    fields = b"".join(packed(name) + packed(getattr(namespace, name)) for name in names)
    return hashlib.sha256(b"lmcache-namespace-1\0" + bytes([0x80 | len(names)]) + fields).digest()


def expected_keys(root: bytes, chunk_size: int, token_ids: list[int]) -> list[bytes]:
    found = [root]
    for at in range(0, len(token_ids) // chunk_size * chunk_size, chunk_size):
        chunk = struct.pack(f"<{chunk_size}I", *token_ids[at : at + chunk_size])
        found.append(hashlib.sha256(found[-1] + chunk).digest())
    return found[1:]


def test_root_and_keys_have_the_values_that_stored_caches_depend_on():
    assert NAMESPACE.root() == expected_root(NAMESPACE)
    assert split_keys(chunk_keys(NAMESPACE, TOKENS)) == expected_keys(expected_root(NAMESPACE), 4, TOKENS)
    assert NAMESPACE.root().hex() == ROOT
    assert tuple(found.hex() for found in split_keys(chunk_keys(NAMESPACE, TOKENS))) == KEYS


@given(namespace=namespaces, token_ids=token_lists)
def test_keys_follow_the_formula_for_any_namespace_and_tokens(namespace: Namespace, token_ids: list[int]):
    expected = expected_keys(namespace.root(), namespace.chunk_size, token_ids)
    assert split_keys(chunk_keys(namespace, token_ids)) == expected


@given(one=namespaces, other=namespaces)
def test_namespaces_that_differ_anywhere_share_no_key(one: Namespace, other: Namespace):
    token_ids = list(range(8))
    shared = set(split_keys(chunk_keys(one, token_ids))) & set(split_keys(chunk_keys(other, token_ids)))
    assert bool(shared) == (one == other)


@given(namespace=namespaces, field=st.sampled_from(Namespace.__struct_fields__), data=st.data())
def test_changing_any_one_field_changes_every_key(namespace: Namespace, field: str, data: st.DataObject):
    value = getattr(namespace, field)
    kind = st.integers(1, 8) if field == "chunk_size" else st.integers(1, 65535) if field == "world_size" else labels
    other = msgspec.structs.replace(namespace, **{field: data.draw(kind.filter(lambda new: new != value))})
    token_ids = list(range(16))
    assert not set(split_keys(chunk_keys(namespace, token_ids))) & set(split_keys(chunk_keys(other, token_ids)))


@given(model=labels, other_fields=st.lists(labels, min_size=3, max_size=3), data=st.data())
def test_text_that_moves_between_fields_changes_the_key(model: str, other_fields: list[str], data: st.DataObject):
    """The same characters, cut elsewhere: a concatenation without lengths would make one namespace of them."""
    text = "".join(other_fields)
    first, second = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    lora, multimodal, salt = other_fields
    one = Namespace(model=model, chunk_size=1, lora=lora, multimodal=multimodal, cache_salt=salt)
    other = one.for_request(text[:first], text[first:second], text[second:])
    assert (one.root() == other.root()) == (one == other)


@given(namespace=namespaces, token_ids=token_lists, cuts=st.lists(st.integers(0, 40), max_size=6))
def test_hashing_a_growing_list_gives_the_keys_of_the_whole(namespace: Namespace, token_ids: list[int], cuts: list[int]):
    hasher = ChunkHasher(namespace)
    for cut in sorted(cuts):
        found = hasher.extend_to(token_ids[:cut])
        assert found == chunk_keys(namespace, token_ids[:cut])
        assert hasher.num_chunks == len(found) // KEY_BYTES
    assert hasher.extend_to(token_ids) == chunk_keys(namespace, token_ids)


@given(namespace=namespaces, shared=token_lists, one=token_lists, other=token_lists)
def test_prompts_share_keys_exactly_up_to_their_first_difference(
    namespace: Namespace, shared: list[int], one: list[int], other: list[int]
):
    first, second = shared + one, shared + other
    common = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    first_keys, second_keys = (split_keys(chunk_keys(namespace, tokens)) for tokens in (first, second))
    same = common // namespace.chunk_size
    assert first_keys[:same] == second_keys[:same]
    assert not set(first_keys[same:]) & set(second_keys[same:])


@pytest.mark.parametrize("container", [list, tuple, lambda values: memoryview(struct.pack("<4I", *values)).cast("I")])
def test_any_sequence_of_integers_gives_the_same_keys(container):
    assert chunk_keys(NAMESPACE, container([1, 2, 3, 4])) == chunk_keys(NAMESPACE, [1, 2, 3, 4])


def test_bytes_are_a_sequence_of_integers_too():
    """array("I", b"...") would take four bytes for one token."""
    assert chunk_keys(NAMESPACE, bytes([1, 2, 3, 4])) == chunk_keys(NAMESPACE, [1, 2, 3, 4])
    assert chunk_keys(NAMESPACE, bytearray([1, 2, 3, 4])) == chunk_keys(NAMESPACE, [1, 2, 3, 4])


@pytest.mark.parametrize("bad", [-1, 2**32, 2**64, 1.5, "7", None, float("nan")])
def test_a_token_id_that_is_no_uint32_is_an_error_that_says_so(bad):
    with pytest.raises(ValueError, match=r"token ids must be integers from 0 to 2\*\*32 - 1"):
        chunk_keys(NAMESPACE, [1, 2, 3, bad])


def test_a_failed_extension_leaves_the_hasher_where_it_was():
    hasher = ChunkHasher(NAMESPACE)
    hasher.extend_to([1, 2, 3, 4])
    with pytest.raises(ValueError, match="token ids"):
        hasher.extend_to([1, 2, 3, 4, 5, 6, 7, -1])
    assert hasher.extend_to([1, 2, 3, 4, 5, 6, 7, 8]) == chunk_keys(NAMESPACE, [1, 2, 3, 4, 5, 6, 7, 8])


def test_tokens_short_of_a_chunk_have_no_key():
    assert chunk_keys(NAMESPACE, []) == b""
    assert chunk_keys(NAMESPACE, [1, 2, 3]) == b""


def test_the_id_is_the_engines_whatever_the_request():
    engine = NAMESPACE
    request = engine.for_request(lora="adapter", multimodal="image", cache_salt="tenant")
    assert request.root() != engine.root()
    assert request.id == engine.id == int.from_bytes(engine.root()[:8], "little")
    assert msgspec.structs.replace(engine, model="another").id != engine.id


def test_keys_do_not_depend_on_the_processs_hash_seed():
    code = (
        "from lmcache.keys import *; n = Namespace(model='a/model', chunk_size=2, lora='x', cache_salt='y');"
        "print(chunk_keys(n, list(range(64))).hex(), n.id)"
    )
    answers = set()
    for seed in ("0", "12345"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, timeout=60, check=True
        )
        answers.add(done.stdout)
    assert len(answers) == 1
    assert len(answers.pop()) > 64
