"""Keep the state of a preparation: totals and position in the input, and the file of quarantined records."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from igla_mega.config.files import no_follow
from igla_mega.prepare.encoding import Encoded
from igla_mega.prepare.formats import Broken

_DIGEST = re.compile(r"([0-9a-f]{64})?")


class State:
    """Totals of the blocks encoded so far, and the position in the input after them."""

    def __init__(self, num_inputs: int):
        self.position: list[int] = [0, 0, 0, 0]
        self.documents = self.tokens = self.empty = self.broken = 0
        self.characters = self.text_bytes = self.input_bytes = self.since_shard = self.aside = 0
        self.file = self.file_texts = self.file_broken = 0
        """Number of the input that was read last, and of its records with and without a text."""
        self.dropped: Counter = Counter()
        self.languages: Counter = Counter()
        self.digests = [""] * num_inputs
        """Chained digest of each input's blocks: sha256 of the previous value and the block's own digest."""

    @classmethod
    def fits(cls, entry: Mapping[str, Any], num_inputs: int) -> bool:
        """Return True if a journal entry has every field, of the right type, that a state is restored from."""
        # Checked in full, since a journal is a file that anybody may have written or edited.
        counts = ["bytes", *(name for name, value in vars(cls(0)).items() if isinstance(value, int))]
        counts.remove("since_shard")
        return (
            all(isinstance(entry.get(name), int) and 0 <= entry[name] < 1 << 63 for name in counts)
            and entry["file"] < max(num_inputs, 1)
            and all(isinstance(entry.get(name), str) for name in ("sha256", "lengths_sha256"))
            and all(isinstance(entry.get(name), dict) for name in ("dropped", "languages"))
            and all(isinstance(entry.get(name), list) for name in ("position", "digests"))
            and len(entry["position"]) == 4
            and all(isinstance(place, int) and 0 <= place < 1 << 63 for place in entry["position"])
            and len(entry["digests"]) == num_inputs
            and all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in entry["digests"])
        )

    @classmethod
    def restored(cls, entry: Mapping[str, Any]) -> "State":
        """Return the state at a journal entry."""
        state = cls(0)
        for name in vars(state):
            if name in entry:
                setattr(state, name, entry[name])
        state.dropped, state.languages = Counter(entry["dropped"]), Counter(entry["languages"])
        return state

    def take(self, encoded: Encoded) -> None:
        """Add an encoded block."""
        self.position = list(encoded.after)
        if encoded.files[0] != self.file:
            self.file, self.file_texts, self.file_broken = encoded.files[0], 0, 0
        self.file_texts += len(encoded.lengths) + sum(encoded.dropped.values())
        self.file_broken += len(encoded.broken)
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
        # A chain, not a running hash: it can be stored in the journal and continued after a restart.
        for number in range(encoded.files[0], encoded.files[1] + 1):
            so_far = bytes.fromhex(self.digests[number])
            self.digests[number] = hashlib.sha256(so_far + encoded.digest).hexdigest()

    def summary(self) -> dict[str, Any]:
        """Return the totals as the manifest records them."""
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
        """Return the totals and the position as the journal records them."""
        of_file = {name: getattr(self, name) for name in ("file", "file_texts", "file_broken")}
        return {**self.summary(), **of_file, "position": self.position, "aside": self.aside}


class Quarantine:
    """Writer of `<prefix>.quarantine.jsonl`: one line per broken record, with its place, the reason and the record."""

    def __init__(self, prefix: str, size: int):
        """Open the file after the first `size` bytes, which an earlier run has flushed."""
        path = f"{prefix}.quarantine.jsonl.partial"
        self._stream = open(path, "r+b" if size and Path(path).exists() else "w+b", opener=no_follow)  # noqa: SIM115
        self._stream.truncate(size)
        self._stream.seek(size)

    def add(self, broken: Broken) -> None:
        """Write a record."""
        record = {"place": broken.place, "reason": broken.reason, "record": broken.record}
        self._stream.write(json.dumps(record).encode() + b"\n")

    def flush(self) -> int:
        """Flush the file and return its size in bytes."""
        self._stream.flush()
        return self._stream.tell()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
