"""The eviction order, against a plain list."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lmcache.errors import UsageError
from lmcache.storage.eviction import POLICIES, make_policy
from lmcache.storage.eviction.lru import LRUPolicy

MAX_SLOTS = 24


class AgainstList(RuleBasedStateMachine):
    """`order` is oldest first, and begins with `num_aside` that are set aside.

    A run is inserted last chunk first, so that its first chunk is the newest.
    """

    @initialize()
    def start(self) -> None:
        self.policy = LRUPolicy()
        self.order: list[int] = []
        self.num_aside = 0

    def take_out(self, slot: int) -> None:
        self.num_aside -= self.order.index(slot) < self.num_aside
        self.order.remove(slot)

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        absent = [slot for slot in range(MAX_SLOTS) if slot not in self.order]
        if not absent:
            return
        slots = data.draw(st.lists(st.sampled_from(absent), min_size=1, max_size=6, unique=True))
        older_than = data.draw(st.none() | st.sampled_from(self.order)) if self.order else None
        self.policy.add(slots, older_than)
        at = len(self.order) if older_than is None else max(self.num_aside, self.order.index(older_than))
        self.order[at:at] = reversed(slots)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        """Any slots in any order, also one twice: a prompt may hold the same chunk again."""
        slots = data.draw(st.lists(st.sampled_from(self.order), min_size=1, max_size=8))
        self.policy.touch(slots)
        for slot in reversed(slots):
            self.take_out(slot)
            self.order.append(slot)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def touch_a_run_that_lies_together(self, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, len(self.order) - 1))
        last = data.draw(st.integers(first, len(self.order) - 1))
        run = self.order[first : last + 1]
        self.policy.touch(run[::-1])
        for slot in run:
            self.take_out(slot)
        self.order += run

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.order))
        self.policy.remove(slot)
        self.take_out(slot)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def remove_while_yielding(self, data: st.DataObject) -> None:
        doomed = set(data.draw(st.lists(st.sampled_from(self.order))))
        seen = []
        for slot in self.policy.victims():
            seen.append(slot)
            if slot in doomed:
                self.policy.remove(slot)
        assert seen == self.order
        for slot in doomed:
            self.take_out(slot)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def set_aside_while_yielding(self, data: st.DataObject) -> None:
        chosen = set(data.draw(st.lists(st.sampled_from(self.order))))
        seen = []
        for slot in self.policy.candidates():
            seen.append(slot)
            if slot in chosen:
                self.policy.set_aside(slot)
        assert seen == self.order[self.num_aside :]
        self.order[self.num_aside :] = [slot for slot in seen if slot in chosen] + [slot for slot in seen if slot not in chosen]
        self.num_aside += len(chosen & set(seen))

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def bring_back(self, data: st.DataObject) -> None:
        """Any slots, also those that were never set aside: to them nothing happens."""
        slots = data.draw(st.lists(st.sampled_from(self.order), unique=True))
        self.policy.bring_back(slots)
        for slot in slots:
            if self.order.index(slot) < self.num_aside:
                self.take_out(slot)
                self.order.insert(self.num_aside, slot)

    @invariant()
    def victims_come_oldest_first(self) -> None:
        victims = self.policy.victims()
        assert [slot for slot, _ in zip(victims, range(2 * MAX_SLOTS), strict=False)] == self.order

    @invariant()
    def candidates_are_those_that_are_not_set_aside(self) -> None:
        candidates = self.policy.candidates()
        found = [slot for slot, _ in zip(candidates, range(2 * MAX_SLOTS), strict=False)]
        assert found == self.order[self.num_aside :]


TestAgainstList = AgainstList.TestCase
TestAgainstList.settings = settings(max_examples=60, stateful_step_count=30)


def test_the_end_of_a_prompt_goes_before_its_beginning():
    policy = LRUPolicy()
    policy.add([10, 11, 12])
    policy.add([20, 21])
    policy.touch([10, 11])
    assert list(policy.victims()) == [12, 21, 20, 11, 10]


def test_a_prompt_stored_in_steps_goes_from_its_end_as_if_stored_at_once():
    policy = LRUPolicy()
    policy.add([1, 2])
    policy.add([3, 4], older_than=2)
    policy.add([5], older_than=4)
    assert list(policy.victims()) == [5, 4, 3, 2, 1]


def test_a_policy_is_found_by_its_name_and_an_unknown_one_names_the_known():
    assert isinstance(make_policy("LRU"), LRUPolicy)
    with pytest.raises(UsageError) as caught:
        make_policy("FIFO")
    assert "'FIFO'" in caught.value.message
    assert all(name in caught.value.hint for name in POLICIES)
