"""The socket: frames that are no request, peers that go or do not read, and a loop that goes on whatever comes."""

import socket
import threading

import msgspec
import pytest
import zmq

from lmcache.client.mq import MessageQueueClient
from lmcache.errors import RemoteError, UsageError
from lmcache.protocol import MAX_FRAMES, Clear, Evict, GetChunkSize, Hello, Noop, Put, Status, encode
from lmcache.protocol import Get as GetRequest
from lmcache.server.zmq_frontend import MAX_UNSENT_GETS, ZmqFrontend
from tests.pools import keys, server_in, status_of, wait_until
from tests.server_process import free_port
from tests.zmtp import RawPeer


@pytest.fixture
def server(tmp_path):
    with server_in(tmp_path, l1_size_gb=1 / 64) as server:
        yield server


@pytest.fixture
def dealer(server):
    """A bare ZMQ socket: what it sends is up to the test."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.rcvtimeo = dealer.sndtimeo = 60_000
        dealer.connect(server.endpoints.zmq)
        yield dealer


def answer_to(dealer, frames) -> tuple[bytes, dict]:
    dealer.send_multipart(frames)
    request_id, header, *_ = dealer.recv_multipart()
    return request_id, msgspec.msgpack.decode(header)


def test_the_request_id_comes_back_as_it_was_sent(dealer):
    for request_id in (b"", b"\0", b"x" * 64, bytes(range(64))):
        echoed, header = answer_to(dealer, [request_id, encode(GetChunkSize())])
        assert echoed == request_id
        assert header["chunk_size"] == 16


@pytest.mark.parametrize(
    ("frames", "code", "echoed"),
    [
        ([b"id"], "bad_frames", b"id"),
        ([b""], "bad_frames", b""),
        ([b"x" * 65, b"header"], "bad_frames", b""),
        ([b"x" * 100_000], "bad_frames", b""),
        ([b"id", b""], "bad_header", b"id"),
        ([b"id", b"junk", b"payload"], "bad_header", b"id"),
        ([b"id", b"\xc0" * (2 << 20)], "oversized", b"id"),
        ([b"id", *[b""] * MAX_FRAMES], "bad_frames", b"id"),
    ],
    ids=["one frame", "an empty frame", "long id", "very long id", "empty header", "junk", "long header", "many frames"],
)
def test_frames_that_are_no_request_are_answered_and_the_next_request_is_served(dealer, frames, code, echoed):
    request_id, header = answer_to(dealer, frames)
    assert (request_id, header["error"]["code"]) == (echoed, code)
    assert header["boot"]
    assert answer_to(dealer, [b"next", encode(GetChunkSize())])[1]["chunk_size"] == 16


def test_a_burst_of_requests_is_answered_one_by_one_in_order(dealer):
    for number in range(500):
        dealer.send_multipart([number.to_bytes(2, "big"), encode(GetChunkSize())])
    answers = [dealer.recv_multipart()[0] for _ in range(500)]
    assert answers == [number.to_bytes(2, "big") for number in range(500)]


def test_health_is_answered_while_another_client_floods_the_server(server):
    stop = threading.Event()

    def flood() -> None:
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(server.endpoints.zmq)
            while not stop.is_set():
                for _ in range(100):
                    dealer.send_multipart([b"x", encode(Noop())])
                for _ in range(100):
                    if not dealer.poll(60_000):
                        return
                    dealer.recv_multipart()

    thread = threading.Thread(target=flood)
    thread.start()
    with MessageQueueClient(server.endpoints.zmq) as mq:
        for _ in range(20):
            assert mq.call(Noop(), timeout_seconds=60).problems == []
    stop.set()
    thread.join(120)
    assert not thread.is_alive()


# -- chunks on their way ----------------------------------------------------------------------------------------------


def put_chunk(mq: MessageQueueClient, num_bytes: int) -> str:
    client = mq.call(Hello(kind="test")).client
    assert mq.call(Put(client=client), [keys(1), bytes(num_bytes)]).outcomes in ([0], [1])
    return client


@pytest.mark.parametrize("num_bytes", [10, 1 << 20])
def test_the_pins_of_a_reply_go_when_it_was_sent(server, num_bytes):
    with MessageQueueClient(server.endpoints.zmq) as mq:
        client = put_chunk(mq, num_bytes)
        for _ in range(20):
            future = mq.submit(GetRequest(client=client), [keys(1)], may_wait=True)
            assert future.result().lengths == [num_bytes]
        wait_until(lambda: status_of(server)["l1"]["pins"] == 0)


def test_a_reader_that_does_not_read_holds_a_bounded_number_of_replies_until_it_goes(server):
    """Its chunks stay pinned and whole; everybody else is served; when its connection ends they are freed."""
    with MessageQueueClient(server.endpoints.zmq) as mq:
        client = put_chunk(mq, 4 << 20)
        peer = RawPeer(int(server.endpoints.zmq.rpartition(":")[2]), receive_buffer_bytes=4096)
        peer.shake_hands()
        header = encode(GetRequest(client=client))
        for number in range(3 * MAX_UNSENT_GETS):
            peer.send([number.to_bytes(4, "big"), header, keys(1)])
        wait_until(lambda: status_of(server)["counters"]["retrieved_chunks"] == 3 * MAX_UNSENT_GETS)
        pins = status_of(server)["l1"]["pins"]
        assert 0 < pins <= MAX_UNSENT_GETS
        assert status_of(server)["counters"]["replies_dropped"] >= 3 * MAX_UNSENT_GETS - pins - 1
        assert mq.call(Clear()).kept_objects == 1
        assert mq.call(Noop()).problems == []
        peer.socket.close()
        wait_until(lambda: status_of(server)["l1"]["pins"] == 0)
        assert mq.call(Clear()).objects == 1


def test_a_reader_that_stands_still_for_too_long_is_gone(tmp_path, monkeypatch):
    """Its connection stays open at its end: frozen, or beyond a network that is cut."""
    monkeypatch.setattr("lmcache.server.zmq_frontend.PEER_TIMEOUT_MS", 500)
    with server_in(tmp_path, l1_size_gb=1 / 64) as server, MessageQueueClient(server.endpoints.zmq) as mq:
        client = put_chunk(mq, 4 << 20)
        with RawPeer(int(server.endpoints.zmq.rpartition(":")[2]), receive_buffer_bytes=4096) as peer:
            peer.shake_hands()
            for number in range(4):
                peer.send([bytes([number]), encode(GetRequest(client=client)), keys(1)])
            wait_until(lambda: status_of(server)["counters"]["retrieved_chunks"] == 4)
            wait_until(lambda: status_of(server)["l1"]["pins"] == 0)
            assert mq.call(Clear()).objects == 1


def test_stopping_while_chunks_are_on_their_way_leaves_nothing(tmp_path):
    """The fixture checks threads, descriptors, mappings and files."""
    peers = []
    with server_in(tmp_path, l1_size_gb=1 / 64) as server, MessageQueueClient(server.endpoints.zmq) as mq:
        client = put_chunk(mq, 4 << 20)
        for _ in range(2):
            peer = RawPeer(int(server.endpoints.zmq.rpartition(":")[2]), receive_buffer_bytes=4096)
            peer.shake_hands()
            for number in range(8):
                peer.send([bytes([number]), encode(GetRequest(client=client)), keys(1)])
            peers.append(peer)
        wait_until(lambda: status_of(server)["counters"]["retrieved_chunks"] == 16)
    for peer in peers:
        peer.socket.close()


def test_peers_that_go_before_their_reply_cost_nothing(server):
    for number in range(30):
        with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 1000
            dealer.connect(server.endpoints.zmq)
            dealer.send_multipart([bytes([number]), encode(Status())])
    with MessageQueueClient(server.endpoints.zmq) as mq:
        assert mq.call(Noop()).problems == []


# -- requests of other threads ----------------------------------------------------------------------------------------


def test_other_threads_requests_are_answered_by_the_owner(server):
    owner = server._owner
    assert owner.call(GetChunkSize()).result(timeout=60).chunk_size == 16
    with pytest.raises(RemoteError, match="EVICT selects nothing"):
        owner.call(Evict()).result(timeout=60)


def test_a_request_that_was_cancelled_is_dropped_and_undone(server):
    future = server._owner.call(Hello(kind="gone"))
    if future.cancel():
        wait_until(lambda: status_of(server)["counters"]["replies_dropped"] == 1)
        assert status_of(server)["clients"] == []
    else:
        assert future.result(timeout=60).client


# -- where it listens -------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_one_usage_error_and_leaves_nothing():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"cannot listen on tcp://127.0.0.1:{port}") as caught:
            ZmqFrontend("127.0.0.1", port)
    assert "--port" in caught.value.hint


@pytest.mark.parametrize("host", ["no-such-host.invalid", "256.1.1.1", "192.0.2.1", "x" * 300, "\0"])
def test_a_host_that_is_not_this_one_is_one_usage_error(host):
    with pytest.raises(UsageError, match="cannot listen on"):
        ZmqFrontend(host, 0)


def test_the_endpoint_names_the_port_that_was_free(tmp_path):
    with server_in(tmp_path) as server:
        assert server.endpoints.zmq.startswith("tcp://127.0.0.1:")
        assert server.endpoints.http == ""
    port = free_port()
    with server_in(tmp_path, host="localhost", port=port) as server:
        assert server.endpoints.zmq.endswith(f":{port}")
