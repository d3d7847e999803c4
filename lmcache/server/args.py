"""The server's settings: each default once, its flag, its environment variable, its range.

A flag wins over the variable `LMCACHE_<NAME>`, which wins over the default. Five groups, five `add_*_args()` helpers, so that a
program that embeds the server can offer the groups that it wants.
"""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lmcache.environment import is_service_link
from lmcache.errors import UsageError
from lmcache.log import LEVELS, init_logger
from lmcache.numerals import plain_number
from lmcache.pool import PAGE_BYTES
from lmcache.protocol import DEFAULT_HTTP_PORT, DEFAULT_ZMQ_PORT
from lmcache.storage.eviction import POLICIES
from lmcache.storage.l2.spec import AdapterSpec, parse_adapter
from lmcache.storage.parsing import number
from lmcache.storage.sizing import GIB

ENGINE_TYPES = ("default", "blend")
L2_POLICIES = ("write-through", "write-on-evict")
MAX_TIERS = 8
Parse = Callable[[Any], Any]


def _text(text: str) -> str:
    return text


def _switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off", ""):
        return False
    raise ValueError("expected 1 or 0")


def _mode(text: str) -> int:
    try:
        value = plain_number(lambda digits: int(digits, 8), text)
    except ValueError:
        raise ValueError("expected octal permissions such as 0600") from None
    if value & ~0o777 or value & 0o600 != 0o600:
        raise ValueError("expected permissions that let the owner read and write, such as 0600 or 0660")
    return value


def _pool_name(text: str) -> str:
    if text and (not all(c.isalnum() or c in "-_" for c in text) or len(text) > 64):
        raise ValueError("expected at most 64 letters, digits, '-' and '_'")
    return text


def _choice(choices: tuple[str, ...]) -> Parse:
    def parse(text: str) -> str:
        for choice in choices:
            if text.lower() == choice.lower():
                return choice
        raise ValueError("expected " + " or ".join(choices))

    return parse


def _adapters(given: str | list[str]) -> tuple[AdapterSpec, ...]:
    """Flags give a list, the variable one text: URLs with spaces between them, or JSON (an object, or a list of both)."""
    texts = _split_adapters(given) if isinstance(given, str) else given
    if len(texts) > MAX_TIERS:
        raise ValueError(f"expected at most {MAX_TIERS}")
    return tuple(parse_adapter(text) for text in texts)


def _split_adapters(text: str) -> list[str]:
    text = text.strip()
    if text.startswith("{"):
        return [text]
    if not text.startswith("["):
        return text.split()
    try:
        return [item if isinstance(item, str) else json.dumps(item) for item in json.loads(text)]
    except ValueError:
        raise UsageError("LMCACHE_L2_ADAPTER is not a JSON list", "URLs with spaces between them are simpler") from None


def _setting(default: Any, parse: Parse, help_: str, metavar: str = "", is_repeatable: bool = False) -> Any:
    metadata = {"parse": parse, "help": help_, "metavar": metavar, "is_repeatable": is_repeatable}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class MPServerSettings:
    """The server itself."""

    engine_type: str = _setting("default", _choice(ENGINE_TYPES), "which cache engine runs", "{default,blend}")
    host: str = _setting("127.0.0.1", _text, "address of the ZMQ socket; 0.0.0.0 lets other hosts in", "HOST")
    port: int = _setting(
        DEFAULT_ZMQ_PORT,
        number(int, 0, 65535),
        "port of the ZMQ socket; 0 takes a free one",
        "PORT",
    )
    chunk_size: int = _setting(
        256,
        number(int, 1, 1 << 20),
        "tokens in a chunk; a multiple of the engines' block size",
        "TOKENS",
    )
    client_lease_seconds: float = _setting(15.0, number(float, 1, 3600), "how long a client on another host may be silent", "S")
    pin_timeout_seconds: float = _setting(
        600.0, number(float, 1, 86400), "how long a request may hold chunks without a word", "S"
    )
    exit_when_stuck_seconds: float = _setting(
        0.0,
        number(float, 0, 86400),
        "end with status 1 when the owner thread answers nothing for so long, for a supervisor to start it anew; 0: never",
        "S",
    )


