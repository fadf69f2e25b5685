import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from igla_mega.config import features, needed, rules, rules_experts
from igla_mega.config.errors import ConfigError
from igla_mega.config.merging import merge
from igla_mega.config.near import near_divisors
from igla_mega.config.schema import Recipe

SMALL = {
    "model": {
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 2,
        "intermediate_size": 688,
        "vocab_size": 4096,
        "max_position": 256,
    },
    "training": {"batch_size": "16K tokens", "total_steps": 100},
}
TUNE = {"base_model": "llama-7b", "training": {"batch_size": 8, "epochs": 1}}
MOE = {"moe": {"num_experts": 8, "num_experts_per_tok": 2}}


def breaches(change: dict, under: dict = SMALL, world_size: int | None = None) -> list[str]:
    return rules.breaches(Recipe.model_validate(merge(under, change)), world_size)


def phases(*given: dict, **training) -> dict:
    """A change to a recipe: phases, which say how long the run is."""
    return {"curriculum": {"phases": list(given)}, "training": {"total_steps": None, **training}}


def test_a_sound_recipe_has_no_breach():
    assert breaches({}) == breaches({}, under=TUNE) == breaches({}, world_size=8) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model": {"num_heads": 7, "num_kv_heads": 7}},
            "model.num_heads: 7 does not divide model.hidden_size 256. Use 4 or 8, or set model.head_dim.",
        ),
        (
            {"logging": {"on_event": {"fnished": ["true"]}}},
            "logging.on_event.fnished: no such event; did you mean `finished`?",
        ),
        (
            {"model": {"num_kv_heads": 3}},
            "model.num_kv_heads: 3 does not divide model.num_heads 8. Use 2 or 4.",
        ),
        (
            phases({"name": "a", "tokens": 5, "lr": 1e-3}, total_steps=100),
            "training.total_steps: 100 with curriculum.phases, whose tokens set the length of the run. Remove it.",
        ),
        (
            {
                **phases({"name": "a", "tokens": 5, "lr": 1e-3}, {"name": "books", "tokens": 5, "lr": 1e-3}),
                "data": {"mix": {}, "sources": {"book": "b", "a": "c"}},
            },
            "curriculum.phases.1.name: books is not in data.sources; did you mean `book`?",
        ),
        (
            {**phases({"name": "a", "tokens": 5, "lr": 1e-3, "data": "mix"}), "data": {"sources": {"a": "b"}}},
            "curriculum.phases.0.data: mix, but data.mix gives no source a weight. Give data.mix weights, or name a"
            " source.",
        ),
        (
            phases({"name": "a", "tokens": 5, "lr": 1e-3}, {"name": "a", "tokens": 5, "lr": 1e-3}),
            "curriculum.phases: 2 are named a. Use distinct names; `data` gives the source.",
        ),
        (
            phases({"name": "a", "tokens": 5, "lr": 1e-5}, min_lr=1e-4),
            "curriculum.phases.0.lr: 1e-05 is below training.min_lr 0.0001. Lower training.min_lr.",
        ),
        (
            phases({"name": "a", "tokens": 5, "lr": 1e-3, "sequence_length": 512}),
            "curriculum.phases.0.sequence_length: 512 is longer than model.max_position 256. Use at most 256.",
        ),
        (
            phases({"name": "a", "tokens": 5, "lr": 1e-3, "sequence_length": 96}),
            "curriculum.phases.0.sequence_length: training.batch_size 16K tokens = 16384 tokens is not a whole number "
            "of sequences of 96. Use 64 or 128.",
        ),
        (
            {"continual": {"base_data": "a"}},
            "continual.base_data: given without `base_model:`, to which it refers. Remove it, or set base_model.",
        ),
        (
            {"koshey": {"ewc_enabled": True, "fisher_seq_length": 300}},
            "koshey.fisher_seq_length: 300 is longer than model.max_position 256. Use at most 256.",
        ),
        (
            {"koshey": {"ewc_enabled": True, "ewc_lambda": 3}, "continual": {}},
            "koshey.ewc_lambda: 3 disagrees with continual.ewc_lambda 5000. Set both to the same value, or "
            "koshey.ewc_enabled=false.",
        ),
        (
            {
                **phases({"name": "a", "tokens": 5, "lr": 1e-3}),
                "koshey": {"ewc_enabled": True, "consolidate_every": "1M"},
            },
            "koshey.consolidate_every: 1000000 with curriculum.phases, at whose ends the Fisher is estimated. "
            "Remove one of them.",
        ),
        (
            {**phases({"name": "a", "tokens": 5, "lr": 1e-3}), "continual": {}, "data": {"validation_fraction": 0.0}},
            "data.validation_fraction: 0 leaves no data to measure forgetting on after each phase of `continual:`. "
            "Use 0.01, or more for small sources.",
        ),
        ({"model": {"head_dim": 33}}, "model.head_dim: 33 is odd, but rotary positions rotate pairs. Use 34."),
        (
            {"model": {"rope_scaling": {"factor": 8, "low_freq_factor": 4}}},
            "model.rope_scaling.low_freq_factor: 4 is not below high_freq_factor 4. Llama 3 uses 1 and 4.",
        ),
        (
            {"training": {"sequence_length": 512}},
            "training.sequence_length: 512 is longer than model.max_position 256. "
            "Use at most 256, or raise model.max_position.",
        ),
        (
            {"data": {"max_length": 128, "max_prompt_length": 128}},
            "data.max_prompt_length: 128 leaves no room for an answer in data.max_length 128. Use at most 127.",
        ),
        (
            {"training": {"sequence_length": 250}},
            "training.batch_size: 16K tokens = 16384 tokens is not a whole number of sequences of 250. "
            "Use 16250 tokens or 16500 tokens.",
        ),
        (
            {"training": {"gradient_accumulation": 4}},
            "training.gradient_accumulation: 4 conflicts with batch_size 16K tokens, which fixes the global batch. "
            "Remove it, or give batch_size in sequences.",
        ),
        (
            {"training": {"epochs": 2}},
            "training.epochs: 2 and training.total_steps 100 both set the length of the run. Keep one; --set "
            "training.epochs=null removes the other.",
        ),
        (
            {"training": {"total_steps": None}},
            "training.total_steps: missing, and so is training.epochs. Give one of them as the length of the run.",
        ),
        (
            {"training": {"warmup_steps": 101}},
            "training.warmup_steps: 101 is more than training.total_steps 100. "
            "Use at most 100, or --set training.warmup_steps=null.",
        ),
        (
            {"training": {"warmup_steps": 30}, "scheduler": {"warmup_ratio": 0.02}},
            "training.warmup_steps: 30 disagrees with scheduler.warmup_ratio 0.02, which is 2 of 100 steps. "
            "Set scheduler.warmup_ratio to 0.3, or remove one of the two.",
        ),
        (
            {"training": {"warmup_ratio": 0.1}, "scheduler": {"warmup_ratio": 0.02}},
            "training.warmup_ratio: 0.1 disagrees with scheduler.warmup_ratio 0.02. Remove one.",
        ),
        (
            {"training": {"min_lr": 1e-3}},
            "training.min_lr: 0.001 is above training.learning_rate 0.0003. "
            "Use at most 0.0003; a tenth of it is usual.",
        ),
        (
            {"data": {"document_packing": "best_fit"}},
            "data.document_packing: best_fit packs whole documents, which requires data.document_mask. "
            "Set data.document_mask=true.",
        ),
        (
            {"data": {"mix": {"web": 0, "code": 0}}},
            "data.mix: no weight is above 0 (web, code). Give at least one source a weight.",
        ),
        (
            {"data": {"mix": {"web": 0.5, "code": 0.5}, "sources": {"web": "web.jsonl"}}},
            "data.sources.code: missing; data.mix gives `code` a weight of 0.5. Give its path.",
        ),
        (
            {"data": {"mix": {"web": 1}, "sources": {"web": "web.jsonl", "code": ["a", "b"]}}},
            "data.mix.code: missing; data.sources has `code`, which would never be read. Give its weight.",
        ),
        (
            {"training": {"expert_capacity_factor": 1.25}},
            "training.expert_capacity_factor: given without `moe:`. Remove it, or give `moe.num_experts`.",
        ),
        (
            {"distributed": {"expert_parallel": 2}},
            "distributed.expert_parallel: 2 without `moe:`, so there are no experts. Use 1 or auto.",
        ),
        (
            {"moe": {"num_experts": 2, "num_experts_per_tok": 3}},
            "moe.num_experts_per_tok: 3 is more than moe.num_experts 2. Use at most 2.",
        ),
        (
            {**MOE, "distributed": {"expert_parallel": 3}},
            "distributed.expert_parallel: 3 does not divide moe.num_experts 8. Use 2 or 4.",
        ),
        (
            {"distributed": {"expert_tensor_parallel": 2}},
            "distributed.expert_tensor_parallel: 2 without `moe:`, so there are no experts. Use 1.",
        ),
        (
            {**MOE, "distributed": {"expert_tensor_parallel": 3}},
            "distributed.expert_tensor_parallel: 3 does not divide model.intermediate_size 688. Use 2 or 4.",
        ),
        (
            {"moe": {"num_experts": 8, "pad_to_capacity": True, "capacity_over": "rank"}},
            "moe.pad_to_capacity: true without training.expert_capacity_factor, which sets the size. Give it.",
        ),
        (
            {"moe": {"num_experts": 8, "pad_to_capacity": True}, "training": {"expert_capacity_factor": 2}},
            "moe.pad_to_capacity: true with moe.capacity_over sequence, whose shares differ between ranks. Use "
            "moe.capacity_over=rank, or pad_to_capacity=false.",
        ),
        (
            {**MOE, "distributed": {"tensor_parallel": 2, "sequence_parallel": False}},
            "distributed.sequence_parallel: false with `moe:` and tensor_parallel 2, whose ranks would each send the "
            "same tokens to the experts. Use true or auto.",
        ),
        (
            {
                **MOE,
                "koshey": {"ewc_enabled": True, "ewc_lambda": 1.0},
                "distributed": {"strategy": "FSDP", "expert_parallel": 2},
            },
            "distributed.expert_parallel: 2 with strategy FSDP, `moe:` and EWC, whose Fisher is not verified there."
            " Use 1, or strategy DDP.",
        ),
        (
            {"quantization": {"bits": 4}},
            "quantization: given without `lora:`; quantized weights are frozen and nothing would train. Add `lora:`.",
        ),
        ({"sft": {}, "dpo": {}}, "dpo: given together with `sft:` in one run. Make them two `stages:`."),
        (
            {"distributed": {"tensor_parallel": 4}},
            "distributed.tensor_parallel: 4 does not divide model.num_kv_heads 2. Use 2, or set num_kv_heads to 4.",
        ),
        (
            {"model": {"vocab_size": 4097}, "distributed": {"tensor_parallel": 2}},
            "distributed.tensor_parallel: 2 does not divide model.vocab_size 4097. "
            "Use 1 or 17, or set vocab_size to 4096 or 4098.",
        ),
        (
            {"distributed": {"virtual_pipeline": 2}},
            "distributed.virtual_pipeline: 2 needs distributed.pipeline_parallel above 1, not auto. Use "
            "virtual_pipeline 1, or pipeline_parallel 2.",
        ),
        (
            {"distributed": {"pipeline_parallel": 3}},
            "distributed.pipeline_parallel: 3 does not divide model.num_layers 4. Use 2 or 4 in all, or 3 or 6 layers.",
        ),
        (
            {"distributed": {"pipeline_parallel": 2, "virtual_pipeline": 4}},
            "distributed.pipeline_parallel: 2 x virtual_pipeline 4 = 8 does not divide model.num_layers 4. "
            "Use 4 in all, or 8 layers.",
        ),
        (
            {
                "training": {"sequence_length": 255, "batch_size": 4},
                "distributed": {"sequence_parallel": True, "tensor_parallel": 2},
            },
            "distributed.sequence_parallel: tensor_parallel 2 does not divide the sequence of 255 tokens. "
            "Set training.sequence_length to 254 or 256.",
        ),
        (
            {"distributed": {"context_parallel": 3}},
            "distributed.context_parallel: 3 does not fit the sequence of 256 tokens: zig-zag needs a multiple of 6. "
            "Set training.sequence_length to 252 or 258, or distributed.pad_sequences=true.",
        ),
        (
            {
                "training": {"sequence_length": 252, "batch_size": 4},
                "model": {"num_kv_heads": 4, "intermediate_size": 512},
                "distributed": {"sequence_parallel": True, "tensor_parallel": 4, "context_parallel": 2},
            },
            "distributed.sequence_parallel: tensor_parallel 4 does not divide the sequence of 252 tokens, "
            "126 on each of 2 context-parallel ranks. Set training.sequence_length to 248 or 256.",
        ),
        (
            {"distributed": {"tensor_parallel": 1, "context_parallel": 4, "context_schedule": "a2a"}},
            "distributed.context_schedule: a2a distributes key-value heads over 4 context-parallel ranks, which "
            "does not divide 2 (num_kv_heads 2 / tensor_parallel 1). Use p2p or auto, or context_parallel 2.",
        ),
        (
            {"model": {"max_position": 131072, "rope_theta": 5e5}, "training": {"batch_size": 4}},
            "model.rope_theta: 500000 is too small for model.max_position 131072: attention cannot distinguish "
            "similar tokens from noise at that distance, which needs about 9.1e+06. Use 1e+07, or "
            "model.rope_scaling to extend a shorter context.",
        ),
        (
            {"distributed": {"strategy": "FSDP", "pipeline_parallel": 2}},
            "distributed.strategy: FSDP with pipeline_parallel 2 is not verified to train exactly, so it is "
            "refused. Use strategy DDP (which also shards the optimizer state), or pipeline_parallel 1.",
        ),
        (
            {"checkpoint": {"local_folder": "/nvme", "local_every_steps": 2000}},
            "checkpoint.local_every_steps: 2000 is not below checkpoint.every_steps 1000. Use at most 500, or omit "
            "both local keys.",
        ),
        (
            {"checkpoint": {"local_every_steps": 10}},
            "checkpoint.local_folder: missing, but checkpoint.local_every_steps is given. Give a folder on each node.",
        ),
        (
            {"checkpoint": {"local_folder": "/nvme/{rank}", "local_every_steps": 10}},
            "checkpoint.local_folder: {rank} is not a known placeholder. Use {node} or {host}.",
        ),
        (
            {"checkpoint": {"local_folder": " ", "local_every_steps": 10}},
            "checkpoint.local_folder: empty. Give a folder on each node, or set it to null.",
        ),
        (
            {"checkpoint": {"remote": "bucket/run"}},
            "checkpoint.remote: 'bucket/run' is not a URL. Give one with its scheme, such as s3://bucket/run or "
            "file:///backup/run, or set it to null.",
        ),
        (
            {"evaluation": {"needle": {"lengths": [128, 512]}}},
            "evaluation.needle.lengths: 512 is longer than training.sequence_length 256. Use at most 256.",
        ),
        (
            {"evaluation": {"prompts": [" "]}},
            "evaluation.prompts: ' ' is blank. Give a text to continue, or remove it.",
        ),
        (
            {"evaluation": {"tasks": {"names": ["arc", "arc"]}}},
            "evaluation.tasks.names: arc given more than once. Keep one of each.",
        ),
        (
            {"distributed": {"precision": "FP8", "kernels": "local"}},
            "distributed.precision: FP8 needs Transformer Engine, but distributed.kernels is local. Use kernels te "
            "or auto, or precision BF16.",
        ),
        (
            {"distributed": {"cuda_graphs": True, "strategy": "FSDP"}},
            "distributed.cuda_graphs: true with strategy FSDP: layers cannot be recorded. Set cuda_graphs=false.",
        ),
        (
            {
                **{"base_model": "b", "lora": {"rank": 4, "alpha": 8}, "quantization": {"bits": 4}},
                "distributed": {"tensor_parallel": 2},
            },
            "distributed.tensor_parallel: 2 leaves 344 weights of down_proj on a rank, not a multiple of NF4's 64. "
            "Use fewer tensor-parallel ranks, or leave `quantization` out.",
        ),
        (
            {"name": "../x"},
            "name: '../x' cannot name a file. Use letters, digits, and `_ . + -` or spaces behind the first character.",
        ),
    ],
)
def test_a_breach_is_one_line_with_both_numbers_and_the_way_out(change, says):
    assert breaches(change) == [says]


