"""Requests to the server over ZMQ: futures, deadlines, reconnect.

Comes in: a request of `protocol.py` and payload frames. Goes out: its reply. Next on the path: `server/zmq_frontend.py`.

There is no I/O thread. Each thread that uses a `MessageQueueClient` has its own DEALER socket, and a waiting future reads
that socket itself, so a round trip costs no hand-over between threads. A future belongs to the thread that submitted it.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic

import zmq

from lmcache.errors import DeadlineError, ProtocolError, UnreachableError, UsageError
from lmcache.protocol import MAX_CHUNK_BYTES, R, Request, decode_reply, encode

DEFAULT_TIMEOUT_SECONDS = 5.0
# What listens at an address shows what it speaks within this time, or it is taken for one who may speak ZMQ.
GREETING_SECONDS = 0.2
CONNECT_TIMEOUT_SECONDS = 2.0
RECONNECT_FIRST_MS = 50
RECONNECT_MAX_MS = 1000
# Of a host that went away without a word TCP tells nothing for a quarter of an hour. So libzmq asks for a sign of life this
# often, and connects anew when none has come for so long: a frozen server gives none, nor a chunk that is not yet whole, which
# must not take longer (32 MiB at 1.1 MB/s). The server hangs up on a client of which it hears nothing for the last of these.
PING_MS = 5_000
PING_TIMEOUT_MS = 30_000
PING_TTL_MS = 60_000
# Where nothing is under way: probes that the peer's kernel answers, also for a frozen server.
KEEPALIVE_IDLE_SECONDS = 15
KEEPALIVE_INTERVAL_SECONDS = 5
KEEPALIVE_PROBES = 4
# A thread that waits looks this often whether its client is being closed.
WAKE_MS = 100
# Then it leaves its call. A closed socket under a thread that is still in one would make libzmq abort the process.
LEAVE_SECONDS = WAKE_MS / 1000 + 1.0
LEAVE_POLL_SECONDS = 2e-3
# So long after its deadline a reply is still expected: a frozen server sends it when it goes on, one that has ended never does.
LATE_SECONDS = 300.0
# libzmq ends within milliseconds, but for its I/O thread when that is in the system's resolver: 10 s and more.
END_SECONDS = 1.0
# libzmq lets go of the buffers of a closed socket within milliseconds; NotDone after this is a bug, not to be passed over.
SEND_END_SECONDS = 30.0
START_HINT = "start it with 'lmcache server', or pass --url"

Payload = Sequence[bytes | bytearray | memoryview]


class ReplyFuture(Generic[R]):
    """The answer to one request, read from the submitting thread's socket when someone asks."""

    def __init__(self, channel: _Channel, request: Request[R], deadline: float) -> None:
        self.request = request
        self.payload: list[memoryview] = []
        self.sent_at = self.received_at = 0.0
        self.tracker: zmq.MessageTracker | None = None
        self.is_undone_late = True
        """Whether `on_late_reply` is to hear of a reply that comes after nobody waits for it any more."""
        self._channel = channel
        self.deadline = deadline
        self._header: bytes | None = None

    @property
    def round_trip_seconds(self) -> float:
        """The time on the way: from the request's last frame given to ZMQ to the reply's first frame taken from it."""
        return self.received_at - self.sent_at

    def set_reply(self, header: bytes, payload: list[memoryview]) -> None:
        """Called by the channel when the reply's frames have come."""
        self._header = header
        self.payload = payload

    @property
    def is_settled(self) -> bool:
        """Whether `result` would return or raise at once, as far as the replies read so far tell."""
        return self._header is not None or time.monotonic() >= self.deadline

    def done(self) -> bool:
        """Tell, without waiting, whether `result` would return or raise at once."""
        return self.wait(0.0)

    def wait(self, seconds: float) -> bool:
        """Read replies until this one has come, for at most `seconds`; return `is_settled`."""
        if self._header is None:
            self._channel.read_until(self, min(self.deadline, time.monotonic() + seconds))
        return self.is_settled

    def abandon(self) -> None:
        """Stop waiting; what a reply that still comes grants is given back."""
        if self._header is None:
            self._channel.abandon(self)

    def result(self) -> R:
        """Wait for the reply until the request's deadline.

        Raises: DeadlineError, RemoteError, ProtocolError.
        """
        try:
            if self._header is None:
                self._channel.read_until(self, self.deadline)
        finally:
            if self._header is None:
                self._channel.abandon(self)
        if self._header is None:
            raise DeadlineError(f"no reply from {self._channel.url} within its deadline", hint=START_HINT)
        return decode_reply(self._header, self.request)


