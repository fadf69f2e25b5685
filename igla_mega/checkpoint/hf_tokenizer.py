"""Carry the tokenizer, the chat template and the generation settings of a model to a Hugging Face folder."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from igla_mega.checkpoint.base import read_base
from igla_mega.checkpoint.folder import TOKENIZER, bos_rule_of, tokenizer_of
from igla_mega.checkpoint.hf_config import read_json
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.data.tuning import chat
from igla_mega.data.tuning.turns import special_ids

GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_TEMPLATE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"
_CARRIED = (
    "tokenizer.json", _SETTINGS, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", _TEMPLATE, "chat_template.json", GENERATION,
)  # fmt: skip
"""Files that are copied unchanged between a Hugging Face folder and a checkpoint's tokenizer folder."""


def carry(source: Path, target: Path) -> None:
    """Copy those files of the tokenizer and of the generation settings that exist."""
    target.mkdir(exist_ok=True)
    for name in _CARRIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def keep_token_ids(config: dict[str, Any], target: Path) -> None:
    """Store the ids of the special tokens, for which a recipe has no key, unless a generation config exists."""
    ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
    if ids and not (target / GENERATION).exists():
        write_json(target / GENERATION, ids)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as transformers formats it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export_tokenizer(checkpoint: Path, recipe: Recipe, hf_dir: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Write tokenizer, chat template and generation settings into a folder; return the token ids for its `config.json`.

    Args:
        checkpoint: checkpoint of the model, or of its adapters.
        recipe: recipe of that checkpoint. After a run on conversations or pairs, the folder gets the template of that
            run, and generation ends at the token that closes its turns.
    """
    bases = list(_bases(checkpoint, recipe))
    source = next(filter(None, [tokenizer_of(checkpoint, recipe), *map(_tokenizer_folder, bases)]), None)
    if source is None:
        tokenizer = recipe.data.tokenizer or "none given"
        say(f"{checkpoint}: its tokenizer ({tokenizer}) does not exist; exported without one")
        return dict.fromkeys(TOKEN_IDS)
    carry(source if source.is_dir() else source.parent, hf_dir)
    template = None
    if recipe.form != "text":
        template = _write_template(source, recipe, hf_dir, say)
    # What the base stops at, the tuned model may still write.
    for file in [folder / GENERATION for folder in map(_tokenizer_folder, bases) if folder is not None]:
        if file.is_file() and not (hf_dir / GENERATION).exists():
            shutil.copyfile(file, hf_dir / GENERATION)
    if recipe.form != "text" or not (hf_dir / GENERATION).exists():
        _write_ends(hf_dir, template)
    rule = bos_rule_of(checkpoint, recipe)
    carried = load_tokenizer(hf_dir) if rule != "auto" and (hf_dir / "tokenizer.json").is_file() else None
    if carried is not None and carried.bos_rule != rule:
        adds = "adds a begin-of-text token" if carried.bos else "adds no begin-of-text token"
        say(f"{hf_dir}: trained with data.add_bos: {rule}, but its tokenizer {adds}; give it texts as in training")
    settings = read_json(hf_dir / GENERATION) if (hf_dir / GENERATION).exists() else {}
    return {key: settings.get(key) for key in TOKEN_IDS}


def _bases(checkpoint: Path, recipe: Recipe) -> Iterator[Path]:
    """Yield the folders that may hold the model that a run started from: checkpoints or Hugging Face folders."""
    if (note := read_base(checkpoint)) is not None:
        yield Path(note["checkpoint"])
    if recipe.base_model is not None:
        yield Path(recipe.base_model)
        yield checkpoint.parent.parent / "base"  # where a run keeps an imported base


def _tokenizer_folder(base: Path) -> Path | None:
    """Return the folder with a model's tokenizer and generation settings, or None."""
    folders = (base / TOKENIZER, base)
    return next((one for one in folders if any((one / name).is_file() for name in _CARRIED)), None)


def _write_template(source: Path, recipe: Recipe, hf_dir: Path, say: Callable[[str], None]) -> chat.ChatTemplate | None:
    """Write the chat template that a run rendered its turns with; return it, or None if it used none."""
    given = recipe.data.chat_template
    try:
        template = chat.load_template(source, given)
    except ConfigError as error:
        if given is None:
            return None  # plain prompts and completions need no template
        # Better none than the tokenizer's own, which is another one.
        say(f"{error}\n  Exported without a chat template.")
        template = None
    if given is not None:
        (hf_dir / "chat_template.json").unlink(missing_ok=True)
        (hf_dir / _TEMPLATE).unlink(missing_ok=True)
        # Without a class transformers would take Llama's tokenizer, with special tokens of its own.
        known = read_json(hf_dir / _SETTINGS) if (hf_dir / _SETTINGS).is_file() else {}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **known}
        settings.pop("chat_template", None)
        if template is not None:
            (hf_dir / _TEMPLATE).write_text(template.source, encoding="utf-8")
            settings["chat_template"] = template.source  # read by what does not know the file
        write_json(hf_dir / _SETTINGS, settings)
    return template


def _write_ends(hf_dir: Path, template: chat.ChatTemplate | None) -> None:
    """Add every token that ends a text or a turn to the generation settings; keep what they contain."""
    if not (hf_dir / "tokenizer.json").is_file():
        return
    tokenizer = load_tokenizer(hf_dir)
    settings = read_json(hf_dir / GENERATION) if (hf_dir / GENERATION).is_file() else None
    given = (settings or {}).get("eos_token_id")
    before = given if isinstance(given, list) else [given]
    found = dict.fromkeys([*before, *_turn_ends(tokenizer, template), tokenizer.eod_id])
    ends = [one for one in found if one is not None]
    if settings is None:
        settings = {"bos_token_id": tokenizer.begin.ids[-1] if tokenizer.begin.ids else tokenizer.eod_id}
    elif ends == [one for one in before if one is not None]:
        return
    write_json(hf_dir / GENERATION, {**settings, "eos_token_id": ends if len(ends) > 1 else (ends or [None])[0]})


def _turn_ends(tokenizer: Any, template: chat.ChatTemplate | None) -> list[int]:
    """Return the id of the special token that closes an answer, or nothing."""
    if template is None:
        return []
    turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}]
    try:
        sample = chat.tokenize(turns, tokenizer, template, "chat template")
        special = special_ids(tokenizer)
    except ConfigError:  # of conversations of another form
        return []
    last = int(sample.tokens[sample.targets][-1])
    return [last] if last in special else []
