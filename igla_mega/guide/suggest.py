"""Suggest a recipe for a folder of data: short, commented, with what the files show in place of placeholders."""

import functools
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from igla_mega.checkpoint.hf_config import model_of, read_json
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import base_folder, load_recipe
from igla_mega.config.names import printable, safe_name
from igla_mega.config.schema import Model
from igla_mega.data.raw_files import ROWS, TEXT
from igla_mega.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from igla_mega.data.tuning import chat, forms
from igla_mega.prepare.formats import How, Input, blocks_of, whole
from igla_mega.prepare.raw.inputs import input_files
from igla_mega.prepare.records import objects_of, texts_of

GOALS = {
    "pretrain": "text",
    "continue": "text",
    "sft": "instructions",
    "lora": "text or instructions",
    "dpo": "preference_pairs",
}
"""Goal -> kind of the data that it needs."""
NUM_SAMPLES = 200
"""Number of records from which keys, lengths and characters per token are measured."""
_SAMPLED_CHARACTERS = 20_000
_COUNTED_BYTES, _USUAL_COMPRESSION = 32 << 20, 4
_USUAL_TEXT_KEYS = ("text", "content", "body", "document", "raw_content", "code")
_RATES = {"pretrain": 3e-4, "continue": 5e-5, "sft": 2e-5, "lora": 2e-4, "dpo": 5e-7}
_SMALL_RATE, _SMALL = 1e-3, 100_000_000
"""Learning rate of a model trained from random weights with fewer than so many parameters."""
_EPOCHS = {"pretrain": 1, "continue": 1, "sft": 2, "lora": 3, "dpo": 1}
_FEWEST_STEPS = 100
"""Number of steps that the batch size leaves, if the data allows it."""
_TOKENIZER_BYTES = 8 << 20
"""Maximum bytes of text from which a tokenizer is trained."""
_SHAPES = ((10**7, 256, 4), (10**8, 512, 8), (10**9, 768, 12), (10**10, 2048, 24), (10**20, 4096, 32))
"""Tokens of the data up to which a model from random weights has this hidden size and number of layers."""


@dataclass(frozen=True)
class Found:
    """Facts about a folder of data."""

    files: list[Path]
    num_bytes: int
    form: str
    """`text`, `instructions` or `preference_pairs`."""
    text_key: str
    texts: list[str]
    """Texts of the sampled records, the first `_SAMPLED_CHARACTERS` of each; of conversations their turns, joined."""
    keys: list[str]
    """Keys of the sampled records; empty for plain text."""
    text_bytes: int
    """Bytes of text in all records, estimated from the sample."""
    num_records: int
    """Number of records, estimated for files above `_COUNTED_BYTES`."""
    has_turns: bool = False
    """True if records consist of messages, which need a chat template."""


def suggest(data: Path, base: str | None, goal: str, out: Path, *, ranks: int = 1, models: Path | None = None) -> str:
    """Write a recipe for a goal to `out`, check it, and return what was found, as text.

    Args:
        data: a file, or a folder of them.
        base: a model to start from; to pretrain, one whose tokenizer and shape are taken. None only to pretrain, which
            then trains a tokenizer on the data, next to `out`.
        ranks: number of ranks that the batch size is to be divisible by.
        models: folder in which `base` is looked up.

    Raises:
        ConfigError: an input does not exist or does not suit the goal, or `out` exists; nothing was written.
    """
    if goal not in GOALS:
        raise ConfigError(f"--goal: {goal} is not one of {', '.join(GOALS)}.")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{out}: already exists and would be overwritten.\n  Give another --out, or move it away.")
    if not out.parent.is_dir():
        raise ConfigError(f"--out: {out.parent} is no folder.\n  Create it, or give another path.")
    if base is None and goal != "pretrain":
        raise ConfigError(f"--base: not given, but {goal} starts from a trained model.\n  Give its folder.")
    if not data.exists():
        raise ConfigError(f"--data: {data} does not exist.\n  Give a file of text, or a folder of them.")
    folder = base_folder(base, models) if base is not None else None
    found = look(data)
    if found.form not in GOALS[goal]:
        fitting = [f"--goal {name}" for name, forms in GOALS.items() if found.form in forms]
        keys = f" with the keys {', '.join(found.keys)}" if found.keys else ""
        raise ConfigError(
            f"--goal {goal}: needs {GOALS[goal].replace('_', ' ')}, but {found.files[0]} holds "
            f"{found.form.replace('_', ' ')}{keys}.\n  Use {' or '.join(fitting)}, or other data."
        )
    model = shape_of(folder) if folder is not None else None
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".init_") as unfinished:
        if folder is not None:
            place, made = _tokenizer_place(folder), None
        else:
            place, made = Path(unfinished, "tokenizer"), out.with_name(f"{out.stem}_tokenizer")
            if made.exists():
                raise ConfigError(f"{made}: already exists and would be overwritten.\n  Give another --out.")
            _train_tokenizer(found, place)
        facts = _Facts(data, found, folder, goal, load_tokenizer(place), model, made or place, ranks)
        text = _recipe(facts, out)
        draft = Path(unfinished, "draft.yaml")
        draft.write_text(text, encoding="utf-8")
        load_recipe(draft)  # before anything is written under its final name
        if made is not None:
            os.rename(place, made)
        with open(out, "x", encoding="utf-8") as file:
            file.write(text)
    return "\n".join(facts.lines())


