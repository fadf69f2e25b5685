"""Conversations and pairs, from JSONL to batches."""

import ast
import bz2
import gzip
import itertools
import json
import lzma
import shutil
from pathlib import Path

import chat_tokenizers
import numpy as np
import pytest
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Dpo
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import BatchShard
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.prepared import TARGETS
from igla_mega.data.tokenizer import load_tokenizer, train_bpe
from igla_mega.data.tuning.conversations import Conversations, Pairs
from igla_mega.distributed.mesh import Axis
from igla_mega.objective import dpo
from igla_mega.prepare import toy_tasks
from igla_mega.prepare.samples import prepare_samples

LENGTH = 48
CASES = Path(__file__).parents[1] / "cases"


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


def test_a_pair_longer_than_a_row_is_refused_before_the_first_step(folder):
    with pytest.raises(ConfigError, match=r"training.sequence_length: pair \d+ of own has \d+ tokens .* 4 of a row"):
        pairs(folder, sequence_length=4)


def test_what_is_up_to_date_is_not_prepared_again_and_another_limit_prepares_it(folder, capsys):
    lines = [talk(i) for i in range(9)]
    made = recipe(folder, lines, sft={}, data={"chat_template": "plain"})
    prepare_samples(made)
    assert "own: 9 instructions" in capsys.readouterr().err
    prepare_samples(made)
    assert capsys.readouterr().err == ""
    prepare_samples(recipe(folder, lines, sft={}, data={"chat_template": "plain", "max_length": 40}))
    assert "own: 9 instructions" in capsys.readouterr().err
    for part, suffix in itertools.product(("", TARGETS), (".bin", ".idx")):
        prefix = prepare_samples(made, progress=False)["own"]
        Path(f"{prefix}{part}{suffix}").unlink()
        prepare_samples(made)
        assert "own: 9 instructions" in capsys.readouterr().err, "a file that is missing is made again"


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_other_special_tokens_beside_the_tokenizer_prepare_it_again(small, tmp_path, name):
    (tmp_path / "one.jsonl").write_bytes(jsonl([talk(1)]))
    copy = shutil.copytree(small / "tokl2", tmp_path / "own")
    if name == "special_tokens_map.json":
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        kept = {key: value for key, value in settings.items() if key not in ("bos_token", "eos_token")}
        (copy / "tokenizer_config.json").write_text(json.dumps(kept))
    for begin, end in (("<s>", "</s>"), ("<|im_start|>", "<|im_end|>")):
        settings = json.loads((copy / name).read_text()) if (copy / name).is_file() else {}
        (copy / name).write_text(json.dumps({**settings, "bos_token": begin, "eos_token": end}))
        (text,) = prepared(tmp_path, "own", tmp_path / "one.jsonl", tmp_path / "out")[0]
        assert text.startswith(f"{begin}[INST]") and text.endswith(f"{end}]")


