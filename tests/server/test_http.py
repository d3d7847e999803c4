"""The HTTP frontend: what each route answers, who may change the cache, and that health means that the loop answers."""

import os
import socket
import threading
from concurrent.futures import Future

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import UsageError
from lmcache.metrics import SPECS, Kind
from lmcache.protocol import Clear, EndSession
from lmcache.server import http_frontend, http_routes
from tests.fakes import seconds
from tests.pools import content, keys, server_in, status_of, wait_until
from tests.server_process import free_port

ROUTES = {
    "/livez": {"get"},
    "/readyz": {"get"},
    "/healthcheck": {"get"},
    "/api/healthcheck": {"get"},
    "/api/status": {"get"},
    "/api/clear": {"post"},
    "/metrics": {"get"},
}
TOKEN = "secret-token"


def answers(url: str) -> bool:
    try:
        httpx.get(f"{url}/livez", timeout=5, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def http_server(directory, **settings):
    return server_in(directory, no_http=False, **settings)


def client_of(server, **options) -> httpx.Client:
    """A client once the frontend's libraries are imported; that happens after the start."""
    wait_until(lambda: answers(server.endpoints.http), "HTTP")
    return httpx.Client(base_url=server.endpoints.http, timeout=60, trust_env=False, **options)


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    with http_server(tmp_path_factory.mktemp("pool")) as server, client_of(server) as http:
        http.get("/livez")
        yield server


@pytest.fixture
def server(shared_server):
    """One server for all tests that leave it as they found it; it has no chunks when a test begins."""
    shared_server._owner.call(Clear()).result(timeout=60)
    return shared_server


@pytest.fixture(scope="module")
def token_server(tmp_path_factory):
    with http_server(tmp_path_factory.mktemp("pool"), token=TOKEN) as server, client_of(server) as http:
        http.get("/livez")
        yield server


@pytest.fixture
def http(server):
    with client_of(server) as http:
        yield http


def store(server, *numbers: int) -> None:
    with KVCacheClient(server.endpoints.zmq) as client:
        client.store(keys(*numbers), [content(number, 4096) for number in numbers])


# -- what can be asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthcheck", "/api/healthcheck"])
def test_a_healthy_server_says_ok(http, path):
    reply = http.get(path)
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "problems": []})


def test_the_status_is_the_one_that_zmq_gives(server, http):
    over_http, over_zmq = http.get("/api/status").json(), status_of(server)
    for status in (over_http, over_zmq):
        del status["uptime_seconds"]
    assert over_http == over_zmq
    assert over_http["http_endpoint"] == server.endpoints.http
    assert over_http["config"]["chunk_size"] == {"value": 16, "source": "default"}


def test_metrics_are_exactly_the_declared_ones_at_their_values(server, http):
    """OBS-3."""
    store(server, 1, 2)
    reply = http.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(reply.text)}
    assert set(families) == {spec.name for spec in SPECS}
    assert {name: family.type for name, family in families.items()} == {spec.name: spec.kind.value for spec in SPECS}
    assert families["lmcache_stored_chunks"].samples[0].value == status_of(server)["counters"]["stored_chunks"] >= 2
    assert families["lmcache_l1_chunks"].samples[0].value == 2
    assert families["lmcache_healthy"].samples[0].value == 1
    assert "text/plain" in reply.headers["content-type"]
    assert all(spec.help in reply.text for spec in SPECS)
    assert any(spec.kind is Kind.HISTOGRAM for spec in SPECS)


def test_metrics_can_be_left_out(tmp_path):
    with http_server(tmp_path, no_metrics=True) as server, client_of(server) as http:
        assert http.get("/metrics").status_code == 404
        assert "/metrics" not in http.get("/openapi.json").json()["paths"]


