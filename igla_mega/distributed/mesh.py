"""Process groups as a value. The only file that touches megatron-core's `parallel_state`."""

import datetime
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from igla_mega.layout.layout import Layout


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it."""

    group: dist.ProcessGroup
    size: int
    rank: int


@dataclass(frozen=True)
class Mesh:
    """Every axis of the layout, and this rank's place on each."""

    rank: int
    world_size: int
    tensor: Axis
    pipeline: Axis
    context: Axis
    """These ranks hold parts of the same sequences."""
    data: Axis
    """Data parallel, context ranks not included: these ranks read different samples."""
    data_context: Axis
    """Data and context parallel: these ranks hold the same parameters."""
    model: Axis
    """Tensor and pipeline parallel: these ranks hold one replica of the model, of whose experts each has some."""
    expert: Axis
    """These ranks, of the data, context and tensor axes, hold different experts."""
    expert_tensor: Axis
    """These ranks hold parts of the same experts."""
    expert_data: Axis
    """These ranks hold the same experts, or the same parts of them."""
    host_group: dist.ProcessGroup
    """All ranks over gloo: for objects, for checkpoints written from a thread, and for agreeing on errors."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def replicas(self, *, expert: bool) -> Axis:
        """The ranks that hold the same parameters as this one: an expert's, or others."""
        return self.expert_data if expert else self.data_context


def under_launcher() -> bool:
    """Whether torchrun (or the like) has told this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def init_process_groups(device: torch.device, timeout_seconds: float = 600.0, dumps: Path | None = None) -> None:
    """Join the default process group: NCCL beside gloo on CUDA, gloo on CPU; alone when not under torchrun.

    Args:
        dumps: folder for what NCCL recorded of the last collectives, written when one of them times out.
    """
    if device.type == "cuda" and dumps is not None:
        _record_collectives(dumps)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    if under_launcher():
        dist.init_process_group(backend, timeout=timeout)
        return
    # A file store needs no free port.
    store = dist.FileStore(os.path.join(tempfile.mkdtemp(prefix="igla-"), "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)


def _record_collectives(dumps: Path) -> None:
    """Switch on torch's flight recorder, under the names of torch 2.9 and those before; what is set by hand stays."""
    dumps.mkdir(parents=True, exist_ok=True)
    settings = {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        **dict.fromkeys(("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
        **dict.fromkeys(("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"), f"{dumps}/nccl_rank_"),
    }
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def own_store() -> dist.Store:
    """A connection of its own to what the ranks met at: it may be used from another thread."""
    return dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]


def build_mesh(layout: Layout, seed: int) -> Mesh:
    """Lay the ranks out: tensor innermost, then context, data, pipeline (megatron-core's order)."""
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
    """The mesh of a process that runs a whole model by itself; what was joined before is kept.

    Raises:
        RuntimeError: this process is one of several.
    """
    if not dist.is_initialized():
        init_process_groups(device)
    if dist.get_world_size() > 1:
        raise RuntimeError(f"a whole model was asked for on one of {dist.get_world_size()} ranks; start one process")
    return _mesh() if parallel_state.model_parallel_is_initialized() else build_mesh(layout, seed)


def _mesh() -> Mesh:
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
    """Leave the process groups; safe when they were never joined."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def pipeline_ends(virtual_stage: int | None) -> tuple[bool, bool]:
    """Whether this rank's chunk `virtual_stage` holds the embedding, and whether it holds the output layer."""
    return (
        parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=virtual_stage),
        parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=virtual_stage),
    )
