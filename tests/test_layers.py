"""The shape of the code: imports point down and in no circle, tests are found by name, and nothing grows too large."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "igla_mega"
LAYERS = {
    "config": 0, "recipes": 0, "_helpers": 0, "os_errors": 0, "layout": 1, "ops": 1, "untrusted": 1, "distributed": 2,
    "data": 3, "monitor": 4, "model": 4, "checkpoint": 5, "objective": 5, "prepare": 5, "plan": 6, "engine": 6,
    "evaluate": 7, "train": 8, "report": 8, "doctor": 8, "run": 9, "guide": 9, "verbs": 9, "cli": 10, "__main__": 11,
}  # fmt: skip
"""A part may import parts of a lower number only."""
CORE = ("config", "layout", "distributed", "ops", "model", "objective", "engine", "train", "checkpoint")
TORCHLESS = ("config", "recipes", "layout", "untrusted", "plan", "data", "monitor", "prepare", "cli")
MAY_IMPORT_TORCH = {"data/batches", "data/dali", "data/micro_batch"}
SOURCES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix(): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")
}

MOST_FILE_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 550, 60, 6
"""Of a file all lines count, as a reader scrolls over them."""
MOST_FOLDER_CODE, MOST_CORE_CODE = 2_700, 12_400
"""Of a folder only code counts, without docstrings, comments and blank lines: words are to be added where they help.
With them these bounds correspond to about 3,500 and 14,000 to 17,500 lines."""
LONG_FILES: dict[str, str] = {
    "cli": "one verb after the other, each the declaration of its options; what verbs do is in other rooms",
}
"""File without ending -> why it may exceed the bound."""
LONG_FUNCTIONS: dict[str, str] = {
    "cli:train": "half of it declares options",
    "ops/ring_attention:ring_attention": "the documented entry of a kernel: half of it is its docstring",
}
"""file:function -> why it may exceed the bound."""
MANY_PARAMETERS: dict[str, str] = {
    "cli:plan": "options of the command line",
    "cli:prepare": "options of the command line",
    "cli:train": "options of the command line",
    "cli:eval_": "options of the command line",
    "cli:generate": "options of the command line",
    "cli:report": "options of the command line",
    "model/spec:CoreAttention.__init__": "megatron-core's signature",
    "ops/block_attention:block_backward": "a kernel: tensors in, tensors out",
    "ops/block_attention:_dense_backward": "a kernel: tensors in, tensors out",
    "ops/linear_cross_entropy:_LinearCrossEntropy.forward": "an autograd function's inputs",
    "ops/linear_cross_entropy:linear_cross_entropy": "a kernel: tensors in, tensors out",
    "ops/ring_attention:ring_attention": "a kernel with flash-attn's options",
    "ops/ring_attention:_ring_backward": "a kernel: tensors in, tensors out",
    "ops/ring_attention:_gathered_backward": "a kernel: tensors in, tensors out",
    "ops/ring_attention:_gradients": "a kernel: tensors in, tensors out",
    "evaluate/scoring:_score_head": "the signature of `model.output.Output` and one of its own",
    "evaluate/scoring:_draw_head": "the signature of `model.output.Output` and one of its own",
    "evaluate/generate:generate": "the options of the verb, as transformers names them",
    "evaluate/generate:sample": "the options of sampling, as transformers names them",
    "checkpoint/adapters:merge": "two models, two sections and where to write; called in one place",
    "checkpoint/frozen_base:attach": "what a frozen base is made of; called in two places",
    "checkpoint/store:CheckpointWriter.__init__": "the folders and limits of a run's checkpoints",
}
"""file:function -> why it may take more."""

TESTED_ELSEWHERE: dict[str, str] = {
    "__main__": "test_cli.py",
    "run": "integration/test_phases.py integration/test_stops.py",
    "verbs": "test_cli.py",
    "config/needed": "config/test_rules.py train/test_evaluation.py",
    "checkpoint/base": "checkpoint/test_adapters.py",
    "checkpoint/folder": "checkpoint/test_store.py",
    "checkpoint/frozen_base": "integration/test_tuning.py integration/test_experts_tuned.py",
    "checkpoint/hf_names": "checkpoint/test_hugging_face.py",
    "checkpoint/integrity": "checkpoint/test_store.py",
    "checkpoint/load": "checkpoint/test_store.py",
    "checkpoint/load_model": "evaluate/test_generate.py",
    "checkpoint/local": "checkpoint/test_store.py",
    "checkpoint/pieces": "checkpoint/test_store.py fuzz/test_model_files.py",
    "checkpoint/progress": "checkpoint/test_store.py",
    "checkpoint/remote": "checkpoint/test_store.py",
    "checkpoint/safetensors": "checkpoint/test_hugging_face.py fuzz/test_model_files.py",
    "config/breaches": "config/test_load.py",
    "config/errors": "config/test_rules.py",
    "config/features": "config/test_schema.py",
    "config/json_text": "fuzz/test_model_files.py",
    "config/merging": "config/test_load.py",
    "config/near": "config/test_rules.py",
    "config/quantities": "config/test_schema.py config/test_ranges.py",
    "config/rules_experts": "config/test_rules.py",
    "config/rules_layout": "config/test_rules.py",
    "config/tiers": "config/test_load.py",
    "config/yaml_text": "config/test_load.py fuzz/test_recipes.py",
    "data/ahead": "data/test_prefetch.py",
    "data/tuning/conversations": "prepare/test_samples.py integration/test_conversations.py",
    "data/dali": "data/test_prefetch.py",
    "data/journal": "prepare/test_resume.py",
    "data/loader": "data/test_prefetch.py",
    "data/prepared": "prepare/test_preprocess.py",
    "data/raw_files": "prepare/test_formats.py",
    "distributed/addresses": "distributed/test_rendezvous.py",
    "distributed/mesh": "integration/test_layouts.py",
    "distributed/torchrun": "integration/test_stops.py",
    "doctor/examine": "doctor/test_node_test.py doctor/test_installed.py",
    "doctor/measure": "doctor/test_node_test.py",
    "engine/build": "plan/test_parameters.py integration/test_layouts.py",
    "engine/ddp": "integration/test_layouts.py",
    "engine/fsdp": "integration/test_layouts.py",
    "engine/heartbeat": "train/test_watchdog.py",
    "engine/optimizer": "objective/test_ewc.py integration/test_layouts.py",
    "engine/step": "integration/test_layouts.py",
    "evaluate/harness": "train/test_evaluation.py",
    "evaluate/needle": "train/test_evaluation.py",
    "evaluate/tasks": "train/test_evaluation.py",
    "layout/hardware": "integration/test_published.py",
    "layout/layout": "plan/test_choose.py",
    "model/expert_tokens": "integration/test_experts_tuned.py",
    "model/experts": "model/test_router.py",
    "model/projections": "model/test_lora.py",
    "objective/language": "integration/test_conversations.py",
    "ops/checks": "ops/test_accumulate.py ops/test_fisher.py",
    "ops/frozen_linear": "model/test_nf4.py",
    "ops/ring_checks": "ops/test_ring_attention.py",
    "ops/ring_schedule": "ops/test_ring_attention.py",
    "plan/answer": "integration/test_plan_verb.py",
    "plan/base_model": "integration/test_plan_verb.py",
    "plan/calibration": "integration/test_published.py",
    "plan/card": "integration/test_plan_verb.py",
    "plan/cost": "integration/test_plan_verb.py",
    "plan/finished": "integration/test_plan_verb.py",
    "plan/forecast": "integration/test_plan_verb.py integration/test_published.py",
    "plan/memory": "plan/test_activations.py",
    "plan/question": "integration/test_plan_verb.py",
    "plan/search": "integration/test_published.py plan/test_choose.py",
    "plan/time": "integration/test_published.py",
    "prepare/bar": "prepare/test_preprocess.py",
    "prepare/check": "test_cli.py",
    "prepare/duplicates": "prepare/test_cleaning.py",
    "prepare/encoding": "prepare/test_preprocess.py",
    "prepare/filters": "prepare/test_cleaning.py",
    "prepare/giant": "prepare/test_formats.py",
    "prepare/manifest": "prepare/test_merge.py prepare/test_resume.py",
    "prepare/records": "prepare/test_formats.py",
    "prepare/sources": "prepare/test_preprocess.py",
    "prepare/state": "prepare/test_resume.py",
    "prepare/toy_tasks": "prepare/test_samples.py",
    "prepare/raw/unpacking": "prepare/test_formats.py",
    "report/scaling": "integration/test_plan_verb.py",
    "train/console": "test_cli.py",
    "train/dpo_reference": "integration/test_tuning.py objective/test_dpo.py",
    "train/ends": "report/test_state.py",
    "train/loop": "integration/test_stops.py train/test_bad_steps.py",
    "train/metrics": "train/test_trackers.py integration/test_experts.py",
    "train/opening": "integration/test_long_context.py test_cli.py",
    "train/parts": "integration/test_phases.py integration/test_tuning.py",
    "train/phases": "integration/test_phases.py",
    "train/resume": "test_cli.py integration/test_phases.py",
    "train/run_folder": "test_cli.py integration/test_stops.py",
    "train/session": "train/test_bad_steps.py",
    "train/state": "integration/test_phases.py",
    "train/step_log": "train/test_bad_steps.py",
    "train/stop_signal": "integration/test_stops.py",
    "train/stragglers": "train/test_watchdog.py",
}
"""Module without a test at the mirrored path -> the file or files that test it."""


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that the file imports anywhere in it, late imports included; `from a import b` counts as `a.b`."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    return names | {f"{node.module}.{alias.name}" for node in froms for alias in node.names}


def modules_imported(tree: ast.AST) -> set[str]:
    """Modules of the package that the file imports, as keys of SOURCES. What only type checkers read is left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    found = set()
    for name in imports(tree):
        parts = name.split(".")[1:] if name.startswith("igla_mega.") else []
        for end in (len(parts), len(parts) - 1):
            if end > 0 and "/".join(parts[:end]) in SOURCES:
                found.add("/".join(parts[:end]))
                break
    return found


