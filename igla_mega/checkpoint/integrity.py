"""Whether a checkpoint is what was written: the manifest of sizes and digests, and who checks it. Knows no torch."""

import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError

REPLACED = ".replaced_"


MANIFEST = "manifest.json"
PLACE = "place.json"
"""In a rank's own checkpoint, on its node's disk: which save, and which part of which layout it is."""
UNFINISHED, REMOVED = ".writing_", ".removing_"
"""Before the name of a checkpoint that is being written, or taken away."""
_STEP_NAME = re.compile(r"step_(\d{8,})")
_THREADS = 8
"""At most: BLAKE2 takes about 1 GB/s of a core, and no file system gives much more than so many times that."""

_verified: dict[Path, tuple[int, ...]] = {}
_one_at_a_time = threading.Lock()


def step_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name names."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def steps_in(root: Path) -> list[int]:
    """Steps of the checkpoints under `root` that were finished, ascending."""
    if not root.is_dir():
        return []
    steps = (step_of(path.name) for path in root.iterdir() if (path / MANIFEST).is_file())
    return sorted(step for step in steps if step is not None)


def digest(path: Path) -> str:
    """BLAKE2b of a file, 32 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def new_digest():
    """What every file of a checkpoint is digested by."""
    return hashlib.blake2b(digest_size=16)


def read_manifest(content: str | bytes) -> dict[str, tuple[int, str]]:
    """Size in bytes and digest of every file that a manifest names.

    Raises:
        ValueError: not a manifest; the message says why.
    """
    try:
        files = json_text.loads(content)["files"]
        named = {name: (entry["bytes"], entry["blake2b"]) for name, entry in files.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    for name, (size, expected) in named.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"{MANIFEST} cannot be read (it names {name!r}, outside the checkpoint)")
        if not isinstance(size, int) or not isinstance(expected, str):
            raise ValueError(f"{MANIFEST} cannot be read (size and digest of {name} are not a number and hex digits)")
    return named


def damage(path: Path, *, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words, or None. Digests are checked for every `num_parts`-th file."""
    try:
        files = sorted(read_manifest((path / MANIFEST).read_bytes()).items())
        for name, (size, _) in files:
            if not (path / name).is_file():
                return f"{path}: {name} is missing"
            if (found := (path / name).stat().st_size) != size:
                return f"{path}: {name} has {found} bytes, {size} were written"
        own = files[part::num_parts]
        with ThreadPoolExecutor(_threads(num_parts)) as threads:
            digests = threads.map(digest, [path / name for name, _ in own])
            for (name, (_, expected)), found_digest in zip(own, digests, strict=True):
                if found_digest != expected:
                    return f"{path}: {name} does not have the digest it was written with"
    except OSError as error:
        how = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        return f"{path}: {Path(error.filename or MANIFEST).name} {how}"
    except ValueError as error:
        return f"{path}: {error}"
    return None


def _threads(num_parts: int) -> int:
    """Ranks of a node that check parts of one checkpoint share its cores."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if num_parts > 1 else 1
    return max(1, min(_THREADS, (os.cpu_count() or 1) // sharing))


def strangers(path: Path) -> list[str]:
    """Files below a checkpoint that its manifest does not name."""
    named = read_manifest((path / MANIFEST).read_bytes())
    files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(set(files) - named.keys() - {MANIFEST})


def is_verified(path: Path) -> bool:
    """Whether this process has checked a checkpoint, which has not changed since."""
    try:
        return _verified.get(path.resolve()) == _state(path)
    except OSError:
        return False


def note_verified(path: Path) -> None:
    """Take a checkpoint as checked, by this process together with others."""
    _verified[path.resolve()] = _state(path)


def verify(path: Path) -> None:
    """Check a checkpoint on its own, once in this process.

    Raises:
        ConfigError: it is damaged; the message names the file.
    """
    with _one_at_a_time:
        if is_verified(path):
            return
        if (reason := damage(path)) is not None:
            raise refusal(reason)
        note_verified(path)


def refusal(reason: str) -> ConfigError:
    """What is said of a checkpoint that is damaged."""
    return ConfigError(f"{reason}.\n  Use another checkpoint, or restore this one from a backup.")


def _state(path: Path) -> tuple[int, ...]:
    info = (path / MANIFEST).stat()
    return info.st_ino, info.st_size, info.st_mtime_ns


def remove(folder: Path) -> None:
    """Remove a checkpoint: at once as far as its name goes, so that no half of it is ever found under that."""
    aside = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def report(path: Path) -> tuple[list[str], list[str]]:
    """Check a checkpoint, or every one of a run, of its `checkpoints` folder or of a node's own.

    Returns:
        What was found, in lines, and those of them that are damage.

    Raises:
        ConfigError: no checkpoint lies there.
    """
    if (path / MANIFEST).is_file():
        folders = [path]
    elif step_of(path.name) is not None:
        folders = sealed(path)
    else:
        folders = sorted(_below(path))
    begun = (f"{UNFINISHED}*", f"step_*/{UNFINISHED}*")
    roots = (path, path / "checkpoints")
    unfinished = [folder for root in roots for pattern in begun for folder in sorted(root.glob(pattern))]
    if not folders and not unfinished:
        raise ConfigError(
            f"{path}: holds no checkpoint.\n  Give a checkpoint (step_00000100), or the run folder it lies in."
        )
    lines, damages = [], []
    for folder in folders:
        if (reason := damage(folder)) is not None:
            damages.append(reason)
            continue
        files = read_manifest((folder / MANIFEST).read_bytes())
        size = sum(size for size, _ in files.values())
        lines.append(f"{folder}: every file has the size and digest it was written with ({len(files)}, {words(size)})")
        lines += [f"  note: {name} is not in its {MANIFEST}: it was put there later" for name in strangers(folder)]
    lines += [f"{folder}: was never finished; nothing takes it for a checkpoint" for folder in unfinished]
    return lines, damages


def sealed(step: Path) -> list[Path]:
    """What of a step's folder has a manifest by its name: the folder, or on a node's own disk each rank's in it."""
    ranks = sorted(rank for rank in step.glob("rank_*") if rank.is_dir())
    begun = [name for prefix in (UNFINISHED, REMOVED) for name in step.glob(f"{prefix}rank_*")]
    return ranks or ([] if begun else [step])


def _below(path: Path) -> Iterable[Path]:
    """Folders that are checkpoints by their name: also one whose manifest is gone, and what a rank kept for itself."""
    for root in (path / "checkpoints", path, *sorted(path.glob("*-*/"))):
        for folder in root.glob("step_*"):
            if step_of(folder.name) is not None and folder.is_dir():
                yield from sealed(folder)
    for name in ("base", "fisher"):
        if (path / name / MANIFEST).is_file():
            yield path / name
    yield from (folder.parent for folder in path.glob(f"merged/*/{MANIFEST}"))


def words(size: float) -> str:
    """Bytes for people: `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def last_line(error: BaseException) -> str:
    """The cause, in a line."""
    failures = getattr(error, "failures", {}).values()
    cause = next((f[0] if isinstance(f, tuple) else f for f in failures), error)
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
