import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "igla_mega"
LAYERS = {
    "config": 0, "recipes": 0, "_helpers": 0, "plan": 1, "ops": 1, "parallel": 2, "host": 2, "model": 3, "data": 3,
    "checkpoint": 4, "objective": 4, "train": 5, "report": 5, "assemble": 6, "launch": 6, "generate": 6,
    "cluster": 1, "doctor": 6, "nodes": 6, "evaluate": 7, "run": 7, "cli": 8, "__main__": 9,
}  # fmt: skip
SOURCES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")
}
MAY_IMPORT_TORCH = {"data/batches", "data/dali"}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that the file imports anywhere in it; `from a import b` counts as `a.b`."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return names | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def test_imports_point_down_and_never_sideways():
    wrong = []
    for name, tree in SOURCES.items():
        part = name.split("/")[0]
        for target in {i.split(".")[1] for i in imports(tree) if i.startswith("igla_mega.")} - {part}:
            if part == "ops" or LAYERS[target] >= LAYERS.get(part, 0):
                wrong.append(f"igla_mega/{name}.py imports igla_mega.{target}")
    assert not wrong


def test_torch_is_imported_from_layer_two_up_and_in_ops():
    torchless = {
        name: tree
        for name, tree in SOURCES.items()
        if name.split("/")[0] in ("config", "recipes", "plan", "data", "cli")
    }
    assert {
        n for n, tree in torchless.items() if any(i.split(".")[0] == "torch" for i in imports(tree))
    } <= MAY_IMPORT_TORCH


@pytest.mark.parametrize(
    "module", ["cli", "config.load", "config.rules", "plan.layout", "data.preprocess", "checkpoint.integrity"]
)
def test_what_must_start_fast_imports_no_torch(module):
    subprocess.run(
        [sys.executable, "-c", f"import sys, igla_mega.{module}; sys.exit('torch' in sys.modules)"],
        check=True,
        cwd=PACKAGE.parent,
    )


def test_only_megatron_core_is_imported_and_its_global_groups_in_one_file():
    used = {(name, i) for name, tree in SOURCES.items() for i in imports(tree) if i.split(".")[0] == "megatron"}
    assert {(name, i) for name, i in used if not i.startswith("megatron.core")} == set()
    assert {name for name, i in used if "parallel_state" in i.split(".") or i == "megatron.core.mpu"} <= {"parallel"}
