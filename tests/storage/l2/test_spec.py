"""What `--l2-adapter` accepts, what it says about the rest, and that no password is ever repeated."""

import json
from urllib.parse import quote

import pytest

from lmcache.errors import UsageError
from lmcache.storage.l2 import spec as spec_module
from lmcache.storage.l2.fs import FsAdapter
from lmcache.storage.l2.spec import ADAPTERS, EXAMPLES, SCHEMES, SETTINGS, make_adapter, parse_adapter

SECRET = "s3cr3t"


def refused(text: str) -> tuple[str, str]:
    with pytest.raises(UsageError) as caught:
        parse_adapter(text)
    assert SECRET not in caught.value.message + caught.value.hint
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize(
    ("text", "name", "redacted"),
    [
        ("fs:///var/cache/lmcache?capacity-gb=200", "fs", "fs:///var/cache/lmcache?capacity-gb=200"),
        ("fs:///a%20b/../c?direct_io=no", "fs", "fs:///c?direct-io=0"),
        ("fs:////a//b/", "fs", "fs:///a/b"),
        ("redis://", "redis", "redis://localhost:6379/0"),
        ("redis://host", "redis", "redis://host:6379/0"),
        (f"redis://user:{SECRET}@host:1234/5?ttl-seconds=60", "redis", "redis://user:***@host:1234/5?ttl-seconds=60"),
        (f"redis://:{SECRET}@host", "redis", "redis://:***@host:6379/0"),
        (f"rediss://host?password={SECRET}&prefix=kv:", "redis", "rediss://:***@host:6379/0?prefix=kv:"),
        ("redis+cluster://[::1]:7000", "redis", "redis+cluster://[::1]:7000/0"),
        ("rediss+cluster://host", "redis", "rediss+cluster://host:6379/0"),
        ("s3://bucket", "s3", "s3://bucket/lmcache"),
        ("s3://bucket/a/b/?region=eu-central-1", "s3", "s3://bucket/a/b?region=eu-central-1"),
        (
            f"s3://bucket/p?endpoint=http://host:9000/&access-key-id={SECRET}&secret-access-key={SECRET}",
            "s3",
            "s3://bucket/p?endpoint=http://host:9000&access-key-id=***&secret-access-key=***",
        ),
        ("gs://bucket/p", "gs", "gs://bucket/p"),
        ("az://container/p?account=name", "az", "az://container/p?account=name"),
        ('{"type": "fs", "path": "/c", "capacity-gb": 1.5}', "fs", "fs:///c?capacity-gb=1.5"),
        (json.dumps({"type": "redis", "password": SECRET, "tls": True}), "redis", "rediss://:***@localhost:6379/0"),
        ('{"type": "redis+cluster", "host": "h", "port": 7000}', "redis", "redis+cluster://h:7000/0"),
    ],
)
def test_a_url_and_a_json_object_say_the_same_in_two_ways(text, name, redacted):
    spec = parse_adapter(text)
    assert (spec.name, spec.redacted) == (name, redacted)
    assert SECRET not in repr(spec)
    if "***" not in redacted:
        assert parse_adapter(redacted) == spec


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("redsi://host", "unknown L2 adapter 'redsi'; known: fs, redis, s3, gs, az", "did you mean 'redis'?"),
        ("ftp://host", "unknown L2 adapter 'ftp'; known: fs, redis, s3, gs, az", ""),
        ("/var/cache", "L2 adapter: neither a URL nor a JSON object", EXAMPLES["fs"]),
        (
            "fs:///c?capacity-gib=1",
            "L2 adapter fs has no setting 'capacity-gib'; known: path, capacity-gb, direct-io",
            "did you mean 'capacity-gb'?",
        ),
        ("fs:///c?capacity-gb=much", "L2 adapter fs: capacity-gb 'much': expected a number", ""),
        ("fs:///c?capacity-gb=-1", "L2 adapter fs: capacity-gb '-1': expected 0 to 1073741824", ""),
        ("fs://c/d", "L2 adapter fs: 'c' is read as a host", "write fs:/// and the absolute path"),
        ("fs://", "L2 adapter fs: no path", EXAMPLES["fs"]),
        (
            "fs:///",
            "L2 adapter fs: path '/': expected an absolute path of a folder of its own, such as /var/cache/lmcache",
            "",
        ),
        (
            "fs:////",
            "L2 adapter fs: path '//': expected an absolute path of a folder of its own, such as /var/cache/lmcache",
            "",
        ),
        (
            '{"type": "fs", "path": "//a/.."}',
            "L2 adapter fs: path '//a/..': expected an absolute path of a folder of its own, such as /var/cache/lmcache",
            "",
        ),
        ("redis://host?ttl-seconds=1.5", "L2 adapter redis: ttl-seconds '1.5': expected a whole number", ""),
        ("redis://host/one", "L2 adapter redis: db 'one': expected a whole number", ""),
        ("redis://host?prefix=", "L2 adapter redis: prefix '': expected 1 to 512 printable ASCII characters", ""),
        ("s3://bucket?prefix=/", "L2 adapter s3: prefix '/': expected the name of a folder, such as lmcache or team-a/kv", ""),
        ("redis+cluster://host/2", "L2 adapter redis: db 2: a cluster has only database 0", ""),
        ("rediss://host?tls=0", "L2 adapter redis: tls is given twice", ""),
        ("redis://host?ca-file=/c.pem", "L2 adapter redis: ca-file without TLS", "write rediss://"),
        (
            f"redis://:{SECRET}@host?password-file=/f",
            "L2 adapter redis: password and password-file are both given",
            "drop one",
        ),
        (
            f"redis://:{SECRET}@host:70000",
            "L2 adapter redis: the URL cannot be read: the port is not a number up to 65535",
            EXAMPLES["redis"],
        ),
        (
            f"redis://host?{SECRET}",
            "L2 adapter redis: the URL cannot be read: not key=value&key=value after '?'",
            EXAMPLES["redis"],
        ),
        (f"redis://host?password%3D{SECRET}=1", None, ""),
        ("redis://host#1", "L2 adapter redis: '#' in the URL", "write it as %23"),
        ("s3://", "L2 adapter s3: no bucket", EXAMPLES["s3"]),
        (f"s3://user:{SECRET}@bucket", "L2 adapter s3: a user in the URL", EXAMPLES["s3"]),
        (
            f"s3://bucket?secret-access-key={SECRET}",
            "L2 adapter s3: access-key-id and secret-access-key go together",
            "",
        ),
        (
            "s3://bucket?endpoint=host:9000",
            "L2 adapter s3: endpoint 'host:9000': expected http://HOST:PORT or https://HOST, without credentials or query",
            "",
        ),
        *(
            (
                f"s3://bucket?endpoint={quote(endpoint)}",
                "L2 adapter s3: endpoint ***: expected http://HOST:PORT or https://HOST, without credentials or query",
                "",
            )
            for endpoint in (
                f"https://user:{SECRET}@minio:9000",
                f"user:{SECRET}@minio:9000",
                f"https://user:{SECRET}\u2100@minio:9000",
                f"https://minio:9000/?sig={SECRET}",
                f"https://minio:9000#{SECRET}",
            )
        ),
        *(
            (
                f"s3://bucket?prefix={prefix}",
                f"L2 adapter s3: prefix {prefix!r}: expected the name of a folder, such as lmcache or team-a/kv",
                "",
            )
            for prefix in ("..", ".", "a/../b", "a/./b", "a//b")
        ),
        ("s3://bucket?endpoint=http://host:port", None, ""),
        ("az://container", "L2 adapter az: no account", EXAMPLES["az"]),
        ('{"path": "/c"}', "L2 adapter: the JSON object has no text 'type'", "known: fs, redis, s3, gs, az"),
        ('{"type": "fs", "path": ["/c"]}', "L2 adapter fs: path is neither text, number nor true or false", ""),
        ('{"type": "fs", "path": "c"}', None, ""),
    ],
)
def test_what_cannot_be_meant_is_refused_by_the_name_of_the_setting(text, message, hint):
    found = refused(text)
    assert message is None or found == (message, hint)


