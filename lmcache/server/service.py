"""Answers each request: what every operation means.

Comes in: a header frame and payload frames, from the ZMQ or the HTTP frontend alike. Goes out: a reply, at once or, for the few
that wait, from a later `tick`. Next on the data path: `storage/manager.py`. Owner thread only; no handler blocks.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from lmcache import __version__
from lmcache.errors import LMCacheError, ProtocolError, RemoteError
from lmcache.keys import KEY_BYTES, Namespace
from lmcache.layout import SUPPORTED_DEVICES, SUPPORTED_KV_GROUPS, KVLayout, shown_sessions
from lmcache.log import RateLimitedLog, init_logger
from lmcache.metrics import Metrics
from lmcache.pool import PAGE_BYTES, PoolFile, PresenceWatch, is_client_alive, remove_client_file
from lmcache.protocol import (
    FEATURES,
    MAX_CHUNK_BYTES,
    MAX_CHUNKS,
    MAX_PLACES,
    MIN_PROTOCOL_VERSION,
    PROTOCOL_VERSION,
    Abort,
    Attach,
    ChunkSizeReply,
    Clear,
    ClearTier,
    Commit,
    CommitReply,
    EndSession,
    ErrorInfo,
    Evict,
    FindWorkers,
    FreeLookupLocks,
    Get,
    GetChunkSize,
    GetReply,
    Goodbye,
    Hello,
    HelloReply,
    HitStatus,
    Lookup,
    LookupReply,
    Noop,
    NoopReply,
    PinReport,
    PinsReply,
    Placement,
    Put,
    PutReply,
    RegisterKVCache,
    RegisterReply,
    Release,
    RemovalReply,
    Reply,
    Report,
    Request,
    Retrieve,
    RetrieveReply,
    Status,
    StatusReply,
    Store,
    StoreOutcome,
    StoreReply,
    UnregisterKVCache,
    WorkersReply,
    count_keys,
    decode_request,
)
from lmcache.server.sessions import Client, LookupPins, Sessions
from lmcache.storage.manager import MAX_ENTRIES_PER_SLICE, Removal, RemovalReason, Selection, StorageManager, Sweep
from lmcache.storage.promotion import Found
from lmcache.storage.tiers import TierRemovals, Tiers

logger = init_logger(__name__)

STATUS_SCHEMA_VERSION = 1
CLIENT_CHECK_SECONDS = 0.5
PASS_SECONDS = 0.1
BUSY_PASS_SECONDS = 0.01
IDLE_CHECK_SECONDS = 1.0
# Between two lines about clients that went without a goodbye, and how many of them one names.
GONE_LOG_SECONDS = 10.0
MAX_GONE_NAMED = 3
# Re-adding this many entries takes about 20 ms: not noticed when idle. Above it only the totals are compared.
MAX_CHECKED_CHUNKS = 50_000
# Bytes of one GET that may be on their way to one peer: a reader that stops reading pins no more than this.
MAX_GET_BYTES = 64 << 20
# Errors of a peer that speaks something else and may not understand the reply: the log tells whoever looks for the reason.
FOREIGN = ("version_mismatch", "bad_header")
# A lookup is answered within this share of the time that its sender waits.
TIMEOUT_SHARE = 0.75
# Both are only there so that no sequence of good requests makes the server grow without end.
MAX_PENDING_REMOVALS = 64
# Chunks times ranks that one request names: some 0.2 s of the owner's time.
MAX_VALUES = 1 << 18
MAX_MODELS = 1024
# In the line about an engine that shares nothing with another of its model.
MAX_TOLD_DIFFERENCES = 8
# No GPU copies more between two heartbeats; made-up reports must not outgrow what a message can hold.
MAX_COPIED_BYTES = 1 << 36

Payload = Sequence[bytes | memoryview]


class Answer(msgspec.Struct):
    """A reply with its payload. `undo` takes back what was granted if nobody can be told; `done` runs once it was sent."""

    reply: Reply
    payload: list[memoryview] = []
    undo: Callable[[], object] | None = None
    done: Callable[[], None] | None = None


class Endpoints(msgspec.Struct):
    """Where the server listens, as told to clients; `http` is empty without a frontend."""

    zmq: str
    http: str = ""


class Model(msgspec.Struct):
    """One engine's namespace as registered by its ranks; `world_size` counts these."""

    namespace: Namespace
    rank_bytes: dict[int, int]
    world_size: int
    layout: KVLayout
    revision_parts: dict[str, str] = {}

    @property
    def bytes_per_token(self) -> int:
        """What a token weighs in all shards, those of ranks that have not registered yet included."""
        return sum(self.rank_bytes.values()) * self.namespace.world_size // len(self.rank_bytes)


class Pending(msgspec.Struct, frozen=True):
    """A request whose reply comes later."""

    op: str
    respond: Callable[[Answer], bool]
    started_at: float


class PendingLookup(msgspec.Struct, eq=False):
    """A LOOKUP that waits for the tiers. It `is_abandoned` when its request gives up all that it would pin."""

    request: Lookup
    num_chunks: int
    is_abandoned: bool = False


class PendingRemoval(msgspec.Struct):
    """A CLEAR or EVICT under way: through L1 once, then with `force` for pins, with tiers for what moves and for the tiers.

    `sweep` is None where L1 is left alone. What it kept is removed later; what was stored since is not its business. One that
    `is_answered` because its time was up only goes on until it `is_swept`.
    """

    request: Clear | Evict
    pending: Pending
    sweep: Sweep | None = None
    in_tiers: TierRemovals | None = None
    is_swept: bool = False
    is_answered: bool = False


