import re
import tomllib
from pathlib import Path

import typer
import yaml

from igla_mega import cli
from igla_mega.config import load, rules

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_citation_and_the_changelog_are_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert (citation["version"], citation["license"]) == (version, "Apache-2.0")
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_its_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test"} <= set(re.findall(r"^make ([a-z-]+)", README, re.M)) <= targets
    assert "make lint test" in (ROOT / ".ci" / "run").read_text()


def test_its_verbs_exist():
    named = set(re.findall(r"igla-mega ([a-z]+)\b", README))
    verbs = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert named <= verbs


def test_its_table_has_a_command_that_trains_each_recipe_unless_it_is_refused():
    rows = re.findall(r"^\| \d \| `(\w+)` \|.*\| (.+?) \|$", README, re.M)
    assert [name for name, _ in rows] == list(load.packaged())
    train = typer.main.get_command(cli.app).commands["train"]  # type: ignore[attr-defined]
    options = {option for parameter in train.params for option in parameter.opts}
    for name, cell in rows:
        assert cell.startswith("refused") == bool(rules.not_yet(load.load_recipe(name)))
        if not cell.startswith("refused"):
            assert cell.startswith(f"`igla-mega train {name} "), cell
            assert set(re.findall(r"--[a-z-]+", cell)) <= options, cell


def test_it_is_short_enough_to_be_read_in_one_sitting():
    assert len(README.split()) <= 1200


def test_its_tree_has_every_folder_and_no_other():
    tree = README.split("## The map\n\n```\n")[1].split("```")[0].splitlines()
    package = {line.split()[0] for line in tree if line.startswith("  ")}
    found = {f"{path.name}/" for path in (ROOT / "igla_mega").iterdir() if any(path.glob("[a-z]*.*"))}
    assert package == {"cli.py", "run.py"} | found - {"__pycache__/"}
    for line in tree:
        if not line.startswith(" "):
            assert (ROOT / line.split()[0]).is_dir(), line


def test_the_files_of_its_picture_are_there():
    picture = README.split("```mermaid\n")[1].split("```")[0]
    named = re.findall(r"[a-z]+/\w+\.py", picture)
    assert len(named) >= 10
    for path in named:
        assert (ROOT / "igla_mega" / path).is_file(), path


def test_the_files_it_names_are_there():
    for path in re.findall(r"(?<![\w/])(?:tools|examples|docs|igla_mega|csrc|tests|docker|bench)/[\w./]+[\w/]", README):
        assert (ROOT / path).exists(), path
