"""KVLayout: sizes, fingerprint, and which chunk sizes an engine's blocks allow."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.errors import UsageError
from lmcache.layout import KVLayout, shown_sessions

# Llama 3.1 8B: 32 layers, 8 KV heads of 128 values, 2 bytes each, keys and values apart, blocks of 16 tokens.
LLAMA_8B = KVLayout(num_layers=32, num_planes=2, block_bytes=16 * 8 * 128 * 2, block_size=16, dtype="bfloat16", order="NHD")

layouts = st.builds(
    KVLayout,
    num_layers=st.integers(1, 200),
    num_planes=st.integers(1, 3),
    block_bytes=st.integers(1, 1 << 24),
    block_size=st.integers(1, 1024),
    dtype=st.sampled_from(["bfloat16", "float16", "fp8_e4m3"]),
    order=st.sampled_from(["", "NHD", "HND"]),
)


def test_a_known_models_sizes_are_what_its_card_says():
    assert LLAMA_8B.bytes_per_token == 128 << 10
    assert LLAMA_8B.blocks_per_chunk(256) == 16
    assert LLAMA_8B.chunk_bytes(256) == 32 << 20


@given(layout=layouts, num_blocks=st.integers(1, 64))
def test_a_chunk_weighs_its_blocks(layout: KVLayout, num_blocks: int):
    chunk_size = layout.block_size * num_blocks
    assert layout.blocks_per_chunk(chunk_size) == num_blocks
    assert layout.chunk_bytes(chunk_size) == num_blocks * layout.bytes_per_block
    assert layout.bytes_per_token * chunk_size <= layout.chunk_bytes(chunk_size)


@given(layout=layouts, chunk_size=st.integers(1, 1 << 20))
def test_a_chunk_size_that_blocks_do_not_divide_is_refused_with_sizes_that_work(layout: KVLayout, chunk_size: int):
    if chunk_size % layout.block_size == 0:
        return
    with pytest.raises(UsageError) as caught:
        layout.blocks_per_chunk(chunk_size)
    assert str(chunk_size) in caught.value.message
    assert str(layout.block_size) in caught.value.message
    offered = [int(word) for word in caught.value.hint.split() if word.isdigit()]
    assert offered
    for size in offered:
        assert abs(size - chunk_size) < layout.block_size
        assert layout.blocks_per_chunk(size) > 0


@given(layout=layouts, field=st.sampled_from(KVLayout.__struct_fields__))
def test_the_fingerprint_differs_when_any_field_does(layout: KVLayout, field: str):
    value = getattr(layout, field)
    other = msgspec.structs.replace(layout, **{field: value + 1 if isinstance(value, int) else value + "x"})
    assert other.fingerprint != layout.fingerprint
    assert len(layout.fingerprint) == 16


def test_the_fingerprint_has_the_value_that_stored_caches_depend_on():
    assert LLAMA_8B.fingerprint == "095484f99de6b816"


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [
        (65536, "2.0 sessions of 32K or 0.5 of 128K tokens"),
        (512, "0.0 sessions of 32K or 0.0 of 128K tokens"),
        (10_000_000, "305.2 sessions of 32K or 76.3 of 128K tokens"),
    ],
)
def test_tokens_are_told_as_long_sessions(num_tokens, expected):
    assert shown_sessions(num_tokens) == expected
