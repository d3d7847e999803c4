"""The script that runs all checks and benchmarks of the GPU path: what it does with parts that end, fail or hang."""

import importlib
import json
import sys
from pathlib import Path

import psutil
import pytest

from tests.chaos.waiting import wait_until

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
HANGS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(os.environ["TMPDIR"] + "/vllm.log", "w") as log:
    log.write(str(child.pid))
time.sleep(600)
"""


@pytest.fixture
def gpu_all(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gpu_all")


def test_each_part_is_told_of_and_nothing_of_it_is_left(gpu_all, tmp_path, capsys):
    def python(name, code, max_seconds=60.0, may_share=False):
        return gpu_all.Part(name, [sys.executable, "-c", code], max_seconds, may_share)

    parts = [
        python("good", "print('{broken'); print('{\"x\": 1}'); print('words')"),
        python("hangs", HANGS, max_seconds=2.0, may_share=True),
        python("bad", "raise SystemExit(3)", may_share=True),
    ]
    results = gpu_all.run_all(parts, tmp_path)
    assert {name: (result["status"], result["result"]) for name, result in results.items()} == {
        "good": (0, {"x": 1}),
        "hangs": (None, None),
        "bad": (3, None),
    }
    assert "KeyboardInterrupt" in (tmp_path / "hangs.log").read_text()
    child = int((tmp_path / "hangs-vllm.log").read_text())
    wait_until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE, "it is killed")
    assert "hangs: ended at its deadline" in capsys.readouterr().out
    assert json.dumps(results)


def test_a_part_that_there_is_not_is_refused_with_those_that_there_are(gpu_all, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_all.py", "--model", "m", "--out", "o", "--parts", "engin", "copy"])
    with pytest.raises(SystemExit):
        gpu_all.parse_args()
    error = capsys.readouterr().err
    assert "no part is called engin" in error
    assert "timeline" in error
