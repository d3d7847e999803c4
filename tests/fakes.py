"""Peers that behave as no good server does: late, silent, or with made-up answers. All in threads of this process."""

import threading
import time
from collections.abc import Callable
from types import TracebackType

import msgspec
import zmq

from lmcache.protocol import Reply, encode

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
