"""What may change between two calls of `train` on one run folder, and what would make it another run."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe

Effect = Literal["refused", "checked", "next_step", "none"]
"""Effect of a changed key on a run that has a checkpoint:

refused: the weights would compute something else, or other samples would come; `--accept-changes` insists.
checked: refused elsewhere where it matters, with the numbers that differ.
next_step: takes effect from the next step on; recorded in the events of the run.
none: changes neither weights nor samples: where, how fast and how often something is done, or what is logged.
"""
EFFECTS: dict[str, Effect] = {
    "name": "checked",
    "extends": "none",
    "base_model": "none",  # read before the first step; adapters are held to its digest
    "stages": "checked",  # compared part by part
    "model": "refused",
    "model.init_std": "none",
    "training": "next_step",
    "training.batch_size": "checked",
    "training.gradient_accumulation": "checked",
    "training.seed": "refused",
    "training.sequence_length": "refused",
    "optimizer": "next_step",
    "optimizer.fused": "none",
    "scheduler": "next_step",
    "distributed": "none",
    "distributed.precision": "next_step",
    "distributed.fp8_recipe": "next_step",
    "distributed.pad_sequences": "none",
    "data": "none",  # prepared datasets are held to their fingerprints
    "data.mix": "checked",  # mix.json
    "data.validation_fraction": "refused",
    "data.document_mask": "refused",
    "data.document_packing": "refused",
    "data.packing": "refused",
    "data.format": "refused",
    "checkpoint": "none",
    "evaluation": "none",
    "logging": "none",
    "koshey": "next_step",
    "koshey.tier": "none",
    "continual": "next_step",
    "curriculum": "checked",
    "curriculum.phases.name": "refused",
    "curriculum.phases.data": "refused",
    "curriculum.phases.replay": "refused",
    "curriculum.phases.lr": "next_step",
    "lora": "refused",
    "lora.dropout": "next_step",
    "lora.adapter": "none",
    "quantization": "refused",
    "dpo": "next_step",
    "dpo.data": "refused",
    "dpo.batch_size": "checked",
    "sft": "next_step",
    "sft.data": "refused",
    "sft.batch_size": "checked",
    "moe": "next_step",
    "moe.num_experts": "refused",
    "moe.num_experts_per_tok": "refused",
    "moe.shared_intermediate_size": "refused",
    "moe.pre_softmax": "refused",
    "moe.scaling_factor": "refused",
    "moe.dispatcher": "none",
    "moe.alarm_load": "none",
    "moe.alarm_drop_rate": "none",
}
"""Effect of a key, or of all keys of a section that have no entry of their own."""


def effect_of(key: str) -> Effect | None:
    """Return the effect of a dotted key, indices of lists left out; None for a key without an entry."""
    parts = [part for part in key.split(".") if not part.isdigit()]
    for end in range(len(parts), 0, -1):
        if (effect := EFFECTS.get(".".join(parts[:end]))) is not None:
            return effect
    return None


def refuse_another_run(
    before: Recipe, now: Recipe, data: Mapping[str, tuple[str, str]], where: str, accepted: Collection[str]
) -> list[str]:
    """Compare a recipe and its data with those of a checkpoint.

    Args:
        before: recipe in the checkpoint.
        data: source -> fingerprints in the checkpoint and now.
        where: the checkpoint, for the message.
        accepted: keys whose change the user insists on.

    Returns:
        A line for each change that was accepted.

    Raises:
        ConfigError: a change would make it another run; the message lists all of them.
    """
    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    changes = {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and effect_of(key) == "refused"
    }
    changes |= {f"data.sources.{name}": pair for name, pair in sorted(data.items()) if pair[0] != pair[1]}
    refused = {key: pair for key, pair in changes.items() if not _is_accepted(key, accepted)}
    if refused:
        raise ConfigError(
            f"{where}: this recipe would continue it as another run:",
            *(_line(key, *pair) for key, pair in refused.items()),
            "  Undo the changes, or start in a new run folder. To continue all the same: --accept-changes "
            f"{','.join(refused)}. If another run wrote that checkpoint, move it away.",
        )
    return [_line(key, *pair) for key, pair in changes.items()]


def _is_accepted(key: str, accepted: Iterable[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in accepted)


def _line(key: str, before: Any, now: Any) -> str:
    if key.startswith("data.sources."):
        return f"{key}: the prepared data differs: its fingerprint was {before} and is {now}."
    return f"{key}: was {before}, is {now}."


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings and lists of mappings as one mapping of dotted keys; keys without a value are left out."""
    if isinstance(tree, dict):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and tree and all(isinstance(one, dict) for one in tree):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        return {} if tree is None else {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in items:
        found |= flat(value, f"{prefix}.{key}" if prefix else key)
    return found
