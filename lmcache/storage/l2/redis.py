"""L2 in Redis or Valkey: one string a value, on one server or on a cluster.

Comes in: keys and memory. Goes out: SET and GET whose payloads go between the socket and that memory, with no copy in between,
and STRLEN and UNLINK of many names at once; for all else redis-py's own commands. What is evicted, and when, is the server's
business (`maxmemory-policy`), unless `ttl-seconds` says when values go.

One connection does one command at a time. redis-py keeps them, connects, authenticates and finds a key's node.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import redis
from redis import exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from lmcache.errors import UsageError
from lmcache.storage.l2.base import L2Adapter, L2Error, Parts, Reason, Usage, check_length
from lmcache.storage.l2.spec import AdapterSpec, RedisSettings, read_secret

T = TypeVar("T")
CRLF = b"\r\n"
# Holds the first line of a reply; the start of the value that comes with it is copied.
SCRATCH_BYTES = 4096
BATCH_KEYS = 512
MAX_REDIRECTS = 5
# Of a node of a cluster, beside those of calls: for the map of slots, for SCAN and for INFO.
SPARE_CONNECTIONS = 3
_ERRORS = (exceptions.RedisError, exceptions.RedisClusterException, OSError)
# Replies that redis-py has no class of its own for.
_REASONS_BY_WORD = {
    "NOAUTH": Reason.DENIED,
    "WRONGPASS": Reason.DENIED,
    "NOPERM": Reason.DENIED,
    "OOM": Reason.FULL,
    "READONLY": Reason.READ_ONLY,
    "MISCONF": Reason.READ_ONLY,
    "NOREPLICAS": Reason.READ_ONLY,
    "LOADING": Reason.UNREACHABLE,
    "CLUSTERDOWN": Reason.UNREACHABLE,
    "MASTERDOWN": Reason.UNREACHABLE,
    "WRONGTYPE": Reason.CORRUPT,
}
_REASONS_BY_CLASS: list[tuple[Any, Reason]] = [
    ((exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError), Reason.DENIED),
    (exceptions.OutOfMemoryError, Reason.FULL),
    (exceptions.ReadOnlyError, Reason.READ_ONLY),
    ((exceptions.TimeoutError, TimeoutError), Reason.TIMEOUT),
    ((exceptions.ConnectionError, exceptions.ClusterError, exceptions.RedisClusterException, OSError), Reason.UNREACHABLE),
]


class RedisAdapter(L2Adapter):
    """One server or one cluster."""

    def __init__(self, spec: AdapterSpec) -> None:
        assert isinstance(spec.settings, RedisSettings)
        self._settings = settings = spec.settings
        self._password = read_secret(settings.password_file) if settings.password_file else settings.password
        if settings.ca_file and not os.access(settings.ca_file, os.R_OK):
            raise UsageError(f"L2 adapter redis: ca-file {settings.ca_file} cannot be read")
        self._name = f"{settings.host}:{settings.port}"
        self._client: Any = None
        self._mutex = threading.Lock()
        self._turns = threading.BoundedSemaphore(settings.max_connections)

    # -- the contract ------------------------------------------------------------------------------

    def put(self, key: str, parts: Parts) -> None:
        """See the contract."""
        name, views = self._encoded(key), [part.cast("B") for part in parts if part.nbytes]
        expiry = [b"EX", str(self._settings.ttl_seconds).encode()] if self._settings.ttl_seconds else []
        with self._as_l2_error("put"):
            self._on_connection(name, lambda connection: _send_put(connection, name, views, expiry))

    def get(self, key: str, parts: Parts) -> bool:
        """See the contract. The whole value comes within the timeout."""
        name, views = self._encoded(key), [part.cast("B") for part in parts if part.nbytes]
        timeout = self._settings.timeout_seconds
        with self._as_l2_error("get"):
            return self._on_connection(name, lambda connection: _receive_get(connection, key, name, views, timeout))

    def lengths(self, keys: Sequence[str]) -> list[int | None]:
        """See the contract: one round trip, on a cluster one to each of its nodes."""
        with self._as_l2_error("look up"):
            names = [self._encoded(key) for key in keys]
            return [length or None for length in self._numbers("STRLEN", names)]

    def delete(self, keys: Sequence[str]) -> int:
        """See the contract. The server frees their memory in the background."""
        with self._as_l2_error("delete"):
            return self._delete([self._encoded(key) for key in keys])

    def clear(self) -> int:
        """See the contract: every name that begins with the prefix."""
        pattern = "".join(f"\\{char}" if char in "*?[]\\^" else char for char in self._settings.prefix) + "*"
        removed = 0
        with self._as_l2_error("clear"):
            batch: list[bytes] = []
            for name in self._connected().scan_iter(match=pattern, count=2 * BATCH_KEYS):
                batch.append(name)
                if len(batch) == BATCH_KEYS:
                    removed += self._delete(batch)
                    batch = []
            return removed + self._delete(batch)

    def usage(self) -> Usage:
        """See the contract: what the whole server holds; it does not tell how much of that is ours."""
        with self._as_l2_error("ask"):
            try:
                client = self._connected()
                nodes = (
                    [client.get_redis_connection(node) for node in client.get_primaries()]
                    if self._settings.cluster
                    else [client]
                )
                reports = [node.info("memory") for node in nodes]
            except exceptions.NoPermissionError:  # the user may use values, and not see how the server is
                return Usage()
        capacity = sum(int(report.get("maxmemory", 0)) for report in reports)
        return Usage(used_bytes=sum(int(report["used_memory"]) for report in reports), capacity_bytes=capacity or None)

    def ping(self) -> None:
        """Set a name below the prefix and remove it: a full or read-only server answers with an error."""
        name = self._encoded("ping")
        with self._as_l2_error("ping"):
            self._on_connection(name, lambda connection: _send_put(connection, name, [], [b"PX", b"1000"]))
            self._delete([name])

    def close(self) -> None:
        """See the contract."""
        with self._mutex:
            client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(*_ERRORS):
                client.close()
                if not self._settings.cluster:
                    client.connection_pool.disconnect()

    # -- through redis-py --------------------------------------------------------------------------

    def _connected(self) -> Any:
        """Return the client. A cluster's asks for the cluster's nodes first, and one thread does that."""
        if self._client is not None:
            return self._client
        if not self._mutex.acquire(timeout=self._settings.timeout_seconds):
            raise exceptions.TimeoutError("another thread is still connecting")
        try:
            if self._client is None:
                self._client = self._new_client()
            return self._client
        finally:
            self._mutex.release()

    def _new_client(self) -> Any:
        settings = self._settings
        arguments = {
            "host": settings.host,
            "port": settings.port,
            "username": settings.username or None,
            "password": self._password or None,
            "socket_timeout": settings.timeout_seconds,
            "socket_connect_timeout": settings.timeout_seconds,
            "max_connections": settings.max_connections,
            "protocol": 2,
        }
        if settings.tls:
            arguments |= {"ssl_ca_certs": settings.ca_file or None, "ssl_check_hostname": True}
        # Once more only: a connection that was kept may be dead. What timed out is not tried again.
        retry = Retry(NoBackoff(), 1, (exceptions.ConnectionError,))
        if settings.cluster:
            arguments["max_connections"] = settings.max_connections + SPARE_CONNECTIONS
            return redis.RedisCluster(**arguments, ssl=settings.tls, retry=retry)
        pool = redis.BlockingConnectionPool(
            **arguments,
            db=settings.db,
            connection_class=redis.SSLConnection if settings.tls else redis.Connection,
            timeout=settings.timeout_seconds,  # for one of the connections
            retry=retry,
        )
        return redis.Redis(connection_pool=pool)

    def _encoded(self, key: str) -> bytes:
        return (self._settings.prefix + key).encode()

    def _numbers(self, command: str, names: Sequence[bytes]) -> list[int]:
        """Return the numbers that one command for each name answers; 0 where something is that is no string.

        On a cluster one node is asked after the other, within one timeout for all of them; what has moved, by itself.
        """
        timeout = self._settings.timeout_seconds
        deadline = time.monotonic() + timeout
        found: dict[bytes, int] = {}

        def ask(group: Sequence[bytes], may_move: bool) -> None:
            if time.monotonic() >= deadline:
                raise exceptions.TimeoutError(f"not all keys within {timeout:g} s")
            found.update(self._on_connection(group[0], lambda c: _ask_numbers(c, command, group, deadline, may_move)))

        for group in self._by_node(names):
            ask(group, may_move=True)
        for name in names:
            if name not in found:
                ask([name], may_move=False)
        return [found[name] for name in names]

    def _by_node(self, names: Sequence[bytes]) -> list[list[bytes]]:
        """Group names by the node that has them."""
        groups: dict[str, list[bytes]] = {}
        for name in names:
            node = self._connected().get_node_from_key(name.decode()).name if self._settings.cluster else ""
            groups.setdefault(node, []).append(name)
        return list(groups.values())

    def _delete(self, names: Sequence[bytes]) -> int:
        return sum(self._numbers("UNLINK", list(dict.fromkeys(names))))  # SCAN may tell a name twice

    # -- values ------------------------------------------------------------------------------------

    def _on_connection(self, name: bytes, action: Callable[[Any], T]) -> T:
        """Return what `action` does with a connection to the server that has the name, when there is one to be had.

        The pools of a cluster's nodes do not wait for that, they raise.
        """
        if not self._turns.acquire(timeout=self._settings.timeout_seconds):
            raise exceptions.TimeoutError(f"all {self._settings.max_connections} connections are in use")
        try:
            return self._follow(name, action)
        finally:
            self._turns.release()

    def _follow(self, name: bytes, action: Callable[[Any], T]) -> T:
        """Do it where the name is, also when that has moved; once more where the connection was dead."""
        client = self._connected()
        is_second = False
        asked: Any = None
        for _ in range(MAX_REDIRECTS):
            node = asked or (client.get_node_from_key(name.decode()) if self._settings.cluster else None)
            pool = client.get_redis_connection(node).connection_pool if node else client.connection_pool
            try:
                with _borrowed(pool) as connection:
                    if asked:
                        connection.send_command("ASKING")
                        connection.read_response()
                    return action(connection)
            except exceptions.AskError as exc:  # MovedError is one
                if not self._settings.cluster:
                    raise L2Error(
                        f"redis {self._name} is a node of a cluster; write redis+cluster://", code=Reason.ERROR
                    ) from exc
                is_moved = isinstance(exc, exceptions.MovedError)
                asked = None if is_moved else client.get_node(host=exc.host, port=exc.port)
                if asked is None:  # or a node that is new
                    client.nodes_manager.initialize()
            except exceptions.ConnectionError as exc:
                if is_second or isinstance(exc, exceptions.AuthenticationError):
                    raise
                asked, is_second = None, True
                if self._settings.cluster:
                    client.nodes_manager.initialize()
            except exceptions.TimeoutError:
                if self._settings.cluster:  # another node may have its slots by the next call
                    with contextlib.suppress(*_ERRORS):
                        client.nodes_manager.initialize()
                raise
        raise exceptions.ClusterError(f"{MAX_REDIRECTS} redirections and no end")

    @contextlib.contextmanager
    def _as_l2_error(self, action: str) -> Iterator[None]:
        try:
            yield
        except _ERRORS as exc:
            # redis-py puts the command of a pipeline in front.
            text = str(exc).rpartition("caused error: ")[2] or type(exc).__name__
            raise L2Error(f"redis {self._name}: cannot {action}: {text}", code=_reason(exc, text)) from exc


def _reason(error: Exception, text: str) -> Reason:
    reason = _REASONS_BY_WORD.get(text.partition(" ")[0])
    if reason is None:
        reason = next((reason for kind, reason in _REASONS_BY_CLASS if isinstance(error, kind)), Reason.ERROR)
    return reason


@contextlib.contextmanager
def _borrowed(pool: Any) -> Iterator[Any]:
    """A connection of the pool. One that was left in the midst of an answer, or whose server is no primary, is closed.

    After a failover the name leads to another server, but a connection that is kept leads to the old one.
    """
    connection = pool.get_connection()
    try:
        yield connection
    except (exceptions.ReadOnlyError, exceptions.MasterDownError):
        connection.disconnect()
        raise
    except exceptions.ResponseError:  # a whole answer
        raise
    except BaseException:
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _bulk(word: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(word), word)


def _send_put(connection: Any, name: bytes, views: Sequence[memoryview], expiry: Sequence[bytes]) -> None:
    """Do a SET; the socket reads the value from where it lies."""
    length = sum(map(len, views))
    head = b"*%d\r\n" % (3 + len(expiry)) + _bulk(b"SET") + _bulk(name) + b"$%d\r\n" % length
    tail = CRLF + b"".join(map(_bulk, expiry))
    connection.send_packed_command([head, *views, tail])
    connection.read_response()


def _receive_get(connection: Any, key: str, name: bytes, views: Sequence[memoryview], timeout_seconds: float) -> bool:
    """Do a GET; the socket writes the value to where it belongs. False when there is none."""
    connection.send_packed_command([b"*2\r\n" + _bulk(b"GET") + _bulk(name)])
    socket = _Socket(connection, time.monotonic() + timeout_seconds)
    with socket:
        scratch = bytearray(SCRATCH_BYTES)
        count = 0
        while (end := scratch.find(CRLF, 0, count)) < 0:
            if count == SCRATCH_BYTES:
                raise exceptions.InvalidResponse("the first line of an answer does not end")
            count += socket.receive_into(memoryview(scratch)[count:])
        line, rest = bytes(scratch[:end]), memoryview(scratch)[end + len(CRLF) : count]
        if line.startswith(b"-"):
            raise connection._parser.parse_error(line[1:].decode(errors="replace"))
        if line == b"$-1":
            return False
        if not line.startswith(b"$") or not line[1:].isdigit():
            raise exceptions.InvalidResponse("an answer to GET is no string")
        check_length(key, int(line[1:]), sum(map(len, views)))
        for view in (*views, memoryview(bytearray(len(CRLF)))):
            copied = min(len(view), len(rest))
            view[:copied], rest, view = rest[:copied], rest[copied:], view[copied:]
            while len(view):
                view = view[socket.receive_into(view) :]
    return True


def _ask_numbers(connection: Any, command: str, names: Sequence[bytes], deadline: float, may_move: bool) -> dict[bytes, int]:
    """Ask one thing of each name in one round trip; 0 where something is that is no string.

    512 names take 0.3 ms of the processor, in a pipeline of redis-py 2.4.

    Args:
        may_move: leave out the names that the server says are elsewhere, instead of raising that.
    """
    word = b"*2\r\n" + _bulk(command.encode())
    connection.send_packed_command([b"".join([word + _bulk(name) for name in names])])
    received, scratch, num_lines = bytearray(), memoryview(bytearray(SCRATCH_BYTES)), 0
    with _Socket(connection, deadline) as socket:
        while num_lines < len(names):
            received += scratch[: socket.receive_into(scratch)]
            num_lines = received.count(b"\n")
    found = {}
    for name, line in zip(names, received.split(CRLF), strict=False):
        if line.startswith(b":") and line[1:].isdigit():
            found[name] = int(line[1:])
        elif line.startswith(b"-WRONGTYPE"):
            found[name] = 0
        elif line.startswith(b"-"):
            error = connection._parser.parse_error(line[1:].decode(errors="replace"))
            if not (may_move and isinstance(error, exceptions.AskError)):
                raise error
        else:
            raise exceptions.InvalidResponse(f"an answer to {command} is no number")
    return found


class _Socket:
    """The socket of a connection of redis-py, whose own parser would copy a value thrice; it knows a deadline, not a pause."""

    def __init__(self, connection: Any, deadline: float) -> None:
        self._socket = connection._sock
        self._timeout = connection.socket_timeout
        self._deadline = deadline

    def receive_into(self, view: memoryview) -> int:
        """Return how many bytes came, at least one. Raises: what redis-py raises."""
        self._socket.settimeout(max(0.001, self._deadline - time.monotonic()))
        try:
            count: int = self._socket.recv_into(view)
        except TimeoutError as exc:
            raise exceptions.TimeoutError("the whole value did not come in time") from exc
        except OSError as exc:
            raise exceptions.ConnectionError(f"while a value came: {exc}") from exc
        if not count:
            raise exceptions.ConnectionError("the server closed the connection while a value came")
        return count

    def __enter__(self) -> _Socket:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._socket.settimeout(self._timeout)
