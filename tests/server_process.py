"""A real `lmcache server` as a child process on free ports of the loopback interface."""

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from lmcache.client.mq import MessageQueueClient
from lmcache.errors import UnreachableError
from lmcache.protocol import Noop, Status

LMCACHE = (sys.executable, "-m", "lmcache.cli.main")
# A machine with other work takes several times what an idle one does.
START_SECONDS = 120.0
STOP_SECONDS = 60.0
ANSWER_SECONDS = 60.0


class LmcacheServer:
    """A server that answers inside `with`; after it no process and no shared memory is left.

    Args:
        flags: more flags of `lmcache server`; they come last, so they win.
        env: more environment variables; those of the surroundings named LMCACHE_* are left out.
        l1_size_gb: size of the pool.
        http: False starts it with `--no-http`.
        leaves_pool: True where the flags ask for a pool that outlives the process.
        port: where it listens; 0 takes a free one.
        command: another `lmcache` than this environment's.
    """

    def __init__(
        self,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        l1_size_gb: float = 0.0625,
        http: bool = True,
        leaves_pool: bool = False,
        port: int = 0,
        command: Sequence[str] = LMCACHE,
    ) -> None:
        self.port = port or free_port()
        self.http_port = free_port()
        self.zmq_url = f"tcp://127.0.0.1:{self.port}"
        self.http_url = f"http://127.0.0.1:{self.http_port}" if http else ""
        self.pool_path = ""
        self._leaves_pool = leaves_pool
        self._env = {**clean_environment(), **(env or {})}
        self._command = [
            *command,
            "server",
            *("--port", str(self.port), "--l1-size-gb", str(l1_size_gb)),
            *(("--http-port", str(self.http_port)) if http else ("--no-http",)),
            *flags,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the server

    def __enter__(self) -> "LmcacheServer":
        try:
            self.start()
        except BaseException:
            self._log.close()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process id; only while it runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the process and return when it answers."""
        self._process = subprocess.Popen(
            self._command,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        try:
            self._wait_until_it_answers(self._process)
            self.pool_path = str(self.status()["l1"]["pool_path"])
        except BaseException:
            self.kill()
            raise

    def status(self) -> dict[str, Any]:
        """What the server says about itself."""
        with MessageQueueClient(self.zmq_url, ANSWER_SECONDS) as client:
            return client.call(Status()).status

    def freeze(self) -> None:
        """Stop the process as a debugger would: its ports stay open and nobody answers, not even what came before."""
        os.kill(self.pid, signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        while any((task / "stat").read_text().rpartition(")")[2].split()[0] != "T" for task in tasks.iterdir()):
            time.sleep(0.001)  # the signal stops one thread, that one the others

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def log_text(self) -> str:
        """All that the server has printed so far."""
        length = self._log.seek(0, os.SEEK_END)
        return os.pread(self._log.fileno(), length, 0).decode(errors="replace")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit status; the log stays readable."""
        process, self._process = self._process, None
        assert process is not None
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        try:
            code = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"the server ignored {number.name}:\n{self.log_text()}") from None
        left = [child for child in children if child.is_running()]
        assert not left, f"processes outlived their server: {left}"
        return code

    def kill(self) -> None:
        """End the process without giving it a chance to clean up; does nothing after its end."""
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGKILL)
        self._process = None

    def shared_files(self) -> list[Path]:
        """The pool's file and its clients' that exist now."""
        if not self.pool_path:
            return []
        pool = Path(self.pool_path)
        return sorted(pool.parent.glob(f"{pool.name}*"))

    def close(self) -> None:
        """Stop the server if it still runs, and check that nothing of it is left."""
        was_running = self._process is not None
        try:
            if self._process is not None:
                died_with = self._process.poll()
                assert died_with is None, f"the server had died with {died_with}:\n{self.log_text()}"
                code = self.stop()
                assert code == 0, f"the server ended with {code}:\n{self.log_text()}"
        finally:
            left = self.shared_files()
            for path in left:
                path.unlink()
            self._log.close()
        if was_running and not self._leaves_pool:
            assert not left, f"left in shared memory: {left}"

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        with MessageQueueClient(self.zmq_url, timeout_seconds=0.5) as client:
            while time.monotonic() < deadline:
                if process.poll() is not None:
                    raise RuntimeError(f"exited with {process.returncode}:\n{self.log_text()}")
                try:
                    client.call(Noop())
                    return
                except UnreachableError:
                    continue  # not listening yet
        raise RuntimeError(f"no answer in {START_SECONDS:g} s:\n{self.log_text()}")


def clean_environment() -> dict[str, str]:
    """The environment without this project's variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}


def run_lmcache(
    *words: str,
    env: Mapping[str, str] | None = None,
    stdin: str = "",
    cwd: Path | None = None,
    timeout_seconds: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run the real command and return its exit code, stdout and stderr."""
    return subprocess.run(
        [*LMCACHE, *words],
        env={**clean_environment(), **(env or {})},
        input=stdin,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


@contextlib.contextmanager
def running_lmcache(
    *words: str, env: Mapping[str, str] | None = None, command: Sequence[str] = LMCACHE
) -> Iterator[subprocess.Popen[str]]:
    """The real command at work; it is ended, reaped and closed with the `with` block, however that ends."""
    with subprocess.Popen(
        [*command, *words],
        env={**clean_environment(), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Ports:
    """Ports of the loopback interface that no other run of the tests takes, one after the other.

    A port that was merely free may be somebody else's by the time a server listens on it. So each process owns a block of
    them, for which it holds an address that the kernel gives to one process only and takes back at its end. None is of those
    that the system hands out by itself: it could give it to the next connection.
    """

    FIRST, LAST, BLOCK = 10_000, 32_700, 100

    def __init__(self) -> None:
        blocks = range(self.FIRST, self.LAST, self.BLOCK)
        for first in random.SystemRandom().sample(blocks, len(blocks)):
            self._owned = socket.socket(socket.AF_UNIX)
            try:
                self._owned.bind(f"\0lmcache-test-ports-{first}")
            except OSError:
                self._owned.close()
                continue
            self._next = itertools.cycle(range(first, first + self.BLOCK))
            return
        raise RuntimeError("all ports for tests are taken by other runs")

    def take(self) -> int:
        """Return one that nobody listens on."""
        while True:
            port = next(self._next)
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port


_ports = Ports()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on, and nobody will who asks here too."""
    return _ports.take()
