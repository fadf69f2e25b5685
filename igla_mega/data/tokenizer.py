"""Any tokenizer: Hugging Face folders, SentencePiece models, tiktoken ranks; and train a byte-level BPE.

Imports `transformers` only for a folder that has no tokenizer.json to read.
"""

import base64
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tokenizers

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>", "<eod>")
_OLDER_FILES = ("vocab.json", "vocab.txt")
"""Of Hugging Face folders without a tokenizer.json."""
_MOST_IDS = 2**31
_NO_FOLDER_FORMAT = (
    "  Give a Hugging Face folder, a tokenizer.json, a SentencePiece *.model or a *.tiktoken file;"
    " `tools/toy_corpus.py --vocab-size N` makes a small one."
)


class Engine(Protocol):
    """The library behind a tokenizer; adds no begin or end token."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back. Adds no begin or end token of its own."""

    path: str
    engine: Any
    """The library's own object."""
    vocab_size: int
    """Largest id + 1, added tokens included: the least `model.vocab_size` that can read its output."""
    eod_id: int | None
    """Id of the end-of-document token; None where the tokenizer has none."""
    codec: Engine
    """The same, behind one interface."""
    file: Path
    """What decides about the ids, and is digested."""
    added: tuple[str, ...] = ()
    """Tokens that are found in a text before all others."""
    written: bytes | None = None
    """Of a tokenizer that had to be converted, its tokenizer.json."""

    def encode(self, text: str) -> list[int]:
        return self.codec.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode several texts in the library's own threads."""
        return self.codec.encode_batch(list(texts))

    def encode_flat(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, uint32, and how many each has, int64."""
        encoded = self.encode_batch(texts)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        ids = itertools.chain.from_iterable(encoded)
        return np.fromiter(ids, dtype=np.uint32, count=int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self.codec.decode([int(i) for i in ids], skip_special_tokens)

    def digest(self) -> str:
        """sha256 of the tokenizer's file: two tokenizers of one digest give the same ids."""
        content = self.written
        if content is None and self.file.is_file():
            content = self.file.read_bytes()
        # What has no file is an encoding known by its name.
        return hashlib.sha256(content or repr((self.path, self.vocab_size)).encode()).hexdigest()


class _HuggingFace:
    def __init__(self, engine: tokenizers.Tokenizer):
        self._engine = engine

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._engine.decode(ids, skip_special_tokens=skip_special_tokens)


class _SentencePiece:
    def __init__(self, engine: Any):
        self._engine = engine

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._engine.encode(texts, num_threads=1)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if not self._engine.is_control(i)]
        return self._engine.decode(ids)


class _Tiktoken:
    def __init__(self, engine: Any):
        self._engine = engine
        self._special = set(engine._special_tokens.values())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._engine.encode(text, allowed_special="all") for text in texts]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if i not in self._special]
        return self._engine.decode(ids)


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Open a Hugging Face folder, a tokenizer.json, a SentencePiece model, a file of tiktoken ranks, or by its name an
    encoding that tiktoken has.

    Args:
        vocab_size: rows of the model's embedding, where a model is known.

    Raises:
        ConfigError: no such tokenizer, a file that is none, or ids that the model has no row for.
    """
    file = tokenizer_file(path)
    if file.suffix == ".tiktoken":
        tokenizer = _load_tiktoken(path, file)
    elif file.suffix == ".model":
        tokenizer = _load_tiktoken(path, file) if _holds_ranks(file) else _load_sentencepiece(path, file)
    else:
        tokenizer = _load_hugging_face(path, file)
    if tokenizer.vocab_size > _MOST_IDS:
        raise ConfigError(f"{file}: has an id of {tokenizer.vocab_size - 1}, the last that data can hold is 2^31 - 1.")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is smaller than the {tokenizer.vocab_size} ids of the tokenizer {path}.\n"
            f"  Set model.vocab_size to {tokenizer.vocab_size} or more, or use another tokenizer."
        )
    return tokenizer


def _load_hugging_face(path: str | Path, file: Path) -> Tokenizer:
    written = None
    try:
        if file.name not in _OLDER_FILES:
            engine = tokenizers.Tokenizer.from_file(str(file))
        else:
            engine = _converted(file.parent)
            written = engine.to_str().encode()
    except (ConfigError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # the library raises plain Exception for malformed files, and Rust's panics for some
        raise ConfigError(f"{file}: not a tokenizer.json ({error}).\n  Save the tokenizer again.") from None
    # Folders often carry their model's limits; a corpus must not be cut or padded by them.
    engine.no_truncation()
    engine.no_padding()
    vocabulary = engine.get_vocab(with_added_tokens=True)
    size = max(vocabulary.values(), default=-1) + 1
    added = tuple(token.content for token in engine.get_added_tokens_decoder().values())
    end = _end_of_document(file, vocabulary)
    return Tokenizer(str(path), engine, size, end, _HuggingFace(engine), file, added, written)


def _converted(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a folder that has only the files of an older class."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ConfigError(
            f"{folder}: has no tokenizer.json, and converting its other files needs transformers.\n"
            "  pip install 'igla-mega[hf]', or save the tokenizer as tokenizer.json."
        ) from None
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True).backend_tokenizer


def _load_sentencepiece(path: str | Path, file: Path) -> Tokenizer:
    sentencepiece = _library("sentencepiece", file)
    try:
        engine = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"{file}: not a SentencePiece model ({error}).\n  Save the tokenizer again.") from None
    end = engine.eos_id() if engine.eos_id() >= 0 else None
    return Tokenizer(str(path), engine, engine.get_piece_size(), end, _SentencePiece(engine), file)


def _load_tiktoken(path: str | Path, file: Path) -> Tokenizer:
    """Ranks alone do not say how a text is cut: a published encoding is known by the file's name, another one says it
    in `<name>.json` beside it (pat_str, special_tokens)."""
    tiktoken = _library("tiktoken", file)
    from tiktoken import registry

    if file.is_file():
        try:
            ranks = _ranks(file)
        except ValueError as error:
            raise ConfigError(f"{file}: not a file of tiktoken ranks ({error}).\n  Save the tokenizer again.") from None
        said = file.with_suffix(".json")
        if said.is_file():
            engine = _described(file, said, ranks, tiktoken)
        else:
            engine = _published(file, ranks, tiktoken, registry)
    else:
        try:
            engine = tiktoken.get_encoding(str(path))
        except Exception as error:  # no network, or no such name
            raise ConfigError(
                f"data.tokenizer: tiktoken has no {path} here ({error}).\n  Give its *.tiktoken file."
            ) from None
    special = engine._special_tokens
    end = next((special[name] for name in (END_OF_DOCUMENT, *_OTHER_ENDS) if name in special), None)
    return Tokenizer(str(path), engine, engine.max_token_value + 1, end, _Tiktoken(engine), file, tuple(special))


def _ranks(file: Path) -> dict[bytes, int]:
    """Token -> rank. Not by tiktoken's own function: it keeps a copy for each path in a folder that all users share,
    and gives that copy when the file has long changed."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line:
            token, _, rank = line.partition(b" ")
            try:
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    numbers = set(ranks.values())
    if len(numbers) < len(ranks) or not all(0 <= number < _MOST_IDS for number in numbers):
        raise ValueError("two tokens of one rank, or a rank that is none")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"no rank for the byte {missing[0]:#04x}")
    return ranks


