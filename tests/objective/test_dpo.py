"""Tests of preference optimization against TRL on the same weights and pairs, and every layout against one process."""

from functools import partial

import numpy as np
import pytest
import ranks
import tiny
import torch
import tuned
from megatron.core.pipeline_parallel import get_forward_backward_func

from igla_mega.checkpoint.hf_names import weights_of
from igla_mega.config.features import Dpo
from igla_mega.data.micro_batch import SEQUENCES, MicroBatch
from igla_mega.data.tuning.pairs import Pair, rows_of
from igla_mega.engine.step import _shard_for_context_parallel
from igla_mega.model.output import TokenLogProbs
from igla_mega.model.shards import named_shards
from igla_mega.objective import dpo

PAIRS = 8
TOLERANCE = 1e-6
"""Absolute tolerance, for losses of 0.1 to 1 and rewards of 0.1: fp32 logits of a few units, summed over ten tokens."""


def pairs() -> list[Pair]:
    draw = np.random.default_rng(0)
    sizes = draw.integers((2, 3, 1), (12, 16, 12), size=(PAIRS, 3))
    return [Pair(*(draw.integers(0, tiny.VOCAB, n) for n in size)) for size in sizes]


def batches(layout, data_rank: int, reference=None):
    """Return the micro-batches of one data-parallel rank, `micro_batch_size` pairs each."""
    rows, size = rows_of(pairs(), layout.sequence_length, 0), 2 * layout.micro_batch_size
    for m in range(PAIRS // (layout.micro_batch_size * layout.data)):
        at = (m * layout.data + data_rank) * size
        own = rows[at : at + size]
        batch = MicroBatch(*(torch.tensor(np.stack([getattr(row, name) for row in own])) for name in SEQUENCES))
        yield batch if reference is None else batch._replace(reference=reference[at : at + size])


def passed(built, micro_batches, step, *, forward_only: bool, chunks=None):
    """Run a forward step over micro-batches of pairs; return the report of the last stage."""
    layout, chunks = built.layout, chunks or built.chunks
    own = [_shard_for_context_parallel(batch, built.mesh.context) for batch in micro_batches]
    return get_forward_backward_func()(
        forward_step_func=partial(step, context=built.mesh.context),
        data_iterator=iter(own),
        model=chunks[0],
        num_microbatches=len(own),
        seq_length=layout.padded_length,
        micro_batch_size=2 * layout.micro_batch_size,
        forward_only=forward_only,
    )


def bare(built):
    return [getattr(chunk, "module", chunk) for chunk in built.chunks]


def reference_of(built, micro_batches, chunks=None):
    with torch.no_grad():
        return passed(built, micro_batches, dpo.reference_step, forward_only=True, chunks=chunks)


def objective(built, section, reference=None, chunks=None):
    """Return the sums of the report over the global batch, after a forward and a backward pass."""
    built.optimizer.zero_grad()
    micro_batches = list(batches(built.layout, built.mesh.data.rank, reference))
    if reference is None and not section.reference_free:
        micro_batches = list(dpo.with_reference(micro_batches, reference_of(built, micro_batches, chunks)))
    reports = passed(built, micro_batches, partial(dpo.forward_step, dpo=section), forward_only=False)
    sums = torch.zeros(2 + len(dpo.METRICS), dtype=torch.float64)
    if reports and built.mesh.tensor.rank == 0:
        sums = torch.stack(reports).sum(0)
    torch.distributed.all_reduce(sums)
    means = (sums / sums[1]).tolist()
    return dict(zip(("loss", "pairs", *dpo.METRICS), means, strict=True))


def engine(recipe, base=None, section=None, mesh=None):
    built, shards, switch = tuned.engine(recipe, section, base=base, mesh=mesh)
    for chunk in bare(built):
        chunk.output = TokenLogProbs()
    return built, shards, switch


def gradients(built, shards, model) -> dict[str, torch.Tensor]:
    """Return the gradients by Hugging Face's names."""
    found = {shard.name: param.main_grad for shard, param in named_shards(built.chunks, shards)}
    return {name: part for w in weights_of(model) for name, part in zip(w.parts, w.split(found[w.native]), strict=True)}


def trl_trainer(policy, reference, folder, **settings):
    import datasets
    import tokenizers
    import transformers
    import trl

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="b", pad_token="a")
    return trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, **settings
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "a", "rejected": "b"}]),
        processing_class=tokenizer,
    )


