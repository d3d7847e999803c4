"""`lmcache server`: run the cache server in the foreground until Ctrl-C or SIGTERM."""

from __future__ import annotations

from argparse import Namespace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from lmcache.cli.base import CommandParser


def register_command(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "server",
        help="run the cache server",
        description="Run the cache server in the foreground until Ctrl-C or SIGTERM. "
        "Each flag also has a variable: --l1-size-gb is LMCACHE_L1_SIZE_GB.",
        populate=add_arguments,
    )
    parser.set_defaults(func=run_server)


def add_arguments(parser: CommandParser) -> None:
    """Add the server's flags: only now are its modules imported."""
    from lmcache.server import args

    args.add_arguments(parser)


def run_server(args: Namespace) -> int:
    """Serve; return when the server has ended."""
    from lmcache.server.app import run

    return run(args)
