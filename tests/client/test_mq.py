"""Requests over ZMQ: deadlines, connections that are not there, and answers that nobody waits for any more."""

import contextlib
import gc
import os
import socket
import threading

import pytest
import zmq

from lmcache.client import mq as client_mq
from lmcache.client.mq import MessageQueueClient, check_reachable, diagnose
from lmcache.errors import DeadlineError, ProtocolError, RemoteError, UnreachableError, UsageError
from lmcache.protocol import Clear, ErrorInfo, GetChunkSize, Noop, NoopReply, Reply, Status
from tests.fakes import Proxy, ScriptedPeer, reply_of, seconds
from tests.pools import server_in, wait_until
from tests.server_process import free_port
from tests.tcp_proxy import TcpProxy


@pytest.fixture
def server(tmp_path):
    with server_in(tmp_path) as server:
        yield server


@pytest.fixture
def mq(server):
    with MessageQueueClient(server.endpoints.zmq) as mq:
        yield mq


def test_replies_reach_their_requests_in_whatever_order_they_are_asked_for(mq):
    futures = [mq.submit(request, may_wait=True) for request in (Noop(), GetChunkSize(), Status(), GetChunkSize())]
    assert futures[3].result().chunk_size == 16
    assert futures[2].result().status["chunk_size"] == 16
    assert futures[0].result().engine_type == "default"
    assert futures[1].result().chunk_size == 16
    assert all(future.round_trip_seconds > 0 for future in futures)


def test_a_future_can_be_asked_without_waiting_and_again_and_again(mq):
    future = mq.submit(GetChunkSize(), may_wait=True)
    wait_until(future.done)
    assert future.done()
    assert future.result() == future.result()


def test_each_thread_has_its_own_connection_and_they_do_not_mix(server, mq):
    wrong = []

    def ask() -> None:
        for _ in range(50):
            if mq.call(GetChunkSize()).chunk_size != 16 or mq.call(Noop()).engine_type != "default":
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_a_request_that_no_reply_is_wanted_for_is_done_and_its_reply_read_away(server, mq):
    for _ in range(200):
        mq.call(Noop())
        mq.post(Clear())
    assert mq.call(GetChunkSize()).chunk_size == 16
    assert mq.call(Status()).status["counters"]["stored_chunks"] == 0
    assert server.service.metrics.value("lmcache_requests", "CLEAR", "ok") == 200


def test_the_servers_error_comes_with_its_code_and_hint(mq):
    with pytest.raises(RemoteError) as caught:
        mq.call(Noop(client="0" * 32))
    assert (caught.value.code, caught.value.exit_code) == ("unknown_client", 1)
    assert caught.value.hint


@pytest.mark.parametrize("may_wait", [True, False])
def test_no_connection_is_an_error_by_the_deadline_at_the_latest(may_wait):
    with MessageQueueClient(f"tcp://127.0.0.1:{free_port()}") as mq:
        with pytest.raises(UnreachableError, match="no connection to tcp://") as caught:
            mq.submit(Noop(), timeout_seconds=0.2, may_wait=may_wait)
        assert "lmcache server" in caught.value.hint
        assert caught.value.exit_code == 3


def test_a_silent_peer_is_a_deadline_error_that_names_it():
    with ScriptedPeer(lambda op: None) as peer, MessageQueueClient(peer.url) as mq:
        with pytest.raises(DeadlineError, match=f"no reply from {peer.url}"):
            mq.call(Noop(), timeout_seconds=0.2)
        future = mq.submit(Noop(), timeout_seconds=0.1, may_wait=True)
        wait_until(future.done)
        with pytest.raises(DeadlineError):
            future.result()


def test_a_server_that_comes_later_is_found_within_the_deadline(tmp_path):
    port = free_port()
    with MessageQueueClient(f"tcp://127.0.0.1:{port}") as mq:
        with pytest.raises(UnreachableError):
            mq.call(Noop(), timeout_seconds=0.1)
        with server_in(tmp_path, port=port):
            assert mq.call(GetChunkSize(), timeout_seconds=60).chunk_size == 16


def test_a_server_that_is_gone_without_a_word_is_found_again_at_its_address(server, monkeypatch):
    monkeypatch.setattr(client_mq, "PING_MS", 100)
    monkeypatch.setattr(client_mq, "PING_TIMEOUT_MS", 1000)
    with (
        TcpProxy(int(server.endpoints.zmq.rpartition(":")[2])) as proxy,
        MessageQueueClient(f"tcp://127.0.0.1:{proxy.port}") as mq,
    ):
        mq.call(Noop())
        proxy.strand()

        def is_answered() -> bool:
            with contextlib.suppress(UnreachableError):
                mq.call(Noop(), timeout_seconds=1)
                return True
            return False

        assert not is_answered()
        wait_until(is_answered, "another connection")


