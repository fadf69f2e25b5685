"""Every key of a recipe, with its unit, range and default in the docstring below it.

`load.py` reads recipe files; constraints between keys of two sections (`hidden_size` and `tensor_parallel`, the batch
size and the world size) are in `rules.py`.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from igla_mega.config import quantities
from igla_mega.config.features import (
    Continual,
    Curriculum,
    Dpo,
    Koshey,
    Logging,
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
    Seconds,
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
    """Number of transformer layers. At least 1."""
    num_heads: Count
    """Number of query heads. At least 1."""
    num_kv_heads: Count = Field(default_factory=lambda given: given.get("num_heads", 1))
    """Number of key-value heads, each shared by num_heads / num_kv_heads query heads. At least 1; unset,
    `num_heads`."""
    head_dim: Count | None = None
    """Number of channels of one head, even. At least 2; unset, hidden_size / num_heads."""
    intermediate_size: Count
    """Width of the feed-forward network (of one expert, with `moe`), in channels. At least 1."""
    vocab_size: Count = 32000
    """Number of token ids, which are 0 to vocab_size - 1. At least 1."""
    max_position: Count = 8192
    """Longest sequence, in tokens. At least 1."""
    rope_theta: Positive = Field(
        default_factory=lambda given: quantities.usual_rope_theta(given.get("max_position", 0))
    )
    """Base of the rotary wavelengths. Above 0; unset, 1e4 up to 8192 positions, beyond that the smallest power of ten
    that is large enough for `max_position`."""
    rope_scaling: RopeScaling | None = None
    """Llama 3 scaling of the rotary frequencies; unset, no scaling."""
    tie_embeddings: bool = False
    """True if the output projection shares the weights of the input embedding."""
    norm_epsilon: Positive = 1e-5
    """Constant added to the mean square before the square root in RMSNorm. Above 0."""
    init_std: Positive = 0.02
    """Standard deviation of the initial weights. Above 0."""

    @property
    def head_size(self) -> int:
        """Number of channels of one head: `head_dim`, or hidden_size / num_heads if that is unset."""
        return self.head_dim or self.hidden_size // self.num_heads

    def num_parameters(self, moe: Moe | None = None) -> int:
        """Return the number of parameters of the whole model, including every expert."""
        experts = moe.num_experts if moe else 1
        norms = self.hidden_size * (2 * self.num_layers + 1)
        embedding = self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        return embedding + norms + self.num_layers * self._layer_weights(experts, moe)

    def active_parameters(self, moe: Moe | None = None) -> int:
        """Return the number of parameters used for one token: the experts it is routed to, and the whole embedding."""
        idle = moe.num_experts - moe.num_experts_per_tok if moe else 0
        return self.num_parameters(moe) - idle * 3 * self.hidden_size * self.intermediate_size * self.num_layers

    def matmul_parameters(self, moe: Moe | None = None) -> int:
        """Return the number of parameters that take part in a matrix product for one token.

        Includes the output projection and the experts the token is routed to, but not the embedding lookup or norms.
        """
        experts = moe.num_experts_per_tok if moe else 1
        return self.vocab_size * self.hidden_size + self.num_layers * self._layer_weights(experts, moe)

    def _layer_weights(self, experts: int, moe: Moe | None) -> int:
        """Return the number of matrix weights of one layer with `experts` experts counted; norms are not included."""
        attention = 2 * self.hidden_size * self.head_size * (self.num_heads + self.num_kv_heads)
        router = self.hidden_size * moe.num_experts if moe else 0
        shared = (moe.shared_intermediate_size or 0) if moe else 0
        # SwiGLU has three matrices: gate, up and down.
        return attention + router + 3 * self.hidden_size * (experts * self.intermediate_size + shared)


class Training(Section):
    """Length of the run, batch size, learning rate and the handling of bad steps."""

    learning_rate: Positive = 3e-4
    """Peak learning rate, per step. Above 0."""
    min_lr: NonNegative = 0.0
    """Learning rate that the schedule reaches after its last step. 0 to `learning_rate`."""
    batch_size: BatchSize = "4M tokens"
    """Tokens (`4M tokens` is 4 x 2^20) or sequences (`128`) per step over all ranks, at least 1. With
    `gradient_accumulation`, sequences per micro-batch of one data-parallel rank."""
    gradient_accumulation: Count | None = None
    """Micro-batches per step and data-parallel rank, if `batch_size` is in sequences. At least 1; unset, chosen by the
    layout."""
    warmup_steps: Whole | None = None
    """Number of warm-up steps, in which the learning rate rises to its peak. At least 0; unset, `warmup_ratio` of all
    steps."""
    warmup_ratio: Fraction | None = None
    """Warm-up as a share of all steps. 0 to 1; unset, `scheduler.warmup_ratio`, else 0."""
    total_steps: Count | None = None
    """Number of optimizer steps of the run. At least 1."""
    epochs: Count | None = None
    """Number of passes over the data, instead of `total_steps`. At least 1."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay, per unit of learning rate; not applied to norms. At least 0."""
    gradient_clip: NonNegative = 1.0
    """Maximum L2 norm of the gradient over all parameters; a larger gradient is scaled down. At least 0; 0 disables."""
    seed: Whole = 1234
    """Seed of the initial weights and the data order. At least 0."""
    sequence_length: Count | None = None
    """Length of a training sequence, in tokens. At least 1; unset, `data.max_length`, else `model.max_position`."""
    expert_capacity_factor: Positive | None = None
    """Maximum number of tokens per expert in training, as a multiple of its fair share (see `moe.capacity_over`). The
    least probable tokens above it are dropped. Above 0; unset, none are dropped."""
    on_nonfinite: Literal["stop", "skip", "rewind"] = "stop"
    """Action for a step whose loss or gradient is not finite, also when repeated: stop before the update (stop), skip
    the samples of the step (skip), or return to the last checkpoint and skip them (rewind)."""
    on_spike: Literal["ignore", "warn", "stop", "skip", "rewind"] = "warn"
    """Action for a loss spike (see `spike_deviations`): nothing (ignore), a warning (warn), or as for
    `on_nonfinite`."""
    spike_deviations: Positive = 10.0
    """Minimum distance of a loss spike above the median of recent losses, in robust standard deviations (1.4826 x the
    median absolute deviation; at least 1 % of the median). Above 0."""
    spike_window: Count = 100
    """Number of recent steps of a stage whose losses the median is taken over; a spike is detected only once half of
    them are available. At least 1."""
    rewind_skips: Literal["bad_step", "since_checkpoint"] = "bad_step"
    """Samples that `rewind` skips: those of the bad step, or those of all steps since the checkpoint."""
    bad_steps_in_a_row: Count = 10
    """Number of consecutive skipped steps after which the run stops. At least 1."""

    @property
    def batch_tokens(self) -> int | None:
        """Tokens per step over all ranks; None if `batch_size` counts sequences."""
        return quantities.batch_tokens(self.batch_size)


