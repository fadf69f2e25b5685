"""Six small tokenizers with chat templates, each of another kind; the cases in `cases/` name them."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCE = "the cat sat on a mat and dog ran to see big red sun over hill while small blue bird sang"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
_HEADER = "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
CHATML = "{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+m['content']+'<|im_end|>\n'}}{% endfor %}" + _HEADER
TOOLS = (
    "{% if tools %}{{'<|im_start|>system\nTools: '+(tools|tojson)+'<|im_end|>\n'}}{% endif %}"
    "{% for m in messages %}{{'<|im_start|>'+m['role']+'\n'+m['content']}}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{'<tool_call>'+(c.function|tojson)+'</tool_call>'}}{% endfor %}"
    "{% endif %}{{'<|im_end|>\n'}}{% endfor %}" + _HEADER
)
WITHOUT_THOUGHTS = (
    "{% for m in messages %}{% if m.role=='assistant' %}{% set c=m.content %}"
    "{% if '</think>' in c %}{% set c=c.split('</think>')[-1] %}{% endif %}"
    "{{'<|im_start|>assistant\n'+c+'<|im_end|>'}}"
    "{% else %}{{'<|im_start|>'+m.role+'\n'+m.content+'<|im_end|>'}}{% endif %}{% endfor %}" + _HEADER
)
LLAMA2 = (
    "{{bos_token}}{% for m in messages %}{% if m.role=='user' %}{{'[INST] '+m.content.strip()+' [/INST]'}}"
    "{% elif m.role=='assistant' %}{{' '+m.content.strip()+' '+eos_token}}{% endif %}{% endfor %}"
)
NO_SYSTEM = "{% if messages[0].role=='system' %}{{raise_exception('System role not supported')}}{% endif %}" + CHATML
KINDS = {
    "tok": (None, "<|endoftext|>"),
    "tokml": (CHATML, "<|im_end|>"),
    "toktools": (TOOLS, "<|im_end|>"),
    "tokr1": (WITHOUT_THOUGHTS, "<|im_end|>"),
    "tokl2": (LLAMA2, "</s>"),
    "toknosys": (NO_SYSTEM, "<|im_end|>"),
}
"""Name -> chat template and end token."""


def make(folder: Path) -> None:
    """Write a folder of each kind, all of the same byte-level BPE, in which each word of `SENTENCE` is a token."""
    draw, words = random.Random(0), SENTENCE.split()
    texts = [" ".join(draw.choices(words, k=draw.randint(20, 60))) + "." for _ in range(400)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    for name, (template, end) in KINDS.items():
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end}
        settings |= {"bos_token": "<s>"} if template == LLAMA2 else {}
        settings |= {"chat_template": template} if template else {}
        (folder / name).mkdir()
        tokenizer.save(str(folder / name / "tokenizer.json"))
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
