"""The server hangs, dies and comes back while clients are at work."""

import threading
import time
from pathlib import Path

import pytest

from lmcache.client import kvcache
from lmcache.client.kvcache import KVCacheClient
from lmcache.errors import StaleReadError, UnreachableError
from lmcache.keys import Namespace
from lmcache.layout import KVLayout
from lmcache.pool import CLIENT_SUFFIX, is_client_alive
from lmcache.protocol import Evict, StoreOutcome
from tests.chaos.content import PAGE, chunk_key, chunk_keys, content
from tests.chaos.waiting import wait_until
from tests.fakes import PATIENCE_SECONDS
from tests.server_process import LmcacheServer

LAYOUT = KVLayout(num_layers=2, num_planes=2, block_bytes=512, block_size=16, dtype="bfloat16")
ENGINE = Namespace(model="a-model", layout=LAYOUT.fingerprint, chunk_size=256)
# What a call may take beyond its deadline on a machine with more to do; one that waits on takes for ever.
SLACK_SECONDS = 30.0
# Calls that fail at once take far less than one deadline each.
NUM_FAILING = 20


def restart(server: LmcacheServer) -> None:
    server.kill()
    server.start()


def attached(server: LmcacheServer) -> list[tuple[bool, str | None]]:
    """Of each client, whether it mapped the pool, and its model."""
    return [(client["mapped"], client["model"]) for client in server.status()["clients"]]


def seconds_of(call) -> float:
    """How long a call takes that cannot be answered."""
    started_at = time.monotonic()
    with pytest.raises(UnreachableError):
        call()
    return time.monotonic() - started_at


# -- the server hangs -------------------------------------------------------------------------------------------------


def test_calls_to_a_server_that_hangs_end_at_their_deadline(server):
    with KVCacheClient(server.zmq_url) as client:
        client.store(chunk_key(0), [content(chunk_key(0), PAGE)])
        server.freeze()
        client.mq.timeout_seconds = 0.5
        calls = [
            lambda: client.lookup(chunk_key(0)),
            lambda: client.pin(chunk_key(0)),
            lambda: client.store(chunk_key(1), [bytes(PAGE)]),
            lambda: client.end_session("request"),
            lambda: client.register(ENGINE, LAYOUT),
        ]
        taken = [seconds_of(call) for call in calls]
        server.thaw()
        client.mq.timeout_seconds = PATIENCE_SECONDS
        assert max(taken) < 0.5 + SLACK_SECONDS, taken
        assert client.pin(chunk_key(0)).extents[0] == content(chunk_key(0), PAGE)


