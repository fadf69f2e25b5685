"""Find the newest whole checkpoint, and read weights and optimizer state from it in any layout."""

import os
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from igla_mega.checkpoint import integrity
from igla_mega.checkpoint.integrity import MANIFEST, REPLACED, UNFINISHED, damage, fsync, last_line, step_dir, steps_in
from igla_mega.checkpoint.local import Local
from igla_mega.checkpoint.pieces import Pieces, Reader, key_of, kind_of, load
from igla_mega.checkpoint.progress import Progress, read_progress
from igla_mega.checkpoint.remote import Remote
from igla_mega.checkpoint.store import run_id
from igla_mega.config.errors import ConfigError
from igla_mega.distributed.mesh import Mesh
from igla_mega.model.shards import ParameterState, Shard, local_values


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
def spread_masters(pairs: Iterable[tuple[Shard, Tensor]], states: Iterable[ParameterState], mesh: Mesh) -> None:
    """Make the weights that the modules compute with from the fp32 masters, which replicas may share among them.

    All replicas call it with the same parameters in the same order.
    """
    own: dict[str, list[ParameterState]] = {}
    for state in states:
        own.setdefault(state.shard.name, []).append(state)
    for shard, param in pairs:
        values, start = local_values(param)
        whole = torch.zeros(values.numel(), dtype=torch.float32, device=values.device)
        held = own.get(shard.name, [])
        for state in held:
            master = state.values["master"]
            whole[state.start - start : state.start - start + master.numel()] = master
        group = mesh.replicas(expert=shard.expert)
        if group.size > 1 and not isinstance(param, DTensor) and not any(state.replicated for state in held):
            # Bits are added to zeros: a sum of numbers would lose the sign of -0.
            dist.all_reduce(whole.view(torch.int32), group=group.group)
        values.copy_(whole)


def load_states(
    path: Path,
    states: Iterable[ParameterState],
    group: dist.ProcessGroup | None,
    *,
    kinds: Collection[str] | None = None,
) -> None:
    """Read the states' values, all or those of some kinds. Raises as `load_weights` does."""
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
        kinds = {kind_of(name) for name in wanted}
        extra = [name for name in stored if name not in wanted and kind_of(name) in kinds]
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


def find_checkpoint(
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
            offers = [f"{remote.address}: cannot be read ({last_line(failure)}).\n  Mend checkpoint.remote."]
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
            error = f"{remote.address}: step {step}: {last_line(failure)}"
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
            fsync(root)
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
    for replaced in root.glob(f"{REPLACED}*"):
        final = root / replaced.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(replaced, final)
