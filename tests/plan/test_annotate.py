from dataclasses import replace

import pytest

from igla_mega.config import load, yaml_text
from igla_mega.config.load import load_recipe
from igla_mega.layout.layout import Layout
from igla_mega.plan.annotate import annotated

ONE = Layout(
    tensor=1, pipeline=1, virtual_pipeline=1, context=1, expert=1, data=2, sequence_parallel=False, strategy="DDP",
    distributed_optimizer=True, micro_batch_size=2, num_microbatches=1, global_batch=4, sequence_length=64,
)  # fmt: skip
CHOSEN = {"kernels": "local", "loss_chunk": 256, "attention": "the choice of torch"}


@pytest.mark.parametrize("name", load.packaged())
def test_every_auto_of_the_layout_is_followed_by_what_was_used_and_no_value_changes(name):
    recipe = load_recipe(name)
    before = load.dump(recipe)
    parts = [[ONE]] * len(recipe.stages or (recipe,))
    after = annotated(before, parts, CHOSEN)
    assert yaml_text.parse(after, "recipe.yaml") == yaml_text.parse(before, "recipe.yaml")
    assert [line.split("  # used: ")[0] for line in after.splitlines()] == before.splitlines()
    # The section of a recipe of stages is read by none of them.
    read = after.partition("\nstages:\n")[2] or after
    open_keys = [line.strip() for line in read.splitlines() if line.endswith(": auto")]
    assert set(open_keys) <= {"context_schedule: auto", "reference: auto", "add_bos: auto"}


def test_what_ran_stands_beside_what_was_asked_for_only_where_they_differ():
    recipe = load_recipe("pretrain_7b", overrides=["distributed.strategy=FSDP", "distributed.tensor_parallel=1"])
    lines = annotated(load.dump(recipe), [[ONE, replace(ONE, micro_batch_size=4)]], {}).splitlines()
    assert "  strategy: FSDP  # used: DDP" in lines and "  tensor_parallel: 1" in lines
    assert "  sequence_parallel: auto  # used: false" in lines and "  micro_batch_size: auto  # used: 2, 4" in lines


def test_text_that_looks_like_a_section_stays_as_it_is():
    text = "a\n\ndistributed:\n\ntensor_parallel: auto\n\n  tensor_parallel: auto\n"
    recipe = load_recipe("pretrain_7b").with_keys({"evaluation.prompts": (text,)})
    before = load.dump(recipe)
    assert yaml_text.parse(annotated(before, [[ONE]], CHOSEN), "x") == yaml_text.parse(before, "x")
