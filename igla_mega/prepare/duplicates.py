"""Find exact and near duplicates in a separate pass over the texts; the result is stored on disk.

Texts are compared by a 128-bit hash. The hashes are partitioned into 256 files, one of which is in memory at a time.
Near duplicates are found by datatrove's MinHash-LSH. A document is identified by its number among all texts.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow
from igla_mega.data.journal import replace_file
from igla_mega.prepare.bar import say
from igla_mega.prepare.formats import Block

Texts = Callable[[], Iterator[tuple[Block, list[str]]]]
"""Function that starts a pass over all blocks and their texts."""
_PARTITIONS = 256
_BUFFERED = 1 << 20
"""Hashes buffered in memory before they are written."""
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])


class Duplicates:
    """Duplicates among all texts, looked up by block."""

    def __init__(self, folder: Path | None, found: Mapping[str, int]):
        self.found = found
        """Number of dropped documents, by kind."""
        self._folder = folder
        if folder is not None:
            self._dropped = np.memmap(folder / "unwanted", dtype=bool, mode="r")
            self._files, self._offsets, self._firsts = np.load(folder / "blocks.npy", allow_pickle=False)

    @classmethod
    def find(
        cls,
        texts: Texts,
        prefix: str,
        *,
        exact: bool,
        near: Mapping[str, Any] | None,
        job: str,
        label: str | None = None,
    ) -> "Duplicates":
        """Search all texts, or load the result of an earlier run of the same job.

        Args:
            texts: starts a pass over all blocks with their texts.
            prefix: the result is stored in `<prefix>.duplicates`.
            exact: True to drop documents whose text occurred before.
            near: n-gram, buckets, hashes and seed of MinHash; None to search for exact duplicates only.
            job: digest of the inputs and options.
            label: name of the dataset in the report on stderr; None reports nothing.

        Raises:
            ConfigError: datatrove is required and not installed.
        """
        if not exact and near is None:
            return cls(None, {})
        folder = Path(f"{prefix}.duplicates")
        done = folder / "found.json"
        try:
            known = json_text.read(done)
        except (OSError, ValueError):
            known = {}
        if not isinstance(known, dict) or known.get("job") != job or not isinstance(known.get("found"), dict):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if label is not None:
                say(f"{label}: searching for {'near' if near else 'exact'} duplicates")
            found = _search(texts, folder, exact, near)
            known = {"job": job, "found": found}
            # Written last: a folder without it is from an interrupted search and is removed above.
            replace_file(done, json.dumps(known).encode())
        return cls(folder, known["found"])

    def of_block(self, block: Block) -> np.ndarray | None:
        """Return True for each text of a block that is dropped, bool [texts]; None if nothing was searched."""
        if self._folder is None:
            return None
        number = self._number(block)
        first, stop = int(self._firsts[number]), int(self._firsts[number + 1])
        return np.array(self._dropped[first:stop])

    def remove(self) -> None:
        """Remove the result from the disk."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _number(self, block: Block) -> int:
        """Return the number of a block, found by the position at which it ends."""
        low, high = np.searchsorted(self._files[:-1], [block.after.file, block.after.file + 1])
        return int(low + np.searchsorted(self._offsets[low:high], block.after.offset))


def _search(texts: Texts, folder: Path, exact: bool, near: Mapping[str, Any] | None) -> dict[str, int]:
    """Write the dropped documents and the blocks' positions into a folder; return the number dropped by kind."""
    found: dict[str, int] = {}
    ends: list[tuple[int, int]] = []
    firsts = [0]

    def numbered() -> Iterator[list[str]]:
        """Pass over all texts, recording where each block ends and the number of its first text."""
        # Cleared first, since both searches make their own pass.
        ends.clear()
        del firsts[1:]
        for block, of_block in texts():
            ends.append((block.after.file, block.after.offset))
            firsts.append(firsts[-1] + len(of_block))
            yield of_block

    hashes = _HashPartitions(folder)
    for of_block in numbered():
        hashes.add(of_block, firsts[-2])
    hashes.flush()
    # The file keeps its name: folders of earlier versions stay readable.
    dropped = np.memmap(folder / "unwanted", dtype=bool, mode="w+", shape=(max(firsts[-1], 1),))
    if exact:
        for repeated in hashes.repeated():
            dropped[repeated] = True
        found["exact"] = int(dropped.sum())
    if near is not None:
        for number in _near(itertools.chain.from_iterable(numbered()), folder / "minhash", near):
            found["near"] = found.get("near", 0) + (not dropped[number])
            dropped[number] = True
    dropped.flush()
    files, offsets = zip(*[*ends, (2**31, 0)], strict=True)
    np.save(folder / "blocks.npy", np.array([files, offsets, firsts], dtype=np.int64))
    hashes.remove()
    return found


