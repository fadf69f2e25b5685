"""Build what a rank trains with from a recipe: its part of the model, its optimizer, and its data."""

from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from igla_mega.checkpoint import frozen_base, store
from igla_mega.checkpoint.load import load_states, load_weights, spread_masters
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import Corpus, Dataset, Sampling
from igla_mega.data.prepared import sample_prefixes, source_prefixes
from igla_mega.data.tuning.conversations import Conversations, Pairs
from igla_mega.distributed.mesh import Mesh
from igla_mega.engine import ddp, fsdp
from igla_mega.engine.step import Engine
from igla_mega.layout.layout import Layout
from igla_mega.model import build, lora
from igla_mega.model.output import Output, SummedLoss, TokenLogProbs
from igla_mega.model.shards import Shards, local_runs, named_shards, shards_of
from igla_mega.model.spec import DTYPES, fp8_settings, graph_settings, use_transformer_engine


def build_engine(
    recipe: Recipe,
    layout: Layout,
    mesh: Mesh,
    device: torch.device,
    *,
    initialize: bool = True,
    base: Path | None = None,
) -> tuple[Engine, Shards]:
    """Build this rank's model and optimizer.

    Args:
        initialize: set the weights to their initial values; False if those of a checkpoint are loaded later.
        base: checkpoint of the frozen weights if adapters train; the adapters get their initial values here.

    Returns:
        The engine, and the shard of the whole model that each parameter holds.
    """
    model, dtype = recipe.model, DTYPES[recipe.distributed.precision]
    assert model is not None, "resolved before"
    sharded, seed = layout.strategy == "FSDP", recipe.training.seed
    chunks, shards, config, switch = _chunks(recipe, layout, mesh, device, base)

    def fill() -> None:
        """Set the initial weights; called as soon as the parameters have memory."""
        if initialize:
            build.initialize(local_runs(chunks, shards), model, seed)
        if recipe.lora is not None:
            frozen_base.fill(chunks, shards, recipe.lora, model, base, seed)

    if sharded:
        # FSDP allocates after sharding, so that no rank ever holds the whole model.
        fsdp.wrap(chunks[0], mesh, dtype, device)
        fill()
        optimizer = fsdp.ShardedAdamW(chunks[0], shards, mesh, config, recipe.training, recipe.optimizer)
        return Engine(mesh, layout, chunks, optimizer, adapters=switch), shards

    build.materialize(chunks, device)
    fill()
    wrapped = ddp.wrap(
        chunks,
        config,
        distributed_optimizer=layout.distributed_optimizer and mesh.data_context.size > 1,
        overlap=_overlaps(recipe, device),
    )
    adam = ddp.MegatronAdamW(wrapped, shards, mesh, config, recipe.training, recipe.optimizer)
    if dtype != torch.float32 and (initialize or recipe.lora is not None):
        # mcore copies its fp32 masters from the rounded bf16 weights: set them to the exact initial values.
        masters = [(state.shard, state.values["master"], state.start) for state in adam.states()]
        if recipe.lora is None:
            build.initialize(masters, model, seed)
        elif recipe.lora.adapter is None:
            lora.initialize(masters, seed)
    return Engine(mesh, layout, wrapped, adam, adapters=switch), shards


def _chunks(
    recipe: Recipe, layout: Layout, mesh: Mesh, device: torch.device, base: Path | None
) -> tuple[list[build.CausalLM], Shards, TransformerConfig, lora.Switch | None]:
    """Build this rank's model chunks without memory for their weights, with their shards, config and adapters."""
    model, where = recipe.model, recipe.distributed
    dtype = DTYPES[where.precision]
    assert model is not None, "resolved before"
    # Adapters are attached to our own layers, not to Transformer Engine's.
    transformer_engine = recipe.lora is None and use_transformer_engine(where.kernels, device)
    more: dict = fp8_settings(where.fp8_recipe, device, transformer_engine) if where.precision == "FP8" else {}
    if where.cuda_graphs and device.type == "cuda":
        more |= graph_settings(recipe.training.seed, layout.recompute)
    how = build.Execution(
        # FSDP keeps the parameters in fp32, as they are the masters, and casts them when it gathers them.
        dtype=torch.float32 if layout.strategy == "FSDP" else dtype,
        device=device,
        recompute=layout.recompute,
        transformer_engine=transformer_engine,
        fused=where.fused_layers,
        attention=where.attention,
        capacity_factor=recipe.training.expert_capacity_factor,
        more=more,
    )
    config = build.transformer_config(model, layout, how, recipe.moe)
    output = _output(recipe, overlap=_overlaps(recipe, device))
    chunks = build.build_chunks(
        config,
        model,
        transformer_engine=transformer_engine,
        moe=recipe.moe,
        output=output,
        fused=where.fused_layers,
    )
    switch = None
    if recipe.lora is not None:
        quantized = recipe.quantization
        switch = frozen_base.attach(chunks, recipe.lora, quantized, base, mesh, model.vocab_size, config.params_dtype)
    return chunks, shards_of(chunks, mesh, model.vocab_size), config, switch


def _overlaps(recipe: Recipe, device: torch.device) -> bool:
    """Return True if data parallelism reduces gradients while the backward pass runs."""
    return recipe.distributed.overlap_communication and device.type == "cuda"


