"""Encode blocks of text into tokens with threads or processes; order and result do not depend on their number."""

import hashlib
import itertools
import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from igla_mega.data.indexed import token_dtype
from igla_mega.data.tokenizer import Tokenizer, load_tokenizer
from igla_mega.prepare import fast, giant
from igla_mega.prepare.filters import Filters
from igla_mega.prepare.formats import Block, Broken, Position
from igla_mega.prepare.records import Sentences, texts_of

MAX_THREADS = 4
"""Maximum number of workers run as threads; more are processes, since parsing JSON holds the interpreter lock."""


@dataclass(frozen=True)
class Job:
    """Settings of a worker that encodes blocks; pickled for worker processes."""

    tokenizer: str
    """Path of the tokenizer."""
    fast: bool
    """True to encode with gigatoken."""
    text_key: str = "text"
    append_eod: bool = True
    bos: tuple[int, ...] = ()
    """Ids in front of each document."""
    language_key: str | None = None
    filters: Filters = field(default_factory=Filters)


@dataclass(frozen=True)
class Encoded:
    """Result of encoding one block."""

    tokens: list[np.ndarray]
    """Concatenated ids of the documents, in one or several arrays."""
    lengths: np.ndarray
    """Length of each document in tokens, int32 [documents]."""
    characters: int
    """Number of characters of the documents, without begin-of-text and end-of-document tokens."""
    text_bytes: int
    """Number of UTF-8 bytes of the documents."""
    empty: int
    """Number of documents without text."""
    broken: list[Broken]
    """Records that hold no text."""
    dropped: Counter
    """Number of dropped documents, by filter."""
    languages: Counter
    """Number of documents, by language tag."""
    digest: bytes
    """sha256 of the block."""
    after: Position
    """Position at which reading continues after the block."""
    input_bytes: int
    """Bytes on disk that the block took."""
    files: tuple[int, int]
    """Numbers of the first and the last input that the block comes from."""


