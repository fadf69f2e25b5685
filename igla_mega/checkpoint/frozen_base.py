"""Build the frozen base under adapters: freeze, quantize and fill its weights, and separate them from the adapters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from igla_mega.checkpoint import adapters
from igla_mega.checkpoint.load import load_weights
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Lora, Quantization
from igla_mega.config.schema import Model
from igla_mega.distributed.mesh import Mesh
from igla_mega.model import lora, nf4
from igla_mega.model.shards import Shard, Shards, local_runs, named_shards, shards_of

COMPUTE = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Types to which `quantization.compute_dtype` refers."""


def attach(
    chunks: Sequence[Any],
    section: Lora,
    quantization: Quantization | None,
    base: Path | None,
    mesh: Mesh,
    vocab_size: int,
    dtype: torch.dtype,
) -> lora.Switch:
    """Freeze chunks on the meta device, quantize their projections to 4 bits if configured, and add adapters.

    Args:
        base: checkpoint of the base; needed if `quantization` is given.
        dtype: type from which the weights are quantized.

    Returns:
        The switch that turns the adapters off and on.
    """
    if quantization is not None:
        assert base is not None, "a base of random weights is not worth quantizing"
        by_name = {shard.name: shard for shard in shards_of(chunks, mesh, vocab_size).values()}
        device = "cuda" if torch.cuda.is_available() else "cpu"

        def read(name: str) -> Tensor:
            """Read this rank's part of one linear's weight: the base is never in memory as a whole unquantized."""
            part = torch.empty(by_name[name].local_shape, dtype=dtype, device=device)
            load_weights(base, [(by_name[name], part)], None, partly=True)  # type: ignore[arg-type]
            return part

        compute, double = COMPUTE[quantization.compute_dtype], quantization.double_quant
        nf4.quantize_chunks(chunks, read, compute_dtype=compute, double=double)
    return lora.attach(chunks, section, context=(mesh.context.rank, mesh.context.size))


def frozen(chunks: Sequence[Any], shards: Shards) -> list[tuple[Shard, nn.Parameter]]:
    """Return the parameters of the base, each with its shard."""
    return [(shard, param) for shard, param in named_shards(chunks, shards) if not lora.is_adapter(shard.name)]


def trained(chunks: Sequence[Any], shards: Shards) -> list[tuple[Shard, nn.Parameter]]:
    """Return the parameters of the adapters, which are those that their checkpoint holds, each with its shard."""
    return [(shard, param) for shard, param in named_shards(chunks, shards) if lora.is_adapter(shard.name)]


def fill(chunks: Sequence[Any], shards: Shards, section: Lora, model: Model, base: Path | None, seed: int) -> None:
    """Load the base's weights, and set the adapters to their initial values or to those of `lora.adapter`.

    Raises:
        ConfigError: the `lora` section differs from the adapter that it names.
    """
    if base is not None:
        load_weights(base, frozen(chunks, shards), None, partly=True)
    lora.initialize(local_runs(chunks, shards), seed)
    lora.initialize_magnitudes(chunks)
    if section.adapter is not None:
        given, matrices = adapters.import_folder(Path(section.adapter), model)
        for key in ("rank", "alpha", "use_rslora", "use_dora"):
            if getattr(given, key) != getattr(section, key):
                raise ConfigError(
                    f"lora.{key}: {getattr(section, key)}, but {section.adapter} has {getattr(given, key)}.\n"
                    "  Set it to the adapter's value."
                )
        if set(given.target_modules) != set(section.target_modules):
            raise ConfigError(
                f"lora.target_modules: {', '.join(section.target_modules)}, but {section.adapter} has "
                f"{', '.join(given.target_modules)}.\n  Set them to the adapter's."
            )
        with torch.no_grad():
            adapters.place(matrices, named_shards(chunks, shards))
