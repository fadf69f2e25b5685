"""Locate prepared datasets: map each source of a recipe to the prefix of its indexed dataset."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.begin import AddBos
from igla_mega.data.indexed import joined_path, part_prefixes
from igla_mega.data.raw_files import SUFFIXES
from igla_mega.data.remote_files import cache_folder, is_remote, local_dataset
from igla_mega.data.tokenizer import bos_rule_at
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
        return [
            "data.sources: not set.\n  Give each name in data.mix its JSONL files. To try a packaged recipe, "
            "--scale laptop makes it small and supplies data."
        ]
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


def refuse_other_bos(recipe: Recipe) -> None:
    """Compare the rule for begin-of-text tokens of a recipe with that of its prepared data.

    Raises:
        ConfigError: they differ, or the rule is `always` and the tokenizer has no such token.
    """
    held, rule = prepared_bos(recipe), recipe.data.add_bos
    if not held and rule != "always":
        return
    wanted = bos_rule_at(recipe.data.tokenizer, rule)
    resolved = f" (auto, by the tokenizer {recipe.data.tokenizer})" if rule == "auto" else ""
    breaches = [
        f"data.sources.{name}: prepared with data.add_bos: {theirs}, but the recipe's data.add_bos is "
        f"{wanted}{resolved}.\n  Set data.add_bos: {theirs}, or prepare the source again."
        for name, theirs in held.items()
        if wanted not in (None, theirs)
    ]
    if breaches:
        raise ConfigError(*breaches)


def bos_rule(recipe: Recipe) -> AddBos:
    """Return the rule for begin-of-text tokens of a run's texts: its prepared data's if known, else the recipe's."""
    rules = set(prepared_bos(recipe).values())
    return rules.pop() if len(rules) == 1 else recipe.data.add_bos  # type: ignore[return-value]


def prepared_bos(recipe: Recipe) -> dict[str, str]:
    """Return the rule for begin-of-text tokens of each source that is prepared and records it: `always` or `never`."""
    try:
        prefixes = source_prefixes(recipe.data)
    except ConfigError:
        return {}  # reported where the data is opened
    held = {}
    for name in prefixes if recipe.form == "text" else drawn_from(recipe):
        for part in part_prefixes(prefixes[name]) if name in prefixes else ():
            if (record := _record(part)) is not None:
                held[name] = recorded_bos(record)
    return held


def recorded_bos(record: Mapping[str, Any]) -> str:
    """Return the rule for begin-of-text tokens of a manifest, or of the `<prefix>.json` of samples."""
    # Before version 0.2 no dataset had them, and no manifest an entry.
    options = record.get("options", record)
    return str(options.get("add_bos", "never")) if isinstance(options, dict) else "never"


def _record(prefix: str) -> dict[str, Any] | None:
    """Return the manifest of a dataset, or the `<prefix>.json` of samples; None if it has neither."""
    for suffix, key in ((".manifest.json", "job"), (".json", "digest")):
        try:
            record = json_text.read(f"{prefix}{suffix}")
        except (OSError, ValueError):  # a damaged manifest is reported where the data is checked
            continue
        if isinstance(record, dict) and key in record:
            return record
    return None
