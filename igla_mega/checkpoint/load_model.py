"""Load the whole model of a checkpoint into one process, for `generate`, `eval` and the check of an export."""

from pathlib import Path

import torch

from igla_mega.checkpoint import frozen_base
from igla_mega.checkpoint.base import base_of
from igla_mega.checkpoint.folder import read_recipe
from igla_mega.checkpoint.load import load_weights
from igla_mega.config.schema import Model, Recipe
from igla_mega.distributed import host
from igla_mega.distributed.mesh import single_process_mesh
from igla_mega.layout.layout import Layout
from igla_mega.model.build import CausalLM, Execution, build_chunks, materialize, transformer_config
from igla_mega.model.shards import named_shards, shards_of
from igla_mega.model.spec import DTYPES


def load_model(checkpoint: Path, *, dtype: torch.dtype = torch.float32) -> tuple[CausalLM, Recipe]:
    """Load the whole model of a checkpoint into this process, in evaluation mode, on CUDA if available.

    A checkpoint of adapters is loaded with its base, quantized to 4 bits if it was in training.
    Creates process groups of this process alone unless they exist; `destroy_process_groups` destroys them.

    Args:
        dtype: type of the weights that the modules compute with.

    Returns:
        The model, and the checkpoint's recipe.

    Raises:
        ConfigError: not a checkpoint, or one that does not match its recipe.
    """
    recipe = read_recipe(checkpoint)
    model = recipe.model
    assert model is not None, "read_recipe rejects that"
    device = host.prepare()
    layout = single_process_layout(model)
    mesh = single_process_mesh(layout, device, recipe.training.seed)
    config = transformer_config(model, layout, Execution(dtype, device), recipe.moe)
    chunks = build_chunks(config, model, moe=recipe.moe)
    if recipe.lora is None:
        materialize(chunks, device)
        shards = shards_of(chunks, mesh, model.vocab_size)
        load_weights(checkpoint, named_shards([*chunks], shards), group=None)
        return chunks[0].eval(), recipe
    # The base is quantized from the type that the recipe computed in, so that its values are those of the training run.
    base, coded_from = base_of(checkpoint), DTYPES[recipe.distributed.precision]
    frozen_base.attach(chunks, recipe.lora, recipe.quantization, base, mesh, model.vocab_size, coded_from)
    materialize(chunks, device)
    shards = shards_of(chunks, mesh, model.vocab_size)
    load_weights(base, frozen_base.frozen(chunks, shards), None, partly=True)
    load_weights(checkpoint, frozen_base.trained(chunks, shards), None, partly=True)
    return chunks[0].eval(), recipe


def single_process_layout(model: Model) -> Layout:
    """Return the layout of a process that runs a whole model by itself, one sequence at a time."""
    return Layout(
        tensor=1,
        pipeline=1,
        virtual_pipeline=1,
        context=1,
        expert=1,
        data=1,
        sequence_parallel=False,
        strategy="DDP",
        distributed_optimizer=False,
        micro_batch_size=1,
        num_microbatches=1,
        global_batch=1,
        sequence_length=model.max_position,
    )
