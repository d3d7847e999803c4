"""Which tiers the server uses, as given to `--l2-adapter`: a URL or a JSON object, checked before anything is opened.

Comes in: `redis://host:6379/0?prefix=kv:` or `{"type": "redis", "host": "host", "prefix": "kv:"}`. Goes out: an `AdapterSpec`,
and from it an adapter. No back end's client is imported until its adapter is made. Next on the data path: the adapter.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from lmcache.errors import UsageError
from lmcache.storage.l2.base import L2Adapter
from lmcache.storage.parsing import number

ADAPTERS = {
    "fs": "lmcache.storage.l2.fs:FsAdapter",
    "redis": "lmcache.storage.l2.redis:RedisAdapter",
    "s3": "lmcache.storage.l2.s3:ObjectStoreAdapter",
    "gs": "lmcache.storage.l2.s3:ObjectStoreAdapter",
    "az": "lmcache.storage.l2.s3:ObjectStoreAdapter",
}
# What `pip install lmcache[...]` brings the client of each.
EXTRAS = {"redis": "redis", "s3": "s3", "gs": "s3", "az": "s3"}
SCHEMES = {
    "fs": ("fs", {}),
    "redis": ("redis", {}),
    "rediss": ("redis", {"tls": "1"}),
    "redis+cluster": ("redis", {"cluster": "1"}),
    "rediss+cluster": ("redis", {"cluster": "1", "tls": "1"}),
    "s3": ("s3", {}),
    "gs": ("gs", {}),
    "az": ("az", {}),
}
HIDDEN = "***"
MAX_PREFIX_CHARS = 512


def _text(text: str) -> str:
    return text


def _name(text: str) -> str:
    if not text:
        raise ValueError("expected a name")
    return text


def _prefix(text: str) -> str:
    if not text.isascii() or not text.isprintable() or not 0 < len(text) <= MAX_PREFIX_CHARS:
        raise ValueError(f"expected 1 to {MAX_PREFIX_CHARS} printable ASCII characters")
    return text


def _bucket_folder(text: str) -> str:
    folder = _prefix(text).strip("/")
    if {"", ".", ".."} & set(folder.split("/")):
        raise ValueError("expected the name of a folder, such as lmcache or team-a/kv")
    return folder


def _folder(text: str) -> str:
    path = "/" + os.path.normpath(text).lstrip("/")  # normpath keeps two leading slashes
    if not os.path.isabs(text) or "\0" in text or path == "/":
        raise ValueError("expected an absolute path of a folder of its own, such as /var/cache/lmcache")
    return path


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected 1 or 0")


def _endpoint(text: str) -> str:
    try:
        parts = urlsplit(text)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not _carries_more(text)
    except ValueError:  # may quote it
        is_good = False
    if text and not is_good:
        raise ValueError("expected http://HOST:PORT or https://HOST, without credentials or query")
    return text.rstrip("/")


def _carries_more(endpoint: str) -> bool:
    """Whether it may hold a password or a signature."""
    return bool(set("@?#") & set(endpoint))


def _setting(default: Any, parse: Callable[[str], Any], help_: str, *, in_url: str = "", is_secret: bool = False) -> Any:
    """One setting; `in_url` says which part of a URL it is, where it is not of the query."""
    return field(
        default=default,
        repr=not is_secret,
        metadata={"parse": parse, "help": help_, "in_url": in_url, "is_secret": is_secret},
    )


@dataclass(frozen=True)
class FsSettings:
    """A folder of a local or mounted file system."""

    path: str = _setting(MISSING, _folder, "the folder; it is made when it is not there", in_url="path")
    capacity_gb: float = _setting(
        0.0,
        number(float, 0, 1 << 30),
        "GiB that values may take; 0: what they take at first use, and four fifths of what is free",
    )
    direct_io: bool = _setting(True, _switch, "pass by the page cache where the file system can")


@dataclass(frozen=True)
class RedisSettings:
    """A Redis or Valkey server, or a cluster of them."""

    host: str = _setting("localhost", _name, "of the server, or of any node of the cluster", in_url="host")
    port: int = _setting(6379, number(int, 1, 65535), "its port", in_url="port")
    db: int = _setting(0, number(int, 0, 1 << 16), "number of the database; a cluster has only 0", in_url="path")
    username: str = _setting("", _text, "ACL user", in_url="user")
    password: str = _setting("", _text, "its password", in_url="password", is_secret=True)
    password_file: str = _setting("", _text, "file with the password on one line")
    tls: bool = _setting(False, _switch, "encrypt; `rediss://` sets it", in_url="scheme")
    cluster: bool = _setting(False, _switch, "the server is a node of a cluster; `redis+cluster://` sets it", in_url="scheme")
    ca_file: str = _setting("", _text, "certificates that sign the server's; empty: the system's")
    prefix: str = _setting("lmcache:", _prefix, "what the names of all values begin with; `clear` removes no others")
    ttl_seconds: int = _setting(0, number(int, 0, 1 << 31), "how long a value stays after its put; 0: until it is evicted")
    timeout_seconds: float = _setting(5.0, number(float, 0.01, 3600), "how long to wait to connect, and for each answer")
    max_connections: int = _setting(16, number(int, 1, 1024), "calls at the same time, and connections to each server")


@dataclass(frozen=True)
class ObjectStoreSettings:
    """A bucket of S3 or what speaks like it, of Google Cloud Storage or of Azure Blob Storage."""

    bucket: str = _setting(MISSING, _name, "the bucket (Azure: the container)", in_url="host")
    prefix: str = _setting("lmcache", _bucket_folder, "its folder for the values; `clear` removes no others", in_url="path")
    endpoint: str = _setting("", _endpoint, "where the service is, unless it is its maker's; http:// is not encrypted")
    region: str = _setting("", _text, "S3 only; empty: AWS_REGION or us-east-1")
    account: str = _setting("", _text, "Azure only: the storage account")
    access_key_id: str = _setting("", _text, "S3 only; empty: what the environment or the machine's role gives", is_secret=True)
    secret_access_key: str = _setting("", _text, "belongs to access-key-id", is_secret=True)
    timeout_seconds: float = _setting(10.0, number(float, 0.01, 3600), "how long one request may take")
    retries: int = _setting(2, number(int, 0, 10), "how often a failed request is tried again, within one timeout in all")
    max_requests: int = _setting(32, number(int, 1, 1024), "requests of one call at the same time")


Settings = FsSettings | RedisSettings | ObjectStoreSettings
SETTINGS: dict[str, type[Settings]] = {
    "fs": FsSettings,
    "redis": RedisSettings,
    "s3": ObjectStoreSettings,
    "gs": ObjectStoreSettings,
    "az": ObjectStoreSettings,
}


@dataclass(frozen=True)
class AdapterSpec:
    """One tier: the name of its adapter, its settings, and the same as a URL without secrets."""

    name: str
    settings: Settings

    @property
    def redacted(self) -> str:
        """What may be logged and shown: a URL whose secrets are `***`."""
        values = {item.name: shown(item.metadata, getattr(self.settings, item.name)) for item in fields(self.settings)}
        query = {
            item.name.replace("_", "-"): values[item.name]
            for item in fields(self.settings)
            if not item.metadata["in_url"] and getattr(self.settings, item.name) != item.default
        }
        return self._location(values) + ("?" + urlencode(query, safe="*/:") if query else "")

    def _location(self, values: Mapping[str, str]) -> str:
        if isinstance(self.settings, FsSettings):
            return "fs://" + quote(self.settings.path)
        if isinstance(self.settings, RedisSettings):
            scheme = "redis" + "s" * self.settings.tls + "+cluster" * self.settings.cluster
            secret = f":{HIDDEN}" if self.settings.password else ""
            user = f"{quote(self.settings.username, safe='')}{secret}@" if self.settings.username or secret else ""
            host = f"[{self.settings.host}]" if ":" in self.settings.host else self.settings.host
            return f"{scheme}://{user}{host}:{self.settings.port}/{self.settings.db}"
        return f"{self.name}://{self.settings.bucket}/{quote(self.settings.prefix)}"


def shown(metadata: Mapping[str, Any], value: Any) -> str:
    """Return a setting as text, and `***` for a secret."""
    if metadata["is_secret"]:
        return HIDDEN
    return str(int(value)) if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def parse_adapter(text: str) -> AdapterSpec:
    """Return what a value of `--l2-adapter` asks for.

    Raises: UsageError that names the setting at fault and what was expected, and repeats no secret.
    """
    text = text.strip()
    name, given = _read_json(text) if text.startswith("{") else _read_url(text)
    settings = SETTINGS[name]
    known = {item.name: item for item in fields(settings)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        item = known.get(key.replace("-", "_"))
        if item is None:
            shown = [other.replace("_", "-") for other in known]
            word = key.partition("=")[0]  # the rest may be a password
            raise UsageError(f"L2 adapter {name} has no setting {word!r}; known: {', '.join(shown)}", _nearest(word, shown))
        if item.name in values:
            raise UsageError(f"L2 adapter {name}: {key} is given twice")
        try:
            values[item.name] = item.metadata["parse"](value)
        except ValueError as exc:
            is_hidden = item.metadata["is_secret"] or (item.name == "endpoint" and _carries_more(value))
            shown_value = HIDDEN if is_hidden else repr(value)
            raise UsageError(f"L2 adapter {name}: {key} {shown_value}: {exc}") from exc
    for item in known.values():
        if item.default is MISSING and item.name not in values:
            raise UsageError(f"L2 adapter {name}: no {item.name}", hint=EXAMPLES[name])
    spec = AdapterSpec(name, settings(**values))
    _check_together(spec)
    return spec


JSON_EXAMPLE = 'for example {"type": "fs", "path": "/var/cache/lmcache"}'
EXAMPLES = {
    "fs": "for example fs:///var/cache/lmcache?capacity-gb=200",
    "redis": "for example redis://localhost:6379/0?prefix=lmcache:",
    "s3": "for example s3://bucket/prefix?region=eu-central-1",
    "gs": "for example gs://bucket/prefix",
    "az": "for example az://container/prefix?account=name",
}


def _check_together(spec: AdapterSpec) -> None:
    """Return if the settings go together."""
    settings = spec.settings
    if isinstance(settings, RedisSettings):
        if settings.cluster and settings.db:
            raise UsageError(f"L2 adapter redis: db {settings.db}: a cluster has only database 0")
        if settings.password and settings.password_file:
            raise UsageError("L2 adapter redis: password and password-file are both given", hint="drop one")
        if settings.ca_file and not settings.tls:
            raise UsageError("L2 adapter redis: ca-file without TLS", hint="write rediss://")
    if isinstance(settings, ObjectStoreSettings):
        if bool(settings.access_key_id) != bool(settings.secret_access_key):
            raise UsageError(f"L2 adapter {spec.name}: access-key-id and secret-access-key go together")
        if spec.name == "az" and not settings.account:
            raise UsageError("L2 adapter az: no account", hint=EXAMPLES["az"])


def _read_json(text: str) -> tuple[str, dict[str, str]]:
    try:
        document = json.loads(text)
    except ValueError as exc:
        raise UsageError(f"L2 adapter: not JSON: {exc}", hint=JSON_EXAMPLE) from exc
    except RecursionError as exc:
        raise UsageError("L2 adapter: the JSON object is nested too deep", hint=JSON_EXAMPLE) from exc
    kind = document.pop("type", None)
    if not isinstance(kind, str):
        raise UsageError("L2 adapter: the JSON object has no text 'type'", hint="known: " + ", ".join(ADAPTERS))
    name, given = _known_scheme(kind)
    for key, value in document.items():
        if not isinstance(value, str | int | float):
            raise UsageError(f"L2 adapter {name}: {key} is neither text, number nor true or false")
        given[key] = str(value)
    return name, given


def _read_url(text: str) -> tuple[str, dict[str, str]]:
    scheme, separator, _ = text.partition("://")
    if not separator:
        raise UsageError("L2 adapter: neither a URL nor a JSON object", hint=EXAMPLES["fs"])
    name, given = _known_scheme(scheme)
    try:
        parts = urlsplit(text)
        port = parts.port
        query = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError as exc:
        raise UsageError(f"L2 adapter {name}: the URL cannot be read: {_without_secrets(text, exc)}", EXAMPLES[name]) from exc
    if parts.fragment:
        raise UsageError(f"L2 adapter {name}: '#' in the URL", hint="write it as %23")
    located = {
        "user": unquote(parts.username or ""),
        "password": unquote(parts.password or ""),
        "host": unquote(parts.hostname or ""),
        "port": "" if port is None else str(port),
        "path": unquote(parts.path),
    }
    if name == "fs" and parts.netloc:
        raise UsageError(f"L2 adapter fs: {parts.netloc!r} is read as a host", hint="write fs:/// and the absolute path")
    if name != "fs":
        located["path"] = located["path"].strip("/")
    for item in fields(SETTINGS[name]):
        value = located.pop(item.metadata["in_url"], "")
        if value:
            given[item.name] = value
    for part in ("user", "password", "port"):
        if located.get(part):
            raise UsageError(f"L2 adapter {name}: a {part} in the URL", hint=EXAMPLES[name])
    for key, value in query:
        if key.replace("-", "_") in {other.replace("-", "_") for other in given}:
            raise UsageError(f"L2 adapter {name}: {key} is given twice")
        given[key] = value
    return name, given


def _without_secrets(text: str, error: ValueError) -> str:
    """The parser's message may quote the URL; the part with the password is not repeated."""
    return "the port is not a number up to 65535" if "ort" in str(error) else "not key=value&key=value after '?'"