class _Channel:
    """One thread's socket and the requests that wait on it.

    `with` it the socket is used, by its own thread. It is connected then, if it is not, and nobody else closes it.
    """

    def __init__(self, client: MessageQueueClient, sockets: _Sockets) -> None:
        self.url = client.url
        self._client = client
        self._sockets = sockets
        self._ids = itertools.count(1)
        self._waiting: dict[bytes, ReplyFuture[Any]] = {}
        self._abandoned: dict[bytes, ReplyFuture[Any]] = {}
        self._thread_id = threading.get_ident()
        self._is_connected = False

    def __enter__(self) -> None:
        if self._thread_id in self._sockets.in_use:  # garbage collection interrupts it, perhaps between two frames
            raise UnreachableError(f"this thread is in the middle of another request to {self.url}")
        self._sockets.in_use.add(self._thread_id)
        try:
            self._client.check_open()  # after the line above, so that whoever closes the client either waits or is seen
            if not self._is_connected:
                self._connect()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()
        if isinstance(exc, zmq.ContextTerminated):
            raise UnreachableError(f"the client of {self.url} is closed") from exc

    def _leave(self) -> None:
        self._sockets.in_use.discard(self._thread_id)
        if self._sockets.is_ended:
            self.close()

    def _connect(self) -> None:
        self._receive_timeout_ms = -2
        try:
            self._socket = self._sockets.open(self.url)
        except zmq.ZMQError as exc:
            raise UnreachableError(f"cannot open a socket to {self.url}: {exc}", hint="see 'ulimit -n'") from exc
        self._socket.linger = 0
        self._socket.ipv6 = "[" in self.url  # a name that has both kinds of address stays with IPv4
        # Without IMMEDIATE a request to a server that is away would wait in a queue and run long after its deadline.
        self._socket.immediate = True
        self._socket.reconnect_ivl = RECONNECT_FIRST_MS
        self._socket.reconnect_ivl_max = RECONNECT_MAX_MS
        self._socket.connect_timeout = int(CONNECT_TIMEOUT_SECONDS * 1000)
        self._socket.maxmsgsize = MAX_CHUNK_BYTES
        self._socket.heartbeat_ivl = PING_MS
        self._socket.heartbeat_timeout = PING_TIMEOUT_MS
        self._socket.heartbeat_ttl = PING_TTL_MS
        self._socket.tcp_keepalive = 1
        self._socket.tcp_keepalive_idle = KEEPALIVE_IDLE_SECONDS
        self._socket.tcp_keepalive_intvl = KEEPALIVE_INTERVAL_SECONDS
        self._socket.tcp_keepalive_cnt = KEEPALIVE_PROBES
        try:
            self._socket.connect(self.url)
        except zmq.ZMQError as exc:
            self.close()
            raise UsageError(
                f"{self.url!r} is not a ZMQ address: {exc}",
                hint="use tcp://host:port or ipc:///path",
            ) from exc
        self._is_connected = True

    def submit(
        self, request: Request[R], payload: Payload, deadline: float, may_wait: bool, wants_reply: bool = True
    ) -> ReplyFuture[R]:
        request_id = next(self._ids).to_bytes(8, "little")
        future = ReplyFuture(self, request, deadline)
        frames = [request_id, encode(request), *payload]
        with self:
            future.sent_at = time.perf_counter()
            try:
                future.tracker = self._send(frames, deadline if may_wait else 0.0)
            except zmq.Again as exc:
                raise UnreachableError(f"no connection to {self.url}", hint=START_HINT) from exc
            if wants_reply:
                self._waiting[request_id] = future
        return future

    def _send(self, frames: Payload, deadline: float) -> zmq.MessageTracker | None:
        """Usually the socket is ready, and the timeout need not be set. Chunks are sent from the caller's buffers; `abandon`
        sees to it that they are read no more when it gets them back.
        """
        has_chunks = len(frames) > 3
        try:
            return self._socket.send_multipart(frames, zmq.NOBLOCK, copy=not has_chunks, track=has_chunks)
        except zmq.Again:
            remaining_ms = max(0, int((deadline - time.monotonic()) * 1000))
        while True:
            self._client.check_open()
            self._socket.sndtimeo = min(remaining_ms, WAKE_MS)
            try:
                return self._socket.send_multipart(frames, copy=not has_chunks, track=has_chunks)
            except zmq.Again:
                remaining_ms = int((deadline - time.monotonic()) * 1000)
                if remaining_ms <= 0:
                    raise

    def read_until(self, future: ReplyFuture[Any], deadline: float) -> None:
        """Read replies, whosever they are, until `future` has its own or the deadline has passed."""
        while future._header is None:
            remaining_ms = round((deadline - time.monotonic()) * 1000)
            timeout_ms = max(0, min(remaining_ms, WAKE_MS))
            try:
                self._read_one(timeout_ms)
            except zmq.Again:
                if remaining_ms <= WAKE_MS:
                    return

    def read_what_came(self) -> None:
        """Read the replies that are here, whosever they are."""
        with contextlib.suppress(zmq.Again):
            while True:
                self._read_one(0)

    def _read_one(self, timeout_ms: int) -> None:
        """Read a reply and hand it to its future; one that comes late goes to `on_late_reply`, which may use the socket."""
        with self:
            late = self._deliver(*self._receive(timeout_ms))
        if late is not None:
            self._client.on_late_reply(late)

    def _receive(self, timeout_ms: int) -> tuple[bytes, bytes, list[memoryview], float]:
        """Return a message's request id, header and payload, and when the first of them came.

        Raises: zmq.Again.
        """
        if timeout_ms != self._receive_timeout_ms:
            self._socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._receive_timeout_ms = timeout_ms
        request_id = self._socket.recv()
        received_at = time.perf_counter()
        option = self._socket.getsockopt  # the attribute `rcvmore` reads the same, six times slower
        header = self._socket.recv() if option(zmq.RCVMORE) else b""
        payload: list[memoryview] = []
        while option(zmq.RCVMORE):
            payload.append(self._socket.recv(copy=False).buffer)
        return request_id, header, payload, received_at

    def _deliver(
        self, request_id: bytes, header: bytes, payload: list[memoryview], received_at: float
    ) -> ReplyFuture[Any] | None:
        """Return the future if nobody waits for it any more."""
        future = self._waiting.pop(request_id, None)
        if future is not None:
            future.received_at = received_at
            future.set_reply(header, payload)
            return None
        late = self._abandoned.pop(request_id, None)
        if late is not None:
            late.set_reply(header, payload)
        return late

    def abandon(self, future: ReplyFuture[Any]) -> None:
        """Stop waiting; a reply that still comes goes to `on_late_reply`, which gives back what it granted, if that is wanted.

        Where the caller's buffers are still being sent, the connection goes: it may change them now, and a message that ended
        with other bytes than it began would be stored. The server drops the half that it has.
        """
        self._forget_abandoned()
        for request_id, waiting in self._waiting.items():
            if waiting is future:
                del self._waiting[request_id]
                if future.is_undone_late:
                    self._abandoned[request_id] = future
                break
        if future.tracker is not None and not future.tracker.done:
            self.close()
            future.tracker.wait(timeout=SEND_END_SECONDS)
            with contextlib.suppress(UnreachableError), self:
                pass  # the next request need not wait for a connection

    def _forget_abandoned(self) -> None:
        oldest = time.monotonic() - LATE_SECONDS
        while self._abandoned and next(iter(self._abandoned.values())).deadline < oldest:
            del self._abandoned[next(iter(self._abandoned))]

    def close(self) -> None:
        """Close the socket; the next use opens another one. Its own thread only, or none that uses it."""
        self._is_connected = False
        if hasattr(self, "_socket"):
            self._sockets.close(self._socket)

    def __del__(self) -> None:
        """A thread that ends takes its socket along."""
        self.close()


