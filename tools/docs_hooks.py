"""Generate the page of all recipe keys from the schema when the site is built, so that it is always current."""

import enum
import sys
import typing
from pathlib import Path

from mkdocs.structure.files import File
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from igla_mega.config.schema import Recipe, json_schema

HEADER = """# Every key

Generated from the schema (`igla_mega/config/schema.py`) when this site was built. `igla-mega check RECIPE` checks a
recipe against it, `--set section.key=value` changes a key, and editors complete from
`igla_mega/recipes/recipe.schema.json`. An omitted key has its default. An omitted section has the defaults of its keys,
or is a feature that is off.
"""


def on_files(files, config):
    """Add keys.md to the site; mkdocs calls this."""
    files.append(File.generated(config, "keys.md", content=page()))
    return files


def page() -> str:
    """Return the page as Markdown, with a section for each section of a recipe, depth first."""
    definitions = json_schema()["$defs"]
    parts = [HEADER, "## At the top\n", _table(Recipe, definitions, sections=False)]
    for name, field in Recipe.model_fields.items():
        if (section := _section(field.annotation)) is not None and section is not Recipe:
            parts += list(_section_parts(name, section, definitions))
    return "\n".join(parts) + "\n"


def _section_parts(place: str, section: type[BaseModel], definitions: dict) -> typing.Iterator[str]:
    """Yield the heading and the table of a section, and those of the sections in it."""
    about = " ".join((section.__doc__ or "").split())
    yield f"## {place}\n\n{about}\n"
    yield _table(section, definitions, sections=True)
    for name, field in section.model_fields.items():
        if (inner := _section(field.annotation)) is not None:
            yield from _section_parts(f"{place}.{name}", inner, definitions)


def _table(section: type[BaseModel], definitions: dict, *, sections: bool) -> str:
    """Return the table of a section's keys; with `sections`, keys that are sections too."""
    rows = ["| key | default | values | what it is |", "|---|---|---|---|"]
    properties = definitions[section.__name__]["properties"]
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if not sections and inner is not None and inner is not Recipe:
            continue
        about = " ".join((field.description or "").split())
        values = "a section, below" if inner is not None and inner is not Recipe else _values(properties[name])
        rows.append(f"| `{name}` | {_default(field)} | {values} | {_cell(about)} |")
    return "\n".join(rows) + "\n"


def _section(annotation: typing.Any) -> type[BaseModel] | None:
    """Return the model of a key that is a section or a list of sections, else None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := _section(inner)) is not None), None)


def _default(field) -> str:
    """Return the default of a key as YAML has it."""
    if field.is_required():
        return "required"
    if field.default is PydanticUndefined or field.default in (None, "", ()):
        return ""
    default = field.default.value if isinstance(field.default, enum.Enum) else field.default
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default}`"


def _values(schema: dict) -> str:
    """Describe the possible values of a key."""
    if "enum" in schema:
        return ", ".join(f"`{str(value).lower() if isinstance(value, bool) else value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    arms = [arm for arm in schema.get("anyOf", []) if arm.get("type") != "null"]
    if arms:
        return _cell(" or ".join(dict.fromkeys(filter(None, map(_values, arms)))))
    kind = schema.get("type", "")
    if isinstance(kind, list):  # of a section or a list that may be null
        kind = kind[0]
    if kind == "array":
        inner = schema.get("items", {})
        return f"list of {_values(inner)}" if _values(inner) else "list"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    return words.get(kind, "mapping" if kind == "object" else "")


def _cell(text: str) -> str:
    """Escape a text for a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
