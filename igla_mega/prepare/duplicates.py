"""Which documents were there before, or nearly: found in a pass of its own over the texts, and kept on disk.

Texts are told apart by 128 bits of their hash; those are sorted out by their first byte, so that one of 256 lots lies
in memory at a time. Near duplicates are datatrove's MinHash-LSH. A document is known by its number among all texts.
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
from igla_mega.data.journal import replace_file
from igla_mega.prepare.bar import say
from igla_mega.prepare.formats import Block

Texts = Callable[[], Iterator[tuple[Block, list[str]]]]
_LOTS = 256
_HELD = 1 << 20
"""Hashes that wait in memory before they are written."""
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])


class Duplicates:
    """Of every block, which of its texts are left out."""

    def __init__(self, folder: Path | None, found: Mapping[str, int]):
        self.found = found
        """Documents left out, by kind."""
        self._folder = folder
        if folder is not None:
            self._unwanted = np.memmap(folder / "unwanted", dtype=bool, mode="r")
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
        label: str = "",
        progress: bool = False,
    ) -> "Duplicates":
        """Look through all texts, unless an earlier run of the same job has.

        Args:
            texts: gives every block with its texts.
            near: n-gram, buckets, hashes and seed of MinHash; None looks for exact ones alone.

        Raises:
            ConfigError: datatrove is needed and not installed.
        """
        if not exact and near is None:
            return cls(None, {})
        folder = Path(f"{prefix}.duplicates")
        done = folder / "found.json"
        try:
            known = json_text.loads(done.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        if not isinstance(known, dict) or known.get("job") != job or not isinstance(known.get("found"), dict):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            if progress:
                say(f"{label}: looking for {'near' if near else 'exact'} duplicates")
            found = _look(texts, folder, exact, near)
            known = {"job": job, "found": found}
            replace_file(done, json.dumps(known).encode())
        return cls(folder, known["found"])

    def of_block(self, block: Block) -> np.ndarray | None:
        """Of each text of a block, whether it is left out."""
        if self._folder is None:
            return None
        number = self._number(block)
        first, stop = int(self._firsts[number]), int(self._firsts[number + 1])
        return np.array(self._unwanted[first:stop])

    def remove(self) -> None:
        """Remove what was kept on disk."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _number(self, block: Block) -> int:
        low, high = np.searchsorted(self._files[:-1], [block.after.file, block.after.file + 1])
        return int(low + np.searchsorted(self._offsets[low:high], block.after.offset))


def _look(texts: Texts, folder: Path, exact: bool, near: Mapping[str, Any] | None) -> dict[str, int]:
    found: dict[str, int] = {}
    ends: list[tuple[int, int]] = []
    firsts = [0]

    def numbered() -> Iterator[list[str]]:
        ends.clear()
        del firsts[1:]
        for block, of_block in texts():
            ends.append((block.after.file, block.after.offset))
            firsts.append(firsts[-1] + len(of_block))
            yield of_block

    lots = _Lots(folder)
    for of_block in numbered():
        lots.add(of_block, firsts[-2])
    lots.flush()
    unwanted = np.memmap(folder / "unwanted", dtype=bool, mode="w+", shape=(max(firsts[-1], 1),))
    if exact:
        for repeated in lots.repeated():
            unwanted[repeated] = True
        found["exact"] = int(unwanted.sum())
    if near is not None:
        for number in _near(itertools.chain.from_iterable(numbered()), folder / "minhash", near):
            found["near"] = found.get("near", 0) + (not unwanted[number])
            unwanted[number] = True
    unwanted.flush()
    files, offsets = zip(*[*ends, (2**31, 0)], strict=True)
    np.save(folder / "blocks.npy", np.array([files, offsets, firsts], dtype=np.int64))
    lots.remove()
    return found


class _Lots:
    """Hashes with their documents' numbers, sorted out by their first byte into files."""

    def __init__(self, folder: Path):
        self._folder = folder / "hashes"
        self._folder.mkdir()
        self._held: list[np.ndarray] = []
        self._size = 0

    def add(self, texts: list[str], first: int) -> None:
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
        records = np.empty(len(texts), _RECORD)
        halves = np.frombuffer(digests, "<u8").reshape(-1, 2)
        records["high"], records["low"] = halves[:, 0], halves[:, 1]
        records["number"] = np.arange(first, first + len(texts))
        self._held.append(records)
        self._size += len(texts)
        if self._size >= _HELD:
            self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        records = np.concatenate(self._held)
        lots = (records["high"] % _LOTS).astype(np.int64)
        order = np.argsort(lots, kind="stable")
        borders = np.searchsorted(lots[order], np.arange(_LOTS + 1))
        for lot, (begin, end) in enumerate(itertools.pairwise(borders.tolist())):
            if begin < end:
                with open(self._folder / f"{lot:03d}", "ab") as stream:
                    stream.write(records[order[begin:end]].tobytes())
        self._held, self._size = [], 0

    def repeated(self) -> Iterator[np.ndarray]:
        """Numbers of the documents whose text was there before, a lot at a time."""
        for file in sorted(self._folder.iterdir()):
            records = np.fromfile(file, _RECORD)
            records = records[np.lexsort((records["number"], records["low"], records["high"]))]
            same = (records["high"][1:] == records["high"][:-1]) & (records["low"][1:] == records["low"][:-1])
            yield records["number"][1:][same].astype(np.int64)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


def _near(texts: Iterator[str], folder: Path, parameters: Mapping[str, Any]) -> np.ndarray:
    """Numbers of the documents that are left out, so that one of each cluster stays."""
    try:
        from datatrove.data import Document
        from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig
        from datatrove.utils.hashing import HashConfig
        from datatrove.utils.logging import logger
        from datatrove.utils.word_tokenizers import WordTokenizer
    except ImportError as error:
        raise ConfigError(
            f"data.cleaning.near_duplicates: needs datatrove ({error}).\n  pip install 'igla-mega[data]'"
        ) from None
    logger.disable("datatrove")

    class Words(WordTokenizer):
        """By spaces: of any language that has some, and without a model to download."""

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
        hash_config=HashConfig(hash_fc="sha1"),  # its other one, xxhash, is refused by xxhash's newer versions
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
