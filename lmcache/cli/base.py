"""What every command shares: parser, common options, addresses, and one request with a deadline.

A command is a module in `commands/` with `register_command(subparsers)`. It adds its parser with
`subparsers.add_parser(name, help=..., populate=...)`, where `populate(parser)` adds the arguments once they are needed,
and sets the default `func`: a callable that takes the parsed `Namespace`, returns the exit code, and raises `LMCacheError`
for everything that goes wrong. The common options come by themselves.
"""

from __future__ import annotations

import argparse
import os
import time
from argparse import Namespace

from lmcache.numerals import plain_number

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any, NoReturn

    from lmcache.client.mq import MessageQueueClient
    from lmcache.errors import UsageError
    from lmcache.protocol import R, Request

DEFAULT_TIMEOUT_SECONDS = 5.0
DEFAULT_URL = "localhost:5555"
DEFAULT_ENGINE_URL = "http://localhost:8000"
URL_VARIABLE = "LMCACHE_URL"
ENGINE_URL_VARIABLE = "LMCACHE_ENGINE_URL"
TOKEN_VARIABLE = "LMCACHE_HTTP_TOKEN"
ENGINE_TOKEN_VARIABLE = "LMCACHE_ENGINE_TOKEN"
DEBUG_VARIABLE = "LMCACHE_DEBUG"

# What is read besides the variables of the server's flags, which `lmcache.server.args` names.
ENVIRONMENT_VARIABLES = frozenset(
    {
        URL_VARIABLE,
        ENGINE_URL_VARIABLE,
        TOKEN_VARIABLE,
        ENGINE_TOKEN_VARIABLE,
        DEBUG_VARIABLE,
        "LMCACHE_LOG_LEVEL",
        "LMCACHE_USE_UPSTREAM_MP",
    }
)
PREFIX = "LMCACHE_"
WRONG_PREFIX = "LM_CACHE_"

# They say how a prompt's tokens become keys, and nothing without a prompt.
PROMPT_COMPANIONS = ("corpus", "tokenizer", "tokenize_with", "lora", "cache_salt")
PROMPT_OPTIONS = ("prompt", "tokens", "model", *PROMPT_COMPANIONS)

URL_RULE = "use http:// or https:// for HTTP; tcp://host:port, ipc:///path or host:port for ZMQ"


# -- parsing ---------------------------------------------------------------------------------------


class HelpFormatter(argparse.HelpFormatter):
    """As wide as the terminal, like argparse's own, which asks shutil: 3 ms of imports."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, **{"width": terminal_columns() - 2, **kwargs})


class RawHelpFormatter(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The same, with the description's own line ends."""


