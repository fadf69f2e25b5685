import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.batches import BatchShard, Corpus, Sampling
from igla_mega.data.loader import open_loader
from igla_mega.data.prefetch import Prefetch


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, write_dataset):
    generator = np.random.default_rng(5)
    documents = [generator.integers(0, 300, n).tolist() for n in generator.integers(5, 90, 200)]
    return write_dataset(tmp_path_factory.mktemp("set") / "a", documents)


def corpus(prefix, **options) -> Corpus:
    settings = dict(sequence_length=32, seed=3, vocab_size=320, validation_fraction=0.1, document_mask=True)
    loading = {key: options.pop(key) for key in ("loader", "prefetch") if key in options}
    return Corpus({"a": prefix}, {"a": 1.0}, Sampling(**(settings | options)), **loading)


def plain(batches) -> list:
    return [
        {name: value.tolist() if hasattr(value, "tolist") else value for name, value in batch._asdict().items()}
        for batch in batches
    ]


@dataclass(frozen=True)
class Made:
    steps: list

    def __call__(self, step, share):
        for m in range(3):
            self.steps.append((step, m))
            yield {"n": step * 10 + m}


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_batches_are_the_same_whatever_is_put_together_ahead(prefix, depth):
    share = BatchShard(8, 2)
    expected = [plain(corpus(prefix, prefetch=0).micro_batches(step, share)) for step in range(6)]
    loaded = corpus(prefix, prefetch=depth)
    assert [plain(loaded.micro_batches(step, share)) for step in range(6)] == expected
    # Resumed elsewhere, and on two ranks in the place of one.
    assert plain(loaded.micro_batches(3, share)) == expected[3]
    halves = [plain(corpus(prefix, prefetch=depth).micro_batches(4, BatchShard(8, 2, 2, rank))) for rank in (0, 1)]
    assert [batch for pair in zip(*halves, strict=True) for batch in pair] == expected[4]


def test_the_next_step_s_batches_are_put_together_during_this_one():
    made = Made([])
    loader = Prefetch(made, 4)
    batches = loader.step(7, "share")
    assert [next(batches)["n"] for _ in range(2)] == [70, 71]
    deadline = time.monotonic() + 5
    while (8, 0) not in made.steps and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (8, 0) in made.steps
    assert len(made.steps) <= 8
    assert [batch["n"] for batch in batches] == [72]
    loader.close()


def test_a_step_that_was_left_early_or_skipped_is_made_anew():
    loader = Prefetch(Made([]), 2)
    assert next(loader.step(0, "share"))["n"] == 0
    assert [batch["n"] for batch in loader.step(0, "share")] == [0, 1, 2]
    assert [batch["n"] for batch in loader.step(5, "share")] == [50, 51, 52]
    assert [batch["n"] for batch in loader.step(6, "other")] == [60, 61, 62]
    loader.close()


def test_who_draws_just_the_batches_of_a_step_keeps_what_is_put_together_ahead():
    made = Made([])
    loader = Prefetch(made, 2)
    for step in range(5):
        batches = loader.step(step, "share")
        assert [next(batches)["n"] for _ in range(3)] == [step * 10 + m for m in range(3)]
    assert len(made.steps) == len(set(made.steps)), "a batch was made twice"
    loader.close()


def test_an_error_is_raised_at_its_batch_and_the_thread_ends():
    def make(step, share):
        yield {"n": 0}
        raise ConfigError("token 5 is outside")

    loader = Prefetch(make, 3)
    batches = loader.step(0, "share")
    assert next(batches)["n"] == 0
    with pytest.raises(ConfigError, match="token 5"):
        next(batches)
    loader.close()
    deadline = time.monotonic() + 3
    while any(t.name == "read ahead" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.05)


def test_a_loader_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="neither `native` nor `dali`"):
        open_loader("dolly", Made([]), 1)
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        with pytest.raises(ConfigError, match="dali is not installed"):
            open_loader("dali", Made([]), 1)


@pytest.mark.parametrize("depth", [1, 3])
def test_dali_s_batches_are_ours_batch_for_batch_also_after_a_resume(prefix, depth):
    pytest.importorskip("nvidia.dali")
    share = BatchShard(8, 2)
    expected = [plain(corpus(prefix, prefetch=0).micro_batches(step, share)) for step in range(5)]
    loaded = corpus(prefix, loader="dali", prefetch=depth)
    assert [plain(loaded.micro_batches(step, share)) for step in range(5)] == expected
    assert plain(corpus(prefix, loader="dali", prefetch=depth).micro_batches(3, share)) == expected[3]
    assert plain(loaded.micro_batches(1, share)) == expected[1]
