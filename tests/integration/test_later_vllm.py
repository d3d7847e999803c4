"""A real vLLM on the CPU whose requests wait for their loads and whose stores go on in the background, as on a GPU."""

import pytest

from tests.chaos.waiting import wait_until
from tests.integration.conftest import CHUNK_SIZE, Engine, make_prompt
from tests.integration.later_copier import LATER
from tests.integration.test_vllm import fail_the_load, num_failed_blocks

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

CACHED = 3 * CHUNK_SIZE
PROMPT = make_prompt("later", CACHED + 10)


@pytest.fixture(scope="module")
def later(tiny_model_dir, tmp_path_factory, cache_server):
    log_path = tmp_path_factory.mktemp("vllm") / "later.log"
    with Engine(tiny_model_dir, log_path, cache_server, connector=LATER) as engine:
        engine.wait_for_cache()
        yield engine


@pytest.fixture(scope="module")
def cold(later):
    """The first answer, when the prompt has been stored."""
    text, counts = later.ask_counted(PROMPT)
    assert (counts["hit"], counts["loaded"]) == (0, 0)
    wait_until(lambda: later.ask_counted(PROMPT)[1]["stored"] == 0, "the background has stored it")
    return text


def test_an_awaited_load_answers_as_the_engines_own_cache_does(later, cold):
    own = later.ask(PROMPT)
    later.forget()
    text, counts = later.ask_counted(PROMPT)
    assert (text, counts) == (own, {"hit": CACHED, "loaded": CACHED, "stored": 0})


def test_a_request_whose_awaited_load_fails_is_computed(later, cold, cache_server):
    response = fail_the_load(later, cache_server, PROMPT)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == cold
    wait_until(lambda: num_failed_blocks(cache_server) > 0, "the failed load was reported", 60)
    later.wait_for_cache()
    later.forget()
    wait_until(lambda: later.ask_counted(PROMPT)[1]["loaded"] == CACHED or later.forget(), "it was stored again", 60)
