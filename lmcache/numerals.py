"""What counts as a number in text that people write, for everybody who reads one."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # every command loads this, and typing takes longer than parsing
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


def plain_number(kind: Callable[[str], T], text: str) -> T:
    """Return `kind(text)`, such as of int or float.

    Raises: ValueError also for what Python reads besides: `1_000`, and digits of other scripts.
    """
    if not text.isascii() or "_" in text:
        raise ValueError(f"{text!r} is no plain number")
    return kind(text)


def shown_number(value: float) -> str:
    """Return `1048576` where `%g` would say `1.04858e+06`."""
    return str(int(value)) if value == int(value) else f"{value:g}"
