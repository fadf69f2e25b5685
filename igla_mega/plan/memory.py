"""Memory of a layout per device: persistent state, the peak within a step, and losses of the allocator."""

from dataclasses import dataclass, replace

from igla_mega.config.schema import Recipe
from igla_mega.layout.hardware import GIB, Hardware
from igla_mega.layout.layout import Layout
from igla_mega.plan import activations, parameters

CUDA_SLACK = 0.04
"""Fragmentation of the CUDA caching allocator, as a share of the memory in use. Assumed."""
PROCESS_BYTES = 0.56 * GIB
"""Memory of a CPU rank for Python, torch and megatron-core. Peak resident memory minus the rest of the plan was 533 to
608 MiB in four of the cases of tools/bench/plan.py."""


@dataclass(frozen=True)
class Memory:
    """Memory of a rank of one pipeline stage at its peak in bytes, by purpose."""

    stage: int
    weights: int
    fp8: int
    """Weight matrices of the layers in 8 bits and their transposes, which Transformer Engine keeps with those in
    bf16."""
    gradients: int
    optimizer: int
    ewc: int
    """Fisher information and anchor."""
    reference: int
    """Second, frozen model for preference optimization."""
    activations: int
    working: int
    """Temporary tensors, including the workspace of attention and gradients of activations."""
    loss: int
    unsharded: int
    """Gathered weights and gradients not yet scattered (FSDP)."""
    communication: int
    slack: int
    """Fragmentation of the allocator."""
    reserved: int
    """Driver, libraries and NCCL; on a CPU the process."""
    moment: str
    """Moment of the peak within a step."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def held(self) -> int:
        """Persistent state, from the first step to the last."""
        return self.weights + self.fp8 + self.gradients + self.optimizer + self.ewc + self.reference

    def parts(self) -> dict[str, int]:
        return {name: value for name, value in self.__dict__.items() if name not in ("stage", "moment")}


def of_stage(recipe: Recipe, layout: Layout, stage: int, hardware: Hardware) -> Memory:
    """Return the memory of a rank of pipeline stage `stage`."""
    device = "cpu" if hardware.is_cpu else "cuda"
    held = parameters.held(recipe, layout, stage, device=device)
    peak = activations.peak(recipe, layout, stage, device)
    dpo = recipe.dpo
    reference = 0
    if dpo is not None and dpo.reference == "model" and not dpo.reference_free:
        # The reference model is not sharded by FSDP.
        whole = replace(layout, strategy="DDP")
        reference = parameters.held(recipe, whole, stage, device=device).elements * (
            4 if recipe.distributed.precision == "FP32" else 2
        )
    fp8 = 0
    if recipe.distributed.precision == "FP8":
        assert recipe.model is not None, "resolved before"
        chunks = parameters.chunks_of(layout, recipe.model.num_layers, stage)
        layers = sum(chunk.layers for chunk in chunks)
        fp8 = 2 * layers * sum(p.elements for p in parameters.of_layer(recipe, layout) if len(p.shape) > 1)
    # FSDP allocates gradient shards within the step, so only those at the peak count.
    gradients = peak.gradients if layout.strategy == "FSDP" else held.gradients
    used = fp8 + held.weights + held.optimizer + held.memory + reference + peak.total
    used += 0 if layout.strategy == "FSDP" else held.gradients
    return Memory(
        stage=stage,
        weights=held.weights,
        fp8=fp8,
        gradients=gradients,
        optimizer=held.optimizer,
        ewc=held.memory,
        reference=reference,
        activations=peak.kept,
        working=peak.working,
        loss=peak.loss,
        unsharded=peak.unsharded,
        communication=peak.communication,
        slack=0 if hardware.is_cpu else round(CUDA_SLACK * used),
        reserved=round(PROCESS_BYTES if hardware.is_cpu else hardware.reserved_bytes),
        moment=peak.moment,
    )


def of_stages(recipe: Recipe, layout: Layout, hardware: Hardware) -> list[Memory]:
    """Return the memory of every pipeline rank."""
    return [of_stage(recipe, layout, stage, hardware) for stage in range(layout.pipeline)]


def worst(recipe: Recipe, layout: Layout, hardware: Hardware) -> Memory:
    """Return the memory of the pipeline rank that needs most: the first, with most micro-batches in flight, or the
    last."""
    ends = sorted({0, layout.pipeline - 1})
    return max((of_stage(recipe, layout, stage, hardware) for stage in ends), key=lambda memory: memory.total)


def available(hardware: Hardware, layout: Layout) -> float:
    """Return the memory available to one rank in bytes; the ranks on a CPU share that of the machine."""
    return hardware.memory_bytes / layout.world_size if hardware.is_cpu else hardware.memory_bytes
