"""Merge of one mapping over another, as `extends`, scales, tiers and `--set` need it."""

from typing import Any

# Their keys are names chosen by the user: merging would leave sources of the parent in the mix of the child.
_REPLACED_WHOLE = {"mix", "sources"}


def merge(under: Any, over: Any, key: str = "") -> Any:
    """Return `over` merged onto `under`, without changing either.

    Mappings merge key by key, a mapping over a list merges onto each of its elements, anything else replaces.
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
    """Return True if a nested mapping has a value other than null at `a.b.c`."""
    for part in dotted.split("."):
        if not isinstance(mapping, dict) or mapping.get(part) is None:
            return False
        mapping = mapping[part]
    return True


def without_nulls(content: Any) -> Any:
    """Return a copy without the keys that are null: null removes a key of the parent."""
    if isinstance(content, dict):
        return {key: without_nulls(value) for key, value in content.items() if value is not None}
    return [without_nulls(value) for value in content] if isinstance(content, list) else content
