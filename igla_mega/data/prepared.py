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
    if not data.sources:
        raise ConfigError(
            "data.sources: not set.\n  Give each name in data.mix its JSONL files. To try a packaged recipe, "
            "--scale laptop makes it small and supplies data."
        )
    if not data.prepared and not all(indexed_prefix(path, data) for path in data.sources.values()):
        raise ConfigError("data.prepared: not set.\n  Name the folder for the prepared datasets.")
    if wrong := [name for name in data.sources if not name or "/" in name or name.startswith(".")]:
        raise ConfigError(
            *[f"data.sources.{name}: not usable as a file name.\n  Use no slash and no leading dot." for name in wrong]
        )
    prepared = Path(data.prepared or "")
    return {name: indexed_prefix(path, data) or str(prepared / name) for name, path in data.sources.items()}


def indexed_prefix(path: str | Sequence[str], data: DataSection) -> str | None:
    """Return the prefix of an existing indexed dataset, which needs no preparation; None for raw text files."""
    if not isinstance(path, str):
        return None
    # A remote prefix cannot be probed cheaply: an address without a raw-text suffix counts as an indexed dataset.
    if is_remote(path) and "*" not in path and not path.endswith(SUFFIXES):
        return local_dataset(path, cache_folder(getattr(data, "cache", None)))
    return path if Path(f"{path}.idx").is_file() or joined_path(path).is_file() else None


def sample_prefixes(recipe: Recipe) -> dict[str, str]:
    """Return source name -> dataset prefix for the sources that `sft.data` or `dpo.data` draws from.

    Raises:
        ConfigError: `sft.data` or `dpo.data` names a source that `data.sources` does not define.
    """
    known = source_prefixes(recipe.data)
    names = drawn_from(recipe)
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(
            f"data.sources.{unknown[0]}: no path for a source used by `{'sft' if recipe.sft else 'dpo'}.data`.\n"
            f"  Add a path, or use one of {', '.join(known)}."
        )
    return {name: known[name] for name in names}
