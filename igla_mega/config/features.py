"""The sections that ask for a feature; a recipe without one does without the feature.

Units and ranges are in the docstring below each field.
"""

from typing import Annotated, Literal

from pydantic import Field

from igla_mega.config.quantities import BelowOne, Count, Fraction, NonNegative, Positive, Tokens
from igla_mega.config.section import Section


class Memory(Section):
    """How weights that earlier tasks need are held (Elastic Weight Consolidation)."""

    ewc_lambda: NonNegative = 0.0
    """Stiffness of the pull to earlier tasks, against a Fisher per token. Dimensionless, at least 0; 0 disables.
    Typical 1e2 to 1e5."""
    fisher_samples: Count = 1000
    """Sequences that the Fisher information of a task is estimated from. At least 1."""
    fisher_seq_length: Count | None = None
    """Tokens of each of them. At least 1; unset, the training's."""
    fisher_labels: Literal["model", "data"] = "model"
    """Whose next tokens: drawn from the model (the Fisher information), or the data's own (the empirical one)."""
    fisher: str | None = None
    """Folder that `igla-mega fisher` wrote for the base model; unset, it is taken on `base_data`."""
    base_data: str | None = None
    """What the base model was trained on: a key of `data.sources`, or `mix` for `data.mix`."""
    coupling: Literal["coupled", "decoupled", "proximal"] = "coupled"
    """Where the pull enters: the gradient before clipping, after clipping, or a step of its own after AdamW's."""
    consolidation: Literal["online", "separate", "laplace"] = "online"
    """How the Fisher of several tasks are joined: decayed by `gamma` about the newest weights, each about its own
    weights, or summed about the newest."""
    gamma: Fraction = 1.0
    """What `online` leaves of earlier tasks at each new one. 0 to 1."""
    damping: NonNegative = 0.0
    """Added to every Fisher value, as a multiple of their mean: holds what the samples never touched. At least 0."""


class Koshey(Memory):
    """Long context and memory of earlier tasks. `tier` names presets; a key given here wins over its tier."""

    tier: Annotated[Count, Field(le=10)] | None = None
    """Preset, 1 to 10, cumulative. 1-3 bf16, recompute and flash attention; 4-6 adds ring attention, EWC and sequence
    parallelism; 7-9 adds MoE, continual learning and token-budget batches; 10 all."""
    flash_attention: bool = True
    """Attention that never holds the sequence x sequence scores."""
    ring_attention: bool = False
    """Splits each sequence over `distributed.context_parallel` ranks."""
    ewc_enabled: bool = False
    """Pulls the weights to where the previous task left them (Elastic Weight Consolidation)."""
    consolidate_every: Tokens | None = None
    """Tokens after which the Fisher is taken anew and the anchor moved. At least 1; unset, only at the end."""
    dynamic_batching: bool = False
    """Fills each micro-batch to a budget of tokens instead of a number of sequences."""


class Lora(Section):
    """Low-rank adapters: only they train (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Count
    """Rank of each adapter, in dimensions. At least 1."""
    alpha: Positive
    """Scale: an adapter's output is multiplied by alpha / rank. Above 0."""
    dropout: BelowOne = 0.0
    """Probability that an adapter's input is dropped. 0 to below 1."""
    target_modules: tuple[Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...] = (
        "q_proj",
        "v_proj",
    )
    """Linear layers that get an adapter, by their Hugging Face names."""
    use_rslora: bool = False
    """Multiplies an adapter's output by alpha / sqrt(rank) instead (Kalajdzievski 2023, arXiv:2312.03732)."""
    use_dora: bool = False
    """Trains the norm of each output's weights apart from their direction (Liu et al. 2024, arXiv:2402.09353)."""
    adapter: str | None = None
    """Adapters to start from: a folder that PEFT saved; unset, new ones."""


class Quantization(Section):
    """How the frozen base model is stored (QLoRA: Dettmers et al. 2023, arXiv:2305.14314)."""

    bits: Literal[4, 8] = 4
    """Bits a weight. 4 or 8."""
    quant_type: Literal["nf4", "fp4", "int8"] = "nf4"
    """Code of a weight."""
    double_quant: bool = True
    """Quantizes the scales too; saves about 0.4 bits a weight."""
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type that products are taken in."""


class Dpo(Section):
    """Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290)."""

    beta: Positive = 0.1
    """Strength of the pull to the reference model. Dimensionless, above 0. Typical 0.01 to 0.5."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Loss of a pair's margin."""
    label_smoothing: Annotated[BelowOne, Field(lt=0.5)] = 0.0
    """Probability that a preference is the wrong way round. 0 to below 0.5."""
    reference_free: bool = False
    """Leaves the reference model out."""
    reference: Literal["auto", "adapter", "model", "cached"] = "auto"
    """Where the reference's log-probabilities come from: the model with its adapters off, a second model that is
    frozen, or one pass over all pairs before the first step. `auto` is `adapter` with `lora:`, else `cached`."""
    learning_rate: Positive | None = None
    """Peak learning rate of this stage, per step, above 0; unset, `training.learning_rate`."""
    batch_size: Count | None = None
    """Pairs in the whole batch, at least 1; unset, `training.batch_size`."""
    epochs: Count | None = None
    """Passes over the pairs, at least 1; unset, `training.epochs`."""
    data: str | None = None
    """Name of the preference pairs: a key of `data.sources`, or a path."""


