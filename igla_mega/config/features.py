"""Optional sections of a recipe, each of which enables a feature.

The docstring below each field gives its unit, range and default.
"""

from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field

from igla_mega.config.quantities import BelowOne, Count, Fraction, NonNegative, Positive, Tokens, is_not
from igla_mega.config.section import Section

PromFile = Annotated[
    Annotated[str, Field(pattern=r"^[^\x00]*[^/\x00]\.prom$")], is_not("a path of a file whose name ends in .prom")
]


class Memory(Section):
    """Elastic Weight Consolidation: a pull of the weights to those of earlier tasks (Kirkpatrick et al. 2017)."""

    ewc_lambda: NonNegative = 0.0
    """Strength of the pull to earlier tasks, with the Fisher information per token. Dimensionless, at least 0; 0
    disables. Typical 1e2 to 1e5."""
    fisher_samples: Count = 1000
    """Number of sequences from which the Fisher information of a task is estimated. At least 1."""
    fisher_seq_length: Count | None = None
    """Length of each of these sequences, in tokens. At least 1; unset, that of training."""
    fisher_labels: Literal["model", "data"] = "model"
    """Labels of the Fisher pass: sampled from the model (Fisher information), or those of the data (empirical
    Fisher)."""
    fisher: str | None = None
    """Folder that `igla-mega fisher` wrote for the base model; unset, the Fisher is estimated on `base_data`."""
    base_data: str | None = None
    """Training data of the base model: a key of `data.sources`, or `mix` for `data.mix`. Unset, none."""
    coupling: Literal["coupled", "decoupled", "proximal"] = "coupled"
    """Point at which the pull is applied: to the gradient before clipping (coupled), to the gradient after clipping
    (decoupled), or as a separate step after AdamW (proximal)."""
    consolidation: Literal["online", "separate", "laplace"] = "online"
    """Combination of the Fisher information of several tasks: decayed by `gamma`, anchored at the newest weights
    (online); one anchor per task (separate); or summed, anchored at the newest weights (laplace)."""
    gamma: Fraction = 1.0
    """Factor by which `online` multiplies the Fisher information of earlier tasks at each new task. 0 to 1."""
    damping: NonNegative = 0.0
    """Constant added to every Fisher value, as a multiple of their mean, so that weights unused by the samples are held
    too. At least 0."""


class Koshey(Memory):
    """Long context and EWC. `tier` selects presets; a key given in the recipe takes precedence over its tier."""

    tier: Annotated[Count, Field(le=10)] | None = None
    """Preset, 1 to 10, cumulative: 1-3 bf16, recompute and flash attention; 4-6 adds ring attention, EWC and sequence
    parallelism; 7-9 adds MoE, continual learning and token-budget batches; 10 all of them. Unset, no preset."""
    flash_attention: bool = True
    """True if attention never stores the full sequence x sequence score matrix."""
    ring_attention: bool = False
    """True if each sequence is split over `distributed.context_parallel` ranks."""
    ewc_enabled: bool = False
    """True if the weights are pulled to those after the previous task (Elastic Weight Consolidation)."""
    consolidate_every: Tokens | None = None
    """Number of tokens after which the Fisher is estimated again and the anchor is moved. At least 1; unset, only at
    the end."""
    dynamic_batching: bool = False
    """True if each micro-batch is filled to a budget of tokens instead of a number of sequences."""


Linear = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _all_linear(given: object) -> object:
    """Return the names of all linear layers for `all-linear`, PEFT's word for them; other values unchanged."""
    return get_args(Linear) if given == "all-linear" else given


class Lora(Section):
    """Low-rank adapters, which are trained while all other weights are frozen (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Count
    """Rank of each adapter, in dimensions. At least 1."""
    alpha: Positive
    """Scale of the adapters: their output is multiplied by alpha / rank. Above 0."""
    dropout: BelowOne = 0.0
    """Dropout probability of the input of an adapter. 0 to below 1."""
    target_modules: Annotated[
        tuple[Linear, ...],
        BeforeValidator(_all_linear, json_schema_input_type=Literal["all-linear"] | tuple[Linear, ...]),
    ] = ("q_proj", "v_proj")
    """Hugging Face names of the linear layers that get an adapter; `all-linear` for all of them."""
    use_rslora: bool = False
    """True if the output is multiplied by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """True if the norm of the weights of each output is trained separately from their direction (Liu et al. 2024,
    arXiv:2402.09353)."""
    adapter: str | None = None
    """Folder of adapters to start from, as saved by PEFT; unset, new adapters."""


