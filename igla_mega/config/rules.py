"""Constraints between the keys of a recipe: one function per rule, which yields an error text for each breach."""

import difflib
import re
from collections.abc import Callable, Iterator

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import EVENTS
from igla_mega.config.names import name_error, printable
from igla_mega.config.near import near_divisors, near_multiples
from igla_mega.config.quantities import least_rope_theta, usual_rope_theta
from igla_mega.config.rules_experts import expected_drop_rate, experts_add_up, experts_fit_the_rest
from igla_mega.config.rules_layout import (
    device_has_kernels,
    fp8_has_its_kernels,
    fsdp_is_proved,
    heads_divide_among_context_ranks,
    layers_can_be_recorded,
    pipeline_divides_layers,
    quantized_blocks_stay_on_a_rank,
    sequence_divides_among_ranks,
    tensor_parallel_divides_model,
    world_fits_layout,
)
from igla_mega.config.schema import Recipe

Rule = Callable[[Recipe], Iterator[str]]

WORTH_SAYING = 0.1
"""Share of dropped token-expert assignments above which a warning about the capacity is given."""


def check(recipe: Recipe, world_size: int | None = None, device: str = "cpu") -> None:
    """Refuse a recipe that breaks a rule.

    Args:
        world_size: number of ranks of the run; None skips the rules that depend on it.
        device: device type of the run, `cpu` or `cuda`.

    Raises:
        ConfigError: the recipe breaks at least one rule; the message lists every breach.
    """
    if found := breaches(recipe, world_size, device):
        raise ConfigError(*found)


