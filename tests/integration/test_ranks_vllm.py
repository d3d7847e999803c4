"""Real vLLM with two tensor parallel ranks: each stores and loads its shard, and with MLA one stores for both."""

import pytest

from tests.integration.conftest import CHUNK_SIZE, Engine, make_prompt
from tests.server_process import LmcacheServer
from tests.tiny_model import make_tiny_mla_model

torch = pytest.importorskip("torch", reason="needs torch: make setup-vllm")

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1800)]

CACHED = 2 * CHUNK_SIZE
# Two ranks take both cores of a small machine, and the server may be silent for too long: then one round loses something.
MAX_ROUNDS = 4
# With MLA vLLM for the CPU has a prefix cache of its own only where the CPU has AMX, so it is switched off. What it computes in
# one go differs in its last bits from what it computes over loaded KV, which shows late in some answers; wrong KV at once.
MLA_COMPARED_CHARACTERS = 20


@pytest.mark.parametrize(("is_mla", "num_shards"), [(False, 2), (True, 1)], ids=["full attention", "MLA"])
def test_two_ranks_answer_over_loaded_kv_as_over_their_own(tiny_model_dir, tmp_path, is_mla, num_shards):
    model_dir = make_tiny_mla_model(tmp_path / "mla") if is_mla else tiny_model_dir
    has_own_cache = not is_mla or torch.cuda.is_available()
    flags = ["--tensor-parallel-size", "2", "--max-num-batched-tokens", str(CHUNK_SIZE)]
    flags += [] if has_own_cache else ["--no-enable-prefix-caching"]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    expected = [
        {"hit": 0, "loaded": 0, "stored": num_shards * CACHED},
        {"hit": CACHED, "loaded": CACHED, "stored": 0},
        # What is computed in the step of a load is stored once both ranks have told that theirs was good.
        {"hit": CACHED, "loaded": CACHED, "stored": num_shards * CHUNK_SIZE},
    ]
    ask = ask_with_own_cache if has_own_cache else ask_mla
    with LmcacheServer() as server, Engine(model_dir, tmp_path / "vllm.log", server, flags=flags, env=env) as engine:
        engine.wait_for_cache()
        rounds = []
        while expected not in rounds:
            assert len(rounds) < MAX_ROUNDS, rounds
            prompt = make_prompt(f"ranks {len(rounds)}", CACHED + 10)
            rounds.append(ask(engine, prompt, prompt + make_prompt("longer", CHUNK_SIZE)))
        (model,) = server.status()["models"]
        assert (model["ranks"], model["world_size"], model["namespace"]["world_size"]) == ([0, 1], 2, num_shards)


def ask_with_own_cache(engine, prompt, longer):
    """Compare answers with those over vLLM's own cache; return what was found, loaded and stored: cold, warm and longer."""
    engine.ask(prompt, cache_salt="own")
    own, own_longer = engine.ask(prompt, cache_salt="own"), engine.ask(longer, cache_salt="own")
    _, cold = engine.ask_counted(prompt)
    engine.forget()
    warm_text, warm = engine.ask_counted(prompt)
    engine.forget()
    longer_text, grown = engine.ask_counted(longer, max_tokens=1)
    if warm["loaded"] == grown["loaded"] == CACHED:
        assert (warm_text, own_longer[: len(longer_text)]) == (own, longer_text)
    return [cold, warm, grown]


def ask_mla(engine, prompt, longer):
    """The same, compared with cold answers; nothing is returned where these differ."""
    own_longer = engine.ask(longer, cache_salt="own")
    own, cold = engine.ask_counted(prompt)
    warm_text, warm = engine.ask_counted(prompt)
    longer_text, grown = engine.ask_counted(longer, max_tokens=1)
    size = MLA_COMPARED_CHARACTERS
    are_equal = warm_text[:size] == own[:size] and own_longer.startswith(longer_text)
    return [cold, warm, grown] if are_equal else []