def test_broken_json_is_told_where_it_breaks():
    message, hint = refused(f'{{"type": "redis", "password": "{SECRET}"')
    assert message.startswith("L2 adapter: not JSON: ")
    assert hint == spec_module.JSON_EXAMPLE


def test_json_without_end_is_refused():
    found = refused('{"type": "fs", "path": ' + "[" * 100_000)
    assert found == ("L2 adapter: the JSON object is nested too deep", spec_module.JSON_EXAMPLE)


def test_every_adapter_has_settings_an_example_and_a_scheme():
    assert set(ADAPTERS) == set(SETTINGS) == set(EXAMPLES) == {name for name, _ in SCHEMES.values()}
    for name, example in EXAMPLES.items():
        assert parse_adapter(example.split()[-1]).name == name


def test_the_folder_needs_not_be_there_when_the_adapter_is_made(tmp_path):
    assert isinstance(make_adapter(parse_adapter(f"fs://{tmp_path}/new/folder")), FsAdapter)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", [EXAMPLES[name].split()[-1] for name in ("redis", "s3", "az")])
def test_a_client_that_is_not_installed_is_named_with_its_extra(monkeypatch, text):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'client'", name="client")

    monkeypatch.setattr(spec_module.importlib, "import_module", import_module)
    spec = parse_adapter(text)
    with pytest.raises(UsageError) as caught:
        make_adapter(spec)
    assert caught.value.message == f"L2 adapter {spec.name} needs client"
    assert caught.value.hint == f"install lmcache[{spec_module.EXTRAS[spec.name]}]"


@pytest.mark.parametrize(("text", "problem"), [("", "has not one line"), ("a\nb", "has not one line"), (None, "cannot read")])
def test_a_password_file_holds_the_password_alone(tmp_path, text, problem):
    path = tmp_path / "password"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=problem):
        make_adapter(parse_adapter(f"redis://host?password-file={path}"))


def test_certificates_that_cannot_be_read_are_refused_at_start(tmp_path):
    with pytest.raises(UsageError, match=r"ca-file .* cannot be read"):
        make_adapter(parse_adapter(f"rediss://host?ca-file={tmp_path}/none.pem"))


def test_no_client_is_loaded_by_reading_specs():
    """A server without L2, or with a folder alone, pays for none of them."""
    import subprocess
    import sys

    code = (
        "import sys\nfrom lmcache.storage.l2.spec import parse_adapter, make_adapter\n"
        "for text in ('redis://h', 's3://b'): parse_adapter(text)\nmake_adapter(parse_adapter('fs:///nowhere'))\n"
        "print({'redis', 'hiredis', 'obstore'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_an_object_store_is_asked_for_as_many_keys_as_it_answers_at_once():
    adapter = make_adapter(parse_adapter("s3://bucket?max-requests=7&access-key-id=a&secret-access-key=b"))
    assert adapter.keys_at_once == 7
    adapter.close()
