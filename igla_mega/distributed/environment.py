"""Determine this process's rank from its launcher's environment: torchrun, Slurm's `srun` or Kubeflow. No torch."""

import ctypes
import os
import re
import signal
import sys
from collections.abc import MutableMapping

from igla_mega.config.errors import ConfigError

LAUNCHER = "IGLA_LAUNCHER"
"""Environment variable with the process id of the launcher that started this rank."""


def end_with_launcher() -> None:
    """Ask the kernel to kill this rank when torchrun's process ends, for any reason, so that no rank trains on alone.

    Call this before importing torch, which takes seconds in which the launcher may end.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):
        os._exit(1)  # the launcher ended before prctl, and the kernel signals later deaths only


def adopt(environment: MutableMapping[str, str] = os.environ) -> None:
    """Translate a scheduler's environment variables to those of torchrun.

    Under `srun` each task is a rank. A Kubeflow pod is a machine: torchrun's variables (PET_*) give the number of
    machines and become the defaults of `--nnodes` and `--rendezvous`; PyTorchJob's RANK and WORLD_SIZE count pods.

    Raises:
        ConfigError: `srun` started fewer tasks on this node than it allocated GPUs.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return
    if "PET_NNODES" in environment:
        # Left in place, these would make this process one rank of a run without torchrun's agent.
        environment.pop("RANK", None)
        environment.pop("WORLD_SIZE", None)
        host = environment.get("PET_MASTER_ADDR") or environment.get("MASTER_ADDR")
        port = environment.get("PET_MASTER_PORT") or environment.get("MASTER_PORT") or "29500"
        if host:
            environment.setdefault("PET_RDZV_ENDPOINT", f"{host}:{port}")
        return
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    if "RANK" in environment or num_tasks == 1 or "SLURM_STEP_ID" not in environment:
        return
    here = _tasks_of_node(environment)
    gpus = int(environment.get("SLURM_GPUS_ON_NODE", 0))
    if gpus > here:
        raise ConfigError(
            f"srun: {here} task{'s' if here > 1 else ''} on node {environment.get('SLURMD_NODENAME', '')} of {gpus} "
            "GPUs; each task is a rank, and each rank uses one GPU.\n"
            f"  Use --ntasks-per-node={gpus}, or --gpus-per-node={here}."
        )
    # With --gpus-per-task each task sees a single GPU, which is then index 0 in every task of the node.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    bound = here > 1 and visible != "" and "," not in visible
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=str(num_tasks),
        LOCAL_RANK="0" if bound else environment["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=str(here),
    )
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    # Derived from the job, because two jobs that share a node must not use the same port.
    environment.setdefault("MASTER_PORT", str(15000 + int(environment["SLURM_JOB_ID"]) % 15000))


def first_host(nodes: str) -> str:
    """Return the first host name of Slurm's compressed list, such as `a[01-03,7]-x,b2`."""
    found = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _tasks_of_node(environment: MutableMapping[str, str]) -> int:
    """Return the number of tasks on this node; Slurm writes three nodes of 8 tasks and one of 4 as `8(x3),4`."""
    counts: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[min(int(environment.get("SLURM_NODEID", 0)), len(counts) - 1)]
