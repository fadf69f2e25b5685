"""Convert text to indexed datasets, streamed in bounded memory; an interrupted run resumes to the same bytes."""

import dataclasses
import hashlib
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import regular
from igla_mega.data.begin import AddBos
from igla_mega.data.indexed import IndexedWriter, publish, token_dtype
from igla_mega.data.journal import Journal, Lock, replace_file
from igla_mega.data.prepared import recorded_bos
from igla_mega.data.raw_files import LINES, TEXT
from igla_mega.data.tokenizer import Tokenizer, version
from igla_mega.os_errors import words_of
from igla_mega.prepare import fast, formats, giant
from igla_mega.prepare.bar import progress as show_progress
from igla_mega.prepare.bar import say
from igla_mega.prepare.duplicates import Duplicates
from igla_mega.prepare.encoding import Encoded, Job, encode_all, num_workers
from igla_mega.prepare.filters import Filters
from igla_mega.prepare.formats import Broken, Input, OnError, Position
from igla_mega.prepare.manifest import damage, digest_of, index_entry, manifest_path, read_manifest
from igla_mega.prepare.raw.inputs import input_files
from igla_mega.prepare.records import texts_of
from igla_mega.prepare.state import Quarantine, State

SHARD_BYTES = 256 << 20
"""Input bytes between two journal entries, the maximum that is repeated after a crash."""
WORTH_A_WORKER_BYTES = 4 << 20
"""Input bytes per worker below which a further worker does not pay."""
FORMAT = 3
"""Version of the output of `prepare`; raised when the same input would produce other bytes."""
_FILES = [".bin", ".quarantine.jsonl", ".manifest.json", ".idx"]
"""Files of a dataset in the order in which they get their final names; the .idx marks it as complete."""


@dataclass(frozen=True)
class Options:
    """Options that determine the documents of a dataset, together with its inputs and tokenizer."""

    text_key: str = "text"
    """Key or column of the text in a record."""
    append_eod: bool = True
    """True to append the end-of-document token to each document that does not end in it."""
    add_bos: AddBos = "auto"
    """Rule for begin-of-text tokens in front of each document; a manifest records `auto` as what it resolves to."""
    on_error: OnError = "stop"
    """Handling of a record without text: `stop`, `skip`, or `quarantine` it in `<prefix>.quarantine.jsonl`."""
    text_documents: str = "file"
    """Unit that forms a document of plain text: `file` or `line`."""
    language_key: str | None = None
    """Key of a record's language tag, by which documents are counted."""
    filters: Filters = dataclasses.field(default_factory=Filters)
    """Conditions that a kept document fulfills."""
    exact_duplicates: bool = False
    """True to drop documents whose text occurred before."""
    near_duplicates: Mapping[str, Any] | None = None
    """MinHash parameters for dropping near duplicates; None keeps them."""

    @property
    def cleans(self) -> bool:
        """True if documents may be dropped."""
        return self.filters.any or self.exact_duplicates or self.near_duplicates is not None


@dataclass(frozen=True)
class Settings:
    """Settings of a preparation that do not change the content of the documents."""

    workers: int | None = None
    """Number of threads or processes; None chooses by cores and input size. The output does not depend on it."""
    progress: bool = True
    """True to report on stderr, as a bar on a terminal and as lines elsewhere."""
    label: str | None = None
    """Name of the dataset in the report; None uses the file name of the prefix."""
    part: tuple[int, int] = (0, 1)
    """(i, n): prepare the i-th (from 0) of n contiguous parts of the input."""
    shard_bytes: int = SHARD_BYTES
    """Input bytes between two journal entries."""
    fast_path: bool = True
    """True to use gigatoken if it gives the same ids on a sample."""
    dry_run: bool = False
    """True to count only and write nothing."""


