"""What each command imports: counted in modules, not in milliseconds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmcache.client.kvcache import KVCacheClient
from tests.cli.conftest import LAYOUT, MODEL, namespace
from tests.server_process import LmcacheServer, clean_environment

ENGINE = {"torch", "numpy", "transformers", "vllm"}
SCRIPT = """
import json, sys
before = set(sys.modules)
{body}
print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
"""


def modules_after(body, **env):
    """Top-level names of what `body` imports in a fresh interpreter, and of those in sys.stdlib_module_names."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(body=body)],
        env={**clean_environment(), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    names = json.loads(done.stderr.splitlines()[-1])
    return {name.partition(".")[0] for name in names}


def test_the_package_alone_imports_the_standard_library_only():
    assert modules_after("import lmcache") - sys.stdlib_module_names == {"lmcache"}


@pytest.mark.parametrize("words", [["--help"], ["ping", "--help"], ["ping", "kvcache", "--help"], ["--version"], ["png"]])
def test_help_imports_no_library(words):
    loaded = modules_after(f"from lmcache.cli.main import main; main({words!r})")
    assert loaded - sys.stdlib_module_names == {"lmcache"}
    assert not loaded & {"dataclasses", "json", "ssl", "socket", "asyncio", "logging"}


def test_ping_imports_zmq_and_msgspec_and_nothing_heavier(server: LmcacheServer):
    loaded = modules_after(
        "from lmcache.cli.main import main; assert main(['ping', 'kvcache']) == 0", LMCACHE_URL=server.zmq_url
    )
    assert {"zmq", "msgspec"} <= loaded
    assert not loaded & (ENGINE | {"httpx", "fastapi", "uvicorn", "prometheus_client"})


def test_ping_over_http_imports_no_zmq(server: LmcacheServer):
    loaded = modules_after(
        "from lmcache.cli.main import main; assert main(['ping', 'kvcache']) == 0", LMCACHE_URL=server.http_url
    )
    assert "h11" in loaded
    assert not loaded & (ENGINE | {"zmq", "msgspec", "httpx"})


@pytest.mark.parametrize(
    "words",
    [
        ["describe", "kvcache"],
        ["query", "kvcache", "--round-trip"],
        ["kvcache", "evict", "--ratio", "0"],
        ["bench", "kvcache", "--verify-only", "--working-set", "8MiB", "--timeout", "60"],
    ],
)
def test_other_commands_import_no_engine(words, server: LmcacheServer):
    loaded = modules_after(f"from lmcache.cli.main import main; assert main({words!r}) == 0", LMCACHE_URL=server.zmq_url)
    assert not loaded & (ENGINE | {"httpx"})


def test_a_prompt_is_tokenized_without_torch(server: LmcacheServer, tiny_tokenizer_dir: Path):
    words = ["query", "kvcache", "--prompt", "hello", "--tokenizer", str(tiny_tokenizer_dir), "--model", MODEL]
    with KVCacheClient(server.zmq_url) as client:
        client.register(namespace(), LAYOUT)
        body = f"from lmcache.cli.main import main; assert main({words!r}) == 0"
        loaded = modules_after(body, LMCACHE_URL=server.zmq_url)
    assert "transformers" in loaded
    assert not loaded & {"torch", "vllm"}


def test_a_worker_of_bench_kvcache_imports_no_engine_before_a_device_is_asked_for():
    assert not modules_after("import lmcache.cli.commands.bench.worker") & (ENGINE | {"httpx"})


def test_one_command_does_not_import_another():
    body = "from lmcache.cli.main import main; main(['ping', 'kvcache', '--help']); import sys"
    body += "; assert 'lmcache.cli.commands.kvcache' not in sys.modules"
    modules_after(body)