class Optimizer(Section):
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""

    type: Literal["AdamW"] = "AdamW"
    """Name of the optimizer."""
    beta1: BelowOne = 0.9
    """Decay of the running mean of gradients, per step. 0 to below 1."""
    beta2: BelowOne = 0.95
    """Decay of the running mean of squared gradients, per step. 0 to below 1."""
    epsilon: Positive = 1e-8
    """Constant added to the square root of the second moment. Above 0."""
    fused: bool = True
    """True if all weights are updated in one pass over memory. Speed-up: 1.07x on 2 CPU cores; not yet measured on a
    GPU."""


class Scheduler(Section):
    """Decay of the learning rate from `learning_rate` to `min_lr` after the warm-up."""

    type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay; `constant` keeps `learning_rate`."""
    warmup_ratio: Fraction | None = None
    """Warm-up as a share of all steps. 0 to 1; unset, `training.warmup_steps` or `training.warmup_ratio`, else 0."""


class Distributed(Section):
    """Distribution of the model and the batch over ranks. A size of `auto` is chosen for the world size of the run."""

    strategy: Literal["FSDP", "DDP"] = "DDP"
    """Storage of the weights on data-parallel ranks: sharded (FSDP) or a full copy on each (DDP)."""
    precision: Precision = "BF16"
    """Data type of activations and matrix products; main weights and gradients are always fp32. FP8 computes the
    products of the layers in 8 bits with Transformer Engine, the rest in bf16. Speed-up of BF16: 1.56x on 2 CPU cores;
    of FP8: not yet measured."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """Scaling of FP8 values: by the current maximum of the tensor (tensorwise), by the maxima of earlier steps
    (delayed; not stored in checkpoints, so a resumed run rounds differently), per block (blockwise), or per 32 values
    (mxfp8, Blackwell or newer)."""
    gradient_checkpointing: RecomputeOrUnset = None
    """Activations recomputed in the backward pass: none (or false), selective (the feed-forward network), full (or
    true: whole layers). Unset, the least that fits in memory on a GPU, none on a CPU."""
    tensor_parallel: CountOrAuto = "auto"
    """Number of ranks that each weight matrix is split over. At least 1."""
    pipeline_parallel: CountOrAuto = "auto"
    """Number of ranks that the layers are split over. At least 1."""
    virtual_pipeline: CountOrAuto = "auto"
    """Number of model chunks per pipeline rank, for the interleaved schedule. At least 1; `auto` is 1 on a CPU."""
    context_parallel: CountOrAuto = "auto"
    """Number of ranks that each sequence is split over. At least 1; `auto` is 1 without `koshey.ring_attention`."""
    context_schedule: Literal["auto", "p2p", "allgather", "a2a", "a2a+p2p"] = "auto"
    """Exchange of keys and values between context-parallel ranks: in a ring (p2p), all at once (allgather), heads
    exchanged for tokens (a2a), or a2a within a node and a ring across nodes (a2a+p2p)."""
    pad_sequences: bool = False
    """True if each sequence is padded to a multiple of 2 x context_parallel, which the zig-zag split requires."""
    expert_parallel: CountOrAuto = "auto"
    """Number of ranks of the data, context and tensor axes that the experts are distributed over. At least 1."""
    expert_tensor_parallel: Count = 1
    """Number of ranks that the matrices of each expert are split over: 1, or `tensor_parallel`."""
    micro_batch_size: CountOrAuto = "auto"
    """Number of sequences per micro-batch of a data-parallel rank. At least 1."""
    sequence_parallel: BoolOrAuto = "auto"
    """True if norms and residuals are split along the sequence over the tensor-parallel ranks."""
    distributed_optimizer: bool = True
    """True if the optimizer state is sharded over data-parallel ranks (DDP)."""
    overlap_communication: bool = True
    """True if gradients are reduced during the backward pass and, with `distributed_optimizer`, weights are gathered
    during the forward pass (GPU only). Speed-up: not yet measured."""
    attention: Literal["auto", "flash", "cudnn"] = "auto"
    """Attention kernel for the tokens of one rank (GPU only); auto lets torch choose. Speed-up: not yet measured."""
    cuda_graphs: bool = False
    """True if each layer is replayed as one CUDA graph (GPU only). Speed-up: not yet measured."""
    loss_chunk: CountOrAuto = "auto"
    """Number of tokens whose logits are computed at once. At least 1; `auto` is 256 on a CPU, 4096 on a GPU. Speed-up
    over all at once: 1.06x with a tenth of the memory on 2 CPU cores; not yet measured on a GPU."""
    kernels: Literal["auto", "te", "local", "require"] = "auto"
    """Implementation of the layers: Transformer Engine (te), this package (local), Transformer Engine if installed,
    else this package (auto), or this package with all native ops required (require)."""
    fused_layers: bool = True
    """True if norms, SwiGLU and rotary positions are one fused kernel each. Speed-up: 1.09x (bf16 1.07x) with a tenth
    of the memory on 2 CPU cores; not yet measured on a GPU."""
    keep_freed_memory: bool = False
    """True if freed memory is kept in the process, not returned to the system (CPU, glibc). Speed-up: 1.03x on 2
    cores."""
    timeout_seconds: Annotated[Seconds, Field(ge=1)] = 600
    """Maximum time that a rank waits for its peers before the run ends, in seconds. 1 to a year."""
    hang_seconds: Seconds = 60
    """Maximum time without progress of any rank, in seconds; then the run ends and names the rank that hangs. Start-up,
    saving and the first step may take `timeout_seconds`. 0 to a year; 0 disables."""
    straggler_every: Whole = 50
    """Steps between comparisons of the ranks' compute times, without waiting for peers. At least 0; 0 disables."""
    straggler_factor: Positive = 1.5
    """Multiple of the median compute time above which a rank is reported as a straggler. Above 0."""


