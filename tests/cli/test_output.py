"""Results as text and as JSON."""

import errno
import json
import os
import resource
import stat
from argparse import Namespace

import pytest

from lmcache.cli.output import (
    Result,
    check_output,
    format_bytes,
    format_duration,
    percentile,
    printable,
    report,
    to_json,
    write,
)
from lmcache.errors import LMCacheError, UsageError


def arguments(**values):
    return Namespace(**{"format": "text", "output": None, "quiet": False, **values})


def test_a_box_has_the_shape_of_the_published_transcript():
    result = Result("Ping Engine", width=30, value_start=25)
    result.row("Status", "OK")
    result.row("Round trip time (ms)", 12.3)
    assert result.text() == (
        "======== Ping Engine =========\n"
        "Status:                  OK\n"
        "Round trip time (ms):    12.3\n"
        "=============================="
    )


def test_right_aligned_values_indents_and_section_rules_match_the_published_transcript():
    result = Result("Query Engine Result", width=41)
    result.row("Prompt tokens", 8192)
    result.row("Corpus 'ffmpeg'", 8186, indent=2)
    result.section("Latency Metrics")
    result.row("TTFT (ms)", 892.3)
    assert result.text().splitlines() == [
        "========== Query Engine Result ==========",
        "Prompt tokens:                       8192",
        "  Corpus 'ffmpeg':                   8186",
        "-------------Latency Metrics-------------",
        "TTFT (ms):                          892.3",
        "=========================================",
    ]


def test_values_may_end_before_the_box_does():
    result = Result("LMCache KV Cache Service", width=50, value_end=45)
    result.row("L1 used (GB)", 1, text="42.3 (70.5%)")
    assert result.text().splitlines()[1] == "L1 used (GB):                    42.3 (70.5%)"


@pytest.mark.parametrize("shape", [{}, {"value_end": 25}, {"value_start": 20}])
def test_the_box_grows_with_its_longest_row_and_stays_aligned(shape):
    result = Result("Title", width=30, **shape)
    result.row("A label that is rather long", "and so is its value")
    result.row("Short", "value")
    top, *rows, bottom = result.text().splitlines()
    assert len(top) == len(bottom)
    assert all(len(row) <= len(top) for row in rows) or "value_start" in shape
    assert "long: and" in rows[0]


def test_text_and_json_come_from_the_same_calls():
    result = Result("Title")
    result.row("Ratio", 0.5, key="ratio", text="50.0%")
    result.section("Part", key="part")
    result.row("Size", 1 << 20, key="size_bytes", text="1.0 MiB")
    result.unknown("L2", "no tier is configured", key="l2_ratio")
    result.line("free text")
    result.put("only_json", [1, 2])
    assert "50.0%" in result.text()
    assert "n/a (no tier is configured)" in result.text()
    assert json.loads(to_json(result.document())) == {
        "ok": True,
        "schema_version": 1,
        "ratio": 0.5,
        "part": {
            "size_bytes": 1 << 20,
            "l2_ratio": None,
            "l2_ratio_unknown_because": "no tier is configured",
            "only_json": [1, 2],
        },
    }


def test_a_bad_result_exits_with_1_and_says_why_on_stderr(capsys):
    result = Result("Title")
    result.row("Status", "FAIL", key="status")
    result.fail("the pool cannot allocate", "restart the server", "unhealthy")
    assert report(result, arguments()) == 1
    captured = capsys.readouterr()
    assert "FAIL" in captured.out
    assert captured.err == "error: the pool cannot allocate\nhint: restart the server\n"
    assert report(result, arguments(format="json")) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "ok": False,
        "schema_version": 1,
        "error": {"code": "unhealthy", "message": "the pool cannot allocate", "hint": "restart the server"},
        "status": "FAIL",
    }
    assert captured.err == ""


def test_quiet_prints_nothing_and_keeps_the_exit_code(capsys):
    result = Result("Title")
    assert report(result, arguments(quiet=True)) == 0
    result.fail("bad")
    assert report(result, arguments(quiet=True)) == 1
    assert capsys.readouterr() == ("", "")