def breaches(recipe: Recipe, world_size: int | None = None, device: str = "cpu") -> list[str]:
    """Return every breach of a recipe; those of a stage are prefixed with its key, such as `stages.1.`."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, not cpu or cuda")
    if recipe.stages is not None:
        found = [*stages_hold_the_model(recipe)]
        for i, stage in enumerate(recipe.stages):
            # A later stage continues from the previous one, so it needs no model. A placeholder satisfies the rules.
            if i and stage.model is None and stage.base_model is None:
                stage = stage.model_copy(update={"base_model": "the stage before"})
            found += [f"stages.{i}.{breach}" for breach in breaches(stage, world_size, device)]
            if stage.distributed.cuda_graphs and len(recipe.stages) > 1:
                found.append(
                    f"stages.{i}.distributed.cuda_graphs: true with several stages, but layers are recorded only "
                    "once per process. Set cuda_graphs=false."
                )
            for key in ("stages", "curriculum"):
                if getattr(stage, key) is not None:
                    found.append(f"stages.{i}.{key}: not allowed within a stage. Make each a stage.")
        return found
    found = [breach for rule in RULES for breach in rule(recipe)]
    if world_size is not None:
        found += [*world_fits_layout(recipe, world_size), *device_has_kernels(recipe, device)]
    return found


def stages_hold_the_model(recipe: Recipe) -> Iterator[str]:
    """Refuse a model next to `stages:`: the first stage has it."""
    for key in ("model", "base_model"):
        if getattr(recipe, key) is not None:
            yield f"{key}: given next to `stages:`, each of which is a complete recipe. Move it into the first stage."


def names_can_be_files(recipe: Recipe) -> Iterator[str]:
    """Names become folders, files and lines of a terminal, so one rule holds for all of them."""
    named = [("name", recipe.name)] if recipe.name else []
    named += [(f"data.sources.{name}", name) for name in recipe.data.sources]
    named += [(f"data.mix.{name}", name) for name in recipe.data.mix if name not in recipe.data.sources]
    if recipe.curriculum is not None:
        named += [(f"curriculum.phases.{i}.name", phase.name) for i, phase in enumerate(recipe.curriculum.phases)]
    for i, stage in enumerate(recipe.stages or ()):
        named += [(f"stages.{i}.name", stage.name)] if stage.name else []
        named += [(f"stages.{i}.data.sources.{name}", name) for name in stage.data.sources]
    for place, name in named:
        if (error := name_error(name)) is not None:
            yield f"{printable(place)}: {name!a} {error}."


def commands_have_an_event(recipe: Recipe) -> Iterator[str]:
    """Refuse a command for a kind of event that no run writes."""
    for kind in recipe.logging.on_event:
        if kind not in EVENTS:
            near = difflib.get_close_matches(kind, EVENTS, 1)
            remedy = f"; did you mean `{near[0]}`?" if near else f". Use one of: {', '.join(EVENTS)}."
            yield f"logging.on_event.{printable(kind)}: no such event{remedy}"


def has_a_model(recipe: Recipe) -> Iterator[str]:
    """Require a model or a base model."""
    if recipe.model is None and recipe.base_model is None:
        yield "model: missing. Give `model:` (to train from random weights) or `base_model:` (to tune a trained model)."


def heads_fit_hidden_size(recipe: Recipe) -> Iterator[str]:
    """Require that query heads divide the hidden size, and key-value heads the query heads."""
    if (model := recipe.model) is None:
        return
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (
            f"model.num_heads: {model.num_heads} does not divide model.hidden_size {model.hidden_size}. "
            f"Use {near_divisors(model.hidden_size, model.num_heads)}, or set model.head_dim."
        )
    elif model.head_size % 2:
        yield f"model.head_dim: {model.head_size} is odd, but rotary positions rotate pairs. Use {model.head_size + 1}."
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads: {model.num_kv_heads} does not divide model.num_heads {model.num_heads}. "
            f"Use {near_divisors(model.num_heads, model.num_kv_heads)}."
        )


def rope_scaling_bands_are_ordered(recipe: Recipe) -> Iterator[str]:
    """Require that the two wavelength bounds of the Llama 3 scaling are ordered."""
    if recipe.model is None or (scaling := recipe.model.rope_scaling) is None:
        return
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor: {scaling.low_freq_factor:g} is not below high_freq_factor "
            f"{scaling.high_freq_factor:g}. Llama 3 uses 1 and 4."
        )


def rope_theta_reaches_max_position(recipe: Recipe) -> Iterator[str]:
    """Refuse a rotary base far too small for the context of a model trained from random weights."""
    model = recipe.model
    # A trained model keeps the theta of its training, and with scaling theta alone does not define the wavelengths.
    if model is None or model.rope_scaling is not None or recipe.base_model is not None:
        return
    needed = least_rope_theta(model.max_position)
    # The fit is accurate to a factor of 1.5 only, so refuse from a factor of 2 on.
    if model.max_position > 8192 and model.rope_theta < needed / 2:
        yield (
            f"model.rope_theta: {model.rope_theta:g} is too small for model.max_position {model.max_position}: "
            f"attention cannot distinguish similar tokens from noise at that distance, which needs about {needed:.1e}. "
            f"Use {usual_rope_theta(model.max_position):g}, or model.rope_scaling to extend a shorter context."
        )


def sequence_fits_positions(recipe: Recipe) -> Iterator[str]:
    """Require that sequences fit the positions of the model, and prompts leave room for an answer."""
    length = recipe.sequence_length
    if recipe.model is not None and length is not None and length > recipe.model.max_position:
        key = "training.sequence_length" if recipe.training.sequence_length else "data.max_length"
        yield (
            f"{key}: {length} is longer than model.max_position {recipe.model.max_position}. "
            f"Use at most {recipe.model.max_position}, or raise model.max_position."
        )
    data = recipe.data
    if data.max_length and data.max_prompt_length and data.max_prompt_length >= data.max_length:
        yield (
            f"data.max_prompt_length: {data.max_prompt_length} leaves no room for an answer in data.max_length "
            f"{data.max_length}. Use at most {data.max_length - 1}."
        )


def batch_is_whole_sequences(recipe: Recipe) -> Iterator[str]:
    """Require that a batch in tokens is a whole number of sequences and fixes no micro-batch count."""
    training, length = recipe.training, recipe.sequence_length
    tokens = training.batch_tokens
    if tokens is None:
        return
    if training.gradient_accumulation is not None:
        yield (
            f"training.gradient_accumulation: {training.gradient_accumulation} conflicts with batch_size "
            f"{training.batch_size}, which fixes the global batch. Remove it, or give batch_size in sequences."
        )
    row = None if length is None else length * (2 if recipe.form == "preference_pairs" else 1)
    if row is not None and tokens % row:
        what = "sequences" if row == length else "pairs of sequences"
        yield (
            f"training.batch_size: {training.batch_size} = {tokens} tokens is not a whole number of {what} of "
            f"{length}. Use {near_multiples(row, tokens).replace(' or', ' tokens or')} tokens."
        )


def length_of_run_is_said_once(recipe: Recipe) -> Iterator[str]:
    """Require exactly one of steps, epochs and curriculum for the length of the run."""
    training = recipe.training
    if training.total_steps is not None and training.epochs is not None:
        yield (
            f"training.epochs: {training.epochs} and training.total_steps {training.total_steps} both set the "
            "length of the run. Keep one; --set training.epochs=null removes the other."
        )
    lengths = (training.total_steps, training.epochs, recipe.curriculum)
    in_stage = [section.epochs for section in (recipe.sft, recipe.dpo) if section is not None]
    if not any(lengths) and not any(in_stage):
        yield "training.total_steps: missing, and so is training.epochs. Give one of them as the length of the run."


def warmup_is_said_once(recipe: Recipe) -> Iterator[str]:
    """Require that the warm-up is shorter than the run and that its keys agree."""
    training, scheduler = recipe.training, recipe.scheduler
    steps, total = training.warmup_steps, training.total_steps
    if steps is not None and total is not None and steps > total:
        yield (
            f"training.warmup_steps: {steps} is more than training.total_steps {total}. "
            f"Use at most {total}, or --set training.warmup_steps=null."
        )
        return
    for key, ratio in (
        ("training.warmup_ratio", training.warmup_ratio),
        ("scheduler.warmup_ratio", scheduler.warmup_ratio),
    ):
        if steps is not None and total is not None and ratio is not None and abs(steps - ratio * total) > 1:
            yield (
                f"training.warmup_steps: {steps} disagrees with {key} {ratio:g}, which is {round(ratio * total)} of "
                f"{total} steps. Set {key} to {steps / total:.4g}, or remove one of the two."
            )
    ratios = (training.warmup_ratio, scheduler.warmup_ratio)
    if None not in ratios and ratios[0] != ratios[1]:
        yield f"training.warmup_ratio: {ratios[0]:g} disagrees with scheduler.warmup_ratio {ratios[1]:g}. Remove one."


def learning_rate_falls(recipe: Recipe) -> Iterator[str]:
    """Require that the final learning rate does not exceed the peak."""
    training, key, peak = recipe.training, "training", recipe.training.learning_rate
    for section in ("sft", "dpo"):
        if (own := getattr(recipe, section)) is not None and own.learning_rate is not None:
            key, peak = section, own.learning_rate
    if training.min_lr > peak:
        yield (
            f"training.min_lr: {training.min_lr:g} is above {key}.learning_rate {peak:g}. "
            f"Use at most {peak:g}; a tenth of it is usual."
        )


def local_checkpoints_say_where_and_when(recipe: Recipe) -> Iterator[str]:
    """Require that node-local checkpoints have a folder and an interval shorter than that of the others."""
    settings = recipe.checkpoint
    if settings.local_every_steps and settings.local_folder is None:
        yield "checkpoint.local_folder: missing, but checkpoint.local_every_steps is given. Give a folder on each node."
    if settings.local_folder is None:
        return
    if not settings.local_every_steps:
        yield "checkpoint.local_every_steps: missing, but checkpoint.local_folder is given. Give an interval in steps."
    elif 0 < settings.every_steps <= settings.local_every_steps:
        yield (
            f"checkpoint.local_every_steps: {settings.local_every_steps} is not below checkpoint.every_steps "
            f"{settings.every_steps}. Use at most {max(1, settings.every_steps // 2)}, or omit both local keys."
        )
    for name in re.findall(r"\{(\w*)\}", re.sub(r"\$\{\w+\}", "", settings.local_folder)):
        if name not in ("node", "host"):
            yield f"checkpoint.local_folder: {{{name}}} is not a known placeholder. Use {{node}} or {{host}}."


def checkpoint_folders_are_named(recipe: Recipe) -> Iterator[str]:
    """Require that the local folder is not empty and the remote one is a URL."""
    settings = recipe.checkpoint
    if settings.local_folder is not None and not settings.local_folder.strip():
        yield "checkpoint.local_folder: empty. Give a folder on each node, or set it to null."
    if settings.remote is not None and not re.fullmatch(r"\w[\w.+-]*://\S.*", settings.remote):
        yield (
            f"checkpoint.remote: {settings.remote!r} is not a URL. Give one with its scheme, such as s3://bucket/run "
            "or file:///backup/run, or set it to null."
        )


def packing_has_its_mask(recipe: Recipe) -> Iterator[str]:
    """Require a document mask for packing of whole documents."""
    data = recipe.data
    if recipe.form == "text" and data.document_packing == "best_fit" and not data.document_mask:
        yield (
            "data.document_packing: best_fit packs whole documents, which requires data.document_mask. "
            "Set data.document_mask=true."
        )


def mix_has_sources(recipe: Recipe) -> Iterator[str]:
    """Require that the mix and the sources have the same keys, and some weight is above 0."""
    mix, sources = recipe.data.mix, recipe.data.sources
    if mix and not any(mix.values()):
        yield f"data.mix: no weight is above 0 ({', '.join(mix)}). Give at least one source a weight."
    if not sources:
        return
    for name in mix.keys() - sources.keys():
        yield f"data.sources.{name}: missing; data.mix gives `{name}` a weight of {mix[name]:g}. Give its path."
    for name in sources.keys() - mix.keys() if recipe.form == "text" and not recipe.curriculum else ():
        yield f"data.mix.{name}: missing; data.sources has `{name}`, which would never be read. Give its weight."


def warnings(recipe: Recipe) -> list[str]:
    """Return a sentence for each setting of a recipe that is allowed but probably a mistake."""
    moe, factor, length = recipe.moe, recipe.training.expert_capacity_factor, recipe.sequence_length
    sentences = []
    if moe is not None and factor is not None and length is not None:
        rate = expected_drop_rate(moe, factor, length)
        if rate > WORTH_SAYING:
            sentences.append(
                f"training.expert_capacity_factor: {factor:g} drops about {rate:.0%} of the token-expert assignments "
                f"even with a balanced load. Use {1 if factor < 1 else 2:g} or more, or null to drop none."
            )
    if moe is not None and moe.num_experts > moe.num_experts_per_tok == 1 and not moe.pre_softmax:
        sentences.append(
            "moe.num_experts_per_tok: 1 gives the chosen expert a weight of 1 regardless of its score, so the router "
            "learns only from the balancing loss. Use 2, or moe.pre_softmax=true."
        )
    if moe is not None and moe.force_balanced:
        sentences.append(
            "moe.force_balanced: tokens are routed to experts in turn, for speed measurements; the weights are useless."
        )
    for kind, command in recipe.logging.on_event.items():
        sentences.append(f"logging.on_event: the event `{kind}` runs the program {printable(command[0])!a}.")
    return sentences


def features_go_together(recipe: Recipe) -> Iterator[str]:
    """Require the sections that a feature depends on, and refuse those that exclude each other."""
    if recipe.quantization is not None and recipe.lora is None:
        yield "quantization: given without `lora:`; quantized weights are frozen and nothing would train. Add `lora:`."
    if recipe.sft is not None and recipe.dpo is not None:
        yield "dpo: given together with `sft:` in one run. Make them two `stages:`."
    for section in ("lora", "dpo"):
        if getattr(recipe, section) is not None and recipe.base_model is None and recipe.sft is None:
            yield f"{section}: given without `base_model:`, but it tunes a trained model. Give one."
    form = recipe.data.format
    if form == "preference_pairs" and recipe.dpo is None:
        yield "data.format: preference_pairs without `dpo:`, which reads them. Add `dpo:`, or use instructions."
    for section, own in (("sft", "instructions"), ("dpo", "preference_pairs")):
        if getattr(recipe, section) is not None and form not in ("text", own):
            yield f"data.format: {form} with `{section}:`, which reads {own}. Use {own}, or omit data.format."
    if recipe.dpo is not None and recipe.dpo.reference == "adapter" and recipe.lora is None:
        yield "dpo.reference: adapter without `lora:`, so there is no adapter to disable. Use cached or model."
    if recipe.form == "text":
        return
    if recipe.data.mix:
        yield f"data.mix: given with {recipe.form}, which are read without weights. Remove it."
    for section in ("curriculum", "continual"):
        if getattr(recipe, section) is not None:
            yield f"{section}: given with {recipe.form}, but its phases read text. Remove one of them."


def phases_are_learnable(recipe: Recipe) -> Iterator[str]:
    """Require that phases have distinct names, known sources, and lengths that fit model and batch."""
    if recipe.curriculum is None:
        return
    phases, training, model = recipe.curriculum.phases, recipe.training, recipe.model
    for key in ("total_steps", "epochs"):
        if (value := getattr(training, key)) is not None:
            yield f"training.{key}: {value} with curriculum.phases, whose tokens set the length of the run. Remove it."
    names = [phase.name for phase in phases]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"curriculum.phases: {names.count(name)} are named {name}. Use distinct names; `data` gives the source."
    for i, phase in enumerate(phases):
        place, length = f"curriculum.phases.{i}", phase.sequence_length
        yield from _source_is_known(recipe, f"{place}.{'data' if phase.data else 'name'}", phase.source)
        if phase.lr < training.min_lr <= training.learning_rate:
            yield f"{place}.lr: {phase.lr:g} is below training.min_lr {training.min_lr:g}. Lower training.min_lr."
        if length is None:
            continue
        if model is not None and length > model.max_position:
            yield (
                f"{place}.sequence_length: {length} is longer than model.max_position {model.max_position}. "
                f"Use at most {model.max_position}."
            )
        if training.batch_tokens is not None and training.batch_tokens % length:
            yield (
                f"{place}.sequence_length: training.batch_size {training.batch_size} = {training.batch_tokens} tokens "
                f"is not a whole number of sequences of {length}. Use {near_divisors(training.batch_tokens, length)}."
            )


def memory_has_something_to_hold(recipe: Recipe) -> Iterator[str]:
    """Require data and a base model for the Fisher information, and one EWC section without conflict."""
    if (memory := recipe.memory) is None:
        return
    section = "continual" if memory is recipe.continual else "koshey"
    if memory.base_data is not None:
        yield from _source_is_known(recipe, f"{section}.base_data", memory.base_data)
    for key in ("fisher", "base_data"):
        if getattr(memory, key) is not None and recipe.base_model is None:
            yield f"{section}.{key}: given without `base_model:`, to which it refers. Remove it, or set base_model."
    if memory.fisher is not None and memory.base_data is not None and section == "koshey":
        yield "koshey.base_data: ignored if koshey.fisher is given. Keep one of them."
    length, model = memory.fisher_seq_length, recipe.model
    if length is not None and model is not None and length > model.max_position:
        yield (
            f"{section}.fisher_seq_length: {length} is longer than model.max_position {model.max_position}. "
            f"Use at most {model.max_position}."
        )
    koshey, continual = recipe.koshey, recipe.continual
    if koshey and continual and koshey.ewc_enabled and koshey.ewc_lambda != continual.ewc_lambda:
        yield (
            f"koshey.ewc_lambda: {koshey.ewc_lambda:g} disagrees with continual.ewc_lambda {continual.ewc_lambda:g}. "
            "Set both to the same value, or koshey.ewc_enabled=false."
        )
    if koshey is not None and koshey.consolidate_every is not None and recipe.curriculum is not None:
        yield (
            f"koshey.consolidate_every: {koshey.consolidate_every} with curriculum.phases, at whose ends the "
            "Fisher is estimated. Remove one of them."
        )
    if continual is not None and recipe.curriculum is not None and recipe.data.validation_fraction == 0:
        yield (
            "data.validation_fraction: 0 leaves no data to measure forgetting on after each phase of `continual:`. "
            "Use 0.01, or more for small sources."
        )


def _source_is_known(recipe: Recipe, place: str, source: str) -> Iterator[str]:
    """Require that a source is a key of `data.sources`, or `mix` with a weighted mix; `place` is the key with it."""
    sources = recipe.data.sources
    if source == "mix" and "mix" not in sources:
        # Missing data is not a breach here: `train` reports it, and the laptop scale generates some.
        if sources and not recipe.data.mix:
            yield f"{place}: mix, but data.mix gives no source a weight. Give data.mix weights, or name a source."
    elif sources and source not in sources:
        near = difflib.get_close_matches(source, sources, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sources)}."
        yield f"{place}: {source} is not in data.sources; {hint}"


def evaluation_has_what_it_reads(recipe: Recipe) -> Iterator[str]:
    """Require held-out text for the needle test, prompts with text, and distinct tasks."""
    evaluation, length = recipe.evaluation, recipe.sequence_length
    if (needle := evaluation.needle) is not None:
        if recipe.form != "text":
            yield (
                f"evaluation.needle: needs held-out text, but this recipe trains on {recipe.form}. "
                "Remove it, or use evaluation.tasks or evaluation.prompts."
            )
        if recipe.data.validation_fraction == 0:
            yield (
                "evaluation.needle: needs held-out text, but data.validation_fraction is 0. "
                "Set data.validation_fraction=0.01, or remove evaluation.needle."
            )
        for tokens in needle.lengths or ():
            if length is not None and tokens > length:
                yield (
                    f"evaluation.needle.lengths: {tokens} is longer than training.sequence_length {length}. "
                    f"Use at most {length}."
                )
    for text in evaluation.prompts:
        if not text.strip():
            yield f"evaluation.prompts: {text!r} is blank. Give a text to continue, or remove it."
    tasks = evaluation.tasks
    if tasks is not None and (twice := {name for name in tasks.names if tasks.names.count(name) > 1}):
        yield f"evaluation.tasks.names: {', '.join(sorted(twice))} given more than once. Keep one of each."


FP8_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Minimum compute capability of a GPU with matrix products for each FP8 recipe: Ada 8.9, Hopper 9.0, Blackwell 10.0."""


