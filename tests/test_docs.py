"""What the documents say must be so: commands, keys, words of errors, and links, which the site's build follows."""

import ast
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from igla_mega import cli
from igla_mega.config.schema import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
GAP = "…"


def fenced(text: str, *languages: str) -> list[str]:
    """Blocks of code in any of these languages."""
    return [
        block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if language in languages
    ]


def commands(text: str) -> list[list[str]]:
    """What a page says of `igla-mega` and its verbs: lines of shell blocks, and code within a sentence."""
    lines = [line for block in fenced(text, "bash", "sh") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines += [" ".join(code.split()) for code in re.findall(r"`(igla-mega [^`]+)`", prose)]
    found = [re.search(r"(?:^|[\s/])igla-mega (.*)", line.split(" # ")[0]) for line in lines]
    return [shlex.split(match[1], posix=True) for match in found if match]


def keys(section) -> dict:
    """The keys of a section, each with those below it."""
    found = {}
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        found[name] = {} if inner is None or inner is Recipe else keys(inner)
    return found


def _section(annotation):
    if isinstance(annotation, type) and hasattr(annotation, "model_fields"):
        return annotation
    return next((found for inner in getattr(annotation, "__args__", ()) if (found := _section(inner))), None)


KEYS = keys(Recipe)


def words_of_the_code() -> list[str]:
    """Every text in the package, with a gap where something is filled in."""
    texts = []
    for path in (ROOT / "igla_mega").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else GAP for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return [" ".join(text.split()) for text in texts]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_has_a_verb_and_options_that_exist(page):
    group = typer.main.get_command(cli.app)
    for words in commands(PAGES[page]):
        verb = group.commands.get(words[0])
        if words[0].startswith("-"):
            continue  # `--help`, or a name given to another command
        assert verb is not None, f"{page}: igla-mega {' '.join(words)}"
        options = {option for parameter in verb.params for option in parameter.opts} | {"--help"}
        for word in words[1:]:
            if word.startswith("--"):
                assert word.split("=")[0] in options, f"{page}: igla-mega {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_every_key_that_a_page_names_exists(page):
    sections = "|".join(name for name, below in KEYS.items() if below)
    named = re.findall(rf"(?<![\w./])(?:stages\.\d+\.)?((?:{sections})(?:\.\w+)+)(?![\w/(])", PAGES[page])
    for name in named:
        if name.endswith((".py", ".md", ".yaml", ".html", ".json", ".jsonl")):
            continue
        below = KEYS
        for part in name.split("."):
            if part.isdigit():
                continue
            assert part in below, f"{page}: {name} is no key"
            below = below[part]


@pytest.mark.parametrize("page", PAGES)
def test_every_recipe_in_a_page_has_keys_that_exist(page):
    for block in fenced(PAGES[page], "yaml"):
        content = yaml.safe_load(block)
        if not isinstance(content, dict) or not set(content) & set(KEYS):
            continue
        assert set(content) <= set(KEYS), f"{page}: {sorted(set(content) - set(KEYS))}"
        for name, section in content.items():
            if KEYS[name] and isinstance(section, dict):
                assert set(section) <= set(KEYS[name]), f"{page}: {name} {sorted(set(section) - set(KEYS[name]))}"


def test_the_words_of_every_error_are_the_code_s_own():
    texts = words_of_the_code()
    quoted = [line for name, page in PAGES.items() if name.startswith("failures") for block in fenced(page, "text")
              for line in block.splitlines() if line.strip()]  # fmt: skip
    assert len(quoted) > 30
    missing = []
    for line in quoted:
        pattern = re.compile(".*".join(map(re.escape, re.split(f" ?{GAP} ?", " ".join(line.split())))))
        if not any(pattern.search(text) for text in texts):
            missing.append(line)
    assert not missing, "\n".join(missing)


def test_the_files_that_the_pages_name_are_there():
    for name, page in PAGES.items():
        for path in re.findall(r"`((?:tools|tests|examples|igla_mega|csrc|docker)/[\w./]+\w)`", page):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_the_files_on_the_roads_of_inside_md_are_there():
    named = set(re.findall(r"`((?!tests/)(?:\w+/)?\w+\.py)`", PAGES["inside.md"]))
    assert len(named) > 30
    for path in named:
        assert (ROOT / "igla_mega" / path).is_file(), path


def test_targets_of_make_that_the_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for name, page in PAGES.items():
        assert set(re.findall(r"(?:^|`)make ([a-z-]+)", page, re.M)) <= targets, name


def test_every_recipe_has_its_section_and_every_key_its_line():
    from igla_mega.config.load import packaged

    assert re.findall(r"^## (\w+)$", PAGES["recipes.md"], re.M) == list(packaged())
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "tools" / "docs_hooks.py")
    assert spec is not None and spec.loader is not None
    pytest.importorskip("mkdocs")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    page = hooks.page()

    def look(below: dict, place: str) -> None:
        for name, inner in below.items():
            assert f"| `{name}` |" in page or f"## {name}" in page, f"{place}{name}"
            look(inner, f"{place}{name}.")

    look(KEYS, "")


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list(tmp_path.glob("*.html"))
    assert {"index.html", "keys.html", "failures.html"} <= {page.name for page in pages}
    for page in pages:
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]+(?:src|href)="?(https?:[^" >]+)', page.read_text())
        assert not fetched, f"{page.name}: {fetched}"
