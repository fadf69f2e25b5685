import subprocess
import sys
import textwrap

import pytest

from igla_mega.config import load
from igla_mega.config.errors import ConfigError
from igla_mega.config.load import dump, load_recipe

SMALL = """\
model: {hidden_size: 64, num_layers: 2, num_heads: 4, intermediate_size: 96, vocab_size: 128, max_position: 32}
training:
  batch_size: 4
  total_steps: 10
data:
  mix: {web: 0.5, code: 0.5}
"""


@pytest.fixture
def write(tmp_path):
    def write_recipe(text: str, name: str = "mine.yaml"):
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write_recipe


def refusal(*arguments, **options) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(*arguments, **options)
    return str(caught.value)


def test_a_recipe_is_named_after_its_file(write):
    assert load_recipe(write(SMALL)).name == "mine"


def test_a_float_without_a_dot_is_a_number(write):
    recipe = load_recipe(write(SMALL + "optimizer: {epsilon: 1e-7}\n"), overrides=["training.learning_rate=3e-4"])
    assert (recipe.training.learning_rate, recipe.optimizer.epsilon) == (3e-4, 1e-7)
    assert load_recipe(write(SMALL), overrides=["training.total_steps=1e3"]).training.total_steps == 1000


def test_off_is_a_word_and_a_leading_zero_is_decimal(write):
    recipe = load_recipe(write(SMALL + "logging: {wandb: off}\n"), overrides=["training.seed=010"])
    assert (recipe.logging.wandb, recipe.training.seed) == ("off", 10)


def test_a_child_changes_its_parent_and_replaces_the_mix_whole(write):
    write(SMALL, "parent.yaml")
    child = write(
        """\
        extends: parent.yaml
        model: {num_layers: 3}
        training: {batch_size: 8}
        data: {mix: {prose: 1.0}}
        """
    )
    recipe = load_recipe(child)
    assert recipe.model is not None
    assert (recipe.model.num_layers, recipe.model.hidden_size) == (3, 64)
    assert (recipe.training.batch_size, recipe.training.total_steps) == (8, 10)
    assert recipe.data.mix == {"prose": 1.0}
    assert (recipe.name, recipe.extends) == ("mine", None)


def test_a_child_may_extend_a_packaged_recipe_and_take_a_key_back(write):
    child = write("extends: pretrain_7b\ntraining: {warmup_steps: null}\n")
    recipe = load_recipe(child)
    assert recipe.training.warmup_steps is None
    assert recipe.num_warmup_steps(100_000) == 2000


def test_recipes_that_extend_each_other_are_refused(write):
    write("extends: mine.yaml\n", "other.yaml")
    assert "mine.yaml -> other.yaml -> mine.yaml" in refusal(write("extends: other.yaml\n"))


def test_an_unknown_parent_is_refused_with_the_nearest(write):
    message = refusal(write("extends: pretrain_7\n"))
    assert "mine.yaml: extends: pretrain_7: no such recipe; did you mean `pretrain_7b`?" in message


def test_an_override_reaches_into_a_list_and_wins_over_the_scale():
    recipe = load_recipe(
        "continual_7b", scale="laptop", overrides=["curriculum.phases.1.lr=3e-3", "evaluation.every_steps=7"]
    )
    assert recipe.curriculum is not None
    assert [phase.lr for phase in recipe.curriculum.phases] == [2e-3, 3e-3, 2e-3]
    assert recipe.evaluation.every_steps == 7


def test_fewer_steps_at_laptop_scale_shorten_the_warm_up():
    recipe = load_recipe("pretrain_7b", scale="laptop", overrides=["training.total_steps=20"])
    assert recipe.num_warmup_steps(20) == 2


def test_null_takes_a_feature_back():
    assert load_recipe("lora_7b", overrides=["lora=null"]).lora is None


