"""Byte-level BPE tokenizers in the Hugging Face folder format: train one, open any. Never imports `transformers`."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from igla_mega.config.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<eod>")


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Adds no begin or end token of its own."""

    path: str
    engine: tokenizers.Tokenizer
    vocab_size: int
    """Largest id + 1, added tokens included: the least `model.vocab_size` that can read its output."""
    eod_id: int | None
    """Id of the end-of-document token; None where the tokenizer has none."""

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts in the library's own threads."""
        return [encoding.ids for encoding in self.engine.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.engine.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def digest(self) -> str:
        """sha256 of tokenizer.json: two tokenizers of one digest give the same ids."""
        return hashlib.sha256(_tokenizer_json(self.path).read_bytes()).hexdigest()


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Open a Hugging Face folder or a tokenizer.json.

    Args:
        vocab_size: rows of the model's embedding, where a model is known.

    Raises:
        ConfigError: no such tokenizer, a file that is none, or ids that the model has no row for.
    """
    file = _tokenizer_json(path)
    try:
        engine = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for every malformed file
        raise ConfigError(f"{file}: not a tokenizer.json ({error}).\n  Save the tokenizer again.") from None
    # Folders often carry their model's limits; a corpus must not be cut or padded by them.
    engine.no_truncation()
    engine.no_padding()
    vocabulary = engine.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    if vocab_size is not None and size > vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is smaller than the {size} ids of the tokenizer {path}.\n"
            f"  Set model.vocab_size to {size} or more, or use another tokenizer."
        )
    return Tokenizer(str(path), engine, size, _end_of_document(file, vocabulary))


def train_bpe(
    files: Sequence[str | Path], vocab_size: int, out_dir: str | Path, *, text_key: str = "text"
) -> Tokenizer:
    """Train a byte-level BPE on JSONL files and save it as a folder that `transformers.AutoTokenizer` opens.

    The same files in the same order give the same bytes.

    Args:
        vocab_size: number of ids, the 256 bytes and `<|endoftext|>` included.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"vocab_size: {vocab_size} is below 257: 256 bytes and {END_OF_DOCUMENT}.\n  Use 257 or more."
        )
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(_texts(files, text_key), trainer)

    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    engine.save(str(out / "tokenizer.json"))
    ends = {"bos_token": END_OF_DOCUMENT, "eos_token": END_OF_DOCUMENT}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **ends}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (out / "special_tokens_map.json").write_text(json.dumps(ends, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(out)


def _texts(files: Sequence[str | Path], text_key: str) -> Iterator[str]:
    for file in files:
        try:
            with open(file, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield _text(line, text_key, f"{file}:{number}")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror}).\n  Give JSONL files to train on.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8 ({error.reason}).\n  Save it as UTF-8.") from None


def _text(line: str, text_key: str, place: str) -> str:
    try:
        return str(json.loads(line)[text_key])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{place}: not a JSON object with the text under `{text_key}` ({error}).\n  Mend or remove the line."
        ) from None


def _tokenizer_json(path: str | Path) -> Path:
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        what = f"the folder {path} has no tokenizer.json" if path.is_dir() else f"{path}: no such file or folder"
        raise ConfigError(
            f"data.tokenizer: {what}.\n"
            "  Give a Hugging Face folder or a tokenizer.json; `tools/toy_corpus.py --vocab-size N` makes a small one."
        )
    return file


def _end_of_document(file: Path, vocabulary: dict[str, int]) -> int | None:
    """The folder's `eos_token` if it names one, else the usual names."""
    names = [END_OF_DOCUMENT, *_OTHER_ENDS]
    config = file.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{config}: not a JSON object ({error}).\n  Save the tokenizer again.") from None
        named = named.get("content") if isinstance(named, dict) else named
        names = [named, *names] if named else names
    return next((vocabulary[name] for name in names if name in vocabulary), None)
