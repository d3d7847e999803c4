"""Every message between a client and the server, its codec and its version.

A request is the frames `[request id][header][payload...]`, a reply the same with the request's id. Headers are msgpack
maps; the structs below are their schema and are checked by msgspec as they are decoded, so a handler never sees a field
of the wrong type or out of range. Payload frames are raw bytes: concatenated chunk keys first, then chunk contents.

Compatibility: a reader ignores fields it does not know, and new fields have defaults. `PROTOCOL_VERSION` rises when an
old peer would misunderstand; a server still answers versions from `MIN_PROTOCOL_VERSION`.
"""

from __future__ import annotations

import enum
import functools
import threading
from typing import Annotated, Any, ClassVar, Generic, TypeVar, cast

import msgspec
from msgspec import Meta, Struct

from lmcache.errors import ProtocolError, RemoteError
from lmcache.keys import KEY_BYTES, Namespace
from lmcache.layout import KVLayout

PROTOCOL_VERSION = 1
MIN_PROTOCOL_VERSION = 1

DEFAULT_ZMQ_PORT = 5555
DEFAULT_HTTP_PORT = 8080

MAX_REQUEST_ID_BYTES = 64
MAX_HEADER_BYTES = 1 << 20
MAX_CHUNKS = 1 << 14
MAX_CHUNK_BYTES = 1 << 28
# A lookup tells so many places at most. To tell more would take the server long, and a copy of so many chunks takes so long
# that nobody notices the message which asks for them. (128 places: 0.12 ms of the server, 1.6 KB.)
MAX_PLACES = 128
MAX_FRAMES = MAX_CHUNKS + 3
# The server keeps them with each model: 12 KiB at most.
MAX_REVISION_PARTS = 128
MAX_PART_CHARS = 48