class Quantization(Section):
    """Quantization of the frozen base model (QLoRA: Dettmers et al. 2023, arXiv:2305.14314)."""

    bits: Literal[4, 8] = 4
    """Number of bits per weight. 4 or 8."""
    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Data type of a quantized weight."""
    double_quant: bool = True
    """True if the scales are quantized too, which saves about 0.4 bits per weight."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of matrix products."""


class Dpo(Section):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: Positive = 0.1
    """Strength of the pull to the reference model. Dimensionless, above 0. Typical 0.01 to 0.5."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss as a function of the margin of a pair."""
    label_smoothing: Annotated[BelowOne, Field(lt=0.5)] = 0.0
    """Assumed probability that chosen and rejected answer are swapped. 0 to below 0.5."""
    reference_free: bool = False
    """True if no reference model is used."""
    reference: Literal["auto", "adapter", "model", "cached"] = "auto"
    """Source of the reference log-probabilities: the model with its adapters disabled (adapter), a second, frozen model
    (model), or one pass over all pairs before the first step (cached). `auto` is `adapter` with `lora:`, else
    `cached`."""
    learning_rate: Positive | None = None
    """Peak learning rate of this stage, per step, above 0; unset, `training.learning_rate`."""
    batch_size: Count | None = None
    """Number of pairs per step over all ranks. At least 1; unset, `training.batch_size`."""
    epochs: Count | None = None
    """Number of passes over the pairs. At least 1; unset, `training.epochs`."""
    data: str | None = None
    """Source of the preference pairs: a key of `data.sources`, or a path. Unset, all sources."""


class Sft(Section):
    """Supervised fine-tuning on instructions."""

    learning_rate: Positive | None = None
    """Peak learning rate of this stage, per step, above 0; unset, `training.learning_rate`."""
    batch_size: Count | None = None
    """Number of sequences per step over all ranks. At least 1; unset, `training.batch_size`."""
    epochs: Count | None = None
    """Number of passes over the instructions. At least 1; unset, `training.epochs`."""
    data: str | None = None
    """Source of the instructions: a key of `data.sources`, or a path. Unset, all sources."""


