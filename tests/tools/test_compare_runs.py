import importlib.util
import json
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "compare_runs", Path(__file__).resolve().parents[2] / "tools" / "compare_runs.py"
)
compare_runs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(compare_runs)


@pytest.fixture
def write_run(tmp_path):
    def write(name, losses, first=1, tail=""):
        folder = tmp_path / name
        folder.mkdir()
        lines = [
            json.dumps({"step": step, "loss": loss, "grad_norm": 2 * loss}) for step, loss in enumerate(losses, first)
        ]
        (folder / "metrics.jsonl").write_text("\n".join([*lines, tail]))
        return str(folder)

    return write


def test_equal_runs_are_equal_bit_for_bit_also_with_a_half_written_line(write_run, capsys):
    a = write_run("a", [4.1, 3.2, 0.1 + 0.2], tail='{"step": 4, "lo')
    b = write_run("b", [4.1, 3.2, 0.1 + 0.2, 1.0])
    assert compare_runs.main([a, b]) == 0
    said = capsys.readouterr().out
    assert "3 common steps, 1 to 3" in said and said.count("equal bit for bit") == 2


def test_the_last_bit_counts_and_the_largest_difference_is_named(write_run, capsys):
    a, b = write_run("a", [4.0, 3.0, 0.3]), write_run("b", [4.0, 3.5, 0.1 + 0.2])
    assert compare_runs.main([a, b]) == 1
    assert "differs at 2 steps, first at 2, most by 0.5 at step 2 (3.0 and 3.5)" in capsys.readouterr().out
    assert compare_runs.main([a, b, "--from", "3"]) == 1
    assert "differs at 1 steps, first at 3, most by 5.55e-17" in capsys.readouterr().out


def test_steps_before_from_do_not_count(write_run):
    a, b = write_run("a", [4.0, 3.0]), write_run("b", [5.0, 3.0])
    assert (compare_runs.main([a, b]), compare_runs.main([a, b, "--from", "2"])) == (1, 0)


def test_runs_without_common_steps_or_files_are_not_equal(write_run, tmp_path, capsys):
    a, b = write_run("a", [4.0]), write_run("b", [4.0], first=9)
    assert compare_runs.main([a, b]) == 1
    assert "no step in common" in capsys.readouterr().out
    assert compare_runs.main([a, str(tmp_path / "absent")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def test_a_loss_that_is_in_one_run_only_is_a_difference():
    lines, equal = compare_runs.compare({1: {"loss": 1.0}}, {1: {"loss": 1.0, "grad_norm": 2.0}})
    assert not equal and "grad_norm: differs" in lines[2]
