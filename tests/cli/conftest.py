"""One server for the tests of the command line, and the commands run against it."""

import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.keys import Namespace
from lmcache.layout import KVLayout
from tests.server_process import LmcacheServer, run_lmcache

# What asks a server or an engine, and how long it may take where a test says nothing about that.
ASKING = ("ping", "describe", "query", "kvcache")
PATIENCE = ("--timeout", "120")
CHUNK_TOKENS = 256
CHUNK_BYTES = 64 << 10
MODEL = "org/tiny-model"
LAYOUT = KVLayout(num_layers=4, num_planes=2, block_bytes=512, block_size=16, dtype="bfloat16")


class Cli:
    """The real command in a process of its own, with a server's address in LMCACHE_URL.

    Args:
        url: the address; empty leaves the variable unset.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, *words: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
        # First, so that a test's own wins and errors are as without it.
        patience = PATIENCE if words[0] in ASKING else ()
        return run_lmcache(*patience, *words, env={"LMCACHE_URL": self.url, **env} if self.url else env, stdin=stdin)

    def json(self, *words: str, code: int = 0, **env: str) -> dict[str, Any]:
        """Run with --format json, check the exit code, and return the one document on stdout."""
        done = self(*words, "--format", "json", **env)
        assert done.returncode == code, done
        document = json.loads(done.stdout)
        assert document["schema_version"] == 1
        assert document["ok"] is (code == 0)
        return document

    def refused(self, *words: str, code: int = 2, **env: str) -> str:
        """Run, check that it failed as it should in text and in JSON, and return the error's text."""
        with ThreadPoolExecutor() as both:  # many of them wait for a deadline
            text = both.submit(self, *words, **env)
            document = both.submit(self.json, *words, code=code, **env)
        done = text.result()
        assert done.returncode == code, done
        assert done.stdout == ""
        assert done.stderr.startswith("error: "), done.stderr
        assert "Traceback" not in done.stderr
        assert set(document.result()["error"]) == {"code", "message", "hint"}
        return done.stderr


@pytest.fixture(scope="session")
def server() -> Iterator[LmcacheServer]:
    with LmcacheServer() as running:
        yield running


@pytest.fixture(params=["zmq", "http"])
def cli(request: pytest.FixtureRequest, server: LmcacheServer) -> Cli:
    """The command over each transport."""
    return Cli(server.zmq_url if request.param == "zmq" else server.http_url)


@pytest.fixture
def zmq_cli(server: LmcacheServer) -> Cli:
    return Cli(server.zmq_url)


@pytest.fixture
def engine(server: LmcacheServer) -> Iterator[KVCacheClient]:
    """An engine that registered MODEL; what it stored goes with the test."""
    with KVCacheClient(server.zmq_url, kind="test-engine") as client:
        client.register(namespace(), LAYOUT)
        yield client
        run_lmcache("kvcache", "clear", "-y", "--url", server.zmq_url)


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, ssl.SSLContext]:
    """The file of a certificate for `localhost` that nobody trusts, and the context of a server that has it."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    key, file = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject, "-keyout", key, "-out"]
    subprocess.run([*command, file], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return file, context


def namespace(model: str = MODEL) -> Namespace:
    return Namespace(model=model, dtype="bfloat16", layout=LAYOUT.fingerprint, chunk_size=CHUNK_TOKENS)