@pytest.mark.parametrize(
    ("line", "changes", "said"),
    [
        (talk(1), {"sft": {}}, "chat_template"),
        ({**talk(1), "prompt": "1 one"}, {"sft": {}}, "the tokenizer has no chat template"),
        ({"messages": [{"role": "user", "content": "a"}]}, {"sft": {}}, "no turn by the assistant"),
        ({"prompt": "a", "completion": "two " * 90}, {"sft": {}}, "data.too_long"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, {"dpo": {}}, "chosen equals rejected"),
        ({"prompt": "one " * 90, "chosen": "b", "rejected": "c"}, {"dpo": {}}, "data.max_length 48"),
        (
            {"prompt": "one " * 9, "chosen": "b", "rejected": "c"},
            {"dpo": {}, "data": {"max_prompt_length": 8}},
            "more than the 8 of data.max_prompt_length",
        ),
        (
            [{"prompt": "a", "completion": "b"}],
            {"sft": {}},
            "a JSON array, not an object.\n  Write one object per line",
        ),
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


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The tokenizers that the cases name."""
    made = tmp_path_factory.mktemp("tokenizers")
    chat_tokenizers.make(made)
    return made


def prepared(small, name: str, file: Path, out: Path, **changes) -> tuple[list[str], dict]:
    """Prepare a file of conversations, or of pairs with `dpo`; return its documents as text, and what is counted.

    Targets of a conversation are in brackets.
    """
    form = {changes.pop("form", "sft"): {}}
    data = {"sources": {"own": str(file)}, "tokenizer": str(small / name), "prepared": str(out), "max_length": 64}
    made = Recipe.model_validate({"base_model": "any", "data": {**data, **changes}, **form})
    prefix = prepare_samples(made)["own"]
    tokenizer, reader = load_tokenizer(small / name), IndexedReader(prefix)
    targets = IndexedReader(prefix + TARGETS) if "sft" in form else None
    starts, texts = reader.document_starts(0, reader.num_documents), []
    for first, stop in itertools.pairwise(starts):
        ids, text, before = reader.tokens(first, stop), "", False
        for token, target in zip(ids, targets.tokens(first, stop) if targets else [False] * len(ids), strict=True):
            text += ("" if before == target else "[" if target else "]") + tokenizer.decode([token])
            before = target
        texts.append(text + "]" * bool(before))
    counts = json.loads(Path(f"{prefix}.json").read_text())
    return texts, {key: counts[key] for key in ("samples", "left_out", "cut")}


def lines_of(name: str) -> list[dict]:
    return [json.loads(line) for line in (CASES / name).read_text(encoding="utf-8-sig").splitlines()]


def test_the_case_of_long_pairs(small, tmp_path, capsys):
    file, pairs = CASES / "dpo_long.jsonl", lines_of("dpo_long.jsonl")
    with pytest.raises(
        ConfigError, match=r"dpo_long.jsonl:1: the prompt's 60 and the chosen .* 32 tokens exceed .* 64"
    ):
        prepared(small, "tok", file, tmp_path / "error", form="dpo")
    assert not list(tmp_path.glob("error/own.json"))
    capsys.readouterr()
    texts, counts = prepared(small, "tok", file, tmp_path / "cut", form="dpo", too_long="cut")
    assert counts == {"samples": 12, "left_out": 0, "cut": 12}
    said = capsys.readouterr().err
    assert said.startswith("own: 12 preference pairs, ") and said.endswith("; 12 too long and cut\n")
    for number, pair in enumerate(pairs):
        prompt, *answers = texts[3 * number : 3 * number + 3]
        assert answers == [pair["chosen"] + "<|endoftext|>", pair["rejected"] + "<|endoftext|>"], "answers are whole"
        assert prompt and pair["prompt"].endswith(prompt)
    written = {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()}
    with pytest.raises(ConfigError, match=r"own: every line is too long and left out"):
        prepared(small, "tok", file, tmp_path / "cut", form="dpo", too_long="skip")
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == written, "nothing is replaced"


@pytest.mark.parametrize("name", ["dpo_exact.jsonl", "dpo_over.jsonl"])
def test_the_cases_of_a_prompt_as_long_as_the_limit_or_longer(small, tmp_path, capsys, name):
    with pytest.raises(ConfigError, match=rf"{name}:\d+: the prompt's \d+ and the \w+ answer's 2 tokens exceed .* 64"):
        prepared(small, "tok", CASES / name, tmp_path / "error", form="dpo")
    long = {i for i, pair in enumerate(lines_of(name)) if len(pair["prompt"].split()) > 9}
    texts, counts = prepared(small, "tok", CASES / name, tmp_path / "skip", form="dpo", too_long="skip")
    total = len(lines_of(name))
    assert counts == {"samples": total - len(long), "left_out": len(long), "cut": 0}
    assert f"; {len(long)} too long and left out\n" in capsys.readouterr().err
    texts, counts = prepared(small, "tok", CASES / name, tmp_path / "cut", form="dpo", too_long="cut")
    assert counts == {"samples": total, "left_out": 0, "cut": len(long)}
    for number, pair in enumerate(lines_of(name)):
        prompt, *answers = texts[3 * number : 3 * number + 3]
        assert answers == [pair["chosen"] + "<|endoftext|>", pair["rejected"] + "<|endoftext|>"]
        assert len(prompt.split()) == (62 if number in long else 2) and pair["prompt"].endswith(prompt)


TOOL_TEXT = 'Tools: [{"type": "function", "function": {"name": "f", "parameters": {}}}]'
EXPECTED = {
    "tools": f"<|im_start|>system\n{TOOL_TEXT}<|im_end|>\n"
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n[sat on<|im_end|>]\n",
    "tool role": "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    '[<tool_call>{"name": "f", "arguments": {}}</tool_call><|im_end|>]\n'
    "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n[sat<|im_end|>]\n",
    "template drops tool_calls": "the chat template does not render `tool_calls`",
    "weight 0": "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nbad bad<|im_end|>\n"
    "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n[sat on<|im_end|>]\n",
    "thinking stripped by the template": "the chat template does not render `content` of the assistant",
    "end token twice, plain": "the cat[ sat on<|endoftext|>]",
    "begin and end typed": "<s>[INST] the cat [/INST][ sat on</s>]",
    "assistant turns inside a prompt": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nFEWSHOT<|im_end|>\n"
    "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n[c<|im_end|>]\n",
}


@pytest.mark.parametrize("case", lines_of("sft_cases.jsonl"), ids=lambda case: case["case"])
def test_a_case_of_conversations(small, tmp_path, case):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps(case["line"]) + "\n")
    expected = EXPECTED[case["case"]]
    if expected.startswith("the chat template"):
        with pytest.raises(ConfigError) as caught:
            prepared(small, case["tokenizer"], file, tmp_path, max_length=256)
        assert expected in str(caught.value) and f"{file}:1: turn 2: " in str(caught.value)
    else:
        assert prepared(small, case["tokenizer"], file, tmp_path, max_length=256)[0] == [expected]


def test_the_case_of_a_template_that_always_ends_with_a_header(small, tmp_path):
    lines = lines_of("sft_bom.jsonl")
    template = str(CASES / "generation_header.jinja")
    texts, _ = prepared(small, "tokml", CASES / "sft_bom.jsonl", tmp_path, chat_template=template)
    assert len(texts) == len(lines)
    for text, line in zip(texts, lines, strict=True):
        assert f"<|im_start|>assistant\n[{line['messages'][1]['content']}<|im_end|>]\n" in text


def as_parquet(lines: list[dict], change=lambda table: table) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    parquet.write_table(change(pyarrow.Table.from_pylist(lines)), sink)
    return sink.getvalue().to_pybytes()


def cast_texts(name: str):
    """A change of a table's columns of strings, also those within structs, to another type of strings."""

    def other(kind):
        import pyarrow
        from pyarrow import types

        if types.is_string(kind):
            index = {"dictionary": lambda: pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
            return index.get(name, getattr(pyarrow, name))()
        if types.is_list(kind) and name != "string_view":  # which pyarrow does not write within lists
            return pyarrow.list_(other(kind.value_type))
        if types.is_struct(kind):
            return pyarrow.struct([(field.name, other(field.type)) for field in kind])
        return kind

    def change(table):
        import pyarrow

        schema = pyarrow.schema([(field.name, other(field.type)) for field in table.schema])
        return pyarrow.Table.from_pylist(table.to_pylist(), schema)

    return change


def jsonl(lines: list[dict]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def zst(lines: list[dict]) -> bytes:
    import zstandard

    return zstandard.compress(jsonl(lines))


KINDS = {
    "BOM.jsonl": lambda lines: b"\xef\xbb\xbf" + jsonl(lines),
    "blank lines.jsonl": lambda lines: b"\n \r\n" + jsonl(lines).replace(b"\n", b"\r\n\n") + b"\n\t",
    "no line end.json": lambda lines: jsonl(lines)[:-1],
    "one.jsonl.gz": lambda lines: gzip.compress(jsonl(lines)),
    "members.jsonl.gz": lambda lines: b"".join(gzip.compress(jsonl([line])) for line in lines),
    "BOM.jsonl.gz": lambda lines: gzip.compress(b"\xef\xbb\xbf" + jsonl(lines)),
    "one.jsonl.bz2": lambda lines: bz2.compress(jsonl(lines)),
    "one.jsonl.xz": lambda lines: lzma.compress(jsonl(lines)),
    "one.jsonl.zst": zst,
    "string.parquet": as_parquet,
    "large.parquet": lambda lines: as_parquet(lines, cast_texts("large_string")),
    "view.parquet": lambda lines: as_parquet(lines, cast_texts("string_view")),
    "binary.parquet": lambda lines: as_parquet(lines, cast_texts("binary")),
}
FORMS = {
    "sft": [talk(1), {"messages": [{"role": "system", "content": "two"}, *talk(2)["messages"]]}],
    "completion": [{"prompt": "one ", "completion": "two"}, {"prompt": "three ", "completion": "two", "id": "7"}],
    "ShareGPT": [
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two", "weight": None}]}
    ]
    * 2,
    "Alpaca": [
        {"instruction": "one", "input": "", "output": "two"},
        {"instruction": "one", "input": "a", "output": "b"},
    ],
    "pairs": [{"prompt": "one ", "chosen": "yes", "rejected": "no"}] * 2,
    "UltraFeedback": [
        {
            "prompt": "1 one",
            "chosen": talk(1)["messages"],
            "rejected": [*talk(1)["messages"][:1], {"role": "assistant", "content": "no"}],
            "score_chosen": 8.0,
        }
    ]
    * 2,
    "HH-RLHF": [{"chosen": "\n\nHuman: one\n\nAssistant: yes", "rejected": "\n\nHuman: one\n\nAssistant: no"}] * 2,
}


@pytest.fixture(scope="module")
def plainly(folder, tmp_path_factory):
    """The documents of each form from plain JSONL."""
    root, texts = tmp_path_factory.mktemp("plainly"), {}
    for name, lines in FORMS.items():
        (root / f"{name}.jsonl").write_bytes(jsonl(lines))
        texts[name] = documents(folder, name, root / f"{name}.jsonl", root / name)
    return texts


def documents(folder, name: str, file: Path, out: Path) -> list[str]:
    form = "dpo" if "chosen" in FORMS[name][0] else "sft"
    texts, counts = prepared(folder, "tokenizer", file, out, form=form, chat_template="plain")
    assert counts == {"samples": 2, "left_out": 0, "cut": 0}
    return texts


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_the_same_from_every_kind_of_file(folder, plainly, tmp_path, name):
    for kind, written in KINDS.items():
        (tmp_path / kind).write_bytes(written(FORMS[name]))
        assert documents(folder, name, tmp_path / kind, tmp_path / kind.partition(".")[0]) == plainly[name], kind


def test_columns_that_are_dictionaries_are_texts(folder, plainly, tmp_path):
    (tmp_path / "d.parquet").write_bytes(as_parquet(FORMS["pairs"], cast_texts("dictionary")))
    assert documents(folder, "pairs", tmp_path / "d.parquet", tmp_path) == plainly["pairs"]


BAD_FILES = {
    "two.parquet": (
        lambda: as_parquet([{"a": 1}], lambda t: t.append_column("a", t["a"])),
        "several columns of one name",
    ),
    "cut.parquet": (lambda: as_parquet(FORMS["pairs"])[:-9], "not a Parquet file, or truncated"),
    "cut.jsonl.gz": (lambda: gzip.compress(jsonl(FORMS["pairs"]))[:-9], "truncated: the .gz data ends"),
    "words.txt": (lambda: b"one two\n", "plain text, not JSON objects"),
    "latin.jsonl": (lambda: '{"prompt": "ä"}\n'.encode("latin-1"), "latin.jsonl:1: not UTF-8"),
    "blank.jsonl": (lambda: b"\xef\xbb\xbf\n \n", "data.sources.own: its files have no lines"),
    "null.parquet": (
        lambda: as_parquet([{"prompt": "a", "completion": None}]),
        "null.parquet: row 1: not a conversation",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_without_conversations_is_refused_by_name(folder, tmp_path, name):
    content, said = BAD_FILES[name]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ConfigError, match=name if name != "blank.jsonl" else "own") as caught:
        prepared(folder, "tokenizer", tmp_path / name, tmp_path)
    assert said in str(caught.value)


def test_a_long_conversation_is_cut_after_a_whole_answer(small, tmp_path, capsys):
    turns = [{"role": role, "content": " ".join(["sat"] * 10)} for _ in range(4) for role in ("user", "assistant")]
    (tmp_path / "long.jsonl").write_bytes(jsonl([{"messages": turns}, {"messages": turns[:2]}]))
    with pytest.raises(ConfigError, match=r"long.jsonl:1: \d+ tokens exceed data.max_length 64"):
        prepared(small, "tokml", tmp_path / "long.jsonl", tmp_path / "error")
    whole, _ = prepared(small, "tokml", tmp_path / "long.jsonl", tmp_path / "whole", max_length=999)
    texts, counts = prepared(small, "tokml", tmp_path / "long.jsonl", tmp_path / "cut", too_long="cut")
    assert counts == {"samples": 2, "left_out": 0, "cut": 1} and texts[1] == whole[1]
    assert whole[0].startswith(texts[0]) and texts[0].endswith("sat<|im_end|>]")
    capsys.readouterr()
    assert prepared(small, "tokml", tmp_path / "long.jsonl", tmp_path / "skip", too_long="skip")[0] == whole[1:]
    said = capsys.readouterr().err
    assert said.startswith("own: 1 instructions, ") and said.endswith("; 1 too long and left out\n")
