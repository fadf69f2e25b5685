"""JSONL to indexed datasets: streamed, in bounded memory, the same bytes for any number of workers."""

import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader, IndexedWriter, token_dtype
from igla_mega.data.tokenizer import Tokenizer, load_tokenizer

BLOCK_BYTES = 1 << 20
"""Input bytes per unit of work: large enough to hide the hand-over, small enough that a few per worker fit anywhere."""
WORTH_A_WORKER_BYTES = 16 << 20
"""A worker process takes 0.3 s to start; below this much input per worker one process is as fast."""
FORMAT = 1
"""Of what `prepare` writes; raised when the same input would give other bytes."""


@dataclass(frozen=True)
class Counts:
    """What came out of one dataset."""

    documents: int
    tokens: int
    input_bytes: int
    empty: int
    """Documents of no text, left out."""
    broken: int
    """Lines left out because `skip_broken_lines` was asked for."""
    seconds: float


@dataclass(frozen=True)
class Job:
    """How a block of lines becomes tokens; what a worker process needs to know."""

    tokenizer: str
    text_key: str
    append_eod: bool
    skip_broken_lines: bool


@dataclass(frozen=True)
class Block:
    """Whole lines of one input file."""

    file: str
    first_line: int
    data: bytes


@dataclass(frozen=True)
class Encoded:
    tokens: np.ndarray
    lengths: np.ndarray
    empty: int
    broken: int
    input_bytes: int


class DataSection(Protocol):
    """The part of a recipe's `data:` that preparation reads."""

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
    def workers(self) -> int: ...


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    append_eod: bool = True,
    skip_broken_lines: bool = False,
    workers: int | None = None,
    progress: bool = True,
    label: str | None = None,
) -> Counts:
    """Tokenize JSONL files into `<prefix>.bin` and `<prefix>.idx`, one document per line, in the order of the files.

    Args:
        inputs: files, patterns, or folders of *.jsonl.
        workers: processes; None chooses by cores and size. The output does not depend on it.
        progress: report on stderr, as a bar on a terminal and as lines elsewhere.
        label: name of this dataset in the report.

    Raises:
        ConfigError: an input that is missing, empty, or has a broken line; an output that cannot be written.
    """
    files = input_files(inputs)
    if append_eod and tokenizer.eod_id is None:
        raise ConfigError(
            f"{tokenizer.path}: this tokenizer has no end-of-document token to append.\n"
            "  Name it as `eos_token` in its tokenizer_config.json, or do not ask for one (no --append-eod)."
        )
    total_bytes = sum(file.stat().st_size for file in files)
    job = Job(tokenizer.path, text_key, append_eod, skip_broken_lines)
    label = label or Path(prefix).name
    began = time.monotonic()
    empty = broken = 0
    try:
        with (
            IndexedWriter(prefix, token_dtype(tokenizer.vocab_size)) as writer,
            _progress(label, total_bytes, progress) as advance,
        ):
            for part in _encode_all(_blocks(files), job, tokenizer, _num_workers(workers, total_bytes)):
                writer.add(part.tokens, part.lengths)
                empty, broken = empty + part.empty, broken + part.broken
                advance(part.input_bytes, len(part.tokens))
            if writer.num_documents == 0:
                names = ", ".join(str(file) for file in files)
                raise ConfigError(f"{names}: no text under `{text_key}` in any line.\n  Name the key: data.text_key.")
    except OSError as error:
        raise ConfigError(
            f"{error.filename or prefix}: {error.strerror}, while {label} was prepared.\n"
            "  Nothing is left half-written: free some space, mend the rights or choose another place, and run again."
        ) from None
    counts = Counts(writer.num_documents, writer.num_tokens, total_bytes, empty, broken, time.monotonic() - began)
    if progress:
        _say(f"{label}: {_summary(counts)}")
    return counts


def prepare_sources(data: DataSection, *, workers: int | None = None, progress: bool = True) -> dict[str, str]:
    """Make every source of a recipe ready to train on: `<data.prepared>/<source>.bin` and .idx, and manifest.json.

    A source whose inputs, tokenizer and options are those of the manifest is not done again.

    Returns:
        Source name -> prefix.

    Raises:
        ConfigError: what `preprocess` refuses, or a section without sources, tokenizer or place.
    """
    prefixes = source_prefixes(data)
    if not data.tokenizer:
        raise ConfigError("data.tokenizer: none given.\n  Give a Hugging Face folder or a tokenizer.json.")
    tokenizer = load_tokenizer(data.tokenizer)
    manifest_file = Path(str(data.prepared)) / "manifest.json"
    entries = _read_manifest(manifest_file)
    for name, prefix in prefixes.items():
        inputs = data.sources[name]
        if prefix == inputs:
            continue
        files = input_files([inputs] if isinstance(inputs, str) else inputs)
        stamp = _stamp(files, tokenizer, data)
        old = entries.get(name, {})
        if old.get("digest") == stamp["digest"] and old.get("output_bytes") == _output_bytes(prefix):
            if progress:
                _say(f"{name}: up to date, {old['documents']:,} documents, {old['tokens']:,} tokens")
            continue
        counts = preprocess(
            files,
            prefix,
            tokenizer,
            text_key=data.text_key,
            skip_broken_lines=data.skip_broken_lines,
            workers=workers or data.workers,
            progress=progress,
            label=name,
        )
        # Written after each source: what an interrupted run finished stays finished.
        entries[name] = {**stamp, **asdict(counts), "output_bytes": _output_bytes(prefix)}
        _replace_text(manifest_file, json.dumps({"format": FORMAT, "sources": entries}, indent=2) + "\n")
    return prefixes


