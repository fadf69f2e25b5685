"""Every knob of a recipe, with its unit and range in the docstring below it. Loading is `load.py`'s.

What spans two sections (`hidden_size` and `tensor_parallel`, a batch and a world) is in `rules.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from igla_mega.config import quantities
from igla_mega.config.features import (
    Continual,
    Curriculum,
    Dpo,
    Koshey,
    Lora,
    Memory,
    Moe,
    Quantization,
    RopeScaling,
    Sft,
)
from igla_mega.config.quantities import (
    BatchSize,
    BelowOne,
    BoolOrAuto,
    Bytes,
    Count,
    CountOrAuto,
    Fraction,
    NonNegative,
    Percent,
    Positive,
    Precision,
    RecomputeOrUnset,
    Tokens,
    Whole,
    is_not,
)
from igla_mega.config.section import Section

PathOrPaths = Annotated[str | tuple[str, ...], is_not("a path or a list of paths")]


class Model(Section):
    """Shape of a Llama-style decoder: RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases."""

    hidden_size: Count
    """Width of the residual stream, in channels. At least 1."""
    num_layers: Annotated[Count, Field(le=10_000)]
    """Transformer layers. At least 1."""
    num_heads: Count
    """Query heads. At least 1."""
    num_kv_heads: Count = Field(default_factory=lambda given: given.get("num_heads", 1))
    """Key and value heads, each shared by num_heads / num_kv_heads query heads. At least 1; unset, `num_heads`."""
    head_dim: Count | None = None
    """Channels of one head, even. At least 2; unset, hidden_size / num_heads."""
    intermediate_size: Count
    """Width of the feed-forward network (of one expert, with `moe`), in channels. At least 1."""
    vocab_size: Count = 32000
    """Token ids, 0 to vocab_size - 1. At least 1."""
    max_position: Count = 8192
    """Longest sequence, in tokens. At least 1."""
    rope_theta: Positive = Field(
        default_factory=lambda given: quantities.usual_rope_theta(given.get("max_position", 0))
    )
    """Base of the rotary wavelengths. Above 0; unset, 1e4 up to 8192 positions, beyond that the power of ten that
    `max_position` needs."""
    rope_scaling: RopeScaling | None = None
    """Llama-3's stretch of the wavelengths; unset, none."""
    tie_embeddings: bool = False
    """Uses the input embedding as output projection too."""
    norm_epsilon: Positive = 1e-5
    """Added to the mean square before its root is taken. Above 0."""
    init_std: Positive = 0.02
    """Standard deviation of initial weights. Above 0."""

    @property
    def head_size(self) -> int:
        """Channels of one head: `head_dim`, or hidden_size / num_heads where that is unset."""
        return self.head_dim or self.hidden_size // self.num_heads

    def num_parameters(self, moe: Moe | None = None) -> int:
        """Return the parameters of the whole model, every expert counted."""
        experts = moe.num_experts if moe else 1
        norms = self.hidden_size * (2 * self.num_layers + 1)
        embedding = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embedding + norms + self.num_layers * self._layer_weights(experts, moe)

    def active_parameters(self, moe: Moe | None = None) -> int:
        """Return the parameters that one token uses: of the experts those it visits, of the embedding all."""
        idle = moe.num_experts - moe.num_experts_per_tok if moe else 0
        return self.num_parameters(moe) - idle * 3 * self.hidden_size * self.intermediate_size * self.num_layers

    def matmul_parameters(self, moe: Moe | None = None) -> int:
        """Return the parameters that one token is multiplied with.

        The output projection counts, the embedding's look-up and the norms do not; of the experts, those visited.
        """
        experts = moe.num_experts_per_tok if moe else 1
        return self.vocab_size * self.hidden_size + self.num_layers * self._layer_weights(experts, moe)

    def _layer_weights(self, experts: int, moe: Moe | None) -> int:
        attention = 2 * self.hidden_size * self.head_size * (self.num_heads + self.num_kv_heads)
        router = self.hidden_size * moe.num_experts if moe else 0
        shared = (moe.shared_intermediate_size or 0) if moe else 0
        return attention + router + 3 * self.hidden_size * (experts * self.intermediate_size + shared)


