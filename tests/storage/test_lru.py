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
    """`order` is oldest first. A run is inserted last chunk first, so that its first chunk is the newest."""

    @initialize()
    def start(self) -> None:
        self.policy = LRUPolicy()
        self.order: list[int] = []

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        absent = [slot for slot in range(MAX_SLOTS) if slot not in self.order]
        if not absent:
            return
        slots = data.draw(st.lists(st.sampled_from(absent), min_size=1, max_size=6, unique=True))
        older_than = data.draw(st.none() | st.sampled_from(self.order)) if self.order else None
        self.policy.add(slots, older_than)
        at = len(self.order) if older_than is None else self.order.index(older_than)
        self.order[at:at] = reversed(slots)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def touch(self, data: st.DataObject) -> None:
        """Any slots in any order, also one twice: a prompt may hold the same chunk again."""
        slots = data.draw(st.lists(st.sampled_from(self.order), min_size=1, max_size=8))
        self.policy.touch(slots)
        for slot in reversed(slots):
            self.order.remove(slot)
            self.order.append(slot)

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def touch_a_run_that_lies_together(self, data: st.DataObject) -> None:
        first = data.draw(st.integers(0, len(self.order) - 1))
        last = data.draw(st.integers(first, len(self.order) - 1))
        run = self.order[first : last + 1]
        self.policy.touch(run[::-1])
        self.order = self.order[:first] + self.order[last + 1 :] + run

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.order))
        self.policy.remove(slot)
        self.order.remove(slot)

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
        self.order = [slot for slot in self.order if slot not in doomed]

    @invariant()
    def victims_come_oldest_first(self) -> None:
        victims = self.policy.victims()
        assert [slot for slot, _ in zip(victims, range(2 * MAX_SLOTS), strict=False)] == self.order


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
