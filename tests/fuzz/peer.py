"""A client that breaks the rules: it knows the protocol well enough to get deep into the server before it errs."""

import contextlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import zmq

from lmcache.errors import PoolError
from lmcache.keys import Namespace
from lmcache.layout import KVLayout
from lmcache.pool import PoolView, Presence
from lmcache.protocol import REQUESTS, FailureReason
from tests.chaos.content import chunk_key
from tests.fuzz.mutate import mutate_bytes, mutate_fields, mutate_frames

REPLY_MS = 60_000
NUM_KEYS = 96
CHUNK_BYTES = (1, 4096, 4097, 20_000, 65_536)
LAYOUTS = [
    KVLayout(num_layers=2, num_planes=2, block_bytes=64, block_size=16, dtype="bfloat16"),
    KVLayout(num_layers=1, num_planes=1, block_bytes=1024, block_size=64, dtype="float8", order="NHD"),
    KVLayout(num_layers=3, num_planes=1, block_bytes=100, block_size=48, dtype="float16"),
]
MAX_KEPT_PLACEMENTS = 200
# A CLEAR with `force` empties the pool again and again until the watch lets go of its pin: only for moments.
CLEAR_SECONDS = 0.02
# What ends or empties so much that little is left to err on.
RARE = {"CLEAR": 0.1, "EVICT": 0.3, "GOODBYE": 0.1, "HELLO": 0.2}


