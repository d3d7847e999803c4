"""Client tests run against real servers in this process; afterwards nothing may be left of either."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks import nothing_left


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    with nothing_left(tmp_path):
        yield
