"""Find the files of a source: what paths, patterns and folders refer to, each file once.

In a folder, the names of splits are recognised as Hugging Face's `datasets` does: a keyword such as `train`, `test` or
`dev` between separators, in the name of a folder or of a file. Only training text is taken. A file given by its path,
or by a pattern, is always taken.
"""

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.names import printable
from igla_mega.data.raw_files import SUFFIXES

TRAIN = "train"
KEYWORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> words that name it, as `datasets` knows them."""
_SEPARATOR = "[-._ 0-9]"
_SHARD = re.compile(r"data/(.+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_IN_FOLDER = {s: re.compile(rf"(?:^|{_SEPARATOR})(?:{'|'.join(w)})(?:{_SEPARATOR}|$)") for s, w in KEYWORDS.items()}
_IN_NAME = {s: re.compile(rf"(?:^|{_SEPARATOR})(?:{'|'.join(w)}){_SEPARATOR}") for s, w in KEYWORDS.items()}
_METADATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files of a dataset's folder that hold no records."""
_STATE = "state.json"
_NAMES_SHOWN = 3


def input_files(inputs: Sequence[str | Path], say: Callable[[str], None] | None = None) -> list[Path]:
    """Return the files that paths, patterns (`*`, `**`) and folders refer to, in order, each one once.

    Args:
        say: takes a line on each folder, and on what is left out or given twice; None says nothing.

    Raises:
        ConfigError: lists all files that are missing, empty or need a package that is not installed.
    """
    files: list[Path] = []
    breaches: list[str] = []
    notes: list[str] = []
    for given in map(Path, inputs):
        found = [given]
        try:
            if given.is_dir():
                found = _of_folder(given, notes)
            elif not given.exists() and glob.has_magic(str(given)):
                found = _of_pattern(given, notes)
        except ConfigError as error:
            breaches += error.breaches
            continue
        for file in found:
            if not file.is_file():
                breaches.append(f"{file}: no such file.\n  Give the path of a text file or a folder of them.")
            elif file.stat().st_size == 0:
                breaches.append(f"{file}: the file is empty.\n  Add text to it, or remove it from the inputs.")
            else:
                breaches += _lacking(file)
                files.append(file)
    if breaches:
        raise ConfigError(*dict.fromkeys(breaches))
    files, repeated = _each_once(files)
    if repeated:
        notes.append(f"given more than once and read once: {_shown(map(str, repeated))}")
    if say is not None:
        for note in notes:
            say(printable(note).replace("\n", "\\n"))
    return files


@dataclass
class _Folder:
    """What a folder holds, by paths relative to it."""

    readable: list[tuple[list[str], str]] = field(default_factory=list)
    """Key of the order, and path."""
    hidden: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)
    """Number of files of other kinds, by suffix."""


def _of_folder(folder: Path, notes: list[str]) -> list[Path]:
    """Return the files of a folder to train on, and add a note on them and on what is left out.

    Raises:
        ConfigError: there are none, a folder cannot be listed, or a file of a saved dataset is missing.
    """
    held = _look_through(folder)
    readable = [name for _, name in sorted(held.readable)]
    taken, left = training_files(readable)
    unread = [f"{count} {suffix}" for suffix, count in sorted(held.others.items())]
    parts = [
        f"{len(names)} of {f'split {split}' if split else 'no split'} ({_shown(names)})"
        for split, names in left.items()
    ]
    parts += [f"{len(held.hidden)} hidden ({_shown(sorted(held.hidden))})"] if held.hidden else []
    parts += [f"files of other kinds ({', '.join(unread)})"] if unread else []
    parts += [f"metadata ({_shown(sorted(held.metadata))})"] if held.metadata else []
    rest = f"; left out: {', '.join(parts)}" if parts else ""
    if not taken and readable:
        raise ConfigError(
            f"{folder}: every file in this folder is named as a test or validation split{rest}.\n"
            "  Give the files by path to train on them all the same."
        )
    if not taken:
        raise ConfigError(
            f"{folder}: no *.jsonl, *.txt, *.parquet or *.arrow in this folder{rest}.\n"
            "  Give JSONL, plain text, Parquet or Arrow files; the first two may be compressed (.gz, .zst, .bz2, .xz)."
        )
    notes.append(f"{folder}: {len(taken)} {'file' if len(taken) == 1 else 'files'} ({_shown(taken)}){rest}")
    return [folder / name for name in taken]


def _look_through(top: Path) -> _Folder:
    """Return what a folder holds. Links to folders are followed, and each folder is entered once.

    Raises:
        ConfigError: a folder cannot be listed, a link leads nowhere, or a file of a saved dataset is missing.
    """
    held, seen, waiting = _Folder(), set(), [""]
    while waiting:
        inside = waiting.pop()
        folder = top / inside
        try:
            status, entries = folder.stat(), list(os.scandir(folder))
        except OSError as error:
            raise ConfigError(f"{folder}: {error.strerror}.\n  Correct its permissions.") from None
        if (place := (status.st_dev, status.st_ino)) in seen:
            continue
        seen.add(place)
        # `save_to_disk` lists its files in the order of their rows; others are not part of it, such as caches.
        saved = _saved_files(folder) if any(entry.name == _STATE for entry in entries) else None
        for entry in entries:
            name = inside + entry.name
            is_folder = not entry.name.startswith(".") and _is_folder(entry)
            if entry.name.startswith(".") or (entry.name.startswith("__") and is_folder):
                held.hidden.append(name)
            elif is_folder:
                waiting.append(f"{name}/")
            elif entry.name in _METADATA:
                held.metadata.append(name)
            elif saved is not None and entry.name not in saved:
                held.others["outside a saved dataset"] += 1
            elif not entry.name.endswith(SUFFIXES):
                held.others[Path(entry.name).suffix or "without a suffix"] += 1
            elif entry.is_file():
                order = entry.name if saved is None else f"{saved.index(entry.name):09d}"
                # By parts of the path: a folder's files are together.
                held.readable.append(([*name.split("/")[:-1], order], name))
            elif entry.is_symlink():
                raise ConfigError(_dangling(entry.path))
            else:
                held.others["not a regular file"] += 1
    return held


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return True for a folder or a link to one; raise ConfigError on a link that cannot be followed."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        raise ConfigError(_dangling(entry.path)) from None


