#!/usr/bin/env python
"""Run recipes for a few steps with two source trees, and compare everything that they write bit for bit.

It proves that a change of structure changes no number: losses and gradient norms of every step, checkpoint
files, prepared data and plans. A git worktree of the earlier commit is the first tree:

    git worktree add ../before HEAD~1 && cp igla_mega/*.so ../before/igla_mega/
    python tools/compare_trees.py ../before . --out /tmp/compared
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import compare_runs

RECIPES = {
    "pretrain_7b": 1,
    "koshey_7b": 2,
    "lora_7b": 1,
    "qlora_7b": 1,
    "dpo_7b": 1,
    "sft_dpo_7b": 1,
    "moe_8x7b": 2,
    "continual_7b": 1,
}
"""Number of ranks at laptop scale, by packaged recipe."""
NOT_DETERMINED = (
    "heartbeat.json",
    "manifest.json",
    "recipe.yaml",
    "progress.json",
    "events.jsonl",
    "journal",
    ".manifest.json",
)
"""Suffixes of files with times, versions or paths, which differ between equal runs."""


def main(arguments: list[str] | None = None) -> int:
    """Record one or two trees, and compare two; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="+", help="source trees: one is only recorded, two are compared")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; finished runs are not repeated")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    args = parser.parse_args(arguments)
    folders = [record(tree.resolve(), args.out.resolve(), args.recipes, args.steps) for tree in args.trees]
    return 0 if len(folders) == 1 or compare(folders[0], folders[1], args.recipes) else 1


def record(tree: Path, out: Path, recipes: list[str], steps: int) -> Path:
    """Run `recipes` with the code of `tree`; return the folder with their results."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True)
    folder = out / f"{tree.name}-{revision.stdout[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    # Every tree runs under the same path: paths are part of recipes, and so of the digests in data and checkpoints.
    stage = out / "current"
    stage.unlink(missing_ok=True)
    stage.symlink_to(folder, target_is_directory=True)
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "IGLA_CACHE": str(stage / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    for name in recipes:
        if (folder / f"{name}.done").exists():
            continue
        words = [sys.executable, "-m", "igla_mega"]
        plan = subprocess.run(
            [*words, "plan", name, "--json"], cwd=stage, env=environment, capture_output=True, text=True
        )
        (folder / f"{name}.plan.json").write_text(plan.stdout or plan.stderr)
        command = [*words, "train", name, "--scale", "laptop", "--run", str(stage / name), "--stop-after", str(steps)]
        command += ["--nproc", str(RECIPES[name])]
        print(f"{tree.name}: {' '.join(command[2:])}", flush=True)
        with open(folder / f"{name}.log", "w") as log:
            code = subprocess.run(command, cwd=stage, env=environment, stdout=log, stderr=log).returncode
        if code:
            raise SystemExit(f"{folder / name}.log: the run ended with code {code}. Read its last lines.")
        (folder / f"{name}.done").touch()
    return folder


def compare(before: Path, after: Path, recipes: list[str]) -> bool:
    """Print the differences of two recorded folders; return True if there are none."""
    equal = True
    for name in recipes:
        lines, same = compare_runs.compare(compare_runs.read(before / name), compare_runs.read(after / name))
        print(f"{name}: {'; '.join(lines)}")
        plans = [json.loads((folder / f"{name}.plan.json").read_text()) for folder in (before, after)]
        same_plan = _numbers(plans[0]) == _numbers(plans[1])
        words = "" if plans[0] == plans[1] else ", their words differ"
        print(f"{name}: the numbers of the plans are {'equal' if same_plan else 'DIFFERENT'}{words}")
        equal = equal and same and same_plan
    digests = [_digests(folder) for folder in (before, after)]
    for path in sorted(digests[0].keys() | digests[1].keys()):
        if digests[0].get(path) != digests[1].get(path):
            print(f"{path}: {'differs' if path in digests[0] and path in digests[1] else 'is in one tree only'}")
            equal = False
    if not digests[0]:
        print("no checkpoint and no data file was written, so nothing was compared")
        return False
    print(f"{len(digests[0])} checkpoint and data files compared: {'all equal' if equal else 'see above'}")
    return equal


def _numbers(plan: object) -> object:
    """Return a plan without its texts, which may be reworded; names and units of keys stay."""
    if isinstance(plan, dict):
        return {key: _numbers(value) for key, value in plan.items() if not isinstance(value, str)}
    if isinstance(plan, list):
        return [_numbers(value) for value in plan if not isinstance(value, str)]
    return plan


def _digests(folder: Path) -> dict[str, str]:
    """Return the digest of every checkpoint tensor file and indexed dataset below `folder`, by relative path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".distcp", ".bin", ".idx") and not path.name.endswith(NOT_DETERMINED):
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


if __name__ == "__main__":
    sys.exit(main())
