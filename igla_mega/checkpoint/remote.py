"""Checkpoints in an object store (s3://, gs://, file:// and whatever fsspec knows): copied there when they are whole.

The manifest goes last and is taken away first: what has none is no checkpoint, however much of it lies there.
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

_PIECE = 1 << 24
_OWNER = "run_id"
_PATIENCE = datetime.timedelta(hours=24)
"""Ranks wait for one another's uploads."""


def is_address(path: str | Path) -> bool:
    """Whether a path of the command line is an address; `Path` has taken one of its slashes."""
    return ":/" in str(path) and not str(path).startswith("/")


def address_of(path: str | Path) -> str:
    """The address that a path of the command line was."""
    scheme, _, rest = str(path).partition(":/")
    if rest.startswith("/"):
        return str(path)
    return f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"


class Remote:
    """A folder of an object store with a run's checkpoints.

    Raises:
        ConfigError: fsspec, or what the address needs besides, is not installed.
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
            raise ConfigError(f"{address}: not an address that fsspec knows ({error}).\n  Mend it.") from None

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there with their manifests, ascending.

        Raises:
            OSError: the store does not answer.
        """
        self._system.invalidate_cache()
        if not self._system.exists(self._root):
            return []
        steps = (integrity.step_of(name.rstrip("/").rsplit("/", 1)[-1]) for name in self._listed())
        return sorted(s for s in steps if s is not None and self._system.exists(self._path(s, integrity.MANIFEST)))

    def _listed(self) -> list[str]:
        try:
            return self._system.ls(self._root, detail=False)
        except FileNotFoundError:
            return []

    def manifest(self, step: int) -> bytes | None:
        """That of a checkpoint, as it lies there."""
        path = self._path(step, integrity.MANIFEST)
        return self._system.cat_file(path) if self._system.exists(path) else None

    def owner(self) -> str | None:
        """Which run's checkpoints lie here, as `store.run_id` names it."""
        path = f"{self._root}/{_OWNER}"
        return self._system.cat_file(path).decode(errors="replace").strip() if self._system.exists(path) else None

    def claim(self, run: str) -> None:
        """Have the checkpoints here be those of one run, from which another then keeps away."""
        with contextlib.suppress(Exception):  # of whatever kind the store's client knows; the first copy says it
            self._system.makedirs(self._root, exist_ok=True)
            self._system.pipe_file(f"{self._root}/{_OWNER}", f"{run}\n".encode())

    def put(self, folder: Path, step: int, names: list[str]) -> None:
        """Copy some files of a checkpoint there.

        Raises:
            OSError: one could not be copied whole.
        """
        for name in names:
            target = self._path(step, name)
            self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            self._system.put_file(str(folder / name), target)
            written, there = (folder / name).stat().st_size, self._system.info(target)["size"]
            if there != written:
                raise OSError(f"{self.address}: {name} has {there} bytes there, {written} were sent")

    def fetch(self, step: int, folder: Path, names: list[str]) -> None:
        """Copy some files of a checkpoint from there."""
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._system.open(self._path(step, name), "rb") as source, open(target, "wb") as copy:
                shutil.copyfileobj(source, copy, _PIECE)
                copy.flush()
                os.fsync(copy.fileno())

    def unseal(self, step: int) -> None:
        """Take the manifest away: what is there is then no checkpoint."""
        path = self._path(step, integrity.MANIFEST)
        if self._system.exists(path):
            self._system.rm_file(path)

    def remove(self, step: int) -> None:
        """Take a checkpoint away."""
        self.unseal(step)
        self._system.rm(self._path(step), recursive=True)

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint there, in words, or None. Every byte is read."""
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
        path = f"{self._root}/{integrity.step_dir(Path(), step)}"
        return f"{path}/{name}" if name else path


def split(address: str) -> tuple[Remote, int | None]:
    """The folder of checkpoints that an address means, and the step, when it is that of one."""
    parent, _, name = address.rstrip("/").rpartition("/")
    step = integrity.step_of(name)
    return (Remote(address), None) if step is None else (Remote(parent), step)


def report(address: str) -> tuple[list[str], list[str]]:
    """Check the checkpoints at an address, as `integrity.report` does those in a folder."""
    folder, step = split(address)
    steps = folder.steps() if step is None else [step]
    if not steps:
        raise ConfigError(f"{address}: holds no checkpoint.\n  Mend the address, or the rights to read it.")
    lines, damages = [], []
    for one in steps:
        if (reason := folder.damage(one)) is not None:
            damages.append(reason)
            continue
        where = f"{folder.address}/{integrity.step_dir(Path(), one)}"
        lines.append(f"{where}: every file has the size and digest it was written with")
    return lines, damages


def copied(address: str) -> Path:
    """A local copy of the checkpoint at an address, or of the newest there; made once, below $IGLA_CACHE.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    folder, step = split(address)
    steps = folder.steps()
    if not steps or step not in (None, *steps):
        raise ConfigError(f"{address}: holds no checkpoint.\n  Mend the address, or the rights to read it.")
    step = steps[-1] if step is None else step
    manifest = folder.manifest(step)
    assert manifest is not None, "listed"
    cache = Path(os.environ.get("IGLA_CACHE") or Path.home() / ".cache" / "igla_mega") / "checkpoints"
    # Another save of the same step is another copy.
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
    """Copies whole checkpoints to a remote folder in the background, in parts by rank; all ranks add the same steps.

    Args:
        run: whose checkpoints they are, by `store.run_id`; those of another run there are left alone.
        ended: called with step, seconds, bytes and the error of each, on every rank.
        obsolete: which of the steps there may go.
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
        # Collectives of its own: saves go on meanwhile.
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._steps: queue.Queue[int | None] = queue.Queue()
        self._open: list[int] = []
        self._thread: threading.Thread | None = None

    def add(self, step: int) -> None:
        """Copy the checkpoint of a step, unless it is there."""
        self._open.append(step)
        self._steps.put(step)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="checkpoint-upload", daemon=True)
            self._thread.start()

    def pending(self) -> frozenset[int]:
        """Steps that are not there yet, and must stay here."""
        return frozenset(self._open)

    def finish(self, alive: Callable[[], None]) -> None:
        """Wait until all are there, or have failed; `alive` is called meanwhile."""
        if self._thread is not None:
            self._steps.put(None)
            while self._thread.is_alive():
                self._thread.join(1.0)
                alive()
            self._thread = None

    def _work(self) -> None:
        while (step := self._steps.get()) is not None:
            started = time.monotonic()
            try:
                size, error = self._upload(step), None
            except Exception as failure:  # said; the run goes on, and the next checkpoint is tried again
                size, error = 0, f"{self.remote.address}: step {step} could not be copied there: {_line(failure)}"
            self._open.remove(step)
            if size or error:
                self._ended(step, time.monotonic() - started, size, error)

    def _upload(self, step: int) -> int:
        """Bytes of the checkpoint; 0 when it need not be copied."""
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
        except Exception as failure:  # of whatever kind the store's client knows; all ranks must hear of it
            error = _line(failure)
        errors: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(errors, error, group=self._group)
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
        """The files to copy; none when they are there, or when newer ones wait. A text is an error."""
        try:
            manifest = (folder / integrity.MANIFEST).read_bytes()
            if step in self._obsolete(sorted(self._open)):
                return {}
            if (owner := self.remote.owner()) is None:
                self.remote.claim(self._run)
            elif owner != self._run:
                return f"another run ({owner}) keeps its checkpoints there; set checkpoint.remote to another folder"
            if self.remote.manifest(step) == manifest:
                return {}
            self.remote.unseal(step)
            return integrity.read_manifest(manifest)
        except Exception as failure:
            return _line(failure)


def _line(failure: Exception) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[-1]
