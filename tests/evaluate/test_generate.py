import json
import math
from pathlib import Path

import pytest
import ranks
import tiny
import torch

from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import train_bpe
from igla_mega.evaluate.generate import choose, decode_stream, generate, restrict, sample

PROMPT = [7, 81, 3, 200, 14]
TEXTS = ["Ein Satz mit äöü und einem Kaninchen 🐇.", "日本語のテキストも一行だけ。", "def add(a, b): return a + b"]


def model(**shape):
    """A whole random model of this rank's own; large weights, so that its likeliest tokens vary."""
    engine, _ = tiny.engine(tiny.recipe(model={"init_std": 0.2, **shape}))
    return engine.chunks[0].module.eval()


@torch.no_grad()
def greedy_without_cache(built, ids, num_tokens):
    ids = list(ids)
    for _ in range(num_tokens):
        tokens = torch.tensor([ids])
        logits = built(tokens, torch.arange(len(ids)).unsqueeze(0), None)
        ids.append(int(logits[0, -1].argmax()))
    return ids


def with_and_without_cache(shape):
    built = model(**shape)
    drawn = list(sample(built, PROMPT, max_new_tokens=20))
    return PROMPT + drawn, greedy_without_cache(built, PROMPT, 20)


@pytest.mark.parametrize("shape", [{}, {"tie_embeddings": True}, {"num_kv_heads": 4, "head_dim": 8}], ids=str)
def test_greedy_with_the_cache_equals_greedy_without_it(shape):
    [(cached, dense)] = ranks.run(1, with_and_without_cache, shape)
    assert cached == dense
    assert len(set(cached)) > 5, "the model repeats one token: the test shows nothing"


def beside_transformers():
    from transformers import LlamaConfig, LlamaForCausalLM

    built = model()
    shape = tiny.recipe().model
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_position,
        rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    weights = {name: param.detach() for name, param in built.named_parameters()}
    queries, size = shape.num_heads // shape.num_kv_heads, shape.head_size
    theirs = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for layer in range(shape.num_layers):
        ours, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        qkv = weights[ours + "self_attention.linear_qkv.weight"].unflatten(0, (shape.num_kv_heads, queries + 2, size))
        for name, part in (("q", qkv[:, :queries]), ("k", qkv[:, queries]), ("v", qkv[:, queries + 1])):
            theirs[f"{hf}self_attn.{name}_proj.weight"] = part.reshape(-1, shape.hidden_size)
        theirs[hf + "self_attn.o_proj.weight"] = weights[ours + "self_attention.linear_proj.weight"]
        gate, up = weights[ours + "mlp.linear_fc1.weight"].chunk(2)
        theirs[hf + "mlp.gate_proj.weight"], theirs[hf + "mlp.up_proj.weight"] = gate, up
        theirs[hf + "mlp.down_proj.weight"] = weights[ours + "mlp.linear_fc2.weight"]
        theirs[hf + "input_layernorm.weight"] = weights[ours + "input_layernorm.weight"]
        theirs[hf + "post_attention_layernorm.weight"] = weights[ours + "pre_mlp_layernorm.weight"]
    peer = LlamaForCausalLM(config).eval()
    peer.load_state_dict(theirs)
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt)
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = peer.generate(prompt, attention_mask=mask, **settings)
    return PROMPT + list(sample(built, PROMPT, max_new_tokens=20)), expected[0].tolist()


def test_greedy_equals_that_of_transformers_on_the_same_weights():
    pytest.importorskip("transformers")
    [(ours, theirs)] = ranks.run(1, beside_transformers)
    assert ours == theirs


def sampled_several_ways():
    built = model()

    def draw(**settings):
        return list(sample(built, PROMPT, max_new_tokens=12, **settings))

    full = list(sample(built, list(range(tiny.SEQUENCE)), max_new_tokens=5))
    nearly_full = list(sample(built, list(range(tiny.SEQUENCE - 3)), max_new_tokens=50))
    greedy = draw()
    ended = list(sample(built, PROMPT, max_new_tokens=12, end_id=greedy[4]))
    try:
        list(sample(built, [1] * (tiny.SEQUENCE + 1), max_new_tokens=1))
        refusal = ""
    except ConfigError as error:
        refusal = str(error)
    return {
        "greedy": greedy,
        "top_k_1": draw(temperature=1.3, top_k=1, seed=5),
        "tiny_top_p": draw(temperature=1.0, top_p=1e-6, seed=5),
        "seed_5": [draw(temperature=2.0, seed=5), draw(temperature=2.0, seed=5)],
        "seed_6": draw(temperature=2.0, seed=6),
        "num_at_the_end": (len(full), len(nearly_full)),
        "ended": ended,
        "refusal": refusal,
    }