def functions(name: str, tree: ast.AST) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Qualified name and node of every function and method of a file."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield f"{name}:{prefix}{child.name}", child
            yield from walk(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    return walk(tree, "")


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of a graph of imports (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            members = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def test_imports_point_down_and_never_sideways():
    wrong = []
    for name, tree in SOURCES.items():
        part = name.split("/")[0]
        for target in {i.split(".")[1] for i in imports(tree) if i.startswith("igla_mega.")} - {part}:
            if part == "ops" or LAYERS[target] >= LAYERS.get(part, 0):
                wrong.append(f"igla_mega/{name}.py imports igla_mega.{target}")
    assert not wrong


def test_no_circle_of_imports_late_ones_included():
    assert circles({name: modules_imported(tree) - {name} for name, tree in SOURCES.items()}) == []


def test_a_circle_would_be_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_plan_is_imported_by_the_face_the_root_and_reports_only():
    """The planner forecasts; what trains takes a layout that was chosen before."""
    users = {n for n, tree in SOURCES.items() if any(i.startswith("igla_mega.plan.") for i in imports(tree))}
    outside = {name for name in users if not name.startswith(("plan/", "report/"))}
    assert outside <= {"cli", "run", "train/parts", "train/resume"}, "the last two name `Resolved` alone"


def test_torch_is_imported_from_layer_two_up_and_in_ops():
    torchless = {name: tree for name, tree in SOURCES.items() if name.split("/")[0] in TORCHLESS}
    users = {n for n, tree in torchless.items() if any(i.split(".")[0] == "torch" for i in imports(tree))}
    assert users <= MAY_IMPORT_TORCH


@pytest.mark.parametrize(
    "module", ["cli", "config.load", "config.rules", "plan.question", "prepare.preprocess", "checkpoint.integrity"]
)
def test_what_must_start_fast_imports_no_torch(module):
    subprocess.run(
        [sys.executable, "-c", f"import sys, igla_mega.{module}; sys.exit('torch' in sys.modules)"],
        check=True,
        cwd=ROOT,
    )


def test_only_megatron_core_is_imported_and_its_global_groups_in_one_file():
    used = {(name, i) for name, tree in SOURCES.items() for i in imports(tree) if i.split(".")[0] == "megatron"}
    assert {(name, i) for name, i in used if not i.startswith("megatron.core")} == set()
    users = {name for name, i in used if "parallel_state" in i.split(".") or i == "megatron.core.mpu"}
    assert users <= {"distributed/mesh"}


def test_every_module_has_a_test_at_the_mirrored_path_or_a_line_that_says_where():
    missing, needless = [], []
    for name in SOURCES:
        folder, _, stem = name.rpartition("/")
        if stem == "__init__":
            continue
        mirrored = (ROOT / "tests" / folder / f"test_{stem}.py").is_file()
        if not mirrored and name not in TESTED_ELSEWHERE:
            missing.append(name)
        if mirrored and name in TESTED_ELSEWHERE:
            needless.append(name)
    assert not missing and not needless
    assert TESTED_ELSEWHERE.keys() <= SOURCES.keys()


@pytest.mark.parametrize("name", TESTED_ELSEWHERE)
def test_a_module_tested_elsewhere_is_named_there(name):
    for place in TESTED_ELSEWHERE[name].split():
        assert (ROOT / "tests" / place).is_file(), place


def code_lines(name: str) -> int:
    """Lines of a file that are neither docstring nor comment nor blank."""
    prose: set[int] = set()
    for node in ast.walk(SOURCES[name]):
        for one in node.body if isinstance(getattr(node, "body", None), list) else ():
            if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
                prose |= set(range(one.lineno, one.end_lineno + 1))
    lines = enumerate((PACKAGE / f"{name}.py").read_text().splitlines(), 1)
    return sum(bool(line.strip()) and line.strip()[0] != "#" and number not in prose for number, line in lines)


def test_files_and_folders_keep_their_bounds():
    lines = {name: len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in SOURCES}
    assert {n: c for n, c in lines.items() if c > MOST_FILE_LINES and n not in LONG_FILES} == {}
    assert LONG_FILES.keys() <= {n for n, c in lines.items() if c > MOST_FILE_LINES}, "no longer needed"
    folders: dict[str, int] = {}
    for name in SOURCES:
        folders[name.rpartition("/")[0]] = folders.get(name.rpartition("/")[0], 0) + code_lines(name)
    assert {n: c for n, c in folders.items() if c > MOST_FOLDER_CODE} == {}
    assert sum(folders[part] for part in CORE) <= MOST_CORE_CODE


def test_functions_keep_their_bounds():
    long, wide = {}, {}
    for name, tree in SOURCES.items():
        for place, node in functions(name, tree):
            if (length := node.end_lineno - node.lineno + 1) > MOST_FUNCTION_LINES:
                long[place] = length
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if (count := len([a for a in given if a.arg not in ("self", "cls", "ctx")])) > MOST_PARAMETERS:
                wide[place] = count
    assert {place: n for place, n in long.items() if place not in LONG_FUNCTIONS} == {}
    assert {place: n for place, n in wide.items() if place not in MANY_PARAMETERS} == {}
    assert LONG_FUNCTIONS.keys() <= long.keys() and MANY_PARAMETERS.keys() <= wide.keys(), "no longer needed"


def test_a_recipe_is_remade_in_few_places():
    """Elsewhere `Section.with_keys` derives it, and `plan.resolve` is where a run's recipe comes from."""
    places = [
        f"{name}:{node.lineno}"
        for name, tree in SOURCES.items()
        if not name.startswith(("config/", "layout/"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("model_copy")
    ]
    assert len(places) <= 12, places
