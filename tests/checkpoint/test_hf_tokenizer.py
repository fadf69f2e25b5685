"""An exported folder, as transformers uses it: the template of the run, and an end at the end of the turn."""

import json
import os
import stat

import pytest
import torch
import yaml

from igla_mega.checkpoint import hugging_face, store
from igla_mega.checkpoint.adapters import export_folder as export_adapters
from igla_mega.checkpoint.hf_tokenizer import export_tokenizer
from igla_mega.config.features import Lora
from igla_mega.config.load import load_recipe
from igla_mega.data.tokenizer import train_bpe
from igla_mega.data.tuning import chat

transformers = pytest.importorskip("transformers")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BARE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [
    {"role": "user", "content": "  Is it raining? "},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Überall?"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "text.jsonl").write_text(json.dumps({"text": "is it raining everywhere? no."}) + "\n")
    train_bpe([path / "text.jsonl"], 300, path)
    loaded = transformers.AutoTokenizer.from_pretrained(path)
    loaded.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    loaded.chat_template = CHATML
    loaded.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """A checkpoint of a tiny model, imported without a tokenizer; its settings let generation end at id 7."""
    path = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=320,
        max_position_embeddings=128,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path / "hf")
    (path / "hf" / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 7}))
    hugging_face.import_folder(path / "hf", path / "native", say=print)
    return path / "native"


def as_tuned(native, folder, tokenizer, **data):
    """A copy of the checkpoint, as a run on conversations leaves it: without files of the base's tokenizer."""
    folder.mkdir(parents=True)
    for file in native.iterdir():
        if file.name != "tokenizer":
            os.link(file, folder / file.name)
    content = yaml.safe_load((native / "recipe.yaml").read_text())
    content |= {"sft": {}, "base_model": str(native), "data": {"tokenizer": str(tokenizer), **data}}
    return with_recipe(folder, content)


def with_recipe(folder, content):
    """The checkpoint with another recipe, sealed again."""
    for name in ("recipe.yaml", store.MANIFEST):
        (folder / name).unlink()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    store.write_manifest(folder, {})
    return folder


def written(model, prompt: torch.Tensor, token: int) -> int:
    """Number of tokens that a model generates which writes this token again and again."""
    hook = model.lm_head.register_forward_hook(
        lambda module, args, output: torch.nn.functional.one_hot(torch.tensor([[token]]), output.size(-1)).float()
    )
    found = model.generate(prompt, max_new_tokens=6, do_sample=False)
    hook.remove()
    return found.size(1) - prompt.size(1)


@pytest.mark.parametrize(
    ("template", "end"),
    [("tokenizer", "<|im_end|>"), ("plain", "<|endoftext|>"), ("file", "<|im_end|>"), ("bare", None)],
)
def test_an_exported_chat_model_has_its_template_and_stops_at_the_end_of_its_turn(
    native, tokenizer, tmp_path, template, end
):
    file = tmp_path / "own.jinja"
    file.write_text(BARE if template == "bare" else CHATML.replace("<|im_start|>", "<|im_start|>The "))
    given = {"tokenizer": None, "plain": "plain"}.get(template, str(file))
    tuned = as_tuned(native, tmp_path / "tuned", tokenizer, **({"chat_template": given} if given else {}))
    out = tmp_path / "not" / "yet" / "there"
    hugging_face.export_folder(tuned, out, say=print)

    theirs = transformers.AutoTokenizer.from_pretrained(out)
    expected = chat.load_template(tokenizer, given).render(TURNS, add_generation_prompt=True)
    assert theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == expected
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert given is None or settings["chat_template"] == chat.load_template(tokenizer, given).source

    generation = json.loads((out / "generation_config.json").read_text())
    ends = [7, *([theirs.convert_tokens_to_ids(end)] if end else []), theirs.convert_tokens_to_ids("<|endoftext|>")]
    assert generation == {"temperature": 0.6, "eos_token_id": list(dict.fromkeys(ends))}, "the base's are kept"
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    prompt = theirs(expected, return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert [written(model, prompt, one) for one in (*ends, 20)] == [1] * len(ends) + [6]
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(one.stat().st_mode) for one in out.iterdir()} == {0o666 & ~umask}


def test_a_model_that_was_not_tuned_on_turns_keeps_its_files(native, tokenizer, tmp_path):
    tuned = as_tuned(native, tmp_path / "text", tokenizer)
    content = yaml.safe_load((tuned / "recipe.yaml").read_text())
    del content["sft"]
    with_recipe(tuned, content)
    hugging_face.export_folder(tuned, tmp_path / "out", say=print)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (
            not (tokenizer / name).exists() or (tmp_path / "out" / name).read_bytes() == (tokenizer / name).read_bytes()
        )
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 7


def test_a_template_that_is_gone_is_not_replaced_by_another_one(native, tokenizer, tmp_path):
    tuned = as_tuned(native, tmp_path / "tuned", tokenizer, chat_template=str(tmp_path / "gone.jinja"))
    said = []
    hugging_face.export_folder(tuned, tmp_path / "out", say=said.append)
    assert any("gone.jinja cannot be read" in line and "without a chat template" in line for line in said)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template is None


def test_adapters_alone_carry_the_template_too(native, tokenizer, tmp_path):
    tuned = as_tuned(native, tmp_path / "tuned", tokenizer, chat_template="plain")
    recipe = load_recipe(tuned / "recipe.yaml")
    matrices = {"decoder.layers.0.self_attention.linear_proj.o_proj.lora_A": torch.zeros(2, 32)}
    export_adapters(
        matrices, Lora(rank=2, alpha=4), tmp_path / "out", base_model="base",
        more=lambda folder: export_tokenizer(tuned, recipe, folder, print),
    )  # fmt: skip
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(TURNS[:1], tokenize=False) == "### user\n  Is it raining? \n"
    assert stat.S_IMODE((tmp_path / "out" / "adapter_model.safetensors").stat().st_mode) & 0o400


def test_the_first_token_of_a_text_is_the_one_that_the_tokenizer_names(tokenizer, tmp_path, native):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizer / name).read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<|im_start|>"}))
    recipe = load_recipe(native / "recipe.yaml").with_keys({"data.tokenizer": str(folder)})
    (tmp_path / "out").mkdir()
    ids = export_tokenizer(tmp_path / "checkpoint", recipe, tmp_path / "out", print)
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    assert ids == {
        "bos_token_id": loaded.convert_tokens_to_ids("<|im_start|>"),
        "eos_token_id": loaded.convert_tokens_to_ids("<|endoftext|>"),
        "pad_token_id": None,
    }
