"""YAML read by the rules of its version 1.2: `3e-4` is a number, `off` is a word, a key stands once in a mapping."""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from igla_mega.config.errors import ConfigError

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """Safe loader with the core schema's scalars; refuses a key written twice."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str | int | float | bool | None):
                raise ConfigError(f"line {line}: a key must be a word, not a {type(key).__name__}.")
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

# YAML 1.1 reads 010 as eight; 1.2 as ten.
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(node.value, 0 if node.value[:2] in ("0o", "0x") else 10),
)


def parse(text: str, place: str) -> Any:
    """Return what a YAML text says: a list of what its documents say, where there are several.

    Args:
        place: its file, for messages.

    Raises:
        ConfigError: broken syntax, a repeated key, a tag that is not plain data; each with its line.
    """
    try:
        loader = _Loader(text)
        documents = []
        while loader.check_node():
            # Deep: at once, so that an anchor which holds itself is an error and not a circle of objects.
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
        raise ConfigError(f"{place}{line}: not valid YAML: {error.problem}.{hint}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}: not valid YAML: {error}.") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; of several documents, divided by `---`, each is one of its `stages:`.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds something other than mappings.
    """
    try:
        text = path.read_text(encoding="utf-8")
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
