"""Find the newest complete checkpoint, and read weights and optimizer state from it in any layout."""

import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from igla_mega.checkpoint import integrity
from igla_mega.checkpoint.integrity import MANIFEST, REPLACED, UNFINISHED, damage, last_line, step_dir, steps_in
from igla_mega.checkpoint.local import Local
from igla_mega.checkpoint.pieces import Pieces, Reader, key_of, kind_of, load
from igla_mega.checkpoint.progress import Progress, read_progress
from igla_mega.checkpoint.remote import Remote
from igla_mega.checkpoint.store import run_id
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_bytes, sync_folder
from igla_mega.distributed.mesh import Mesh
from igla_mega.model.shards import ParameterState, Shard, local_values


def load_weights(
    path: Path, pairs: Iterable[tuple[Shard, Tensor]], group: dist.ProcessGroup | None, *, partly: bool = False
) -> None:
    """Read weights into parameters (of any dtype, on any device), from a checkpoint of any layout.

    Args:
        pairs: each parameter with its shard's position in the whole tensor.
        group: gloo group of all ranks that load, or None for this process alone.
        partly: True if the checkpoint may hold tensors that are not read.

    Raises:
        ConfigError: the checkpoint is damaged, or of another model.
    """
    targets: dict[str, tuple[Shard, list]] = {}
    for shard, param in pairs:
        values, start = local_values(param)
        targets.setdefault(shard.name, (shard, []))[1].extend(shard.rectangles(values, start))
    wanted = {name: (shard.shape, rectangles) for name, (shard, rectangles) in targets.items()}
    _read(path, wanted, group, partly=partly)


@torch.no_grad()
def spread_masters(pairs: Iterable[tuple[Shard, Tensor]], states: Iterable[ParameterState], mesh: Mesh) -> None:
    """Copy the fp32 masters into the weights that the modules compute with, gathering masters that replicas share.

    All replicas call it with the same parameters in the same order. Afterwards every weight is exactly its master
    rounded to the weight's type, as after an optimizer step.

    Args:
        pairs: each parameter with its shard's position in the whole tensor.
        states: the masters that this rank holds: of a whole parameter, of parts of it, or none.
    """
    states_of: dict[str, list[ParameterState]] = {}
    for state in states:
        states_of.setdefault(state.shard.name, []).append(state)
    for shard, param in pairs:
        values, start = local_values(param)
        whole = torch.zeros(values.numel(), dtype=torch.float32, device=values.device)
        held = states_of.get(shard.name, [])
        for state in held:
            master = state.values["master"]
            whole[state.start - start : state.start - start + master.numel()] = master
        replicas = mesh.replicas(expert=shard.expert)
        # Only the distributed optimizer divides a parameter's masters over its replicas. Under FSDP (DTensor) each rank
        # holds the masters of exactly its own rows, and in plain data parallelism (`replicated`) each rank holds all.
        if replicas.size > 1 and not isinstance(param, DTensor) and not any(state.replicated for state in held):
            # An all-gather of uneven parts as a sum with zeros: each element is nonzero on one rank at most. The sum is
            # over the bits, because -0.0 + 0.0 is 0.0 in floating point.
            dist.all_reduce(whole.view(torch.int32), group=replicas.group)
        values.copy_(whole)


def load_states(
    path: Path,
    states: Iterable[ParameterState],
    group: dist.ProcessGroup | None,
    *,
    kinds: Collection[str] | None = None,
) -> None:
    """Read the values of optimizer states, from a checkpoint of any layout.

    Args:
        group: gloo group of all ranks that load, or None for this process alone.
        kinds: the kinds to read, such as "master"; None: all that the states have.

    Raises:
        ConfigError: the checkpoint is damaged, or of another model.
    """
    targets: dict[str, tuple] = {}
    for state in states:
        for kind, values in state.values.items():
            if kinds is not None and kind not in kinds:
                continue
            entry = targets.setdefault(key_of(state.shard.name, kind), (state.shard.shape, []))
            entry[1].extend(state.shard.rectangles(values, state.start))
    _read(path, targets, group)


