"""Every key of the schema has a stated effect on a run that is resumed; what would make it another run is refused."""

import json
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest
import ranks
import small_run
from pydantic import BaseModel

from igla_mega import run as engine
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.config.schema import Recipe
from igla_mega.data.indexed import IndexedWriter
from igla_mega.train.continuity import EFFECTS, effect_of, flat, refuse_another_run, refuse_unknown_keys


def leaves(section: type[BaseModel], prefix: str = ""):
    """Dotted keys of the schema, without the indices of lists."""

    def sections(annotation):
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield annotation
        for argument in typing.get_args(annotation):
            yield from sections(argument)

    for key, field in section.model_fields.items():
        inner = [one for one in sections(field.annotation) if one is not Recipe]
        for one in inner:
            yield from leaves(one, f"{prefix}{key}.")
        if not inner:
            yield prefix + key


KEYS = sorted(set(leaves(Recipe)))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_schema_has_an_effect(key):
    assert effect_of(key) is not None, "add it to EFFECTS: does a change of it make another run?"


def test_every_effect_is_of_a_key_that_exists():
    known = {".".join(key.split(".")[:end]) for key in KEYS for end in range(1, key.count(".") + 2)}
    assert EFFECTS.keys() <= known


def test_a_new_section_without_an_entry_would_be_found():
    assert effect_of("optimiser.beta") is None and effect_of("stages.0.model.rope_theta") == "checked"
    assert effect_of("curriculum.phases.3.lr") == "next_step"


def recipe(**overrides) -> Recipe:
    given = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return load_recipe("pretrain_7b", scale="laptop", overrides=given)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model__num_heads": 4}, "model.num_heads: was 8, is 4."),
        ({"model__rope_theta": 77777.0}, "model.rope_theta: was 10000.0, is 77777.0."),
        ({"model__norm_epsilon": 0.01}, "is 0.01."),
        ({"training__seed": 5}, "training.seed: was"),
        ({"training__sequence_length": 128}, "training.sequence_length: was"),
        ({"data__validation_fraction": 0.25}, "data.validation_fraction: was"),
        ({"data__document_mask": True}, "data.document_mask: was False, is True."),
    ],
)
def test_what_would_be_another_run_is_refused_with_both_values_and_may_be_insisted_on(change, says):
    [key] = [key.replace("__", ".") for key in change]
    with pytest.raises(ConfigError) as refused:
        refuse_another_run(recipe(), recipe(**change), {}, "CKPT", ())
    assert says in str(refused.value) and f"--accept-changes {key}" in str(refused.value)
    lines = refuse_another_run(recipe(), recipe(**change), {}, "CKPT", (key.split(".")[0],))
    assert len(lines) == 1 and lines[0].startswith(f"{key}: was")


@pytest.mark.parametrize(
    "change",
    [
        {"training__learning_rate": 2e-3},
        {"training__total_steps": 999},
        {"logging__tensorboard": False},
        {"evaluation__every_steps": 7},
        {"distributed__tensor_parallel": 2},
        {"checkpoint__keep_last": 9},
    ],
)
def test_what_may_change_between_two_calls_is_taken(change):
    assert refuse_another_run(recipe(), recipe(**change), {}, "CKPT", ()) == []


def test_data_that_was_replaced_is_refused_with_both_fingerprints():
    with pytest.raises(ConfigError, match=r"(?s)data\.sources\.web: .* was aaaa and is bbbb.*--accept-changes"):
        refuse_another_run(recipe(), recipe(), {"web": ("aaaa", "bbbb"), "code": ("c", "c")}, "CKPT", ())
    assert len(refuse_another_run(recipe(), recipe(), {"web": ("aaaa", "bbbb")}, "CKPT", ("data.sources.web",))) == 1


def test_a_changed_tokenizer_is_refused_with_both_digests_and_may_be_insisted_on():
    data = {".tokenizer": ("aaaa", "bbbb"), ".add_bos": ("never", "always"), "web": ("c", "c")}
    with pytest.raises(ConfigError) as refused:
        refuse_another_run(recipe(), recipe(), data, "CKPT", ())
    assert "data.tokenizer: the tokenizer's files differ: their sha256 was aaaa and is bbbb." in str(refused.value)
    assert "data.add_bos: was never, is always." in str(refused.value)
    assert "--accept-changes data.add_bos,data.tokenizer" in str(refused.value)
    lines = refuse_another_run(recipe(), recipe(), data, "CKPT", ("data.tokenizer", "data.add_bos"))
    assert [line.split(":")[0] for line in lines] == ["data.add_bos", "data.tokenizer"]