class Training(Section):
    """How much is learned, how fast, in which steps."""

    learning_rate: Positive = 3e-4
    """Peak learning rate, per step. Above 0."""
    min_lr: NonNegative = 0.0
    """Learning rate at the end of the schedule. 0 to `learning_rate`."""
    batch_size: BatchSize = "4M tokens"
    """Tokens (`4M tokens` is 4 x 2^20) or sequences (`128`) a step, at least 1, over all ranks; sequences together with
    `gradient_accumulation` are per data-parallel rank and micro-batch."""
    gradient_accumulation: Count | None = None
    """Micro-batches a step and data-parallel rank, for `batch_size` in sequences. At least 1; unset, chosen."""
    warmup_steps: Whole | None = None
    """Steps over which the learning rate rises to its peak. At least 0; unset, the ratio's."""
    warmup_ratio: Fraction | None = None
    """The same as a share of all steps, 0 to 1; unset, `scheduler.warmup_ratio`, else 0."""
    total_steps: Count | None = None
    """Optimizer steps of the run. At least 1."""
    epochs: Count | None = None
    """Passes over the data, in place of `total_steps`. At least 1."""
    weight_decay: NonNegative = 0.1
    """Decoupled decay, per unit of learning rate; none on norms. At least 0."""
    gradient_clip: NonNegative = 1.0
    """L2 norm that the whole gradient is scaled down to. At least 0; 0 disables."""
    seed: Whole = 1234
    """Seed of weights and data order. At least 0."""
    sequence_length: Count | None = None
    """Tokens of a training sample. At least 1; unset, `model.max_position`."""
    expert_capacity_factor: Positive | None = None
    """Tokens an expert takes in training, as a multiple of its fair share (`moe.capacity_over`); the least probable
    beyond are dropped. Above 0; unset, none are dropped."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """What is done about a step whose loss or gradient is not finite, and is not either when run again: stop before
    the update; leave the step's samples out; or do so after going back to the last checkpoint."""
    on_spike: Literal["ignore", "warn", "stop", "skip", "rewind"] = "warn"
    """The same about a loss out of all proportion to those before it (`spike_deviations`)."""
    spike_deviations: Positive = 10.0
    """Distance above the median of the last losses at which a loss is a spike, in standard deviations (1.4826 x the
    median distance from the median; at least 1 % of the median). Above 0."""
    spike_window: Count = 100
    """How many last losses that is taken over, in steps of the stage; half as many must be known. At least 1."""
    rewind_skips: Literal["bad_step", "since_checkpoint"] = "bad_step"
    """Whose samples `rewind` leaves out: the bad step's, or those of all steps since the checkpoint."""
    bad_steps_in_a_row: Count = 10
    """Steps left out one after another at which the run stops all the same. At least 1."""

    @property
    def batch_tokens(self) -> int | None:
        """Tokens a step over all ranks; None when `batch_size` counts sequences."""
        return quantities.batch_tokens(self.batch_size)


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    type: Literal["AdamW"] = "AdamW"
    """The optimizer."""
    beta1: BelowOne = 0.9
    """Decay of the mean of gradients, per step. 0 to below 1."""
    beta2: BelowOne = 0.95
    """Decay of the mean of squared gradients, per step. 0 to below 1."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment. Above 0."""
    fused: bool = True
    """Updates all weights in one pass over memory. Gain: 1.07x on 2 CPU cores, on a GPU not yet measured."""


class Scheduler(Section):
    """How the learning rate falls from `learning_rate` to `min_lr` after the warm-up."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the fall; `constant` stays at `learning_rate`."""
    warmup_ratio: Fraction | None = None
    """Warm-up as a share of all steps. 0 to 1."""


