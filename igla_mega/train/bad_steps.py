"""Repeat a bad step (a loss or gradient that is not finite, or a spike) to find where it begins and what causes it.

If the repetition gives the same bits, the cause is in the data, the weights or the code. If it gives a good result, the
cause is the machine.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from igla_mega.checkpoint.progress import Progress
from igla_mega.config.schema import Training
from igla_mega.distributed.mesh import Mesh
from igla_mega.engine.heartbeat import Heartbeat
from igla_mega.engine.optimizer import BadStep
from igla_mega.engine.step import Engine, StepReport
from igla_mega.model.router import routers_of
from igla_mega.train.state import NextStep, Run

SHOWN = 4
"""Maximum number of ranks or weights that a message names; the rest is counted."""


@dataclass(frozen=True)
class Place:
    """Place on a rank where a tensor that is not finite appeared first."""

    micro_batch: int
    """Number of the micro-batch, counted from 1."""
    order: int
    """Position of the module in the pass of this micro-batch, counted from 1."""
    module: str
    """Name of the module in the whole model."""
    came_in: bool
    """True if the module's input was not finite already."""


@dataclass(frozen=True)
class Account:
    """Findings of one rank about a bad step."""

    rank: int
    stage: int
    """Pipeline stage of the rank."""
    first_losses: list[float]
    """Losses of its micro-batches in the first run; empty unless it has the last pipeline stage."""
    gradients: tuple[str, str]
    """Digests of the gradients of the first and of the second run."""
    forward: Place | None = None
    backward: Place | None = None
    weights: list[str] = field(default_factory=list)
    """Names of weights that are not finite, at most `SHOWN`."""
    weight_gradients: list[str] = field(default_factory=list)
    """Names of weights whose gradients are not finite, at most `SHOWN`."""


@dataclass(frozen=True)
class Diagnosis:
    """Result of repeating a bad step, the same on every rank."""

    report: StepReport | None
    """Report of the second run if it was good, in which case the step is taken; else None."""
    what: str
    """What was bad: `loss`, `gradient norm` or `spike`."""
    value: float
    verdict: Literal["transient", "deterministic", "not repeatable"]
    ranks: list[int]
    """Ranks where it began; empty if unknown."""
    place: str
    """Ranks, micro-batch and module as text; empty if unknown."""
    entry: dict[str, Any]
    """Part of the line in bad_steps.jsonl."""

    @property
    def words(self) -> str:
        """What happened, where, and the likely cause, as text in two sentences."""
        named = {"loss": f"the loss is {self.value}", "gradient norm": f"the gradient norm is {self.value}"}
        happened = named.get(self.what, f"loss spike: {self.value:.4g}")
        return f"{happened}{self.place}.\n  {self._cause()}"

    def _cause(self) -> str:
        """Return the sentence about the cause."""
        if self.verdict == "transient":
            again = f"{self.report.loss:.4f}" if self.report else "good"
            return (
                f"When repeated it is {again}: a hardware fault, not the data or the code. The step is taken with the "
                "second result. If it recurs, test the node: igla-mega doctor."
            )
        if self.verdict == "deterministic":
            return "When repeated it gives the same bits: the cause is in the data, the weights or the code."
        return "When repeated it is bad too, with other bits: a kernel that sums in no fixed order, or faulty hardware."


def diagnose(engine: Engine, bad: BadStep, retake: Callable[[], StepReport]) -> Diagnosis:
    """Repeat a bad step with probes, and return what is known then. Every rank calls it.

    Args:
        retake: takes the step again from the same weights, micro-batches and seed; the first time it raised `bad`.
    """
    # Before the second run overwrites the gradients: they are what decides whether the two runs agree bit for bit.
    first = gradient_digest(engine.chunks)
    report, second = None, bad
    _reset_routing_counts(engine)
    with _probed(engine.chunks, engine.heartbeat) as probe:
        try:
            report = retake()
        except BadStep as again:
            second = again
            _reset_routing_counts(engine)
    names = [(name, param) for chunk in engine.chunks for name, param in _named(chunk)]
    own = Account(
        engine.mesh.rank,
        engine.mesh.pipeline.rank,
        bad.losses,
        (first, gradient_digest(engine.chunks)),
        probe.forward,
        probe.backward,
        [name for name, param in names if not _finite(param)][:SHOWN],
        [name for name, param in names if not _finite(_gradient(param))][:SHOWN] if report is None else [],
    )
    accounts = _gathered(own, engine.mesh)
    if report is not None:
        return _transient(bad, report, accounts)
    same = bad.what == second.what and all(one.gradients[0] == one.gradients[1] for one in accounts)
    verdict: Literal["deterministic", "not repeatable"] = "deterministic" if same else "not repeatable"
    ranks, place, more = _origin(bad, accounts) if bad.what != "spike" else ([], "", {})
    return Diagnosis(None, bad.what, bad.value, verdict, ranks, place, _entry(bad, verdict, ranks, more))