class Encoder:
    """Tokenizer of one worker."""

    def __init__(self, job: Job, tokenizer: Tokenizer | None = None, engine: fast.FastTokenizer | None = None):
        self.job = job
        tokenizer = tokenizer or load_tokenizer(job.tokenizer, tried=True)
        self.eod_id = tokenizer.eod_id
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._bos = np.array(job.bos, self.dtype)
        self.engine: Any = engine or fast.FastTokenizer(tokenizer) if job.fast else tokenizer

    def encode(self, block: Block, unwanted: np.ndarray | None = None) -> Encoded:
        """Encode a block and release its data.

        Args:
            unwanted: True for each text to drop, bool [texts]; counted as `duplicate`.
        """
        job = self.job
        digest = _digest(block)
        if (long_text := giant.long_text(block, job.text_key)) is not None and job.language_key is None:
            return self._encode_giant(block, long_text, digest, unwanted)
        read = texts_of(block, job.text_key, job.language_key)
        block.data = None  # releases the memory now: the queue still refers to the block
        texts, languages = read.texts, read.languages
        dropped: Counter = Counter()
        if unwanted is not None:
            dropped["duplicate"] += int(unwanted.sum())
            texts = [text for text, out in zip(texts, unwanted, strict=True) if not out]
            languages = [tag for tag, out in zip(languages, unwanted, strict=False) if not out]
        texts, tags, by_filter = job.filters.keep(texts, languages)
        dropped.update(by_filter)
        arrays, lengths = self._arrays(texts)
        full = lengths > 0
        lengths = lengths[full]
        if full.any() and (self._eod is not None or len(self._bos)):
            arrays, lengths = self._framed(np.concatenate(arrays), lengths)
        return Encoded(
            arrays,
            lengths.astype(np.int32),
            sum(map(len, texts)),
            sum(len(text) if text.isascii() else len(text.encode()) for text in texts),
            # A text that the tokenizer's normalizer reduces to nothing counts as an empty document too.
            read.empty + int((~full).sum()),
            read.broken,
            dropped,
            Counter(tag or "unknown" for tag in tags),
            digest,
            block.after,
            block.input_bytes,
            block.files,
        )

    @property
    def _eod(self) -> int | None:
        """Id to append to each document, or None."""
        return self.eod_id if self.job.append_eod else None

    def _arrays(self, texts: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the concatenated ids of the texts in the dataset's dtype, and the number of tokens per text."""
        if not texts:
            return [], np.zeros(0, np.int64)
        if any(isinstance(text, Sentences) for text in texts):
            documents = [text.parts if isinstance(text, Sentences) else (text,) for text in texts]
            ids, lengths = self._arrays([sentence for document in documents for sentence in document])
            return ids, np.add.reduceat(lengths, np.cumsum([0, *map(len, documents[:-1])]))
        if max(map(len, texts)) <= fast.PIECE_CHARS:
            flat, lengths = self.engine.encode_flat(texts)
            return [flat.astype(self.dtype)], lengths
        arrays, sizes = [], []
        for text in texts:
            parts = [self.engine.encode_flat([piece])[0] for piece in fast.pieces(iter([text]), self.engine)]
            arrays += [part.astype(self.dtype) for part in parts]
            sizes.append(sum(map(len, parts)))
        return arrays, np.array(sizes, dtype=np.int64)

    def _framed(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Return ids and lengths of documents with the begin and end tokens that they lack."""
        stops, width = np.cumsum(lengths), len(self._bos)
        starts = stops - lengths
        led = np.full(len(lengths), width > 0) & (lengths >= width)
        for place, token in enumerate(self._bos):
            led &= ids[np.minimum(starts + place, len(ids) - 1)] == token
        ended = ids[stops - 1] == self._eod if self._eod is not None else np.ones(len(lengths), bool)
        sizes = lengths + width * ~led + ~ended
        joined = np.empty(int(sizes.sum()), self.dtype)
        ends = np.cumsum(sizes)
        inside = np.ones(len(joined), dtype=bool)
        firsts = (ends - sizes)[~led]
        for place, token in enumerate(self._bos):
            joined[firsts + place], inside[firsts + place] = token, False
        lasts = ends[~ended] - 1
        joined[lasts], inside[lasts] = self._eod or 0, False
        joined[inside] = ids
        return [joined], sizes

    def _encode_giant(self, block: Block, text: giant.LongText, digest: bytes, unwanted: np.ndarray | None) -> Encoded:
        """Encode a document that fills its block piece by piece, without ever holding its whole text."""
        nothing = np.zeros(0, np.int32)
        counts: dict[str, int] = {"characters": 0, "bytes": 0}

        def counted() -> Iterator[str]:
            """Yield the pieces of the text, counting characters and bytes."""
            for piece in text.pieces():
                counts["characters"] += len(piece)
                counts["bytes"] += len(piece.encode())
                yield piece

        def encoded(arrays: list[np.ndarray], empty: int, broken: list[Broken], dropped: Counter) -> Encoded:
            """Return the result of the block."""
            block.data = None
            size = sum(map(len, arrays))
            lengths = np.array([size], np.int32) if size else nothing
            return Encoded(
                arrays, lengths, counts["characters"], counts["bytes"], empty, broken, dropped, Counter(), digest,
                block.after, block.input_bytes, block.files,
            )  # fmt: skip

        if unwanted is not None and unwanted.any():
            return encoded([], 0, [], Counter(duplicate=1))
        if reason := self.job.filters.reason_for(text.sample(), text.num_bytes):
            return encoded([], 0, [], Counter({reason: 1}))
        arrays = []
        try:
            for piece in fast.pieces(counted(), self.engine):
                arrays.append(self.engine.encode_flat([piece])[0].astype(self.dtype))
        except ValueError as error:
            return encoded([], 0, [Broken(f"{block.file}:{block.first}", str(error), text.shown)], Counter())
        if not sum(map(len, arrays)):
            return encoded([], 1, [], Counter())
        width = len(self._bos)
        if not np.array_equal(np.concatenate([part[:width] for part in arrays])[:width], self._bos):
            arrays.insert(0, self._bos)
        if self._eod is not None and next(part[-1] for part in reversed(arrays) if len(part)) != self._eod:
            arrays.append(np.array([self._eod], self.dtype))
        return encoded(arrays, 0, [], Counter())


def _digest(block: Block) -> bytes:
    """Return the sha256 of a block's data; lengths are hashed too where the data is a list of values."""
    if isinstance(block.data, bytes | bytearray):
        return hashlib.sha256(block.data).digest()
    digest = hashlib.sha256()
    for record in block.data:
        for value in record:
            content = value if isinstance(value, bytes | bytearray) else repr(value).encode(errors="surrogatepass")
            digest.update(b"%d " % len(content))
            digest.update(content)
    return digest.digest()


_worker: Encoder


def _start_process(job: Job) -> None:
    """Initialize a worker process with its encoder."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = Encoder(job)


def _in_process(block: Block, unwanted: np.ndarray | None) -> Encoded:
    """Encode a block in a worker process."""
    return _worker.encode(block, unwanted)


class _Threads:
    """Encoding function for threads; each thread creates its encoder at its first block."""

    def __init__(self, job: Job, tokenizer: Tokenizer, engine: fast.FastTokenizer | None):
        self._job, self._tokenizer = job, tokenizer
        self._spare = [engine] if engine is not None else []
        self._local = threading.local()

    def __call__(self, block: Block, unwanted: np.ndarray | None) -> Encoded:
        """Encode a block in the calling thread."""
        encoder = getattr(self._local, "encoder", None)
        if encoder is None:
            try:
                # `pop` is atomic: a test for emptiness first could let two threads through.
                engine = self._spare.pop()
            except IndexError:
                engine = None
            encoder = self._local.encoder = Encoder(self._job, self._tokenizer, engine)
        return encoder.encode(block, unwanted)


def encode_all(
    blocks: Iterator[tuple[Block, np.ndarray | None]],
    job: Job,
    tokenizer: Tokenizer,
    workers: int,
    engine: fast.FastTokenizer | None = None,
) -> Iterator[Encoded]:
    """Yield the encoded blocks in order, with up to two blocks per worker in progress.

    Args:
        engine: fast tokenizer that is already open, used by the first thread.
    """
    encode: Any
    if workers > MAX_THREADS:
        # Spawned, not forked: a fork would copy locks held by the threads of the tokenizer and the progress bar.
        spawn = multiprocessing.get_context("spawn")
        pool: Executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_process, initargs=(job,))
        encode = _in_process
    else:
        pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")
        encode = _Threads(job, tokenizer, engine)

    def submit(block: Block, unwanted: np.ndarray | None) -> Future:
        return pool.submit(encode, block, unwanted)

    with _one_thread_each(), pool:
        try:
            # Waiting for the oldest block keeps the order; two per worker hide an occasional slow block.
            in_progress = deque(submit(*item) for item in itertools.islice(blocks, 2 * workers))
            while in_progress:
                encoded = in_progress.popleft().result()
                in_progress.extend(submit(*item) for item in itertools.islice(blocks, 1))
                yield encoded
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Disable the tokenizers' own threads, which would multiply with the number of workers."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def num_workers(workers: int | None, total_bytes: int, worth_bytes: int) -> int:
    """Return the configured number of workers, or one per core but at most one per `worth_bytes` of input."""
    if workers is not None:
        return max(1, workers)
    return max(1, min(len(os.sched_getaffinity(0)), total_bytes // worth_bytes))