def terminal_columns() -> int:
    """Return $COLUMNS, or the terminal's width, or 80."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdigit() and int(columns[:4]) > 2:
        return int(columns[:4])
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class CommandParser(argparse.ArgumentParser):
    """A parser that knows the common options, and raises `UsageError` instead of exiting.

    Args:
        populate: adds this parser's arguments when it is first used; until then their imports and groups cost nothing.
        common: False for a parser whose own options would collide with the common ones.
        is_static: False when `populate` imports so much that `lmcache completion` had better not call it.
        leaves_rest: True for a command that hands the words that it does not know on to another program: `args.rest`.
    """

    def __init__(
        self,
        *args: Any,
        populate: Callable[[CommandParser], None] = lambda parser: None,
        common: bool = True,
        is_static: bool = True,
        leaves_rest: bool = False,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)
        self.is_static = is_static
        self._leaves_rest = leaves_rest
        self._to_add = [populate, add_common_options] if common else [populate]
        self.set_defaults(parser=self)

    def populate(self) -> None:
        """Add the arguments that were put off."""
        while self._to_add:
            self._to_add.pop(0)(self)

    def add_subparsers(self, **kwargs: Any) -> Any:
        """Add targets or actions; their usage starts with this parser's name."""
        kwargs.setdefault("prog", self.prog)
        return super().add_subparsers(**kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Populate, then parse."""
        self.populate()
        if self._subparsers is not None and args is not None:
            self.first_word(args)
        parsed, rest = super().parse_known_args(args, namespace)
        if self._leaves_rest:
            parsed.rest, rest = rest, []
        return parsed, rest

    def format_help(self) -> str:
        """Populate, then describe."""
        self.populate()
        return super().format_help()

    def print_help(self, file: Any = None) -> None:
        """Print it to stdout; argparse's own ignores what cannot be written.

        Raises: LMCacheError
        """
        from lmcache.cli.output import write

        write(self.format_help().rstrip("\n"))

    def options(self) -> list[str]:
        """Return every option string of this parser."""
        return list(self._option_string_actions)

    def first_word(self, words: Sequence[str]) -> str:
        """Return the first word that is no option of this parser nor the value of one, or nothing.

        Raises: UsageError for an unknown option before it: its value would be taken for the word.
        """
        remaining = iter(words)
        for word in remaining:
            if word == "-" or not word.startswith("-"):
                return word
            option, has_value, _ = word.partition("=")
            action = self._option_string_actions.get(option)
            if action is None and word.startswith("--") and word != "--":
                self.unrecognized([word])
            if action is not None and action.nargs is None and not has_value:
                next(remaining, None)
        return ""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would have printed.

        Raises: UsageError
        """
        from lmcache.errors import UsageError

        raise UsageError(message, hint=self._suggestion(message) or f"see '{self.prog} --help'")

    def _suggestion(self, message: str) -> str:
        import re

        wrong = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        return did_you_mean(wrong[1], re.findall(r"[\w.-]+", wrong[2])) if wrong else ""

    def unrecognized(self, words: Sequence[str]) -> NoReturn:
        """Raise the error for words that no parser took.

        Raises: UsageError
        """
        from lmcache.errors import UsageError

        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        hint = next(filter(None, (did_you_mean(word, self.options()) for word in options)), "")
        raise UsageError(f"unrecognized arguments: {' '.join(words)}", hint=hint or f"see '{self.prog} --help'")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that work before and after the command's name and its target.

    None has a default here: a default of the inner parser would overwrite what was given before the
    command's name.
    """
    group = parser.add_argument_group("common options")
    group.add_argument(
        "--url",
        default=argparse.SUPPRESS,
        help=f"address; {URL_RULE} (default: ${URL_VARIABLE}, then {DEFAULT_URL}; "
        f"for engines ${ENGINE_URL_VARIABLE}, then {DEFAULT_ENGINE_URL})",
    )
    group.add_argument(
        "--timeout",
        type=positive_seconds,
        default=argparse.SUPPRESS,
        metavar="SECONDS",
        help=f"how long to wait for the answer (default: {DEFAULT_TIMEOUT_SECONDS:g})",
    )
    group.add_argument(
        "--format",
        choices=("text", "json"),
        default=argparse.SUPPRESS,
        help="how to report (default: text)",
    )
    group.add_argument(
        "--output",
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="write the result to FILE instead of stdout",
    )
    group.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print nothing; the exit code tells",
    )
    # main() prints it before anything is parsed; here it is for --help.
    group.add_argument("--version", action="store_true", default=argparse.SUPPRESS, help="print the version and exit")


def fill_common_defaults(args: Namespace) -> None:
    """Set the common options that were given nowhere; `has_timeout` keeps whether `--timeout` was."""
    args.has_timeout = hasattr(args, "timeout")
    defaults = {
        "url": None,
        "timeout": DEFAULT_TIMEOUT_SECONDS,
        "format": "text",
        "output": None,
        "quiet": False,
    }
    for name, value in defaults.items():
        if not hasattr(args, name):
            setattr(args, name, value)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `did you mean 'ping'?` for the nearest known word, or nothing."""
    import difflib

    nearest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean '{nearest[0]}'?" if nearest else ""


def before_dashes(argv: Sequence[str]) -> Sequence[str]:
    """Return the words before `--`, which ends the options."""
    return argv[: argv.index("--")] if "--" in argv else argv


def read_option(argv: Sequence[str], name: str) -> str | None:
    """Return the last value of a long option in raw arguments.

    For errors that happen before there is a Namespace.
    """
    value = None
    words = before_dashes(argv)
    for index, word in enumerate(words):
        if word == name:
            value = words[index + 1] if index + 1 < len(words) else None
        elif word.startswith(name + "="):
            value = word[len(name) + 1 :]
    return value


# -- values ----------------------------------------------------------------------------------------

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    **{unit + suffix: 1024**power for power, unit in enumerate("kmgt", 1) for suffix in ("ib", "i")},
    **{unit + "b": 1000**power for power, unit in enumerate("kmgt", 1)},
}
_DURATION_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _number_and_unit(text: str, units: Mapping[str, float], example: str) -> tuple[float, float]:
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
    unit = text.strip()[len(number) :].lower()
    try:
        if unit in units:
            return plain_number(float, number), units[unit]
    except ValueError:
        pass
    known = ", ".join(name for name in units if name)
    raise argparse.ArgumentTypeError(f"{text!r} is not {example}; units: {known}")


