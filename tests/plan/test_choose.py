import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.config.merging import merge
from igla_mega.config.schema import Recipe
from igla_mega.layout.layout import Layout, lay_out
from igla_mega.plan.choose import choose_layout

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


def layout(world_size: int, device: str = "cpu", **sections) -> Layout:
    return choose_layout(Recipe.model_validate(merge(SMALL, sections)), world_size, device)


def refusal(world_size: int, **sections) -> str:
    with pytest.raises(ConfigError) as caught:
        layout(world_size, **sections)
    return str(caught.value)


def test_two_cpu_ranks_split_every_matrix():
    chosen = layout(2)
    assert (chosen.tensor, chosen.data, chosen.sequence_parallel) == (2, 1, False)
    assert (chosen.global_batch, chosen.micro_batch_size, chosen.num_microbatches) == (64, 8, 8)


def test_cpu_ranks_beyond_the_key_value_heads_split_the_batch():
    assert [(layout(n).tensor, layout(n).data) for n in (1, 2, 4, 8)] == [(1, 1), (2, 1), (2, 2), (2, 4)]


def test_gpus_split_the_batch():
    chosen = layout(8, "cuda", distributed={"strategy": "FSDP"})
    assert (chosen.tensor, chosen.data, chosen.strategy) == (1, 8, "FSDP")
    assert (chosen.micro_batch_size, chosen.num_microbatches) == (8, 1)


def test_a_long_sequence_fills_a_gpu_alone():
    chosen = layout(4, "cuda", model={"max_position": 8192}, training={"batch_size": 32})
    assert (chosen.micro_batch_size, chosen.num_microbatches) == (1, 8)


