"""Adapters to PEFT and back, merged, and named by their base."""

import dataclasses
import json

import pytest
import ranks
import tiny
import torch
import tuned
from safetensors.torch import load_file, save_file

from igla_mega.checkpoint import adapters, hugging_face, load_model
from igla_mega.checkpoint.base import digest_of
from igla_mega.checkpoint.folder import read_recipe
from igla_mega.config.errors import ConfigError
from igla_mega.distributed.mesh import single_process_mesh
from igla_mega.model import lora, nf4
from igla_mega.model.shards import local_runs, named_shards, shards_of

TOLERANCE = 1e-5
"""On fp32 logits of a few units: the same sums in another order."""
KINDS = {"LoRA": {}, "q and v": {"target_modules": ("q_proj", "v_proj")}, "rsLoRA": {"use_rslora": True}}
KINDS["DoRA"] = {"use_dora": True}


def random_adapters(model, section):
    """What they add to the logits is far above the tolerance."""
    generator = torch.Generator().manual_seed(4)
    shapes = adapters.shapes_of(model, section)
    return {
        name: torch.rand(shape, generator=generator) + 0.5
        if name.endswith("magnitude")
        else torch.empty(shape).normal_(0, 0.05, generator=generator)
        for name, shape in shapes.items()
    }


def tokens():
    return torch.randint(0, tiny.VOCAB, (2, tiny.SEQUENCE), generator=torch.Generator().manual_seed(1))


def our_logits(base, section, matrices, dtype=torch.float32):
    """Of this engine's model with adapters."""
    model, recipe = load_model.load_model(base, dtype=dtype)
    lora.attach([model], section)
    mesh = single_process_mesh(tuned.choose_layout(recipe, 1, "cpu"), torch.device("cpu"), 1)
    with torch.no_grad():
        adapters.place(matrices, named_shards([model], shards_of([model], mesh, recipe.model.vocab_size)))
        positions = torch.arange(tiny.SEQUENCE).expand(2, -1)
        return model.eval()(tokens(), positions, None)


def exported(tmp_path):
    import peft
    import transformers

    tuned.llama(tmp_path / "hf")
    model = read_recipe(tmp_path / "hf-native").model
    differences = {}
    for name, changes in KINDS.items():
        section = tuned.section(**changes)
        matrices = random_adapters(model, section)
        folder = tmp_path / name
        adapters.export_folder(matrices, section, folder, base_model=str(tmp_path / "hf"))
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        with torch.no_grad():
            without = base(tokens()).logits
            theirs = peft.PeftModel.from_pretrained(base, folder)(tokens()).logits
            ours = our_logits(tmp_path / "hf-native", section, matrices)
        section_again, again = adapters.import_folder(folder, model)
        assert section_again == section and again.keys() == matrices.keys()
        assert all(torch.equal(again[n], matrices[n]) for n in matrices)
        differences[name] = ((ours - theirs).abs().max().item(), (without - theirs).abs().max().item())
    return differences


def test_peft_gives_the_logits_of_an_exported_adapter(tmp_path):
    [differences] = ranks.run(1, exported, tmp_path, limit_seconds=200)
    for name, (difference, effect) in differences.items():
        print(f"{name}: logits differ by {difference:.1e}; the adapter changes them by {effect:.1e}")
        assert difference < TOLERANCE and effect > 0.05


def imported(tmp_path):
    """What PEFT saves, read by us."""
    section = tuned.section(use_dora=True, dropout=0.1)
    base = tuned.llama(tmp_path / "hf")
    wrapped = tuned.with_peft(base, section)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = read_recipe(tmp_path / "hf-native").model
    found, matrices = adapters.import_folder(tmp_path / "adapter", model)
    with torch.no_grad():
        theirs = wrapped.eval()(tokens()).logits
    ours = our_logits(tmp_path / "hf-native", found, matrices)
    return found == section, (ours - theirs).abs().max().item()


def test_an_adapter_of_peft_gives_its_logits_here(tmp_path):
    [(same, difference)] = ranks.run(1, imported, tmp_path, limit_seconds=100)
    print(f"logits differ by {difference:.1e}")
    assert same and difference < TOLERANCE


def merged(tmp_path):
    """Logits of the merged checkpoint through transformers, beside those with adapters; also on a base in 4 bits."""
    import transformers

    tuned.llama(tmp_path / "hf", hidden_size=128, intermediate_size=256)
    base = tmp_path / "hf-native"
    model = read_recipe(base).model
    differences = {}
    for name, (changes, quantized) in {
        "LoRA": ({}, None),
        "DoRA on q": ({"use_dora": True, "target_modules": ("q_proj",)}, None),
        "QLoRA": ({"target_modules": ("q_proj", "v_proj")}, torch.float32),
    }.items():
        section = tuned.section(**changes)
        matrices = random_adapters(model, section)
        adapters.merge(base, matrices, section, model, tmp_path / name, quantized=quantized)
        hugging_face.export_folder(tmp_path / name, tmp_path / f"{name} hf", say=print)
        with torch.no_grad():
            theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} hf")(tokens()).logits
        if quantized is None:
            ours = our_logits(base, section, matrices)
        else:
            ours = quantized_logits(base, section, matrices, quantized)
        differences[name] = (ours - theirs).abs().max().item()
    return differences


