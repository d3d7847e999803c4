"""A real vLLM API server on the CPU as a child process, spoken to over loopback HTTP."""

import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from tests.server_process import free_port

MODEL_NAME = "tiny"
# Healthy after about 40 s on two idle cores; a busy machine takes several times as long.
START_SECONDS = 600.0
STOP_SECONDS = 60.0
RESET_SECONDS = 180.0
RESET_LINE = "Successfully reset prefix cache"
# More flags for each vLLM: on a GPU, how much of its memory to take.
FLAGS_VARIABLE = "LMCACHE_TEST_VLLM_FLAGS"
LOG_TAIL_LINES = 60
SHARED_MEMORY = Path("/dev/shm")

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # With a KV connector vLLM keeps one more core free, which changes thread counts and sums.
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONUNBUFFERED": "1",
}


class VllmServer:
    """A vLLM server that is healthy inside `with`, and of which no process is left after it.

    Args:
        model_dir: what `tests.tiny_model.make_tiny_model` wrote.
        log_path: where stdout and stderr of all its processes go.
        flags: more command-line flags; they come last, so they win.
        env: more environment variables; they win too.
        start_seconds: how long it may take to become healthy.
    """

    def __init__(
        self,
        model_dir: Path,
        log_path: Path,
        flags: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        start_seconds: float = START_SECONDS,
    ) -> None:
        self.log_path = log_path
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._start_seconds = start_seconds
        self._env = {**os.environ, **ENVIRONMENT, **(env or {})}
        # fmt: off
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(model_dir), "--served-model-name", MODEL_NAME,
            "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "bfloat16", "--max-model-len", "8192", "--enforce-eager",
            *flags, *shlex.split(os.environ.get(FLAGS_VARIABLE, "")),
        ]
        # fmt: on
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "VllmServer":
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def group(self) -> int:
        """The id of the process group; only while it runs."""
        assert self._process is not None
        return self._process.pid

    def members(self) -> list[psutil.Process]:
        """Its processes that still run."""
        return _group_members(self.group)

    def start(self) -> None:
        """Start the server and return when it is healthy."""
        self.launch()
        try:
            self.wait_until_healthy()
        except BaseException:
            self.close()
            raise

    def launch(self) -> None:
        """Start the server in a session of its own; `close` ends it."""
        self._scratch = tempfile.TemporaryDirectory(prefix="vllm-")
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                # vLLM leaves its sockets and caches behind in the temporary folder.
                env={**self._env, "TMPDIR": self._scratch.name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_healthy(self) -> None:
        """Return when it answers.

        Raises: RuntimeError, with the end of its log, where it has ended or takes longer than it may.
        """
        process = self._process
        assert process is not None
        deadline = time.monotonic() + self._start_seconds
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise RuntimeError(f"vLLM exited with {process.returncode}:\n{self.log_tail()}")
            try:
                if httpx.get(f"{self.url}/health", timeout=60).is_success:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            time.sleep(0.2)
        raise RuntimeError(f"vLLM not healthy in {self._start_seconds:g} s:\n{self.log_tail()}")

    def complete(
        self,
        prompt: str | Sequence[int],
        max_tokens: int,
        temperature: float = 0.0,
        timeout_seconds: float = 100.0,
    ) -> str:
        """The text that vLLM adds to `prompt`, which is text or token ids."""
        response = httpx.post(
            f"{self.url}/v1/completions",
            json={
                "model": MODEL_NAME,
                "prompt": prompt if isinstance(prompt, str) else list(prompt),
                "max_tokens": max_tokens,
                "temperature": temperature,
            },
            timeout=timeout_seconds,
        )
        if response.is_error:
            raise RuntimeError(f"HTTP {response.status_code}: {response.text}\n{self.log_tail()}")
        return str(response.json()["choices"][0]["text"])

    def forget(self) -> None:
        """Empty vLLM's own prefix cache, so that hits come from the cache server.

        vLLM answers 200 also when it could not, because a store still reads an ended request's blocks; its log tells.
        """
        deadline = time.monotonic() + RESET_SECONDS
        num_resets = self.log_text().count(RESET_LINE)
        while self.log_text().count(RESET_LINE) == num_resets:
            assert time.monotonic() < deadline, "vLLM does not empty its prefix cache"
            httpx.post(f"{self.url}/reset_prefix_cache", timeout=RESET_SECONDS)
            time.sleep(0.02)

    def log_text(self) -> str:
        """All that the server has printed so far."""
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self) -> str:
        """The last lines of the log, for messages."""
        return "\n".join(self.log_text().splitlines()[-LOG_TAIL_LINES:])

    def kill(self) -> None:
        """End all its processes at once, as a lack of memory does."""
        assert self._process is not None
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """End the whole process group and confirm that it is gone; a second call does nothing."""
        self._end(signal.SIGTERM, signal.SIGKILL)

    def _end(self, *numbers: signal.Signals) -> None:
        """Send signals until all have ended; the shared memory that nobody is left to remove goes too."""
        process, self._process = self._process, None
        if process is None:
            return
        inodes = {inode for member in _group_members(process.pid) for inode in _mapped_inodes(member.pid)}
        for number in numbers:
            # The system gives this id to nobody else while the group has a member.
            _signal_group(process.pid, number)
            if _wait_for_group_to_end(process, STOP_SECONDS):
                _remove_shared_memory(inodes)
                if self._scratch:
                    self._scratch.cleanup()
                return
        left = ", ".join(f"{p.pid} {p.name()}" for p in _group_members(process.pid))
        raise RuntimeError(f"vLLM process group {process.pid} outlived SIGKILL: {left}")


def _remove_shared_memory(inodes: set[int]) -> None:
    # multiprocessing's segments and semaphores, and those through which vLLM's ranks talk on a CPU: it never removes them.
    for pattern in ("psm_*", "sem.mp-*", "vllm_dist_*"):
        for path in SHARED_MEMORY.glob(pattern):
            with suppress(FileNotFoundError):
                if path.stat().st_ino in inodes:
                    path.unlink()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):  # the last one has just ended
        os.killpg(group, number)


def _wait_for_group_to_end(process: subprocess.Popen[bytes], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not _group_members(process.pid):
            process.wait()  # reaps the leader
            return True
        time.sleep(0.1)
    return False


def _group_members(group: int) -> list[psutil.Process]:
    """The processes of the group that still run; zombies hold nothing and are not counted."""
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass  # ended meanwhile
    return members


def _mapped_inodes(pid: int) -> set[int]:
    """The files that a process has mapped. Not by name: a semaphore is mapped before it gets the one that it keeps."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:  # it has just ended
        return set()
    return {int(line.split(maxsplit=5)[4]) for line in lines} - {0}
