"""What each adapter makes of a back end that is away, slow, full, forbidden or damaged: the table in docs/l2-adapters.md.

Each fault ends with an error that names its reason, or with a miss; never with a wrong or partial value, and never later than
the adapter's own timeouts allow. Afterwards the same adapter works again as soon as the back end does.
"""

import contextlib
import functools
import http.server
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import redis

from lmcache.storage.l2.base import L2Error
from lmcache.storage.l2.value import HEADER_BYTES, ValueHeader, check_value, unpack_header, value_checksum
from tests.fakes import seconds
from tests.l2_servers import ACCESS, BUCKET, redis_cluster, redis_server, s3_server
from tests.server_process import free_port
from tests.storage.l2.test_contract import content, empty_parts, fetch, parts_of
from tests.tcp_proxy import TcpProxy

MIB = 1 << 20
STOP_SECONDS = 60.0
# What a test waits out where nothing answers; elsewhere a slow machine must not look like a slow server.
QUICK = "timeout-seconds=0.5"
PATIENT = "timeout-seconds=60"
HANG_SECONDS = 120.0
NOBODY = 65534
T = TypeVar("T")
KEY = bytes(range(32))


def reason(action: Callable[[], object]) -> str:
    """The reason with which an action fails; it must not hang."""
    caught: list[L2Error] = []

    def run() -> None:
        with pytest.raises(L2Error) as error:
            action()
        caught.append(error.value)

    assert seconds(run) < HANG_SECONDS
    assert "secret" not in str(caught[0])
    return caught[0].code


def every_call(adapter) -> dict[str, Callable[[], object]]:
    return {
        "put": lambda: adapter.put("key", [memoryview(bytes(5000))]),
        "get": lambda: adapter.get("key", empty_parts(5000)),
        "lengths": lambda: adapter.lengths(["key", "other"]),
        "delete": lambda: adapter.delete(["key"]),
        "ping": adapter.ping,
    }


def works(adapter) -> bool:
    adapter.put("works", [memoryview(b"value")])
    return fetch(adapter, "works", 5) == b"value"


