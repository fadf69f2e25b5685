#!/usr/bin/env python
"""Compare the losses and gradient norms of two runs step by step; exit with 0 if they are equal bit for bit, else 1."""

import argparse
import json
import math
import sys
from pathlib import Path

KEYS = ("loss", "grad_norm")


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison of two runs; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_a", type=Path, help="run folder, or its metrics.jsonl")
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--from", dest="first", type=int, default=0, metavar="N", help="compare only steps from N on")
    args = parser.parse_args(arguments)
    try:
        a, b = (read(run, args.first) for run in (args.run_a, args.run_b))
    except OSError as error:
        print(f"{error.filename}: cannot be read ({error.strerror}). Give two run folders.", file=sys.stderr)
        return 1
    lines, equal = compare(a, b)
    print("\n".join(lines))
    return 0 if equal else 1


def read(run: Path, first: int = 0) -> dict[int, dict[str, float]]:
    """Return the training steps from `first` on, by number; of a step written twice the later one counts."""
    path = run / "metrics.jsonl" if run.is_dir() else run
    steps = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a line that is still being written
            continue
        if isinstance(entry, dict) and "loss" in entry and entry["step"] >= first:
            steps[entry["step"]] = {key: entry[key] for key in KEYS if entry.get(key) is not None}
    return steps


def compare(a: dict[int, dict[str, float]], b: dict[int, dict[str, float]]) -> tuple[list[str], bool]:
    """Describe the differences over the common steps, in lines of text; the second value is True if there are none."""
    common = sorted(a.keys() & b.keys())
    if not common:
        return ["The runs have no step in common."], False
    lines, equal = [f"{len(common)} common steps, {common[0]} to {common[-1]}"], True
    for key in KEYS:
        pairs = [(step, a[step].get(key), b[step].get(key)) for step in common]
        if all(x is None and y is None for _, x, y in pairs):
            lines.append(f"{key}: in neither run")
            continue
        unequal = [(step, x, y) for step, x, y in pairs if not _same(x, y)]
        if not unequal:
            lines.append(f"{key}: equal bit for bit")
            continue
        equal = False
        step, x, y = max(unequal, key=_difference)
        lines.append(
            f"{key}: differs at {len(unequal)} steps, first at {unequal[0][0]}, "
            f"most by {_difference((step, x, y)):.3g} at step {step} ({x!r} and {y!r})"
        )
    return lines, equal


def _same(x: float | None, y: float | None) -> bool:
    """Return True for equal values; NaN equals NaN."""
    return x == y or (x is not None and y is not None and math.isnan(x) and math.isnan(y))


def _difference(pair: tuple[int, float | None, float | None]) -> float:
    """Return the absolute difference; inf if a value is missing or NaN."""
    _, x, y = pair
    difference = math.inf if x is None or y is None else abs(x - y)
    return math.inf if math.isnan(difference) else difference


if __name__ == "__main__":
    sys.exit(main())