Name = Annotated[str, Meta(max_length=512)]
Part = Annotated[str, Meta(max_length=MAX_PART_CHARS)]
ClientId = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**62)]
# Is added up for ever, and the sum must still be an integer of MessagePack.
Increment = Annotated[int, Meta(ge=0, le=2**32)]
Rank = Annotated[int, Meta(ge=0, lt=1 << 16)]
WorldSize = Annotated[int, Meta(ge=1, lt=1 << 16)]
ChunkBytes = Annotated[int, Meta(ge=1, le=MAX_CHUNK_BYTES)]
Seconds = Annotated[float, Meta(ge=0, le=86400)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
ParentKey = Annotated[bytes, Meta(max_length=KEY_BYTES)]
Hash64 = Annotated[int, Meta(ge=0)]


ENGINE_HINT = (
    "an engine finds its connector by --kv-transfer-config "
    """'{"kv_connector":"LMCacheMPConnector","kv_role":"kv_both","kv_load_failure_policy":"recompute"}'"""
)


class Feature(enum.IntFlag):
    """What a peer can do beyond the messages themselves; both sides use the intersection."""

    SHARED_POOL = 1
    INLINE = 2
    CHECKSUM = 4


FEATURES = Feature.SHARED_POOL | Feature.INLINE | Feature.CHECKSUM


class StoreOutcome(enum.IntEnum):
    """What became of one chunk of a STORE or PUT."""

    RESERVED = 0
    """The caller owns the place and must commit or abort it. For PUT: stored."""
    EXISTS = 1
    """The chunk is there already; nothing to do."""
    BUSY = 2
    """Another live client is writing it."""
    FULL = 3
    """No room: what is not free is pinned or reserved."""


class HitStatus(str, enum.Enum):
    """What a LOOKUP found. PENDING: some chunks are on their way up from a slower tier."""

    HIT = "HIT"
    PENDING = "PENDING"
    MISS = "MISS"


class Placement(Struct, frozen=True, array_like=True):
    """Where one chunk lies: its slot, byte range in the pool's data area, generation and content checksum (0: none)."""

    slot: Count
    offset: Count
    length: ChunkBytes
    generation: Hash64
    checksum: Hash64 = 0


class ErrorInfo(Struct, frozen=True):
    """An error reply: a stable code, one sentence, and what to do next."""

    code: str
    message: str
    hint: str = ""


class Reply(Struct, kw_only=True):
    """What every reply carries: the id of the server process's life, and the error if there is one."""

    boot: str = ""
    error: ErrorInfo | None = None


R = TypeVar("R", bound=Reply)


class Request(Struct, Generic[R], kw_only=True, tag_field="op"):
    """Base of all requests; `reply_type` is what the server answers with."""

    reply_type: ClassVar[type[Reply]] = Reply
    v: int = PROTOCOL_VERSION


class Envelope(Struct):
    """What is read before anything else of a request is believed."""

    v: int
    op: str


class NoopReply(Reply):
    """Debug information; `problems` is empty when the server can do its work."""

    version: str = ""
    min_protocol: int = 0
    max_protocol: int = 0
    features: int = 0
    uptime_seconds: float = 0.0
    engine_type: str = ""
    zmq_endpoint: str = ""
    http_endpoint: str = ""
    problems: list[str] = []


class Noop(Request[NoopReply], tag="NOOP"):
    """Is it alive? With `client` it also renews that client's lease."""

    reply_type = NoopReply
    client: ClientId | None = None


class ChunkSizeReply(Reply):
    """The server's chunk size in tokens."""

    chunk_size: int = 0


class GetChunkSize(Request[ChunkSizeReply], tag="GET_CHUNK_SIZE"):
    """How many tokens make a chunk?"""

    reply_type = ChunkSizeReply


class HelloReply(Reply):
    """The client's id and lease, and the pool to map (empty path: none to map)."""

    client: str = ""
    features: int = 0
    chunk_size: int = 0
    lease_seconds: float = 0.0
    pool_path: str = ""
    pin_timeout_seconds: float = 0.0
    """How long a request may hold pins without a word; 0: the server does not say."""


class Hello(Request[HelloReply], tag="HELLO"):
    """Introduces a client. Afterwards it owns pins and reservations until its lease ends."""

    reply_type = HelloReply
    kind: Annotated[str, Meta(max_length=64)]
    pid: Count = 0
    features: Count = int(FEATURES)
    software: Name = ""
    """What it is made of, for people: "lmcache 0.1.0, vllm 0.32.0"."""


class Attach(Request[Reply], tag="ATTACH"):
    """Proves that the client mapped the pool and holds the lock of its presence file; its lease is now the kernel's."""

    client: ClientId
    cookie: Annotated[bytes, Meta(min_length=16, max_length=16)]


class Goodbye(Request[Reply], tag="GOODBYE"):
    """The client leaves; its pins and reservations go."""

    client: ClientId


class RegisterReply(Reply):
    """What the registration means: bytes of one token on this rank, and how many tokens L1 holds at that size."""

    bytes_per_token: int = 0
    l1_tokens: int = 0


class RegisterKVCache(Request[RegisterReply], tag="REGISTER_KV_CACHE"):
    """One of `world_size` ranks says what its KV looks like; where all hold the same, the namespace's world size is 1."""

    reply_type = RegisterReply
    client: ClientId
    namespace: Namespace
    layout: KVLayout
    rank: Rank = 0
    world_size: WorldSize = 1
    processes: Annotated[list[Name], Meta(max_length=4)] = []
    """The rank's own process and its parent: by one of them its engine's scheduler finds it (FIND_WORKERS)."""
    backend: Name = ""
    """What moves its bytes, for people: "cuda, Triton"."""
    revision_parts: Annotated[dict[Part, Part], Meta(max_length=MAX_REVISION_PARTS)] = {}
    """What the namespace's revision is a digest of, for people: short values, and digests of long ones. Not in a reply."""


class WorkersReply(Reply):
    """One entry a registered rank, in the order of the ranks. Empty while none is known."""

    registrations: list[RegisterKVCache] = []


class FindWorkers(Request[WorkersReply], tag="FIND_WORKERS"):
    """Which ranks did this process, or its children, register? A scheduler that its workers cannot tell asks so."""

    reply_type = WorkersReply
    client: ClientId
    process: Annotated[str, Meta(min_length=1, max_length=512)]


class UnregisterKVCache(Request[Reply], tag="UNREGISTER_KV_CACHE"):
    """Takes the client's registration back."""

    client: ClientId


class FailureReason(str, enum.Enum):
    """Why an engine could not use the cache: names for people, in metrics."""

    MISSING = "missing"
    """The chunk was gone when it was to be loaded."""
    STALE = "stale"
    """Its place was freed while it was copied."""
    CHECKSUM = "checksum"
    LAYOUT = "layout"
    DEADLINE = "deadline"
    UNREACHABLE = "unreachable"
    REFUSED = "refused"
    """The server answered with an error."""
    ERROR = "error"


class PinReport(Struct, frozen=True, kw_only=True):
    """How much of the pool that an engine mapped its GPU reaches at the speed of the wire.

    Of `pool_bytes` `pinned_bytes` are pinned and `unpinned_bytes` could not be; what is in neither has not been tried yet.
    `unpinned_copied_bytes`: what was copied through memory that was not pinned, since the client introduced itself.
    """

    pool_bytes: Count = 0
    pinned_bytes: Count = 0
    unpinned_bytes: Count = 0
    unpinned_copied_bytes: Count = 0

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be pinned."""
        return self.pinned_bytes + self.unpinned_bytes >= self.pool_bytes


class Report(Request[Reply], tag="REPORT"):
    """What an engine counted since its last report and the server cannot see: sent with the heartbeat.

    `failed_blocks`: engine blocks that a load did not fill. `failed_lookups`: lookups that became misses because no
    answer came. `decode_chunks`: those of its stored chunks that hold generated tokens. `loaded_chunks`: those that it read
    at the places of a LOOKUP, sent at the end of the step that did. `pins`: how things are, when that has changed.
    """

    client: ClientId
    failed_blocks: dict[FailureReason, Increment] = {}
    failed_lookups: dict[FailureReason, Increment] = {}
    decode_chunks: Increment = 0
    loaded_chunks: Annotated[int, Meta(ge=0, le=MAX_CHUNKS)] = 0
    pins: PinReport | None = None


class LookupReply(Reply):
    """The prefix hit in chunks: in all tiers, and those of them in L1 now.

    `placements`: where those in L1 lie, chunk by chunk, in each chunk rank by rank; or none at all.
    With a client `hit_chunks` is `l1_chunks`, and `l2_chunks` of them were loaded into L1 for this lookup. Without one nothing
    is loaded: `l2_chunks` are in L2 only, and `tiers` has how many of the hit each tier of L2 holds.
    """

    status: HitStatus = HitStatus.MISS
    hit_chunks: int = 0
    l1_chunks: int = 0
    l2_chunks: int = 0
    placements: list[Placement] = []
    tiers: dict[str, int] = {}


class Lookup(Request[LookupReply], tag="LOOKUP"):
    """How many leading chunks (payload: keys) are present for all ranks? With `client` they stay pinned for `request_id`.

    `places`: a client that has mapped the pool wants to know where they lie. It is told of MAX_PLACES at most.
    `timeout_seconds`: how long the sender waits; the server answers before, with what it has loaded from L2 until then.
    """

    reply_type = LookupReply
    client: ClientId | None = None
    request_id: Name = ""
    world_size: WorldSize = 1
    places: bool = False
    timeout_seconds: Seconds | None = None


class PinsReply(Reply):
    """How many pins were released."""

    released: int = 0


class FreeLookupLocks(Request[PinsReply], tag="FREE_LOOKUP_LOCKS"):
    """Unpins chunks [start, end) of what LOOKUP pinned for the request; one that still waits and finds no others is a miss."""

    reply_type = PinsReply
    client: ClientId
    request_id: Name
    start: Count = 0
    end: Count = MAX_CHUNKS


class EndSession(Request[PinsReply], tag="END_SESSION"):
    """Releases every pin of a request: of one client, or of all clients when none is named. A LOOKUP that waits is a miss."""

    reply_type = PinsReply
    request_id: Name
    client: ClientId | None = None


class StoreReply(Reply):
    """One outcome a chunk, in order, and one placement for each that is RESERVED, in order."""

    outcomes: list[int] = []
    placements: list[Placement] = []


class Store(Request[StoreReply], tag="STORE"):
    """Reserves places for chunks (payload: keys) of `chunk_bytes` each. `parent` is the key before the first, if any."""

    reply_type = StoreReply
    client: ClientId
    chunk_bytes: ChunkBytes
    namespace_id: Hash64 = 0
    rank: Rank = 0
    parent: ParentKey = b""


class CommitReply(Reply):
    """How many became visible, and the slots that did not (reservation lost, or committed by someone else first)."""

    committed: int = 0
    rejected: list[int] = []


class Commit(Request[CommitReply], tag="COMMIT"):
    """Publishes reserved places, exactly as STORE returned them, with the checksum filled in or 0."""

    reply_type = CommitReply
    client: ClientId
    placements: Annotated[list[Placement], Meta(max_length=MAX_CHUNKS)]


class Abort(Request[Reply], tag="ABORT"):
    """Gives reserved places back."""

    client: ClientId
    placements: Annotated[list[Placement], Meta(max_length=MAX_CHUNKS)]


class RetrieveReply(Reply):
    """Where the leading chunks that are present lie; each is pinned once until RELEASE."""

    placements: list[Placement] = []


class Retrieve(Request[RetrieveReply], tag="RETRIEVE"):
    """Pins chunks (payload: keys) of one rank for reading."""

    reply_type = RetrieveReply
    client: ClientId
    request_id: Name = ""
    rank: Rank = 0


class Release(Request[PinsReply], tag="RELEASE"):
    """Unpins places that RETRIEVE returned."""

    reply_type = PinsReply
    client: ClientId
    placements: Annotated[list[Placement], Meta(max_length=MAX_CHUNKS)]
    request_id: Name = ""


class PutReply(Reply):
    """One `StoreOutcome` a chunk; RESERVED means stored."""

    outcomes: list[int] = []


class Put(Request[PutReply], tag="PUT"):
    """Stores chunks whose bytes are the payload frames after the keys."""

    reply_type = PutReply
    client: ClientId
    namespace_id: Hash64 = 0
    rank: Rank = 0
    parent: ParentKey = b""
    checksums: Annotated[list[Hash64], Meta(max_length=MAX_CHUNKS)] = []


class GetReply(Reply):
    """The leading chunks present follow as payload frames, in order."""

    lengths: list[int] = []
    checksums: list[int] = []


class Get(Request[GetReply], tag="GET"):
    """Reads chunks (payload: keys) over the socket."""

    reply_type = GetReply
    client: ClientId
    rank: Rank = 0


class StatusReply(Reply):
    """The status view: plain maps, lists, numbers and strings, as `/api/status` gives it."""

    status: dict[str, Any] = {}


class Status(Request[StatusReply], tag="STATUS"):
    """What is this thing?"""

    reply_type = StatusReply


class TierRemoval(Struct, frozen=True, kw_only=True):
    """What one tier of L2 removed; None where it cannot tell. Until `done`, or when it failed, `error` says why."""

    name: str
    objects: int | None = 0
    removed_bytes: int | None = None
    done: bool = False
    error: str = ""


class RemovalReply(Reply):
    """What a CLEAR or EVICT removed from L1 (with `dry_run`: would remove) and what it kept because it is pinned.

    `remaining_objects`: entries not looked at when its time was up; the server goes on with them, except in a dry run.
    `tiers`: what a CLEAR of L2, or an EVICT with keys, removed there, one entry for each tier.
    """

    objects: int = 0
    removed_bytes: int = 0
    kept_objects: int = 0
    kept_bytes: int = 0
    remaining_objects: int = 0
    seconds: float = 0.0
    tiers: list[TierRemoval] = []


class ClearTier(str, enum.Enum):
    """What a CLEAR is about."""

    L1 = "l1"
    L2 = "l2"
    ALL = "all"


class Clear(Request[RemovalReply], tag="CLEAR"):
    """Removes everything that is not pinned; waits for that, with `force` for pins, and for tiers, until `timeout_seconds`."""

    reply_type = RemovalReply
    dry_run: bool = False
    force: bool = False
    timeout_seconds: Seconds = 4.0
    tier: ClearTier = ClearTier.ALL


class Evict(Request[RemovalReply], tag="EVICT"):
    """Removes from L1, in policy order, what *all* conditions select; with keys as payload only those, and waits for L2."""

    reply_type = RemovalReply
    dry_run: bool = False
    num_bytes: Count | None = None
    ratio: Ratio | None = None
    model: Name | None = None
    older_than_seconds: Seconds | None = None
    timeout_seconds: Seconds = 4.0


REQUESTS: dict[str, type[Request[Any]]] = {
    request.__struct_config__.tag: request  # type: ignore[misc]
    for request in (
        Noop,
        GetChunkSize,
        Hello,
        Attach,
        Goodbye,
        RegisterKVCache,
        UnregisterKVCache,
        FindWorkers,
        Report,
        Lookup,
        FreeLookupLocks,
        EndSession,
        Store,
        Commit,
        Abort,
        Retrieve,
        Release,
        Put,
        Get,
        Status,
        Clear,
        Evict,
    )
}

_encoder = msgspec.msgpack.Encoder()
_building = threading.Lock()


@functools.cache
def _decoder(message: type[Struct]) -> msgspec.msgpack.Decoder[Any]:
    """Built on first use: a short-lived command needs one or two of them.

    One at a time: what msgspec knows of a nested struct can be seen before it is complete, and another thread's decoder that
    was built on that would crash the process.
    """
    with _building:
        return msgspec.msgpack.Decoder(message)


def encode(message: Struct) -> bytes:
    """Return the header frame of a request or reply."""
    return _encoder.encode(message)


def decode_request(
    header: bytes,
    min_version: int = MIN_PROTOCOL_VERSION,
    max_version: int = PROTOCOL_VERSION,
) -> Request[Any]:
    """Return the checked request in a header frame.

    Raises: ProtocolError with the code that the error reply carries.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(
            f"the header has {len(header)} bytes, at most {MAX_HEADER_BYTES} are read",
            code="oversized",
        )
    try:
        envelope = _decoder(Envelope).decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(
            f"the header is not a request: {exc}",
            hint=f"this is an lmcache server, which speaks msgpack maps with 'v' and 'op'; {ENGINE_HINT}",
            code="bad_header",
        ) from exc
    if not min_version <= envelope.v <= max_version:
        raise version_mismatch(envelope.v, min_version, max_version)
    request = REQUESTS.get(envelope.op)
    if request is None:
        raise ProtocolError(
            f"unknown operation {envelope.op[:64]!r}",
            hint="known: " + ", ".join(REQUESTS),
            code="unknown_op",
        )
    try:
        return cast(Request[Any], _decoder(request).decode(header))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(f"bad {envelope.op} request: {exc}", code="bad_field") from exc


def version_mismatch(theirs: int, min_version: int, max_version: int) -> ProtocolError:
    """Return the one sentence that both sides print when versions do not overlap."""
    older = "client" if theirs < min_version else "server"
    return ProtocolError(
        f"the client speaks protocol {theirs}, the server speaks {min_version} to {max_version}",
        hint=f"upgrade lmcache on the {older}'s side",
        code="version_mismatch",
    )


def decode_reply(header: bytes, request: Request[R]) -> R:
    """Return the reply to `request`.

    Raises: RemoteError when the server answered with an error; ProtocolError when the bytes are no reply.
    """
    try:
        reply = _decoder(request.reply_type).decode(header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise ProtocolError(
            f"the reply is not one of this protocol: {exc}",
            hint="is this an lmcache server of another version, or another service?",
        ) from exc
    if not reply.boot:
        raise ProtocolError(
            "the reply is not one of this protocol: it names no server life",
            hint="is this an lmcache server of another version, or another service?",
        )
    if reply.error is not None:
        raise RemoteError(reply.error.message, reply.error.hint, reply.error.code)
    return cast(R, reply)


def count_keys(keys: bytes | memoryview) -> int:
    """Return how many keys a payload frame holds.

    Raises: ProtocolError for a partial key or more than MAX_CHUNKS of them.
    """
    count, rest = divmod(len(keys), KEY_BYTES)
    if rest:
        raise ProtocolError(f"the keys frame has {len(keys)} bytes, not a multiple of {KEY_BYTES}", code="bad_keys")
    if count > MAX_CHUNKS:
        raise ProtocolError(f"{count} keys in one request, at most {MAX_CHUNKS}", code="oversized")
    return count