class Peer:
    """One connection and what the server granted to it.

    Args:
        is_mapped: whether it maps the pool and holds a presence file, as a client on the host does.
        counts: shared by all peers: replies by operation and outcome.
    """

    def __init__(self, url: str, rng: random.Random, is_mapped: bool, counts: Counter[str]) -> None:
        self._rng = rng
        self._counts = counts
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.sndtimeo = self._socket.rcvtimeo = REPLY_MS
        self._socket.connect(url)
        self._num_sent = 0
        self._placements: list[list[int]] = []
        self._cookie = bytes(16)
        self._view: PoolView | None = None
        self._presence: Presence | None = None
        self.is_unknown = False
        hello = self._ask("HELLO", {"kind": "fuzz", "pid": 1})
        self._client = str(hello["client"])
        if is_mapped:
            self._map(Path(hello["pool_path"]))

    def _map(self, path: Path) -> None:
        with contextlib.suppress(PoolError):
            self._view = PoolView(path)
            self._presence = Presence(path, self._client)
            self._cookie = self._view.header.cookie
            self._ask("ATTACH", {"client": self._client, "cookie": self._cookie})

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Send something, most often spoilt in some way, and read what has been answered."""
        (op,) = self._rng.choices(list(REQUESTS), [RARE.get(name, 1.0) for name in REQUESTS])
        fields, payload = self._build(op)
        kind = self._rng.random()
        if kind < 0.35:
            self._send(op, [_encode(op, fields), *payload])
        elif kind < 0.70:
            self._send(op, [_encode(op, self._spoil(op, fields)), *payload])
        elif kind < 0.80:
            self._send(op, [mutate_bytes(self._rng, _encode(op, fields)), *payload])
        elif kind < 0.95:
            self._send(op, mutate_frames(self._rng, [_encode(op, fields), *payload]))
        else:
            self._socket.send_multipart(mutate_frames(self._rng, [b"id", _encode(op, fields), *payload]))
            self._num_sent += 1
        self.read()

    def sequence(self) -> None:
        """Do what an engine does, rightly up to some point."""
        for op in self._rng.choice(SEQUENCES):
            fields, payload = self._build(op)
            if self._rng.random() < 0.15:
                fields = self._spoil(op, fields)
            with contextlib.suppress(msgspec.ValidationError):
                self._ask(op, fields, payload)

    def _spoil(self, op: str, fields: dict[str, Any]) -> dict[str, Any]:
        spoilt = mutate_fields(self._rng, op, fields)
        if op == "CLEAR" and spoilt.get("force") is True:
            spoilt["timeout_seconds"] = CLEAR_SECONDS
        return spoilt

    def flood(self) -> None:
        """Send many good requests before any reply is read."""
        for _ in range(200):
            op = self._rng.choice(("LOOKUP", "STATUS", "GET", "RETRIEVE", "NOOP", "STORE"))
            fields, payload = self._build(op)
            self._send(op, [_encode(op, fields), *payload])
        self.read()

    def send_large(self) -> None:
        """Send a message that is too long somewhere, or only long."""
        header = _encode("PUT", {"client": self._client})
        size = self._rng.choice((1 << 20, (1 << 20) + 1, 8 << 20))
        self._send("PUT", self._rng.choice(([bytes(size)], [header, bytes(size)], [header, chunk_key(0), bytes(size)])))
        if self._rng.random() < 0.2:
            self._send("PUT", [header, chunk_key(0), *([b"x"] * 20_000)])
        self.read()

    # -- the wire -----------------------------------------------------------------------------------------------------

    def _send(self, op: str, frames: list[bytes]) -> bytes:
        self._num_sent += 1
        request_id = b"%s %d" % (op.encode(), self._num_sent)
        self._socket.send_multipart([request_id, *frames])
        return request_id

    def _ask(self, op: str, fields: dict[str, Any], payload: list[bytes] | None = None) -> dict[str, Any]:
        """Send a request that can be told apart, and wait for its reply."""
        request_id = self._send(op, [_encode(op, fields), *(payload or [])])
        try:
            while True:
                got_id, reply = self._receive(0)
                if got_id == request_id:
                    return reply
        except zmq.Again:
            raise AssertionError(f"no reply to {op} {fields!r:.2000}") from None

    def read(self) -> None:
        """Take in the replies that have come."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._receive(zmq.NOBLOCK)

    def _receive(self, flags: int) -> tuple[bytes, dict[str, Any]]:
        request_id, header, *_ = self._socket.recv_multipart(flags)
        reply = msgspec.msgpack.decode(header)
        assert len(reply["boot"]) == 32, reply
        error = reply["error"]
        assert error is None or error["code"] != "internal", (request_id, error)
        op = request_id.partition(b" ")[0].decode("latin-1")
        if op in REQUESTS:
            self._counts[f"{op} {'ok' if error is None else 'error'}"] += 1
        self.is_unknown = error is not None and error["code"] == "unknown_client"
        if error is None:
            self._placements += reply.get("placements", [])
            del self._placements[:-MAX_KEPT_PLACEMENTS]
        return request_id, reply

    # -- good requests ------------------------------------------------------------------------------------------------

    def _build(self, op: str) -> tuple[dict[str, Any], list[bytes]]:
        """A request that the server accepts if the moment is right."""
        rng = self._rng
        keys = [chunk_key(rng.randrange(NUM_KEYS)) for _ in range(rng.choice((0, 1, 2, 8)))]
        joined = [b"".join(keys)]
        client = {"client": self._client}
        request = {"request_id": f"request {rng.randrange(4)}"}
        rank = {"rank": rng.choice((0, 0, 0, 1, 65535))}
        placements = {"placements": rng.sample(self._placements, min(len(self._placements), rng.choice((0, 1, 2, 8))))}
        stored = {"namespace_id": rng.randrange(3), "parent": rng.choice((b"", *keys)), **rank}
        if op == "HELLO":
            return {"kind": "fuzz", "pid": rng.randrange(1 << 22), "features": rng.randrange(8)}, []
        if op == "ATTACH":
            return {**client, "cookie": rng.choice((self._cookie, bytes(16)))}, []
        if op == "REGISTER_KV_CACHE":
            layout = rng.choice(LAYOUTS)
            world_size = rng.choice((1, 2))
            namespace = Namespace(
                model=f"model {rng.randrange(100)}", layout=layout.fingerprint, chunk_size=256, world_size=world_size
            )
            described = {"namespace": msgspec.to_builtins(namespace), "layout": msgspec.to_builtins(layout)}
            return {**client, **described, "world_size": world_size, "rank": rng.randrange(world_size)}, []
        if op == "LOOKUP":
            return {**rng.choice((client, {})), **request, "world_size": rng.choice((1, 1, 2, 65535))}, joined
        if op == "FREE_LOOKUP_LOCKS":
            return {**client, **request, "start": rng.randrange(9), "end": rng.choice((0, 3, 9, 2**62))}, []
        if op == "END_SESSION":
            return {**request, **rng.choice((client, {}))}, []
        if op == "STORE":
            return {**client, **stored, "chunk_bytes": rng.choice(CHUNK_BYTES)}, joined
        if op in ("COMMIT", "ABORT"):
            return {**client, **placements}, []
        if op == "RELEASE":
            return {**client, **placements, **request}, []
        if op == "RETRIEVE":
            return {**client, **request, **rank}, joined
        if op == "PUT":
            sums = {"checksums": [rng.getrandbits(64) for _ in keys]} if rng.random() < 0.5 else {}
            return {**client, **stored, **sums}, [*joined, *(bytes(rng.choice(CHUNK_BYTES)) for _ in keys)]
        if op == "GET":
            return {**client, **rank}, joined
        if op == "CLEAR":
            return {"dry_run": rng.random() < 0.5, "force": rng.random() < 0.1, "timeout_seconds": CLEAR_SECONDS}, []
        if op == "EVICT":
            chosen = rng.choice(({"num_bytes": 4096}, {"ratio": 0.01}, {"model": "model 1"}, {"older_than_seconds": 1.0}, {}))
            return {**chosen, "dry_run": rng.random() < 0.3}, rng.choice((joined, []))
        if op == "NOOP":
            return rng.choice((client, {})), []
        if op == "FIND_WORKERS":
            return {**client, "process": f"host/{rng.randrange(1 << 22)}"}, []
        if op == "REPORT":
            failed = {rng.choice(list(FailureReason)).value: rng.choice((0, 1, 2**32))}
            pins = {name: rng.choice((0, 4096, 2**62)) for name in ("pool_bytes", "pinned_bytes", "unpinned_copied_bytes")}
            counted = {"failed_blocks": failed, "failed_lookups": failed, "decode_chunks": rng.randrange(9)}
            return {**client, **counted, **({"pins": pins} if rng.random() < 0.5 else {})}, []
        return (client if op in ("GOODBYE", "UNREGISTER_KV_CACHE") else {}), []

    def close(self, is_polite: bool) -> None:
        """Leave, with or without a word; the presence file goes as when a process dies."""
        if is_polite:
            self._ask("GOODBYE", {"client": self._client})
        if self._presence is not None:
            self._presence.close()
        if self._view is not None:
            self._view.close()
        self._socket.close()
        self._context.term()


SEQUENCES = [
    ["STORE", "COMMIT", "RETRIEVE", "RELEASE", "RELEASE"],
    ["STORE", "STORE", "ABORT", "COMMIT", "STORE"],
    ["STORE", "COMMIT", "COMMIT", "ABORT", "LOOKUP", "RETRIEVE", "FREE_LOOKUP_LOCKS", "FREE_LOOKUP_LOCKS", "RELEASE"],
    ["PUT", "LOOKUP", "GET", "END_SESSION", "EVICT", "GET"],
    ["PUT", "RETRIEVE", "CLEAR", "EVICT", "RELEASE", "CLEAR"],
    ["LOOKUP", "LOOKUP", "FREE_LOOKUP_LOCKS", "RETRIEVE", "END_SESSION", "RELEASE", "FREE_LOOKUP_LOCKS"],
    ["REGISTER_KV_CACHE", "STORE", "PUT", "COMMIT", "UNREGISTER_KV_CACHE", "STORE"],
    ["STORE", "GOODBYE", "COMMIT", "RETRIEVE", "HELLO", "ATTACH"],
]


def _encode(op: str, fields: dict[str, Any]) -> bytes:
    return msgspec.msgpack.encode({"op": op, "v": 1, **fields})
