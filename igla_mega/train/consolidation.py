"""Anchor a learned task: take its Fisher, merge it with those of earlier tasks, move the anchor; also from files."""

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
"""Name of the file with the metadata of a Fisher, next to its tensors in a checkpoint or in a separate folder."""
KINDS = ("fisher", "anchor")
"""Names of the tensors that a Fisher adds to each parameter's state."""


def consolidate(
    engine: Engine, corpus: Corpus, sources: tuple[str, ...], memory: Memory, seed: int, display: Display | Silent
) -> FisherMetadata:
    """Anchor what the model knows of `corpus` now, together with what was anchored before. Every rank calls it.

    Returns:
        Metadata of the Fisher just taken.
    """
    ewc = engine.ewc
    assert ewc is not None, "only called with EWC"
    how = fisher_estimate.Estimate(memory.fisher_samples, memory.fisher_labels, memory.damping, seed)
    with display.counting("Fisher", how.samples) as advance:
        anchors, metadata = fisher_estimate.take(engine, corpus, sources, how, advance)
    states = list(engine.optimizer.states())
    # Checked before the merge: a sum of two Fishers would hide which of them is not finite.
    ewc.refuse_broken(states, anchors)
    merged = merge(memory.consolidation, memory.gamma, ewc.anchors, anchors)
    # Only then is the anchor the model itself, whose digest the metadata may keep.
    latest = memory.consolidation != "separate"
    ewc.hold(states, merged, ewc.metadata.merged(metadata, latest) if ewc.metadata else metadata)
    return metadata


def notes(ewc: Ewc | None) -> dict[str, str]:
    """Return the files to store next to the tensors of a checkpoint, name -> text."""
    if ewc is None or ewc.metadata is None:
        return {}
    return {ORIGIN: json.dumps(asdict(ewc.metadata), indent=1) + "\n"}


def read_origin(folder: Path) -> FisherMetadata | None:
    """Return the metadata of the Fisher in a checkpoint or in a separate folder; None if there is no Fisher.

    Raises:
        ConfigError: the file cannot be read, or the Fisher has another normalization.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return None
    try:
        content = json_text.read(path)
        metadata = FisherMetadata(**{**content, "sources": tuple(content["sources"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).\n  Take the Fisher again: igla-mega fisher.") from None
    if metadata.normalization != PER_TOKEN:
        raise ConfigError(
            f"{path}: a Fisher `{metadata.normalization}`, but ewc_lambda requires one `{PER_TOKEN}`: they differ by "
            "the number of tokens.\n  Take it again: igla-mega fisher."
        )
    return metadata


@contextmanager
def restoring(engine: Engine, checkpoint: Path) -> Iterator[None]:
    """Allocate Fisher and anchor of a checkpoint before it is loaded in the context, and check them afterwards."""
    metadata = read_origin(checkpoint) if engine.ewc is not None else None
    if metadata is None or engine.ewc is None:
        yield
        return
    states = list(engine.optimizer.states())
    # The loader fills the tensors in `Engine.states()`, which include the anchors from here on.
    engine.ewc.anchors = engine.ewc.allocate(states)
    yield
    engine.ewc.hold(states, engine.ewc.anchors, metadata)


def hold_file(engine: Engine, folder: Path) -> FisherMetadata:
    """Anchor the model at its current weights, by a Fisher that was written for it.

    Raises:
        ConfigError: the folder is damaged, has no Fisher, or that of another model.
    """
    ewc = engine.ewc
    assert ewc is not None, "only called with EWC"
    try:
        verify_together(folder, engine.mesh.host_group)
    except ConfigError as error:
        raise ConfigError(f"{error.breaches[0].splitlines()[0]}\n  Take the Fisher again: igla-mega fisher.") from None
    metadata = read_origin(folder)
    if metadata is None:
        raise ConfigError(f"{folder}: contains no Fisher ({ORIGIN} is missing).\n  Write one: igla-mega fisher.")
    states = list(engine.optimizer.states())
    anchors = ewc.allocate(states)
    load_states(folder, _with(states, anchors), engine.mesh.host_group, kinds=KINDS)
    if (here := weights_digest(engine.mesh, states)) != metadata.model:
        raise ConfigError(
            f"{folder}: the Fisher of another model (digest of its weights {metadata.model}, of the base model's "
            f"{here}).\n  Take the Fisher of this model: igla-mega fisher."
        )
    ewc.hold(states, anchors, metadata)
    return metadata


def save_file(engine: Engine, folder: Path, recipe_yaml: str) -> None:
    """Write Fisher and anchor to a separate folder, without the model. Every rank calls it."""
    assert engine.ewc is not None and engine.ewc.holds, "only called after a Fisher was taken"
    states = list(engine.optimizer.states())
    texts = {**notes(engine.ewc), "recipe.yaml": recipe_yaml}
    store.save_folder(folder, _with(states, engine.ewc.anchors, only=True), texts, engine.mesh)


def _with(states, anchors: list[FisherAnchor], *, only: bool = False):
    """Yield the parameter states with Fisher and anchor among their tensors, or with these `only`."""
    for state, held in zip(states, anchors, strict=True):
        values = {"fisher": held.fisher, "anchor": held.anchor}
        yield state._replace(values=values if only else {**state.values, **values})
