"""Connections that begin and do not go on."""

import contextlib
import http.client
import socket
from pathlib import Path

from tests.chaos.waiting import wait_until
from tests.server_process import LmcacheServer, free_port
from tests.zmtp import GREETING, ready

NUM_HTTP = 100
NUM_METRICS = 40
NUM_ZMQ = 60


def test_half_open_connections_are_closed_and_one_in_use_stays(pool_dir):
    metrics_port = free_port()
    with (
        LmcacheServer(["--pool-dir", str(pool_dir), "--metrics-port", str(metrics_port)], l1_size_gb=8 / 1024) as server,
        contextlib.ExitStack() as opened,
        contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=60.0)) as in_use,
    ):

        def is_alive() -> bool:
            in_use.request("GET", "/livez")
            return b"ok" in in_use.getresponse().read()

        def connect(port: int, said: bytes) -> None:
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(said)

        assert is_alive()
        in_use.auto_open = 0  # a closed connection is an error from here on
        descriptors = Path(f"/proc/{server.pid}/fd")
        num_before = len(list(descriptors.iterdir()))
        for number in range(NUM_HTTP):
            connect(server.http_port, (b"", b"GET /livez HTTP/1.1\r\nHost:")[number % 2])
        for number in range(NUM_METRICS):
            connect(metrics_port, (b"", b"GET /metrics HTTP/1.1\r\nHost:")[number % 2])
        for number in range(NUM_ZMQ):
            connect(server.port, (b"", GREETING[:20], GREETING, GREETING + ready()[:10])[number % 4])
        wait_until(lambda: is_alive() and len(list(descriptors.iterdir())) <= num_before + 1, "they are closed")
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", metrics_port, timeout=60.0)) as scraper:
            scraper.request("GET", "/metrics")
            assert b"lmcache_healthy 1.0" in scraper.getresponse().read()