class _Sockets:
    """A client's ZMQ context and what is open in it.

    `in_use` holds the threads that are in a call. The lock is re-entrant: garbage collection, which may begin in any method,
    finalizes channels and closes clients in the same thread.
    """

    def __init__(self) -> None:
        self.in_use: set[int] = set()
        self.is_ended = False
        self._process_id = os.getpid()
        self._lock = threading.RLock()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._opened: dict[zmq.Socket[bytes], int] = {}  # the thread that each belongs to

    @property
    def are_anothers(self) -> bool:
        """Whether this process was forked from the one that they work in. Nothing of theirs may be touched then: the
        I/O thread is not there, nor whoever holds the lock.
        """
        return os.getpid() != self._process_id

    def open(self, url: str) -> zmq.Socket[bytes]:
        """Return a new socket.

        Raises: UnreachableError when the client is closed, zmq.ZMQError when there is no descriptor left.
        """
        with self._lock:
            if not self.is_ended:
                opened = self._context.socket(zmq.DEALER)
                self._opened[opened] = threading.get_ident()
                if not self.is_ended:
                    return opened
                self.close(opened)
        raise UnreachableError(f"the client of {url} is closed")

    def close(self, opened: zmq.Socket[bytes]) -> None:
        if self.are_anothers:
            return
        with self._lock:
            opened.close()
            self._opened.pop(opened, None)

    def end(self, leave_seconds: float = 0.0, end_seconds: float = 0.0) -> None:
        """Close what is open, but for the sockets of threads that do not leave their calls in time: they do it themselves.

        Only a thread of its own waits for the context, after `end_seconds`: that has not ended while a socket is open, or the
        system looks for an address.
        """
        if self.are_anothers:
            return
        self.is_ended = True
        give_up_at = time.monotonic() + leave_seconds
        while self._others_in_use() and time.monotonic() < give_up_at:
            time.sleep(LEAVE_POLL_SECONDS)
        with self._lock:
            for opened, thread_id in [*self._opened.items()]:
                if thread_id not in self.in_use:
                    self.close(opened)
        ended = threading.Lock()
        ended.acquire(blocking=False)
        with contextlib.suppress(RuntimeError):  # no thread is to be had, as when the process ends: it is left to that
            # Not a Thread: garbage collection, which comes here, may have begun inside the start of one, with its lock taken.
            _thread.start_new_thread(self._end_context, (ended,))
            ended.acquire(timeout=end_seconds)

    def _end_context(self, ended: threading.Lock) -> None:
        self._context.term()
        ended.release()

    def _others_in_use(self) -> bool:
        return bool(self.in_use - {threading.get_ident()})


