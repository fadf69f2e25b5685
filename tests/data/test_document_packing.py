import itertools

import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.batches import BatchShard, Corpus, Sampling
from igla_mega.data.document_packing import best_fit, cut, statistics


def lengths(seed: int, n: int = 3000) -> np.ndarray:
    return np.random.default_rng(seed).geometric(0.02, n).astype(np.int64)


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_never_over_full_and_few(seed):
    _, pieces = cut(lengths(seed), 128)
    rows = best_fit(pieces, 128)
    filled = np.bincount(rows, pieces)
    assert filled.max() <= 128
    assert filled.min() > 0
    # Johnson et al. 1974: 11/9 of the fewest and a constant; the fewest are no fewer than the tokens need.
    assert len(filled) <= 11 / 9 * np.ceil(pieces.sum() / 128) + 4


def test_each_piece_goes_into_the_fullest_row_that_has_room():
    pieces = np.array([7, 6, 5, 4, 3, 3, 2, 1])
    free, expected = [], np.empty(len(pieces), int)
    for i in np.argsort(-pieces, kind="stable"):
        fitting = [(room, -row) for row, room in enumerate(free) if room >= pieces[i]]
        row = -min(fitting)[1] if fitting else len(free)
        if not fitting:
            free.append(10)
        free[row] -= pieces[i]
        expected[i] = row
    assert best_fit(pieces, 10).tolist() == expected.tolist()


def test_pieces_are_the_documents_without_gap_or_overlap():
    documents = lengths(1)
    starts, pieces = cut(documents, 50)
    assert np.array_equal(starts, np.cumsum(pieces) - pieces)
    assert pieces.sum() == documents.sum()
    assert pieces.max() == 50


def test_statistics_tell_padding_cuts_and_long_documents():
    documents = np.array([4, 6, 25, 5])
    split = statistics(documents, 10, packed=False)
    # Rows begin at 0, 10, 20, 30: the third document lies in rows 1 to 3, the last one in row 3.
    assert (split.rows, split.padding, split.cut_documents, split.truncated) == (3, 0.0, 1, 15)
    packed = statistics(documents, 10, packed=True)
    # Full rows of the third document, its rest of 5 with the last, and 6 with 4.
    assert (packed.rows, packed.padding, packed.cut_documents, packed.truncated) == (4, 0.0, 1, 15)
    assert packed.long_share == 25 / 40


@pytest.fixture(scope="module")
def prefix(tmp_path_factory, write_dataset):
    sizes = np.random.default_rng(2).integers(1, 80, 120)
    # Ids tell document and place.
    documents = [[1000 + d * 100 + i for i in range(n)] for d, n in enumerate(sizes)]
    return write_dataset(tmp_path_factory.mktemp("packed") / "a", documents, np.int32), documents


def packed_corpus(prefix, **options) -> Corpus:
    settings = dict(sequence_length=32, seed=3, vocab_size=20_000, validation_fraction=0.0, document_mask=True)
    return Corpus({"a": prefix}, {"a": 1.0}, Sampling(packing="best_fit", **(settings | options)))


def test_an_epoch_holds_every_token_once_and_every_target_once(prefix):
    prefix, documents = prefix
    corpus = packed_corpus(prefix)
    share = BatchShard(1, 1)
    inputs, targets = [], []
    for step in range(corpus.windows_per_epoch()["a"]):
        (batch,) = corpus.micro_batches(step, share)
        tokens, labels, mask = (getattr(batch, key)[0].numpy() for key in ("tokens", "labels", "loss_mask"))
        (borders,) = batch.documents
        assert borders[0] == 0 and borders[-1] == 32 and sorted(set(borders)) == borders
        for first, stop in itertools.pairwise(borders):
            row = tokens[first:stop]
            assert batch.position_ids[0, first:stop].tolist() == list(range(stop - first))
            if row.any():
                assert len({(t - 1000) // 100 for t in row.tolist()}) == 1
                inputs += row.tolist()
        assert np.array_equal(labels[mask == 1], tokens[mask == 1] + 1)
        targets += labels[mask == 1].tolist()
    assert sorted(inputs) == sorted(t for document in documents for t in document)
    # All but each document's first token, and those that begin a rest.
    rests = sum((len(document) - 1) // 32 for document in documents)
    expected = sum(len(document) - 1 for document in documents)
    assert expected - rests <= len(targets) <= expected
    assert len(set(targets)) == len(targets)


def test_a_last_document_that_fills_its_row_has_no_label_behind_it(tmp_path, write_dataset):
    corpus = packed_corpus(write_dataset(tmp_path / "a", [[1], list(range(2, 34))]))
    batches = [batch for step in range(2) for batch in corpus.micro_batches(step, BatchShard(1, 1))]
    full = next(batch for batch in batches if batch.tokens.min() >= 2)
    assert full.loss_mask[0].tolist() == [1.0] * 31 + [0.0]
    assert full.labels[0].tolist() == [*range(3, 34), 0]


def test_the_plan_is_made_once_and_the_order_changes_with_the_epoch(prefix):
    prefix, _ = prefix
    corpus, again = packed_corpus(prefix), packed_corpus(prefix)
    per_epoch = corpus.windows_per_epoch()["a"]
    one, other = ([c._train["a"].segments(i) for i in range(2 * per_epoch)] for c in (corpus, again))
    assert one == other
    assert sorted(one[:per_epoch]) == sorted(one[per_epoch:])
    assert one[:per_epoch] != one[per_epoch:]
    assert len(list(prefix.parent.glob("*.npy"))) == 1


def test_best_fit_without_a_document_mask_is_refused(prefix):
    with pytest.raises(ConfigError, match=r"Set data\.document_mask=true"):
        packed_corpus(prefix[0], document_mask=False)