def test_a_tier_names_presets_and_keys_win_over_it(write):
    def tier(number: int, *more: str):
        return load_recipe(write(SMALL + f"koshey: {{tier: {number}}}\n"), overrides=list(more))

    third, sixth, eighth = tier(3), tier(6), tier(8)
    assert third.koshey and sixth.koshey and eighth.koshey
    assert (third.distributed.gradient_checkpointing, third.koshey.ring_attention) == ("full", False)
    assert (sixth.koshey.ring_attention, sixth.koshey.ewc_enabled, sixth.moe) == (True, True, None)
    assert sixth.distributed.sequence_parallel is True
    assert eighth.moe and eighth.continual and eighth.koshey.dynamic_batching
    chosen = tier(6, "koshey.ring_attention=false", "distributed.precision=FP32")
    assert chosen.koshey and (chosen.koshey.ring_attention, chosen.koshey.ewc_enabled) == (False, True)
    assert chosen.distributed.precision == "FP32"


def test_the_dump_is_yaml_that_another_reader_reads_alike(write):
    yaml = pytest.importorskip("yaml")
    plain = yaml.safe_load(dump(load_recipe("pretrain_7b")))
    assert plain["training"]["learning_rate"] == 3e-4
    assert plain["optimizer"]["epsilon"] == 1e-8
    assert plain["logging"]["wandb"] == "off"
    assert plain["data"]["total_tokens"] == "140B"


def test_all_breaches_are_reported_together():
    message = refusal(
        "continual_7b",
        overrides=[
            "continual.ewc_lamda=3",
            "training.batch_size=4X tokens",
            "training.min_lr=1",
            "distributed.strategy=FSDB",
            "optimizer.beta1=1.5",
            "data.mix={web: 0, code: 0}",
        ],
    )
    assert message.splitlines() == [
        "training.batch_size: '4X tokens' is not a number of sequences (`128`) or of tokens "
        "(`512K tokens`, `4M tokens`; K is 2^10, M is 2^20).",
        "optimizer.beta1: 1.5 is out of range: it must be below 1.",
        "distributed.strategy: 'FSDB' is not one of FSDP, DDP. Did you mean `FSDP`?",
        "continual.ewc_lamda: no such key; did you mean `ewc_lambda`?",
        "training.min_lr: 1 is above training.learning_rate 0.0003. Use at most 0.0003; a tenth of it is usual.",
        "data.mix: no weight is above 0 (web, code). Give at least one source a weight.",
    ]


def test_a_broken_key_does_not_bring_breaches_of_its_consequences():
    message = refusal("pretrain_7b", overrides=["model.num_heads=many", "model.num_kv_heads=null"])
    assert message == "model.num_heads: 'many' is not a whole number."


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learning_rate=3", "learning_rate: no such key; did you mean `training.learning_rate`?"),
        ("training.hidden_size=3", "training.hidden_size: no such key; did you mean `model.hidden_size`?"),
        ("optimizer.zzz=3", "optimizer.zzz: no such key. Keys of this section: type, beta1, beta2, epsilon, fused."),
        (
            "model.hidden_size=null",
            "model.hidden_size: missing. Width of the residual stream, in channels. At least 1.",
        ),
        ("training.total_steps=0", "training.total_steps: 0 is out of range: it must be at least 1."),
        ("training.total_steps=true", "training.total_steps: True is not a number."),
        ("training.total_steps=1.5", "training.total_steps: 1.5 is not a whole number."),
        ("training.learning_rate=.nan", "training.learning_rate: nan is not a finite number."),
        ("training=5", "training: 5 is not a section: write its keys indented below it."),
        ("data.mix.web=-1", "data.mix.web: -1 is out of range: it must be at least 0."),
        ("data.sources.web=7", "data.sources.web: 7 is not a path or a list of paths."),
        ("distributed.tensor_parallel=two", "'two' is not a whole number of at least 1, or `auto`."),
        ("distributed.gradient_checkpointing=sometimes", "'sometimes' is not one of none, selective, full."),
        ("koshey={tier: 11}", "koshey.tier: 11 is out of range: it must be at most 10."),
        (
            "lora={rank: 4}",
            "lora.alpha: missing. Scale of the adapters: their output is multiplied by alpha / rank. Above 0.",
        ),
        ("curriculum={phases: []}", "curriculum.phases: empty. Give at least one."),
        ("evaluation.needle={depths: [101]}", "needle.depths.0: 101 is out of range: it must be at most 100."),
        ("name=7", "name: 7 is not text (in quotes, if it looks like a number)."),
        ("training.total_steps", "--set training.total_steps: write KEY=VALUE"),
        ("training..x=3", "write KEY=VALUE"),
        ("training.total_steps.x=3", "`x` is within 100000, which is a value, not a section."),
        ("training.total_steps={", "--set training.total_steps={, line 2: not valid YAML"),
    ],
)
def test_a_wrong_override_is_refused_in_words(override, says):
    message = refusal("pretrain_7b", overrides=[override])
    assert says in message
    assert len(message.splitlines()) == 1


