"""Load a tokenizer (Hugging Face folder, SentencePiece model, tiktoken ranks) or train a byte-level BPE.

Imports `transformers` only for a Hugging Face folder without a tokenizer.json.
"""

import base64
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import tokenizers

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_bytes, regular
from igla_mega.data.begin import (
    NO_BEGIN,
    AddBos,
    Begin,
    of_hugging_face,
    of_sentencepiece,
    of_tiktoken,
    settings_beside,
)
from igla_mega.untrusted import trial
from igla_mega.untrusted.child import no_panic

END_OF_DOCUMENT = "<|endoftext|>"
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<eod>")
_OLDER_FILES = ("vocab.json", "vocab.txt")
"""Vocabulary files of Hugging Face folders without a tokenizer.json."""
_MOST_IDS = 2**31
"""Exclusive upper bound of token ids: datasets store int32."""
_NO_FOLDER_FORMAT = (
    "  Give a Hugging Face folder, a tokenizer.json, a SentencePiece *.model or a *.tiktoken file;"
    " `tools/toy_corpus.py --vocab-size N` trains a small one."
)


class Engine(Protocol):
    """Library behind a tokenizer; adds no begin-of-text or end-of-text token."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class Tokenizer:
    """Conversion between text and token ids; `encode` adds no special token, `encode_text` those of a begin."""

    path: str
    """Path or encoding name from which the tokenizer was loaded."""
    engine: Any
    """The library's own tokenizer object."""
    vocab_size: int
    """Largest id + 1, added tokens included: the minimum `model.vocab_size` for its output."""
    eod_id: int | None
    """Id of the end-of-document token; None if the tokenizer has none."""
    codec: Engine
    """`engine` behind the interface common to all libraries."""
    file: Path
    """File that determines the ids; the input of `digest`."""
    added: tuple[str, ...] = ()
    """Added tokens, matched in a text before all others."""
    written: bytes | None = None
    """The tokenizer.json of a tokenizer that had to be converted, else None."""
    begin: Begin = NO_BEGIN
    """Begin-of-text tokens of the tokenizer."""
    add_bos: AddBos = "auto"
    """Rule by which texts begin with them: the recipe's `data.add_bos`."""

    def with_bos(self, rule: AddBos) -> "Tokenizer":
        """Return the tokenizer under another rule for begin-of-text tokens.

        Raises:
            ConfigError: the rule is `always`, and the tokenizer has no such token.
        """
        self.begin.under(rule, self.path)
        return dataclasses.replace(self, add_bos=rule)

    @property
    def bos(self) -> tuple[int, ...]:
        """Ids in front of a text under the rule."""
        return self.begin.under(self.add_bos, self.path)

    @property
    def bos_rule(self) -> Literal["always", "never"]:
        """Rule with `auto` resolved, as manifests record it."""
        return "always" if self.bos else "never"

    def lead(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """Return the begin-of-text ids that the ids of a text lack."""
        bos = self.bos
        return [] if tuple(ids[: len(bos)]) == bos else list(bos)

    def encode_text(self, text: str) -> list[int]:
        """Encode one text that a model reads from its beginning, such as a prompt."""
        ids = self.encode(text)
        return [*self.lead(ids), *ids]

    def encode(self, text: str) -> list[int]:
        """Encode one text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts, in the library's own threads if it has any."""
        with no_panic(self.path):
            return self.codec.encode_batch(list(texts))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the concatenated ids of all texts, uint32, and the number of tokens per text, int64."""
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        ids = itertools.chain.from_iterable(encoded)
        return np.fromiter(ids, dtype=np.uint32, count=int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        with no_panic(self.path):
            return self.codec.decode([int(i) for i in ids], skip_special_tokens)

    def digest(self) -> str:
        """Return the sha256 of the tokenizer's file: tokenizers with equal digests produce equal ids."""
        content = self.written
        if content is None and self.file.is_file():
            content = read_bytes(self.file)
        # A tokenizer without a file is a published encoding, identified by its name and size.
        return hashlib.sha256(content or repr((self.path, self.vocab_size)).encode()).hexdigest()


class _HuggingFace:
    """`Engine` over a Hugging Face `tokenizers.Tokenizer`."""

    def __init__(self, engine: tokenizers.Tokenizer):
        self._engine = engine

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._engine.decode(ids, skip_special_tokens=skip_special_tokens)


class _SentencePiece:
    """`Engine` over a SentencePieceProcessor."""

    def __init__(self, engine: Any):
        self._engine = engine

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        # One thread: the callers already encode blocks in parallel.
        return self._engine.encode(texts, num_threads=1)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if not self._engine.is_control(i)]
        return self._engine.decode(ids)


