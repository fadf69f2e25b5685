"""Prepare conversations and preference pairs: from JSONL and Parquet to indexed datasets.

A conversation is one document of `<prefix>`; its target mask is the same document of `<prefix>.targets` (uint8). A pair
is three documents: prompt, chosen, rejected. `<prefix>.json` records a digest of the inputs and options, and how many
lines are too long and left out or cut.
"""

import hashlib
import json
import os
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import write_text
from igla_mega.config.schema import Recipe
from igla_mega.data.indexed import IndexedWriter, token_dtype
from igla_mega.data.prepared import TARGETS, sample_prefixes
from igla_mega.data.tokenizer import Tokenizer, load_tokenizer
from igla_mega.data.tuning import chat, forms, limits, pairs
from igla_mega.prepare.bar import say
from igla_mega.prepare.raw.inputs import input_files
from igla_mega.prepare.records import objects_of
from igla_mega.prepare.sources import source_files

FORMAT = 3
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
    tokenizer = load_tokenizer(data.tokenizer).with_bos(data.add_bos)
    for name, prefix in prefixes.items():
        if prefix == data.sources[name]:
            continue
        files = input_files(source_files(data, name), say if progress else None)
        template = _template(recipe, files, tokenizer)
        stamp = _stamp(recipe, files, tokenizer, template)
        if _is_done(prefix, stamp, recipe.form):
            continue
        began = time.monotonic()
        counts = _write(recipe, files, prefix, tokenizer, template)
        _seal(prefix, {"digest": stamp, **counts, "add_bos": tokenizer.bos_rule})
        if progress:
            notes = [f"; {counts[key]:,} too long and {key.replace('_', ' ')}" for key in ("left_out", "cut")]
            note = "".join(note for note in notes if not note.startswith("; 0 "))
            seconds = max(time.monotonic() - began, 1e-3)
            took = f"{counts['samples'] / seconds:,.0f} per second, {seconds:.1f} s"
            said = f"{name}: {counts['samples']:,} {recipe.form.replace('_', ' ')}, {took}{note}"
            print(said, file=sys.stderr, flush=True)
    return prefixes


def _template(recipe: Recipe, files: list[Path], tokenizer: Tokenizer) -> chat.ChatTemplate | None:
    """Return the chat template; None if there is none and no line needs one."""
    try:
        return chat.load_template(recipe.data.tokenizer or "", recipe.data.chat_template, loaded=tokenizer)
    except ConfigError:
        if recipe.data.chat_template is not None or any(_has_turns(entry) for _, entry in objects_of(files)):
            raise
        return None


def _has_turns(entry: dict) -> bool:
    """Return True if a line consists of messages and so needs a chat template."""
    plain = {"prompt", "completion", "chosen", "rejected"} & entry.keys()
    turns = {"messages", "conversations"} & entry.keys()
    return not plain or bool(turns) or any(isinstance(entry[key], list | dict) for key in plain)


def _write(
    recipe: Recipe, files: list[Path], prefix: str, tokenizer: Tokenizer, template: chat.ChatTemplate | None
) -> Counter[str]:
    """Write one source; return the number of samples written, of these cut, and left out.

    Raises:
        ConfigError: a line is invalid, or no sample is left; an earlier dataset is then unchanged.
    """
    counts = Counter(samples=0, left_out=0, cut=0)
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    data, dtype, ends = recipe.data, token_dtype(tokenizer.vocab_size), limits.end_ids(tokenizer)
    most = limits.Limits(data.max_length or recipe.sequence_length, data.max_prompt_length, data.too_long)
    talks, begin = recipe.form == "instructions", tokenizer.begin.ids
    if most.max_length is None and not talks:
        raise ConfigError("data.max_length: not set, and the base model's maximum length is unknown.\n  Set it.")
    with IndexedWriter(prefix, dtype) as tokens, ExitStack() as stack:
        targets = stack.enter_context(IndexedWriter(prefix + TARGETS, np.dtype(np.uint8))) if talks else None
        for place, entry in objects_of(files):
            whole: chat.Sample | pairs.Pair
            kept: chat.Sample | pairs.Pair | None
            if talks:
                whole = chat.tokenize(forms.conversation_of(entry, place), tokenizer, template, place)
                kept = limits.limit_sample(whole, most, ends, place, begin=begin)
            else:
                whole = pairs.pair_of(entry, tokenizer, template, place)
                kept = limits.limit_pair(whole, most, ends, place, begin=begin)
            counts["samples" if kept else "left_out"] += 1
            counts["cut"] += kept is not None and kept is not whole
            if kept is None:
                continue
            documents = [kept.tokens] if isinstance(kept, chat.Sample) else list(kept)
            tokens.add(np.concatenate(documents).astype(dtype), np.array([len(part) for part in documents]))
            if targets is not None and isinstance(kept, chat.Sample):
                targets.add(kept.targets.astype(np.uint8), np.array([len(kept.tokens)]))
        if not counts["samples"]:
            what = "every line is too long and left out" if counts["left_out"] else "its files have no lines"
            name = Path(prefix).name
            raise ConfigError(f"data.sources.{name}: {what}.\n  Raise data.max_length, or give other files.")
        # Before the new files get their names: after a kill in between, the old digest must not vouch for them.
        Path(f"{prefix}.json").unlink(missing_ok=True)
    return counts


def _stamp(recipe: Recipe, files: list[Path], tokenizer: Tokenizer, template: chat.ChatTemplate | None) -> str:
    """Return the digest of everything that determines the output of a source."""
    data = recipe.data
    made_from = {
        "inputs": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "tokenizer": tokenizer.digest(),
        # Settings beside the tokenizer's file, which its digest does not cover.
        "special": [tokenizer.eod_id, tokenizer.begin.ids, dict(template.special_tokens) if template else None],
        "template": template.source if template else None,
        "form": recipe.form,
        "bos": [tokenizer.bos, tokenizer.add_bos == "always"],  # `always` also applies to rendered messages
        "limits": [data.max_length or recipe.sequence_length, data.max_prompt_length, data.too_long],
    }
    return hashlib.sha256(json.dumps([FORMAT, made_from]).encode()).hexdigest()


def _is_done(prefix: str, stamp: str, form: str) -> bool:
    """Return True if all files of the dataset exist and were prepared from the same inputs and options."""
    parts = (prefix, prefix + TARGETS) if form == "instructions" else (prefix,)
    try:
        whole = all(Path(part + suffix).is_file() for part in parts for suffix in (".bin", ".idx"))
        return whole and json_text.read(Path(f"{prefix}.json"))["digest"] == stamp
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _seal(prefix: str, content: dict) -> None:
    """Write `<prefix>.json`, after the datasets, as the mark that they are complete."""
    partial = Path(f"{prefix}.json.partial")
    write_text(partial, json.dumps(content, indent=1) + "\n")
    os.replace(partial, f"{prefix}.json")
