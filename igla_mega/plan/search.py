"""Which layout: every legal one for a recipe and its hardware, what each needs and takes, and why the winner won."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.layout.hardware import GIB, TABLE, Hardware, local_gpu
from igla_mega.layout.layout import Layout, lay_out
from igla_mega.plan import memory
from igla_mega.plan.calibration import Rates, of
from igla_mega.plan.memory import Memory
from igla_mega.plan.time import Clock, StepTime

PLAIN_IS_KEPT = 0.02
"""The plain layout is taken unless another saves more than this share of a step: rates are not known better."""
MOST_TRIED = 400


@dataclass(frozen=True)
class Candidate:
    """A layout that was weighed."""

    layout: Layout
    memory: Memory
    step: StepTime | None
    """None where it does not fit."""
    reason: str = ""
    """Why it is not the winner."""

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
    """What was weighed, the winner first."""

    winner: Candidate
    others: list[Candidate]
    refused: list[tuple[str, str]]
    """Sizes that make no legal layout, and the rule that says so."""


def search(recipe: Recipe, world_size: int, hardware: Hardware, rates: Rates) -> Search:
    """Weigh every layout of the sizes that a recipe leaves open.

    Raises:
        ConfigError: there is no legal layout at all; the plain one's breaches.
    """
    candidates, refused = weigh(recipe, world_size, hardware, rates)
    winner = best(candidates)
    others = [explained(one, winner, hardware) for one in candidates if one is not winner]
    others.sort(key=lambda one: (not one.fits, one.step.seconds if one.step else one.memory.total))
    return Search(winner, others, refused)


def best(candidates: list[Candidate]) -> Candidate:
    """The fastest that fits, or the plain one where that is hardly slower; the smallest where none fits."""
    # Where the recipe says a rank's share of the batch, the layout must not change the whole of it.
    same = [one for one in candidates if one.layout.global_batch == candidates[0].layout.global_batch]
    fitting = [one for one in same if one.fits] or [one for one in candidates if one.fits]
    # Experts are spread as far as they go, if that fits: memory for longer rows is worth more than a few messages.
    most = max((one.layout.expert for one in fitting), default=1)
    fitting = [one for one in fitting if one.layout.expert == most]
    if not fitting:
        return min(candidates, key=lambda one: one.memory.total)
    fastest = min(fitting, key=lambda one: one.seconds_per_token)
    plain = fitting[0]  # they come with the plainest first
    return plain if plain.seconds_per_token <= fastest.seconds_per_token * (1 + PLAIN_IS_KEPT) else fastest


def weigh(
    recipe: Recipe, world_size: int, hardware: Hardware, rates: Rates
) -> tuple[list[Candidate], list[tuple[str, str]]]:
    """Return every legal layout with its memory and time, the plainest first, and what is not legal and why."""
    device = "cpu" if hardware.is_cpu else "cuda"
    found: list[Candidate] = []
    refused: list[tuple[str, str]] = []
    first_error: ConfigError | None = None
    seen: set[Layout] = set()
    for sizes in _sizes(recipe, world_size, hardware, device):
        where = recipe.distributed.model_copy(update=sizes)
        try:
            layout = lay_out(recipe.model_copy(update={"distributed": where}), world_size, device)
        except ConfigError as error:
            first_error = first_error or error
            refused.append((_words(sizes), error.breaches[0].split("\n")[0]))
            continue
        for variant in _variants(recipe, layout):
            if variant not in seen:
                seen.add(variant)
                found.append(_weighed(recipe, variant, hardware, rates))
        if len(found) >= MOST_TRIED:
            break
    if not found:
        assert first_error is not None, "one size at least was tried"
        raise first_error
    return found, refused


def _weighed(recipe: Recipe, layout: Layout, hardware: Hardware, rates: Rates) -> Candidate:
    needs = memory.worst(recipe, layout, hardware)
    if needs.total > memory.available(hardware, layout):
        return Candidate(layout, needs, None)
    return Candidate(layout, needs, Clock(recipe, layout, hardware, rates).step())


def _sizes(recipe: Recipe, world_size: int, hardware: Hardware, device: str) -> Iterator[dict[str, Any]]:
    """Sizes for what the recipe leaves open, the plainest first."""
    where, model = recipe.distributed, recipe.model
    assert model is not None, "resolved before"
    if device == "cpu":
        yield {}  # the point there is to see a layout work: `layout.py` says which
        return
    splits = math.gcd(model.num_heads, model.num_kv_heads, model.intermediate_size, model.vocab_size)
    tensors = _open(where.tensor_parallel, [n for n in (1, 2, 4, 8) if n <= hardware.node_size and splits % n == 0])
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
    """Model chunks a pipeline rank: more of them make the bubble shorter, and the messages more."""
    where, model = recipe.distributed, recipe.model
    assert model is not None, "resolved before"
    if where.virtual_pipeline != "auto":
        return [where.virtual_pipeline]
    return [1, *(n for n in (2, 4) if pipeline > 1 and model.num_layers % (pipeline * n) == 0)]


def _open(written: Any, choices: list[int]) -> list[int]:
    return choices if written == "auto" else [written]


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _variants(recipe: Recipe, layout: Layout) -> Iterator[Layout]:
    """The layout with each micro-batch and recomputation that the recipe leaves open, its own first."""
    where, training = recipe.distributed, recipe.training
    per_rank = layout.global_batch // layout.data
    micro_batches = [layout.micro_batch_size]
    if where.micro_batch_size == "auto" and training.gradient_accumulation is None:
        groups = layout.pipeline if layout.virtual_pipeline > 1 else 1
        smaller = [n for n in range(layout.micro_batch_size - 1, 0, -1) if per_rank % (n * groups) == 0]
        micro_batches += smaller[:2]
    recomputes = [layout.recompute] if where.gradient_checkpointing is not None else ["none", "selective", "full"]
    for recompute in recomputes:
        for size in micro_batches:
            yield replace(layout, recompute=recompute, micro_batch_size=size, num_microbatches=per_rank // size)


def explained(one: Candidate, winner: Candidate, hardware: Hardware) -> Candidate:
    """Say the first reason why a candidate is not the winner."""
    if one.step is None:
        space = memory.available(hardware, one.layout) / GIB
        return replace(one, reason=f"needs {one.memory.total / GIB:.1f} GiB of {space:.1f}")
    if winner.step is None:
        return one
    slower = one.seconds_per_token / winner.seconds_per_token - 1
    ours, theirs = winner.step.parts(), one.step.parts()
    scale = winner.layout.global_batch / one.layout.global_batch
    gaps = {name: theirs[name] * scale - ours[name] for name in ours}
    name, gap = max(gaps.items(), key=lambda item: item[1])
    if slower <= 0:
        return replace(one, reason=f"saves {-slower:.1%}, less than is known for sure; the plainer layout is kept")
    share = gap / winner.step.seconds
    return replace(one, reason=f"{slower:.1%} slower: {name} takes {share:.1%} of a step more")


def name_of(layout: Layout) -> str:
    """A layout in words: `tensor 2 x data 32, micro-batch 1, recompute full`."""
    sizes = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "context": layout.context,
        "data": layout.data,
    }
    split = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one device"
    extra = [f"expert {layout.expert}"] if layout.expert > 1 else []
    extra += [f"virtual {layout.virtual_pipeline}"] if layout.virtual_pipeline > 1 else []
    extra += [f"micro-batch {layout.micro_batch_size}", f"recompute {layout.recompute}"]
    return ", ".join([f"{layout.strategy} {split}", *extra])


def _words(sizes: dict[str, Any]) -> str:
    return ", ".join(f"{key.removesuffix('_parallel')} {value}" for key, value in sizes.items())


def sizes_for(recipe: Recipe, world_size: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What `train` fixes on this machine's GPUs (A100 80GB where they are not known): sizes, and notes to say aloud."""
    hardware = local_gpu() or TABLE["a100-80gb"]
    calibration, _ = of(hardware, recipe.distributed.precision)
    candidates, _ = weigh(recipe, world_size, hardware, calibration.rates)
    winner = best(candidates)
    notes: tuple[str, ...] = ()
    if not winner.fits:
        space = memory.available(hardware, winner.layout) / GIB
        notes = (
            f"distributed: by the plan no layout fits {hardware.title}; the smallest needs "
            f"{winner.memory.total / GIB:.1f} GiB of {space:.1f} (`igla-mega plan` says what would help).",
        )
    return fixed_sizes(winner.layout), notes


def fixed_sizes(layout: Layout) -> dict[str, Any]:
    """The keys of `distributed:` that give this layout."""
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