class _Tiktoken:
    """`Engine` over a tiktoken Encoding."""

    def __init__(self, engine: Any):
        self._engine = engine
        self._special = set(engine._special_tokens.values())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._engine.encode(text, allowed_special="all") for text in texts]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._special]
        return self._engine.decode(ids)


def load_tokenizer(path: str | Path, vocab_size: int | None = None, *, tried: bool = False) -> Tokenizer:
    """Open a Hugging Face folder, tokenizer.json, SentencePiece model, tiktoken ranks file, or tiktoken encoding name.

    Args:
        vocab_size: number of rows in the model's embedding; None skips the check against it.
        tried: True if another process of the same job has loaded it, so that it needs no trial.

    Raises:
        ConfigError: no such tokenizer, an invalid file, one that takes too much time or memory for its own texts, or
            ids beyond the model's embedding.
    """
    file = tokenizer_file(path)
    if not tried and file.is_file():
        trial.of_file(file, lambda: _opened(path, file))
    tokenizer = _opened(path, file)
    if tokenizer.vocab_size > _MOST_IDS:
        raise ConfigError(
            f"{file}: has token id {tokenizer.vocab_size - 1}, above the maximum of 2^31 - 1 in a dataset."
        )
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer {path}.\n"
            f"  Set model.vocab_size to {tokenizer.vocab_size} or more, or use another tokenizer."
        )
    return tokenizer


def _opened(path: str | Path, file: Path) -> Tokenizer:
    """Open a tokenizer with the library of its file."""
    if file.suffix == ".tiktoken":
        return _load_tiktoken(path, file)
    if file.suffix == ".model":
        return _load_tiktoken(path, file) if _holds_ranks(file) else _load_sentencepiece(path, file)
    return _load_hugging_face(path, file)


