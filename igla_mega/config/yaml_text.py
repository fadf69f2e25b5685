"""YAML 1.2 reader: `3e-4` is a number, `off` is text, and a repeated key is an error."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_text

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

MOST_NODES, DEEPEST, LONGEST_NUMBER = 100_000, 64, 400
MOST_BYTES = 1 << 24
"""Limits of a file: values, with every use of an alias counted; nesting levels; digits of a number. Recipes stay far
below them."""


class _Loader(_SafeLoader):
    """Safe loader with the scalars of the YAML 1.2 core schema; refuses repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return the mapping of a node.

        Raises:
            ConfigError: a key is repeated or is not a scalar.
        """
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                raise ConfigError(f"line {line}: a key must be text or a number, not a {type(key).__name__}.")
            if key in lines:
                raise ConfigError(f"line {line}: `{key}` is already set on line {lines[key]}. Keep one of them.")
            lines[key] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in [
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
]:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)


def _whole_number(loader: Any, node: yaml.ScalarNode) -> int:
    """Return the integer of a scalar, decimal unless it starts with 0o or 0x."""
    written = loader.construct_scalar(node)
    if len(written) > LONGEST_NUMBER:
        raise ConfigError(
            f"line {node.start_mark.line + 1}: a number has {len(written)} digits, more than {LONGEST_NUMBER}."
        )
    # YAML 1.1 reads 010 as eight, YAML 1.2 as ten.
    return int(written, 0 if written[:2] in ("0o", "0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _refuse_bombs(text: str) -> None:
    """Refuse text that expands when read: aliases of aliases, and deep nesting, whose cost is at least quadratic."""
    sizes: dict[str | None, int] = {}
    open_nodes: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        if count > MOST_NODES or len(open_nodes) > DEEPEST:
            what = f"more than {MOST_NODES:,} values" if count > MOST_NODES else f"nested deeper than {DEEPEST} levels"
            line = event.start_mark.line + 1 if event.start_mark else 1
            raise ConfigError(f"line {line}: {what}. Is this a recipe?")


def parse(text: str, place: str) -> Any:
    """Return the value of a YAML text, or a list with the value of each document if there are several.

    Args:
        place: name of the file, for error messages.

    Raises:
        ConfigError: invalid syntax, a repeated key or a tag that is not plain data; each with its line.
    """
    try:
        _refuse_bombs(text)
        loader = _Loader(text)
        documents = []
        while loader.check_node():
            # Deep construction is immediate, so an anchor that contains itself is an error, not a cyclic object.
            documents.append(loader.construct_object(loader.get_node(), deep=True))
        documents = [document for document in documents if document is not None]
        return documents if len(documents) > 1 else documents[0] if documents else None
    except ConfigError as error:
        raise ConfigError(f"{place}, {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        tab = "\t" in text.splitlines()[mark.line] if mark and mark.line < len(text.splitlines()) else False
        hint = " Indent with spaces, not tabs." if tab else " Check the indentation and the colons near there."
        raise ConfigError(f"{place}{line}: not valid YAML: {str(error.problem)[:200]}.{hint}") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # Besides its own errors, the constructors of PyYAML raise these for a tag on the wrong kind of value.
        raise ConfigError(f"{place}: not valid YAML: {str(error)[:200]}.") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; several documents, separated by `---`, become its `stages:`.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or contains something other than mappings.
    """
    try:
        text = read_text(path, most=MOST_BYTES)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}). Is this a recipe?") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    content = parse(text, str(path))
    if content is None:
        raise ConfigError(f"{path}, line 1: empty. A recipe is a mapping of sections such as `model:`, `training:`.")
    if isinstance(content, list) and "\n---" in text and all(isinstance(document, dict) for document in content):
        return {"stages": content}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}, line 1: a {type(content).__name__}, not a mapping of sections such as `model:`, `training:`."
        )
    return content
