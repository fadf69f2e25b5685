"""No call that runs what a file says: ruff's rules (S, in pyproject.toml), and here what ruff has no rule for."""

import ast
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for folder in ("igla_mega", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES = {
    "pickle": {"igla_mega/checkpoint/pieces.py"},  # its Unpickler, held to DCP's own records
    "zipfile": {"igla_mega/train/dpo_reference.py", "tools/wheelhouse.py"},  # an exception's name; wheels' metadata
    **{name: set() for name in ("cloudpickle", "dill", "joblib", "marshal", "shelve", "tarfile", "xmlrpc")},
}
"""What can run or unpack what a file says, and the files that may import it."""
ONLY_IN = {
    "torch.load": set(),
    "torch.hub.load": set(),
    "dcp.load": {"igla_mega/checkpoint/pieces.py", "tools/bench/save.py"},  # of a reader that refuses pickled objects
    "FileSystemReader": set(),
    "jinja2.Environment": set(),
    "jinja2.Template": set(),
    "shutil.unpack_archive": set(),
    "yaml.load": set(),
    "yaml.load_all": set(),
    "yaml.safe_load": set(),  # expands aliases without bound; config/yaml_text.py does not
    "json.load": set(),
    "json.loads": {  # RecursionError is no ValueError; config/json_text.py makes it one
        "igla_mega/config/json_text.py",
        "igla_mega/prepare/records.py",
        "igla_mega/checkpoint/safetensors.py",
        "igla_mega/report",
        "tools",
    },
}
"""Calls, and the files or folders that may have them."""
MUST_SAY = {
    "from_pretrained": ("trust_remote_code", False),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
MUST_NOT_SAY = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False}


def breaches(source: str, name: str) -> Iterator[str]:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        place = f"{name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{place}: imports {m}" for m in named if name not in MODULES.get(m.split(".")[0], {name}))
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node.func)
        said = {word.arg: getattr(word.value, "value", word.value) for word in node.keywords}
        spread = any(word.arg is None for word in node.keywords)
        if not any(name == place_ or name.startswith(f"{place_}/") for place_ in ONLY_IN.get(call, {name})):
            yield f"{place}: {call}"
        for end, (key, value) in MUST_SAY.items():
            if (call == end or call.endswith(f".{end}")) and not spread and said.get(key, "missing") is not value:
                yield f"{place}: {call} without {key}={value}"
        yield from (f"{place}: {key}={value}" for key, value in MUST_NOT_SAY.items() if said.get(key) is value)


def test_nothing_here_runs_what_a_file_says():
    found = [b for path in SOURCES for b in breaches(path.read_text(), path.relative_to(ROOT).as_posix())]
    found = [b for b in found if not (b.startswith("tools/") and "from_pretrained" in b)]  # of models made there
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from dill import loads",
        "import tarfile",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "dcp.load(state)",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "json.loads(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(words, shell=True)",
        "jinja2.Environment().from_string(text)",
        "read(path, weights_only=False)",
    ],
)
def test_the_scan_finds(line):
    assert list(breaches(line, "igla_mega/new.py"))


def test_ruff_finds_what_it_has_rules_for():
    source = (
        "import pickle, subprocess, tarfile, torch, yaml\n"
        "pickle.loads(b'')\nexec('')\neval('')\nsubprocess.run('x', shell=True)\ntarfile.open('x').extractall()\n"
        "yaml.load('x', Loader=yaml.Loader)\ntorch.load('x')\nopen('/tmp/x')\n"
    )
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "--stdin-filename=igla_mega/new.py"]
    done = subprocess.run([*command, "-"], input=source, capture_output=True, text=True, cwd=ROOT, check=False)
    for rule in ("S301", "S102", "S307", "S602", "S202", "S506", "S108"):
        assert f" {rule} " in done.stdout


def test_every_dependency_is_listed_with_its_reason_and_pinned_for_ci():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *itertools.chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.split(r"[\[<>=!~; ]", one)[0].lower() for one in asked}
    told = (ROOT / "docs" / "dependencies.md").read_text()
    rows = [line.split("|")[1:3] for line in told.splitlines() if line.startswith("| ") and "**" not in line]
    listed = {
        n.strip(): v.strip() for name, version in rows for n, v in zip(name.split(","), version.split(","), strict=True)
    }
    assert names <= listed.keys()
    pins = dict(re.findall(r"^([\w.-]+)==([^; ]+)", (ROOT / "constraints-ci.txt").read_text(), re.MULTILINE))
    pins |= dict(re.findall(r"^(torch)==([\d.]+)", (ROOT / "constraints-cpu.txt").read_text(), re.MULTILINE))
    assert {name: listed[name] for name in names if name in pins} == {
        name: pins[name] for name in names if name in pins
    }
    assert {name for name in names if name not in pins} == {name for name in names if listed[name] == "not here"}
