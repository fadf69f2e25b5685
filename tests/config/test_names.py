import pytest
from hypothesis import given
from hypothesis import strategies as st

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.names import MAX_LENGTH, name_error, printable, safe_name

HOSTILE = ["../../../escaped", "a/b", "/abs", "..", ".hidden", "\x1b[31mred", "a\0b", "a\nb", "\u202eabc", "a.", " "]
HOSTILE += ["a" * 101]


@pytest.mark.parametrize("name", ["pretrain_7b", "a", "7B base", "v1.2-rc+3", "Modell_ä", "日本語"])
def test_usual_names_are_taken(name):
    assert name_error(name) is None and safe_name(name) == name


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("place", ["name", "curriculum.phases.0.name", "data.sources"])
def test_one_rule_holds_for_every_name(name, place):
    value = repr(name) if place != "data.sources" else None
    recipe = "continual_7b" if place.startswith("curriculum") else "pretrain_7b"
    import yaml

    written = yaml.safe_dump({name: "x.jsonl"} if value is None else name, allow_unicode=False).removesuffix("...\n")
    with pytest.raises(ConfigError) as refused:
        load_recipe(recipe, overrides=[f"{place}={written.strip()}"])
    assert "\x1b" not in printable(str(refused.value)) and "\0" not in printable(str(refused.value))
    assert "file" in str(refused.value) or "characters" in str(refused.value)


@given(st.text())
def test_every_text_becomes_a_valid_name(text):
    assert name_error(safe_name(text)) is None and len(safe_name(text)) <= MAX_LENGTH


@given(st.text())
def test_what_is_printed_moves_no_cursor_and_reorders_nothing(text):
    shown = printable(text)
    assert all(char in "\n\t" or char.isprintable() or char.isspace() for char in shown)
    assert printable(shown) == shown