def eventually(action: Callable[[], T]) -> T:
    """What an action returns, once it is in time: on a busy machine an answer can take longer than QUICK."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        try:
            return action()
        except L2Error:
            if time.monotonic() > deadline:
                raise


def put_chunk(adapter, key: str = "key", num_bytes: int = MIB) -> bytes:
    """Put a chunk with its header, as the server does."""
    chunk = content(key, num_bytes)
    header = ValueHeader(key=KEY, rank=0, namespace_id=1, length=num_bytes, checksum=value_checksum(chunk))
    adapter.put(key, [memoryview(header.pack()), *parts_of(chunk)])
    return chunk


def fetch_chunk(adapter, key: str = "key", num_bytes: int = MIB) -> bytes | None:
    """Get it and believe nothing, as the server does."""
    header, chunk = parts = empty_parts(HEADER_BYTES + num_bytes, HEADER_BYTES)
    if not adapter.get(key, parts):
        return None
    check_value(unpack_header(header), KEY, 0, chunk)
    return bytes(chunk)


# -- any back end that is reached by TCP -----------------------------------------------------------


@pytest.fixture(params=["redis", "s3"])
def remote(request, redis_port, s3_port) -> str:
    """A URL with room for the port; the servers are up before a test counts descriptors."""
    if request.param == "redis":
        return f"redis://127.0.0.1:{{port}}?prefix={request.node.name}:&{PATIENT}"
    return (
        f"s3://{BUCKET}/{request.node.name.replace('[', '-').strip(']')}?endpoint=http://127.0.0.1:{{port}}&{ACCESS}&{PATIENT}"
    )


@pytest.fixture
def server_port(remote, redis_port, s3_port) -> int:
    return redis_port if remote.startswith("redis") else s3_port


@pytest.fixture
def proxy(server_port) -> Iterator[TcpProxy]:
    with TcpProxy(server_port) as proxy:
        yield proxy


def test_nobody_listens(remote, make):
    adapter = make(remote.format(port=free_port()))
    assert {reason(call) for call in every_call(adapter).values()} == {"unreachable"}


def test_nobody_answers(remote, make, proxy):
    quick = remote.replace(PATIENT, QUICK)
    adapter = make(quick.format(port=proxy.port))
    assert eventually(lambda: works(adapter))
    proxy.hold.set()
    assert {name: reason(call) for name, call in every_call(adapter).items()} == dict.fromkeys(every_call(adapter), "timeout")
    proxy.forget()
    assert eventually(lambda: works(adapter))


def test_an_answer_that_comes_in_drops_is_too_late(remote, make, proxy):
    """Each drop comes soon after the one before; the whole value does not come in time."""
    quick = remote.replace(PATIENT, QUICK)
    adapter = make(quick.format(port=proxy.port))
    eventually(lambda: put_chunk(adapter))
    proxy.drip.set()
    assert reason(lambda: fetch_chunk(adapter)) == "timeout"
    proxy.forget()
    assert eventually(lambda: works(adapter))


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_connection_that_is_reset_within_a_value(remote, make, proxy, share):
    adapter = make(remote.format(port=proxy.port))
    value = put_chunk(adapter, num_bytes=MIB)
    proxy.cut_down = int(share * MIB)
    # S3's client may take up the rest where the connection broke; a whole value is then as good.
    with contextlib.suppress(L2Error):
        assert fetch_chunk(adapter) == value
    proxy.forget()
    assert fetch_chunk(adapter) == value


def test_a_connection_that_is_reset_within_a_value_is_unreachable(redis_port, make):
    with TcpProxy(redis_port) as proxy:
        adapter = make(f"redis://127.0.0.1:{proxy.port}?prefix=reset:&{PATIENT}")
        put_chunk(adapter)
        proxy.cut_down = MIB // 2
        assert reason(lambda: fetch_chunk(adapter)) == "unreachable"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_a_connection_that_is_reset_within_a_put_leaves_nothing(remote, make, server_port, share):
    with TcpProxy(server_port) as proxy:
        adapter = make(remote.format(port=proxy.port))
        adapter.ping()
        proxy.cut_up = int(share * MIB)
        assert reason(lambda: put_chunk(adapter, "cut")) == "unreachable"
        proxy.forget()
        assert adapter.lengths(["cut"]) == [None]
        assert works(adapter)


def test_a_bit_that_flips_on_the_way_is_found(remote, make, proxy):
    adapter = make(remote.format(port=proxy.port))
    chunk = put_chunk(adapter)
    make_another = make(remote.format(port=proxy.port))  # its connections' bytes are counted from their start
    proxy.flip_down = MIB // 2
    assert reason(lambda: fetch_chunk(make_another)) == "corrupt"
    proxy.forget()
    assert fetch_chunk(make_another) == chunk


def test_a_server_that_comes_back_is_used_again(make, tmp_path):
    port = free_port()
    adapter = make(f"redis://127.0.0.1:{port}?{PATIENT}")
    for number in range(3):
        assert reason(adapter.ping) == "unreachable"
        with redis_server(tmp_path / str(number), port=port):
            assert works(adapter)


# -- Redis -----------------------------------------------------------------------------------------


def test_redis_without_memory_is_full_and_serves_what_it_has(make, tmp_path):
    with redis_server(tmp_path, "--maxmemory", "6mb", "--maxmemory-policy", "noeviction") as port:
        adapter = make(f"redis://127.0.0.1:{port}?timeout-seconds=30")
        chunk = put_chunk(adapter)

        def fill() -> None:
            for number in range(20):
                put_chunk(adapter, f"more-{number}")

        assert reason(fill) == "full"
        assert fetch_chunk(adapter) == chunk
        assert adapter.usage().capacity_bytes == 6 * MIB
        assert adapter.clear() > 1
        assert works(adapter)


def test_redis_that_only_reads_is_read_only(make, tmp_path, redis_port):
    with redis_server(tmp_path, "--replicaof", "127.0.0.1", str(redis_port)) as port:
        adapter = make(f"redis://127.0.0.1:{port}?prefix=replica:&timeout-seconds=30")
        calls = every_call(adapter)
        assert {reason(calls[name]) for name in ("put", "delete", "ping")} == {"read_only"}


@pytest.mark.parametrize(
    ("name", "expected"), [("put", "read_only"), ("delete", "read_only"), ("ping", "read_only"), ("get", "unreachable")]
)
def test_redis_behind_a_name_that_leads_to_a_new_primary(make, tmp_path, name, expected):
    """The old one lives on as a replica, and the connections that there are lead to it."""
    with redis_server(tmp_path / "old") as old, redis_server(tmp_path / "new") as new, TcpProxy(old) as proxy:
        adapter = make(f"redis://127.0.0.1:{proxy.port}?{PATIENT}")
        assert works(adapter)
        with contextlib.closing(redis.Redis(port=old, protocol=2)) as admin:
            if name == "get":  # a replica answers that, unless it may not
                admin.config_set("replica-serve-stale-data", "no")
            admin.execute_command("REPLICAOF", "127.0.0.1", free_port())
        proxy.server_port = new
        call = every_call(adapter)[name]
        assert reason(call) == expected
        call()
        assert works(adapter)


def test_redis_wants_a_password(make, tmp_path):
    (tmp_path / "password").write_text("a secret\n")
    with redis_server(tmp_path, "--requirepass", "a secret") as port:
        for user in ("", ":wrong-secret@", "nobody:wrong-secret@"):
            adapter = make(f"redis://{user}127.0.0.1:{port}?{PATIENT}")
            assert {reason(call) for call in every_call(adapter).values()} == {"denied"}
        assert works(make(f"redis://:a%20secret@127.0.0.1:{port}?{PATIENT}"))
        assert works(make(f"redis://127.0.0.1:{port}?password-file={tmp_path}/password&{PATIENT}"))


def test_redis_forbids_a_command(make, tmp_path):
    with redis_server(tmp_path) as port:
        with contextlib.closing(redis.Redis(port=port, protocol=2)) as admin:
            admin.execute_command("ACL", "SETUSER", "reader", "on", ">secret", "~*", "+get", "+strlen")
        adapter = make(f"redis://reader:secret@127.0.0.1:{port}?{PATIENT}")
        assert fetch(adapter, "key", 10) is None
        assert adapter.lengths(["key"]) == [None]
        calls = every_call(adapter)
        assert {reason(calls[name]) for name in ("put", "delete", "ping")} == {"denied"}
        assert adapter.usage().used_bytes is None


def test_redis_holds_something_else_under_the_name(make, redis_port):
    adapter = make(f"redis://127.0.0.1:{redis_port}?prefix=foreign:")
    with contextlib.closing(redis.Redis(port=redis_port, protocol=2)) as admin:
        admin.rpush("foreign:list", "x")
        admin.set("foreign:short", b"x" * 100)
        put_chunk(adapter, "flipped")
        admin.setrange("foreign:flipped", HEADER_BYTES + 1000, b"flip")
    assert reason(lambda: fetch_chunk(adapter, "list")) == "corrupt"
    assert adapter.lengths(["list", "short"]) == [None, 100]  # a put replaces it
    assert reason(lambda: fetch_chunk(adapter, "short")) == "corrupt"
    assert reason(lambda: fetch_chunk(adapter, "flipped")) == "corrupt"
    assert adapter.delete(["list", "short", "flipped"]) == 3


def test_what_answers_is_no_redis(make):
    with stub_http_server(200) as port:
        adapter = make(f"redis://127.0.0.1:{port}?{PATIENT}")
        assert {reason(call) for call in every_call(adapter).values()} <= {"error", "unreachable"}


def test_a_cluster_that_moves_a_slot_is_followed(make, redis_cluster_ports):
    adapter = make(f"redis+cluster://127.0.0.1:{redis_cluster_ports[1]}?prefix=moving:&timeout-seconds=30")
    chunk = put_chunk(adapter, "before")
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(contextlib.closing(redis.Redis(port=port, protocol=2))) for port in redis_cluster_ports]
        slot = int(nodes[0].execute_command("CLUSTER", "KEYSLOT", "moving:before"))
        ids = [node.execute_command("CLUSTER", "MYID").decode() for node in nodes]
        source = next(index for index, node in enumerate(nodes) if node.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot))
        target = (source + 1) % len(nodes)
        nodes[target].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        nodes[source].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        nodes[source].execute_command("MIGRATE", "127.0.0.1", redis_cluster_ports[target], "moving:before", 0, 30_000)
        assert fetch_chunk(adapter, "before") == chunk  # ASK
        assert adapter.lengths(["other", "before"]) == [None, HEADER_BYTES + MIB]
        assert put_chunk(adapter, "before") == chunk
        for index in (target, source, 3 - target - source):
            nodes[index].execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        assert fetch_chunk(adapter, "before") == chunk  # MOVED
        assert adapter.lengths(["before"]) == [HEADER_BYTES + MIB]
        assert adapter.clear() == 1


def test_a_cluster_that_stands_still_is_late_and_then_used_again(make, tmp_path):
    with redis_cluster(tmp_path, num_nodes=1) as [port]:
        with contextlib.closing(redis.Redis(port=port, protocol=2)) as admin:
            process_id = admin.info("server")["process_id"]
        adapter, fresh = (make(f"redis+cluster://127.0.0.1:{port}?{QUICK}") for _ in range(2))
        chunk = eventually(lambda: put_chunk(adapter, "kept"))  # what was sent to the others may be done late
        os.kill(process_id, signal.SIGSTOP)
        try:
            for one in (adapter, fresh):
                assert {reason(call) for call in every_call(one).values()} <= {"timeout", "unreachable"}
        finally:
            os.kill(process_id, signal.SIGCONT)
        for one in (adapter, fresh):
            assert eventually(functools.partial(fetch_chunk, one, "kept")) == chunk


def test_a_node_of_a_cluster_that_stands_still_is_asked_once_for_all_its_keys(make, tmp_path):
    keys = [f"key-{number}" for number in range(60)]
    with redis_cluster(tmp_path) as ports, contextlib.closing(redis.Redis(port=ports[-1], protocol=2)) as admin:
        adapter = make(f"redis+cluster://127.0.0.1:{ports[0]}?{QUICK}")
        assert eventually(lambda: adapter.lengths(keys)) == [None] * len(keys)
        before = admin.info("stats")["total_connections_received"]
        process_id = admin.info("server")["process_id"]
        os.kill(process_id, signal.SIGSTOP)
        try:
            assert reason(lambda: adapter.lengths(keys)) == "timeout"
        finally:
            os.kill(process_id, signal.SIGCONT)
        assert admin.info("stats")["total_connections_received"] - before < 10  # some of them ask who has which slots
        assert eventually(lambda: adapter.lengths(keys)) == [None] * len(keys)


def test_a_certificate_that_nobody_trusts_is_unreachable_and_says_why(make, redis_tls):
    port, _ = redis_tls
    adapter = make(f"rediss://localhost:{port}?{PATIENT}")
    with pytest.raises(L2Error, match="certificate verify failed") as caught:
        adapter.ping()
    assert caught.value.code == "unreachable"


# -- object stores ---------------------------------------------------------------------------------


@contextlib.contextmanager
def stub_http_server(status: int, code: str = "") -> Iterator[int]:
    """Answers every request with one status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

        def log_message(self, *args) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(STOP_SECONDS)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "", "denied"),
        (403, "AccessDenied", "denied"),
        (403, "QuotaExceeded", "full"),
        (405, "MethodNotAllowed", "read_only"),
        (404, "NoSuchBucket", "unreachable"),
        (503, "SlowDown", "unreachable"),
        (507, "XMinioStorageFull", "full"),
        (418, "", "error"),
    ],
)
def test_an_object_store_refuses_a_put(make, s3_port, status, code, expected):
    with stub_http_server(status, code) as port:
        adapter = make(f"s3://{BUCKET}/a?endpoint=http://127.0.0.1:{port}&{ACCESS}&{PATIENT}")
        assert reason(lambda: adapter.put("key", [memoryview(b"value")])) == expected