class Distributed(Section):
    """Where the model and its batch lie. A size that is `auto` is chosen for the world it runs in."""

    strategy: Literal["FSDP", "DDP"] = "DDP"
    """What data-parallel ranks do with the weights: FSDP shards them, DDP keeps them whole."""
    precision: Precision = "BF16"
    """Type of activations and products; main weights and gradients are fp32 in all. FP8: the products of the layers in
    8 bits by Transformer Engine, the rest in bf16. Gain of BF16: 1.56x on 2 CPU cores; of FP8: not yet measured."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How FP8 scales its numbers: by the tensor's largest now, or by those of steps before (delayed; they are not in
    checkpoints, so that a resumed run differs in rounding), by blocks, or by 32 values (mxfp8, from Blackwell on)."""
    gradient_checkpointing: RecomputeOrUnset = None
    """Computes activations again in the backward pass: none, selective (the feed-forward network), full (true: whole
    layers). Unset, on a GPU the least that fits, on a CPU none."""
    tensor_parallel: CountOrAuto = "auto"
    """Ranks that each matrix is split over. At least 1."""
    pipeline_parallel: CountOrAuto = "auto"
    """Ranks that the layers are split over. At least 1."""
    virtual_pipeline: CountOrAuto = "auto"
    """Model chunks a pipeline rank, for the interleaved schedule. At least 1; `auto` is 1 on a CPU."""
    context_parallel: CountOrAuto = "auto"
    """Ranks that each sequence is split over. At least 1; `auto` is 1 without `koshey.ring_attention`."""
    context_schedule: Literal["auto", "p2p", "allgather", "a2a", "a2a+p2p"] = "auto"
    """How keys and values reach the queries of other context-parallel ranks: round a ring (p2p), all at once
    (allgather), heads exchanged for tokens (a2a), or that within a node and a ring across nodes (a2a+p2p)."""
    pad_sequences: bool = False
    """Fills each sequence up to the multiple of 2 x context_parallel that splitting it needs."""
    expert_parallel: CountOrAuto = "auto"
    """Ranks that the experts are split over, among those of the data, context and tensor axes. At least 1."""
    expert_tensor_parallel: Count = 1
    """Ranks that each expert's matrices are split over: 1, or `tensor_parallel`."""
    micro_batch_size: CountOrAuto = "auto"
    """Sequences a rank takes through the model at once. At least 1."""
    sequence_parallel: BoolOrAuto = "auto"
    """Splits norms and residuals along the sequence over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """Shards the optimizer's state over data-parallel ranks (DDP)."""
    overlap_communication: bool = True
    """On GPUs, sums gradients while the backward pass still runs, and with `distributed_optimizer` gathers weights
    while the forward pass does. Gain: not yet measured."""
    attention: Literal["auto", "flash", "cudnn"] = "auto"
    """On GPUs, whose kernel attends over a rank's own tokens; auto is torch's choice. Gain: not yet measured."""
    cuda_graphs: bool = False
    """On GPUs, replays each layer as one recorded graph instead of launching its kernels. Gain: not yet measured."""
    loss_chunk: CountOrAuto = "auto"
    """Tokens whose logits exist at once. At least 1; `auto` is 256 on a CPU, 4096 on a GPU. Gain over all at once:
    1.06x and a tenth of the memory on 2 CPU cores, on a GPU not yet measured."""
    kernels: Literal["auto", "te", "local", "require"] = "auto"
    """Whose layers: Transformer Engine's (te), ours (local), those that are there (auto), ours with all native ops
    (require)."""
    fused_layers: bool = True
    """One kernel each for norms, SwiGLU and rotary positions. Gain: 1.09x (bf16 1.07x) and a tenth of the memory on 2
    CPU cores, on a GPU not yet measured."""
    keep_freed_memory: bool = False
    """Keeps freed memory in the process instead of returning its pages (CPU, glibc). Gain: 1.03x on 2 cores."""
    timeout_seconds: Count = 600
    """Seconds a rank waits for its peers before the run ends. At least 1."""
    hang_seconds: Whole = 60
    """Seconds without any progress of any rank after which a run is ended, naming the rank that is stuck; a start, a
    save and the first step have `timeout_seconds`. At least 0; 0 disables."""
    straggler_every: Whole = 50
    """Steps between comparisons of the ranks' own times, waiting for others left out. At least 0; 0 disables."""
    straggler_factor: Positive = 1.5
    """Multiple of the ranks' median beyond which one is named. Above 0."""


