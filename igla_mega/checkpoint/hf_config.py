"""Convert the `config.json` of Hugging Face models to the `model` and `moe` sections of a recipe, and back."""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.features import Moe
from igla_mega.config.schema import Model

# Key in `config.json`: key in the recipe's `model` section.
SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position",
    "tie_word_embeddings": "tie_embeddings",
}

_SIZES = {**SIZES, "rms_norm_eps": "norm_epsilon", "initializer_range": "init_std"}
_EXPERTS = {
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "router_aux_loss_coef": "router_aux_loss_coef",
}
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
# The values that transformers uses for keys that are missing in `config.json`, by `model_type`.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "mistral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "mixtral": {
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
}
_ROPE_SCALING = {
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position_embeddings": "original_max_position",
}
_ROPE_KEYS = frozenset({"type", "rope_type", "rope_theta", "partial_rotary_factor", *_ROPE_SCALING})
_USED = frozenset({
    *_SIZES, "model_type", "architectures", "rope_theta", "rope_scaling", "rope_parameters", "sliding_window",
    "bos_token_id", "eos_token_id", "pad_token_id",
})  # fmt: skip
_NEUTRAL = frozenset({
    # Of the file, its author's tools, and how a library runs the model.
    "transformers_version", "_name_or_path", "name_or_path", "_commit_hash", "_from_model_config", "torch_dtype",
    "dtype", "use_cache", "attn_implementation", "_attn_implementation", "_attn_implementation_autoset",
    "_flash_attn_2_enabled", "use_flash_attn", "use_flashattn", "experts_implementation", "pretraining_tp",
    "unsloth_version", "unsloth_fixed", "transformers.js_config", "is_llama_config", "torchscript", "use_bfloat16",
    "chunk_size_feed_forward", "tf_legacy_loss", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits", "max_sequence_length", "model_max_length", "tokenizer_class", "is_decoder",
    # Of training, for which a recipe has its own settings.
    "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
    # Of other tasks than the next token: labels of classes, a prefix.
    "finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "prefix", "task_specific_params",
    # Of generation.
    "sep_token_id", "decoder_start_token_id", "unk_token_id", "bad_words_ids", "begin_suppress_tokens",
    "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "remove_invalid_values", "return_dict_in_generate", "output_scores", "do_sample", "early_stopping",
    "max_length", "min_length", "max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences",
    "diversity_penalty", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "temperature", "top_k", "top_p", "typical_p",
})  # fmt: skip
"""Keys that change nothing in what the weights compute."""
_BIASES, _NO = ((False, None), "biases are not supported"), ((False, None), "is not supported; false is")
_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu",), "is not supported; silu is"),
    "attention_bias": _BIASES,
    "mlp_bias": _BIASES,
    "router_jitter_noise": ((0, None), "is not supported; 0 is"),
    "partial_rotary_factor": ((1, None), "is not supported; 1.0 is"),
    "quantization_config": ((None, {}), "quantized weights are not supported; use the full model"),
    "layer_types": ((None,), "is not supported; full_attention on every layer is"),
    "auto_map": ((None, {}), "names code of the model's own, which may compute something else"),
    "pruned_heads": ((None, {}), "is not supported; null is"),
    "per_layer_config": ((None, {}), "is not supported; null is"),
    "cross_attention_hidden_size": ((None,), "is not supported; null is"),
    "tie_last_hidden_states": ((None,), "is not supported; null is"),
    **dict.fromkeys(
        ("rope_interleaved", "use_sliding_window", "is_encoder_decoder", "tie_encoder_decoder", "add_cross_attention"),
        _NO,
    ),
}
"""Keys that change the model -> the values that leave it a plain Llama, and the message for any other value."""


def is_mixtral(moe: Moe | None, checkpoint: Path) -> None:
    """Reject experts with features that MixtralForCausalLM does not have.

    Raises:
        ConfigError: names each of these features.
    """
    if moe is None:
        return
    features = {
        "moe.shared_intermediate_size": moe.shared_intermediate_size is not None,
        "moe.pre_softmax": moe.pre_softmax,
        "moe.bias_update_rate": moe.bias_update_rate > 0,
    }
    if breaches := [
        f"{checkpoint}: {key}: not supported by transformers' Mixtral." for key, used in features.items() if used
    ]:
        raise ConfigError(*breaches, "  Such a model can be trained and evaluated here, but not exported.")


