"""Search for the fastest layout: every legal one for a recipe and its hardware, with memory, time and comparison."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.layout.hardware import GIB, TABLE, Hardware, local_gpu
from igla_mega.layout.layout import Layout, describe, lay_out
from igla_mega.plan import memory
from igla_mega.plan.calibration import Rates, of
from igla_mega.plan.memory import Memory
from igla_mega.plan.time import Clock, StepTime

PLAIN_IS_KEPT = 0.02
"""Minimum share of a step that another layout must save to replace the plain one: below the accuracy of the rates."""
MOST_TRIED = 400
"""Maximum number of layouts considered, so that a plan takes seconds; the plainest come first."""


@dataclass(frozen=True)
class Candidate:
    """Layout with its memory and time."""

    layout: Layout
    memory: Memory
    step: StepTime | None
    """Time of a step; None if the layout does not fit in memory."""
    reason: str = ""
    """Reason why it is not the winner."""

    @property
    def fits(self) -> bool:
        return self.step is not None

    @property
    def seconds_per_token(self) -> float:
        assert self.step is not None
        layout = self.layout
        return self.step.seconds / (layout.global_batch * layout.rows_per_sample * layout.sequence_length)


@dataclass(frozen=True)
class Search:
    """Result of a search."""

    winner: Candidate
    others: list[Candidate]
    """Other legal layouts, the fastest first, then those that do not fit."""
    refused: list[tuple[str, str]]
    """Sizes without a legal layout, each with the error of the rule."""


def search(recipe: Recipe, world_size: int, hardware: Hardware, rates: Rates) -> Search:
    """Evaluate every layout of the sizes that a recipe leaves to `auto`, and choose the best.

    Raises:
        ConfigError: no layout is legal; the message has the breaches of the plain one.
    """
    candidates, refused = weigh(recipe, world_size, hardware, rates)
    winner = best(candidates)
    others = [explained(one, winner, hardware) for one in candidates if one is not winner]
    others.sort(key=lambda one: (not one.fits, one.step.seconds if one.step else one.memory.total))
    return Search(winner, others, refused)


def best(candidates: list[Candidate]) -> Candidate:
    """Return the fastest layout that fits, or the plain one if hardly slower; if none fits, the one with least
    memory."""
    # If the recipe gives the batch per rank, the data parallel size changes the global batch; prefer to keep it.
    same = [one for one in candidates if one.layout.global_batch == candidates[0].layout.global_batch]
    fitting = [one for one in same if one.fits] or [one for one in candidates if one.fits]
    # Prefer the largest expert parallel size that fits: free memory for longer rows outweighs some communication.
    largest = max((one.layout.expert for one in fitting), default=1)
    fitting = [one for one in fitting if one.layout.expert == largest]
    if not fitting:
        return min(candidates, key=lambda one: one.memory.total)
    fastest = min(fitting, key=lambda one: one.seconds_per_token)
    plain = fitting[0]  # candidates are ordered, the plainest first
    return plain if plain.seconds_per_token <= fastest.seconds_per_token * (1 + PLAIN_IS_KEPT) else fastest


def weigh(
    recipe: Recipe, world_size: int, hardware: Hardware, rates: Rates
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Return every legal layout with memory and time, the plainest first, and the illegal sizes with their errors."""
    device = "cpu" if hardware.is_cpu else "cuda"
    found: list[Candidate] = []
    refused: list[tuple[str, str]] = []
    first_error: ConfigError | None = None
    seen: set[Layout] = set()
    for sizes in _sizes(recipe, world_size, hardware, device):
        try:
            layout = lay_out(
                recipe.with_keys({f"distributed.{key}": size for key, size in sizes.items()}), world_size, device
            )
        except ConfigError as error:
            first_error = first_error or error
            refused.append((_sizes_text(sizes), error.breaches[0].split("\n")[0]))
            continue
        for variant in _variants(recipe, layout):
            if variant not in seen:
                seen.add(variant)
                found.append(_weighed(recipe, variant, hardware, rates))
        if len(found) >= MOST_TRIED:
            break
    if not found:
        assert first_error is not None, "at least one combination of sizes was tried"
        raise first_error
    return found, refused


def _weighed(recipe: Recipe, layout: Layout, hardware: Hardware, rates: Rates) -> Candidate:
    """Return the memory of a layout, and its time if it fits."""
    needs = memory.worst(recipe, layout, hardware)
    if needs.total > memory.available(hardware, layout):
        return Candidate(layout, needs, None)
    return Candidate(layout, needs, Clock(recipe, layout, hardware, rates).step())