class NearDuplicates(Section):
    """MinHash-LSH (Broder 1997): two documents are near duplicates if their n-grams overlap by about the threshold.

    The threshold is (1 / num_buckets)^(1 / hashes_per_bucket): 0.72 with the default values.
    """

    ngram: Count = 5
    """Number of words of an n-gram. At least 1."""
    num_buckets: Count = 14
    """Number of bands of the signature. At least 1."""
    hashes_per_bucket: Count = 8
    """Number of hashes per band. At least 1."""
    seed: Whole = 1
    """Seed of the hash functions. At least 0."""


class Cleaning(Section):
    """Filters for documents that `prepare` leaves out and counts."""

    exact_duplicates: bool = False
    """True if a document with the same text as an earlier one of its source is left out."""
    near_duplicates: NearDuplicates | None = None
    """Settings for leaving out near duplicates within a source; unset, none are left out."""
    min_characters: Count | None = None
    """Minimum length of a document, in characters. At least 1; unset, no limit."""
    max_characters: Count | None = None
    """Maximum length of a document, in characters. At least 1; unset, no limit."""
    max_symbol_ratio: Fraction | None = None
    """Maximum share of characters that are neither letters nor digits, spaces not counted. 0 to 1; unset, no limit."""
    languages: tuple[str, ...] | None = None
    """Languages to keep, compared with the tag at `data.language_key`; unset, all."""


