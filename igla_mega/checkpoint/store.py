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
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import TypeAdapter
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from igla_mega.checkpoint import integrity
from igla_mega.checkpoint.integrity import MANIFEST, REMOVED, UNFINISHED, damage, step_dir, steps_in
from igla_mega.checkpoint.local import PLACE, Local, is_local
from igla_mega.checkpoint.pieces import Pieces, Reader, Writer, load
from igla_mega.checkpoint.remote import Remote, Uploads
from igla_mega.config.errors import ConfigError
from igla_mega.model.shards import Shard, Slot, local_values
from igla_mega.parallel import Mesh

__all__ = ["MANIFEST", "damage", "is_local", "step_dir", "steps_in"]

_REPLACED = ".replaced_"
_RUN = "run_id"


@dataclass
class Progress:
    """How far a run is. Everything random is a function of the seed and the step, so this is all a resume needs."""

    step: int = 0
    """Optimizer steps taken."""
    samples: int = 0
    """Sequences consumed."""
    tokens: int = 0
    """Tokens consumed."""
    stage: int = 0
    """Stages finished: trained, evaluated and, where that is asked for, consolidated."""
    domain_losses: list[dict[str, float]] = field(default_factory=list)
    """After each of them that is a phase, the loss on each domain, nats per token."""
    before: dict[str, dict[str, float]] = field(default_factory=dict)
    """What was measured on each source before the first step of the stage at hand."""
    skipped: list[int] = field(default_factory=list)
    """Steps, counted from 1, whose samples are consumed without an update."""
    bad_steps: list[int] = field(default_factory=list)
    """Those of them that were bad themselves."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps of the stage at hand, nats: what a spike is told by."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    keep_last: int
    """How many of the newest."""
    keep_every: int | None = None
    """Also every one whose step is a multiple of this."""
    always: frozenset[int] = frozenset()
    """Also those of these steps: what a later stage starts from."""

    def obsolete(self, steps: Iterable[int]) -> list[int]:
        """The steps, of those there are, whose checkpoints may go."""
        steps = sorted(steps)
        kept = {*steps[-self.keep_last :], *self.always}
        return [s for s in steps if s not in kept and not (self.keep_every and s % self.keep_every == 0)]


@dataclass(frozen=True)
class SaveOutcome:
    """How a save, or the copying of one to a remote folder, has ended."""

    step: int
    seconds: float
    """From the call, or the start of the copying, until it was whole."""
    bytes: int
    """Written by all ranks; 0 when it failed."""
    error: str | None
    """Why it failed, in words, with what still stands; None: it is whole."""
    where: Literal["shared", "local", "remote"]
    note: str | None = None
    """What else should be said of it."""


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
        slots: Iterable[Slot],
        progress: Progress,
        recipe_yaml: str,
        notes: Mapping[str, str] | None = None,
        *,
        local: bool = False,
    ) -> None:
        """Save `slots` as the checkpoint of `progress.step`; waits until the one before it is written.

        Args:
            notes: more files that describe what the slots hold, name -> text.
            local: on this node's own disk.
        """
        self._join()
        started = time.monotonic()
        staged = _Staging(self.staging_bytes if self.asynchronous else 0)
        state = _to_write(slots, None if local else self.mesh, staged)
        texts = {"progress.json": json.dumps(asdict(progress), indent=1) + "\n", "recipe.yaml": recipe_yaml}
        texts |= notes or {}
        step, released = progress.step, threading.Event()

        def write() -> None:
            size, error = 0, None
            try:
                write_folder = self._write_local if local else self._write_shared
                size = write_folder(step, state, texts, released.set)
            except (Exception, CheckpointException) as failure:  # the latter is no Exception
                error = _save_failed(self.root, step, failure) if not local else _reason(failure)
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
            error = _reason(failure)
        outcomes = local.gathered((size, error))
        failed = [(rank, why) for rank, (_, why) in enumerate(outcomes) if why is not None]
        if failed:
            local.remove([step])
            rank, why = failed[0]
            raise OSError(f"{local.root}: step {step} could not be saved on the node of rank {rank}: {why}")
        local.remove(local.steps()[: -local.keep_last])
        return sum(size for size, _ in outcomes)


def save_folder(folder: Path, slots: Iterable[Slot], texts: Mapping[str, str], mesh: Mesh) -> None:
    """Save slots by themselves, in the format of a checkpoint: whole or not at all.

    Raises:
        RuntimeError: it could not be written.
    """
    try:
        _write_folder(folder, _to_write(slots, mesh, _Staging(0)), texts, mesh.host_group, lambda: None)
    except (CheckpointException, OSError) as error:
        raise RuntimeError(f"{folder}: could not be written: {_reason(error)}") from error


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
            _write_text(temporary / name, text)

    def commit() -> None:
        write_manifest(temporary, digests)
        # A step may be saved again, after a consolidation or in a run that was taken back; a half of it is undone by
        # `_restore`.
        replaced = final.parent / f"{_REPLACED}{final.name}"
        shutil.rmtree(replaced, ignore_errors=True)
        if final.exists():
            os.replace(final, replaced)
        os.replace(temporary, final)
        _fsync(final.parent)
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


def _to_write(slots: Iterable[Slot], mesh: Mesh | None, staging: _Staging) -> dict[str, Pieces]:
    """Of those pieces of the state that this rank is the one to write: copies on the host, and what is copied late.

    Args:
        mesh: None: all that this rank holds.
    """
    copies: dict[str, list] = {}
    shapes, dtypes = {}, {}
    for slot in slots:
        if mesh is not None and not (slot.shard.is_first_copy and _is_writer(slot, mesh)):
            continue
        for kind, values in slot.values.items():
            name = _key(slot.shard.name, kind)
            shapes[name], dtypes[name] = slot.shard.shape, values.dtype
            pieces = copies.setdefault(name, [])
            if staging.takes(values.nbytes):
                staged = values.to("cpu", copy=True)
                pieces += [(at, p.shape, p) for at, p in slot.shard.rectangles(staged, slot.start)]
            else:
                rectangles = slot.shard.rectangles(values, slot.start)
                pieces += [(at, p.shape, lambda live=p: live) for at, p in rectangles]
    return {name: Pieces(shapes[name], dtypes[name], pieces) for name, pieces in copies.items()}


def _is_writer(slot: Slot, mesh: Mesh) -> bool:
    if not slot.replicated:
        return True
    # Ranks that keep the same share the writing by name.
    owner = int.from_bytes(hashlib.blake2b(slot.shard.name.encode(), digest_size=4).digest(), "big")
    replicas = mesh.replicas(expert=slot.shard.expert)
    return owner % replicas.size == replicas.rank


def _key(name: str, kind: str) -> str:
    return name if kind == "master" else f"optimizer.{kind}.{name}"


def _kind(key: str) -> str:
    return key.split(".")[1] if key.startswith("optimizer.") else "master"


def load_weights(
    path: Path, pairs: Iterable[tuple[Shard, Tensor]], group: dist.ProcessGroup | None, *, partly: bool = False
) -> None:
    """Read weights into parameters (of any dtype, on any device), from a checkpoint of any layout.

    Args:
        pairs: each parameter's place in the whole, and the parameter.
        group: gloo group of all ranks that load, or None for this process alone.
        partly: the checkpoint may hold more than is asked for.

    Raises:
        ConfigError: the checkpoint holds another model.
    """
    targets: dict[str, tuple[Shard, list]] = {}
    for shard, param in pairs:
        values, start = local_values(param)
        targets.setdefault(shard.name, (shard, []))[1].extend(shard.rectangles(values, start))
    wanted = {name: (shard.shape, rectangles) for name, (shard, rectangles) in targets.items()}
    _read(path, wanted, group, partly=partly)


@torch.no_grad()
def spread_masters(pairs: Iterable[tuple[Shard, Tensor]], slots: Iterable[Slot], mesh: Mesh) -> None:
    """Make the weights that the modules compute with from the fp32 masters, which replicas may share among them.

    All replicas call it with the same parameters in the same order.
    """
    own: dict[str, list[Slot]] = {}
    for slot in slots:
        own.setdefault(slot.shard.name, []).append(slot)
    for shard, param in pairs:
        values, start = local_values(param)
        whole = torch.zeros(values.numel(), dtype=torch.float32, device=values.device)
        held = own.get(shard.name, [])
        for slot in held:
            master = slot.values["master"]
            whole[slot.start - start : slot.start - start + master.numel()] = master
        group = mesh.replicas(expert=shard.expert)
        if group.size > 1 and not isinstance(param, DTensor) and not any(slot.replicated for slot in held):
            # Bits are added to zeros: a sum of numbers would lose the sign of -0.
            dist.all_reduce(whole.view(torch.int32), group=group.group)
        values.copy_(whole)


def load_slots(
    path: Path, slots: Iterable[Slot], group: dist.ProcessGroup | None, *, kinds: Collection[str] | None = None
) -> None:
    """Read the slots' values, all or those of some kinds. Raises as `load_weights` does."""
    targets: dict[str, tuple] = {}
    for slot in slots:
        for kind, values in slot.values.items():
            if kinds is not None and kind not in kinds:
                continue
            entry = targets.setdefault(_key(slot.shard.name, kind), (slot.shard.shape, []))
            entry[1].extend(slot.shard.rectangles(values, slot.start))
    _read(path, targets, group)


