import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def wheelhouse(*arguments) -> str:
    """What it says when it ends with 1."""
    alone = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    done = subprocess.run(
        [sys.executable, "tools/wheelhouse.py", *map(str, arguments)],
        cwd=ROOT,
        env={**{name: value for name, value in os.environ.items() if not name.startswith("PIP_")}, **alone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_without_an_index_it_says_what_was_not_fetched_and_what_it_needs(tmp_path):
    said = wheelhouse("--out", tmp_path)
    assert "pip did not fetch" in said and "megatron-core" in said and "It needs an index" in said


def test_a_list_of_packages_that_is_not_there_is_named(tmp_path):
    assert f"--have {tmp_path / 'freeze.txt'} cannot be read" in wheelhouse("--have", tmp_path / "freeze.txt")