class NearDuplicates(Section):
    """MinHash-LSH (Broder 1997): documents whose n-grams overlap by about `threshold` or more are nearly the same.

    The threshold is (1 / num_buckets)^(1 / hashes_per_bucket): 0.72 as it stands.
    """

    ngram: Count = 5
    """Words of an n-gram. At least 1."""
    num_buckets: Count = 14
    """Bands of the signature. At least 1."""
    hashes_per_bucket: Count = 8
    """Hashes of a band. At least 1."""
    seed: Whole = 1
    """Seed of the hashes. At least 0."""


class Cleaning(Section):
    """Documents that `prepare` leaves out, and counts."""

    exact_duplicates: bool = False
    """Those whose text was there before, in the same source."""
    near_duplicates: NearDuplicates | None = None
    """Those that are nearly another of the same source; unset, none."""
    min_characters: Count | None = None
    """Shorter ones, in characters. At least 1; unset, none."""
    max_characters: Count | None = None
    """Longer ones, in characters. At least 1; unset, none."""
    max_symbol_ratio: Fraction | None = None
    """Those with a larger share of neither letters nor digits, spaces aside. 0 to 1; unset, none."""
    languages: tuple[str, ...] | None = None
    """Those whose `language_key` is not one of these; unset, none."""


class Data(Section):
    """What is read."""

    total_tokens: Tokens | None = None
    """Tokens that the recipe states, at least 1: `140B` is 1.4e11. They do not end a run; its steps do."""
    mix: dict[str, NonNegative] = Field(default={})
    """Weight of each source, at least 0; taken as shares of their sum. 0 is never drawn."""
    sources: dict[str, PathOrPaths] = Field(default={})
    """Files of each source, from the working directory: files or folders of JSONL, plain text or Parquet, packed or
    not, `*` allowed; or an indexed data set, without .bin and .idx."""
    tokenizer: str | None = None
    """Folder of the tokenizer, a tokenizer.json, a SentencePiece model or a file of tiktoken ranks."""
    prepared: str | None = None
    """Folder that `prepare` writes indexed data sets to and `train` reads them from."""
    text_key: str = "text"
    """Key of a JSON line, or column of Parquet, that holds the text."""
    language_key: str | None = None
    """Key of a language tag; documents are counted by it."""
    text_documents: Literal["file", "line"] = "file"
    """What a document of plain text is."""
    cleaning: Cleaning | None = None
    """Documents left out by `prepare`; unset, none."""
    validation_fraction: BelowOne = 0.01
    """Share of documents held out. 0 to below 1."""
    on_error: Literal["stop", "skip", "quarantine"] = "stop"
    """What `prepare` does with a record that holds no text: stop at the first, skip and count them, or put them aside
    into `<prepared>/<source>.quarantine.jsonl`."""
    skip_broken_lines: bool = False
    """The same as `on_error: skip`."""
    document_mask: bool = False
    """Keeps documents that share a training sample from seeing each other; positions start anew in each."""
    document_packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents fill training samples: end to end, cut where a sample ends; or whole, best fit, with padding (needs
    `document_mask`)."""
    workers: Count | None = None
    """Threads or processes that tokenize. At least 1; unset, as many as there are cores."""
    loader: Literal["native", "dali"] = "native"
    """What puts batches together: threads of our own, or NVIDIA DALI's; the batches are the same."""
    prefetch: Whole = 2
    """Micro-batches that are put together ahead. At least 0."""
    cache: str | None = None
    """Folder for copies of data sets whose paths are addresses (s3://, gs://); unset, $IGLA_CACHE/data."""
    format: Literal["text", "instructions", "preference_pairs"] = "text"
    """What a document is."""
    max_length: Count | None = None
    """Longest prompt and answer together, in tokens. At least 1; unset, `training.sequence_length`."""
    max_prompt_length: Count | None = None
    """Longest prompt, in tokens. At least 1; unset, `max_length`."""
    too_long: Literal["error", "cut", "skip"] = "error"
    """What becomes of a conversation or a prompt beyond its limit: refused, cut, or left out."""
    chat_template: str | None = None
    """File with the Jinja template of a conversation's turns, or `plain`; unset, the tokenizer's own."""
    packing: bool = True
    """Puts several conversations into a training sample, none of which sees another."""


