"""Adapters, codes of 4 bits and Elastic Weight Consolidation on a mixture of experts."""

from pathlib import Path

import numpy as np
import pytest
import ranks
import small_run
import tiny
import torch
import torch.distributed as dist
import yaml
from experts import ALLGATHER as GATHERED
from experts import CP, EP, FSDP, FULL, MOE, PP, STEADY, TOLERANCE, TP, furthest, recipe, reports
from layouts import label
from states import pieces, whole

from igla_mega.checkpoint import frozen_base, load_model, store
from igla_mega.checkpoint.adapters import export_adapters, merge_adapters
from igla_mega.checkpoint.base import BASE, base_note, digest_of_checkpoint
from igla_mega.checkpoint.pieces import Reader
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import dump, load_recipe
from igla_mega.config.schema import Recipe
from igla_mega.data.micro_batch import MicroBatch
from igla_mega.distributed.mesh import build_mesh
from igla_mega.engine.build import build_engine
from igla_mega.ops.categorical import token_keys
from igla_mega.plan.choose import choose_layout
from igla_mega.train import fisher_estimate

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARED = {"shared_intermediate_size": 64}
SAMPLES = 5


def adapted(*, quantization=None, dropout=0.0, moe=None, **layout) -> Recipe:
    plain = recipe(moe, **layout).model_dump(exclude_none=True)
    lora = {"rank": 4, "alpha": 8, "target_modules": ALL, "dropout": dropout}
    more = {"quantization": quantization} if quantization is not None else {}
    return Recipe.model_validate({**plain, "base_model": "base", "lora": lora, **more})


def save_base(wanted, folder: str) -> None:
    built, _ = tiny.engine(wanted)
    writer = store.CheckpointWriter(Path(folder), built.mesh, Retention(1), asynchronous=False)
    writer.save(built.states(), Progress(step=1), dump(wanted))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folders = {}

    def of(moe=None) -> Path:
        if str(moe) not in folders:
            folder = tmp_path_factory.mktemp("base")
            ranks.run(1, save_base, recipe(moe, STEADY), str(folder))
            folders[str(moe)] = store.step_dir(folder, 1)
        return folders[str(moe)]

    return of


def tune(wanted, base: Path, folder: str = "", num_steps: int = 3) -> list[dict]:
    layout = choose_layout(wanted, dist.get_world_size(), "cpu")
    mesh = build_mesh(layout, 1)
    built, shards = build_engine(wanted, layout, mesh, torch.device("cpu"), initialize=False, base=base)
    frozen = [param.detach().clone() for _, param in frozen_base.frozen(built.chunks, shards)]
    # Without dropout in the recipe the seed has no effect.
    found = reports(built, 0, num_steps, rate=1e-2, dropout_seed=7)
    if layout.strategy != "FSDP":
        after = [param for _, param in frozen_base.frozen(built.chunks, shards)]
        assert all(torch.equal(a, b) for a, b in zip(frozen, after, strict=True)), "the base does not move"
    if folder:
        digest = digest_of_checkpoint(base)
        writer = store.CheckpointWriter(Path(folder), mesh, Retention(1), asynchronous=False)
        note = {BASE: base_note(base, digest, "base")}
        writer.save(built.states(), Progress(step=1), dump(wanted), note)
    return found


DROPPED = 0.1


@pytest.fixture(scope="module")
def tuned_alone(base):
    return ranks.run(1, tune, adapted(moe=SHARED, dropout=DROPPED), base(SHARED))[0]


@pytest.mark.parametrize(
    "case",
    [(2, {**TP, **EP}), (2, {**FSDP, **EP}), (2, {**CP, **EP, **GATHERED}), (4, {**PP, **EP, **FULL})],
    ids=label,
)
def test_adapters_of_experts_train_alike_in_every_layout_with_dropout(case, base, tuned_alone):
    """Masks are functions of the token and the expert, whatever the order in which a dispatcher delivers tokens."""
    num_ranks, layout = case
    moe = {**SHARED, "dispatcher": layout.get("dispatcher", "alltoall")}
    where = {key: value for key, value in layout.items() if key != "dispatcher"}
    found = ranks.run(num_ranks, tune, adapted(moe=moe, dropout=DROPPED, **where), base(SHARED))[0]
    assert furthest(found, tuned_alone) < TOLERANCE


def test_dropout_of_adapters_on_experts_is_drawn(base, tuned_alone):
    whole = ranks.run(1, tune, adapted(moe=SHARED), base(SHARED))[0]
    assert whole[0]["loss"] - whole[-1]["loss"] != 0
    # lora_B starts at zero, so the first loss is the same; from the second step on the masks show.
    assert whole[0]["loss"] == tuned_alone[0]["loss"] and furthest(whole, tuned_alone) > 1e-4


