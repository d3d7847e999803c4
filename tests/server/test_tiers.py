"""A server with a folder below L1: what clients see of it."""

from pathlib import Path

import pytest

from lmcache.client.kvcache import KVCacheClient
from lmcache.client.mq import MessageQueueClient
from lmcache.errors import UsageError
from lmcache.protocol import Clear, ClearTier, Evict, RemovalReply, StoreOutcome, TierRemoval
from lmcache.server.app import RunningServer, start_server
from lmcache.storage.l2.spec import parse_adapter
from tests.pools import content, key, keys, make_config, server_in, status_of, wait_until

CHUNK = 64 << 10


def with_folder(tmp_path: Path, **settings: object) -> dict[str, object]:
    """Settings of a server of 16 such chunks with a folder below."""
    adapter = parse_adapter(f"fs://{tmp_path}/l2?capacity-gb=1")
    return {
        "l1_size_gb": 16 * CHUNK / 2**30,
        "l2_adapter": (adapter,),
        "l2_lookup_timeout_seconds": 30.0,
        "l2_inflight_ratio": 1.0,
        **settings,
    }


def pools(tmp_path: Path, name: str = "pools") -> Path:
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    return folder


def store(server: RunningServer, *numbers: int) -> None:
    with KVCacheClient(server.endpoints.zmq) as client:
        for number in numbers:
            assert client.store(key(number), [content(number, CHUNK)]) == [StoreOutcome.RESERVED]


def wait_for_writes(server: RunningServer) -> None:
    wait_until(lambda: not status_of(server)["l2"][0]["queued_chunks"], "the writes")


def fetch(client: KVCacheClient, *numbers: int) -> int:
    """Look up, read and compare; return how many leading chunks came."""
    hit = client.lookup(keys(*numbers), "r").hit_chunks
    buffers = [bytearray(CHUNK) for _ in range(hit)]
    assert client.retrieve(keys(*numbers[:hit]), buffers, "r", check_content=True) == hit
    client.end_session("r")
    assert [bytes(buffer) for buffer in buffers] == [content(number, CHUNK) for number in numbers[:hit]]
    return hit


def clear(server: RunningServer, tier: ClearTier, **fields: object) -> RemovalReply:
    with MessageQueueClient(server.endpoints.zmq, 30.0) as mq:
        return mq.call(Clear(tier=tier, timeout_seconds=20.0, **fields))


def test_more_than_l1_holds_comes_back_right(tmp_path: Path):
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server:
        for number in range(100):
            store(server, number)
            wait_for_writes(server)
        with KVCacheClient(server.endpoints.zmq) as client:
            assert all(fetch(client, number) == 1 for number in range(100))
        [tier] = status_of(server)["l2"]
        assert tier["read_chunks"] >= 84
        assert tier["failures"] == 0


def test_a_restarted_server_is_warm(tmp_path: Path):
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server:
        store(server, *range(10))
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server, KVCacheClient(server.endpoints.zmq) as client:
        reply = client.lookup(keys(*range(10)), "r")
        assert (reply.hit_chunks, reply.l1_chunks, reply.l2_chunks) == (10, 10, 10)
        client.end_session("r")
        assert fetch(client, *range(10)) == 10
        status = status_of(server)
        assert status["counters"]["l2_promoted_chunks"] == 10
        assert status["hit_rate"] == 1.0


def test_two_servers_share_a_folder(tmp_path: Path):
    with (
        server_in(pools(tmp_path, "one"), **with_folder(tmp_path)) as one,
        server_in(pools(tmp_path, "other"), **with_folder(tmp_path)) as other,
    ):
        store(one, *range(5))
        wait_for_writes(one)
        with KVCacheClient(other.endpoints.zmq) as client:
            assert fetch(client, *range(6)) == 5


def test_a_lookup_without_pins_tells_what_each_tier_holds(tmp_path: Path):
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server:
        store(server, 0, 1)
        wait_for_writes(server)
        clear(server, ClearTier.L1)
        store(server, 0)
        with KVCacheClient(server.endpoints.zmq) as client:
            reply = client.lookup(keys(0, 1, 2), pin=False)
        assert (reply.hit_chunks, reply.l1_chunks, reply.l2_chunks, reply.tiers) == (2, 1, 1, {"fs": 2})
        assert status_of(server)["l1"]["chunks"] == 1


@pytest.mark.parametrize(
    ("tier", "in_l1", "in_l2", "again"),
    [(ClearTier.L1, 0, 3, 0), (ClearTier.L2, 3, 0, 3), (ClearTier.ALL, 0, 0, 0)],
    ids=lambda v: str(v),
)
def test_clear_empties_the_tiers_that_it_names(tmp_path: Path, tier: ClearTier, in_l1: int, in_l2: int, again: int):
    """EVI-7. What L1 keeps is written to L2 again, and it would not be if it were still there."""
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server:
        store(server, 0, 1, 2)
        wait_for_writes(server)
        reply = clear(server, tier)
        assert reply.objects == 3 - in_l1
        assert [removal.done for removal in reply.tiers] == [True] * (tier is not ClearTier.L1)
        assert sum(removal.objects for removal in reply.tiers) == 3 - in_l2
        wait_for_writes(server)
        with KVCacheClient(server.endpoints.zmq) as client:
            found = client.lookup(keys(0, 1, 2), pin=False)
        assert (found.l1_chunks, found.tiers.get("fs", 0)) == (in_l1, in_l2 + again)
        assert status_of(server)["l2"][0]["written_chunks"] == 3 + again


def test_a_dry_run_clears_nothing(tmp_path: Path):
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server:
        store(server, 0)
        wait_for_writes(server)
        reply = clear(server, ClearTier.ALL, dry_run=True)
        assert (reply.objects, len(reply.tiers)) == (1, 1)
        assert len(list((tmp_path / "l2").rglob("*.kv"))) == 1


def test_evicting_a_prompt_takes_it_out_of_l2_too(tmp_path: Path):
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server:
        store(server, 0, 1)
        wait_for_writes(server)
        with MessageQueueClient(server.endpoints.zmq, 30.0) as mq:
            reply = mq.call(Evict(timeout_seconds=20.0), [keys(0)])
        assert (reply.objects, reply.tiers) == (1, [TierRemoval(name="fs", objects=1, done=True)])
        assert len(list((tmp_path / "l2").rglob("*.kv"))) == 1


def test_a_folder_that_cannot_be_written_to_is_no_health_problem_and_shows(tmp_path: Path):
    (tmp_path / "l2").write_text("not a folder")
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server:
        store(server, *range(12))
        wait_until(lambda: status_of(server)["l2"][0]["write_breaker"] != "closed", "the breaker")
        status = status_of(server)
        assert status["healthy"]
        assert status["l2"][0]["last_error"]
        with KVCacheClient(server.endpoints.zmq) as client:
            assert fetch(client, *range(12)) == 12


def test_write_on_evict_writes_when_the_server_ends(tmp_path: Path):
    with server_in(pools(tmp_path), **with_folder(tmp_path, l2_policy="write-on-evict")) as server:
        store(server, *range(4))
        assert status_of(server)["l2"][0]["written_chunks"] == 0
    with server_in(pools(tmp_path), **with_folder(tmp_path)) as server, KVCacheClient(server.endpoints.zmq) as client:
        assert fetch(client, *range(4)) == 4


def test_a_server_that_cannot_start_leaves_nothing(tmp_path: Path):
    config = make_config(pools(tmp_path), **with_folder(tmp_path, l1_size_gb=1 << 19))
    with pytest.raises(UsageError):
        start_server(config)
