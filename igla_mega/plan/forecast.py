"""Plan of a recipe: layout, memory and time of each stage; days, cost and energy of the whole run."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Quantization
from igla_mega.config.schema import Recipe
from igla_mega.layout.hardware import GIB, TABLE, Hardware
from igla_mega.layout.layout import Layout
from igla_mega.layout.stages import parts_of
from igla_mega.plan import base_model, calibration, card, cost, memory, parameters
from igla_mega.plan.calibration import Calibration
from igla_mega.plan.card import Claim
from igla_mega.plan.cost import Run
from igla_mega.plan.memory import Memory
from igla_mega.plan.search import Candidate, Search, best, name_of, search, weigh
from igla_mega.plan.time import Clock, StepTime, model_flops_per_token

EXAMPLES, EXAMPLE_TOKENS = 52_002, 512
"""Assumed instructions per epoch and tokens of each: the size of Alpaca (Taori et al. 2023)."""
PAIRS = 61_135
"""Assumed preference pairs per epoch: the size of UltraFeedback (Cui et al. 2023, arXiv:2310.01377)."""


@dataclass(frozen=True)
class Part:
    """Consecutive steps of one recipe: a stage, a phase, or the whole run."""

    name: str
    recipe: Recipe
    """Recipe with the shape of its model."""
    found: Search
    steps: int
    run: Run

    @property
    def layout(self) -> Layout:
        return self.found.winner.layout

    @property
    def memory(self) -> Memory:
        return self.found.winner.memory

    @property
    def step(self) -> StepTime:
        assert self.found.winner.step is not None, "what does not fit is refused"
        return self.found.winner.step

    @property
    def tokens_per_step(self) -> int:
        return self.layout.global_batch * self.layout.rows_per_sample * self.layout.sequence_length

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.step.seconds

    @property
    def flops(self) -> float:
        """Model FLOP of all steps."""
        return self.tokens * model_flops_per_token(self.recipe, self.layout.sequence_length)

    def utilization(self, hardware: Hardware) -> float:
        """Return the model FLOP utilization of a step relative to the dense peak of all devices."""
        flops = self.tokens_per_step * model_flops_per_token(self.recipe, self.layout.sequence_length)
        devices = 1 if hardware.is_cpu else self.layout.world_size
        return flops / self.step.seconds / (hardware.peak(self.recipe.distributed.precision) * devices)


@dataclass(frozen=True)
class Forecast:
    """Memory, time and cost of a recipe on a number of devices."""

    name: str
    hardware: Hardware
    gpus: int
    price: float
    """Dollars per hour of one device; of the whole machine on a CPU."""
    price_source: str
    calibration: Calibration
    parts: tuple[Part, ...]
    claim: Claim | None
    contradictions: tuple[str, ...]
    assumed: tuple[str, ...]
    """Assumptions: values given by neither the recipe nor the card."""
    warnings: tuple[str, ...]
    advice: tuple[str, ...]
    """Changes to the recipe that would save time."""
    data_is_assumed: bool = field(default=False)
    """True if the number of tokens depends on an assumed size of the data."""

    @property
    def days(self) -> float:
        return sum(part.run.days for part in self.parts)

    @property
    def device_hours(self) -> float:
        return sum(part.run.device_hours for part in self.parts)

    @property
    def dollars(self) -> float:
        # The price of a CPU is that of the machine, which all ranks share.
        return self.device_hours / (self.gpus if self.hardware.is_cpu else 1) * self.price

    @property
    def energy(self) -> float:
        return sum(part.run.energy(self.hardware) for part in self.parts)

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts)

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)


@dataclass(frozen=True)
class Given:
    """What the user adds to the recipe."""

    price: float | None = None
    """Dollars per hour of one device; None: that of the hardware table."""
    calibrated: Path | None = None
    """Calibration file; None: the newest for the hardware, else assumptions."""
    models: Path | None = None
    """Folder with base models."""
    samples: int | None = None
    """Rows (or pairs) per epoch, if the recipe counts epochs."""
    scale: str | None = None
    """Scale at which the recipe was loaded, also assumed for a missing base model."""
    claim: Claim | None = None
    """Claim of the card for the recipe."""
    advise: bool = True
    """True to search for changes of given keys that would save time."""


def forecast(recipe: Recipe, hardware: Hardware, gpus: int, given: Given | None = None) -> Forecast:
    """Return the plan of a recipe on `gpus` devices (on a CPU: ranks of this machine).

    Raises:
        ConfigError: an invalid number, no legal layout, or none that fits; then with the changes that make one fit.
    """
    given = given or Given()
    _refuse_missing_fp8(recipe, hardware)
    _numbers_are_above_zero(gpus=gpus, price=given.price, samples=given.samples)
    assumed: list[str] = []
    warnings: list[str] = []
    parts: list[Part] = []
    found_calibration: Calibration | None = None
    for name, part, steps_of in _pieces(recipe, given, assumed):
        used, notes = calibration.of(hardware, part.distributed.precision, given.calibrated)
        warnings += [line for line in notes if line not in warnings]
        found_calibration = found_calibration or used
        found = search(part, gpus, hardware, used.rates)
        if not found.winner.fits:
            raise ConfigError(_does_not_fit((name, part), found, hardware, gpus, used, given.price))
        warnings += [note for note in found.winner.layout.notes if note not in warnings]
        steps = steps_of(found.winner.layout)
        parts.append(Part(name, part, found, steps, _run(part, found.winner, steps, hardware, used)))
    assert found_calibration is not None, "a recipe has at least one part"
    data_is_assumed = _counts_epochs(recipe) and given.samples is None
    return Forecast(
        name=recipe.name,
        hardware=hardware,
        gpus=gpus,
        price=hardware.price if given.price is None else given.price,
        price_source=hardware.price_source if given.price is None else "--price",
        calibration=found_calibration,
        parts=tuple(parts),
        claim=given.claim,
        contradictions=_contradictions(parts, given.claim, hardware, data_is_assumed=data_is_assumed),
        assumed=tuple(dict.fromkeys(assumed)),
        warnings=tuple(warnings),
        advice=tuple(_advice(parts, hardware, found_calibration)) if given.advise else (),
        data_is_assumed=data_is_assumed,
    )


def _refuse_missing_fp8(recipe: Recipe, hardware: Hardware) -> None:
    """Refuse 8-bit training on hardware without its matrix products or its way to scale them."""
    if recipe.distributed.precision == "FP8" and not hardware.has_fp8(kind := recipe.distributed.fp8_recipe):
        able = ", ".join(entry.name for entry in TABLE.values() if entry.has_fp8(kind))
        why = f"does not support fp8_recipe {kind}" if hardware.fp8_flops else "has no 8-bit matrix products"
        raise ConfigError(f"distributed.precision: FP8, but {hardware.title} {why}. Use BF16, or --gpu {able}.")


def _contradictions(
    parts: Sequence[Part], claim: Claim | None, hardware: Hardware, *, data_is_assumed: bool
) -> tuple[str, ...]:
    """Return what the card claims and the plan contradicts."""
    if claim is None:
        return ()
    return tuple(
        card.contradictions(
            parts[0].recipe,
            claim,
            tokens=None if data_is_assumed else sum(part.tokens for part in parts),
            steps=sum(part.steps for part in parts),
            total_flops=sum(part.flops for part in parts),
            peak=hardware.peak(parts[0].recipe.distributed.precision),
        )
    )


def _numbers_are_above_zero(**numbers: float | None) -> None:
    """Refuse options that are not above 0, also NaN.

    Raises:
        ConfigError: the message lists every one.
    """
    breaches = [
        f"--{name}: {number:g} is not above 0. Give {'a whole number of at least 1' if name != 'price' else 'dollars'}."
        for name, number in numbers.items()
        if number is not None and not number > 0
    ]
    if breaches:
        raise ConfigError(*breaches)


def _counts_epochs(recipe: Recipe) -> bool:
    """Return True if the length of a stage depends on the size of its data."""
    pieces = recipe.stages or (recipe,)
    return any(p.training.total_steps is None and p.curriculum is None and p.data.total_tokens is None for p in pieces)


def _pieces(recipe: Recipe, given: Given, assumed: list[str]) -> Iterator[tuple]:
    """Yield name, recipe with a model, and a function layout -> steps, for every stage and phase."""
    first: Recipe | None = None
    for number, stage in enumerate(recipe.stages or (recipe,)):
        whole = stage
        if recipe.stages is not None and stage.model is None and first is not None:
            whole = stage.with_keys({"model": first.model, "moe": stage.moe or first.moe})
            if stage.sequence_length is None:
                whole = whole.with_keys({"training.sequence_length": first.training.sequence_length})
        whole, notes = base_model.with_base(parts_of(whole)[0], given.models, given.scale)
        assumed += notes
        first = first or whole
        kind = "sft" if stage.sft is not None else "dpo" if stage.dpo is not None else f"stage {number + 1}"
        name = recipe.name if recipe.stages is None else kind
        if whole.curriculum is None:
            yield name, whole, _steps(whole, given.samples, assumed)
            continue
        longest = max(phase.sequence_length or whole.sequence_length or 0 for phase in whole.curriculum.phases)
        for phase in whole.curriculum.phases:
            length = phase.sequence_length or whole.training.sequence_length
            own = whole.with_keys({"training.sequence_length": length, "name": phase.name})
            if (own.sequence_length or 0) < longest:
                assumed.append(f"{phase.name}: planned in its own layout; `train` keeps that of the longest phase.")
            yield (
                phase.name,
                own,
                lambda layout, tokens=phase.tokens: -(-tokens // (layout.global_batch * layout.sequence_length)),
            )


def _steps(recipe: Recipe, samples: int | None, assumed: list[str]):
    """Return a function layout -> steps, and append to `assumed` if the size of the data is unknown."""
    training = recipe.training
    if training.total_steps is not None:
        return lambda layout: training.total_steps
    epochs, length = training.epochs or 1, recipe.sequence_length or 1
    pairs = recipe.dpo is not None
    if samples is not None:
        rows = samples
    elif recipe.data.total_tokens is not None:
        rows = max(1, recipe.data.total_tokens // length)
    elif pairs:
        rows = PAIRS
        assumed.append(f"{rows:,} preference pairs per epoch (the size of UltraFeedback); --samples gives the number.")
    else:
        packed = recipe.data.packing
        rows = -(-EXAMPLES * EXAMPLE_TOKENS // length) if packed else EXAMPLES
        assumed.append(
            f"{EXAMPLES:,} examples per epoch (the size of Alpaca) of {EXAMPLE_TOKENS} tokens"
            + (f", packed into {rows:,} rows of {length:,}" if packed else "")
            + "; --samples gives the number of rows."
        )
    return lambda layout: max(1, epochs * rows // layout.global_batch)


def _run(recipe: Recipe, one: Candidate, steps: int, hardware: Hardware, used: Calibration) -> Run:
    """Return the times of a run of `steps` steps in a layout."""
    layout = one.layout
    assert one.step is not None
    clock = Clock(recipe, layout, hardware, used.rates)
    held = parameters.held(recipe, layout, 0, device="cpu" if hardware.is_cpu else "cuda")
    batches = recipe.evaluation.num_batches * max(1, len(recipe.data.mix or recipe.data.sources))
    forward = clock.forward_seconds() * layout.pipeline * layout.num_microbatches
    fisher = 0.0
    if recipe.uses_ewc and recipe.memory is not None:
        # One row per data-parallel rank at a time, so estimate it as a step with one micro-batch of one row.
        single = replace(layout, micro_batch_size=1, num_microbatches=1, global_batch=layout.data)
        fisher = Clock(recipe, single, hardware, used.rates).step().seconds * recipe.memory.fisher_samples / layout.data
    value = 4 if recipe.distributed.precision == "FP32" else 2
    # A checkpoint has fp32 weights, both moments and EWC; in bf16 a third of the optimizer state is those weights.
    state = 4 * held.updated + (held.optimizer if value == 4 else held.optimizer * 2 // 3) + held.memory
    model_ranks = (
        layout.world_size
        if layout.strategy == "FSDP" or layout.distributed_optimizer
        else (layout.tensor * layout.pipeline)
    )
    work = cost.Work(
        step_seconds=one.step.seconds,
        steps=steps,
        evaluation_seconds=forward * batches,
        evaluate_every=recipe.evaluation.every_steps,
        fisher_seconds=fisher,
        saved_bytes=float(state * model_ranks),
        rank_bytes=float(state),
        asynchronous=recipe.checkpoint.asynchronous,
        every_steps=recipe.checkpoint.every_steps,
        devices=layout.world_size,
    )
    return cost.run(work, hardware)


def _advice(parts: Sequence[Part], hardware: Hardware, used: Calibration) -> Iterator[str]:
    """Yield single changes of given keys that fit and save more than 5 % of a step, the accuracy of the plan."""
    for part in parts[:1]:
        where = part.recipe.distributed
        for key, value, shown in (
            ("gradient_checkpointing", None, "null"),
            ("strategy", "DDP" if where.strategy == "FSDP" else "FSDP", None),
        ):
            if getattr(where, key) in (None, value):
                continue
            other = part.recipe.with_keys({f"distributed.{key}": value})
            try:
                winner = best(weigh(other, part.layout.world_size, hardware, used.rates)[0])
            except ConfigError:
                continue
            if winner.step is None:
                continue
            saved = 1 - winner.seconds_per_token * part.tokens_per_second
            if saved > 0.05:
                now = f" (chosen: {winner.layout.recompute})" if key == "gradient_checkpointing" else ""
                yield (
                    f"distributed.{key}={shown or value}{now}: {saved:.0%} less time, "
                    f"{part.run.days * (1 - saved):,.3g} days instead of {part.run.days:,.3g}, in "
                    f"{winner.memory.total / GIB:.1f} of {memory.available(hardware, winner.layout) / GIB:.1f} GiB."
                )
    for part in parts:
        run = part.run
        if run.failures > 1 and run.checkpoint_every_steps > 2 * run.best_checkpoint_steps:
            yield (
                f"checkpoint.every_steps={run.best_checkpoint_steps}: with {run.failures:.1f} failures expected, less "
                f"time is lost than with {run.checkpoint_every_steps:,} steps (Young, Daly)."
            )


def _does_not_fit(
    piece: tuple[str, Recipe], found: Search, hardware: Hardware, gpus: int, used: Calibration, price: float | None
) -> str:
    """Return the error text if no layout fits `piece`: the missing memory, and the three cheapest remedies."""
    name, recipe = piece
    smallest = found.winner
    space = memory.available(hardware, smallest.layout) / GIB
    largest = sorted(smallest.memory.parts().items(), key=lambda part: -part[1])[:3]
    breakdown = ", ".join(f"{part} {value / GIB:.1f}" for part, value in largest)
    lines = [
        f"{name}: no layout fits {gpus} x {hardware.title}: the one with least memory ({name_of(smallest.layout)}) "
        f"needs {smallest.memory.total / GIB:.1f} GiB of {space:.1f} ({breakdown})."
    ]
    ways = sorted(_ways(recipe, hardware, gpus, used, price), key=lambda way: way[0])[:3]
    for dollars, text in ways:
        lines.append(f"  {text}; ${dollars * 1e9:,.4g} per billion tokens")
    if not ways:
        lines.append("  No single change makes it fit. Use a smaller model or many more devices.")
    return "\n".join(lines)


def _ways(
    recipe: Recipe, hardware: Hardware, gpus: int, used: Calibration, price: float | None
) -> Iterator[tuple[float, str]]:
    """Yield changes that make a recipe fit: dollars per token, and the change as text."""
    where, training = recipe.distributed, recipe.training
    length = recipe.sequence_length or 1
    changes: list[tuple[str, Recipe]] = []

    def changed(text: str, keys: dict) -> None:
        changes.append((text, recipe.with_keys(keys)))

    if where.gradient_checkpointing is not None and where.gradient_checkpointing != "full":
        changed("distributed.gradient_checkpointing=full", {"distributed.gradient_checkpointing": "full"})
    if where.strategy == "DDP":
        opened = {
            f"distributed.{axis}": "auto" for axis in ("pipeline_parallel", "expert_parallel", "virtual_pipeline")
        }
        changed("distributed.strategy=FSDP", {"distributed.strategy": "FSDP", **opened})
    if training.gradient_accumulation is not None and isinstance(training.batch_size, int) and training.batch_size > 1:
        times = training.batch_size * training.gradient_accumulation
        keys = {"training.batch_size": 1, "training.gradient_accumulation": times}
        changed(f"training.batch_size=1 and training.gradient_accumulation={times}", keys)
    if where.micro_batch_size not in ("auto", 1):
        changed("distributed.micro_batch_size=1", {"distributed.micro_batch_size": 1})
    open_sizes = ("tensor_parallel", "pipeline_parallel")
    if any(getattr(where, key) != "auto" for key in open_sizes):
        left_open = {f"distributed.{key}": "auto" for key in open_sizes}
        changed("distributed.tensor_parallel and pipeline_parallel=auto", left_open)
    if where.precision == "FP32":
        changed("distributed.precision=BF16", {"distributed.precision": "BF16"})
    if recipe.lora is not None and recipe.quantization is None:
        changed("quantization.bits=4", {"quantization": Quantization()})
    if length % 2 == 0 and length > 512:
        text = f"training.sequence_length={length // 2} (changes the task: shorter rows)"
        changed(text, {"training.sequence_length": length // 2})
    for text, other in changes:
        if (way := _cheapest(other, hardware, gpus, used, price)) is not None:
            yield way[0], f"{text}: {way[1]}"
    for times in (2, 4, 8, 16, 32, 64):
        if (way := _cheapest(recipe, hardware, gpus * times, used, price)) is not None:
            yield way[0], f"--gpus {gpus * times}: {way[1]}"
            break
    for other_hardware in (entry for entry in TABLE.values() if entry.memory_bytes > 1.05 * hardware.memory_bytes):
        rates = calibration.of(other_hardware, where.precision)[0]
        for times in (1, 2, 4, 8):
            if (way := _cheapest(recipe, other_hardware, gpus * times, rates, None)) is not None:
                count = f" --gpus {gpus * times}" if times > 1 else ""
                yield way[0], f"--gpu {other_hardware.name}{count}: {way[1]}"
                break


def _cheapest(
    recipe: Recipe, hardware: Hardware, gpus: int, used: Calibration, price: float | None
) -> tuple[float, str] | None:
    """Return dollars per token and a summary of the best layout, or None if none fits."""
    try:
        winner = best(weigh(recipe, gpus, hardware, used.rates)[0])
    except ConfigError:
        return None
    if winner.step is None:
        return None
    each = hardware.price if price is None else price
    dollars = winner.seconds_per_token * each * (1 if hardware.is_cpu else gpus) / 3600
    return dollars, f"{winner.memory.total / GIB:.1f} GiB, {1 / winner.seconds_per_token:,.0f} tokens/s"