def quantized_logits(base, section, matrices, dtype):
    model, recipe = load_model.load_model(base, dtype=dtype)
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    nf4.quantize_chunks([model], lambda name: weights[name], compute_dtype=dtype)
    lora.attach([model], section)
    mesh = single_process_mesh(tuned.choose_layout(recipe, 1, "cpu"), torch.device("cpu"), 1)
    with torch.no_grad():
        adapters.place(matrices, named_shards([model], shards_of([model], mesh, recipe.model.vocab_size)))
        return model.eval()(tokens(), torch.arange(tiny.SEQUENCE).expand(2, -1), None)


def test_a_merged_model_gives_the_logits_of_base_and_adapter(tmp_path):
    [differences] = ranks.run(1, merged, tmp_path, limit_seconds=200)
    for name, difference in differences.items():
        print(f"{name}, merged: logits differ by {difference:.1e}")
        assert difference < TOLERANCE


def refused(tmp_path, changes, tensors):
    model = tiny.recipe().model
    section = tuned.section(target_modules=("q_proj", "down_proj"))
    folder = tmp_path / "adapter"
    adapters.export_folder(random_adapters(model, section), section, folder, base_model="base")
    settings = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps({**settings, **changes}))
    state = load_file(folder / adapters.WEIGHTS)
    save_file(tensors(state), folder / adapters.WEIGHTS)
    with pytest.raises(ConfigError) as raised:
        adapters.import_folder(folder, model)
    return str(raised.value)


def without_last(state):
    return dict(list(state.items())[:-1])


def narrow(state):
    return {n: t[:, :32].contiguous() if n.endswith("q_proj.lora_A.weight") else t for n, t in state.items()}


def with_other(state):
    return {**state, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 64)}


def first_layer(state):
    return {name: tensor for name, tensor in state.items() if ".layers.0." in name}


REFUSALS = {
    "not a LoRA adapter": ({"peft_type": "IA3"}, dict),
    "rank_pattern: {'q_proj': 2} is not supported": ({"rank_pattern": {"q_proj": 2}}, dict),
    "bias: all is not supported": ({"bias": "all"}, dict),
    "has no base_model.model.model.layers": ({}, without_last),
    "has adapters on 1 layers, none on layer 1": ({}, first_layer),
    "is [4, 32], this base needs [4, 64]": ({}, narrow),
    "lm_head.lora_A.weight is not an adapter": ({}, with_other),
}


@pytest.mark.parametrize("words", REFUSALS)
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, words):
    assert words in refused(tmp_path, *REFUSALS[words])


CHANGES_THE_RESULT = [
    *(
        {"init_lora_weights": name}
        for name in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica")
    ),
    {"alora_invocation_tokens": [1, 2]},
    {"use_bdlora": {"nblocks": 2}},
    {"kasa_config": {"beta": 1e-4}},
    {"layer_replication": [[0, 2], [1, 2]]},
    {"use_qalora": True},
    {"fan_in_fan_out": True},
    {"lora_bias": True},
    {"target_parameters": ["mlp.experts.gate_up_proj"]},
    {"layers_to_transform": [0]},
    {"a_key_of_next_year": "on"},
]


@pytest.mark.parametrize("changes", CHANGES_THE_RESULT, ids=str)
def test_a_setting_that_may_change_the_result_is_refused_by_name(tmp_path, changes):
    [(key, value)] = changes.items()
    assert f"{key}: {value} is not supported" in refused(tmp_path, changes, dict)


def test_every_setting_of_peft_is_accepted_at_its_default(tmp_path):
    """A new version of PEFT adds a key: unless its default is off, this fails until somebody has classified it."""
    peft = pytest.importorskip("peft")
    defaults = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    plain = {key: value for key, value in peft.LoraConfig().to_dict().items() if key in defaults}
    (tmp_path / adapters.CONFIG).write_text(json.dumps({**plain, "peft_type": "LORA"}, default=list))
    assert adapters._settings(tmp_path)["r"] == 8


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"adapter_config.json: cannot be read(.|\n)*PEFT saved"):
        adapters.import_folder(tmp_path, tiny.recipe().model)


def digested(layout, change=0.0):
    recipe = tiny.recipe(**layout)
    built, shards, _ = tuned.engine(recipe, tuned.section())
    chunks = [chunk.module for chunk in built.chunks]
    with torch.no_grad():
        if change and built.mesh.is_main:
            next(chunks[0].parameters())[0, 0] += change
    counted = [run for run in local_runs(chunks, shards) if run[0].is_first_copy and built.mesh.data_context.rank == 0]
    return digest_of(counted, built.mesh.host_group)


def test_a_base_has_one_digest_in_every_layout():
    [whole] = ranks.run(1, digested, {})
    for layout in ({"tensor_parallel": 2}, {"pipeline_parallel": 2}, {"distributed_optimizer": True}):
        assert ranks.run(2, digested, layout) == [whole, whole]
    assert ranks.run(1, digested, {"precision": "BF16"}) == [whole]
    assert ranks.run(1, digested, {}, 0.01) != [whole]
