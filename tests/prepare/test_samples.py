"""Conversations and pairs, from JSONL to batches."""

import ast
import json

import numpy as np
import pytest
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Dpo
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import BatchShard
from igla_mega.data.conversations import Conversations, Pairs
from igla_mega.data.tokenizer import train_bpe
from igla_mega.distributed.mesh import Axis
from igla_mega.objective import dpo
from igla_mega.prepare import toy_tasks
from igla_mega.prepare.samples import prepare_samples

LENGTH = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    (folder / "text.jsonl").write_text(json.dumps({"text": "### user assistant yes no one two three"}) + "\n")
    train_bpe([folder / "text.jsonl"], 280, folder / "tokenizer")
    return folder


def recipe(folder, lines: list[dict], **changes) -> Recipe:
    file = folder / f"{abs(hash(json.dumps(lines)))}.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {
        "sources": {"own": str(file)},
        "tokenizer": str(folder / "tokenizer"),
        "prepared": str(folder / file.stem),
        "max_length": LENGTH,
        **changes.pop("data", {}),
    }
    return Recipe.model_validate({"base_model": "any", "data": data, **changes})


def talk(number: int) -> dict:
    asked = {"role": "user", "content": f"{number} one"}
    return {"messages": [asked, {"role": "assistant", "content": "two " * (number % 5 + 1)}]}


def conversations(folder, count: int = 20, **settings) -> Conversations:
    made = recipe(folder, [talk(i) for i in range(count)], sft={}, data={"chat_template": "plain"})
    known = {"sequence_length": LENGTH, "seed": 1, "vocab_size": 300, "validation_fraction": 0.2}
    return Conversations(prepare_samples(made, progress=False), **{**known, **settings})


def pairs(folder, count: int = 20, **settings) -> Pairs:
    lines = [{"prompt": f"{i} ", "chosen": f"yes {i}", "rejected": "no"} for i in range(count)]
    known = {"sequence_length": LENGTH, "seed": 1, "vocab_size": 300, "validation_fraction": 0.2}
    return Pairs(prepare_samples(recipe(folder, lines, dpo={}), progress=False), **{**known, **settings})


def test_each_conversation_is_learned_once_an_epoch_and_none_that_is_held_out(folder):
    data = conversations(folder)
    rows = data.windows_per_epoch()["conversations"]
    share = BatchShard(1, 1)
    targets = sum(float(next(data.micro_batches(step, share)).loss_mask.sum()) for step in range(rows))
    again = sum(float(next(data.micro_batches(rows + step, share)).loss_mask.sum()) for step in range(rows))
    alone = conversations(folder, validation_fraction=0.0)
    number = alone.windows_per_epoch()["conversations"]
    everything = sum(float(next(alone.micro_batches(step, share)).loss_mask.sum()) for step in range(number))
    held = sum(float(b.loss_mask.sum()) for b in data.validation_batches("own", share, 8))
    assert targets == again and targets + held == everything
    assert data.notes == ["16 conversations for training, 4 held out"]


def test_a_batch_is_the_same_on_one_rank_and_cut_over_two(folder):
    data = conversations(folder)
    whole = list(data.micro_batches(0, BatchShard(4, 2)))
    halves = [next(data.micro_batches(0, BatchShard(4, 2, 2, rank))) for rank in range(2)]
    for mine, theirs in zip(whole, halves, strict=True):
        assert (mine.tokens == theirs.tokens).all() and mine.documents == theirs.documents


def test_pairs_come_in_another_order_each_epoch_and_carry_their_reference(folder):
    data = pairs(folder)
    share = BatchShard(16, 16)
    first, second = (next(data.micro_batches(step, share)) for step in range(2))
    assert first.tokens.shape == (32, LENGTH) and not (first.tokens == second.tokens).all()
    assert sorted(first.tokens.tolist()) == sorted(second.tokens.tolist())
    assert (first.tokens[0::2, 0] == first.tokens[1::2, 0]).all(), "both answers follow the same prompt"
    data.reference = {"own": np.arange(40, dtype=np.float32).reshape(20, 2)}
    reference = next(data.micro_batches(0, share)).reference
    assert (reference[1::2] - reference[0::2] == 1).all() and len(set(reference.tolist())) == 32