def _output(recipe: Recipe, *, overlap: bool) -> Output:
    """Choose what the last stage returns: log-probabilities for preference pairs, else the summed loss."""
    if recipe.dpo is not None:
        return TokenLogProbs()
    chunk = recipe.distributed.loss_chunk
    return SummedLoss(
        chunk=None if chunk == "auto" else chunk,
        sparse_loss_mask=recipe.form == "instructions",
        into_main_grad=not overlap,
    )


def frozen_chunks(
    recipe: Recipe, layout: Layout, mesh: Mesh, device: torch.device, base: Path | None
) -> list[build.CausalLM]:
    """Build this rank's chunks of a second model that does not train, with the base model's weights.

    Args:
        base: checkpoint of the weights; None for the recipe's initial ones.
    """
    plain = recipe.with_keys({"lora": None, "quantization": None})
    chunks, shards, _, _ = _chunks(plain, layout, mesh, device, None)
    for chunk in chunks:
        chunk.requires_grad_(False).eval()
    if layout.strategy == "FSDP":
        fsdp.wrap(chunks[0], mesh, DTYPES[recipe.distributed.precision], device)
    else:
        build.materialize(chunks, device)
    if base is None:
        build.initialize(local_runs(chunks, shards), recipe.model, recipe.training.seed)  # type: ignore[arg-type]
    else:
        load_weights(base, named_shards(chunks, shards), mesh.host_group)
    return chunks


def load_into(engine: Engine, shards: Shards, checkpoint: Path, num_updates: int, *, with_moments: bool = True) -> None:
    """Load a checkpoint into an engine; their layouts may differ.

    The weights that the modules compute with are read separately: with a distributed optimizer this rank's masters are
    only part of them.

    Args:
        num_updates: optimizer steps taken so far, for Adam's bias correction.
        with_moments: False to load the weights only, as of a base model.
    """
    pairs = frozen_base.trained(engine.chunks, shards) if engine.adapters else named_shards(engine.chunks, shards)
    if store.is_local(checkpoint):
        states = list(engine.states())
        load_states(checkpoint, states, None, kinds=None if with_moments else ("master",))
        spread_masters(pairs, states, engine.mesh)
        engine.optimizer.loaded(num_updates)
        return
    group = engine.mesh.host_group
    load_weights(checkpoint, pairs, group)
    load_states(checkpoint, engine.states(), group, kinds=None if with_moments else ("master",))
    engine.optimizer.loaded(num_updates)


def open_corpus(recipe: Recipe, sequence_length: int, mix: Mapping[str, float] | None = None) -> Corpus:
    """Open the recipe's prepared data sets, drawn from with the weights of `mix`, by default the recipe's."""
    assert recipe.model is not None, "resolved before"
    sampling = Sampling(
        sequence_length=sequence_length,
        seed=recipe.training.seed,
        vocab_size=recipe.model.vocab_size,
        validation_fraction=recipe.data.validation_fraction,
        document_mask=recipe.data.document_mask,
        packing=recipe.data.document_packing,
    )
    mix = recipe.data.mix if mix is None else mix
    prefixes = source_prefixes(recipe.data)
    return Corpus(prefixes, mix, sampling, loader=recipe.data.loader, prefetch=recipe.data.prefetch)


def open_dataset(recipe: Recipe, sequence_length: int, mix: Mapping[str, float] | None = None) -> Dataset:
    """Open the prepared data of a recipe: text, conversations or preference pairs."""
    if recipe.form == "text":
        return open_corpus(recipe, sequence_length, mix)
    assert recipe.model is not None, "resolved before"
    prefixes, training = sample_prefixes(recipe), recipe.training
    settings: dict = {
        "sequence_length": sequence_length,
        "seed": training.seed,
        "vocab_size": recipe.model.vocab_size,
        "validation_fraction": recipe.data.validation_fraction,
    }
    if recipe.form == "instructions":
        return Conversations(prefixes, pack=recipe.data.packing, **settings)
    return Pairs(prefixes, **settings)


def num_steps(recipe: Recipe, layout: Layout) -> int:
    """Return the number of optimizer steps of a run without phases: as given, or that of `epochs` passes over the data.

    Raises:
        ConfigError: neither is given, or the warm-up is longer than the run.
    """
    if recipe.training.total_steps is not None:
        return recipe.training.total_steps
    if recipe.training.epochs is None:
        raise ConfigError("training.total_steps: neither it nor training.epochs is given. Set one.")
    windows = sum(open_dataset(recipe, layout.sequence_length).windows_per_epoch().values())
    steps = max(1, recipe.training.epochs * windows // layout.global_batch)
    # With `total_steps` a rule holds this; here the number of steps is known only once the data is open.
    if (warmup := recipe.num_warmup_steps(steps)) > steps:
        raise ConfigError(
            f"training.warmup_steps: {warmup} is more than the {steps} steps of the run, so the learning rate would "
            f"not reach its peak: training.epochs {recipe.training.epochs} over {windows} rows in batches of "
            f"{layout.global_batch}.\n"
            "  Use fewer, or training.warmup_ratio."
        )
    return steps