class MessageQueueClient:
    """Sends requests to one server; every thread may use it.

    Args:
        url: `tcp://host:port` or `ipc:///path`.
        timeout_seconds: the deadline of requests that name none.
        on_late_reply: told, in the thread that reads it, of a reply that came after its deadline.
    """

    def __init__(
        self,
        url: str,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
        on_late_reply: Callable[[ReplyFuture[Any]], None] = lambda future: None,
    ) -> None:
        self.url = url
        self.timeout_seconds = timeout_seconds
        self.on_late_reply = on_late_reply
        self._sockets = _Sockets()
        # Of a client that nobody closed, garbage collection may finalize the context first, and that waits for its sockets for
        # ever, in whatever thread. So these are kept from becoming garbage, and are ended when the client becomes it.
        self._end = weakref.finalize(self, self._sockets.end)
        self._end.atexit = False
        self._local = threading.local()
        # Who may use it: None stands for every thread; none has the id 0.
        self._usable_by: int | None = None

    def _channel(self) -> _Channel:
        channel: _Channel | None = getattr(self._local, "channel", None)
        if channel is None:
            channel = self._local.channel = _Channel(self, self._sockets)
        return channel

    def connect(self) -> None:
        """Begin to connect the calling thread's socket, so that its first request need not wait for that."""
        with self._channel():
            pass

    @property
    def is_anothers(self) -> bool:
        """Whether this process was forked from the one that made it."""
        return self._sockets.are_anothers

    def check_open(self) -> None:
        """Return if the calling thread may use this client.

        Raises: UnreachableError when it is closed, another thread is closing it, or this process was forked from its own.
        """
        if self.is_anothers:
            raise UnreachableError(f"the client of {self.url} belongs to the process that this one was forked from")
        if self._usable_by is not None and self._usable_by != threading.get_ident():
            raise UnreachableError(f"the client of {self.url} is closed")

    def begin_close(self) -> None:
        """End what other threads wait for, in WAKE_MS at the latest; from now on only the calling thread may send requests."""
        self._usable_by = threading.get_ident()

    def submit(
        self,
        request: Request[R],
        payload: Payload = (),
        timeout_seconds: float | None = None,
        may_wait: bool = False,
    ) -> ReplyFuture[R]:
        """Send a request and return its future at once.

        Raises: UnreachableError when there is no connection now (`may_wait`: before the deadline).
        """
        timeout = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        return self._channel().submit(request, payload, time.monotonic() + timeout, may_wait)

    def call(self, request: Request[R], payload: Payload = (), timeout_seconds: float | None = None) -> R:
        """Send a request and wait for its reply.

        Raises: UnreachableError, DeadlineError, RemoteError, ProtocolError.
        """
        return self.submit(request, payload, timeout_seconds, may_wait=True).result()

    def read_what_came(self) -> None:
        """Read the calling thread's replies that are here; nothing is waited for."""
        self._channel().read_what_came()

    def post(self, request: Request[Any]) -> None:
        """Send a request whose reply nobody needs; it is read and dropped when the thread reads its next reply.

        Raises: UnreachableError when there is no connection now.
        """
        self._channel().submit(request, (), time.monotonic(), may_wait=False, wants_reply=False)

    def close(self) -> None:
        """Close every thread's socket. What other threads wait for ends, in WAKE_MS as a rule."""
        self._usable_by = 0
        if self._end.detach() is not None:  # nobody has closed it yet
            self._sockets.end(LEAVE_SECONDS, END_SECONDS)

    def __enter__(self) -> MessageQueueClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def check_reachable(url: str, timeout_seconds: float) -> None:
    """Return if something accepts connections at a tcp:// address; other transports are not checked.

    Raises: UnreachableError at once when the connection is refused, DeadlineError when nothing answers.
    """
    try:
        _connect(url, min(timeout_seconds, CONNECT_TIMEOUT_SECONDS)).close()
    except _NotTcpError:
        return