def _read(
    path: Path,
    targets: dict[str, tuple[tuple[int, ...], list]],
    group: dist.ProcessGroup | None,
    *,
    partly: bool = False,
) -> None:
    """Check a checkpoint against the tensors that are expected, and read it into them.

    Args:
        targets: by key, the whole tensor's shape and this rank's rectangles of it.
    """
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
        # Over all ranks: with pipeline parallelism each asks for the layers of its own stage. A kind that no rank asks
        # for (the moments, when only weights are read) is not an error.
        expected = _union(targets, group)
        kinds = {kind_of(name) for name in expected}
        extra = [name for name in stored if name not in expected and kind_of(name) in kinds]
        breaches += [f"{path}: holds {name}, which this recipe's model does not have." for name in extra]
    if breaches:
        more = [f"... and {len(breaches) - 3} more."] if len(breaches) > 3 else []
        raise ConfigError(
            "The checkpoint is of another model:",
            *breaches[:3],
            *more,
            "  Use the recipe in its folder (recipe.yaml), or start in a new run folder.",
        )
    state = {name: Pieces.of(shape, rectangles) for name, (shape, rectangles) in targets.items()}
    load(state, reader, group)


def _union(names: Iterable[str], group: dist.ProcessGroup | None) -> set[str]:
    """Return the names that any rank of the group gives."""
    if group is None:
        return set(names)
    everyones: list = [None] * group.size()
    dist.all_gather_object(everyones, list(names), group=group)
    return {name for part in everyones for name in part}


def find_checkpoint(
    root: Path, mesh: Mesh, say: Callable[[str], None], *, local: Local | None = None, remote: Remote | None = None
) -> tuple[Path, Progress] | None:
    """Return the newest complete checkpoint and its progress, agreed on by all ranks.

    Candidates are tried from the newest to the oldest, a shared checkpoint before a local one of the same step; one
    that is damaged, has no manifest or is of another run is reported and skipped.

    Args:
        root: folder of the checkpoints that all nodes share.
        local: the checkpoints on the nodes' own disks, used when newer than the shared ones and complete on all nodes.
        remote: folder of an object store, from which the newest is copied if `root` has no complete checkpoint.

    Returns:
        None if there is no checkpoint at all.

    Raises:
        ConfigError: there are checkpoints, but none can be used.
    """
    if mesh.is_main:
        _restore(root)
    # Only rank 0 lists the folder: network file systems may show the ranks different contents at the same time, and
    # ranks that try different checkpoints would wait for one another forever.
    found: list = [steps_in(root)[::-1], integrity.passed_over(root)] if mesh.is_main else [None, None]
    dist.broadcast_object_list(found, src=0, group=mesh.host_group)
    local_steps = local.agreed(say) if local else []
    candidates = sorted([(step, True) for step in found[0]] + [(step, False) for step in local_steps], reverse=True)
    damages = [reason for step, reason in found[1] if not candidates or step > candidates[0][0]]
    for reason in damages:
        say(f"{reason}.")
    for step, shared in candidates:
        path = step_dir(root, step) if shared or local is None else local.folder(step)
        reason = _damaged_together(path, mesh.host_group) if shared or local is None else local.damaged(step)
        if reason is None:
            # The ranks have checked the files together; reading must not make each check all of them once more.
            integrity.note_verified(path)
            reason = _first(_unusable(path, step), mesh.host_group)
        if reason is None:
            if local:
                # Local parts of later steps belong to a past that this resume abandons. The run will save the same
                # steps again, and a rank killed in between would leave parts of two different saves.
                local.remove([other for other in local.steps() if other > step])
            return path, read_progress(path)
        damages.append(reason)
        say(f"{reason}; going back to the checkpoint before it.")
    if remote is not None and (fetched := _fetch_newest(root, remote, mesh, say)) is not None:
        return fetched, read_progress(fetched)
    if damages:
        raise ConfigError(
            f"{root}: every checkpoint is damaged: {damages[0]}.",
            "  Restore one from a backup; to start from the beginning, move the folder away.",
        )
    if mesh.is_main and root.is_dir():
        unfinished = [path.name for path in root.glob(f"{UNFINISHED}*")]
        if unfinished:
            say(f"{root}: no complete checkpoint; {unfinished[0]} is incomplete.")
    return None


def _damaged_together(path: Path, group: dist.ProcessGroup) -> str | None:
    """Return what is wrong with a checkpoint that all ranks see, or None; each rank reads a part of its files."""
    return _first(damage(path, part=group.rank(), num_parts=group.size()), group)


def _first(reason: str | None, group: dist.ProcessGroup) -> str | None:
    """Return the first reason that any rank of a group gives, or None; all of them call it."""
    reasons: list = [None] * group.size()
    dist.all_gather_object(reasons, reason, group=group)
    return next((one for one in reasons if one), None)


