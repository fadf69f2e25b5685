"""Find what a recipe needs from this machine and what is not here: packages, programs, folders."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from igla_mega.config.names import printable
from igla_mega.config.schema import Recipe


def not_installed(recipe: Recipe) -> list[str]:
    """Return a sentence for each package, program and folder that a run of the recipe needs and that is not here."""
    found = [*_destinations_absent(recipe)]
    for part in (recipe, *(recipe.stages or ())):
        flex = part.moe is not None and part.moe.dispatcher == "flex"
        wandb = part.logging.wandb
        for is_set, package, what, way_out in (
            (
                part.evaluation.tasks,
                "lm_eval",
                "evaluation.tasks: lm-evaluation-harness",
                "Run `pip install 'igla-mega[eval]'`, or remove evaluation.tasks.",
            ),
            (
                wandb != "off",
                "wandb",
                f"logging.wandb: {wandb} needs the package wandb, which",
                "Run `pip install 'igla-mega[track]'`, or set logging.wandb=off.",
            ),
            (
                part.quantization,
                "bitsandbytes",
                "quantization: bitsandbytes",
                "Run `pip install 'igla-mega[quant]'`, or remove quantization.",
            ),
            (flex, "deep_ep", "moe.dispatcher: flex needs deep_ep, which", "Install it, or use alltoall."),
        ):
            if is_set and importlib.util.find_spec(package) is None:
                found.append(f"{what} is not installed. {way_out}")
    return list(dict.fromkeys(found))


def _destinations_absent(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence for each destination of `logging` that cannot be used on this machine."""
    logging = recipe.logging
    if logging.mlflow is not None and importlib.util.find_spec("mlflow") is None:
        yield (
            f"logging.mlflow: {printable(logging.mlflow)} needs the package mlflow, which is not installed.\n"
            "  Run `pip install mlflow-skinny` (or install the extra `track`), or remove logging.mlflow."
        )
    if logging.prometheus is not None and not os.access(Path(logging.prometheus).absolute().parent, os.W_OK):
        yield (
            f"logging.prometheus: the folder of {printable(logging.prometheus)} does not exist, or cannot be written.\n"
            "  Create it, or give the folder that node_exporter's --collector.textfile.directory names."
        )
    for kind, command in logging.on_event.items():
        if shutil.which(command[0]) is None:
            yield (
                f"logging.on_event.{kind}: {printable(command[0])} is not a program on this machine.\n"
                "  Give its path, or a name in $PATH; words are not read by a shell."
            )
