"""The server's settings: where each value comes from, and one sentence for each that is not acceptable."""

import argparse
from dataclasses import fields

import pytest

from lmcache.errors import UsageError
from lmcache.server.args import ENVIRONMENT_VARIABLES, ServerConfig, add_arguments, config_from_args
from lmcache.storage.sizing import GIB

GROUPS = ("server", "storage", "prometheus", "telemetry", "http")
SETTINGS = {item.name: item for group in GROUPS for item in fields(getattr(ServerConfig(), group))}


def parse(*words: str, environ: dict[str, str] | None = None) -> ServerConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_arguments(parser)
    return config_from_args(parser.parse_args(words), environ or {})


def value_of(config: ServerConfig, name: str) -> object:
    return config.describe()[name]["value"]


def test_without_flags_and_variables_every_setting_has_its_default():
    config = parse()
    for name, item in SETTINGS.items():
        shown = {"pool_mode": "0600", "l2_adapter": []}.get(name, item.default)
        assert config.describe()[name] == {"value": shown, "source": "default"}
    assert config.server.host == config.http.http_host == config.prometheus.metrics_host == "127.0.0.1", "SEC-1"
    assert config.storage.pool_mode == 0o600
    assert config.http_token == ""


# A value for each setting that is not its default.
OTHER_VALUES = {
    "engine_type": "default",
    "host": "localhost",
    "port": "1234",
    "chunk_size": "512",
    "client_lease_seconds": "7.5",
    "pin_timeout_seconds": "100",
    "l1_size_gb": "0.5",
    "max_chunks": "77",
    "eviction_policy": "lru",
    "eviction_watermark": "0.8",
    "eviction_ratio": "0.2",
    "pool_dir": "/tmp",
    "pool_name": "my-pool_1",
    "pool_mode": "0660",
    "allow_overcommit": "1",
    "l2_adapter": "fs:///tmp/l2?capacity-gb=1",
    "l2_policy": "write-on-evict",
    "l2_lookup_timeout_seconds": "0.5",
    "l2_min_tokens_per_second": "0",
    "l2_inflight_ratio": "0.25",
    "l2_read_threads": "8",
    "l2_write_threads": "1",
    "l2_drain_seconds": "0",
    "exit_when_stuck_seconds": "30",
    "no_metrics": "1",
    "metrics_host": "localhost",
    "metrics_port": "1235",
    "log_level": "debug",
    "log_format": "json",
    "status_interval_seconds": "0",
    "no_http": "1",
    "http_host": "localhost",
    "http_port": "1236",
}


def test_every_setting_has_a_flag_and_a_variable_and_is_tried_below():
    assert set(OTHER_VALUES) == set(SETTINGS) - {"http_token_file"}
    assert {f"LMCACHE_{name.upper()}" for name in SETTINGS} == ENVIRONMENT_VARIABLES


@pytest.mark.parametrize("name", sorted(OTHER_VALUES))
def test_a_flag_wins_over_the_variable_and_the_variable_over_the_default(name):
    text, variable = OTHER_VALUES[name], f"LMCACHE_{name.upper()}"
    flag = "--" + name.replace("_", "-")
    words = [flag] if isinstance(SETTINGS[name].default, bool) else [flag, text]
    by_flag = parse(*words, environ={variable: "nonsense that is not even looked at"})
    by_variable = parse(environ={variable: text})
    assert value_of(by_flag, name) == value_of(by_variable, name)
    assert by_flag.describe()[name]["source"] == "flag"
    assert by_variable.describe()[name]["source"] == "environment"
    if text not in ("default", "lru"):
        assert value_of(by_variable, name) != value_of(parse(), name)
    others = {other for other in SETTINGS if other != name}
    assert {by_variable.describe()[other]["source"] for other in others} == {"default"}


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("port", ["-1", "65536", "x", "", "1.5", "5_0x"]),
        ("http_port", ["-1", "65536"]),
        ("metrics_port", ["99999"]),
        ("chunk_size", ["0", "-16", "1048577", "256.0", "nan"]),
        ("client_lease_seconds", ["0", "-1", "3601", "nan", "inf"]),
        ("pin_timeout_seconds", ["0", "1e9", "nan"]),
        ("l1_size_gb", ["-1", "nan", "inf", "1e-9", "2000000", "60GB"]),
        ("max_chunks", ["-1", "1e3", "999999999999"]),
        ("eviction_policy", ["FIFO", ""]),
        ("eviction_watermark", ["0", "1.01", "nan"]),
        ("eviction_ratio", ["0", "2", "nan"]),
        ("pool_dir", ["/no/such/folder", "/dev/null", "x\0y"]),
        ("pool_name", ["a/b", "../x", "a.b", "a b", "x" * 65, "\0"]),
        ("pool_mode", ["9", "0400", "07777", "rw", "-1", ""]),
        ("engine_type", ["fast", "blend"]),
        ("log_level", ["LOUD"]),
        ("log_format", ["xml"]),
        ("status_interval_seconds", ["-1", "nan"]),
        ("allow_overcommit", ["maybe", "2"]),
        ("no_http", ["ja"]),
    ],
)
def test_a_value_out_of_range_is_one_sentence_that_names_its_flag_or_variable(name, texts):
    flag, variable = "--" + name.replace("_", "-"), f"LMCACHE_{name.upper()}"
    for text in texts:
        with pytest.raises(UsageError) as caught:
            parse(environ={variable: text})
        assert caught.value.exit_code == 2
        assert flag in caught.value.message or variable in caught.value.message
        assert "\n" not in caught.value.message
        if not isinstance(SETTINGS[name].default, bool):
            with pytest.raises(UsageError) as caught:
                parse(f"{flag}={text}")
            assert flag in caught.value.message


