"""Copy complete checkpoints to an object store (s3://, gs://, file:// and every other scheme of fsspec), and back.

An object store has no atomic rename of folders. Instead the manifest is written last and deleted first: a folder
without a manifest is not a checkpoint, however many of its files exist.
"""

import contextlib
import datetime
import hashlib
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from igla_mega.checkpoint import integrity
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_bytes

_PIECE = 1 << 24
"""Bytes that are read at a time."""
_OWNER = "run_id"
"""File in a remote folder with the id of the run whose checkpoints it holds."""
_TIMEOUT = datetime.timedelta(hours=24)
"""How long a rank waits in a collective for the slowest rank's upload."""


def is_address(path: str | Path) -> bool:
    """Return True if a path of the command line is an address, in which `Path` may have merged the two slashes."""
    return ":/" in str(path) and not str(path).startswith("/")


def address_of(path: str | Path) -> str:
    """Return the address of a path of the command line, with the slashes that `Path` has merged."""
    scheme, _, rest = str(path).partition(":/")
    if rest.startswith("/"):
        return str(path)
    return f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"


class Remote:
    """A folder of an object store with a run's checkpoints.

    Raises:
        ConfigError: fsspec or the package for this scheme is not installed, or fsspec does not support the scheme.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        try:
            import fsspec

            self._system, self._root = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        except ImportError as error:
            raise ConfigError(
                f"{address}: {error}.\n  pip install 'igla-mega[data]', and for s3:// s3fs, for gs:// gcsfs."
            ) from None
        except ValueError as error:
            raise ConfigError(
                f"{address}: not an address that fsspec supports ({error}).\n  Give one such as s3://bucket/folder."
            ) from None

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints with a manifest in the folder, ascending.

        Raises:
            OSError: the store does not answer.
        """
        # fsspec caches listings of a folder, and another process may have written there since.
        self._system.invalidate_cache()
        if not self._system.exists(self._root):
            return []
        steps = (integrity.step_of(name.rstrip("/").rsplit("/", 1)[-1]) for name in self._listed())
        return sorted(s for s in steps if s is not None and self._system.exists(self._path(s, integrity.MANIFEST)))

    def _listed(self) -> list[str]:
        """Return the paths in the folder; none if it was removed in the meantime."""
        try:
            return self._system.ls(self._root, detail=False)
        except FileNotFoundError:
            return []

    def manifest(self, step: int) -> bytes | None:
        """Return the manifest of a step's checkpoint as stored, or None."""
        path = self._path(step, integrity.MANIFEST)
        return self._system.cat_file(path) if self._system.exists(path) else None

    def owner(self) -> str | None:
        """Return the id of the run whose checkpoints the folder holds (`store.run_id`), or None."""
        path = f"{self._root}/{_OWNER}"
        return self._system.cat_file(path).decode(errors="replace").strip() if self._system.exists(path) else None

    def claim(self, run: str) -> None:
        """Record the run whose checkpoints the folder holds from now on; other runs then do not write to it."""
        # Each store's client raises exceptions of its own types. A run must not fail at its start because of them: the
        # first copy reports the error.
        with contextlib.suppress(Exception):
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(f"{self._root}/{_OWNER}", f"{run}\n".encode())

    def put(self, folder: Path, step: int, names: list[str]) -> None:
        """Copy some files of a step's checkpoint from `folder` to the store.

        Raises:
            OSError: a file was not copied completely.
        """
        for name in names:
            target = self._path(step, name)
            self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._system.put_file(str(folder / name), target)
            sent, stored = (folder / name).stat().st_size, self._system.info(target)["size"]
            if stored != sent:
                raise OSError(f"{self.address}: {name} has {stored} bytes in the store, {sent} were sent")

    def fetch(self, step: int, folder: Path, names: list[str]) -> None:
        """Copy some files of a step's checkpoint from the store to `folder`."""
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._system.open(self._path(step, name), "rb") as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, _PIECE)
                copy.flush()
                os.fsync(copy.fileno())

    def unseal(self, step: int) -> None:
        """Delete the manifest of a step, so that the rest no longer counts as a checkpoint."""
        path = self._path(step, integrity.MANIFEST)
        if self._system.exists(path):
            self._system.rm_file(path)

    def remove(self, step: int) -> None:
        """Delete a step's checkpoint, its manifest first."""
        self.unseal(step)
        self._system.rm(self._path(step), recursive=True)

    def damage(self, step: int) -> str | None:
        """Return what is wrong with a checkpoint in the store, as a message, or None. Every byte is read."""
        path = f"{self.address}/{integrity.step_dir(Path(), step)}"
        try:
            content = self.manifest(step)
            if content is None:
                return f"{path}: {integrity.MANIFEST} is missing"
            for name, (size, expected) in sorted(integrity.read_manifest(content).items()):
                if not self._system.exists(self._path(step, name)):
                    return f"{path}: {name} is missing"
                if (found := self._system.info(self._path(step, name))["size"]) != size:
                    return f"{path}: {name} has {found} bytes, {size} were written"
                digest = integrity.new_digest()
                with self._system.open(self._path(step, name), "rb") as file:
                    while piece := file.read(_PIECE):
                        digest.update(piece)
                if digest.hexdigest() != expected:
                    return f"{path}: {name} does not have the digest it was written with"
        except ValueError as error:
            return f"{path}: {error}"
        return None

    def _path(self, step: int, name: str = "") -> str:
        """Return the store's path of a step's folder, or of a file in it."""
        path = f"{self._root}/{integrity.step_dir(Path(), step)}"
        return f"{path}/{name}" if name else path


