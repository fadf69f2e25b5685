"""Lock the run folder, refuse a recipe of another run, and report the keys that changed since the last start."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from igla_mega.checkpoint import integrity
from igla_mega.config import json_text, load, yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import no_follow
from igla_mega.config.schema import Recipe

LOCK_SECONDS = 30.0
"""Maximum time that restarted ranks wait for their predecessors to release the run folder."""


def lock_run_folder(run_dir: Path, recipe: Recipe) -> IO[str]:
    """Lock the folder against a second run and another recipe; the kernel releases the lock when the process ends.

    Returns:
        The lock file, which must stay open while the run lasts.

    Raises:
        ConfigError: another process trains in the folder, it has a run of another recipe, or it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a+", opener=no_follow)  # noqa: SIM115 (held while the run lasts)
    except OSError as error:
        raise ConfigError(
            f"{run_dir}: cannot be created or written ({error.strerror}).\n"
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
    # Only with the lock: no other process can change the folder after the check.
    refuse_other_recipe(run_dir, recipe)
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


def refuse_other_recipe(run_dir: Path, recipe: Recipe) -> None:
    """Refuse a recipe with another name, another objective or other trained weights than the folder's run.

    Raises:
        ConfigError: the recipes differ in one of these.
    """
    if not integrity.steps_in(run_dir / "checkpoints"):
        return
    if not (old := _last_recipe(run_dir)):
        return  # shapes and data are checked against the checkpoint later
    new = _flat(yaml_text.parse(load.dump(recipe), "recipe.yaml"))
    kinds = ("lora", "dpo", "sft", "stages", "curriculum")
    breaches = []
    if old.get("name") != new.get("name"):
        breaches.append(f"recipe `{old.get('name')}` and not `{new.get('name')}`")
    for kind in kinds:
        had, has = (any(key.split(".")[0] == kind and tree[key] is not None for key in tree) for tree in (old, new))
        if had != has:
            breaches.append(f"{'with' if had else 'without'} `{kind}`")
    if breaches:
        raise ConfigError(
            f"{run_dir}: contains a run of another recipe: {', '.join(breaches)}.\n"
            f"  Give another --run; or continue with its own recipe, {run_dir / 'recipe.yaml'}."
        )


def recipe_changes(run_dir: Path, recipe_yaml: str) -> list[str]:
    """Return a line for each key that differs from the recipe with which the folder was trained last."""
    if not (old := _last_recipe(run_dir)):
        return []
    new = _flat(yaml_text.parse(recipe_yaml, "recipe.yaml"))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: was {old.get(key)}, is {new.get(key)} from here on" for key in keys]


def _last_recipe(run_dir: Path) -> dict:
    """Return the recipe that a folder was trained with last, by dotted keys; empty if it cannot be read."""
    try:
        return _flat(yaml_text.parse((run_dir / "recipe.yaml").read_text(), "recipe.yaml"))
    except (OSError, ValueError, AttributeError):
        return {}


def _flat(tree: dict, prefix: str = "") -> dict:
    """Return nested mappings as one mapping with dotted keys."""
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