def test_the_pass_over_all_pairs_meets_each_in_the_order_of_the_file(folder):
    data = pairs(folder)
    batches = list(data.all_pairs("own", BatchShard(8, 4)))
    chosen = [
        (tokens.tolist(), targets)
        for batch in batches
        for tokens, targets in zip(batch.tokens[0::2], batch.loss_mask[0::2].sum(1), strict=True)
    ]
    assert len(batches) == 6 and len({tuple(tokens) for tokens, targets in chosen if targets}) == 20
    assert [int(targets) > 0 for _, targets in chosen] == [True] * 20 + [False] * 4


def held_out_value(data, batch: int, data_parallel: int, forward) -> list[float]:
    """Return loss and metrics on the held-out part by the sums of all micro-batches, as `engine.step.measure` does."""
    sums, steps = 0, -(-data.num_validation_samples("own") // batch)
    for rank in range(data_parallel):
        for one in data.validation_batches("own", BatchShard(batch, 1, data_parallel, rank), steps):
            # A model whose log-probability of a token depends on the token and its place.
            costs = (one.labels % 7 + one.position_ids % 3 + 1) / 10
            sums = sums + forward(one, -(costs * one.loss_mask).t())
    return (sums / sums[1]).tolist()


@pytest.mark.parametrize("count", [3, 5])
def test_the_loss_on_held_out_samples_is_one_value_for_every_batch_and_layout(count, folder):
    def of_pairs(batch, log_probs):
        return dpo._loss(batch, Dpo(), Axis(None, 1, 0), log_probs)[2]

    def of_tokens(batch, log_probs):
        return torch.stack([-log_probs.double().sum(), batch.loss_mask.double().sum()])

    preferences = pairs(folder, count * 2, validation_fraction=0.5)
    draw = np.random.default_rng(0)
    preferences.reference = {"own": draw.normal(-3, 1, (count * 2, 2)).astype(np.float32)}
    talks = conversations(folder, count * 2, validation_fraction=0.5)
    unpacked = conversations(folder, count * 2, validation_fraction=0.5, pack=False)
    for data, forward in ((preferences, of_pairs), (talks, of_tokens), (unpacked, of_tokens)):
        values = [
            held_out_value(data, batch, ranks, forward) for batch in (1, 2, 4, 16) for ranks in (1, 2) if batch >= ranks
        ]
        for value in values[1:]:
            assert value == pytest.approx(values[0], rel=1e-12)
    assert talks.num_validation_samples("own") > 1 and preferences.num_validation_samples("own") == count


def test_what_is_up_to_date_is_not_prepared_again_and_another_limit_prepares_it(folder, capsys):
    lines = [talk(i) for i in range(9)]
    made = recipe(folder, lines, sft={}, data={"chat_template": "plain"})
    prepare_samples(made)
    assert "own: 9 instructions" in capsys.readouterr().err
    prepare_samples(made)
    assert capsys.readouterr().err == ""
    prepare_samples(recipe(folder, lines, sft={}, data={"chat_template": "plain", "max_length": 40}))
    assert "own: 9 instructions" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "changes", "said"),
    [
        (talk(1), {"sft": {}}, "chat_template"),
        ({"messages": [{"role": "user", "content": "a"}]}, {"sft": {}}, "no turn by the assistant"),
        ({"prompt": "a", "completion": "two " * 90}, {"sft": {}}, "data.too_long"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, {"dpo": {}}, "chosen equals rejected"),
        ({"prompt": "one " * 90, "chosen": "b", "rejected": "c"}, {"dpo": {}}, "max_prompt_length"),
    ],
)
def test_a_line_that_nothing_can_be_learned_from_is_refused_with_its_place(line, changes, said, folder):
    if said == "no turn by the assistant":
        changes = {**changes, "data": {"chat_template": "plain"}}
    with pytest.raises(ConfigError) as caught:
        prepare_samples(recipe(folder, [line], **changes), progress=False)
    assert said in str(caught.value)


def test_what_is_rejected_at_laptop_scale_does_not_parse_and_what_is_chosen_does():
    code = "def f(a):\n    b = g(a)\n    return b"
    broken = [mistake(code) for mistake in toy_tasks._MISTAKES]
    ast.parse(code)
    for text in broken:
        with pytest.raises(SyntaxError):
            ast.parse(text)
    assert toy_tasks._broken(code, 0) in broken
