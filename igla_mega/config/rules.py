"""What must hold between the keys of a recipe: one function a rule, each yielding its breaches in finished words."""

import difflib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator

from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.near import near_divisors, near_multiples
from igla_mega.config.quantities import least_rope_theta, usual_rope_theta
from igla_mega.config.rules_layout import (
    device_has_kernels,
    fp8_has_its_kernels,
    fsdp_is_proved,
    heads_divide_among_context_ranks,
    layers_can_be_recorded,
    pipeline_divides_layers,
    sequence_divides_among_ranks,
    tensor_parallel_divides_model,
    world_fits_layout,
)
from igla_mega.config.schema import Recipe

Rule = Callable[[Recipe], Iterator[str]]

WORTH_SAYING = 0.1
"""A share of dropped visits above which a capacity is remarked on."""
# Weights are written with two or three digits: thirds as 0.33 still add up.


def check(recipe: Recipe, world_size: int | None = None, device: str = "cpu") -> None:
    """Refuse a recipe that breaks a rule.

    Args:
        world_size: ranks it is to run on; None leaves out what needs them.
        device: `cpu` or `cuda`, where it is to run.

    Raises:
        ConfigError: every breach at once.
    """
    if found := breaches(recipe, world_size, device):
        raise ConfigError(*found)


def breaches(recipe: Recipe, world_size: int | None = None, device: str = "cpu") -> list[str]:
    """Return every breach of a recipe, a stage's with its place in front."""
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, not cpu or cuda")
    if recipe.stages is not None:
        found = [*stages_hold_the_model(recipe)]
        for i, stage in enumerate(recipe.stages):
            if i and stage.model is None and stage.base_model is None:
                stage = stage.model_copy(update={"base_model": "the stage before"})
            found += [f"stages.{i}.{breach}" for breach in breaches(stage, world_size, device)]
            if stage.distributed.cuda_graphs and len(recipe.stages) > 1:
                found.append(
                    f"stages.{i}.distributed.cuda_graphs: true beside other stages, whose layers are recorded only "
                    "once a process. Set cuda_graphs=false."
                )
            for key in ("stages", "curriculum"):
                if getattr(stage, key) is not None:
                    found.append(f"stages.{i}.{key}: a stage has no stages of its own. Make each a stage.")
        return found
    found = [breach for rule in RULES for breach in rule(recipe)]
    if world_size is not None:
        found += [*world_fits_layout(recipe, world_size), *device_has_kernels(recipe, device)]
    return found


def stages_hold_the_model(recipe: Recipe) -> Iterator[str]:
    for key in ("model", "base_model"):
        if getattr(recipe, key) is not None:
            yield f"{key}: given beside `stages:`, each of which is a recipe of its own. Move it into the first stage."


def has_a_model(recipe: Recipe) -> Iterator[str]:
    if recipe.model is None and recipe.base_model is None:
        yield "model: missing. Give `model:` (trained from nothing) or `base_model:` (a trained one to start from)."


def heads_fit_hidden_size(recipe: Recipe) -> Iterator[str]:
    if (model := recipe.model) is None:
        return
    if model.head_dim is None and model.hidden_size % model.num_heads:
        yield (
            f"model.num_heads: {model.num_heads} does not divide model.hidden_size {model.hidden_size}. "
            f"Use {near_divisors(model.hidden_size, model.num_heads)}, or set model.head_dim."
        )
    elif model.head_size % 2:
        yield f"model.head_dim: {model.head_size} is odd; rotary positions turn pairs. Use {model.head_size + 1}."
    if model.num_heads % model.num_kv_heads:
        yield (
            f"model.num_kv_heads: {model.num_kv_heads} does not divide model.num_heads {model.num_heads}. "
            f"Use {near_divisors(model.num_heads, model.num_kv_heads)}."
        )


def rope_scaling_bands_are_ordered(recipe: Recipe) -> Iterator[str]:
    if recipe.model is None or (scaling := recipe.model.rope_scaling) is None:
        return
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor: {scaling.low_freq_factor:g} is not below high_freq_factor "
            f"{scaling.high_freq_factor:g}. Llama 3 has 1 and 4."
        )