class Moe(Section):
    """Mixture of experts, which replaces the feed-forward network of each layer."""

    num_experts: Count
    """Number of experts per layer. At least 1."""
    num_experts_per_tok: Count = 2
    """Number of experts per token. 1 to `num_experts`."""
    router_aux_loss_coef: NonNegative = 0.01
    """Weight of the load-balancing loss of each layer, which is 1 if the load is balanced (Fedus et al. 2021,
    arXiv:2101.03961, eq. 4-6). Dimensionless, at least 0."""
    balance_over: Literal["micro_batch", "sequence"] = "micro_batch"
    """Set of tokens over which that loss balances the experts: a micro-batch, or each sequence."""
    bias_update_rate: NonNegative = 0.0
    """Step size of a bias per expert that affects only the routing: up for experts with too few tokens, down for those
    with too many (Wang et al. 2024, arXiv:2408.15664). In logits, at least 0; 0 disables. Typical 1e-3."""
    pre_softmax: bool = False
    """True if the softmax over all experts is taken before the top-k choice, not over the chosen experts after it."""
    scaling_factor: Positive = 1.0
    """Factor on the sum of the expert outputs of a token (DeepSeek-AI 2024, arXiv:2405.04434). Above 0."""
    shared_intermediate_size: Count | None = None
    """Width of an additional expert shared by all tokens, in channels. At least 1; unset, none."""
    capacity_over: Literal["sequence", "rank", "global"] = "sequence"
    """Set of tokens from which `training.expert_capacity_factor` computes the fair share: each sequence, the part of a
    micro-batch on one rank, or a micro-batch over all data-parallel ranks (global). Only `sequence` gives the same
    result in every layout."""
    pad_to_capacity: bool = False
    """True if the tokens of each expert are padded to its capacity, so that no shape depends on the data (requires
    `capacity_over: rank`)."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """Transport of tokens to experts on other ranks: routed tokens only (alltoall), all tokens (allgather), or DeepEP
    (flex)."""
    force_balanced: bool = False
    """True if tokens are routed to the experts in turn, regardless of the router: for speed measurements only."""
    alarm_load: Fraction = 0.1
    """Multiple of its fair share of tokens below which an expert is reported as starved. 0 to 1."""
    alarm_drop_rate: Fraction = 0.2
    """Share of dropped token-expert assignments above which a layer is reported. 0 to 1."""


class Continual(Memory):
    """Continual learning of several domains without forgetting (Kirkpatrick et al. 2017, arXiv:1612.00796)."""

    method: Literal["ewc"] = "ewc"
    """Method against forgetting."""
    ewc_lambda: NonNegative = 5000.0
    """Strength of the pull to earlier phases, with the Fisher information per token. Dimensionless, at least 0; 0
    disables. Typical 1e2 to 1e5."""
    replay: BelowOne = 0.0
    """Share of each batch drawn from earlier domains, equally from each. 0 to below 1."""


class Phase(Section):
    """One domain of a curriculum."""

    name: str
    """Name of the phase, and its source in `data.sources` unless `data` gives another."""
    tokens: Tokens
    """Number of training tokens, at least 1: `10B` is 1e10. Rounded up to whole batches."""
    lr: Positive
    """Peak learning rate of the phase, per step. Above 0."""
    data: str | None = None
    """Source of the phase: a key of `data.sources`, or `mix` for `data.mix`; unset, `name`."""
    sequence_length: Count | None = None
    """Length of a training sequence in this phase, in tokens. At least 1; unset, that of the recipe."""
    replay: BelowOne | None = None
    """Share of each batch drawn from earlier domains in this phase. 0 to below 1; unset, `continual.replay`."""

    @property
    def source(self) -> str:
        """Source of the phase: a key of `data.sources`, or `mix`."""
        return self.data or self.name


class Curriculum(Section):
    """Domains in the order in which they are learned."""

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    """Phases, first to last. At least one."""


class RopeScaling(Section):
    """Llama 3 scaling of the rotary frequencies to contexts longer than those in training."""

    factor: Positive
    """Factor by which the context is extended. Above 0."""
    low_freq_factor: Positive = 1.0
    """Divisor of `original_max_position`: wavelengths above the quotient are scaled by `factor`. Above 0."""
    high_freq_factor: Positive = 4.0
    """Divisor of `original_max_position`: wavelengths below the quotient are unchanged. Above `low_freq_factor`."""
    original_max_position: Count = 8192
    """Context length of the base model in training, in tokens. At least 1."""


EVENTS = (
    "started", "resumed", "saved", "save_failed", "evaluated", "spike", "skipped", "rewound", "straggler", "damaged",
    "repaired", "lines_missing", "recipe_changed", "change_accepted",
    "hang", "killed", "died", "restarting", "failed", "stopping", "finished",
)  # fmt: skip
"""Kinds of events for which a command can be given."""


class Logging(Section):
    """Destinations of metrics in addition to `metrics.jsonl`."""

    tensorboard: bool = True
    """True if `tensorboard/` is written in the run folder."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mode of Weights & Biases."""
    project: str = "igla-mega"
    """Name of the Weights & Biases project, and of the MLflow experiment."""
    mlflow: Annotated[str, Field(min_length=1)] | None = None
    """Where MLflow keeps the run: `sqlite:///mlflow.db`, `file:mlruns`, or the address of a server; unset, nowhere."""
    prometheus: PromFile | None = None
    """Path of a file ending in .prom for the textfile collector of Prometheus' node_exporter; unset, none."""
    on_event: dict[str, Annotated[tuple[str, ...], Field(min_length=1)]] = Field(
        default={}, json_schema_extra={"propertyNames": {"enum": list(EVENTS)}}
    )
    """Command for each kind of event, as a list of words; it runs without a shell, with IGLA_EVENT, IGLA_STEP,
    IGLA_MESSAGE, IGLA_TIME and IGLA_RUN in its environment, for at most 30 seconds. Empty, none."""