def split(address: str) -> tuple[Remote, int | None]:
    """Return the folder of an address, and the step if the address is that of one checkpoint."""
    parent, _, name = address.rstrip("/").rpartition("/")
    step = integrity.step_of(name)
    return (Remote(address), None) if step is None else (Remote(parent), step)


def report(address: str) -> tuple[list[str], list[str]]:
    """Check the checkpoints at an address, as `integrity.report` does for a folder.

    Returns:
        Lines about the checkpoints that are complete, and one message for each that is damaged.

    Raises:
        ConfigError: the address holds no checkpoint.
    """
    folder, step = split(address)
    steps = folder.steps() if step is None else [step]
    if not steps:
        raise ConfigError(f"{address}: holds no checkpoint.\n  Correct the address, or get permission to read it.")
    lines, damages = [], []
    for one in steps:
        if (reason := folder.damage(one)) is not None:
            damages.append(reason)
            continue
        where = f"{folder.address}/{integrity.step_dir(Path(), one)}"
        lines.append(f"{where}: every file has the size and digest it was written with")
    return lines, damages


def copied(address: str) -> Path:
    """Return a local copy of the checkpoint at an address, or of the newest one there; copied once, below $IGLA_CACHE.

    Raises:
        ConfigError: there is no checkpoint, or it is damaged.
    """
    folder, step = split(address)
    steps = folder.steps()
    if not steps or step not in (None, *steps):
        raise ConfigError(f"{address}: holds no checkpoint.\n  Correct the address, or get permission to read it.")
    step = steps[-1] if step is None else step
    manifest = folder.manifest(step)
    assert manifest is not None, "listed"
    cache = Path(os.environ.get("IGLA_CACHE") or Path.home() / ".cache" / "igla_mega") / "checkpoints"
    # The manifest is part of the key: the same step saved again is another checkpoint.
    key = hashlib.sha256(folder.address.encode() + manifest).hexdigest()[:16]
    target = integrity.step_dir(cache / key, step)
    if not (target / integrity.MANIFEST).is_file():
        temporary = target.with_name(f".writing_{target.name}_{os.getpid()}")
        try:
            folder.fetch(step, temporary, list(integrity.read_manifest(manifest)))
            (temporary / integrity.MANIFEST).write_bytes(manifest)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    integrity.verify(target)
    return target


