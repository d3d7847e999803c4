"""A caller may reuse its buffers once its deadline has passed, whatever is still on the way."""

import os
import time

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import DeadlineError
from lmcache.keys import Namespace, chunk_keys
from tests.fakes import PATIENCE_SECONDS
from tests.server_process import LmcacheServer

CHUNK_BYTES = 8 << 20


def test_buffers_changed_after_the_deadline_are_never_stored() -> None:
    namespace = Namespace(model="deadline", chunk_size=1)
    with LmcacheServer(l1_size_gb=0.25) as server, KVCacheClient(server.zmq_url, inline=True) as client:
        chunks = [bytearray(os.urandom(CHUNK_BYTES)) for _ in range(4)]
        originals = [bytes(chunk) for chunk in chunks]
        client.store(chunk_keys(namespace, [1]), chunks[:1])
        keys = chunk_keys(namespace, range(10, 14))
        server.freeze()
        client.mq.timeout_seconds = 1
        try:
            with pytest.raises(DeadlineError):
                client.store(keys, chunks)
            for chunk in chunks:
                chunk[:] = bytes(CHUNK_BYTES)
        finally:
            server.thaw()
        client.mq.timeout_seconds = PATIENCE_SECONDS
        time.sleep(0.5)
        with KVCacheClient(server.zmq_url) as reader:
            buffers = [bytearray(CHUNK_BYTES) for _ in range(4)]
            found = reader.retrieve(keys, buffers)
        assert buffers[:found] == originals[:found]
        assert client.store(chunk_keys(namespace, range(20, 24)), chunks)
