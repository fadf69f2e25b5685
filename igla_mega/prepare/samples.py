"""Prepare conversations and preference pairs: from JSONL to indexed datasets.

A conversation is one document of `<prefix>`; its target mask is the same document of `<prefix>.targets` (uint8). A pair
is three documents: prompt, chosen, rejected. `<prefix>.json` records a digest of the inputs and options.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import write_text
from igla_mega.config.schema import Recipe
from igla_mega.data import chat, pairs
from igla_mega.data.indexed import IndexedWriter, token_dtype
from igla_mega.data.prepared import TARGETS, sample_prefixes
from igla_mega.data.tokenizer import Tokenizer, load_tokenizer
from igla_mega.prepare.preprocess import input_files

FORMAT = 1
"""Version of the output; raised when the same input would produce other bytes."""


def prepare_samples(recipe: Recipe, *, progress: bool = True) -> dict[str, str]:
    """Prepare every source of a recipe of conversations or pairs that is not up to date.

    Returns:
        Source name -> prefix.

    Raises:
        ConfigError: a line is invalid; or the recipe has no sources, tokenizer, template or output folder.
    """
    data, prefixes = recipe.data, sample_prefixes(recipe)
    if not data.tokenizer:
        raise ConfigError("data.tokenizer: not set.\n  Give a Hugging Face folder or a tokenizer.json.")
    tokenizer = load_tokenizer(data.tokenizer)
    for name, prefix in prefixes.items():
        inputs = data.sources[name]
        if prefix == inputs:
            continue
        files = input_files([inputs] if isinstance(inputs, str) else inputs)
        template = _template(recipe, files)
        stamp = _stamp(recipe, files, tokenizer, template)
        if _is_done(prefix, stamp):
            continue
        began = time.monotonic()
        num_samples, left_out = _write(recipe, files, prefix, tokenizer, template)
        if not num_samples:
            raise ConfigError(f"data.sources.{name}: every line is too long and left out.\n  Raise data.max_length.")
        _seal(prefix, {"digest": stamp, "samples": num_samples, "left_out": left_out})
        if progress:
            note = f"; {left_out:,} too long and left out" if left_out else ""
            seconds = max(time.monotonic() - began, 1e-3)
            took = f"{num_samples / seconds:,.0f} per second, {seconds:.1f} s"
            print(f"{name}: {num_samples:,} {recipe.form.replace('_', ' ')}, {took}{note}", file=sys.stderr, flush=True)
    return prefixes


def _template(recipe: Recipe, files: list[Path]) -> chat.ChatTemplate | None:
    """Return the chat template; None if there is none and no line needs one."""
    try:
        return chat.load_template(recipe.data.tokenizer or "", recipe.data.chat_template)
    except ConfigError:
        if recipe.data.chat_template is not None or any(_has_turns(entry) for f in files for _, entry in _lines(f)):
            raise
        return None


def _lines(file: Path) -> Iterator[tuple[str, dict]]:
    """Yield the lines of a JSONL file with their places."""
    return chat.json_lines(file)


def _has_turns(entry: dict) -> bool:
    """Return True if a line consists of messages and so needs a chat template."""
    plain = {"prompt", "completion", "chosen", "rejected"} & entry.keys()
    return not plain or any(isinstance(entry[key], list) for key in plain)


def _write(
    recipe: Recipe, files: list[Path], prefix: str, tokenizer: Tokenizer, template: chat.ChatTemplate | None
) -> tuple[int, int]:
    """Write one source; return the number of samples written and left out."""
    written = left_out = 0
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    dtype, max_length = token_dtype(tokenizer.vocab_size), recipe.data.max_length or recipe.sequence_length
    if recipe.form == "instructions":
        with IndexedWriter(prefix, dtype) as tokens, IndexedWriter(prefix + TARGETS, np.dtype(np.uint8)) as targets:
            for file in files:
                for place, conversation in chat.read_conversations(file):
                    sample = chat.tokenize(
                        conversation,
                        tokenizer,
                        template,
                        place,
                        max_length=max_length,
                        too_long=recipe.data.too_long,
                    )
                    if sample is None:
                        left_out += 1
                        continue
                    tokens.add(sample.tokens.astype(dtype), np.array([len(sample.tokens)]))
                    targets.add(sample.targets.astype(np.uint8), np.array([len(sample.tokens)]))
                    written += 1
        return written, left_out
    if max_length is None:
        raise ConfigError("data.max_length: not set, and the base model's maximum length is unknown.\n  Set it.")
    with IndexedWriter(prefix, dtype) as tokens:
        for file in files:
            for _, pair in pairs.read_pairs(
                file,
                tokenizer,
                template,
                max_length=max_length,
                max_prompt_length=recipe.data.max_prompt_length or max_length,
                too_long=recipe.data.too_long,
            ):
                if pair is None:
                    left_out += 1
                    continue
                tokens.add(np.concatenate(pair).astype(dtype), np.array([len(part) for part in pair]))
                written += 1
    return written, left_out


def _stamp(recipe: Recipe, files: list[Path], tokenizer: Tokenizer, template: chat.ChatTemplate | None) -> str:
    """Return the digest of everything that determines the output of a source."""
    data = recipe.data
    made_from = {
        "inputs": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "tokenizer": tokenizer.digest(),
        "template": template.source if template else None,
        "form": recipe.form,
        "limits": [data.max_length or recipe.sequence_length, data.max_prompt_length, data.too_long],
    }
    return hashlib.sha256(json.dumps([FORMAT, made_from]).encode()).hexdigest()


def _is_done(prefix: str, stamp: str) -> bool:
    """Return True if the dataset exists and was prepared from the same inputs and options."""
    try:
        return (
            json_text.loads(Path(f"{prefix}.json").read_bytes())["digest"] == stamp and Path(f"{prefix}.idx").is_file()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _seal(prefix: str, content: dict) -> None:
    """Write `<prefix>.json`, after the datasets, as the mark that they are complete."""
    partial = Path(f"{prefix}.json.partial")
    write_text(partial, json.dumps(content, indent=1) + "\n")
    os.replace(partial, f"{prefix}.json")
