"""Corpora in prompts."""

import argparse

import pytest

from lmcache.cli.corpora import built_in_names, corpus_option, expand_prompt, load_corpus
from lmcache.errors import UsageError


def test_the_built_in_corpora_are_there_and_are_text():
    assert built_in_names() == ["ffmpeg", "paul_graham"]
    for name in built_in_names():
        assert len(load_corpus(name)) > 10_000


def test_names_expand_and_their_places_are_known():
    prompt = expand_prompt("{a} and {{b}, then {b}{a}", {"a": str(own("AAA")), "b": str(own("BB"))})
    assert prompt.text == "AAA and {b}, then BBAAA"
    assert [(span.name, prompt.text[span.start : span.end]) for span in prompt.spans] == [
        ("a", "AAA"),
        ("b", "BB"),
        ("a", "AAA"),
    ]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def own(text):
    path = f"{text}.txt"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def test_what_a_corpus_holds_is_not_expanded_again():
    assert expand_prompt("{a}", {"a": own("{ffmpeg} {{ {")}).text == "{ffmpeg} {{ {"


def test_a_doubled_brace_is_a_brace_and_a_closing_one_stands_for_itself():
    assert expand_prompt('{{"key": 1}').text == '{"key": 1}'
    assert expand_prompt("a } b }}").text == "a } b }}"
    assert expand_prompt("{{{{ffmpeg}").text == "{{ffmpeg}"
    assert expand_prompt("").text == ""


def test_an_own_corpus_wins_over_a_built_in_one():
    assert expand_prompt("{ffmpeg}", {"ffmpeg": own("mine")}).text == "mine"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UsageError, match="unknown corpus 'ffmepg'; known: ffmpeg, mine, paul_graham"):
        expand_prompt("{ffmepg}", {"mine": own("x")})


@pytest.mark.parametrize("template", ["{", "a { b", '{"json": 1}', "{}", "{a b}"])
def test_a_brace_that_starts_no_name_is_refused(template):
    with pytest.raises(UsageError, match=r"starts no \{corpus\}") as refused:
        expand_prompt(template)
    assert refused.value.hint == "write '{{' for a literal brace"


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in ("missing", "binary", "."):
        with pytest.raises(UsageError, match=f"cannot read corpus 'c' from '{path}'"):
            expand_prompt("{c}", {"c": path})


def test_the_corpus_option_takes_name_and_path():
    assert corpus_option("my.corpus-1=a=b.txt") == ("my.corpus-1", "a=b.txt")
    for text in ("name", "name=", "=path", "a b=path", "a}=path"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not name=path"):
            corpus_option(text)