def _transient(bad: BadStep, report: StepReport, accounts: Sequence[Account]) -> Diagnosis:
    """Return the diagnosis of a step that was good when repeated; only the losses of the first run give its place."""
    ranks = [one.rank for one in accounts if not all(math.isfinite(loss) for loss in one.first_losses)]
    batches = {n for one in accounts for n, loss in enumerate(one.first_losses, 1) if not math.isfinite(loss)}
    place = f" ({_ranks(ranks)}, micro-batch {min(batches)})" if ranks else ""
    more = {"micro_batch": min(batches) if batches else None, "again": report.loss}
    return Diagnosis(report, bad.what, bad.value, "transient", ranks, place, _entry(bad, "transient", ranks, more))


def _origin(bad: BadStep, accounts: Sequence[Account]) -> tuple[list[int], str, dict[str, Any]]:
    """Return the ranks where a step became bad, the place as text, and the place for bad_steps.jsonl.

    The first bad module is the earliest in the first bad micro-batch. A bad input came from another rank, so that rank
    is not the origin.
    """
    if bad.what == "gradient norm" and not any(one.forward for one in accounts):
        backward = [(one, one.backward) for one in accounts if one.backward]
        # The backward pass visits pipeline stages from the last to the first.
        found = _earliest(backward, lambda one, at: (at.micro_batch, -one.stage, at.order))
        direction, gives = "backward", "gradient"
    else:
        forward = [(one, one.forward) for one in accounts if one.forward and not one.forward.came_in]
        found = _earliest(forward, lambda one, at: (at.micro_batch, one.stage, at.order))
        direction, gives = "forward", "output"
    if not found:
        holders = [one for one in accounts if one.weight_gradients]
        ranks = [one.rank for one in holders]
        if not holders:
            return [], ": every gradient is finite, but the sum of their squares is not", {"micro_batch": None}
        # A weight's own gradient passes through no module's output, so no probe sees it.
        name = holders[0].weight_gradients[0]
        return ranks, f" ({_ranks(ranks)}): the gradient of {name}", {"micro_batch": None, "module": name}
    ranks, place = [one.rank for one, _ in found], found[0][1]
    broken = sorted({name for one, _ in found for name in one.weights})
    why = f"; weights that are not finite: {', '.join(broken[:SHOWN])}" if broken else ""
    words = (
        f" ({_ranks(ranks)}, micro-batch {place.micro_batch}, {direction}): the first module whose {gives} is not "
        f"finite is {place.module}{why}"
    )
    more = {"micro_batch": place.micro_batch, "pass": direction, "module": place.module, "broken_weights": broken}
    return ranks, words, more


def _earliest(
    found: list[tuple[Account, Place]], key: Callable[[Account, Place], tuple]
) -> list[tuple[Account, Place]]:
    """Return the findings with the smallest key; several if ranks share a stage."""
    first = min((key(one, at) for one, at in found), default=None)
    return [(one, at) for one, at in found if key(one, at) == first]


