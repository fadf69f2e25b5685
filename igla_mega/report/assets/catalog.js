// What the page draws: plots and heat maps by the keys of metrics.jsonl, and the kinds of events.

// `rows` have a value at every step; `points` are measured at intervals: "name/" matches all keys with that prefix, and
// "a/*b" all keys with that prefix and suffix. The rest of the key becomes part of the label.
const PLOTS = [
  ...inGroup("Learning", [
    {
      id: "loss",
      title: "Loss",
      note: "",
      wide: true,
      rows: { loss: "training" },
      points: { "validation_loss/": "validation, ", unigram_entropy: "unigram entropy" },
    },
    {
      id: "learning_rate",
      title: "Learning rate",
      note: "per step",
      rows: { learning_rate: "rate" },
      format: rate,
      plain: true,
    },
    {
      id: "grad_norm",
      title: "Gradient norm",
      note: "L2 over all parameters, before clipping",
      rows: { grad_norm: "gradient" },
    },
    {
      id: "ewc_nats",
      title: "EWC penalty",
      note: "Elastic Weight Consolidation, nats per token",
      rows: { ewc_nats: "penalty" },
      zero: true,
    },
    {
      id: "ewc_grad_norm",
      title: "Gradient norm of the EWC penalty",
      note: "L2, next to that of the task's loss",
      rows: { ewc_grad_norm: "penalty", task_grad_norm: "task" },
    },
    {
      id: "backward_transfer",
      title: "Backward transfer",
      note: "nats per token over earlier domains; below 0: forgetting",
      points: { backward_transfer: "transfer" },
    },
  ]),
  ...inGroup("Preferences", [
    {
      id: "dpo_margin",
      title: "Rewards",
      note: "of the chosen and the rejected answer, and their margin",
      rows: { dpo_margin: "margin", dpo_reward_chosen: "chosen", dpo_reward_rejected: "rejected" },
      points: {
        "validation/*dpo_margin": "margin, held-out ",
        "validation/*dpo_reward_chosen": "chosen, held-out ",
        "validation/*dpo_reward_rejected": "rejected, held-out ",
      },
    },
    {
      id: "dpo_accuracy",
      title: "Accuracy",
      note: "pairs whose chosen answer has the higher reward",
      rows: { dpo_accuracy: "training" },
      points: { "validation/*dpo_accuracy": "validation, " },
      format: percent,
      zero: true,
    },
    {
      id: "dpo_preferred",
      title: "Preferred answer",
      note: "pairs whose chosen answer is more likely than the rejected one",
      rows: { dpo_preferred: "training" },
      points: { "validation/*dpo_preferred": "validation, " },
      format: percent,
      zero: true,
    },
    {
      id: "dpo_kl",
      title: "Distance from the reference",
      note: "KL estimate, nats",
      rows: { dpo_kl: "training" },
      points: { "validation/*dpo_kl": "validation, " },
    },
    {
      id: "dpo_log_prob",
      title: "Log-probabilities",
      note: "of the answers, nats",
      rows: { dpo_log_prob_chosen: "chosen", dpo_log_prob_rejected: "rejected" },
      points: {
        "validation/*dpo_log_prob_chosen": "chosen, held-out ",
        "validation/*dpo_log_prob_rejected": "rejected, held-out ",
      },
    },
  ]),
  ...inGroup("Evaluation", [
    { id: "tasks", title: "Tasks", note: "lm-evaluation-harness, on local data", points: { "tasks/": "" } },
  ]),
  ...inGroup("Experts", [
    {
      id: "moe_aux_loss",
      title: "Balance",
      note: "balancing loss, mean over layers; 1 is balanced",
      rows: { moe_aux_loss: "balance" },
    },
    {
      id: "moe_drop_rate",
      title: "Dropped tokens",
      note: "share of the assignments of tokens to experts, mean over layers",
      rows: { moe_drop_rate: "dropped" },
      zero: true,
      format: percent,
    },
    {
      id: "moe_router_entropy",
      title: "Router entropy",
      note: "nats, mean over layers and tokens",
      rows: { moe_router_entropy: "entropy" },
    },
    {
      id: "moe_max_violation",
      title: "Busiest expert",
      note: "excess over its fair share, worst layer",
      rows: { moe_max_violation: "excess" },
      zero: true,
      format: percent,
    },
  ]),
  ...inGroup("Speed", [
    {
      id: "tokens_per_second",
      title: "Throughput",
      note: "tokens per second of each step, all ranks together",
      rows: { tokens_per_second: "tokens/s" },
      zero: true,
    },
    {
      id: "mfu",
      title: "Model FLOP/s utilization",
      note: "of each step, as a share of the device's dense peak",
      rows: { mfu: "MFU" },
      zero: true,
      format: percent,
    },
    {
      id: "memory_bytes",
      title: "Memory",
      note: "peak of the main rank",
      rows: { memory_bytes: "memory" },
      zero: true,
      format: gib,
      plain: true,
      unit: 2 ** 30,
    },
    {
      id: "step_seconds",
      title: "Step time",
      note: "seconds; of the ranks at the steps where they are compared",
      rows: { step_seconds: "step" },
      points: { "rank_step_seconds/": "ranks, " },
      zero: true,
      format: secs,
    },
  ]),
  ...inGroup("Data", [
    {
      id: "read_epochs",
      title: "Passes over the data",
      note: "of each source",
      points: { "read_epochs/": "" },
      zero: true,
    },
  ]),
];

