"""The error tree: what its drawing says is what the classes are."""

import re

import pytest

from lmcache import errors
from lmcache.errors import LMCacheError

CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, LMCacheError)]


def drawn() -> dict[str, tuple[int, str]]:
    """Exit code and parent of every class in the module's drawing."""
    found: dict[str, tuple[int, str]] = {}
    parents = ["LMCacheError"]
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([│ ]*)[├└]── (\w+)\s+(\d)  \S", line)
        if match:
            depth = len(match[1]) // 4 + 1
            del parents[depth:]
            found[match[2]] = (int(match[3]), parents[-1])
            parents.append(match[2])
    return found


def test_the_drawing_shows_every_class_with_its_parent_and_exit_code():
    assert drawn() == {cls.__name__: (cls.exit_code, cls.__bases__[0].__name__) for cls in CLASSES if cls is not LMCacheError}


def test_codes_are_unique_and_exit_codes_are_those_of_the_command_line():
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)
    assert {cls.exit_code for cls in CLASSES} == {1, 2, 3, 4}


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_keeps_its_sentence_hint_and_code(cls: type[LMCacheError]):
    plain, special = cls("it broke"), cls("it broke", "mend it", "special")
    assert (str(plain), plain.message, plain.hint, plain.code) == ("it broke", "it broke", "", cls.code)
    assert (str(special), special.hint, special.code) == ("it broke", "mend it", "special")
    assert cls.code != "special"