def _described(file: Path, said: Path, ranks: dict[bytes, int], tiktoken: Any) -> Any:
    """The encoding that `<name>.json` beside the ranks describes."""
    try:
        about = json_text.loads(said.read_bytes())
        special = about.get("special_tokens", {})
        if any(not 0 <= number < _MOST_IDS for number in special.values()):
            raise ValueError("a special token's id is no whole number from 0 to 2^31 - 1")
        return tiktoken.Encoding(file.stem, pat_str=about["pat_str"], mergeable_ranks=ranks, special_tokens=special)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # Rust's panics among them
        raise ConfigError(
            f"{said}: does not describe an encoding ({type(error).__name__}: {error}).\n"
            '  Write {"pat_str": "...", "special_tokens": {"...": ID}}.'
        ) from None


def _published(file: Path, ranks: dict[bytes, int], tiktoken: Any, registry: Any) -> Any:
    registry._find_constructors()
    constructor = registry.ENCODING_CONSTRUCTORS.get(file.stem)
    if constructor is None:
        raise ConfigError(
            f"{file}: ranks alone do not say how a text is cut, and {file.stem} is no encoding that tiktoken has.\n"
            f"  Write {file.with_suffix('.json').name} beside it:"
            ' {"pat_str": "...", "special_tokens": {"...": ID}}.'
        )
    names = constructor.__globals__
    original = names["load_tiktoken_bpe"]
    # Its own description of the encoding, with the ranks from this file in place of a download.
    names["load_tiktoken_bpe"] = lambda *_, **__: ranks
    try:
        return tiktoken.Encoding(**constructor())
    finally:
        names["load_tiktoken_bpe"] = original


def _library(name: str, file: Path) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise ConfigError(f"{file}: needs {name}, which is not installed.\n  pip install 'igla-mega[data]'") from None


def _holds_ranks(file: Path) -> bool:
    """Whether a *.model is a text of base64 tokens and ranks, as Llama 3's is, and no protocol buffer."""
    with open(file, "rb") as stream:
        line = stream.readline(1000).split()
    return len(line) == 2 and line[1].isdigit()


def version(library: str) -> str | None:
    """The installed version, None where it is not there."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


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
        return str(json_text.loads(line)[text_key])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{place}: not a JSON object with the text under `{text_key}` ({error}).\n  Mend or remove the line."
        ) from None


def tokenizer_file(path: str | Path) -> Path:
    """The file that decides about a tokenizer's ids.

    Raises:
        ConfigError: there is none.
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
    """The digest of a tokenizer that need not be opened; None where there is no file of one."""
    try:
        file = tokenizer_file(path) if path else None
    except ConfigError:
        return None
    if file is None or not file.is_file() or file.name in _OLDER_FILES:
        return None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _encoding_names() -> list[str]:
    import tiktoken

    return tiktoken.list_encoding_names()


def _end_of_document(file: Path, vocabulary: dict[str, int]) -> int | None:
    """The folder's `eos_token` if it names one, else the usual names."""
    names = [END_OF_DOCUMENT, *_OTHER_ENDS]
    config = file.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            named = json_text.loads(config.read_bytes()).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{config}: not a JSON object ({error}).\n  Save the tokenizer again.") from None
        named = named.get("content") if isinstance(named, dict) else named
        names = [named, *names] if isinstance(named, str) and named else names
    return next((vocabulary[name] for name in names if name in vocabulary), None)