def diagnose(url: str) -> ProtocolError | None:
    """Tell what else answers at an address that does not answer us, in at most 0.6 s; None when it is silent."""
    try:
        with _connect(url, GREETING_SECONDS) as peer:
            peer.settimeout(GREETING_SECONDS)
            try:
                first = peer.recv(16)
            except TimeoutError:
                peer.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
                first = peer.recv(16)
    except (OSError, UnreachableError, _NotTcpError):
        return None
    if first.startswith(b"\xff") or not first:
        return None
    if first.startswith(b"HTTP/"):
        return ProtocolError(
            f"{url} speaks HTTP, not ZMQ",
            hint=f"use --url {url.replace('tcp://', 'http://')}, or the server's ZMQ port",
        )
    return ProtocolError(f"{url} does not speak ZMQ: it sent {first!r}", hint=START_HINT)


class _NotTcpError(Exception):
    """The address has no host and port to connect to."""


def _connect(url: str, timeout_seconds: float) -> socket.socket:
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    if scheme != "tcp" or not port.isdigit():
        raise _NotTcpError
    try:
        return socket.create_connection((host.strip("[]"), int(port)), timeout_seconds)
    except TimeoutError as exc:
        raise DeadlineError(f"no connection to {url} within {timeout_seconds:g} s", hint=START_HINT) from exc
    except (OSError, OverflowError, UnicodeError) as exc:
        raise UnreachableError(f"cannot connect to {url}: {exc}", hint=START_HINT) from exc