def source_prefixes(data: DataSection) -> dict[str, str]:
    """Where each source's dataset is, or will be put by `prepare_sources`: name -> path without .bin and .idx."""
    if not data.sources:
        raise ConfigError("data.sources: none given.\n  Give each name in data.mix its JSONL files.")
    if not data.prepared and not all(_indexed(path) for path in data.sources.values()):
        raise ConfigError("data.prepared: none given.\n  Name the folder for the prepared datasets.")
    if wrong := [name for name in data.sources if not name or "/" in name or name.startswith(".")]:
        raise ConfigError(
            *[f"data.sources.{name}: cannot name a file.\n  Use no slash, no dot first." for name in wrong]
        )
    prepared = Path(data.prepared or "")
    return {name: _indexed(path) or str(prepared / name) for name, path in data.sources.items()}


def _indexed(path: str | Sequence[str]) -> str | None:
    """The path itself when it already names an indexed dataset (a prefix), as megatron's users have them."""
    return path if isinstance(path, str) and Path(f"{path}.idx").is_file() else None


def unigram_entropy(prefixes: Mapping[str, str | Path], weights: Mapping[str, float]) -> float:
    """Entropy of the blend's token frequencies, in nats per token: the loss of a model that knows no context.

    Args:
        weights: source name -> weight in the blend; they need not add up to 1.
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


def input_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files behind paths, patterns (`*`) and folders, in order; every one there and not empty.

    Raises:
        ConfigError: all that is wrong with them, together.
    """
    files: list[Path] = []
    breaches = []
    for given in map(Path, inputs):
        found = [given]
        if given.is_dir():
            found = sorted(given.glob("*.jsonl"))
        elif not given.exists() and glob.has_magic(str(given)):
            found = sorted(map(Path, glob.glob(str(given))))
        if not found:
            breaches.append(f"{given}: no *.jsonl in this folder, or no file of this pattern.\n  Give JSONL files.")
        for file in found:
            if not file.is_file():
                breaches.append(f"{file}: no such file.\n  Give the path of a JSONL file or a folder of them.")
            elif file.stat().st_size == 0:
                breaches.append(f"{file}: the file is empty.\n  Give it text, or leave it out.")
            elif file.suffix in (".gz", ".bz2", ".xz", ".zst", ".parquet"):
                breaches.append(f"{file}: {file.suffix} is not read yet.\n  Unpack it to JSONL.")
            else:
                files.append(file)
    if breaches:
        raise ConfigError(*breaches)
    return files


def _blocks(files: Iterable[Path]) -> Iterator[Block]:
    """Cut files into blocks of whole lines of about BLOCK_BYTES; a longer line is a block of its own."""
    for file in files:
        first_line = 1
        with open(file, "rb") as stream:
            while data := stream.read(BLOCK_BYTES):
                if not data.endswith(b"\n"):
                    data += stream.readline()
                yield Block(str(file), first_line, data)
                first_line += data.count(b"\n")


def _texts(block: Block, job: Job) -> tuple[list[str], int, int]:
    """Texts of a block, and how many lines had an empty text and how many were broken."""
    texts: list[str] = []
    empty = broken = 0
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if not line or line.isspace():
            continue
        try:
            text = _text(line, job.text_key)
        except ValueError as error:
            if not job.skip_broken_lines:
                raise ConfigError(
                    f"{block.file}:{number}: {error}.\n"
                    "  Mend the line, or leave such lines out with data.skip_broken_lines (--skip-broken-lines)."
                ) from None
            broken += 1
            continue
        if text:
            texts.append(text)
        else:
            empty += 1
    return texts, empty, broken


