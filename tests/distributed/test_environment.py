"""What Slurm and Kubeflow tell a process, in the variables that they set."""

import shutil
import subprocess
import sys
from pathlib import Path

import command_line
import pytest
from command_line import metrics, write_dataset, write_recipe
from slurm_cluster import free_ports

from igla_mega.config.errors import ConfigError
from igla_mega.distributed import environment

ROOT = Path(__file__).resolve().parents[2]
# Of `srun` on the second of two nodes of two tasks (Slurm 22.05).
SLURM = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "40312",
    "SLURMD_NODENAME": "gpu08",
    "SLURM_GPUS_ON_NODE": "2",
}
RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def adopted(variables: dict[str, str]) -> dict[str, str]:
    """What is new or other after `adopt`."""
    told = dict(variables)
    environment.adopt(told)
    return {name: value for name, value in told.items() if variables.get(name) != value}


def test_a_task_of_srun_is_a_rank_and_meets_the_others_on_the_first_node():
    assert adopted(SLURM) == {**RANK, "MASTER_ADDR": "gpu07", "MASTER_PORT": "25312"}


def test_where_ranks_meet_is_the_users_to_say():
    there = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}
    assert adopted({**SLURM, **there}) == RANK


@pytest.mark.parametrize(("visible", "place"), [("", "1"), ("0,1", "1"), ("1", "0")])
def test_a_task_that_sees_one_gpu_takes_that_one(visible, place):
    assert adopted({**SLURM, "CUDA_VISIBLE_DEVICES": visible})["LOCAL_RANK"] == place


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {name: value for name, value in SLURM.items() if name != "SLURM_STEP_ID"},  # a batch script, outside of srun
        {**SLURM, "RANK": "0", "WORLD_SIZE": "4"},
        {**SLURM, "TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8"},
    ],
    ids=["no Slurm", "one task", "batch script", "told", "torchrun"],
)
def test_a_process_that_is_alone_or_knows_its_rank_keeps_what_it_has(variables):
    assert adopted(variables) == {}


def test_a_task_for_several_gpus_is_refused_with_the_option_that_mends_it():
    with pytest.raises(ConfigError) as caught:
        adopted({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "8"})
    assert "1 task on node gpu08 of 8 GPUs" in str(caught.value) and "--ntasks-per-node=8" in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"), ("a,b", "a"), ("a[01-03]", "a01"), ("a[7,9]", "a7"), ("a-b[010-012,4]-ib,c", "a-b010-ib"),
        ("a1,b[2-3]", "a1"), ("gpu-a100-7", "gpu-a100-7"),
    ],
)  # fmt: skip
def test_the_first_node_of_slurms_short_list_is_read(nodes, first):
    assert environment.first_host(nodes) == first


def test_a_pod_of_kubeflow_is_a_machine_and_no_rank():
    v1 = {"PET_NNODES": "8", "PET_NODE_RANK": "0", "MASTER_ADDR": "m", "MASTER_PORT": "23456"}
    told = {**v1, "RANK": "0", "WORLD_SIZE": "64"}
    environment.adopt(told)
    assert told == {**v1, "PET_RDZV_ENDPOINT": "m:23456"}
    v2 = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "j-node-0-0.j", "PET_MASTER_PORT": "29400"}
    assert adopted(v2) == {"PET_RDZV_ENDPOINT": "j-node-0-0.j:29400"}
    assert adopted({"PET_NNODES": "2", "PET_RDZV_ENDPOINT": "h:1", "MASTER_ADDR": "m"}) == {}


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*_*b.sh")), ids=lambda path: path.stem)
def test_an_example_is_one_rank_under_srun_and_starts_its_ranks_elsewhere(script, tmp_path):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")  # the scripts prefer the repository's own .venv
    for name, body in {"igla-mega": 'echo "$@"', "python": "echo 3"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    kept = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": ""}

    def said(**variables: str) -> str:
        command = [tmp_path / "examples" / script.name, "--set", "a=b"]
        done = subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    recipe = script.stem
    assert said(**SLURM) == f"train {recipe} --set a=b"
    assert said() == f"train {recipe} --nproc 3 --set a=b"


def test_two_machines_of_a_pytorchjob_train_as_one_machine_of_two_ranks(tmp_path):
    write_dataset(tmp_path / "prepared" / "words")
    recipe = write_recipe(tmp_path)
    command = [sys.executable, "-m", "igla_mega", "train", str(recipe), "--run"]
    subprocess.run(
        [*command, tmp_path / "one", "--nproc", "2"], env=command_line.environment(), check=True, timeout=240
    )
    pods = {"PET_NNODES": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_ports(1)[0], "WORLD_SIZE": 2}
    machines = [
        subprocess.Popen(
            [*command, tmp_path / "two", "--nproc", "1"],
            env={**command_line.environment(**pods, PET_NODE_RANK=rank), "RANK": str(rank)},
            stdout=subprocess.DEVNULL if rank else None,
        )
        for rank in (0, 1)
    ]
    try:
        assert [machine.wait(240) for machine in machines] == [0, 0]
    finally:
        for machine in machines:
            machine.kill()
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one")