def test_a_recipe_needs_a_model_or_a_base():
    assert breaches({"model": None})[0].startswith("model: missing. Give `model:`")


def test_every_rule_has_a_breach_in_these_tests():
    cases = test_a_breach_is_one_line_with_both_numbers_and_the_way_out.pytestmark[0].args[1]
    recipes = [Recipe.model_validate(merge(SMALL, change)) for change, _ in cases] + [Recipe()]
    assert [rule.__name__ for rule in rules.RULES if not any(list(rule(recipe)) for recipe in recipes)] == []


def test_thirds_of_two_digits_add_up():
    assert breaches({"data": {"mix": {"a": 0.33, "b": 0.33, "c": 0.33}}}) == []


@pytest.mark.parametrize(
    ("number", "wanted", "near"),
    [
        (8, 3, "2 or 4"),
        (8, 1, "2"),
        (2, 4, "2"),
        (7, 3, "1 or 7"),
        (1, 2, "1"),
        (10**30 + 57, 2, "1 or " + str(10**30 + 57)),
    ],
)
def test_the_nearest_divisors_are_named_also_of_a_huge_number(number, wanted, near):
    assert near_divisors(number, wanted) == near


def test_a_world_that_the_layout_does_not_divide_is_refused():
    change = {"distributed": {"tensor_parallel": 2, "pipeline_parallel": 2}}
    assert breaches(change, world_size=8) == []
    assert breaches(change, world_size=6) == [
        "distributed: tensor_parallel 2 x pipeline_parallel 2 = 4 ranks does not divide the world of 6. "
        "Start 4 or 8 ranks, or use 3 or 6 in all."
    ]