def test_without_http_nothing_listens_and_zmq_serves(tmp_path):
    before = {thread.ident for thread in threading.enumerate()}
    with server_in(tmp_path, no_http=True) as server:
        assert server.endpoints.http == ""
        assert status_of(server)["http_endpoint"] == ""
        started = {thread.name for thread in threading.enumerate() if thread.ident not in before}
        assert started == {"lmcache-owner"}


def test_metrics_can_have_a_port_of_their_own(tmp_path):
    port = free_port()
    with server_in(tmp_path, no_http=True, metrics_port=port), httpx.Client(timeout=60, trust_env=False) as http:
        text = http.get(f"http://127.0.0.1:{port}/metrics").text
        assert {family.name for family in text_string_to_metric_families(text)} == {spec.name for spec in SPECS}


def test_a_scrape_of_that_port_is_of_the_moment_and_a_silent_owner_is_not_healthy(tmp_path, monkeypatch):
    port = free_port()
    monkeypatch.setattr("lmcache.server.app.OWNER_DEADLINE_SECONDS", 60.0)
    with server_in(tmp_path, no_http=True, metrics_port=port) as server, httpx.Client(timeout=90, trust_env=False) as http:

        def scrape(query: str = "") -> dict[str, float]:
            families = text_string_to_metric_families(http.get(f"http://127.0.0.1:{port}/metrics{query}").text)
            return {sample.name: sample.value for family in families for sample in family.samples}

        first = scrape()
        assert (first["lmcache_healthy"], first["lmcache_l1_capacity_bytes"]) == (
            1,
            server.service.storage.l1.pool.header.capacity_bytes,
        )
        assert scrape("?name[]=lmcache_uptime_seconds")["lmcache_uptime_seconds"] > first["lmcache_uptime_seconds"]
        monkeypatch.setattr("lmcache.server.app.OWNER_DEADLINE_SECONDS", 0.1)
        monkeypatch.setattr(server._owner, "call", lambda request: Future())
        assert scrape()["lmcache_healthy"] == 0


# -- what cannot ------------------------------------------------------------------------------------------------------


def test_exactly_the_known_routes_are_served_and_none_runs_code_or_reads_files(http):
    """SEC-1."""
    paths = http.get("/openapi.json").json()["paths"]
    assert {path: set(methods) for path, methods in paths.items()} == ROUTES
    for path, methods in ROUTES.items():
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            status = http.request(method, path).status_code
            assert (status == 405) == (method.lower() not in methods), (method, path)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/redoc",
        "/env",
        "/run_script",
        "/conf",
        "/api",
        "/static/../etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/api/status/../../etc/passwd",
        "//etc/passwd",
    ],
)
def test_everything_else_is_not_found(http, path):
    assert http.get(path).status_code in (404, 405)
    assert http.post(path, content=b"print(1)").status_code in (404, 405)


def test_no_answer_shows_the_environment_or_the_token(token_server, monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "swordfish")
    with client_of(token_server) as http:
        for path in (*ROUTES, "/openapi.json"):
            reply = http.get(path)
            for secret in ("swordfish", TOKEN, "SOME_PASSWORD", os.environ["PATH"]):
                assert secret not in reply.text
                assert secret not in str(reply.headers)
        assert TOKEN not in str(status_of(token_server))


# -- clearing ---------------------------------------------------------------------------------------------------------


def test_a_clear_counts_what_it_removes_and_a_dry_run_removes_nothing(server, http):
    store(server, 1, 2, 3)
    with KVCacheClient(server.endpoints.zmq) as client:
        client.lookup(keys(1), "r")
        expected = {"objects": 2, "removed_bytes": 8192, "kept_objects": 1, "kept_bytes": 4096}
        for dry_run in ("true", "false"):
            reply = http.post("/api/clear", params={"dry_run": dry_run})
            assert reply.status_code == 200
            assert {name: reply.json()[name] for name in expected} == expected
            assert set(reply.json()) == {*expected, "remaining_objects", "seconds", "tiers"}
        assert client.lookup(keys(2), pin=False).hit_chunks == 0


