"""Write next to each `auto` of a recipe what it was resolved to on the ranks that train it."""

from collections.abc import Mapping, Sequence
from typing import Any

from igla_mega.layout.layout import Layout

_SIZES = {
    "strategy": "strategy",
    "tensor_parallel": "tensor",
    "pipeline_parallel": "pipeline",
    "virtual_pipeline": "virtual_pipeline",
    "context_parallel": "context",
    "expert_parallel": "expert",
    "micro_batch_size": "micro_batch_size",
    "sequence_parallel": "sequence_parallel",
}
"""Key of `distributed` -> field of a layout that has what it was resolved to."""


def annotated(recipe_yaml: str, parts: Sequence[Sequence[Layout]], chosen: Mapping[str, Any]) -> str:
    """Return a resolved recipe with a comment behind each key of `distributed` whose value is not what was used.

    Comments, not values: a run that resumes on other ranks resolves each `auto` again.

    Args:
        recipe_yaml: as `config.load.dump` returns it.
        parts: layouts of the phases of each part; one part for a recipe without `stages`.
        chosen: other keys of `distributed` -> what was used where they are `auto`.
    """
    lines, inside, part = [], False, -1
    # By the exact indentation: text of several lines, such as a prompt, is indented further and may look like a key.
    heads = ("  distributed:", "- distributed:") if "\nstages:\n" in recipe_yaml else ("distributed:",)
    in_stages = len(heads) == 1
    for line in recipe_yaml.splitlines():
        if line[:1] not in (" ", "-") and len(heads) == 2:
            in_stages = line == "stages:"
        if line in heads and in_stages:
            inside, part = True, part + 1
        elif inside and line.startswith(heads[0].replace("distributed:", "  ")):
            line += _comment(line.strip(), parts[part], chosen) if part < len(parts) else ""
        else:
            inside = False
        lines.append(line)
    return "\n".join(lines) + "\n"


def _comment(entry: str, layouts: Sequence[Layout], chosen: Mapping[str, Any]) -> str:
    """Return the comment behind one `key: value`; empty if the value is what was used."""
    key, _, written = entry.partition(": ")
    if key in _SIZES:
        used = [_text(getattr(layout, _SIZES[key])) for layout in layouts]
    elif written == "auto" and key in chosen:
        used = [_text(chosen[key])]
    else:
        return ""
    different = list(dict.fromkeys(used))
    return f"  # used: {', '.join(different)}" if different != [written] else ""


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