def trl_inputs():
    rows, length = rows_of(pairs(), tiny.SEQUENCE, 0), tiny.SEQUENCE
    ordered = rows[0::2] + rows[1::2]
    prompts = [len(pair.prompt) for pair in pairs()] * 2
    places, ends = torch.arange(length), torch.tensor([row.documents[-1] for row in ordered])[:, None]
    return {
        "input_ids": torch.tensor(np.stack([row.tokens for row in ordered])),
        "attention_mask": (places < ends).long(),
        "completion_mask": ((places >= torch.tensor(prompts)[:, None]) & (places < ends)).long(),
    }


SMOOTH = 0.2
CASES = {
    "sigmoid": (Dpo(), {"loss_type": ["sigmoid"]}),
    "sigmoid, beta 0.2": (Dpo(beta=0.2), {"loss_type": ["sigmoid"], "beta": 0.2}),
    # TRL has no smoothed sigmoid of its own; it is this sum of two of its losses.
    "sigmoid, smoothed": (
        Dpo(label_smoothing=SMOOTH),
        {
            "loss_type": ["sigmoid", "robust"],
            "loss_weights": [2 * (1 - SMOOTH), 2 * SMOOTH - 1],
            "label_smoothing": SMOOTH,
        },
    ),
    "hinge": (Dpo(loss_type="hinge"), {"loss_type": ["hinge"]}),
    "ipo": (Dpo(loss_type="ipo", beta=0.3), {"loss_type": ["ipo"], "beta": 0.3}),
}


def against_trl(tmp_path):
    policy = tuned.llama(tmp_path / "policy")
    reference = tuned.llama(tmp_path / "reference")
    with torch.no_grad():
        for param in reference.parameters():
            param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(param.numel())) * 0.01)
    reference.save_pretrained(tmp_path / "moved")
    tuned.hugging_face.import_folder(tmp_path / "moved", tmp_path / "moved-native", say=print)
    recipe = tiny.recipe()
    built, shards, _ = engine(recipe, tmp_path / "policy-native")
    other, _, _ = engine(recipe, tmp_path / "moved-native", mesh=built.mesh)
    differences = {}
    for name, (section, settings) in CASES.items():
        trainer = trl_trainer(policy, reference, tmp_path / "trl", **settings)
        policy.zero_grad()
        loss = trainer.compute_loss(trainer.model, trl_inputs())
        loss.backward()
        theirs = {
            key: trainer._metrics["train"][f"rewards/{key}"][-1]
            for key in ("chosen", "rejected", "margins", "accuracies")
        }
        ours = objective(built, section, chunks=other.chunks)
        grads = gradients(built, shards, recipe.model)
        expected = {n: p.grad for n, p in policy.named_parameters()}
        assert grads.keys() == expected.keys()
        differences[name] = {
            "loss": abs(ours["loss"] - loss.item()),
            "chosen": abs(ours["dpo_reward_chosen"] - theirs["chosen"]),
            "rejected": abs(ours["dpo_reward_rejected"] - theirs["rejected"]),
            "margin": abs(ours["dpo_margin"] - theirs["margins"]),
            "accuracy": abs(ours["dpo_accuracy"] - theirs["accuracies"]),
            "gradients": max((grads[n] - expected[n]).abs().max().item() for n in expected),
            "largest gradient": max(g.abs().max().item() for g in expected.values()),
        }
    return differences


def test_losses_rewards_and_gradients_equal_those_of_trl(tmp_path):
    [differences] = ranks.run(1, against_trl, tmp_path, limit_seconds=300)
    for name, found in differences.items():
        print(name, {key: f"{value:.1e}" for key, value in found.items()})
    for found in differences.values():
        assert found.pop("largest gradient") > 1e-3
        assert max(found.values()) < TOLERANCE


def reference_free():
    built, _, _ = engine(tiny.recipe())
    found = objective(built, Dpo(reference_free=True, label_smoothing=0.1))
    sums = torch.cat(reference_of(built, list(batches(built.layout, 0)))).double().tolist()
    return found, sums


def test_without_a_reference_the_loss_is_that_of_the_log_probabilities_by_hand():
    import math

    [(found, sums)] = ranks.run(1, reference_free)
    margins = [0.1 * (sums[2 * i] - sums[2 * i + 1]) for i in range(PAIRS)]
    losses = [0.9 * math.log1p(math.exp(-m)) + 0.1 * math.log1p(math.exp(m)) for m in margins]
    assert abs(found["loss"] - sum(losses) / PAIRS) < TOLERANCE
    assert abs(found["dpo_margin"] - sum(margins) / PAIRS) < 1e-5


