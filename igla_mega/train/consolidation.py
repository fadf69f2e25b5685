"""When a task is learned: take its Fisher, fold it into what is held, move the anchor; and the same from files."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from igla_mega.checkpoint import store
from igla_mega.checkpoint.load import load_states, verify_together
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Memory
from igla_mega.data.batches import Corpus
from igla_mega.engine.step import Engine
from igla_mega.objective.ewc import PER_TOKEN, Ewc, FisherAnchor, FisherMetadata, merge, weights_digest
from igla_mega.train import fisher_estimate
from igla_mega.train.console import Display, Silent

ORIGIN = "fisher.json"
"""Beside the tensors of a checkpoint or a Fisher of its own: where it comes from."""
KINDS = ("fisher", "anchor")


def consolidate(
    engine: Engine, corpus: Corpus, sources: tuple[str, ...], asked: Memory, seed: int, display: Display | Silent
) -> FisherMetadata:
    """Hold what the model knows of `corpus` now, together with what was held before.

    Returns:
        Where the Fisher just taken comes from.
    """
    ewc = engine.ewc
    assert ewc is not None, "asked for"
    how = fisher_estimate.Estimate(asked.fisher_samples, asked.fisher_labels, asked.damping, seed)
    with display.counting("Fisher", how.samples) as advance:
        anchors, metadata = fisher_estimate.take(engine, corpus, sources, how, advance)
    states = list(engine.optimizer.states())
    # Checked by itself: a sum would hide which of the two is broken.
    ewc.refuse_broken(states, anchors)
    folded = merge(asked.consolidation, asked.gamma, ewc.anchors, anchors)
    latest = asked.consolidation != "separate"
    ewc.hold(states, folded, ewc.metadata.merged(metadata, latest) if ewc.metadata else metadata)
    return metadata


def notes(ewc: Ewc | None) -> dict[str, str]:
    """What lies beside the tensors, name -> text."""
    if ewc is None or ewc.metadata is None:
        return {}
    return {ORIGIN: json.dumps(asdict(ewc.metadata), indent=1) + "\n"}


def read_origin(folder: Path) -> FisherMetadata | None:
    """Where the Fisher in a checkpoint, or in a folder of its own, comes from; None when there is none.

    Raises:
        ConfigError: not to be read, or of another normalisation.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return None
    try:
        content = json_text.loads(path.read_bytes())
        metadata = FisherMetadata(**{**content, "sources": tuple(content["sources"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).\n  Take the Fisher again: igla-mega fisher.") from None
    if metadata.normalization != PER_TOKEN:
        raise ConfigError(
            f"{path}: a Fisher `{metadata.normalization}`, where ewc_lambda goes with one `{PER_TOKEN}`: they differ "
            "by the number of tokens.\n  Take it again: igla-mega fisher."
        )
    return metadata


@contextmanager
def restoring(engine: Engine, checkpoint: Path) -> Iterator[None]:
    """While a checkpoint is loaded: make room for what it holds of earlier tasks, and check what came."""
    metadata = read_origin(checkpoint) if engine.ewc is not None else None
    if metadata is None or engine.ewc is None:
        yield
        return
    states = list(engine.optimizer.states())
    engine.ewc.anchors = engine.ewc.allocate(states)
    yield
    engine.ewc.hold(states, engine.ewc.anchors, metadata)


def hold_file(engine: Engine, folder: Path) -> FisherMetadata:
    """Hold the model as it stands by a Fisher that was written for it.

    Raises:
        ConfigError: the folder is damaged, holds no Fisher, or one of another model.
    """
    ewc = engine.ewc
    assert ewc is not None, "asked for"
    try:
        verify_together(folder, engine.mesh.host_group)
    except ConfigError as error:
        raise ConfigError(f"{error.breaches[0].splitlines()[0]}\n  Take the Fisher again: igla-mega fisher.") from None
    metadata = read_origin(folder)
    if metadata is None:
        raise ConfigError(f"{folder}: holds no Fisher ({ORIGIN} is missing).\n  Write one: igla-mega fisher.")
    states = list(engine.optimizer.states())
    anchors = ewc.allocate(states)
    load_states(folder, _with(states, anchors), engine.mesh.host_group, kinds=KINDS)
    if (here := weights_digest(engine.mesh, states)) != metadata.model:
        raise ConfigError(
            f"{folder}: the Fisher of another model (its weights {metadata.model}, the base model's {here}).\n"
            "  Take that of this one: igla-mega fisher."
        )
    ewc.hold(states, anchors, metadata)
    return metadata


def save_file(engine: Engine, folder: Path, recipe_yaml: str) -> None:
    """Write what is held as a folder of its own."""
    assert engine.ewc is not None and engine.ewc.holds, "taken before"
    states = list(engine.optimizer.states())
    texts = {**notes(engine.ewc), "recipe.yaml": recipe_yaml}
    store.save_folder(folder, _with(states, engine.ewc.anchors, only=True), texts, engine.mesh)


def _with(states, anchors: list[FisherAnchor], *, only: bool = False):
    for state, held in zip(states, anchors, strict=True):
        values = {"fisher": held.fisher, "anchor": held.anchor}
        yield state._replace(values=values if only else {**state.values, **values})
