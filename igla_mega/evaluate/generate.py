"""Generate text with a checkpoint: greedily or by sampling, one token at a time with a key-value cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from igla_mega.checkpoint.folder import bos_rule_of, read_recipe, resolve_checkpoint
from igla_mega.checkpoint.load_model import load_model
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.tokenizer import Tokenizer, load_tokenizer
from igla_mega.distributed.mesh import destroy_process_groups
from igla_mega.model.build import CausalLM

_CONTEXT_IDS = 8
"""Number of preceding ids that are decoded together with new ones.

Some decoders insert or drop a space depending on the preceding token, so a new id cannot be decoded alone."""


def generate(
    checkpoint: Path,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: Callable[[str], None],
) -> str:
    """Continue `prompt` with the model of a checkpoint, up to an end of document or `max_new_tokens`.

    Args:
        checkpoint: a checkpoint, a run folder or its `checkpoints`.
        temperature, top_k, top_p, seed: as in `sample`.
        stream: called with each piece of text once it is final; a character is never split.

    Returns:
        The continuation: all streamed pieces, joined.

    Raises:
        ConfigError: a setting is out of range, the prompt is empty or too long, or the checkpoint or its tokenizer does
            not exist.
    """
    _check(prompt, max_new_tokens, temperature, top_k, top_p)
    checkpoint = resolve_checkpoint(checkpoint)
    tokenizer = _tokenizer(checkpoint, read_recipe(checkpoint))
    if not tokenizer.encode(prompt):
        raise ConfigError(
            f"--prompt: the tokenizer {tokenizer.path} encodes {prompt!r} to no tokens.\n  Use another text."
        )
    ids = tokenizer.encode_text(prompt)
    pieces = []
    try:
        model, _ = load_model(checkpoint, dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        drawn = sample(
            model,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            end_id=tokenizer.eod_id,
        )
        for piece in decode_stream(tokenizer, ids, drawn):
            pieces.append(piece)
            stream(piece)
    finally:
        destroy_process_groups()
    return "".join(pieces)


@torch.inference_mode()
def sample(
    model: CausalLM,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    end_id: int | None = None,
) -> Iterator[int]:
    """Yield token ids that continue `ids`, up to `max_new_tokens`, `end_id` or the model's last position.

    Args:
        model: all layers, on one rank.
        temperature: divisor of the logits; 0 selects the most likely token.
        top_k: number of most likely tokens to draw from; 0 draws from all.
        top_p: draws from the smallest set of most likely tokens whose total probability reaches this value (Holtzman
            et al. 2019, arXiv:1904.09751), after `top_k`.
        seed: seed of the draws; None uses a different one at each call.
        end_id: token that ends the text; it is not yielded.

    Raises:
        ConfigError: `ids` is empty or longer than the model's positions.
    """
    longest = model.max_sequence_length
    if not 1 <= len(ids) <= longest:
        raise ConfigError(
            f"--prompt: {len(ids)} tokens; this model reads 1 to {longest} (model.max_position).\n  Shorten the prompt."
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)

    model.eval()
    num_tokens = min(max_new_tokens, longest + 1 - len(ids))
    # The last drawn token is never read back, so the cache needs no entry for it.
    cache = StaticInferenceContext(max_batch_size=1, max_sequence_length=len(ids) + num_tokens - 1)
    unread = torch.tensor([list(ids)], device=device)
    for _ in range(num_tokens):
        token = choose(_next_logits(model, unread, cache), temperature, top_k, top_p, generator)
        if token == end_id:
            return
        yield token
        unread = torch.tensor([[token]], device=device)


def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> int:
    """Choose a token id given the logits [V]; the settings are those of `sample`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = restrict(logits.float() / temperature, top_k, top_p).softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def restrict(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return the logits [V] with those outside `top_k` and `top_p` set to -inf; the most likely one is always kept."""
    # Stable: of equal logits the lower id is kept, on every device.
    descending, order = logits.sort(descending=True, stable=True)
    if top_k:
        descending[top_k:] = -math.inf
    if top_p < 1.0:
        probabilities = descending.softmax(-1)
        # A token is kept if the more likely ones have not yet reached top_p without it.
        descending[probabilities.cumsum(-1) - probabilities >= top_p] = -math.inf
    return torch.empty_like(logits).scatter_(0, order, descending)


def decode_stream(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterator[int]) -> Iterator[str]:
    """Yield the text of ids that follow `prompt`, piece by piece.

    A byte-level token may end within a character, which decodes to U+FFFD. Such an incomplete end is held back until
    the rest of the character arrives or the ids end.
    """
    window = list(prompt[-_CONTEXT_IDS:])
    known = tokenizer.decode(window, skip_special_tokens=True)
    for token in ids:
        window.append(token)
        text = tokenizer.decode(window, skip_special_tokens=True)
        if len(text) > len(known) and not text.endswith("\ufffd"):
            yield text[len(known) :]
            window = window[-_CONTEXT_IDS:]
            known = tokenizer.decode(window, skip_special_tokens=True)
    rest = tokenizer.decode(window, skip_special_tokens=True)[len(known) :]
    if rest:
        yield rest


def _next_logits(model: CausalLM, unread: Tensor, cache: StaticInferenceContext) -> Tensor:
    """Return the logits [V] of the token after `unread` [1, S]; the keys and values of `unread` enter the cache."""
    first, length = cache.sequence_len_offset, unread.size(1)
    positions = torch.arange(first, first + length, device=unread.device).unsqueeze(0)
    logits = model(unread, positions, None, inference_context=cache, runtime_gather_output=True)  # [1, S, V padded]
    cache.sequence_len_offset += length
    cache.enable_decode_mode()
    return logits[0, -1, : model.true_vocab_size]


def _tokenizer(checkpoint: Path, recipe: Recipe) -> Tokenizer:
    """Load the tokenizer stored in the checkpoint, else its recipe's; texts begin as the training data does."""
    assert recipe.model is not None, "a checkpoint has a model"
    beside = checkpoint / "tokenizer"
    path = beside if beside.is_dir() else recipe.data.tokenizer
    if path is None:
        raise ConfigError(
            f"{checkpoint}: names no tokenizer (data.tokenizer in its recipe.yaml) and has no folder `tokenizer`.\n"
            "  Copy the Hugging Face tokenizer folder of the training data there."
        )
    return load_tokenizer(path, recipe.model.vocab_size).with_bos(bos_rule_of(checkpoint, recipe))


def _check(prompt: str, max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raise ConfigError if a setting is out of range, with all breaches at once."""
    breaches = []
    if not prompt:
        breaches.append("--prompt: is empty.\n  Give the model a text to continue.")
    if max_new_tokens < 1:
        breaches.append(f"--max-new-tokens: {max_new_tokens} is below 1.\n  Use 1 or more.")
    if not (temperature >= 0 and math.isfinite(temperature)):
        breaches.append(f"--temperature: {temperature} is not 0 or more.\n  Use 0 for the most likely token, or 0.8.")
    if top_k < 0:
        breaches.append(f"--top-k: {top_k} is below 0.\n  Use 0 for all tokens, or 1 or more.")
    if not 0 < top_p <= 1:
        breaches.append(f"--top-p: {top_p} is not above 0 and at most 1.\n  Use 1 for all tokens, or less.")
    if breaches:
        raise ConfigError(*breaches)