def _unusable(path: Path, step: int) -> str | None:
    """Return why a run cannot resume from an undamaged checkpoint, or None: something that it needs is not in it."""
    listed = integrity.read_manifest(read_bytes(path / MANIFEST))
    if missing := [name for name in ("progress.json", "recipe.yaml") if name not in listed]:
        return f"{path}: {missing[0]} is not in its {MANIFEST}, so that no run can resume from it"
    try:
        Reader(path).read_metadata()
        written = read_progress(path).step
    except ConfigError as error:
        return str(error).splitlines()[0].removesuffix(".")
    return None if written == step else f"{path}: holds step {written}, so that its name is not its own"


def verify_together(path: Path, group: dist.ProcessGroup | None) -> None:
    """Check a checkpoint as `integrity.verify` does, divided over the ranks of a group; all of them call it.

    Raises:
        ConfigError: the checkpoint is damaged.
    """
    if group is None:
        return integrity.verify(path)
    known: list = [None] * group.size()
    dist.all_gather_object(known, integrity.is_verified(path), group=group)
    # Collective even if this rank knows the checkpoint: another one may have been started later.
    if not all(known):
        if (reason := _damaged_together(path, group)) is not None:
            raise integrity.refusal(reason)
        integrity.note_verified(path)


def _fetch_newest(root: Path, remote: Remote, mesh: Mesh, say: Callable[[str], None]) -> Path | None:
    """Copy the newest complete checkpoint of a remote folder below `root`, each rank some files; return its path.

    A checkpoint that cannot be copied or is damaged is reported and the one before it tried; None if none is left.

    Raises:
        ConfigError: the remote folder cannot be read.
    """
    offers: list = [None]
    if mesh.is_main:
        try:
            offers = [[(step, remote.manifest(step)) for step in remote.steps()[::-1]]]
        except Exception as failure:  # each store's client raises exceptions of its own types
            offers = [f"{remote.address}: cannot be read ({last_line(failure)}).\n  Correct checkpoint.remote."]
    dist.broadcast_object_list(offers, src=0, group=mesh.host_group)
    if isinstance(offers[0], str):
        raise ConfigError(offers[0])
    run = run_id(root, mesh)
    for step, manifest in offers[0]:
        final = step_dir(root, step)
        temporary = root / f"{UNFINISHED}{final.name}"
        say(f"{root}: no complete checkpoint here; copying step {step} from {remote.address}")
        reason = _copy_together(remote, step, manifest, temporary, mesh)
        if reason is None:
            if mesh.is_main:
                integrity.write_text(temporary / MANIFEST, manifest.decode())
                sync_folder(temporary)
                integrity.adopt(root, [integrity.owner_of(temporary)])
                remote.claim(run)
            dist.barrier(group=mesh.host_group)
            reason = _damaged_together(temporary, mesh.host_group)
        if mesh.is_main and reason is None:
            # A folder of this name is a damaged checkpoint: `find_checkpoint` would have returned a complete one.
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            sync_folder(root)
        elif mesh.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier(group=mesh.host_group)
        if reason is None:
            integrity.note_verified(final)
            reason = _first(_unusable(final, step), mesh.host_group)
        if reason is None:
            return final
        say(f"{reason}; going back to the checkpoint before it.")
    return None


def _copy_together(remote: Remote, step: int, manifest: bytes | None, temporary: Path, mesh: Mesh) -> str | None:
    """Copy a checkpoint's files from a remote folder, each rank some of them; return the first error, or None."""
    error = None
    try:
        names = sorted(integrity.read_manifest(manifest))  # type: ignore[arg-type]
        temporary.mkdir(parents=True, exist_ok=True)
        remote.fetch(step, temporary, names[mesh.rank :: mesh.world_size])
    except Exception as failure:
        error = f"{remote.address}: step {step}: {last_line(failure)}"
    errors: list = [None] * mesh.world_size
    dist.all_gather_object(errors, error, group=mesh.host_group)
    return next((e for e in errors if e), None)


def _restore(root: Path) -> None:
    """Complete a replacement that was interrupted: move the old checkpoint back, or delete it if the new one exists.

    `store._write_folder` moves the old folder aside before it renames the new one.
    """
    for replaced in root.glob(f"{REPLACED}*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, final)