def test_a_source_that_only_one_side_has_is_refused():
    with pytest.raises(
        ConfigError, match=r"(?s)code: is no longer one of the sources\..*web: was not one of the sources"
    ):
        refuse_another_run(recipe(), recipe(), {"web": (None, "b"), "code": ("c", None)}, "CKPT", ())
    accepted = ("data.sources.web", "data.sources.code")
    assert len(refuse_another_run(recipe(), recipe(), {"web": (None, "b"), "code": ("c", None)}, "CKPT", accepted)) == 2


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("data.tokeniser", "data.tokenizer"),
        ("model.rope_tetha", "model.rope_theta"),
        ("trainning.seed", "training.seed"),
        ("data.sources.wbe", "data.sources.web"),
        ("1", "Give the keys"),
    ],
)
def test_an_unknown_key_that_is_accepted_is_refused_with_the_nearest(key, near):
    with pytest.raises(ConfigError, match=rf"--accept-changes: no such key or source: {key}\.\n  .*{near}"):
        refuse_another_run(recipe(), recipe(), {"web": ("a", "a")}, "CKPT", ("training.seed", key))


@pytest.mark.parametrize("key", [*KEYS, *(key.split(".")[0] for key in KEYS), "data.sources.any", "stages.1.model"])
def test_every_key_and_section_of_the_schema_can_be_accepted(key):
    refuse_unknown_keys([key])


def test_lists_of_sections_are_compared_entry_by_entry():
    assert flat({"a": [{"b": 1}, {"b": 2}], "c": [3, 4], "d": None}) == {"a.0.b": 1, "a.1.b": 2, "c": [3, 4]}


def continued(path: str, run_dir: str, stop_after: int | None, changes: list[str], accepted: list[str]) -> str:
    """Train on one rank; what was refused, if anything."""
    store = small_run.own_world()  # kept: the run's world lives in it
    try:
        engine.train(load_recipe(path, overrides=changes), Path(run_dir), stop_after=stop_after, accepted=accepted)
    except ConfigError as refused:
        return str(refused)
    finally:
        del store
    return ""


def test_a_run_is_continued_on_its_own_data_and_as_its_own_model_only(tmp_path):
    path, run = small_run.write_recipe(tmp_path), tmp_path / "run"
    train = lambda stop, changes=(), accepted=(): ranks.run(  # noqa: E731
        1, continued, str(path), str(run), stop, list(changes), list(accepted)
    )[0]
    assert train(2) == ""
    assert json.loads((run / "checkpoints" / "step_00000002" / "data.json").read_text()).keys() == {"words"}
    assert "model.rope_theta: was" in train(4, ["model.rope_theta=123.0"])
    # The data grows in place: windows are shuffled over other documents, so samples would be skipped and repeated.
    with IndexedWriter(tmp_path / "words", np.uint16) as writer:
        writer.add(np.random.default_rng(4).integers(0, small_run.VOCAB, 22_000), np.full(110, 200))
    assert "data.sources.words" in train(4)
    assert train(4, accepted=["data.sources.words"]) == ""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [one["step"] for one in events if one["event"] == "change_accepted"] == [2]
    assert not [one for one in events if one["event"] == "recipe_changed"]
    assert train(6, ["training.gradient_clip=0.5"]) == "", "from here on it is the run's own data"
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    [changed] = [one for one in events if one["event"] == "recipe_changed"]
    assert changed["step"] == 4 and changed["message"].startswith("training.gradient_clip: was ")


def test_a_run_is_continued_with_its_own_tokenizer_and_mixes_only(tmp_path, tokenizer):
    folder = Path(shutil.copytree(tokenizer.path, tmp_path / "tokenizer"))
    path, run = small_run.write_recipe(tmp_path, data={"tokenizer": str(folder)}), tmp_path / "run"
    with IndexedWriter(tmp_path / "more", np.uint16) as writer:
        writer.add(np.random.default_rng(5).integers(0, small_run.VOCAB, 20_000), np.full(100, 200))
    more = f"data.sources={{words: {tmp_path / 'words'}, more: {tmp_path / 'more'}}}"
    train = lambda stop, changes=(), accepted=(): ranks.run(  # noqa: E731
        1, continued, str(path), str(run), stop, list(changes), list(accepted)
    )[0]
    assert train(2) == ""
    assert json.loads((run / "checkpoints" / "step_00000002" / "data.json").read_text()).keys() == {
        "words",
        ".tokenizer",
    }
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    assert "data.tokenizer: the tokenizer's files differ" in train(4)
    assert "did you mean" in train(4, accepted=["data.tokenise"]).lower()
    assert train(4, [more, "data.mix={words: 1, more: 1}"], ["data.tokenizer"]) == ""
    # The run folder is lost, and the checkpoints are restored from elsewhere.
    lost = json.loads((run / "mix.json").read_text())
    (run / "mix.json").unlink()
    assert train(6, [more, "data.mix={words: 1, more: 1}"]) == ""
    assert json.loads((run / "mix.json").read_text()) == lost and lost[1]["first_sample"] == 16
    assert json.loads((run / "checkpoints" / "step_00000006" / "mix.json").read_text()) == lost
