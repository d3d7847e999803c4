"""Every name that vLLM or an old script imports from here exists, and costs little to import."""

import json
import pickle
import subprocess
import sys

import pytest

from lmcache.integration.vllm.utils import mla_enabled
from lmcache.integration.vllm.vllm_multi_process_adapter import (
    LoadStoreOp,
    ParallelStrategy,
)
from lmcache.utils import init_logger
from lmcache.v1.multiprocess.custom_types import BlockAllocationRecord, RequestAllocationRecord

# What vLLM 0.32 imports of ours at its own import; nothing else of ours may be loaded by it.
IMPORTED_BY_VLLM = [
    "lmcache.utils",
    "lmcache.integration.vllm.utils",
    "lmcache.integration.vllm.vllm_multi_process_adapter",
    "lmcache.v1.multiprocess.custom_types",
]


def test_the_names_behave_as_vllm_uses_them():
    assert init_logger("vllm.connector").name == "lmcache.vllm.connector"
    record = RequestAllocationRecord(req_id="r", new_block_ids=[1], new_token_ids=[2, 3])
    assert BlockAllocationRecord is type(record)
    strategy = ParallelStrategy(False, 2, 1, 2, 1, 2, 1)
    assert (strategy.kv_world_size, strategy.kv_worker_id, strategy.pp_size) == (2, 1, 1)
    op = LoadStoreOp(token_ids=[1, 2], block_ids=[5, 4, 9], start=0, end=2)
    assert len(op) == 3
    assert pickle.loads(pickle.dumps(op)) == op


@pytest.mark.parametrize("use_mla", [True, False])
def test_mla_is_what_the_model_says(use_mla):
    class ModelConfig:
        pass

    assert not mla_enabled(ModelConfig())
    ModelConfig.use_mla = use_mla
    assert mla_enabled(ModelConfig()) is use_mla


def test_what_vllm_imports_at_its_own_import_is_light():
    code = (
        "import importlib, json, sys\n"
        f"[importlib.import_module(name) for name in {IMPORTED_BY_VLLM}]\n"
        "print(json.dumps([name for name in sys.modules if '.' not in name]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert not set(json.loads(output)) & {"torch", "vllm", "numpy", "transformers", "fastapi"}


def test_the_old_server_module_is_the_server_command():
    outputs = [
        subprocess.run(
            [sys.executable, "-m", *words, "--help"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for words in (["lmcache.v1.multiprocess.http_server"], ["lmcache.cli.main", "server"])
    ]
    assert outputs[0] == outputs[1]
    assert "--l1-size-gb" in outputs[0]
