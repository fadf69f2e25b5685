"""A checkpoint's loss and perplexity on whole data sets, in one process; its scores on tasks, on any ranks."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from igla_mega.checkpoint.folder import TOKENIZER, read_recipe, resolve_checkpoint, tokenizer_of
from igla_mega.checkpoint.load_model import load_model, single_process_layout
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe, Tasks
from igla_mega.data.batches import BatchShard, Dataset, on_device, split_point
from igla_mega.data.conversations import Pairs
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.prepared import source_prefixes
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.distributed import host
from igla_mega.distributed.mesh import build_mesh, destroy_process_groups, init_process_groups, single_process_mesh
from igla_mega.engine.build import frozen_chunks, open_dataset
from igla_mega.engine.step import Engine
from igla_mega.evaluate.tasks import open_harness, run_tasks
from igla_mega.model.build import CausalLM
from igla_mega.model.output import TokenLogProbs
from igla_mega.objective import language
from igla_mega.plan.choose import choose_layout

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens that go through the model at once."""

Part = tuple[IndexedReader, int, int]
"""A data set and the tokens [first, end) of its stream."""


def evaluate(checkpoint: Path, prefixes: Mapping[str, str | Path] | None = None) -> dict[str, tuple[float, float, int]]:
    """Measure a checkpoint on whole data sets.

    Args:
        checkpoint: a checkpoint, a run folder or its `checkpoints`.
        prefixes: name -> path without .bin and .idx; None takes what the checkpoint's recipe held out of each source.

    Returns:
        By name: loss in nats per target token, perplexity, number of target tokens. Of conversations the targets are
        the assistant's tokens; of pairs both answers are measured, each under its own name.

    Raises:
        ConfigError: no such checkpoint, a data set that does not open or holds less than two tokens, or none held
            out.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    recipe = read_recipe(checkpoint)
    assert recipe.model is not None and recipe.sequence_length is not None, "read_recipe refuses that"
    vocab_size = recipe.model.vocab_size
    samples = open_dataset(recipe, recipe.sequence_length) if prefixes is None and recipe.form != "text" else None
    parts = {}
    if samples is None:
        parts = _held_out(recipe, vocab_size) if prefixes is None else _whole(prefixes, vocab_size)
    bf16 = torch.cuda.is_available() and recipe.distributed.precision != "FP32"

    results = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    try:
        model, _ = load_model(checkpoint, dtype=torch.bfloat16 if bf16 else torch.float32)
        with Progress(*columns, console=Console(stderr=True)) as progress:
            for name, part in parts.items():
                task = progress.add_task(name, total=part[2] - part[1] - 1)
                loss_sum, num_targets = 0.0, 0
                for batch_sum, batch_targets in losses(model, part, recipe.sequence_length):
                    loss_sum, num_targets = loss_sum + batch_sum, num_targets + batch_targets
                    progress.advance(task, batch_targets)
                loss = loss_sum / num_targets
                results[name] = (loss, perplexity(loss), num_targets)
            if samples is not None:
                for name in samples.validation_names():
                    results |= _of_samples(model, samples, name, progress)
    finally:
        destroy_process_groups()
    return results


def evaluate_tasks(checkpoint: Path, asked: Tasks) -> dict[str, float]:
    """Run tasks of lm-evaluation-harness on a checkpoint, on all ranks of this world, each of which calls it.

    Returns:
        `task/metric` -> value, on the main rank; nothing on the others.

    Raises:
        ConfigError: no such checkpoint or task, the task's data is not here, or lm-eval is not installed.
        RuntimeError: a task's own code failed.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    recipe = read_recipe(checkpoint)
    assert recipe.model is not None, "read_recipe refuses that"
    path = tokenizer_of(checkpoint, recipe)
    if path is None:
        raise ConfigError(
            f"{checkpoint}: its tokenizer ({recipe.data.tokenizer or 'none given'}) is not there.\n"
            f"  Copy the Hugging Face tokenizer folder of its training data to {checkpoint / TOKENIZER}."
        )
    tokenizer = load_tokenizer(path, recipe.model.vocab_size)
    device = host.prepare()
    init_process_groups(device, recipe.distributed.timeout_seconds)
    try:
        harness = None
        refusals: list[ConfigError | None] = [None]
        if dist.get_rank() == 0:
            try:
                harness = open_harness(asked, tokenizer, recipe.model.max_position, place="--tasks")
            except ConfigError as error:
                refusals = [error]
        dist.broadcast_object_list(refusals, src=0, group=dist.new_group(backend="gloo"))
        if (refusal := refusals[0]) is not None:
            raise refusal
        with torch.no_grad():
            values = run_tasks(_engine(checkpoint, recipe, device), harness, recipe.training.seed)
    finally:
        destroy_process_groups()
    if isinstance(values, str):
        raise RuntimeError(f"--tasks: {values}")
    return values