def look(data: Path) -> Found:
    """Read a sample of the records of a file or folder, and return what they are.

    Raises:
        ConfigError: no file of a known format, or records that no goal can read.
    """
    files = input_files([data])
    num_bytes = sum(file.stat().st_size for file in files)
    structured = [given for given in whole(files) if given.kind != TEXT]
    if not structured:
        texts = [text[:_SAMPLED_CHARACTERS] for text in islice(_texts(files, "text"), NUM_SAMPLES)]
        return Found(files, num_bytes, "text", "text", texts, [], num_bytes, len(files))
    each = max(1, NUM_SAMPLES // len(structured))
    records = [record for given in structured[:NUM_SAMPLES] for record in islice(_records(given), each)]
    if not records:
        raise ConfigError(f"{structured[0].path}: no record could be read.\n  Give JSON lines, plain text or Parquet.")
    keys = list(dict.fromkeys(key for record in records for key in record))
    form = _form(keys)
    has_turns = form != "text" and _check_samples(form, [Path(given.path) for given in structured[:NUM_SAMPLES]], each)
    key = _text_key(records, keys, data) if form == "text" else "text"
    texts = [record[key] if form == "text" else _joined(record) for record in records]
    sampled = sum(
        len(json.dumps(record, default=str, ensure_ascii=False).encode("utf-8", "replace")) + 1 for record in records
    )
    count = max(1, sum(_num_records(given, len(records) / sampled) for given in structured))
    text_bytes = count * sum(len(text.encode("utf-8", "replace")) for text in texts) // len(records)
    texts = [text[:_SAMPLED_CHARACTERS] for text in texts]
    return Found(files, num_bytes, form, key, texts, keys, text_bytes, count, has_turns)


def shape_of(folder: Path) -> Model:
    """Return the shape of a base model: a Hugging Face folder or a checkpoint.

    Raises:
        ConfigError: its configuration cannot be read, or is not that of a supported model.
    """
    config = folder / "config.json"
    if config.is_file():
        return model_of(read_json(config), config)[0]
    model = load_recipe(folder / "recipe.yaml").model
    if model is None:
        raise ConfigError(f"{folder / 'recipe.yaml'}: model: not given.\n  Use a checkpoint that `train` wrote.")
    return model


def _tokenizer_place(folder: Path) -> Path:
    """Return the tokenizer of a base model: of its folder, of a checkpoint, or the one that its recipe names."""
    if (folder / "tokenizer").is_dir():
        return folder / "tokenizer"
    if not (folder / "config.json").is_file() and (named := load_recipe(folder / "recipe.yaml").data.tokenizer):
        return Path(named)
    return folder


def _records(given: Input) -> Iterator[dict[str, Any]]:
    """Yield the records of a file of JSON lines or rows, without those that are no mappings."""
    for block in blocks_of([given], How(text_key=None)):
        if given.kind == ROWS:
            yield from (row for row, _ in block.data)
            continue
        for line in bytes(block.data).split(b"\n"):
            if not line.strip():
                continue
            try:
                record = json_text.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def _num_records(given: Input, per_byte: float) -> int:
    """Return the number of records of a file: counted, or estimated for a large one."""
    if given.kind == ROWS:
        return sum(len(block.data) for block in blocks_of([given], How(text_key=None)))
    if given.size > _COUNTED_BYTES:
        return int(given.size * per_byte * (_USUAL_COMPRESSION if given.packing else 1))
    return sum(
        not line.isspace() and line != b"" for b in blocks_of([given], How()) for line in bytes(b.data).split(b"\n")
    )


def _texts(files: list[Path], key: str) -> Iterator[str]:
    """Yield the texts of files, as `prepare` reads them."""
    for block in blocks_of(whole(files), How(key)):
        yield from texts_of(block, key).texts


def _form(keys: list[str]) -> str:
    """Return the kind of records with these keys."""
    if {"chosen", "rejected"} <= {*keys}:
        return "preference_pairs"
    talks = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"})
    return "instructions" if any({*keys} >= one for one in talks) else "text"


def _check_samples(form: str, files: list[Path], each: int) -> bool:
    """Return True if a sampled conversation or pair consists of turns.

    Raises:
        ConfigError: `prepare` would refuse one of them.
    """
    turns = False
    for file in files:
        for place, entry in islice(objects_of([file]), each):
            if form == "instructions":
                turns |= not isinstance(forms.conversation_of(entry, place), tuple)
                continue
            answers: list[Any] = [entry.get(key) for key in ("chosen", "rejected")]
            if not all(answers) or len({type(answer) for answer in answers}) > 1:
                raise ConfigError(f"{place}: not a preference pair (`chosen`, `rejected`).\n  Fix or remove the line.")
            if isinstance(answers[0], list | dict):
                turns = True
                for answer in answers:
                    forms.checked([answer] if isinstance(answer, dict) else answer, place)
    return turns


def _text_key(records: list[dict[str, Any]], keys: list[str], place: Path) -> str:
    """Return the key of the text: a usual one, else the one with the longest texts.

    Raises:
        ConfigError: no key holds text in every record.
    """
    fitting = [key for key in keys if all(isinstance(record.get(key), str) for record in records)]
    if not fitting:
        raise ConfigError(
            f"{place}: no key holds text in all of {len(records)} records; keys are {', '.join(keys) or 'none'}.\n"
            "  Give records with text under one key, conversations (`messages`) or pairs (`chosen`, `rejected`)."
        )
    usual = next((key for key in _USUAL_TEXT_KEYS if key in fitting), None)
    return usual or max(fitting, key=lambda key: sum(len(record[key]) for record in records))


def _joined(record: Mapping[str, Any]) -> str:
    """Return all text of a conversation or pair; of a pair the longer answer alone."""

    def text(value: Any) -> str:
        value = [value] if isinstance(value, dict) else value
        if isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, dict)]
            return "\n".join(str(turn.get("content") or turn.get("value") or "") for turn in turns)
        return value if isinstance(value, str) else ""

    answers = [text(record[key]) for key in ("chosen", "rejected") if key in record]
    others = [text(value) for key, value in record.items() if key not in ("chosen", "rejected")]
    return "\n".join(part for part in (*others, max(answers, key=len, default="")) if part)


