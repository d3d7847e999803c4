"""The connector class itself, without an engine around it."""

import warnings

import pytest

from lmcache.integration.vllm.steps import StepPlan

pytest.importorskip("vllm", reason="needs vLLM: make setup-vllm")

with warnings.catch_warnings():  # vLLM's and PyTorch's own, at import
    warnings.simplefilter("ignore")
    from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector, PlanMetadata


class Worker:
    """Notes what it is told to store."""

    def __init__(self, copies_later=True):
        self.copies_later = copies_later
        self.stored = []
        self.num_lingers = 0
        self.was_idle = []

    def begin_step(self):
        pass

    def store(self, plan):
        self.stored.append(plan.number)

    def linger(self):
        self.num_lingers += 1

    def take_released(self):
        return {f"after {self.stored}"}

    def take_received(self, is_idle):
        self.was_idle.append(is_idle)
        return {f"received in {self.stored[-1:]}"}


@pytest.mark.parametrize("save_comes", ["before", "after", "never"])
def test_a_steps_chunks_are_stored_once_and_before_its_requests_are_released(save_comes):
    """vLLM 0.25 leaves out `wait_for_save` in a step that computes nothing, and calls it last where drafts follow."""
    connector = object.__new__(LMCacheMPConnector)
    connector._worker = worker = Worker()
    for number in (1, 2):
        connector.bind_connector_metadata(PlanMetadata(StepPlan(number=number)))
        if save_comes == "before":
            connector.wait_for_save()
        assert connector.get_finished(set()) == ({f"after {[*range(1, number + 1)]}"}, {f"received in {[number]}"})
        if save_comes == "after":
            connector.wait_for_save()
        connector.clear_connector_metadata()
    assert worker.stored == [1, 2]


def test_what_is_copied_at_once_is_stored_when_the_drafts_of_the_step_are_computed():
    connector = object.__new__(LMCacheMPConnector)
    connector._worker = worker = Worker(copies_later=False)
    connector.bind_connector_metadata(PlanMetadata(StepPlan(number=1)))
    connector.get_finished(set())
    assert worker.stored == []
    connector.wait_for_save()
    assert worker.stored == [1]
    connector.clear_connector_metadata()
    connector.bind_connector_metadata(PlanMetadata(StepPlan(number=2, is_idle=True)))
    connector.get_finished(set())
    assert worker.stored == [1, 2]


@pytest.mark.parametrize("is_idle", [True, False])
def test_only_a_step_that_computes_nothing_lingers_for_a_load_and_names_one_that_is_far_from_over(is_idle):
    connector = object.__new__(LMCacheMPConnector)
    connector._worker = worker = Worker()
    connector.bind_connector_metadata(PlanMetadata(StepPlan(number=1, is_idle=is_idle)))
    connector.get_finished(set())
    assert worker.num_lingers == is_idle
    assert worker.was_idle == [is_idle]
