"""How much does our protocol add to a bare pyzmq round trip?

Floor: a DEALER/ROUTER echo of the same bytes, the echo in a process of its own like the server. The two take turns, so that the
machine's drift hits both. Run: python benchmarks/round_trip.py
"""

from __future__ import annotations

import subprocess
import sys
import time

import zmq
from common import percentile, report, server

from lmcache.client.mq import MessageQueueClient
from lmcache.protocol import Noop, encode

ROUNDS = 20
PER_ROUND = 500

ECHO = """
import sys, zmq
socket = zmq.Context().socket(zmq.ROUTER)
print(socket.bind_to_random_port("tcp://127.0.0.1"), flush=True)
while True:
    frames = socket.recv_multipart()
    socket.send_multipart([*frames[:2], bytes(int(sys.argv[1]))])
"""


def time_noops(client: MessageQueueClient) -> list[float]:
    """Return seconds of one round of NOOPs."""
    taken = []
    for _ in range(PER_ROUND):
        started = time.perf_counter()
        client.call(Noop())
        taken.append(time.perf_counter() - started)
    return taken


def time_echoes(dealer: zmq.Socket[bytes], header: bytes) -> list[float]:
    """Return seconds of one round of bare echoes."""
    taken = []
    for number in range(PER_ROUND):
        started = time.perf_counter()
        dealer.send_multipart([number.to_bytes(8, "little"), header])
        dealer.recv_multipart()
        taken.append(time.perf_counter() - started)
    return taken


def main() -> None:
    """Print p50 and p99 of both, and their ratio."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with server("--l1-size-gb", "0.0625") as (url, _), MessageQueueClient(url) as client:
        reply_bytes = len(encode(client.call(Noop())))
        echo = subprocess.Popen([sys.executable, "-c", ECHO, str(reply_bytes)], stdout=subprocess.PIPE, text=True)
        assert echo.stdout is not None
        dealer = context.socket(zmq.DEALER)
        dealer.connect(f"tcp://127.0.0.1:{echo.stdout.readline().strip()}")
        header = encode(Noop())
        time_noops(client), time_echoes(dealer, header)
        ours: list[float] = []
        floor: list[float] = []
        for _ in range(ROUNDS):
            ours += time_noops(client)
            floor += time_echoes(dealer, header)
        dealer.close(linger=0)
        echo.kill()
        echo.wait(timeout=10)
    context.term()
    figures = {
        name: {"p50_us": percentile(v, 0.5) * 1e6, "p99_us": percentile(v, 0.99) * 1e6}
        for name, v in (("noop", ours), ("echo", floor))
    }
    ratio = figures["noop"]["p50_us"] / figures["echo"]["p50_us"]
    print(f"NOOP p50 {figures['noop']['p50_us']:.0f} us, echo p50 {figures['echo']['p50_us']:.0f} us: {ratio:.2f} x")
    report("round_trip", ratio_p50=round(ratio, 3), **figures)


if __name__ == "__main__":
    main()
