"""Engines whose KV is not what a prefix of tokens decides: they serve without the cache, and say why."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")
pytest.importorskip("vllm", reason="needs vLLM: make setup-vllm")

from lmcache.integration.vllm.scheduler import _scheduled_requests  # noqa: E402
from tests.integration.test_cross_layers import (  # noqa: E402
    FULL,
    NAMES,
    FullAttentionSpec,
    kv_cache_config,
    make_connector,
)

# What vLLM imports warns of itself.
pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore::DeprecationWarning")]


def register(connector):
    """Return why the worker serves without the cache; "" when it does not."""
    connector.register_kv_caches({name: torch.zeros(FULL, dtype=torch.bfloat16) for name in NAMES})
    return connector._worker.hello.refusal


@pytest.mark.parametrize(
    ("pooler", "is_supported", "is_refused"),
    [(None, False, False), ("LAST", True, False), ("MEAN", False, True), ("CLS", False, True)],
)
def test_a_pooling_model_that_needs_the_whole_prompt_is_refused(monkeypatch, pooler, is_supported, is_refused):
    """A hit left out what vLLM then missed, and the engine died of it."""
    connector = make_connector(monkeypatch, {})
    model = connector._vllm_config.model_config
    model.pooler_config = pooler and SimpleNamespace(seq_pooling_type=pooler)
    model.is_prefix_caching_supported = is_supported
    assert ("computed at once" in register(connector)) is is_refused


def test_kv_that_depends_on_later_tokens_is_refused(monkeypatch):
    connector = make_connector(monkeypatch, {})

    class PrefixLMSpec(FullAttentionSpec):
        non_causal = True

    PrefixLMSpec.__name__ = "FullAttentionSpec"
    connector._kv_cache_config = kv_cache_config(PrefixLMSpec)
    assert "depends on later tokens" in register(connector)


@pytest.mark.parametrize("outer", [None, "LMCacheMPConnector", "MultiConnector"])
def test_one_of_several_connectors_is_refused_as_another_ones_failed_load_would_be_stored(monkeypatch, outer):
    config = outer and SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector=outer))
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)
    refusal = register(make_connector(monkeypatch, {}))
    assert ("other connectors of a MultiConnector" in refusal) is (outer == "MultiConnector")


def test_a_model_without_kv_is_scheduled_all_the_same():
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id="new", block_ids=(), num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=["old"], new_block_ids=[()], num_computed_tokens=[3], resumed_req_ids=set()
        ),
    )
    assert list(_scheduled_requests(output)) == [("new", [], True, 0), ("old", [], False, 3)]
