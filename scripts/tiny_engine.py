"""What an engine does with the cache, without an engine: an example of the client library, and a part of `make demo`.

It registers a small model's KV layout, stores the chunks of a prompt except the last two, and reads them back. The KV itself is
random: only an engine can compute the real one.

Run: python scripts/tiny_engine.py localhost:5555 TOKENIZER_DIR '{ffmpeg} What is a demuxer?'
"""

from __future__ import annotations

import argparse
import os
import sys

from lmcache.cli.base import parse_url
from lmcache.cli.corpora import expand_prompt
from lmcache.cli.prompts import load_tokenizer
from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import LMCacheError
from lmcache.keys import KEY_BYTES, Namespace, chunk_keys
from lmcache.layout import KVLayout

NUM_NEW_CHUNKS = 2
# Four layers of 4 KV heads of 64 in bfloat16, keys and values apart, 16 tokens a block: 4 KiB a token.
LAYOUT = KVLayout(num_layers=4, num_planes=2, block_bytes=16 * 4 * 64 * 2, block_size=16, dtype="bfloat16", order="BNHD")


def register(client: KVCacheClient, model: str) -> Namespace:
    """Tell the server what this model's KV looks like; return what its chunk keys depend on."""
    namespace = Namespace(
        model=model,
        dtype=LAYOUT.dtype,
        layout=LAYOUT.fingerprint,
        chunk_size=client.attach().chunk_size,
    )
    reply = client.register(namespace, LAYOUT)
    print(f"registered {model}: {reply.bytes_per_token} bytes of KV a token, L1 holds {reply.l1_tokens} tokens")
    return namespace


def store(client: KVCacheClient, namespace: Namespace, keys: bytes) -> int:
    """Store the chunks that are not there yet; return how many became visible."""
    chunk_bytes = LAYOUT.chunk_bytes(namespace.chunk_size)
    with client.reserve(keys, chunk_bytes, namespace.id) as reservation:
        for extent in reservation.extents:
            extent[:] = os.urandom(chunk_bytes)  # an engine copies its KV blocks into the pool here
        return reservation.commit(with_checksums=True)


def retrieve(client: KVCacheClient, keys: bytes) -> int:
    """Read the leading chunks that are there, check their contents, and return how many they are."""
    with client.pin(keys, request_id="tiny-engine") as pinned:
        copies = [bytes(extent) for extent in pinned.extents]  # an engine copies them into its KV blocks here
        pinned.verify(check_content=True)  # raises if a chunk was freed or changed under the copy
        return len(copies)


def run(url: str, tokenizer_dir: str, prompt: str) -> None:
    """Store and retrieve one prompt."""
    token_ids = load_tokenizer(tokenizer_dir)(expand_prompt(prompt).text)
    with KVCacheClient(parse_url(url).text, kind="tiny-engine") as client:
        namespace = register(client, os.path.basename(tokenizer_dir.rstrip("/")))
        keys = chunk_keys(namespace, token_ids)
        num_chunks = len(keys) // KEY_BYTES
        known = keys[: max(1, num_chunks - NUM_NEW_CHUNKS) * KEY_BYTES]
        num_stored = store(client, namespace, known)
        print(f"stored {num_stored} of the prompt's {num_chunks} chunks ({len(token_ids)} tokens)")
        print(f"read {retrieve(client, keys)} chunks back, contents as stored")


def main() -> int:
    """Parse, run, and say what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="the server's ZMQ address")
    parser.add_argument("tokenizer_dir", help="folder with a tokenizer; its name is the model's")
    parser.add_argument("prompt", help="text; {name} stands for a built-in corpus")
    args = parser.parse_args()
    try:
        run(args.url, args.tokenizer_dir, args.prompt)
    except LMCacheError as exc:
        print(f"error: {exc.message}\nhint: {exc.hint}", file=sys.stderr)
        return exc.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