def test_an_object_store_knows_neither_key_nor_signature(make, s3_port, tmp_path, monkeypatch):
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1")  # the bucket's making; then every request is checked
    with s3_server(tmp_path) as port:
        adapter = make(f"s3://{BUCKET}/a?endpoint=http://127.0.0.1:{port}&{ACCESS}&{PATIENT}")
        assert {reason(call) for call in every_call(adapter).values()} == {"denied"}


def test_a_bucket_that_is_not_there(make, s3_port):
    adapter = make(f"s3://no-such-bucket/a?endpoint=http://127.0.0.1:{s3_port}&{ACCESS}&{PATIENT}")
    assert reason(adapter.ping) == "unreachable"
    assert reason(lambda: adapter.put("key", [memoryview(b"value")])) == "unreachable"
    assert fetch(adapter, "key", 5) is None
    assert adapter.lengths(["key"]) == [None]


def test_an_object_that_was_cut_or_changed(make, s3_port):
    adapter = make(f"s3://{BUCKET}/changed?endpoint=http://127.0.0.1:{s3_port}&{ACCESS}")
    chunk = put_chunk(adapter)
    value = fetch(adapter, "key", HEADER_BYTES + MIB)
    assert value is not None
    for changed in (value[:-1], value[: HEADER_BYTES - 1], value[:-1] + bytes([value[-1] ^ 1]), bytes(len(value))):
        adapter.put("key", [memoryview(changed)])
        assert reason(lambda: fetch_chunk(adapter)) == "corrupt"
    assert put_chunk(adapter) == chunk == fetch_chunk(adapter)


