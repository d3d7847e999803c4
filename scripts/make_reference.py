"""Write the parts of docs/*.md that are made from the code: commands, settings, metrics, messages, ports.

A page holds marked blocks, `<!-- made: NAME -->` to `<!-- end -->`; what stands between them is replaced, the prose around is
not. Run: python scripts/make_reference.py [--check]. With --check nothing is written, and stale pages are exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import inspect as msgspec_types

from lmcache import errors, protocol
from lmcache.cli import base
from lmcache.cli.main import add_commands, build_parser
from lmcache.keys import Namespace
from lmcache.layout import KVLayout
from lmcache.metrics import DURATION_BUCKETS, OPS, SPECS, MetricSpec
from lmcache.storage.l2 import spec as l2_spec
from lmcache.storage.l2.base import Reason

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"(<!-- made: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
DEFAULT_GROUPS = ("options", "positional arguments")
COMMON_GROUP = "common options"

# What each variable does that belongs to no flag of the server.
VARIABLES = {
    base.URL_VARIABLE: "address of the cache server, where `--url` is not given",
    base.ENGINE_URL_VARIABLE: "address of the engine, where `--url` is not given",
    base.TOKEN_VARIABLE: "the bearer token: what the server asks for, and what the command line presents",
    base.ENGINE_TOKEN_VARIABLE: "the bearer token that the command line presents to engines: what vLLM calls `--api-key`",
    base.DEBUG_VARIABLE: "`1`: print the traceback of an unforeseen error",
    "LMCACHE_LOG_LEVEL": "the least severe lines that are logged: DEBUG, INFO, WARNING, ERROR",
    "LMCACHE_USE_UPSTREAM_MP": "read by vLLM: not empty, it uses its own connector class with our adapters",
}


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


# -- commands --------------------------------------------------------------------------------------


def full_parser() -> base.CommandParser:
    """Return the parser with every command."""
    parser = build_parser()
    add_commands(parser)
    return parser


def walk(parser: base.CommandParser) -> Iterator[base.CommandParser]:
    """Yield the parser and then all below it, with the arguments that they add when they are first used."""
    if parser.is_static:
        parser.populate()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from walk(child)


def is_parent(parser: base.CommandParser) -> bool:
    """Whether the parser only leads to others."""
    return any(isinstance(action, argparse._SubParsersAction) for action in parser._actions)


def commands() -> str:
    """Return a section for each command that does something."""
    return "\n".join(describe(parser) for parser in walk(full_parser()) if not is_parent(parser))


def describe(parser: base.CommandParser) -> str:
    """Return one command's section: what it does, and a table of flags for each group."""
    description, _, literal = (parser.description or "").partition("\n\n")
    lines = [f"### {parser.prog}\n", f"\n{description}\n"]
    if literal:
        lines.append(f"\n```text\n{literal}\n```\n")
    if not parser.is_static:
        lines.append(f"\nIts flags: `{parser.prog} --help`.\n")
    for group in parser._action_groups:
        rows = [flag_row(action) for action in group._group_actions if is_shown(action)]
        if rows and group.title != COMMON_GROUP:
            title = "" if group.title in DEFAULT_GROUPS else f"\n{capitalized(group.title or '')}:\n"
            lines += [title, "\n", table(("Flag", "What it does"), rows)]
    return "".join(lines)


def capitalized(text: str) -> str:
    """Return the text with its first letter in upper case, the others as they are."""
    return text[:1].upper() + text[1:]


def is_shown(action: argparse.Action) -> bool:
    """Whether the reference lists an argument."""
    return action.help is not argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)


def flag_row(action: argparse.Action) -> tuple[str, str]:
    """Return one argument's flag with its value, and its help."""
    help_ = argparse.HelpFormatter("")._expand_help(action) if action.help else ""
    names = action.option_strings or [""]
    return ", ".join(f"`{f'{name} {value_of(action)}'.strip()}`" for name in names), help_