def _dangling(path: str | Path) -> str:
    """Return the error for a link without a file."""
    return f"{path}: a link that leads to no file.\n  Remove it, or restore the file."


def _saved_files(folder: Path) -> list[str] | None:
    """Return the files of a folder that `datasets.Dataset.save_to_disk` has written; None if it is no such folder.

    Raises:
        ConfigError: a file is missing or outside of the folder, or rows are selected by files of indices.
    """
    file = folder / _STATE
    try:
        state = json_text.read(file)
        names = [one["filename"] for one in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # another program's state
    if any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ConfigError(f"{file}: lists a file that is not in its folder.\n  Save the dataset again.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ConfigError(f"{folder / missing[0]}: missing, but {_STATE} lists it.\n  Save the dataset again.")
    if state.get("_indices_data_files"):
        raise ConfigError(
            f"{file}: the dataset selects its rows by files of indices, which are not read.\n"
            "  Call flatten_indices() on it, and save it again."
        )
    return names


def training_files(names: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Return the files of a folder to train on, and by split those to leave out; "" is no split.

    As `datasets` does, the first of three rules that finds a training split decides: the names of shards in `data/`,
    the names of folders, the names of files. Then files outside of that split are left out. If none finds one,
    everything is for training but what is named as another split.

    Args:
        names: paths relative to the folder, with slashes.
    """
    left: dict[str, list[str]] = {}
    rest = list(names)
    for splits_of in (_splits_of_shard, _splits_by_folder, _splits_by_name):
        found = {name: splits_of(name) for name in rest}
        trains = any(TRAIN in splits for splits in found.values())
        others = {n: s for n, s in found.items() if (TRAIN not in s if trains else any(one in KEYWORDS for one in s))}
        for name, splits in others.items():
            left.setdefault(splits[0] if splits else "", []).append(name)
        rest = [name for name in rest if name not in others]
        if trains:
            break
    return rest, left


def _splits_of_shard(name: str) -> list[str]:
    """Return the split of a file such as `data/train-00000-of-00001.parquet`, as the Hub writes them."""
    match = _SHARD.fullmatch(name)
    return [match.group(1)] if match else []


def _splits_by_folder(name: str) -> list[str]:
    """Return the splits that the folders of a file are named after."""
    folders = name.split("/")[:-1]
    return [split for split, word in _IN_FOLDER.items() if any(map(word.search, folders))]


def _splits_by_name(name: str) -> list[str]:
    """Return the splits that a file is named after."""
    return [split for split, word in _IN_NAME.items() if word.search(name.rpartition("/")[2])]


def _of_pattern(pattern: Path, notes: list[str]) -> list[Path]:
    """Return the files that match a pattern, and add notes on other splits than the rest and on what is no file.

    Raises:
        ConfigError: no file matches, or a link leads nowhere.
    """
    matched = sorted(map(Path, glob.glob(str(pattern), recursive=True)))
    if broken := [path for path in matched if not path.exists()]:
        raise ConfigError(_dangling(broken[0]))
    found = [path for path in matched if path.is_file()]
    # `**` goes through the folders that it matches.
    rest = [path.name for path in matched if not path.is_file() and not (path.is_dir() and "**" in pattern.parts)]
    if rest:
        notes.append(f"{pattern}: left out, since they are no files: {_shown(rest)}")
    if not found:
        raise ConfigError(
            f"{pattern}: no file matches this pattern.\n"
            "  Give JSONL, plain text, Parquet or Arrow files; the first two may be compressed (.gz, .zst, .bz2, .xz)."
        )
    _, left = training_files([file.name for file in found])
    others = [name for split, names in left.items() if split in KEYWORDS for name in names]
    if others:
        notes.append(
            f"{pattern}: {len(found)} files, of which {len(others)} are named as a test or validation split and are "
            f"trained on, since a pattern takes all it matches ({_shown(others)})"
        )
    return found


def _each_once(files: Iterable[Path]) -> tuple[list[Path], list[Path]]:
    """Return the files without repetitions, also by links of either kind, and the repetitions."""
    first: dict[tuple[int, int] | str, Path] = {}
    repeated = []
    for file in files:
        status = file.stat()
        # Some network file systems number no files.
        key = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(file)
        if first.setdefault(key, file) is not file:
            repeated.append(file)
    return list(first.values()), repeated


def _lacking(file: Path) -> Iterator[str]:
    """Yield an error if a file's format needs a package that is not installed."""
    rows = dict.fromkeys((".parquet", ".arrow", ".feather"), "pyarrow")
    if (needed := {".zst": "zstandard", **rows}.get(file.suffix)) is not None:
        try:
            __import__(needed)
        except ImportError:
            yield f"{file}: {file.suffix} needs {needed}, which is not installed.\n  pip install 'igla-mega[data]'"


def _shown(names: Iterable[str]) -> str:
    """Return the first few names as text."""
    known = list(names)
    return ", ".join(known[:_NAMES_SHOWN]) + (f" and {len(known) - _NAMES_SHOWN} more" * (len(known) > _NAMES_SHOWN))