def _known_scheme(kind: str) -> tuple[str, dict[str, str]]:
    if kind.lower() not in SCHEMES:
        shown = kind if kind.replace("+", "").isalnum() else "..."
        hint = _nearest(kind, SCHEMES)
        raise UsageError(f"unknown L2 adapter {shown!r}; known: {', '.join(ADAPTERS)}", hint)
    name, given = SCHEMES[kind.lower()]
    return name, dict(given)


def _nearest(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word.replace("_", "-"), list(known), n=1, cutoff=0.6)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def make_adapter(spec: AdapterSpec) -> L2Adapter:
    """Return the adapter; whether its back end is up shows later.

    Raises: UsageError when its client is not installed or a file that the settings name cannot be used.
    """
    module_name, _, class_name = ADAPTERS[spec.name].partition(":")
    try:
        adapter_class = getattr(importlib.import_module(module_name), class_name)
    except ModuleNotFoundError as exc:
        if (exc.name or "lmcache").startswith("lmcache"):
            raise
        extra = EXTRAS[spec.name]
        raise UsageError(f"L2 adapter {spec.name} needs {exc.name}", hint=f"install lmcache[{extra}]") from exc
    adapter: L2Adapter = adapter_class(spec)
    return adapter


def read_secret(path_text: str) -> str:
    """Return the one line of a file.

    Raises: UsageError.
    """
    try:
        secret = Path(path_text).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read the password file {path_text}: {exc}") from exc
    if len(secret.splitlines()) != 1:
        raise UsageError(f"the password file {path_text} has not one line", hint="the password alone, on one line")
    return secret
