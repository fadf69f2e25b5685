"""What is measured between steps and changes none of them: held-out loss, needle, tasks, sampled text.

Every rank takes part in every forward pass, and requests are spread over the data-parallel ranks. Each kind has an
interval of its own and a bound on what it asks; data and requests are opened before the first step.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from igla_mega.checkpoint.folder import tokenizer_of
from igla_mega.checkpoint.progress import Progress
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe, Tasks
from igla_mega.data.batches import Corpus, Dataset, on_device
from igla_mega.data.tokenizer import Tokenizer, load_tokenizer
from igla_mega.distributed.mesh import Mesh
from igla_mega.engine.step import measure
from igla_mega.evaluate import needle, scoring
from igla_mega.evaluate.tasks import open_harness, run_tasks
from igla_mega.layout.stages import Stage
from igla_mega.train.state import NOTHING, Prepared, Run

if TYPE_CHECKING:
    from igla_mega.evaluate.harness import Harness


def prepare(stages: Sequence[Stage], corpora: Sequence[Dataset], base: Path | None, mesh: Mesh) -> list[Prepared]:
    """Open what the stages' evaluations read, the tasks on the main rank alone. Every rank calls it.

    Args:
        base: checkpoint of the base model, whose tokenizer serves where the recipe names none.

    Raises:
        ConfigError: a tokenizer, a task or its data is missing, or a needle does not fit; on every rank alike.
    """
    harnesses: dict[Tasks, Harness | None] = {}
    prepared, error = [], None
    try:
        for stage, corpus in zip(stages, corpora, strict=True):
            prepared.append(_prepare(stage, corpus, base, mesh, harnesses))
    except ConfigError as refusal:
        error = refusal
    if any(stage.recipe.evaluation.tasks for stage in stages):
        # Only the main rank has opened the tasks.
        refusals: list[ConfigError | None] = [error]
        dist.broadcast_object_list(refusals, src=0, group=mesh.host_group)
        error = error or refusals[0]
    if error is not None:
        raise error
    return prepared


def _prepare(
    stage: Stage, corpus: Dataset, base: Path | None, mesh: Mesh, harnesses: "dict[Tasks, Harness | None]"
) -> Prepared:
    recipe, asked = stage.recipe, stage.recipe.evaluation
    if not (asked.needle or asked.tasks or asked.prompts):
        return NOTHING
    tokenizer = _tokenizer(recipe, base)
    haystack = None
    if asked.needle is not None:
        assert isinstance(corpus, Corpus), "rules refuse a needle in anything but text"
        haystack = needle.prepare(asked.needle, corpus, tokenizer, stage.layout.sequence_length, recipe.training.seed)
    for prompt in asked.prompts:
        if not tokenizer.encode(prompt):
            raise ConfigError(f"evaluation.prompts: the tokenizer {tokenizer.path} makes no token of {prompt!r}.")
    if asked.tasks is not None and mesh.is_main and asked.tasks not in harnesses:
        harnesses[asked.tasks] = open_harness(asked.tasks, tokenizer, _longest(recipe))
    return Prepared(tokenizer, haystack, harnesses.get(asked.tasks) if asked.tasks else None)


def _tokenizer(recipe: Recipe, base: Path | None) -> Tokenizer:
    model, path = recipe.model, recipe.data.tokenizer
    assert model is not None, "a run has a model by now"
    if path is None and base is not None and (beside := tokenizer_of(base, recipe)) is not None:
        path = str(beside)
    if path is None:
        keys = [f"evaluation.{key}" for key in ("needle", "tasks", "prompts") if getattr(recipe.evaluation, key)]
        raise ConfigError(
            f"data.tokenizer: not given, and {' and '.join(keys)} make tokens of text.\n"
            "  Name the tokenizer of the prepared data, or leave them out."
        )
    return load_tokenizer(path, model.vocab_size)


def _longest(recipe: Recipe) -> int:
    assert recipe.model is not None, "a run has a model by now"
    return recipe.model.max_position


def at_intervals(run: Run, data_step: int, progress: Progress) -> bool:
    """Measure what is due after this step, or at the end. Every rank calls it.

    Args:
        data_step: the stage's next step.

    Returns:
        Whether anything was measured.
    """
    asked, step = run.recipe.evaluation, progress.step
    last = step == run.last_step
    # The end of a phase has an evaluation of the loss of its own, of every domain so far.
    phase_ends = bool(run.stage.domain) and step == run.stage.last_step
    kinds: list[tuple[int, Callable[[], None]]] = []
    if not phase_ends:
        kinds.append((asked.every_steps, partial(_losses, run, data_step, progress)))
    if asked.needle is not None:
        kinds.append((asked.needle.every_steps, partial(_needle, run, step)))
    if asked.tasks is not None:
        kinds.append((asked.tasks.every_steps, partial(_tasks, run, step)))
    if asked.prompts:
        kinds.append((asked.prompts_every_steps, partial(_samples, run, step)))
    due = [evaluate for every, evaluate in kinds if last or (every > 0 and step % every == 0)]
    for number, evaluate in enumerate(due):
        if number and run.session.stop.requested():  # who asks for a stop does not wait for the rest
            break
        with scoring.undisturbed(run.engine):
            evaluate()
    return bool(due)


def _losses(run: Run, data_step: int, progress: Progress) -> None:
    measured = validate(run)
    log_validation(measured, run, progress)
    log_reading(run, data_step, progress)
    if progress.before and progress.step == run.stage.last_step:
        run.session.say(comparison(progress.before, measured, run.recipe.form))


def _needle(run: Run, step: int) -> None:
    assert run.prepared.haystack is not None, "prepared before the first step"
    began = time.perf_counter()
    chosen, exact = needle.measure(run.engine, run.prepared.haystack)
    run.session.trackers.metrics({"step": step, "stage": run.recipe.name, "needle": chosen, "needle_exact": exact})
    run.session.say(f"step {step}: {needle.words_of(chosen, exact)}  {_took(began)}")


def _tasks(run: Run, step: int) -> None:
    began = time.perf_counter()
    values = run_tasks(run.engine, run.prepared.harness, run.recipe.training.seed)
    if isinstance(values, str):
        run.session.say(f"step {step}: evaluation.tasks: {values}; training goes on")
        return
    if values:
        run.session.trackers.metrics({"step": step, "stage": run.recipe.name, "tasks": values})
    parts = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    run.session.say(f"step {step}: tasks  {parts}  {_took(began)}")


def _samples(run: Run, step: int) -> None:
    began, asked, tokenizer = time.perf_counter(), run.recipe.evaluation, run.prepared.tokenizer
    assert tokenizer is not None, "prepared before the first step"
    prompts = [tokenizer.encode(prompt) for prompt in asked.prompts]
    drawn = scoring.draw(
        partial(scoring.next_tokens, run.engine, temperature=asked.prompts_temperature),
        prompts,
        max_new_tokens=[asked.prompts_tokens] * len(prompts),
        seed=run.recipe.training.seed,
        longest=_longest(run.recipe),
        ended=lambda _, new: new[-1] == tokenizer.eod_id,
    )
    for prompt, ids, new in zip(asked.prompts, prompts, drawn, strict=True):
        known = tokenizer.decode(ids, skip_special_tokens=True)
        text = tokenizer.decode([*ids, *new], skip_special_tokens=True)[len(known) :]
        run.session.trackers.sample({"step": step, "stage": run.recipe.name, "prompt": prompt, "text": text})
    run.session.say(f"step {step}: continued {len(prompts)} prompts (samples.jsonl)  {_took(began)}")


def _took(began: float) -> str:
    return f"({time.perf_counter() - began:.1f} s)"


def log_validation(
    measured: dict[str, dict[str, float]],
    run: Run,
    progress: Progress,
) -> None:
    """Write down and show what was measured on held-out data."""
    if not measured:
        return
    losses = {name: values["loss"] for name, values in measured.items()}
    more = {f"{name}/{key}": one for name, values in measured.items() for key, one in values.items() if key != "loss"}
    entry = {"step": progress.step, "stage": run.recipe.name, "validation_loss": losses}
    run.session.trackers.metrics({**entry, "validation": more} if more else entry)
    unit = "nats/pair" if run.recipe.form == "preference_pairs" else "nats/token"
    parts = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    run.session.say(f"step {progress.step}: validation loss ({unit})  {parts}")


def log_reading(run: Run, data_step: int, progress: Progress) -> None:
    """Write down and show how far each source of text has been read."""
    if not isinstance(run.corpus, Corpus):
        return
    read = run.corpus.read_until(data_step, run.share.global_batch)
    tokens = {name: count for name, (count, _) in read.items()}
    epochs = {name: round(passes, 4) for name, (_, passes) in read.items() if passes is not None}
    entry = {"step": progress.step, "stage": run.recipe.name}
    run.session.trackers.metrics({**entry, "read_tokens": tokens, "read_epochs": epochs})
    parts = [
        f"{name} {count / 1e6:,.4g}M" + (f" ({passes:.3g})" if passes is not None else "")
        for name, (count, passes) in read.items()
    ]
    run.session.say(f"step {progress.step}: read, tokens (epochs)  {'  '.join(parts)}")


def comparison(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]], form: str) -> str:
    """What the stage has changed on held-out data, in a line for each source."""
    lines = []
    for name, values in after.items():
        if (old := before.get(name)) is None:
            continue
        if form == "preference_pairs":
            lines.append(
                f"{name}: the chosen answer is the likelier one in {old['dpo_preferred']:.1%} of held-out pairs "
                f"before, in {values['dpo_preferred']:.1%} after; margin of the rewards {values['dpo_margin']:+.3f}"
            )
        else:
            what = "held-out answers" if form == "instructions" else "held-out text"
            lines.append(
                f"{name}: {what} cost {old['loss']:.3f} nats/token before, {values['loss']:.3f} after "
                f"(perplexity {math.exp(old['loss']):.1f} before, {math.exp(values['loss']):.1f} after)"
            )
    return "\n".join(lines)


def validate(run: Run) -> dict[str, dict[str, float]]:
    """Loss (nats per target token, or per pair) and the objective's metrics on the held-out part of each source."""
    measured = {}
    for name in run.corpus.validation_names():
        num_samples = run.corpus.num_validation_samples(name)
        num_batches = min(run.recipe.evaluation.num_batches, -(-num_samples // run.share.global_batch))
        batches = on_device(run.corpus.validation_batches(name, run.share, num_batches), run.session.device)
        measured[name] = measure(run.engine, batches, num_batches)
    return measured
