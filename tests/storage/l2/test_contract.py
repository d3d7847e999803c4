"""What the server relies on, for every adapter on a real back end: a folder, Redis plain, encrypted and as a cluster, S3."""

import itertools
import mmap
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache.storage.l2.base import L2Error
from lmcache.storage.l2.value import HEADER_BYTES

MIB = 1 << 20
DEADLINE_SECONDS = 120.0


def content(seed: object, num_bytes: int) -> bytes:
    return random.Random(str(seed)).randbytes(num_bytes)


def parts_of(value: bytes, *cuts: int) -> list[memoryview]:
    """The value in pieces, each in page-aligned memory of its own that can be written to, as the pool's extents are."""
    bounds = [0, *cuts, len(value)]
    pieces = []
    for first, end in itertools.pairwise(bounds):
        memory = memoryview(mmap.mmap(-1, max(1, end - first)))[: end - first]
        memory[:] = value[first:end]
        pieces.append(memory)
    return pieces


def empty_parts(num_bytes: int, *cuts: int) -> list[memoryview]:
    return parts_of(bytes(num_bytes), *cuts)


def fetch(adapter, key: str, num_bytes: int, *cuts: int) -> bytes | None:
    parts = empty_parts(num_bytes, *cuts)
    return b"".join(parts) if adapter.get(key, parts) else None


@pytest.fixture
def adapter(place, make):
    return make(place.url("a"))


@pytest.mark.parametrize("num_bytes", [1, 4095, 4096, 4097, HEADER_BYTES + MIB, HEADER_BYTES + 3 * MIB + 77])
def test_a_value_comes_back_through_another_adapter(place, make, num_bytes):
    value = content(num_bytes, num_bytes)
    make(place.url("a")).put("key", [memoryview(value)])
    assert fetch(make(place.url("a")), "key", num_bytes) == value


@pytest.mark.parametrize("cuts", [(HEADER_BYTES,), (1, 2, 5000), (HEADER_BYTES, 3 * HEADER_BYTES + 1), (0, 77), (100_000,)])
def test_a_value_can_be_put_and_fetched_in_any_parts(adapter, cuts):
    value = content(cuts, 100_000)
    adapter.put("key", parts_of(value, *cuts))
    assert fetch(adapter, "key", len(value)) == value
    assert fetch(adapter, "key", len(value), *cuts) == value
    assert fetch(adapter, "key", len(value), 50_000, 50_001) == value


def test_a_value_can_be_put_and_fetched_in_a_thousand_pages(adapter):
    value = content("pages", 1500 * 4096)
    cuts = range(4096, len(value), 4096)
    adapter.put("key", parts_of(value, *cuts))
    assert fetch(adapter, "key", len(value), *cuts) == value


def test_what_was_never_put_is_nowhere(adapter):
    assert fetch(adapter, "key", 100) is None
    assert adapter.lengths(["key", "other"]) == [None, None]
    assert adapter.delete(["key", "other"]) == 0
    assert adapter.clear() == 0


@pytest.mark.parametrize("asked", [1, 4999, 5001, 8192, 3 * MIB])
def test_a_value_of_another_length_is_corrupt(adapter, asked):
    adapter.put("key", [memoryview(bytes(5000))])
    with pytest.raises(L2Error) as caught:
        fetch(adapter, "key", asked)
    assert caught.value.code == "corrupt"
    assert fetch(adapter, "key", 5000) == bytes(5000)


@pytest.mark.parametrize("num_bytes", [5000, 10, 20_000])
def test_a_value_replaces_the_one_before(adapter, num_bytes):
    adapter.put("key", [memoryview(content("old", 5000))])
    adapter.put("key", [memoryview(content("new", num_bytes))])
    assert adapter.lengths(["key"]) == [num_bytes]
    assert fetch(adapter, "key", num_bytes) == content("new", num_bytes)


def test_lengths_come_in_the_order_of_the_keys(adapter):
    keys = [f"key-{number}" for number in range(512)]
    for number in range(0, 512, 7):
        adapter.put(keys[number], [memoryview(bytes(number + 1))])
    assert adapter.lengths(keys) == [number + 1 if number % 7 == 0 else None for number in range(512)]
    assert adapter.lengths([]) == []
    assert adapter.lengths(["key-7", "key-7"]) == [8, 8]


