"""Check that a checkpoint is unchanged, by the sizes and digests in its manifest. Imports no torch."""

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
from igla_mega.config.files import no_follow, read_bytes, regular, replace_durably

MANIFEST = "manifest.json"
"""File that lists size and digest of every other file; written last, so a folder without it is no checkpoint."""
PLACE = "place.json"
"""File in a rank's local checkpoint that identifies the save, the rank and the layout."""
UNFINISHED, REMOVED, REPLACED = ".writing_", ".removing_", ".replaced_"
"""Prefixes of a checkpoint's name while it is being written, while it is deleted, and while another replaces it."""
RUN, EARLIER_RUNS = "run_id", "earlier_runs"
"""Files of a folder of checkpoints: id of the run that trains in it, and ids of the runs whose checkpoints it took."""
INDEX = ".metadata"
"""File of every checkpoint: torch's index of its tensors, without which nothing can be read."""
_STEP_NAME = re.compile(r"step_(\d{8,})")
_RUN_ID = re.compile(r"[0-9a-f]{8}")
_THREADS = 8
"""Maximum number of threads that compute digests. BLAKE2 reads about 1 GB/s per core, and few disks read over 8."""

_verified: dict[Path, tuple[int, ...]] = {}
_one_at_a_time = threading.Lock()


def step_dir(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return root / f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step of a checkpoint folder's name; None if it is no such name."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def steps_in(root: Path) -> list[int]:
    """Return the steps of the finished checkpoints below `root`, ascending, without those of other runs."""
    if not root.is_dir():
        return []
    runs = runs_of(root)
    steps = {step_of(path.name): path for path in root.iterdir() if (path / MANIFEST).is_file()}
    return sorted(step for step, path in steps.items() if step is not None and not _is_foreign(path, runs))


def passed_over(root: Path) -> list[tuple[int, str]]:
    """Return the steps below `root` that do not count although they are named like checkpoints, with the reason."""
    steps = {step_of(path.name): path for path in (root.iterdir() if root.is_dir() else ())}
    counted, found = steps_in(root), []
    for step, path in sorted((step, path) for step, path in steps.items() if step is not None and step not in counted):
        why = f"{MANIFEST} is missing, without which nothing in it can be checked"
        if (path / MANIFEST).is_file():
            why = f"run {owner_of(path)} wrote it, not this one ({runs_of(root)[0]})"
        found.append((step, f"{path}: {why}; it is not used. Move it away, or copy it again from where it came from"))
    return found


def runs_of(root: Path) -> list[str]:
    """Return the ids of the runs whose checkpoints count below `root`: its own first; none if it has no valid id."""
    own, *earlier = (_ids(root / name) for name in (RUN, EARLIER_RUNS))
    return [*own[:1], *earlier[0]] if own else []


def _ids(file: Path) -> list[str]:
    """Return the ids in a file; none if it does not exist or is damaged."""
    try:
        return [one for one in read_bytes(file).decode("ascii").split() if _RUN_ID.fullmatch(one)]
    except (OSError, UnicodeDecodeError):
        return []


def owner_of(checkpoint: Path) -> str | None:
    """Return the id of the run that wrote a checkpoint; None if its manifest has none, as before version 0.2."""
    try:
        found = json_text.read(checkpoint / MANIFEST).get("run")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) and _RUN_ID.fullmatch(found) else None


def _is_foreign(checkpoint: Path, runs: list[str]) -> bool:
    """Return True if another run than these wrote a checkpoint."""
    return bool(runs) and owner_of(checkpoint) not in (None, *runs)


def adopt(root: Path, runs: Iterable[str | None]) -> None:
    """Count the checkpoints of other runs below `root` as this run's past from now on."""
    known = _ids(root / EARLIER_RUNS)
    if new := [run for run in runs if run is not None and run not in known]:
        write_text(root / f".{EARLIER_RUNS}", "".join(f"{run}\n" for run in [*known, *new]))
        replace_durably(root / f".{EARLIER_RUNS}", root / EARLIER_RUNS)


def digest(path: Path) -> str:
    """Return the BLAKE2b digest of a file, 32 hex digits."""
    with open(path, "rb", opener=regular) as file:
        return hashlib.file_digest(file, new_digest).hexdigest()


def new_digest():
    """Return a new hash object for a file of a checkpoint."""
    # 128 bits: enough to detect damage. Not a proof of origin: an attacker who can write a file can write its manifest.
    return hashlib.blake2b(digest_size=16)


def read_manifest(content: str | bytes) -> dict[str, tuple[int, str]]:
    """Return size in bytes and digest of every file that a manifest names.

    Raises:
        ValueError: not a manifest; the message gives the reason.
    """
    try:
        files = json_text.loads(content)["files"]
        named = {name: (entry["bytes"], entry["blake2b"]) for name, entry in files.items()}
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    for name, (size, expected) in named.items():
        # A manifest may come from elsewhere, and these names become paths that are read and, from a remote folder,
        # written.
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise ValueError(f"{MANIFEST} cannot be read (it names {name!r}, outside the checkpoint)")
        if not isinstance(size, int) or not isinstance(expected, str):
            raise ValueError(f"{MANIFEST} cannot be read (size and digest of {name} are not a number and hex digits)")
    if INDEX not in named:
        raise ValueError(f"{MANIFEST} lists {len(named)} files, but not {INDEX}, which every checkpoint has")
    return named


