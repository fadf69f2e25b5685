import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
_SPEC = importlib.util.spec_from_file_location("gpu_check", ROOT / "tools" / "gpu_check.py")
gpu_check = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(gpu_check)


def test_a_failing_part_hides_no_other():
    def runner(name: str, limit: float) -> dict:
        return {"seconds": 1.0, "ok": name != "tests", "reason": "ended with 1" if name == "tests" else ""}

    results = gpu_check.run_parts(["build", "tests", "ring"], runner)
    assert [line.split()[:2] for line in gpu_check.summary(results)] == [
        ["build", "passed"],
        ["tests", "FAILED"],
        ["ring", "passed"],
    ]


def test_a_part_that_dies_or_hangs_is_a_result_too(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check.sys, "executable", "/bin/false")
    assert gpu_check.run_part("ring", 5.0)["reason"] == "ended with 1"
    hangs = tmp_path / "hangs"
    hangs.write_text("#!/bin/sh\nexec sleep 30\n")
    hangs.chmod(0o755)
    monkeypatch.setattr(gpu_check.sys, "executable", str(hangs))
    assert gpu_check.run_part("ring", 0.5)["reason"] == "killed after 0 s, its limit"


def test_what_has_no_time_left_is_not_begun(monkeypatch):
    monkeypatch.setattr(gpu_check, "TOTAL_SECONDS", 0)
    results = gpu_check.run_parts(["build"], lambda name, limit: pytest.fail("begun"))
    assert results["build"]["reason"] == "no time was left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_ends_with_2():
    done = subprocess.run([sys.executable, "tools/gpu_check.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("torch sees none on this machine.")


def test_an_unknown_part_is_refused_with_the_known_ones():
    done = subprocess.run(
        [sys.executable, "tools/gpu_check.py", "tets"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "no such part: tets; the parts are build, tests, calibration" in done.stderr