def _entry(bad: BadStep, verdict: str, ranks: list[int], more: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a line of bad_steps.jsonl that the diagnosis contributes."""
    # JSON has no NaN and no infinity.
    value = bad.value if math.isfinite(bad.value) else str(bad.value)
    again = more.get("again")
    return {"what": bad.what, "value": value, "verdict": verdict, "ranks": ranks, **more, "again": again}


def _ranks(ranks: Sequence[int]) -> str:
    """Return ranks as text: `rank 3`, or `ranks 0, 1, 2, 3 and 4 more`."""
    shown = ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _gathered(own: Account, mesh: Mesh) -> list[Account]:
    """Return the findings of all ranks. Every rank calls it."""
    everyones: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(everyones, asdict(own), group=mesh.host_group)
    accounts = []
    for one in everyones:
        places = {key: Place(**one[key]) if one[key] else None for key in ("forward", "backward")}
        accounts.append(Account(**{**one, **places, "gradients": tuple(one["gradients"])}))
    return accounts


def _reset_routing_counts(engine: Engine) -> None:
    """Discard what routers have counted in a step that was not taken."""
    for router in routers_of(engine.chunks):
        router.take_tally()


def gradient_digest(chunks: Iterable[nn.Module]) -> str:
    """Return a digest of this rank's gradients that changes with any bit of a single value.

    Per tensor it is the integer sum of the bit patterns, computed on the device, so no gradient is copied to the host.
    """
    digest = hashlib.blake2b(digest_size=8)
    for chunk in chunks:
        for name, param in _named(chunk):
            if (gradient := _gradient(param)) is None:
                continue
            bits = gradient.detach().contiguous().view(torch.int32 if gradient.element_size() == 4 else torch.uint8)
            digest.update(f"{name} {int(bits.sum(dtype=torch.int64))}".encode())
    return digest.hexdigest()


def _gradient(param: nn.Parameter) -> Tensor | None:
    """Return this rank's part of a gradient: megatron-core's fp32 `main_grad`, or `grad` with FSDP."""
    gradient = getattr(param, "main_grad", None)
    gradient = param.grad if gradient is None else gradient
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _finite(tensor: Tensor | None) -> bool:
    """Return True if this rank's part of a tensor is finite; integers and None are."""
    if tensor is None or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor.to_local() if isinstance(tensor, DTensor) else tensor).all())


