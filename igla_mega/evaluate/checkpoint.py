"""Measure a checkpoint: loss and perplexity on data sets in one process, scores on tasks on any number of ranks."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from igla_mega.checkpoint.folder import TOKENIZER, bos_rule_of, read_recipe, resolve_checkpoint, tokenizer_of
from igla_mega.checkpoint.load_model import load_model, single_process_layout
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe, Tasks
from igla_mega.data.batches import BatchShard, Dataset, on_device
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.prepared import source_prefixes
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.data.tuning.conversations import Pairs
from igla_mega.data.windows import split_point
from igla_mega.distributed import host
from igla_mega.distributed.mesh import build_mesh, destroy_process_groups, init_process_groups, single_process_mesh
from igla_mega.engine.build import frozen_chunks, open_dataset
from igla_mega.engine.step import Engine
from igla_mega.evaluate.bar import counting
from igla_mega.evaluate.tasks import open_harness, run_tasks
from igla_mega.layout.layout import Layout
from igla_mega.layout.stages import drawn_data
from igla_mega.model.build import CausalLM
from igla_mega.model.output import TokenLogProbs
from igla_mega.objective import language

BATCH_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Number of tokens in one forward pass, by device type."""

Part = tuple[IndexedReader, int, int]
"""Data set and the range [first, end) of its token stream to measure."""
LayoutChooser = Callable[[Recipe, int, str], Layout]
"""Function of a recipe, a number of ranks and a device type that returns a layout: `plan.choose.choose_layout`.

The planner is passed in by the caller, so that this package does not import it."""


def evaluate(checkpoint: Path, prefixes: Mapping[str, str | Path] | None = None) -> dict[str, tuple[float, float, int]]:
    """Measure a checkpoint on whole data sets.

    Args:
        checkpoint: a checkpoint, a run folder or its `checkpoints`.
        prefixes: name -> path without .bin and .idx; None measures the part of each source that the checkpoint's
            recipe held out.

    Returns:
        By name: loss in nats per target token, perplexity, number of target tokens. In conversations the targets are
        the assistant's tokens; of preference pairs both answers are measured, each under a separate name.

    Raises:
        ConfigError: the checkpoint does not exist, a data set cannot be opened or has fewer than two tokens, or the run
            held nothing out.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    recipe = read_recipe(checkpoint)
    if prefixes is None and not recipe.data.sources and recipe.data.validation_fraction > 0:
        raise ConfigError(
            f"--data: not given, and {checkpoint} names no data of its own (data.sources in its recipe.yaml).\n"
            "  Give indexed datasets with --data PREFIX, or tasks with --tasks NAME."
        )
    assert recipe.model is not None and recipe.sequence_length is not None, "read_recipe refuses a recipe without them"
    vocab_size = recipe.model.vocab_size
    samples = open_dataset(recipe, recipe.sequence_length) if prefixes is None and recipe.form != "text" else None
    parts = {}
    if samples is None:
        parts = _held_out(recipe, vocab_size) if prefixes is None else _whole(prefixes, vocab_size)
    bf16 = torch.cuda.is_available() and recipe.distributed.precision != "FP32"

    results = {}
    try:
        model, _ = load_model(checkpoint, dtype=torch.bfloat16 if bf16 else torch.float32)
        for name, part in parts.items():
            loss_sum, num_targets = 0.0, 0
            with counting(name, part[2] - part[1] - 1, "tokens") as advance:
                for batch_sum, batch_targets in losses(model, part, recipe.sequence_length):
                    loss_sum, num_targets = loss_sum + batch_sum, num_targets + batch_targets
                    advance(batch_targets)
            loss = loss_sum / num_targets
            results[name] = (loss, perplexity(loss), num_targets)
        if samples is not None:
            for name in samples.validation_names():
                results |= _sample_losses(model, samples, name)
    finally:
        destroy_process_groups()
    return results


def evaluate_tasks(checkpoint: Path, settings: Tasks, choose_layout: LayoutChooser) -> dict[str, float]:
    """Run tasks of lm-evaluation-harness on a checkpoint. Collective: every rank of the world must call it.

    Args:
        choose_layout: lays the model out where there is more than one rank.

    Returns:
        `task/metric` -> value on the main rank; an empty dictionary on the others.

    Raises:
        ConfigError: the checkpoint, a task or its data does not exist, or lm-eval is not installed.
        RuntimeError: a task's own code failed.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    recipe = read_recipe(checkpoint)
    assert recipe.model is not None, "read_recipe refuses a recipe without a model"
    path = tokenizer_of(checkpoint, recipe)
    if path is None:
        raise ConfigError(
            f"{checkpoint}: the tokenizer ({recipe.data.tokenizer or 'none given'}) does not exist.\n"
            f"  Copy the Hugging Face tokenizer folder of the training data to {checkpoint / TOKENIZER}."
        )
    tokenizer = load_tokenizer(path, recipe.model.vocab_size).with_bos(bos_rule_of(checkpoint, recipe))
    device = host.prepare()
    init_process_groups(device, recipe.distributed.timeout_seconds)
    try:
        harness = None
        # Only the main rank opens the tasks. A refusal is broadcast, or the other ranks would wait in the first forward
        # pass until the collective times out.
        refusals: list[ConfigError | None] = [None]
        if dist.get_rank() == 0:
            try:
                harness = open_harness(settings, tokenizer, recipe.model.max_position, place="--tasks")
            except ConfigError as error:
                refusals = [error]
        dist.broadcast_object_list(refusals, src=0, group=dist.new_group(backend="gloo"))
        if (refusal := refusals[0]) is not None:
            raise refusal
        with torch.no_grad():
            engine = _forward_engine(checkpoint, recipe, device, choose_layout)
            values = run_tasks(engine, harness, recipe.training.seed)
    finally:
        destroy_process_groups()
    if isinstance(values, str):
        raise RuntimeError(f"--tasks: {values}")
    return values


