"""The HTTP port is fed with spoilt requests and no HTTP at all, and goes on serving as if nothing were."""

import random
import socket
import struct
import time
import urllib.parse
from collections import Counter

import httpx
import pytest

from tests.chaos.conftest import directory_left_empty
from tests.fuzz.mutate import mutate_bytes
from tests.fuzz.watch import Watch
from tests.server_process import LmcacheServer

ANSWER_SECONDS = 60.0
MAX_IDLE_SOCKETS = 40
RESET = struct.pack("ii", 1, 0)
TOKEN = "let-me"
# Each must have been answered; a machine that is too busy to have come to that gets more time.
WANTED = {"200", "400", "401", "404", "405", "422"}
EXTRA_SECONDS = 120.0

METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "G\0T", "X" * 100, "")
PATHS = (
    "/livez", "/readyz", "/healthcheck", "/api/healthcheck", "/api/status", "/api/clear", "/metrics", "/openapi.json",
    "/", "*", "//livez", "/livez/", "/api/../api/status", "/../../etc/passwd", "/%2e%2e/%00", "/api/clear/x", "/docs",
    "/api%2fstatus", "/" + "a" * 5000, "/%ff%fe", "/run_script", "/env", "http://other/livez", "/livez#x", "\\livez",
)  # fmt: skip
QUERIES = (
    "", "dry_run=true", "dry_run=maybe", "force=1&timeout_seconds=0.01", "timeout_seconds=nan", "timeout_seconds=inf",
    "timeout_seconds=-1", "timeout_seconds=1e999", "force=true&force=false", "dry_run", "&&&=", "x=" + "y" * 5000,
    "dry_run=%00", "timeout_seconds=%ff", "timeout_seconds=0x10", "[]=1", "dry_run=true;force=true",
)  # fmt: skip
HEADERS = (
    "Host: localhost", "Host: ", "Host: a\r\nHost: b", "Authorization: Bearer let-me", "Authorization: Bearer",
    "Authorization: Basic \xff\xfe", "Authorization: Bearer \u00e9", "Origin: http://evil", "Connection: close",
    "Connection: Upgrade\r\nUpgrade: websocket", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c", "Expect: 100-continue",
    "Content-Length: 5", "Content-Length: -1", "Content-Length: 99999999999999999999", "Content-Length: 5\r\nContent-Length: 6",
    "Transfer-Encoding: chunked", "Transfer-Encoding: chunked\r\nContent-Length: 3", "Transfer-Encoding: gzip, chunked",
    "Accept: application/openmetrics-text", "Accept-Encoding: gzip", "Range: bytes=0-0,1-1", "Content-Type: application/json",
    "X-Long: " + "z" * 20_000, "Bad Name: x", ": x", "NoColon", " folded: x", "X: \0", "\r\nGET /livez HTTP/1.1\r\n",
)  # fmt: skip
BODIES = (
    b"",
    b"hello",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"-1\r\n\r\n",
    b"{}",
    b"\0" * 1000,
    b"a" * 200_000,
)
VERSIONS = ("HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1.1 x", "", "http/1.1")


@pytest.mark.timeout(1500)
def test_nothing_sent_to_the_http_port_harms_the_server(fuzz_seconds, rng):
    counts: Counter[str] = Counter()
    with directory_left_empty() as pool_dir:
        flags = ["--pool-dir", str(pool_dir), "--client-lease-seconds", "1", "--log-level", "WARNING"]
        env = {"LMCACHE_HTTP_TOKEN": TOKEN}
        with LmcacheServer(flags, env=env, l1_size_gb=8 / 1024) as server:
            httpx.get(f"{server.http_url}/openapi.json", timeout=ANSWER_SECONDS)  # what is imported on first use is
            watch = Watch(server)
            try:
                fuzz(server, watch, rng, counts, fuzz_seconds)
                print(watch.finish())
            finally:
                watch.close()
    print(f"{sum(counts.values())} requests: {dict(sorted(counts.items()))}")
    assert not [status for status in counts if status.startswith("5") and status != "503"]
    assert counts.keys() >= WANTED


def fuzz(server: LmcacheServer, watch: Watch, rng: random.Random, counts: Counter[str], seconds: float) -> None:
    """Send one request after another, good and bad, until the time is up."""
    deadline = time.monotonic() + seconds
    idle: list[socket.socket] = []
    with httpx.Client(base_url=server.http_url, timeout=ANSWER_SECONDS) as client:
        try:
            while time.monotonic() < deadline or (not counts.keys() >= WANTED and time.monotonic() < deadline + EXTRA_SECONDS):
                if rng.random() < 0.4:
                    counts[str(good_request(client, rng).status_code)] += 1
                else:
                    counts[raw_request(server.http_port, rng, idle)] += 1
                if watch.num_steps % 50 == 0:
                    assert client.get("/livez").status_code == 200
                watch.step()
        finally:
            for left in idle:
                left.close()


def good_request(client: httpx.Client, rng: random.Random) -> httpx.Response:
    """A request that a client of this server sends, or a person with a mistake in mind."""
    path = rng.choice(PATHS[:8] + PATHS[-8:-5])
    query = f"?{urllib.parse.quote(rng.choice(QUERIES), safe='=&')}"
    headers = {"Authorization": f"Bearer {TOKEN}"} if rng.random() < 0.7 else {}
    return client.request(rng.choice(("GET", "GET", "POST", "POST", "HEAD", "DELETE")), path + query, headers=headers)


def raw_request(port: int, rng: random.Random, idle: list[socket.socket]) -> str:
    """Bytes on a new connection; returns the status of the first reply, or what became of the connection."""
    connection = socket.create_connection(("127.0.0.1", port), ANSWER_SECONDS)
    outcome = "not read"
    try:
        connection.sendall(raw_bytes(rng))
        if rng.random() < 0.7:
            connection.shutdown(socket.SHUT_WR)
            status = connection.recv(4096)[:12]
            outcome = status[9:12].decode() if status.startswith(b"HTTP/1.") else "closed"
    except TimeoutError:
        raise  # neither an answer nor the end of the connection
    except OSError:
        outcome = "reset"
    idle.append(connection)
    while len(idle) > MAX_IDLE_SOCKETS or (idle and rng.random() < 0.7):
        closed = idle.pop(rng.randrange(len(idle)))
        if rng.random() < 0.3:
            closed.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        closed.close()
    return outcome


def raw_bytes(rng: random.Random) -> bytes:
    """A request line, headers and body of odd parts, or their bytes spoilt, cut short or repeated."""
    kind = rng.random()
    if kind < 0.05:
        return rng.choice(
            (b"", b"\xff" * 64, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01\x02\x00", rng.randbytes(5000))
        )
    headers = rng.sample(HEADERS, rng.choice((0, 1, 2, 5)))
    if kind < 0.08:
        headers += [f"X-{number}: y" for number in range(500)]
    line = f"{rng.choice(METHODS)} {rng.choice(PATHS)}?{rng.choice(QUERIES)} {rng.choice(VERSIONS)}"
    request = "\r\n".join([line, *headers, "", ""]).encode("latin-1", "replace") + rng.choice(BODIES)
    if kind < 0.30:
        return mutate_bytes(rng, request)
    if kind < 0.40:
        return request[: rng.randrange(len(request))]
    return request * rng.choice((1, 1, 1, 20))