class Data(Section):
    """Training data: sources, tokenizer, preparation and batching."""

    total_tokens: Tokens | None = None
    """Size of the data, in tokens, at least 1: `140B` is 1.4e11. Informational: the number of steps ends a run."""
    mix: dict[str, NonNegative] = Field(default={})
    """Weight of each source, at least 0; its share is its weight over their sum. A source of weight 0 is neither
    prepared nor drawn."""
    sources: dict[str, PathOrPaths] = Field(default={})
    """Paths of each source, relative to the working directory: files or folders of JSONL, plain text or Parquet,
    compressed or not, `*` allowed; or an indexed data set, without .bin and .idx."""
    tokenizer: str | None = None
    """Path of the tokenizer: a folder, a tokenizer.json, a SentencePiece model or a file of tiktoken ranks."""
    add_bos: Literal["auto", "always", "never"] = "auto"
    """Rule for the begin-of-text token in front of each document, prompt and plain sample: if the tokenizer's own
    library adds it (auto), always, or never. It is never doubled. In conversations the chat template decides, and
    `always` adds it where the template does not."""
    prepared: str | None = None
    """Folder that `prepare` writes indexed data sets to and `train` reads them from."""
    text_key: str = "text"
    """Key of a JSON line, or column of Parquet, that holds the text."""
    language_key: str | None = None
    """Key of a JSON line, or column of Parquet, with a language tag; documents are counted per tag. Unset, none."""
    text_documents: Literal["file", "line"] = "file"
    """Unit of plain text that is one document."""
    cleaning: Cleaning | None = None
    """Filters for documents that `prepare` leaves out; unset, none."""
    validation_fraction: BelowOne = 0.01
    """Share of documents held out for validation. 0 to below 1."""
    on_error: Literal["stop", "skip", "quarantine"] = "stop"
    """Action of `prepare` for a record without text: stop at the first one, skip and count it, or write it to
    `<prepared>/<source>.quarantine.jsonl` (quarantine)."""
    skip_broken_lines: bool = False
    """True has the same effect as `on_error: skip`."""
    document_mask: bool = False
    """True if attention does not cross documents within a training sample; positions restart at 0 in each document."""
    document_packing: Literal["concatenate", "best_fit"] = "concatenate"
    """Packing of documents into training samples: end to end, cut at the end of a sample (concatenate); or whole, by
    best fit, with padding (best_fit; requires `document_mask`)."""
    workers: Count | None = None
    """Number of threads or processes that tokenize. At least 1; unset, the number of cores."""
    loader: Literal["native", "dali"] = "native"
    """Loader that assembles batches: threads of this package (native) or NVIDIA DALI; the batches are the same."""
    prefetch: Whole = 2
    """Number of micro-batches assembled in advance. At least 0."""
    cache: str | None = None
    """Folder for local copies of data sets with remote paths (s3://, gs://); unset, $IGLA_CACHE/data."""
    format: Literal["text", "instructions", "preference_pairs"] = "text"
    """Kind of the documents. `sft` and `dpo` imply theirs."""
    max_length: Count | None = None
    """Maximum length of prompt and answer together, in tokens. At least 1; unset, `training.sequence_length`."""
    max_prompt_length: Count | None = None
    """Maximum length of the prompt of a pair, in tokens. At least 1; unset, only `max_length` applies."""
    too_long: Literal["error", "cut", "skip"] = "error"
    """Action for a conversation or pair above its limit: an error, truncation (cut), or leaving it out (skip)."""
    chat_template: str | None = None
    """Path of the Jinja template for the turns of a conversation, or `plain`; unset, the template of the tokenizer."""
    packing: bool = True
    """True if several conversations share a training sample; attention does not cross them."""