def value_of(action: argparse.Action) -> str:
    """Return how the value of an option or a positional argument is written."""
    if action.nargs == 0:
        return ""
    value = action.metavar or ("{" + ",".join(action.choices) + "}" if action.choices else action.dest.upper())
    return f"[{value}]" if action.nargs == "?" else str(value)


def common_options() -> str:
    """Return the options that every command has."""
    group = next(group for group in build_parser()._action_groups if group.title == COMMON_GROUP)
    return table(("Flag", "What it does"), [flag_row(action) for action in group._group_actions])


def exit_codes() -> str:
    """Return the exit codes as `lmcache --help` has them, and the errors that lead to each."""
    listed = (build_parser().epilog or "").removeprefix("exit codes: ").split("; ")
    rows = []
    for text in listed:
        code, _, meaning = text.partition(" ")
        rows.append((code, meaning, ", ".join(sorted(f"`{name}`" for name in error_codes().get(int(code), ())))))
    return table(("Exit code", "Meaning", "Errors of `--format json` (`error.code`) that end with it, among others"), rows)


def error_codes() -> dict[int, set[str]]:
    """Return the codes of the error classes by their exit code."""
    found: dict[int, set[str]] = {}
    for _, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, errors.LMCacheError):
            found.setdefault(error.exit_code, set()).add(error.code)
    return found


def environment() -> str:
    """Return the variables that are read, but for those of the server's flags."""
    return table(("Variable", "What it does"), [(f"`{name}`", text) for name, text in sorted(VARIABLES.items())])


def ports() -> str:
    """Return the ports that are used unless told otherwise."""
    rows = [
        ("ZMQ: engines and the command line", str(protocol.DEFAULT_ZMQ_PORT), "`--port`"),
        ("HTTP: health, status, metrics", str(protocol.DEFAULT_HTTP_PORT), "`--http-port`"),
        ("metrics alone", "none", "`--metrics-port`"),
    ]
    return table(("What", "Port", "Flag"), rows)


# -- metrics ---------------------------------------------------------------------------------------


def metrics() -> str:
    """Return one row for each metric."""
    rows = [(f"`{spec.exported_name}`", spec.kind.value, labels(spec), spec.help) for spec in SPECS]
    return table(("Name", "Kind", "Labels", "What it counts"), rows)


def labels(spec: MetricSpec) -> str:
    """Return a metric's labels with their values; those of `op` and `tier` are told below the table."""
    shown = [f"`{name}`" + ("" if values in (OPS, ()) else ": " + ", ".join(values)) for name, values in spec.labels.items()]
    return "; ".join(shown)


def operations() -> str:
    """Return the values of the label `op`, and the buckets of the histograms."""
    buckets = ", ".join(f"{bucket:g}" for bucket in DURATION_BUCKETS)
    return (
        f"`op` is one of {', '.join(OPS)}. `tier` is a tier's name, as `describe kvcache` shows it: its adapter's, with a"
        f" number where there are several (`fs`, `redis`, `fs-2`). The buckets of durations end at {buckets} seconds.\n"
    )


# -- messages --------------------------------------------------------------------------------------


def messages() -> str:
    """Return one row for each request."""
    rows = []
    for op, request in protocol.REQUESTS.items():
        asked = field_list(request, protocol.Request)
        answered = field_list(request.reply_type, protocol.Reply, with_defaults=False)
        rows.append((f"`{op}`", inspect.getdoc(request) or "", asked, answered))
    return table(("Operation", "What it asks", "Fields", "Fields of the reply"), rows)


def types() -> str:
    """Return one row for each type that the fields of messages have."""
    rows = []
    for kind in (Namespace, KVLayout, protocol.Placement, protocol.TierRemoval, protocol.ErrorInfo):
        rows.append((f"`{kind.__name__}`", first_line(kind), field_list(kind)))
    for values in (protocol.StoreOutcome, protocol.HitStatus, protocol.ClearTier, protocol.Feature):
        rows.append(
            (f"`{values.__name__}`", first_line(values), "<br>".join(f"`{item.value}`: {item.name}" for item in values))
        )
    return table(("Type", "What it is", "Fields or values"), rows)


