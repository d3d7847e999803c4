"""One report, or one after the other: what every target of `describe` does with its samples.

Comes in: a function that takes a `Sample`. Goes out: a report, or with `--watch` one after the other until interrupted.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from argparse import Namespace

from lmcache.cli.base import positive_seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

    from lmcache.cli.base import CommandParser
    from lmcache.cli.output import Result

DEFAULT_WATCH_SECONDS = 2.0
CLEAR_SCREEN = "\x1b[H\x1b[2J"


class Sample(ABC):
    """What was seen at one moment."""

    @abstractmethod
    def result(self) -> Result:
        """Return the page."""

    @abstractmethod
    def line(self, before: Sample | None) -> str:
        """Return the page in a line, with rates since `before`, if that is of the same process."""


def add_watch_option(parser: CommandParser) -> None:
    """Add `--watch`."""
    parser.add_argument(
        "--watch",
        type=positive_seconds,
        nargs="?",
        const=DEFAULT_WATCH_SECONDS,
        metavar="SECONDS",
        help="show it again and again: redrawn on a terminal, one line a sample elsewhere "
        f"(default: every {DEFAULT_WATCH_SECONDS:g} s)",
    )


def describe(take: Callable[[], Sample], args: Namespace) -> int:
    """Report one sample, or with `--watch` samples until interrupted; return the exit code.

    Raises: UnreachableError, LMCacheError.
    """
    from lmcache.cli.output import report

    if args.watch is not None:
        watch(take, args)
    return report(take().result(), args)


def watch(take: Callable[[], Sample], args: Namespace) -> NoReturn:
    """Report until interrupted; after the first answer, an absence is only said.

    Raises: UnreachableError, LMCacheError.
    """
    from lmcache.cli.output import print_error
    from lmcache.errors import UnreachableError

    before: Sample | None = None
    while True:
        started_at = time.monotonic()
        try:
            sample = take()
            if not args.quiet:
                _show(sample, before, args)
            before = sample
        except UnreachableError as exc:
            if before is None:
                raise
            print_error(exc)
        time.sleep(max(0.0, args.watch - (time.monotonic() - started_at)))


def _show(sample: Sample, before: Sample | None, args: Namespace) -> None:
    import json
    import sys

    from lmcache.cli.output import write

    if args.format == "json":
        write(json.dumps(sample.result().document()), args.output)
    elif args.output is not None:
        write(sample.result().text(), args.output)
    elif sys.stdout.isatty():
        write(CLEAR_SCREEN + sample.result().text())
    else:
        write(sample.line(before))