def test_delete_says_how_many_there_were(adapter):
    for number in range(3):
        adapter.put(f"key-{number}", [memoryview(b"value")])
    assert adapter.delete(["key-0", "key-2", "key-9"]) == 2
    assert adapter.lengths([f"key-{number}" for number in range(3)]) == [None, 5, None]
    assert adapter.delete([]) == 0


def test_clear_removes_what_any_adapter_of_this_configuration_put_and_nothing_else(place, make):
    adapter, same, other = make(place.url("a")), make(place.url("a")), make(place.url("b"))
    for number in range(20):
        (adapter if number % 2 else same).put(f"key-{number}", [memoryview(b"value")])
        other.put(f"key-{number}", [memoryview(b"other")])
    assert adapter.clear() == 20
    assert same.lengths([f"key-{number}" for number in range(20)]) == [None] * 20
    assert fetch(other, "key-3", 5) == b"other"
    assert adapter.clear() == 0
    assert other.clear() == 20


def test_ping_and_usage_leave_nothing(adapter):
    for _ in range(3):
        adapter.ping()
    before = adapter.usage()
    assert before.objects in (0, None)
    adapter.put("key", [memoryview(bytes(MIB))])
    after = adapter.usage()
    if before.used_bytes is not None:
        assert after.used_bytes >= before.used_bytes + MIB // 2  # a server counts what else it holds, and frees in between
    assert adapter.clear() == 1


@pytest.mark.parametrize("key", ["a", "0" * 128, "f00d-7", "A.b_c-d"])
def test_names_of_keys_are_kept_apart(adapter, key):
    adapter.put(key, [memoryview(b"1")])
    assert adapter.lengths([key, key + "0", key[:-1] or "b"]) == [1, None, None]
    assert adapter.delete([key]) == 1


def test_many_threads_use_one_adapter(adapter):
    def one(worker: int) -> int:
        done = 0
        for number in range(15):
            key, value = f"{worker}-{number}", content((worker, number), 20_000 + worker)
            adapter.put(key, parts_of(value, HEADER_BYTES))
            assert fetch(adapter, key, len(value), HEADER_BYTES) == value
            assert adapter.lengths([key, "none"]) == [len(value), None]
            done += adapter.delete([key]) if number % 2 else 0
        return done

    with ThreadPoolExecutor(12) as threads:
        counts = [future.result(DEADLINE_SECONDS) for future in [threads.submit(one, worker) for worker in range(12)]]
    assert counts == [7] * 12
    assert adapter.clear() == 12 * 8


def test_writers_of_one_key_leave_one_whole_value(place, make):
    values = [content(number, 300_000) for number in range(6)]
    adapters = [make(place.url("a")) for _ in range(2)]

    def one(number: int) -> None:
        for _ in range(8):
            adapters[number % 2].put("key", parts_of(values[number], HEADER_BYTES))
            assert fetch(adapters[(number + 1) % 2], "key", 300_000, HEADER_BYTES) in values

    with ThreadPoolExecutor(len(values)) as threads:
        for future in [threads.submit(one, number) for number in range(len(values))]:
            future.result(DEADLINE_SECONDS)
    assert adapters[0].clear() == 1


def test_close_can_be_called_twice(adapter):
    adapter.put("key", [memoryview(b"1")])
    adapter.close()
    adapter.close()


KEYS = ["a", "b", "c"]
STEPS = st.one_of(
    st.tuples(st.just("put"), st.sampled_from(KEYS), st.integers(1, 9000), st.integers(0, 255)),
    st.tuples(st.just("get"), st.sampled_from(KEYS)),
    st.tuples(st.just("lengths")),
    st.tuples(st.just("delete"), st.lists(st.sampled_from(KEYS), unique=True)),
    st.tuples(st.just("clear")),
)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=25))
def test_an_adapter_is_a_dictionary(adapter, steps):
    adapter.clear()
    model: dict[str, bytes] = {}
    for step in steps:
        if step[0] == "put":
            model[step[1]] = bytes([step[3]]) * step[2]
            adapter.put(step[1], [memoryview(model[step[1]])])
        elif step[0] == "get":
            assert fetch(adapter, step[1], len(model.get(step[1], b"x"))) == model.get(step[1])
        elif step[0] == "lengths":
            assert adapter.lengths(KEYS) == [len(model[key]) if key in model else None for key in KEYS]
        elif step[0] == "delete":
            assert adapter.delete(step[1]) == len([model.pop(key) for key in step[1] if key in model])
        else:
            assert adapter.clear() == len(model)
            model.clear()
