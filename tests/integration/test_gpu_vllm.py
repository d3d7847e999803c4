"""Real vLLM on a GPU with other layouts of KV than the usual one: what is loaded answers as vLLM's own cache does.

`LMCACHE_TEST_VLLM_FLAGS` says how much of the GPU's memory each vLLM may take.
"""

import pytest

from tests.chaos.waiting import wait_until
from tests.integration.conftest import CHUNK_SIZE, Engine, make_prompt
from tests.server_process import LmcacheServer
from tests.tiny_model import make_tiny_mla_model, make_tiny_model

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

CACHED = 4 * CHUNK_SIZE
NUM_PROMPTS = 8
JOINED = {"lmcache.mp.cross_layer_blocks": True}


# vLLM 0.25 joins the layers of a block in its model runner V1 only.
@pytest.mark.parametrize(
    ("make_model", "connector_config", "env", "layers_per_block"),
    [
        pytest.param(make_tiny_model, {}, {}, 1, id="a layer a tensor"),
        pytest.param(make_tiny_model, {}, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, 1, id="a layer a tensor, runner V1"),
        pytest.param(make_tiny_model, JOINED, {"VLLM_USE_V2_MODEL_RUNNER": "0"}, 4, id="all layers in one tensor"),
        pytest.param(make_tiny_mla_model, {}, {}, 1, id="MLA"),
    ],
)
def test_loaded_kv_answers_as_vllms_own(tmp_path, make_model, connector_config, env, layers_per_block):
    log_path, model_dir = tmp_path / "vllm.log", make_model(tmp_path / "model")
    with (
        LmcacheServer() as server,
        Engine(model_dir, log_path, server, connector_config=connector_config, env=env) as engine,
    ):
        engine.wait_for_cache()
        for number in range(NUM_PROMPTS):
            prompt = make_prompt(f"layouts {number}", CACHED + 10 + number)
            assert engine.ask_counted(prompt)[1]["loaded"] == 0
            own = engine.ask(prompt)
            wait_for_stored(server, (number + 1) * CACHED // CHUNK_SIZE)
            engine.forget()
            text, counts = engine.ask_counted(prompt)
            assert (text, counts["loaded"]) == (own, CACHED)
        (model,) = server.status()["models"]
        assert model["layout"]["layers_per_block"] == layers_per_block
        assert "lmcache.mp.cross_layer_blocks:" not in engine.log_text()


def wait_for_stored(server, num_chunks):
    wait_until(lambda: server.status()["counters"]["stored_chunks"] == num_chunks, f"{num_chunks} chunks are stored")
