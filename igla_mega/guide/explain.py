"""Explain the keys of a recipe from the schema itself: meaning, type, range, default, effect on a resume, readers."""

import ast
import difflib
import functools
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.train.continuity import effect_of

WIDTH = 118
_PACKAGE = Path(__file__).parents[1]
_DECLARED_IN = ("config/schema.py", "config/features.py")
_EFFECTS = {
    "refused": "makes it another run: refused, unless --accept-changes names it",
    "checked": "checked against the checkpoint: refused if the samples or the parts would differ",
    "next_step": "takes effect from the next step",
    "none": "changes neither weights nor samples",
}
"""Text for each `train.continuity.Effect`."""
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def explain(key: str | None) -> str:
    """Return a text about a key or section of a recipe; None explains the recipe, with all its sections.

    A name without its section, such as `ewc_lambda`, explains every key of that name.

    Raises:
        ConfigError: no such key; the message has the nearest ones.
    """
    if key is None:
        return _of_section(Recipe, "", "")
    parts = [part for part in key.strip().removeprefix("stages.").split(".") if not part.isdigit()]
    known = dict(all_keys())
    name = _without_names_of_sources(".".join(parts), known)
    found = [name] if name in known else [one for one in known if one.rpartition(".")[2] == name]
    if not found:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.7)
        near = near or [
            one for one in known if difflib.get_close_matches(parts[-1], [one.rpartition(".")[2]], cutoff=0.7)
        ]
        hint = (
            f"did you mean {', '.join(f'`{one}`' for one in near[:3])}?" if near else "`igla-mega explain` lists all."
        )
        raise ConfigError(f"{key}: no such key; {hint}")
    return "\n\n".join(_of_key(one, known[one]) for one in found)


def all_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every dotted key of a recipe with its field, sections before their keys."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        inner = section_of(field)
        if inner is not None and inner is not Recipe:
            yield from all_keys(inner, f"{prefix}{name}.")


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of the section, or of the elements of the list of sections, that a field holds; else None."""

    def inside(annotation: Any) -> type[BaseModel] | None:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return annotation
        return next((found for inner in get_args(annotation) if (found := inside(inner))), None)

    return inside(field.annotation)


def _without_names_of_sources(name: str, known: dict[str, FieldInfo]) -> str:
    """Return the key of a mapping for a name in it: `data.mix` for `data.mix.web`."""
    above = name.rpartition(".")[0]
    return above if name not in known and above in known and _schema(above).get("additionalProperties") else name


def _of_key(key: str, field: FieldInfo) -> str:
    """Return the text about one key."""
    section = section_of(field)
    if section is not None:
        return _of_section(section, key, field.description or "")
    schema = _schema(key)
    lines = [key, *_wrapped(field.description or ""), f"  type: {_type(schema)}"]
    if bounds := _range(field, schema):
        lines.append(f"  range: {bounds}")
    lines.append(f"  default: {_default(field)}")
    return "\n".join([*lines, *_common(key)])


def _of_section(section: type[BaseModel], key: str, description: str) -> str:
    """Return the text about a section: what it is, and its keys."""
    fields = section.model_fields
    lines = [f"{key}: a section", *_wrapped(description), *_wrapped(inspect.getdoc(section) or "")] if key else []
    lines += _common(key) if key else _wrapped(inspect.getdoc(section) or "")
    width = max(map(len, fields))
    for name, field in fields.items():
        first = " ".join((field.description or "").split()).split(". ")[0].rstrip(".") + "."
        lines.append(f"  {name:{width}}  {textwrap.shorten(first, WIDTH - width - 4, placeholder=' ...')}")
    return "\n".join(lines)


def _common(key: str) -> list[str]:
    """Return the lines on the effect of a key on a resumed run, and on the modules that read it."""
    effect = effect_of(key)
    lines = [f"  changed before a resume: {_EFFECTS[effect]}"] if effect is not None else []
    # Some modules take a section whole, so its readers stand for keys that none of them names.
    read_by = ", ".join(readers(key) or readers(key.rpartition(".")[0]))
    return lines + textwrap.wrap(f"read by: {read_by}", WIDTH - 2, initial_indent="  ", subsequent_indent="    ")


def _wrapped(text: str) -> list[str]:
    """Return a docstring as indented lines; its paragraphs are kept."""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
    return [
        line for part in paragraphs for line in textwrap.wrap(part, WIDTH, initial_indent="  ", subsequent_indent="  ")
    ]


def _schema(key: str) -> dict[str, Any]:
    """Return the JSON Schema of a key, references resolved."""
    node = whole = _whole_schema()
    for part in ["$root", *key.split(".")]:
        if part != "$root":
            node = node["properties"][part]
        while inner := _inner(node):
            node = whole["$defs"][inner["$ref"].rpartition("/")[2]] if "$ref" in inner else inner
    return node


@functools.cache
def _whole_schema() -> dict[str, Any]:
    return Recipe.model_json_schema()


def _inner(node: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a node of a schema stands for: a reference, a list's elements, or the one choice that is not null."""
    if "$ref" in node:
        return {"$ref": node["$ref"]}
    choices = [one for one in node.get("anyOf", []) if one.get("type") != "null"]
    if len(choices) == 1:
        return choices[0]
    return node["items"] if node.get("type") == "array" and "$ref" in node["items"] else None