class Checkpoint(Section):
    """Intervals of checkpoints and the number to keep."""

    every_steps: Whole = 1000
    """Number of steps between checkpoints. At least 0; 0 saves only at the end."""
    keep_last: Count = 3
    """Number of newest checkpoints to keep. At least 1."""
    keep_every: Count | None = None
    """Interval of checkpoints that are never deleted, in steps: those at its multiples. At least 1; unset, none."""
    asynchronous: bool = True
    """True if checkpoints are written while training continues."""
    staging_memory: Bytes | None = None
    """Maximum host memory per rank for the copy being written: a size (`8 GiB`) or bytes. Training waits while the rest
    is written. Unset, no limit: the whole shard of the rank is copied."""
    local_folder: str | None = None
    """Folder on the local disk of each node for checkpoints from which a run on the same nodes resumes. `{node}`,
    `{host}` and environment variables are replaced by their values. Unset, no local checkpoints."""
    local_every_steps: Whole = 0
    """Number of steps between checkpoints in `local_folder`. At least 0; 0 disables."""
    local_keep_last: Count = 1
    """Number of newest checkpoints to keep in `local_folder`. At least 1."""
    remote: str | None = None
    """URL of a folder in an object store, such as `s3://bucket/run`, to which complete checkpoints are copied and from
    which a run folder without a checkpoint resumes. Only for one run: the last one started there owns it. Unset,
    none."""


class Needle(Section):
    """Needle-in-a-haystack test: retrieval of a fact hidden in held-out text, queried at the end of the context."""

    every_steps: Whole = 1000
    """Number of steps between tests. At least 0; 0 tests only at the end."""
    lengths: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Context lengths, in tokens. At least 1 each; unset, a quarter, a half and all of the sequence length."""
    depths: Annotated[tuple[Percent, ...], Field(min_length=1)] = (0, 25, 50, 75, 100)
    """Positions of the fact from the start of the context, in percent of its length. 0 to 100."""
    num_samples: Count = 8
    """Number of contexts per length and depth. At least 1."""


class Tasks(Section):
    """Tasks of lm-evaluation-harness (the extra `eval`), on local data: nothing is downloaded."""

    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of tasks, groups or tags. At least one."""
    every_steps: Whole = 1000
    """Number of steps between evaluations. At least 0; 0 evaluates only at the end."""
    limit: Count | None = 200
    """Maximum number of examples per task. At least 1; null takes all."""
    include_path: str | None = None
    """Folder of the YAML files of the tasks; unset, the tasks of the harness."""
    num_fewshot: Whole | None = None
    """Number of examples before each question. At least 0; unset, the number that the task defines."""


class Evaluation(Section):
    """Evaluation during and at the end of training: loss on held-out data, and the tests configured here."""

    every_steps: Whole = 1000
    """Number of steps between evaluations of the loss. At least 0; 0 evaluates only at the end."""
    num_batches: Count = 16
    """Number of global batches per evaluation. At least 1."""
    needle: Needle | None = None
    """Needle-in-a-haystack test for long context; unset, none."""
    tasks: Tasks | None = None
    """Tasks of lm-evaluation-harness; unset, none."""
    prompts: tuple[str, ...] = ()
    """Prompts to continue; the texts are written to `samples.jsonl`."""
    prompts_every_steps: Whole = 1000
    """Number of steps between generations from `prompts`. At least 0; 0 generates only at the end."""
    prompts_tokens: Count = 32
    """Maximum number of new tokens per prompt, each of which takes a forward pass. At least 1."""
    prompts_temperature: NonNegative = 0.7
    """Sampling temperature, by which logits are divided. At least 0; 0 takes the most probable token."""


