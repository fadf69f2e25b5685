"""Masks of conversations, token by token, against transformers and by hand."""

import itertools
import json

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import load_tokenizer, train_bpe
from igla_mega.data.tuning import chat, forms

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA3, "zephyr": ZEPHYR}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

SYSTEM, USER, ASSISTANT = ({"role": role} for role in forms.ROLES[:3])
CONVERSATIONS = {
    "one turn": [{**USER, "content": "What is 2 + 2?"}, {**ASSISTANT, "content": "4, as ever."}],
    "system": [
        {**SYSTEM, "content": "Be brief."},
        {**USER, "content": "Hello there"},
        {**ASSISTANT, "content": "Hello."},
    ],
    "several turns": [
        {**USER, "content": "Say yes"},
        {**ASSISTANT, "content": "yes"},
        {**USER, "content": "Say yes"},
        {**ASSISTANT, "content": "Say yes\nno\n\n  indented"},
        {**USER, "content": "Thanks"},
        {**ASSISTANT, "content": "Naïve 😀 — done"},
    ],
    "ends with the user": [
        {**USER, "content": "One"},
        {**ASSISTANT, "content": "Two"},
        {**USER, "content": "Three"},
    ],
    "answer like a header": [
        {**USER, "content": "assistant\nuser"},
        {**ASSISTANT, "content": "user\nassistant"},
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A real byte-level BPE with special tokens for turns."""
    path = tmp_path_factory.mktemp("tokenizer")
    (path / "text.jsonl").write_text(
        "".join(json.dumps({"text": m["content"]}) + "\n" for c in CONVERSATIONS.values() for m in c) * 3
    )
    train_bpe([path / "text.jsonl"], 320, path)
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(path)
    return path


def with_template(folder, name, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES[name])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    return tmp_path


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_tokens_and_mask_are_those_of_transformers(folder, tmp_path, name, conversation):
    import transformers

    path, messages = with_template(folder, name, tmp_path), CONVERSATIONS[conversation]
    expected = transformers.AutoTokenizer.from_pretrained(path).apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    sample = chat.tokenize(messages, load_tokenizer(path), chat.load_template(path), "here")
    assert sample.tokens.tolist() == expected["input_ids"]
    assert sample.targets.astype(int).tolist() == expected["assistant_masks"]


def pieces(sample, tokenizer) -> list[tuple[bool, str]]:
    """The text, cut where the mask changes."""
    cuts = [0, *(np.flatnonzero(np.diff(sample.targets)) + 1), len(sample.tokens)]
    runs = [(sample.targets[a], sample.tokens[a:b]) for a, b in itertools.pairwise(cuts)]
    return [(bool(target), tokenizer.decode(tokens)) for target, tokens in runs]


def test_the_mask_by_hand(folder, tmp_path):
    path = with_template(folder, "chatml", tmp_path)
    tokenizer = load_tokenizer(path)
    sample = chat.tokenize(CONVERSATIONS["several turns"], tokenizer, chat.load_template(path), "here")
    assert pieces(sample, tokenizer) == [
        (False, "<|im_start|>user\nSay yes<|im_end|>\n<|im_start|>assistant\n"),
        (True, "yes<|im_end|>"),
        (False, "\n<|im_start|>user\nSay yes<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Say yes\nno\n\n  indented<|im_end|>"),
        (False, "\n<|im_start|>user\nThanks<|im_end|>\n<|im_start|>assistant\n"),
        (True, "Naïve 😀 — done<|im_end|>"),
        (False, "\n"),
    ]


def test_the_plain_template_ends_an_answer_with_the_end_of_document(folder):
    tokenizer = load_tokenizer(folder)
    sample = chat.tokenize(CONVERSATIONS["system"], tokenizer, chat.load_template(folder, "plain"), "here")
    assert pieces(sample, tokenizer) == [
        (False, "### system\nBe brief.\n### user\nHello there\n### assistant\n"),
        (True, "Hello.<|endoftext|>"),
        (False, "\n"),
    ]


def test_plain_prompts_and_alpaca(folder):
    tokenizer, plain = load_tokenizer(folder), chat.load_template(folder, "plain")
    pair = forms.conversation_of({"prompt": "2 + 2 =", "completion": " 4"}, "f:1")
    assert pieces(chat.tokenize(pair, tokenizer, None, "f:1"), tokenizer) == [
        (False, "2 + 2 ="),
        (True, " 4<|endoftext|>"),
    ]
    alpaca = {"instruction": "Add.", "input": "2, 2", "output": "4"}
    turns = forms.conversation_of(alpaca, "f:1")
    assert pieces(chat.tokenize(turns, tokenizer, plain, "f:1"), tokenizer) == [
        (False, "### user\nAdd.\n2, 2\n### assistant\n"),
        (True, "4<|endoftext|>"),
        (False, "\n"),
    ]


@pytest.mark.parametrize("completion", [" 4", " 4<|endoftext|>", " 4<|endoftext|>\n"])
def test_a_plain_answer_has_one_end_token(folder, completion):
    tokenizer = load_tokenizer(folder)
    sample = chat.tokenize(("2 + 2 =", completion), tokenizer, None, "f:1")
    assert pieces(sample, tokenizer) == [(False, "2 + 2 ="), (True, " 4<|endoftext|>")]


@pytest.mark.parametrize("name", TEMPLATES)
def test_of_a_prompt_nothing_is_a_target_as_with_trl(folder, tmp_path, name):
    import transformers
    from trl.data_utils import common_prefix_length

    path = with_template(folder, name, tmp_path)
    prompt, completion = CONVERSATIONS["several turns"][:-1], CONVERSATIONS["several turns"][-1:]
    reference = transformers.AutoTokenizer.from_pretrained(path)
    context = reference.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    whole = reference.apply_chat_template([*prompt, *completion], return_dict=True)["input_ids"]
    begin = common_prefix_length(context, whole)
    tokenizer = load_tokenizer(path)
    line = forms.conversation_of({"prompt": prompt, "completion": completion}, "f:1")
    sample = chat.tokenize(line, tokenizer, chat.load_template(path), "f:1")
    assert sample.tokens.tolist() == whole and not sample.targets[:begin].any()
    # TRL also trains on the newline that some templates write after a turn, and on the end of the header where its
    # tokens are others than those of the prompt alone.
    assert not reference.decode(np.array(whole[begin:])[~sample.targets[begin:]]).strip()


BROKEN = {
    "no turn by the assistant": [{**USER, "content": "a"}],
    "two turns in a row by the user": [
        {**USER, "content": "a"},
        {**USER, "content": "b"},
        {**ASSISTANT, "content": "c"},
    ],
    "turn 2: role 'bot'": [{**USER, "content": "a"}, {"role": "bot", "content": "b"}],
    "system text after the first turn": [{**USER, "content": "a"}, {**SYSTEM, "content": "b"}],
    "turn 1: not a": [{"role": "user"}],
    "not a list of turns": [],
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_conversation_names_line_and_turn(words):
    with pytest.raises(ConfigError, match=f"c.jsonl:3.*{words}"):
        forms.conversation_of({"messages": BROKEN[words]}, "c.jsonl:3")


@pytest.mark.parametrize(
    ("line", "words"),
    [({"text": "a"}, "its keys are text"), ({"prompt": 1, "completion": 2}, "not both texts or both lists")],
)
def test_a_line_that_is_no_conversation_is_refused(line, words):
    with pytest.raises(ConfigError, match=f"c.jsonl:1: .*{words}"):
        forms.conversation_of(line, "c.jsonl:1")


def test_a_tokenizer_without_a_template_says_how_to_give_one(folder):
    with pytest.raises(ConfigError, match=r"no chat template(.|\n)*chat_template.jinja(.|\n)*data.chat_template"):
        chat.load_template(folder)


def test_templates_are_found_where_folders_keep_them(folder, tmp_path):
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for content in (CHATML, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": content}))
        assert chat.load_template(tmp_path).source == CHATML
    (tmp_path / "chat_template.jinja").write_text(ZEPHYR)
    assert chat.load_template(tmp_path).source == ZEPHYR, "a file of its own wins"
    assert chat.load_template(tmp_path / "tokenizer.json", tmp_path / "chat_template.jinja").source == ZEPHYR
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match="not a chat template"):
        chat.load_template(tmp_path)


def test_a_template_that_takes_text_back_is_refused(folder, tmp_path):
    # As some do with reasoning: of earlier answers only the last line stays.
    shortening = (
        "{% for m in messages %}{{ m['role'] + ': ' }}"
        "{{ m['content'] if loop.last else m['content'].split('\n')[-1] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(shortening)
    template = chat.load_template(folder, tmp_path / "chat_template.jinja")
    with pytest.raises(ConfigError, match="f:9: turn 4: the chat template renders earlier turns differently"):
        chat.tokenize(CONVERSATIONS["several turns"], load_tokenizer(folder), template, "f:9")


def test_what_a_template_refuses_is_said_with_its_place(folder, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('only one turn') }}")
    template = chat.load_template(folder, tmp_path / "t.jinja")
    with pytest.raises(ConfigError, match="f:2: the chat template fails: only one turn"):
        chat.tokenize(CONVERSATIONS["one turn"], load_tokenizer(folder), template, "f:2")