class Uploads:
    """Copies complete checkpoints to a remote folder in the background, each rank some of the files.

    All ranks add the same steps in the same order.

    Args:
        root: folder of the checkpoints that all nodes share.
        run: id of this run (`store.run_id`); a remote folder of another run is not written to.
        ended: called on every rank with the step, seconds, bytes and error of each copy.
        obsolete: returns those of the steps in the remote folder that may be deleted.
    """

    def __init__(
        self,
        remote: Remote,
        root: Path,
        run: str,
        ended: Callable[[int, float, int, str | None], None],
        obsolete: Callable[[list[int]], list[int]],
    ):
        self.remote, self._root, self._run, self._ended, self._obsolete = remote, root, run, ended, obsolete
        # A separate group: the collectives of saves run at the same time, and gloo matches collectives by order.
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        self._steps: queue.Queue[int | None] = queue.Queue()
        self._pending: list[int] = []
        self._thread: threading.Thread | None = None

    def add(self, step: int) -> None:
        """Queue the copy of a step's checkpoint; it is skipped if the remote folder has it."""
        self._pending.append(step)
        self._steps.put(step)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
            self._thread.start()

    def pending(self) -> frozenset[int]:
        """Return the steps still to be copied, whose local checkpoints must be kept."""
        return frozenset(self._pending)

    def finish(self, alive: Callable[[], None]) -> None:
        """Wait until all copies have ended, calling `alive` every second."""
        if self._thread is not None:
            self._steps.put(None)
            while self._thread.is_alive():
                self._thread.join(1.0)
                alive()
            self._thread = None

    def _work(self) -> None:
        """Copy the queued steps until None is queued; runs in the uploading thread."""
        while (step := self._steps.get()) is not None:
            started = time.monotonic()
            try:
                size, error = self._upload(step), None
            except Exception as failure:  # reported, not raised: the run continues, and the next copy may succeed
                size, error = 0, f"{self.remote.address}: step {step} could not be copied there: {_line(failure)}"
            self._pending.remove(step)
            if size or error:
                self._ended(step, time.monotonic() - started, size, error)

    def _upload(self, step: int) -> int:
        """Copy one checkpoint; return its size in bytes, or 0 if no copy is needed.

        Raises:
            OSError: on every rank, when any of them failed.
        """
        folder, rank = integrity.step_dir(self._root, step), dist.get_rank(self._group)
        files: list = [None]
        if rank == 0:
            files = [self._needed(step, folder)]
        dist.broadcast_object_list(files, src=0, group=self._group)
        if isinstance(files[0], str):
            raise OSError(files[0])
        if not files[0]:
            return 0
        names, error = sorted(files[0]), None
        try:
            self.remote.put(folder, step, names[rank :: dist.get_world_size(self._group)])
        except Exception as failure:  # of any type of the store's client; raising would leave the others in the gather
            error = _line(failure)
        errors: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(errors, error, group=self._group)
        # Only when all ranks have copied their files: with its manifest the checkpoint counts. Older ones are deleted
        # after that, so that the remote folder always has a complete one.
        if rank == 0 and not any(errors):
            try:
                self.remote.put(folder, step, [integrity.MANIFEST])
                for old in self._obsolete(self.remote.steps()):
                    self.remote.remove(old)
            except Exception as failure:
                errors[0] = _line(failure)
        dist.broadcast_object_list(errors, src=0, group=self._group)
        if failed := next(filter(None, errors), None):
            raise OSError(failed)
        return sum(size for size, _ in files[0].values())

    def _needed(self, step: int, folder: Path) -> dict[str, tuple[int, str]] | str:
        """Return the files to copy (none if the copy exists or is not worth making), or an error message."""
        try:
            manifest = read_bytes(folder / integrity.MANIFEST)
            # Copies are slower than saves: skip a step that the queued ones make obsolete before it is copied.
            if step in self._obsolete(sorted(self._pending)):
                return {}
            if (owner := self.remote.owner()) is None:
                self.remote.claim(self._run)
            elif owner != self._run:
                return f"another run ({owner}) keeps its checkpoints there; set checkpoint.remote to another folder"
            if self.remote.manifest(step) == manifest:
                return {}
            # An earlier save of this step may be there: its manifest does not describe the files written from here on.
            self.remote.unseal(step)
            return integrity.read_manifest(manifest)
        except Exception as failure:
            return _line(failure)


def _line(failure: Exception) -> str:
    """Return the last line of an error's message, or the name of its type."""
    return (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