def _text(line: bytes, text_key: str) -> str:
    """The text of one line; a ValueError says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {line[error.start]:#04x} at column {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {_json_type(record)}, not an object")
    if text_key not in record:
        raise ValueError(f"no key `{text_key}` (there are: {', '.join(map(repr, list(record)[:8])) or 'none'})")
    text = record[text_key]
    if not isinstance(text, str):
        raise ValueError(f"`{text_key}` is a JSON {_json_type(text)}, not a string")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"`{text_key}` has half of a surrogate pair (character {error.start + 1})") from None
    return text


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _encode(block: Block, job: Job, tokenizer: Tokenizer) -> Encoded:
    texts, empty, broken = _texts(block, job)
    tail = [tokenizer.eod_id] if job.append_eod and tokenizer.eod_id is not None else []
    encoded = [ids + tail for ids in tokenizer.encode_batch(texts)]
    # A text of which the tokenizer's normaliser leaves nothing is an empty document too.
    documents = [ids for ids in encoded if len(ids) > len(tail)]
    lengths = np.fromiter(map(len, documents), dtype=np.int32, count=len(documents))
    tokens = np.fromiter(
        itertools.chain.from_iterable(documents),
        dtype=token_dtype(tokenizer.vocab_size),
        count=int(lengths.sum(dtype=np.int64)),
    )
    return Encoded(tokens, lengths, empty + len(encoded) - len(documents), broken, len(block.data))


_worker: tuple[Job, Tokenizer]


def _start_worker(job: Job) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = job, load_tokenizer(job.tokenizer)


def _encode_in_worker(block: Block) -> Encoded:
    job, tokenizer = _worker
    return _encode(block, job, tokenizer)


def _encode_all(blocks: Iterator[Block], job: Job, tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """Encode blocks in order, two per worker under way; one worker is this process."""
    if workers == 1:
        yield from (_encode(block, job, tokenizer) for block in blocks)
        return
    # Spawned, not forked: the tokenizer's and the progress bar's threads hold locks that a fork would copy.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker, initargs=(job,)) as pool:
        try:
            under_way = deque(pool.submit(_encode_in_worker, block) for block in itertools.islice(blocks, 2 * workers))
            while under_way:
                encoded = under_way.popleft().result()
                under_way.extend(pool.submit(_encode_in_worker, block) for block in itertools.islice(blocks, 1))
                yield encoded
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _num_workers(workers: int | None, total_bytes: int) -> int:
    if workers is not None:
        return max(1, workers)
    return max(1, min(len(os.sched_getaffinity(0)), total_bytes // WORTH_A_WORKER_BYTES))


@contextmanager
def _progress(label: str, total_bytes: int, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to call with the bytes and tokens just done."""
    if wanted and sys.stderr.isatty():
        with _bar(label, total_bytes) as advance:
            yield advance
    else:
        yield _Lines(label, total_bytes).advance if wanted else lambda _bytes, _tokens: None


@contextmanager
def _bar(label: str, total_bytes: int) -> Iterator[Callable[[int, int], None]]:
    # Here, because importing rich takes as long as a small corpus.
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[tokens]:,} tokens"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total_bytes, tokens=0)
        done_tokens = 0

        def advance(num_bytes: int, num_tokens: int) -> None:
            nonlocal done_tokens
            done_tokens += num_tokens
            bar.update(task, advance=num_bytes, tokens=done_tokens)

        yield advance


class _Lines:
    """Progress for a log file: a line every ten seconds."""

    def __init__(self, label: str, total_bytes: int):
        self.label, self.total_bytes = label, total_bytes
        self.began = self.said = time.monotonic()
        self.done_bytes = self.done_tokens = 0

    def advance(self, num_bytes: int, num_tokens: int) -> None:
        self.done_bytes += num_bytes
        self.done_tokens += num_tokens
        now = time.monotonic()
        if now - self.said >= 10:
            self.said = now
            rate = self.done_bytes / (now - self.began)
            _say(
                f"{self.label}: {self.done_bytes / self.total_bytes:.0%}, {rate / 1e6:.1f} MB/s,"
                f" {self.done_tokens:,} tokens, {(self.total_bytes - self.done_bytes) / rate:.0f} s left"
            )


def _summary(counts: Counts) -> str:
    rate = counts.input_bytes / 1e6 / max(counts.seconds, 1e-9)
    text = f"{counts.documents:,} documents, {counts.tokens:,} tokens, {rate:.1f} MB/s"
    if counts.empty:
        text += f"; {counts.empty:,} without text left out"
    if counts.broken:
        text += f"; {counts.broken:,} broken lines skipped"
    return text


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _stamp(files: list[Path], tokenizer: Tokenizer, data: DataSection) -> dict[str, Any]:
    """What a prepared source was made from. The digest covers names, sizes and times, not terabytes of content."""
    stats = [(str(file), file.stat()) for file in files]
    inputs = [{"file": file, "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns} for file, stat in stats]
    made_from = {
        "inputs": inputs,
        "tokenizer_digest": tokenizer.digest(),
        "eod_id": tokenizer.eod_id,
        "text_key": data.text_key,
        "skip_broken_lines": data.skip_broken_lines,
    }
    digest = hashlib.sha256(json.dumps([FORMAT, made_from], sort_keys=True).encode()).hexdigest()
    return {**made_from, "digest": digest}


def _output_bytes(prefix: str) -> list[int]:
    """Sizes of .bin and .idx; -1 for one that is not there."""
    files = [Path(f"{prefix}.bin"), Path(f"{prefix}.idx")]
    return [file.stat().st_size if file.is_file() else -1 for file in files]


def _read_manifest(file: Path) -> dict[str, Any]:
    """The manifest's sources; nothing when there is none, or one of another format or damaged: all is done again."""
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        return manifest["sources"] if manifest["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _replace_text(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def _sum_padded(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = max(len(a), len(b))
    return np.pad(a, (0, size - len(a))) + np.pad(b, (0, size - len(b)))
