"""HTTP as the command line speaks it: one connection, deadlines that hold, and times taken at the socket.

Comes in: an address and what should answer there, a `Peer`. Goes out: answers, JSON objects or lines of a stream; or an
`LMCacheError` that says what happened instead. h11 knows the protocol; the socket is ours. So each wait ends at the request's
deadline, however slowly bytes trickle in, a round trip is the time from the first byte sent to the first received, and the
import takes a sixth of httpx's.
"""

from __future__ import annotations

import os
import select
import socket
import time

import h11

from lmcache.cli.base import DEFAULT_TIMEOUT_SECONDS, ENGINE_TOKEN_VARIABLE, TOKEN_VARIABLE, Url, check_name
from lmcache.errors import DeadlineError, LMCacheError, ProtocolError, RemoteError, UnreachableError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

MAX_BODY_BYTES = 64 << 20
MAX_HEAD_BYTES = 64 << 10
READ_BYTES = 64 << 10
MAX_DIGITS = 20  # of 2**64 - 1


class Peer:
    """Who is expected at an address.

    Args:
        name: as in "does not answer like an lmcache server".
        code: of the error that says so.
        token_variable: the environment variable whose value goes along as a bearer token.
        log_hint: where to look when it failed.
        absent_hint: what to do when nobody answers; empty for what a client of the cache server says.
    """

    def __init__(self, name: str, code: str, token_variable: str, log_hint: str, absent_hint: str = "") -> None:
        self.name = name
        self.code = code
        self.token_variable = token_variable
        self.log_hint = log_hint
        self._absent_hint = absent_hint

    @property
    def absent_hint(self) -> str:
        """What to do when nobody answers."""
        from lmcache.client.mq import START_HINT

        return self._absent_hint or START_HINT


SERVER = Peer("an lmcache server", "not_lmcache", TOKEN_VARIABLE, "see the server's log")
ENGINE = Peer(
    "an inference engine",
    "not_engine",
    ENGINE_TOKEN_VARIABLE,
    "see the engine's log",
    "start the engine, or correct its address",
)


class RefusedError(RemoteError):
    """The peer answered with an HTTP status that is no success."""

    def __init__(self, status: int, message: str, hint: str = "", code: str = "") -> None:
        super().__init__(message, hint, code)
        self.status = status


