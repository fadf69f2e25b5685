"""Error texts for the validation errors of pydantic, one line each: key, value, remedy."""

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
    """Return a place in command-line notation: `stages.0.dpo.beta`."""
    return ".".join(str(part) for part in place)


def of_schema(error: ValidationError) -> list[str]:
    """Return one line per error that the schema reports for the content of a recipe."""
    # Two kinds are consequences of other errors: a default computed from an invalid key, and a list whose entries are
    # all invalid and therefore empty.
    details = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
    within = {detail["loc"][:-1] for detail in details}
    return [_line(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in within]


def without(content: Any, places: list[Place]) -> Any:
    """Return a copy of `content` without the given places and without sections that lack a required key."""
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
    """Return True if `content` has a value at a place."""
    for part in place:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _line(detail: Any) -> str:
    """Return the error text for one entry of `ValidationError.errors()`."""
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
        return f"{key}: empty. Give at least one."
    for stem, words in _KINDS.items():
        if kind.startswith(stem):
            return f"{key}: {given!r} is not {words}."
    return f"{key}: {detail['msg']}."


def _section(place: Place) -> type[BaseModel]:
    """Return the class of the section that contains a place."""
    section: type[BaseModel] = Recipe
    for part in place[:-1]:
        if isinstance(part, str) and part in section.model_fields:
            section = next(_sections(section.model_fields[part].annotation), section)
    return section


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the section classes within a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections(inner)


def _description(place: Place) -> str:
    """Return the docstring of the field at a place, on one line."""
    field = _section(place).model_fields.get(str(place[-1]))
    return " ".join((field.description or "").split()) if field else ""


def _legal_words(place: Place) -> list[str]:
    """Return the values allowed by the `Literal` of the field at a place, or of the list that contains it."""
    named = place if isinstance(place[-1], str) else place[:-1]
    field = _section(named).model_fields[str(named[-1])]
    return list(dict.fromkeys(_words(field.annotation)))


def _words(annotation: Any) -> Iterator[str]:
    """Yield the literal values within a type annotation."""
    for inner in get_args(annotation):
        if isinstance(inner, str | int):
            yield str(inner)
        else:
            yield from _words(inner)


def _unknown_key(place: Place) -> str:
    """Return the error text for an unknown key, with the most similar key of this or another section."""
    section, word = _section(place), str(place[-1])
    # Order of the hints: a close match here, the exact name in another section, then a distant match here.
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
    return f"{dotted(place)}: no such key. Keys of this section: {', '.join(section.model_fields)}."
