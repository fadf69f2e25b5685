"""Checkpoints: one format for every layout, whole or not there at all.

`step_00000100/` holds DCP files with a key per parameter (its fp32 master weights under its global name) and
`optimizer.<kind>.<name>` beside it (moments; with Elastic Weight Consolidation also `fisher` and `anchor`, which
`fisher.json` describes), `progress.json`, the resolved `recipe.yaml` and `manifest.json` with the size
and digest of every file. It is written under a temporary name, checked, and renamed; `latest` moves last.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from igla_mega.checkpoint import integrity
from igla_mega.checkpoint.integrity import (
    MANIFEST,
    REMOVED,
    REPLACED,
    UNFINISHED,
    damage,
    fsync,
    last_line,
    step_dir,
    steps_in,
    write_text,
)
from igla_mega.checkpoint.local import PLACE, Local, is_local
from igla_mega.checkpoint.pieces import Pieces, Reader, Writer, key_of
from igla_mega.checkpoint.progress import Progress, Retention, SaveOutcome
from igla_mega.checkpoint.remote import Remote, Uploads
from igla_mega.config.errors import ConfigError
from igla_mega.distributed.mesh import Mesh
from igla_mega.model.shards import ParameterState

__all__ = ["MANIFEST", "damage", "is_local", "step_dir", "steps_in"]

_RUN = "run_id"


class CheckpointWriter:
    """Saves in the background: a copy is taken at once, and written by a thread with a process group of its own.

    A save that fails is an outcome, not an error: the run goes on, and what was whole stays so. All ranks call the
    same methods in the same order; `poll` excepted, which waits for nobody.

    Args:
        root: folder of the checkpoints that all nodes share.
        staging_bytes: most that a copy takes of a rank's memory; what is beyond it is written before `save` returns.
        local: where this node keeps checkpoints of its own, if anywhere.
        remote: where whole checkpoints are copied to.
    """

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        retention: Retention,
        *,
        asynchronous: bool,
        staging_bytes: int | None = None,
        local: Local | None = None,
        remote: Remote | None = None,
    ):
        self.root, self.mesh, self.retention, self.asynchronous = root, mesh, retention, asynchronous
        self.staging_bytes = staging_bytes
        self.trouble: str | None = None
        """Why the last save on shared storage failed, until one succeeds."""
        # Its own: what the training thread asks of the others meanwhile must not be taken for an answer.
        self._group = dist.new_group(backend="gloo")
        self.local = replace(local, group=self._group) if local else None
        self._thread: threading.Thread | None = None
        self._ended: list[SaveOutcome] = []
        self._lock = threading.Lock()
        self._staging_said = False
        self._untidy: str | None = None
        self._uploads = None
        if remote:
            run = run_id(root, mesh)
            if mesh.is_main and not steps_in(root):  # it begins: what lies there was another's
                remote.claim(run)
            self._uploads = Uploads(remote, root, run, self._uploaded, retention.obsolete)
        if mesh.is_main:
            root.mkdir(parents=True, exist_ok=True)
            self._device = root.stat().st_dev
            for begun in (UNFINISHED, REMOVED):
                for folder in root.glob(f"{begun}*"):
                    shutil.rmtree(folder, ignore_errors=True)
        if local:
            local.tidy()

    def save(
        self,
        states: Iterable[ParameterState],
        progress: Progress,
        recipe_yaml: str,
        notes: Mapping[str, str] | None = None,
        *,
        local: bool = False,
    ) -> None:
        """Save `states` as the checkpoint of `progress.step`; waits until the one before it is written.

        Args:
            notes: more files that describe what the states hold, name -> text.
            local: on this node's own disk.
        """
        self._join()
        started = time.monotonic()
        staged = _Staging(self.staging_bytes if self.asynchronous else 0)
        state = _to_write(states, None if local else self.mesh, staged)
        texts = {"progress.json": json.dumps(asdict(progress), indent=1) + "\n", "recipe.yaml": recipe_yaml}
        texts |= notes or {}
        step, released = progress.step, threading.Event()

        def write() -> None:
            size, error = 0, None
            try:
                write_folder = self._write_local if local else self._write_shared
                size = write_folder(step, state, texts, released.set)
            except (Exception, CheckpointException) as failure:  # the latter is no Exception
                error = _save_failed(self.root, step, failure) if not local else last_line(failure)
            finally:
                released.set()
            self._end(step, time.monotonic() - started, size, error, staged, local)

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()
        if staged.late_bytes:
            released.wait()
        if not self.asynchronous:
            self._join()

    def poll(self) -> list[SaveOutcome]:
        """What has ended since the last call, without waiting for what is under way."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def wait(self) -> list[SaveOutcome]:
        """Wait until the last save is on disk, or has failed; copying to a remote folder may go on."""
        self._join()
        return self.poll()

    def finish(self, *, alive: Callable[[], None] = lambda: None) -> list[SaveOutcome]:
        """Wait for everything.

        Args:
            alive: called every second while a remote folder is waited for, which may take hours.
        """
        self._join()
        if self._uploads:
            self._uploads.finish(alive)
        return self.poll()

    def refuse_loss(self) -> None:
        """End a run whose last save has failed.

        Raises:
            RuntimeError: it has; the message says why, what still stands and what is lost.
        """
        if self.trouble is None:
            return
        whole = steps_in(self.root)
        lost = f"What was trained after step {whole[-1]} is lost" if whole else "All that was trained is lost"
        raise RuntimeError(f"{self.trouble}\n  {lost}. Make room, then run the same command again to go on from there.")

    def copy_found(self, step: int) -> None:
        """Copy a checkpoint that was found below `root` to the remote folder, unless it is there."""
        if self._uploads:
            self._uploads.add(step)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _end(self, step: int, seconds: float, size: int, error: str | None, staged: "_Staging", local: bool) -> None:
        notes, self._untidy = ([self._untidy] if self._untidy else []), None
        if not local:
            if error is None and self.trouble is not None:
                notes.append(f"the checkpoint of step {step} is whole: saves succeed again")
            self.trouble = error
        if staged.late_bytes and self.asynchronous and not self._staging_said:
            self._staging_said = True
            notes.append(
                f"checkpoint.staging_memory: a rank stages {integrity.words(staged.bytes)}; steps wait while the other "
                f"{integrity.words(staged.late_bytes)} are written"
            )
        where: Literal["shared", "local"] = "local" if local else "shared"
        with self._lock:
            self._ended.append(SaveOutcome(step, seconds, size, error, where, "\n".join(notes) or None))
        if not local and error is None and self._uploads:
            self._uploads.add(step)

    def _uploaded(self, step: int, seconds: float, size: int, error: str | None) -> None:
        with self._lock:
            self._ended.append(SaveOutcome(step, seconds, size, error, "remote"))

    def _write_shared(
        self, step: int, state: dict[str, Pieces], texts: dict[str, str], released: Callable[[], None]
    ) -> int:
        final = step_dir(self.root, step)

        def begin() -> None:
            # Where a mount is lost its empty folder is left, or nothing: what is written there is not where it belongs.
            if not self.root.is_dir():
                raise OSError("the folder is gone")
            if self.root.stat().st_dev != self._device:
                raise OSError("the folder is on another file system than when the run began: its mount is lost")

        def tidy() -> None:
            kept = self._uploads.pending() if self._uploads else ()
            try:
                _point_latest_to(final)
                for old in self.retention.obsolete(steps_in(self.root)):
                    if old not in kept:
                        integrity.remove(step_dir(self.root, old))
            except OSError as error:  # the checkpoint is whole all the same
                self._untidy = (
                    f"{self.root}: step {step} is saved, but what is older could not be put in order: {error}"
                )

        return _write_folder(final, state, texts, self._group, tidy, begin=begin, released=released)

    def _write_local(
        self, step: int, state: dict[str, Pieces], texts: dict[str, str], released: Callable[[], None]
    ) -> int:
        local = self.local
        assert local is not None, "asked for where there is a folder"
        save: list = [secrets.token_hex(8)]
        dist.broadcast_object_list(save, src=0, group=self._group)
        size, error = 0, None
        try:
            texts = {**texts, PLACE: local.place(save[0])}
            size = _write_folder(local.folder(step), state, texts, None, lambda: None, released=released)
        except (Exception, CheckpointException) as failure:  # every rank must hear of it
            error = last_line(failure)
        outcomes = local.gathered((size, error))
        failed = [(rank, why) for rank, (_, why) in enumerate(outcomes) if why is not None]
        if failed:
            local.remove([step])
            rank, why = failed[0]
            raise OSError(f"{local.root}: step {step} could not be saved on the node of rank {rank}: {why}")
        local.remove(local.steps()[: -local.keep_last])
        return sum(size for size, _ in outcomes)