class _HashPartitions:
    """Hashes with their documents' numbers, partitioned into files by the lowest byte of the hash."""

    def __init__(self, folder: Path):
        self._folder = folder / "hashes"
        self._folder.mkdir()
        self._buffered: list[np.ndarray] = []
        self._size = 0

    def add(self, texts: list[str], first: int) -> None:
        """Add texts whose numbers begin at `first`."""
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
        records = np.empty(len(texts), _RECORD)
        halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        records["number"] = np.arange(first, first + len(texts))
        self._buffered.append(records)
        self._size += len(texts)
        if self._size >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write the buffered hashes."""
        if not self._buffered:
            return
        records = np.concatenate(self._buffered)
        partitions = (records["high"] % _PARTITIONS).astype(np.int64)
        order = np.argsort(partitions, kind="stable")
        borders = np.searchsorted(partitions[order], np.arange(_PARTITIONS + 1))
        for partition, (begin, end) in enumerate(itertools.pairwise(borders.tolist())):
            if begin < end:
                with open(self._folder / f"{partition:03d}", "ab", opener=no_follow) as stream:
                    stream.write(records[order[begin:end]].tobytes())
        self._buffered, self._size = [], 0

    def repeated(self) -> Iterator[np.ndarray]:
        """Yield the numbers of documents whose text occurred before, one partition at a time."""
        for file in sorted(self._folder.iterdir()):
            records = np.fromfile(file, _RECORD)
            # The number is the last key: within equal hashes the first document of the corpus comes first and is kept.
            records = records[np.lexsort((records["number"], records["low"], records["high"]))]
            same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
            yield records["number"][1:][same].astype(np.int64)

    def remove(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _near(texts: Iterator[str], folder: Path, parameters: Mapping[str, Any]) -> np.ndarray:
    """Return the numbers of the documents to drop so that one of each cluster of near duplicates remains."""
    try:
        from datatrove.data import Document
        from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig
        from datatrove.utils.logging import logger
        from datatrove.utils.word_tokenizers import WordTokenizer
    except ImportError as error:
        raise ConfigError(
            f"data.cleaning.near_duplicates: requires datatrove ({error}).\n  pip install 'igla-mega[data]'"
        ) from None
    logger.disable("datatrove")

    class Words(WordTokenizer):
        """Split at whitespace, which needs no model to download and works for every language that uses spaces."""

        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        def sent_tokenize(self, text: str) -> list[str]:
            return text.splitlines()

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    config = MinhashConfig(
        n_grams=parameters["ngram"],
        num_buckets=parameters["num_buckets"],
        hashes_per_bucket=parameters["hashes_per_bucket"],
        seed=parameters["seed"],
        hash_config=HashConfig(hash_fc="sha1"),  # datatrove's xxhash call fails with recent versions of xxhash
    )
    places = {name: str(folder / name) for name in ("signatures", "buckets", "remove")}
    documents = (Document(text=text, id=str(number)) for number, text in enumerate(texts))
    MinhashDedupSignature(places["signatures"], config=config, language=Words()).run(documents, 0, 1)
    for bucket in range(config.num_buckets):
        MinhashDedupBuckets(places["signatures"], places["buckets"], config=config).run(
            None, bucket, config.num_buckets
        )
    MinhashDedupCluster(places["buckets"], places["remove"], config=config).run(None, 0, 1)
    files = sorted((folder / "remove").rglob("*.remove"))
    removed = [np.fromfile(file, "<u4") for file in files]
    shutil.rmtree(folder, ignore_errors=True)
    return np.concatenate(removed).astype(np.int64) if removed else np.zeros(0, np.int64)
