"""`lmcache query`: what happens when I send one request, to the cache server or to an inference engine?"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

    from lmcache.cli.base import CommandParser


def register_command(subparsers: Any) -> None:
    description = "Send one request and show what became of it."
    subparsers.add_parser("query", help="what happens to one request?", description=description, populate=add_targets)


def add_targets(parser: CommandParser) -> None:
    """Add what can be queried."""
    targets = parser.add_subparsers(title="targets", metavar="TARGET", required=True)
    kvcache = targets.add_parser(
        "kvcache",
        help="the cache server",
        description="Look a prompt up in the cache, pinning nothing; or store, retrieve, compare and remove random bytes.",
        populate=_add_kvcache_options,
    )
    kvcache.set_defaults(func=_query_kvcache)
    engine = targets.add_parser(
        "engine",
        help="an inference engine, such as vLLM",
        description="Send one prompt to an inference engine and time its answer. "
        "The first token, and each after another, may take --timeout, here 300 s unless told otherwise.",
        populate=_add_engine_options,
    )
    engine.set_defaults(func=_query_engine)


def _add_kvcache_options(parser: CommandParser) -> None:
    from lmcache.cli.commands.query.kvcache import add_options

    add_options(parser)


def _query_kvcache(args: Namespace) -> int:
    from lmcache.cli.commands.query.kvcache import query_kvcache

    return query_kvcache(args)


def _add_engine_options(parser: CommandParser) -> None:
    from lmcache.cli.commands.query.engine import add_options

    add_options(parser)


def _query_engine(args: Namespace) -> int:
    from lmcache.cli.commands.query.engine import query_engine

    return query_engine(args)
