"""How long to fuzz, and from which seed."""

import random

import pytest


@pytest.fixture
def fuzz_seconds(request: pytest.FixtureRequest) -> float:
    """The share of one of the two fuzz tests."""
    return float(request.config.getoption("--fuzz-seconds")) / 2


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """Where all choices come from; its seed is shown when the test fails."""
    seed = request.config.getoption("--fuzz-seed")
    seed = random.randrange(2**32) if seed is None else int(seed)
    print(f"run this again with --fuzz-seed {seed}")
    return random.Random(seed)
