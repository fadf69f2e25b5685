"""Recipe 2's sequence length, for real: 131,072 tokens over four context-parallel ranks."""

import resource

import pytest
import ranks
import tiny
import torch

from igla_mega.data.micro_batch import MicroBatch
from igla_mega.engine.step import train_step
from igla_mega.plan.choose import choose_layout

LENGTH, STEPS = 131072, 2


def long_recipe(num_ranks: int, length: int = LENGTH):
    return tiny.recipe(
        model={
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 1,
            "num_kv_heads": 1,
            "intermediate_size": 64,
            "max_position": LENGTH,
            "rope_theta": 1e7,
        },
        training={"learning_rate": 1e-3, "batch_size": 1, "sequence_length": length},
        context_parallel=num_ranks,
        context_schedule="p2p",
        gradient_checkpointing="full",
        micro_batch_size=1,
    )


def long_steps(recipe, num_steps: int):
    """Losses, gradient norms, and how far memory grew beyond the built engine, in bytes."""
    engine, _ = tiny.engine(recipe)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reports = []
    for step in range(num_steps):
        length = engine.layout.sequence_length
        row = torch.randint(0, tiny.VOCAB, (1, length + 1), generator=torch.Generator().manual_seed(step))
        # Half of the row repeats the other half: what is far away is worth attending to.
        row[:, length // 2 : 2 * (length // 2)] = row[:, : length // 2]
        batch = MicroBatch(
            tokens=row[:, :-1],
            labels=row[:, 1:],
            loss_mask=torch.ones(1, length),
            position_ids=torch.arange(length).unsqueeze(0),
        )
        report = train_step(engine, iter([batch]), step=step, seed=1, learning_rate=1e-3)
        reports.append((report.loss, report.grad_norm))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return reports, grown * 1024


def test_steps_of_131072_tokens_happen_on_four_ranks_within_memory():
    results = ranks.run(4, long_steps, long_recipe(4), STEPS, limit_seconds=900)
    reports, grown = results[0][0], max(result[1] for result in results)
    print(f"131,072 tokens on 4 ranks: {reports}, {grown / 2**20:.0f} MiB a rank")
    assert all(result[0] == reports for result in results)
    assert reports[0][0] == pytest.approx(5.52, abs=0.1)  # ln(250) nats: nothing is known yet
    assert reports[1] != reports[0]
    # The scores alone would be 4 * 131072^2 / 4 bytes a head; logits and their gradient 2 * 4 * 32768 * 250.
    assert grown < 400 * 2**20


def test_a_long_row_on_four_ranks_equals_one_process():
    one, _ = ranks.run(1, long_steps, long_recipe(1, 4096), 3)[0]
    four, _ = ranks.run(4, long_steps, long_recipe(4, 4096), 3)[0]
    for (loss, grad_norm), (loss_of_one, grad_norm_of_one) in zip(four, one, strict=True):
        assert abs(loss - loss_of_one) < 1e-6 and abs(grad_norm - grad_norm_of_one) < 1e-5


def test_131072_tokens_have_a_layout_on_the_cards_gpus():
    from igla_mega.config.load import load_recipe

    layout = choose_layout(load_recipe("koshey_7b"), 128, "cuda")
    assert (layout.context, layout.data, layout.num_microbatches) == (8, 16, 1)
