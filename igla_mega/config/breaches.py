"""What pydantic found wrong, in a line each: the key, the value, the way out."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from igla_mega.config.schema import Recipe

Place = tuple[int | str, ...]

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text (in quotes, if it looks like a number)",
    "tuple": "a list",
    "dict": "a mapping of names to values",
    "model": "a section: write its keys indented below it",
}


def dotted(place: Place) -> str:
    """Return a place as it is written on the command line: `stages.0.dpo.beta`."""
    return ".".join(str(part) for part in place)


def of_schema(error: ValidationError) -> list[str]:
    """Return a line for each thing that the schema refuses in a recipe's content."""
    # A default that needs a broken key is a consequence, not a mistake; so is a list left empty by broken entries.
    details = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
    within = {detail["loc"][:-1] for detail in details}
    return [_line(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in within]


def without(content: Any, places: list[Place]) -> Any:
    """Return a copy of `content` that lacks the given places, and the sections that miss a required key."""
    leaving = {place[0] for place in places if len(place) == 1}
    deeper = [place for place in places if len(place) > 1]
    if isinstance(content, list):
        kept = [i for i in range(len(content)) if i not in leaving]
        return [without(content[i], [place[1:] for place in deeper if place[0] == i]) for i in kept]
    if not isinstance(content, dict):
        return content
    missing = {place[0] for place in deeper if not _holds(content, place)}
    return {
        key: without(value, [place[1:] for place in deeper if place[0] == key])
        for key, value in content.items()
        if key not in leaving | missing
    }


def _holds(content: Any, place: Place) -> bool:
    for part in place:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _line(detail: Any) -> str:
    place: Place = tuple(detail["loc"])
    key, kind, given, context = dotted(place), detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown_key(place)
    if kind == "missing":
        return f"{key}: missing. {_description(place)}"
    if kind == "is_not":
        return f"{key}: {given!r} is not {context['forms']}."
    for bound, words in (("gt", "above"), ("ge", "at least"), ("lt", "below"), ("le", "at most")):
        if bound in context:
            return f"{key}: {given!r} is out of range: it must be {words} {context[bound]:g}."
    if kind == "literal_error":
        legal = _legal_words(place)
        near = difflib.get_close_matches(str(given), legal, n=1)
        return f"{key}: {given!r} is not one of {', '.join(legal)}." + (f" Did you mean `{near[0]}`?" if near else "")
    if kind == "too_short":
        return f"{key}: empty; it needs at least one."
    for stem, words in _KINDS.items():
        if kind.startswith(stem):
            return f"{key}: {given!r} is not {words}."
    return f"{key}: {detail['msg']}."


def _section(place: Place) -> type[BaseModel]:
    """Return the class of the section that a place lies in."""
    section: type[BaseModel] = Recipe
    for part in place[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), section)
    return section


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _description(place: Place) -> str:
    field = _section(place).model_fields.get(str(place[-1]))
    return " ".join((field.description or "").split()) if field else ""


def _legal_words(place: Place) -> list[str]:
    named = place if isinstance(place[-1], str) else place[:-1]
    field = _section(named).model_fields[str(named[-1])]
    return list(dict.fromkeys(_words(field.annotation)))


def _words(annotation: Any) -> Iterator[str]:
    for inner in get_args(annotation):
        if isinstance(inner, str | int):
            yield str(inner)
        else:
            yield from _words(inner)


def _unknown_key(place: Place) -> str:
    section, word = _section(place), str(place[-1])
    near = difflib.get_close_matches(word, section.model_fields, n=1, cutoff=0.75)
    if near:
        return f"{dotted(place)}: no such key; did you mean `{near[0]}`?"
    elsewhere = [
        f"{name}.{word}"
        for name, field in Recipe.model_fields.items()
        for inner in _sections(field.annotation)
        if inner is not Recipe and word in inner.model_fields
    ]
    if elsewhere:
        return f"{dotted(place)}: no such key; did you mean `{elsewhere[0]}`?"
    near = difflib.get_close_matches(word, section.model_fields, n=1)
    if near:
        return f"{dotted(place)}: no such key; did you mean `{near[0]}`?"
    return f"{dotted(place)}: no such key. Known here: {', '.join(section.model_fields)}."
