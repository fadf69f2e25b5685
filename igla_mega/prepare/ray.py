"""Preparation spread over a Ray cluster: a task a part, taken up again elsewhere when its worker dies, then joined."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.data.prepared import DataSection, source_prefixes
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.prepare.bar import say
from igla_mega.prepare.merge import merge
from igla_mega.prepare.preprocess import SHARD_BYTES, Options, part_prefix, preprocess
from igla_mega.prepare.sources import options_of, source_files

TRIES = 10
"""Of a part whose worker dies; every one goes on behind the shards that are finished."""


def preprocess_on_ray(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: str,
    options: Options,
    parts: int | None = None,
    workers: int | None = None,
    address: str | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> None:
    """Make a dataset as `preprocess` does, byte for byte, in parts on the machines of a cluster.

    All of them must see inputs, tokenizer and output under the same paths.

    Args:
        parts: tasks; None takes two a node.
        workers: threads or processes a task, and the cores it asks the cluster for; None: 1.
        address: of the cluster; None starts one on this machine.

    Raises:
        ConfigError: Ray is not installed or has no such cluster, or whatever a part refuses.
    """
    ray = _connected(address)
    parts = parts or max(2, 2 * len(ray.nodes()))
    # Said at once, not by each task.
    load_tokenizer(tokenizer)
    cores = workers or 1

    @ray.remote(num_cpus=min(cores, int(ray.cluster_resources().get("CPU", 1))), max_retries=TRIES)
    def make(number: int) -> tuple[str | None, int]:
        try:
            counts = preprocess(
                inputs,
                part_prefix(prefix, (number, parts)),
                load_tokenizer(tokenizer),
                options=options,
                workers=cores,
                progress=False,
                part=(number, parts),
                shard_bytes=shard_bytes,
            )
        except ConfigError as error:
            return str(error), 0
        return None, counts.documents

    waiting = {make.remote(number): number for number in range(parts)}
    breaches = []
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        number = waiting.pop(done)
        try:
            breach, documents = ray.get(done)
        except ray.exceptions.RayError as error:
            first = str(error).splitlines()[0]
            breach, documents = f"{prefix}: part {number} of {parts} was given up ({first}).\n  Run it again.", 0
        if breach is not None:
            breaches.append(breach)
        elif progress:
            say(f"{Path(prefix).name}: part {number + 1} of {parts} is done, {documents:,} documents")
    if breaches:
        raise ConfigError(*dict.fromkeys(breaches))
    names = [part_prefix(prefix, (number, parts)) for number in range(parts)]
    merge(prefix, names, progress=progress)
    for name in names:
        for suffix in (".bin", ".idx", ".manifest.json"):
            Path(name + suffix).unlink(missing_ok=True)


def prepare_on_ray(data: DataSection, *, workers: int | None = None) -> None:
    """Make every source of a recipe ready to train on, each in parts on the cluster of $RAY_ADDRESS, or a local one."""
    if not data.tokenizer:
        raise ConfigError("data.tokenizer: none given.\n  Give a Hugging Face folder or a tokenizer.json.")
    for name, prefix in source_prefixes(data).items():
        if prefix != str(Path(data.prepared or "") / name):
            continue  # an indexed dataset already
        files = source_files(data, name)
        address = os.environ.get("RAY_ADDRESS")
        preprocess_on_ray(files, prefix, data.tokenizer, options_of(data), None, workers or data.workers, address)


def _connected(address: str | None) -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray: Ray is not installed.\n  pip install 'igla-mega[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"--engine ray: no cluster at {address} ({first}).\n  Mend RAY_ADDRESS.") from None
    return ray
