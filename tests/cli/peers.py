"""What may listen at an address instead of a healthy server of ours."""

import contextlib
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import zmq

from lmcache.protocol import NoopReply, Reply


@contextlib.contextmanager
def tcp_peer(greeting: bytes) -> Iterator[int]:
    """A socket that sends `greeting` to whoever connects, and nothing else; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                held.append(peer)
                with contextlib.suppress(OSError):
                    peer.sendall(greeting)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            for peer in held:
                peer.close()


@contextlib.contextmanager
def zmq_peer(answer: Callable[[list[bytes]], list[bytes]]) -> Iterator[int]:
    """A ROUTER that answers each request's frames with what `answer` makes of them; yields its port."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    router.rcvtimeo = 50
    port = router.bind_to_random_port("tcp://127.0.0.1")
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                identity, *frames = router.recv_multipart()
            except zmq.Again:
                continue
            router.send_multipart([identity, *answer(frames)])

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield port
    finally:
        stop.set()
        thread.join()
        router.close()
        context.term()


def unhealthy(*problems: str) -> Callable[[list[bytes]], list[bytes]]:
    """Answers that name problems, as a server's whose pool cannot allocate."""
    reply: Reply = NoopReply(boot="0" * 32, problems=list(problems))
    return lambda frames: [frames[0], msgspec.msgpack.encode(reply)]


@contextlib.contextmanager
def http_peer(status: int, body: bytes, content_type: str = "application/json") -> Iterator[int]:
    """A web server that gives the same answer to everything; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.send_header("content-type", content_type)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _answer

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.daemon_threads = True
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield httpd.server_address[1]
        finally:
            httpd.shutdown()
            thread.join()


Script = Callable[["EngineHandler"], None]


class EngineHandler(BaseHTTPRequestHandler):
    """One request to an `engine_peer`; a script may answer it as an engine's stream does."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as engines do: tokens are small
    routes: dict[str, Any]
    requests: list[tuple[str, str, Any]]
    document: Any = None

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.document = json.loads(body) if body else None
        self.requests.append((self.command, self.path, self.document))
        found = self.routes.get(self.path.partition("?")[0], (404, {"detail": "Not Found"}))
        if callable(found):
            found(self)
        else:
            self.reply(*found)

    do_GET = do_POST = _answer

    def reply(self, status: int, document: Any) -> None:
        """Send a JSON document, or text as it is."""
        body = document.encode() if isinstance(document, str) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def redirect(self, place: str) -> None:
        """Send the client elsewhere."""
        self.send_response(302)
        self.send_header("location", place)
        self.send_header("content-length", "0")
        self.end_headers()

    def start_stream(self) -> None:
        """Send the head of a stream."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def send_line(self, line: str) -> None:
        """Send a line of the stream, with the empty line that ends an event."""
        data = f"{line}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end_stream(self) -> None:
        """Send what ends a stream well."""
        self.wfile.write(b"0\r\n\r\n")

    def hang_up(self) -> None:
        """End the connection as the death of a process does."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class EnginePeer:
    """An engine made of answers: its address, and the requests that came."""

    def __init__(self, port: int, requests: list[tuple[str, str, Any]]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.requests = requests


@contextlib.contextmanager
def engine_peer(routes: dict[str, Any], tls: ssl.SSLContext | None = None) -> Iterator[EnginePeer]:
    """An engine that answers each path with a (status, document) or a script, and all others with 404."""
    requests: list[tuple[str, str, Any]] = []
    handler = type("Handler", (EngineHandler,), {"routes": routes, "requests": requests})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        httpd.block_on_close = False
        if tls is not None:
            httpd.socket = tls.wrap_socket(httpd.socket, server_side=True)
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield EnginePeer(httpd.server_address[1], requests)
        finally:
            httpd.shutdown()
            thread.join()


def letters(handler: EngineHandler) -> None:
    """Tokenize as an engine does whose tokens are characters; a chat has a template of 10 more."""
    document = handler.document
    text = document["messages"][0]["content"] + " " * 10 if "messages" in document else document["prompt"]
    handler.reply(200, {"count": len(text), "tokens": [ord(char) for char in text]})
