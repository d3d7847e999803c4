"""Does a lookup stay fast when the cache is large, and what does a chunk cost the server in memory?

A lookup of a 128k-token prompt (512 chunks of 256 tokens, all hits, pinned), timed in the server's own process without the
socket, at 1,000 and at 1,000,000 cached chunks of 4 KiB. Memory: growth of the process outside the pool (RssAnon) while the
chunks are stored. Run: python benchmarks/lookup.py [--chunks 1000 1000000]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time

from common import memory_kib, percentile, report

from lmcache.keys import KEY_BYTES
from lmcache.protocol import EndSession, Hello, Lookup, encode
from lmcache.server.app import start_server
from lmcache.server.args import HttpFrontendSettings, MPServerSettings, ServerConfig, StorageManagerSettings
from lmcache.server.service import Answer, CacheService

PROMPT_CHUNKS = 512
LOOKUPS = 2000
CHUNK_BYTES = 4096
OWNER = bytes(16)


def fill(service: CacheService, num_chunks: int) -> list[bytes]:
    """Store `num_chunks` in prompts of PROMPT_CHUNKS; return each prompt's keys. Contents are left as they are."""
    prompts = []
    l1 = service.storage.l1
    for number in range(-(-num_chunks // PROMPT_CHUNKS)):
        keys = b"".join(hashlib.sha256(b"%d %d" % (number, index)).digest() for index in range(PROMPT_CHUNKS))
        lengths = [CHUNK_BYTES] * PROMPT_CHUNKS
        _, placements = service.storage.reserve(keys, 0, lengths, 0, OWNER, b"")
        assert len(placements) == PROMPT_CHUNKS, "the pool is too small"
        l1.commit(placements, OWNER)
        prompts.append(keys)
    return prompts


def time_lookups(service: CacheService, prompts: list[bytes]) -> list[float]:
    """Return seconds of LOOKUP, from header frame to reply."""
    client = ""

    def keep_client(answer: Answer) -> bool:
        nonlocal client
        client = getattr(answer.reply, "client", client)
        assert answer.reply.error is None, answer.reply.error
        return bool(encode(answer.reply))

    service.handle(encode(Hello(kind="benchmark")), (), keep_client)
    taken = []
    for number in range(LOOKUPS):
        keys = bytes(bytearray(prompts[number * 7919 % len(prompts)]))  # in the CPU's cache, as fresh from the socket
        header = encode(Lookup(client=client, request_id=str(number)))
        started = time.perf_counter()
        service.handle(header, [memoryview(keys)], keep_client)
        taken.append(time.perf_counter() - started)
        service.handle(encode(EndSession(client=client, request_id=str(number))), (), keep_client)
    return taken


def measure(num_chunks: int) -> dict[str, float]:
    """Return lookup percentiles in ms and bytes of memory a chunk."""
    capacity_gib = (num_chunks + 2 * PROMPT_CHUNKS) * CHUNK_BYTES / 2**30 * 1.06
    config = ServerConfig(
        server=MPServerSettings(port=0),
        storage=StorageManagerSettings(l1_size_gb=capacity_gib, max_chunks=num_chunks + 2 * PROMPT_CHUNKS),
        http=HttpFrontendSettings(no_http=True),
    )
    server = start_server(config)
    try:
        service = server.service
        while service.storage.residency.is_running:
            time.sleep(0.1)
        service.storage.run_pass()
        server._owner.stop_loop()  # from here on this thread is the owner
        before = memory_kib(os.getpid(), "RssAnon")
        prompts = fill(service, num_chunks)
        keys_kib = len(prompts) * PROMPT_CHUNKS * KEY_BYTES // 1024
        grown = memory_kib(os.getpid(), "RssAnon") - before - keys_kib
        taken = time_lookups(service, prompts)
    finally:
        server.stop()
    return {
        "p50_ms": percentile(taken, 0.5) * 1e3,
        "p99_ms": percentile(taken, 0.99) * 1e3,
        "bytes_per_chunk": grown * 1024 / len(prompts) / PROMPT_CHUNKS,
    }


def main() -> None:
    """Print a line for each size, and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1000, 1_000_000])
    args = parser.parse_args()
    results = {}
    for num_chunks in args.chunks:
        figures = results[str(num_chunks)] = measure(num_chunks)
        print(
            f"{num_chunks} chunks cached: lookup of {PROMPT_CHUNKS} p50 {figures['p50_ms']:.3f} ms,"
            f" p99 {figures['p99_ms']:.3f} ms; {figures['bytes_per_chunk']:.0f} B of server memory a chunk"
        )
    first, last = (results[str(count)]["p50_ms"] for count in (args.chunks[0], args.chunks[-1]))
    report("lookup", ratio_p50_large_to_small=round(last / first, 3), **results)


if __name__ == "__main__":
    main()
