"""The digest that stands for weights: what in their files changes it."""

import json
import random

import pytest

from lmcache.weights import adapter_digest, weights_digest


def safetensors(tensors):
    """Return a file of named tensors of bytes, as safetensors lays it out."""
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, data in tensors.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(tensors.values())


def test_the_digest_follows_names_lengths_and_both_ends(tmp_path):
    path = tmp_path / "a.safetensors"
    digests = set()
    for content in (b"", b"x", b"xx", bytes(1 << 18), b"\1" + bytes((1 << 18) - 1)):
        path.write_bytes(content)
        digests.add(weights_digest(tmp_path))
    path.rename(tmp_path / "b.safetensors")
    digests.add(weights_digest(tmp_path))
    (tmp_path / "readme.txt").write_text("not a weight")
    digests.add(weights_digest(tmp_path))
    assert len(digests) == 6


def test_each_tensor_that_was_changed_in_place_changes_the_digest(tmp_path):
    """An adapter merged into some projections leaves both ends of the file, the embeddings and the norms, as they were."""
    draw = random.Random(1)
    tensors = {f"layer {i}": draw.randbytes(draw.choice((1, 300, 5_000, 90_000))) for i in range(40)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors(tensors))
    digests = {weights_digest(tmp_path)}
    for name, data in tensors.items():
        path.write_bytes(safetensors({**tensors, name: bytes(255 - byte for byte in data)}))
        digests.add(weights_digest(tmp_path))
    assert len(digests) == 1 + len(tensors)


@pytest.mark.parametrize("name", ["model.bin", "model.gguf", "broken.safetensors"])
def test_a_part_of_another_kind_of_file_that_was_changed_changes_the_digest(tmp_path, name):
    content = b"\xff" * 8 + random.Random(1).randbytes(4 << 20)
    path = tmp_path / name
    path.write_bytes(content)
    assert weights_digest(path) == weights_digest(tmp_path)
    digests = {weights_digest(path)}
    for part in range(1, 63):
        at = part << 16
        path.write_bytes(content[:at] + bytes(1 << 16) + content[at + (1 << 16) :])
        digests.add(weights_digest(path))
    assert len(digests) == 63


def test_an_adapter_without_its_settings_is_none(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors({"a": b"x"}))
    with pytest.raises(OSError, match="adapter_config"):
        adapter_digest(tmp_path)