def test_sampling_is_greedy_at_top_k_1_and_reproduced_by_its_seed_and_ends_where_it_must():
    [drawn] = ranks.run(1, sampled_several_ways)
    assert drawn["top_k_1"] == drawn["greedy"] == drawn["tiny_top_p"]
    assert drawn["seed_5"][0] == drawn["seed_5"][1] != drawn["seed_6"]
    assert drawn["num_at_the_end"] == (1, 4)
    assert drawn["ended"] == drawn["greedy"][: drawn["greedy"].index(drawn["greedy"][4])]
    assert f"{tiny.SEQUENCE + 1} tokens; this model reads 1 to {tiny.SEQUENCE}" in drawn["refusal"]


def kept(logits, top_k, top_p):
    return set(torch.isfinite(restrict(logits, top_k, top_p)).nonzero().flatten().tolist())


def test_top_k_and_top_p_keep_the_right_tokens():
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    assert kept(logits, 0, 1.0) == {0, 1, 2, 3, 4}
    assert kept(logits, 2, 1.0) == {1, 3}
    assert kept(logits, 9, 1.0) == {0, 1, 2, 3, 4}
    assert kept(logits, 0, 0.3) == {1}
    assert kept(logits, 0, 0.69) == {1, 3}
    assert kept(logits, 0, 0.71) == {1, 3, 4}
    # top_p counts within top_k: of {0.4, 0.3}, 0.4 has 4/7.
    assert kept(logits, 2, 0.5) == {1}
    assert kept(torch.zeros(4), 2, 1.0) == {0, 1}


def test_draws_follow_the_probabilities_of_the_tokens_that_are_kept():
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    generator = torch.Generator().manual_seed(0)
    draws = [choose(probabilities.log(), 1.0, 3, 1.0, generator) for _ in range(4000)]
    share = torch.bincount(torch.tensor(draws), minlength=5) / len(draws)
    expected = torch.tensor([0.0, 0.4, 0.0, 0.3, 0.15]) / 0.85
    # Four standard deviations of a share of 4000 draws.
    assert (share - expected).abs().max() < 4 * math.sqrt(0.25 / len(draws))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    (folder / "text.jsonl").write_text(json.dumps({"text": "plain words only"}) + "\n")
    return train_bpe([folder / "text.jsonl"], 257, folder / "tokenizer")


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_never_splits_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()), "one token per byte: characters span tokens"
    prompt, rest = ids[:2], ids[2:]
    pieces = list(decode_stream(tokenizer, tokenizer.encode("x"), iter(ids)))
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(text)
    if text.isascii():
        assert "".join(decode_stream(tokenizer, prompt, iter(rest))) == text[2:]


def test_streaming_ends_within_a_character_with_what_is_there(tokenizer):
    ids = tokenizer.encode("a🐇")[:3]
    assert list(decode_stream(tokenizer, [], iter(ids))) == ["a", "\ufffd"]


def saved_checkpoint(folder, tokenizer_path):
    from igla_mega.checkpoint import store
    from igla_mega.config.load import dump

    recipe = tiny.recipe(model={"vocab_size": 257})
    engine, _ = tiny.engine(recipe)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"tokenizer": tokenizer_path})})
    writer = store.CheckpointWriter(folder, engine.mesh, Retention(1), asynchronous=False)
    writer.save(engine.optimizer.states(), Progress(3, 24, 24 * tiny.SEQUENCE), dump(recipe))


def generated(folder, prompt, settings):
    pieces = []
    try:
        text = generate(Path(folder), prompt, stream=pieces.append, **settings)
    except ConfigError as error:
        return str(error)
    assert "".join(pieces) == text
    return (text,)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("run")
    ranks.run(1, saved_checkpoint, folder / "checkpoints", tokenizer.path)
    return folder


def test_a_run_folder_continues_a_prompt(run_dir):
    settings = {"max_new_tokens": 6, "temperature": 1.0, "seed": 1}
    [first] = ranks.run(1, generated, run_dir, "Hello", settings)
    assert isinstance(first, tuple) and first[0]
    assert ranks.run(1, generated, run_dir, "Hello", settings) == [first]


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ("", {}, "--prompt: is empty"),
        ("x" * 40, {}, "40 tokens; this model reads 1 to 32"),
        ("x", {"temperature": -1.0}, "--temperature: -1.0"),
        ("x", {"top_p": 0.0}, "--top-p: 0.0"),
        ("x", {"top_k": -2}, "--top-k: -2"),
        ("x", {"max_new_tokens": 0}, "--max-new-tokens: 0"),
    ],
)
def test_a_wrong_prompt_or_setting_is_refused_in_words(run_dir, prompt, settings, said):
    [message] = ranks.run(1, generated, run_dir, prompt, settings)
    assert isinstance(message, str) and said in message


def test_a_checkpoint_without_a_tokenizer_says_where_to_put_one(run_dir, tmp_path, tokenizer):
    ranks.run(1, saved_checkpoint, tmp_path / "checkpoints", None)
    [message] = ranks.run(1, generated, tmp_path, "x", {})
    assert isinstance(message, str) and "names no tokenizer" in message
    (tmp_path / "checkpoints" / "step_00000003" / "tokenizer").symlink_to(tokenizer.path)
    assert isinstance(ranks.run(1, generated, tmp_path, "x", {"max_new_tokens": 2})[0], tuple)
