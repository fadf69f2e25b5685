"""The run folder: its lock, and what its last recipe says otherwise than the present one."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from igla_mega.checkpoint import store
from igla_mega.config import json_text, load, yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe

LOCK_SECONDS = 30.0
"""How long ranks that are started again wait for the run folder of those before them."""


def lock_run_folder(run_dir: Path, recipe: Recipe) -> IO[str]:
    """Keep a second run, and another recipe's, out of the folder; the lock goes with the process, however it ends.

    Raises:
        ConfigError: another process trains in it, or another recipe has; or nothing can be written there.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open(run_dir / ".lock", "a+")  # noqa: SIM115 (held while the run lasts)
    except OSError as error:
        raise ConfigError(
            f"{run_dir}: no run can be written there ({error.strerror}).\n  Give another --run, or mend its rights."
        ) from None
    # A launcher that starts the ranks again may do so before the last ones are gone.
    patience = LOCK_SECONDS if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) else 0
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                break  # a file system without locks
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{run_dir}: another run is training in this folder{_holder(lock)}.\n"
                    "  Wait for it, end it, or give another --run."
                ) from None
            time.sleep(0.2)
    _refuse_other_recipe(run_dir, recipe)
    lock.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
    lock.flush()
    return lock


def _holder(lock: IO[str]) -> str:
    """Who wrote into a lock file, in words."""
    try:
        lock.seek(0)
        other = json_text.loads(lock.read())
        return f": process {other['pid']} on {other['host']}, since {other['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return ""


def _refuse_other_recipe(run_dir: Path, recipe: Recipe) -> None:
    """What a folder has trained goes on as what it is: a name, what is learned, and which weights train."""
    if not store.steps_in(run_dir / "checkpoints"):
        return
    if not (old := _last_recipe(run_dir)):
        return  # what matters is checked against the checkpoint
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
            f"{run_dir}: holds a run of another recipe: {', '.join(breaches)}.\n"
            f"  Give another --run; or go on with its own, {run_dir / 'recipe.yaml'}."
        )


def recipe_changes(run_dir: Path, recipe_yaml: str) -> list[str]:
    """What the recipe says otherwise than the one this run folder was trained with."""
    if not (old := _last_recipe(run_dir)):
        return []
    new = _flat(yaml_text.parse(recipe_yaml, "recipe.yaml"))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: was {old.get(key)}, is {new.get(key)} from here on" for key in keys]


def _last_recipe(run_dir: Path) -> dict:
    """What a folder was last trained with; empty where that cannot be read."""
    try:
        return _flat(yaml_text.parse((run_dir / "recipe.yaml").read_text(), "recipe.yaml"))
    except (OSError, ValueError, AttributeError):
        return {}


def _flat(tree: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
