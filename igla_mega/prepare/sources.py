"""Prepare every source of a recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.journal import replace_file
from igla_mega.data.prepared import DataSection, indexed_prefix, source_prefixes
from igla_mega.data.remote_files import cache_folder, local_files
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.prepare.bar import say
from igla_mega.prepare.filters import Filters
from igla_mega.prepare.formats import OnError
from igla_mega.prepare.manifest import read_manifest
from igla_mega.prepare.preprocess import FORMAT, Options, Settings, part_prefix, preprocess, summary_of


def prepare_sources(
    data: DataSection,
    *,
    workers: int | None = None,
    progress: bool = True,
    part: tuple[int, int] = (0, 1),
    dry_run: bool = False,
) -> dict[str, str]:
    """Prepare every source of a recipe: `<data.prepared>/<source>.bin` and .idx, and `<data.prepared>/manifest.json`.

    A source whose inputs, tokenizer and options match its manifest is not prepared again.

    Args:
        part: (i, n): prepare the i-th (from 0) of n parts of each source, written as `<source>_0000i-of-0000n`.
        dry_run: True to count only and write nothing.

    Returns:
        Source name -> prefix.

    Raises:
        ConfigError: `preprocess` rejects an input, or the section has no sources, tokenizer or output folder.
    """
    prefixes = source_prefixes(data)
    if not data.tokenizer:
        raise ConfigError("data.tokenizer: not set.\n  Give a Hugging Face folder or a tokenizer.json.")
    tokenizer = load_tokenizer(data.tokenizer)
    entries: dict[str, Any] = {}
    for name, prefix in prefixes.items():
        inputs = data.sources[name]
        if indexed_prefix(inputs, data):
            continue
        settings = Settings(
            workers=workers or data.workers,
            progress=progress,
            label=name if part[1] == 1 else f"{name} {part[0] + 1}/{part[1]}",
            part=part,
            dry_run=dry_run,
        )
        target = part_prefix(prefix, part)
        counts = preprocess(source_files(data, name), target, tokenizer, options=options_of(data), settings=settings)
        if dry_run:
            say(f"{name}: {summary_of(counts)}; nothing written")
        elif part[1] == 1:
            # Written after each source, so that an interrupted run keeps the entries of the finished ones.
            entries[name] = read_manifest(prefix)
            summary = json.dumps({"format": FORMAT, "sources": entries}, indent=2) + "\n"
            replace_file(Path(str(data.prepared)) / "manifest.json", summary.encode())
    return prefixes


def parse_part(text: str) -> tuple[int, int]:
    """Return (i, n) of a text `i/n` with i from 0 to n - 1.

    Raises:
        ConfigError: the text has another form.
    """
    try:
        number, count = map(int, text.split("/"))
        if 0 <= number < count:
            return number, count
    except ValueError:
        pass
    raise ConfigError(f"--shard: {text} is not i/n with i from 0 to n - 1.\n  Use for example 0/4, 1/4, 2/4 and 3/4.")


def options_of(data: DataSection) -> Options:
    """Return the options that a recipe's `data:` section sets."""
    cleaning = getattr(data, "cleaning", None)
    on_error: OnError = getattr(data, "on_error", "stop")
    near = getattr(cleaning, "near_duplicates", None)
    return Options(
        text_key=data.text_key,
        add_bos=getattr(data, "add_bos", "auto"),
        on_error="skip" if data.skip_broken_lines and on_error == "stop" else on_error,
        text_documents=getattr(data, "text_documents", "file"),
        language_key=getattr(data, "language_key", None),
        filters=Filters(
            min_characters=getattr(cleaning, "min_characters", None),
            max_characters=getattr(cleaning, "max_characters", None),
            max_symbol_ratio=getattr(cleaning, "max_symbol_ratio", None),
            languages=getattr(cleaning, "languages", None),
        ),
        exact_duplicates=getattr(cleaning, "exact_duplicates", False),
        near_duplicates=near.model_dump() if near is not None else None,
    )


def source_files(data: DataSection, name: str) -> list[str | Path]:
    """Return the files of a source, with local copies of remote ones."""
    given = data.sources[name]
    return local_files([given] if isinstance(given, str) else given, cache_folder(getattr(data, "cache", None)))


def unigram_entropy(prefixes: Mapping[str, str | Path], weights: Mapping[str, float]) -> float:
    """Return the entropy of the blend's token frequencies, in nats per token: the loss of a model without context.

    Args:
        prefixes: source name -> dataset prefix.
        weights: source name -> weight in the blend; the weights need not add up to 1.
    """
    mixed = np.zeros(0)
    for name, weight in weights.items():
        if weight <= 0:
            continue
        reader = IndexedReader(prefixes[name])
        counts = np.zeros(0, dtype=np.int64)
        for start in range(0, reader.num_tokens, 1 << 24):
            counts = _sum_padded(counts, np.bincount(reader.tokens(start, start + (1 << 24))))
        mixed = _sum_padded(mixed, counts * (weight / reader.num_tokens))
    shares = mixed[mixed > 0] / mixed.sum()
    return float(-(shares * np.log(shares)).sum())


def _sum_padded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the sum of two arrays, the shorter one padded with zeros."""
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))
