"""Back ends that the tests of this folder share; each is started when a test first needs it."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

from lmcache.storage.l2.base import L2Adapter
from lmcache.storage.l2.spec import make_adapter, parse_adapter
from tests.l2_servers import ACCESS, BUCKET, make_certificates, redis_cluster, redis_server, s3_server
from tests.leaks import nothing_left
from tests.server_process import free_port

BACK_ENDS = ["fs", "fs-buffered", "fs-memory", "redis", "redis-tls", "redis-cluster", "s3"]
SERVERS = {"redis": "redis_port", "redis-tls": "redis_tls", "redis-cluster": "redis_cluster_ports", "s3": "s3_port"}
# Far more than anything takes that works, also where other work shares the machine.
PATIENT = "timeout-seconds=60"


@pytest.fixture(scope="session")
def redis_port(tmp_path_factory) -> Iterator[int]:
    with redis_server(tmp_path_factory.mktemp("redis")) as port:
        yield port


@pytest.fixture(scope="session")
def redis_tls(tmp_path_factory) -> Iterator[tuple[int, Path]]:
    """The port and the certificate to trust."""
    directory = tmp_path_factory.mktemp("redis-tls")
    certificate, key = make_certificates(directory)
    flags = ["--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no"]
    with redis_server(directory, "--port", "0", "--tls-port", str(free_port()), *flags) as port:
        yield port, certificate


@pytest.fixture(scope="session")
def redis_cluster_ports(tmp_path_factory) -> Iterator[list[int]]:
    with redis_cluster(tmp_path_factory.mktemp("redis-cluster")) as ports:
        yield ports


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory) -> Iterator[int]:
    with s3_server(tmp_path_factory.mktemp("s3")) as port:
        # The client's threads and their descriptors stay for good: start them before a test counts.
        adapter = make_adapter(parse_adapter(f"s3://{BUCKET}/start?endpoint=http://127.0.0.1:{port}&{ACCESS}&{PATIENT}"))
        adapter.ping()
        adapter.close()
        yield port


@pytest.fixture(autouse=True)
def _nothing_left(request, tmp_path) -> Iterator[None]:
    """As for all tests of storage; a back end that tests share is started before the counting."""
    kind = request.node.callspec.params.get("place") if hasattr(request.node, "callspec") else None
    if kind in SERVERS:
        request.getfixturevalue(SERVERS[kind])
    with nothing_left(tmp_path):
        yield


class Place(NamedTuple):
    """Somewhere to keep values, empty at first: `url(name)` is one of the disjoint parts of it."""

    kind: str
    url: Callable[[str], str]


@pytest.fixture(params=BACK_ENDS)
def place(request, tmp_path) -> Iterator[Place]:
    """Every back end in turn."""
    yield from make_place(request, tmp_path, request.param)


def make_place(request, tmp_path: Path, kind: str) -> Iterator[Place]:
    """One back end; the name of a prefix holds what a glob pattern would take for its own."""
    unique = uuid4().hex
    server = request.getfixturevalue(SERVERS[kind]) if kind in SERVERS else None
    if kind == "fs-memory":
        directory = Path("/dev/shm") / f"lmcache-test-{unique}"
        directory.mkdir()
        try:
            yield Place(kind, lambda name: f"fs://{directory}/{name}?capacity-gb=0.25")
        finally:
            shutil.rmtree(directory)
    elif kind.startswith("fs"):
        direct = "&direct-io=0" if kind == "fs-buffered" else ""
        yield Place(kind, lambda name: f"fs://{tmp_path}/{name}?capacity-gb=0.25{direct}")
    elif kind == "redis":
        yield Place(kind, lambda name: f"redis://127.0.0.1:{server}?prefix={unique}[{name}]:&{PATIENT}")
    elif kind == "redis-tls":
        port, certificate = server
        yield Place(kind, lambda name: f"rediss://localhost:{port}?ca-file={certificate}&prefix={unique}{name}:&{PATIENT}")
    elif kind == "redis-cluster":
        yield Place(kind, lambda name: f"redis+cluster://127.0.0.1:{server[0]}?prefix={unique}{name}:&{PATIENT}")
    else:
        endpoint = f"endpoint=http://127.0.0.1:{server}"
        yield Place(kind, lambda name: f"s3://{BUCKET}/{unique}/{name}?{endpoint}&{ACCESS}&{PATIENT}")


@pytest.fixture
def make() -> Iterator[Callable[[str], L2Adapter]]:
    """Make adapters that are closed after the test."""
    made: list[L2Adapter] = []

    def make_one(url: str) -> L2Adapter:
        made.append(make_adapter(parse_adapter(url)))
        return made[-1]

    yield make_one
    for adapter in made:
        adapter.close()