class Recipe(Section):
    """Description of a training run. An omitted section has its default values, or its feature is disabled."""

    name: str = ""
    """Name of the recipe; unset, the name of its file."""
    extends: str | None = None
    """Parent recipe that this one modifies: the name of a packaged recipe, or a path relative to the folder of this
    file. Mappings are merged, except `mix` and `sources`, which replace those of the parent; null removes a key."""
    base_model: str | None = None
    """Pretrained model to start from: a folder in `--models` or $IGLA_MODELS, or a path. Unset, random weights."""
    model: Model | None = None
    """Shape of the model; unset, that of the base model."""
    koshey: Koshey | None = None
    """Long context and EWC; unset, disabled."""
    training: Training = Field(default_factory=Training)
    """Length of the run, batch size and learning rate."""
    optimizer: Optimizer = Field(default_factory=Optimizer)
    """Hyperparameters of AdamW."""
    scheduler: Scheduler = Field(default_factory=Scheduler)
    """Learning rate schedule."""
    distributed: Distributed = Field(default_factory=Distributed)
    """Distribution over ranks."""
    data: Data = Field(default_factory=Data)
    """Training data."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """Intervals and folders of checkpoints."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """Loss on held-out data and other tests."""
    logging: Logging = Field(default_factory=Logging)
    """Destinations of metrics."""
    lora: Lora | None = None
    """Low-rank adapters; unset, all weights are trained."""
    quantization: Quantization | None = None
    """Quantization of the frozen base model; unset, none."""
    dpo: Dpo | None = None
    """Direct preference optimization; unset, none."""
    sft: Sft | None = None
    """Supervised fine-tuning on instructions; unset, none."""
    moe: Moe | None = None
    """Mixture of experts; unset, a dense model."""
    continual: Continual | None = None
    """Continual learning with EWC; unset, none."""
    curriculum: Curriculum | None = None
    """Domains that are learned one after another; unset, one phase."""
    stages: Annotated[tuple["Recipe", ...], Field(min_length=1)] | None = None
    """Recipes that run one after another, each from the weights of the previous one. At least one; unset, one stage."""

    @property
    def memory(self) -> Memory | None:
        """Section that configures Elastic Weight Consolidation: `continual` or `koshey`; None if neither enables it."""
        if self.continual is not None:
            return self.continual
        return self.koshey if self.koshey is not None and self.koshey.ewc_enabled else None

    @property
    def uses_ewc(self) -> bool:
        """True if weights are pulled to those of an earlier task: an EWC section with ewc_lambda above 0."""
        return self.memory is not None and self.memory.ewc_lambda > 0

    @property
    def form(self) -> Literal["text", "instructions", "preference_pairs"]:
        """Kind of the documents: `data.format`, unless `sft` or `dpo` implies another."""
        if self.dpo is not None:
            return "preference_pairs"
        return "instructions" if self.sft is not None else self.data.format

    @property
    def sequence_length(self) -> int | None:
        """Length of a training sequence in tokens; None if it depends on a base model that is not loaded yet."""
        longest = self.model.max_position if self.model is not None else None
        return self.training.sequence_length or self.data.max_length or longest

    def num_warmup_steps(self, total_steps: int) -> int:
        """Return the number of warm-up steps: `warmup_steps`, else the warm-up ratio of `total_steps`, else 0."""
        if self.training.warmup_steps is not None:
            return self.training.warmup_steps
        ratio = self.training.warmup_ratio if self.training.warmup_ratio is not None else self.scheduler.warmup_ratio
        return round((ratio or 0.0) * total_steps)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a recipe, for editors.

    No key is required: a recipe file may leave any of them to the recipe it extends.
    """
    schema = Recipe.model_json_schema()
    sections = schema["$defs"]
    for section in sections.values():
        section.pop("required", None)
    for holder in (schema, *sections.values()):
        for key in holder.get("properties", {}).values():
            # Of a choice between a section and null, an editor says that neither fits; of a section it names the key.
            match key.get("anyOf"):
                case [{"$ref": place}, {"type": "null"}]:
                    del key["anyOf"]
                    key["$ref"] = place
                    sections[place.removeprefix("#/$defs/")]["type"] = ["object", "null"]
                case [{"type": "array", **items}, {"type": "null"}]:
                    del key["anyOf"]
                    key |= items | {"type": ["array", "null"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