def save_folder(folder: Path, states: Iterable[ParameterState], texts: Mapping[str, str], mesh: Mesh) -> None:
    """Save states by themselves, in the format of a checkpoint: whole or not at all.

    Raises:
        RuntimeError: it could not be written.
    """
    try:
        _write_folder(folder, _to_write(states, mesh, _Staging(0)), texts, mesh.host_group, lambda: None)
    except (CheckpointException, OSError) as error:
        raise RuntimeError(f"{folder}: could not be written: {last_line(error)}") from error


def _write_folder(
    final: Path,
    state: dict[str, Pieces],
    texts: Mapping[str, str],
    group: dist.ProcessGroup | None,
    tidy: Callable[[], None],
    *,
    begin: Callable[[], None] = lambda: None,
    released: Callable[[], None] = lambda: None,
) -> int:
    """Write under another name, seal, rename; then `tidy`. Rank 0 does what is done once.

    Args:
        group: the ranks that write it; None for this one alone.
        released: called when the pieces that were not staged are on disk.

    Returns:
        Bytes, of all ranks.
    """
    temporary = final.parent / f"{UNFINISHED}{final.name}"

    def prepare() -> None:
        begin()
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            write_text(temporary / name, text)

    def commit() -> None:
        write_manifest(temporary, digests)
        # A step may be saved again, after a consolidation or in a run that was taken back; a half of it is undone by
        # `_restore`.
        replaced = final.parent / f"{REPLACED}{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        fsync(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        tidy()

    try:
        _on_main(group, prepare)
        writer = Writer(temporary, released)
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
        parts: list = [(writer.digests, writer.num_bytes)]
        if group is not None:
            parts *= group.size()
            dist.all_gather_object(parts, parts[group.rank()], group=group)
        digests = {name: digest for part, _ in parts for name, digest in part.items()}
        _on_main(group, commit)
    except (CheckpointException, OSError):
        if group is None or group.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(size for _, size in parts)


