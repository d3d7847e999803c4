"""Back ends for L2 as real child processes on free ports of the loopback interface.

Redis or Valkey is Debian's (`make setup-l2`). S3 is moto's server from PyPI: it speaks the protocol over HTTP as the client of
production does, knows buckets, lists, multi-object deletes and signatures, and needs nothing but Python.
"""

import contextlib
import http.client
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import redis

from tests.server_process import free_port

START_SECONDS = 120.0
STOP_SECONDS = 60.0
SLOTS = 16384
BUCKET = "lmcache-test"
ACCESS = "access-key-id=test&secret-access-key=test&region=us-east-1"
MOTO = Path(__file__).parent / "moto_one_by_one.py"
# moto reads the region and the service out of it, and no more.
_AUTHORIZATION = "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


def redis_binary() -> str:
    """The server's path; skips the test where there is none."""
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        pytest.skip("needs valkey-server or redis-server: make setup-l2")
    return found


def wait_for(is_done: Callable[[], bool], what: str) -> None:
    """Return when something is done; an exception in it counts as not yet."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError, redis.RedisError, http.client.HTTPException):
            if is_done():
                return
        assert time.monotonic() < deadline, f"{what}: not within {START_SECONDS} s"
        time.sleep(0.02)


@contextlib.contextmanager
def process(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child process that ends with the block."""
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield child
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(STOP_SECONDS)


@contextlib.contextmanager
def redis_server(directory: Path, *flags: str, port: int = 0) -> Iterator[int]:
    """A server that keeps nothing on disk; yields its port. `flags` come last, so they win."""
    port = port or free_port()
    directory.mkdir(parents=True, exist_ok=True)
    command = [redis_binary(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with process([*command, "--dir", str(directory), *flags], directory / "log"):
        is_tls = "--tls-port" in flags

        def answers() -> bool:
            kind = {"ssl": True, "ssl_cert_reqs": "none"} if is_tls else {}
            with redis.Redis(port=port, protocol=2, socket_timeout=1, **kind) as client:
                try:
                    return bool(client.ping())
                except (redis.AuthenticationError, redis.exceptions.NoPermissionError):
                    return True

        if is_tls:
            port = int(flags[flags.index("--tls-port") + 1])
        wait_for(answers, "redis")
        yield port


@contextlib.contextmanager
def redis_cluster(directory: Path, num_nodes: int = 3) -> Iterator[list[int]]:
    """A cluster without replicas; yields the nodes' ports."""
    with contextlib.ExitStack() as stack:
        bus_ports = [free_port() for _ in range(num_nodes)]
        flags = ("--cluster-enabled", "yes", "--cluster-node-timeout", "5000", "--cluster-port")
        ports = [
            stack.enter_context(redis_server(directory / str(number), *flags, str(bus_ports[number])))
            for number in range(num_nodes)
        ]
        nodes = [redis.Redis(port=port, protocol=2) for port in ports]
        for number, node in enumerate(nodes):
            first, end = SLOTS * number // num_nodes, SLOTS * (number + 1) // num_nodes
            node.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            node.execute_command("CLUSTER", "MEET", "127.0.0.1", ports[0], bus_ports[0])

        def is_whole() -> bool:
            states = [node.execute_command("CLUSTER", "INFO").split() for node in nodes]
            return all({b"cluster_state:ok", f"cluster_known_nodes:{num_nodes}".encode()} <= set(state) for state in states)

        wait_for(is_whole, "the cluster")
        for node in nodes:
            node.close()
        yield ports


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[int]:
    """A server with one empty bucket; yields its port."""
    port = free_port()
    with process([sys.executable, str(MOTO), "-H", "127.0.0.1", "-p", str(port)], directory / "s3.log"):

        def has_bucket() -> bool:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            with contextlib.closing(connection):
                connection.request("PUT", f"/{BUCKET}", headers={"Authorization": _AUTHORIZATION})
                return connection.getresponse().status == 200

        wait_for(has_bucket, "the S3 server")
        yield port


def make_certificates(directory: Path) -> tuple[Path, Path]:
    """Return a certificate for localhost that signs itself, and its key."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True, timeout=START_SECONDS,
    )  # fmt: skip
    return certificate, key
