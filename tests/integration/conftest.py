"""One cache server and one vLLM that the tests with a real engine share: starting a vLLM takes longer than most of them."""

import contextlib
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chaos.waiting import wait_until
from tests.server_process import LmcacheServer
from tests.vllm_process import MODEL_NAME, VllmServer

CHUNK_SIZE = 256
# vLLM computes 5 chunks a step at most.
STEP_TOKENS = 5 * CHUNK_SIZE
RECONNECT_SECONDS = 180.0
REQUEST_SECONDS = 600.0
LOOKUP_SECONDS = 60.0
# The worker's report and the scheduler's frees come over two connections; neither waits for an answer.
SETTLE_SECONDS = 0.1
PLACEHOLDERS = Path(__file__).parents[1] / "cuda_placeholders"
PATHS = [str(PLACEHOLDERS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
BUILT_IN = {"LMCACHE_USE_UPSTREAM_MP": "1", "PYTHONPATH": os.pathsep.join(filter(None, PATHS))}


def make_prompt(seed: object, num_tokens: int) -> list[int]:
    """Token ids that share no prefix with those of another seed."""
    generator = random.Random(str(seed))
    return [generator.randrange(10, 8000) for _ in range(num_tokens)]


def is_at_rest(server: LmcacheServer) -> bool:
    """Whether no request holds anything."""
    status = server.status()
    return not (status["l1"]["pins"] or status["sessions"] or status["l1"]["reserved_bytes"])


class Engine(VllmServer):
    """A vLLM with its own prefix cache, and a way to empty it, that uses a cache server; and what both say."""

    def __init__(
        self,
        model_dir: Path,
        log_path: Path,
        server: LmcacheServer,
        *,
        env: dict[str, str] | None = None,
        failure_policy: str = "recompute",
        flags: Sequence[str] = (),
        connector_config: Mapping[str, object] | None = None,
        connector: Mapping[str, str] | None = None,
    ) -> None:
        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": failure_policy,
            "kv_connector_extra_config": {
                "lmcache.mp.host": "tcp://127.0.0.1",
                "lmcache.mp.port": server.port,
                # Half of the tests run on the other core: what is there must be found however long an answer takes.
                "lmcache.mp.lookup_timeout": LOOKUP_SECONDS,
                **(connector_config or {}),
            },
            **(connector or {}),
        }
        ours = ["--max-num-batched-tokens", str(STEP_TOKENS), "--kv-transfer-config", json.dumps(transfer)]
        super().__init__(model_dir, log_path, [*ours, *flags], env={"VLLM_SERVER_DEV_MODE": "1", **(env or {})})
        self.server = server

    def send(self, prompt: list[int], **extra: object) -> httpx.Response:
        """Complete a prompt, 16 tokens long unless told otherwise, greedily."""
        body = {"model": MODEL_NAME, "prompt": prompt, "max_tokens": 16, "temperature": 0.0, "ignore_eos": True, **extra}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=REQUEST_SECONDS)

    def ask(self, prompt: list[int], **extra: object) -> str:
        """Return the text that follows a prompt."""
        response = self.send(prompt, **extra)
        assert response.status_code == 200, f"{response.text}\n{self.log_tail()}"
        return str(response.json()["choices"][0]["text"])

    def ask_counted(self, prompt: list[int], **extra: object) -> tuple[str, dict[str, int]]:
        """Return the text, and the tokens that were meanwhile looked up with success, loaded and stored."""
        before = self.server.status()["counters"]
        text = self.ask(prompt, **extra)
        after = self.counters_at_rest()
        return text, {
            "hit": CHUNK_SIZE * (after["lookup_chunks"]["hit"] - before["lookup_chunks"]["hit"]),
            "loaded": after["retrieved_tokens"] - before["retrieved_tokens"],
            "stored": CHUNK_SIZE * (after["stored_chunks"] - before["stored_chunks"]),
        }

    def counters_at_rest(self) -> dict[str, Any]:
        """Return the server's counters once it has heard of the request's end, from both halves of the plug-in."""
        wait_until(lambda: is_at_rest(self.server), "the request holds nothing any more")
        counters: dict[str, Any] = {}
        while counters != (counters := self.server.status()["counters"]):
            time.sleep(SETTLE_SECONDS)
        return counters

    def metric(self, name: str) -> float:
        """Return the sum of a metric's series; 0 while vLLM is too busy to tell."""
        with contextlib.suppress(httpx.TransportError):
            lines = httpx.get(f"{self.url}/metrics", timeout=REQUEST_SECONDS).text.splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))
        return 0.0

    def pid_of(self, kind: str) -> int:
        """Return the process id of one half of the plug-in, `engine-scheduler` or `engine-worker`."""
        (pid,) = [client["pid"] for client in self.clients() if client["kind"] == kind]
        return int(pid)

    def clients(self) -> list[dict[str, Any]]:
        """Return the server's clients that are processes of this engine."""
        members = {member.pid for member in self.members()}
        return [client for client in self.server.status()["clients"] if client["pid"] in members]

    def wait_for_cache(self) -> None:
        """Return when both halves of the plug-in are the server's clients, the worker registered."""
        deadline = time.monotonic() + RECONNECT_SECONDS
        while time.monotonic() < deadline:
            known = {client["kind"]: client["model"] for client in self.clients()}
            if known.keys() >= {"engine-scheduler", "engine-worker"} and known["engine-worker"]:
                return
            time.sleep(0.1)
        raise AssertionError(f"the engine did not come back: {self.server.status()['clients']}\n{self.log_tail()}")


@pytest.fixture(scope="session")
def cache_server(tmp_path_factory):
    """A cache server whose pool outlives it, so that it may be killed."""
    name = f"lmcache-test-{random.SystemRandom().randrange(1 << 40):010x}"
    with LmcacheServer(["--pool-name", name], l1_size_gb=0.25, leaves_pool=True) as server:
        yield server


@pytest.fixture(scope="session")
def engine(tiny_model_dir, tmp_path_factory, cache_server):
    """A vLLM with our connector class."""
    log_path = tmp_path_factory.mktemp("vllm") / "ours.log"
    with Engine(tiny_model_dir, log_path, cache_server) as engine:
        engine.wait_for_cache()
        yield engine