@dataclass(frozen=True)
class StorageManagerSettings:
    """L1, eviction and the tiers below."""

    l1_size_gb: float = _setting(
        0.0,
        number(float, 0, 1 << 20),
        "size of L1 in GiB; 0 takes a quarter of the memory to be had, at most 64",
        "GIB",
    )
    max_chunks: int = _setting(
        0,
        number(int, 0, 1 << 28),
        "how many chunks L1 can hold; 0: one for each 64 KiB of it",
        "N",
    )
    eviction_policy: str = _setting("LRU", _choice(tuple(POLICIES)), "what goes first", "{" + ",".join(POLICIES) + "}")
    eviction_watermark: float = _setting(
        0.95,
        number(float, 0.01, 1),
        "share of L1 in use above which chunks are evicted before room is needed",
        "RATIO",
    )
    eviction_ratio: float = _setting(
        0.05,
        number(float, 0.001, 1),
        "share of L1 that such a pass frees; at most the watermark",
        "RATIO",
    )
    pool_dir: str = _setting(
        "/dev/shm",
        _text,
        "where the pool's file is: a memory file system that clients share",
        "DIR",
    )
    pool_name: str = _setting(
        "",
        _pool_name,
        "keep the pool under this name when the server ends; the next server serves it again",
        "NAME",
    )
    pool_mode: int = _setting(0o600, _mode, "permissions of the pool's file", "OCTAL")
    allow_overcommit: bool = _setting(False, _switch, "start although the memory at hand is less than L1")
    l2_adapter: tuple[AdapterSpec, ...] = _setting(
        (),
        _adapters,
        "a tier below L1, as a URL or a JSON object; repeat it for more, the first is asked first (docs/l2-adapters.md)",
        "URL",
        is_repeatable=True,
    )
    l2_policy: str = _setting(
        L2_POLICIES[0], _choice(L2_POLICIES), "when chunks are written to L2", "{" + ",".join(L2_POLICIES) + "}"
    )
    l2_lookup_timeout_seconds: float = _setting(
        1.0, number(float, 0.001, 60), "how long a lookup waits for L2; then it is answered with what is in L1", "S"
    )
    l2_min_tokens_per_second: float = _setting(
        1000.0,
        number(float, 0, 1e9),
        "what your engine computes; a hit that L2 is expected to deliver more slowly is not waited for",
        "N",
    )
    l2_inflight_ratio: float = _setting(
        0.5, number(float, 0.001, 1), "share of L1 that chunks on their way up from L2 may take", "RATIO"
    )
    l2_read_threads: int = _setting(4, number(int, 1, 64), "reads from a tier side by side", "N")
    l2_write_threads: int = _setting(2, number(int, 1, 64), "writes to a tier side by side", "N")
    l2_drain_seconds: float = _setting(10.0, number(float, 0, 3600), "how long a server that ends goes on writing to L2", "S")


@dataclass(frozen=True)
class PrometheusSettings:
    """Metrics."""

    no_metrics: bool = _setting(False, _switch, "serve no /metrics")
    metrics_host: str = _setting("127.0.0.1", _text, "address of a port for metrics alone", "HOST")
    metrics_port: int = _setting(
        0,
        number(int, 0, 65535),
        "port for metrics alone, beside the HTTP port's /metrics; 0: none",
        "PORT",
    )


@dataclass(frozen=True)
class TelemetrySettings:
    """The log."""

    log_level: str = _setting("INFO", _choice(LEVELS), "the least severe lines that are logged", "LEVEL")
    log_format: str = _setting("text", _choice(("text", "json")), "one line of text or of JSON", "{text,json}")
    status_interval_seconds: float = _setting(
        30.0,
        number(float, 0, 86400),
        "how often a status line is logged while there is traffic; 0: never",
        "S",
    )


@dataclass(frozen=True)
class HttpFrontendSettings:
    """HTTP."""

    no_http: bool = _setting(False, _switch, "ZMQ only: no health routes, no /metrics")
    http_host: str = _setting("127.0.0.1", _text, "address of the HTTP frontend", "HOST")
    http_port: int = _setting(
        DEFAULT_HTTP_PORT,
        number(int, 0, 65535),
        "port of the HTTP frontend; 0 takes a free one",
        "PORT",
    )
    http_token_file: str = _setting(
        "",
        _text,
        "file with the bearer token that changing routes ask for (or LMCACHE_HTTP_TOKEN)",
        "FILE",
    )


