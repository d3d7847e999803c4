"""`lmcache bench`: how fast is it, under load?"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any


def register_command(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="measure with many requests: how fast is it?")
    targets = parser.add_subparsers(title="targets", metavar="TARGET", dest="target", required=True)
    kvcache = targets.add_parser(
        "kvcache",
        help="the KV cache server: store, retrieve and look up, with checked contents",
        description="Store, retrieve and look up chunks of known content as an engine does, check every byte that "
        "comes back, and compare the bandwidth with a plain copy of the same size in the same run.",
        populate=_add_kvcache_arguments,
    )
    kvcache.set_defaults(func=_bench_kvcache)
    engine = targets.add_parser(
        "engine",
        help="an inference engine: 'vllm bench serve', and what the KV cache did meanwhile",
        populate=_add_engine_arguments,
        leaves_rest=True,
    )
    engine.set_defaults(func=_bench_engine)


def _add_kvcache_arguments(parser: Any) -> None:
    from lmcache.cli.commands.bench.kvcache import add_arguments

    add_arguments(parser)


def _bench_kvcache(args: Namespace) -> int:
    from lmcache.cli.commands.bench.kvcache import run

    return run(args)


def _add_engine_arguments(parser: Any) -> None:
    from lmcache.cli.commands.bench.engine import DESCRIPTION, add_arguments

    parser.description = DESCRIPTION
    add_arguments(parser)


def _bench_engine(args: Namespace) -> int:
    from lmcache.cli.commands.bench.engine import run

    return run(args)
