"""Text to indexed datasets: streamed, in bounded memory, taken up again where it was killed, the same bytes however."""

import dataclasses
import errno
import hashlib
import json
import platform
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedWriter, publish, token_dtype
from igla_mega.data.journal import Journal, Lock, replace_file
from igla_mega.data.raw_files import LINES
from igla_mega.data.tokenizer import Tokenizer, version
from igla_mega.prepare import fast, formats, giant
from igla_mega.prepare.bar import progress as show_progress
from igla_mega.prepare.bar import say
from igla_mega.prepare.duplicates import Duplicates
from igla_mega.prepare.encoding import Encoded, Job, encode_all, num_workers
from igla_mega.prepare.filters import Filters
from igla_mega.prepare.formats import Input, OnError, Position, input_files
from igla_mega.prepare.manifest import damage, digest_of, index_entry, manifest_path, read_manifest
from igla_mega.prepare.records import texts_of

SHARD_BYTES = 256 << 20
"""Input between two entries of the journal: at most so much is done again after a kill."""
WORTH_A_WORKER_BYTES = 4 << 20
"""Below this much input per worker one is as fast."""
FORMAT = 2
"""Of what `prepare` writes; raised when the same input would give other bytes."""
_DIGEST = re.compile(r"([0-9a-f]{64})?")
_FILES = [".bin", ".quarantine.jsonl", ".manifest.json", ".idx"]


@dataclass(frozen=True)
class Options:
    """What decides about the documents of a dataset, besides its inputs and its tokenizer."""

    text_key: str = "text"
    append_eod: bool = True
    on_error: OnError = "stop"
    """A record without a text: `stop`, `skip` it, or put it aside into `<prefix>.quarantine.jsonl`."""
    text_documents: str = "file"
    """What a document of plain text is: a `file` or a `line`."""
    language_key: str | None = None
    """Key of a record's language tag; documents are counted by it."""
    filters: Filters = dataclasses.field(default_factory=Filters)
    exact_duplicates: bool = False
    """Leave out documents whose text was there before."""
    near_duplicates: Mapping[str, Any] | None = None
    """Leave out documents that are nearly another (MinHash); parameters of `near_duplicates`."""

    @property
    def cleans(self) -> bool:
        return self.filters.any or self.exact_duplicates or self.near_duplicates is not None


