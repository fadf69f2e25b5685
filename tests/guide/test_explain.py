"""Every key of the schema is explained from the schema: nothing is kept by hand, so nothing is missing."""

import re

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.guide import explain as module
from igla_mega.guide.explain import all_keys, explain, readers, section_of

KEYS = dict(all_keys())


def test_every_key_has_a_text_a_type_a_default_an_effect_and_a_range_if_it_is_a_number():
    for key, field in KEYS.items():
        text = explain(key)
        assert text.splitlines()[0].removesuffix(": a section") == key
        assert len(text.splitlines()[1].split()) >= 2, key
        if section_of(field) is not None:
            continue
        for line in ("  type: ", "  default: ", "  read by: "):
            assert re.search(rf"^{line}\S", text, re.M), (key, line)
        if "number" in module._type(module._schema(key)):
            assert re.search(r"^  range: (at least|above) \S+", text, re.M), key
        assert "changed before a resume: " in text, key


def test_a_section_lists_its_keys():
    text = explain("lora")
    assert text.startswith("lora: a section") and all(f"  {key}" in text for key in ("rank", "alpha", "adapter"))
    assert all(f"  {key}" in explain(None) for key in ("training", "stages", "data"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("training.learning_rate", ["above 0", "default: 0.0003", "next step", "engine/schedule.py"]),
        ("stages.1.training.seed", ["training.seed", "at least 0", "refused"]),
        ("curriculum.phases.0.lr", ["curriculum.phases.lr", "none, must be given"]),
        ("data.mix.web", ["data.mix", "mapping of names to number"]),
        ("koshey.tier", ["at least 1, at most 10"]),
        ("dpo.label_smoothing", ["at least 0, below 0.5"]),
        ("training.batch_size", ["whole number or text with a unit", "range: at least 1"]),
        ("distributed.strategy", ["one of FSDP, DDP", "default: DDP"]),
        ("ewc_lambda", ["koshey.ewc_lambda", "continual.ewc_lambda"]),
    ],
)
def test_a_key_is_explained(key, words):
    text = explain(key)
    assert [word for word in words if word not in text] == [], text


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("training.learnin_rate", "`training.learning_rate`"),
        ("lerning_rate", "`training.learning_rate`"),
        ("trainin", "`training`"),
        ("zzz", "lists all"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, near):
    with pytest.raises(ConfigError, match=re.escape(near)):
        explain(key)


def test_readers_are_modules_that_name_the_key():
    assert readers("evaluation.needle.depths") and "evaluate/needle.py" in readers("evaluation.needle.depths")
    assert not [name for name in readers("lora.rank") if name.startswith(("guide/", "config/schema"))]
