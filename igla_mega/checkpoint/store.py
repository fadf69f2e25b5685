"""Write checkpoints in one format for every layout; a checkpoint exists completely or not at all.

`step_00000100/` holds files of torch's distributed checkpoint (DCP) with one key per parameter (its fp32 master weights
under its global name) and `optimizer.<kind>.<name>` for its moments (with Elastic Weight Consolidation also `fisher`
and `anchor`, which `fisher.json` describes), `progress.json`, the resolved `recipe.yaml`, and `manifest.json` with the
size and digest of every file. It is written under a temporary name, checked, and renamed; `latest` is updated last.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
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
    RUN,
    UNFINISHED,
    damage,
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
from igla_mega.config.files import replace_durably, sync_folder
from igla_mega.distributed.mesh import Mesh
from igla_mega.model.shards import ParameterState

__all__ = ["MANIFEST", "damage", "is_local", "step_dir", "steps_in"]


class CheckpointWriter:
    """Save checkpoints in the background: `save` copies the state, and a thread writes it over its own process group.

    A failed save is an outcome, not an error: the run continues, and earlier checkpoints remain complete. All ranks
    call the same methods in the same order, except for `poll`, which is not collective.

    Args:
        root: folder of the checkpoints that all nodes share.
        staging_bytes: maximum size of the copy in a rank's memory; the rest is written before `save` returns.
        local: where this node keeps its own checkpoints; None: nowhere.
        remote: folder of an object store to which complete checkpoints are copied; None: no copies.
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
        """Why the last save on shared storage failed; None after a save that succeeded."""
        self.sync_logs: Callable[[], None] = lambda: None
        """Called by the main rank's writing thread before a checkpoint is sealed: flushes the lines of its steps."""
        # A separate group: gloo matches collectives by order, and those of the training thread, which run at the same
        # time, must not be matched with those of the writing thread.
        self._group = dist.new_group(backend="gloo")
        self.local = replace(local, group=self._group) if local else None
        self._thread: threading.Thread | None = None
        self._ended: list[SaveOutcome] = []
        self._lock = threading.Lock()
        self._staging_reported = False
        self._remarks: list[str] = []
        self._uploads = None
        self._run = run = run_id(root, mesh)
        if remote:
            # A run without checkpoints is new, so checkpoints in the remote folder belong to an earlier run.
            if mesh.is_main and not steps_in(root):
                remote.claim(run)
            self._uploads = Uploads(remote, root, run, self._uploaded, retention.obsolete)
        if mesh.is_main:
            root.mkdir(parents=True, exist_ok=True)
            self._device = root.stat().st_dev
            sync_folder(root.parent)
            for prefix in (UNFINISHED, REMOVED):
                for folder in root.glob(f"{prefix}*"):
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
        """Save `states` as the checkpoint of `progress.step`, after waiting for the previous save to end.

        Args:
            notes: additional files that describe the states, name -> text.
            local: True to save on this node's own disk.
        """
        self._join()
        started = time.monotonic()
        staged = _Staging(self.staging_bytes if self.asynchronous else 0)
        state = _to_write(states, None if local else self.mesh, staged)
        texts = {"progress.json": json.dumps(asdict(progress), indent=1) + "\n", "recipe.yaml": recipe_yaml}
        texts |= notes or {}
        step, released = progress.step, threading.Event()

        def write() -> None:
            """Write the folder and record how the save ended; runs in the writing thread."""
            size, error = 0, None
            try:
                write_folder = self._write_local if local else self._write_shared
                size = write_folder(step, state, texts, released.set)
            except (Exception, CheckpointException) as failure:  # CheckpointException derives from BaseException
                error = _save_failed(self.root, step, failure) if not local else last_line(failure)
            finally:
                released.set()  # also on failure: the training thread may be waiting for it
            where: Literal["shared", "local"] = "local" if local else "shared"
            self._end(SaveOutcome(step, time.monotonic() - started, size, error, where), staged)

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()
        # Pieces that were not staged are views of live memory, which the next optimizer step would overwrite.
        if staged.late_bytes:
            released.wait()
        if not self.asynchronous:
            self._join()

    def poll(self) -> list[SaveOutcome]:
        """Return the saves and copies that have ended since the last call, without waiting for the others."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def wait(self) -> list[SaveOutcome]:
        """Wait until the last save is on disk or has failed; a copy to a remote folder may continue."""
        self._join()
        return self.poll()

    def finish(self, *, alive: Callable[[], None] = lambda: None) -> list[SaveOutcome]:
        """Wait for the last save and for all copies to the remote folder.

        Args:
            alive: called every second during the copies, which may take hours, so that the watchdog sees progress.
        """
        self._join()
        if self._uploads:
            self._uploads.finish(alive)
        return self.poll()

    def refuse_loss(self) -> None:
        """Raise if the last save on shared storage has failed; called at the end of a run.

        Raises:
            RuntimeError: the save failed; the message gives the cause, the last complete checkpoint and the loss.
        """
        if self.trouble is None:
            return
        complete = steps_in(self.root)
        lost = f"Training after step {complete[-1]} is lost" if complete else "All training of this run is lost"
        raise RuntimeError(
            f"{self.trouble}\n  {lost}. Free some space, then run the same command again to resume from there."
        )

    def copy_found(self, step: int) -> None:
        """Copy a checkpoint found below `root` to the remote folder, unless the folder already has it."""
        if self._uploads:
            self._uploads.add(step)

    def _join(self) -> None:
        """Wait for the writing thread."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _end(self, outcome: SaveOutcome, staged: "_Staging") -> None:
        """Record the outcome of a save with its notes, and queue the copy to the remote folder."""
        shared, error = outcome.where == "shared", outcome.error
        notes, self._remarks = self._remarks, []
        if shared:
            if error is None and self.trouble is not None:
                notes.append(f"the checkpoint of step {outcome.step} is complete: saves succeed again")
            self.trouble = error
        if staged.late_bytes and self.asynchronous and not self._staging_reported:
            self._staging_reported = True
            notes.append(
                f"checkpoint.staging_memory: a rank stages {integrity.words(staged.bytes)}; steps wait while the other "
                f"{integrity.words(staged.late_bytes)} are written"
            )
        with self._lock:
            self._ended.append(replace(outcome, note="\n".join(notes) or None))
        if shared and error is None and self._uploads:
            self._uploads.add(outcome.step)

    def _uploaded(self, step: int, seconds: float, size: int, error: str | None) -> None:
        """Record how a copy to the remote folder ended; called from the uploading thread."""
        with self._lock:
            self._ended.append(SaveOutcome(step, seconds, size, error, "remote"))

    def _write_shared(
        self, step: int, state: dict[str, Pieces], texts: dict[str, str], released: Callable[[], None]
    ) -> int:
        """Write a checkpoint that all nodes share; return the bytes written by all ranks."""
        final = step_dir(self.root, step)

        def check_mount() -> None:
            """Raise OSError if `root` is no longer the file system on which the run started."""
            # A lost mount leaves its empty mount point behind. A checkpoint written there would fill the node's system
            # disk, and be hidden as soon as the mount is back.
            if not self.root.is_dir():
                raise OSError("the folder no longer exists")
            if self.root.stat().st_dev != self._device:
                raise OSError("the folder is on another file system than at the start of the run: its mount is lost")

        def remove_old() -> None:
            """Update `latest`, and remove the checkpoints that retention does not keep."""
            # The uploading thread still reads these.
            kept = self._uploads.pending() if self._uploads else ()
            try:
                _point_latest_to(final)
                # A later step is not of this run's present: it was passed over at the start, or was rolled back.
                for old in self.retention.obsolete(one for one in steps_in(self.root) if one <= step):
                    if old not in kept:
                        integrity.remove(step_dir(self.root, old))
            except OSError as error:
                # Reported, not raised: the new checkpoint is complete, and raising would report it as failed.
                self._remarks.append(
                    f"{self.root}: step {step} is saved, but older checkpoints could not be removed: {error}"
                )

        hooks = _Hooks(check_mount, self._sync_logs, remove_old, released, self._run)
        return _write_folder(final, state, texts, self._group, hooks)

    def _sync_logs(self) -> None:
        """Flush what the run has logged; a failure is a remark, as no checkpoint should be missing for its lines."""
        try:
            self.sync_logs()
        except OSError as error:
            self._remarks.append(f"the lines of the last steps may be lost in a power cut: {error}")

    def _write_local(
        self, step: int, state: dict[str, Pieces], texts: dict[str, str], released: Callable[[], None]
    ) -> int:
        """Write this rank's part of a checkpoint on its node's disk; return the bytes written by all ranks."""
        local = self.local
        assert local is not None, "a local save is requested only where checkpoint.local_folder is set"
        # All parts carry one random id: a step that is saved again must not be combined from two saves.
        save: list = [secrets.token_hex(8)]
        dist.broadcast_object_list(save, src=0, group=self._group)
        size, error = 0, None
        try:
            texts = {**texts, PLACE: local.place(save[0])}
            hooks = _Hooks(sealing=self._sync_logs, released=released)
            size = _write_folder(local.folder(step), state, texts, None, hooks)
        except (Exception, CheckpointException) as failure:
            error = last_line(failure)  # not raised here: the other ranks wait in the gather below
        outcomes = local.gathered((size, error))
        failed = [(rank, why) for rank, (_, why) in enumerate(outcomes) if why is not None]
        if failed:
            local.remove([step])
            rank, why = failed[0]
            raise OSError(f"{local.root}: step {step} could not be saved on the node of rank {rank}: {why}")
        local.remove(local.steps()[: -local.keep_last])
        return sum(size for size, _ in outcomes)


