"""Texts for prompts: `{name}` in a prompt stands for a corpus, built in or the user's own.

Comes in: a prompt as it was typed. Goes out: the prompt in full, and which part of it is which corpus.
"""

from __future__ import annotations

import argparse
import os
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

FOLDER = os.path.dirname(__file__)
SUFFIX = ".txt"
NAME = re.compile(r"[A-Za-z0-9_.-]+")
# A literal brace, a corpus, or a brace that starts neither.
_MARK = re.compile(r"\{\{|\{([A-Za-z0-9_.-]+)\}|\{")


class Span:
    """Characters [start, end) of a prompt are the corpus `name`."""

    __slots__ = ("end", "name", "start")

    def __init__(self, name: str, start: int, end: int) -> None:
        self.name = name
        self.start = start
        self.end = end


class Prompt:
    """A prompt in full, and the corpora in it from left to right."""

    __slots__ = ("spans", "text")

    def __init__(self, text: str, spans: list[Span]) -> None:
        self.text = text
        self.spans = spans


def corpus_option(text: str) -> tuple[str, str]:
    """Parse the `name=path` of `--corpus`."""
    name, separator, path = text.partition("=")
    if not separator or not path or NAME.fullmatch(name) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not name=path with a name of letters, digits, '_', '.' and '-'")
    return name, path


def built_in_names() -> list[str]:
    """Return the names of the corpora that ship with this package."""
    return sorted(name.removesuffix(SUFFIX) for name in os.listdir(FOLDER) if name.endswith(SUFFIX))


def load_corpus(name: str, own: Mapping[str, str] | None = None) -> str:
    """Return the text of a corpus; one of the user's `own`, name -> path, wins over one built in.

    Raises: UsageError for an unknown name, listing the known ones, and for a file that is no text.
    """
    from lmcache.errors import UsageError

    own = own or {}
    known = sorted({*built_in_names(), *own})
    if name not in known:
        raise UsageError(
            f"unknown corpus {name!r}; known: {', '.join(known)}",
            hint="add yours with --corpus name=path, or write '{{' for a literal brace",
            code="corpus",
        )
    path = own.get(name) or os.path.join(FOLDER, name + SUFFIX)
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError) as exc:
        raise UsageError(f"cannot read corpus {name!r} from {path!r}: {exc}", "name a text in UTF-8", "corpus") from exc


def expand_prompt(template: str, own: Mapping[str, str] | None = None) -> Prompt:
    """Return the prompt with each `{name}` replaced by its corpus and each `{{` by a brace.

    Raises: UsageError for an unknown name, or a brace that starts none.
    """
    from lmcache.errors import UsageError

    pieces: list[str] = []
    spans: list[Span] = []
    length = last = 0
    for mark in _MARK.finditer(template):
        if mark[0] == "{":
            raise UsageError(
                f"the prompt has a '{{' at character {mark.start() + 1} that starts no {{corpus}}",
                hint="write '{{' for a literal brace",
                code="corpus",
            )
        before = template[last : mark.start()]
        inserted = "{" if mark[1] is None else load_corpus(mark[1], own)
        start = length + len(before)
        length = start + len(inserted)
        if mark[1] is not None:
            spans.append(Span(mark[1], start, length))
        pieces += [before, inserted]
        last = mark.end()
    return Prompt("".join([*pieces, template[last:]]), spans)
