"""Folders, patterns and paths: which files a source is made of, against Hugging Face's `datasets`."""

import gzip
import json
import os
import random

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.prepare.preprocess import Options, Settings, preprocess
from igla_mega.prepare.raw.inputs import input_files, training_files

WORDS = ["train", "training", "test", "testing", "eval", "evaluation", "dev", "val", "valid", "validation", "heldout"]
WORDS += ["web", "tests", "trained", "latest", "devil", "Test", "data"]
SHARD = "-00000-of-00001.jsonl"


def tree(root, names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"text": "' + name + '"}\n')
    return root


def taken(*inputs):
    """Return the names of the files, and the lines said."""
    said: list[str] = []
    return [file.name for file in input_files(inputs, said.append)], said


@pytest.mark.parametrize(
    ("names", "expected", "left"),
    [
        (["train-0.jsonl", "test-0.jsonl", "validation-0.jsonl"], ["train-0.jsonl"], {"test", "validation"}),
        ([f"data/train{SHARD}", f"data/test{SHARD}"], [f"data/train{SHARD}"], {"test"}),
        ([f"data/train{SHARD}", f"data/extra{SHARD}"], [f"data/train{SHARD}"], {"extra"}),
        (["train/a.jsonl", "test/train.jsonl", "b.jsonl"], ["train/a.jsonl"], {"test", ""}),
        (["en/train.jsonl", "fr/train.jsonl", "fr/dev.jsonl"], ["en/train.jsonl", "fr/train.jsonl"], {"validation"}),
        (["a.jsonl", "testament.jsonl", "latest.jsonl"], ["a.jsonl", "testament.jsonl", "latest.jsonl"], set()),
        (["a.jsonl", "my_test.jsonl", "b/eval/c.jsonl"], ["a.jsonl"], {"test"}),
        ([f"data/en{SHARD}", f"data/de{SHARD}"], None, set()),
        (["train_sft/a.jsonl", "test_sft/a.jsonl"], ["train_sft/a.jsonl"], {"test"}),
        (["test.jsonl", "val.jsonl"], [], {"test", "validation"}),
    ],
)  # fmt: skip
def test_of_splits_training_text_is_taken(names, expected, left):
    assert training_files(names)[0] == (names if expected is None else expected)
    assert set(training_files(names)[1]) == left


def test_splits_are_those_that_datasets_finds(tmp_path):
    data_files = pytest.importorskip("datasets.data_files")
    draw = random.Random(0)
    seen = {"split": 0, "none": 0}
    for number in range(60):
        root, names = tmp_path / str(number), set()
        for _ in range(draw.randint(1, 5)):
            parts = [draw.choice(WORDS) + draw.choice(["", "-", "_", "1", ".", " x"]) for _ in range(3)]
            folders = parts[: draw.choice([0, 0, 1, 2])]
            names.add("/".join([*folders, draw.choice(["", "my_", "a"]) + parts[2] + ".jsonl"]))
        tree(root, names)
        theirs = data_files.DataFilesDict.from_patterns(data_files.get_data_patterns(str(root)), base_path=str(root))
        relative = {split: {os.path.relpath(file, root) for file in files} for split, files in theirs.items()}
        try:
            ours = {os.path.relpath(file, root) for file in input_files([root])}
        except ConfigError as error:
            assert "named as a test or validation split" in str(error)
            ours = set()
        if "train" in relative:
            assert ours == relative["train"], sorted(names)
            seen["split"] += len(relative) > 1
        else:
            # They have no training text then; ours is what has the name of no split.
            assert not ours & set().union(*relative.values()), sorted(names)
            seen["none"] += 1
    assert min(seen.values()) > 5, "the draw meets both cases"


def test_a_folder_says_what_it_takes_and_what_not(tmp_path):
    root = tree(tmp_path / "web", ["train-0.jsonl", "train-1.jsonl", "test-0.jsonl", "README.md", "a.csv", "b.csv"])
    tree(root, [".git/x.jsonl", ".cache/y.jsonl", "__pycache__/z.jsonl", ".hidden.jsonl", "dataset_infos.json"])
    names, (line,) = taken(root)
    assert names == ["train-0.jsonl", "train-1.jsonl"]
    assert line == (
        f"{root}: 2 files (train-0.jsonl, train-1.jsonl); left out: 1 of split test (test-0.jsonl), 4 hidden (.cache, "
        ".git, .hidden.jsonl and 1 more), files of other kinds (2 .csv, 1 .md), metadata (dataset_infos.json)"
    )


def test_a_file_given_by_its_path_or_a_pattern_is_always_taken(tmp_path):
    root = tree(tmp_path / "web", ["train.jsonl", "test.jsonl", ".hidden/a.jsonl"])
    assert taken(root, root / "test.jsonl")[0] == ["train.jsonl", "test.jsonl"]
    assert taken(root / ".hidden")[0] == ["a.jsonl"], "its name inside the given folder decides"
    names, (line,) = taken(root / "*.jsonl")
    assert names == ["test.jsonl", "train.jsonl"]
    assert "2 files, of which 1 are named as a test or validation split and are trained on" in line


def test_a_folder_of_test_splits_alone_is_refused(tmp_path):
    tree(tmp_path, ["test.jsonl", "dev/a.jsonl"])
    with pytest.raises(ConfigError, match="every file in this folder is named as a test or validation split"):
        input_files([tmp_path])


