"""`lmcache kvcache`: change what the cache holds."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError, Namespace

from lmcache.cli.base import add_prompt_options, byte_size, duration_seconds, ratio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from lmcache.cli.base import CommandParser, Url
    from lmcache.cli.output import Result
    from lmcache.protocol import RemovalReply

MAX_NAME_CHARACTERS = 512
# Of the deadline, the share that the server may take until it answers; the rest is the way there and back.
SERVER_SHARE = 0.8


def register_command(subparsers: Any) -> None:
    description = "Remove chunks from the cache, or release a request's."
    subparsers.add_parser("kvcache", help="change what the cache holds", description=description, populate=add_actions)


def add_actions(parser: CommandParser) -> None:
    """Add clear, end-session and evict."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    actions.add_parser(
        "clear",
        help="remove everything",
        description="Remove every chunk that is not pinned, from L1 and from L2.",
        populate=add_clear_options,
    ).set_defaults(func=clear)
    actions.add_parser(
        "end-session",
        help="release a request's chunks",
        description="Release every pin that a request holds.",
        populate=add_end_session_options,
    ).set_defaults(func=end_session)
    actions.add_parser(
        "evict",
        help="remove part of it",
        description="Remove, in the order of the eviction policy, chunks that all given conditions select.",
        populate=add_evict_options,
    ).set_defaults(func=evict)


def add_clear_options(parser: CommandParser) -> None:
    """Add the options of `kvcache clear`."""
    parser.add_argument("-y", "--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    parser.add_argument(
        "--tier",
        choices=("l1", "l2", "all"),
        default="all",
        help="where; what other servers have put into a shared L2 goes as well (default: all)",
    )
    parser.add_argument("--force", action="store_true", help="wait for pinned chunks, almost as long as --timeout")


def add_end_session_options(parser: CommandParser) -> None:
    """Add the options of `kvcache end-session`."""
    parser.add_argument("request_id", nargs="?", type=request_name, metavar="REQUEST_ID", help="the engine's request id")
    parser.add_argument("--request-id", dest="request_id_option", type=request_name, metavar="ID", help="the same")


def add_evict_options(parser: CommandParser) -> None:
    """Add the options of `kvcache evict`."""
    group = parser.add_argument_group("conditions")
    amount = group.add_mutually_exclusive_group()
    amount.add_argument("--bytes", dest="num_bytes", type=byte_size, metavar="SIZE", help="so much, for example 512MiB")
    amount.add_argument("--ratio", type=ratio, metavar="R", help="this share of L1, for example 0.25 or 25%%")
    group.add_argument("--older-than", type=duration_seconds, metavar="AGE", help="unused for so long, for example 10m")
    add_prompt_options(parser)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def request_name(text: str) -> str:
    """Parse a request id."""
    if not 0 < len(text) <= MAX_NAME_CHARACTERS:
        raise ArgumentTypeError(f"a request id has 1 to {MAX_NAME_CHARACTERS} characters")
    return text


# -- clear -----------------------------------------------------------------------------------------


def clear(args: Namespace) -> int:
    """Remove everything, after asking, and report."""
    from lmcache.cli.base import kvcache_url
    from lmcache.cli.output import report

    url = kvcache_url(args)
    if not (args.yes or args.dry_run):
        confirm(url, args)
    removal = send_clear(url, args.timeout, args.tier, args.dry_run, args.force)
    result = removal_result("KV Cache Clear", removal, args.dry_run)
    result.put("tier", args.tier)
    add_tiers(result, removal, args.dry_run)
    if args.tier == "l2" and not removal.tiers:
        result.fail("the server has no L2 tier", "see 'lmcache server --help' for --l2-adapter", "no_tier")
    if args.force and removal.kept_objects:
        result.fail(
            f"{removal.kept_objects} objects are still pinned",
            "pass a longer --timeout, or see 'lmcache describe kvcache' for who holds them",
            "pinned",
        )
    return report(result, args)