@dataclass(frozen=True)
class Counts:
    """Result of preparing one dataset."""

    documents: int
    tokens: int
    input_bytes: int
    empty: int
    """Number of documents without text, which are dropped."""
    broken: int
    """Number of records that hold no text and were skipped."""
    seconds: float
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Number of dropped documents, by filter."""
    characters: int = 0
    text_bytes: int = 0


def preprocess(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: Tokenizer,
    *,
    options: Options | None = None,
    settings: Settings | None = None,
) -> Counts:
    """Tokenize text into `<prefix>.bin`, `.idx` and `.manifest.json`, with documents in the order of the files.

    If it is interrupted, the same call resumes and produces the same bytes as an uninterrupted one.

    Args:
        inputs: files, patterns or folders of JSONL, plain text (both also compressed), Parquet or Arrow.

    Raises:
        ConfigError: an input is missing, empty or damaged, or has a broken record; or the output cannot be written, or
            another process is writing it.
    """
    options, settings = options or Options(), settings or Settings()
    files = input_files(inputs, say if settings.progress else None)
    if options.append_eod and tokenizer.eod_id is None:
        raise ConfigError(
            f"{tokenizer.path}: this tokenizer has no end-of-document token to append.\n"
            "  Name it as `eos_token` in its tokenizer_config.json, or do not append one (no --append-eod)."
        )
    tokenizer = tokenizer.with_bos(options.add_bos)
    options = dataclasses.replace(options, add_bos=tokenizer.bos_rule)
    given = formats.whole(files) if settings.part[1] == 1 else formats.share(files, *settings.part)
    work = _Preparation(str(prefix), given, tokenizer, options, settings)
    if (done := work.up_to_date()) is not None and not settings.dry_run:
        if settings.progress:
            say(f"{work.label}: up to date, {done.documents:,} documents, {done.tokens:,} tokens")
        return done
    try:
        if settings.dry_run:
            return work.run()
        with Lock(prefix) as lock:
            return work.run(work.open_journal(), lock)
    except OSError as error:
        reason, way_out = str(words_of(error, str(prefix))).split(".\n", 1)
        raise ConfigError(
            f"{reason}, while preparing {work.label}.\n{way_out} Run the same command again: finished shards are kept."
        ) from None


class _Output:
    """Files of an unfinished dataset: tokens and index, journal, and quarantined records."""

    def __init__(self, prefix: str, writer: IndexedWriter, journal: Journal, quarantine: Quarantine | None):
        self.prefix, self.writer, self.journal, self.quarantine = prefix, writer, journal, quarantine

    def shard(self, state: State) -> None:
        """Flush what has been written and record it in the journal."""
        # The data first: a journal entry promises that its bytes are on the disk.
        self.writer.flush()
        state.aside = self.quarantine.flush() if self.quarantine is not None else 0
        shards = self.journal.shards
        before = shards[-1]["tokens"] if shards else 0
        size = (state.tokens - before) * self.writer.dtype.itemsize
        self.journal.add({"bytes": size, **self.writer.take_digests(), **state.entry()})
        state.since_shard = 0

    def refuse(self) -> None:
        """Close after an error of the input: keep finished shards, else remove all files."""
        if self.journal.shards:
            self.writer.leave()  # a run with `on_error: skip` can continue after the finished shards
            return
        self.writer.abandon()
        Path(f"{self.prefix}.quarantine.jsonl.partial").unlink(missing_ok=True)
        self.journal.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the quarantine file."""
        if self.quarantine is not None:
            self.quarantine.close()


