"""What the parsers accept, refuse and suggest."""

import argparse
import json

import pytest

from lmcache.cli import base
from lmcache.cli.base import check_environment
from lmcache.cli.main import command_names, main, parse
from lmcache.errors import UsageError

COMMANDS = ["bench", "completion", "describe", "kvcache", "ping", "query", "server"]


@pytest.mark.parametrize(
    "words",
    [
        "--format json --timeout 2 --url h:1 --output f -q ping kvcache",
        "ping --format json --timeout 2 --url h:1 --output f -q kvcache",
        "ping kvcache --format json --timeout 2 --url h:1 --output f -q",
        "--format=json ping --timeout=2 --url=h:1 kvcache --output=f --quiet",
        "--format text --url x:9 ping --format json kvcache --timeout 2s --url h:1 --output f -q",
    ],
)
def test_common_options_work_before_and_after_the_command_and_its_target(words):
    args = parse(words.split())
    assert (args.format, args.timeout, args.url, args.output, args.quiet) == ("json", 2.0, "h:1", "f", True)
    assert args.parser.prog == "lmcache ping kvcache"


def test_common_options_have_their_defaults():
    args = parse(["ping", "kvcache"])
    assert (args.format, args.timeout, args.url, args.output, args.quiet) == ("text", 5.0, None, None, False)


def test_the_commands_are_the_modules_of_the_package():
    assert [name for name in command_names() if name in COMMANDS] == COMMANDS


@pytest.mark.parametrize(
    ("words", "message", "hint"),
    [
        ("", "which command? none was given", "see 'lmcache --help'"),
        ("png kvcache", "invalid choice: 'png'", "did you mean 'ping'?"),
        ("ping kvache", "invalid choice: 'kvache'", "did you mean 'kvcache'?"),
        ("kvcache claer", "invalid choice: 'claer'", "did you mean 'clear'?"),
        ("ping", "the following arguments are required: TARGET", "see 'lmcache ping --help'"),
        ("--fromat json ping kvcache", "unrecognized arguments: --fromat", "did you mean '--format'?"),
        ("ping kvcache --cuont 3", "unrecognized arguments: --cuont 3", "did you mean '--count'?"),
        ("ping kvcache --cuont=3", "unrecognized arguments: --cuont=3", "did you mean '--count'?"),
        ("ping --tiemout 3 kvcache", "--tiemout", "did you mean '--timeout'?"),
        ("ping kvcache --coun 3", "unrecognized arguments: --coun 3", "did you mean '--count'?"),
        ("ping kvcache extra", "unrecognized arguments: extra", "see 'lmcache ping kvcache --help'"),
        ("ping kvcache --format xml", "invalid choice: 'xml'", "see 'lmcache ping kvcache --help'"),
        ("server --l1-size 1", "unrecognized arguments: --l1-size 1", "did you mean '--l1-size-gb'?"),
        ("ping kvcache --timeout", "expected one argument", "see 'lmcache ping kvcache --help'"),
        ("ping kvcache --timeout 0", "'0' is not above 0", "see 'lmcache ping kvcache --help'"),
        ("ping kvcache --timeout soon", "'soon' is not a duration such as 10m", "see 'lmcache ping kvcache --help'"),
        ("ping kvcache --count 0", "'0' is not a whole number above 0", "see 'lmcache ping kvcache --help'"),
        ("kvcache evict --ratio 1.5", "'1.5' is not between 0 and 1", "see 'lmcache kvcache evict --help'"),
        ("kvcache evict --bytes -1", "'-1' is not between 1 byte and 4096 PiB", "see 'lmcache kvcache evict --help'"),
        ("kvcache evict --bytes 1 --ratio 1", "not allowed with argument --bytes", "see 'lmcache kvcache evict --help'"),
        ("query kvcache --corpus x", "'x' is not name=path", "see 'lmcache query kvcache --help'"),
        ("completion csh", "invalid choice: 'csh'", "did you mean 'zsh'?"),
    ],
)
def test_a_wrong_command_line_is_one_error_with_a_hint_and_exit_2(words, message, hint, capsys):
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert lines[1] == f"hint: {hint}"


@pytest.mark.parametrize("words", ["--format json png", "png --format=json", "ping kvcache --cuont --format json"])
def test_a_wrong_command_line_is_a_json_document_where_json_was_asked_for(words, capsys):
    assert main(words.split()) == 2
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert (document["ok"], document["schema_version"], document["error"]["code"]) == (False, 1, "usage")
    assert captured.err == ""


