"""The ZMQ socket and the owner thread: the one thread that touches the cache's state.

Comes in: frames from ROUTER, and requests that other threads hand over with `call`. Goes out: replies. Next on the data path:
`service.py`. The loop waits for messages and for the next tick, whichever is first.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import zmq

from lmcache.errors import RemoteError, UsageError
from lmcache.log import init_logger
from lmcache.protocol import (
    MAX_CHUNK_BYTES,
    MAX_FRAMES,
    MAX_REQUEST_ID_BYTES,
    R,
    Reply,
    Request,
    encode,
)
from lmcache.server.service import Answer, CacheService

logger = init_logger(__name__)

# Messages taken from the socket before the tick gets its turn.
MAX_MESSAGES_PER_TURN = 64
RECEIVE_HWM = 1000
# Replies queued for one peer, beyond which they are dropped: a client may have that many requests under way.
SEND_HWM = 4096
# Of those, replies that carry chunks: they keep up to MAX_GET_BYTES each of the pool pinned until the peer reads.
MAX_UNSENT_GETS = 64
HANDSHAKE_TIMEOUT_MS = 5000
# A peer whose host acknowledges nothing, or that takes not one byte, for so long is gone, and chunks on their way to it are
# unpinned: TCP_USER_TIMEOUT, which Linux 5.11 and later heed for a reader that stands still, too. The I/O thread of a client
# that is busy reads on. ZMQ's heartbeats would end a slow upload: a frame is no sign of life before all of it is there.
PEER_TIMEOUT_MS = 30_000
KEEPALIVE_SECONDS = 10
# libzmq tells nobody when it has sent a frame: while chunks are on their way, look this often whether they can be unpinned.
UNSENT_POLL_MS = 2
# How long the HTTP sides wait for the owner thread.
OWNER_DEADLINE_SECONDS = 2.0


def bind_hint(exc: Exception, host_flag: str, port_flag: str) -> str:
    """Return what to do when a socket cannot be bound; ZMQ's errors have the system's numbers."""
    number = getattr(exc, "errno", None)
    if number == errno.EADDRINUSE:
        return f"is another server running? choose another {port_flag}"
    if number in (errno.EACCES, errno.EPERM):
        return f"choose a {port_flag} that this user may open"
    return f"{host_flag} must be an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"


class ZmqFrontend:
    """Owns the ROUTER socket and runs the service's loop.

    Args:
        host: a host name or address to listen on.
        port: 0 takes a free one; `endpoint` tells which.
    Raises: UsageError when the address cannot be bound.
    """

    def __init__(self, host: str, port: int) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._router = self._context.socket(zmq.ROUTER)
        self._router.linger = 0
        self._router.router_mandatory = True
        self._router.maxmsgsize = MAX_CHUNK_BYTES
        self._router.rcvhwm = RECEIVE_HWM
        self._router.sndhwm = SEND_HWM
        self._router.sndtimeo = 0
        self._router.handshake_ivl = HANDSHAKE_TIMEOUT_MS
        self._router.tcp_maxrt = PEER_TIMEOUT_MS
        self._router.tcp_keepalive = 1
        self._router.tcp_keepalive_idle = self._router.tcp_keepalive_intvl = KEEPALIVE_SECONDS
        # Other threads wake the owner as a client would: one socket to wait on, and no poller in each round trip.
        self._doorbell_id = b"\1" + secrets.token_bytes(16)
        self._doorbell = self._context.socket(zmq.DEALER)
        self._doorbell.linger = 0
        self._doorbell.routing_id = self._doorbell_id
        self._doorbell_lock = threading.Lock()
        try:
            self.endpoint = self._bind(host, port)
        except (zmq.ZMQError, OSError, UnicodeError) as exc:
            self._doorbell.close()
            self._router.close()
            self._context.term()
            raise UsageError(
                f"cannot listen on tcp://{host}:{port}: {exc}",
                hint=bind_hint(exc, "--host", "--port"),
            ) from exc
        self._service: CacheService | None = None
        self._receive_timeout_ms = -1
        self._calls: deque[tuple[Request[Any], Future[Any]]] = deque()
        self._unsent: deque[tuple[bytes, zmq.MessageTracker, Callable[[], None]]] = deque()
        self._num_unsent: Counter[bytes] = Counter()
        self.num_steps = 0  # how often the owner thread has looked for a message: it stands still when that is stuck
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lmcache-owner", daemon=True)

    def _bind(self, host: str, port: int) -> str:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        ip = f"[{address[0]}]" if family == socket.AF_INET6 else str(address[0])
        self._router.ipv6 = family == socket.AF_INET6
        self._router.bind(f"tcp://{ip}:{port or '*'}")
        endpoint = bytes(self._router.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
        self._router.bind("inproc://doorbell")
        self._doorbell.connect("inproc://doorbell")
        return endpoint

    def start(self, service: CacheService) -> None:
        """Start the owner thread; from now on the service's state is its own."""
        self._service = service
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the owner thread runs."""
        return self._thread.is_alive()

    def call(self, request: Request[R]) -> Future[R]:
        """Hand a request to the owner thread, from any thread; the future gets the reply, or RemoteError."""
        future: Future[R] = Future()
        self._calls.append((request, future))
        self.wake()
        return future

    def stop_loop(self) -> None:
        """End the owner thread; the caller owns the service's state from now on."""
        self._stop.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    def stop(self) -> None:
        """End the loop and close the socket."""
        self.stop_loop()
        self._doorbell.close()
        self._router.close()
        self._context.term()
        for _, _, done in self._unsent:
            done()
        self._unsent.clear()

    def wake(self) -> None:
        """Make the owner look for calls, and for what the tiers' threads have done; any thread.

        When the bell cannot be rung once more, the owner has not answered the rings before.
        """
        with self._doorbell_lock, contextlib.suppress(zmq.ZMQError):
            self._doorbell.send(b"", zmq.NOBLOCK)

    # -- owner thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        service = self._service
        assert service is not None
        next_tick = time.monotonic()
        while not self._stop.is_set():
            wait_ms = max(0, round((next_tick - time.monotonic()) * 1000))
            if self._unsent:
                wait_ms = min(wait_ms, UNSENT_POLL_MS)
            self._receive(service, wait_ms)
            if time.monotonic() >= next_tick or service.wants_tick:
                next_tick = time.monotonic() + service.tick()
            self._finish_sent()

    def _receive(self, service: CacheService, wait_ms: int) -> None:
        """Answer what is there, or the first message that comes within `wait_ms`."""
        peer = self._next_peer(wait_ms)
        num_received = 0
        while peer is not None:
            if peer == self._doorbell_id:
                self._router.recv()
                self._run_calls(service)
                service.collect()
            else:
                self._receive_rest(service, peer)
            num_received += 1
            peer = self._next_peer(0) if num_received < MAX_MESSAGES_PER_TURN else None

    def _next_peer(self, wait_ms: int) -> bytes | None:
        """The first frame of the next message: who sent it."""
        self.num_steps += 1
        if not wait_ms:
            has_message = int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN  # cheaper than an exception
            return self._router.recv(zmq.NOBLOCK) if has_message else None
        if wait_ms != self._receive_timeout_ms:
            self._router.setsockopt(zmq.RCVTIMEO, wait_ms)
            self._receive_timeout_ms = wait_ms
        try:
            return self._router.recv()
        except zmq.Again:
            return None

    def _receive_rest(self, service: CacheService, peer: bytes) -> None:
        """Small frames are copied out, payload frames stay where libzmq put them until they are in the pool."""
        router, option = self._router, self._router.getsockopt
        request_id = router.recv() if option(zmq.RCVMORE) else b""
        has_header = bool(option(zmq.RCVMORE))
        header = router.recv() if has_header else b""
        payload: list[memoryview] = []
        num_frames = 2
        while option(zmq.RCVMORE):
            num_frames += 1
            frame = router.recv(copy=False)
            if num_frames <= MAX_FRAMES:
                payload.append(frame.buffer)
        if len(request_id) > MAX_REQUEST_ID_BYTES:
            service.bad_frames(
                f"the request id has {len(request_id)} bytes, at most {MAX_REQUEST_ID_BYTES} are echoed",
                self._responder(peer, b""),
            )
        elif not has_header or num_frames > MAX_FRAMES:
            service.bad_frames(
                f"a message of {num_frames if has_header else 1} frames; expected [request id][header][payload...]"
                f" and at most {MAX_FRAMES}",
                self._responder(peer, request_id),
            )
        else:
            service.handle(header, payload, self._responder(peer, request_id))

    def _responder(self, peer: bytes, request_id: bytes) -> Callable[[Answer], bool]:
        def respond(answer: Answer) -> bool:
            frames = [peer, request_id, encode(answer.reply)]
            try:
                if not answer.payload:
                    self._router.send_multipart(frames)
                    if answer.done is not None:
                        answer.done()
                elif self._num_unsent[peer] >= MAX_UNSENT_GETS:
                    return False
                else:
                    tracker = self._send_views(frames, answer.payload)
                    if answer.done is not None:
                        self._unsent.append((peer, tracker, answer.done))
                        self._num_unsent[peer] += 1
            except zmq.ZMQError as exc:  # EHOSTUNREACH: the peer is gone; EAGAIN: it does not read
                logger.debug("a reply was dropped: %s", exc)
                return False
            return True

        return respond

    def _send_views(self, frames: list[bytes], views: list[memoryview]) -> zmq.MessageTracker:
        """Send views, large ones without copying them; the tracker is done when libzmq has let go of all of them.

        Each is tracked by itself: `send_multipart` tracks only the last frame, and not even that if it is small.
        """
        tracked = [zmq.Frame(view, track=True) for view in views]
        self._router.send_multipart(frames, zmq.SNDMORE)
        for index, frame in enumerate(tracked, 1):
            self._router.send(frame, zmq.SNDMORE if index < len(tracked) else 0, copy=False)
        return zmq.MessageTracker(*tracked)

    def _finish_sent(self) -> None:
        for _ in range(len(self._unsent)):
            peer, tracker, done = self._unsent.popleft()
            if tracker.done:
                done()
                self._num_unsent[peer] -= 1
                if not self._num_unsent[peer]:
                    del self._num_unsent[peer]
            else:
                self._unsent.append((peer, tracker, done))

    def _run_calls(self, service: CacheService) -> None:
        while self._calls:
            request, future = self._calls.popleft()
            service.handle(encode(request), (), _future_responder(future))


def _future_responder(future: Future[Any]) -> Callable[[Answer], bool]:
    def respond(answer: Answer) -> bool:
        if not future.set_running_or_notify_cancel():
            return False
        reply: Reply = answer.reply
        if reply.error is not None:
            future.set_exception(RemoteError(reply.error.message, reply.error.hint, reply.error.code))
        else:
            future.set_result(reply)
        return True

    return respond