def test_a_late_reply_goes_to_whom_it_was_promised_and_disturbs_no_other_request(server):
    late = []
    with Proxy(server.endpoints.zmq) as proxy:
        mq = MessageQueueClient(proxy.url, on_late_reply=late.append)
        mq.call(Noop())
        proxy.hold.set()
        with pytest.raises(DeadlineError):
            mq.call(GetChunkSize(), timeout_seconds=0.1)
        wait_until(lambda: proxy.held)
        proxy.hold.clear()
        assert mq.call(Noop()).engine_type == "default"
        assert [future.result().chunk_size for future in late] == [16]
        mq.close()


def test_replies_that_never_come_are_not_waited_for_for_ever(monkeypatch):
    monkeypatch.setattr(client_mq, "LATE_SECONDS", 0.0)
    with ScriptedPeer(lambda op: None) as peer, MessageQueueClient(peer.url) as mq:
        mq.submit(Noop(), may_wait=True)
        for _ in range(5):
            with pytest.raises(UnreachableError):
                mq.call(Noop(), timeout_seconds=0.01)
        assert len(mq._local.channel._abandoned) == 1


@pytest.mark.parametrize(
    "frames",
    [
        [b"junk"],
        [b""],
        [b"\x80"],
        [],
        [b"HTTP/1.1 400 Bad Request\r\n"],
        [b"\x91" * 10_000],
    ],
    ids=["junk", "empty", "no boot", "no header", "http", "nested"],
)
def test_an_answer_that_is_no_reply_is_a_protocol_error(frames):
    with ScriptedPeer(lambda op: frames) as peer, MessageQueueClient(peer.url) as mq, pytest.raises(ProtocolError) as caught:
        mq.call(Noop())
    assert "not one of this protocol" in caught.value.message


def test_answers_to_questions_never_asked_are_thrown_away():
    """A peer that sends frames of its own accord."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.linger = 0
    port = router.bind_to_random_port("tcp://127.0.0.1")
    with MessageQueueClient(f"tcp://127.0.0.1:{port}") as mq:
        future = mq.submit(Noop(), may_wait=True)
        peer, request_id, _ = router.recv_multipart()
        for frames in ([b"\xff" * 8, b"x"], [b"\xff" * 8], [b"", b"", b""], [request_id[:4]], [b"z" * 100, b"y", b"payload"]):
            router.send_multipart([peer, *frames])
        router.send_multipart([peer, request_id, *reply_of(NoopReply(version="right"))])
        assert future.result().version == "right"
        router.send_multipart([peer, request_id, *reply_of(NoopReply(version="twice"))])
        assert future.result().version == "right"
    router.close()
    context.term()


def test_an_error_reply_is_raised_by_the_future_that_it_belongs_to():
    error = reply_of(Reply(error=ErrorInfo("full", "no room", "make some")))
    with ScriptedPeer(lambda op: error) as peer, MessageQueueClient(peer.url) as mq:
        with pytest.raises(RemoteError, match="no room") as caught:
            mq.call(Noop())
        assert (caught.value.code, caught.value.hint) == ("full", "make some")


@pytest.mark.parametrize("url", ["", "nonsense", "tcp://", "tcp://host", "http://127.0.0.1:80", "inproc:"])
def test_an_address_that_is_none_is_a_usage_error_and_leaves_nothing(url):
    with MessageQueueClient(url) as mq:
        with pytest.raises(UsageError, match="not a ZMQ address") as caught:
            mq.call(Noop(), timeout_seconds=0.2)
        assert "tcp://host:port" in caught.value.hint


def test_a_closed_client_says_so_and_closing_is_quick_whatever_was_under_way():
    with ScriptedPeer(lambda op: None) as peer:
        mq = MessageQueueClient(peer.url)
        mq.submit(Noop(), timeout_seconds=120, may_wait=True)
        assert seconds(mq.close) < 30
        mq.close()
    errors = []

    def ask() -> None:
        try:
            mq.call(Noop())
        except UnreachableError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(60)
    assert "is closed" in str(errors[0])


def test_a_thread_that_ends_takes_its_connection_along(server, mq):
    """A program that starts a thread for each of its requests must not run out of descriptors."""
    mq.call(Noop())
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        thread = threading.Thread(target=lambda: mq.call(Noop()))
        thread.start()
        thread.join(60)
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, "closing of the threads' sockets")


def test_a_client_that_nobody_closed_is_collected_and_leaves_nothing(server):
    """It and its channel are a cycle, so the collector decides what of them is finalized first, and any thread may run it."""
    before = len(os.listdir("/proc/self/fd"))

    def drop_one() -> None:
        dropped = MessageQueueClient(server.endpoints.zmq)
        dropped.call(Noop())
        dropped.submit(Noop())

    for _ in range(10):
        drop_one()
        collector = threading.Thread(target=gc.collect, daemon=True)
        collector.start()
        collector.join(60)
        assert not collector.is_alive(), "garbage collection hangs"
    wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 2, "closing of the clients' sockets")


@pytest.mark.parametrize("by_itself", [True, False], ids=["by garbage collection", "by another thread"])
def test_a_client_that_is_closed_while_a_thread_opens_its_socket_leaves_nothing(monkeypatch, by_itself):
    mq = MessageQueueClient("tcp://127.0.0.1:9")
    closer = threading.Thread(target=mq.close, daemon=True)
    make_socket = zmq.Context.socket

    def close_meanwhile(context: zmq.Context, kind: int) -> zmq.Socket:
        made = make_socket(context, kind)
        if by_itself:
            mq.close()
        else:
            closer.start()
            closer.join(0.3)  # enough to get to where it waits for this thread
        return made

    connected, end = threading.Event(), threading.Event()

    def use() -> None:
        with contextlib.suppress(UnreachableError):
            mq.connect()
        connected.set()
        assert end.wait(120)  # a thread that ended would take its socket along

    monkeypatch.setattr(zmq.Context, "socket", close_meanwhile)
    user = threading.Thread(target=use, daemon=True)
    user.start()
    try:
        assert connected.wait(60), "close() hangs"
        if not by_itself:
            closer.join(60)
            assert not closer.is_alive(), "close() hangs"
        with pytest.raises(UnreachableError, match="is closed"):
            mq.connect()
    finally:
        end.set()
        user.join(60)


def test_no_socket_is_closed_under_a_thread_that_waits_on_it(monkeypatch):
    """libzmq would abort the process."""
    monkeypatch.setattr(client_mq, "LEAVE_SECONDS", 0.0)
    monkeypatch.setattr(client_mq, "WAKE_MS", 60_000)
    closed_by, errors = [], []
    close_socket = zmq.Socket.close

    def close(socket: zmq.Socket, *arguments: object) -> None:
        closed_by.append(threading.get_ident())
        close_socket(socket, *arguments)

    with ScriptedPeer(lambda op: None) as peer:
        mq = MessageQueueClient(peer.url)

        def ask() -> None:
            try:
                mq.call(Noop(), timeout_seconds=120)
            except UnreachableError as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: peer.ops)
        with monkeypatch.context() as patch:
            patch.setattr(zmq.Socket, "close", close)
            mq.close()
            thread.join(60)
        assert closed_by == [thread.ident]
    assert "is closed" in str(errors[0])


def test_a_client_closed_in_the_middle_of_its_own_call_ends_afterwards(server, monkeypatch):
    """As garbage collection does, which may begin between two frames of a message."""
    mq = MessageQueueClient(server.endpoints.zmq)
    mq.call(Noop())
    receive = client_mq._Channel._receive
    inside = []

    def close_first(channel: client_mq._Channel, timeout_ms: int) -> object:
        with pytest.raises(UnreachableError, match="in the middle of another request"):
            mq.call(Noop())
        mq.close()
        inside.append(channel)
        return receive(channel, timeout_ms)

    monkeypatch.setattr(client_mq._Channel, "_receive", close_first)
    with contextlib.suppress(UnreachableError):
        mq.call(Noop())
    assert inside


@pytest.mark.parametrize("is_dropped", [False, True], ids=["closed", "collected"])
def test_nobody_waits_for_a_context_that_does_not_end(monkeypatch, is_dropped):
    """As while the system's resolver is asked for a name, which takes 10 s and more."""
    end = threading.Event()
    term = zmq.Context.term
    monkeypatch.setattr(zmq.Context, "term", lambda context: (end.wait(60), term(context)))
    if is_dropped:
        monkeypatch.setattr(client_mq, "END_SECONDS", 60.0)
    mq = MessageQueueClient("tcp://127.0.0.1:9")
    mq.connect()
    try:
        if is_dropped:
            del mq
            assert seconds(gc.collect) < 30
        else:
            assert seconds(mq.close) < 30
    finally:
        end.set()
        wait_until(lambda: not any(thread.name == "lmcache-zmq-end" for thread in threading.enumerate()))