def test_what_follows_two_dashes_is_not_read_as_an_option(capsys):
    assert main(["kvcache", "end-session", "--", "--format", "json"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("words", ["--version", "ping --version", "ping kvcache --version", "server --version"])
def test_version_is_printed_anywhere(words, capsys):
    assert main(words.split()) == 0
    assert capsys.readouterr().out == "lmcache 0.1.0\n"
    assert main(["--format", "json", *words.split()]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "schema_version": 1, "version": "0.1.0"}


@pytest.mark.parametrize(
    "words", ["", "ping", "ping kvcache", "kvcache evict", "query kvcache", "describe kvcache", "completion"]
)
def test_help_is_printed_on_stdout(words, capsys):
    assert main([*words.split(), "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"usage: {' '.join(['lmcache', *words.split()])} ")
    assert "common options:" in captured.out
    assert captured.err == ""


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"    {name} " in out for name in COMMANDS)
    assert "130 interrupted" in out


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("512MiB", 512 << 20),
        ("1.5GiB", 3 << 29),
        ("1.5gib", 3 << 29),
        ("10GB", 10**10),
        ("2kB", 2000),
        ("2Ki", 2048),
        ("7 B", 7),
        ("1e3", 1000),
    ],
)
def test_sizes_are_read_with_their_units(text, size):
    assert base.byte_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"), [("30", 30), ("10m", 600), ("1.5h", 5400), ("500ms", 0.5), ("1d", 86400), ("0", 0)]
)
def test_durations_are_read_with_their_units(text, seconds):
    assert base.duration_seconds(text) == seconds


@pytest.mark.parametrize(("text", "value"), [("0", 0), ("0.25", 0.25), ("25%", 0.25), ("100%", 1)])
def test_ratios_are_read_as_a_share_or_in_percent(text, value):
    assert base.ratio(text) == value


@pytest.mark.parametrize("parse_value", [base.byte_size, base.duration_seconds, base.ratio, base.positive_int])
@pytest.mark.parametrize(
    "text", ["", " ", "x", "-1", "nan", "inf", "1e999", "1_0", "1_0%", "٣", "٣%", "0x10", "1,5", "10xyz", "--", "9" * 40]
)
def test_other_texts_are_no_values(parse_value, text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not"):
        parse_value(text)


# -- environment -----------------------------------------------------------------------------------


def test_known_variables_pass_and_foreign_ones_are_nobodys_business():
    assert check_environment({"LMCACHE_URL": "x", "LMCACHE_L1_SIZE_GB": "1", "PATH": "x", "VLLM_LMCACHE_X": "1"}) == []


def test_what_kubernetes_sets_for_a_service_of_our_name_is_nobodys_business():
    """In every pod of the namespace, for a Service called lmcache."""
    links = {
        "LMCACHE_SERVICE_HOST": "10.0.0.1",
        "LMCACHE_SERVICE_PORT": "5555",
        "LMCACHE_SERVICE_PORT_ZMQ": "5555",
        "LMCACHE_PORT": "tcp://10.0.0.1:5555",
        "LMCACHE_PORT_5555_TCP": "tcp://10.0.0.1:5555",
        "LMCACHE_PORT_5555_TCP_PROTO": "tcp",
        "LMCACHE_PORT_5555_TCP_PORT": "5555",
        "LMCACHE_PORT_5555_TCP_ADDR": "10.0.0.1",
        "LMCACHE_SERVER_PORT": "tcp://10.0.0.2:5555",
    }
    assert check_environment(links) == []
    with pytest.raises(UsageError):
        check_environment({"LMCACHE_SERVER_PORT": "5555"})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("LMCACHE_ULR", "did you mean 'LMCACHE_URL'?"), ("LMCACHE_L1_SIZE", "did you mean 'LMCACHE_L1_SIZE_GB'?")],
)
def test_an_unknown_variable_is_refused_with_the_nearest_name(name, hint):
    with pytest.raises(UsageError, match=f"unknown environment variable {name}") as refused:
        check_environment({name: "1"})
    assert refused.value.hint == hint


def test_an_unknown_variable_like_no_other_gets_the_list():
    with pytest.raises(UsageError) as refused:
        check_environment({"LMCACHE_QQQQQQQQQQQQ": "1"})
    assert "LMCACHE_URL" in refused.value.hint


def test_a_misspelt_prefix_is_a_warning_with_the_right_name():
    assert check_environment({"LM_CACHE_URL": "x"}) == ["LM_CACHE_URL is not read; the name is LMCACHE_URL"]
