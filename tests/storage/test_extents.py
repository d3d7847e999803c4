"""The free space, against a bitmap that knows nothing of extents."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lmcache.storage.extents import ExtentAllocator

NUM_PAGES = 64


class AgainstBitmap(RuleBasedStateMachine):
    """Every page is in use or free; a free run is as long as the bitmap says."""

    runs: Bundle[tuple[int, int]] = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator()
        self.allocator.free(0, NUM_PAGES)
        self.is_free = [True] * NUM_PAGES

    def free_runs(self) -> list[tuple[int, int]]:
        found, start = [], None
        for page, free in enumerate([*self.is_free, False]):
            if free and start is None:
                start = page
            elif not free and start is not None:
                found.append((start, page - start))
                start = None
        return found

    @rule(target=runs, num_pages=st.integers(1, NUM_PAGES))
    def allocate(self, num_pages: int) -> tuple[int, int]:
        fitting = [length for _, length in self.free_runs() if length >= num_pages]
        starts = {start for start, length in self.free_runs() if fitting and length == min(fitting)}
        start = self.allocator.allocate(num_pages)
        if not fitting:
            assert start is None
            return (0, 0)
        assert start in starts, "best fit: the shortest run that is long enough, from its beginning"
        assert all(self.is_free[start : start + num_pages])
        self.is_free[start : start + num_pages] = [False] * num_pages
        return (start, num_pages)

    @rule(run=consumes(runs))
    def free(self, run: tuple[int, int]) -> None:
        start, num_pages = run
        if num_pages:
            self.allocator.free(start, num_pages)
            self.is_free[start : start + num_pages] = [True] * num_pages

    @rule(run=consumes(runs), data=st.data())
    def free_in_two_parts(self, run: tuple[int, int], data: st.DataObject) -> None:
        start, num_pages = run
        if num_pages > 1:
            cut = data.draw(st.integers(1, num_pages - 1))
            self.allocator.free(start + cut, num_pages - cut)
            self.allocator.free(start, cut)
            self.is_free[start : start + num_pages] = [True] * num_pages

    @invariant()
    def extents_are_the_maximal_free_runs(self) -> None:
        assert self.allocator.extents() == self.free_runs()

    @invariant()
    def totals_agree(self) -> None:
        assert self.allocator.free_pages == sum(self.is_free)
        assert self.allocator.largest_free_pages == max((length for _, length in self.free_runs()), default=0)

    @invariant()
    def neighbours_are_found(self) -> None:
        starts = dict(self.free_runs())
        ends = {start + length: length for start, length in self.free_runs()}
        for page in range(NUM_PAGES + 1):
            assert self.allocator.free_run_at(page) == starts.get(page, 0)
            assert self.allocator.free_run_before(page) == ends.get(page, 0)


TestAgainstBitmap = AgainstBitmap.TestCase
TestAgainstBitmap.settings = settings(max_examples=40, stateful_step_count=40)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [0, 3, 1, 2]])
def test_of_runs_that_fit_alike_the_one_freed_last_goes_first(order: list[int]):
    allocator = ExtentAllocator()
    for run in order:
        allocator.free(run * 10, 4)  # never neighbours
    assert [allocator.allocate(4) for _ in order] == [run * 10 for run in reversed(order)]
    assert allocator.allocate(1) is None


def test_a_freed_run_that_merges_counts_as_freed_now():
    allocator = ExtentAllocator()
    allocator.free(0, 2)
    allocator.free(100, 4)
    allocator.free(2, 2)
    assert allocator.extents() == [(0, 4), (100, 4)]
    assert allocator.allocate(4) == 0
