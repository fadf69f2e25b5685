import math
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
import torch

from igla_mega.checkpoint.progress import Progress, Retention
from igla_mega.config.errors import ConfigError
from igla_mega.data.indexed import IndexedReader, IndexedWriter
from igla_mega.evaluate.checkpoint import evaluate, perplexity

NUM_DOCUMENTS = 60


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Two sources of random ids; neither length is a multiple of the sequence."""
    folder = tmp_path_factory.mktemp("prepared")
    generator = np.random.default_rng(0)
    for name in ("code", "web"):
        lengths = generator.integers(3, 40, NUM_DOCUMENTS)
        with IndexedWriter(folder / name, np.uint16) as writer:
            writer.add(generator.integers(0, tiny.VOCAB, lengths.sum()), lengths)
    with IndexedWriter(folder / "two", np.uint16) as writer:
        writer.add(np.array([5, 9]), np.array([2]))
    with IndexedWriter(folder / "one", np.uint16) as writer:
        writer.add(np.array([5]), np.array([1]))
    with IndexedWriter(folder / "foreign", np.uint16) as writer:
        writer.add(np.array([5, 9999]), np.array([2]))
    return folder


def saved_checkpoint(folder, data):
    from igla_mega.checkpoint import store
    from igla_mega.config.load import dump

    recipe = tiny.recipe(model={"init_std": 0.2})
    engine, _ = tiny.engine(recipe)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=data)})
    writer = store.CheckpointWriter(folder, engine.mesh, Retention(1), asynchronous=False)
    writer.save(engine.optimizer.states(), Progress(1, 8, 8 * tiny.SEQUENCE), dump(recipe))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, prepared):
    folder = tmp_path_factory.mktemp("run")
    data = {
        "mix": {"web": 0.75, "code": 0.25},
        "sources": {"web": "web.jsonl", "code": "code.jsonl"},
        "prepared": str(prepared),
        "validation_fraction": 0.2,
    }
    ranks.run(1, saved_checkpoint, folder / "checkpoints", data)
    return folder


def measured(folder, prefixes):
    try:
        return evaluate(folder, prefixes)
    except ConfigError as error:
        return str(error)


def dense(folder, streams):
    """Mean loss of every target, window by window, from whole logits."""
    from igla_mega.checkpoint.folder import resolve_checkpoint
    from igla_mega.checkpoint.load_model import load_model

    model, _ = load_model(resolve_checkpoint(folder), dtype=torch.float32)
    results = {}
    for name, stream in streams.items():
        loss_sum, targets = 0.0, 0
        for first in range(0, len(stream) - 1, tiny.SEQUENCE):
            window = torch.from_numpy(stream[first : first + tiny.SEQUENCE + 1].astype(np.int64))
            tokens, labels = window[:-1].unsqueeze(0), window[1:]
            with torch.no_grad():
                logits = model(tokens, torch.arange(tokens.size(1)).unsqueeze(0), None)[0].double()
            loss_sum -= logits.log_softmax(-1)[torch.arange(len(labels)), labels].sum().item()
            targets += len(labels)
        results[name] = (loss_sum / targets, targets)
    return results


def assert_equal_to_dense(folder, prefixes, streams):
    [results] = ranks.run(1, measured, folder, prefixes)
    [expected] = ranks.run(1, dense, folder, streams)
    assert results.keys() == expected.keys()
    for name, (loss, ppl, tokens) in results.items():
        assert tokens == expected[name][1] == len(streams[name]) - 1
        # fp32 logits of about 10: their rounding, averaged.
        assert loss == pytest.approx(expected[name][0], abs=2e-6)
        assert ppl == pytest.approx(math.exp(loss))


def test_every_token_of_a_whole_data_set_is_a_target_once(run_dir, prepared):
    prefixes = {name: str(prepared / name) for name in ("code", "two")}
    readers = {name: IndexedReader(prefix) for name, prefix in prefixes.items()}
    streams = {name: np.array(reader.tokens(0, reader.num_tokens)) for name, reader in readers.items()}
    assert len(streams["code"]) % tiny.SEQUENCE, "the last window must be a short one"
    assert_equal_to_dense(run_dir, prefixes, streams)


def test_without_data_sets_each_source_is_measured_on_what_was_held_out(run_dir, prepared):
    streams = {}
    for name in ("web", "code"):
        reader = IndexedReader(prepared / name)
        streams[name] = np.array(reader.tokens(reader.document_start(48), reader.num_tokens))
    assert_equal_to_dense(run_dir, None, streams)


@pytest.mark.parametrize(
    ("name", "said"),
    [("one", "one: 1 tokens to evaluate on"), ("absent", "no such file"), ("foreign", "id 9999, outside")],
)
def test_a_data_set_that_cannot_be_measured_is_refused_in_words(run_dir, prepared, name, said):
    [message] = ranks.run(1, measured, run_dir, {name: str(prepared / name)})
    assert isinstance(message, str) and said in message


def test_nothing_held_out_is_refused_in_words(tmp_path):
    ranks.run(1, saved_checkpoint, tmp_path / "checkpoints", {"validation_fraction": 0.0})
    [message] = ranks.run(1, measured, tmp_path, None)
    assert "data.validation_fraction: 0" in message and "--data" in message


def test_perplexity_of_a_huge_loss_is_infinite():
    assert perplexity(1000.0) == math.inf


def test_a_checkpoint_without_data_of_its_own_names_the_options_that_give_some(monkeypatch, tmp_path):
    monkeypatch.setattr("igla_mega.evaluate.checkpoint.resolve_checkpoint", lambda path: path)
    monkeypatch.setattr("igla_mega.evaluate.checkpoint.read_recipe", lambda path: tiny.recipe())
    with pytest.raises(ConfigError, match=r"--data: not given.*\n.*--data PREFIX, or tasks with --tasks NAME"):
        evaluate(tmp_path)
