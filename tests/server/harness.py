"""The service without sockets: requests go in as bytes, replies come out as the client would read them."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from lmcache.errors import RemoteError
from lmcache.keys import Namespace
from lmcache.layout import KVLayout
from lmcache.metrics import Metrics
from lmcache.pool import PAGE_BYTES, PoolFile, Presence
from lmcache.protocol import (
    Attach,
    Commit,
    Goodbye,
    Hello,
    Placement,
    R,
    RegisterKVCache,
    Request,
    Status,
    Store,
    decode_reply,
    encode,
)
from lmcache.server.service import Answer, CacheService, Endpoints
from lmcache.server.sessions import Sessions
from lmcache.storage.manager import StorageManager
from tests.pools import content, keys, open_manager, pool_path

CHUNK_SIZE = 16
LEASE_SECONDS = 15.0
PIN_TIMEOUT_SECONDS = 600.0
# Its chunk is one page.
LAYOUT = KVLayout(num_layers=2, num_planes=2, block_bytes=PAGE_BYTES // 4, block_size=16, dtype="float16")


def namespace(model: str = "m", world_size: int = 1) -> Namespace:
    """An engine's namespace with LAYOUT."""
    return Namespace(model=model, chunk_size=CHUNK_SIZE, layout=LAYOUT.fingerprint, world_size=world_size)


class Clock:
    """Time that passes when told to, for leases, pins and deadlines."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class FakeClient:
    """One introduced client: it maps nothing, but holds a real presence file when `mapped`."""

    def __init__(self, service: "ServiceHarness", mapped: bool = True, kind: str = "test") -> None:
        self.service = service
        hello = service.call(Hello(kind=kind, pid=os.getpid()))
        self.id = hello.client
        self.presence: Presence | None = None
        if mapped:
            self.presence = Presence(Path(hello.pool_path), self.id)
            service.call(Attach(client=self.id, cookie=service.pool.header.cookie))

    def store(self, *numbers: int, num_bytes: int = PAGE_BYTES, **fields: Any) -> list[Placement]:
        """Reserve, write and commit numbered chunks; all must be accepted."""
        placements = self.reserve(*numbers, num_bytes=num_bytes, **fields)
        for number, place in zip(numbers, placements, strict=True):
            self.service.pool.data[place.offset : place.offset + num_bytes] = content(number, num_bytes)
        reply = self.service.call(Commit(client=self.id, placements=placements))
        assert (reply.committed, reply.rejected) == (len(numbers), [])
        return placements

    def reserve(self, *numbers: int, num_bytes: int = PAGE_BYTES, **fields: Any) -> list[Placement]:
        """Reserve places for numbered chunks; all must be given."""
        reply = self.service.call(Store(client=self.id, chunk_bytes=num_bytes, **fields), [keys(*numbers)])
        assert reply.outcomes == [0] * len(numbers)
        return reply.placements

    def register(
        self, model: str = "m", rank: int = 0, world_size: int = 1, num_shards: int | None = None, backend: str = ""
    ) -> Any:
        """Say what this engine's KV looks like."""
        shards = namespace(model, world_size if num_shards is None else num_shards)
        return self.service.call(
            RegisterKVCache(client=self.id, namespace=shards, layout=LAYOUT, rank=rank, world_size=world_size, backend=backend)
        )

    def die(self) -> None:
        """End as SIGKILL would end the process: the kernel lets go of the lock, the file stays."""
        assert self.presence is not None
        os.close(self.presence._fd)
        self.presence = None

    def leave(self) -> None:
        """Say goodbye."""
        self.service.call(Goodbye(client=self.id))
        if self.presence is not None:
            self.presence.close()
            self.presence = None