class _Staging:
    """What of a save is copied, and what is written before training goes on."""

    def __init__(self, most: int | None):
        self.most, self.bytes, self.late_bytes = most, 0, 0

    def takes(self, size: int) -> bool:
        """Whether there is room for so many bytes, which are then taken."""
        room = self.most is None or self.bytes + size <= self.most
        self.bytes += size if room else 0
        self.late_bytes += 0 if room else size
        return room


def _to_write(states: Iterable[ParameterState], mesh: Mesh | None, staging: _Staging) -> dict[str, Pieces]:
    """Of those pieces of the state that this rank is the one to write: copies on the host, and what is copied late.

    Args:
        mesh: None: all that this rank holds.
    """
    copies: dict[str, list] = {}
    shapes, dtypes = {}, {}
    for state in states:
        if mesh is not None and not (state.shard.is_first_copy and _is_writer(state, mesh)):
            continue
        for kind, values in state.values.items():
            name = key_of(state.shard.name, kind)
            shapes[name], dtypes[name] = state.shard.shape, values.dtype
            pieces = copies.setdefault(name, [])
            if staging.takes(values.nbytes):
                staged = values.to("cpu", copy=True)
                pieces += [(at, p.shape, p) for at, p in state.shard.rectangles(staged, state.start)]
            else:
                rectangles = state.shard.rectangles(values, state.start)
                pieces += [(at, p.shape, lambda live=p: live) for at, p in rectangles]
    return {name: Pieces(shapes[name], dtypes[name], pieces) for name, pieces in copies.items()}


def _is_writer(state: ParameterState, mesh: Mesh) -> bool:
    if not state.replicated:
        return True
    # Ranks that keep the same share the writing by name.
    owner = int.from_bytes(hashlib.blake2b(state.shard.name.encode(), digest_size=4).digest(), "big")
    replicas = mesh.replicas(expert=state.shard.expert)
    return owner % replicas.size == replicas.rank


def write_manifest(path: Path, digests: dict[str, str]) -> None:
    """Seal a checkpoint folder: size and digest of every file below it (those not in `digests` are read).

    Raises:
        OSError: what is on disk is not what was written.
    """
    files = {}
    for written in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        name = written.relative_to(path).as_posix()
        files[name] = {"bytes": written.stat().st_size, "blake2b": digests.get(name) or integrity.digest(written)}
    missing = digests.keys() - files.keys()
    if missing:
        raise OSError(f"{sorted(missing)[0]} was written and is not there")
    try:
        index = Reader(path).read_metadata()
    except ConfigError as error:
        raise OSError(str(error)) from error
    for storage in index.storage_data.values():
        size = files.get(storage.relative_path, {}).get("bytes", 0)
        if storage.offset + storage.length > size:
            raise OSError(f"{storage.relative_path} ends at byte {size}, before what the index says")
    write_text(path / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1))
    fsync(path)


def _point_latest_to(checkpoint: Path) -> None:
    temporary = checkpoint.parent / ".latest"
    temporary.write_text(checkpoint.name + "\n")
    os.replace(temporary, checkpoint.parent / "latest")
    fsync(checkpoint.parent)


def _on_main(group: dist.ProcessGroup | None, action: Callable[[], None]) -> None:
    """Run `action` on rank 0, and raise its error on every rank."""
    if group is None:
        return action()
    outcome: list = [None]
    if group.rank() == 0:
        try:
            action()
        except Exception as error:  # the others wait for word
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise OSError(outcome[0])


def _save_failed(root: Path, step: int, error: BaseException) -> str:
    whole = steps_in(root)
    stands = f"The checkpoint of step {whole[-1]} is whole." if whole else "There is no earlier checkpoint."
    try:
        free = f"{shutil.disk_usage(root).free / 2**30:.1f} GiB are free there."
    except OSError:
        free = "The folder cannot be reached."
    return (
        f"{root}: the checkpoint of step {step} could not be written: {last_line(error)}. {free}\n"
        f"  {stands} Make room (a smaller checkpoint.keep_last deletes old ones), or bring the mount back."
    )


def run_id(root: Path, mesh: Mesh) -> str:
    """What tells this run from an earlier one in the same folder, which a node may remember; made once."""
    name: list = [None]
    if mesh.is_main:
        root.mkdir(parents=True, exist_ok=True)
        if not (root / _RUN).is_file():
            write_text(root / f".{_RUN}", secrets.token_hex(4) + "\n")
            os.replace(root / f".{_RUN}", root / _RUN)
        name = [(root / _RUN).read_text().strip()]
    dist.broadcast_object_list(name, src=0, group=mesh.host_group)
    return name[0]