class CacheService:
    """The cache behind both frontends.

    Args:
        storage, sessions, metrics, tiers: the state, owned by the calling thread; no tiers: None.
        chunk_size: tokens in a chunk.
        endpoints: filled in once both are bound.
        config: every setting with its source, for STATUS.
        versions: lowest and highest protocol version answered.
        status_interval_seconds: how often a line is logged while there is traffic; 0: never.
    """

    def __init__(
        self,
        *,
        storage: StorageManager,
        sessions: Sessions,
        metrics: Metrics,
        tiers: Tiers | None = None,
        chunk_size: int,
        engine_type: str,
        endpoints: Endpoints,
        config: dict[str, Any] | None = None,
        versions: tuple[int, int] = (MIN_PROTOCOL_VERSION, PROTOCOL_VERSION),
        status_interval_seconds: float = 0.0,
    ) -> None:
        self.storage = storage
        self.sessions = sessions
        self.metrics = metrics
        self.tiers = tiers
        self._pool: PoolFile = storage.l1.pool
        self._boot = self._pool.header.boot_id.hex()
        self._chunk_size = chunk_size
        self._engine_type = engine_type
        self._endpoints = endpoints
        self._config = config or {}
        self._versions = versions
        self._started_at = time.monotonic()
        self._models: dict[int, Model] = {}
        self._removals: list[PendingRemoval] = []
        self._pending_lookups: list[PendingLookup] = []
        self._orphans = storage.l1.reservations()
        self._log = RateLimitedLog(logger)
        self._last_request_at = self._started_at
        self._clients_checked_at = self._started_at
        self._unchecked = False
        self._gone: list[str] = []  # since the last line about them
        self._gone_logged_at = float("-inf")
        self._status_interval_seconds = status_interval_seconds
        self._status_logged_at = self._started_at
        self._requests_logged = 0
        self._num_requests = 0
        self._maintenance_error = ""
        self._accounting_error = ""
        self._handlers: dict[type[Request[Any]], Callable[[Any, Payload], Answer]] = {
            Noop: self._noop,
            GetChunkSize: self._get_chunk_size,
            Hello: self._hello,
            Attach: self._attach,
            Goodbye: self._goodbye,
            RegisterKVCache: self._register,
            UnregisterKVCache: self._unregister,
            FindWorkers: self._find_workers,
            Report: self._report,
            Lookup: self._lookup,
            FreeLookupLocks: self._free_lookup_locks,
            EndSession: self._end_session,
            Store: self._store,
            Commit: self._commit,
            Abort: self._abort,
            Retrieve: self._retrieve,
            Release: self._release,
            Put: self._put,
            Get: self._get,
            Status: self._status,
        }

    # -- one request --------------------------------------------------------------------------------------------------

    def handle(self, header: bytes, payload: Payload, respond: Callable[[Answer], bool]) -> None:
        """Answer one request through `respond`, which tells whether the reply could be handed over."""
        started_at = self._last_request_at = time.monotonic()
        self._num_requests += 1
        op = "invalid"
        try:
            request = decode_request(header, *self._versions)
            op = str(type(request).__struct_config__.tag)
            if self._answers_later(request, payload, Pending(op, respond, started_at)):
                return
            self._send(op, self._handlers[type(request)](request, payload), respond, started_at)
        except LMCacheError as exc:
            if exc.code in FOREIGN:
                self._log.warning(exc.code, f"a request was refused: {exc.with_hint}")
            self._send(op, self._error(exc), respond, started_at)
        except Exception as exc:  # a bug must cost its request an error, not every client the server
            logger.exception("%s failed", op)
            error = RemoteError(
                f"{op} failed in the server: {exc!r}",
                "this is a bug; see the server's log",
                "internal",
            )
            self._send(op, self._error(error), respond, started_at)

    def _answers_later(self, request: Request[Any], payload: Payload, pending: Pending) -> bool:
        """Begin what may take long, or must wait for pins or tiers; True when the reply has come or will come from there."""
        if isinstance(request, Lookup) and self.tiers is not None:
            return self._begin_lookup(self.tiers, request, payload, pending)
        if isinstance(request, Clear | Evict):
            self._begin_removal(request, payload, pending)
            return True
        return False

    def _finish(self, pending: Pending, make: Callable[[], Answer]) -> None:
        """Answer a request that was begun earlier."""
        try:
            answer = make()
        except LMCacheError as exc:
            answer = self._error(exc)
        self._send(pending.op, answer, pending.respond, pending.started_at)

    def bad_frames(self, message: str, respond: Callable[[Answer], bool]) -> None:
        """Answer frames that are no request at all."""
        self._send(
            "invalid",
            self._error(ProtocolError(message, code="bad_frames")),
            respond,
            time.monotonic(),
        )

    def _send(self, op: str, answer: Answer, respond: Callable[[Answer], bool], started_at: float) -> None:
        answer.reply.boot = self._boot
        if not respond(answer):
            self.metrics.count("lmcache_replies_dropped")
            if answer.undo is not None:
                answer.undo()
        self.metrics.count("lmcache_requests", op, "error" if answer.reply.error else "ok")
        self.metrics.observe("lmcache_request_duration_seconds", op, value=time.monotonic() - started_at)

    def _error(self, exc: LMCacheError) -> Answer:
        return Answer(Reply(error=ErrorInfo(exc.code, exc.message, exc.hint)))

    def _client(self, client_id: str, mapped: bool = False) -> Client:
        client = self.sessions.find(client_id)
        if client is None:
            raise RemoteError(
                f"client {client_id} is not known to this server",
                "say HELLO first: the server was restarted, or the lease ran out",
                "unknown_client",
            )
        if mapped and client.presence is None:
            raise RemoteError(
                "this client has not mapped the pool",
                "ATTACH first, or use PUT and GET",
                "not_attached",
            )
        return client

    # -- who is there -------------------------------------------------------------------------------------------------

    def _noop(self, request: Noop, payload: Payload) -> Answer:
        if request.client is not None:
            self._client(request.client)
        return Answer(
            NoopReply(
                version=__version__,
                min_protocol=self._versions[0],
                max_protocol=self._versions[1],
                features=int(FEATURES),
                uptime_seconds=time.monotonic() - self._started_at,
                engine_type=self._engine_type,
                zmq_endpoint=self._endpoints.zmq,
                http_endpoint=self._endpoints.http,
                problems=self.problems(),
            )
        )

    def problems(self) -> list[str]:
        """Return why the server cannot do its work; [] when it can."""
        found = self.storage.problems() + ([] if self.tiers is None else self.tiers.problems())
        return found + [text for text in (self._maintenance_error, self._accounting_error) if text]

    def _get_chunk_size(self, request: GetChunkSize, payload: Payload) -> Answer:
        return Answer(ChunkSizeReply(chunk_size=self._chunk_size))

    def _hello(self, request: Hello, payload: Payload) -> Answer:
        client = self.sessions.introduce(request.kind, request.pid, request.software)
        reply = HelloReply(
            client=client.id,
            features=int(FEATURES) & request.features,
            chunk_size=self._chunk_size,
            lease_seconds=self.sessions.lease_seconds,
            pool_path=str(self._pool.path),
            pin_timeout_seconds=self.sessions.pin_timeout_seconds,
        )
        return Answer(reply, undo=lambda: self.storage.l1.unpin(self._take_out(client)))

    def _attach(self, request: Attach, payload: Payload) -> Answer:
        client = self._client(request.client)
        path = self._pool.client_path(client.id)
        if request.cookie != self._pool.header.cookie:
            raise RemoteError("the cookie is not this pool's", "another file was mapped", "wrong_pool")
        if client.presence is None:
            client.presence = _watch(path)
        return Answer(Reply())

    def _goodbye(self, request: Goodbye, payload: Payload) -> Answer:
        self.storage.l1.unpin(self._take_out(self._client(request.client)))
        return Answer(Reply())

    def _register(self, request: RegisterKVCache, payload: Payload) -> Answer:
        client = self._client(request.client)
        namespace = request.namespace
        if request.layout.fingerprint != namespace.layout or namespace.world_size not in (1, request.world_size):
            raise RemoteError("the namespace names another layout or world size", code="layout_mismatch")
        request.layout.blocks_per_chunk(self._chunk_size)
        if namespace.chunk_size != self._chunk_size:
            raise RemoteError(
                f"the engine cuts chunks of {namespace.chunk_size} tokens, the server of {self._chunk_size}",
                "let the engine ask for the chunk size",
                "chunk_size",
            )
        if request.rank >= request.world_size:
            raise RemoteError(f"rank {request.rank} of a world of {request.world_size}", code="bad_field")
        if request.layout.chunk_bytes(self._chunk_size) > MAX_CHUNK_BYTES:
            raise RemoteError(
                f"a chunk would have {request.layout.chunk_bytes(self._chunk_size)} bytes, at most {MAX_CHUNK_BYTES}",
                "use a smaller --chunk-size",
                "chunk_size",
            )
        client.registration = msgspec.structs.replace(request, revision_parts={})
        engine = namespace.for_request()
        known = model = self._models.get(engine.id)
        if model is None or model.world_size != request.world_size:  # with MLA one namespace serves any number of ranks
            model = self._models[engine.id] = Model(engine, {}, request.world_size, request.layout)
        model.revision_parts = model.revision_parts or request.revision_parts
        is_new = request.rank not in model.rank_bytes
        if known is None:
            self._note_differences(model)
        model.rank_bytes[request.rank] = request.layout.bytes_per_token
        self._forget_models()
        l1_tokens = self._l1_tokens(model)
        if is_new:
            logger.info(
                "%s rank %d of %d: %.1f KiB of KV a token; L1 holds %d tokens of it: %s",
                namespace.model,
                request.rank,
                request.world_size,
                request.layout.bytes_per_token / 1024,
                l1_tokens,
                shown_sessions(l1_tokens),
            )
        return Answer(RegisterReply(bytes_per_token=request.layout.bytes_per_token, l1_tokens=l1_tokens))

    def _note_differences(self, model: Model) -> None:
        """Say why an engine does not find what another of the same model has stored."""
        name = model.namespace.model
        for other in [known for known in self._models.values() if known is not model and known.namespace.model == name]:
            found = _differences(other, model)
            more = f" and {len(found) - MAX_TOLD_DIFFERENCES} more" if len(found) > MAX_TOLD_DIFFERENCES else ""
            told = ", ".join(found[:MAX_TOLD_DIFFERENCES]) + more
            logger.warning("%s is registered with another %s: it shares nothing with what was stored so", name, told)

    def _forget_models(self) -> None:
        """Of more than MAX_MODELS, drop the oldest that no client uses."""
        if len(self._models) > MAX_MODELS:
            live = self._live_models()
            for id_ in [id_ for id_ in self._models if id_ not in live][: len(self._models) - MAX_MODELS]:
                del self._models[id_]

    def _live_models(self) -> dict[int, set[str]]:
        """Return what moves the bytes of each model that an engine is registered for."""
        backends: dict[int, set[str]] = {}
        for client in self.sessions.clients.values():
            if client.registration is not None:
                backends.setdefault(client.registration.namespace.id, set()).add(client.registration.backend)
        return backends

    def _l1_tokens(self, model: Model) -> int:
        return self._pool.header.capacity_bytes // max(1, model.bytes_per_token)

    def _unregister(self, request: UnregisterKVCache, payload: Payload) -> Answer:
        self._client(request.client).registration = None
        return Answer(Reply())

    def _find_workers(self, request: FindWorkers, payload: Payload) -> Answer:
        self._client(request.client)
        registrations = [client.registration for client in self.sessions.clients.values() if client.registration is not None]
        found = [known for known in registrations if request.process in known.processes]
        return Answer(WorkersReply(registrations=sorted(found, key=lambda known: known.rank)))

    def _report(self, request: Report, payload: Payload) -> Answer:
        client = self._client(request.client)
        if request.pins is not None:
            self._note_pins(client, request.pins)
        for reason, count in request.failed_blocks.items():
            self.metrics.count("lmcache_retrieve_failed", reason.value, by=count)
        for reason, count in request.failed_lookups.items():
            self.metrics.count("lmcache_lookup_failed", reason.value, by=count)
        self.metrics.count("lmcache_stored_decode_chunks", by=request.decode_chunks)
        self._count_loaded(client.registration, request.loaded_chunks)
        return Answer(Reply())

    def _note_pins(self, client: Client, pins: PinReport) -> None:
        """Remember how much of the pool a client's GPU has pinned, and count what it copied without since it last told."""
        if pins.pinned_bytes + pins.unpinned_bytes > pins.pool_bytes:
            raise RemoteError(
                f"{pins.pinned_bytes} bytes are pinned and {pins.unpinned_bytes} cannot be, of {pins.pool_bytes}",
                "this is a bug of the engine's plug-in; please report it",
                "bad_field",
            )
        before = client.pins.unpinned_copied_bytes if client.pins is not None else 0
        client.pins = pins
        copied_bytes = min(max(0, pins.unpinned_copied_bytes - before), MAX_COPIED_BYTES)
        self.metrics.count("lmcache_unpinned_copied_bytes", by=copied_bytes)

    def _unpinned_bytes(self) -> int:
        clients = self.sessions.clients.values()
        return sum(c.pins.unpinned_bytes for c in clients if c.pins is not None and c.registration is not None)

    def _count_loaded(self, registration: RegisterKVCache | None, num_chunks: int) -> None:
        """Count chunks that an engine has read at the places of its lookup."""
        self.metrics.count("lmcache_retrieved_chunks", by=num_chunks)
        if registration is not None:
            # No more than there can be at once, or the sum of made-up reports would outgrow what a message can hold.
            num_bytes = min(num_chunks * registration.layout.chunk_bytes(self._chunk_size), self._pool.header.capacity_bytes)
            self.metrics.count("lmcache_retrieved_bytes", by=num_bytes)
            if registration.rank == 0:
                self.metrics.count("lmcache_retrieved_tokens", by=num_chunks * self._chunk_size)

    # -- lookup -------------------------------------------------------------------------------------------------------

    def _begin_lookup(self, tiers: Tiers, request: Lookup, payload: Payload, pending: Pending) -> bool:
        """Ask the tiers for what L1 lacks; False when they are not asked."""
        keys, num_chunks = _keys(payload, request.world_size)
        slots = self.storage.l1.find_prefix(keys, request.world_size)
        has_all = len(slots) == num_chunks * request.world_size
        if request.client is not None and (has_all or self.sessions.find(request.client) is None):
            return False
        max_seconds = None if request.timeout_seconds is None else request.timeout_seconds * TIMEOUT_SHARE
        lookup = PendingLookup(request, num_chunks)

        def done(found: Found) -> None:
            self._pending_lookups.remove(lookup)
            miss = Answer(LookupReply())
            self._finish(pending, lambda: miss if lookup.is_abandoned else self._lookup(request, [keys], found))

        self._pending_lookups.append(lookup)
        has_begun = tiers.look_up(keys, request.world_size, slots, request.client is not None, max_seconds, done)
        if not has_begun:
            self._pending_lookups.remove(lookup)
        return has_begun

    def _abandon_lookups(self, client: Client, request_id: str, start: int = 0, end: int = MAX_CHUNKS) -> None:
        """A request gives up chunks [start, end). What it still waits for would be pinned afterwards, and for nobody."""
        for lookup in self._pending_lookups:
            if (lookup.request.client, lookup.request.request_id) == (client.id, request_id):
                lookup.is_abandoned = lookup.is_abandoned or (start == 0 and end >= lookup.num_chunks)

    def _lookup(self, request: Lookup, payload: Payload, found: Found | None = None) -> Answer:
        """`found`: what the tiers said, if they were asked; what they had is in L1 by now."""
        client = self._client(request.client) if request.client is not None else None
        keys, num_chunks = _keys(payload, request.world_size)
        slots = self.storage.l1.find_prefix(keys, request.world_size)
        hit_chunks = l1_chunks = len(slots) // request.world_size
        first_hits = hit_chunks if found is None else found.l1_chunks
        if found is not None and client is None:  # nothing was pinned: all of it is of the moment when it was asked
            hit_chunks, l1_chunks = max(first_hits, found.hit_chunks), first_hits
        if client is not None:  # else a person looks, and no engine could have used it
            self.metrics.count("lmcache_lookup_chunks", "hit", by=first_hits)
            self.metrics.count("lmcache_lookup_chunks", "miss", by=num_chunks - first_hits)
        status = HitStatus.HIT if hit_chunks else HitStatus.MISS
        reply = LookupReply(status=status, hit_chunks=hit_chunks, l1_chunks=l1_chunks)
        reply.l2_chunks = hit_chunks - first_hits
        self.metrics.count("lmcache_l2_promoted_chunks", by=reply.l2_chunks if client is not None else 0)
        reply.tiers = found.tiers if found is not None else {}
        answer = Answer(reply)
        if slots and client is not None:
            self.storage.l1.touch(slots)
            self.storage.l1.pin(slots)
            if self.tiers is not None:
                self.tiers.note_used(keys[: l1_chunks * KEY_BYTES], request.world_size)
            if request.places and client.presence is not None and len(slots) <= MAX_PLACES:
                reply.placements = [self.storage.l1.placement(slot) for slot in slots]
            pins = LookupPins([*slots], request.world_size)
            self.sessions.session(client, request.request_id).lookups.append(pins)
            answer.undo = lambda: self.storage.l1.unpin(self.sessions.forget_lookup(client, request.request_id, pins))
        return answer

    def _free_lookup_locks(self, request: FreeLookupLocks, payload: Payload) -> Answer:
        client = self._client(request.client)
        self._abandon_lookups(client, request.request_id, request.start, request.end)
        slots = self.sessions.free_lookup(client, request.request_id, request.start, request.end)
        self.storage.l1.unpin(slots)
        return Answer(PinsReply(released=len(slots)))

    def _end_session(self, request: EndSession, payload: Payload) -> Answer:
        clients = list(self.sessions.clients.values()) if request.client is None else [self._client(request.client)]
        for client in clients:
            self._abandon_lookups(client, request.request_id)
        slots = [slot for client in clients for slot in self.sessions.end_session(client, request.request_id)]
        if request.client is None:  # an operator, who does not know what the holder is about
            self.storage.l1.take_back(slots)
        else:
            self.storage.l1.unpin(slots)
        return Answer(PinsReply(released=len(slots)))

    # -- store --------------------------------------------------------------------------------------------------------

    def _store(self, request: Store, payload: Payload) -> Answer:
        client = self._client(request.client, mapped=True)
        keys, num_chunks = _keys(payload)
        self._check_chunk_bytes(client, {request.chunk_bytes})
        outcomes, placements = self._reserve(client, request, keys, [request.chunk_bytes] * num_chunks)
        reply = StoreReply(outcomes=[int(outcome) for outcome in outcomes], placements=placements)
        return Answer(reply, undo=lambda: self._abort_placements(client, placements))

    def _check_chunk_bytes(self, client: Client, lengths: set[int]) -> None:
        """A registered engine's chunks have one length, whichever way they come."""
        if client.registration is None:
            return
        expected = client.registration.layout.chunk_bytes(self._chunk_size)
        for length in lengths - {expected}:
            raise RemoteError(f"chunks of {length} bytes, but the registered layout makes {expected}", code="chunk_bytes")

    def _reserve(
        self, client: Client, request: Store | Put, keys: bytes, lengths: list[int]
    ) -> tuple[list[StoreOutcome], list[Placement]]:
        self._unchecked = True
        outcomes, placements = self.storage.reserve(
            keys, request.rank, lengths, request.namespace_id, client.owner, request.parent
        )
        client.reservations.update((placement.slot, placement) for placement in placements)
        for reason, outcome in (
            ("exists", StoreOutcome.EXISTS),
            ("busy", StoreOutcome.BUSY),
            ("full", StoreOutcome.FULL),
        ):
            self.metrics.count("lmcache_store_rejected_chunks", reason, by=outcomes.count(outcome))
        if StoreOutcome.FULL in outcomes:
            l1 = self.storage.l1
            self._log.warning(
                "full",
                f"L1 is full: need {max(lengths)} bytes, {l1.pinned_pages * PAGE_BYTES} pinned,"
                f" {l1.reserved_pages * PAGE_BYTES} reserved; hint: raise --l1-size-gb",
            )
        return outcomes, placements

    def _commit(self, request: Commit, payload: Payload) -> Answer:
        client = self._client(request.client, mapped=True)
        committed = self._publish(client, request.placements)
        rejected = [p.slot for p in request.placements if p.slot not in committed]
        self.metrics.count("lmcache_commit_rejected_chunks", by=len(rejected))
        return Answer(CommitReply(committed=len(committed), rejected=rejected))

    def _publish(self, client: Client, placements: Sequence[Placement]) -> set[int]:
        slots = self.storage.l1.commit(placements, client.owner)
        if self.tiers is not None:
            self.tiers.note_committed(slots)
        committed = set(slots)
        stored_bytes = sum(client.reservations.pop(slot).length for slot in committed)
        self.metrics.count("lmcache_stored_chunks", by=len(committed))
        self.metrics.count("lmcache_stored_bytes", by=stored_bytes)
        return committed

    def _abort(self, request: Abort, payload: Payload) -> Answer:
        self._abort_placements(self._client(request.client), request.placements)
        return Answer(Reply())

    def _abort_placements(self, client: Client, placements: Sequence[Placement]) -> None:
        # One by one: a placement of long ago may name a slot that the client has reserved again since.
        aborted = [placement.slot for placement in placements if self.storage.l1.abort([placement], client.owner)]
        self.metrics.count("lmcache_aborted_reservations", by=len(aborted))
        for slot in aborted:
            client.reservations.pop(slot, None)

    def _put(self, request: Put, payload: Payload) -> Answer:
        client = self._client(request.client)
        keys, num_chunks = _keys(payload)
        chunks = payload[1:]
        lengths = [len(chunk) for chunk in chunks]
        if len(chunks) != num_chunks or len(request.checksums) not in (0, num_chunks):
            raise ProtocolError(
                f"{num_chunks} keys, {len(chunks)} chunks and {len(request.checksums)} checksums",
                code="bad_keys",
            )
        if lengths and not 0 < min(lengths) <= max(lengths) <= MAX_CHUNK_BYTES:
            raise ProtocolError(f"chunks have 1 to {MAX_CHUNK_BYTES} bytes", code="oversized")
        self._check_chunk_bytes(client, set(lengths))
        outcomes, placements = self._reserve(client, request, keys, lengths)
        reserved = [i for i, outcome in enumerate(outcomes) if outcome is StoreOutcome.RESERVED]
        filled = []
        for index, placement in zip(reserved, placements, strict=True):
            self._pool.data[placement.offset : placement.offset + placement.length] = chunks[index]
            sum_ = request.checksums[index] if request.checksums else 0
            filled.append(msgspec.structs.replace(placement, checksum=sum_))
        self._publish(client, filled)
        return Answer(PutReply(outcomes=[int(outcome) for outcome in outcomes]))

    # -- retrieve -----------------------------------------------------------------------------------------------------

    def _find_chunks(
        self, client: Client, keys: bytes, num_chunks: int, rank: int, max_bytes: int | None = None
    ) -> list[Placement]:
        """The leading chunks of one rank that are present, at least one if any and otherwise at most `max_bytes`."""
        l1 = self.storage.l1
        placements: list[Placement] = []
        total = 0
        for index in range(num_chunks):
            slot = l1.find(keys[index * KEY_BYTES : (index + 1) * KEY_BYTES], rank)
            if slot is None:
                self.metrics.count("lmcache_retrieve_missing_chunks", by=num_chunks - index)
                break
            placement = l1.placement(slot)
            total += placement.length
            if max_bytes is not None and placements and total > max_bytes:
                total -= placement.length
                break
            placements.append(placement)
        slots = [placement.slot for placement in placements]
        if slots:
            l1.touch(slots)
        self.metrics.count("lmcache_retrieved_chunks", by=len(slots))
        self.metrics.count("lmcache_retrieved_bytes", by=total)
        # Of several ranks that read the same chunks, one counts.
        if (client.registration.rank if client.registration is not None else rank) == 0:
            self.metrics.count("lmcache_retrieved_tokens", by=len(slots) * self._chunk_size)
        return placements

    def _retrieve(self, request: Retrieve, payload: Payload) -> Answer:
        client = self._client(request.client, mapped=True)
        placements = self._find_chunks(client, *_keys(payload), request.rank)
        slots = [placement.slot for placement in placements]
        if slots:
            self.storage.l1.pin(slots)
            session = self.sessions.session(client, request.request_id)
            for slot in slots:
                session.retrieved[slot] = session.retrieved.get(slot, 0) + 1
        return Answer(
            RetrieveReply(placements=placements),
            undo=lambda: self._unpin_retrieved(client, request.request_id, slots),
        )

    def _release(self, request: Release, payload: Payload) -> Answer:
        client = self._client(request.client)
        slots = [placement.slot for placement in request.placements]
        return Answer(PinsReply(released=self._unpin_retrieved(client, request.request_id, slots)))

    def _unpin_retrieved(self, client: Client, request_id: str, slots: list[int]) -> int:
        freed = self.sessions.free_retrieved(client, request_id, slots)
        self.storage.l1.unpin(freed)
        return len(freed)

    def _get(self, request: Get, payload: Payload) -> Answer:
        """The frames are views of the pool, so the chunks stay pinned until the socket has let go of them."""
        placements = self._find_chunks(self._client(request.client), *_keys(payload), request.rank, MAX_GET_BYTES)
        slots = [placement.slot for placement in placements]
        data = self._pool.data
        self.storage.l1.pin(slots)
        return Answer(
            GetReply(lengths=[p.length for p in placements], checksums=[p.checksum for p in placements]),
            payload=[data[p.offset : p.offset + p.length].toreadonly() for p in placements],
            undo=lambda: self.storage.l1.unpin(slots),
            done=lambda: self.storage.l1.unpin(slots),
        )

    # -- removing -----------------------------------------------------------------------------------------------------

    def _begin_evict(self, removal: PendingRemoval, request: Evict, payload: Payload) -> None:
        keys = _keys(payload, len(self.storage.l1.ranks))[0] if payload else None
        capacity = self._pool.header.capacity_bytes
        bounds = [
            request.num_bytes,
            None if request.ratio is None else int(request.ratio * capacity),
        ]
        max_bytes = min((bound for bound in bounds if bound is not None), default=None)
        if max_bytes is None and keys is None and request.model is None and request.older_than_seconds is None:
            raise RemoteError("EVICT selects nothing", "give bytes, a ratio, a model, an age or keys", "bad_field")
        selection = Selection(
            max_bytes=max_bytes,
            namespace_ids=None if request.model is None else self._namespace_ids(request.model),
            older_than_seconds=request.older_than_seconds,
            keys=keys,
        )
        if self.tiers is not None and keys is not None and not request.dry_run:
            removal.in_tiers = self.tiers.delete(keys, self._ranks_in_tiers(len(keys) // KEY_BYTES))
        removal.sweep = self.storage.begin_removal(selection, RemovalReason.REQUEST, request.dry_run)

    def _ranks_in_tiers(self, num_keys: int) -> list[int]:
        """Return whose chunks the tiers may have: of ranks that stored here, and of all of each engine that was seen."""
        worlds = [range(known.namespace.world_size) for known in self._models.values()]
        ranks = sorted({0, *self.storage.l1.ranks, *itertools.chain(*worlds)})
        _check_num_values(num_keys, len(ranks))
        return ranks

    def _namespace_ids(self, model: str) -> frozenset[int]:
        ids = frozenset(id_ for id_, known in self._models.items() if known.namespace.model == model)
        if not ids:
            known = ", ".join(sorted({m.namespace.model for m in self._models.values()})) or "none"
            raise RemoteError(f"no engine registered model {model!r}", f"registered: {known}", "unknown_model")
        return ids

    def _begin_clear(self, removal: PendingRemoval, request: Clear) -> None:
        if self.tiers is not None and not request.dry_run:
            if request.tier is ClearTier.L1:
                self.tiers.stop_moving()
            else:
                removal.in_tiers = self.tiers.clear(keeps_l1=request.tier is ClearTier.L2)
        if request.tier is not ClearTier.L2:
            removal.sweep = self.storage.begin_removal(Selection(), RemovalReason.CLEAR, request.dry_run)

    def _begin_removal(self, request: Clear | Evict, payload: Payload, pending: Pending) -> None:
        if len(self._removals) >= MAX_PENDING_REMOVALS:
            raise RemoteError(f"{MAX_PENDING_REMOVALS} evictions and clears are under way already", "try again later", "busy")
        removal = PendingRemoval(request, pending)
        if isinstance(request, Clear):
            self._begin_clear(removal, request)
        else:
            self._begin_evict(removal, request, payload)
        if self._advance(removal, MAX_ENTRIES_PER_SLICE):
            self._removals.append(removal)
        self._note_removals()

    def _continue_removals(self) -> None:
        """Remove a slice, shared among all that are under way; answer those that are done, or whose time is up."""
        share = MAX_ENTRIES_PER_SLICE // len(self._removals)
        self._removals = [removal for removal in self._removals if self._advance(removal, share)]
        self._note_removals()

    def _note_removals(self) -> None:
        self._unchecked = True
        if self.tiers is not None:
            self.tiers.is_l1_being_cleared = any(isinstance(r.request, Clear) and _is_sweeping(r) for r in self._removals)

    def _advance(self, removal: PendingRemoval, max_entries: int) -> bool:
        """Remove a slice, and answer when it is time; False when nothing is left to do."""
        if removal.sweep is not None:
            if removal.is_swept and not removal.sweep.num_left:
                removal.sweep.begin_again()
            self.storage.advance(removal.sweep, max_entries)
            removal.is_swept = removal.is_swept or not removal.sweep.num_left
        must_wait = self._must_wait(removal)
        waited = time.monotonic() - removal.pending.started_at
        if not removal.is_answered and (not must_wait or waited >= removal.request.timeout_seconds):
            removal.is_answered = True
            self._finish(removal.pending, functools.partial(self._removal_answer, removal))
        return must_wait and (not removal.is_answered or (_is_sweeping(removal) and not removal.request.dry_run))

    def _must_wait(self, removal: PendingRemoval) -> bool:
        """Whether more would go if it had time."""
        if _is_sweeping(removal) or (removal.in_tiers is not None and not removal.in_tiers.is_done):
            return True
        if removal.sweep is None or not removal.sweep.removal.kept_objects:
            return False
        if isinstance(removal.request, Evict) or removal.request.dry_run:
            return False
        is_moving = self.tiers is not None and self.tiers.num_moving > 0
        return removal.request.force or is_moving or removal.sweep.num_left > 0

    def _removal_answer(self, removal: PendingRemoval) -> Answer:
        done = Removal() if removal.sweep is None else removal.sweep.removal
        request = removal.request
        reply = RemovalReply(
            objects=done.objects,
            removed_bytes=done.removed_bytes,
            kept_objects=done.kept_objects,
            kept_bytes=done.kept_bytes,
            remaining_objects=removal.sweep.num_left if removal.sweep is not None and _is_sweeping(removal) else 0,
            seconds=time.monotonic() - removal.pending.started_at,
        )
        if removal.in_tiers is not None:
            reply.tiers = list(removal.in_tiers.removals)
        elif self.tiers is not None and isinstance(request, Clear) and request.dry_run and request.tier is not ClearTier.L1:
            reply.tiers = self.tiers.would_remove()
        return Answer(reply)

    # -- time passes --------------------------------------------------------------------------------------------------

    @property
    def wants_tick(self) -> bool:
        """Whether L1 is above its watermark: better evicted while engines copy than when they ask for room."""
        return self.storage.is_above_watermark

    def collect(self) -> None:
        """See what the tiers' threads have done; called when they have woken the owner."""
        if self.tiers is None:
            return
        try:
            self.tiers.collect()
        except Exception as exc:  # as in `tick`
            self._note_maintenance_error(exc)

    def tick(self) -> float:
        """Do what no request asks for; return the seconds until the next call is due."""
        try:
            self.storage.run_pass()
            if self.tiers is not None:
                self.tiers.tick()
            if self._removals:
                self._continue_removals()
            now = time.monotonic()
            if now - self._clients_checked_at >= CLIENT_CHECK_SECONDS:
                self._clients_checked_at = now
                self._check_clients()
            if self._unchecked and not self._removals and now - self._last_request_at > IDLE_CHECK_SECONDS:
                self._unchecked = False
                self._check_accounting()
            if 0 < self._status_interval_seconds <= now - self._status_logged_at:
                self._status_logged_at = now
                self._log_status()
            self._maintenance_error = ""
        except Exception as exc:  # the loop must live on, and health must say what does not work
            self._note_maintenance_error(exc)
        if not self._maintenance_error and any(_is_sweeping(removal) for removal in self._removals):
            return 0.0
        is_busy = self.storage.wants_pass_soon or self._removals or (self.tiers is not None and self.tiers.wants_tick_soon)
        return BUSY_PASS_SECONDS if is_busy else PASS_SECONDS

    def _note_maintenance_error(self, exc: Exception) -> None:
        self._maintenance_error = f"maintenance fails: {exc!r}"
        self._log.warning("maintenance", self._maintenance_error)
        logger.debug("maintenance failed", exc_info=True)

    def _check_clients(self) -> None:
        for client in self.sessions.dead_clients():
            self._gone.append(f"{client.id[:8]} ({client.kind}, pid {client.pid})")
            self.metrics.count("lmcache_dead_clients")
            self.storage.l1.take_back(self._take_out(client))
        self._log_gone()
        for client, request_id, silent_seconds in self.sessions.expired_sessions():
            slots = self.sessions.end_session(client, request_id)
            self.storage.l1.take_back(slots)
            self.metrics.count("lmcache_expired_pins", by=len(slots))
            self._log.warning(
                "expired",
                f"request {request_id!r} of client {client.id[:8]} ({client.kind}, pid {client.pid}) held {len(slots)} pins for"
                f" {silent_seconds:.0f} s without a word, at most {self.sessions.pin_timeout_seconds:g} s are allowed; they"
                " were released; hint: raise --pin-timeout-seconds if it was still at work",
            )
        self._orphans = [orphan for orphan in self._orphans if not self._free_orphan(*orphan)]

    def _log_gone(self) -> None:
        """The first one is told at once, and those of the next seconds together: a crash of many engines is two lines."""
        now = time.monotonic()
        if not self._gone or now - self._gone_logged_at < GONE_LOG_SECONDS:
            return
        names, num_more = ", ".join(self._gone[:MAX_GONE_NAMED]), len(self._gone) - MAX_GONE_NAMED
        if len(self._gone) == 1:
            logger.info("client %s is gone", names)
        else:
            more = f" and {num_more} more" if num_more > 0 else ""
            logger.info("%d clients are gone: %s%s", len(self._gone), names, more)
        self._gone_logged_at = now
        self._gone.clear()

    def _free_orphan(self, owner: bytes, placement: Placement) -> bool:
        """A reservation from before this server: its writer may still be at it as long as it lives."""
        if is_client_alive(self._pool.client_path(owner.hex())):
            return False
        self.storage.l1.abort([placement], owner)
        return True

    def _take_out(self, client: Client) -> list[int]:
        """Forget a client; return a slot for each of its pins, which are the caller's to take back."""
        if client.id not in self.sessions.clients:
            return []
        pinned = self.sessions.remove(client)
        self._abort_placements(client, list(client.reservations.values()))
        remove_client_file(self._pool.client_path(client.id))
        self._unchecked = True
        return pinned

    def _check_accounting(self) -> None:
        try:
            self.storage.l1.check(deep=len(self.storage.l1) <= MAX_CHECKED_CHUNKS)
        except AssertionError as exc:
            self._accounting_error = f"the pool's accounting is wrong: {exc}"
            logger.error("%s", self._accounting_error)

    def _log_status(self) -> None:
        if self._num_requests == self._requests_logged:
            return
        l1, counts = self.storage.l1, self.metrics.value
        logger.info(
            "L1 %.1f %% of %.2f GiB, %d chunks, %d pins, %d clients; %d requests; chunks stored %d, retrieved %d, evicted %d",
            100 * l1.used_pages / l1.capacity_pages,
            self._pool.header.capacity_bytes / 2**30,
            len(l1),
            l1.num_pins,
            len(self.sessions.clients),
            self._num_requests - self._requests_logged,
            counts("lmcache_stored_chunks"),
            counts("lmcache_retrieved_chunks"),
            counts("lmcache_evicted_chunks", "demand") + counts("lmcache_evicted_chunks", "watermark"),
        )
        self._requests_logged = self._num_requests

    # -- what it looks like -------------------------------------------------------------------------------------------

    def update_gauges(self) -> None:
        """Bring the gauges up to date; called before a scrape."""
        l1 = self.storage.l1
        for name, value in (
            ("lmcache_l1_capacity_bytes", self._pool.header.capacity_bytes),
            ("lmcache_l1_resident_bytes", self._resident_bytes()),
            ("lmcache_l1_used_bytes", l1.used_pages * PAGE_BYTES),
            ("lmcache_l1_reserved_bytes", l1.reserved_pages * PAGE_BYTES),
            ("lmcache_l1_pinned_bytes", l1.pinned_pages * PAGE_BYTES),
            ("lmcache_unpinned_bytes", self._unpinned_bytes()),
            ("lmcache_l1_largest_free_bytes", l1.allocator.largest_free_pages * PAGE_BYTES),
            ("lmcache_l1_chunks", len(l1)),
            ("lmcache_pins", l1.num_pins),
            ("lmcache_sessions", self.sessions.num_sessions),
            ("lmcache_clients", len(self.sessions.clients)),
            ("lmcache_healthy", not self.problems()),
            ("lmcache_uptime_seconds", time.monotonic() - self._started_at),
        ):
            self.metrics.set(name, value)
        if self.tiers is not None:
            self.tiers.update_gauges()

    def _resident_bytes(self) -> int:
        return self.storage.residency.frontier_pages() * PAGE_BYTES

    def _status(self, request: Status, payload: Payload) -> Answer:
        self.update_gauges()
        counters = self.metrics.counters()
        problems = self.problems()
        live = self._live_models()
        hits, misses = (self.metrics.value("lmcache_lookup_chunks", result) for result in ("hit", "miss"))
        promoted = self.metrics.value("lmcache_l2_promoted_chunks")
        status = {
            "schema_version": STATUS_SCHEMA_VERSION,
            "version": __version__,
            "protocol": {"min": self._versions[0], "max": self._versions[1]},
            "boot": self._boot,
            "healthy": not problems,
            "problems": problems,
            "pid": os.getpid(),
            "uptime_seconds": time.monotonic() - self._started_at,
            "engine_type": self._engine_type,
            "supported": {"kv_groups": list(SUPPORTED_KV_GROUPS), "devices": list(SUPPORTED_DEVICES)},
            "chunk_size": self._chunk_size,
            "zmq_endpoint": self._endpoints.zmq,
            "http_endpoint": self._endpoints.http,
            "l1": self._l1_status(),
            "l2": [] if self.tiers is None else self.tiers.status(),
            "hit_rate": (hits + promoted) / (hits + misses) if hits + misses else None,
            "sessions": self.sessions.num_sessions,
            "clients": [self._client_status(client) for client in self.sessions.clients.values()],
            "models": [self._model_status(model, live) for model in self._models.values()],
            "counters": counters,
            "config": self._config,
        }
        return Answer(StatusReply(status=status))

    def _l1_status(self) -> dict[str, Any]:
        l1 = self.storage.l1
        return {
            "capacity_bytes": self._pool.header.capacity_bytes,
            "resident_bytes": self._resident_bytes(),
            "used_bytes": l1.used_pages * PAGE_BYTES,
            "reserved_bytes": l1.reserved_pages * PAGE_BYTES,
            "pinned_bytes": l1.pinned_pages * PAGE_BYTES,
            "free_bytes": (l1.capacity_pages - l1.used_pages) * PAGE_BYTES,
            "largest_free_bytes": l1.allocator.largest_free_pages * PAGE_BYTES,
            "chunks": len(l1),
            "max_chunks": self._pool.header.num_slots,
            "pins": l1.num_pins,
            "eviction_policy": self.storage.policy_name,
            "pool_path": str(self._pool.path),
            "persistent": self._pool.header.persistent,
            "adopted_chunks": l1.adopted_chunks,
            "dropped_reservations": l1.dropped_reservations,
        }

    def _client_status(self, client: Client) -> dict[str, Any]:
        registration = client.registration
        return {
            "id": client.id,
            "kind": client.kind,
            "pid": client.pid,
            "software": client.software,
            "mapped": client.presence is not None,
            "age_seconds": time.monotonic() - client.since,
            "pins": sum(len(session.slots()) for session in client.sessions.values()),
            "reservations": len(client.reservations),
            "model": registration.namespace.model if registration else None,
            "rank": registration.rank if registration else None,
            "transfer_backend": registration.backend if registration else None,
            "gpu_pins": msgspec.to_builtins(client.pins) if client.pins and registration else None,
        }

    def _model_status(self, model: Model, live: dict[int, set[str]]) -> dict[str, Any]:
        return {
            "namespace": msgspec.to_builtins(model.namespace),
            "namespace_id": model.namespace.id,
            "bytes_per_token": model.bytes_per_token,
            "layout": msgspec.to_builtins(model.layout),
            "transfer_backends": sorted(live.get(model.namespace.id, set()) - {""}),
            "world_size": model.world_size,
            "ranks": sorted(model.rank_bytes),
            "l1_tokens": self._l1_tokens(model),
            "live": model.namespace.id in live,
        }


def _differences(known: Model, model: Model) -> list[str]:
    """Name each field in which two engines' namespaces differ, with both values; of a digest what it was made of, where
    both engines have told it."""
    made_of = {
        "layout": (msgspec.structs.asdict(known.layout), msgspec.structs.asdict(model.layout)),
        "revision": (known.revision_parts, model.revision_parts),
    }
    found = []
    for name, change in _changes(msgspec.structs.asdict(known.namespace), msgspec.structs.asdict(model.namespace)).items():
        parts = _changes(*made_of[name]) if name in made_of and all(made_of[name]) else {}
        found += [f"{name}.{part} {values}" for part, values in parts.items()] or [f"{name} {change}"]
    return found


def _changes(before: Mapping[str, object], now: Mapping[str, object]) -> dict[str, str]:
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return {name: f"({before.get(name)!r}, now {now.get(name)!r})" for name in names}


def _watch(path: Path) -> PresenceWatch:
    """Begin to look after a client that maps the pool."""
    problem = "not locked"
    try:
        watch = PresenceWatch(path)
        if watch.is_alive:
            return watch
        watch.close()
    except OSError as exc:
        problem = exc.strerror or "cannot be opened"
    raise RemoteError(f"{path}: {problem}", "lock it before ATTACH", "no_presence")


def _keys(payload: Payload, num_ranks: int = 1) -> tuple[bytes, int]:
    """The first payload frame and how many keys it holds, each of which will be looked up for so many ranks."""
    if not payload:
        raise ProtocolError("the frame with the chunk keys is missing", code="bad_keys")
    num_chunks = count_keys(payload[0])
    _check_num_values(num_chunks, num_ranks)
    return bytes(payload[0]), num_chunks


def _check_num_values(num_chunks: int, num_ranks: int) -> None:
    if num_chunks * num_ranks > MAX_VALUES:
        most = MAX_VALUES // num_ranks
        raise RemoteError(f"{num_chunks} chunks of {num_ranks} ranks are too many at once", f"name {most}", "bad_field")


def _is_sweeping(removal: PendingRemoval) -> bool:
    """Whether it has not come to the end of L1 yet."""
    return removal.sweep is not None and not removal.is_swept
