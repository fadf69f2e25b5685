"""The repository's own batch scripts on a real Slurm: two nodes of one rank each, over gloo."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import environment, metrics, write_dataset, write_recipe
from slurm_cluster import Cluster, absent

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "examples" / "slurm" / "train.sbatch"
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1")
STEPS = 100


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := absent():
        assert not os.environ.get("IGLA_REQUIRE_SYSTEM"), f"this machine is to have a Slurm: {reason}"
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    write_dataset(folder / "prepared" / "words")
    return write_recipe(
        folder,
        training={"total_steps": STEPS, "batch_size": 8, "warmup_steps": 2},
        checkpoint={"every_steps": 20},
    )


@pytest.fixture(scope="module")
def unbroken(recipe):
    """Losses of the same run on one machine, by two ranks that nothing disturbs."""
    run = recipe.parent / "unbroken"
    command = [sys.executable, "-m", "igla_mega", "train", str(recipe), "--nproc", "2", "--run", str(run)]
    subprocess.run(command, env=environment(), check=True, timeout=300, stdout=subprocess.DEVNULL)
    return metrics(run)


def submit(cluster: Cluster, run: Path, *words: str, options: tuple[str, ...] = (), **variables: str) -> str:
    """Queue the repository's script; the log of the job is stored next to the run."""
    return cluster.command(
        "sbatch", "--parsable", f"--output={run}.log", *SMALL, *options, str(TRAIN), *words,
        IGLA_RUN=str(run), PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", **variables,
    )  # fmt: skip


def log_of(run: Path) -> str:
    path = Path(f"{run}.log")
    return path.read_text() if path.exists() else ""


def wait_for(cluster: Cluster, run: Path, what: str, true: Callable[[], bool]) -> None:
    try:
        cluster.wait(what, true)
    except AssertionError as error:
        raise AssertionError(f"{log_of(run)}\n{error}") from None


def in_mid_run(cluster: Cluster, run: Path, after: int = 0) -> None:
    """Wait until the run has taken some steps, and more than `after`."""
    path = run / "metrics.jsonl"
    wait_for(cluster, run, "steps", lambda: path.exists() and len(path.read_text().splitlines()) > after + 3)


def ended(cluster: Cluster, job: str, run: Path) -> dict[str, str]:
    """Wait until a job is over; what the controller then knows of it."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_for(cluster, run, f"the end of job {job}", lambda: cluster.state(job)["JobState"] in over)
    return cluster.state(job)


def test_a_job_that_slurm_preempts_saves_first_and_goes_on_when_the_urgent_one_is_over(
    cluster, recipe, unbroken, tmp_path
):
    run = tmp_path / "run"
    job = submit(cluster, run, str(recipe))
    in_mid_run(cluster, run)
    urgent = cluster.command(
        "sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    found = ended(cluster, job, run)
    said = log_of(run)
    assert cluster.state(urgent)["JobState"] == "COMPLETED"
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), said
    assert "resuming at step" in said and metrics(run) == unbroken


def test_a_job_whose_time_is_nearly_up_saves_and_is_queued_again(cluster, recipe, tmp_path):
    run = tmp_path / "run"
    options = ("--time=60", "--signal=TERM@120")
    job = submit(cluster, run, str(recipe), "--set", "training.total_steps=100000", options=options)
    in_mid_run(cluster, run)
    hours, minutes, _ = map(int, cluster.state(job)["RunTime"].split(":"))
    # One to two minutes are left; Slurm looks at limits every half minute.
    cluster.command("scontrol", "update", f"jobid={job}", f"timelimit={60 * hours + minutes + 2}")
    wait_for(cluster, run, "the signal", lambda: "queued again" in log_of(run))
    cluster.command("scancel", job)
    assert "saved as requested; queued again" in log_of(run)
    assert list((run / "checkpoints").glob("step_*"))


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, recipe, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, str(recipe))
    in_mid_run(cluster, run)
    cluster.command("scancel", job)
    found = ended(cluster, job, run)
    wait_for(cluster, run, "the save", lambda: any((run / "checkpoints").glob("step_*")))
    time.sleep(2)
    assert cluster.state(job)["JobState"] == "CANCELLED" and found["Restarts"] == "0", log_of(run)


def test_a_wrong_recipe_is_not_queued_again(cluster, recipe, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, str(recipe), "--set", "training.batchsize=8")
    found = ended(cluster, job, run)
    assert (found["JobState"], found["Restarts"], found["ExitCode"]) == ("FAILED", "0", "2:0"), log_of(run)
    assert "did you mean" in log_of(run)


def test_a_bad_node_is_named_before_the_run_and_ends_the_job(cluster, recipe, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, str(recipe), IGLA_TEST_NODES="1", IGLA_LIMITS="disk=1e15 skew=5")
    found, said = ended(cluster, job, run), log_of(run)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), said
    assert "2 nodes, 2 ranks, CPU" in said and "bad: node1 (rank 0): disk:" in said, said
    assert "bad: node2 (rank 1): disk:" in said and "--exclude the failed nodes" in said and not run.exists(), said


def test_a_job_that_loses_a_node_goes_on_from_the_last_checkpoint(cluster, recipe, unbroken, tmp_path):
    run = tmp_path / "run"
    job = submit(cluster, run, str(recipe))
    in_mid_run(cluster, run, after=20)
    cluster.command("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    wait_for(cluster, run, "the requeue", lambda: cluster.state(job)["Restarts"] == "1")
    cluster.command("scontrol", "update", "nodename=node2", "state=resume")
    found = ended(cluster, job, run)
    assert found["JobState"] == "COMPLETED", log_of(run)
    assert "resuming at step" in log_of(run) and metrics(run) == unbroken, log_of(run)