class Checkpoint(Section):
    """When the run is saved and what is kept."""

    every_steps: Whole = 1000
    """Steps between checkpoints. At least 0; 0 saves only at the end."""
    keep_last: Count = 3
    """Newest checkpoints that are kept. At least 1."""
    keep_every: Count | None = None
    """Checkpoints whose step is a multiple of this are kept for good, in steps. At least 1; unset, none."""
    asynchronous: bool = True
    """Writes while training goes on."""
    staging_memory: Bytes | None = None
    """Most that the copy of what is being written takes of a rank's host memory: a size (`8 GiB`) or bytes. Steps wait
    while what is beyond it is written. Unset, no bound: the rank's whole part is copied."""
    local_folder: str | None = None
    """Folder on each node's own disk for checkpoints that a resume on the same nodes takes: `{node}`, `{host}` and
    environment variables stand for their values. Unset, none."""
    local_every_steps: Whole = 0
    """Steps between checkpoints in `local_folder`. At least 0; 0 for none."""
    local_keep_last: Count = 1
    """Newest checkpoints that are kept in `local_folder`. At least 1."""
    remote: str | None = None
    """Address of a folder in an object store, such as `s3://bucket/run`, to which whole checkpoints are copied, and
    from which a run folder without one resumes. Of one run: the last to begin there has it. Unset, none."""


class Needle(Section):
    """A fact hidden in held-out text, and asked for at its end: can the model use its context?"""

    every_steps: Whole = 1000
    """Steps between searches. At least 0; 0 searches only at the end."""
    lengths: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Contexts, in tokens. At least 1 each; unset, a quarter, a half and all of the sequence length."""
    depths: Annotated[tuple[Percent, ...], Field(min_length=1)] = (0, 25, 50, 75, 100)
    """How far behind the context's beginning the fact stands, in percent. 0 to 100."""
    num_samples: Count = 8
    """Contexts of each length and depth. At least 1."""


class Tasks(Section):
    """Tasks of lm-evaluation-harness (the extra `eval`), on data that is here: nothing is downloaded."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tasks, groups or tags. At least one."""
    every_steps: Whole = 1000
    """Steps between evaluations. At least 0; 0 evaluates only at the end."""
    limit: Count | None = 200
    """Examples of each task. At least 1; null takes all."""
    include_path: str | None = None
    """Folder of the tasks' YAML files; unset, the harness's own tasks."""
    num_fewshot: Whole | None = None
    """Examples put before each question. At least 0; unset, as the task says."""


