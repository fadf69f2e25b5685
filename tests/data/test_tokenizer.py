import json
import shutil

import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.tokenizer import END_OF_DOCUMENT, load_tokenizer, train_bpe


def test_any_text_comes_back(tokenizer, texts):
    for text in [*texts[:20], "\x00\x01 tabs\t\r\n  ", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_is_encoded_as_one_by_one(tokenizer, texts):
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_no_token_is_added_and_the_end_of_document_is_known(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([tokenizer.eod_id]) == END_OF_DOCUMENT
    assert tokenizer.decode([tokenizer.eod_id], skip_special_tokens=True) == ""
    assert tokenizer.vocab_size == 320


def test_the_same_text_gives_the_same_tokenizer(tokenizer, jsonl, tmp_path):
    again = train_bpe([jsonl], 320, tmp_path)
    assert again.digest() == tokenizer.digest()


def test_a_folder_and_its_tokenizer_json_are_the_same(tokenizer):
    alone = load_tokenizer(f"{tokenizer.path}/tokenizer.json")
    assert (alone.digest(), alone.eod_id) == (tokenizer.digest(), tokenizer.eod_id)


def test_transformers_opens_the_folder_and_gives_the_same_ids(tokenizer, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path)
    assert theirs.eos_token_id == tokenizer.eod_id
    assert [theirs.encode(text) for text in texts[:50]] == tokenizer.encode_batch(texts[:50])


def test_the_limits_of_a_folder_do_not_cut_or_pad_a_corpus(tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer.path, tmp_path / "limited")
    tokenizer.engine.save(str(folder / "tokenizer.json"))
    saved = json.loads((folder / "tokenizer.json").read_text())
    saved["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": END_OF_DOCUMENT,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(saved))
    text = "The ring passes keys and values."
    assert load_tokenizer(folder).encode_batch([text, "a"]) == tokenizer.encode_batch([text, "a"])


def test_an_eos_token_written_as_an_object_is_read(tokenizer, tmp_path):
    folder = shutil.copytree(tokenizer.path, tmp_path / "other")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "A"}}))
    assert load_tokenizer(folder).decode([load_tokenizer(folder).eod_id]) == "A"


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*nowhere: no such file or folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_smaller_than_the_tokenizer_s_ids_is_refused(tokenizer):
    assert load_tokenizer(tokenizer.path, vocab_size=320).vocab_size == 320
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 300 is smaller than the 320 ids"):
        load_tokenizer(tokenizer.path, vocab_size=300)


def test_a_vocabulary_below_the_bytes_is_refused(jsonl, tmp_path):
    with pytest.raises(ConfigError, match="vocab_size: 256 is below 257"):
        train_bpe([jsonl], 256, tmp_path)


def test_a_broken_line_among_the_training_text_is_named(jsonl, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(jsonl.read_text() + '{"text": \n')
    with pytest.raises(ConfigError, match=r"broken\.jsonl:301: not a JSON object"):
        train_bpe([broken], 320, tmp_path)
