"""A TCP connection that breaks, stalls or changes bytes between a client and a real server."""

import contextlib
import selectors
import socket
import struct
import threading
import time
from types import TracebackType

STOP_SECONDS = 60.0
POLL_SECONDS = 0.005
READ_BYTES = 1 << 16
DROP_BYTES = 512
TAIL_BYTES = 256
IO_SECONDS = 30.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class _Pipe:
    """One connection and its twin; how many bytes went each way."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.up = self.down = 0


class TcpProxy:
    """Listens on `port` inside `with`. Whatever is set applies to bytes that come later, on every connection.

    server_port: where new connections lead; those that there are stay.
    hold: while set, nothing that the server says goes on.
    drip: while set, it goes on in drops: 100 KB/s at most.
    cut_up, cut_down: reset the connection once so many bytes of it went to the server, to the client.
    flip_down: change a bit of this byte (counted from the connection's start) on its way to the client.
    up_tail, down_tail: the last bytes that a client, that the server said.
    num_down: bytes that went to clients so far.
    turns: how often a client spoke after the server had: its round trips.
    """

    def __init__(self, server_port: int) -> None:
        self.server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.hold = threading.Event()
        self.drip = threading.Event()
        self.cut_up: int | None = None
        self.cut_down: int | None = None
        self.flip_down: int | None = None
        self.num_down = 0
        self.turns = 0
        self.up_tail = self.down_tail = b""
        self._speaker: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._stranding = threading.Event()
        self._stranded: list[socket.socket] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="test-tcp-proxy")

    def forget(self) -> None:
        """Let everything pass again."""
        self.cut_up = self.cut_down = self.flip_down = None
        self.hold.clear()
        self.drip.clear()

    def strand(self) -> None:
        """Let the connections that there are be silent for ever, and stay open: their host is gone without a word."""
        self._stranding.set()
        deadline = time.monotonic() + STOP_SECONDS
        while self._stranding.is_set():
            assert time.monotonic() < deadline
            time.sleep(POLL_SECONDS)

    def _strand(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                self._selector.unregister(key.fileobj)
                self._stranded.append(key.fileobj)
        self._stranding.clear()

    def _run(self) -> None:
        while not self._stop.is_set():
            if self._stranding.is_set():
                self._strand()
            for key, _ in self._selector.select(POLL_SECONDS):
                sock = key.fileobj
                assert isinstance(sock, socket.socket)
                if key.data is None:
                    self._accept()
                elif sock.fileno() >= 0:  # not closed a moment ago
                    self._pump(key.data, sock)
        self._strand()
        for sock in (*self._stranded, self._listener):
            with contextlib.suppress(OSError):
                sock.close()
        self._selector.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(("127.0.0.1", self.server_port), IO_SECONDS)
        except OSError:
            client.close()
            return
        client.settimeout(IO_SECONDS)
        pipe = _Pipe(client, server)
        for sock in (client, server):
            self._selector.register(sock, selectors.EVENT_READ, pipe)

    def _pump(self, pipe: _Pipe, source: socket.socket) -> None:
        is_up = source is pipe.client
        if not is_up and self.hold.is_set():
            return
        try:
            if self.drip.is_set():
                self._stop.wait(POLL_SECONDS)
            data = bytearray(source.recv(DROP_BYTES if self.drip.is_set() else READ_BYTES))
            if not data:
                self._close(pipe, reset=False)
                return
            self.turns += is_up and self._speaker is not pipe.client
            self._speaker = source
            self._forward(pipe, data, is_up)
        except OSError:
            self._close(pipe, reset=True)

    def _forward(self, pipe: _Pipe, data: bytearray, is_up: bool) -> None:
        sent = pipe.up if is_up else pipe.down
        limit = self.cut_up if is_up else self.cut_down
        if not is_up and self.flip_down is not None and sent <= self.flip_down < sent + len(data):
            data[self.flip_down - sent] ^= 1
        is_cut = limit is not None and sent + len(data) > limit
        if is_cut:
            data = data[: max(0, limit - sent)]
        (pipe.server if is_up else pipe.client).sendall(data)
        if is_up:
            pipe.up += len(data)
            self.up_tail = (self.up_tail + bytes(data))[-TAIL_BYTES:]
        else:
            pipe.down += len(data)
            self.down_tail = (self.down_tail + bytes(data))[-TAIL_BYTES:]
            self.num_down += len(data)
        if is_cut:
            self._close(pipe, reset=True)

    def _close(self, pipe: _Pipe, reset: bool) -> None:
        for sock in (pipe.client, pipe.server):
            self._selector.unregister(sock)
            with contextlib.suppress(OSError):
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
                sock.close()

    def __enter__(self) -> "TcpProxy":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join(STOP_SECONDS)
        assert not self._thread.is_alive()
