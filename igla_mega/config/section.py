"""Common model of all recipe sections: no unknown keys, frozen, each field described by the docstring below it."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Section of a recipe with a fixed set of keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True, protected_namespaces=()
    )