def test_a_forced_clear_waits_for_pins_until_its_deadline_and_for_their_release(server, http):
    store(server, 1)
    with KVCacheClient(server.endpoints.zmq) as client:
        client.lookup(keys(1), "r")
        reply = http.post("/api/clear", params={"force": True, "timeout_seconds": 0.1}).json()
        assert (reply["objects"], reply["kept_objects"]) == (0, 1)
        assert reply["seconds"] >= 0.1
        timer = threading.Timer(0.1, lambda: server._owner.call(EndSession(request_id="r")).result(timeout=60))
        timer.start()
        reply = http.post("/api/clear", params={"force": True, "timeout_seconds": 60}).json()
        timer.join(60)
        assert (reply["objects"], reply["kept_objects"]) == (1, 0)


@pytest.mark.parametrize(
    "params",
    [
        {"timeout_seconds": -1},
        {"timeout_seconds": 1e9},
        {"timeout_seconds": "nan"},
        {"timeout_seconds": "inf"},
        {"timeout_seconds": "x"},
        {"force": "maybe"},
        {"dry_run": "2"},
    ],
)
def test_a_parameter_out_of_range_is_refused_and_nothing_removed(server, http, params):
    store(server, 1)
    assert http.post("/api/clear", params=params).status_code == 422
    assert status_of(server)["l1"]["chunks"] == 1


# -- who may ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 401),
        ({"Authorization": ""}, 401),
        ({"Authorization": TOKEN}, 401),
        ({"Authorization": f"Basic {TOKEN}"}, 401),
        ({"Authorization": f"Bearer {TOKEN}x"}, 401),
        ({"Authorization": f"Bearer {TOKEN[:-1]}"}, 401),
        ({"Authorization": "Bearer \xe9"}, 401),
        ({"Authorization": f"Bearer {TOKEN}"}, 200),
        ({"Authorization": f"Bearer {TOKEN}", "Origin": "https://evil.example"}, 403),
    ],
)
def test_changing_needs_the_token_where_there_is_one(token_server, headers, expected):
    server = token_server
    with client_of(server) as http:
        store(server, 1)
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        assert http.post("/api/clear", headers=raw).status_code == expected
        assert status_of(server)["l1"]["chunks"] == (0 if expected == 200 else 1)
        for path in ("/livez", "/readyz", "/api/status", "/metrics"):
            assert http.get(path).status_code == 200, "reading needs none"


def test_a_token_beyond_ascii_can_be_presented(tmp_path):
    with http_server(tmp_path, token="clé") as server, client_of(server) as http:
        assert http.post("/api/clear", headers=[(b"Authorization", "Bearer clé".encode())]).status_code == 200
        assert http.post("/api/clear", headers=[(b"Authorization", b"Bearer cle")]).status_code == 401


@pytest.mark.parametrize(
    ("token", "headers", "expected"), [("", {}, 403), (TOKEN, {}, 401), (TOKEN, {"Authorization": f"Bearer {TOKEN}"}, 200)]
)
def test_beyond_loopback_nothing_can_be_changed_without_a_token(tmp_path, token, headers, expected):
    """SEC-1: 0.0.0.0, asked from this host."""
    with http_server(tmp_path, token=token, http_host="0.0.0.0") as server:
        server.endpoints.http = server.endpoints.http.replace("0.0.0.0", "127.0.0.1")
        with client_of(server) as http:
            store(server, 1)
            assert http.post("/api/clear", headers=headers).status_code == expected
            assert http.get("/livez").status_code == 200
            assert status_of(server)["l1"]["chunks"] == (0 if expected == 200 else 1)


def test_a_web_page_cannot_clear_the_cache_of_whoever_visits_it(server, http):
    store(server, 1)
    assert http.post("/api/clear", headers={"Origin": "https://evil.example"}).status_code == 403
    assert status_of(server)["l1"]["chunks"] == 1