# -- a folder --------------------------------------------------------------------------------------


@pytest.fixture
def mount(tmp_path) -> Iterator[Callable[..., Path]]:
    """Mount memory file systems of a given size; skips where that is not permitted."""
    mounted: list[Path] = []

    def mount_one(size: str) -> Path:
        path = tmp_path / f"mount{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "lmcache-test", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STOP_SECONDS)
        if done.returncode:
            pytest.skip(f"mounting a file system is not permitted here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount_one
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=STOP_SECONDS)


def fill_up(directory: Path) -> None:
    with (directory / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))


def test_a_full_disk_takes_new_values_for_old_ones(make, mount):
    """The capacity promises more than there is: what is ours goes, as it would at the capacity."""
    directory = mount("4m")
    adapter = make(f"fs://{directory}/l2?capacity-gb=1")
    for number in range(12):
        put_chunk(adapter, f"key-{number}")
    assert fetch_chunk(adapter, "key-11") == content("key-11", MIB)
    assert fetch_chunk(adapter, "key-0") is None
    assert list((directory / "l2" / "tmp").glob("*-*")) == []


def test_a_disk_that_others_filled_is_full_and_serves_what_it_has(make, mount):
    directory = mount("4m")
    adapter = make(f"fs://{directory}/l2?capacity-gb=1")
    adapter.ping()
    fill_up(directory)
    assert reason(lambda: put_chunk(adapter)) == "full"
    assert list((directory / "l2" / "tmp").glob("*-*")) == []
    assert adapter.lengths(["key"]) == [None]
    (directory / "filler").unlink()
    assert put_chunk(adapter) == fetch_chunk(adapter)


