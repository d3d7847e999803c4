"""What tells weights from others of the same name: a digest of samples of their files, as reading all would take minutes.

Comes in: a checkpoint's folder or file, or an adapter's. Goes out: its digest, or what stands for an adapter in keys. Of every
tensor some bytes are read, so that a checkpoint that was trained on, or merged with an adapter, in place is another one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
ADAPTER_CONFIG = "adapter_config.json"
# At both ends of a file, and of each tensor in it.
END_BYTES = 1 << 16
SAMPLE_BYTES = 1 << 10
# Of a file whose tensors are not known, evenly spread.
NUM_SAMPLES = 1024
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


def weights_digest(path: Path) -> str:
    """Return a digest of each weight file's name, length, both ends and some bytes of each tensor.

    Args:
        path: a folder, of which the files with one of SUFFIXES are read, or a file.
    Raises: OSError.
    """
    digest = hashlib.sha256()
    for file in weight_files(path):
        with file.open("rb", buffering=0) as opened:
            descriptor = opened.fileno()
            size = os.fstat(descriptor).st_size
            digest.update(f"{file.name}\0{size}\0".encode())
            for offset, length in _samples(descriptor, size):
                digest.update(os.pread(descriptor, length, offset))
    return digest.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """Return what of a folder, or whether a file, holds weights.

    Raises: OSError.
    """
    return sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]


def adapter_label(name: str, path: str, digest: str) -> str:
    """Return what stands for a LoRA adapter in a namespace: its name, where it lies and what it holds."""
    return json.dumps([name, path, digest])


def adapter_digest(path: Path) -> str:
    """Return a digest of an adapter's weights and settings.

    Raises: OSError.
    """
    settings = (path / ADAPTER_CONFIG).read_bytes()
    return hashlib.sha256(settings + weights_digest(path).encode()).hexdigest()


def _samples(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, bytes) of what is looked at in a file."""
    yield 0, END_BYTES
    yield max(0, size - END_BYTES), END_BYTES
    tensors = _tensors(descriptor, size)
    if tensors is None:
        yield from ((size * i // NUM_SAMPLES, SAMPLE_BYTES) for i in range(NUM_SAMPLES))
    else:
        yield from (((start + end) // 2, min(SAMPLE_BYTES, end - start)) for start, end in tensors)


def _tensors(descriptor: int, size: int) -> list[tuple[int, int]] | None:
    """Return where the tensors of a safetensors file lie; None where it is none."""
    header_bytes = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    start = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES or start > size:
        return None
    try:
        header = json.loads(os.pread(descriptor, header_bytes, 8))
        spans = [value["data_offsets"] for name, value in header.items() if name != "__metadata__"]
        return sorted((start + first, start + last) for first, last in spans)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
