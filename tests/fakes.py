"""Peers that behave as no good one does: servers that are late, silent or make answers up, and a tier that fails as told.

All in threads of this process.
"""

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import msgspec
import zmq

from lmcache.protocol import Reply, encode
from lmcache.storage.l2.base import L2Adapter, L2Error, Parts, Reason, Usage, check_length

STOP_SECONDS = 60.0
# How long a call may take that must succeed, on a machine with much else to do.
PATIENCE_SECONDS = 60.0
Frames = list[bytes]


class Proxy:
    """Stands between clients and a server. While `hold` is set, the server's replies wait; `drop` loses them.

    Each client gets a connection of its own to the server, as it would have without the proxy.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.linger = 0
        self.url = f"tcp://127.0.0.1:{self._front.bind_to_random_port('tcp://127.0.0.1')}"
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self.hold = threading.Event()
        self.drop = threading.Event()
        self.held: list[Frames] = []
        self.ops: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-proxy")

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._front, zmq.POLLIN)
        while not self._stop.is_set():
            ready = dict(poller.poll(5))
            if self._front in ready:
                peer, *frames = self._front.recv_multipart()
                self._back(peer, poller).send_multipart(frames)
                self.ops.append(msgspec.msgpack.decode(frames[1])["op"])
            for peer, back in self._backs.items():
                if back in ready:
                    self.held.append([peer, *back.recv_multipart()])
            if self.drop.is_set():
                self.held.clear()
            if not self.hold.is_set():
                for frames in self.held:
                    self._front.send_multipart(frames)
                self.held.clear()
        for socket in (self._front, *self._backs.values()):
            socket.close()

    def _back(self, peer: bytes, poller: zmq.Poller) -> "zmq.Socket[bytes]":
        if peer not in self._backs:
            back = self._backs[peer] = self._context.socket(zmq.DEALER)
            back.linger = 0
            back.connect(self._server_url)
            poller.register(back, zmq.POLLIN)
        return self._backs[peer]

    def __enter__(self) -> "Proxy":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(STOP_SECONDS)
        assert not self._thread.is_alive()
        self._context.term()


class ScriptedPeer:
    """A ROUTER that answers each request with the frames after the request id that `answer(op)` gives; None: not at all."""

    def __init__(self, answer: Callable[[str], Frames | None]) -> None:
        self._answer = answer
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self.url = f"tcp://127.0.0.1:{self._router.bind_to_random_port('tcp://127.0.0.1')}"
        self.ops: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-peer")

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self._router.poll(10):
                continue
            peer, request_id, header, *_ = self._router.recv_multipart()
            op = msgspec.msgpack.decode(header)["op"]
            self.ops.append(op)
            answer = self._answer(op)
            if answer is not None:
                self._router.send_multipart([peer, request_id, *answer])
        self._router.close()

    def __enter__(self) -> "ScriptedPeer":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(STOP_SECONDS)
        assert not self._thread.is_alive()
        self._context.term()


def reply_of(reply: Reply, boot: str = "b" * 32) -> Frames:
    """The frames of one reply."""
    reply.boot = boot
    return [encode(reply)]


def seconds(action: Callable[[], object]) -> float:
    """How long an action takes, for bounds that are far from what it should take."""
    started = time.monotonic()
    action()
    return time.monotonic() - started


class FakeTier(L2Adapter):
    """An L2 back end in a dictionary that fails, lags, hangs or corrupts when told to.

    `hold`: while it is clear, calls named in `held` wait, at most STOP_SECONDS. `errors`: the reason with which a call fails.
    `asked`: for how many keys each call of `lengths` asked.
    """

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.errors: dict[str, Reason] = {}
        self.held: set[str] = set()
        self.hold = threading.Event()
        self.hold.set()
        self.calls: list[str] = []
        self.asked: list[int] = []
        self.num_waiting = 0
        self.is_closed = False
        self._mutex = threading.Lock()

    def stop(self, *names: str) -> None:
        """From now on these calls wait until `go`."""
        self.held = set(names)
        self.hold.clear()

    def go(self) -> None:
        """Let them go on."""
        self.hold.set()

    def _enter(self, name: str) -> None:
        with self._mutex:
            self.calls.append(name)
            is_held = name in self.held
            self.num_waiting += is_held and not self.hold.is_set()
        if is_held:
            assert self.hold.wait(STOP_SECONDS)
        if name in self.errors:
            raise L2Error(f"fake {name} failed", code=self.errors[name])

    def put(self, key: str, parts: Parts) -> None:
        self._enter("put")
        self.values[key] = b"".join(parts)

    def get(self, key: str, parts: Parts) -> bool:
        self._enter("get")
        value = self.values.get(key)
        if value is None:
            return False
        check_length(key, len(value), sum(part.nbytes for part in parts))
        at = 0
        for part in parts:
            part[:] = value[at : at + part.nbytes]
            at += part.nbytes
        return True

    def lengths(self, keys: Sequence[str]) -> list[int | None]:
        self.asked.append(len(keys))
        self._enter("lengths")
        return [len(self.values[key]) if key in self.values else None for key in keys]

    def delete(self, keys: Sequence[str]) -> int:
        self._enter("delete")
        return sum(self.values.pop(key, None) is not None for key in keys)

    def clear(self) -> int:
        self._enter("clear")
        count = len(self.values)
        self.values.clear()
        return count

    def usage(self) -> Usage:
        self._enter("usage")
        return Usage(used_bytes=sum(map(len, self.values.values())), objects=len(self.values))

    def ping(self) -> None:
        self._enter("ping")

    def close(self) -> None:
        self.is_closed = True

    def flip(self, key: str, at: int = -1) -> None:
        """Change one bit of a value."""
        value = bytearray(self.values[key])
        value[at] ^= 1
        self.values[key] = bytes(value)
