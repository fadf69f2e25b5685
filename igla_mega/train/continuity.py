"""What may change between two calls of `train` on one run folder, and what would make it another run."""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel

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
    "base_model": "checked",  # read before the first step; adapters and references are held to its digest
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
    "data.add_bos": "checked",  # the rule that the data was prepared with
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
    before: Recipe,
    now: Recipe,
    data: Mapping[str, tuple[str | None, str | None]],
    where: str,
    accepted: Collection[str],
) -> list[str]:
    """Compare a recipe and its data with those of a checkpoint.

    Args:
        before: recipe in the checkpoint.
        data: source -> fingerprints in the checkpoint and now, None where it is not a source; likewise other keys of
            `data`, written with a leading dot.
        where: the checkpoint, for the message.
        accepted: keys whose change the user insists on.

    Returns:
        A line for each change that was accepted.

    Raises:
        ConfigError: a change would make it another run; the message lists all of them. Or `accepted` has a key that
            does not exist.
    """
    found = {f"data{name}" if name[0] == "." else f"data.sources.{name}": pair for name, pair in sorted(data.items())}
    refuse_unknown_keys(accepted, {*found, *(f"data.sources.{name}" for name in now.data.sources)})
    old, new = flat(before.model_dump(mode="json")), flat(now.model_dump(mode="json"))
    changes: dict[str, tuple[Any, Any]] = {
        key: (old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and effect_of(key) == "refused"
    }
    changes |= {key: pair for key, pair in found.items() if pair[0] != pair[1]}
    refused = {key: pair for key, pair in changes.items() if not _is_accepted(key, accepted)}
    if refused:
        raise ConfigError(
            f"{where}: this recipe would continue it as another run:",
            *(_line(key, *pair) for key, pair in refused.items()),
            "  Undo the changes, or start in a new run folder. To continue all the same: --accept-changes "
            f"{','.join(refused)}. If another run wrote that checkpoint, move it away.",
        )
    return [_line(key, *pair) for key, pair in changes.items()]


def refuse_unknown_keys(accepted: Iterable[str], sources: Collection[str] | None = None) -> None:
    """Refuse a key of `--accept-changes` that is neither a key or section of the schema nor a source.

    Args:
        sources: `data.sources.NAME` of every source; None accepts any name.

    Raises:
        ConfigError: a key does not exist; the message names the nearest one.
    """
    known = set(_keys(Recipe, "")) | set(sources or ())
    breaches = []
    for key in accepted:
        plain = ".".join(part for part in key.split(".") if not part.isdigit()).removeprefix("stages.")
        if plain in known or key in known or (sources is None and key.startswith("data.sources.")):
            continue
        near = difflib.get_close_matches(plain, sorted(known), n=1)
        hint = f"Did you mean `{near[0]}`?" if near else "Give the keys that the refusal names."
        breaches.append(f"--accept-changes: no such key or source: {key}.\n  {hint}")
    if breaches:
        raise ConfigError(*breaches)


def _keys(annotation: Any, prefix: str) -> Iterator[str]:
    """Yield the dotted keys of the sections within a type annotation, without indices of lists."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield f"{prefix}{name}"
            # The entries of `stages` are recipes: their keys are those of a recipe.
            if name != "stages":
                yield from _keys(field.annotation, f"{prefix}{name}.")
    for inner in get_args(annotation):
        yield from _keys(inner, prefix)


def _is_accepted(key: str, accepted: Iterable[str]) -> bool:
    return any(key == one or key.startswith(f"{one}.") for one in accepted)


def _line(key: str, before: Any, now: Any) -> str:
    if key.startswith("data.sources."):
        if before is None or now is None:
            return f"{key}: {'was not' if before is None else 'is no longer'} one of the sources."
        return f"{key}: the prepared data differs: its fingerprint was {before} and is {now}."
    if key == "data.tokenizer":
        return f"{key}: the tokenizer's files differ: their sha256 was {before} and is {now}."
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
