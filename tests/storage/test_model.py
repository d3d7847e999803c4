"""The storage manager against a model that keeps Python sets: any order of events, crashes and restarts among them."""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache.pool import PAGE_BYTES
from lmcache.protocol import Placement, StoreOutcome
from lmcache.storage.manager import RemovalReason, Selection
from tests.pools import OTHER, OWNER, adopt_manager, content, crash, create_manager, key, keys, remove, reserve

NUM_PAGES = 24
NUM_SLOTS = 12
NUMBERS = range(20)


class ManagerMachine(RuleBasedStateMachine):
    """What the model knows: who holds which reservation, what is committed with which length, and the pins."""

    @initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.manager = create_manager(Path(self.directory.name), NUM_PAGES, NUM_SLOTS)
        self.reserved: dict[int, SimpleNamespace] = {}
        self.committed: dict[int, int] = {}
        self.pins: dict[int, int] = {}
        self.dead_placements: list[Placement] = []

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.manager.close()
            self.directory.cleanup()

    @property
    def l1(self):
        return self.manager.l1

    def forget_evicted(self) -> None:
        """Eviction may take any committed chunk that is not pinned; what is pinned must still be there."""
        gone = {number for number in self.committed if self.l1.find(key(number), 0) is None}
        assert not {number for number in gone if self.pins.get(number)}, "a pinned chunk went"
        for number in gone:
            del self.committed[number]

    def can_all_fit(self, num_pages: int) -> bool:
        """Whether a place of this size must be found: nothing pinned or reserved stands between any two pages."""
        return not self.reserved and not any(self.pins.values()) and num_pages <= NUM_PAGES

    @rule(
        numbers=st.lists(st.sampled_from(NUMBERS), min_size=1, max_size=4, unique=True),
        length=st.integers(1, 6 * PAGE_BYTES),
        owner=st.sampled_from([OWNER, OTHER]),
        parent=st.none() | st.sampled_from(NUMBERS),
    )
    def reserve(self, numbers: list[int], length: int, owner: bytes, parent: int | None) -> None:
        known = [number in self.committed for number in numbers]
        must_fit = self.can_all_fit(-(-length // PAGE_BYTES))
        outcomes, placements = reserve(
            self.manager, *numbers, num_bytes=length, owner=owner, parent=key(parent) if parent is not None else b""
        )
        found = iter(placements)
        for position, (number, outcome) in enumerate(zip(numbers, outcomes, strict=True)):
            if outcome is StoreOutcome.EXISTS:
                assert known[position]
            elif outcome is StoreOutcome.BUSY:
                assert number in self.reserved
            elif outcome is StoreOutcome.RESERVED:
                assert number not in self.reserved
                placement = next(found)
                assert placement.length == length
                self.l1.pool.data[placement.offset : placement.offset + length] = content(number, length)
                self.reserved[number] = SimpleNamespace(owner=owner, placement=placement)
            else:
                assert position or not must_fit, "FULL although everything could have been evicted"
        self.forget_evicted()

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), right_owner=st.booleans(), checksum=st.integers(0, 2**64 - 1))
    def commit(self, data: st.DataObject, right_owner: bool, checksum: int) -> None:
        """Any reservations in any order, also those of the wrong owner and of generations long gone."""
        numbers = data.draw(st.lists(st.sampled_from(sorted(self.reserved)), min_size=1, max_size=4))
        stale = data.draw(st.lists(st.sampled_from(self.dead_placements), max_size=2)) if self.dead_placements else []
        owner = self.reserved[numbers[0]].owner if right_owner else bytes(16)
        offered = [msgspec.structs.replace(self.reserved[number].placement, checksum=checksum) for number in numbers]
        slots = self.l1.commit(stale + offered, owner)
        expected = [number for number in dict.fromkeys(numbers) if self.reserved[number].owner == owner]
        assert slots == [self.reserved[number].placement.slot for number in expected]
        for number in expected:
            self.committed[number] = self.reserved.pop(number).placement.length
            assert self.l1.placement(self.l1.find(key(number), 0)).checksum == checksum

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), right_owner=st.booleans())
    def abort(self, data: st.DataObject, right_owner: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.reserved)))
        held = self.reserved[number]
        assert self.l1.abort([held.placement], held.owner if right_owner else bytes(16)) == right_owner
        if right_owner:
            del self.reserved[number]
            self.dead_placements.append(held.placement)

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.committed)))
        slot = self.l1.find(key(number), 0)
        self.l1.touch([slot])
        self.l1.pin([slot])
        self.pins[number] = self.pins.get(number, 0) + 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(number for number, count in self.pins.items() if count)))
        self.l1.unpin([self.l1.find(key(number), 0)])
        self.pins[number] -= 1

    @rule(numbers=st.none() | st.lists(st.sampled_from(NUMBERS), max_size=3), max_bytes=st.none() | st.integers(0, 40_000))
    def remove(self, numbers: list[int] | None, max_bytes: int | None) -> None:
        selection = Selection(keys=None if numbers is None else keys(*numbers), max_bytes=max_bytes)
        before = {number: self.l1.placement(self.l1.find(key(number), 0)) for number in self.committed}
        removal = remove(self.manager, selection, RemovalReason.REQUEST, dry_run=False)
        self.forget_evicted()
        gone = set(before) - set(self.committed)
        self.dead_placements += [before[number] for number in gone]
        assert (removal.objects, removal.removed_bytes) == (len(gone), sum(before[number].length for number in gone))
        if max_bytes is None:
            selected = set(before) if numbers is None else set(before) & set(numbers)
            assert gone == {number for number in selected if not self.pins.get(number)}

    @rule()
    def crash_and_adopt(self) -> None:
        """The pins are gone with the server, reservations wait for their owners, chunks are served again."""
        places = {number: self.l1.placement(self.l1.find(key(number), 0)) for number in self.committed}
        crash(self.manager)
        self.manager = adopt_manager(Path(self.directory.name))
        self.pins = {}
        assert self.l1.adopted_chunks == len(self.committed)
        assert {number: self.l1.placement(self.l1.find(key(number), 0)) for number in self.committed} == places
        held = sorted((one.owner, one.placement.slot, one.placement.generation) for one in self.reserved.values())
        found = sorted((owner, placement.slot, placement.generation) for owner, placement in self.l1.reservations())
        assert found == held

    @invariant()
    def books_are_right(self) -> None:
        if hasattr(self, "manager"):
            self.l1.check()
            assert self.l1.num_pins == sum(self.pins.values())
            assert self.l1.num_reserved == len(self.reserved)
            assert len(self.l1) == len(self.committed)

    @invariant()
    def only_what_was_committed_is_found_with_its_own_bytes(self) -> None:
        if not hasattr(self, "manager"):
            return
        for number in NUMBERS:
            slot = self.l1.find(key(number), 0)
            assert (slot is not None) == (number in self.committed)
            if slot is not None:
                place = self.l1.placement(slot)
                assert place.length == self.committed[number]
                stored = self.l1.pool.data[place.offset : place.offset + place.length]
                assert bytes(stored) == content(number, place.length)

    @invariant()
    def every_committed_chunk_can_be_evicted_once(self) -> None:
        if hasattr(self, "manager"):
            victims = [slot for slot, _ in zip(self.l1.policy.victims(), range(2 * NUM_SLOTS), strict=False)]
            assert sorted(victims) == sorted(self.l1.slots())

    @invariant()
    def what_is_not_pinned_is_a_candidate(self) -> None:
        if hasattr(self, "manager"):
            pinned = {self.l1.find(key(number), 0) for number, count in self.pins.items() if count}
            assert {*self.l1.slots()} - {*self.l1.policy.candidates()} <= pinned

    @invariant()
    def dead_placements_are_known_as_stale(self) -> None:
        if hasattr(self, "manager"):
            assert all(self.l1.pool.generation(place.slot) > place.generation for place in self.dead_placements)


TestManagerMachine = ManagerMachine.TestCase
TestManagerMachine.settings = settings(max_examples=60, stateful_step_count=30)