def first_line(kind: type[Any]) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def field_list(message: type[Any], parent: type[Any] | None = None, with_defaults: bool = True) -> str:
    """Return a message's fields with their types, without those that its parent has."""
    inherited = {field.name for field in msgspec.structs.fields(parent)} if parent else set()
    own = [field for field in msgspec.structs.fields(message) if field.name not in inherited]
    return "<br>".join(field_text(field, with_defaults) for field in own) or "none"


def field_text(field: Any, with_default: bool) -> str:
    """Return `name: type = default`; None is left out, since the type says it."""
    default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    default = default.value if isinstance(default, enum.Enum) else default
    has_none = default is None or default is msgspec.NODEFAULT
    shown = f" = {default!r}" if with_default and not has_none else ""
    return f"`{field.name}: {type_text(msgspec_types.type_info(field.type))}{shown}`"


def type_text(info: Any) -> str:
    """Return a type's short name."""
    if isinstance(info, msgspec_types.UnionType):
        return " or ".join(type_text(part) for part in info.types)
    if isinstance(info, msgspec_types.ListType):
        return f"list of {type_text(info.item_type)}"
    if isinstance(info, msgspec_types.Metadata):
        return type_text(info.type)
    if isinstance(info, (msgspec_types.StructType, msgspec_types.EnumType)):
        return str(info.cls.__name__)
    return {"NoneType": "none", "AnyType": "any", "DictType": "map"}.get(
        type(info).__name__, type(info).__name__.removesuffix("Type").lower()
    )


# -- L2 --------------------------------------------------------------------------------------------


def tier_settings() -> str:
    """Return one table of settings for each kind of adapter."""
    kinds: dict[type[Any], list[str]] = {}
    for name, settings in l2_spec.SETTINGS.items():
        kinds.setdefault(settings, []).append(name)
    return "\n".join(f"### {', '.join(names)}\n\n{first_line(kind)}\n\n{setting_rows(kind)}" for kind, names in kinds.items())


def setting_rows(kind: type[Any]) -> str:
    """Return the settings of one kind of adapter."""
    rows = []
    for item in dataclasses.fields(kind):
        place = {"": "after `?`", "scheme": "scheme"}.get(item.metadata["in_url"], item.metadata["in_url"])
        default = "" if item.default in (dataclasses.MISSING, "") else f"`{l2_spec.shown(item.metadata, item.default)}`"
        rows.append((f"`{item.name.replace('_', '-')}`", place, default, item.metadata["help"]))
    return table(("Setting", "In a URL", "Default", "What it is"), rows)


def tier_reasons() -> str:
    """Return the reasons of failures."""
    return ", ".join(f"`{reason.value}`" for reason in Reason) + "\n"


# -- pages -----------------------------------------------------------------------------------------

BLOCKS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "common-options": common_options,
    "exit-codes": exit_codes,
    "environment": environment,
    "ports": ports,
    "metrics": metrics,
    "operations": operations,
    "messages": messages,
    "types": types,
    "tier-settings": tier_settings,
    "tier-reasons": tier_reasons,
}


def fill(text: str) -> str:
    """Return a page with every marked block made anew."""
    return BLOCK.sub(lambda block: block[1] + BLOCKS[block[2]]() + block[3], text)


def pages() -> dict[Path, str]:
    """Return what every page of docs/ that has blocks should hold."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
    return {path: fill(text) for path, text in texts.items() if BLOCK.search(text)}


def update(is_check: bool) -> int:
    """Write the pages that are stale, or only name them; return the exit code."""
    stale = {path: text for path, text in pages().items() if path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        if is_check:
            print(f"{path} is stale: run python scripts/make_reference.py", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return int(is_check and bool(stale))


def main() -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a page is stale")
    return update(parser.parse_args().check)


if __name__ == "__main__":
    sys.exit(main())