def damage(path: Path, *, part: int = 0, num_parts: int = 1) -> str | None:
    """Return what is wrong with a checkpoint, as a message, or None.

    Existence and size are checked for every file, digests for every `num_parts`-th one, beginning with number `part`.
    """
    try:
        files = sorted(read_manifest(read_bytes(path / MANIFEST)).items())
        for name, (size, _) in files:
            if not (path / name).is_file():
                return f"{path}: {name} is missing"
            if (found := (path / name).stat().st_size) != size:
                return f"{path}: {name} has {found} bytes, {size} were written"
        checked = files[part::num_parts]
        with ThreadPoolExecutor(_threads(num_parts)) as threads:
            digests = threads.map(digest, [path / name for name, _ in checked])
            for (name, (_, expected)), found_digest in zip(checked, digests, strict=True):
                if found_digest != expected:
                    return f"{path}: {name} does not have the digest it was written with"
    except OSError as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        return f"{path}: {Path(error.filename or MANIFEST).name} {problem}"
    except ValueError as error:
        return f"{path}: {error}"
    return None


def _threads(num_parts: int) -> int:
    """Return the number of threads for digests; ranks of a node that check parts of one checkpoint share its cores."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if num_parts > 1 else 1
    return max(1, min(_THREADS, (os.cpu_count() or 1) // sharing))


def strangers(path: Path) -> list[str]:
    """Return the files below a checkpoint that its manifest does not name."""
    named = read_manifest(read_bytes(path / MANIFEST))
    files = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(set(files) - named.keys() - {MANIFEST})


def is_verified(path: Path) -> bool:
    """Return True if this process has checked a checkpoint and its manifest has not changed since."""
    try:
        return _verified.get(path.resolve()) == _state(path)
    except OSError:
        return False


def note_verified(path: Path) -> None:
    """Record that a checkpoint was checked, by this process or by its group together."""
    _verified[path.resolve()] = _state(path)


def verify(path: Path) -> None:
    """Check all files of a checkpoint, once per process.

    Raises:
        ConfigError: the checkpoint is damaged; the message names the file.
    """
    # Under a lock: threads that read the same checkpoint wait for one check instead of each making it.
    with _one_at_a_time:
        if is_verified(path):
            return
        if (reason := damage(path)) is not None:
            raise refusal(reason)
        note_verified(path)


def refusal(reason: str) -> ConfigError:
    """Return the error for a damaged checkpoint."""
    return ConfigError(f"{reason}.\n  Use another checkpoint, or restore this one from a backup.")


def _state(path: Path) -> tuple[int, ...]:
    """Return what identifies the current manifest: inode, size and modification time."""
    info = (path / MANIFEST).stat()
    return info.st_ino, info.st_size, info.st_mtime_ns


def remove(folder: Path) -> None:
    """Delete a checkpoint; its name disappears in one step, so that no partial checkpoint is ever found under it."""
    aside = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def report(path: Path) -> tuple[list[str], list[str]]:
    """Check one checkpoint, or all in a run folder, in its `checkpoints` folder or in a node's local folder.

    Returns:
        Lines about the checkpoints that are complete, and one message for each that is damaged.

    Raises:
        ConfigError: `path` holds no checkpoint.
    """
    if (path / MANIFEST).is_file():
        folders = [path]
    elif step_of(path.name) is not None:
        folders = sealed(path)
    else:
        folders = sorted(_below(path))
    patterns = (f"{UNFINISHED}*", f"step_*/{UNFINISHED}*")
    roots = (path, path / "checkpoints")
    unfinished = [folder for root in roots for pattern in patterns for folder in sorted(root.glob(pattern))]
    if not folders and not unfinished:
        raise ConfigError(
            f"{path}: holds no checkpoint.\n  Give a checkpoint (step_00000100), or the run folder that contains it."
        )
    lines, damages = [], []
    for folder in folders:
        if (reason := damage(folder)) is not None:
            damages.append(reason)
            continue
        files = read_manifest(read_bytes(folder / MANIFEST))
        size = sum(size for size, _ in files.values())
        lines.append(f"{folder}: every file has the size and digest it was written with ({len(files)}, {words(size)})")
        lines += [f"  note: {name} is not in its {MANIFEST}: it was added later" for name in strangers(folder)]
    lines += [f"{folder}: is incomplete, and is not used as a checkpoint" for folder in unfinished]
    return lines, damages


def sealed(step: Path) -> list[Path]:
    """Return the folders of a step that should have a manifest: each rank's on a node's disk, else the step's own."""
    ranks = sorted(rank for rank in step.glob("rank_*") if rank.is_dir())
    # Only unfinished rank folders: a local checkpoint of which nothing is complete, hence nothing to check.
    unfinished = [name for prefix in (UNFINISHED, REMOVED) for name in step.glob(f"{prefix}rank_*")]
    return ranks or ([] if unfinished else [step])


def _below(path: Path) -> Iterable[Path]:
    """Yield the folders below a path that are checkpoints by their name, also without a manifest, and ranks' parts."""
    for root in (path / "checkpoints", path, *sorted(path.glob("*-*/"))):
        for folder in root.glob("step_*"):
            if step_of(folder.name) is not None and folder.is_dir():
                yield from sealed(folder)
    for name in ("base", "fisher"):
        if (path / name / MANIFEST).is_file():
            yield path / name
    yield from (folder.parent for folder in path.glob(f"merged/*/{MANIFEST}"))


def words(size: float) -> str:
    """Return a number of bytes as text, such as `1.5 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def write_text(path: Path, text: str) -> None:
    """Write a text file and flush it to the disk."""
    with open(path, "w", encoding="utf-8", opener=no_follow) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message; of DCP's error over all ranks, that of the first rank's cause."""
    failures = getattr(error, "failures", {}).values()
    cause = next((f[0] if isinstance(f, tuple) else f for f in failures), error)
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