# -- health means that the loop answers -------------------------------------------------------------------------------


def test_a_blocked_owner_thread_is_unhealthy_within_the_deadline_and_healthy_after(tmp_path, monkeypatch):
    monkeypatch.setattr(http_routes, "OWNER_DEADLINE_SECONDS", 0.2)
    with http_server(tmp_path) as server, client_of(server) as http:
        block_and_ask(server, http, monkeypatch)


def block_and_ask(server, http, monkeypatch):
    blocked, release = threading.Event(), threading.Event()

    def tick() -> float:
        blocked.set()
        release.wait(300)
        return 0.01

    monkeypatch.setattr(server.service, "tick", tick)
    assert blocked.wait(60)
    try:
        for path in ("/livez", "/readyz", "/api/status", "/metrics"):
            reply = http.get(path, timeout=60)
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "owner_silent"
    finally:
        release.set()
    wait_until(lambda: http.get("/livez").status_code == 200)


def test_a_server_that_cannot_do_its_work_is_alive_and_not_ready(server, http, monkeypatch):
    monkeypatch.setattr(server.service.storage, "run_pass", lambda: 1 // 0)
    wait_until(lambda: http.get("/readyz").status_code == 503)
    for path in ("/readyz", "/healthcheck", "/api/healthcheck"):
        reply = http.get(path)
        assert reply.status_code == 503
        assert reply.json()["status"] == "fail"
        assert "maintenance fails" in reply.json()["problems"][0]
    assert http.get("/livez").status_code == 200
    assert http.get("/api/status").json()["healthy"] is False


# -- sockets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw", [b"\r\n\r\n", b"junk\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\xff" * 1000, b"GET /" + b"x" * 100_000]
)
def test_bytes_that_are_no_http_are_answered_or_hung_up_on_and_the_next_request_served(server, http, raw):
    host, port = server.endpoints.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 60) as peer:
        peer.sendall(raw)
        peer.shutdown(socket.SHUT_WR)
        try:
            while peer.recv(4096):
                pass
        except ConnectionResetError:
            pass
    assert http.get("/livez").status_code == 200


def test_a_connection_that_asks_and_never_reads_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(http_frontend, "PEER_TIMEOUT_MS", 500)
    with http_server(tmp_path) as server, client_of(server) as http, socket.socket() as peer:
        http.get("/livez")
        http.close()
        [frontend] = server._frontends
        connections = frontend._server.server_state.connections
        wait_until(lambda: not connections)
        host, port = server.endpoints.http.removeprefix("http://").split(":")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        peer.connect((host, int(port)))
        peer.sendall(b"GET /api/status HTTP/1.1\r\nHost: x\r\n\r\n" * 2000)
        wait_until(lambda: any(connection.flow.write_paused for connection in connections), "an answer that is not read")
        wait_until(lambda: not connections, "its end")


def test_stopping_does_not_wait_for_a_connection_that_says_nothing(tmp_path):
    with http_server(tmp_path) as server:
        wait_until(lambda: answers(server.endpoints.http))
        host, port = server.endpoints.http.removeprefix("http://").split(":")
        idle = socket.create_connection((host, int(port)), 60)
        half = socket.create_connection((host, int(port)), 60)
        half.sendall(b"POST /api/clear HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        assert seconds(server.stop) < 30
        idle.close()
        half.close()
        server.stop()  # again: nothing happens


def test_a_port_in_use_is_one_usage_error_before_a_pool_is_made(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for setting in ({"http_port": taken.getsockname()[1], "no_http": False}, {"metrics_port": taken.getsockname()[1]}):
            with (
                pytest.raises(UsageError, match=r"cannot listen on http://127\.0\.0\.1") as caught,
                server_in(tmp_path, **setting),
            ):
                pass
            assert "-port" in caught.value.hint
            assert list(tmp_path.iterdir()) == []