def three_references(tmp_path):
    """Return results with the three references: adapters off, a second model, and precomputed sums."""
    tuned.llama(tmp_path / "hf")
    recipe, base, section = tiny.recipe(), tmp_path / "hf-native", tuned.section(dropout=0.3)
    built, shards, switch = engine(recipe, base, section)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for shard, param in named_shards(built.chunks, shards):
            if shard.name.endswith("lora_B"):
                param.normal_(0, 0.05, generator=generator)
    second, _, _ = engine(recipe, base, mesh=built.mesh)
    micro_batches = list(batches(built.layout, 0))
    with switch.off():
        off = torch.cat(reference_of(built, micro_batches))
    other = torch.cat(reference_of(built, micro_batches, second.chunks))
    results = []
    for reference in (off, other, torch.tensor(np.array(other.numpy()))):
        torch.manual_seed(0)
        found = objective(built, Dpo(), reference=reference)
        norm = sum(p.main_grad.square().sum().item() for p in built.chunks[0].parameters() if p.requires_grad)
        results.append((found, norm))
    return torch.equal(off, other), results


def test_three_references_give_the_same_loss(tmp_path):
    [(same, (adapter, model, cached))] = ranks.run(1, three_references, tmp_path)
    assert same and adapter == model == cached
    assert adapter[0]["dpo_kl"] != 0.0 and adapter[1] > 0


def stepped(recipe):
    """Take five steps; the reference is the initial model, evaluated once."""
    built, _, _ = engine(recipe)
    made = reference_of(built, list(batches(built.layout, built.mesh.data.rank)))
    reports = []
    for _ in range(5):
        built.optimizer.zero_grad()
        micro_batches = dpo.with_reference(batches(built.layout, built.mesh.data.rank), made)
        found = passed(built, list(micro_batches), partial(dpo.forward_step, dpo=Dpo(beta=0.3)), forward_only=False)
        sums = torch.zeros(2 + len(dpo.METRICS), dtype=torch.float64)
        if found and built.mesh.tensor.rank == 0:
            sums = torch.stack(found).sum(0)
        torch.distributed.all_reduce(sums)
        norm, _ = built.optimizer.step(2e-3)
        reports.append(((sums[0] / sums[1]).item(), norm, *(sums[2:] / sums[1]).tolist()))
    return reports


# In whole runs and six layouts: tests/integration/test_tuning.py.
LAYOUTS = [
    (1, {"micro_batch_size": 4}),
    (2, {"tensor_parallel": 2, "sequence_parallel": True}),
    (2, {"strategy": "FSDP"}),
    (4, {"tensor_parallel": 2, "sequence_parallel": True, "pipeline_parallel": 2, "gradient_checkpointing": "full"}),
    (4, {"context_parallel": 2, "pipeline_parallel": 2}),
]


@pytest.fixture(scope="module")
def one_process():
    return ranks.run(1, stepped, tiny.recipe())[0]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_a_layout_equals_one_process(case, one_process):
    reports = ranks.run(case[0], stepped, tiny.recipe(**case[1]))[0]
    differences = np.abs(np.array(reports) - np.array(one_process))
    # At first the model is its reference: every pair is a tie, in every layout.
    accuracy = 2 + dpo.METRICS.index("dpo_accuracy")
    assert reports[0][accuracy] == one_process[0][accuracy] == 0.5
    loss, norm, metrics = differences[:, 0].max(), differences[:, 1].max(), differences[:, 2:].max()
    print(f"{case}: loss {loss:.1e}, gradient norm {norm:.1e}, metrics {metrics:.1e}")
    assert loss < 1e-5 and norm < 2e-5 and metrics < 1e-4
    assert reports[-1][0] < reports[0][0], "it learns to prefer"


@pytest.mark.parametrize(
    ("chosen", "rejected", "accuracy"),
    [
        (-20.0, -20.0, 0.5),
        (-20.0, -20.0 + 1e-6, 0.5),
        (-20.0, -20.0 - 1e-6, 0.5),
        (-20.0, -20.1, 1.0),
        (-20.1, -20.0, 0.0),
    ],
)
def test_a_tie_of_rewards_counts_half(chosen, rejected, accuracy):
    policy = torch.tensor([chosen, rejected], dtype=torch.float64)
    reference = torch.full((2,), -20.0, dtype=torch.float64)
    _, metrics = dpo.pair_losses(policy, reference, torch.full((2,), 5.0, dtype=torch.float64), Dpo())
    assert metrics[dpo.METRICS.index("dpo_accuracy")].tolist() == [accuracy]
