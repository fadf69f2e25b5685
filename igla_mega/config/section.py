"""Common model of all recipe sections: no unknown keys, frozen, each field described by the docstring below it."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Section of a recipe with a fixed set of keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True, protected_namespaces=()
    )

    def with_keys(self, changes: Mapping[str, Any]) -> Self:
        """Return a copy with other values at dotted keys, as in `{"training.total_steps": 100}`.

        Values are not validated: they are derived by the caller, never given by a user.
        """
        own: dict[str, Any] = {}
        nested: dict[str, dict[str, Any]] = {}
        for key, value in changes.items():
            head, _, rest = key.partition(".")
            if rest:
                nested.setdefault(head, {})[rest] = value
            else:
                own[head] = value
        return self.model_copy(
            update=own | {head: getattr(self, head).with_keys(rest) for head, rest in nested.items()}
        )