def test_a_stages_breach_names_the_stage():
    stages = {"stages": [TUNE, {**TUNE, "training": {"epochs": 1, "min_lr": 1.0}}]}
    assert [line.split(":")[0] for line in breaches(stages, under={})] == ["stages.1.training.min_lr"]
    assert breaches({**stages, "base_model": "x"}, under={})[0].startswith("base_model: given next to `stages:`")


def test_check_raises_all_breaches_in_one_error():
    recipe = Recipe.model_validate(merge(SMALL, {"training": {"min_lr": 1.0, "warmup_steps": 500}}))
    with pytest.raises(ConfigError) as caught:
        rules.check(recipe)
    assert len(caught.value.breaches) == 2


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({}, []),
        ({"lora": {"rank": 4, "alpha": 8}, "quantization": {}}, []),
        ({"lora": {"rank": 4, "alpha": 8}, "quantization": {"bits": 8, "quant_type": "int8"}}, ["quantization"]),
        ({"lora": {"rank": 4, "alpha": 8}, "koshey": {"ewc_enabled": True}}, ["lora"]),
        ({"dpo": {}, "data": {"format": "preference_pairs"}}, []),
        ({"sft": {}}, []),
        ({**MOE, "distributed": {"expert_parallel": 2}}, []),
        ({"koshey": {"ring_attention": True}}, []),
        ({"koshey": {"dynamic_batching": True}}, ["koshey.dynamic_batching"]),
        ({"distributed": {"context_parallel": 2}}, []),
        (
            {"continual": {}, "curriculum": {"phases": [{"name": "a", "tokens": 5, "lr": 1e-3}]}},
            [],
        ),
    ],
)
def test_what_is_not_built_is_named_by_its_key(change, keys):
    sentences = rules.not_yet(Recipe.model_validate(merge(SMALL, change)))
    assert [sentence.split(":")[0] for sentence in sentences] == keys