def _type(schema: dict[str, Any]) -> str:
    """Return the type of a JSON Schema as text."""
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return "one of " + ", ".join(str(value).lower() if isinstance(value, bool) else str(value) for value in values)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"]))
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_type(schema.get('items') or schema.get('prefixItems', [{}])[0])}"
    if kind == "object":
        return f"mapping of names to {_type(schema.get('additionalProperties') or {})}"
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
    }
    return "text with a unit" if "pattern" in schema else words.get(str(kind), "any value")


def _range(field: FieldInfo, schema: dict[str, Any]) -> str:
    """Return the bounds of the numbers that a key takes; empty if it takes none."""
    bounds: dict[str, list[float]] = {words: [] for words in _BOUNDS.values()}
    for one in _metadata(field):
        for name, words in (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below")):
            if (value := getattr(one, name, None)) is not None:
                bounds[words].append(value)
    if not any(bounds.values()):  # numbers with a notation of their own, such as `4M tokens`
        nodes = (schema, *schema.get("anyOf", []))
        bounds = {words: [node[bound] for node in nodes if bound in node] for bound, words in _BOUNDS.items()}
    lower = {words: max(values) for words, values in bounds.items() if values and words in ("at least", "above")}
    upper = {words: min(values) for words, values in bounds.items() if values and words in ("at most", "below")}
    if upper and min(upper, key=lambda words: upper[words]) != next(iter(upper)):
        upper.pop(next(iter(upper)))
    return ", ".join(f"{words} {value:,}" for words, value in (lower | upper).items())


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Yield the constraints of a field, wherever they stand in its annotation."""
    yield from field.metadata
    pending = [field.annotation]
    while pending:
        annotation = pending.pop()
        for one in getattr(annotation, "__metadata__", ()):
            yield from one.metadata if isinstance(one, FieldInfo) else [one]
        pending += [getattr(annotation, "__origin__", None)] if hasattr(annotation, "__metadata__") else []
        pending += get_args(annotation) if not hasattr(annotation, "__metadata__") else []


def _default(field: FieldInfo) -> str:
    """Return the default of a field as text."""
    if field.is_required():
        return "none, must be given"
    if field.default_factory is not None or field.default is None:
        return "unset"
    if isinstance(field.default, bool):
        return str(field.default).lower()
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "empty" if value in ([], {}, "") else str(value)


def readers(key: str) -> list[str]:
    """Return the modules of the package that read a key: they access its name, and name its section."""
    section, _, name = key.rpartition(".")
    owner = section_of(dict(all_keys())[section]) if section else Recipe
    assert owner is not None, "the caller resolved the key"
    near = {one.__name__ for one in owner.__mro__ if issubclass(one, BaseModel)} - {"Section", "BaseModel"}
    near |= {one.lower() for one in near} | ({section.rpartition(".")[2]} if section else set())
    found = []
    for path in sorted(_PACKAGE.rglob("*.py")):
        module = path.relative_to(_PACKAGE).as_posix()
        if module in _DECLARED_IN or module.startswith("guide/") or name not in _text(path):
            continue
        reads, names = _names(path)
        if name in reads and near & (names | reads):
            found.append(module)
    return found


@functools.cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def _names(path: Path) -> tuple[set[str], set[str]]:
    """Return the attributes and texts that may be keys in a module, and all other names in it."""
    reads, names = set(), set()
    for node in ast.walk(ast.parse(_text(path))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            reads.add(node.attr)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            reads.add(node.value)  # getattr(section, "key")
    return reads, names
