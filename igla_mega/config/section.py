"""What every section of a recipe is: closed, frozen, each field described by the docstring below it."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Mapping of a recipe that knows its own keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True, protected_namespaces=()
    )
