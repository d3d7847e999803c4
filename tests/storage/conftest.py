"""Storage tests run on small pools in their own directory; afterwards nothing may be left there or in the process."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks import nothing_left


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    with nothing_left(tmp_path):
        yield
