"""The engines that benchmarks start: none of them outlives its benchmark."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from tests.chaos.waiting import wait_until
from tests.fakes import PATIENCE_SECONDS

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# It never gets healthy, and takes its time to end. Not vLLM: what counts here is who ends it, and when.
ENGINE = """
import pathlib, signal, sys, time

def end(*_):
    pathlib.Path(sys.argv[1] + ".ending").touch()
    time.sleep(3 if "plain" in sys.argv[1] else 1)  # the one that is ended first is the slower one
    sys.exit()

signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1] + ".started").touch()
time.sleep(600)
"""
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
LOST = """
import os, signal
from engines import end_on_sigterm

class Told:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

end_on_sigterm()
Told()
print("lost", flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
BENCHMARK = """
import sys
from contextlib import ExitStack
from pathlib import Path
from engines import Engine, end_on_sigterm, start_side_by_side

code, folder = sys.argv[1:]
end_on_sigterm()
with ExitStack() as stack:
    engines = [Engine(name, Path("model"), Path(folder), []) for name in ("ours", "plain")]
    for engine in engines:
        engine._command = [sys.executable, "-c", code, str(engine.log_path)]
    start_side_by_side(engines, stack)
"""


def test_a_benchmark_that_is_told_to_end_while_engines_start_ends_them_at_once_and_all_even_if_it_is_told_twice(tmp_path):
    command = [sys.executable, "-c", BENCHMARK, ENGINE, str(tmp_path)]
    benchmark = subprocess.Popen(command, env={**ENVIRONMENT, "PYTHONFAULTHANDLER": "1"})
    engines = []
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.started"))) == 2, "both were started")
        engines = psutil.Process(benchmark.pid).children()
        benchmark.send_signal(signal.SIGTERM)
        wait_until(lambda: list(tmp_path.glob("*.ending")), "the first is being ended")
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(PATIENCE_SECONDS) == 128 + signal.SIGTERM
        assert not any(engine.is_running() for engine in engines)
    finally:
        if benchmark.poll() is None:
            benchmark.send_signal(signal.SIGABRT)  # says where it is
        benchmark.wait()
        for engine in engines:
            with suppress(psutil.NoSuchProcess):
                engine.kill()


def test_a_benchmark_whose_exit_was_lost_in_a_destructor_ends_when_it_is_told_again():
    command = [sys.executable, "-c", LOST]
    ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert ended.stdout == "lost\n"
    assert ended.returncode == 128 + signal.SIGTERM
