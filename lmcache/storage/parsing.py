"""Reading numbers that people write: in the server's flags and in the settings of L2 adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmcache.numerals import plain_number, shown_number


def number(kind: type[int] | type[float], low: float, high: float) -> Callable[[str], Any]:
    """Return a parser of numbers from `low` to `high`; it raises a ValueError that says what was expected."""

    def parse(text: str) -> Any:
        try:
            value = plain_number(kind, text)
        except ValueError:
            raise ValueError(f"expected {'a whole number' if kind is int else 'a number'}") from None
        if not low <= value <= high:
            raise ValueError(f"expected {shown_number(low)} to {shown_number(high)}")
        return value

    return parse