def _named(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a chunk with their names in the whole model."""
    names = {module: name for name, module in _modules(chunk)}
    for module in chunk.modules():
        for own, param in module.named_parameters(recurse=False):
            yield f"{names[module]}.{own}", param


def _modules(chunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a chunk with their names in the whole model, for any wrapper and pipeline stage."""
    # A chunk counts its layers from 0; the number of its first layer in the model is known to the layers only.
    layers = {}
    for name, module in chunk.named_modules():
        name = name.removeprefix("module").removeprefix(".")
        number = getattr(module, "layer_number", None)
        if number is not None and name.startswith("decoder.layers.") and name.count(".") == 2:
            layers[name] = f"decoder.layers.{number - 1}"
        layer = ".".join(name.split(".")[:3])
        yield layers.get(layer, layer) + name[len(layer) :], module


@dataclass
class _Probe:
    """Records the first module of this rank whose tensors are not finite, in the forward and in the backward pass."""

    heartbeat: Heartbeat
    forward: Place | None = None
    backward: Place | None = None
    _counts: dict[tuple[str, int], int] = field(default_factory=dict)
    """Number of modules that have run, by pass and micro-batch."""

    def after(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """Check the output of a module; a forward hook."""
        batch = self.heartbeat.micro_batch
        order = self._count("forward", batch)
        tensors = list(_tensors(output))
        if self.forward is None and not all(map(_finite, tensors)):
            came_in = not all(map(_finite, _tensors(inputs)))
            self.forward = Place(batch, order, name or "the model", came_in)
        # Hooks of tensors, not of modules: they hold for views too, and cost nothing when there is no backward pass.
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(partial(self.before, name, batch))

    def before(self, name: str, batch: int, gradient: Tensor) -> None:
        """Check the gradient with respect to a module's output; a hook of the output tensor."""
        order = self._count("backward", batch)
        if self.backward is None and not _finite(gradient):
            self.backward = Place(batch, order, name or "the model", False)

    def _count(self, direction: str, batch: int) -> int:
        """Count one more module of a pass of a micro-batch, and return the number."""
        self._counts[direction, batch] = order = self._counts.get((direction, batch), 0) + 1
        return order


def _tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


@contextmanager
def _probed(chunks: Iterable[nn.Module], heartbeat: Heartbeat) -> Iterator[_Probe]:
    """Attach a probe to all modules while the context is open."""
    probe = _Probe(heartbeat)
    with ExitStack() as hooks:
        for chunk in chunks:
            for name, module in _modules(chunk):
                hooks.callback(module.register_forward_hook(partial(probe.after, name)).remove)
        yield probe


def highest_loss(losses: Sequence[float], window: int, deviations: float) -> float:
    """Return the loss above which a step is a spike, in nats; infinite until half a window of losses is known.

    It is the median of the last losses plus `deviations` times their spread. The spread is 1.4826 times the median
    absolute deviation, which equals the standard deviation for normal noise and is robust against a few spikes; it is
    at least 1 % of the median.
    """
    if 2 * len(losses) < window:
        return math.inf
    middle = median(losses)
    spread = 1.4826 * median(abs(loss - middle) for loss in losses)
    return middle + deviations * max(spread, 0.01 * abs(middle))


def spike_bound(training: Training, progress: Progress) -> float:
    """Return the loss above which the next step counts as a spike, in nats; inf when spikes are ignored."""
    if training.on_spike == "ignore":
        return math.inf
    return highest_loss(progress.losses, training.spike_window, training.spike_deviations)


def answer(run: Run, found: Diagnosis, step: NextStep, progress: Progress) -> StepReport | None:
    """Do what the recipe configures for a bad step: stop, or leave its samples out, at once or after a rewind.

    Returns:
        The report of the second run if that was good and the step is taken, else None.

    Raises:
        FloatingPointError: the recipe requests a stop, or too many consecutive steps were bad.
    """
    training, session = run.recipe.training, run.session
    key = "on_spike" if found.what == "spike" else "on_nonfinite"
    action = "taken" if found.report else getattr(training, key)
    # Number of bad steps immediately before this one.
    row = 0
    while step.number - 1 - row in progress.bad_steps:
        row += 1
    too_many = action in ("skip", "rewind") and row >= training.bad_steps_in_a_row
    if session.mesh.is_main:
        samples = run.corpus.ledger_entry(step.data_step, run.share.global_batch)
        entry = {"time": round(time.time(), 3), "step": step.number, "stage": run.recipe.name, "samples": samples}
        session.trackers.bad_step({**entry, **found.entry, "action": "stop" if too_many else action})
    kind = "spike" if found.what == "spike" else "nonfinite"
    session.log_event(kind, step.number, found.words, verdict=found.verdict, ranks=found.ranks)
    if found.report is not None:
        return found.report
    if action == "stop" or too_many:
        session.trackers.event("stopping", step.number - 1, f"stopped before the update of step {step.number}")
        raise FloatingPointError(_refusal(step.number, key, row if too_many else 0))
    bad, skipped = [*progress.bad_steps, step.number], {*progress.skipped, step.number}
    if action == "rewind":
        skipped |= _rewind(run, step.number, progress, skipped)
    progress.bad_steps, progress.skipped = bad, sorted(skipped)
    return None


def _refusal(step: int, key: str, row: int) -> str:
    """Return the error of a run that stops at a bad step.

    Args:
        row: number of consecutive bad steps before it if they are too many, else 0.
    """
    why = f"; so were the {row} before it, training.bad_steps_in_a_row {row}" if row else ""
    way_out = (
        "The samples are not the cause: delete the newest checkpoints to resume further back, and lower "
        "training.learning_rate."
        if row
        else f"To continue without them, set training.{key}=skip (or rewind); or lower training.learning_rate."
    )
    return (
        f"step {step} is bad{why}: stopped before its update. The lines above name the place, bad_steps.jsonl its "
        f"samples.\n  {way_out}"
    )


def _rewind(run: Run, step: int, progress: Progress, skipped: set[int]) -> set[int]:
    """Go back to the last checkpoint of the stage, and return the steps that are to be left out after it."""
    session = run.session
    if not run.rewind(progress):
        session.log_event("rewound", step, "this stage has no checkpoint to go back to; only this step is left out")
        return skipped
    if run.recipe.training.rewind_skips == "since_checkpoint":
        skipped = skipped | set(range(progress.step + 1, step + 1))
    session.trackers.rewind(progress.step)
    left_out = sorted(one for one in skipped if one > progress.step)
    message = f"back to the checkpoint of step {progress.step}; left out from there: {_ranges(left_out)}"
    session.log_event("rewound", step, message, to_step=progress.step)
    return skipped


def _ranges(steps: Sequence[int]) -> str:
    """Return sorted steps as text: `step 5`, `steps 5 to 8` if consecutive, else all of them."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    whole = steps[-1] - steps[0] + 1 == len(steps)
    return f"steps {steps[0]} to {steps[-1]}" if whole else f"steps {', '.join(map(str, steps))}"