def test_a_sentence_on_what_is_not_built_says_the_way_out():
    assert rules.not_yet(Recipe.model_validate({"koshey": {"dynamic_batching": True}})) == [
        "koshey.dynamic_batching: token-budget batching is not supported yet, so `train` cannot run this recipe. "
        "Set koshey.dynamic_batching=false to train without it."
    ]


def test_continued_pretraining_is_built():
    assert rules.not_yet(Recipe.model_validate(TUNE)) == []


def test_deepep_is_refused_where_there_is_no_gpu_and_only_there():
    recipe = Recipe.model_validate(merge(SMALL, {"moe": {"num_experts": 8, "dispatcher": "flex"}}))
    assert rules.breaches(recipe, 2, "cuda") == rules.breaches(recipe) == []
    [breach] = rules.breaches(recipe, 2, "cpu")
    assert breach.startswith("moe.dispatcher: flex") and "Use alltoall or allgather" in breach


@pytest.mark.parametrize(
    ("factor", "length", "rate"), [(0.1, 8192, 0.9), (0.5, 8192, 0.5), (1.0, 256, 0.043), (1.25, 8192, 0.0)]
)
def test_the_expected_drop_rate_is_that_of_a_fair_lottery(factor, length, rate):
    moe = features.Moe(num_experts=8)
    assert rules.expected_drop_rate(moe, factor, length) == pytest.approx(rate, abs=2e-3)
    draws = np.random.default_rng(0).binomial(length, 0.25, 20000)
    dropped = np.clip(draws - np.ceil(length * 0.25 * factor), 0, None).mean() / (length * 0.25)
    assert dropped == pytest.approx(rate, abs=2e-3)