def _sizes(recipe: Recipe, world_size: int, hardware: Hardware, device: str) -> Iterator[dict[str, Any]]:
    """Yield values for the sizes that the recipe leaves to `auto`, those with fewest model-parallel ranks first."""
    where, model = recipe.distributed, recipe.model
    assert model is not None, "resolved before"
    if device == "cpu":
        yield {}  # a CPU serves to demonstrate a layout, which `layout.lay_out` chooses
        return
    splits = math.gcd(model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    tensors = _open(where.tensor_parallel, [n for n in (1, 2, 4, 8) if n <= hardware.node_size and splits % n == 0])
    # FSDP with pipeline stages or expert parallelism, and EWC or LoRA with pipeline stages, are chosen only explicitly.
    alone = where.strategy == "FSDP"
    pipelines = _open(where.pipeline_parallel, [1] if alone else _divisors(model.num_layers, 16))
    if recipe.memory is not None or recipe.lora is not None:
        pipelines = pipelines if where.pipeline_parallel != "auto" else [1]
    contexts: list[Any] = [where.context_parallel]
    if where.context_parallel == "auto" and recipe.koshey is not None and recipe.koshey.ring_attention:
        contexts = ["auto", 4, 8, 16, 32]
    experts: list[Any] = [where.expert_parallel]
    if recipe.moe is not None and where.expert_parallel == "auto" and not alone:
        experts = ["auto", *_divisors(recipe.moe.num_experts, recipe.moe.num_experts)]
    seen = set()
    for total in sorted({t * p for t in tensors for p in pipelines}):
        if world_size % total:
            continue
        for tensor in tensors:
            if total % tensor or total // tensor not in pipelines:
                continue
            for context in contexts:
                for expert in experts:
                    sizes = {"tensor_parallel": tensor, "pipeline_parallel": total // tensor}
                    if context != where.context_parallel:
                        sizes["context_parallel"] = context
                    if expert != where.expert_parallel:
                        sizes["expert_parallel"] = expert
                    for chunks in _virtual(recipe, total // tensor):
                        both = {**sizes, "virtual_pipeline": chunks}
                        if (key := tuple(both.items())) not in seen:
                            seen.add(key)
                            yield both


def _virtual(recipe: Recipe, pipeline: Any) -> list[Any]:
    """Return the numbers of model chunks per pipeline rank: more shorten the bubble but add messages."""
    where, model = recipe.distributed, recipe.model
    assert model is not None, "resolved before"
    if where.virtual_pipeline != "auto":
        return [where.virtual_pipeline]
    return [1, *(n for n in (2, 4) if pipeline > 1 and model.num_layers % (pipeline * n) == 0)]


def _open(written: Any, choices: list[int]) -> list[int]:
    """Return the choices if the recipe has `auto`, else its value."""
    return choices if written == "auto" else [written]


def _divisors(number: int, limit: int) -> list[int]:
    """Return the divisors of a number up to a limit."""
    return [n for n in range(1, min(number, limit) + 1) if number % n == 0]


def _variants(recipe: Recipe, layout: Layout) -> Iterator[Layout]:
    """Yield the layout with each micro-batch size and recomputation that the recipe leaves to `auto`, its own first."""
    where, training = recipe.distributed, recipe.training
    per_rank = layout.global_batch // layout.data
    micro_batches = [layout.micro_batch_size]
    if where.micro_batch_size == "auto" and training.gradient_accumulation is None:
        groups = layout.pipeline if layout.virtual_pipeline > 1 else 1
        smaller = [n for n in range(layout.micro_batch_size - 1, 0, -1) if per_rank % (n * groups) == 0]
        # Two smaller ones are enough: memory falls with the size, but small products are slow.
        micro_batches += smaller[:2]
    recomputes = [layout.recompute] if where.gradient_checkpointing is not None else ["none", "selective", "full"]
    for recompute in recomputes:
        for size in micro_batches:
            yield replace(layout, recompute=recompute, micro_batch_size=size, num_microbatches=per_rank // size)


def explained(one: Candidate, winner: Candidate, hardware: Hardware) -> Candidate:
    """Return the candidate with the main reason why it is not the winner."""
    if one.step is None:
        space = memory.available(hardware, one.layout) / GIB
        return replace(one, reason=f"needs {one.memory.total / GIB:.1f} GiB of {space:.1f}")
    if winner.step is None:
        return one
    slower = one.seconds_per_token / winner.seconds_per_token - 1
    best_parts, parts = winner.step.parts(), one.step.parts()
    # Compare times for the same number of samples.
    scale = winner.layout.global_batch / one.layout.global_batch
    gaps = {name: parts[name] * scale - best_parts[name] for name in best_parts}
    name, gap = max(gaps.items(), key=lambda item: item[1])
    if slower <= 0:
        return replace(one, reason=f"{-slower:.1%} faster, within the accuracy of the plan; the plainer layout is kept")
    share = gap / winner.step.seconds
    return replace(one, reason=f"{slower:.1%} slower: {name} takes {share:.1%} more of a step")


def name_of(layout: Layout) -> str:
    """Return a layout as text: `DDP tensor 2 x data 32, micro-batch 1, recompute full`."""
    return f"{describe(layout)}, micro-batch {layout.micro_batch_size}, recompute {layout.recompute}"


def _sizes_text(sizes: dict[str, Any]) -> str:
    """Return sizes as text: `tensor 2, pipeline 4`."""
    return ", ".join(f"{key.removesuffix('_parallel')} {value}" for key, value in sizes.items())


def sizes_for(recipe: Recipe, world_size: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the sizes that `train` uses on the GPUs of this machine (A100 80GB if unknown), and notes for the user."""
    hardware = local_gpu() or TABLE["a100-80gb"]
    calibration, _ = of(hardware, recipe.distributed.precision)
    candidates, _ = weigh(recipe, world_size, hardware, calibration.rates)
    winner = best(candidates)
    notes: tuple[str, ...] = ()
    if not winner.fits:
        space = memory.available(hardware, winner.layout) / GIB
        notes = (
            f"distributed: by the plan no layout fits {hardware.title}; the one with least memory needs "
            f"{winner.memory.total / GIB:.1f} GiB of {space:.1f}. `igla-mega plan` lists remedies.",
        )
    return fixed_sizes(winner.layout), notes


def fixed_sizes(layout: Layout) -> dict[str, Any]:
    """Return the keys of `distributed:` that give this layout."""
    return {
        "tensor_parallel": layout.tensor,
        "pipeline_parallel": layout.pipeline,
        "virtual_pipeline": layout.virtual_pipeline,
        "context_parallel": layout.context,
        "expert_parallel": layout.expert,
        "micro_batch_size": layout.micro_batch_size,
        "gradient_checkpointing": layout.recompute,
        "sequence_parallel": layout.sequence_parallel,
    }
