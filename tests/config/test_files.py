import ast
from pathlib import Path

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow, write_text
from igla_mega.config.load import load_recipe
from igla_mega.data.journal import replace_file
from igla_mega.data.json_lines import Lines, rewind
from igla_mega.train.run_folder import lock_run_folder

PACKAGE = Path(__file__).resolve().parents[2] / "igla_mega"
NEW_FOLDER = {
    "checkpoint/adapters": "below a folder that `appearing` has just made",
    "checkpoint/hugging_face": "below a folder that `appearing` has just made",
    "checkpoint/hf_tokenizer": "below a folder that `appearing` has just made",
    "checkpoint/load": "below a folder that it has just made",
    "checkpoint/remote": "below a folder that it has just made",
    "data/tokenizer": "`train_bpe` writes where its caller asks for",
    "distributed/rendezvous": "exclusive creation",
    "doctor/measure": "exclusive creation of random names",
    "guide/suggest": "exclusive creation, and below a temporary folder",
    "prepare/toy_corpus": "below a temporary folder",
    "prepare/toy_tasks": "below a temporary folder",
    "report/scaling": "the file that the user names",
    "train/watchdog": "NCCL's own dump",
    "checkpoint/pieces": "below a folder that the save has just made",
    "config/files": "the opener itself",
}
"""Files whose writes need no protection, and why."""


def writes(tree: ast.AST) -> list[int]:
    """Lines of calls that open a file for writing and would follow a link."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name == "open" and not any(keyword.arg == "opener" for keyword in node.keywords):
            mode = ast.unparse(node.args[1]) if len(node.args) > 1 else "'r'"
            if set(mode) & set("wax+") and "os.open" not in ast.unparse(node.args[0]):
                found.append(node.lineno)
        if name.endswith((".write_text", ".write_bytes")):
            found.append(node.lineno)
    return found


def test_no_file_of_a_fixed_name_is_opened_through_a_link():
    unprotected = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if name not in NEW_FOLDER and (lines := writes(ast.parse(path.read_text()))):
            unprotected[name] = lines
    assert unprotected == {}


@pytest.fixture
def victim(tmp_path):
    """A file of somebody else, and a function that plants a link to it."""
    file = tmp_path / "victim"
    file.write_text('{"step": 9}\n')
    run = tmp_path / "run"
    run.mkdir()

    def plant(name: str) -> Path:
        (run / name).symlink_to(file)
        return run / name

    yield plant
    assert file.read_text() == '{"step": 9}\n', "the victim's file was written to"


def test_a_planted_lock_is_refused(victim):
    lock = victim(".lock")
    with pytest.raises(ConfigError, match="symbolic link"):
        lock_run_folder(lock.parent, load_recipe("pretrain_7b"))


@pytest.mark.parametrize("name", ["events.jsonl", "heartbeat.json", "wandb_id", "mlflow_id"])
def test_a_link_in_the_place_of_a_file_that_is_written_in_place_is_refused(name, victim):
    run = victim(name).parent
    with pytest.raises(ConfigError, match=rf"{name}: is a symbolic link"):
        lock_run_folder(run, load_recipe("pretrain_7b"))


def test_a_planted_file_of_metrics_is_not_written_to(victim):
    lines = Lines(victim("metrics.jsonl"))
    lines.add({"step": 1})  # kept in memory, as on a full disk
    lines.close()


def test_a_planted_temporary_of_a_rewind_is_refused(victim):
    temporary = victim(".metrics.jsonl")
    metrics = temporary.with_name("metrics.jsonl")
    metrics.write_text('{"step": 1}\n')
    with pytest.raises(OSError, match="symbolic link"):
        rewind(metrics, 0)


def test_a_planted_temporary_of_a_replaced_file_is_refused(victim):
    temporaries = [f"recipe.yaml{end}" for end in (".partial", ".new", ".tmp")] + [".recipe.yaml", "recipe.yaml"]
    for name in temporaries:
        victim(name)
    target = victim("other").parent / "recipe.yaml"
    try:
        replace_file(target, b"name: mine\n")
    except OSError as refused:
        assert "symbolic link" in str(refused)
    else:
        assert not target.is_symlink()


def test_a_text_is_written_and_replaces_what_was_there(tmp_path):
    write_text(tmp_path / "a", "long text")
    write_text(tmp_path / "a", "ü")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "ü"
    with open(tmp_path / "a", opener=no_follow) as stream:
        assert stream.read() == "ü"
