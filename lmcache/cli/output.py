"""One result, two renderings: a box of text for people and a JSON document for scripts.

Comes in: a `Result` that a command filled once. Goes out: stdout or a file, and the exit code.
"""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence
    from typing import Any

    from lmcache.errors import LMCacheError

SCHEMA_VERSION = 1
# Nothing can be made beside the file, or its name cannot be given to another: then it is written where it is.
NO_DRAFT = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.EEXIST)
NO_RENAME = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV)


class Row:
    """One line of a box: `label:` and its value; lines without a label are free text."""

    __slots__ = ("indent", "label", "value")

    def __init__(self, label: str, value: str, indent: int = 0) -> None:
        self.label = label
        self.value = value
        self.indent = indent

    @property
    def left(self) -> str:
        """What stands left of the value."""
        return " " * self.indent + (f"{self.label}:" if self.label else "")


class Section:
    """Rows under a rule that carries the section's title; the first section of a box has none."""

    __slots__ = ("rows", "title")

    def __init__(self, title: str = "") -> None:
        self.title = title
        self.rows: list[Row] = []


class Result:
    """What a command found out; text and JSON are made from the same calls.

    Args:
        title: the box's heading.
        width: of the box; it grows when a row does not fit.
        value_end: the column where right-aligned values end (default: `width`).
        value_start: the column where left-aligned values start; it wins over `value_end`.

    `ok` decides the exit code, and `error` is what is said on stderr, and in JSON, when it is
    false.
    """

    def __init__(self, title: str, *, width: int = 50, value_end: int = 0, value_start: int = 0) -> None:
        self.title = title
        self.width = width
        self.value_end = value_end or width
        self.value_start = value_start
        self.sections = [Section()]
        self.data: dict[str, Any] = {}
        self.error: LMCacheError | None = None
        self._group = self.data

    @property
    def ok(self) -> bool:
        """Whether the answer was good: exit code 0."""
        return self.error is None

    def fail(self, message: str, hint: str = "", code: str = "failed") -> None:
        """Say that an answer came and was bad; the exit code will be 1."""
        from lmcache.errors import LMCacheError

        self.error = LMCacheError(message, hint, code)

    def section(self, title: str, key: str = "") -> None:
        """Start a section; with `key`, the values that follow go into a JSON object so named."""
        self.sections.append(Section(title))
        self._group = self.data.setdefault(key, {}) if key else self.data

    def row(self, label: str, value: Any, *, key: str = "", text: str | None = None, indent: int = 0) -> None:
        """Add a line: `value` for JSON, under `key` if there is one; `text` or it for the box."""
        if key:
            self._group[key] = value
        self.sections[-1].rows.append(Row(label, str(value) if text is None else text, indent))

    def unknown(self, label: str, reason: str, *, key: str = "", indent: int = 0) -> None:
        """Add a line for what cannot be known: `n/a (reason)`, in JSON null and the reason."""
        if key:
            self._group[f"{key}_unknown_because"] = reason
        self.row(label, None, key=key, text=f"n/a ({reason})", indent=indent)

    def line(self, text: str, indent: int = 0) -> None:
        """Add a line of free text, which JSON does not have."""
        self.sections[-1].rows.append(Row("", text, indent))

    def put(self, key: str, value: Any) -> None:
        """Add a value that only JSON has."""
        self._group[key] = value

    def document(self) -> dict[str, Any]:
        """Return the JSON document."""
        head: dict[str, Any] = {"ok": self.ok, "schema_version": SCHEMA_VERSION}
        if self.error is not None:
            head["error"] = error_object(self.error)
        return {**head, **self.data}

    def text(self) -> str:
        """Return the box, without a newline at its end."""
        growth = self._growth()
        width = self.width + growth
        lines = [f" {printable(self.title)} ".center(width, "=")]
        for section in self.sections:
            if section.title:
                lines.append(printable(section.title).center(width, "-"))
            lines += [self._line(row, growth) for row in section.rows]
        lines.append("=" * width)
        return "\n".join(lines)

    def _line(self, row: Row, growth: int) -> str:
        left, value = printable(row.left), printable(row.value)
        if not row.label:
            return left + value
        if self.value_start:
            return (left.ljust(self.value_start + growth) + value).rstrip()
        return left + value.rjust(self.value_end + growth - len(left))

    def _growth(self) -> int:
        """How many columns the widest row lacks."""
        rows = [row for section in self.sections for row in section.rows if row.label]
        if self.value_start:
            lacking = [len(printable(row.left)) + 1 - self.value_start for row in rows]
        else:
            lacking = [len(printable(row.left)) + 1 + len(printable(row.value)) - self.value_end for row in rows]
        return max([0, *lacking])