def test_a_read_only_file_system_serves_what_it_has(make, mount):
    directory = mount("8m")
    adapter = make(f"fs://{directory}/l2?capacity-gb=1")
    chunk = put_chunk(adapter)
    adapter.close()
    remount = ["mount", "-o", "remount,ro", str(directory)]
    subprocess.run(remount, check=True, timeout=STOP_SECONDS)
    adapter = make(f"fs://{directory}/l2?capacity-gb=1")
    assert fetch_chunk(adapter) == chunk
    assert adapter.lengths(["key", "other"]) == [HEADER_BYTES + MIB, None]
    calls = every_call(adapter)
    assert {reason(calls[name]) for name in ("put", "delete", "ping")} == {"read_only"}


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's powers, which pass by permissions."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_folder_without_permission(make, tmp_path):
    adapter = make(f"fs://{tmp_path}/l2?capacity-gb=1")
    put_chunk(adapter)
    adapter.close()
    (tmp_path / "l2").chmod(0)
    try:
        with as_nobody():
            found = {name: reason(call) for name, call in every_call(adapter).items()}
    finally:
        (tmp_path / "l2").chmod(0o700)
    assert set(found.values()) == {"denied"}
    assert works(adapter)


def test_a_file_where_the_folder_should_be(make, tmp_path):
    (tmp_path / "file").write_text("")
    adapter = make(f"fs://{tmp_path}/file/l2?capacity-gb=1")
    assert {reason(call) for call in every_call(adapter).values()} == {"unreachable"}


@pytest.mark.parametrize("direct", [0, 1])
def test_a_file_that_was_cut_or_changed(make, tmp_path, direct):
    adapter = make(f"fs://{tmp_path}/l2?capacity-gb=1&direct-io={direct}")
    chunk = put_chunk(adapter)
    [path] = (tmp_path / "l2").rglob("key.kv")
    value = path.read_bytes()
    flipped = value[:-1] + bytes([value[-1] ^ 1])
    for changed in (value[:-1], value[:5000], b"", flipped, value + b"x", bytes(len(value)), b"\1" * HEADER_BYTES):
        path.write_bytes(changed)
        assert reason(lambda: fetch_chunk(adapter)) == "corrupt"
    assert put_chunk(adapter) == chunk == fetch_chunk(adapter)


def test_a_folder_under_the_name_of_a_value(make, tmp_path):
    adapter = make(f"fs://{tmp_path}/l2?capacity-gb=1")
    put_chunk(adapter)
    [path] = (tmp_path / "l2").rglob("key.kv")
    path.unlink()
    path.mkdir()
    assert reason(lambda: fetch_chunk(adapter)) in ("error", "corrupt")
    shutil.rmtree(path)
    assert works(adapter)