def test_threads_that_wait_for_one_introduction_end_at_their_deadline(server):
    with KVCacheClient(server.zmq_url) as client:
        client.attach()
        client._retire(client._attachment)
        server.freeze()
        client.mq.timeout_seconds = 0.5
        taken: list[float] = []
        threads = [threading.Thread(target=lambda: taken.append(seconds_of(client.attach))) for _ in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        server.thaw()
        assert len(taken) == 20
        assert max(taken) < 2 * 0.5 + SLACK_SECONDS, taken


def test_a_client_of_a_server_that_hangs_closes_soon(server):
    client = KVCacheClient(server.zmq_url, heartbeat=True)
    client.attach()
    server.freeze()
    started_at = time.monotonic()
    client.close()
    taken = time.monotonic() - started_at
    server.thaw()
    assert taken < 5 + SLACK_SECONDS


def test_with_a_heartbeat_calls_fail_at_once_while_the_server_hangs_and_work_again_after(server):
    with KVCacheClient(server.zmq_url, heartbeat=True) as client:
        client.register(ENGINE, LAYOUT)
        server.freeze()
        client.mq.timeout_seconds = 1
        wait_until(lambda: client._down_reason, "the heartbeat notices")
        client.mq.timeout_seconds = 10
        taken = [seconds_of(lambda: client.lookup(chunk_key(0))) for _ in range(NUM_FAILING)]
        client.mq.timeout_seconds = 1
        server.thaw()
        assert sum(taken) < NUM_FAILING, taken
        # A reply that a busy machine delays beyond the second is one more try: the client itself must know, too.
        wait_until(
            lambda: attached(server) == [(True, "a-model")] and not client._down_reason,
            "attached and registered again",
        )
        client.mq.timeout_seconds = PATIENCE_SECONDS
        assert client.store(chunk_key(0), [bytes(chunk_bytes())]) == [StoreOutcome.RESERVED]


def chunk_bytes() -> int:
    return LAYOUT.chunk_bytes(256)


# -- the server dies and comes back -----------------------------------------------------------------------------------


def test_with_a_heartbeat_a_client_is_attached_and_registered_again_without_a_call(server):
    with KVCacheClient(server.zmq_url, heartbeat=True) as client:
        client.register(ENGINE, LAYOUT)
        for _ in range(3):
            restart(server)
            wait_until(lambda: attached(server) == [(True, "a-model")], "attached and registered again")
        assert client.store(chunk_key(0), [bytes(chunk_bytes())]) == [StoreOutcome.RESERVED]


def test_with_a_heartbeat_calls_fail_at_once_while_the_server_is_away(server):
    with KVCacheClient(server.zmq_url, heartbeat=True) as client:
        client.attach()
        server.kill()
        wait_until(lambda: client._down_reason, "the heartbeat notices")
        taken = [seconds_of(lambda: client.lookup(chunk_key(0))) for _ in range(NUM_FAILING)]
        assert sum(taken) < NUM_FAILING, taken
        server.start()
        wait_until(lambda: attached(server) == [(True, None)], "attached again")


@pytest.mark.parametrize("inline", [False, True])
def test_without_a_heartbeat_the_first_call_after_a_restart_works(server, inline):
    with KVCacheClient(server.zmq_url, inline=inline) as client:
        client.register(ENGINE, LAYOUT)
        data = content(chunk_key(0), chunk_bytes())
        assert client.store(chunk_key(0), [data]) == [StoreOutcome.RESERVED]
        restart(server)
        assert client.store(chunk_key(0), [data]) == [StoreOutcome.RESERVED]
        assert attached(server) == [(not inline, "a-model")]
        restart(server)
        with client.pin(chunk_key(0)) as pinned:
            assert pinned.extents == []
        restart(server)
        client.register(ENGINE, LAYOUT)
        assert attached(server) == [(not inline, "a-model")]


def test_an_introduction_that_is_cut_short_leaves_nothing_behind(server, monkeypatch):
    def hang(*, client, cookie, real=kvcache.Attach):
        server.freeze()
        return real(client=client, cookie=cookie)

    with KVCacheClient(server.zmq_url, timeout_seconds=2) as client:
        with monkeypatch.context() as patch:
            patch.setattr(kvcache, "Attach", hang)
            with pytest.raises(UnreachableError):
                client.attach()
        assert server.shared_files() == [Path(server.pool_path)]
        server.thaw()
        client.mq.timeout_seconds = PATIENCE_SECONDS
        client.store(chunk_key(0), [bytes(PAGE)])


# -- the attachment of one call ---------------------------------------------------------------------------------------


def test_a_writer_keeps_its_proof_of_life_when_the_heartbeat_gives_up_during_its_call(server, monkeypatch):
    """Else the server would take it for dead and give the place to someone else while it writes."""
    with KVCacheClient(server.zmq_url) as client:

        def give_up(*, real=kvcache.Store, **fields):
            client._retire(client._attachment)
            return real(**fields)

        with monkeypatch.context() as patch:
            patch.setattr(kvcache, "Store", give_up)
            reservation = client.reserve(chunk_key(0), PAGE)
        (presence,) = (path for path in server.shared_files() if CLIENT_SUFFIX in path.name)
        assert is_client_alive(presence)
        reservation.extents[0][:] = content(chunk_key(0), PAGE)
        assert reservation.commit() == 1
        assert not is_client_alive(presence)
        assert client.pin(chunk_key(0)).extents[0] == content(chunk_key(0), PAGE)


def test_places_of_a_commit_without_an_answer_are_free_again(server):
    with KVCacheClient(server.zmq_url) as client, KVCacheClient(server.zmq_url) as other:
        reservation = client.reserve(chunk_keys([0, 1]), PAGE)
        server.freeze()
        client.mq.timeout_seconds = 0.3
        with pytest.raises(UnreachableError):
            reservation.commit()
        server.thaw()
        # Either the commit came through or its places are given back: nobody waits for them for ever.
        wait_until(lambda: StoreOutcome.BUSY not in other.store(chunk_keys([0, 1]), [bytes(PAGE)] * 2), "the places are free")


def test_a_chunk_that_was_replaced_during_the_read_is_stale_not_damaged(server):
    with KVCacheClient(server.zmq_url) as client:
        client.store(chunk_key(0), [content(chunk_key(0), PAGE)], with_checksums=True)
        with client.pin(chunk_key(0), "request") as pinned:
            client.end_session("request")
            client.mq.call(Evict(), [chunk_key(0)])
            client.store(chunk_key(1), [content(chunk_key(1), PAGE)])
            with pytest.raises(StaleReadError):
                pinned.verify(check_content=True)


def test_places_and_pins_are_given_back_although_the_caller_still_looks_at_the_bytes(server):
    with KVCacheClient(server.zmq_url) as client:
        with client.reserve(chunk_key(0), PAGE) as reservation:
            written = memoryview(reservation.extents[0])
            written[:] = content(chunk_key(0), PAGE)
            assert reservation.commit() == 1
        with client.pin(chunk_key(0)) as pinned:
            read = memoryview(pinned.extents[0])
        wait_until(lambda: not server.status()["l1"]["pins"], "the pin is gone")
        assert read == content(chunk_key(0), PAGE)
    wait_until(lambda: not server.status()["clients"], "the client is gone")
