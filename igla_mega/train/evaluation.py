"""Evaluate a run between its steps, without changing them: held-out loss, needle, tasks and sampled text.

Every rank takes part in every forward pass, and requests are distributed over the data-parallel ranks. Each kind has
its own interval and a maximum size. Data and requests are opened before the first step, so that errors show early.
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
from igla_mega.data.prepared import bos_rule
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
    """Open what the evaluations of the stages need, the tasks on the main rank only. Every rank calls it.

    Args:
        base: checkpoint of the base model, whose tokenizer is used if the recipe names none.

    Raises:
        ConfigError: a tokenizer, a task or its data is missing, or a needle does not fit; raised on every rank.
    """
    harnesses: dict[Tasks, Harness | None] = {}
    prepared, error = [], None
    try:
        for stage, corpus in zip(stages, corpora, strict=True):
            prepared.append(_prepare(stage, corpus, base, mesh, harnesses))
    except ConfigError as refusal:
        error = refusal
    if any(stage.recipe.evaluation.tasks for stage in stages):
        # Only the main rank opens the tasks; without its error the others would wait for it in a collective.
        refusals: list[ConfigError | None] = [error]
        dist.broadcast_object_list(refusals, src=0, group=mesh.host_group)
        error = error or refusals[0]
    if error is not None:
        raise error
    return prepared


def _prepare(
    stage: Stage, corpus: Dataset, base: Path | None, mesh: Mesh, harnesses: "dict[Tasks, Harness | None]"
) -> Prepared:
    """Open what one stage needs; tasks that several stages share are opened once, in `harnesses`."""
    recipe, section = stage.recipe, stage.recipe.evaluation
    if not (section.needle or section.tasks or section.prompts):
        return NOTHING
    tokenizer = _tokenizer(recipe, base)
    haystack = None
    if section.needle is not None:
        assert isinstance(corpus, Corpus), "rules refuse a needle in anything but text"
        haystack = needle.prepare(section.needle, corpus, tokenizer, stage.layout.sequence_length, recipe.training.seed)
    for prompt in section.prompts:
        if not tokenizer.encode(prompt):
            raise ConfigError(
                f"evaluation.prompts: the tokenizer {tokenizer.path} gives no token for {prompt!r}. Use another text."
            )
    if section.tasks is not None and mesh.is_main and section.tasks not in harnesses:
        harnesses[section.tasks] = open_harness(section.tasks, tokenizer, _longest(recipe))
    return Prepared(tokenizer, haystack, harnesses.get(section.tasks) if section.tasks else None)


def _tokenizer(recipe: Recipe, base: Path | None) -> Tokenizer:
    """Return the tokenizer of the prepared data, or that of the base model.

    Raises:
        ConfigError: there is neither, or it has more ids than the model's vocabulary.
    """
    model, path = recipe.model, recipe.data.tokenizer
    assert model is not None, "a run has a model by now"
    if path is None and base is not None and (of_base := tokenizer_of(base, recipe)) is not None:
        path = str(of_base)
    if path is None:
        keys = [f"evaluation.{key}" for key in ("needle", "tasks", "prompts") if getattr(recipe.evaluation, key)]
        raise ConfigError(
            f"data.tokenizer: not given, but required by {' and '.join(keys)}.\n"
            "  Set it to the tokenizer of the prepared data, or remove these keys."
        )
    return load_tokenizer(path, model.vocab_size).with_bos(bos_rule(recipe))


def _longest(recipe: Recipe) -> int:
    """Return the maximum number of tokens that the model can take."""
    assert recipe.model is not None, "a run has a model by now"
    return recipe.model.max_position


def at_intervals(run: Run, data_step: int, progress: Progress) -> bool:
    """Run the evaluations that are due after this step; at the last step, all of them. Every rank calls it.

    Args:
        data_step: next step of the stage's data.

    Returns:
        True if anything was measured.
    """
    section, step = run.recipe.evaluation, progress.step
    last = step == run.last_step
    # `phases` measures the loss on every domain at the end of a phase.
    phase_ends = bool(run.stage.domain) and step == run.stage.last_step
    kinds: list[tuple[int, Callable[[], None]]] = []
    if not phase_ends:
        kinds.append((section.every_steps, partial(_losses, run, data_step, progress)))
    if section.needle is not None:
        kinds.append((section.needle.every_steps, partial(_needle, run, step)))
    if section.tasks is not None:
        kinds.append((section.tasks.every_steps, partial(_tasks, run, step)))
    if section.prompts:
        kinds.append((section.prompts_every_steps, partial(_samples, run, step)))
    due = [evaluate for every, evaluate in kinds if last or (every > 0 and step % every == 0)]
    for number, evaluate in enumerate(due):
        # A scheduler grants limited time after its signal: the remaining evaluations give way to the checkpoint.
        if number and run.session.stop.requested():
            break
        with scoring.undisturbed(run.engine):
            evaluate()
    return bool(due)


def _losses(run: Run, data_step: int, progress: Progress) -> None:
    """Measure and log the loss on held-out data, and how far each source was read."""
    measured = validate(run)
    log_validation(measured, run, progress)
    log_reading(run, data_step, progress)
    if progress.before and progress.step == run.stage.last_step:
        run.session.say(comparison(progress.before, measured, run.recipe.form))


def _needle(run: Run, step: int) -> None:
    """Measure and log how well the model finds a fact in a long context."""
    assert run.prepared.haystack is not None, "prepared before the first step"
    began = time.perf_counter()
    chosen, exact = needle.measure(run.engine, run.prepared.haystack)
    run.session.trackers.metrics({"step": step, "stage": run.recipe.name, "needle": chosen, "needle_exact": exact})
    run.session.say(f"step {step}: {needle.words_of(chosen, exact)}  {_took(began)}")


def _tasks(run: Run, step: int) -> None:
    """Run and log the tasks of lm-evaluation-harness."""
    began = time.perf_counter()
    values = run_tasks(run.engine, run.prepared.harness, run.recipe.training.seed)
    if isinstance(values, str):
        run.session.say(f"step {step}: evaluation.tasks: {values}; training continues")
        return
    if values:
        run.session.trackers.metrics({"step": step, "stage": run.recipe.name, "tasks": values})
    parts = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    run.session.say(f"step {step}: tasks  {parts}  {_took(began)}")


def _samples(run: Run, step: int) -> None:
    """Continue the prompts of the recipe, and log the texts."""
    began, section, tokenizer = time.perf_counter(), run.recipe.evaluation, run.prepared.tokenizer
    assert tokenizer is not None, "prepared before the first step"
    prompts = [tokenizer.encode_text(prompt) for prompt in section.prompts]
    drawn = scoring.draw(
        partial(scoring.next_tokens, run.engine, temperature=section.prompts_temperature),
        prompts,
        max_new_tokens=[section.prompts_tokens] * len(prompts),
        seed=run.recipe.training.seed,
        longest=_longest(run.recipe),
        ended=lambda _, new: new[-1] == tokenizer.eod_id,
    )
    for prompt, ids, new in zip(section.prompts, prompts, drawn, strict=True):
        # New tokens are decoded together with the prompt: alone, a first space or half a character would be lost.
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
    """Write losses and metrics on held-out data to the trackers, and show the losses."""
    if not measured:
        return
    losses = {name: values["loss"] for name, values in measured.items()}
    more = {f"{name}/{key}": one for name, values in measured.items() for key, one in values.items() if key != "loss"}
    entry = {"step": progress.step, "stage": run.recipe.name, "validation_loss": losses}
    run.session.trackers.metrics({**entry, "validation": more} if more else entry)
    unit = "nats/pair" if run.recipe.form == "preference_pairs" else "nats/token"
    parts = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    run.session.say(f"step {progress.step}: validation loss ({unit})  {parts}{_share_measured(run)}")


def _share_measured(run: Run) -> str:
    """Return a note if only a part of the held-out sequences was measured; `igla-mega eval` measures all of them."""
    counts = [run.corpus.num_validation_samples(name) for name in run.corpus.validation_names()]
    most = run.recipe.evaluation.num_batches * run.share.global_batch
    taken, total = sum(min(most, count) for count in counts), sum(counts)
    return f"  (first {taken:,} of {total:,} held-out sequences; `igla-mega eval` takes all)" if taken < total else ""


def log_reading(run: Run, data_step: int, progress: Progress) -> None:
    """Write and show how many tokens and epochs of each source of text have been read."""
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
    """Return what the stage has changed on held-out data, one line per source."""
    lines = []
    for name, values in after.items():
        if (old := before.get(name)) is None:
            continue
        if form == "preference_pairs":
            lines.append(
                f"{name}: the chosen answer is more likely in {old['dpo_preferred']:.1%} of held-out pairs before, in "
                f"{values['dpo_preferred']:.1%} after; reward margin {values['dpo_margin']:+.3f}"
            )
        else:
            what = "held-out answers" if form == "instructions" else "held-out text"
            lines.append(
                f"{name}: loss on {what} {old['loss']:.3f} nats/token before, {values['loss']:.3f} after "
                f"(perplexity {math.exp(old['loss']):.1f} before, {math.exp(values['loss']):.1f} after)"
            )
    return "\n".join(lines)


def validate(run: Run) -> dict[str, dict[str, float]]:
    """Return loss (nats per target token, or per pair) and the objective's metrics on each source's held-out part."""
    measured = {}
    for name in run.corpus.validation_names():
        num_samples = run.corpus.num_validation_samples(name)
        num_batches = min(run.recipe.evaluation.num_batches, -(-num_samples // run.share.global_batch))
        batches = on_device(run.corpus.validation_batches(name, run.share, num_batches), run.session.device)
        measured[name] = measure(run.engine, batches, num_batches)
    return measured