def test_output_replaces_a_file_and_leaves_no_draft(tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text("old")
    result = Result("Title")
    assert report(result, arguments(format="json", output=str(path))) == 0
    assert json.loads(path.read_text())["ok"] is True
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]
    assert capsys.readouterr().out == ""


@pytest.fixture
def no_rename(monkeypatch):
    """Renaming fails as it does onto a file that is a bind mount."""

    def refuse(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", refuse)


def test_a_file_that_cannot_be_renamed_over_is_written_in_place(tmp_path, no_rename):
    path = tmp_path / "result"
    path.write_text("what was there before, and longer")
    write("new", str(path))
    assert path.read_text() == "new\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


@pytest.mark.parametrize("refuses", ["permissions", "name"])
def test_a_file_beside_which_no_draft_can_be_made_is_written_in_place(tmp_path, refuses):
    if refuses == "permissions" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    path = tmp_path / ("result" if refuses == "permissions" else "r" * 255)
    path.write_text("what was there before, and longer")
    tmp_path.chmod(0o500 if refuses == "permissions" else 0o700)
    try:
        check_output(str(path))
        write("new", str(path))
    finally:
        tmp_path.chmod(0o700)
    assert path.read_text() == "new\n"


def test_a_draft_that_the_disk_does_not_hold_leaves_the_file_alone(tmp_path):
    path = tmp_path / "result"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        with pytest.raises(LMCacheError, match="File too large"):
            write("more than eight bytes", str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result"]


def test_figures_that_the_file_does_not_take_go_to_stdout_with_the_error(capsys):
    result = Result("Title")
    result.row("Figure", 42, key="figure")
    assert report(result, arguments(output="/dev/full")) == 1
    captured = capsys.readouterr()
    assert "42" in captured.out
    assert captured.err.splitlines()[0] == "error: cannot write /dev/full: No space left on device"


def test_a_document_that_the_file_does_not_take_is_the_one_on_stdout(capsys):
    result = Result("Title")
    result.row("Figure", 42, key="figure")
    assert report(result, arguments(output="/dev/full", format="json")) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], document["figure"], document["error"]["code"]) == (False, 42, "output")


def test_a_bad_answer_that_the_file_does_not_take_keeps_its_error(capsys):
    result = Result("Title")
    result.fail("the pool cannot allocate", code="unhealthy")
    assert report(result, arguments(output="/dev/full", format="json")) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"]["code"] == "unhealthy"
    assert captured.err.startswith("error: cannot write /dev/full")


def test_output_follows_a_link_and_writes_to_a_device(tmp_path):
    target = tmp_path / "target"
    target.write_text("old")
    (tmp_path / "link").symlink_to(target)
    write("new", str(tmp_path / "link"))
    assert target.read_text() == "new\n"
    assert (tmp_path / "link").is_symlink()
    write("text", os.devnull)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_a_full_disk_is_an_error_of_ours():
    with pytest.raises(LMCacheError, match="cannot write /dev/full: No space left on device"):
        write("text", "/dev/full")


@pytest.mark.parametrize("path", ["", "/nonexistent/file", "/", "/proc/version"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(path):
    if path == "/proc/version" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    with pytest.raises(UsageError, match="cannot write"):
        check_output(path)


def test_numbers_that_json_lacks_are_refused():
    with pytest.raises(ValueError, match="JSON compliant"):
        to_json({"value": float("nan")})


def test_control_characters_do_not_reach_the_terminal():
    assert printable("name\x1b[31m\nline\u200b") == "name\\x1b[31m\\nline\\u200b"
    assert printable("Grüße 中") == "Grüße 中"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.9, "59s"), (60, "1m 0s"), (8072, "2h 14m 32s"), (90061, "1d 1h 1m 1s")],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (64 << 20, "64.0 MiB"), (3 << 40, "3.0 TiB")]
)
def test_sizes(size, text):
    assert format_bytes(size) == text


def test_percentiles_interpolate():
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([0.0, 100.0], 0.99) == pytest.approx(99.0)
