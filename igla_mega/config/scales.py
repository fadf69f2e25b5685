"""Precedence in a recipe: a key that the user sets wins over a scale, and over keys that contradict it."""

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from igla_mega.config import yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.merging import has, merge

Say = Callable[[str], None]
"""Function that prints a line for the user."""

FOLDER = Path(__file__).parent.parent / "recipes" / "scales"

_WARMUPS = ("training.warmup_steps", "training.warmup_ratio", "scheduler.warmup_ratio")
RULES_OUT: dict[str, tuple[str, ...]] = {
    "training.total_steps": ("training.epochs", "sft.epochs", "dpo.epochs"),
    "training.epochs": ("training.total_steps", "sft.epochs", "dpo.epochs"),
    "training.batch_size": ("sft.batch_size", "dpo.batch_size"),
    "training.learning_rate": ("sft.learning_rate", "dpo.learning_rate"),
    "sft.epochs": ("training.total_steps",),
    "dpo.epochs": ("training.total_steps",),
    **{key: tuple(other for other in _WARMUPS if other != key) for key in _WARMUPS},
}
"""Key -> keys with the same meaning, which are dropped if they come from a recipe below the one that sets the key."""
_BOUNDS = (
    ("training.min_lr", "training.learning_rate"),
    ("training.sequence_length", "model.max_position"),
    ("data.max_length", "model.max_position"),
    ("data.max_prompt_length", "data.max_length"),
)
"""Pairs of keys of which the first must not exceed the second."""


def scales() -> list[str]:
    """Return the names accepted by `--scale`."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def read_scale(scale: str) -> dict[str, Any]:
    """Return the overlays of a scale, condition -> keys.

    Raises:
        ConfigError: no such scale.
    """
    path = FOLDER / f"{scale}.yaml"
    if scale not in scales():
        raise ConfigError(
            f"--scale {scale}: no such scale. Use {' or '.join(scales())}, or omit --scale for full size."
        )
    return yaml_text.read_mapping(path)


def at_scale(whole: dict[str, Any], packaged: Any, own: Any, overlays: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe with the overlays of a scale merged into it, except where the user's own files set a key.

    An overlay applies if the packaged recipe has the key that is its condition, `always` to every recipe.

    Args:
        whole: content of all files.
        packaged: content of the packaged recipes among them.
        own: content of the other files.
    """
    scaled = whole
    for condition, overlay in overlays.items():
        if condition == "always" or (has(packaged, condition) and has(whole, condition)):
            scaled = merge(scaled, overlay)
    own = own if isinstance(own, dict) else {}
    given = set(keys_of(own))
    scaled = merge(scaled, {key: value for key, value in own.items() if key != "stages"})
    for low, high in _BOUNDS:
        values = [value_at(scaled, key) for key in (low, high)]
        numbers = all(isinstance(value, int | float) for value in values)
        if numbers and values[0] > values[1] and len(given & {low, high}) == 1:
            other = low if high in given else high
            scaled = merge(scaled, _nested(other, value_at(whole, other)))
    scaled = without_ruled_out(scaled, given, "", lambda line: None)
    if not isinstance(stages := scaled.get("stages"), list):
        return scaled
    theirs, mine = ((side or {}).get("stages") for side in (packaged, own))
    below = theirs if isinstance(theirs, list) and not isinstance(mine, list) else [{}] * len(stages)
    above = mine if isinstance(mine, list) else [mine] * len(stages)
    parts = zip(stages, below, above, strict=True)
    return {**scaled, "stages": [at_scale(s, b, a, overlays) if isinstance(s, dict) else s for s, b, a in parts]}


def without_ruled_out(content: dict[str, Any], given: Collection[str], where: str, say: Say) -> dict[str, Any]:
    """Return a recipe without the keys that explicit ones rule out (`RULES_OUT`), and print each; also in its stages.

    Args:
        given: dotted keys that are set explicitly; those of a stage start with `stages.` and its index, if any.
        where: who sets them, for the lines.
    """
    for key, others in RULES_OUT.items():
        if key not in given or not has(content, key):
            continue
        for other in others:
            if other not in given and has(content, other):
                say(f"{other}: {value_at(content, other)} is not used: {where} sets {key} {value_at(content, key)}")
                content = merge(content, _nested(other, None))
    if not isinstance(stages := content.get("stages"), list):
        return content

    def of_stage(number: int) -> set[str]:
        inner = [key.removeprefix("stages.") for key in given if key.startswith("stages.")]
        return {key.removeprefix(f"{number}.") for key in inner if key.startswith(f"{number}.") or key[:1].isalpha()}

    rest = [
        without_ruled_out(stage, of_stage(number), where, say) if isinstance(stage, dict) else stage
        for number, stage in enumerate(stages)
    ]
    return {**content, "stages": rest}


def scale_lines(scale: str, before: dict[str, Any], after: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """Return what a scale has changed, and what it left because the user's files set it, as lines for the user."""
    old, new = dict(_items(before)), dict(_items(after))
    changed = [f"{key}={_text(new.get(key))}" for key in {**new, **old} if old.get(key) != new.get(key)]
    lines = [f"--scale {scale} sets {', '.join(changed)}"] if changed else []
    touched = {key for overlay in read_scale(scale).values() for key in keys_of(overlay)}
    kept = [f"{key}={_text(value)}" for key, value in _items(own) if key in touched and old.get(key) == new.get(key)]
    return lines + ([f"--scale {scale} leaves what your recipe sets: {', '.join(kept)}"] if kept else [])


def keys_of(content: Any) -> list[str]:
    """Return the dotted keys of nested mappings; a list is a value."""
    return [key for key, _ in _items(content, lists=False)]


def value_at(content: Any, key: str) -> Any:
    """Return the value at a dotted key; None if there is none."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _items(content: Any, prefix: str = "", *, lists: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield dotted key and value of nested mappings, and of lists of mappings if `lists`; values null are left out."""
    if isinstance(content, list) and lists and content and all(isinstance(one, dict) for one in content):
        content = dict(enumerate(content))
    if not isinstance(content, dict):
        if content is not None or not lists:
            yield prefix, content
        return
    for key, value in content.items():
        yield from _items(value, f"{prefix}.{key}" if prefix else str(key), lists=lists)


def _nested(key: str, value: Any) -> dict[str, Any]:
    """Return nested mappings with one value at a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