def test_a_capacity_that_drops_most_tokens_is_remarked_on_with_the_rate():
    def said(factor):
        return rules.warnings(
            Recipe.model_validate(merge(SMALL, {**MOE, "training": {"expert_capacity_factor": factor}}))
        )

    [line] = said(0.125)
    assert line.startswith("training.expert_capacity_factor: 0.125 drops about 87% of the token-expert assignments")
    [line] = rules.warnings(Recipe.model_validate(merge(SMALL, {"moe": {"num_experts": 8, "num_experts_per_tok": 1}})))
    assert line.startswith("moe.num_experts_per_tok: 1 gives the chosen expert a weight of 1") and "pre_softmax" in line
    assert said(1.25) == [] and rules.warnings(Recipe.model_validate(SMALL)) == []


@pytest.mark.parametrize(
    "change",
    [{"distributed": {"expert_parallel": 2}}, {"distributed": {"expert_tensor_parallel": 2}},
     {"training": {"expert_capacity_factor": 2.0}}],
)  # fmt: skip
def test_experts_may_be_those_of_a_base_model_that_is_read_later(change):
    assert breaches(change, under=TUNE) == []
    assert breaches({**change, "model": SMALL["model"]}, under=TUNE) != [], "its shape is known, and has no experts"
    assert breaches({**change, "model": SMALL["model"], **MOE}, under=TUNE) == []


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({}, True),
        ({"distributed": {"micro_batch_size": 4}}, True),
        ({"distributed": {"micro_batch_size": 1}}, False),
        ({"moe": {"balance_over": "sequence"}}, False),
        ({"moe": {"router_aux_loss_coef": 0}}, False),
    ],
)
def test_a_balancing_loss_that_depends_on_the_layout_is_named(change, differs):
    recipe = Recipe.model_validate(merge(merge(SMALL, MOE), change))
    assert [line[:33] for line in rules_experts.differs_by_layout(recipe)] == [
        "moe.balance_over: micro_batch bal"
    ] * differs
    assert rules_experts.differs_by_layout(Recipe.model_validate(SMALL)) == []