def test_each_file_is_read_once_however_it_is_named(tmp_path):
    root = tree(tmp_path / "web", ["a.jsonl", "b.jsonl", "deep/c.jsonl"])
    (root / "link.jsonl").symlink_to("a.jsonl")
    os.link(root / "b.jsonl", root / "hard.jsonl")
    (root / "again").symlink_to("deep")
    (root / "deep" / "up").symlink_to("..")
    names, said = taken(root, root / "*.jsonl", root / "a.jsonl", root / ".." / "web" / "b.jsonl")
    assert sorted(names) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert said[-1].startswith("given more than once and read once: ")


def test_a_link_to_a_folder_is_followed_and_one_to_nothing_is_refused(tmp_path):
    tree(tmp_path / "far", ["a.jsonl"])
    root = tree(tmp_path / "web", ["b.jsonl"])
    (root / "linked").symlink_to(tmp_path / "far")
    assert taken(root)[0] == ["b.jsonl", "a.jsonl"]
    (root / "gone.jsonl").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"gone\.jsonl: a link that leads to no file"):
        input_files([root])


def test_the_cache_of_the_hub_with_its_links_is_read_once(tmp_path):
    blobs = tree(tmp_path / "blobs", ["0f", "1e"])
    snapshot = tmp_path / "snapshots" / "abc" / "data"
    snapshot.mkdir(parents=True)
    for name, blob in (("train-00000-of-00001.jsonl", "0f"), ("test-00000-of-00001.jsonl", "1e")):
        (snapshot / name).symlink_to(blobs / blob)
    assert taken(snapshot.parent)[0] == ["train-00000-of-00001.jsonl"]


def documents(inputs, tmp_path, tokenizer, **options):
    settings = Settings(progress=False)
    return preprocess(inputs, tmp_path / "set", tokenizer, options=Options(**options), settings=settings).documents


def test_a_saved_dataset_is_read_and_of_several_splits_train(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": [f"row {i}" for i in range(50)], "n": list(range(50))})
    rows.save_to_disk(str(tmp_path / "one"), num_shards=3)
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"rows of a map")
    names, (line,) = taken(tmp_path / "one")
    assert names == [f"data-0000{i}-of-00003.arrow" for i in range(3)]
    assert "1 outside a saved dataset" in line and "dataset_info.json, state.json" in line
    assert documents([tmp_path / "one"], tmp_path, tokenizer) == 50

    splits = datasets.DatasetDict({"train": rows.select(range(7)), "test": rows.select(range(9))})
    splits.save_to_disk(str(tmp_path / "several"))
    names, (line,) = taken(tmp_path / "several")
    assert "1 of split test (test/data-00000-of-00001.arrow)" in line and "dataset_dict.json" in line
    assert documents([tmp_path / "several"], tmp_path, tokenizer) == 7
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(ConfigError, match=r"data-00001-of-00003\.arrow: missing, but state\.json lists it"):
        input_files([tmp_path / "one"])


def test_the_files_of_a_saved_dataset_are_in_its_order_and_stay_in_its_folder(tmp_path):
    tree(tmp_path / "one", ["a.arrow", "b.arrow"])
    state = {"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]}
    (tmp_path / "one" / "state.json").write_text(json.dumps(state))
    assert taken(tmp_path / "one")[0] == ["b.arrow", "a.arrow"]
    for change in ({"_data_files": [{"filename": "../x.arrow"}]}, {"_indices_data_files": [{"filename": "i.arrow"}]}):
        (tmp_path / "one" / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(ConfigError, match=r"not in its folder|flatten_indices"):
            input_files([tmp_path / "one"])
    (tmp_path / "one" / "state.json").write_text('["of another program"]')
    assert taken(tmp_path / "one")[0] == ["a.arrow", "b.arrow"]


def test_a_file_without_any_text_is_refused_where_broken_lines_are_skipped(tmp_path, tokenizer):
    good = tree(tmp_path / "in", ["a.jsonl"]) / "a.jsonl"
    packed = tmp_path / "in" / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"body": "x"}\n' * 20))
    for files in ([packed, good], [good, packed]):
        for on_error in ("skip", "quarantine"):
            with pytest.raises(
                ConfigError, match=r"b\.jsonl\.gz: no text in any of its records \(20 broken; the first"
            ):
                documents(files, tmp_path, tokenizer, on_error=on_error)
    with pytest.raises(ConfigError, match="if the text has another key"):
        documents([packed], tmp_path, tokenizer)
    packed.write_bytes(gzip.compress(b'{"body": "x"}\n' * 20 + b'{"text": "y"}\n'))
    assert documents([good, packed], tmp_path, tokenizer, on_error="skip") == 2
    packed.write_bytes(gzip.compress(b"\n\n"))
    assert documents([good, packed], tmp_path, tokenizer, on_error="skip") == 1, "a blank file has nothing to lose"


def test_a_link_to_itself_is_refused_and_a_pattern_says_what_is_no_file(tmp_path):
    root = tree(tmp_path / "web", ["a.jsonl", "deep/b.jsonl"])
    assert taken(root / "*") == (["a.jsonl"], [f"{root / '*'}: left out, since they are no files: deep"])
    assert taken(root / "**" / "*.jsonl") == (["a.jsonl", "b.jsonl"], [])
    for link, target in (("loop.jsonl", "loop.jsonl"), ("gone.jsonl", "nowhere")):
        (root / link).symlink_to(target)
        for given in (root, root / "*.jsonl"):
            with pytest.raises(ConfigError, match=rf"{link}: a link that leads to no file"):
                input_files([given])
        (root / link).unlink()