# -- what answers there -----------------------------------------------------------------------------------------------


def test_a_refused_connection_is_known_at_once_and_a_server_is_reachable(server):
    check_reachable(server.endpoints.zmq, 1)
    check_reachable("ipc:///nowhere", 1)
    with pytest.raises(UnreachableError, match="cannot connect") as caught:
        check_reachable(f"tcp://127.0.0.1:{free_port()}", 5)
    assert not isinstance(caught.value, DeadlineError)
    with pytest.raises(UnreachableError):
        check_reachable("tcp://127.0.0.1:99999", 1)
    with pytest.raises(UnreachableError):
        check_reachable("tcp://no-such-host.invalid:5555", 1)


@pytest.mark.parametrize(
    ("greeting", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "speaks HTTP, not ZMQ"),
        (b"SSH-2.0-x\r\n", "does not speak ZMQ"),
        (b"\xff\0\0", None),
        (b"", None),
    ],
)
def test_another_service_at_the_address_is_named(monkeypatch, greeting, expected):
    monkeypatch.setattr(client_mq, "GREETING_SECONDS", 60.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            peer, _ = listener.accept()
            with peer, contextlib.suppress(OSError):
                peer.settimeout(5)
                peer.sendall(greeting)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(100):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        found = diagnose(f"tcp://127.0.0.1:{listener.getsockname()[1]}")
        thread.join(60)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert expected in found.message
        assert found.hint


def test_nobody_at_the_address_is_diagnosed_as_nothing():
    assert diagnose(f"tcp://127.0.0.1:{free_port()}") is None
    assert diagnose("ipc:///nowhere") is None
