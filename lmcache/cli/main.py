"""The `lmcache` command: finds the module that was asked for, runs it, and says what went wrong.

Everything is imported inside the functions: an interrupt is caught from the first line on, and
`--help` stays quick.
"""

from __future__ import annotations

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence
    from typing import Any

    from lmcache.cli.base import CommandParser
    from lmcache.errors import LMCacheError

INTERRUPTED = 130
ALIAS_GOES_IN = "0.3.0"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 good, 1 bad, 2 usage, 3 not reachable, 4 inconclusive.

    130 interrupted.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    if argv is None:
        gc.set_threshold(20_000)  # imports make many objects and no garbage: collections between them cost 3 ms
    # Without a stream, as after `>&-`, print() would write errors to the other one.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    try:
        code = _flush(_guarded(words))
        if argv is None and "torch" not in sys.modules:
            # The process ends now, and the last collection would search every module: 8 ms. Libraries below torch
            # look for leaks after it and would report what was not collected.
            gc.freeze()
        return code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        from lmcache.cli.output import discard_stdout

        discard_stdout()
        return 0


def _flush(code: int) -> int:
    """Return the exit code: a reader that has gone changes nothing, a full disk is a failure, which may have been told."""
    try:
        sys.stdout.flush()
    except OSError as exc:
        from lmcache.cli.output import discard_stdout, print_error, unwritable

        discard_stdout()
        if not code and not isinstance(exc, BrokenPipeError):
            print_error(unwritable(None, exc))
            return 1
    return code


def deprecated_server_main() -> int:
    """Run `lmcache server` under its old name, `lmcache_server`."""
    print(
        f"warning: lmcache_server is deprecated and goes in version {ALIAS_GOES_IN}; use 'lmcache server'",
        file=sys.stderr,
    )
    return main(["server", *sys.argv[1:]])


def _guarded(words: list[str]) -> int:
    """Run; turn every error into its text or document and its exit code."""
    from lmcache.cli import base
    from lmcache.errors import LMCacheError

    args: Namespace | None = None
    try:
        for stream in (sys.stdout, sys.stderr):
            # A name that the terminal's encoding lacks must not be the reason that a command fails.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        _check_words(words)
        if "--version" in base.before_dashes(words):
            return print_version(words)
        args = parse(words)
        return run(args)
    except SystemExit as exc:  # --help
        return exc.code if isinstance(exc.code, int) else 0
    except LMCacheError as exc:
        return _report_error(exc, words, is_quiet=args is not None and args.quiet)
    except BrokenPipeError:
        raise
    except Exception as exc:
        return _report_bug(exc, words)


def _check_words(words: Sequence[str]) -> None:
    """Return if all are text: what is not could be sent to no server.

    Raises: UsageError
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            from lmcache.errors import UsageError

            raise UsageError(f"{word!a} is not UTF-8", "write it as text") from None


def run(args: Namespace) -> int:
    """Run a parsed command.

    Raises: LMCacheError
    """
    from lmcache.cli.base import check_environment
    from lmcache.cli.output import check_output

    for warning in check_environment(os.environ):
        print(f"warning: {warning}", file=sys.stderr)
    check_output(args.output)
    return int(args.func(args))


def parse(words: Sequence[str]) -> Namespace:
    """Parse a command line, importing only the module of the command that it names.

    Raises: UsageError; SystemExit(0) after --help.
    """
    from lmcache.cli.base import fill_common_defaults

    parser = build_parser()
    command = parser.first_word(words)
    add_commands(parser, command)
    args, rest = parser.parse_known_args(words)
    if rest:
        args.parser.unrecognized(rest)
    if not hasattr(args, "func"):
        args.parser.error("which command? none was given")
    fill_common_defaults(args)
    return args  # type: ignore[no-any-return]


def print_version(words: Sequence[str]) -> int:
    """Print the version in the format asked for."""
    from lmcache import __version__
    from lmcache.cli.base import read_option
    from lmcache.cli.output import Result, to_json, write

    result = Result("lmcache")
    result.put("version", __version__)
    is_json = read_option(words, "--format") == "json"
    write(to_json(result.document()) if is_json else f"lmcache {__version__}", read_option(words, "--output"))
    return 0


def build_parser() -> CommandParser:
    """Return the parser without any command."""
    from lmcache.cli.base import CommandParser

    parser = CommandParser(
        prog="lmcache",
        description="Serve a KV cache to LLM engines, and measure and operate it.",
        epilog="exit codes: 0 done and good; 1 answered but bad; 2 usage; 3 not reachable, or deadline passed; "
        "4 inconclusive: a check could decide nothing; 130 interrupted",
    )
    parser.populate()
    return parser


def command_names() -> list[str]:
    """Return the names of all commands: those of the modules and packages in `lmcache.cli.commands`."""
    import pkgutil

    from lmcache.cli import commands

    names = (module.name for module in pkgutil.iter_modules(commands.__path__))
    return sorted(name.replace("_", "-") for name in names if not name.startswith("_"))


def add_commands(parser: CommandParser, command: str = "") -> None:
    """Add the named command, or all of them when there is none of that name."""
    subparsers: Any = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    if not _add_command(command, subparsers):
        for name in command_names():
            _add_command(name, subparsers)


def _add_command(name: str, subparsers: Any) -> bool:
    """Add one command; False when there is none of that name. pkgutil, which costs 5 ms, is needed only to list them all."""
    from importlib import import_module

    if not name.replace("-", "").isalnum():
        return False
    module_name = f"lmcache.cli.commands.{name.replace('-', '_')}"
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as exc:
        if exc.name != module_name:
            raise
        return False
    module.register_command(subparsers)
    return True


def _report_error(error: LMCacheError, words: Sequence[str], is_quiet: bool = False) -> int:
    """Say what went wrong where the caller looks for it; return the exit code."""
    from lmcache.cli.base import read_option
    from lmcache.cli.output import discard_stdout, error_document, print_error, to_json, write
    from lmcache.errors import LMCacheError

    if is_quiet and error.exit_code != 2:
        return error.exit_code
    if read_option(words, "--format") != "json":
        print_error(error)
        return error.exit_code
    document = to_json(error_document(error))
    path = read_option(words, "--output")
    is_told = path is None
    try:
        try:
            write(document, path)
        except LMCacheError:
            is_told = True
            write(document)
    except BrokenPipeError:  # the reader has gone; the exit code still tells
        discard_stdout()
    except LMCacheError as nowhere:  # nor can stdout be written: stderr is left
        discard_stdout()
        if error.message != nowhere.message:
            print_error(error)
        print_error(nowhere)
    if not is_told:
        print_error(error)
    return error.exit_code


def _report_bug(exc: Exception, words: Sequence[str]) -> int:
    """The one place that catches what nobody foresaw."""
    from lmcache.cli.base import DEBUG_VARIABLE
    from lmcache.errors import LMCacheError

    if os.environ.get(DEBUG_VARIABLE) == "1":
        import traceback

        traceback.print_exc()
    error = LMCacheError(
        f"{type(exc).__name__}: {exc}; this is a bug in lmcache",
        f"run it again with {DEBUG_VARIABLE}=1 and report what it prints",
        "bug",
    )
    return _report_error(error, words)


if __name__ == "__main__":
    sys.exit(main())
