"""A suggested recipe: every goal on every kind of data passes `check`, and a bad input is refused before any write."""

import gzip
import json

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.load import load_recipe
from igla_mega.data.tokenizer import train_bpe
from igla_mega.guide.suggest import GOALS, look, suggest

SENTENCE = "The quick brown fox jumps over the lazy dog while the small cat sleeps. "
TURNS = [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": SENTENCE * 2}]
OTHER = [TURNS[0], {"role": "assistant", "content": "No."}]
RECORDS = {
    "text": {"text": SENTENCE * 3},
    "own key": {"id": 7, "title": "fox", "Body of it: #1": SENTENCE * 3},
    "messages": {"messages": TURNS, "id": 1},
    "prompt": {"prompt": SENTENCE, "completion": SENTENCE},
    "alpaca": {"instruction": SENTENCE, "input": "", "output": SENTENCE},
    "pairs": {"prompt": SENTENCE, "chosen": SENTENCE, "rejected": "No."},
    "pairs of turns": {"chosen": TURNS, "rejected": OTHER},
}
FORMS = {
    "text": "text",
    "own key": "text",
    "plain": "text",
    "gz": "text",
    "parquet": "text",
    "pairs": "preference_pairs",
}
FORMS |= {"pairs of turns": "preference_pairs", **dict.fromkeys(("messages", "prompt", "alpaca"), "instructions")}


def write(folder, kind: str, count: int = 300):
    folder.mkdir()
    lines = "".join(json.dumps(RECORDS.get(kind, RECORDS["text"])) + "\n" for _ in range(count))
    if kind == "plain":
        (folder / "a.txt").write_text(SENTENCE * count)
        (folder / "b.txt").write_text(SENTENCE)
    elif kind == "gz":
        (folder / "part.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [SENTENCE] * count}), folder / "part.parquet")
    else:
        (folder / "part.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model folder without weights, which no suggestion reads."""
    folder = tmp_path_factory.mktemp("models") / "base: 1"
    text = folder.with_name("text.jsonl")
    text.write_text(json.dumps({"text": SENTENCE}) + "\n")
    train_bpe([text], 300, folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    config = {"model_type": "llama", **sizes, "vocab_size": 320, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("goal", GOALS)
def test_a_goal_and_a_kind_of_data_give_a_recipe_that_passes_or_are_refused_with_the_goals_that_fit(
    goal, kind, base, tmp_path
):
    data, out = write(tmp_path / "my data: #1", kind), tmp_path / "mine.yaml"
    if FORMS[kind] not in GOALS[goal]:
        with pytest.raises(ConfigError, match="--goal") as caught:
            suggest(data, str(base), goal, out)
        assert FORMS[kind].replace("_", " ") in str(caught.value)
        assert sorted(tmp_path.iterdir()) == [data]
        return
    suggest(data, str(base), goal, out, ranks=3)
    recipe = load_recipe(out)
    assert recipe.form == FORMS[kind]
    assert list(recipe.data.sources.values()) == [str(data)]
    assert recipe.data.text_key == ("Body of it: #1" if kind == "own key" else "text")
    assert int(recipe.training.batch_size) % 3 == 0
    assert (recipe.base_model is None) == (goal == "pretrain") and (recipe.lora is None) == (goal != "lora")
    assert recipe.sequence_length is not None and recipe.sequence_length <= 256
    assert recipe.data.chat_template == ("plain" if kind in ("messages", "alpaca", "pairs of turns") else None)


def test_to_pretrain_without_a_base_a_tokenizer_is_trained_that_fits_the_model(tmp_path):
    data = write(tmp_path / "notes", "text")
    suggest(data, None, "pretrain", tmp_path / "mine.yaml")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.data.tokenizer == str(tmp_path / "mine_tokenizer")
    assert (tmp_path / "mine_tokenizer" / "tokenizer.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "mine_tokenizer", "notes"]


def test_sizes_are_those_of_the_files(base, tmp_path):
    data = write(tmp_path / "notes", "text", count=50)
    found = look(data)
    assert (found.num_records, found.num_bytes, found.keys) == (50, (data / "part.jsonl").stat().st_size, ["text"])
    said = suggest(data, str(base), "continue", tmp_path / "mine.yaml")
    assert f"{found.num_bytes:,} bytes of text under `text`, about 50 records" in said
    assert said.splitlines()[0] in (tmp_path / "mine.yaml").read_text()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"goal": "sing"}, "--goal: sing is not one of pretrain, continue"),
        ({"base": None}, "--base: not given, but sft starts from a trained model"),
        ({"base": "nowhere"}, "base_model: nowhere not found"),
        ({"data": "nowhere"}, "nowhere does not exist"),
        ({"data": "empty"}, "empty: no *.jsonl"),
        ({"data": "broken"}, "no record could be read"),
        ({"data": "numbers"}, "no key holds text in all of 1 records; keys are a"),
        ({"data": "turns"}, "turn 2: two turns in a row by the user"),
        ({"out": "old.yaml"}, "old.yaml: already exists and would be overwritten"),
        ({"out": "no/such/mine.yaml"}, "is no folder"),
    ],
)
def test_a_bad_input_is_refused_before_anything_is_written(changes, says, base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "talk", "messages")
    for name, text in (
        ("broken", "{\n"),
        ("numbers", '{"a": 1}\n'),
        ("turns", json.dumps({"messages": [TURNS[0]] * 2})),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.jsonl").write_text(text)
    (tmp_path / "empty").mkdir()
    (tmp_path / "old.yaml").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    given = {"data": "talk", "base": str(base), "goal": "sft", "out": "new.yaml", **changes}
    with pytest.raises(ConfigError) as caught:
        suggest(type(tmp_path)(given["data"]), given["base"], given["goal"], type(tmp_path)(given["out"]))
    assert says in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "old.yaml").read_text() == "mine"


def test_the_turns_of_share_gpt_are_measured_and_need_a_template(tmp_path):
    asked, answer = {"from": "human", "value": SENTENCE}, {"from": "gpt", "value": SENTENCE * 2}
    pair = {"conversations": [asked], "chosen": answer, "rejected": {"from": "gpt", "value": "No."}}
    for form, line in (("instructions", {"conversations": [asked, answer]}), ("preference_pairs", pair)):
        (tmp_path / f"{form}.jsonl").write_text(json.dumps(line) + "\n")
        found = look(tmp_path / f"{form}.jsonl")
        assert (found.form, found.has_turns, found.texts) == (form, True, ["\n".join([SENTENCE, SENTENCE * 2])])