def test_fixed_sizes_are_kept_and_the_rest_is_data():
    where = {"tensor_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2, "micro_batch_size": 4}
    chosen = layout(8, distributed=where)
    assert (chosen.tensor, chosen.pipeline, chosen.virtual_pipeline, chosen.data) == (2, 2, 2, 2)
    assert (chosen.micro_batch_size, chosen.num_microbatches) == (4, 8)
    assert chosen.world_size == 8


def test_an_interleaved_schedule_gets_a_multiple_of_its_ranks_in_micro_batches():
    where = {"tensor_parallel": 1, "pipeline_parallel": 2, "virtual_pipeline": 2}
    chosen = layout(2, training={"batch_size": 6}, distributed=where)
    assert (chosen.micro_batch_size, chosen.num_microbatches) == (3, 2)


def test_sequence_parallelism_is_on_between_gpus_and_on_request_between_cpus():
    assert layout(2, "cuda", distributed={"tensor_parallel": 2}).sequence_parallel
    assert layout(2, distributed={"sequence_parallel": True}).sequence_parallel
    alone = layout(1, distributed={"sequence_parallel": True})
    assert not alone.sequence_parallel
    assert alone.notes[0].startswith("sequence_parallel: disabled, since there is only one tensor-parallel rank")


def test_fsdp_with_one_data_rank_runs_as_ddp_and_says_so():
    chosen = layout(2, distributed={"strategy": "FSDP"})
    assert chosen.strategy == "DDP"
    assert chosen.notes == (
        "strategy: FSDP has only one data-parallel rank to shard over (2 in all, tensor_parallel 2, pipeline_parallel 1); "
        "DDP is used, which is equivalent there.",
    )
    assert layout(4, distributed={"strategy": "FSDP"}).notes == ()


@pytest.mark.parametrize(
    ("training", "sizes"),
    [
        ({"batch_size": "16K tokens"}, (64, 8, 4)),
        ({"batch_size": 32}, (32, 8, 2)),
        ({"batch_size": 4, "gradient_accumulation": 4}, (32, 4, 4)),
    ],
)
def test_a_batch_in_tokens_or_sequences_or_accumulated_ones(training, sizes):
    chosen = layout(4, training=training, distributed={"tensor_parallel": 2})
    assert (chosen.global_batch, chosen.micro_batch_size, chosen.num_microbatches) == sizes


def test_experts_spread_over_gpus():
    moe = {"num_experts": 8, "num_experts_per_tok": 2}
    assert layout(4, "cuda", moe=moe).expert == 4
    on_cpu = layout(4, moe=moe)
    assert (on_cpu.tensor, on_cpu.data, on_cpu.expert) == (1, 4, 4)
    many = Recipe.model_validate(merge(SMALL, {"moe": {"num_experts": 64}}))
    assert lay_out(many, 64, "cuda").expert == 8, "as many as a node has"


def test_experts_spread_over_tensor_and_context_ranks_too():
    moe = {"num_experts": 8, "num_experts_per_tok": 2}
    folded = layout(4, moe=moe, distributed={"tensor_parallel": 2, "context_parallel": 2, "expert_parallel": 4})
    assert (folded.data, folded.expert, folded.sequence_parallel) == (1, 4, True)
    split = layout(4, moe=moe, distributed={"expert_tensor_parallel": 2})
    assert (split.expert, split.expert_tensor) == (2, 2)
    said = refusal(2, moe=moe, distributed={"tensor_parallel": 2, "expert_parallel": 4})
    assert "expert_parallel: 4 does not divide the 2 ranks of the tensor, context and data axes. Use 2." in said


def test_a_base_model_without_a_known_length_asks_for_it():
    tune = {"base_model": "llama-7b", "training": {"batch_size": 8, "epochs": 1}}
    with pytest.raises(
        ConfigError, match=r"training\.sequence_length: not given, and base_model llama-7b is not loaded"
    ):
        choose_layout(Recipe.model_validate(tune), 1)
    tune["training"]["sequence_length"] = 128
    assert choose_layout(Recipe.model_validate(tune), 2).data == 2


def test_stages_have_a_layout_each():
    with pytest.raises(ConfigError, match="each stage has its own layout"):
        choose_layout(Recipe.model_validate({"stages": [SMALL]}), 1)


@pytest.mark.parametrize(
    ("world_size", "sections", "says"),
    [
        (
            3,
            {},
            "training.batch_size: 16K tokens = 64 sequences, not divisible by 3 data-parallel ranks. "
            "Use 63 or 66 sequences, or 2 or 4 ranks.",
        ),
        (
            1,
            {"distributed": {"micro_batch_size": 5}},
            "distributed.micro_batch_size: 5 does not divide the 64 sequences of a data-parallel rank "
            "(batch 64 / 1 ranks). Use 4 or 8.",
        ),
        (2, {"distributed": {"tensor_parallel": 4}}, "distributed.tensor_parallel: 4 does not divide"),
        (
            2,
            {"distributed": {"pipeline_parallel": 4}},
            "distributed: pipeline_parallel 4 = 4 ranks does not divide the world of 2. "
            "Start 4 ranks, or use 2 in all.",
        ),
        (
            2,
            {"training": {"batch_size": 3}, "distributed": {"pipeline_parallel": 2, "virtual_pipeline": 2}},
            "training.batch_size: 3 gives each data-parallel rank 3 sequences, not divisible by pipeline_parallel 2, "
            "which virtual_pipeline requires. Use 2 or 4 sequences in all, or virtual_pipeline 1.",
        ),
        (
            2,
            {"distributed": {"pipeline_parallel": 2, "virtual_pipeline": 2, "micro_batch_size": 64}},
            "distributed.micro_batch_size: 64 gives 1 micro-batches, not divisible by pipeline_parallel 2, which "
            "virtual_pipeline requires. Use 32, or virtual_pipeline 1.",
        ),
        (
            2,
            {
                "moe": {"num_experts": 8},
                "distributed": {"expert_parallel": 4, "tensor_parallel": 1},
            },
            "distributed.expert_parallel: 4 does not divide the 2 data-parallel ranks. Use 2.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers_that_would(world_size, sections, says):
    assert says in refusal(world_size, **sections)