def _load_hugging_face(path: str | Path, file: Path) -> Tokenizer:
    """Open a tokenizer.json, or convert a folder of older files."""
    written = None
    try:
        if file.name not in _OLDER_FILES:
            engine = tokenizers.Tokenizer.from_file(str(file))
        else:
            engine = _converted(file.parent)
            written = engine.to_str().encode()
        # A tokenizer.json often carries its model's length limits, which must not truncate or pad a corpus.
        engine.no_truncation()
        engine.no_padding()
        vocabulary = engine.get_vocab(with_added_tokens=True)
        begin = of_hugging_face(engine, file, vocabulary)
    except (ConfigError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    # The library raises plain Exception for malformed files, and for some a Rust panic, which is a BaseException.
    except BaseException as error:
        raise ConfigError(f"{file}: not a tokenizer.json ({error}).\n  Save the tokenizer again.") from None
    size = max(vocabulary.values(), default=-1) + 1
    added = tuple(token.content for token in engine.get_added_tokens_decoder().values())
    end = _end_of_document(file, vocabulary)
    return Tokenizer(str(path), engine, size, end, _HuggingFace(engine), file, added, written, begin)


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """Convert the tokenizer of a folder that has only vocabulary files of an older class."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError(
            f"{folder}: has no tokenizer.json, and converting its other files requires transformers.\n"
            "  pip install 'igla-mega[hf]', or save the tokenizer as tokenizer.json."
        ) from None
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True).backend_tokenizer


def _load_sentencepiece(path: str | Path, file: Path) -> Tokenizer:
    """Open a SentencePiece model."""
    sentencepiece = _library("sentencepiece", file)
    try:
        engine = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{file}: not a SentencePiece model ({error}).\n  Save the tokenizer again.") from None
    end = engine.eos_id() if engine.eos_id() >= 0 else None
    codec, begin = _SentencePiece(engine), of_sentencepiece(engine, file)
    return Tokenizer(str(path), engine, engine.get_piece_size(), end, codec, file, begin=begin)


def _load_tiktoken(path: str | Path, file: Path) -> Tokenizer:
    """Open a file of tiktoken ranks, or a published encoding by its name.

    Ranks alone do not define how a text is split. A published encoding is recognized by the file's name; any other one
    needs `<name>.json` next to it, with pat_str and special_tokens.
    """
    tiktoken = _library("tiktoken", file)
    from tiktoken import registry

    if file.is_file():
        try:
            ranks = _ranks(file)
        except ValueError as error:
            raise ConfigError(f"{file}: not a file of tiktoken ranks ({error}).\n  Save the tokenizer again.") from None
        description = file.with_suffix(".json")
        if description.is_file():
            engine = _described(file, description, ranks, tiktoken)
        else:
            engine = _published(file, ranks, tiktoken, registry)
    else:
        try:
            engine = tiktoken.get_encoding(str(path))
        except Exception as error:  # no network, or no such name
            raise ConfigError(
                f"data.tokenizer: tiktoken cannot load {path} ({error}).\n  Give its *.tiktoken file."
            ) from None
    special = engine._special_tokens
    end = next((special[name] for name in (END_OF_DOCUMENT, *_OTHER_ENDS) if name in special), None)
    codec, size, begin = _Tiktoken(engine), engine.max_token_value + 1, of_tiktoken(special, file)
    return Tokenizer(str(path), engine, size, end, codec, file, tuple(special), begin=begin)


def _ranks(file: Path) -> dict[bytes, int]:
    """Return token -> rank of a file; raise ValueError where it is malformed."""
    # Not tiktoken.load.load_tiktoken_bpe: it caches by path in a temporary folder shared by all users, and returns
    # the stale copy after the file has changed.
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(file).splitlines(), 1):
        if line:
            token, _, rank = line.partition(b" ")
            try:
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    numbers = set(ranks.values())
    if len(numbers) < len(ranks) or not all(0 <= number < _MOST_IDS for number in numbers):
        raise ValueError("two tokens with the same rank, or a rank outside 0 to 2^31 - 1")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"no rank for the byte {missing[0]:#04x}")
    return ranks


def _described(file: Path, description: Path, ranks: dict[bytes, int], tiktoken: Any) -> Any:
    """Return the encoding described by the `<name>.json` next to the ranks."""
    try:
        about = json_text.read(description)
        special = about.get("special_tokens", {})
        if any(not 0 <= number < _MOST_IDS for number in special.values()):
            raise ValueError("a special token's id is not an integer from 0 to 2^31 - 1")
        return tiktoken.Encoding(file.stem, pat_str=about["pat_str"], mergeable_ranks=ranks, special_tokens=special)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # a Rust panic is a BaseException
        raise ConfigError(
            f"{description}: does not describe an encoding ({type(error).__name__}: {error}).\n"
            '  Write {"pat_str": "...", "special_tokens": {"...": ID}}.'
        ) from None


def _published(file: Path, ranks: dict[bytes, int], tiktoken: Any, registry: Any) -> Any:
    """Return the published encoding with the file's name, built from the file's ranks."""
    registry._find_constructors()
    constructor = registry.ENCODING_CONSTRUCTORS.get(file.stem)
    if constructor is None:
        raise ConfigError(
            f"{file}: ranks alone do not define how a text is split, and tiktoken has no encoding {file.stem}.\n"
            f"  Write {file.with_suffix('.json').name} next to it:"
            ' {"pat_str": "...", "special_tokens": {"...": ID}}.'
        )
    names = constructor.__globals__
    original = names["load_tiktoken_bpe"]
    # tiktoken's constructor defines the encoding but downloads the ranks. Replacing its loader for the duration of the
    # call substitutes the ranks of this file.
    names["load_tiktoken_bpe"] = lambda *_, **__: ranks
    try:
        return tiktoken.Encoding(**constructor())
    finally:
        names["load_tiktoken_bpe"] = original


def _library(name: str, file: Path) -> Any:
    """Import an optional library that a tokenizer file requires."""
    try:
        return __import__(name)
    except ImportError:
        raise ConfigError(
            f"{file}: requires {name}, which is not installed.\n  pip install 'igla-mega[data]'"
        ) from None


def _holds_ranks(file: Path) -> bool:
    """Return True if a *.model is a text of base64 tokens and ranks, as Llama 3's is, not a protocol buffer."""
    with open(file, "rb", opener=regular) as stream:
        line = stream.readline(1000).split()
    return len(line) == 2 and line[1].isdigit()


def version(library: str) -> str | None:
    """Return the installed version of a library, or None if it is not installed."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def train_bpe(
    files: Sequence[str | Path], vocab_size: int, out_dir: str | Path, *, text_key: str = "text"
) -> Tokenizer:
    """Train a byte-level BPE on JSONL files and save it as a folder that `transformers.AutoTokenizer` opens.

    The same files in the same order produce the same bytes.

    Args:
        vocab_size: number of ids, including the 256 bytes and `<|endoftext|>`.

    Raises:
        ConfigError: `vocab_size` is below 257, or a file cannot be read.
    """
    if vocab_size < 257:
        raise ConfigError(
            f"vocab_size: {vocab_size} is below 257, the 256 bytes and {END_OF_DOCUMENT}.\n  Use 257 or more."
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
    """Yield the text of every line that is not blank."""
    for file in files:
        try:
            with open(file, encoding="utf-8", opener=regular) as lines:
                for number, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield _text(line, text_key, f"{file}:{number}")
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror}).\n  Give JSONL files to train on.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: not UTF-8 ({error.reason}).\n  Save it as UTF-8.") from None


def _text(line: str, text_key: str, place: str) -> str:
    """Return the text of one JSONL line; `place` is its file:line for the error."""
    try:
        return str(json_text.loads(line)[text_key])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{place}: not a JSON object with the text under `{text_key}` ({error}).\n  Fix or remove the line."
        ) from None


def tokenizer_file(path: str | Path) -> Path:
    """Return the file that determines a tokenizer's ids.

    Raises:
        ConfigError: no such file exists.
    """
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.json", "tokenizer.model", *_OLDER_FILES)
        file = next((path / name for name in names if (path / name).is_file()), None)
        file = file or next(iter(sorted(path.glob("*.tiktoken"))), None)
        what = f"the folder {path} has no tokenizer.json"
    else:
        named = path.suffix == "" and version("tiktoken") and str(path) in _encoding_names()
        file = path if path.is_file() else path.with_suffix(".tiktoken") if named else None
        what = f"{path}: no such file or folder"
    if file is None:
        raise ConfigError(f"data.tokenizer: {what}.\n{_NO_FOLDER_FORMAT}")
    return file


def digest_at(path: str | Path | None) -> str | None:
    """Return the digest of a tokenizer without opening it; None if that requires a conversion or there is no file."""
    try:
        file = tokenizer_file(path) if path else None
    except ConfigError:
        return None
    if file is None or not file.is_file() or file.name in _OLDER_FILES:
        return None
    return hashlib.sha256(read_bytes(file)).hexdigest()


def content_digest(path: str | Path | None) -> str | None:
    """Return a digest of a tokenizer's vocabulary files, also of one that requires a conversion; None without files."""
    try:
        file = tokenizer_file(path) if path else None
    except ConfigError:
        return None
    if file is None or not file.is_file():
        return None
    digest = hashlib.sha256(read_bytes(file))
    if file.name in _OLDER_FILES and (merges := file.with_name("merges.txt")).is_file():
        digest.update(read_bytes(merges))
    return digest.hexdigest()


def bos_rule_at(path: str | Path | None, rule: AddBos) -> Literal["always", "never"] | None:
    """Return a rule for begin-of-text tokens with `auto` resolved by a tokenizer; None where there is no tokenizer.

    Raises:
        ConfigError: the tokenizer is invalid, or has no such token and the rule is `always`.
    """
    if rule == "never":
        return rule
    try:
        tokenizer_file(path or "")
    except ConfigError:
        return None if rule == "auto" else rule
    return load_tokenizer(path or "").with_bos(rule).bos_rule


def _encoding_names() -> list[str]:
    """Return the names of tiktoken's published encodings."""
    import tiktoken

    return tiktoken.list_encoding_names()


def _end_of_document(file: Path, vocabulary: dict[str, int]) -> int | None:
    """Return the id of the folder's `eos_token` if it names one, else of the first common end token; None if none."""
    names = [END_OF_DOCUMENT, *_OTHER_ENDS]
    named = settings_beside(file).get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    names = [named, *names] if isinstance(named, str) and named else names
    return next((vocabulary[name] for name in names if name in vocabulary), None)