def fp8(**distributed):
    return {"distributed": {"precision": "fp8", **distributed}}


def test_fp8_is_taken_in_either_case_and_refused_where_there_is_no_gpu():
    recipe = Recipe.model_validate(merge(SMALL, fp8()))
    assert recipe.distributed.precision == "FP8" and recipe.distributed.fp8_recipe == "tensorwise"
    assert rules.breaches(recipe) == rules.breaches(recipe, 2, "cuda") == []
    [breach] = rules.breaches(recipe, 2, "cpu")
    assert breach.startswith("distributed.precision: FP8 needs an Ada, Hopper or newer GPU") and "BF16" in breach


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (fp8(kernels="local"), "distributed.kernels is local. Use kernels te or auto, or precision BF16"),
        (fp8(strategy="FSDP"), "FP8 with strategy FSDP is not verified"),
        (merge(fp8(), {"model": {"intermediate_size": 690}}), "model.intermediate_size: 690 is not a multiple of 16"),
        (
            merge(fp8(tensor_parallel=2), {"model": {"intermediate_size": 688 + 16}, "training": {"total_steps": 9}}),
            None,
        ),
        (fp8(tensor_parallel=2), "688 is not a multiple of 16 x distributed.tensor_parallel 2"),
        (
            merge(fp8(tensor_parallel=2), {"model": {"hidden_size": 336, "num_heads": 42, "intermediate_size": 704}}),
            "model.hidden_size: 336 is not a multiple of 16 x distributed.tensor_parallel 2",
        ),
        (fp8(fp8_recipe="mxfp8"), "not a multiple of 32, which distributed.fp8_recipe mxfp8 needs. Use 672 or 704"),
    ],
)
def test_fp8_says_what_does_not_go_with_it(change, says):
    found = breaches(change)
    assert found == [] if says is None else len(found) == 1 and says in found[0]


