"""Whole runs of fine-tuning, from files to checkpoints: layouts, resumes, references, stages, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from small_run import Fault, as_rank, lines, train_hurt

from igla_mega import run as engine
from igla_mega.checkpoint import adapters, load_model, store
from igla_mega.checkpoint.adapters import export_adapters, import_adapters, merge_adapters
from igla_mega.checkpoint.base import digest_of_checkpoint, read_base
from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import dump, load_recipe
from igla_mega.data.tokenizer import train_bpe
from igla_mega.evaluate.checkpoint import evaluate
from igla_mega.layout.stages import parts_of
from igla_mega.prepare.samples import prepare_samples

BASE = """
model: {hidden_size: 128, num_layers: 4, num_heads: 4, num_kv_heads: 2, intermediate_size: 128, vocab_size: 300,
  max_position: 64, init_std: 0.05}
training: {batch_size: 8, total_steps: 2, learning_rate: 1e-3}
distributed: {precision: FP32, tensor_parallel: 1, micro_batch_size: 2}
data: {mix: {words: 1.0}, validation_fraction: 0.1}
evaluation: {every_steps: 0, num_batches: 1}
logging: {tensorboard: false}
"""
TUNING = """
training: {batch_size: 8, total_steps: 6, learning_rate: 1e-2, weight_decay: 0.0}
distributed: {precision: FP32, tensor_parallel: 1, micro_batch_size: 2}
checkpoint: {every_steps: 0}
evaluation: {every_steps: 0, num_batches: 1}
logging: {tensorboard: false}
"""
LORA = "lora: {rank: 4, alpha: 8, dropout: 0.3, target_modules: [q_proj, v_proj, o_proj, up_proj, down_proj]}\n"
SFT = "sft: {}\n"
LAYOUTS = [
    {"tensor_parallel": 2},
    {"pipeline_parallel": 2},
    {"context_parallel": 2},
    {},
    {"strategy": "FSDP"},
    {"tensor_parallel": 2, "pipeline_parallel": 2},
]
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def call(recipe, run_dir: Path, stop_after: int | None = None):
    engine.train(recipe, run_dir, stop_after=stop_after)


def train(text: str, run_dir: Path, *, num_ranks: int = 1, stop_after: int | None = None) -> str:
    return ranks.run(num_ranks, as_rank, call, text, str(run_dir), stop_after)[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Data, tokenizer and a base model."""
    folder = tmp_path_factory.mktemp("home")
    draw = np.random.default_rng(0)

    def phrase() -> str:
        return " ".join(draw.choice(WORDS, draw.integers(2, 6)))

    def turns(asked: str, answer: str) -> list[dict]:
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]

    def write(name: str, lines: list) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("words", [{"text": " ".join(phrase() for _ in range(20))} for _ in range(60)])
    write("talk", [{"messages": turns(asked := phrase(), asked.upper())} for _ in range(60)])
    pairs = [(phrase(), phrase()) for _ in range(50)]
    write("pairs", [{"prompt": a, "chosen": f" {b} done", "rejected": f" {b} undone"} for a, b in pairs])
    write("letters", [{"text": " ".join(WORDS).upper() + "### user assistant done undone"}] * 9)
    train_bpe([folder / "words.jsonl", folder / "letters.jsonl"], 300, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def recipe_of(home, tmp_path_factory):
    def make(text: str, *overrides: str) -> str:
        path = tmp_path_factory.mktemp("recipe") / "tuning.yaml"
        path.write_text(text)
        base = home / "base" / "checkpoints" / "step_00000002"
        first = "stages.0." if "stages:" in text else ""
        data = {"tokenizer": home / "tokenizer", "prepared": path.parent / "prepared", "chat_template": "plain"}
        given = [f"data.{key}={value}" for key, value in data.items()]
        if "words" not in text:
            name, file = ("pairs", "pairs") if "dpo" in text else ("talk", "talk")
            sources = {name: str(home / f"{file}.jsonl")}
            if first:
                sources = {"talk": str(home / "talk.jsonl"), "pairs": str(home / "pairs.jsonl")}
            limits = [f"stages.{i}.data.max_length=64" for i in (0, 1)] if first else ["data.max_length=64"]
            given += [*limits, f"{first}base_model={base}", f"data.sources={json.dumps(sources)}"]
        recipe = load_recipe(path, overrides=[*given, *overrides])
        for part in parts_of(recipe):
            if part.form != "text":
                prepare_samples(part, progress=False)
        return dump(recipe)

    return make


@pytest.fixture(scope="module", autouse=True)
def base(home, recipe_of) -> Path:
    from igla_mega.prepare.sources import prepare_sources

    text = recipe_of(BASE, f"data.sources={json.dumps({'words': str(home / 'words.jsonl')})}")
    path = home / "base.yaml"
    path.write_text(text)
    prepare_sources(load_recipe(path).data, progress=False)
    train(text, home / "base")
    return home / "base" / "checkpoints" / "step_00000002"


def steps(run_dir: Path) -> list[tuple]:
    kept = ("step", "stage", "loss", "grad_norm", "learning_rate", "tokens", "dpo_margin", "dpo_accuracy")
    return [tuple(entry.get(key) for key in kept) for entry in lines(run_dir, "metrics.jsonl") if "loss" in entry]


def assert_close(found: list[tuple], expected: list[tuple], tolerance: float = 1e-5) -> None:
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    worst = max(abs(a[i] - b[i]) for a, b in zip(found, expected, strict=True) for i in (2, 3))
    print(f"loss and gradient norm: {worst:.1e}")
    assert worst < tolerance


@pytest.fixture(scope="module")
def adapted(recipe_of, tmp_path_factory):
    """A run of adapters on conversations, with dropout."""
    run_dir, text = tmp_path_factory.mktemp("adapted"), recipe_of(TUNING + LORA + SFT)
    return run_dir, text, train(text, run_dir)


def test_adapters_learn_and_the_run_says_how_much(adapted):
    run_dir, _, said = adapted
    losses = [loss for _, _, loss, *_ in steps(run_dir)]
    assert losses[-1] < losses[0] and "loss on held-out answers" in said
    before, after = (e["validation_loss"]["talk"] for e in lines(run_dir, "metrics.jsonl") if "validation_loss" in e)
    assert after < before


def measured(run_dir: Path) -> dict:
    return evaluate(run_dir)


@pytest.mark.parametrize("fixture", ["adapted", "preferred"])
def test_eval_measures_the_answers_of_what_was_held_out(fixture, request):
    run_dir = request.getfixturevalue(fixture)[0]
    found = ranks.run(1, measured, run_dir)[0]
    last = [e for e in lines(run_dir, "metrics.jsonl") if "validation_loss" in e][-1]
    if fixture == "adapted":
        assert math.isclose(found["talk"][0], last["validation_loss"]["talk"], abs_tol=1e-5)
    else:
        for kind in ("chosen", "rejected"):  # one pair is held out
            loss, _, num_targets = found[f"pairs, {kind}"]
            expected = last["validation"][f"pairs/dpo_log_prob_{kind}"]
            assert math.isclose(-loss * num_targets, expected, rel_tol=1e-5)


def test_a_run_of_adapters_goes_on_in_the_middle_of_an_epoch_bit_for_bit(adapted, tmp_path):
    run_dir, text, _ = adapted
    train(text, tmp_path, stop_after=3)
    train(text, tmp_path)
    assert steps(tmp_path) == steps(run_dir)


@pytest.mark.parametrize("fixture", ["adapted", "preferred"])
def test_a_fault_that_does_not_come_again_leaves_tuning_as_if_it_had_not_been(fixture, request, tmp_path):
    run_dir, text, _ = request.getfixturevalue(fixture)
    said = ranks.run(1, as_rank, train_hurt, text, str(tmp_path), Fault(0, 4, "final_layernorm", times=1))[0]
    assert "a hardware fault" in said and steps(tmp_path) == steps(run_dir)
    assert lines(tmp_path, "bad_steps.jsonl")[0]["verdict"] == "transient"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adapters_on_packed_conversations_with_dropout_equal_one_process(layout, adapted, recipe_of, tmp_path):
    overrides = [f"distributed.{key}={value}" for key, value in layout.items()]
    train(recipe_of(TUNING + LORA + SFT, *overrides), tmp_path, num_ranks=4 if len(layout) == 2 else 2)
    assert_close(steps(tmp_path), steps(adapted[0]))


def test_a_checkpoint_holds_adapters_alone_and_names_its_base(adapted, base):
    checkpoint = resolve_checkpoint(adapted[0])
    matrices = adapters.read(checkpoint)
    weights = 4 * sum(matrix.numel() for matrix in matrices.values())
    stored = sum(file.stat().st_size for file in checkpoint.glob("*.distcp"))
    print(f"adapters {weights:,} bytes, checkpoint {stored:,} with two moments")
    assert stored < 1.1 * 3 * weights + 2048 * 3 * len(matrices)
    note = read_base(checkpoint)
    assert note is not None and note["checkpoint"] == str(base)
    assert note["digest"] == digest_of_checkpoint(base)


def test_a_run_of_adapters_is_a_base_like_its_merged_checkpoint(adapted, recipe_of, tmp_path):
    merge_adapters(resolve_checkpoint(adapted[0]), tmp_path / "merged")
    text = TUNING.replace("total_steps: 6", "total_steps: 2") + SFT
    for name, base in (("of_run", adapted[0]), ("of_merged", tmp_path / "merged")):
        train(recipe_of(text, f"base_model={base}"), tmp_path / name)
    assert len(steps(tmp_path / "of_run")) == 2
    assert steps(tmp_path / "of_run") == steps(tmp_path / "of_merged")


def test_adapters_on_another_base_are_refused(adapted, recipe_of, home, tmp_path):
    run_dir, _, _ = adapted
    other = home / "other" / "checkpoints" / "step_00000001"
    if not other.exists():
        train((home / "base.yaml").read_text().replace("total_steps: 2", "total_steps: 1"), home / "other")
    changed = recipe_of(TUNING + LORA + SFT, f"base_model={other}", "training.total_steps=9")
    with pytest.raises(ranks.RankFailed, match="adapters of another base"):
        train(changed, run_dir)


def test_adapters_go_to_peft_and_back(adapted, base, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from igla_mega.checkpoint import hugging_face

    checkpoint = resolve_checkpoint(adapted[0])
    hugging_face.export_folder(base, tmp_path / "base", dtype="float32", say=print)
    export_adapters(checkpoint, tmp_path / "adapter")
    merge_adapters(checkpoint, tmp_path / "merged")
    hugging_face.export_folder(tmp_path / "merged", tmp_path / "hf", dtype="float32", say=print)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (theirs(tokens).logits - merged(tokens).logits).abs().max().item()
    ours = torch.tensor(ranks.run(1, logits, checkpoint, tokens)[0])
    native = (theirs(tokens).logits - ours).abs().max().item()
    print(f"PEFT to merged {difference:.1e}, to ours {native:.1e}")
    assert difference < 1e-5 and native < 1e-5
    import_adapters(tmp_path / "adapter", base, tmp_path / "imported")
    again = adapters.read(tmp_path / "imported")
    assert all(torch.equal(again[name], matrix) for name, matrix in adapters.read(checkpoint).items())


def logits(checkpoint: Path, tokens: torch.Tensor) -> list:
    model, _ = load_model.load_model(checkpoint)
    with torch.no_grad():
        return model(tokens, torch.arange(tokens.shape[1])[None], None).float().tolist()


def test_adapters_start_from_those_that_peft_saved(adapted, recipe_of, tmp_path):
    checkpoint = resolve_checkpoint(adapted[0])
    export_adapters(checkpoint, tmp_path / "adapter")
    text = recipe_of(TUNING + LORA + SFT, f"lora.adapter={tmp_path / 'adapter'}")
    train(text, tmp_path / "run", stop_after=1)
    done = [e["validation_loss"]["talk"] for e in lines(adapted[0], "metrics.jsonl") if "validation_loss" in e][-1]
    begun = next(
        e["validation_loss"]["talk"] for e in lines(tmp_path / "run", "metrics.jsonl") if "validation_loss" in e
    )
    assert math.isclose(begun, done, abs_tol=1e-6)


@pytest.fixture(scope="module")
def coded(recipe_of, tmp_path_factory):
    pytest.importorskip("bitsandbytes")
    text = TUNING + LORA + SFT + "quantization: {compute_dtype: float32}\n"
    run_dir = tmp_path_factory.mktemp("coded")
    train(recipe_of(text), run_dir)
    return run_dir, text


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_adapters_on_a_base_of_4_bits_equal_one_process(layout, coded, recipe_of, tmp_path):
    run_dir, text = coded
    overrides = [f"distributed.{key}={value}" for key, value in layout.items()]
    train(recipe_of(text, *overrides), tmp_path, num_ranks=4 if len(layout) == 2 else 2)
    assert_close(steps(tmp_path), steps(run_dir))


@pytest.fixture(scope="module")
def preferred(recipe_of, tmp_path_factory):
    """A run of preference optimization with the default reference of a whole model."""
    run_dir = tmp_path_factory.mktemp("preferred")
    text = recipe_of(TUNING + "dpo: {beta: 0.3}\n", "training.learning_rate=1e-3")
    return run_dir, text, train(text, run_dir)


def test_preferences_are_learned_and_the_run_says_how_much(preferred):
    run_dir, _, said = preferred
    first, *_, last = [entry for entry in lines(run_dir, "metrics.jsonl") if "dpo_margin" in entry]
    assert abs(first["loss"] - math.log(2)) < 1e-6 and last["dpo_margin"] > first["dpo_margin"]
    assert "the chosen answer is more likely in" in said


def test_the_loss_on_held_out_pairs_does_not_depend_on_the_batch_size(recipe_of, tmp_path):
    # Three are held out. Without a reference the loss of a pair is that of the policy's own margin.
    text = TUNING.replace("num_batches: 1", "num_batches: 16") + "dpo: {beta: 0.3, reference_free: true}\n"
    found = []
    for batch in (1, 4, 16):
        given = [f"training.batch_size={batch}", "distributed.micro_batch_size=1", "training.total_steps=1"]
        tiny = "training.learning_rate=1e-12"
        train(recipe_of(text, *given, tiny, "data.validation_fraction=0.06"), tmp_path / str(batch))
        *_, last = [entry for entry in lines(tmp_path / str(batch), "metrics.jsonl") if "validation_loss" in entry]
        found.append([last["validation_loss"]["pairs"], *last["validation"].values()])
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)


@pytest.mark.parametrize("reference", ["model", "cached"])
def test_every_reference_gives_the_same_steps(reference, preferred, recipe_of, tmp_path):
    text = TUNING + f"dpo: {{beta: 0.3, reference: {reference}}}\n"
    train(recipe_of(text, "training.learning_rate=1e-3"), tmp_path)
    assert_close(steps(tmp_path), steps(preferred[0]), 1e-6)


def test_adapters_turned_off_are_the_same_reference_as_a_second_model(recipe_of, tmp_path):
    text = TUNING + LORA.replace("0.3", "0.0")
    for reference in ("adapter", "model", "cached"):
        train(recipe_of(text + f"dpo: {{reference: {reference}}}\n"), tmp_path / reference, stop_after=4)
    assert_close(steps(tmp_path / "model"), steps(tmp_path / "adapter"), 1e-6)
    assert_close(steps(tmp_path / "cached"), steps(tmp_path / "adapter"), 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_preference_optimization_equals_one_process(layout, preferred, recipe_of, tmp_path):
    overrides = [f"distributed.{key}={value}" for key, value in layout.items()]
    text = recipe_of(TUNING + "dpo: {beta: 0.3}\n", "training.learning_rate=1e-3", *overrides)
    train(text, tmp_path, num_ranks=4 if len(layout) == 2 else 2)
    # The norm of the first steps is a sum over answers that nearly cancel.
    assert_close(steps(tmp_path), steps(preferred[0]), 2e-5)


def test_preference_optimization_goes_on_bit_for_bit(preferred, tmp_path):
    run_dir, text, _ = preferred
    train(text, tmp_path, stop_after=2)
    train(text, tmp_path)
    assert steps(tmp_path) == steps(run_dir)


def test_preferences_against_another_reference_are_another_run(preferred, recipe_of, home, tmp_path):
    text = recipe_of(TUNING + "dpo: {reference: model}\n")
    train(text, tmp_path, stop_after=1)
    written = [tmp_path / name for name in ("recipe.yaml", "metrics.jsonl", "events.jsonl", "heartbeat.json")]
    known = [path.read_bytes() for path in written]
    other = preferred[0] / "checkpoints/step_00000006"
    with pytest.raises(Exception, match=r"(?s)another reference: its base has digest \w+, that of base_model .* is \w"):
        train(text.replace(str(home / "base/checkpoints/step_00000002"), str(other)), tmp_path)
    assert [path.read_bytes() for path in written] == known
    train(text, tmp_path, stop_after=2)


STAGES = "stages:\n" + "".join(
    "  - " + "\n    ".join((TUNING.strip() + "\n" + section).splitlines()) + "\n"
    for section in (
        LORA + "sft: {learning_rate: 1e-2, epochs: 1, batch_size: 4, data: talk}",
        "dpo: {learning_rate: 1e-3, epochs: 1, batch_size: 8, data: pairs}",
    )
)


@pytest.fixture(scope="module")
def pipeline(recipe_of, tmp_path_factory):
    run_dir, text = tmp_path_factory.mktemp("pipeline"), recipe_of(STAGES)
    return run_dir, text, train(text, run_dir)


def test_stages_follow_each_other_each_from_the_weights_of_the_one_before(pipeline):
    run_dir, _, said = pipeline
    found = [entry[:2] for entry in steps(run_dir)]
    assert [step for step, _ in found] == list(range(1, len(found) + 1))
    assert list(dict.fromkeys(stage.split(".")[-1] for _, stage in found)) == ["sft", "dpo"]
    assert "loss on held-out answers" in said and "the chosen answer is more likely" in said
    first = next(entry for entry in lines(run_dir, "metrics.jsonl") if "dpo_margin" in entry)
    assert abs(first["loss"] - math.log(2)) < 1e-5, "its reference is the model it starts from"
    assert read_recipe(resolve_checkpoint(run_dir)).dpo is not None


@pytest.mark.parametrize("back", [1, 3, 0])
def test_a_pipeline_goes_on_in_any_stage_bit_for_bit(back, pipeline, tmp_path):
    run_dir, text, _ = pipeline
    first = sum(stage.endswith("sft") for _, stage, *_ in steps(run_dir))
    train(text, tmp_path, stop_after=first - 1 + back if back else first)
    train(text, tmp_path)
    assert steps(tmp_path) == steps(run_dir)
    assert store.steps_in(tmp_path / "checkpoints")[-1] == len(steps(run_dir))


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (TUNING + SFT, ["data.mix={talk: 1.0}"], "data.mix: given with instructions"),
        (TUNING + SFT, ["data.format=preference_pairs"], "data.format: preference_pairs with `sft:`"),
        (TUNING + "dpo: {reference: adapter}\n", [], "dpo.reference: adapter without `lora:`"),
        (TUNING + LORA + SFT, ["lora.rank=0"], "lora.rank: 0"),
        (TUNING + LORA + SFT, ["lora.target_modules=[q_prj]"], "q_proj"),
        (TUNING + SFT, ["data.format=preference_pairs", "sft=null"], "preference_pairs without `dpo:`"),
    ],
)
def test_what_does_not_go_together_is_refused(text, overrides, said, recipe_of):
    with pytest.raises(ConfigError) as caught:
        recipe_of(text, *overrides)
    print(caught.value)
    assert said in str(caught.value)