class Sft(Section):
    """Supervised fine-tuning on instructions."""

    learning_rate: Positive | None = None
    """Peak learning rate of this stage, per step, above 0; unset, `training.learning_rate`."""
    batch_size: Count | None = None
    """Sequences in the whole batch, at least 1; unset, `training.batch_size`."""
    epochs: Count | None = None
    """Passes over the instructions, at least 1; unset, `training.epochs`."""
    data: str | None = None
    """Name of the instructions: a key of `data.sources`, or a path."""


class Moe(Section):
    """Mixture of experts in place of each layer's feed-forward network."""

    num_experts: Count
    """Experts a layer. At least 1."""
    num_experts_per_tok: Count = 2
    """Experts that a token visits. 1 to `num_experts`."""
    router_aux_loss_coef: NonNegative = 0.01
    """Weight of each layer's loss that keeps the experts equally busy, 1 when they are (Fedus et al. 2021,
    arXiv:2101.03961, eq. 4-6). Dimensionless, at least 0."""
    balance_over: Literal["micro_batch", "sequence"] = "micro_batch"
    """Tokens among which that loss wants experts equally busy: a micro-batch's, or each sequence's."""
    bias_update_rate: NonNegative = 0.0
    """Step of a bias on each expert's score that only chooses, up where it has too few tokens and down where too many
    (Wang et al. 2024, arXiv:2408.15664). A logit's size, at least 0; 0 disables. Typical 1e-3."""
    pre_softmax: bool = False
    """Weighs a token's experts by their probabilities among all experts, instead of among those it visits."""
    scaling_factor: Positive = 1.0
    """Multiplies the sum of a token's experts (DeepSeek-AI 2024, arXiv:2405.04434). Above 0."""
    shared_intermediate_size: Count | None = None
    """Width of an expert that every token visits too, in channels. At least 1; unset, none."""
    capacity_over: Literal["sequence", "rank", "global"] = "sequence"
    """Tokens among which `training.expert_capacity_factor` measures a fair share: each sequence's, a rank's share of a
    micro-batch, or that micro-batch of all data-parallel ranks together. Only `sequence` is the same in any layout."""
    pad_to_capacity: bool = False
    """Fills each expert's tokens up to its capacity, so that no size depends on the data (capacity_over: rank)."""
    dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens reach experts on other ranks: only those that are sent (alltoall), all (allgather), DeepEP (flex)."""
    force_balanced: bool = False
    """Sends tokens to experts in turn, whatever the router says: for measuring speed, never for training."""
    alarm_load: Fraction = 0.1
    """An expert with less than this multiple of its fair share of tokens is reported as starving. 0 to 1."""
    alarm_drop_rate: Fraction = 0.2
    """A layer that drops more than this share of its tokens' visits is reported. 0 to 1."""


class Continual(Memory):
    """Learning domains one after another without forgetting (Kirkpatrick et al. 2017, arXiv:1612.00796)."""

    method: Literal["ewc"] = "ewc"
    """What holds earlier domains back."""
    ewc_lambda: NonNegative = 5000.0
    """Stiffness of the pull to earlier phases, against a Fisher per token. Dimensionless, at least 0; 0 disables.
    Typical 1e2 to 1e5."""
    replay: BelowOne = 0.0
    """Share of each batch that is drawn from earlier domains, alike from each. 0 to below 1."""


class Phase(Section):
    """One domain of a curriculum."""

    name: str
    """Name of the domain: a key of `data.sources`, unless `data` names another."""
    tokens: Tokens
    """Tokens trained on, at least 1: `10B` is 1e10. Rounded up to whole batches."""
    lr: Positive
    """Peak learning rate of the phase, per step. Above 0."""
    data: str | None = None
    """What is read: a key of `data.sources`, or `mix` for `data.mix`; unset, `name`."""
    sequence_length: Count | None = None
    """Tokens of a training sample in this phase. At least 1; unset, the recipe's."""
    replay: BelowOne | None = None
    """Share of each batch from earlier domains in this phase. 0 to below 1; unset, `continual.replay`."""

    @property
    def source(self) -> str:
        """What is read: a key of `data.sources`, or `mix`."""
        return self.data or self.name


class Curriculum(Section):
    """Domains in the order they are learned."""

    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    """The phases, first to last. At least one."""


class RopeScaling(Section):
    """Llama-3's stretch of the rotary frequencies to contexts longer than those trained on."""

    factor: Positive
    """How many times longer the context becomes. Above 0."""
    low_freq_factor: Positive = 1.0
    """Wavelengths above original_max_position / this are stretched in full. Above 0."""
    high_freq_factor: Positive = 4.0
    """Wavelengths below original_max_position / this are left alone. Above `low_freq_factor`."""
    original_max_position: Count = 8192
    """Context that the base model was trained on, in tokens. At least 1."""