def _forward_engine(checkpoint: Path, recipe: Recipe, device: torch.device, choose_layout: LayoutChooser) -> Engine:
    """Build an engine of the checkpoint's model for forward passes on this world; it has no optimizer."""
    ranks, length = dist.get_world_size(), recipe.sequence_length
    assert recipe.model is not None and length is not None, "read_recipe refuses a recipe without them"
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
            f"{checkpoint}: contains adapters, which are evaluated in one process only.\n"
            "  Omit --nproc, or merge the adapters first: `export --merge`, then `import`."
        )
    # The layout rules also check the batch and the schedule, which a forward pass does not use: any values that pass on
    # this number of ranks will do.
    training = {"batch_size": ranks, "gradient_accumulation": None, "total_steps": 1, "epochs": None}
    recipe = recipe.with_keys({f"training.{key}": value for key, value in training.items()} | {"curriculum": None})
    layout = choose_layout(recipe, ranks, device.type)
    layout = replace(layout, micro_batch_size=max(1, BATCH_TOKENS[device.type] // length))
    mesh = build_mesh(layout, recipe.training.seed)
    chunks = frozen_chunks(recipe, layout, mesh, device, checkpoint)
    return Engine(mesh, layout, chunks, None)  # type: ignore[arg-type]


def perplexity(loss: float) -> float:
    """Return exp(loss) of a loss in nats; inf where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.inference_mode()
def losses(model: CausalLM, part: Part, sequence_length: int) -> Iterator[tuple[float, int]]:
    """Yield (summed loss in nats, number of targets) for each batch of windows.

    Windows are adjacent: the last label of one is the first token of the next. So every token but the first is a
    target exactly once, and the last window has the length of the remainder.
    """
    model.eval()
    device = next(model.parameters()).device
    windows_at_once = max(1, BATCH_TOKENS[device.type] // sequence_length)
    for rows in _windows(part, sequence_length, windows_at_once):
        batch = torch.from_numpy(rows.astype(np.int64)).to(device)
        tokens, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()  # [B, S]
        positions = torch.arange(tokens.size(1), device=device).expand_as(tokens)
        mask = torch.ones(tokens.shape, device=device)
        loss_sum = model(tokens, positions, None, labels=labels, loss_mask=mask)
        yield float(loss_sum), labels.numel()


@torch.inference_mode()
def _sample_losses(model: CausalLM, samples: Dataset, name: str) -> dict[str, tuple[float, float, int]]:
    """Measure the held-out conversations of a source, or both answers of its preference pairs.

    Returns:
        As `evaluate`.
    """
    model.eval()
    model.output = TokenLogProbs()
    device = next(model.parameters()).device
    pairs = isinstance(samples, Pairs)
    share = BatchShard(*([max(1, BATCH_TOKENS[device.type] // (samples.sequence_length * (1 + pairs)))] * 2))
    num_batches = -(-samples.num_validation_samples(name) // share.global_batch)
    kinds = [f"{name}, chosen", f"{name}, rejected"] if pairs else [name]
    sums = torch.zeros(len(kinds), 2, dtype=torch.float64)
    with counting(name, num_batches, "batches") as advance:
        for batch in on_device(samples.validation_batches(name, share, num_batches), device):
            output = language.run(batch, model)  # [S, B], log-probabilities
            rows = torch.stack([-output.sum(0), batch.loss_mask.sum(1)], 1).double().cpu()
            sums += rows.view(-1, len(kinds), 2).sum(0)
            advance(1)
    return {
        kind: (loss / targets, perplexity(loss / targets), int(targets))
        for kind, (loss, targets) in zip(kinds, sums.tolist(), strict=True)
    }


def _windows(part: Part, sequence_length: int, at_once: int) -> Iterator[np.ndarray]:
    """Yield token ids [windows, length + 1], at most `at_once` windows each; the last one may be shorter."""
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
    """Return the part of each source that the run held out of training."""
    if recipe.data.validation_fraction == 0:
        raise ConfigError(
            "data.validation_fraction: 0, so the run held out no data to evaluate on.\n  Give data sets with --data."
        )
    parts = {}
    for name, prefix in source_prefixes(drawn_data(recipe)).items():
        reader = IndexedReader(prefix, vocab_size)
        parts[name] = (reader, split_point(name, reader, recipe.data.validation_fraction), reader.num_tokens)
    return _measurable(parts)


def _whole(prefixes: Mapping[str, str | Path], vocab_size: int) -> dict[str, Part]:
    """Return the whole token stream of each data set."""
    readers = {name: IndexedReader(prefix, vocab_size) for name, prefix in prefixes.items()}
    return _measurable({name: (reader, 0, reader.num_tokens) for name, reader in readers.items()})


def _measurable(parts: dict[str, Part]) -> dict[str, Part]:
    """Return the parts unchanged, or raise ConfigError if one has fewer than two tokens."""
    short = {name: end - first for name, (_, first, end) in parts.items() if end - first < 2}
    if short:
        raise ConfigError(
            *[
                f"{name}: {count} tokens to evaluate on; a loss needs at least 2.\n  Omit it, or add text to it."
                for name, count in short.items()
            ]
        )
    return parts