def byte_size(text: str) -> int:
    """Parse `512MiB`, `1.5GiB`, `4096` or `10GB` into bytes."""
    number, unit = _number_and_unit(text, _SIZE_UNITS, "a size such as 512MiB")
    if not 0 < number * unit <= 2**62:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 1 byte and 4096 PiB")
    return max(1, int(number * unit))


def duration_seconds(text: str) -> float:
    """Parse `10m`, `1.5h`, `30` or `500ms` into seconds, 0 to one day."""
    number, unit = _number_and_unit(text, _DURATION_UNITS, "a duration such as 10m")
    if not 0 <= number * unit <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and one day")
    return number * unit


def positive_seconds(text: str) -> float:
    """Parse a duration that is not zero."""
    seconds = duration_seconds(text)
    if seconds <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return seconds


def share(text: str) -> float:
    """Return the number in `0.25`, or a hundredth of that in `25%`.

    Raises: ValueError
    """
    return plain_number(float, text[:-1]) / 100 if text.endswith("%") else plain_number(float, text)


def ratio(text: str) -> float:
    """Parse `0.25` or `25%` into 0 to 1."""
    try:
        value = share(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio such as 0.25 or 25%") from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return value


def positive_int(text: str) -> int:
    """Parse a whole number from 1 to a million million."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:20]) <= 10**12:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_prompt_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which tokens of which model are meant; `prompts.py` reads them."""
    from lmcache.cli.corpora import corpus_option

    group = parser.add_argument_group("prompt")
    group.add_argument("--prompt", metavar="TEXT", help="the prompt; {name} stands for a corpus, '{{' for a brace")
    group.add_argument("--corpus", type=corpus_option, action="append", metavar="NAME=PATH", help="a corpus of your own")
    group.add_argument("--tokens", metavar="FILE", help="token ids instead: a JSON list or numbers; '-' is stdin")
    group.add_argument("--model", metavar="M", help="a model that an engine registered (default: the only one)")
    group.add_argument("--tokenizer", metavar="DIR", help="folder or cached name of the tokenizer (default: --model)")
    group.add_argument("--tokenize-with", metavar="URL", help="let the engine at URL tokenize")
    group.add_argument("--lora", type=_lora, metavar="NAME=PATH", help="the request's LoRA adapter, as vLLM was told of it")
    group.add_argument("--cache-salt", type=_salt, metavar="SALT", help="the request's cache salt")


def _lora(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")
    if not name or not separator or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, as in vLLM's --lora-modules")
    return name, path


def _salt(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("'' is no salt; leave the option out for requests without one")
    return text


def prompt_options_given(args: Namespace, names: Iterable[str] = PROMPT_COMPANIONS) -> list[str]:
    """Return those of the options of a prompt that were given, as the user writes them."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name)]


# -- environment -----------------------------------------------------------------------------------


def check_environment(environment: Mapping[str, str]) -> list[str]:
    """Return warnings about misspelt variables.

    Raises: UsageError for a `LMCACHE_*` variable that nothing reads.
    """
    from lmcache.environment import is_service_link

    unknown = [
        name
        for name, value in environment.items()
        if name.startswith(PREFIX) and name not in ENVIRONMENT_VARIABLES and not is_service_link(name, value)
    ]
    if unknown:
        _refuse_unknown(unknown)
    return [
        f"{name} is not read; the name is {PREFIX}{name[len(WRONG_PREFIX) :]}"
        for name in environment
        if name.startswith(WRONG_PREFIX)
    ]


def _refuse_unknown(names: Sequence[str]) -> None:
    from lmcache.errors import UsageError
    from lmcache.server.args import ENVIRONMENT_VARIABLES as SERVER_VARIABLES

    known = ENVIRONMENT_VARIABLES | SERVER_VARIABLES
    for name in names:
        if name not in known:
            raise UsageError(
                f"unknown environment variable {name}",
                hint=did_you_mean(name, sorted(known)) or f"known: {', '.join(sorted(known))}",
                code="environment",
            )


# -- addresses -------------------------------------------------------------------------------------


class Url:
    """An address: `is_http` decides the transport, `text` is what its library takes.

    `host` is empty and `port` 0 for `ipc://`. Without `checks_certificate` whoever answers there to https is believed.
    """

    __slots__ = ("checks_certificate", "host", "is_http", "port", "text")

    def __init__(self, text: str, *, is_http: bool, host: str = "", port: int = 0) -> None:
        self.text = text
        self.is_http = is_http
        self.host = host
        self.port = port
        self.checks_certificate = True

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f"Url({self.text!r})"


def parse_url(text: str) -> Url:
    """Return the address in `text`; the scheme decides the transport.

    Raises: UsageError, with the rule, for anything else.
    """
    scheme, separator, rest = text.strip().rpartition("://")
    scheme = scheme.lower()
    if scheme == "ipc" and rest:
        return Url(f"ipc://{rest}", is_http=False)
    if scheme in ("http", "https"):
        authority, slash, path = rest.partition("/")
        host, port = _host_and_port(text, authority, {"http": 80, "https": 443}[scheme])
        if any(char in "?#" or char.isspace() or not char.isprintable() for char in path):
            raise _url_error(text, "the path may hold no query, fragment or space")
        return Url(f"{scheme}://{authority}{slash}{path}".rstrip("/"), is_http=True, host=host, port=port)
    if scheme == "tcp" or not separator:
        host, port = _host_and_port(text, rest, 0)
        return Url(f"tcp://{rest}", is_http=False, host=host, port=port)
    raise _url_error(text, f"unknown scheme {scheme!r}")


def _host_and_port(text: str, authority: str, default_port: int) -> tuple[str, int]:
    import re

    parts = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[A-Za-z0-9._-]+)(?::([0-9]{1,6}))?", authority)
    if parts is None:
        raise _url_error(text, "expected host:port")
    host = parts[1].strip("[]")
    if parts[1].startswith("["):
        _check_ipv6(text, host)
    if parts[2] is None and not default_port:
        raise _url_error(text, "the port is missing")
    port = int(parts[2] or default_port)
    if not 1 <= port <= 65535:
        raise _url_error(text, f"port {port} is not between 1 and 65535")
    return host, port


def _check_ipv6(text: str, host: str) -> None:
    import ipaddress

    try:
        ipaddress.IPv6Address(host)
    except ValueError as exc:
        raise _url_error(text, str(exc)) from exc


def _url_error(text: str, reason: str) -> UsageError:
    from lmcache.errors import UsageError

    return UsageError(f"{text!r} is not an address: {reason}", hint=URL_RULE, code="url")


def kvcache_url(args: Namespace) -> Url:
    """Return the cache server's address: `--url`, then LMCACHE_URL, then localhost:5555.

    Raises: UsageError
    """
    return parse_url(args.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL)


def engine_url(args: Namespace) -> Url:
    """Return the engine's address: `--url`, then LMCACHE_ENGINE_URL, then http://localhost:8000.

    Raises: UsageError, also for a ZMQ address, which names the command that it fits.
    """
    command: str = args.parser.prog
    text = args.url or os.environ.get(ENGINE_URL_VARIABLE) or DEFAULT_ENGINE_URL
    return http_url(text, f"'{command.replace(' engine', ' kvcache')} --url {text}'")


def http_url(text: str, alternative: str = "an address that starts with http://") -> Url:
    """Return the address of an engine, which speaks HTTP.

    Raises: UsageError for a ZMQ address; the hint asks whether `alternative` was meant.
    """
    from lmcache.errors import UsageError

    url = parse_url(text.strip().rstrip("/").removesuffix("/v1"))  # where OpenAI's clients begin, not all routes do
    if not url.is_http:
        raise UsageError(f"an inference engine speaks HTTP, and {url} is a ZMQ address", f"did you mean {alternative}?", "url")
    return url


# -- requests --------------------------------------------------------------------------------------


class Answer:
    """A reply, its payload frames.

    And the time from the request's last frame sent to the reply's first received.
    """

    __slots__ = ("payload", "reply", "round_trip_seconds")

    def __init__(self, reply: Any, payload: list[memoryview], round_trip_seconds: float) -> None:
        self.reply = reply
        self.payload = payload
        self.round_trip_seconds = round_trip_seconds


def send_request(
    url: Url,
    request: Request[R],
    payload: Sequence[bytes | bytearray | memoryview] = (),
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> Answer:
    """Return the answer to one request of a temporary client, within `timeout` all together.

    Raises: UnreachableError, DeadlineError, RemoteError, ProtocolError.
    """
    deadline = time.monotonic() + timeout
    with connect(url, timeout) as client:
        return ask(client, request, payload, deadline - time.monotonic())


def connect(url: Url, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> MessageQueueClient:
    """Return a client, which the caller closes, after a look at who listens at `url`.

    Raises: UnreachableError, LMCacheError.
    """
    from lmcache.client.mq import MessageQueueClient

    deadline = time.monotonic() + timeout
    url = zmq_url(url, timeout)
    check_peer(url, deadline - time.monotonic())
    return MessageQueueClient(url.text, timeout)


def check_peer(url: Url, timeout: float) -> None:
    """Return if the name resolves and someone listens who may speak ZMQ; one who is silent may.

    Raises: UnreachableError, at once for a refused connection or another protocol.
    """
    from lmcache.client.mq import check_reachable, diagnose
    from lmcache.errors import UnreachableError

    deadline = time.monotonic() + timeout
    check_name(url, timeout)
    check_reachable(url.text, max(0.001, deadline - time.monotonic()))
    stranger = diagnose(url.text)
    if stranger is not None:
        raise UnreachableError(stranger.message, stranger.hint, "not_lmcache")


def ask(
    client: MessageQueueClient,
    request: Request[R],
    payload: Sequence[bytes | bytearray | memoryview] = (),
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
) -> Answer:
    """Send a request on an open client and return the answer.

    Raises: UnreachableError, DeadlineError, RemoteError, ProtocolError.
    """
    from lmcache.errors import DeadlineError, UnreachableError

    try:
        future = client.submit(request, payload, max(0.0, timeout), may_wait=True)
        reply = future.result()
    except UnreachableError as exc:
        # What is left of the time may be less; the user knows the whole.
        raise DeadlineError(f"no reply from {client.url} within {client.timeout_seconds:g} s", exc.hint) from exc
    return Answer(reply, future.payload, future.round_trip_seconds)


def check_name(url: Url, timeout: float) -> list[Any]:
    """Return what `socket.getaddrinfo` says of the host's name, in time; the system's resolver knows no deadline.

    [] for an address, which need not be looked up.

    Raises: UnreachableError, DeadlineError.
    """
    if not url.host or url.host == "localhost" or ":" in url.host or url.host.replace(".", "").isdigit():
        return []
    import socket
    import threading

    from lmcache.errors import DeadlineError, UnreachableError

    found: list[Any] = []
    failure: list[str] = []

    def resolve() -> None:
        try:
            found.extend(socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as exc:
            failure.append(str(exc))

    resolver = threading.Thread(target=resolve, daemon=True)
    resolver.start()
    resolver.join(max(0.0, timeout))
    if resolver.is_alive():
        raise DeadlineError(
            f"the name {url.host!r} did not resolve within {timeout:.3g} s",
            "check --url and the DNS",
        )
    if failure:
        raise UnreachableError(f"cannot resolve {url.host!r}: {failure[0]}", "check --url")
    return found


def zmq_url(url: Url, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> Url:
    """Return the server's ZMQ address: `url` itself, or what the server says over HTTP.

    Raises: UnreachableError, LMCacheError when what answers over HTTP is no lmcache server.
    """
    if not url.is_http:
        return url
    from lmcache.cli.http import http_request, wrong_peer

    endpoint = http_request(url, "GET", "/api/status", timeout=timeout).get("zmq_endpoint")
    if not isinstance(endpoint, str):
        raise wrong_peer(url, "its /api/status names no zmq_endpoint")
    told = parse_url(endpoint.replace("//*:", "//0.0.0.0:"))
    # A wildcard or loopback address is the server's view; from here the server is where its HTTP
    # frontend is.
    if told.host in ("0.0.0.0", "::", "127.0.0.1", "localhost", "::1") and told.host != url.host:
        host = f"[{url.host}]" if ":" in url.host else url.host
        return parse_url(f"tcp://{host}:{told.port}")
    return told
