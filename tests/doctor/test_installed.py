import importlib.metadata
import subprocess
import sys

import pytest
import torch

from igla_mega import ops
from igla_mega.doctor import installed


def row(what):
    return next(row for row in installed.rows() if row[0] == what)


def test_every_row_is_three_texts_and_what_is_missing_says_what_is_lost():
    found = installed.rows()
    assert all(len(r) == 3 and all(isinstance(text, str) for text in r) for r in found)
    assert all(lost for _, state, lost in found if state == installed.MISSING)
    assert len({what for what, _, _ in found}) == len(found)


def test_what_is_there_says_what_uses_it():
    assert row("megatron-core")[2] == "everything that trains"
    names = {what for what, *_ in installed.rows()}
    assert {"apex", "transformer-engine", "flash-attn", "nvidia-dali"} <= names
    assert all(row(name)[2] for name in names & {package[0] for package in installed._PACKAGES})


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch sees GPUs")
def test_gpus_of_the_driver_that_torch_does_not_see_make_a_node_unfit(monkeypatch):
    monkeypatch.setattr(installed, "num_local_gpus", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "the driver shows 3 GPUs" in installed.unfit()[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert installed.unfit() == []


def test_a_node_without_megatron_core_is_unfit(monkeypatch):
    monkeypatch.setattr(installed, "_exists", lambda module: module != "megatron.core")
    assert "pip install megatron-core" in installed.unfit()[0]


def test_versions_are_those_that_are_installed():
    assert row("torch")[1] == torch.__version__
    assert row("megatron-core")[1] == importlib.metadata.version("megatron-core")
    assert row("python")[1].startswith("3.")


def test_each_op_says_which_kernels_answer():
    for op, built in ops.kernels().items():
        state = row(f"op {op}")[1]
        assert ("CPU yes" in state) == built["cpu"] and ("CUDA yes" in state) == built["cuda"]


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is built with CUDA")
def test_a_cpu_build_of_torch_has_no_kernel_for_a_gpu():
    assert not [name for name, state, _ in installed.rows() if "CUDA yes" in state]


def test_a_missing_build_says_how_to_get_one():
    rows = installed._kernels({"merge": {"cpu": False, "cuda": False}}, "csrc/ is not built; build it with `make`")
    assert rows[0][:2] == ("op merge", "CPU no, CUDA no") and "speed on CPU" in rows[0][2]
    assert rows[1] == ("compiled ops", "not loaded", "csrc/ is not built; build it with `make`")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], installed.MISSING),
        (["apex/__init__.py"], "another project"),
        (["apex/__init__.py", "apex/optimizers/__init__.py"], "without its CUDA ops"),
        (["apex/__init__.py", "apex/optimizers/__init__.py", "amp_C.py"], "version unknown"),
    ],
    ids=["absent", "of another project", "without ops", "real"],
)
def test_apex_is_told_from_the_project_of_its_name(tmp_path, monkeypatch, files, said):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise AssertionError('looked up, not imported')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(p for p in sys.path if "site-packages" not in p)])
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert said in installed._apex("its fused Adam")[1]


def test_packages_are_looked_up_and_not_imported():
    code = (
        "import sys, igla_mega.doctor.installed as d; before = set(sys.modules); d.rows(); "
        "sys.exit(bool({'transformers', 'wandb', 'bitsandbytes', 'megatron.core'} & (set(sys.modules) - before)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