@dataclass(frozen=True)
class ServerConfig:
    """All settings, and where each came from: default, environment or flag."""

    server: MPServerSettings = field(default_factory=MPServerSettings)
    storage: StorageManagerSettings = field(default_factory=StorageManagerSettings)
    prometheus: PrometheusSettings = field(default_factory=PrometheusSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    http: HttpFrontendSettings = field(default_factory=HttpFrontendSettings)
    http_token: str = field(default="", repr=False)
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def capacity_bytes(self) -> int:
        """The size of L1 asked for, in whole pages; 0 when the machine decides."""
        return int(self.storage.l1_size_gb * GIB) // PAGE_BYTES * PAGE_BYTES

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return each setting's value and source; the token is never among them."""
        found = {}
        for group in (self.server, self.storage, self.prometheus, self.telemetry, self.http):
            for item in fields(group):
                value = getattr(group, item.name)
                shown = f"{value:04o}" if item.name == "pool_mode" else value
                if item.name == "l2_adapter":
                    shown = [spec.redacted for spec in value]
                found[item.name] = {
                    "value": shown,
                    "source": self.sources.get(item.name, "default"),
                }
        return found


_GROUPS = (
    MPServerSettings,
    StorageManagerSettings,
    PrometheusSettings,
    TelemetrySettings,
    HttpFrontendSettings,
)
ENVIRONMENT_VARIABLES = frozenset(f"LMCACHE_{item.name.upper()}" for group in _GROUPS for item in fields(group))


def _add_group(parser: argparse.ArgumentParser, title: str, settings: type[Any]) -> None:
    group = parser.add_argument_group(title)
    for item in fields(settings):
        flag = "--" + item.name.replace("_", "-")
        default = f"{item.default:04o}" if item.name == "pool_mode" else item.default
        help_ = item.metadata["help"].replace("%", "%%")
        if item.metadata["is_repeatable"]:
            group.add_argument(flag, action="append", default=None, metavar=item.metadata["metavar"], help=help_)
        elif isinstance(item.default, bool):
            group.add_argument(flag, action="store_const", const="1", default=None, help=help_)
        else:
            shown = "" if default == "" else f" (default: {default})"
            group.add_argument(flag, default=None, metavar=item.metadata["metavar"], help=help_ + shown)


def add_mp_server_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the server itself."""
    _add_group(parser, "server", MPServerSettings)


def add_storage_manager_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of L1, eviction and the tiers below."""
    _add_group(parser, "storage", StorageManagerSettings)


def add_prometheus_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of metrics."""
    _add_group(parser, "metrics", PrometheusSettings)


def add_telemetry_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the log."""
    _add_group(parser, "log", TelemetrySettings)


def add_http_frontend_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the HTTP frontend."""
    _add_group(parser, "HTTP", HttpFrontendSettings)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all of them."""
    add_mp_server_args(parser)
    add_storage_manager_args(parser)
    add_prometheus_args(parser)
    add_telemetry_args(parser)
    add_http_frontend_args(parser)


def config_from_args(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> ServerConfig:
    """Return the settings that flags, environment and defaults give.

    Raises: UsageError that names the flag or variable, what it was and what was expected.
    """
    sources: dict[str, str] = {}
    server, storage, prometheus, telemetry, http = (_read_group(group, args, environ, sources) for group in _GROUPS)
    token = _read_token(http.http_token_file, environ)
    config = ServerConfig(server, storage, prometheus, telemetry, http, token, sources)
    if 0 < config.storage.l1_size_gb * GIB < PAGE_BYTES:
        raise UsageError(f"--l1-size-gb {config.storage.l1_size_gb:g} is less than one page", "0 takes what fits the machine")
    if config.server.engine_type == "blend":
        raise UsageError("--engine-type blend is not available yet", hint="use --engine-type default")
    if config.storage.eviction_ratio > config.storage.eviction_watermark:
        raise UsageError(
            f"--eviction-ratio {config.storage.eviction_ratio:g} is more than"
            f" --eviction-watermark {config.storage.eviction_watermark:g}",
            hint="a pass cannot free more than is in use",
        )
    if "metrics_host" in sources and not config.prometheus.metrics_port:
        init_logger(__name__).warning("--metrics-host does nothing without --metrics-port: no port is opened for metrics alone")
    pool_dir = config.storage.pool_dir
    if not os.path.isdir(pool_dir) or not os.access(pool_dir, os.R_OK | os.W_OK | os.X_OK):
        problem = "cannot be written to by this user" if os.path.isdir(pool_dir) else "is not a directory"
        raise UsageError(f"--pool-dir {pool_dir} {problem}", hint="create or mount it first, with room for this user")
    return config


def _read_group(
    settings: type[Any],
    args: argparse.Namespace,
    environ: Mapping[str, str],
    sources: dict[str, str],
) -> Any:
    values = {}
    for item in fields(settings):
        variable = f"LMCACHE_{item.name.upper()}"
        text = getattr(args, item.name, None)
        if text is not None:
            name, sources[item.name] = "--" + item.name.replace("_", "-"), "flag"
        elif variable in environ and not is_service_link(variable, environ[variable]):
            name, text, sources[item.name] = variable, environ[variable], "environment"
        else:
            continue
        try:
            values[item.name] = item.metadata["parse"](text)
        except ValueError as exc:
            shown = "" if item.metadata["is_repeatable"] else f" {text!r}"  # a URL may have a password in it
            raise UsageError(f"{name}{shown}: {exc}", hint="see 'lmcache server --help'") from exc
    return settings(**values)


def _read_token(path_text: str, environ: Mapping[str, str]) -> str:
    if not path_text:
        return _one_line("LMCACHE_HTTP_TOKEN", environ.get("LMCACHE_HTTP_TOKEN", "").strip())
    path = Path(path_text)
    try:
        token = path.read_text().strip()
        is_open = bool(path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO))
    except (OSError, UnicodeDecodeError) as exc:
        raise UsageError(f"cannot read --http-token-file {path_text}: {exc}", hint="a file with the token alone") from exc
    if not token or is_open:
        problem = "is empty" if not token else "can be read by others"
        raise UsageError(f"--http-token-file {path_text} {problem}", hint="one line, permissions 0600")
    return _one_line(f"--http-token-file {path_text}", token)


def _one_line(source: str, token: str) -> str:
    """No header can carry a line break: such a token would refuse everybody."""
    if len(token.splitlines()) > 1:
        raise UsageError(f"{source} has more than one line", hint="the token alone, on one line")
    return token