class _Preparation:
    """Preparation of one dataset."""

    def __init__(self, prefix: str, given: list[Input], tokenizer: Tokenizer, options: Options, settings: Settings):
        self.prefix, self.given, self.tokenizer, self.options = prefix, given, tokenizer, options
        self.settings, self.label = settings, settings.label or Path(prefix).name
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.total_bytes = sum((i.size if i.stop is None else i.stop) - i.start for i in given)
        stats = {i.path: Path(i.path).stat() for i in given}
        self.made_from: dict[str, Any] = {
            "inputs": [
                {"file": i.path, "bytes": stats[i.path].st_size, "modified_ns": stats[i.path].st_mtime_ns}
                | ({"from": i.start, "to": i.stop} if i.stop is not None else {})
                for i in given
            ],
            "part": list(settings.part),
            "tokenizer": {"path": tokenizer.path, "digest": tokenizer.digest(), "vocab_size": tokenizer.vocab_size},
            "eod_id": tokenizer.eod_id,
            "options": asdict(options),
            "shard_bytes": settings.shard_bytes,
        }
        self.job_digest = self._digest(options)
        self.first_broken: Broken | None = None
        """First broken record of the input that is being read."""

    def open_journal(self) -> Journal:
        """Return the journal of this job, also accepting one of a run with `on_error: stop`."""
        # Shards finished by a run that stopped at a broken record are the same under every `on_error`.
        stopped = self._digest(dataclasses.replace(self.options, on_error="stop"))
        return Journal(f"{self.prefix}.journal", self.job_digest, continues=stopped)

    def _digest(self, options: Options) -> str:
        """Return the digest that identifies this job with the given options."""
        # The tokenizer's digest without its path: a copy elsewhere is the same job.
        tokenizer = self.made_from["tokenizer"]["digest"]
        inputs = {**self.made_from, "tokenizer": tokenizer, "options": asdict(options)}
        return hashlib.sha256(json.dumps([FORMAT, inputs], sort_keys=True).encode()).hexdigest()

    def up_to_date(self) -> Counts | None:
        """Return the counts of the existing dataset if it is the result of the same job, else None."""
        try:
            manifest = read_manifest(self.prefix)
        except ConfigError:
            return None
        if manifest is None or manifest["job"] != self.job_digest or damage(self.prefix):
            return None
        if recorded_bos(manifest) != self.options.add_bos:
            return None
        return _counts(manifest, 0.0)

    def run(self, journal: Journal | None = None, lock: Lock | None = None) -> Counts:
        """Prepare the dataset; without a journal, count only."""
        began = time.monotonic()
        if journal is not None and journal.finished:
            return self._publish(journal, began)
        workers = num_workers(self.settings.workers, self.total_bytes, WORTH_A_WORKER_BYTES)
        engine = self._fast_tokenizer()
        state = State(len(self.given)) if journal is None else self._resumed(journal)
        writer = None
        if journal is not None:
            writer = IndexedWriter(self.prefix, self.dtype, lock=lock, keep=(state.documents, state.tokens))
        duplicates = self._duplicates(writer is not None)
        output = None
        if writer is not None and journal is not None:
            aside = Quarantine(self.prefix, state.aside) if self.options.on_error == "quarantine" else None
            output = _Output(self.prefix, writer, journal, aside)
        try:
            self._encode(state, output, duplicates, workers, engine)
            if output is None or journal is None:
                return _counts(state.summary(), time.monotonic() - began)
            if not journal.shards or journal.shards[-1]["position"] != state.position:
                output.shard(state)
            self._complete(state, output)
        except ConfigError:
            if output is not None:
                output.refuse()
            raise
        except BaseException:
            if output is not None:
                output.writer.leave()
            raise
        finally:
            if output is not None:
                output.close()
        duplicates.remove()
        return self._publish(journal, began)

    def _fast_tokenizer(self) -> fast.FastTokenizer | None:
        """Return gigatoken if it is enabled and gives the same ids on a sample of the input."""
        if not self.settings.fast_path:
            return None
        engine, reason = fast.open_fast(self.tokenizer, self._sample())
        if engine is None and self.settings.progress:
            say(f"{self.label}: using the reference tokenizer: {reason}")
        return engine

    def _resumed(self, journal: Journal) -> State:
        """Return the state after the finished shards that are intact."""
        kept = self._verified(journal)
        if not kept:
            return State(len(self.given))
        state = State.restored(kept[-1])
        if self.settings.progress:
            say(f"{self.label}: resuming after {state.documents:,} documents, {state.tokens:,} tokens")
        return state

    def _encode(
        self,
        state: State,
        output: _Output | None,
        duplicates: Duplicates,
        workers: int,
        engine: fast.FastTokenizer | None,
    ) -> None:
        """Encode the rest of the input and write it shard by shard.

        Raises:
            ConfigError: a broken record under `on_error: stop`, or no document at all.
        """
        options = self.options
        job = Job(
            self.tokenizer.path,
            engine is not None,
            options.text_key,
            options.append_eod,
            self.tokenizer.bos,
            options.language_key,
            options.filters,
        )
        blocks = self._blocks(Position(*state.position), workers)
        items = ((block, duplicates.of_block(block)) for block in blocks)
        with show_progress(self.label, self.total_bytes, self.settings.progress, state.input_bytes) as advance:
            for encoded in encode_all(items, job, self.tokenizer, workers, engine):
                self._take(encoded, state, output)
                advance(encoded.input_bytes, int(encoded.lengths.sum()))
                if output is not None and state.since_shard >= self.settings.shard_bytes:
                    output.shard(state)
        if state.documents == 0 and self.settings.part[1] == 1:  # one of several parts may be empty
            raise ConfigError(self._nothing(state))
        self._refuse_fruitless(state)

    def _sample(self) -> list[str]:
        """Return texts from the beginning of up to eight inputs, and from the middle of large plain JSONL files."""
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
            # Every place contributes its share of the characters, so that one huge file cannot hide the others.
            for text in _beginning(first, self.options.text_key) if first is not None else ():
                texts.append(text[: min(room, 20_000)])
                room -= len(texts[-1])
                if room <= 0:
                    break
        return texts

    def _duplicates(self, kept: bool) -> Duplicates:
        """Search for duplicates; the result is stored next to the dataset (`kept`) or removed at once."""
        options, temporary = self.options, tempfile.mkdtemp() if not kept else None
        found = Duplicates.find(
            self._texts,
            f"{temporary}/set" if temporary else self.prefix,
            exact=options.exact_duplicates,
            near=options.near_duplicates,
            job=self.job_digest,
            label=self.label if self.settings.progress else None,
        )
        if temporary:
            shutil.rmtree(temporary)  # the mapped file remains readable until it is closed
        return found

    @property
    def _how(self) -> formats.How:
        """Options that determine the records of a file."""
        return formats.How(self.options.text_key, self.options.text_documents, self.options.language_key)

    def _blocks(self, start: Position, workers: int) -> Iterator[formats.Block]:
        """Return the blocks of the input from a position on."""
        return formats.blocks(self.given, start, self._how, files_at_once=min(workers, 4))

    def _texts(self) -> Iterator[tuple[formats.Block, list[str]]]:
        """Yield every block with its texts."""
        for block in self._blocks(Position(0, 0, 0), 1):
            yield block, texts_of(block, self.options.text_key, self.options.language_key).texts

    def _take(self, encoded: Encoded, state: State, output: _Output | None) -> None:
        """Write an encoded block and add it to the state.

        Raises:
            ConfigError: a broken record under `on_error: stop`, or the file before this one has nothing else.
        """
        if encoded.files[0] != state.file:
            self._refuse_fruitless(state)
            self.first_broken = None
        for broken in encoded.broken:
            self.first_broken = self.first_broken or broken
            if self.options.on_error == "stop":
                other_key = broken.reason.startswith("no key ")
                key = "Set data.text_key (--json-keys) if the text has another key. " if other_key else ""
                raise ConfigError(
                    f"{broken.place}: {broken.reason}.\n"
                    f"  {key}Fix it, or drop such records: data.on_error=skip or =quarantine (--on-error; also"
                    " data.skip_broken_lines, --skip-broken-lines)."
                )
            if output is not None and output.quarantine is not None:
                output.quarantine.add(broken)
        if output is not None:
            output.writer.add_parts(encoded.tokens, encoded.lengths)
        state.take(encoded)

    def _refuse_fruitless(self, state: State) -> None:
        """Refuse an input of which every record was skipped: that is a wrong key or a damaged file, not a broken line.

        Raises:
            ConfigError: the input that was read last has no text.
        """
        if not state.file_broken or state.file_texts:
            return
        given = self.given[state.file]
        # Of a file that is cut among several parts, one may hold nothing but a broken line.
        cut = (given.start, given.stop) not in ((0, None), (0, given.size))
        whole_text = given.kind == TEXT and self.options.text_documents == "file"
        if cut or whole_text:
            return
        first = f"; the first: {self.first_broken.reason}" if self.first_broken else ""
        raise ConfigError(
            f"{given.path}: no text in any of its records ({state.file_broken:,} broken{first}).\n"
            "  Set data.text_key (--json-keys) to the key of the text, or remove the file from the inputs."
        )

    def _verified(self, journal: Journal) -> list[dict[str, Any]]:
        """Return the finished shards whose bytes match the journal, and cut the journal after them."""
        good = 0
        begin = documents = 0
        try:
            with (
                open(f"{self.prefix}.bin.partial", "rb", opener=regular) as bin_,
                open(f"{self.prefix}.idx.partial", "rb", opener=regular) as idx,
            ):
                for shard in journal.shards:
                    if not State.fits(shard, len(self.given)):
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

    def _complete(self, state: State, output: _Output) -> None:
        """Complete the index and write the manifest, both under temporary names."""
        writer, journal = output.writer, output.journal
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
        # From here on a restart only renames: the journal marks the temporary files as complete.
        journal.add({"finished": True})

    def _publish(self, journal: Journal, began: float) -> Counts:
        """Rename the files to their final names and return the counts of the manifest."""
        publish(self.prefix, _FILES)
        journal.path.unlink(missing_ok=True)
        manifest = read_manifest(self.prefix)
        assert manifest is not None, f"{self.prefix}: published without its manifest"
        counts = _counts(manifest, time.monotonic() - began)
        if self.settings.progress:
            say(f"{self.label}: {summary_of(counts)}")
        return counts

    def _nothing(self, state: State) -> str:
        """Return the error for a dataset without documents."""
        names = ", ".join(i.path for i in self.given[:5]) + (", …" if len(self.given) > 5 else "")
        if state.dropped:
            left = ", ".join(f"{count:,} {name}" for name, count in sorted(state.dropped.items()))
            return f"{names}: the filters drop every document ({left}).\n  Loosen the filters: data.cleaning."
        return f"{names}: no text under `{self.options.text_key}` in any line.\n  Set data.text_key."


