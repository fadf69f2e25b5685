import re
from pathlib import Path

from igla_mega import cli
from igla_mega.config import load, rules

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_its_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", README, re.M)) <= targets
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()


def test_its_verbs_exist():
    named = set(re.findall(r"igla-mega ([a-z]+)\b", README))
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert named <= verbs


def test_its_table_says_truly_which_recipes_train():
    rows = re.findall(r"^\| \d \| `(\w+)` \|.*\| (.+?) \|$", README, re.M)
    assert [name for name, _ in rows] == list(load.packaged())
    for name, says in rows:
        assert says.startswith("refused") == bool(rules.not_yet(load.load_recipe(name)))


def test_the_files_it_names_are_there():
    for path in re.findall(r"(?:tools|examples|docs|igla_mega)/[\w./]+[\w/]", README):
        assert (ROOT / path).exists(), path
