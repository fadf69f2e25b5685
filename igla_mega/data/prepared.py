"""Locate prepared datasets: map each source of a recipe to the prefix of its indexed dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.indexed import joined_path
from igla_mega.data.raw_files import SUFFIXES
from igla_mega.data.remote_files import cache_folder, is_remote, local_dataset
from igla_mega.layout.stages import drawn_from

TARGETS = ".targets"


class DataSection(Protocol):
    """Fields of a recipe's `data:` section that preparation reads."""

    @property
    def sources(self) -> Mapping[str, str | Sequence[str]]: ...
    @property
    def tokenizer(self) -> str | None: ...
    @property
    def prepared(self) -> str | None: ...
    @property
    def text_key(self) -> str: ...
    @property
    def skip_broken_lines(self) -> bool: ...
    @property
    def workers(self) -> int | None: ...


def source_prefixes(data: DataSection) -> dict[str, str]:
    """Return source name -> path, without .bin and .idx, of its dataset, whether or not it is prepared yet.

    Raises:
        ConfigError: no sources, no `data.prepared` although a source needs it, or a source name unfit for a file name.
    """
    if missing := missing_keys(data):
        raise ConfigError(*missing)
    if wrong := [name for name in data.sources if not name or "/" in name or name.startswith(".")]:
        raise ConfigError(
            *[f"data.sources.{name}: not usable as a file name.\n  Use no slash and no leading dot." for name in wrong]
        )
    prepared = Path(data.prepared or "")
    return {name: indexed_prefix(path, data) or str(prepared / name) for name, path in data.sources.items()}


def missing_keys(data: DataSection) -> list[str]:
    """Return an error if there are no sources, or no folder for those that are not indexed datasets."""
    if not data.sources:
        return ["data.sources: not set.\n  Give each name in data.mix its JSONL files, or use --scale laptop."]
    if not data.prepared and not all(map(is_indexed, data.sources.values())):
        return ["data.prepared: not set.\n  Name the folder for the prepared datasets."]
    return []


def is_indexed(path: str | Sequence[str]) -> bool:
    """Return True for the path of an indexed dataset, which needs no preparation, and False for raw text files."""
    if not isinstance(path, str):
        return False
    # A remote prefix cannot be probed cheaply: an address without a raw-text suffix counts as an indexed dataset.
    if is_remote(path) and "*" not in path and not path.endswith(SUFFIXES):
        return True
    return Path(f"{path}.idx").is_file() or joined_path(path).is_file()


def indexed_prefix(path: str | Sequence[str], data: DataSection) -> str | None:
    """Return the prefix of an existing indexed dataset, copied from a remote address; None for raw text files."""
    if not isinstance(path, str) or not is_indexed(path):
        return None
    return local_dataset(path, cache_folder(getattr(data, "cache", None))) if is_remote(path) else path


def sample_prefixes(recipe: Recipe) -> dict[str, str]:
    """Return source name -> dataset prefix for the sources that `sft.data` or `dpo.data` draws from.

    Raises:
        ConfigError: `sft.data` or `dpo.data` names a source that `data.sources` does not define.
    """
    known = source_prefixes(recipe.data)
    if unknown := unknown_sources(recipe):
        raise ConfigError(*unknown)
    return {name: known[name] for name in drawn_from(recipe)}


def unknown_sources(recipe: Recipe) -> list[str]:
    """Return an error for a source that `sft.data` or `dpo.data` names and `data.sources` lacks."""
    sources = recipe.data.sources
    return [
        f"data.sources.{name}: no path for a source used by `{'sft' if recipe.sft else 'dpo'}.data`.\n"
        f"  Add a path, or use one of {', '.join(sources)}."
        for name in drawn_from(recipe)
        if name not in sources
    ]
