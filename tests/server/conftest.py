"""Servers run in this process on pools in the test's directory; afterwards nothing may be left of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leaks import nothing_left
from tests.server.harness import ServiceHarness, service_in


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    with nothing_left(tmp_path):
        yield


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceHarness]:
    """A service on 32 pages and 32 slots, with a clock of its own."""
    with service_in(tmp_path, monkeypatch) as harness:
        yield harness
