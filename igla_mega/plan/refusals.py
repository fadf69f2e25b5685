"""What `train` refuses before its first step by the recipe alone: `check` and `train` ask the same function.

Rules between the keys of one recipe are in `config.rules`. Here they are applied to what is trained, which `sft:`,
`dpo:`, phases and stages change. A layout is tried on the fewest ranks that hold the given sizes: what does not fit
there, such as a micro-batch that does not divide the batch, fits on no number of ranks.
"""

import math
from collections.abc import Iterator, Sequence

from igla_mega.config import needed, rules
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.prepared import missing_keys, unknown_sources
from igla_mega.layout.layout import lay_out
from igla_mega.layout.stages import drawn_data, parts_of, phase_recipe
from igla_mega.plan.choose import stages_of


def refusals(recipe: Recipe) -> list[str]:
    """Return every breach of a recipe that can be known without its data, its base model and the ranks of the run."""
    found = [*rules.breaches(recipe), *rules.not_yet(recipe), *needed.not_installed(recipe)]
    trained: list[Recipe] = []
    parts = parts_of(recipe)
    for i, part in enumerate(parts):
        place = f"stages.{i}." if recipe.stages is not None else ""
        own = [phase_recipe(part, phase) for phase in part.curriculum.phases] if part.curriculum is not None else [part]
        breaches = [*rules.breaches(part), *(breach for one in own for breach in rules.breaches(one)), *_data(part)]
        found += [place + breach for breach in breaches]
        trained += own
    return list(dict.fromkeys(found)) or _layout(recipe if recipe.stages is not None else parts[0], trained)


def _data(part: Recipe) -> Iterator[str]:
    """Yield what the data section lacks; nothing for a recipe without sources, which is complete but for its data."""
    data = drawn_data(part)
    if not data.sources:
        return
    yield from missing_keys(data)
    yield from unknown_sources(part)
    keys = [f"evaluation.{key}" for key in ("needle", "tasks", "prompts") if getattr(part.evaluation, key)]
    if keys and data.tokenizer is None and part.base_model is None:
        yield (
            f"data.tokenizer: not given, but required by {' and '.join(keys)}.\n"
            "  Set it to the tokenizer of the prepared data, or remove these keys."
        )


def _layout(recipe: Recipe, trained: Sequence[Recipe]) -> list[str]:
    """Return why the recipe fits on no number of ranks; nothing if it does, or if that depends on a base model.

    Args:
        trained: the recipe of each part and phase.
    """
    if any(one.sequence_length is None for one in trained):
        return []
    needs_gpus = {breach for one in trained for breach in rules.device_has_kernels(one, "cpu")}
    worlds = sorted({_fewest_ranks(one) for one in trained})
    worlds += [2 * worlds[-1], math.lcm(*worlds)] if len(worlds) > 1 else []
    first: list[str] = []
    for world_size in worlds:
        try:
            # Not the number of steps of the recipe: each may be a stage of its own.
            stages_of(recipe, world_size, "cpu", lambda recipe, layout: 1)
            return []
        except ConfigError as error:
            found = list(error.breaches)
        if needs_gpus.issuperset(found):
            try:
                for one in trained:
                    lay_out(one, world_size, "cuda")
                return []
            except ConfigError as error:
                found = list(error.breaches)
        first = first or found
    return first


def _fewest_ranks(recipe: Recipe) -> int:
    """Return the smallest number of ranks that holds the given sizes of the axes, those that are `auto` being 1."""
    where = recipe.distributed
    given = (where.tensor_parallel, where.context_parallel, where.pipeline_parallel, where.expert_parallel)
    tensor, context, pipeline, expert = (1 if size == "auto" else size for size in given)
    experts = expert * where.expert_tensor_parallel if recipe.moe is not None else 1
    return tensor * context * pipeline * (experts // math.gcd(experts, tensor * context))