def _read(
    path: Path,
    targets: dict[str, tuple[tuple[int, ...], list]],
    group: dist.ProcessGroup | None,
    *,
    partly: bool = False,
) -> None:
    verify_together(path, group)
    reader = Reader(path)
    stored = reader.shapes()
    breaches = []
    for name, (shape, _) in targets.items():
        if name not in stored:
            breaches.append(f"{path}: has no {name} {list(shape)}.")
        elif tuple(stored[name]) != tuple(shape):
            breaches.append(f"{path}: {name} is {list(stored[name])}, this recipe's model has {list(shape)}.")
    if not breaches and not partly:
        wanted = _union(targets, group)
        kinds = {_kind(name) for name in wanted}
        extra = [name for name in stored if name not in wanted and _kind(name) in kinds]
        breaches += [f"{path}: holds {name}, which this recipe's model does not have." for name in extra]
    if breaches:
        more = [f"... and {len(breaches) - 3} more."] if len(breaches) > 3 else []
        raise ConfigError(
            "The checkpoint is of another model:",
            *breaches[:3],
            *more,
            "  Use the recipe that lies beside it (recipe.yaml), or start in a new run folder.",
        )
    state = {name: Pieces.of(shape, rectangles) for name, (shape, rectangles) in targets.items()}
    load(state, reader, group)


