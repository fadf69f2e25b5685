import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("words", Path(__file__).resolve().parents[2] / "tools" / "words.py")
words = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(words)


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("a.py", "x = 1\nraise ValueError('mend its rights')\n", "a.py:2"),
        ("a.py", '"""Fine.\n\nThe loss leaps.\n"""\n', "a.py:3"),
        ("a.py", "# from the begin of\n", "a.py:1"),
        ("a.cpp", "int x;  // as it is told by the caller\n", "a.cpp:1"),
        ("a.md", "One\n\nit goes\non with\n", "a.md:"),
    ],
)
def test_an_unusual_word_is_named_with_its_line_and_an_alternative(name, text, place):
    found = list(words.breaches(name, text))
    assert found == [] if place == "a.md:" else found and found[0].startswith(place) and "write " in found[0]


def test_names_and_longer_words_are_left_alone():
    assert list(words.breaches("a.py", "mend = amendment('recommended')\n")) == []


def test_a_line_may_keep_a_word_that_it_quotes():
    assert list(words.breaches("a.py", "# Slurm calls it 'told by'.  plain-words: keep\n")) == []