def save_folder(folder: Path, states: Iterable[ParameterState], texts: Mapping[str, str], mesh: Mesh) -> None:
    """Write states as a folder in the format of a checkpoint, completely or not at all, and wait for it.

    Raises:
        RuntimeError: the folder could not be written.
    """
    try:
        _write_folder(folder, _to_write(states, mesh, _Staging(0)), texts, mesh.host_group, _Hooks())
    except (CheckpointException, OSError) as error:
        raise RuntimeError(f"{folder}: could not be written: {last_line(error)}") from error


@dataclass(frozen=True)
class _Hooks:
    """Functions that `_write_folder` calls on its way."""

    before: Callable[[], None] = lambda: None
    """Called by rank 0 before anything is written; may raise OSError."""
    sealing: Callable[[], None] = lambda: None
    """Called by rank 0 before the manifest is written."""
    after: Callable[[], None] = lambda: None
    """Called by rank 0 when the folder has its final name."""
    released: Callable[[], None] = lambda: None
    """Called by every rank when its pieces that were not staged are on disk."""
    run: str | None = None
    """Id of the run that writes, for the manifest."""


def _write_folder(
    final: Path,
    state: dict[str, Pieces],
    texts: Mapping[str, str],
    group: dist.ProcessGroup | None,
    hooks: _Hooks,
) -> int:
    """Write a folder under a temporary name, seal it with a manifest, and rename it; return the bytes of all ranks.

    A process killed at any point leaves either the old folder or the new one under the final name:
    the manifest is written last and flushed, only then is the folder renamed, and one rename is atomic (rename(2)).

    Args:
        group: the ranks that write the folder; None for this one alone.

    Raises:
        CheckpointException | OSError: on every rank, when any of them failed.
    """
    temporary = final.parent / f"{UNFINISHED}{final.name}"

    def prepare() -> None:
        """Create the empty temporary folder with the text files."""
        hooks.before()
        # The rest of a save that failed: files that no rank writes again would end up in the manifest.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            write_text(temporary / name, text)

    def commit() -> None:
        """Seal the temporary folder and give it the final name."""
        hooks.sealing()
        write_manifest(temporary, digests, hooks.run)
        # The same step may be saved twice: after a consolidation, or when a run was rolled back. A folder that is not
        # empty cannot be replaced by one rename, so the old one is moved aside first. If the process is killed between
        # the two renames, `load._restore` moves the old folder back.
        replaced = final.parent / f"{REPLACED}{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        # A rename is in the parent folder's data: flush it before the old checkpoint is deleted.
        sync_folder(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)
        hooks.after()

    try:
        _on_main(group, prepare)
        writer = Writer(temporary, hooks.released)
        dcp.save(state, storage_writer=writer, process_group=group, no_dist=group is None)
        parts = _written_by_all(writer, group)
        digests = {name: digest for part, _ in parts for name, digest in part.items()}
        _on_main(group, commit)
    except (CheckpointException, OSError):
        if group is None or group.rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sum(size for _, size in parts)