def _beginning(block: formats.Block, text_key: str) -> list[str]:
    """Return the texts of a block, or the beginning of one that is too long to hold."""
    if (long_text := giant.long_text(block, text_key)) is not None:
        try:
            return [long_text.sample()]
        except ValueError:
            return []  # reported later, when the block is encoded
    return texts_of(block, text_key).texts


def _counts(manifest: Mapping[str, Any], seconds: float) -> Counts:
    """Return the counts that a manifest records."""
    names = [field.name for field in dataclasses.fields(Counts) if field.name != "seconds"]
    return Counts(**{name: manifest[name] for name in names}, seconds=seconds)


def _versions() -> dict[str, str | None]:
    """Return the versions of Python and of the libraries that affect the output."""
    libraries = ("igla-mega", "numpy", "tokenizers", "gigatoken", "sentencepiece", "tiktoken", "pyarrow", "zstandard")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def part_prefix(prefix: str | Path, part: tuple[int, int]) -> str:
    """Return the prefix of part (i, n) of a dataset, i from 0; the prefix itself if there is one part only."""
    return str(prefix) if part[1] == 1 else f"{prefix}_{part[0]:05d}-of-{part[1]:05d}"


def summary_of(counts: Counts) -> str:
    """Return the counts as one line for the report."""
    rate = counts.input_bytes / 1e6 / max(counts.seconds, 1e-9)
    text = f"{counts.documents:,} documents, {counts.tokens:,} tokens, {rate:.1f} MB/s, {counts.seconds:.1f} s"
    if counts.empty:
        text += f"; {counts.empty:,} without text left out"
    if counts.broken:
        text += f"; {counts.broken:,} broken lines skipped"
    for name, count in counts.dropped.items():
        text += f"; {count:,} left out: {name.replace('_', ' ')}"
    return text