def model_of(config: dict[str, Any], path: Path) -> tuple[Model, Moe | None]:
    """Return the `model` and `moe` sections for a Hugging Face configuration.

    Args:
        config: content of `config.json`.
        path: its path, for messages.

    Raises:
        ConfigError: names every setting that is not supported.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise ConfigError(
            f"{path}: model_type: {kind} is not a Llama.\n  Models of type {' and '.join(_DEFAULTS)} can be imported."
        )
    given = {**_DEFAULTS[kind], **config}
    # The types first: config.json may come from anyone, and the checks below compute with these values.
    if wrong := [key for key in ("rope_scaling", "rope_parameters") if not isinstance(given.get(key) or {}, dict)]:
        raise ConfigError(f"{path}: {wrong[0]}: not a JSON object.\n  Download the folder again.")
    for key in ("sliding_window", "max_position_embeddings"):
        if not isinstance(given.get(key) or 0, int | float):
            raise ConfigError(f"{path}: {key}: {given[key]!r} is not a number.\n  Download the folder again.")
    # transformers 4 writes `rope_scaling` and `rope_theta`, transformers 5 both of them in `rope_parameters`.
    rope = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    breaches = _unsupported(kind, given, rope, path)
    if breaches:
        raise ConfigError(
            *few(breaches),
            "  Use a plain Llama, Mistral or Mixtral. A key that changes nothing in what is computed may be removed.",
        )
    section = {ours: given[theirs] for theirs, ours in _SIZES.items() if given.get(theirs) is not None}
    section["rope_theta"] = rope.get("rope_theta") or given.get("rope_theta") or 10000.0
    if _scaling_type(rope) == "llama3":
        section["rope_scaling"] = {ours: rope[theirs] for theirs, ours in _ROPE_SCALING.items()}
    try:
        moe = None
        if kind == "mixtral":
            experts = {ours: given[theirs] for theirs, ours in _EXPERTS.items()}
            experts["router_aux_loss_coef"] = coefficient_per_layer(
                given["router_aux_loss_coef"], given["num_experts_per_tok"], given["num_hidden_layers"]
            )
            moe = Moe.model_validate(experts)
        return Model.model_validate(section), moe
    except ValidationError as error:
        # The user knows the keys of config.json, not those of a recipe.
        theirs = {ours: name for name, ours in (_SIZES | _EXPERTS).items()}
        details = [(str(detail["loc"][0]), detail["msg"]) for detail in error.errors()]
        raise ConfigError(
            *(f"{path}: {theirs.get(key, key)}: {section.get(key)!r}: {text}." for key, text in details),
            "  Download the folder again.",
        ) from None


def coefficient_per_layer(pooled: Any, experts_per_token: Any, num_layers: Any) -> Any:
    """Return the coefficient of our balancing loss that presses as hard as transformers' on balanced experts.

    transformers pools all layers and counts a token once for each of its experts (`load_balancing_loss_func` of
    modeling_mixtral.py): experts_per_token times the mean over layers. Ours is the sum over layers, of shares that add
    up to 1. Without conversion Mixtral 8x7B would be balanced 16 times as hard. Values of a wrong type are passed
    through: the schema refuses them.
    """
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in (pooled, experts_per_token)):
        return pooled
    return pooled * experts_per_token / num_layers


def pooled_coefficient(per_layer: float, experts_per_token: int, num_layers: int) -> float:
    """Return the inverse of `coefficient_per_layer`, without its rounding: 0.02 comes back as 0.02."""
    return float(f"{per_layer * num_layers / experts_per_token:.12g}")


def _scaling_type(rope: dict[str, Any]) -> str:
    """Return the type of rotary scaling, under its new or its old key."""
    return rope.get("rope_type") or rope.get("type") or "default"


def _unsupported(kind: str, given: dict[str, Any], rope: dict[str, Any], path: Path) -> list[str]:
    """Return a message for every required setting that is missing, and for every one that is not supported."""
    breaches = [f"{path}: {key}: not given." for key in _REQUIRED if given.get(key) is None]
    breaches += _unknown(kind, given, rope, path)
    window = given.get("sliding_window")
    if kind == "mixtral":
        breaches += [f"{path}: {key}: not given." for key in _EXPERTS if given.get(key) is None]
    if window is not None and window < (given.get("max_position_embeddings") or 0):
        breaches.append(f"{path}: sliding_window: {window} is not supported; null is.")
    if rope.get("partial_rotary_factor") not in _OFF["partial_rotary_factor"][0]:
        breaches.append(f"{path}: partial_rotary_factor: only 1.0 is supported.")
    scaling_type = _scaling_type(rope)
    if scaling_type not in ("default", "llama3"):
        breaches.append(f"{path}: rope_scaling: type {scaling_type} is not supported; llama3 is.")
    missing = [key for key in _ROPE_SCALING if scaling_type == "llama3" and key not in rope]
    if missing:
        breaches.append(f"{path}: rope_scaling: type llama3 needs {', '.join(missing)}.")
    return breaches


def _unknown(kind: str, given: dict[str, Any], rope: dict[str, Any], path: Path) -> list[str]:
    """Return a message for every key that is not known to leave the model a plain Llama, Mistral or Mixtral.

    A list of what is supported, not of what is not: a key that appears next year must not change a model unnoticed.
    """
    used = _USED | _NEUTRAL | (_EXPERTS.keys() if kind == "mixtral" else set())
    breaches = []
    for key, value in given.items():
        if key in used or (key == "layer_types" and _all_full(value)):
            continue
        allowed, words = _OFF.get(key, ((), ""))
        if not words:
            breaches.append(f"{path}: {key}: {_short(value)}: not a known key; it may change the model.")
        elif value not in allowed:
            breaches.append(f"{path}: {key}: {_short(value) + ' ' if words.startswith('is ') else ''}{words}.")
    if _scaling_type(rope) in ("default", "llama3"):
        breaches += [
            f"{path}: rope_scaling: {key}: {_short(value)}: not a known key; it may change the model."
            for key, value in rope.items()
            if key not in _ROPE_KEYS
        ]
    names, known = given.get("architectures") or [], ("mixtral",) if kind == "mixtral" else ("llama", "mistral")
    if not isinstance(names, list) or any(str(n).lower() not in [f"{k}forcausallm" for k in known] for n in names):
        breaches.append(f"{path}: architectures: {_short(names)} is not supported; {kind.title()}ForCausalLM is.")
    return breaches


def _all_full(layer_types: Any) -> bool:
    """Return True if `layer_types` names full attention for every layer."""
    return isinstance(layer_types, list) and all(kind == "full_attention" for kind in layer_types)


def _short(value: Any) -> str:
    """Return a value of config.json for a message, of bounded length."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def config_of(model: Model, moe: Moe | None, dtype: str) -> dict[str, Any]:
    """Return a LlamaConfig or MixtralConfig in the keys that transformers 4 writes and 5 still reads.

    Args:
        dtype: name of the weights' type, such as "bfloat16".
    """
    scaling = model.rope_scaling
    own: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False}
    if moe is not None:
        own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": None}
        own |= {theirs: getattr(moe, ours) for theirs, ours in _EXPERTS.items()}
        own["router_aux_loss_coef"] = pooled_coefficient(
            moe.router_aux_loss_coef, moe.num_experts_per_tok, model.num_layers
        )
    return {
        **own,
        **{theirs: getattr(model, ours) for theirs, ours in _SIZES.items()},
        "head_dim": model.head_size,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling
        and {"rope_type": "llama3", **{theirs: getattr(scaling, ours) for theirs, ours in _ROPE_SCALING.items()}},
        "torch_dtype": dtype,
        "use_cache": True,
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a Hugging Face folder.

    Raises:
        ConfigError: the file does not exist, cannot be read, or is not a JSON object.
    """
    try:
        content = json_text.read(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file.\n  Give a Hugging Face folder with config.json and safetensors files."
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}).\n  Download it again.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: not a JSON object.\n  Download it again.")
    return content


def few(breaches: list[str]) -> list[str]:
    """Return at most four lines: all messages, or the first three and the number of the others."""
    return breaches if len(breaches) <= 4 else [*breaches[:3], f"... and {len(breaches) - 3} more."]
