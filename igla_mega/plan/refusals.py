"""What `train` refuses before its first step by the recipe alone: `check` and `train` ask the same function.

Rules between the keys of one recipe are in `config.rules`. Here they are applied to what is trained, which `sft:`,
`dpo:`, phases and stages change; and what depends on the files of the recipe's data section is added.
"""

from collections.abc import Iterator

from igla_mega.config import rules
from igla_mega.config.schema import Recipe
from igla_mega.data.prepared import missing_keys, unknown_sources
from igla_mega.layout.stages import drawn_data, parts_of, phase_recipe


def refusals(recipe: Recipe) -> list[str]:
    """Return every breach of a recipe that can be known without its data, its base model and the ranks of the run."""
    found = [*rules.breaches(recipe), *rules.not_yet(recipe), *rules.not_installed(recipe)]
    for i, part in enumerate(parts_of(recipe)):
        place = f"stages.{i}." if recipe.stages is not None else ""
        found += [place + breach for breach in _of_part(part)]
    return list(dict.fromkeys(found))


def _of_part(part: Recipe) -> Iterator[str]:
    """Yield the breaches of what one part trains."""
    yield from rules.breaches(part)
    for phase in part.curriculum.phases if part.curriculum is not None else ():
        own = phase_recipe(part, phase)
        yield from rules.breaches(own)
        if (steps := _known_steps(own, phase.tokens)) is not None and own.num_warmup_steps(steps) > steps:
            yield warmup_breach(own.num_warmup_steps(steps), steps, phase.name)
    data = drawn_data(part)
    # A recipe without any source is complete but for its data: `check` notes that.
    if data.sources:
        yield from missing_keys(data)
        yield from unknown_sources(part)
    evaluation = part.evaluation
    keys = [f"evaluation.{key}" for key in ("needle", "tasks", "prompts") if getattr(evaluation, key)]
    if keys and data.sources and data.tokenizer is None and part.base_model is None:
        yield (
            f"data.tokenizer: not given, but required by {' and '.join(keys)}.\n"
            "  Set it to the tokenizer of the prepared data, or remove these keys."
        )


def _known_steps(recipe: Recipe, tokens: int) -> int | None:
    """Return the number of steps of a phase; None if its batch depends on the number of ranks or the base model."""
    training, length = recipe.training, recipe.sequence_length
    if length is None or (training.batch_tokens is None and training.gradient_accumulation is not None):
        return None
    return -(-tokens // (training.batch_tokens or int(training.batch_size) * length))


def warmup_breach(warmup: int, steps: int, phase: str) -> str:
    """Return the error for a warm-up that is longer than a phase."""
    return (
        f"training.warmup_steps: {warmup} is more than the {steps} steps of phase {phase}.\n"
        "  Use fewer, or training.warmup_ratio, which is relative to each phase."
    )