class ServiceHarness:
    """A service on a real pool, called by the thread that owns it."""

    def __init__(self, storage: StorageManager, clock: Clock, versions: tuple[int, int]) -> None:
        self.clock = clock
        self.storage = storage
        self.pool = storage.l1.pool
        self.metrics = Metrics()
        self.sessions = Sessions(LEASE_SECONDS, PIN_TIMEOUT_SECONDS)
        self.service = CacheService(
            storage=storage,
            sessions=self.sessions,
            metrics=self.metrics,
            chunk_size=CHUNK_SIZE,
            engine_type="default",
            endpoints=Endpoints("tcp://127.0.0.1:1", "http://127.0.0.1:2"),
            versions=versions,
        )
        storage._on_removed = self._count_removed
        self.clients: list[FakeClient] = []

    def _count_removed(self, reason: Any, num_chunks: int, num_bytes: int) -> None:
        self.metrics.count("lmcache_evicted_chunks", reason.value, by=num_chunks)
        self.metrics.count("lmcache_evicted_bytes", reason.value, by=num_bytes)

    def client(self, mapped: bool = True, kind: str = "test") -> FakeClient:
        """A new client."""
        made = FakeClient(self, mapped, kind)
        self.clients.append(made)
        return made

    def send(self, request: Request[Any], payload: Sequence[bytes] = (), *, delivered: bool = True) -> list[Answer]:
        """Send a request; the returned list gets the answer, at once or at a later tick."""
        return self.send_raw(encode(request), payload, delivered=delivered)

    def send_raw(self, header: bytes, payload: Sequence[bytes] = (), *, delivered: bool = True) -> list[Answer]:
        """The same for any bytes. `delivered` False: the peer is gone when the reply is to be sent."""
        answers: list[Answer] = []

        def respond(answer: Answer) -> bool:
            answers.append(answer)
            return delivered

        self.service.handle(header, [memoryview(frame) for frame in payload], respond)
        return answers

    def call(self, request: Request[R], payload: Sequence[bytes] = ()) -> R:
        """Send a request and return its reply; raises RemoteError as the client would."""
        [answer] = self.send(request, payload)
        reply = decode_reply(encode(answer.reply), request)
        if answer.done is not None:
            answer.done()
        return reply

    def code_of(self, request: Request[Any], payload: Sequence[bytes] = ()) -> str:
        """The code of the error that a request is answered with."""
        try:
            self.call(request, payload)
        except RemoteError as error:
            return error.code
        return "ok"

    def status(self) -> dict[str, Any]:
        """The status view, as a client decodes it."""
        return self.call(Status()).status

    def pass_time(self, seconds: float) -> None:
        """Let time pass and the service notice."""
        self.clock.now += seconds
        self.service.tick()

    @property
    def pins(self) -> int:
        """Pins held, with the books checked."""
        self.storage.l1.check()
        held = sum(len(session.slots()) for client in self.sessions.clients.values() for session in client.sessions.values())
        assert held == self.storage.l1.num_pins
        return held

    def value(self, name: str, *labels: str) -> int:
        """A counter."""
        return self.metrics.value(f"lmcache_{name}", *labels)


@contextmanager
def service_in(
    directory: Path, monkeypatch: Any, num_pages: int = 32, num_slots: int = 32, versions: tuple[int, int] = (1, 1)
) -> Iterator[ServiceHarness]:
    """A service whose clients have all left at the end; then nothing may be pinned or reserved, and the books be right."""
    clock = Clock()
    for module in ("server.service", "server.sessions", "storage.l1"):
        monkeypatch.setattr(f"lmcache.{module}.time", SimpleNamespace(monotonic=clock.monotonic))
    pool = PoolFile.create(pool_path(directory), capacity_bytes=num_pages * PAGE_BYTES, num_slots=num_slots)
    with open_service(open_manager(pool), clock, versions) as harness:
        yield harness


@contextmanager
def open_service(storage: StorageManager, clock: Clock, versions: tuple[int, int] = (1, 1)) -> Iterator[ServiceHarness]:
    """The same on a manager that is there already, such as an adopted one."""
    harness = ServiceHarness(storage, clock, versions)
    try:
        yield harness
        for client in list(harness.clients):
            if client.id in harness.sessions.clients:
                client.leave()
        assert harness.pins == 0
        assert storage.l1.num_reserved == len(harness.service._orphans)
        assert harness.service.problems() == []
    finally:
        for client in harness.clients:
            if client.presence is not None:
                client.presence.close()
        harness.sessions.close()
        storage.close()


def as_builtins(reply: Any) -> dict[str, Any]:
    """A reply's own fields."""
    return {name: value for name, value in msgspec.to_builtins(reply).items() if name not in ("boot", "error")}
