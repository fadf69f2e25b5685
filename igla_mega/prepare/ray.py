"""Prepare a dataset on a Ray cluster: one task per part, resumed on another node if its worker dies, then merged."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.data.prepared import DataSection, source_prefixes
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.prepare.bar import say
from igla_mega.prepare.merge import merge
from igla_mega.prepare.preprocess import Options, Settings, part_prefix, preprocess
from igla_mega.prepare.raw.inputs import input_files
from igla_mega.prepare.sources import options_of, source_files

TRIES = 10
"""Maximum number of retries of a part whose worker dies; each resumes after the finished shards."""


@dataclass(frozen=True)
class Cluster:
    """Ray cluster that prepares a dataset."""

    address: str | None = None
    """Address of the cluster; None starts one on this machine."""
    parts: int | None = None
    """Number of tasks; None takes two per node."""


def preprocess_on_ray(
    inputs: Sequence[str | Path],
    prefix: str | Path,
    tokenizer: str,
    options: Options,
    settings: Settings | None = None,
    cluster: Cluster | None = None,
) -> None:
    """Prepare a dataset, byte for byte as `preprocess` does, in parts on the nodes of a cluster.

    All nodes must see the inputs, the tokenizer and the output under the same paths.

    Args:
        tokenizer: path of the tokenizer.
        settings: uses `workers` (threads or processes per task, and its number of cores; None means 1), `shard_bytes`
            and `progress`.

    Raises:
        ConfigError: Ray is not installed, there is no such cluster, or a part failed.
    """
    settings, cluster = settings or Settings(), cluster or Cluster()
    ray = _connected(cluster.address)
    parts = cluster.parts or max(2, 2 * len(ray.nodes()))
    # Loaded here first: a wrong path is reported once, not by every task.
    load_tokenizer(tokenizer)
    inputs = input_files(inputs, say if settings.progress else None)
    cores = settings.workers or 1

    @ray.remote(num_cpus=min(cores, int(ray.cluster_resources().get("CPU", 1))), max_retries=TRIES)
    def prepare_part(number: int) -> tuple[str | None, int]:
        """Prepare one part; return its error, if any, and its number of documents."""
        part = (number, parts)
        try:
            counts = preprocess(
                inputs,
                part_prefix(prefix, part),
                load_tokenizer(tokenizer),
                options=options,
                settings=Settings(workers=cores, progress=False, part=part, shard_bytes=settings.shard_bytes),
            )
        except ConfigError as error:
            # As a value: an exception would arrive wrapped in one of Ray, with a remote traceback as its text.
            return str(error), 0
        return None, counts.documents

    waiting = {prepare_part.remote(number): number for number in range(parts)}
    _wait_for(ray, waiting, prefix, settings.progress)
    names = [part_prefix(prefix, (number, parts)) for number in range(parts)]
    merge(prefix, names, progress=settings.progress)
    for name in names:
        for suffix in (".bin", ".idx", ".manifest.json"):
            Path(name + suffix).unlink(missing_ok=True)


def _wait_for(ray: Any, waiting: dict[Any, int], prefix: str | Path, progress: bool) -> None:
    """Wait for the tasks of all parts; raise ConfigError with the errors of those that failed.

    Args:
        waiting: task -> part number; emptied.
    """
    parts, breaches = len(waiting), []
    while waiting:
        (done, *_), _ = ray.wait(list(waiting))
        number = waiting.pop(done)
        try:
            breach, documents = ray.get(done)
        except ray.exceptions.RayError as error:
            first = str(error).splitlines()[0]
            breach, documents = f"{prefix}: part {number} of {parts} failed ({first}).\n  Run it again.", 0
        if breach is not None:
            breaches.append(breach)
        elif progress:
            say(f"{Path(prefix).name}: part {number + 1} of {parts} is done, {documents:,} documents")
    if breaches:
        raise ConfigError(*dict.fromkeys(breaches))


def prepare_on_ray(data: DataSection, *, workers: int | None = None) -> None:
    """Prepare every source of a recipe in parts on the cluster of $RAY_ADDRESS, or on a local one if it is not set."""
    if not data.tokenizer:
        raise ConfigError("data.tokenizer: not set.\n  Give a Hugging Face folder or a tokenizer.json.")
    for name, prefix in source_prefixes(data).items():
        if prefix != str(Path(data.prepared or "") / name):
            continue  # the source is already an indexed dataset
        files, settings = source_files(data, name), Settings(workers=workers or data.workers)
        cluster = Cluster(os.environ.get("RAY_ADDRESS"))
        preprocess_on_ray(files, prefix, data.tokenizer, options_of(data), settings, cluster)


def _connected(address: str | None) -> Any:
    """Return the ray module, connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray: Ray is not installed.\n  pip install 'igla-mega[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            first = str(error).splitlines()[0]
            raise ConfigError(f"--engine ray: no cluster at {address} ({first}).\n  Correct RAY_ADDRESS.") from None
    return ray