def _union(names: Iterable[str], group: dist.ProcessGroup | None) -> set[str]:
    if group is None:
        return set(names)
    everyones: list = [None] * group.size()
    dist.all_gather_object(everyones, list(names), group=group)
    return {name for part in everyones for name in part}


def find(
    root: Path, mesh: Mesh, say: Callable[[str], None], *, local: Local | None = None, remote: Remote | None = None
) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint, agreed on by all ranks; a damaged one is passed over, and said.

    Args:
        root: those that all nodes share.
        local: those that nodes keep for themselves: taken when newer, and whole on all of them.
        remote: copied from there when `root` holds none that is whole.

    Returns:
        None when there is no checkpoint at all.

    Raises:
        ConfigError: there are checkpoints, and every one is damaged.
    """
    if mesh.is_main:
        _restore(root)
    found: list = [steps_in(root)[::-1] if mesh.is_main else None]
    dist.broadcast_object_list(found, src=0, group=mesh.host_group)
    own = local.agreed(say) if local else []
    candidates = sorted([(step, True) for step in found[0]] + [(step, False) for step in own], reverse=True)
    damages = []
    for step, shared in candidates:
        path = step_dir(root, step) if shared or local is None else local.folder(step)
        reason = _damaged_together(path, mesh.host_group) if shared or local is None else local.damaged(step)
        if reason is None:
            integrity.note_verified(path)
            if local:  # what lies beyond was left behind, and would be mixed up with what comes
                local.remove([other for other in local.steps() if other > step])
            return path, read_progress(path)
        damages.append(reason)
        say(f"{reason}; going back to the checkpoint before it.")
    if remote is not None and (fetched := _fetch_newest(root, remote, mesh, say)) is not None:
        return fetched, read_progress(fetched)
    if damages:
        raise ConfigError(
            f"{root}: every checkpoint is damaged: {damages[0]}.",
            "  Move the folder away to start anew, or restore one from a backup.",
        )
    if mesh.is_main and root.is_dir():
        unfinished = [path.name for path in root.glob(f"{UNFINISHED}*")]
        if unfinished:
            say(f"{root}: no whole checkpoint; {unfinished[0]} was never finished.")
    return None


def _damaged_together(path: Path, group: dist.ProcessGroup) -> str | None:
    """What is wrong with a checkpoint that all ranks see, each of which reads some of its files."""
    reasons: list = [None] * group.size()
    dist.all_gather_object(reasons, damage(path, part=group.rank(), num_parts=group.size()), group=group)
    return next((reason for reason in reasons if reason), None)


def verify_together(path: Path, group: dist.ProcessGroup | None) -> None:
    """`integrity.verify`, of which each rank of a group does a part; all of them call it.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    if group is None:
        return integrity.verify(path)
    known: list = [None] * group.size()
    dist.all_gather_object(known, integrity.is_verified(path), group=group)
    if not all(known):
        if (reason := _damaged_together(path, group)) is not None:
            raise integrity.refusal(reason)
        integrity.note_verified(path)