class Evaluation(Section):
    """What is measured while the run trains, and at its end: loss on held-out data, and what else is asked for."""

    every_steps: Whole = 1000
    """Steps between evaluations of the loss. At least 0; 0 evaluates only at the end."""
    num_batches: Count = 16
    """Global batches an evaluation. At least 1."""
    needle: Needle | None = None
    """Needle in a haystack, for long context."""
    tasks: Tasks | None = None
    """Tasks of lm-evaluation-harness."""
    prompts: tuple[str, ...] = ()
    """Texts that are continued, into `samples.jsonl`."""
    prompts_every_steps: Whole = 1000
    """Steps between the continuations. At least 0; 0 continues only at the end."""
    prompts_tokens: Count = 32
    """New tokens of each, at most; each costs a forward pass. At least 1."""
    prompts_temperature: NonNegative = 0.7
    """Divides the logits before a token is drawn. At least 0; 0 takes the likeliest."""


class Logging(Section):
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    """Writes `tensorboard/` in the run folder."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases."""
    project: str = "igla-mega"
    """Its project."""


class Recipe(Section):
    """What is trained, on what, how, where. A section left out is its defaults, or a feature not asked for."""

    name: str = ""
    """Name of the recipe; unset, its file's."""
    extends: str | None = None
    """Recipe that this one changes: a packaged one's name, or a path from this file's folder. Mappings merge, except
    `mix` and `sources`, which replace the parent's; null takes a key back."""
    base_model: str | None = None
    """Trained model to start from: a folder below `--models` or $IGLA_MODELS."""
    model: Model | None = None
    """Shape of the model; unset, the base model's."""
    koshey: Koshey | None = None
    """Long context and memory of earlier tasks."""
    training: Training = Field(default_factory=Training)
    """How much is learned, how fast."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    """AdamW's constants."""
    scheduler: Scheduler = Field(default_factory=Scheduler)
    """Course of the learning rate."""
    distributed: Distributed = Field(default_factory=Distributed)
    """Where the model and its batch lie."""
    data: Data = Field(default_factory=Data)
    """What is read."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """When the run is saved."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Loss on held-out data."""
    logging: Logging = Field(default_factory=Logging)
    """Where metrics go."""
    lora: Lora | None = None
    """Low-rank adapters."""
    quantization: Quantization | None = None
    """Storage of the frozen base model."""
    dpo: Dpo | None = None
    """Preference optimization."""
    sft: Sft | None = None
    """Fine-tuning on instructions."""
    moe: Moe | None = None
    """Mixture of experts."""
    continual: Continual | None = None
    """Learning without forgetting."""
    curriculum: Curriculum | None = None
    """Domains in order."""
    stages: Annotated[tuple["Recipe", ...], Field(min_length=1)] | None = None
    """Recipes run one after another, each from the weights of the one before. At least one."""

    @property
    def memory(self) -> Memory | None:
        """What is asked of Elastic Weight Consolidation; None when nothing is."""
        if self.continual is not None:
            return self.continual
        return self.koshey if self.koshey is not None and self.koshey.ewc_enabled else None

    @property
    def form(self) -> Literal["text", "instructions", "preference_pairs"]:
        """What a document is: `data.format`, unless `sft` or `dpo` says it."""
        if self.dpo is not None:
            return "preference_pairs"
        return "instructions" if self.sft is not None else self.data.format

    @property
    def sequence_length(self) -> int | None:
        """Tokens of a training sample; None when only the base model knows."""
        longest = self.model.max_position if self.model is not None else None
        return self.training.sequence_length or self.data.max_length or longest

    def num_warmup_steps(self, total_steps: int) -> int:
        """Return the warm-up's steps: those given, else the ratio of `total_steps`, else 0."""
        if self.training.warmup_steps is not None:
            return self.training.warmup_steps
        ratio = self.training.warmup_ratio if self.training.warmup_ratio is not None else self.scheduler.warmup_ratio
        return round((ratio or 0.0) * total_steps)


def json_schema() -> dict[str, Any]:
    """Return a recipe's JSON Schema, for editors; no key is required, since a parent may give what a file lacks."""
    schema = Recipe.model_json_schema()
    for section in schema["$defs"].values():
        section.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
