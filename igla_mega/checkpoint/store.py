"""Checkpoints: one format for every layout, whole or not there at all.

`step_00000100/` holds DCP files with a key per parameter (its fp32 master weights under its global name) and
`optimizer.<kind>.<name>` beside it (moments; with Elastic Weight Consolidation also `fisher` and `anchor`, which
`fisher.json` describes), `progress.json`, the resolved `recipe.yaml` and `manifest.json` with the size
and digest of every file. It is written under a temporary name, checked, and renamed; `latest` moves last.
"""

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from igla_mega.checkpoint.pieces import Pieces, Reader
from igla_mega.config.errors import ConfigError
from igla_mega.model.shards import Shard, Slot, local_values
from igla_mega.parallel import Mesh

MANIFEST = "manifest.json"
_REPLACED = ".replaced_"
_STEP_NAME = re.compile(r"step_(\d{8,})")


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


def step_dir(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return root / f"step_{step:08d}"


def steps_in(root: Path) -> list[int]:
    """Steps of the checkpoints under `root` that were finished, ascending."""
    if not root.is_dir():
        return []
    names = (_STEP_NAME.fullmatch(path.name) for path in root.iterdir() if (path / MANIFEST).is_file())
    return sorted(int(match[1]) for match in names if match)


class CheckpointWriter:
    """Saves in the background: a copy is taken at once, and written by a thread with a process group of its own."""

    def __init__(self, root: Path, mesh: Mesh, retention: Retention, *, asynchronous: bool):
        self.root, self.mesh, self.retention, self.asynchronous = root, mesh, retention, asynchronous
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, slots: Iterable[Slot], progress: Progress, recipe_yaml: str, notes: Mapping[str, str] | None = None
    ) -> None:
        """Save `slots` as the checkpoint of `progress.step`; waits for the one before it.

        Args:
            notes: more files that describe what the slots hold, name -> text.

        Raises:
            RuntimeError: the save before this one failed; the message says why.
        """
        self.wait()
        state = _to_write(slots, self.mesh)
        texts = {"progress.json": json.dumps(asdict(progress), indent=1) + "\n", "recipe.yaml": recipe_yaml}
        texts |= notes or {}
        step = progress.step

        def write() -> None:
            try:
                self._write(step, state, texts)
            except BaseException as error:  # carried to the training thread, raised by `wait`
                self._error = error

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}")
        self._thread.start()
        if not self.asynchronous:
            self.wait()

    def poll(self) -> None:
        """Raise the error of a save that has failed, without waiting for one that is under way."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is whole on disk.

        Raises:
            RuntimeError: it could not be written; the message says why and what still stands.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(self, step: int, state: dict[str, Pieces], texts: dict[str, str]) -> None:
        final = step_dir(self.root, step)

        def tidy() -> None:
            _point_latest_to(final)
            for old in self.retention.obsolete(steps_in(self.root)):
                shutil.rmtree(step_dir(self.root, old))

        try:
            _write_folder(final, state, texts, self.mesh, tidy)
        except (CheckpointException, OSError) as error:
            raise RuntimeError(_save_failed(self.root, step, error)) from error


def save_folder(folder: Path, slots: Iterable[Slot], texts: Mapping[str, str], mesh: Mesh) -> None:
    """Save slots by themselves, in the format of a checkpoint: whole or not at all.

    Raises:
        RuntimeError: it could not be written.
    """
    try:
        _write_folder(folder, _to_write(slots, mesh), texts, mesh, lambda: None)
    except (CheckpointException, OSError) as error:
        raise RuntimeError(f"{folder}: could not be written: {error}") from error


def _write_folder(
    final: Path, state: dict[str, Pieces], texts: Mapping[str, str], mesh: Mesh, tidy: Callable[[], None]
) -> None:
    """Write under another name, seal, rename; then `tidy`, on rank 0."""
    group, temporary = mesh.host_group, final.parent / f".writing_{final.name}"

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            (temporary / name).write_text(text)

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
        _on_main(group, begin)
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
        dcp.save(state, storage_writer=writer, process_group=group)
        digests = _gathered_digests(temporary, mesh)
        _on_main(group, commit)
    except (CheckpointException, OSError):
        if mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _to_write(slots: Iterable[Slot], mesh: Mesh) -> dict[str, Pieces]:
    """Copies, on the host, of those pieces of the state that this rank is the one to write."""
    copies: dict[str, list] = {}
    shapes = {}
    for slot in slots:
        if not slot.shard.is_first_copy or not _is_writer(slot, mesh):
            continue
        for kind, values in slot.values.items():
            name = _key(slot.shard.name, kind)
            shapes[name] = slot.shard.shape
            staged = values.to("cpu", copy=True)
            copies.setdefault(name, []).extend(slot.shard.rectangles(staged, slot.start))
    return {name: Pieces.of(shapes[name], rectangles) for name, rectangles in copies.items()}


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
    dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)


def _union(names: Iterable[str], group: dist.ProcessGroup | None) -> set[str]:
    if group is None:
        return set(names)
    everyones: list = [None] * group.size()
    dist.all_gather_object(everyones, list(names), group=group)
    return {name for part in everyones for name in part}


def find(root: Path, mesh: Mesh, say: Callable[[str], None]) -> tuple[Path, Progress] | None:
    """The newest whole checkpoint under `root`, agreed on by all ranks; a damaged one is passed over, and said.

    Returns:
        None when there is no checkpoint at all.

    Raises:
        ConfigError: there are checkpoints, and every one is damaged.
    """
    if mesh.is_main:
        _restore(root)
    found: list = [steps_in(root)[::-1] if mesh.is_main else None]
    dist.broadcast_object_list(found, src=0, group=mesh.host_group)
    damages = []
    for path in (step_dir(root, step) for step in found[0]):
        own = damage(path, part=mesh.rank, num_parts=mesh.world_size)
        everyones: list = [None] * mesh.world_size
        dist.all_gather_object(everyones, own, group=mesh.host_group)
        reason = next((r for r in everyones if r), None)
        if reason is None:
            return path, read_progress(path)
        damages.append(reason)
        say(f"{reason}; going back to the checkpoint before it.")
    if damages:
        raise ConfigError(
            f"{root}: every checkpoint is damaged: {damages[0]}.",
            "  Move the folder away to start anew, or restore one from a backup.",
        )
    if mesh.is_main and root.is_dir():
        unfinished = [path.name for path in root.glob(".writing_*")]
        if unfinished:
            say(f"{root}: no whole checkpoint; {unfinished[0]} was never finished.")
    return None


def _restore(root: Path) -> None:
    """Finish what a save was killed in: a checkpoint moved aside goes back, unless the new one is in its place."""
    for replaced in root.glob(f"{_REPLACED}*"):
        final = root / replaced.name.removeprefix(_REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, final)


def damage(path: Path, *, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, in words, or None. Digests are checked for every `num_parts`-th file."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for index, (name, expected) in enumerate(sorted(manifest["files"].items())):
            file = path / name
            if not file.is_file():
                return f"{path}: {name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{path}: {name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            if index % num_parts == part and _digest(file) != expected["blake2b"]:
                return f"{path}: {name} does not have the digest it was written with"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"{path}: {MANIFEST} cannot be read ({error})"
    return None


def read_progress(path: Path) -> Progress:
    """How far the run was that wrote this checkpoint."""
    return Progress(**json.loads((path / "progress.json").read_text()))


def write_manifest(path: Path, digests: dict[str, str]) -> None:
    """Seal a checkpoint folder: size and digest of every file below it (those not in `digests` are read).

    Raises:
        OSError: what is on disk is not what was written.
    """
    files = {}
    for written in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        name = written.relative_to(path).as_posix()
        files[name] = {"bytes": written.stat().st_size, "blake2b": digests.get(name) or _digest(written)}
    missing = digests.keys() - files.keys()
    if missing:
        raise OSError(f"{sorted(missing)[0]} was written and is not there")
    for storage in Reader(path).read_metadata().storage_data.values():
        size = files.get(storage.relative_path, {}).get("bytes", 0)
        if storage.offset + storage.length > size:
            raise OSError(f"{storage.relative_path} ends at byte {size}, before what the index says")
    with open(path / MANIFEST, "w") as file:
        json.dump({"format": 1, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _fsync(path)


def _gathered_digests(path: Path, mesh: Mesh) -> dict[str, str]:
    own = {file.name: _digest(file) for file in path.glob(f"__{mesh.rank}_*")}
    everyones: list = [None] * mesh.world_size
    dist.all_gather_object(everyones, own, group=mesh.host_group)
    return {name: digest for part in everyones for name, digest in part.items()}


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


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


def _on_main(group: dist.ProcessGroup, action: Callable[[], None]) -> None:
    """Run `action` on rank 0, and raise its error on every rank."""
    outcome: list = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise OSError(outcome[0])


def _save_failed(root: Path, step: int, error: BaseException) -> str:
    causes = [str(e[0] if isinstance(e, tuple) else e) for e in getattr(error, "failures", {}).values()] or [str(error)]
    whole = steps_in(root)
    stands = f"The checkpoint of step {whole[-1]} is whole." if whole else "There is no earlier checkpoint."
    try:
        free = f"{shutil.disk_usage(root).free / 2**30:.1f} GiB are free there."
    except OSError:
        free = "The folder cannot be reached."
    return (
        f"{root}: the checkpoint of step {step} could not be written: {causes[0].splitlines()[-1]}. {free}\n"
        f"  {stands} Make room (checkpoint.keep_last deletes old ones), then run the same command again to go on."
    )