class HttpAnswer:
    """A whole answer, and the time from the request's first byte sent to the first received; `location` of a redirect."""

    __slots__ = ("body", "location", "round_trip_seconds", "status")

    def __init__(self, status: int, body: bytes, round_trip_seconds: float, location: str = "") -> None:
        self.status = status
        self.body = body
        self.round_trip_seconds = round_trip_seconds
        self.location = location

    @property
    def document(self) -> Any:
        """The body as JSON; None when it is none."""
        try:
            return strict_json(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def error(self) -> dict[str, str]:
        """What the body says about what went wrong: `message` or `detail`, perhaps `code` and `hint`."""
        fields = self.document if isinstance(self.document, dict) else {}
        # {"error": {"message": ...}} is OpenAI's form and ours; SGLang leaves the outer object out, FastAPI says "detail".
        error = fields.get("error")
        found = error if isinstance(error, dict) else {"message": error} if isinstance(error, str) else fields
        if isinstance(found.get("message"), str):
            return {key: str(found[key]) for key in ("message", "code", "hint") if found.get(key) is not None}
        detail = fields.get("detail")
        return {"detail": detail if isinstance(detail, str) else str(detail)} if detail else {}


class HttpClient:
    """One kept connection to a peer; the surroundings' proxies do not take part.

    Each request, from the name's resolution to the last byte, has `timeout` seconds.
    """

    def __init__(self, url: Url, timeout: float = DEFAULT_TIMEOUT_SECONDS, peer: Peer = SERVER) -> None:
        self.url = url
        self.timeout = timeout
        self.peer = peer
        self._connection: _Connection | None = None

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()

    def request(
        self,
        method: str,
        path: str,
        params: Mapping[str, str] | None = None,
        json: Any = None,
        accept: Sequence[int] = (200,),
    ) -> dict[str, Any]:
        """Send one request and return the JSON object of its answer.

        Raises: UnreachableError when nothing that speaks HTTP answers in time; LMCacheError for
            another status than `accept` or another body than a JSON object.
        """
        return self.document(path, self.send(method, path, params, json), accept)

    def document(self, path: str, answer: HttpAnswer, accept: Sequence[int] = (200,)) -> dict[str, Any]:
        """Return the JSON object in an answer.

        Raises: LMCacheError for another status than `accept` or another body than a JSON object.
        """
        if answer.status not in accept:
            raise self.refusal(path, answer)
        document = answer.document
        if not isinstance(document, dict):
            raise wrong_peer(self.url, f"{path} did not answer with a JSON object", self.peer)
        return document

    def send(self, method: str, path: str, params: Mapping[str, str] | None = None, json: Any = None) -> HttpAnswer:
        """Send one request and return its answer, whatever its status.

        Raises: UnreachableError, also when the answer is not HTTP; ProtocolError when it ceases to be.
        """
        deadline = time.monotonic() + self.timeout
        try:
            connection, status = self._exchange(method, path, params, json, deadline)
            body = connection.body(deadline)
        except (OSError, h11.ProtocolError, _ClosedError) as exc:
            error = self._error(exc)
            self._drop()
            raise error from exc
        return HttpAnswer(status, body, connection.round_trip_seconds, connection.location)

    def lines(self, path: str, json: Any, patience: float) -> Iterator[tuple[bytes, float]]:
        """Post a document and yield each line of the answer with the monotonic time of its arrival.

        The first item is an empty line with the time of sending. Each line may take `patience` seconds.

        Raises: UnreachableError, also when the connection ends before the answer; RemoteError for
            another status than 200; ProtocolError when the answer ceases to be HTTP.
        """
        deadline = time.monotonic() + patience
        try:
            connection, status = self._exchange("POST", path, None, json, deadline)
            if status != 200:
                body = connection.body(deadline)
                raise self.refusal(path, HttpAnswer(status, body, connection.round_trip_seconds, connection.location))
            yield b"", connection.sent_at
            begun: list[bytes] = []  # the pieces of a line that has not ended
            while (piece := connection.piece(deadline)) is not None:
                first, *others = piece.split(b"\n")
                begun.append(first)
                if others:
                    *lines, last = [b"".join(begun), *others]
                    begun, deadline = [last], time.monotonic() + patience
                    for line in lines:
                        yield line, connection.received_at
                elif sum(map(len, begun)) > MAX_BODY_BYTES:
                    raise h11.RemoteProtocolError(f"a line of more than {MAX_BODY_BYTES} bytes")
            yield b"".join(begun), connection.received_at
        except (OSError, h11.ProtocolError, _ClosedError) as exc:
            raise self._error(exc, patience) from exc
        finally:
            self._drop()

    def refusal(self, path: str, answer: HttpAnswer) -> LMCacheError:
        """Return the error that an HTTP status and its body stand for."""
        where = self.url.text + path
        variable = self.peer.token_variable
        if answer.status == 401:
            has_token = bool(os.environ.get(variable))
            message = f"{where} wants another token than that in {variable}" if has_token else f"{where} wants a token"
            return RemoteError(message, f"set {variable} to what {self.peer.name} asks for", "unauthorized")
        if 300 <= answer.status < 400 and answer.location:
            message = f"{where} answered HTTP {answer.status}, a redirect to {answer.location}"
            hint = "redirects are not followed: pass the address that answers itself"
            return RefusedError(answer.status, message, hint, "redirect")
        error = answer.error
        hint = self.peer.log_hint if answer.status >= 500 else ""
        if "message" in error:
            return RefusedError(answer.status, error["message"], error.get("hint", hint), error.get("code", "remote"))
        # Our server says in JSON what failed; of an engine, or a proxy before it, a page of HTML is all there may be.
        if "detail" in error or (answer.status >= 500 and self.peer is not SERVER):
            told = f": {error['detail']}" if "detail" in error else ""
            return RefusedError(answer.status, f"{where} answered HTTP {answer.status}{told}", hint)
        return wrong_peer(self.url, f"{path} answered HTTP {answer.status}", self.peer)

    def _exchange(
        self, method: str, path: str, params: Mapping[str, str] | None, json: Any, deadline: float
    ) -> tuple[_Connection, int]:
        """Send a request and return when the answer's head is there."""
        connection = self._connection
        if connection is None or not connection.is_reusable():
            self._drop()
            connection = self._connection = _Connection(self.url, deadline)
        connection.send(method, _target(self.url, path, params), self._headers(), _encoded(json), deadline)
        return connection, connection.head(deadline)

    def _headers(self) -> list[tuple[bytes, bytes]]:
        token = os.environ.get(self.peer.token_variable, "").strip()
        if not token.isprintable():
            message = f"{self.peer.token_variable} is not one line of printable characters"
            raise UsageError(message, "set it to the token alone", "environment")
        return [(b"Authorization", f"Bearer {token}".encode())] if token else []

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _error(self, exc: Exception, timeout: float | None = None) -> LMCacheError:
        """Return our error for what the socket or h11 raised."""
        if isinstance(exc, TimeoutError):
            if _speaks_zmq(self.url):
                address = f"--url tcp://{self.url.text.partition('://')[2]}"
                is_ours = self.peer is SERVER
                hint = f"use {address}" if is_ours else f"for an lmcache server: 'lmcache ping kvcache {address}'"
                return UnreachableError(f"{self.url} speaks ZMQ, not HTTP", hint, "not_http")
            return DeadlineError(f"no reply from {self.url} within {timeout or self.timeout:g} s", self.peer.absent_hint)
        if isinstance(exc, _ClosedError) and exc.has_begun:
            return UnreachableError(f"{self.url} ended the connection within its answer", "see its log", "connection_lost")
        if isinstance(exc, h11.ProtocolError) and self._connection is not None and self._connection.has_head:
            return ProtocolError(f"the answer of {self.url} cannot be read: {exc}", self.peer.log_hint)
        if isinstance(exc, (h11.ProtocolError, _ClosedError)):
            hint = "check the port" + ("; a ZMQ port is written tcp://host:port" if self.peer is SERVER else "")
            return UnreachableError(f"{self.url} does not speak HTTP: {exc}", hint, "not_http")
        is_distrusted = "CERTIFICATE_VERIFY_FAILED" in str(exc)
        hint = "set SSL_CERT_FILE to a file with the certificate that signed it" if is_distrusted else self.peer.absent_hint
        return UnreachableError(f"cannot connect to {self.url}: {exc}", hint)


def http_request(
    url: Url,
    method: str,
    path: str,
    params: Mapping[str, str] | None = None,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> dict[str, Any]:
    """Send one HTTP request to a cache server and return the JSON object of the answer.

    Raises: UnreachableError, LMCacheError.
    """
    with HttpClient(url, timeout) as client:
        return client.request(method, path, params)


def wrong_peer(url: Url, reason: str, peer: Peer = SERVER) -> LMCacheError:
    """Return the error for something that answers, and not as the expected peer would."""
    return LMCacheError(f"{url} does not answer like {peer.name}: {reason}", "check the address", peer.code)


# -- documents ------------------------------------------------------------------------------------


def strict_json(text: bytes) -> Any:
    """Return the document in `text`. JSON has no NaN, and what overflows a double or 64 bits is no figure of anybody's.

    Raises: ValueError, RecursionError.
    """
    import json

    return json.loads(text, parse_constant=_no_number, parse_float=_finite, parse_int=_whole)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text[:MAX_DIGITS]} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if abs(value) < float("inf") else _no_number(text)


def _whole(text: str) -> int:
    return int(text) if len(text) <= MAX_DIGITS else _no_number(text)


# -- one connection --------------------------------------------------------------------------------


class _ClosedError(Exception):
    """The peer closed the connection; `has_begun`: after it had begun to answer."""

    def __init__(self, has_begun: bool) -> None:
        super().__init__("it closed the connection without an answer")
        self.has_begun = has_begun


class _Connection:
    """A connected socket and h11's view of what went over it. Times are monotonic.

    Raises, in every method: OSError, TimeoutError at the deadline, h11.ProtocolError, _ClosedError.
    """

    def __init__(self, url: Url, deadline: float) -> None:
        self._socket = _connected(url, check_name(url, _left(deadline)), deadline)
        self._host = url.text.partition("://")[2].partition("/")[0]
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._has_begun = False
        self.has_head = False
        self.location = ""
        self.sent_at = self.received_at = 0.0
        self.round_trip_seconds = 0.0

    def is_reusable(self) -> bool:
        """Whether the last answer is complete and the peer has not hung up since."""
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
        return self._h11.our_state is h11.IDLE and not select.select([self._socket], [], [], 0)[0]

    def send(self, method: str, target: str, headers: list[tuple[bytes, bytes]], body: bytes | None, deadline: float) -> None:
        """Send a whole request; it is put together before the clock starts."""
        from lmcache import __version__

        agent = f"lmcache/{__version__}"
        headers = [(b"Host", self._host.encode()), (b"User-Agent", agent.encode()), (b"Accept", b"*/*"), *headers]
        if body is not None:
            headers += [(b"Content-Type", b"application/json"), (b"Content-Length", str(len(body)).encode())]
        data = self._h11.send(h11.Request(method=method, target=target, headers=headers)) or b""
        if body:
            data += self._h11.send(h11.Data(data=body)) or b""
        data += self._h11.send(h11.EndOfMessage()) or b""
        self._has_begun = self.has_head = False
        self._socket.settimeout(_left(deadline))
        self.sent_at = time.monotonic()
        try:
            self._socket.sendall(data)
        except (BrokenPipeError, ConnectionResetError) as exc:
            raise _ClosedError(has_begun=False) from exc

    def head(self, deadline: float) -> int:
        """Return the answer's status."""
        event = self._next_event(deadline)
        while isinstance(event, h11.InformationalResponse):
            event = self._next_event(deadline)
        if not isinstance(event, h11.Response):
            raise _ClosedError(has_begun=False)
        self.has_head = True
        self.location = next((value.decode(errors="replace") for name, value in event.headers if name == b"location"), "")
        return event.status_code

    def body(self, deadline: float) -> bytes:
        """Return the answer's whole body."""
        body = bytearray()
        while (piece := self.piece(deadline)) is not None:
            body += piece
            if len(body) > MAX_BODY_BYTES:
                raise h11.RemoteProtocolError(f"an answer of more than {MAX_BODY_BYTES} bytes")
        return bytes(body)

    def piece(self, deadline: float) -> bytes | None:
        """Return the next piece of the answer's body, or None at its end."""
        event = self._next_event(deadline)
        return bytes(event.data) if isinstance(event, h11.Data) else None

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _next_event(self, deadline: float) -> Any:
        try:
            while (event := self._h11.next_event()) is h11.NEED_DATA:
                self._socket.settimeout(_left(deadline))
                data = self._socket.recv(READ_BYTES)
                self.received_at = time.monotonic()
                if not self._has_begun and data:
                    self._has_begun = True
                    self.round_trip_seconds = self.received_at - self.sent_at
                self._h11.receive_data(data)
            return event
        except ConnectionResetError as exc:
            raise _ClosedError(self._has_begun) from exc
        except h11.RemoteProtocolError as exc:
            _, has_ended = self._h11.trailing_data
            raise _ClosedError(self._has_begun) if has_ended else exc from exc


def _connected(url: Url, addresses: list[Any], deadline: float) -> socket.socket:
    """Return a socket that one of the name's addresses accepted; none are given where the host is one itself."""
    failure: OSError = OSError("the name has no address")
    try:
        addresses = addresses or socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except UnicodeError as exc:
        raise OSError(f"{url.host!r} is no address") from exc
    for family, kind, protocol, _, address in addresses:
        peer = socket.socket(family, kind, protocol)
        try:
            peer.settimeout(_left(deadline))
            peer.connect(address)
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return _encrypted(peer, url) if url.text.startswith("https:") else peer
        except OSError as exc:
            peer.close()
            failure = exc
    raise failure


def _encrypted(peer: socket.socket, url: Url) -> ssl.SSLSocket:
    """Trusted are the system's certificates, and what SSL_CERT_FILE names; or everybody."""
    import ssl

    context = ssl.create_default_context()
    if not url.checks_certificate:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(peer, server_hostname=url.host)


def _left(deadline: float) -> float:
    """Return the seconds to the deadline; a timeout of 0 would mean "do not wait" to a socket.

    Raises: TimeoutError
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _target(url: Url, path: str, params: Mapping[str, str] | None) -> str:
    from urllib.parse import quote, urlencode

    prefix = url.text.partition("://")[2].partition("/")[2]
    query = f"?{urlencode(params)}" if params else ""
    return quote(f"/{prefix}{path}" if prefix else path, safe="/%:@!$&'()*+,;=~") + query


def _encoded(json: Any) -> bytes | None:
    if json is None:
        return None
    from json import dumps

    return dumps(json).encode()


def _speaks_zmq(url: Url) -> bool:
    """Tell whether what listens there opens with ZMQ's greeting, as an HTTP server never does."""
    try:
        with socket.create_connection((url.host, url.port), 0.2) as peer:
            return peer.recv(1) == b"\xff"
    except OSError:
        return False
