"""Every number of the schema has a range: a value far outside of it is refused with a message, never a traceback."""

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import json_schema

SCHEMA = json_schema()
UNBOUNDED_WORDS = {"batch_size", "total_tokens", "tokens", "consolidate_every", "staging_memory", "bits"}
"""Keys that also take words, as `4M tokens`: their parser has the bounds."""


def numbers(node: dict, path: str = "") -> dict[str, dict]:
    """Path within the schema -> the alternative that is a number."""
    found = {}
    for alternative in node.get("anyOf", [node]):
        if alternative.get("type") in ("integer", "number"):
            found[path] = alternative
        for key, value in alternative.get("properties", {}).items():
            found |= numbers(value, f"{path}.{key}" if path else key)
        if isinstance(more := alternative.get("additionalProperties"), dict):
            found |= numbers(more, f"{path}.*")
    return found


NUMBERS = {f"{name}.{key}": one for name, section in SCHEMA["$defs"].items() for key, one in numbers(section).items()}


@pytest.mark.parametrize("place", NUMBERS)
def test_every_number_has_both_bounds(place):
    one = NUMBERS[place]
    if place.split(".")[-1] not in UNBOUNDED_WORDS:
        assert {"minimum", "exclusiveMinimum"} & one.keys() and {"maximum", "exclusiveMaximum"} & one.keys(), one


SECTIONS = ("model", "training", "optimizer", "scheduler", "distributed", "data", "checkpoint", "evaluation", "logging")
KEYS = [
    f"{section}.{key}"
    for section in SECTIONS
    for key in numbers(SCHEMA["$defs"][section.capitalize()])
    if "*" not in key
]


@pytest.mark.parametrize("value", ["1e18", "-1", "1e308", ".nan", ".inf", "999999999999999999999999", "true"])
@pytest.mark.parametrize("key", KEYS)
def test_an_extreme_value_is_taken_or_refused_with_a_message_that_names_the_key(key, value):
    try:
        load_recipe("pretrain_7b", overrides=[f"{key}={value}"])
    except ConfigError as refusal:
        assert str(refusal)


@pytest.mark.parametrize(
    "override", ["evaluation.prompts.²=x", "a." * 3000 + "b=1", "curriculum.phases.99999999999999999999.lr=1", "..=1"]
)
def test_a_path_of_set_that_leads_nowhere_is_refused(override):
    with pytest.raises(ConfigError):
        load_recipe("continual_7b", overrides=[override])
