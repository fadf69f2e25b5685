"""The process groups of a run as a frozen value; the only module that uses megatron-core's global `parallel_state`."""

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from igla_mega.distributed.rendezvous import join
from igla_mega.layout.layout import Layout


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh: the group of ranks along it that contains this rank."""

    group: dist.ProcessGroup
    size: int
    rank: int


@dataclass(frozen=True)
class Mesh:
    """Every axis of the layout, and this rank's position on each.

    The ranks of a group differ in their position on its axis and agree on all others.
    """

    rank: int
    world_size: int
    tensor: Axis
    pipeline: Axis
    context: Axis
    """Context parallel: these ranks hold different parts of the same sequences, and the same parameters."""
    data: Axis
    """Data parallel, without the context axis: these ranks read different samples."""
    data_context: Axis
    """Data and context parallel: these ranks hold the same parameters, so gradients are reduced over them."""
    model: Axis
    """Tensor and pipeline parallel: these ranks together hold one replica of the model, and a share of its experts."""
    expert: Axis
    """Expert parallel: these ranks, taken from the data, context and tensor axes, hold different experts."""
    expert_tensor: Axis
    """Expert tensor parallel: these ranks hold different parts of the same experts."""
    expert_data: Axis
    """Expert data parallel: these ranks hold the same experts, or the same parts of them."""
    host_group: dist.ProcessGroup
    """All ranks over gloo: for Python objects, for checkpoints written from a thread, and for agreeing on errors."""

    @property
    def is_main(self) -> bool:
        """True if this rank does what is done once per run: logs, folder names, manifests."""
        return self.rank == 0

    def replicas(self, *, expert: bool) -> Axis:
        """Return the axis of ranks that hold the same copy of a parameter: an expert's, or any other."""
        # Experts are spread over ranks that replicate everything else, so the two groups differ.
        return self.expert_data if expert else self.data_context


def under_launcher() -> bool:
    """Return True if a launcher (torchrun, or `environment.adopt`) has set this process's rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init_process_groups(device: torch.device, timeout_seconds: float = 600.0, dumps: Path | None = None) -> None:
    """Join the default process group: NCCL and gloo on CUDA, gloo on CPU; a group of one when not under a launcher.

    Args:
        timeout_seconds: how long a collective may wait for other ranks.
        dumps: folder to which NCCL writes its record of the last collectives when one of them times out.
    """
    if device.type == "cuda" and dumps is not None:
        _record_collectives(dumps)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if under_launcher():
        join(backend, timeout)
        return
    # A store in memory: it needs neither a free port nor a disk with space, and runs of one process never collide.
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def _record_collectives(dumps: Path) -> None:
    """Enable torch's flight recorder, under its names since torch 2.9 and before; variables that are set are kept."""
    dumps.mkdir(parents=True, exist_ok=True)
    settings = {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        **dict.fromkeys(("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        **dict.fromkeys(("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), f"{dumps}/nccl_rank_"),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def own_store() -> dist.Store:
    """Return a new connection to the store of the default group, which may be used from another thread."""
    # One connection serves one request at a time: a `get` that waits in a thread would block the others.
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def build_mesh(layout: Layout, seed: int) -> Mesh:
    """Create the process groups: tensor innermost, then context, data and pipeline (megatron-core's order).

    Args:
        seed: of the model-parallel random generators.
    """
    # Tensor parallel ranks exchange most bytes per layer, hence neighbours: ranks of one node are consecutive.
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
    )
    model_parallel_cuda_manual_seed(seed)
    return _mesh()


def single_process_mesh(layout: Layout, device: torch.device, seed: int) -> Mesh:
    """Return the mesh of a process that runs a whole model by itself; groups that exist are reused.

    Raises:
        RuntimeError: this process is one of several ranks.
    """
    if not dist.is_initialized():
        init_process_groups(device)
    if dist.get_world_size() > 1:
        raise RuntimeError(
            f"a whole model was requested in one process, but this is one of {dist.get_world_size()} ranks. "
            "Start a single process."
        )
    return _mesh() if parallel_state.model_parallel_is_initialized() else build_mesh(layout, seed)


def _mesh() -> Mesh:
    """Return megatron-core's groups as a mesh, with a new gloo group of all ranks."""
    ps = parallel_state
    return Mesh(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor=_axis(ps.get_tensor_model_parallel_group()),
        pipeline=_axis(ps.get_pipeline_model_parallel_group()),
        context=_axis(ps.get_context_parallel_group()),
        data=_axis(ps.get_data_parallel_group()),
        data_context=_axis(ps.get_data_parallel_group(with_context_parallel=True)),
        model=_axis(ps.get_model_parallel_group()),
        expert=_axis(ps.get_expert_model_parallel_group()),
        expert_tensor=_axis(ps.get_expert_tensor_parallel_group()),
        expert_data=_axis(ps.get_expert_data_parallel_group()),
        host_group=dist.new_group(backend="gloo"),
    )


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group, group.size(), group.rank())


def destroy_process_groups() -> None:
    """Destroy the process groups; does nothing if they were never joined."""
    # megatron-core's globals first: they refer to groups that the second call destroys.
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def pipeline_ends(virtual_stage: int | None) -> tuple[bool, bool]:
    """Return whether this rank's chunk `virtual_stage` holds the embedding, and whether it holds the output layer."""
    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
    )