def test_fp8_trains_no_adapters():
    assert any("FP8 with `lora:`" in one for one in breaches({**fp8(), "lora": {"rank": 4, "alpha": 8}}, under=TUNE))


GRAPHS = {"distributed": {"cuda_graphs": True}}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"distributed": {"gradient_checkpointing": True}}, "gradient_checkpointing full"),
        ({"distributed": {"strategy": "FSDP"}}, "strategy FSDP"),
        ({"distributed": {"context_parallel": 2}}, "context_parallel 2"),
        ({"data": {"document_mask": True}}, "packed documents"),
        (MOE, "`moe:`"),
        ({"koshey": {"ewc_enabled": True}}, "the Fisher pass"),
        ({"evaluation": {"prompts": ["Once"]}}, "evaluation.prompts"),
    ],
)
def test_layers_that_cannot_be_recorded_are_named(change, says):
    assert breaches(GRAPHS) == []
    [breach] = breaches(merge(GRAPHS, change))
    assert breach.startswith("distributed.cuda_graphs: true with ") and says in breach and "cuda_graphs=false" in breach


def test_layers_are_recorded_in_a_run_of_one_stage_alone():
    stage = merge(SMALL, GRAPHS)
    assert rules.breaches(Recipe.model_validate({"stages": [stage]})) == []
    found = rules.breaches(Recipe.model_validate({"stages": [stage, stage]}))
    assert [one.split(":")[0] for one in found] == [f"stages.{i}.distributed.cuda_graphs" for i in (0, 1)]


def test_a_command_for_an_event_that_no_run_writes_is_refused_with_those_that_runs_write():
    [said] = breaches({"logging": {"on_event": {"\x1b[31m": ["true"]}}})
    assert said.startswith("logging.on_event.\\x1b[31m: no such event. Use one of: started, resumed, saved,")


def test_every_event_that_the_code_writes_and_that_matters_may_have_a_command():
    call = re.compile(r'(?:log_event|trackers\.event|self\.event|write_event)\((?:(?:self\.)?_?run_dir, )?"(\w+)"')
    texts = [path.read_text() for path in Path(features.__file__).parents[1].rglob("*.py")]
    written = {kind for text in texts for kind in call.findall(text)}
    assert {"saved", "stopping", "hang", "failed", "died", "damaged", "rewound"} <= written
    assert written <= set(features.EVENTS)


@pytest.mark.parametrize(
    ("logging", "says"),
    [
        ({}, None),
        ({"prometheus": "{folder}/run.prom", "on_event": {"failed": [sys.executable, "-c", ""]}}, None),
        ({"prometheus": "run.prom"}, None),
        ({"prometheus": "{folder}/absent/run.prom"}, "logging.prometheus: the folder of {folder}/absent/run.prom does"),
        ({"on_event": {"failed": ["no-such-program"]}}, "logging.on_event.failed: no-such-program is not a program on"),
        ({"on_event": {"failed": ["curl -X POST"]}}, "logging.on_event.failed: curl -X POST is not a program on"),
        ({"on_event": {"failed": [""]}}, "logging.on_event.failed:  is not a program on"),
    ],
)
def test_a_destination_that_is_not_here_is_named_before_anything_starts(logging, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = json.dumps(logging).replace("{folder}", str(tmp_path))
    found = needed.not_installed(Recipe.model_validate(SMALL | {"logging": json.loads(text)}))
    assert len(found) == (says is not None)
    assert "".join(found).startswith((says or "").replace("{folder}", str(tmp_path)))


def test_mlflow_without_its_package_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(needed.importlib.util, "find_spec", lambda name: None)
    [said] = needed.not_installed(Recipe.model_validate(SMALL | {"logging": {"mlflow": "file:mlruns"}}))
    assert said.startswith("logging.mlflow: file:mlruns needs the package mlflow") and "mlflow-skinny" in said


def test_a_recipe_that_runs_programs_says_which():
    recipe = Recipe.model_validate(SMALL | {"logging": {"on_event": {"failed": ["/bin/sh", "-c", "x"]}}})
    assert rules.warnings(recipe) == ["logging.on_event: the event `failed` runs the program '/bin/sh'."]
