"""The ZMQ port is fed with spoilt messages, spoilt frames and no ZMTP at all, and goes on serving as if nothing were."""

import contextlib
import random
import socket
import struct
import time
from collections import Counter

import msgspec
import pytest

from lmcache.protocol import REQUESTS
from tests.chaos.conftest import directory_left_empty
from tests.fuzz.peer import Peer
from tests.fuzz.watch import Watch
from tests.server_process import LmcacheServer
from tests.zmtp import COMMAND, GREETING, LONG, MORE, RawPeer, frame, message, ready

NUM_PEERS = 6
MAX_IDLE_SOCKETS = 40
# On a machine that is too busy to have reached every operation in time.
EXTRA_SECONDS = 120.0
RESET = struct.pack("ii", 1, 0)
NOOP = msgspec.msgpack.encode({"op": "NOOP", "v": 1})


@pytest.mark.timeout(1500)
def test_nothing_sent_to_the_zmq_port_harms_the_server(fuzz_seconds, rng):
    counts: Counter[str] = Counter()
    with directory_left_empty() as pool_dir:
        flags = ["--pool-dir", str(pool_dir), "--client-lease-seconds", "1", "--log-level", "WARNING"]
        with LmcacheServer(flags, http=False, l1_size_gb=8 / 1024) as server:
            watch = Watch(server)
            try:
                fuzz(server, watch, rng, counts, fuzz_seconds)
                print(watch.finish())
            finally:
                watch.close()
    print(f"{sum(counts.values())} replies and hang-ups: {dict(sorted(counts.items()))}")
    assert not unreached(counts)


def unreached(counts: Counter[str]) -> list[str]:
    """Every operation must have been answered, when it was right and when it was wrong."""
    wanted = [f"{op} {outcome}" for op in REQUESTS for outcome in ("ok", "error")]
    return [name for name in wanted if not counts[name]]


def fuzz(server: LmcacheServer, watch: Watch, rng: random.Random, counts: Counter[str], seconds: float) -> None:
    """Let a few peers and raw sockets do their worst until the time is up."""
    deadline = time.monotonic() + seconds
    peers: list[Peer] = []
    idle: list[socket.socket] = []
    try:
        while time.monotonic() < deadline or (unreached(counts) and time.monotonic() < deadline + EXTRA_SECONDS):
            if len(peers) < NUM_PEERS:
                peers.append(Peer(server.zmq_url, rng, is_mapped=rng.random() < 0.7, counts=counts))
            peer = rng.choice(peers)
            kind = rng.random()
            if kind < 0.70:
                peer.step()
            elif kind < 0.90:
                peer.sequence()
            elif kind < 0.905:
                peer.flood()
            elif kind < 0.915:
                peer.send_large()
            else:
                raw_step(server.port, rng, idle)
                counts["raw"] += 1
            if peer.is_unknown or rng.random() < 0.005:
                peers.remove(peer)
                peer.close(is_polite=rng.random() < 0.3)
            watch.step()
    finally:
        for peer in peers:
            peer.close(is_polite=False)
        for left in idle:
            left.close()


def raw_step(port: int, rng: random.Random, idle: list[socket.socket]) -> None:
    """One connection that errs below the level of messages; some stay open and silent for a while."""
    with contextlib.suppress(ConnectionError, TimeoutError):
        peer = RawPeer(port, timeout_seconds=5.0)
        idle.append(peer.socket)
        if rng.random() < 0.5:
            peer.socket.sendall(before_greeting(rng))
        else:
            peer.shake_hands(**rng.choice(({}, {}, {"Identity": b"twin"}, {"Identity": rng.randbytes(200)})))
            peer.socket.sendall(after_greeting(rng))
    while idle and (len(idle) > MAX_IDLE_SOCKETS or rng.random() < 0.6):
        closed = idle.pop(rng.randrange(len(idle)))
        if rng.random() < 0.3:
            closed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        closed.close()


def before_greeting(rng: random.Random) -> bytes:
    """What no ZMTP peer begins with, or the beginning of a greeting."""
    return rng.choice(
        (
            b"",
            rng.randbytes(rng.choice((1, 10, 64, 1000, 100_000))),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            GREETING[: rng.randrange(64)],
            GREETING[:10] + rng.randbytes(54),
            b"\xff" * 64,
            b"\x01\x00" + message([b"id", NOOP]),
            GREETING + ready()[: rng.randrange(30)],
            GREETING + ready(Socket_Type=rng.choice((b"", b"ROUTER", b"PUB", b"x" * 300))),
            GREETING + frame(rng.randbytes(40), COMMAND),
            GREETING + frame(b"\x05READY\x0bSocket-Type\xff\xff\xff\xff", COMMAND),
            GREETING + message([b"id", NOOP]),
        )
    )


def after_greeting(rng: random.Random) -> bytes:
    """What a peer says that has been let in."""
    lie = rng.choice((2**63 - 1, 2**63, 2**64 - 1, 2**32, 2**28 + 1, 2**28, 255, 70_000))
    return rng.choice(
        (
            b"",
            frame(b"short", claimed_bytes=lie),
            frame(b"short", MORE, claimed_bytes=lie),
            frame(b"id", MORE) + frame(NOOP, claimed_bytes=lie),
            struct.pack(">BQ", LONG, 2**64 - 1),
            message([b"id", NOOP])[: rng.randrange(30)],
            message([b"id", NOOP]) + rng.randbytes(rng.randrange(100)),
            b"".join(frame(b"x" * 1000, MORE) for _ in range(rng.choice((1, 500)))),
            message([b""] * rng.choice((1, 2, 3, 1000))),
            message([b"x" * rng.choice((64, 65, 5000)), NOOP]),
            frame(rng.choice((b"\x04PING\x00\x0a", b"\x05ERROR\x05wrong", b"\x09SUBSCRIBE", b"\xff", b"")), COMMAND),
            bytes([rng.randrange(256)]) + rng.randbytes(20),
            message([b"id", NOOP]) * 300,
        )
    )