def rope_theta_reaches_max_position(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    # A trained model's theta is what it was trained with, and a stretched one's wavelengths are not theta's alone.
    if model is None or model.rope_scaling is not None or recipe.base_model is not None:
        return
    needed = least_rope_theta(model.max_position)
    # The fit is good to a factor of 1.5.
    if model.max_position > 8192 and model.rope_theta < needed / 2:
        yield (
            f"model.rope_theta: {model.rope_theta:g} turns too fast for model.max_position {model.max_position}: a "
            f"token could not tell its own kind from noise that far back, which takes about {needed:.1e}. "
            f"Use {usual_rope_theta(model.max_position):g}, or model.rope_scaling for a model of shorter contexts."
        )


def sequence_fits_positions(recipe: Recipe) -> Iterator[str]:
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
    training, length = recipe.training, recipe.sequence_length
    tokens = training.batch_tokens
    if tokens is None:
        return
    if training.gradient_accumulation is not None:
        yield (
            f"training.gradient_accumulation: {training.gradient_accumulation} cannot be kept with batch_size "
            f"{training.batch_size}, which fixes the whole batch. Remove it, or give batch_size in sequences."
        )
    if length is not None and tokens % length:
        yield (
            f"training.batch_size: {training.batch_size} = {tokens} tokens is not a whole number of sequences of "
            f"{length}. Use {near_multiples(length, tokens).replace(' or', ' tokens or')} tokens."
        )


def length_of_run_is_said_once(recipe: Recipe) -> Iterator[str]:
    training = recipe.training
    if training.total_steps is not None and training.epochs is not None:
        yield (
            f"training.epochs: {training.epochs} and training.total_steps {training.total_steps} both say how long the "
            "run is. Keep one; --set training.epochs=null takes the other back."
        )
    said = (training.total_steps, training.epochs, recipe.curriculum)
    in_stage = [section.epochs for section in (recipe.sft, recipe.dpo) if section is not None]
    if not any(said) and not any(in_stage):
        yield "training.total_steps: missing, and so is training.epochs. Give one: how long is the run?"


def warmup_is_said_once(recipe: Recipe) -> Iterator[str]:
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
    training = recipe.training
    if training.min_lr > training.learning_rate:
        yield (
            f"training.min_lr: {training.min_lr:g} is above training.learning_rate {training.learning_rate:g}. "
            f"Use at most {training.learning_rate:g}; a tenth of it is usual."
        )


def local_checkpoints_say_where_and_when(recipe: Recipe) -> Iterator[str]:
    asked = recipe.checkpoint
    if asked.local_every_steps and asked.local_folder is None:
        yield "checkpoint.local_folder: missing, and checkpoint.local_every_steps is given. Name a folder of each node."
    if asked.local_folder is None:
        return
    if not asked.local_every_steps:
        yield "checkpoint.local_every_steps: missing, and checkpoint.local_folder is given. Say how often."
    elif 0 < asked.every_steps <= asked.local_every_steps:
        yield (
            f"checkpoint.local_every_steps: {asked.local_every_steps} is not below checkpoint.every_steps "
            f"{asked.every_steps}. Use at most {max(1, asked.every_steps // 2)}, or leave both local keys out."
        )
    for name in re.findall(r"\{(\w*)\}", re.sub(r"\$\{\w+\}", "", asked.local_folder)):
        if name not in ("node", "host"):
            yield f"checkpoint.local_folder: {{{name}}} stands for nothing. Use {{node}} or {{host}}."


def checkpoint_folders_are_named(recipe: Recipe) -> Iterator[str]:
    asked = recipe.checkpoint
    if asked.local_folder is not None and not asked.local_folder.strip():
        yield "checkpoint.local_folder: empty. Name a folder of each node, or set it to null."
    if asked.remote is not None and not re.fullmatch(r"\w[\w.+-]*://\S.*", asked.remote):
        yield (
            f"checkpoint.remote: {asked.remote!r} is no address. Give one with its kind, such as s3://bucket/run or "
            "file:///backup/run, or set it to null."
        )


def mix_has_sources(recipe: Recipe) -> Iterator[str]:
    mix, sources = recipe.data.mix, recipe.data.sources
    if mix and not any(mix.values()):
        yield f"data.mix: no weight above 0 ({', '.join(mix)}). Give at least one source a weight."
    if not sources:
        return
    for name in mix.keys() - sources.keys():
        yield f"data.sources.{name}: missing; data.mix gives `{name}` a weight of {mix[name]:g}. Give its path."
    for name in sources.keys() - mix.keys() if recipe.form == "text" and not recipe.curriculum else ():
        yield f"data.mix.{name}: missing; data.sources has `{name}`, which would never be read. Give its weight."


def experts_add_up(recipe: Recipe) -> Iterator[str]:
    moe, parallel = recipe.moe, recipe.distributed.expert_parallel
    split, factor = recipe.distributed.expert_tensor_parallel, recipe.training.expert_capacity_factor
    if moe is None:
        if recipe.training.expert_capacity_factor is not None:
            yield "training.expert_capacity_factor: given without `moe:`. Remove it, or give `moe.num_experts`."
        if parallel not in ("auto", 1):
            yield f"distributed.expert_parallel: {parallel} without `moe:`; there are no experts. Use 1 or auto."
        if split > 1:
            yield f"distributed.expert_tensor_parallel: {split} without `moe:`; there are no experts. Use 1."
        return
    if moe.num_experts_per_tok > moe.num_experts:
        yield (
            f"moe.num_experts_per_tok: {moe.num_experts_per_tok} is more than moe.num_experts {moe.num_experts}. "
            f"Use at most {moe.num_experts}."
        )
    if parallel != "auto" and moe.num_experts % parallel:
        yield (
            f"distributed.expert_parallel: {parallel} does not divide moe.num_experts {moe.num_experts}. "
            f"Use {near_divisors(moe.num_experts, parallel)}."
        )
    if recipe.model is not None and recipe.model.intermediate_size % split:
        size = recipe.model.intermediate_size
        yield (
            f"distributed.expert_tensor_parallel: {split} does not divide model.intermediate_size {size}. "
            f"Use {near_divisors(size, split)}."
        )
    if moe.pad_to_capacity:
        if factor is None:
            yield "moe.pad_to_capacity: true without training.expert_capacity_factor, which is what to fill up to."
        if moe.capacity_over != "rank":
            yield (
                f"moe.pad_to_capacity: true with moe.capacity_over {moe.capacity_over}, by which ranks' shares vary. "
                "Use moe.capacity_over=rank, or leave padding out."
            )
        if moe.dispatcher != "alltoall":
            yield f"moe.pad_to_capacity: true with moe.dispatcher {moe.dispatcher}. Use alltoall."


def experts_fit_the_rest(recipe: Recipe) -> Iterator[str]:
    if (moe := recipe.moe) is None:
        return
    where, ewc = recipe.distributed, recipe.memory is not None and recipe.memory.ewc_lambda > 0
    if where.sequence_parallel is False and where.tensor_parallel not in ("auto", 1):
        yield (
            f"distributed.sequence_parallel: false with `moe:` and tensor_parallel {where.tensor_parallel}, whose "
            "ranks would each send the same tokens to the experts. Use true or auto."
        )
    if where.expert_tensor_parallel > 1:
        for key in ("lora", "quantization"):
            if getattr(recipe, key) is not None:
                yield f"distributed.expert_tensor_parallel: {where.expert_tensor_parallel} beside `{key}:`. Use 1."
        if where.strategy == "FSDP":
            yield (
                f"distributed.expert_tensor_parallel: {where.expert_tensor_parallel} with strategy FSDP is not proved "
                "to train exactly, so it is refused. Use 1, or strategy DDP."
            )
    if ewc and moe.capacity_over == "global" and recipe.training.expert_capacity_factor is not None:
        yield (
            "moe.capacity_over: global beside EWC, whose Fisher is of one sequence at a time. Use sequence, or leave "
            "training.expert_capacity_factor out."
        )
    for key in ("expert_parallel", "tensor_parallel"):
        size = getattr(where, key)
        if where.strategy == "FSDP" and ewc and size not in ("auto", 1):
            yield (
                f"distributed.{key}: {size} with strategy FSDP, `moe:` and EWC, whose Fisher is not proved there. "
                "Use 1, or strategy DDP."
            )


def expected_drop_rate(moe: Moe, capacity_factor: float, num_tokens: int) -> float:
    """Share of visits that find no room when every expert is as likely as any other.

    Args:
        num_tokens: among which the fair share is measured.
    """
    share = moe.num_experts_per_tok / moe.num_experts
    fair, room = num_tokens * share, math.ceil(num_tokens * share * capacity_factor)
    deviation = math.sqrt(num_tokens * share * (1 - share)) or 1e-9
    z = (room - fair) / deviation
    density, beyond = math.exp(-z * z / 2) / math.sqrt(2 * math.pi), math.erfc(z / math.sqrt(2)) / 2
    return deviation * (density - z * beyond) / fair


def warnings(recipe: Recipe) -> list[str]:
    """Return a sentence for each thing that a recipe may ask for and will probably regret."""
    moe, factor, length = recipe.moe, recipe.training.expert_capacity_factor, recipe.sequence_length
    said = []
    if moe is not None and factor is not None and length is not None:
        rate = expected_drop_rate(moe, factor, length)
        if rate > WORTH_SAYING:
            said.append(
                f"training.expert_capacity_factor: {factor:g} drops about {rate:.0%} of the tokens' visits even when "
                f"the experts are equally busy; {1 if factor < 1 else 2:g} or more is usual, null drops none."
            )
    if moe is not None and moe.num_experts > moe.num_experts_per_tok == 1 and not moe.pre_softmax:
        said.append(
            "moe.num_experts_per_tok: 1 gives the one expert a weight of 1 whatever the router says: the router learns "
            "from the balancing loss alone. Use 2, or moe.pre_softmax=true."
        )
    if moe is not None and moe.force_balanced:
        said.append("moe.force_balanced: tokens go to experts in turn; this measures speed and trains nothing of use.")
    return said


def features_go_together(recipe: Recipe) -> Iterator[str]:
    if recipe.quantization is not None and recipe.lora is None:
        yield "quantization: given without `lora:`; quantized weights are frozen and nothing would train. Add `lora:`."
    if recipe.sft is not None and recipe.dpo is not None:
        yield "dpo: given beside `sft:` in one run. Make them two `stages:`."
    for section in ("lora", "dpo"):
        if getattr(recipe, section) is not None and recipe.base_model is None and recipe.sft is None:
            yield f"{section}: given without `base_model:`; it tunes a trained model. Name one."
    form = recipe.data.format
    if form == "preference_pairs" and recipe.dpo is None:
        yield "data.format: preference_pairs without `dpo:`, which learns from them. Add `dpo:`, or use instructions."
    for section, own in (("sft", "instructions"), ("dpo", "preference_pairs")):
        if getattr(recipe, section) is not None and form not in ("text", own):
            yield f"data.format: {form} beside `{section}:`, which reads {own}. Use {own}, or leave it out."
    if recipe.dpo is not None and recipe.dpo.reference == "adapter" and recipe.lora is None:
        yield "dpo.reference: adapter without `lora:`; there is none to turn off. Use cached or model."
    if recipe.form == "text":
        return
    if recipe.data.mix:
        yield f"data.mix: given beside {recipe.form}, which are all read alike. Remove it."
    for section in ("curriculum", "continual"):
        if getattr(recipe, section) is not None:
            yield f"{section}: given beside {recipe.form}; its phases are of text. Remove one."


def phases_are_learnable(recipe: Recipe) -> Iterator[str]:
    if recipe.curriculum is None:
        return
    phases, training, model = recipe.curriculum.phases, recipe.training, recipe.model
    for key in ("total_steps", "epochs"):
        if (said := getattr(training, key)) is not None:
            yield f"training.{key}: {said} beside curriculum.phases, whose tokens say how long the run is. Remove it."
    names = [phase.name for phase in phases]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"curriculum.phases: {names.count(name)} are named {name}. Name each otherwise; `data` is what it reads."
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
    if (memory := recipe.memory) is None:
        return
    section = "continual" if memory is recipe.continual else "koshey"
    if memory.base_data is not None:
        yield from _source_is_known(recipe, f"{section}.base_data", memory.base_data)
    for key in ("fisher", "base_data"):
        if getattr(memory, key) is not None and recipe.base_model is None:
            yield f"{section}.{key}: given without `base_model:`, which it is of. Remove it, or name the base model."
    if memory.fisher is not None and memory.base_data is not None and section == "koshey":
        yield "koshey.base_data: not read beside koshey.fisher. Keep one."
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
            "Set both alike, or koshey.ewc_enabled=false."
        )
    if koshey is not None and koshey.consolidate_every is not None and recipe.curriculum is not None:
        yield (
            f"koshey.consolidate_every: {koshey.consolidate_every} beside curriculum.phases, at whose ends the "
            "Fisher is taken. Remove one."
        )
    if continual is not None and recipe.curriculum is not None and recipe.data.validation_fraction == 0:
        yield (
            "data.validation_fraction: 0 leaves nothing to measure forgetting on, after each phase of `continual:`. "
            "Use 0.01, or more for small sources."
        )