def _written_by_all(writer: Writer, group: dist.ProcessGroup | None) -> list[tuple[dict[str, str], int]]:
    """Return the digests and the size of every rank's file."""
    # Digests of the bytes as they were written: reading the files back would mostly read the page cache, and would seal
    # a file that was damaged on its way to the disk.
    parts: list = [(writer.digests, writer.num_bytes)]
    if group is not None:
        parts *= group.size()
        dist.all_gather_object(parts, parts[group.rank()], group=group)
    return parts


class _Staging:
    """Budget of a save's copy on the host, in bytes, and how much of the save is copied (staged) or written late.

    Args:
        max_bytes: maximum size of the copy; None: no limit.
    """

    def __init__(self, max_bytes: int | None):
        self.max_bytes, self.bytes, self.late_bytes = max_bytes, 0, 0

    def takes(self, size: int) -> bool:
        """Return True if `size` bytes fit, and account for them as staged; otherwise as late."""
        room = self.max_bytes is None or self.bytes + size <= self.max_bytes
        self.bytes += size if room else 0
        self.late_bytes += 0 if room else size
        return room


def _to_write(states: Iterable[ParameterState], mesh: Mesh | None, staging: _Staging) -> dict[str, Pieces]:
    """Return the pieces of the state that this rank writes: copies on the host, or functions for those copied late.

    Args:
        mesh: decides which of the ranks with the same values writes them; None: this rank writes all that it holds.
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
                # copy=True: on a CPU run `to` would otherwise return the live tensor.
                staged = values.to("cpu", copy=True)
                pieces += [(at, p.shape, p) for at, p in state.shard.rectangles(staged, state.start)]
            else:
                rectangles = state.shard.rectangles(values, state.start)
                pieces += [(at, p.shape, lambda live=p: live) for at, p in rectangles]
    return {name: Pieces(shapes[name], dtypes[name], pieces) for name, pieces in copies.items()}


def _is_writer(state: ParameterState, mesh: Mesh) -> bool:
    """Return True if this rank writes a state that its replicas may hold too."""
    if not state.replicated:
        return True
    # Replicas divide the parameters among them, so that all write at once. blake2b, because Python's `hash` of a string
    # differs from process to process.
    owner = int.from_bytes(hashlib.blake2b(state.shard.name.encode(), digest_size=4).digest(), "big")
    replicas = mesh.replicas(expert=state.shard.expert)
    return owner % replicas.size == replicas.rank


def write_manifest(path: Path, digests: dict[str, str], run: str | None = None) -> None:
    """Seal a checkpoint folder with the size and digest of every file below it.

    Args:
        digests: of files that were digested while they were written; the others are read.
        run: id of the run that writes it.

    Raises:
        OSError: the files on disk are not those that were written.
    """
    files = {}
    for written in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        name = written.relative_to(path).as_posix()
        files[name] = {"bytes": written.stat().st_size, "blake2b": digests.get(name) or integrity.digest(written)}
    missing = digests.keys() - files.keys()
    if missing:
        raise OSError(f"{sorted(missing)[0]} was written but does not exist")
    # The index is read as a loader would, before the checkpoint counts and the one before it may be deleted.
    try:
        index = Reader(path).read_metadata()
    except ConfigError as error:
        raise OSError(str(error)) from error
    for storage in index.storage_data.values():
        size = files.get(storage.relative_path, {}).get("bytes", 0)
        if storage.offset + storage.length > size:
            raise OSError(
                f"{storage.relative_path} ends at byte {size}, the index needs {storage.offset + storage.length} bytes"
            )
    sealed = {"format": 1, **({"run": run} if run else {}), "files": files}
    write_text(path / MANIFEST, json.dumps(sealed, indent=1))
    sync_folder(path)


def _point_latest_to(checkpoint: Path) -> None:
    """Write the checkpoint's name into the file `latest` of its folder, atomically."""
    temporary = checkpoint.parent / ".latest"
    write_text(temporary, checkpoint.name + "\n")
    replace_durably(temporary, checkpoint.parent / "latest")