def test_an_override_beyond_a_list_is_refused():
    message = refusal("continual_7b", overrides=["curriculum.phases.3.lr=1"])
    assert "`3` is not an index from 0 to 2." in message


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("training:\n  total_steps: 1\n  total_steps: 2\n", "line 3: `total_steps` is already set on line 2."),
        ("training:\n  seed: 1\n\ttotal_steps: 2\n", "Indent with spaces, not tabs."),
        ("training: {seed: 1\ndata: 3\n", "line 2: not valid YAML"),
        ("- a\n- b\n", "line 1: a list, not a mapping of sections"),
        ("just text\n", "line 1: a str, not a mapping of sections"),
        ("", "line 1: empty."),
        ("training: !!python/object/apply:os.system [ls]\n", "line 1: not valid YAML"),
        ("a: &a [*a]\nb: 1\n", "found unconstructable recursive node"),
        ("? [1, 2]\n: 3\n", "line 1: a key must be text or a number"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(text, says, write):
    path = write(text)
    message = refusal(path)
    assert says in message
    assert message.startswith(str(path))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    assert "no such file. Packaged recipes: pretrain_7b" in refusal(tmp_path / "none.yaml")
    assert "no such recipe; did you mean `pretrain_7b`?" in refusal("pretrain7b")
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff\xfe")
    assert "not UTF-8 text" in refusal(tmp_path / "bytes.yaml")
    assert "--scale phone: no such scale. Use laptop" in refusal("lora_7b", scale="phone")


def test_a_base_is_found_as_a_folder_a_checkpoint_or_a_run(tmp_path):
    def made(*files: str) -> None:
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text("step_00000004\n")

    made("hf/config.json", "step/manifest.json", "empty/recipe.yaml", "run/recipe.yaml", "run/checkpoints/latest")
    made(*(f"run/checkpoints/step_{step:08d}/manifest.json" for step in (2, 4)))
    made("run/checkpoints/step_00000006/recipe.yaml", "run/checkpoints/.writing_step_00000008/manifest.json")
    newest = tmp_path / "run/checkpoints/step_00000004"
    found = {"hf": tmp_path / "hf", "step": tmp_path / "step", str(newest): newest}
    found |= {"run": newest, "run/checkpoints": newest, "run/checkpoints/latest": newest}
    for name, folder in found.items():
        assert load.base_folder(name, tmp_path) == folder
        assert load.base_folder(str(tmp_path / name), None) == folder
    with pytest.raises(ConfigError, match="empty contains neither a model"):
        load.base_folder("empty", tmp_path)
    with pytest.raises(ConfigError, match="nowhere not found in"):
        load.base_folder("nowhere", tmp_path)


def test_all_linear_names_every_linear_layer():
    lora = load_recipe("lora_7b", overrides=["lora.target_modules=all-linear"]).lora
    attention, feed_forward = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    assert lora is not None and lora.target_modules == attention + feed_forward


def test_the_config_loads_without_torch_and_the_package_without_pydantic():
    program = (
        "import sys, igla_mega, igla_mega.config; assert 'pydantic' not in sys.modules;"
        "from igla_mega.config.load import load_recipe; import igla_mega.layout.layout;"
        "load_recipe('pretrain_7b'); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
