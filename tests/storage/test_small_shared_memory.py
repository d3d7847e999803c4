"""What becomes of the pool's size where there is little memory, such as in the 64 MiB of a container's /dev/shm."""

from pathlib import Path

import pytest

from lmcache.errors import PoolSizeError
from lmcache.storage import sizing
from lmcache.storage.sizing import GIB, Limit

MIB = 1 << 20


def limit_to(monkeypatch, num_bytes):
    monkeypatch.setattr(sizing, "limits", lambda directory: [Limit("the space left in /dev/shm", num_bytes)])


@pytest.mark.parametrize("available", [2 * MIB, 63 * MIB, 64 * MIB, 65 * MIB, 200 * MIB, 257 * MIB, 3 * GIB, 1024 * GIB])
def test_the_default_size_fits_what_there_is(monkeypatch, available):
    limit_to(monkeypatch, available)
    capacity = sizing.default_capacity_bytes(Path("/dev/shm"))
    assert capacity > 0
    sizing.check_size(capacity, sizing.default_slots(capacity), Path("/dev/shm"))


def test_the_default_size_is_a_quarter_in_whole_pieces_where_there_is_enough(monkeypatch):
    limit_to(monkeypatch, 10 * GIB)
    assert sizing.default_capacity_bytes(Path("/dev/shm")) == 2560 * MIB
    limit_to(monkeypatch, 1024 * GIB)
    assert sizing.default_capacity_bytes(Path("/dev/shm")) == 64 * GIB


@pytest.mark.parametrize("max_chunks", [None, 1 << 20])
def test_the_hint_names_a_size_that_fits_and_is_nearly_the_largest(monkeypatch, max_chunks):
    limit_to(monkeypatch, 20 * GIB)
    asked = 5000 * GIB
    with pytest.raises(PoolSizeError) as caught:
        sizing.check_size(asked, max_chunks or sizing.default_slots(asked), Path("/dev/shm"))
    hinted = float(caught.value.hint.removeprefix("use --l1-size-gb ").split(" ")[0])
    capacity = int(hinted * GIB)
    sizing.check_size(capacity, max_chunks or sizing.default_slots(capacity), Path("/dev/shm"))
    assert hinted > 19.8