def _fetch_newest(root: Path, remote: Remote, mesh: Mesh, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint of a remote folder, copied below `root` by all ranks."""
    offers: list = [None]
    if mesh.is_main:
        try:
            offers = [[(step, remote.manifest(step)) for step in remote.steps()[::-1]]]
        except Exception as failure:  # of whatever kind the store's client knows
            offers = [f"{remote.address}: cannot be read ({_reason(failure)}).\n  Mend checkpoint.remote."]
    dist.broadcast_object_list(offers, src=0, group=mesh.host_group)
    if isinstance(offers[0], str):
        raise ConfigError(offers[0])
    run = run_id(root, mesh)
    for step, manifest in offers[0]:
        final = step_dir(root, step)
        temporary = root / f"{UNFINISHED}{final.name}"
        say(f"{root}: no whole checkpoint here; copying step {step} from {remote.address}")
        error = None
        try:
            names = sorted(integrity.read_manifest(manifest))
            temporary.mkdir(parents=True, exist_ok=True)
            remote.fetch(step, temporary, names[mesh.rank :: mesh.world_size])
        except Exception as failure:
            error = f"{remote.address}: step {step}: {_reason(failure)}"
        errors: list = [None] * mesh.world_size
        dist.all_gather_object(errors, error, group=mesh.host_group)
        reason = next((e for e in errors if e), None)
        if reason is None:
            if mesh.is_main:
                (temporary / MANIFEST).write_bytes(manifest)
                remote.claim(run)
            dist.barrier(group=mesh.host_group)
            reason = _damaged_together(temporary, mesh.host_group)
        if mesh.is_main and reason is None:
            shutil.rmtree(final, ignore_errors=True)  # damaged: it has been passed over
            os.replace(temporary, final)
            _fsync(root)
        elif mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier(group=mesh.host_group)
        if reason is None:
            integrity.note_verified(final)
            return final
        say(f"{reason}; going back to the checkpoint before it.")
    return None


def _restore(root: Path) -> None:
    """Finish what a save was killed in: a checkpoint moved aside goes back, unless the new one is in its place."""
    for replaced in root.glob(f"{_REPLACED}*"):
        final = root / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, final)


def read_progress(path: Path) -> Progress:
    """How far the run was that wrote this checkpoint."""
    file = path / "progress.json"
    try:
        return TypeAdapter(Progress).validate_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}).\n  Use another checkpoint.") from None


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
    _write_text(path / MANIFEST, json.dumps({"format": 1, "files": files}, indent=1))
    _fsync(path)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _point_latest_to(checkpoint: Path) -> None:
    temporary = checkpoint.parent / ".latest"
    temporary.write_text(checkpoint.name + "\n")
    os.replace(temporary, checkpoint.parent / "latest")
    _fsync(checkpoint.parent)


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def _reason(error: BaseException) -> str:
    """The cause, in a line."""
    failures = getattr(error, "failures", {}).values()
    cause = next((f[0] if isinstance(f, tuple) else f for f in failures), error)
    return (str(cause).strip().splitlines() or [type(cause).__name__])[-1]


def _save_failed(root: Path, step: int, error: BaseException) -> str:
    whole = steps_in(root)
    stands = f"The checkpoint of step {whole[-1]} is whole." if whole else "There is no earlier checkpoint."
    try:
        free = f"{shutil.disk_usage(root).free / 2**30:.1f} GiB are free there."
    except OSError:
        free = "The folder cannot be reached."
    return (
        f"{root}: the checkpoint of step {step} could not be written: {_reason(error)}. {free}\n"
        f"  {stands} Make room (a smaller checkpoint.keep_last deletes old ones), or bring the mount back."
    )


def run_id(root: Path, mesh: Mesh) -> str:
    """What tells this run from an earlier one in the same folder, which a node may remember; made once."""
    name: list = [None]
    if mesh.is_main:
        root.mkdir(parents=True, exist_ok=True)
        if not (root / _RUN).is_file():
            _write_text(root / f".{_RUN}", secrets.token_hex(4) + "\n")
            os.replace(root / f".{_RUN}", root / _RUN)
        name = [(root / _RUN).read_text().strip()]
    dist.broadcast_object_list(name, src=0, group=mesh.host_group)
    return name[0]
