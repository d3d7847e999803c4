"""What an eviction policy must do. It orders slots and knows nothing of pins, bytes or keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """An order over slots. Called by the owner thread only; nothing blocks."""

    def add(self, slots: Sequence[int], older_than: int | None = None) -> None:
        """Insert slots of one prefix, in token order; just older than the slot of the chunk before them if it is given."""

    def touch(self, slots: Sequence[int]) -> None:
        """Note that a prefix was used. `slots` are in token order, the first chunk first; all were added before."""

    def remove(self, slot: int) -> None:
        """Forget a slot."""

    def victims(self) -> Iterator[int]:
        """Yield slots, the best victim first. The caller may remove the slot just yielded, and no other."""