def _source_is_known(recipe: Recipe, place: str, source: str) -> Iterator[str]:
    sources = recipe.data.sources
    if source == "mix" and "mix" not in sources:
        # With no data at all, `train` says so, and the laptop scale makes some.
        if sources and not recipe.data.mix:
            yield f"{place}: mix, and data.mix gives no source a weight. Give it some, or name a source."
    elif sources and source not in sources:
        near = difflib.get_close_matches(source, sources, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known are {', '.join(sources)}."
        yield f"{place}: {source} is not in data.sources; {hint}"


def evaluation_has_what_it_reads(recipe: Recipe) -> Iterator[str]:
    evaluation, length = recipe.evaluation, recipe.sequence_length
    if (needle := evaluation.needle) is not None:
        if recipe.form != "text":
            yield (
                f"evaluation.needle: hides a fact in held-out text, and this recipe learns {recipe.form}. "
                "Leave it out, or ask for evaluation.tasks or evaluation.prompts."
            )
        if recipe.data.validation_fraction == 0:
            yield (
                "evaluation.needle: hides a fact in held-out text, and data.validation_fraction 0 holds none out. "
                "Set data.validation_fraction=0.01, or leave it out."
            )
        for tokens in needle.lengths or ():
            if length is not None and tokens > length:
                yield (
                    f"evaluation.needle.lengths: {tokens} is longer than training.sequence_length {length}. "
                    f"Use at most {length}."
                )
    for text in evaluation.prompts:
        if not text.strip():
            yield f"evaluation.prompts: {text!r} is no text to continue. Write one, or remove it."
    tasks = evaluation.tasks
    if tasks is not None and (twice := {name for name in tasks.names if tasks.names.count(name) > 1}):
        yield f"evaluation.tasks.names: {', '.join(sorted(twice))} is there twice. Remove one."


FP8_CAPABILITY = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Compute capability from which on a GPU has the products of an FP8 recipe."""


RULES: list[Rule] = [
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
    mix_has_sources,
    experts_add_up,
    experts_fit_the_rest,
    features_go_together,
    phases_are_learnable,
    memory_has_something_to_hold,
    tensor_parallel_divides_model,
    pipeline_divides_layers,
    sequence_divides_among_ranks,
    heads_divide_among_context_ranks,
    fsdp_is_proved,
    evaluation_has_what_it_reads,
    fp8_has_its_kernels,
    layers_can_be_recorded,
]


def not_yet(recipe: Recipe) -> list[str]:
    """Return a sentence for each thing that a recipe asks for and `train` cannot do yet."""
    sentences = []
    for asked, key, what, way_out in _not_built(recipe):
        if asked:
            sentences.append(f"{key}: {what} not built yet, so `train` cannot run this recipe; {way_out}.")
    for i, stage in enumerate(recipe.stages or ()):
        sentences += [f"stages.{i}.{sentence}" for sentence in not_yet(stage)]
    return sentences


def not_installed(recipe: Recipe) -> list[str]:
    """Return a sentence for each package that a recipe's run needs and that is not here."""
    asks = any(part.evaluation.tasks is not None for part in (recipe, *(recipe.stages or ())))
    if not asks or importlib.util.find_spec("lm_eval") is not None:
        return []
    return [
        "evaluation.tasks: lm-evaluation-harness is not installed. Run `pip install 'igla-mega[eval]'`, or leave "
        "evaluation.tasks out."
    ]


def _not_built(recipe: Recipe) -> Iterator[tuple[bool, str, str, str]]:
    koshey = recipe.koshey
    if (codes := recipe.quantization) is not None:
        other = (codes.bits, codes.quant_type) != (4, "nf4")
        yield other, "quantization", f"{codes.bits} bits of {codes.quant_type} are", "use 4 bits of nf4"
    held = recipe.memory is not None and recipe.lora is not None
    yield held, "lora", "holding adapters by EWC is", "set lora=null, or leave EWC out"
    if koshey is not None:
        word, what = "dynamic_batching", "token-budget batching is"
        yield koshey.dynamic_batching, f"koshey.{word}", what, f"set koshey.{word}=false to train without it"