@dataclass(frozen=True)
class Counts:
    """What came out of one dataset."""

    documents: int
    tokens: int
    input_bytes: int
    empty: int
    """Documents of no text, left out."""
    broken: int
    """Records left out because they hold no text."""
    seconds: float
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Documents left out, by filter."""
    characters: int = 0
    text_bytes: int = 0


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    options: Options | None = None,
    text_key: str = "text",
    append_eod: bool = True,
    skip_broken_lines: bool = False,
    workers: int | None = None,
    progress: bool = True,
    label: str | None = None,
    part: tuple[int, int] = (0, 1),
    shard_bytes: int = SHARD_BYTES,
    fast_path: bool = True,
    dry_run: bool = False,
) -> Counts:
    """Tokenize text into `<prefix>.bin`, `.idx` and `.manifest.json`, documents in the order of the files.

    Killed at any time, the same call goes on where it was, and ends with the same bytes.

    Args:
        inputs: files, patterns, or folders: JSONL, plain text, Parquet, packed or not.
        options: in place of the three that follow.
        workers: threads or processes; None chooses by cores and size. The output does not depend on it.
        progress: report on stderr, as a bar on a terminal and as lines elsewhere.
        label: name of this dataset in the report.
        part: (i, n): of the input, the i-th of n contiguous parts, i from 0.
        shard_bytes: input between two entries of the journal.
        fast_path: use gigatoken where it is seen to give the same ids.
        dry_run: count, and write nothing.

    Raises:
        ConfigError: an input that is missing, empty or damaged, or has a broken record; an output that cannot be
            written, or that another process is writing.
    """
    options = options or Options(text_key, append_eod, "skip" if skip_broken_lines else "stop")
    files = input_files(inputs)
    if options.append_eod and tokenizer.eod_id is None:
        raise ConfigError(
            f"{tokenizer.path}: this tokenizer has no end-of-document token to append.\n"
            "  Name it as `eos_token` in its tokenizer_config.json, or do not ask for one (no --append-eod)."
        )
    given = formats.whole(files) if part[1] == 1 else formats.share(files, *part)
    work = _Work(str(prefix), given, tokenizer, options, label or Path(prefix).name, progress, shard_bytes, part)
    if (done := work.up_to_date()) is not None and not dry_run:
        if progress:
            say(f"{work.label}: up to date, {done.documents:,} documents, {done.tokens:,} tokens")
        return done
    try:
        if dry_run:
            return work.run(workers, fast_path)
        with Lock(prefix) as lock:
            return work.run(workers, fast_path, work.open_journal(), lock)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise ConfigError(
            f"{error.filename or prefix}: {error.strerror}, while {work.label} was prepared.\n"
            + ("  Free some space" if full else "  Mend the rights, or choose another place")
            + ", and run the same command again: what is finished is kept and not done again."
        ) from None


class _Work:
    """One dataset that is being made."""

    def __init__(
        self,
        prefix: str,
        given: list[Input],
        tokenizer: Tokenizer,
        options: Options,
        label: str,
        progress: bool,
        shard_bytes: int,
        part: tuple[int, int],
    ):
        self.prefix, self.given, self.tokenizer, self.options = prefix, given, tokenizer, options
        self.label, self.progress, self.shard_bytes = label, progress, shard_bytes
        self.total_bytes = sum((i.size if i.stop is None else i.stop) - i.start for i in given)
        stats = {i.path: Path(i.path).stat() for i in given}
        self.made_from: dict[str, Any] = {
            "inputs": [
                {"file": i.path, "bytes": stats[i.path].st_size, "modified_ns": stats[i.path].st_mtime_ns}
                | ({"from": i.start, "to": i.stop} if i.stop is not None else {})
                for i in given
            ],
            "part": list(part),
            "tokenizer": {"path": tokenizer.path, "digest": tokenizer.digest(), "vocab_size": tokenizer.vocab_size},
            "eod_id": tokenizer.eod_id,
            "options": asdict(options),
            "shard_bytes": shard_bytes,
        }
        self.job_digest = self._digest(options)

    def open_journal(self) -> Journal:
        """What is finished; also of a run that stopped at a broken record, of which this one makes something else."""
        stopped = self._digest(dataclasses.replace(self.options, on_error="stop"))
        return Journal(f"{self.prefix}.journal", self.job_digest, continues=stopped)

    def _digest(self, options: Options) -> str:
        # Another path of the same tokenizer is no other job.
        tokenizer = self.made_from["tokenizer"]["digest"]
        decides = {**self.made_from, "tokenizer": tokenizer, "options": asdict(options)}
        return hashlib.sha256(json.dumps([FORMAT, decides], sort_keys=True).encode()).hexdigest()

    def up_to_date(self) -> Counts | None:
        """What is there already, if it is what would be made."""
        try:
            manifest = read_manifest(self.prefix)
        except ConfigError:
            return None
        if manifest is None or manifest["job"] != self.job_digest or damage(self.prefix):
            return None
        return _counts(manifest, 0.0)

    def run(
        self, workers: int | None, fast_path: bool, journal: Journal | None = None, lock: Lock | None = None
    ) -> Counts:
        """Make the dataset; without a journal, only count."""
        began = time.monotonic()
        if journal is not None and journal.finished:
            return self._publish(journal, began)
        workers = num_workers(workers, self.total_bytes, WORTH_A_WORKER_BYTES)
        engine = None
        if fast_path:
            engine, why = fast.open_fast(self.tokenizer, self._sample())
            if engine is None and self.progress:
                say(f"{self.label}: the reference tokenizer is used: {why}")
        state = _State(len(self.given))
        writer = None
        dtype = token_dtype(self.tokenizer.vocab_size)
        if journal is not None:
            kept = self._verified(journal, dtype)
            if kept:
                state = _State.restored(kept[-1])
                if self.progress:
                    say(f"{self.label}: going on behind {state.documents:,} documents, {state.tokens:,} tokens")
            writer = IndexedWriter(self.prefix, dtype, lock=lock, keep=(state.documents, state.tokens))
        duplicates = self._duplicates(writer is not None)
        job = Job(
            self.tokenizer.path,
            engine is not None,
            self.options.text_key,
            self.options.append_eod,
            self.options.language_key,
            self.options.filters,
        )
        aside = _Quarantine(self.prefix, state.aside) if writer and self.options.on_error == "quarantine" else None
        try:
            blocks = self._blocks(Position(*state.position), workers)
            items = ((block, duplicates.of_block(block)) for block in blocks)
            done = state.input_bytes
            with show_progress(self.label, self.total_bytes, self.progress, done) as advance:
                for encoded in encode_all(items, job, self.tokenizer, workers, engine):
                    self._take(encoded, state, writer, aside)
                    advance(encoded.input_bytes, int(encoded.lengths.sum()))
                    if writer and journal and state.since_shard >= self.shard_bytes:
                        self._shard(state, writer, journal, aside)
            if state.documents == 0 and self.made_from["part"][1] == 1:  # a part of many may hold nothing
                raise ConfigError(self._nothing(state))
            if writer is None or journal is None:
                return _counts(state.summary(), time.monotonic() - began)
            if not journal.shards or journal.shards[-1]["position"] != state.position:
                self._shard(state, writer, journal, aside)
            self._complete(state, writer, journal, aside)
        except ConfigError:
            if writer is not None and journal is not None and journal.shards:
                writer.leave()  # what is finished is finished also for `on_error: skip`
            elif writer is not None and journal is not None:
                writer.abandon()
                Path(f"{self.prefix}.quarantine.jsonl.partial").unlink(missing_ok=True)
                journal.path.unlink(missing_ok=True)
            raise
        except BaseException:
            if writer is not None:
                writer.leave()
            raise
        finally:
            if aside is not None:
                aside.close()
        duplicates.remove()
        return self._publish(journal, began)

    def _sample(self) -> list[str]:
        """Texts from the begin of up to eight inputs, and from the middle of those that can be opened there."""
        some = self.given[:: max(1, len(self.given) // 8)][:8]
        places = []
        for i in some:
            places.append(i)
            stop = i.size if i.stop is None else i.stop
            if i.packing is None and i.kind == LINES and stop - i.start > 4 * formats.BLOCK_BYTES:
                middle = formats.line_start(i.path, (i.start + stop) // 2, i.size)
                places.append(i._replace(start=middle, stop=min(stop, middle + formats.BLOCK_BYTES)))
        texts: list[str] = []
        for place in places:
            room = fast.SAMPLE_CHARS // len(places)
            first = next(formats.blocks_of([place], self._how), None)
            for text in _begin_of(first, self.options.text_key) if first is not None else ():
                texts.append(text[: min(room, 20_000)])
                room -= len(texts[-1])
                if room <= 0:
                    break
        return texts

    def _duplicates(self, kept: bool) -> Duplicates:
        options, where = self.options, tempfile.mkdtemp() if not kept else None
        found = Duplicates.find(
            self._texts,
            f"{where}/set" if where else self.prefix,
            exact=options.exact_duplicates,
            near=options.near_duplicates,
            job=self.job_digest,
            label=self.label,
            progress=self.progress,
        )
        if where:
            shutil.rmtree(where)  # what is open stays until it is closed
        return found

    @property
    def _how(self) -> formats.How:
        return formats.How(self.options.text_key, self.options.text_documents, self.options.language_key)

    def _blocks(self, start: Position, workers: int) -> Iterator[formats.Block]:
        return formats.blocks(self.given, start, self._how, files_at_once=min(workers, 4))

    def _texts(self) -> Iterator[tuple[formats.Block, list[str]]]:
        """Every block, and its texts."""
        for block in self._blocks(Position(0, 0, 0), 1):
            yield block, texts_of(block, self.options.text_key, self.options.language_key).texts

    def _take(
        self, encoded: Encoded, state: "_State", writer: IndexedWriter | None, aside: "_Quarantine | None"
    ) -> None:
        for broken in encoded.broken:
            if self.options.on_error == "stop":
                raise ConfigError(
                    f"{broken.place}: {broken.reason}.\n"
                    "  Mend it, or leave such records out: data.on_error=skip or =quarantine (--on-error; also"
                    " data.skip_broken_lines, --skip-broken-lines)."
                )
            if aside is not None:
                aside.add(broken)
        if writer is not None:
            writer.add_parts(encoded.tokens, encoded.lengths)
        state.take(encoded)

    def _shard(self, state: "_State", writer: IndexedWriter, journal: Journal, aside: "_Quarantine | None") -> None:
        """Make sure of what is written, and say so in the journal."""
        writer.flush()
        state.aside = aside.flush() if aside is not None else 0
        before = journal.shards[-1]["tokens"] if journal.shards else 0
        entry = {"bytes": (state.tokens - before) * writer.dtype.itemsize, **writer.take_digests(), **state.entry()}
        journal.add(entry)
        state.since_shard = 0

    def _verified(self, journal: Journal, dtype: np.dtype) -> list[dict[str, Any]]:
        """The finished shards whose bytes are there as the journal says."""
        good = 0
        begin = documents = 0
        try:
            with open(f"{self.prefix}.bin.partial", "rb") as bin_, open(f"{self.prefix}.idx.partial", "rb") as idx:
                for shard in journal.shards:
                    if not _State.fits(shard, len(self.given)):
                        break
                    count = shard["documents"] - documents
                    if digest_of(bin_, begin, shard["bytes"]) != shard["sha256"]:
                        break
                    if digest_of(idx, IndexedWriter.LENGTHS_AT + 4 * documents, 4 * count) != shard["lengths_sha256"]:
                        break
                    begin, documents, good = begin + shard["bytes"], shard["documents"], good + 1
        except FileNotFoundError:
            good = 0
        if good < len(journal.shards) or not good:
            journal.cut(good)
        return journal.shards

    def _complete(self, state: "_State", writer: IndexedWriter, journal: Journal, aside: "_Quarantine | None") -> None:
        writer.complete()
        writer.leave()
        shards = [{"bytes": shard["bytes"], "sha256": shard["sha256"]} for shard in journal.shards]
        summary = state.summary()
        digests = summary.pop("digests")
        for given, digest in zip(self.made_from["inputs"], digests, strict=True):
            given["digest"] = digest
        manifest = {
            "format": FORMAT,
            "job": self.job_digest,
            **self.made_from,
            **summary,
            "dtype": writer.dtype.name,
            "shards": shards,
            "index": index_entry(f"{self.prefix}.idx.partial"),
            "versions": _versions(),
        }
        replace_file(Path(f"{manifest_path(self.prefix)}.partial"), (json.dumps(manifest, indent=2) + "\n").encode())
        journal.add({"finished": True})

    def _publish(self, journal: Journal, began: float) -> Counts:
        publish(self.prefix, _FILES)
        journal.path.unlink(missing_ok=True)
        manifest = read_manifest(self.prefix)
        assert manifest is not None, f"{self.prefix}: published without its manifest"
        counts = _counts(manifest, time.monotonic() - began)
        if self.progress:
            say(f"{self.label}: {summary_of(counts)}")
        return counts

    def _nothing(self, state: "_State") -> str:
        names = ", ".join(i.path for i in self.given[:5]) + (", …" if len(self.given) > 5 else "")
        if state.dropped:
            left = ", ".join(f"{count:,} {name}" for name, count in sorted(state.dropped.items()))
            return f"{names}: no document is left ({left}).\n  Loosen the filters: data.cleaning."
        return f"{names}: no text under `{self.options.text_key}` in any line.\n  Name the key: data.text_key."


def _begin_of(block: formats.Block, text_key: str) -> list[str]:
    if (long_text := giant.long_text(block, text_key)) is not None:
        try:
            return [long_text.sample()]
        except ValueError:
            return []  # told where it is read for good
    return texts_of(block, text_key).texts


class _State:
    """What has come out so far."""

    def __init__(self, num_inputs: int):
        self.position: list[int] = [0, 0, 0, 0]
        self.documents = self.tokens = self.empty = self.broken = 0
        self.characters = self.text_bytes = self.input_bytes = self.since_shard = self.aside = 0
        self.dropped: Counter = Counter()
        self.languages: Counter = Counter()
        self.digests = [""] * num_inputs
        """Of each input's blocks: sha256 of the digest so far and the block's own."""

    @classmethod
    def fits(cls, entry: Mapping[str, Any], num_inputs: int) -> bool:
        """Whether an entry of a journal, which may come from anybody, has what a state is restored from."""
        counts = ["bytes", *(name for name, value in vars(cls(0)).items() if isinstance(value, int))]
        counts.remove("since_shard")
        return (
            all(isinstance(entry.get(name), int) and 0 <= entry[name] < 1 << 63 for name in counts)
            and all(isinstance(entry.get(name), str) for name in ("sha256", "lengths_sha256"))
            and all(isinstance(entry.get(name), dict) for name in ("dropped", "languages"))
            and all(isinstance(entry.get(name), list) for name in ("position", "digests"))
            and len(entry["position"]) == 4
            and all(isinstance(place, int) and 0 <= place < 1 << 63 for place in entry["position"])
            and len(entry["digests"]) == num_inputs
            and all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in entry["digests"])
        )

    @classmethod
    def restored(cls, entry: Mapping[str, Any]) -> "_State":
        state = cls(0)
        for name in vars(state):
            if name in entry:
                setattr(state, name, entry[name])
        state.dropped, state.languages = Counter(entry["dropped"]), Counter(entry["languages"])
        return state

    def take(self, encoded: Encoded) -> None:
        self.position = list(encoded.after)
        self.documents += len(encoded.lengths)
        self.tokens += int(encoded.lengths.sum(dtype=np.int64))
        self.empty += encoded.empty
        self.broken += len(encoded.broken)
        self.characters += encoded.characters
        self.text_bytes += encoded.text_bytes
        self.input_bytes += encoded.input_bytes
        self.since_shard += encoded.input_bytes
        self.dropped.update(encoded.dropped)
        self.languages.update(encoded.languages)
        for number in range(encoded.files[0], encoded.files[1] + 1):
            so_far = bytes.fromhex(self.digests[number])
            self.digests[number] = hashlib.sha256(so_far + encoded.digest).hexdigest()

    def summary(self) -> dict[str, Any]:
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "characters": self.characters,
            "text_bytes": self.text_bytes,
            "input_bytes": self.input_bytes,
            "empty": self.empty,
            "broken": self.broken,
            "dropped": dict(sorted(self.dropped.items())),
            "languages": dict(sorted(self.languages.items())),
            "digests": list(self.digests),
        }

    def entry(self) -> dict[str, Any]:
        return {**self.summary(), "position": self.position, "aside": self.aside}


class _Quarantine:
    """`<prefix>.quarantine.jsonl`, a line for each record put aside: its place, what is wrong, and the record."""

    def __init__(self, prefix: str, size: int):
        path = f"{prefix}.quarantine.jsonl.partial"
        self._stream = open(path, "r+b" if size and Path(path).exists() else "w+b")  # noqa: SIM115
        self._stream.truncate(size)
        self._stream.seek(size)

    def add(self, broken: formats.Broken) -> None:
        record = {"place": broken.place, "reason": broken.reason, "record": broken.record}
        self._stream.write(json.dumps(record).encode() + b"\n")

    def flush(self) -> int:
        """Bytes that are safe."""
        self._stream.flush()
        return self._stream.tell()

    def close(self) -> None:
        self._stream.close()


def _counts(manifest: Mapping[str, Any], seconds: float) -> Counts:
    names = [field.name for field in dataclasses.fields(Counts) if field.name != "seconds"]
    return Counts(**{name: manifest[name] for name in names}, seconds=seconds)


def _versions() -> dict[str, str | None]:
    libraries = ("igla-mega", "numpy", "tokenizers", "gigatoken", "sentencepiece", "tiktoken", "pyarrow", "zstandard")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def part_prefix(prefix: str | Path, part: tuple[int, int]) -> str:
    """Where the i-th of n parts (from 0) of a dataset lies; the whole lies under its own name."""
    return str(prefix) if part[1] == 1 else f"{prefix}_{part[0]:05d}-of-{part[1]:05d}"


def summary_of(counts: Counts) -> str:
    rate = counts.input_bytes / 1e6 / max(counts.seconds, 1e-9)
    text = f"{counts.documents:,} documents, {counts.tokens:,} tokens, {rate:.1f} MB/s"
    if counts.empty:
        text += f"; {counts.empty:,} without text left out"
    if counts.broken:
        text += f"; {counts.broken:,} broken lines skipped"
    for name, count in counts.dropped.items():
        text += f"; {count:,} left out: {name.replace('_', ' ')}"
    return text