def printable(text: str) -> str:
    """Return `text` with control characters escaped: names come from other machines.

    Terminals obey them.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def error_object(error: LMCacheError) -> dict[str, str]:
    """Return the `error` member of a JSON document."""
    return {"code": error.code, "message": error.message, "hint": error.hint}


def error_document(error: LMCacheError) -> dict[str, Any]:
    """Return the JSON document of a command that has nothing else to say."""
    return {"ok": False, "schema_version": SCHEMA_VERSION, "error": error_object(error)}


def report(result: Result, args: Namespace) -> int:
    """Write the result as `--format`, `--output` and `-q` say; return the exit code."""
    if not args.quiet:
        try:
            _write_result(result, args)
        except BrokenPipeError:  # the reader has what it wanted; the exit code still tells
            discard_stdout()
        if result.error is not None and args.format != "json":
            print_error(result.error)
    return 0 if result.error is None else result.error.exit_code


def _write_result(result: Result, args: Namespace) -> None:
    """Write it where `--output` says, or to stdout with that error where the file takes nothing: the figures are kept."""
    from lmcache.errors import LMCacheError

    try:
        write(_rendered(result, args.format), args.output)
    except LMCacheError as exc:
        if args.output is None or args.output == "-":
            raise
        if result.error is None:
            result.error = exc
        else:
            print_error(exc)
        write(_rendered(result, args.format))


def _rendered(result: Result, format_name: str) -> str:
    return to_json(result.document()) if format_name == "json" else result.text()


def to_json(document: dict[str, Any]) -> str:
    """Return one document, indented; numbers that JSON cannot hold are an error, not `NaN`."""
    import json

    return json.dumps(document, indent=2, allow_nan=False)


def write(text: str, path: str | None = None) -> None:
    """Write text and a newline to stdout, or replace the file at `path`, in one step where that can be done.

    Raises: LMCacheError when the device or the file system refuses; BrokenPipeError.
    """
    try:
        if path is not None and path != "-":
            _replace_file(path, text + "\n")
        else:
            print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise unwritable(path, exc) from exc


def unwritable(path: str | None, exc: OSError) -> LMCacheError:
    """Return the error for a file, or stdout, that takes nothing."""
    from lmcache.errors import LMCacheError

    return LMCacheError(f"cannot write {path or 'to standard output'}: {exc.strerror}", "pass another --output", "output")


def check_output(path: str | None) -> None:
    """Return if a file could be written at `path`: asked before the work, not after it.

    Raises: UsageError
    """
    if path is None or path == "-":
        return
    from lmcache.errors import UsageError

    folder = os.path.dirname(os.path.realpath(path))
    if not path or os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise UsageError(f"cannot write {path!r}", "name a file in a folder that exists", "output")


def discard_stdout() -> None:
    """Let the flush at the interpreter's end succeed after the reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _replace_file(path: str, text: str) -> None:
    """Readers see the old content or the new, also when the disk fills up.

    Written as they are: devices and pipes, and a file whose place takes no draft or no rename, such as a bind mount.
    """
    is_device = os.path.exists(path) and not os.path.isfile(path)
    if is_device or not _write_by_rename(os.path.realpath(path), text):
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


def _write_by_rename(target: str, text: str) -> bool:
    """Return whether the file was replaced; False when the draft cannot be made or renamed, and nothing has changed.

    Raises: OSError when the draft's content cannot be written.
    """
    draft = f"{target}.{os.getpid()}.tmp"
    try:
        file = open(draft, "x", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 - closed below
    except OSError as exc:
        if exc.errno in NO_DRAFT:
            return False
        raise
    try:
        with file:
            file.write(text)
        return _is_renamed(draft, target)
    finally:
        if os.path.exists(draft):
            os.unlink(draft)


def _is_renamed(draft: str, target: str) -> bool:
    try:
        os.replace(draft, target)
    except OSError as exc:
        if exc.errno in NO_RENAME:
            return False
        raise
    return True


def print_error(error: LMCacheError) -> None:
    """Write the error's one or two lines to stderr. Where nobody can read them the exit code still tells."""
    import contextlib

    with contextlib.suppress(OSError):
        print(f"error: {printable(error.message)}", file=sys.stderr)
        if error.hint:
            print(f"hint: {printable(error.hint)}", file=sys.stderr)


def format_duration(seconds: float) -> str:
    """Return `2h 14m 32s`; days appear when there are any, and below a minute only seconds."""
    total = int(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    parts = [f"{days}d"] * (total >= 86400) + [f"{hours}h"] * (total >= 3600) + [f"{minutes}m"] * (total >= 60)
    return " ".join([*parts, f"{total % 60}s"])


def format_bytes(num_bytes: float) -> str:
    """Return a size in the largest binary unit that leaves one digit before the point.

    `64.0 MiB`, `12 bytes`.
    """
    for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << power:
            return f"{num_bytes / (1 << power):.1f} {unit}"
    return f"{int(num_bytes)} bytes"


def format_ratio(ratio: float) -> str:
    """Return `93.8%`."""
    return f"{ratio * 100:.1f}%"


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which `share` of `ordered` lies, interpolated between neighbours."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