def test_a_mixture_as_base_model_needs_no_section_for_its_experts(base, tmp_path):
    recipe = yaml.safe_load(small_run.write_recipe(tmp_path, training={"total_steps": 2}).read_text())
    del recipe["model"]
    recipe["distributed"] |= {"expert_parallel": 2, "micro_batch_size": 1}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump({**recipe, "base_model": str(base())}))
    said = small_run.train(2, tmp_path / "tuned.yaml", tmp_path / "run")
    assert "Error" not in "".join(said)
    trained = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert trained.moe.num_experts == MOE["num_experts"] and trained.distributed.expert_parallel == 2
    names = Reader(store.step_dir(tmp_path / "run" / "checkpoints", 2)).shapes()
    assert "decoder.layers.3.mlp.experts.local_experts.3.linear_fc1.weight" in names


def logits(checkpoints) -> list[torch.Tensor]:
    tokens = torch.randint(0, tiny.VOCAB, (2, 32), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(32).expand(2, 32)
    with torch.no_grad():
        return [load_model.load_model(checkpoint)[0](tokens, positions, None) for checkpoint in checkpoints]


def test_adapters_of_experts_merge_into_their_base(base, tmp_path):
    ranks.run(2, tune, adapted(moe=SHARED, **EP), base(SHARED), str(tmp_path))
    checkpoint, merged = store.step_dir(tmp_path, 1), tmp_path / "merged"
    names = Reader(checkpoint).shapes()
    assert "decoder.layers.3.mlp.experts.local_experts.3.linear_fc1.up_proj.lora_B" in names
    assert "decoder.layers.0.mlp.shared_experts.linear_fc2.down_proj.lora_A" in names
    merge_adapters(checkpoint, merged)
    before, with_adapters, after = ranks.run(1, logits, [base(SHARED), checkpoint, merged])[0]
    assert (with_adapters - after).abs().max() < TOLERANCE < (before - after).abs().max()
    with pytest.raises(ConfigError, match=r"adapters of experts.*\n.*--merge"):
        export_adapters(checkpoint, tmp_path / "peft")


def test_experts_in_four_bits_train_alike_on_two_ranks(base):
    pytest.importorskip("bitsandbytes")
    coded = {"compute_dtype": "float32"}
    plain = ranks.run(1, tune, adapted(), base())[0]
    one = ranks.run(1, tune, adapted(quantization=coded), base())[0]
    two = ranks.run(2, tune, adapted(quantization=coded, **EP), base())[0]
    assert furthest(two, one) < TOLERANCE < furthest(plain, one)


def samples(layout, data_rank: int):
    rows = torch.randint(0, tiny.VOCAB, (SAMPLES, tiny.SEQUENCE + 1), generator=torch.Generator().manual_seed(5))
    positions = torch.arange(tiny.SEQUENCE).unsqueeze(0)
    for first in range(0, SAMPLES, layout.data):
        number = first + data_rank
        yield MicroBatch(
            tokens=rows[min(number, SAMPLES - 1)].unsqueeze(0)[:, :-1].contiguous(),
            labels=token_keys(3, number, positions),
            loss_mask=torch.full((1, tiny.SEQUENCE), float(number < SAMPLES)),
            position_ids=positions,
        )


def fisher_of(wanted):
    built, _ = tiny.engine(wanted)
    sums = [torch.zeros_like(state.values["master"]) for state in built.optimizer.states()]
    rows = samples(built.layout, built.mesh.data.rank)
    assert (
        fisher_estimate.accumulate(built, rows, SAMPLES, sums, lambda done: None, draw=True) == SAMPLES * tiny.SEQUENCE
    )
    return pieces(built, sums), reports(built, 0, 2)


@pytest.fixture(scope="module")
def fisher_alone():
    found, after = ranks.run(1, fisher_of, recipe())[0]
    return whole([found]), after


@pytest.mark.parametrize(
    "case",
    [
        (2, EP),
        (2, {**TP, **EP}),
        (2, {**CP, **EP}),
        (4, {**EP, **PP}),
        (2, FSDP),
    ],
    ids=label,
)
def test_a_layout_takes_the_same_fisher_of_experts_as_one_process(case, fisher_alone):
    results = ranks.run(case[0], fisher_of, recipe(**case[1]))
    found, expected = whole([part for part, _ in results]), fisher_alone[0]
    assert found.keys() == expected.keys()
    # Drawn labels flip where a probability lies at a draw; none does here.
    errors = [np.linalg.norm(found[name] - expected[name]) / np.linalg.norm(expected[name]) for name in expected]
    assert max(errors) < TOLERANCE
    assert furthest(results[0][1], fisher_alone[1]) < TOLERANCE, "and training continues unchanged"


def test_the_balancing_loss_is_not_in_the_fisher():
    weights = [0.0, 1.0]
    found = [whole([ranks.run(1, fisher_of, recipe({**MOE, "router_aux_loss_coef": w}))[0][0]]) for w in weights]
    assert all((found[0][name] == found[1][name]).all() for name in found[0])
