"""A mixture of experts, held to one process in every layout, and to transformers' Mixtral with losses written out."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import tiny
import torch
from covering import covering
from experts import (
    ALLGATHER,
    CP,
    DROPPING,
    EP,
    ETP,
    FSDP,
    FULL,
    PP,
    STEADY,
    TOLERANCE,
    TP,
    VPP,
    furthest,
    recipe,
    reports,
)  # fmt: skip
from layouts import label

from igla_mega.checkpoint import hugging_face, load_model, store
from igla_mega.checkpoint.load import find_checkpoint
from igla_mega.checkpoint.pieces import Reader
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import dump
from igla_mega.engine.build import load_into
from igla_mega.engine.step import evaluate, train_step
from igla_mega.evaluate.generate import sample
from igla_mega.plan.base_model import experts_of


def trained(wanted, num_steps: int = 5) -> list[dict]:
    return reports(tiny.engine(wanted)[0], 0, num_steps)


@pytest.fixture(scope="module")
def alone():
    known: dict[str, list[dict]] = {}

    def of(moe: dict, training: dict) -> list[dict]:
        wanted = recipe({key: value for key, value in moe.items() if key != "dispatcher"}, training)
        if (key := dump(wanted)) not in known:
            known[key] = ranks.run(1, trained, wanted)[0]
        return known[key]

    return of


LAYOUTS = [
    (2, EP),
    (2, {**TP, **EP}),
    (4, {**PP, **EP}),
    (2, {**CP, **EP}),
    (2, {**FSDP, **EP}),
    (2, ETP),
    (1, {"gradient_checkpointing": "selective"}),
    (2, TP),
    (2, PP),
    (2, CP),
    (4, EP),
    (2, {**EP, "distributed_optimizer": False}),
    (4, {**VPP, **EP, **FULL}),
    (4, {**TP, **CP, "expert_parallel": 4}),
    (4, {**TP, **PP, **EP, **FULL}),
    (4, {**FSDP, **EP}),
    (4, {**FSDP, **TP, "expert_parallel": 4}),
    (2, {**FSDP, **TP}),
    (2, {**TP, **ETP}),
    (4, {**TP, **ETP, **EP}),
    (8, {**TP, **PP, "expert_parallel": 4}),
]
KINDS = {"dropless": STEADY, "capacity": DROPPING}
# Every layout, and every pair of its parts, and each part both ways.
CASES = covering(
    [(case, kind) for kind in KINDS for case in LAYOUTS],
    features=lambda case: {**case[0][1], "kind": case[1]},
    each=lambda case: label(case[0]),
)


@pytest.mark.parametrize(("case", "kind"), CASES, ids=label)
def test_a_layout_equals_one_process(case, kind, alone):
    results = ranks.run(case[0], trained, recipe(training=KINDS[kind], **case[1]), limit_seconds=120)
    assert all(result == results[0] for result in results), "every rank reports the same"
    far = furthest(results[0], alone({}, KINDS[kind]))
    print(f"{label(case)}: {far:.1e}")
    assert far < TOLERANCE


OPTIONS = [
    (2, ALLGATHER, EP),
    (4, ALLGATHER, {**TP, **EP, **ETP}),
    (2, {"shared_intermediate_size": 48}, {**TP, **EP}),
    (2, {"bias_update_rate": 0.01}, EP),
    (4, {"bias_update_rate": 0.01}, {**TP, **PP}),
    (2, {"bias_update_rate": 0.01}, {**FSDP, **EP}),
    (2, {"pre_softmax": True, "scaling_factor": 2.0}, EP),
    (2, {"balance_over": "sequence"}, {**TP, "micro_batch_size": 4}),
    (2, {"balance_over": "sequence"}, {**EP, "micro_batch_size": 2}),
    (2, {"capacity_over": "rank"}, EP),
]


@pytest.mark.parametrize("case", OPTIONS, ids=label)
def test_an_option_means_the_same_in_any_layout(case, alone):
    num_ranks, moe, layout = case
    # Two tokens that are equally probable to the last bit may change places at the edge of a capacity: not in these.
    training = STEADY if "shared_intermediate_size" in moe else DROPPING
    far = furthest(ranks.run(num_ranks, trained, recipe(moe, training, **layout))[0], alone(moe, training))
    print(f"{label(case)}: {far:.1e}")
    assert far < TOLERANCE


def test_options_change_what_is_trained(alone):
    plain = alone({}, DROPPING)
    for moe in ({"scaling_factor": 2.0}, {"bias_update_rate": 0.01}, {"shared_intermediate_size": 48}):
        assert (
            furthest([{"loss": s["loss"]} for s in alone(moe, DROPPING)], [{"loss": s["loss"]} for s in plain]) > 1e-4
        )


@pytest.mark.parametrize("moe, num_ranks", [({"capacity_over": "rank"}, 2), ({"capacity_over": "global"}, 1)])
def test_filling_up_to_capacity_changes_no_number_and_other_capacities_do(moe, num_ranks, alone):
    layout = EP if num_ranks == 2 else {}
    wanted = ranks.run(num_ranks, trained, recipe(moe, DROPPING, **layout))[0]
    if moe["capacity_over"] == "rank":
        filled = ranks.run(num_ranks, trained, recipe({**moe, "pad_to_capacity": True}, DROPPING, **layout))[0]
        assert furthest(filled, wanted) < TOLERANCE
    else:  # of one rank with a sequence at a time all three are one
        assert furthest(wanted, alone({}, DROPPING)) < TOLERANCE


def drop_rates(wanted) -> list[float]:
    [step] = trained(wanted, 1)
    return [value for name, value in step.items() if name.startswith("drop_rate")]


def test_capacity_of_a_rank_depends_on_the_layout_and_that_of_a_sequence_does_not():
    two = {**CP, "expert_parallel": 1}
    for over, same in (("sequence", True), ("rank", False)):
        one, split = (ranks.run(n, drop_rates, recipe({"capacity_over": over}, DROPPING, **layout))[0]
                      for n, layout in ((1, {}), (2, two)))  # fmt: skip
        assert (max(abs(a - b) for a, b in zip(one, split, strict=True)) < 1e-9) is same


def evaluated(wanted) -> float:
    built, _ = tiny.engine(wanted)
    return evaluate(built, tiny.batches(0, built.layout, built.mesh.data.rank), 1)


def test_nothing_is_dropped_in_evaluation():
    losses = [
        ranks.run(n, evaluated, recipe(moe, {**STEADY, **factor}, **layout))[0]
        for n, moe, factor, layout in [
            (1, {}, {}, {}),
            (1, {}, {"expert_capacity_factor": 0.3}, {}),
            (2, {"capacity_over": "rank", "pad_to_capacity": True}, {"expert_capacity_factor": 0.3}, EP),
        ]
    ]
    assert max(losses) - min(losses) < TOLERANCE


def continued(wanted, folder: str) -> list[list[int]]:
    """The five likeliest next tokens, drawn one by one over a cache, and each by a pass over the whole text."""
    built, _ = tiny.engine(wanted)
    writer = store.CheckpointWriter(Path(folder), built.mesh, Retention(1), asynchronous=False)
    writer.save(built.states(), Progress(step=1), dump(wanted))
    model, _ = load_model.load_model(store.step_dir(Path(folder), 1))
    text = [5, 17, 40, 8]
    drawn = list(sample(model, text, max_new_tokens=5))
    whole = list(text)
    for _ in range(5):
        tokens = torch.tensor([whole])
        with torch.no_grad():
            logits = model(tokens, torch.arange(len(whole))[None], None)
        whole.append(int(logits[0, -1, : tiny.VOCAB].argmax()))
    return [drawn, whole[len(text) :]]


def test_generation_routes_one_token_at_a_time(tmp_path):
    filled = {"capacity_over": "rank", "pad_to_capacity": True}
    drawn, expected = ranks.run(1, continued, recipe(filled, DROPPING), str(tmp_path))[0]
    assert drawn == expected and len(drawn) == 5


def test_experts_must_be_those_of_the_base_model():
    sparse = recipe().moe
    assert experts_of(None, None, Path("base")) is None
    assert experts_of(sparse, None, Path("base")) == experts_of(sparse, sparse, Path("base")) == sparse
    with pytest.raises(ConfigError, match=r"base is a dense model, but the recipe has 4 experts(.|\n)*--upcycle 4"):
        experts_of(None, sparse, Path("base"))
    with pytest.raises(ConfigError, match=r"moe\.num_experts: is 8, but base has 4"):
        experts_of(sparse, recipe({"num_experts": 8}).moe, Path("base"))


# --- the losses written out ---


def uneven(built):
    """Rows of different lengths with padding behind them; in each some tokens are no targets."""
    layout, mesh = built.layout, built.mesh
    for m, batch in enumerate(tiny.batches(0, layout, mesh.data.rank)):
        mask = batch.loss_mask.clone()
        for row in range(len(mask)):
            mask[row, 31 - 3 * ((m * layout.data + mesh.data.rank) * layout.micro_batch_size + row) :] = 0
        yield batch._replace(loss_mask=mask)


def first_step(wanted, folder: str = "") -> dict:
    """Save the initial weights, and take a step."""
    built, _ = tiny.engine(wanted)
    if folder:
        writer = store.CheckpointWriter(Path(folder), built.mesh, Retention(1), asynchronous=False)
        writer.save(built.states(), Progress(step=1), dump(wanted))
    report = train_step(built, uneven(built), step=0, seed=1, learning_rate=1e-3)
    load = report.load
    return {
        "loss": report.loss, "grad_norm": report.grad_norm, "balance": load.balance, "visits": load.tokens_per_expert,
        "drop_rate": load.drop_rate, "entropy": load.entropy,
    }  # fmt: skip


def written_out(folder: Path, micro_batches: list[dict], wanted) -> dict:
    """Loss, gradient norm and balance by transformers' Mixtral, with dropping and balancing in plain loops."""
    from transformers import MixtralForCausalLM

    model, moe = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32), wanted.moe
    experts, k, factor = moe.num_experts, moe.num_experts_per_tok, wanted.training.expert_capacity_factor
    real = torch.zeros(0)
    seen: list[dict] = []

    def routed(gate, args, result):
        logits, weights, chosen = result
        probabilities, balances = torch.softmax(logits.double(), -1).view(*real.shape, experts), []
        chosen_by_row, weights_by_row = chosen.view(*real.shape, k), weights.view(*real.shape, k).clone()
        tokens_per_expert, dropped, entropy = [0] * experts, 0, 0.0
        for row in range(len(real)):
            length = int(real[row].sum())
            most = -(-length * k * factor // experts) if factor else length
            for expert in range(experts):
                places = (chosen_by_row[row] == expert).nonzero().tolist()
                best = sorted(places, key=lambda p: (p[0] >= length, -weights_by_row[row, p[0], p[1]].item()))
                tokens_per_expert[expert] += sum(p[0] < length for p in places)
                for p in best[int(most) :]:
                    dropped += p[0] < length
                    weights_by_row[row, p[0], p[1]] = 0
            for p in range(length):
                entropy -= sum(float(x) * float(x.log()) for x in probabilities[row, p].detach())
        rows = [[row] for row in range(len(real))] if moe.balance_over == "sequence" else [list(range(len(real)))]
        for together in rows:
            tokens = [(row, p) for row in together for p in range(int(real[row].sum()))]
            balance = torch.zeros((), dtype=torch.float64)
            for expert in range(experts):
                share = sum(int((chosen_by_row[t] == expert).sum()) for t in tokens) / (k * len(tokens))
                balance = balance + share * sum(probabilities[t][expert] for t in tokens) / len(tokens)
            balances.append((together, experts * balance))
        seen.append({"balances": balances, "visits": tokens_per_expert, "dropped": dropped, "entropy": entropy})
        return logits, weights_by_row.view_as(weights), chosen

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(routed)
    num_targets = sum(b.loss_mask.sum() for b in micro_batches)
    total, losses, num_real = torch.zeros((), dtype=torch.float64), 0.0, 0
    sums: dict[int, dict] = {}
    for batch in micro_batches:
        ends = [int((row > 0).nonzero().max()) + 2 for row in batch.loss_mask]
        real = torch.arange(32)[None] < torch.tensor(ends)[:, None]
        num_real += int(real.sum())
        seen.clear()
        logits = model(batch.tokens).logits
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        task = (nats * batch.loss_mask.flatten()).sum()
        total, losses = total + task, losses + float(task.detach())
        for layer, found in enumerate(seen):
            own = sums.setdefault(layer, {"balance": 0.0, "visits": [0] * experts, "dropped": 0, "entropy": 0.0})
            for together, balance in found["balances"]:
                weight = float(batch.loss_mask[together].sum())
                total = total + moe.router_aux_loss_coef * weight * balance
                own["balance"] += weight * float(balance)
            own["visits"] = [a + b for a, b in zip(own["visits"], found["visits"], strict=True)]
            own["dropped"] += found["dropped"]
            own["entropy"] += found["entropy"]
    (total / num_targets).backward()
    layers = list(sums.values())
    return {
        "loss": losses / float(num_targets),
        "grad_norm": float(torch.stack([p.grad.norm() for p in model.parameters()]).norm()),
        "balance": [own["balance"] / float(num_targets) for own in layers],
        "visits": [[v / sum(own["visits"]) for v in own["visits"]] for own in layers],
        "drop_rate": [own["dropped"] / sum(own["visits"]) for own in layers],
        "entropy": [own["entropy"] / num_real for own in layers],
    }


def flat(values) -> list[float]:
    return [one for value in values for one in flat(value)] if isinstance(values, list) else [values]


def whole_micro_batches(size: int) -> list[dict]:
    class Layout:
        num_microbatches, data, micro_batch_size, sequence_length = tiny.ROWS // size, 1, size, tiny.SEQUENCE

    class Alone:
        layout, mesh = Layout, type("Mesh", (), {"data": type("Axis", (), {"rank": 0})})

    return list(uneven(Alone))


@pytest.mark.parametrize(
    "moe, training, size, layouts",
    [
        ({}, DROPPING, 1, [(2, {**TP, **EP})]),
        ({}, STEADY, 1, [(2, EP), (2, {**TP, **EP}), (2, {**CP, **EP}), (2, PP)]),
        ({}, DROPPING, 4, [(2, {**EP, "micro_batch_size": 4}), (2, {**CP, "micro_batch_size": 4})]),
        ({"balance_over": "sequence"}, DROPPING, 4, [(2, {**CP, "micro_batch_size": 4})]),
    ],
    ids=["capacity", "dropless", "capacity, micro-batches of 4", "by sequence"],
)
def test_the_losses_are_those_written_out(moe, training, size, layouts, tmp_path):
    pytest.importorskip("transformers")
    wanted = recipe(moe, training, micro_batch_size=size)
    ours = ranks.run(1, first_step, wanted, str(tmp_path))[0]
    hugging_face.export_folder(store.step_dir(tmp_path, 1), tmp_path / "hf", say=lambda text: None)
    oracle = written_out(tmp_path / "hf", whole_micro_batches(size), wanted)
    if training is DROPPING:
        assert min(oracle["drop_rate"]) > 0.02
    results = [ours, *(ranks.run(n, first_step, recipe(moe, training, **layout))[0] for n, layout in layouts)]
    for result in results:
        assert result.keys() == oracle.keys()
        for key, value in result.items():
            pairs = zip(flat(value), flat(oracle[key]), strict=True)
            assert max(abs(a - b) for a, b in pairs) < TOLERANCE, key


# --- checkpoints ---

SAVED, LAST = 2, 6


def save_and_go_on(wanted, folder: str) -> list[dict]:
    built, _ = tiny.engine(wanted)
    reports(built, 0, SAVED)
    writer = store.CheckpointWriter(Path(folder), built.mesh, Retention(1), asynchronous=False)
    writer.save(built.states(), Progress(step=SAVED), dump(wanted))
    return reports(built, SAVED, LAST)


def load_and_go_on(wanted, folder: str) -> list[dict]:
    built, shards = tiny.engine(wanted)
    for state in built.states():
        for values in state.values.values():
            values.fill_(0.123)
    path, progress = find_checkpoint(Path(folder), built.mesh, print)
    load_into(built, shards, path, progress.step)
    return reports(built, SAVED, LAST)


BIAS = {"bias_update_rate": 0.01}


@pytest.mark.parametrize("case", [(2, {**TP, **EP}), (2, {**FSDP, **EP})], ids=label)
def test_a_resumed_run_repeats_an_unbroken_one_bit_for_bit(case, tmp_path):
    wanted = recipe(BIAS, DROPPING, **case[1])
    unbroken = ranks.run(case[0], save_and_go_on, wanted, str(tmp_path))[0]
    assert ranks.run(case[0], load_and_go_on, wanted, str(tmp_path))[0] == unbroken


def test_a_checkpoint_goes_from_two_expert_ranks_to_one_and_to_four(tmp_path):
    unbroken = ranks.run(2, save_and_go_on, recipe(BIAS, **EP), str(tmp_path))[0]
    for num_ranks, layout in [(1, {}), (4, {"expert_parallel": 4})]:
        resumed = ranks.run(num_ranks, load_and_go_on, recipe(BIAS, **layout), str(tmp_path))[0]
        assert furthest(resumed, unbroken) < TOLERANCE
    names = Reader(store.step_dir(tmp_path, SAVED)).shapes()
    assert tuple(names["decoder.layers.3.mlp.experts.local_experts.3.linear_fc1.weight"]) == (192, 64)
    assert tuple(names["decoder.layers.0.mlp.router.expert_bias"]) == (4,)


@pytest.mark.parametrize(
    "writer, reader",
    [
        ((2, EP), (4, {**PP, **EP})),
        ((2, EP), (2, ETP)),
        ((4, {**FSDP, **EP}), (1, {})),
        ((4, {**TP, **PP}), (2, EP)),
    ],
    ids=label,
)
def test_a_checkpoint_loads_in_another_layout(writer, reader, tmp_path):
    unbroken = ranks.run(writer[0], save_and_go_on, recipe(**writer[1]), str(tmp_path))[0]
    resumed = ranks.run(reader[0], load_and_go_on, recipe(**reader[1]), str(tmp_path))[0]
    assert furthest(resumed, unbroken) < TOLERANCE


def igla(*words, cwd: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "igla_mega", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_recipe_7_runs_at_laptop_scale_is_measured_drawn_and_exported(tmp_path):
    train = ["train", "moe_8x7b", "--scale", "laptop", "--nproc", 2, "--run", "run"]
    train += [word for key in ("training.total_steps=4", "evaluation.every_steps=0") for word in ("--set", key)]
    first = igla(*train, cwd=tmp_path)
    assert first.returncode == 0 and "experts over 2" in first.stderr and "per token" in first.stderr, first.stderr
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    taken = [entry for entry in steps if "loss" in entry]
    assert [entry["step"] for entry in taken] == [1, 2, 3, 4]
    for entry in taken:
        assert [len(layer) for layer in entry["expert_load"]] == [8, 8, 8, 8]
        assert all(abs(sum(layer) - 1) < 1e-9 for layer in entry["expert_load"])
        assert entry["moe_aux_loss"] == pytest.approx(sum(entry["moe_layers"]["aux_loss"]) / 4)
    assert igla("report", "run", cwd=tmp_path).returncode == 0
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "run" / "report.html").read_text(), re.DOTALL)[1]
    assert {heat["key"]: heat["shape"] for heat in json.loads(data)["runs"][0]["rest"]["heats"]}["expert_load"] == [
        8,
        8,
        8,
        8,
    ]
    done = igla("export", "run", "hf", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("made:")[0].rsplit(" ", 1)[1]) < TOLERANCE
