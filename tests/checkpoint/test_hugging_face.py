import json
import os
import weakref

import pytest
import ranks
import tiny
import torch
from safetensors.torch import load_file, save_file

from igla_mega.checkpoint import hugging_face, load_model, store
from igla_mega.checkpoint.folder import read_recipe, resolve_checkpoint
from igla_mega.checkpoint.hf_config import coefficient_per_layer, pooled_coefficient
from igla_mega.checkpoint.hf_names import Weight, weights_of
from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.load import dump

# The same sums in another order: fp32 rounding of logits of a few units.
TOLERANCE = 1e-5

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "grouped-query": {"num_key_value_heads": 2},
    "one kv head": {"num_key_value_heads": 1},
    "explicit head_dim": {"head_dim": 24, "num_key_value_heads": 2},
    "llama3 rope_scaling": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "rope_theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 250.0}},
    "odd vocabulary": {"vocab_size": 251, "rms_norm_eps": 1e-3},
}


def write_folder(path, *, dtype="float32", kind="Llama", max_shard_size="5GB", **changes):
    """A Hugging Face folder of a random model, as transformers writes it."""
    import transformers

    torch.manual_seed(1)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 256,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, param in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(param, 0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def tensors(folder):
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def refusal(folder, checkpoint) -> str:
    with pytest.raises(ConfigError) as raised:
        hugging_face.import_folder(folder, checkpoint, say=print)
    assert not checkpoint.exists()
    assert not list(checkpoint.parent.glob(".writing_*"))
    return str(raised.value)


def there_and_back(tmp_path):
    """Logit differences of import and of export, for every model, from one process."""
    differences = {}
    for name, changes in MODELS.items():
        folder, checkpoint, back = (tmp_path / name / part for part in ("hf", "native", "back"))
        write_folder(folder, **changes)
        hugging_face.import_folder(folder, checkpoint, say=print)
        hugging_face.export_folder(checkpoint, back, say=print)
        pairs = [hugging_face.logit_difference(checkpoint, path) for path in (folder, back)]
        assert all(torch.equal(t, tensors(back)[n]) for n, t in tensors(folder).items())
        differences[name] = pairs
    return differences


def test_logits_are_those_of_transformers_both_ways(tmp_path):
    [differences] = ranks.run(1, there_and_back, tmp_path)
    print(differences)
    assert differences.keys() == MODELS.keys()
    assert {name: pair for name, pair in differences.items() if max(pair) > TOLERANCE} == {}


def differences_of_wrong_models(tmp_path):
    folder, checkpoint = write_folder(tmp_path / "hf", num_key_value_heads=2), tmp_path / "native"
    hugging_face.import_folder(folder, checkpoint, say=print)
    change_config(folder, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    return hugging_face.logit_difference(checkpoint, folder)


def test_the_logit_difference_sees_another_rope_theta(tmp_path):
    assert ranks.run(1, differences_of_wrong_models, tmp_path)[0] > 1e-2


def train_and_export(tmp_path, precision):
    recipe = tiny.recipe(model={"tie_embeddings": True, "head_dim": 24}, precision=precision)
    built, _ = tiny.engine(recipe)
    tiny.steps(built, 0, 2)
    writer = store.CheckpointWriter(tmp_path, built.mesh, Retention(1), asynchronous=False)
    writer.save(built.optimizer.states(), Progress(step=2), hugging_face.dump(recipe))
    hugging_face.export_folder(resolve_checkpoint(tmp_path), tmp_path / "hf", say=print)
    return hugging_face.logit_difference(store.step_dir(tmp_path, 2), tmp_path / "hf")


@pytest.mark.parametrize(("precision", "dtype"), [("FP32", torch.float32), ("BF16", torch.bfloat16)])
def test_a_trained_checkpoint_exports_in_the_type_it_computed_in(tmp_path, precision, dtype):
    assert ranks.run(1, train_and_export, tmp_path, precision)[0] < TOLERANCE
    assert {t.dtype for t in tensors(tmp_path / "hf").values()} == {dtype}


def load_in_bfloat16(tmp_path):
    folder = write_folder(tmp_path / "hf", dtype="bfloat16")
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    model, recipe = load_model.load_model(tmp_path / "native", dtype=torch.bfloat16)
    again, _ = load_model.load_model(tmp_path / "native", dtype=torch.bfloat16)
    logits = model(torch.tensor([[1, 2, 3]]), torch.arange(3)[None], None)
    assert not model.training and torch.equal(model.output_layer.weight, again.output_layer.weight)
    assert torch.equal(model.output_layer.weight, tensors(folder)["lm_head.weight"])
    return recipe.model.num_parameters(), logits.shape, logits.dtype


def test_a_single_process_loads_a_checkpoint_more_than_once(tmp_path):
    [(num_parameters, shape, dtype)] = ranks.run(1, load_in_bfloat16, tmp_path)
    assert num_parameters == sum(t.numel() for t in tensors(tmp_path / "hf").values())
    assert (shape, dtype) == ((1, 3, 256), torch.bfloat16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_round_trip_keeps_every_bit(tmp_path, dtype):
    folder = write_folder(tmp_path / "hf", dtype=dtype, num_key_value_heads=2)
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    hugging_face.export_folder(tmp_path / "native", tmp_path / "back", say=print)
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == t.dtype and torch.equal(after[name], t) for name, t in before.items())
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == dtype


def test_a_folder_in_shards_is_read_and_written(tmp_path):
    folder = write_folder(tmp_path / "hf", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    hugging_face.export_folder(tmp_path / "native", tmp_path / "back", max_shard_bytes=70_000, say=print)
    files = sorted((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 3 and files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 70_000 for file in files)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert all(torch.equal(t, tensors(tmp_path / "back")[name]) for name, t in tensors(folder).items())


def test_an_export_narrows_when_asked(tmp_path):
    folder = write_folder(tmp_path / "hf")
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    hugging_face.export_folder(tmp_path / "native", tmp_path / "back", dtype="bfloat16", say=print)
    assert all(torch.equal(t, tensors(folder)[n].bfloat16()) for n, t in tensors(tmp_path / "back").items())


def test_the_configuration_comes_back(tmp_path):
    import transformers

    changes = {"head_dim": 24, "num_key_value_heads": 2, "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}}
    folder = write_folder(tmp_path / "hf", eos_token_id=[7, 9], bos_token_id=5, rms_norm_eps=1e-4, **changes)
    (folder / "generation_config.json").unlink()
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    hugging_face.export_folder(tmp_path / "native", tmp_path / "back", say=print)
    before, after = (transformers.AutoConfig.from_pretrained(path).to_dict() for path in (folder, tmp_path / "back"))
    before.pop("_name_or_path", None), after.pop("_name_or_path", None)
    assert after == before


def test_a_configuration_of_transformers_4_is_read(tmp_path):
    folder = write_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    old = {**config, "rope_theta": 500000.0, "rope_scaling": LLAMA3, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(old))
    model = hugging_face.import_folder(folder, tmp_path / "native", say=print).model
    assert model.rope_theta == 500000.0
    assert (model.rope_scaling.factor, model.rope_scaling.original_max_position) == (8.0, 16)


def test_the_tokenizer_and_generation_files_are_carried_along_and_sealed(tmp_path):
    folder = write_folder(tmp_path / "hf")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 11}')
    (folder / "README.md").write_text("not carried")
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    hugging_face.export_folder(tmp_path / "native", tmp_path / "back", say=print)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 11
    assert not (tmp_path / "back" / "README.md").exists()
    assert store.damage(tmp_path / "native") is None
    (tmp_path / "native" / "tokenizer" / "tokenizer.json").write_text("[]")
    assert "tokenizer/tokenizer.json does not have the digest" in store.damage(tmp_path / "native")


def test_an_import_holds_two_parameters_at_most(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "hf", num_hidden_layers=12, max_shard_size="200KB")
    alive, most, fuse = {}, [0], Weight.fuse

    def counted(weight, parts):
        # The storage, not the tensor: torch's writer holds on to views of what it is given.
        whole = fuse(weight, parts)
        storage, key = whole.untyped_storage(), object()
        alive[key] = storage.nbytes()
        weakref.finalize(storage, alive.pop, key)
        most[0] = max(most[0], sum(alive.values()))
        return whole

    monkeypatch.setattr(Weight, "fuse", counted)
    recipe = hugging_face.import_folder(folder, tmp_path / "native", say=print)
    largest = max(torch.Size(w.shape).numel() for w in weights_of(recipe.model)) * 4
    assert largest < most[0] <= 2 * largest < recipe.model.num_parameters() * 4 / 10


def test_an_export_reads_one_parameter_at_a_time(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "hf", num_hidden_layers=6)
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    asked, load = [], hugging_face.dcp.load

    def counted(state, **options):
        asked.append(len(state))
        assert len(asked) - len(list((tmp_path / ".writing_back").glob("*.safetensors"))) <= 4
        return load(state, **options)

    monkeypatch.setattr(hugging_face.dcp, "load", counted)
    hugging_face.export_folder(tmp_path / "native", tmp_path / "back", max_shard_bytes=1, say=print)
    assert set(asked) == {1} and len(asked) == 3 + 6 * 6


def test_a_missing_shard_is_named(tmp_path):
    folder = write_folder(tmp_path / "hf", max_shard_size="60KB")
    second = sorted(folder.glob("*.safetensors"))[1]
    second.unlink()
    text = refusal(folder, tmp_path / "native")
    assert f"{second.name} is missing (1 of the" in text and "Download the folder again" in text


def test_a_truncated_shard_is_named(tmp_path):
    folder = write_folder(tmp_path / "hf", max_shard_size="60KB")
    second = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(second, 20_000)
    assert f"{second.name}: not a complete safetensors file" in refusal(folder, tmp_path / "native")


def test_missing_extra_and_misshapen_tensors_are_named_together(tmp_path):
    folder = write_folder(tmp_path / "hf")
    held = tensors(folder)
    del held["model.norm.weight"]
    held["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    held["model.layers.1.mlp.up_proj.weight"] = torch.zeros(96, 32)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    text = refusal(folder, tmp_path / "native")
    assert "has no tensor model.norm.weight [64]." in text
    assert "model.layers.1.mlp.up_proj.weight is [96, 32], config.json makes it [96, 64]." in text
    assert "holds model.layers.0.self_attn.q_proj.bias, which such a model does not have." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: gpt2 is not a Llama"),
        ({"attention_bias": True}, "attention_bias: biases are not supported"),
        ({"mlp_bias": True}, "mlp_bias: biases are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: gelu is not supported; silu is"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling: type yarn is not supported"),
        ({"rope_scaling": {"type": "llama3", "factor": 4.0}, "rope_parameters": None}, "type llama3 needs low_freq"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: quantized weights are not supported"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window: 16 is not supported; null is"),
        ({"hidden_size": None}, "hidden_size: not given"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers: 'two': "),
        ({"num_key_value_heads": 3}, "num_kv_heads: 3"),
        ({"vocab_size": 300}, "model.embed_tokens.weight is [256, 64], config.json makes it [300, 64]"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused_in_words(tmp_path, changes, message):
    folder = write_folder(tmp_path / "hf")
    change_config(folder, **changes)
    assert message in refusal(folder, tmp_path / "native")


def test_a_mistral_without_a_sliding_window_is_imported(tmp_path):
    folder = write_folder(tmp_path / "hf", kind="Mistral", sliding_window=None, num_key_value_heads=2)
    assert hugging_face.import_folder(folder, tmp_path / "native", say=print).model.num_kv_heads == 2


def test_pickled_weights_are_not_opened(tmp_path):
    folder = write_folder(tmp_path / "hf")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights (pytorch_model.bin)" in refusal(folder, tmp_path / "native")


def test_a_folder_without_weights_or_configuration_is_refused(tmp_path):
    folder = write_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    assert "has neither model.safetensors nor" in refusal(folder, tmp_path / "native")
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(folder, tmp_path / "native")


def test_a_folder_that_holds_something_is_not_written_over(tmp_path):
    folder = write_folder(tmp_path / "hf")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ConfigError, match="is not an empty folder"):
        hugging_face.import_folder(folder, folder, say=print)
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    with pytest.raises(ConfigError, match="is not an empty folder"):
        hugging_face.export_folder(tmp_path / "native", folder, say=print)
    assert (folder / "config.json").read_bytes() == before


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    hugging_face.import_folder(write_folder(tmp_path / "hf"), tmp_path / "native", say=print)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hugging_face, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        hugging_face.export_folder(tmp_path / "native", tmp_path / "back", say=print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "native"]


def test_a_checkpoint_is_found_from_its_run_folder(tmp_path):
    run = tmp_path / "run"
    for step in (1, 2):
        hugging_face.import_folder(
            write_folder(tmp_path / f"hf{step}"), store.step_dir(run / "checkpoints", step), say=print
        )
    newest = store.step_dir(run / "checkpoints", 2)
    assert {resolve_checkpoint(path) for path in (run, run / "checkpoints", newest)} == {newest}


def test_what_is_no_checkpoint_is_refused_in_words(tmp_path):
    def told(path) -> str:
        with pytest.raises(ConfigError) as raised:
            resolve_checkpoint(path)
        return str(raised.value)

    assert "no such folder" in told(tmp_path / "nowhere")
    assert "holds no checkpoint" in told(tmp_path)
    folder = write_folder(tmp_path / "hf")
    assert "a Hugging Face folder, not a checkpoint" in told(folder)
    hugging_face.import_folder(folder, tmp_path / "native", say=print)
    (tmp_path / "native" / ".metadata").unlink()
    assert ".metadata is missing" in told(tmp_path / "native")
    (tmp_path / "native" / store.MANIFEST).unlink()
    assert "contains only an unfinished checkpoint" in told(tmp_path / "native")


def test_a_model_too_large_for_memory_is_known_beforehand(tmp_path, monkeypatch):
    recipe = hugging_face.import_folder(write_folder(tmp_path / "hf"), tmp_path / "native", say=print)
    needed = 8 * recipe.model.num_parameters() / 0.6
    for available, fits in ((needed + 1, True), (needed - 1, False)):
        memory = type("Memory", (), {"available": available})
        monkeypatch.setattr(hugging_face.psutil, "virtual_memory", lambda memory=memory: memory)
        assert hugging_face.fits_in_memory(tmp_path / "native") is fits


# --- mixtures of experts ---

SPARSE = {"kind": "Mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}


def mixtral_there_and_back(folder):
    """Import `hf`, export it again as `back`; largest differences of the logits."""
    checkpoint, back = folder / "native", folder / "back"
    hugging_face.import_folder(folder / "hf", checkpoint, say=print)
    difference = hugging_face.logit_difference(checkpoint, folder / "hf")
    hugging_face.export_folder(checkpoint, back, say=print)
    return difference, hugging_face.logit_difference(checkpoint, back)


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2, "num_experts_per_tok": 1}, {"dtype": "bfloat16"}])
def test_a_mixtral_folder_goes_there_and_back_bit_for_bit(changes, tmp_path):
    write_folder(tmp_path / "hf", **{**SPARSE, **changes})
    differences = ranks.run(1, mixtral_there_and_back, tmp_path)[0]
    assert max(differences) < TOLERANCE
    before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    recipe = read_recipe(tmp_path / "native")
    layers, experts = recipe.model.num_layers, recipe.moe.num_experts_per_tok
    assert recipe.moe.num_experts == 4
    assert recipe.moe.router_aux_loss_coef == pytest.approx(0.001 * experts / layers, rel=1e-9)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["num_local_experts"]) == ("mixtral", 4)
    assert config["router_aux_loss_coef"] == 0.001, "converted back to what it was"


def test_a_mixtral_with_what_we_do_not_have_is_refused(tmp_path):
    folder = write_folder(tmp_path / "hf", **SPARSE)
    change_config(folder, router_jitter_noise=0.1, sliding_window=32)
    said = refusal(folder, tmp_path / "native")
    assert "router_jitter_noise: 0.1 is not supported" in said and "sliding_window: 32" in said
    change_config(folder, router_jitter_noise=0.0, sliding_window=None, num_local_experts=5)
    assert "has no tensor model.layers.0.block_sparse_moe.experts.4.w1.weight" in refusal(folder, tmp_path / "native")


def losses_on_random_tokens(checkpoints):
    found = []
    for checkpoint in checkpoints:
        model, recipe = load_model.load_model(checkpoint)
        tokens = torch.randint(0, recipe.model.vocab_size, (4, 33), generator=torch.Generator().manual_seed(1))
        mask, positions = torch.ones(4, 32), torch.arange(32).expand(4, 32)
        with torch.no_grad():
            found.append(
                float(model(tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=mask)) / mask.sum()
            )
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_upcycled_model_computes_what_the_dense_one_does(dtype, tmp_path):
    write_folder(tmp_path / "hf", dtype=dtype)
    hugging_face.import_folder(tmp_path / "hf", tmp_path / "dense", say=print)
    moe = Moe(num_experts=8)
    recipe = hugging_face.import_folder(tmp_path / "hf", tmp_path / "sparse", say=print, upcycle=moe)
    assert recipe.moe == moe and store.damage(tmp_path / "sparse") is None
    dense, sparse = ranks.run(1, losses_on_random_tokens, [tmp_path / "dense", tmp_path / "sparse"])[0]
    assert abs(dense - sparse) < TOLERANCE
    assert ranks.run(1, hugging_face.logit_difference, tmp_path / "sparse", tmp_path / "hf")[0] < TOLERANCE


def test_experts_are_not_upcycled_again(tmp_path):
    write_folder(tmp_path / "hf", **SPARSE)
    with pytest.raises(ConfigError, match="has 4 experts already"):
        hugging_face.import_folder(tmp_path / "hf", tmp_path / "native", say=print, upcycle=Moe(num_experts=8))


def save_initial(recipe, folder):
    built, _ = tiny.engine(recipe)
    writer = store.CheckpointWriter(folder, built.mesh, Retention(1), asynchronous=False)
    writer.save(built.states(), Progress(step=1), dump(recipe))


def test_what_a_mixtral_does_not_have_is_not_exported(tmp_path):
    moe = {"num_experts": 4, "shared_intermediate_size": 32, "bias_update_rate": 0.01, "pre_softmax": True}
    ranks.run(1, save_initial, tiny.recipe(moe=moe), tmp_path)
    with pytest.raises(ConfigError) as refused:
        hugging_face.export_folder(store.step_dir(tmp_path, 1), tmp_path / "hf", say=print)
    said = str(refused.value)
    assert all(f"moe.{key}" in said for key in ("shared_intermediate_size", "bias_update_rate", "pre_softmax"))
    assert len(ranks.run(1, losses_on_random_tokens, [store.step_dir(tmp_path, 1)])[0]) == 1, "but evaluated"


def test_a_scaled_sum_of_experts_is_exported_in_their_last_matrices(tmp_path):
    ranks.run(1, save_initial, tiny.recipe(moe={"num_experts": 4, "scaling_factor": 2.5}), tmp_path)
    checkpoint = store.step_dir(tmp_path, 1)
    hugging_face.export_folder(checkpoint, tmp_path / "hf", say=print)
    assert ranks.run(1, hugging_face.logit_difference, checkpoint, tmp_path / "hf")[0] < TOLERANCE


@pytest.mark.parametrize(("layers", "experts_per_token"), [(1, 1), (1, 2), (3, 2), (32, 2)])
def test_balanced_as_hard_as_by_transformers(layers, experts_per_token):
    """transformers pools the layers; ours is summed over them. On layers alike both give one loss after conversion."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts, theirs = 8, 0.02
    logits = torch.randn(64, experts, generator=torch.Generator().manual_seed(1))
    pooled = theirs * load_balancing_loss_func((logits,) * layers, experts, experts_per_token)
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(experts_per_token, dim=1).indices, 1.0)
    share, mean = chosen.sum(0) / chosen.sum(), logits.softmax(1).mean(0)
    ours = coefficient_per_layer(theirs, experts_per_token, layers) * layers * experts * (share * mean).sum()
    assert float(ours) == pytest.approx(float(pooled), rel=1e-5)
    converted = coefficient_per_layer(theirs, experts_per_token, layers)
    assert pooled_coefficient(converted, experts_per_token, layers) == theirs
