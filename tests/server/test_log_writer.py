"""The server's log goes on, and the server with it, when nobody reads it."""

import contextlib
import fcntl
import json
import logging
import os
import re
import signal
import subprocess
from collections.abc import Iterator

import pytest

from lmcache.client.mq import MessageQueueClient
from lmcache.keys import Namespace
from lmcache.log import JsonFormatter
from lmcache.protocol import Hello, Noop, RegisterKVCache
from lmcache.server import log_writer
from lmcache.server.log_writer import LogWriter
from tests.pools import wait_until
from tests.server.harness import LAYOUT
from tests.server_process import LMCACHE, clean_environment, free_port


@contextlib.contextmanager
def small_pipe() -> Iterator[tuple[int, int]]:
    """Its two ends; it holds a page."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    try:
        yield read_end, write_end
    finally:
        for descriptor in (read_end, write_end):
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def writer_to(descriptor: int) -> Iterator[tuple[LogWriter, logging.Logger]]:
    """A writer with a logger that nobody else has."""
    writer = LogWriter(descriptor)
    writer.setFormatter(JsonFormatter())
    logger = logging.Logger("test")
    logger.addHandler(writer)
    yield writer, logger
    writer.close()
    writer._thread.join(60)
    assert not writer._thread.is_alive()


def read_all(descriptor: int) -> list[str]:
    """The messages up to the end of the pipe."""
    with os.fdopen(descriptor) as file:
        return [json.loads(line)["message"] for line in file]


def test_what_is_logged_right_before_the_end_is_written_as_it_was_formatted():
    with small_pipe() as (read_end, write_end):
        with writer_to(write_end) as (_, logger):
            words = ["two\nlines"]
            logger.warning("%s \udcff", words)
            words.clear()
        os.close(write_end)
        assert read_all(read_end) == ["['two\\nlines'] \udcff"]


def test_lines_without_room_are_dropped_and_counted_where_they_are_missing(monkeypatch):
    monkeypatch.setattr(log_writer, "MAX_LINES", 10)
    with small_pipe() as (read_end, write_end):
        with writer_to(write_end) as (writer, logger):
            for number in range(1000):
                logger.info("%d", number)
            first = os.read(read_end, 4096)
            wait_until(lambda: not writer._lines.qsize())
            logger.info("1000")
        os.close(write_end)
        with os.fdopen(read_end, "rb") as rest:
            told = [json.loads(line)["message"] for line in (first + rest.read()).splitlines()]
    expected = 0
    for message in told:
        dropped = re.fullmatch(r"(\d+) lines were dropped here: nobody has read the log", message)
        assert dropped or message == str(expected)
        expected += int(dropped[1]) if dropped else 1
    assert (expected, told[-1]) == (1001, "1000")
    assert len(told) < 500


def test_the_end_waits_for_no_reader(monkeypatch):
    monkeypatch.setattr(log_writer, "CLOSE_SECONDS", 0.05)
    with small_pipe() as (read_end, write_end), writer_to(write_end) as (writer, logger):
        for number in range(1000):
            logger.info("%d", number)
        writer.close()
        assert writer._thread.is_alive()
        logger.info("too late, and no error")
        os.close(read_end)


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The end of a pipe that takes not one byte more."""
    with small_pipe() as (_, write_end):
        os.set_blocking(write_end, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(write_end, b"x")
        os.set_blocking(write_end, True)
        yield write_end


def test_a_server_whose_log_nobody_reads_answers_and_ends(tmp_path, full_pipe):
    url = f"tcp://127.0.0.1:{(port := free_port())}"
    words = ["server", "--port", str(port), "--no-http", "--l1-size-gb", "0.03", "--pool-dir", str(tmp_path)]
    with subprocess.Popen([*LMCACHE, *words, "--chunk-size", "16"], env=clean_environment(), stderr=full_pipe) as process:
        try:
            with MessageQueueClient(url, timeout_seconds=60) as client:
                name = client.call(Hello(kind="engine")).client
                namespace = Namespace(model="m", chunk_size=16, layout=LAYOUT.fingerprint)
                client.call(RegisterKVCache(client=name, namespace=namespace, layout=LAYOUT))  # which is a line of the log
                client.call(Noop())
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert list(tmp_path.iterdir()) == []