def _engine(checkpoint: Path, recipe: Recipe, device: torch.device) -> Engine:
    """What runs forward passes of a checkpoint's model in this world; it has no optimizer and takes no step."""
    ranks, length = dist.get_world_size(), recipe.sequence_length
    assert recipe.model is not None and length is not None, "read_recipe refuses that"
    if ranks == 1:
        bf16 = device.type == "cuda" and recipe.distributed.precision != "FP32"
        model, _ = load_model(checkpoint, dtype=torch.bfloat16 if bf16 else torch.float32)
        layout = replace(
            single_process_layout(recipe.model), micro_batch_size=max(1, BATCH_TOKENS[device.type] // length)
        )
        layout = replace(layout, sequence_length=length)
        return Engine(single_process_mesh(layout, device, 0), layout, [model], None)  # type: ignore[arg-type]
    if recipe.lora is not None:
        raise ConfigError(
            f"{checkpoint}: holds adapters, which are evaluated in one process.\n"
            "  Leave --nproc out, or merge them first: `export --merge`, then `import`."
        )
    # As it was trained, but for what only training needs.
    training = recipe.training.model_copy(
        update={"batch_size": ranks, "gradient_accumulation": None, "total_steps": 1, "epochs": None}
    )
    recipe = recipe.model_copy(update={"training": training, "curriculum": None})
    layout = choose_layout(recipe, ranks, device.type)
    layout = replace(layout, micro_batch_size=max(1, BATCH_TOKENS[device.type] // length))
    mesh = build_mesh(layout, recipe.training.seed)
    chunks = frozen_chunks(recipe, layout, mesh, device, checkpoint)
    return Engine(mesh, layout, chunks, None)  # type: ignore[arg-type]


def perplexity(loss: float) -> float:
    """e to the loss; inf where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.inference_mode()
def losses(model: CausalLM, part: Part, sequence_length: int) -> Iterator[tuple[float, int]]:
    """Yield (summed loss in nats, number of targets) of one batch of windows after the other.

    Windows lie end to end: the last label of one is the first token of the next. So every token but the first is a
    target once, and the last window is as long as what is left.
    """
    model.eval()
    device = next(model.parameters()).device
    windows_at_once = max(1, BATCH_TOKENS[device.type] // sequence_length)
    for rows in _windows(part, sequence_length, windows_at_once):
        batch = torch.from_numpy(rows.astype(np.int64)).to(device)
        tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        positions = torch.arange(tokens.size(1), device=device).expand_as(tokens)
        mask = torch.ones(tokens.shape, device=device)
        loss_sum = model(tokens, positions, None, labels=labels, loss_mask=mask)
        yield float(loss_sum), labels.numel()


@torch.inference_mode()
def _of_samples(
    model: CausalLM, samples: Dataset, name: str, progress: Progress
) -> dict[str, tuple[float, float, int]]:
    """The held-out conversations of a source, or both answers of its pairs."""
    model.eval()
    model.output = TokenLogProbs()
    device = next(model.parameters()).device
    pairs = isinstance(samples, Pairs)
    # Alone, a pair fills its batch: none is measured twice.
    share = BatchShard(*([1 if pairs else max(1, BATCH_TOKENS[device.type] // samples.sequence_length)] * 2))
    num_batches = -(-samples.num_validation_samples(name) // share.global_batch)
    task = progress.add_task(name, total=num_batches)
    kinds = [f"{name}, chosen", f"{name}, rejected"] if pairs else [name]
    sums = torch.zeros(len(kinds), 2, dtype=torch.float64)
    for batch in on_device(samples.validation_batches(name, share, num_batches), device):
        output = language.run(batch, model)
        rows = torch.stack([-output.sum(0), batch.loss_mask.sum(1)], 1).double().cpu()
        sums += rows.view(-1, len(kinds), 2).sum(0)
        progress.advance(task)
    return {
        kind: (loss / targets, perplexity(loss / targets), int(targets))
        for kind, (loss, targets) in zip(kinds, sums.tolist(), strict=True)
    }


def _windows(part: Part, sequence_length: int, at_once: int) -> Iterator[np.ndarray]:
    reader, first, end = part
    while end - first > 1:
        num_rows = min(at_once, (end - first - 1) // sequence_length)
        length = sequence_length if num_rows else end - first - 1
        stop = first + max(num_rows, 1) * length
        if error := reader.out_of_range(first, stop + 1):
            raise error
        stream = reader.tokens(first, stop + 1)
        yield np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]
        first = stop


def _held_out(recipe: Recipe, vocab_size: int) -> dict[str, Part]:
    if recipe.data.validation_fraction == 0:
        raise ConfigError(
            "data.validation_fraction: 0, so the run held nothing out to evaluate on.\n  Give data sets with --data."
        )
    parts = {}
    for name, prefix in source_prefixes(recipe.data).items():
        reader = IndexedReader(prefix, vocab_size)
        parts[name] = (reader, split_point(name, reader, recipe.data.validation_fraction), reader.num_tokens)
    return _measurable(parts)


def _whole(prefixes: Mapping[str, str | Path], vocab_size: int) -> dict[str, Part]:
    readers = {name: IndexedReader(prefix, vocab_size) for name, prefix in prefixes.items()}
    return _measurable({name: (reader, 0, reader.num_tokens) for name, reader in readers.items()})


def _measurable(parts: dict[str, Part]) -> dict[str, Part]:
    short = {name: end - first for name, (_, first, end) in parts.items() if end - first < 2}
    if short:
        raise ConfigError(
            *[
                f"{name}: {count} tokens to evaluate on; a loss needs 2.\n  Leave it out, or give it more text."
                for name, count in short.items()
            ]
        )
    return parts
