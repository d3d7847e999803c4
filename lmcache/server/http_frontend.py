"""The socket and the thread of an HTTP port. Next on the path: `http_routes.py`, or metrics alone (`app.py`)."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from lmcache.errors import UsageError
from lmcache.log import RateLimitedLog, init_logger
from lmcache.server.zmq_frontend import bind_hint

logger = init_logger(__name__)

MAX_CONNECTIONS = 256
STOP_DEADLINE_SECONDS = 3.0
HEAD_DEADLINE_SECONDS = 5.0
# A peer that takes not one byte of its answer for so long is gone: TCP_USER_TIMEOUT, see `zmq_frontend.py`. Else
# MAX_CONNECTIONS that ask and never read would keep everybody out.
PEER_TIMEOUT_MS = 10_000


def bind(host: str, port: int, name: str) -> socket.socket:
    """Return a bound, listening socket, so that a port in use is known before anything is allocated.

    Args:
        name: what the port's flags begin with.
    Raises: UsageError.
    """
    listener: socket.socket | None = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, PEER_TIMEOUT_MS)  # its connections inherit that
        listener.bind(address)
        listener.listen(MAX_CONNECTIONS)
    except (OSError, UnicodeError) as exc:
        if listener is not None:
            listener.close()
        hint = bind_hint(exc, f"--{name}-host", f"--{name}-port") + ("; or pass --no-http" if name == "http" else "")
        raise UsageError(f"cannot listen on http://{host}:{port}: {exc}", hint) from exc
    return listener


def endpoint_of(listener: socket.socket) -> str:
    """Return the URL of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(listener: socket.socket) -> bool:
    """Whether only this host can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


class HttpFrontend:
    """Serves on a bound socket from a thread of its own; the libraries are imported there, after ZMQ answers.

    Args:
        make_app: returns the ASGI application; called in that thread.
        name: the thread's.
    """

    def __init__(self, listener: socket.socket, make_app: Callable[[], Any], name: str) -> None:
        self._listener = listener
        self._make_app = make_app
        self._server: Any = None
        self._is_stopping = False
        self._log = RateLimitedLog(logger)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; open connections get a moment to finish."""
        self._is_stopping = True
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(timeout=STOP_DEADLINE_SECONDS + 2)
        self._listener.close()

    def _run(self) -> None:
        import asyncio

        import uvicorn

        config = uvicorn.Config(
            self._make_app(),
            loop="asyncio",  # the same whatever else is installed; left to itself uvicorn takes uvloop and httptools
            http="h11",  # and it bounds a request's headers, which httptools does not
            log_config=None,
            log_level="critical",  # a line for each bad request would be theirs to write; http_routes logs what fails in ours
            access_log=False,
            lifespan="off",
            ws="none",
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=int(STOP_DEADLINE_SECONDS),
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._server.should_exit = self._is_stopping
        try:
            asyncio.run(self._serve(self._server))
        except (OSError, SystemExit) as exc:
            logger.error("the HTTP frontend ended: %s", exc)

    async def _serve(self, server: Any) -> None:
        import asyncio

        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._connection_failed)
        closing = loop.create_task(_close_half_open(server.server_state.connections))
        await server.serve(sockets=[self._listener])
        closing.cancel()

    def _connection_failed(self, loop: Any, context: dict[str, Any]) -> None:
        """Instead of asyncio's traceback: most often a peer that broke HTTP in the middle of its request."""
        self._log.warning("connection", f"an HTTP connection failed: {context.get('exception') or context['message']}")


async def _close_half_open(connections: set[Any]) -> None:
    """Close connections that do not finish a request's head in time: uvicorn lets them stay, and MAX_CONNECTIONS of them keep
    everybody else out, health probes first.
    """
    import asyncio

    waiting: dict[Any, tuple[Any, float]] = {}
    while True:
        now = time.monotonic()
        idle = [c for c in connections if c.cycle is None or c.cycle.response_complete]
        # Another cycle than last time: a request was answered in between.
        waiting = {c: waiting[c] if c in waiting and waiting[c][0] is c.cycle else (c.cycle, now) for c in idle}
        for connection, (_, since) in waiting.items():
            if now - since > HEAD_DEADLINE_SECONDS:
                connection.transport.close()
        await asyncio.sleep(1.0)