def _train_tokenizer(found: Found, out: Path) -> None:
    """Train a byte-level BPE on the first texts of the data."""
    sample, size = out.with_suffix(".jsonl"), 0
    with open(sample, "w", encoding="utf-8") as lines:
        for text in _texts(found.files, found.text_key):
            lines.write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
            if size > _TOKENIZER_BYTES:
                break
    if not size:
        raise ConfigError(f"{found.files[0]}: holds no text.\n  Give files with text under `{found.text_key}`.")
    train_bpe([sample], 4096 if found.num_bytes < 10 << 20 else 16384 if found.num_bytes < 1 << 30 else 32000, out)


@dataclass(frozen=True)
class _Facts:
    """What a recipe is written from."""

    data: Path
    found: Found
    base: Path | None
    goal: str
    tokenizer: Tokenizer
    base_model: Model | None
    tokenizer_place: Path
    ranks: int

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of each sampled record."""
        return [len(ids) for ids in self.tokenizer.encode_batch(self.found.texts)] or [1]

    @property
    def num_tokens(self) -> int:
        """Estimated tokens of all data."""
        sampled = sum(len(text.encode()) for text in self.found.texts)
        return max(1, round(self.found.text_bytes * sum(self.lengths) / max(1, sampled)))

    @property
    def model(self) -> Model:
        """Shape of the model: the base's, or one of a size that fits the data."""
        if self.base_model is not None:
            return self.base_model
        width, layers = next((width, layers) for most, width, layers in _SHAPES if self.num_tokens <= most)
        vocab = -(-self.tokenizer.vocab_size // 64) * 64
        return Model(
            hidden_size=width,
            num_layers=layers,
            num_heads=max(4, width // 128),
            num_kv_heads=max(2, width // 512),
            intermediate_size=-(-width * 8 // 3 // 64) * 64,
            vocab_size=vocab,
            max_position=2048 if self.num_tokens > 10**7 else 256,
        )

    @property
    def sequence_length(self) -> int:
        """Length of a training sequence: that of the model for text, else what the longest sample needs."""
        longest = self.model.max_position
        if self.found.form == "text":
            return min(longest, 2048)
        # A chat template adds a few tokens per turn, and records beyond the sample may be longer.
        return min(longest, max(64, -(-max(self.lengths) * 3 // 2 // 64) * 64 + 64))

    @property
    def rows(self) -> int:
        """Estimated number of rows of a pass over the data."""
        return max(1, self.num_tokens // self.sequence_length) if self.found.form == "text" else self.found.num_records

    @property
    def batch_size(self) -> int:
        """Sequences per step: a power of two times the ranks, small enough for `_FEWEST_STEPS` steps."""
        rows, size = self.rows * _EPOCHS[self.goal], 1
        while size < 128 and rows // (2 * size * self.ranks) >= _FEWEST_STEPS:
            size *= 2
        return size * self.ranks

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        small = self.goal == "pretrain" and self.model.num_parameters() < _SMALL
        return _SMALL_RATE if small else _RATES[self.goal]

    def lines(self) -> list[str]:
        """Return what was found, for the user."""
        found, kind = self.found, self.found.form.replace("_", " ")
        where = f" under `{found.text_key}`" if found.keys and found.form == "text" else ""
        return [
            f"{self.data}: {len(found.files):,} files, {found.num_bytes:,} bytes of {kind}{where}, about "
            f"{found.num_records:,} records and {self.num_tokens:,} tokens",
            f"{self.tokenizer_place}: {self.tokenizer.vocab_size:,} tokens",
            f"{self.base or 'new model'}: {self.model.num_parameters():,} parameters, sequences of "
            f"{self.sequence_length:,} of at most {self.model.max_position:,} tokens",
        ]


def _recipe(facts: _Facts, out: Path) -> str:
    """Return the recipe as text."""
    found, goal, steps = facts.found, facts.goal, facts.rows * _EPOCHS[facts.goal] // facts.batch_size
    name = safe_name(facts.data.resolve().stem)
    lines = [f"# {' '.join(printable(line).split())}" for line in (f"Goal: {goal}", *facts.lines())]
    lines += ["# `igla-mega explain KEY` explains a key.", ""]
    if goal == "pretrain":
        lines += ["model: # trained from random weights", *_indented(facts.model)]
    else:
        assert facts.base is not None, "refused before"
        lines.append(f"base_model: {_quoted(facts.base.resolve())}")
    if goal == "lora":
        targets = "[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]"
        lines += ["", "lora:", "  rank: 16", "  alpha: 32 # twice the rank is usual", f"  target_modules: {targets}"]
    if goal == "dpo":
        lines += ["", "dpo:", "  beta: 0.1 # pull to the reference model, 0.01 to 0.5"]
    if goal == "sft" or (goal == "lora" and found.form == "instructions"):
        lines += ["", "sft: {} # the loss is taken over the answers alone"]
    epochs = _EPOCHS[goal]
    unit = "pairs" if goal == "dpo" else f"sequences of {facts.sequence_length:,} tokens"
    lines += [
        "",
        "training:",
        f"  learning_rate: {facts.rate:g} # peak",
        f"  batch_size: {facts.batch_size} # {unit} per step, divisible by {facts.ranks} ranks",
        f"  sequence_length: {facts.sequence_length} # tokens",
        f"  epochs: {epochs} # passes over the data: about {max(1, steps):,} steps",
        "  warmup_ratio: 0.03 # of all steps",
        "",
        "data:",
    ]
    if found.form == "text":
        lines.append(f"  mix: {{{_quoted(name)}: 1.0}}")
    lines += [
        f"  sources: {{{_quoted(name)}: {_quoted(facts.data.resolve())}}}",
        f"  tokenizer: {_quoted(facts.tokenizer_place.resolve())}",
        f"  prepared: {_quoted(out.resolve().with_name(f'{out.stem}_prepared'))} # written by `igla-mega prepare`",
    ]
    if found.form == "text" and found.keys:
        lines.append(f"  text_key: {_quoted(found.text_key)} # keys: {printable(', '.join(found.keys[:8]))!r}")
    if found.form != "text":
        longest = max(facts.lengths)
        lines.append(
            f"  too_long: skip # longest of {len(found.texts)} samples: {longest:,} tokens without its template"
        )
        if found.has_turns and not _has_template(facts.tokenizer_place):
            lines.append("  chat_template: plain # the tokenizer has none of its own")
    lines.append(f"  validation_fraction: {0.05 if facts.rows < 10_000 else 0.01} # held out")
    return "\n".join(lines) + "\n"


def _indented(model: Model) -> list[str]:
    """Return the keys of a model that differ from their defaults, as indented lines."""
    plain = {key: value for key, value in model.model_dump(mode="json").items() if value is not None}
    usual = {key: field.default for key, field in Model.model_fields.items()}
    return [f"  {key}: {json.dumps(value)}" for key, value in plain.items() if usual.get(key) != value]


def _has_template(place: Path) -> bool:
    try:
        chat.load_template(place)
    except ConfigError:
        return False
    return True


def _quoted(text: object) -> str:
    """Return text as YAML: as it is if YAML reads it as text, else in quotes."""
    plain = str(text)
    is_word = re.fullmatch(r"[A-Za-z/][\w./-]*", plain, re.ASCII) and not re.fullmatch(
        r"[yn]|null|true|false|o[nf]f?|yes|no", plain, re.I
    )
    return plain if is_word else json.dumps(plain, ensure_ascii=False)
