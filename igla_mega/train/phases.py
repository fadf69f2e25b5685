"""Measure the loss on each domain after each phase (the forgetting matrix), and anchor what was learned with EWC."""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from igla_mega.checkpoint.progress import Progress
from igla_mega.config.schema import Recipe
from igla_mega.data.batches import BatchShard, Corpus, Dataset, on_device
from igla_mega.engine.step import Engine, evaluate
from igla_mega.layout.stages import Stage, weights_of
from igla_mega.objective.ewc import FisherMetadata
from igla_mega.train.consolidation import consolidate, hold_file
from igla_mega.train.session import Session


@dataclass(frozen=True)
class Domain:
    """Data that a phase trains on, and how the loss on it is measured."""

    name: str
    weights: Mapping[str, float]
    """Source -> weight."""
    corpus: Dataset
    share: BatchShard


def domain_losses(engine: Engine, domains: Sequence[Domain], num_batches: int) -> dict[str, float]:
    """Return the loss on the held-out part of each domain, in nats per target token, at its own sequence length."""
    return {domain.name: _loss(engine, domain, num_batches) for domain in domains}


def _loss(engine: Engine, domain: Domain, num_batches: int) -> float:
    """Return the loss on a domain: the weighted mean over its sources, of at most `num_batches` batches each."""
    corpus, share = domain.corpus, domain.share
    layout = replace(
        engine.layout,
        sequence_length=corpus.sequence_length,
        micro_batch_size=share.micro_batch_size,
        num_microbatches=share.num_microbatches,
    )
    engine, device = replace(engine, layout=layout), next(engine.chunks[0].parameters()).device
    measurable = [name for name in domain.weights if name in corpus.validation_names()]
    total = sum(domain.weights[name] for name in measurable)
    loss = 0.0
    for name in measurable:
        batches = min(num_batches, -(-corpus.num_validation_samples(name) // share.global_batch))
        rows = on_device(corpus.validation_batches(name, share, batches), device)
        loss += domain.weights[name] / total * evaluate(engine, rows, batches)
    return loss


def matrix_entry(names: Sequence[str], phases: Sequence[str], rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the forgetting matrix as it is logged: a row for each of `phases`, a column per domain, nats per token.

    `backward_transfer` (Lopez-Paz and Ranzato 2017, arXiv:1706.08840, with losses in place of accuracies) is the mean
    over earlier domains of the loss right after the domain was learned, minus the last loss. Below 0 is forgetting.
    """
    # A domain's first loss is that after its own phase: it is not measured before.
    learned: dict[str, float] = {}
    for row in rows:
        for name, loss in row.items():
            learned.setdefault(name, loss)
    earlier = rows[-2].keys() if len(rows) > 1 else ()
    changes = [learned[name] - rows[-1][name] for name in earlier]
    return {
        "domains": list(names),
        "phases": list(phases[: len(rows)]),
        "forgetting_matrix": [[row.get(name) for name in names] for row in rows],
        "backward_transfer": sum(changes) / len(changes) if changes else None,
    }


def matrix_table(entry: Mapping[str, Any]) -> str:
    """Return the matrix as text for a console; each loss with its rise since the domain was learned in brackets."""
    table = Table("after")
    for name in entry["domains"]:
        table.add_column(name, justify="right")
    learned: dict[int, float] = {}
    for phase, row in zip(entry["phases"], entry["forgetting_matrix"], strict=True):
        cells = []
        for column, loss in enumerate(row):
            if loss is None:
                cells.append("")
                continue
            risen = loss - learned.setdefault(column, loss)
            cells.append(f"{loss:.3f}" + (f" ({risen:+.3f})" if risen else ""))
        table.add_row(phase, *cells)
    text = io.StringIO()
    Console(file=text, width=100).print(table)
    transfer = entry["backward_transfer"]
    end = "" if transfer is None else f"backward transfer {transfer:+.3f} nats/token (below 0: forgotten)"
    title = "loss on each domain, nats/token (and how far it has risen since the domain was learned)"
    return "\n".join([title, text.getvalue().rstrip(), *([end] if end else [])])


def next_stage(stages: Sequence[Stage], progress: Progress) -> int:
    """Return the stage at which a run resumes: that of its next step, or the one before if its end is still due."""
    unfinished = next((i for i, stage in enumerate(stages) if progress.step < stage.last_step), len(stages))
    before = unfinished - 1
    # A run can be killed between the last step of a stage and its measurements and Fisher.
    trained = before == progress.stage and progress.step == stages[before].last_step
    return before if trained and finishes(stages[before]) else unfinished


def finishes(stage: Stage) -> bool:
    """Return True if a stage ends with more than its last step: a measurement of its domain, or EWC."""
    memory = stage.recipe.memory
    return bool(stage.domain) or (memory is not None and memory.ewc_lambda > 0)


@dataclass(frozen=True)
class Learning:
    """Work before the first stage and after each one: measure the domains, and anchor what was learned."""

    recipe: Recipe
    stages: Sequence[Stage]
    corpora: Sequence[Dataset]
    engine: Engine
    open_corpus: Callable[[Mapping[str, float], int], Corpus]
    """Opens the data for given weights of sources and a sequence length."""
    from_base: bool
    """True if the run starts from a base model."""
    session: Session

    def begin(self, progress: Progress) -> None:
        """Measure and anchor the base model, if the recipe says which data it was trained on."""
        memory, ewc = self.recipe.memory, self.engine.ewc
        if base := self._base_domain():
            progress.domain_losses.append(domain_losses(self.engine, [base], self.recipe.evaluation.num_batches))
        if memory is None or ewc is None:
            return
        name, strength = self.recipe.base_model, f"with lambda {ewc.ewc_lambda:g} per token"
        if not self.from_base:
            self.session.say(f"EWC: no base model, so nothing is anchored until {self._first_end()}")
        elif memory.fisher is not None:
            metadata = hold_file(self.engine, Path(memory.fisher))
            self.session.say(
                f"EWC: {name} is anchored {strength}, by the Fisher of {memory.fisher} ({_words(metadata)})"
            )
        elif (source := self._base_source()) is None:
            self.session.say(
                f"EWC: continual.base_data does not say what {name} was trained on: it is not anchored, and "
                f"{self.stages[0].name} trains without a pull"
            )
        else:
            metadata = self._consolidate(weights_of(self.recipe, source), self.stages[0], (source,))
            self.session.say(f"EWC: {name} is anchored {strength}, by its Fisher on {source} ({_words(metadata)})")

    def finish(self, index: int, progress: Progress) -> bool:
        """Measure what the model knows after stage `index`, and anchor it.

        Returns:
            True if there is something new to save.
        """
        stage = self.stages[index]
        if stage.domain:
            domains = [self._domain(i) for i in range(index + 1)]
            if base := self._base_domain():
                domains.insert(0, base)
            progress.domain_losses.append(domain_losses(self.engine, domains, self.recipe.evaluation.num_batches))
            names = list(dict.fromkeys(domain.name for domain in domains))
            before = ["base"] if len(progress.domain_losses) > index + 1 else []
            done = [*before, *(one.name for one in self.stages[: index + 1])]
            entry = matrix_entry(names, done, progress.domain_losses)
            self.session.say(f"step {progress.step}: {stage.name} is done\n{matrix_table(entry)}")
            self.session.trackers.metrics(
                {"step": progress.step, "stage": stage.name, "domain_loss": progress.domain_losses[-1], **entry}
            )
        if self.recipe.memory is not None and self.engine.ewc is not None:
            metadata = self._consolidate(stage.domain or stage.mix, stage, (stage.name,))
            self.session.say(f"EWC: {stage.name} is anchored from here on ({_words(metadata)})")
        progress.stage = index + 1
        return finishes(stage)

    def _consolidate(self, weights: Mapping[str, float], stage: Stage, sources: tuple[str, ...]) -> FisherMetadata:
        """Take the Fisher of the model on data of these weights, and anchor the model; return where it comes from."""
        memory = self.recipe.memory
        assert memory is not None, "only called for a recipe with EWC"
        corpus = self.open_corpus(weights, memory.fisher_seq_length or stage.layout.sequence_length)
        return consolidate(self.engine, corpus, sources, memory, self.recipe.training.seed, self.session.display)

    def _base_source(self) -> str | None:
        """Return the data that the base model was trained on, a source or `mix`; None if unknown.

        A run that only extends the context continues with the data of its base model, so that `data.mix` stands for it.
        """
        memory = self.recipe.memory
        if memory is None or not self.from_base:
            return None
        return memory.base_data or ("mix" if self.recipe.continual is None and self.recipe.data.mix else None)

    def _base_domain(self) -> Domain | None:
        """Return the domain of the base model's data, measured like that of the first stage; None if unknown."""
        if not self.stages[0].domain or (source := self._base_source()) is None:
            return None
        return replace(self._domain(0), name=source, weights=weights_of(self.recipe, source))

    def _domain(self, index: int) -> Domain:
        """Return the domain of a stage."""
        stage, layout = self.stages[index], self.stages[index].layout
        data = self.engine.mesh.data
        share = BatchShard(layout.global_batch, layout.micro_batch_size, data.size, data.rank)
        return Domain(stage.name, stage.domain, self.corpora[index], share)

    def _first_end(self) -> str:
        """Return when the first Fisher is taken, as text."""
        first = self.stages[0]
        if len(self.stages) == 1:
            return "the end, where Fisher and anchor are taken: the model is then ready for continual learning"
        return f"step {first.last_step}, where the Fisher of {first.name} is taken"


def _words(metadata: FisherMetadata) -> str:
    """Return the size of the sample that a Fisher was taken on, as text."""
    return f"{metadata.samples:,} sequences, {metadata.tokens:,} tokens"
