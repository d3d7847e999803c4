"""What an eviction policy must do. It orders slots and knows nothing of pins, bytes or keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol


class EvictionPolicy(Protocol):
    """An order over slots. Called by the owner thread only; nothing blocks."""

    def add(self, slots: Sequence[int], older_than: int | None = None) -> None:
        """Insert slots of one prefix, in token order; just older than the slot of the chunk before them if it is given."""

    def touch(self, slots: Sequence[int]) -> None:
        """Note that a prefix was used. `slots` are in token order, the first chunk first; all were added before."""

    def remove(self, slot: int) -> None:
        """Forget a slot."""

    def set_aside(self, slot: int) -> None:
        """Leave a slot out of `candidates`, until it is touched, brought back or removed."""

    def bring_back(self, slots: Iterable[int]) -> None:
        """Make those of these slots that were set aside the best victims. In token order, as everywhere."""

    def victims(self) -> Iterator[int]:
        """Yield all slots, the best victim first. The caller may remove the slot just yielded, and no other."""

    def candidates(self) -> Iterator[int]:
        """Yield those that are not set aside, the best victim first. It may be set aside or removed as it is yielded."""
