"""Lock the run folder, refuse a recipe of another run, and report the keys that changed since the last start."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from igla_mega.checkpoint import integrity
from igla_mega.config import json_text, load, yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow
from igla_mega.config.schema import Recipe
from igla_mega.data.blend import MIXES
from igla_mega.layout.stages import parts_of
from igla_mega.monitor.heartbeat import FILE as HEARTBEAT
from igla_mega.train.trackers import OF_EVENTS, OF_STEPS

LOCK_SECONDS = 30.0
"""Maximum time that restarted ranks wait for their predecessors to release the run folder."""
_FILES = (
    *(f"{name}.jsonl" for name in (*OF_STEPS, *OF_EVENTS)),
    *(
        "recipe.yaml",
        MIXES,
        HEARTBEAT,
        "wandb_id",
        "mlflow_id",
        "checkpoints/run_id",
        "checkpoints/earlier_runs",
        "checkpoints/latest",
    ),
)
_IN_PLACE = (HEARTBEAT, "wandb_id", "mlflow_id")
"""Files that are written in place, as every `.jsonl` is: a link would lead to another file, and is refused."""
_FOLDERS = ("checkpoints", "tensorboard", "hang", "base", "merged")
"""What `train` reads or writes below a run folder."""


def lock_run_folder(run_dir: Path, recipe: Recipe) -> IO[str]:
    """Lock the folder against a second run and another recipe; the kernel releases the lock when the process ends.

    Returns:
        The lock file, which must stay open while the run lasts.

    Raises:
        ConfigError: another process trains in the folder, it has a run of another recipe, or something in it cannot be
            written or is a folder in the place of a file.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a+", opener=no_follow)  # noqa: SIM115 (held while the run lasts)
    except OSError as error:
        raise ConfigError(
            f"{error.filename or run_dir}: cannot be created or written ({error.strerror}).\n"
            "  Give another --run, or fix its permissions."
        ) from None
    # A launcher may restart the ranks before the last ones have ended.
    patience = LOCK_SECONDS if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else 0
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break  # a file system without locks: better no lock than no run
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{run_dir}: another run is training in this folder{_holder(lock)}.\n"
                    "  Wait until it ends, stop it, or give another --run."
                ) from None
            time.sleep(0.2)
    # Only with the lock: no other process can change the folder after the checks.
    _refuse_unusable_entries(run_dir)
    refuse_other_recipe(run_dir, recipe, say=print)
    lock.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
    lock.flush()
    return lock


def _holder(lock: IO[str]) -> str:
    """Return the process that holds a lock as text, from the lock file; empty if that cannot be read."""
    try:
        lock.seek(0)
        other = json_text.loads(lock.read())
        return f": process {other['pid']} on {other['host']}, since {other['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return ""


def _refuse_unusable_entries(run_dir: Path) -> None:
    """Refuse a run folder in which something that `train` reads or writes cannot be, before anything is written.

    Raises:
        ConfigError: the message lists every entry.
    """
    breaches = []
    for kind, names in (("file", _FILES), ("folder", _FOLDERS)):
        for path in (run_dir / name for name in names):
            if path.is_symlink() and (path.suffix == ".jsonl" or path.name in _IN_PLACE):
                breaches.append(f"{path}: is a symbolic link, which is not followed here.")
            elif path.exists() and not (path.is_file() if kind == "file" else path.is_dir()):
                breaches.append(f"{path}: is not a {kind}.")
            elif path.exists() and not os.access(path, os.R_OK | os.W_OK):
                breaches.append(f"{path}: cannot be read and written by this user.")
    if breaches:
        raise ConfigError(*breaches, "  Move it away or fix its permissions, or give another --run.")


def refuse_other_recipe(run_dir: Path, recipe: Recipe, *, say: Callable[[str], None] = lambda line: None) -> None:
    """Refuse a recipe with another name, another objective or other trained weights than the folder's run.

    Args:
        say: called with a line if the folder's recipe is damaged and a checkpoint's was compared instead.

    Raises:
        ConfigError: the recipes differ in one of these.
    """
    steps = integrity.steps_in(run_dir / "checkpoints")
    if not steps:
        return
    old, file = _last_recipe(run_dir), run_dir / "recipe.yaml"
    breaches = _differences(old, recipe) if old else []
    if not old or (breaches and all(breach.startswith("without") for breach in breaches)):
        # It is damaged, or cut short. A checkpoint has the recipe of its part, under digests.
        checkpoint = integrity.step_dir(run_dir / "checkpoints", steps[-1])
        if not (written := _last_recipe(checkpoint)):
            return
        breaches = min((_differences(written, part) for part in parts_of(recipe)), key=len)
        if not breaches:
            say(f"{file}: missing or damaged; written again, after a comparison with {checkpoint}")
    if breaches:
        raise ConfigError(
            f"{run_dir}: contains a run of another recipe: {', '.join(breaches)}.\n"
            f"  Give another --run; or continue with its own recipe, {file}."
        )


def _differences(old: dict, recipe: Recipe) -> list[str]:
    """Return what makes a recipe that of another run than `old`, by dotted keys."""
    new = _flat(yaml_text.parse(load.dump(recipe), "recipe.yaml"))
    found = [] if old.get("name") == new.get("name") else [f"recipe `{old.get('name')}` and not `{new.get('name')}`"]
    for kind in ("lora", "dpo", "sft", "stages", "curriculum"):
        had, has = (any(key.split(".")[0] == kind and tree[key] is not None for key in tree) for tree in (old, new))
        if had != has:
            found.append(f"{'with' if had else 'without'} `{kind}`")
    return found


def recipe_changes(run_dir: Path, recipe_yaml: str, checkpoint: Path | None) -> list[str]:
    """Return a line for each key that differs from the recipe with which the folder was trained last.

    Args:
        checkpoint: one with that recipe, in case the folder's is damaged.
    """
    old = _last_recipe(run_dir) or (_last_recipe(checkpoint) if checkpoint is not None else {})
    if not old:
        return []
    new = _flat(yaml_text.parse(recipe_yaml, "recipe.yaml"))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: was {old.get(key)}, is {new.get(key)} from here on" for key in keys]


def _last_recipe(run_dir: Path) -> dict:
    """Return the recipe in a run folder or a checkpoint, by dotted keys; empty if it cannot be read."""
    try:
        found = _flat(yaml_text.read_mapping(run_dir / "recipe.yaml"))
    except ConfigError:
        return {}
    # Any text is YAML, and much of it a mapping: every recipe that was written has its name and its training.
    return found if "name" in found and any(key.startswith("training.") for key in found) else {}


def _flat(tree: dict, prefix: str = "") -> dict:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