RULES: list[Rule] = [
    names_can_be_files,
    commands_have_an_event,
    has_a_model,
    heads_fit_hidden_size,
    rope_scaling_bands_are_ordered,
    rope_theta_reaches_max_position,
    sequence_fits_positions,
    batch_is_whole_sequences,
    length_of_run_is_said_once,
    warmup_is_said_once,
    learning_rate_falls,
    local_checkpoints_say_where_and_when,
    checkpoint_folders_are_named,
    packing_has_its_mask,
    mix_has_sources,
    experts_add_up,
    experts_fit_the_rest,
    features_go_together,
    phases_are_learnable,
    memory_has_something_to_hold,
    tensor_parallel_divides_model,
    quantized_blocks_stay_on_a_rank,
    pipeline_divides_layers,
    sequence_divides_among_ranks,
    heads_divide_among_context_ranks,
    fsdp_is_proved,
    evaluation_has_what_it_reads,
    fp8_has_its_kernels,
    layers_can_be_recorded,
]


def not_yet(recipe: Recipe) -> list[str]:
    """Return a sentence for each configured feature that `train` does not support yet."""
    sentences = []
    for is_set, key, what, remedy in _not_built(recipe):
        if is_set:
            sentences.append(f"{key}: {what} not supported yet, so `train` cannot run this recipe. {remedy}.")
    for i, stage in enumerate(recipe.stages or ()):
        sentences += [f"stages.{i}.{sentence}" for sentence in not_yet(stage)]
    return sentences


def _not_built(recipe: Recipe) -> Iterator[tuple[bool, str, str, str]]:
    """Yield each unsupported feature: True if it is configured, its key, subject and verb, and the remedy."""
    koshey = recipe.koshey
    if (codes := recipe.quantization) is not None:
        other = (codes.bits, codes.quant_type) != (4, "nf4")
        yield other, "quantization", f"{codes.bits} bits of {codes.quant_type} are", "Use 4 bits of nf4"
    ewc_on_adapters = recipe.memory is not None and recipe.lora is not None
    yield ewc_on_adapters, "lora", "EWC on adapters is", "Set lora=null, or disable EWC"
    if koshey is not None:
        word, what = "dynamic_batching", "token-budget batching is"
        yield koshey.dynamic_batching, f"koshey.{word}", what, f"Set koshey.{word}=false to train without it"