const HEATS = [
  ...inGroup("Experts", [
    {
      key: "expert_load",
      title: "Expert load",
      fair: true,
      note: "tokens of each expert (layer.expert) over its fair share; blue: underloaded, orange: overloaded",
      say: (v) => `${v.toFixed(2)} × its share`,
    },
    {
      key: "moe_layers/max_violation",
      title: "Busiest expert by layer",
      rows: "layer",
      note: "excess over its fair share",
      say: percent,
    },
    {
      key: "moe_layers/drop_rate",
      title: "Dropped tokens by layer",
      rows: "layer",
      note: "share of the assignments beyond the capacity of their expert",
      say: percent,
      onlyAboveZero: true,
    },
  ]),
  ...inGroup("Speed", [
    {
      key: "rank_step_seconds",
      title: "Step time by rank",
      rows: "rank",
      relative: true,
      note: "over the median rank of the same step; orange: slower",
      say: (v) => `${v.toFixed(3)} × the median`,
    },
  ]),
];

const GROUPS = ["Learning", "Preferences", "Evaluation", "Experts", "Speed", "Data", "Everything else"];
// Keys without a plot: axes, and numbers shown in another form or in a table.
const NOT_DRAWN = ["step", "tokens", "seconds", "tflops_per_device", "domain_loss/", "read_tokens/"];

// A Map, since a kind may have any name. Quiet ones are frequent: a tick at the bottom instead of a line.
const EVENTS = new Map([
  ["started", { glyph: "▶" }],
  ["resumed", { glyph: "▶" }],
  ["saved", { glyph: "▾", quiet: true }],
  ["save_failed", { glyph: "!", alarm: true }],
  ["spike", { glyph: "▲", alarm: true }],
  ["nonfinite", { glyph: "✕", alarm: true }],
  ["skipped", { glyph: "↷", alarm: true }],
  ["rewound", { glyph: "↶", alarm: true }],
  ["straggler", { glyph: "◆", alarm: true }],
  ["hang", { glyph: "‖", alarm: true }],
  ["killed", { glyph: "✖", alarm: true }],
  ["died", { glyph: "✖", alarm: true }],
  ["failed", { glyph: "✖", alarm: true }],
  ["damaged", { glyph: "!", alarm: true }],
  ["restarting", { glyph: "↻", alarm: true }],
  ["evaluated", { glyph: "∘", quiet: true }],
  ["stopping", { glyph: "■" }],
  ["finished", { glyph: "●" }],
  ["stage", { glyph: "§" }],
]);
const looks = (kind) => EVENTS.get(kind) ?? { glyph: "•" };

function inGroup(group, specs) {
  return specs.map((spec) => ({ ...spec, group }));
}
