"""Keys of a Hugging Face config.json: each is used, neutral, or refused unless it is off."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igla_mega.checkpoint import hf_config
from igla_mega.config.errors import ConfigError

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 256,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED = {
    "Llama 1": {
        "architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
        "initializer_range": 0.02, "max_sequence_length": 2048, "pad_token_id": -1, "rms_norm_eps": 1e-06,
        "torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": True, "model_type": "llama",
    },
    "Llama 2": {
        "_name_or_path": "x", "architectures": ["LlamaForCausalLM"], "pretraining_tp": 1, "rope_scaling": None,
        "max_position_embeddings": 4096, "num_key_value_heads": 4, "tie_word_embeddings": False, "model_type": "llama",
    },
    "Llama 3.2": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False,
        "eos_token_id": [128001, 128008], "head_dim": 16, "rope_theta": 500000.0, "model_type": "llama",
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192}, "tie_word_embeddings": True,
    },
    "SmolLM 2": {
        "architectures": ["LlamaForCausalLM"], "is_llama_config": True, "rope_interleaved": False,
        "model_type": "llama",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "max_position_embeddings": 8192,
    },
    "by Unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.1", "pad_token_id": 3, "model_type": "mistral",
                   "sliding_window": None, "architectures": ["MistralForCausalLM"]},
    "Vicuna": {"_flash_attn_2_enabled": False, "temperature": 0.9, "top_p": 0.6, "do_sample": True,
               "model_type": "llama", "max_length": 4096, "architectures": ["LlamaForCausalLM"]},
    "Mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2,
                "output_router_logits": False, "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.0,
                "sliding_window": None, "model_type": "mixtral", "num_key_value_heads": 4},
}  # fmt: skip
"""Keys of published folders, with small sizes."""


def taken(config: dict):
    return hf_config.model_of({**SMALL, **config}, Path("config.json"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_keys_of_published_models_are_known(name):
    model, moe = taken(PUBLISHED[name])
    assert model.num_layers == 2 and (moe is None) == (name != "Mixtral")


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Mixtral"])
@pytest.mark.parametrize("changed", [False, True])
def test_what_transformers_writes_by_default_is_imported(kind, changed):
    """Every key of the class itself: `to_dict` has all of them, `to_diff_dict`, which is saved, those that differ."""
    transformers = pytest.importorskip("transformers")
    rope = {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 64, "rope_theta": 1e5}} if changed else {}
    own = {"num_key_value_heads": 2, "sliding_window": None, "bos_token_id": 5, "dtype": "bfloat16"} if changed else {}
    config = getattr(transformers, f"{kind}Config")(**SMALL, **own, **rope)
    # Mistral's own default is a window of 4,096 of its 131,072 positions, which is refused by its own rule.
    window = {"sliding_window": None}
    for written in (config.to_dict(), config.to_diff_dict()):
        model, moe = hf_config.model_of({**written, **window}, Path("config.json"))
        assert model.hidden_size == 64 and (moe is not None) == (kind == "Mixtral")
        assert not changed or (model.rope_theta, model.rope_scaling.factor) == (1e5, 8.0)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Mixtral"])
def test_each_key_of_transformers_is_used_neutral_or_refused_when_it_is_not_off(kind):
    transformers = pytest.importorskip("transformers")
    known = {*getattr(transformers, f"{kind}Config")().to_dict()}
    assert known - hf_config._USED - hf_config._NEUTRAL - hf_config._EXPERTS.keys() - hf_config._OFF.keys() == set()


KEYS = st.text(st.characters(codec="ascii", categories=("Ll", "Nd"), include_characters="_"), min_size=1, max_size=30)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just({}) | st.just(["a"])
KNOWN = {*hf_config._USED, *hf_config._NEUTRAL, *hf_config._OFF, *hf_config._EXPERTS, *hf_config._ROPE_KEYS}


@given(KEYS.filter(lambda key: key not in KNOWN), VALUES)
def test_an_unknown_key_of_any_value_is_refused_by_its_name(key, value):
    for place in ({key: value}, {"rope_parameters": {"rope_type": "default", key: value}}):
        with pytest.raises(ConfigError) as error:
            taken({"model_type": "llama", **place})
        assert f"{key}: " in str(error.value) and "not a known key" in str(error.value)


@given(st.sampled_from(sorted(hf_config._OFF)), VALUES)
def test_a_key_that_changes_the_model_is_taken_at_its_off_value_only(key, value):
    for allowed in hf_config._OFF[key][0]:
        taken({"model_type": "llama", key: allowed})
    if value not in hf_config._OFF[key][0]:
        with pytest.raises(ConfigError, match=rf"config.json: {key}: "):
            taken({"model_type": "llama", key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: "),
        ({"num_local_experts": 8}, "num_local_experts: 8: not a known key"),
        ({"sliding_window": 16}, "sliding_window: 16 is not supported; null is"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "auto_map: names code of the model's own"),
        ({"architectures": ["LlamaBidirectionalModel"]}, "architectures: ['LlamaBidirectionalModel'] is not supported"),
        ({"logit_scale": 0.5}, "logit_scale: 0.5: not a known key"),
        ({"attention_multiplier": 2.0}, "attention_multiplier: 2.0: not a known key"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 2]}}, "rope_scaling: mrope_section: "),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers: [1, 0]: not a known key"),
        ({"is_causal": False}, "is_causal: False: not a known key"),
        ({"x" * 10: "y" * 1000}, "yyy...: not a known key"),
    ],
)
def test_what_would_be_another_model_is_refused_in_words(changes, words):
    with pytest.raises(ConfigError) as error:
        taken({"model_type": "llama", **changes})
    assert words in str(error.value) and "may be removed" in str(error.value)


def test_full_attention_on_every_layer_is_no_change():
    assert taken({"model_type": "llama", "layer_types": ["full_attention"] * 2})[0].num_layers == 2
