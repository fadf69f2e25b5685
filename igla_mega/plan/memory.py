"""What a layout needs of one device: what is held for good, what a step adds at its peak, and what allocators lose."""

from dataclasses import dataclass, replace

from igla_mega.config.schema import Recipe
from igla_mega.layout.hardware import GIB, Hardware
from igla_mega.layout.layout import Layout
from igla_mega.plan import activations, parameters

CUDA_SLACK = 0.04
"""Share of what is in use that CUDA's caching allocator holds beside it in pieces of the wrong size. Assumed."""
PROCESS_BYTES = 0.56 * GIB
"""Of a rank on a CPU beside all that: Python, torch, megatron-core. Peak resident memory less the rest of the plan was
533 to 608 MiB in four of the cases of tools/bench/plan.py."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank of one pipeline stage at its peak, by what they are for."""

    stage: int
    weights: int
    fp8: int
    """The layers' matrices in 8 bits, and their transposes, as Transformer Engine keeps them beside those in bf16."""
    gradients: int
    optimizer: int
    ewc: int
    """Fisher information and anchor."""
    reference: int
    """A second, frozen model of preference optimization."""
    activations: int
    working: int
    """In work beside the activations, attention's workspace and gradients of activations included."""
    loss: int
    unsharded: int
    communication: int
    slack: int
    reserved: int
    """Driver, libraries, NCCL; on a CPU the process."""
    moment: str
    """Where in a step the peak is."""

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    @property
    def held(self) -> int:
        """From the first step to the last."""
        return self.weights + self.fp8 + self.gradients + self.optimizer + self.ewc + self.reference

    def parts(self) -> dict[str, int]:
        return {name: value for name, value in self.__dict__.items() if name not in ("stage", "moment")}


def of_stage(recipe: Recipe, layout: Layout, stage: int, hardware: Hardware) -> Memory:
    """Count the memory of a rank of pipeline rank `stage`."""
    device = "cpu" if hardware.is_cpu else "cuda"
    held = parameters.held(recipe, layout, stage, device=device)
    peak = activations.peak(recipe, layout, stage, device)
    dpo = recipe.dpo
    reference = 0
    if dpo is not None and dpo.reference == "model" and not dpo.reference_free:
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
    """Count every pipeline rank."""
    return [of_stage(recipe, layout, stage, hardware) for stage in range(layout.pipeline)]


def worst(recipe: Recipe, layout: Layout, hardware: Hardware) -> Memory:
    """The pipeline rank that needs most: the first or the last."""
    ends = sorted({0, layout.pipeline - 1})
    return max((of_stage(recipe, layout, stage, hardware) for stage in ends), key=lambda memory: memory.total)


def available(hardware: Hardware, layout: Layout) -> float:
    """Bytes that one rank may use: the ranks of a CPU share its machine's."""
    return hardware.memory_bytes / layout.world_size if hardware.is_cpu else hardware.memory_bytes
