"""Logs: to stderr, as text or JSON lines, and never the same cause over and over."""

import json
import logging
from collections.abc import Iterator

import pytest

from lmcache import log
from lmcache.log import RateLimitedLog, configure_logging, init_logger


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger(log.ROOT_NAME)
    handlers, level, propagate = root.handlers[:], root.level, root.propagate
    yield
    root.handlers[:], root.propagate = handlers, propagate
    root.setLevel(level)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    return now


def test_lines_go_to_stderr_and_nothing_to_stdout(capsys: pytest.CaptureFixture[str]):
    configure_logging("INFO")
    init_logger("lmcache.part").info("hello %d", 7)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("INFO lmcache.part: hello 7\n")


def test_json_lines_are_one_object_each_also_with_a_traceback(capsys: pytest.CaptureFixture[str]):
    configure_logging("INFO", json_lines=True)
    logger = init_logger("part")
    logger.info("two\nlines")
    try:
        raise KeyError("x")
    except KeyError:
        logger.exception("failed")
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["message"], first["level"], first["logger"]) == ("two\nlines", "INFO", "lmcache.part")
    assert isinstance(first["time"], float)
    assert "KeyError" in second["exception"]


@pytest.mark.parametrize(
    ("level", "variable", "expected"),
    [("WARNING", "DEBUG", "WARNING"), ("", "error", "ERROR"), ("", "", "INFO"), ("", "loud", "INFO"), ("debug", "", "DEBUG")],
)
def test_the_level_is_the_given_one_then_the_variable_then_info(monkeypatch, level: str, variable: str, expected: str):
    monkeypatch.setenv(log.LEVEL_VARIABLE, variable)
    configure_logging(level)
    assert logging.getLogger("lmcache").level == getattr(logging, expected)


def test_configuring_twice_writes_a_line_once(capsys: pytest.CaptureFixture[str]):
    configure_logging()
    configure_logging()
    init_logger("lmcache.part").warning("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_logger_named_outside_the_package_is_put_under_it():
    assert init_logger("plugin").name == "lmcache.plugin"
    assert init_logger("lmcache.x").name == "lmcache.x"


def test_a_repeating_cause_is_logged_once_an_interval_with_its_count(capsys, clock: list[float]):
    configure_logging("INFO")
    limited = RateLimitedLog(init_logger("lmcache.part"), interval_seconds=10)
    for _ in range(1000):
        limited.warning("full", "L1 is full")
    limited.warning("other", "another cause is not held back")
    clock[0] += 10
    limited.warning("full", "L1 is full")
    clock[0] += 10
    limited.warning("full", "L1 is full")
    lines = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "L1 is full",
        "another cause is not held back",
        "L1 is full (999 more since the last such line)",
        "L1 is full",
    ]
