"""A manager with fake tiers below it, driven by the test as the owner thread would drive it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmcache.metrics import Metrics
from lmcache.pool import PAGE_BYTES
from lmcache.storage.l2.tier import Tier, TierConfig
from lmcache.storage.l2.value import HEADER_BYTES, ValueHeader, value_checksum, value_key
from lmcache.storage.manager import StorageManager
from lmcache.storage.promotion import Found
from lmcache.storage.tiers import NamedAdapter, Tiers
from tests.fakes import FakeTier
from tests.pools import content, create_manager, key, keys, store, wait_until


class Tiered:
    """L1 of some pages and its tiers. `look_up` and `settle` let the owner thread's work be done."""

    def __init__(self, manager: StorageManager, fakes: Sequence[FakeTier], **settings: Any) -> None:
        self.manager = manager
        self.fakes = fakes
        names = [f"fake-{i}" for i in range(1, len(fakes) + 1)]
        self.metrics = Metrics(names)
        self.rung = threading.Event()
        config = TierConfig(**{"chunk_size": 16, "lookup_timeout_seconds": 60.0, "inflight_ratio": 1.0, **settings})
        adapters = [NamedAdapter(name, f"fake://{name}", fake) for name, fake in zip(names, fakes, strict=True)]
        self.tiers = Tiers(adapters, manager, config, self.metrics, self.rung.set)
        self.found: list[Found] = []

    @property
    def fake(self) -> FakeTier:
        """The first tier's back end."""
        return self.fakes[0]

    @property
    def tier(self) -> Tier:
        """The first tier."""
        return self.tiers._tiers[0]

    def value(self, name: str, *labels: str, tier: str = "fake-1") -> int:
        """One of a tier's counters."""
        return self.metrics.value(f"lmcache_l2_{name}", tier, *labels)

    def store(self, *numbers: int, **more: Any) -> list[int]:
        """Store numbered chunks and tell the tiers."""
        slots = store(self.manager, *numbers, **more)
        self.tiers.note_committed(slots)
        return slots

    def until(self, condition: Callable[[], Any], what: str = "the condition") -> None:
        """Do the owner's work until something is true."""

        def is_true() -> Any:
            self.tiers.tick()
            return condition()

        wait_until(is_true, what)

    def settle(self) -> None:
        """Wait until all that was queued is written and nothing is being loaded."""
        self.until(lambda: not self.tiers.num_moving and self.tiers._is_drained(), "an idle tier")

    def begin(self, *numbers: int, world_size: int = 1, promotes: bool = True, seconds: float | None = None) -> bool:
        """Begin a lookup of numbered chunks; what it finds goes to `found`."""
        slots = self.manager.l1.find_prefix(keys(*numbers), world_size)
        return self.tiers.look_up(keys(*numbers), world_size, slots, promotes, seconds, self.found.append)

    def look_up(self, *numbers: int, **settings: Any) -> int:
        """Look up and wait for the answer; return how many leading chunks are in L1 then."""
        num_found = len(self.found)
        if self.begin(*numbers, **settings):
            self.until(lambda: len(self.found) > num_found, "the lookup's answer")
        world_size = settings.get("world_size", 1)
        return len(self.manager.l1.find_prefix(keys(*numbers), world_size)) // world_size

    def bytes_of(self, number: int, rank: int = 0) -> bytes:
        """What L1 holds under a numbered key."""
        slot = self.manager.l1.find(key(number), rank)
        assert slot is not None
        record = self.manager.l1.record(slot)
        return bytes(self.manager.l1.pool.data[record.offset : record.offset + record.length])


def name_of(number: int, rank: int = 0) -> str:
    """A numbered chunk's key in a tier."""
    return value_key(key(number), rank)


def put_value(fake: FakeTier, *numbers: int, num_bytes: int = PAGE_BYTES, rank: int = 0, namespace_id: int = 7) -> None:
    """Put numbered chunks into a tier, as another server would have."""
    for number in numbers:
        data = content(number, num_bytes)
        header = ValueHeader(
            key=key(number), rank=rank, namespace_id=namespace_id, length=num_bytes, checksum=value_checksum(data)
        )
        fake.values[name_of(number, rank)] = header.pack() + data
        assert len(fake.values[name_of(number, rank)]) == HEADER_BYTES + num_bytes


@contextmanager
def tiered_in(
    directory: Path, num_pages: int = 64, num_tiers: int = 1, watermark: float = 1.0, ratio: float = 0.05, **settings: Any
) -> Iterator[Tiered]:
    """Tiers over a new pool; at the end nothing may be pinned or reserved, and the books be right."""
    manager = create_manager(directory, num_pages, num_slots=num_pages, watermark=watermark, ratio=ratio)
    tiered = Tiered(manager, [FakeTier() for _ in range(num_tiers)], **settings)
    try:
        yield tiered
        for fake in tiered.fakes:
            fake.go()
        tiered.settle()
        assert manager.l1.num_pins == 0
        assert manager.l1.num_reserved == 0
        manager.l1.check()
    finally:
        for fake in tiered.fakes:
            fake.go()
        tiered.tiers.close(0.0)
        assert tiered.metrics.num_failures == 0
        assert all(fake.is_closed for fake in tiered.fakes)
        manager.close()