def confirm(url: Url, args: Namespace) -> None:
    """Return when the person at the terminal agrees.

    Raises: UsageError when there is no terminal to ask at; LMCacheError when the answer is no.
    """
    from lmcache.cli.output import format_bytes
    from lmcache.errors import LMCacheError, UsageError

    if not sys.stdin.isatty():
        raise UsageError("this removes every chunk, and there is no terminal to ask at", "pass -y, or --dry-run to look first")
    would = send_clear(url, args.timeout, args.tier, dry_run=True, force=False)
    at_least = "at least " if would.remaining_objects else ""
    what = [] if args.tier == "l2" else [f"{at_least}{would.objects} objects ({format_bytes(would.removed_bytes)})"]
    what += [f"{'all' if tier.objects is None else tier.objects} in L2 {tier.name}" for tier in would.tiers]
    print(f"Remove {' and '.join(what) or 'nothing'} from {url}? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise LMCacheError("nothing was removed", code="declined")


def add_tiers(result: Result, removal: RemovalReply, dry_run: bool) -> None:
    """Add what went from each tier of L2; the first that did not do it decides the exit code."""
    from lmcache.cli.output import format_bytes

    result.put(
        "tiers",
        [
            {"name": tier.name, "objects": tier.objects, "removed_bytes": tier.removed_bytes, "error": tier.error or None}
            for tier in removal.tiers
        ],
    )
    for tier in removal.tiers:
        result.section(f"L2 {tier.name}")
        verb = "to remove" if dry_run else "removed"
        if tier.objects is None:
            result.unknown(f"Objects {verb}", "the tier cannot tell")
        else:
            result.row(f"Objects {verb}", tier.objects)
        if tier.removed_bytes is None:
            result.unknown("Bytes", "the tier cannot tell")
        else:
            result.row(f"Bytes {verb}", format_bytes(tier.removed_bytes))
        if tier.error:
            result.row("Error", tier.error)
            hint = "it goes on; ask again later" if not tier.done else "see 'lmcache describe kvcache' for the tier's state"
            result.fail(f"L2 {tier.name} has not removed all of it: {tier.error}", hint, "tier")


def send_clear(url: Url, timeout: float, tier: str, dry_run: bool, force: bool) -> RemovalReply:
    """Ask the server to clear, over whichever transport the address has.

    Raises: UnreachableError, RemoteError, LMCacheError.
    """
    from lmcache.cli.base import send_request
    from lmcache.cli.http import http_request, wrong_peer
    from lmcache.protocol import Clear, ClearTier, RemovalReply

    wait = timeout * SERVER_SHARE
    if not url.is_http:
        request = Clear(dry_run=dry_run, force=force, timeout_seconds=wait, tier=ClearTier(tier))
        reply: RemovalReply = send_request(url, request, timeout=timeout).reply
        return reply
    import msgspec

    params = {"dry_run": str(dry_run).lower(), "force": str(force).lower(), "timeout_seconds": str(wait), "tier": tier}
    answer = http_request(url, "POST", "/api/clear", params, timeout)
    if "objects" not in answer:
        raise wrong_peer(url, "/api/clear does not say how many objects it removed")
    try:
        return msgspec.convert(answer, RemovalReply)
    except msgspec.ValidationError as exc:
        raise wrong_peer(url, f"/api/clear: {exc}") from exc


def removal_result(title: str, removal: RemovalReply, dry_run: bool) -> Result:
    """Return the report of a clear or an evict."""
    from lmcache.cli.output import Result, format_bytes

    result = Result(title, width=36, value_end=35)
    result.row("Status", "OK (dry run)" if dry_run else "OK", key="status")
    result.row("Objects to remove" if dry_run else "Objects removed", removal.objects, key="objects")
    removed = removal.removed_bytes
    result.row("Bytes to remove" if dry_run else "Bytes removed", removed, key="removed_bytes", text=format_bytes(removed))
    kept = f"{removal.kept_objects} ({format_bytes(removal.kept_bytes)})"
    result.row("Kept, because pinned", removal.kept_objects, key="kept_objects", text=kept)
    result.put("kept_bytes", removal.kept_bytes)
    result.put("dry_run", dry_run)
    result.put("remaining_objects", removal.remaining_objects)
    result.row("Seconds", removal.seconds, key="seconds", text=f"{removal.seconds:.3f}")
    if removal.remaining_objects:
        hint = "pass a longer --timeout" if dry_run else "it goes on; ask again later, or pass a longer --timeout"
        result.fail(f"{removal.remaining_objects} objects were not looked at yet", hint, "unfinished")
    return result


# -- end-session and evict -------------------------------------------------------------------------


def end_session(args: Namespace) -> int:
    """Release every pin of a request and report."""
    from lmcache.cli.base import kvcache_url, send_request
    from lmcache.cli.output import Result, report
    from lmcache.errors import UsageError
    from lmcache.protocol import EndSession

    given = [value for value in (args.request_id, args.request_id_option) if value is not None]
    if len(given) != 1:
        raise UsageError("give one request id", f"see '{args.parser.prog} --help'")
    reply = send_request(kvcache_url(args), EndSession(request_id=given[0]), timeout=args.timeout).reply
    result = Result("KV Cache End Session", width=38, value_end=36)
    result.row("Status", "OK", key="status")
    result.row("Request ID", given[0], key="request_id")
    result.row("Pins released", reply.released, key="released_pins")
    return report(result, args)


def evict(args: Namespace) -> int:
    """Remove what the conditions select and report."""
    from lmcache.cli.base import kvcache_url, send_request
    from lmcache.cli.output import report
    from lmcache.protocol import Evict

    url = kvcache_url(args)
    model, keys = select(url, args)
    request = Evict(
        dry_run=args.dry_run,
        num_bytes=args.num_bytes,
        ratio=args.ratio,
        model=model,
        older_than_seconds=args.older_than,
        timeout_seconds=args.timeout * SERVER_SHARE,
    )
    reply = send_request(url, request, keys, args.timeout).reply
    result = removal_result("KV Cache Evict", reply, args.dry_run)
    add_tiers(result, reply, args.dry_run)
    return report(result, args)


def select(url: Url, args: Namespace) -> tuple[str | None, list[bytes]]:
    """Return the model's registered name, if one was given, and the payload of keys, if tokens were.

    Raises: UsageError when no condition was given, or one that narrows a prompt's keys without a prompt;
        LMCacheError, UnreachableError, RemoteError.
    """
    from lmcache.cli.base import prompt_options_given
    from lmcache.cli.prompts import check_prompt_options, has_prompt, keys_of, model_name, read_prompt, select_model
    from lmcache.cli.status import fetch_status
    from lmcache.errors import UsageError

    if has_prompt(args):
        check_prompt_options(args)
        model = select_model(fetch_status(url, args.timeout)[1].models, args.model)
        return None, [keys_of(args, model, read_prompt(args, model).token_ids)]
    idle = prompt_options_given(args)
    if idle:
        raise UsageError(
            f"{', '.join(idle)} would narrow nothing: without --prompt or --tokens chunks of every request are selected",
            "add --prompt or --tokens, or leave it out",
        )
    if args.model is not None:
        return model_name(fetch_status(url, args.timeout)[1].models, args.model), []
    if args.num_bytes is None and args.ratio is None and args.older_than is None:
        raise UsageError(
            "evict what? no condition was given",
            "give --bytes, --ratio, --model, --older-than, --prompt or --tokens; 'kvcache clear' removes everything",
        )
    return None, []
