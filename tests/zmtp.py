"""ZMTP by hand on a plain TCP socket: for what a ZMQ library does not let a test do, as to stall, to lie or to hang up."""

import socket
import struct
from collections.abc import Sequence
from types import TracebackType

MORE, LONG, COMMAND = 1, 2, 4
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = 0, claimed_bytes: int | None = None) -> bytes:
    """One frame; `claimed_bytes` is what its length field says when that is a lie."""
    length = len(body) if claimed_bytes is None else claimed_bytes
    if length < 256:
        return struct.pack(">BB", flags, length) + body
    return struct.pack(">BQ", flags | LONG, length) + body


def message(frames: Sequence[bytes]) -> bytes:
    """A whole message as it goes over the wire."""
    return b"".join(frame(body, MORE if index + 1 < len(frames) else 0) for index, body in enumerate(frames))


def ready(**properties: bytes) -> bytes:
    """The READY command of the NULL mechanism; a property's name has '-' where the keyword has '_'."""
    body = b"\x05READY"
    for name, value in {"Socket_Type": b"DEALER", **properties}.items():
        encoded = name.replace("_", "-").encode()
        body += struct.pack(">B", len(encoded)) + encoded + struct.pack(">I", len(value)) + value
    return frame(body, COMMAND)


class RawPeer:
    """A DEALER on a plain socket. Every wait ends after `timeout_seconds` with TimeoutError."""

    def __init__(self, port: int, timeout_seconds: float = 60.0, receive_buffer_bytes: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(timeout_seconds)
        if receive_buffer_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise

    def shake_hands(self, **properties: bytes) -> None:
        """Greet and become a peer whose messages are delivered."""
        self.socket.sendall(GREETING)
        self._read_exactly(len(GREETING))
        self.socket.sendall(ready(**properties))
        while not self._read_frame()[0] & COMMAND:
            pass

    def send(self, frames: Sequence[bytes]) -> None:
        """Send one message."""
        self.socket.sendall(message(frames))

    def receive(self) -> list[bytes]:
        """Return the frames of the next message."""
        frames: list[bytes] = []
        while True:
            flags, body = self._read_frame()
            if flags & COMMAND:
                continue
            frames.append(body)
            if not flags & MORE:
                return frames

    def close(self) -> None:
        """Hang up."""
        self.socket.close()

    def __enter__(self) -> "RawPeer":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read_frame(self) -> tuple[int, bytes]:
        flags, length = struct.unpack(">BB", self._read_exactly(2))
        if flags & LONG:
            length = int.from_bytes(bytes([length]) + self._read_exactly(7), "big")
        return flags, self._read_exactly(length)

    def _read_exactly(self, num_bytes: int) -> bytes:
        parts: list[bytes] = []
        while num_bytes:
            part = self.socket.recv(min(num_bytes, 1 << 20))
            if not part:
                raise ConnectionError("the server hung up")
            parts.append(part)
            num_bytes -= len(part)
        return b"".join(parts)
