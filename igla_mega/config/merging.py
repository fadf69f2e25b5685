"""Laying one mapping over another: `extends`, scales, tiers and `--set` are all this."""

from typing import Any

# Their keys are the user's own words, so a child's set of them takes the parent's place.
_REPLACED_WHOLE = {"mix", "sources"}


def merge(under: Any, over: Any, key: str = "") -> Any:
    """Return `over` laid on `under`; neither is changed.

    Mappings merge key by key, a mapping laid on a list is laid on each of its elements, anything else replaces.
    """
    if isinstance(over, dict) and isinstance(under, list):
        return [merge(element, over) for element in under]
    if not isinstance(over, dict) or not isinstance(under, dict) or key in _REPLACED_WHOLE:
        return over
    merged = dict(under)
    for name, value in over.items():
        merged[name] = merge(under[name], value, name) if name in under else value
    return merged


def has(mapping: Any, dotted: str) -> bool:
    """Return whether a mapping holds something other than null at `a.b.c`."""
    for part in dotted.split("."):
        if not isinstance(mapping, dict) or mapping.get(part) is None:
            return False
        mapping = mapping[part]
    return True


def without_nulls(content: Any) -> Any:
    """Return a copy that lacks the keys which are null: a null takes back what lies under it."""
    if isinstance(content, dict):
        return {key: without_nulls(value) for key, value in content.items() if value is not None}
    return [without_nulls(value) for value in content] if isinstance(content, list) else content