def test_a_pass_cannot_free_more_than_may_be_in_use():
    with pytest.raises(UsageError, match=r"--eviction-ratio 0\.9 is more than --eviction-watermark 0\.5"):
        parse("--eviction-ratio", "0.9", "--eviction-watermark", "0.5")


def test_the_size_is_asked_for_in_gib_and_given_in_whole_pages():
    assert parse("--l1-size-gb", "1.5").capacity_bytes == 3 * GIB // 2
    assert parse("--l1-size-gb", "0.0000100").capacity_bytes == 8192
    assert parse("--l1-size-gb", "0").capacity_bytes == parse().capacity_bytes == 0


def test_flags_cannot_be_shortened():
    with pytest.raises(SystemExit):
        parse("--chunk", "256")


# -- the token --------------------------------------------------------------------------------------------------------


def test_the_token_comes_from_its_file_or_its_variable_and_is_never_shown(tmp_path):
    path = tmp_path / "token"
    path.write_text(" hunter2\n")
    path.chmod(0o600)
    by_file = parse("--http-token-file", str(path), environ={"LMCACHE_HTTP_TOKEN": "other"})
    by_variable = parse(environ={"LMCACHE_HTTP_TOKEN": "hunter2\n"})
    assert by_file.http_token == by_variable.http_token == "hunter2"
    for config in (by_file, by_variable):
        assert "hunter2" not in str(config.describe())
        assert "hunter2" not in repr(config)


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"", 0o600, "is empty"),
        (b" \n", 0o600, "is empty"),
        (b"token", 0o644, "can be read by others"),
        (b"token", 0o640, "can be read by others"),
        (b"\xff\xfe", 0o600, "cannot read"),
        (b"two\nlines", 0o600, "more than one line"),
    ],
)
def test_a_token_file_that_is_no_secret_is_refused(tmp_path, content, mode, problem):
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(UsageError, match=f"{problem}") as caught:
        parse("--http-token-file", str(path))
    assert str(path) in caught.value.message


@pytest.mark.parametrize("name", ["missing", "."])
def test_a_token_file_that_cannot_be_read_is_refused(tmp_path, name):
    with pytest.raises(UsageError, match="cannot read --http-token-file"):
        parse("--http-token-file", str(tmp_path / name))


def test_a_token_variable_that_no_header_can_carry_is_refused():
    with pytest.raises(UsageError, match="more than one line") as caught:
        parse(environ={"LMCACHE_HTTP_TOKEN": "two\nlines"})
    assert "LMCACHE_HTTP_TOKEN" in caught.value.message


# -- tiers below L1 ---------------------------------------------------------------------------------------------------

REDIS = "redis://user:hunter2@cache:6379/0"


def test_tiers_come_in_the_order_of_their_flags():
    config = parse("--l2-adapter", "fs:///tmp/l2", "--l2-adapter", REDIS)
    assert [spec.name for spec in config.storage.l2_adapter] == ["fs", "redis"]


@pytest.mark.parametrize(
    "text",
    [
        f"fs:///tmp/l2 {REDIS}",
        f'["fs:///tmp/l2", "{REDIS}"]',
        '[{"type": "fs", "path": "/tmp/l2"}, {"type": "redis", "host": "cache"}]',
    ],
)
def test_the_variable_holds_several_tiers(text):
    config = parse(environ={"LMCACHE_L2_ADAPTER": text})
    assert [spec.name for spec in config.storage.l2_adapter] == ["fs", "redis"]


def test_one_json_object_is_one_tier():
    assert len(parse(environ={"LMCACHE_L2_ADAPTER": '{"type": "fs", "path": "/tmp/l2"}'}).storage.l2_adapter) == 1


def test_a_password_is_in_no_description_and_no_error():
    config = parse("--l2-adapter", REDIS)
    assert "hunter2" not in repr(config.describe()) + repr(config)
    for wrong in (REDIS + "?nonsense=1", "redis://user:hunter2@cache:port", '{"type": "redis", "password": "hunter2", "x": 1}'):
        with pytest.raises(UsageError) as caught:
            parse("--l2-adapter", wrong)
        assert "hunter2" not in caught.value.message + caught.value.hint


def test_more_tiers_than_there_may_be_are_refused():
    with pytest.raises(UsageError, match="at most 8"):
        parse(*["--l2-adapter", "fs:///tmp/l2"] * 9)
