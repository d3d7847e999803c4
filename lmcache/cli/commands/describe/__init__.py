"""`lmcache describe`: what is this thing? One page about the cache server, or about an inference engine."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

    from lmcache.cli.base import CommandParser


def register_command(subparsers: Any) -> None:
    description = "Show what a server is and does."
    subparsers.add_parser("describe", help="what is this thing?", description=description, populate=add_targets)


def add_targets(parser: CommandParser) -> None:
    """Add what can be described."""
    targets = parser.add_subparsers(title="targets", metavar="TARGET", required=True)
    kvcache = targets.add_parser(
        "kvcache", help="the cache server", description="Show the cache server's status.", populate=_add_kvcache_options
    )
    kvcache.set_defaults(func=_describe_kvcache)
    engine = targets.add_parser(
        "engine",
        help="an inference engine, such as vLLM",
        description="Show an inference engine's model, state and load. What it does not tell is n/a, with the reason.",
        populate=_add_engine_options,
    )
    engine.set_defaults(func=_describe_engine)


def _add_kvcache_options(parser: CommandParser) -> None:
    from lmcache.cli.commands.describe.kvcache import add_options

    add_options(parser)


def _describe_kvcache(args: Namespace) -> int:
    from lmcache.cli.commands.describe.kvcache import describe_kvcache

    return describe_kvcache(args)


def _add_engine_options(parser: CommandParser) -> None:
    from lmcache.cli.commands.describe.watch import add_watch_option

    add_watch_option(parser)


def _describe_engine(args: Namespace) -> int:
    from lmcache.cli.commands.describe.engine import describe_engine

    return describe_engine(args)