def _on_main(group: dist.ProcessGroup | None, action: Callable[[], None]) -> None:
    """Run `action` on rank 0 while the others wait, and raise its error on every rank as OSError."""
    if group is None:
        return action()
    outcome: list = [None]
    if group.rank() == 0:
        try:
            action()
        except Exception as error:  # raising here would leave the other ranks waiting in the broadcast
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise OSError(outcome[0])


def _save_failed(root: Path, step: int, error: BaseException) -> str:
    """Return the message for a failed save: the cause, the free space, the last complete checkpoint, the remedy."""
    complete = [one for one in steps_in(root) if one <= step]
    previous = f"The checkpoint of step {complete[-1]} is complete." if complete else "There is no earlier checkpoint."
    try:
        free = f"{shutil.disk_usage(root).free / 2**30:.1f} GiB are free there."
    except OSError:
        free = "The folder cannot be reached."
    return (
        f"{root}: the checkpoint of step {step} could not be written: {last_line(error)}. {free}\n"
        f"  {previous} Free some space (a smaller checkpoint.keep_last deletes old ones), or restore the mount."
    )


def run_id(root: Path, mesh: Mesh) -> str:
    """Return the id that distinguishes this run from an earlier one in the same folder; created on the first call.

    A node's own disk and a remote folder may still hold checkpoints of that earlier run. The checkpoints that a folder
    without an id already has count as its own. All ranks call it.
    """
    name: list = [None]
    if mesh.is_main:
        root.mkdir(parents=True, exist_ok=True)
        if not integrity.runs_of(root):
            integrity.adopt(root, sorted({integrity.owner_of(step_dir(root, s)) or "" for s in steps_in(root)} - {""}))
            write_text(root / f".{RUN}", secrets.token_hex(4) + "\n")
            replace_durably(root / f".{RUN}", root / RUN)
        name = [integrity.runs_of(root)[0]]
    dist.broadcast_object_list(name, src=0, group=mesh.host_group)
    return name[0]
