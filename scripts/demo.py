"""`make demo`: a server, and what people and engines do with it, each in a process of its own.

Prints every command line and its real output. Exits with 0 only if each command ended as it must and nothing is left behind,
neither a process nor a file in shared memory. Where vLLM is installed, it starts one with a tiny random model and asks it
the same question twice. Needs no GPU and no network; takes half a minute, and two minutes more with vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LMCACHE = str(Path(sysconfig.get_path("scripts")) / "lmcache")
TINY_ENGINE = str(REPOSITORY / "scripts" / "tiny_engine.py")
# Every process of the demo inherits this variable, so that those which are left can be told from all others.
MARKER = "DEMO_ID"
POOL_GIB = "0.25"
PROMPT = "{ffmpeg} What is the example usage of ffmpeg?"
ENGINE_PROMPT = "{ffmpeg} Which flag drops the sound?"
STEP_DEADLINE_SECONDS = 600
STOP_DEADLINE_SECONDS = 15
UNREACHABLE = 3


class Demo:
    """Runs the steps; `failures` says which did not end as they must.

    Args:
        tokenizer_dir: a folder with a tokenizer, whose name is the model's, and with a model where vLLM is to be shown.
        log_path: where the server's log goes.
        with_engine: whether vLLM is there to be shown.
    """

    def __init__(self, tokenizer_dir: Path, log_path: Path, with_engine: bool) -> None:
        self.failures: list[str] = []
        self.pool_path = ""
        self._tokenizer_dir = str(tokenizer_dir)
        self._log_path = log_path
        self._with_engine = with_engine
        self._marker = secrets.token_hex(8)
        self._port, self._http_port = free_ports(2)
        self._environment = {name: value for name, value in os.environ.items() if not name.startswith("LMCACHE_")}
        self._environment |= {MARKER: self._marker, "LMCACHE_URL": f"localhost:{self._port}"}
        self._server: subprocess.Popen[bytes] | None = None

    def run(self) -> None:
        """Go through all steps."""
        self.start_server()
        try:
            self.use_server()
            if self._with_engine:
                self.use_engine()
        finally:
            self.stop_server()
        self.heading("Nobody is there now, and the command says so")
        self.lmcache("ping", "kvcache", expected=UNREACHABLE)

    def use_server(self) -> None:
        """What people and engines do with a server."""
        self.heading("Wait until it answers, as a start-up script would")
        if not self.lmcache("ping", "kvcache", "--wait", "20", "--quiet"):
            raise RuntimeError("the server does not answer")
        self.heading("Is it alive? Over HTTP, and over ZMQ")
        self.lmcache("ping", "kvcache", "--url", f"http://localhost:{self._http_port}")
        self.lmcache("ping", "kvcache")
        self.pool_path = self.ask_pool_path()
        self.heading("One store and one retrieve, compared byte by byte")
        self.lmcache("query", "kvcache", "--round-trip")
        self.heading("A process registers a model, stores what an engine would store of a prompt, and ends")
        engine = [TINY_ENGINE, f"localhost:{self._port}", self._tokenizer_dir, PROMPT]
        self.step([sys.executable, *engine], f"python scripts/tiny_engine.py {shlex.join(engine[1:])}")
        self.heading("What of that prompt is cached? The same keys, from another process")
        self.lmcache("query", "kvcache", "--prompt", PROMPT, "--model", self._tokenizer_dir)
        self.heading("What is this server, and what does it hold?")
        self.lmcache("describe", "kvcache")
        self.heading("How fast is it, and does every byte come back?")
        self.lmcache("bench", "kvcache", "--duration", "5")
        self.lmcache("bench", "kvcache", "--verify-only")
        self.heading("Empty it")
        self.lmcache("kvcache", "clear", "-y")

    def use_engine(self) -> None:
        """A vLLM that computes a long prompt once."""
        from tests.vllm_process import VllmServer

        transfer = {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"lmcache.mp.port": self._port},
        }
        flags = ["--max-model-len", "16384", "--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(transfer)]
        marked = {MARKER: self._environment[MARKER]}
        vllm = VllmServer(Path(self._tokenizer_dir), self._log_path.with_name("vllm.log"), flags, env=marked)
        self.heading("vLLM, with one flag for the cache; its own prefix cache is off, so that the next hit is ours")
        shown = ["vllm", "serve", self._tokenizer_dir, "--served-model-name", "tiny", "--port", str(vllm.port), *flags]
        print(f"$ {shlex.join(shown)} &\n", flush=True)
        with vllm:
            self.heading("The same question twice: vLLM computes it once")
            question = ["--url", vllm.url, "--prompt", ENGINE_PROMPT, "--max-tokens", "4", "--ignore-eos", "--timeout", "500"]
            self.lmcache("query", "engine", *question)
            self.lmcache("query", "engine", *question)
            self.heading("What the cache holds now")
            self.lmcache("describe", "kvcache")
            self.heading(
                "vLLM's own benchmark, and where each prompt token came from; the second run finds what the first stored"
            )
            bench = [
                "--model",
                self._tokenizer_dir,
                "--served-model-name",
                "tiny",
                "--dataset-name",
                "random",
                "--input-len",
                "600",
            ]
            self.lmcache("bench", "engine", "--url", vllm.url, *bench, "--output-len", "8", "--num-prompts", "4")
            self.lmcache("bench", "engine", "--url", vllm.url, *bench, "--output-len", "8", "--num-prompts", "4")

    # -- steps ---------------------------------------------------------------------------------------------------------

    def lmcache(self, *words: str, expected: int = 0) -> bool:
        """Run `lmcache WORDS`; tell whether it ended with the exit code that it must have."""
        return self.step([LMCACHE, *words], f"lmcache {shlex.join(words)}", expected)

    def step(self, command: Sequence[str], shown: str, expected: int = 0) -> bool:
        """Print a command line, run it, and compare its exit code."""
        print(f"$ {shown}", flush=True)
        try:
            code = subprocess.run(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.STDOUT,  # so that errors stand where they happened, also in a file
                timeout=STEP_DEADLINE_SECONDS,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return self.fail(f"'{shown}' did not end within {STEP_DEADLINE_SECONDS} s")
        if code != expected:
            return self.fail(f"'{shown}' ended with exit code {code}, expected {expected}")
        if code:
            print(f"(exit code {code}, as it must be)")
        print(flush=True)
        return True

    def fail(self, problem: str) -> bool:
        """Note a problem, and go on."""
        print(f"FAILED: {problem}\n", flush=True)
        self.failures.append(problem)
        return False

    def heading(self, text: str) -> None:
        """Print what comes next."""
        print(f"# {text}", flush=True)

    # -- the server ----------------------------------------------------------------------------------------------------

    def start_server(self) -> None:
        """Start `lmcache server` in the background."""
        words = ["server", "--port", str(self._port), "--http-port", str(self._http_port), "--l1-size-gb", POOL_GIB]
        self.heading("A server with a small pool; the other commands find it through LMCACHE_URL")
        print(f"$ lmcache {shlex.join(words)} &\n$ export LMCACHE_URL=localhost:{self._port}\n", flush=True)
        with self._log_path.open("wb") as log:
            self._server = subprocess.Popen(
                [LMCACHE, *words], env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop_server(self) -> None:
        """Send SIGTERM to the server's pid, wait for its end, and show its log."""
        server, self._server = self._server, None
        if server is None:
            return
        self.heading("Stop the server by its process id; this is its log")
        print(f"$ kill {server.pid}", flush=True)
        server.send_signal(signal.SIGTERM)
        try:
            code = server.wait(STOP_DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            code = server.wait()
        print(self._log_path.read_text(errors="replace"), flush=True)
        if code:
            self.fail(f"the server ended with exit code {code}, expected 0")

    def ask_pool_path(self) -> str:
        """Return where the pool's file is."""
        command = [LMCACHE, "describe", "kvcache", "--format", "json"]
        answer = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=STEP_DEADLINE_SECONDS, check=True
        )
        return str(json.loads(answer.stdout)["l1"]["pool_path"])

    def check_nothing_left(self) -> None:
        """Note processes of this demo that still run, and files of its pool that still exist."""
        for pid in marked_processes(f"{MARKER}={self._marker}".encode()):
            self.fail(f"process {pid} is left")
        pool = Path(self.pool_path)
        for path in pool.parent.glob(f"{pool.name}*") if self.pool_path else ():
            self.fail(f"{path} is left")


def marked_processes(marker: bytes) -> list[int]:
    """Return the processes that started with `marker` in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:
            continue  # another user's, or it has just ended
    return found


def free_ports(count: int) -> list[int]:
    """Return ports of the loopback interface that nobody listens on."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def main() -> int:
    """Run the demo; 0 when everything was as it must be."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a demo that is ended also ends its server
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.path.insert(0, str(REPOSITORY))
    from tests.tiny_model import make_tiny_model, make_tiny_tokenizer

    with_engine = importlib.util.find_spec("vllm") is not None
    with tempfile.TemporaryDirectory(prefix="lmcache-demo-") as folder:
        make = make_tiny_model if with_engine else make_tiny_tokenizer
        demo = Demo(make(Path(folder) / "tiny-model"), Path(folder) / "server.log", with_engine)
        try:
            demo.run()
        except (RuntimeError, OSError, subprocess.SubprocessError) as exc:
            demo.fail(str(exc))
        except KeyboardInterrupt:
            demo.fail("interrupted")
        demo.check_nothing_left()
    if demo.failures:
        print("The demo failed:", *demo.failures, sep="\n  ")
        return 1
    print("The demo succeeded: every command ended as it must, and no process and no file is left.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
