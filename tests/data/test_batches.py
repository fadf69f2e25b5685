import itertools
import json

import numpy as np
import pytest
import torch

from igla_mega.config.errors import ConfigError
from igla_mega.data.batches import BatchShard, Corpus, Sampling
from igla_mega.data.indexed import IndexedReader
from igla_mega.data.micro_batch import SEQUENCES
from igla_mega.data.windows import split_point

LENGTH = 16


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory, write_dataset):
    """Two sources of 40 documents of 50 tokens; ids name their place in the stream, `code` from 4000 on."""
    root = tmp_path_factory.mktemp("sets")
    return {
        name: str(write_dataset(root / name, [[base + 50 * d + t for t in range(50)] for d in range(40)]))
        for name, base in (("web", 0), ("code", 4000))
    }


def corpus(prefixes, **changes) -> Corpus:
    options = dict(sequence_length=LENGTH, seed=1, vocab_size=6000, validation_fraction=0.1) | changes
    return Corpus(prefixes, options.pop("mix", {"web": 0.7, "code": 0.3}), Sampling(**options))


def test_labels_are_the_next_tokens_of_one_stretch_of_the_stream(prefixes):
    batch = next(corpus(prefixes).micro_batches(0, BatchShard(8, 8)))
    tensors = {name: getattr(batch, name) for name in SEQUENCES}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == dict(
        tokens=((8, LENGTH), torch.int64),
        labels=((8, LENGTH), torch.int64),
        loss_mask=((8, LENGTH), torch.float32),
        position_ids=((8, LENGTH), torch.int64),
    )
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert torch.equal(batch.labels, batch.tokens + 1)
    assert torch.equal(batch.tokens[:, 1:], batch.tokens[:, :-1] + 1)
    assert batch.loss_mask.eq(1).all()
    assert torch.equal(batch.position_ids, torch.arange(LENGTH).expand(8, LENGTH))


@pytest.mark.parametrize(("data_parallel", "micro_batch_size"), [(1, 1), (1, 24), (2, 3), (3, 2), (4, 6), (8, 1)])
def test_data_parallel_ranks_share_out_the_same_global_batch(prefixes, data_parallel, micro_batch_size):
    data = corpus(prefixes)
    for step in (0, 5):
        whole = next(data.micro_batches(step, BatchShard(24, 24))).tokens
        rows = torch.full_like(whole, -1)
        for rank in range(data_parallel):
            share = BatchShard(24, micro_batch_size, data_parallel, rank)
            batches = list(data.micro_batches(step, share))
            assert len(batches) == share.num_microbatches
            for m, batch in enumerate(batches):
                rows[share.rows(m)] = batch.tokens
        assert torch.equal(rows, whole)


def test_a_step_is_the_same_in_a_corpus_opened_anew(prefixes):
    first, again = corpus(prefixes), corpus(prefixes)
    list(first.micro_batches(3, BatchShard(8, 4)))
    for a, b in zip(first.micro_batches(9, BatchShard(8, 4)), again.micro_batches(9, BatchShard(8, 4)), strict=True):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for name in SEQUENCES)


def test_training_never_sees_a_validation_document(prefixes):
    data = corpus(prefixes)
    seen = {
        int(t) for step in range(40) for b in data.micro_batches(step, BatchShard(8, 8)) for t in b.labels.flatten()
    }
    held_out = set(range(1800, 2000)) | set(range(5800, 6000))
    assert not seen & held_out
    validation = [b for name in data.validation_names() for b in data.validation_batches(name, BatchShard(4, 4), 100)]
    assert {int(t) for batch in validation for t in batch.labels[batch.loss_mask > 0]} <= held_out


def test_the_split_is_by_document(prefixes):
    reader = IndexedReader(prefixes["web"])
    assert split_point("web", reader, 0.1) == 36 * 50
    assert split_point("web", reader, 1e-6) == 39 * 50
    assert split_point("web", reader, 0.0) == 2000


def test_the_ledger_tells_which_samples_a_step_consumed(prefixes):
    data = corpus(prefixes)
    per_epoch = data.windows_per_epoch()["web"]
    ends = {"web": 0, "code": 0}
    for step in range(60):
        entry = json.loads(json.dumps(data.ledger_entry(step, 8)))
        for name, drawn in entry.items():
            assert drawn["samples"][0] == ends[name]
            ends[name] = drawn["samples"][1]
        assert entry["web"]["epochs"] == [entry["web"]["samples"][0] // per_epoch, (ends["web"] - 1) // per_epoch]
    assert ends == {"web": 336, "code": 144}
    assert ends["web"] > per_epoch


def test_an_epoch_of_a_source_reads_each_of_its_windows_once(prefixes):
    data = corpus(prefixes, mix={"web": 1.0})
    per_epoch = data.windows_per_epoch()["web"]
    firsts = data.rows(np.arange(per_epoch))[:, 0]
    assert len(set(firsts.tolist())) == per_epoch == 112


@pytest.mark.parametrize(("data_parallel", "micro_batch_size"), [(1, 6), (1, 2), (2, 3), (3, 1)])
def test_validation_covers_each_window_once_for_every_layout(prefixes, data_parallel, micro_batch_size):
    data = corpus(prefixes)
    assert data.num_validation_samples("code") == 12
    counts, lengths = [], set()
    for rank in range(data_parallel):
        batches = list(data.validation_batches("code", BatchShard(6, micro_batch_size, data_parallel, rank), 100))
        lengths.add(len(batches))
        counts += [int(t) for batch in batches for t in batch.tokens[batch.loss_mask > 0]]
    assert sorted(counts) == list(range(5800, 5800 + 12 * LENGTH))
    assert len(lengths) == 1


def test_validation_is_limited_to_so_many_global_batches(prefixes):
    assert len(list(corpus(prefixes).validation_batches("web", BatchShard(4, 2), 2))) == 4


def test_rows_beyond_the_validation_split_count_nothing(prefixes):
    data = corpus(prefixes)
    *_, last = data.validation_batches("web", BatchShard(8, 8), 100)
    assert last.loss_mask.sum(dim=1).tolist() == [LENGTH] * 4 + [0] * 4


def test_a_validation_split_shorter_than_a_window_is_one_masked_row(prefixes):
    data = corpus(prefixes, sequence_length=100, validation_fraction=0.01)
    (batch,) = data.validation_batches("web", BatchShard(1, 1), 10)
    assert batch.loss_mask.sum() == 49
    assert batch.labels[0, :49].tolist() == list(range(1951, 2000))


@pytest.mark.parametrize("batch", [1, 2, 4, 16])
def test_each_held_out_target_counts_once_whatever_the_batch(prefixes, batch):
    data = corpus(prefixes, document_mask=False)
    steps = -(-data.num_validation_samples("web") // batch)
    found = [b.labels[b.loss_mask > 0] for b in data.validation_batches("web", BatchShard(batch, 1), steps)]
    assert torch.cat(found).tolist() == list(range(1801, 1801 + 12 * LENGTH))


def test_a_source_of_weight_zero_is_not_opened(prefixes, tmp_path, write_dataset):
    # Nothing of one document can be held out; a file that is not there cannot be opened.
    one = str(write_dataset(tmp_path / "one", [[1] * 50]))
    data = corpus({**prefixes, "one": one, "none": "none"}, mix={"web": 1.0, "one": 0, "none": 0.0})
    assert set(data.readers) == {"web", "code"} == set(data.validation_names())
    with pytest.raises(ConfigError, match="holds out 1 of the 1 documents of one"):
        corpus({**prefixes, "one": one}, mix={"web": 1.0, "one": 0.1})


def test_without_a_validation_share_no_source_is_evaluated(prefixes):
    assert corpus(prefixes, validation_fraction=0.0).validation_names() == []


def test_the_fingerprint_tells_other_data_and_another_order(prefixes, tmp_path, write_dataset):
    fingerprint = corpus(prefixes).fingerprint()
    assert corpus(prefixes).fingerprint() == fingerprint
    assert corpus(prefixes, seed=2).fingerprint() != fingerprint
    assert corpus(prefixes, mix={"web": 0.6, "code": 0.4}).fingerprint() != fingerprint
    other = {**prefixes, "web": str(write_dataset(tmp_path / "web", [[1] * 50] * 40))}
    assert corpus(other).fingerprint() != fingerprint


def test_an_id_outside_the_vocabulary_stops_the_step_that_reads_it(tmp_path, write_dataset):
    """Deep inside a large set, where the sample taken at opening does not look."""
    length = 1 << 19
    documents = [list(range(10)) * (length // 10) for _ in range(2)]
    documents[0][(1 << 18) + 3000] = 77
    prefix = str(write_dataset(tmp_path / "set", documents))
    data = Corpus({"web": prefix}, {"web": 1}, Sampling(1024, seed=0, vocab_size=50, validation_fraction=0.5))
    with pytest.raises(ConfigError, match=r"token 265144 \(document 0\) has id 77, outside model\.vocab_size 50"):
        for step in range(data.windows_per_epoch()["web"]):
            list(data.micro_batches(step, BatchShard(1, 1)))


def test_all_breaches_are_told_together(prefixes, tmp_path):
    paths = {"web": prefixes["web"], "books": str(tmp_path / "books")}
    with pytest.raises(ConfigError) as raised:
        corpus(paths, mix={"web": 0.5, "code": 0.2, "books": 0.3}, sequence_length=4000)
    assert len(raised.value.breaches) == 3
    message = str(raised.value)
    assert "data.sources.code: no path" in message
    assert f"{tmp_path}/books.bin: no such file" in message
    assert "data.sources.web: 1800 training tokens are fewer than one window of 4000 + 1" in message


def test_a_source_of_weight_zero_needs_no_path(prefixes):
    sources = corpus(prefixes, mix={"web": 1.0, "books": 0.0}).ledger_entry(0, 64)
    assert list(sources) == ["web"]


def test_holding_out_every_document_is_refused(prefixes):
    with pytest.raises(ConfigError, match="holds out 40 of the 40 documents of web"):
        corpus(prefixes, validation_fraction=0.999)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"10 is not divisible by micro_batch_size 2 times 3 .*\n.*multiple of 6"):
        BatchShard(10, 2, 3, 0)


def test_with_a_document_mask_positions_start_anew_and_no_document_predicts_the_next(prefixes):
    data = corpus(prefixes, document_mask=True, sequence_length=64)
    plain = corpus(prefixes, sequence_length=64)
    batch, unmasked = (next(c.micro_batches(3, BatchShard(8, 8))) for c in (data, plain))
    assert torch.equal(batch.tokens, unmasked.tokens) and torch.equal(batch.labels, unmasked.labels)
    assert {len(row) for row in batch.documents} <= {2, 3, 4}  # documents of 50 tokens
    for row, offsets in enumerate(batch.documents):
        assert offsets[0] == 0 and offsets[-1] == 64
        number = (batch.tokens[row] % 4000) // 50
        next_number = (batch.labels[row] % 4000) // 50
        starts = [0, *(i for i in range(1, 64) if number[i] != number[i - 1])]
        assert offsets[:-1] == starts
        assert torch.equal(batch.loss_mask[row], (number == next_number).float())
        expected = torch.cat([torch.arange(b - a) for a, b in itertools.pairwise(offsets)])
        assert torch.equal(batch.position_ids[row], expected)


def test_a_document_mask_leaves_what_fills_up_a_validation_row_outside_every_document(prefixes):
    data = corpus(prefixes, document_mask=True, sequence_length=512)
    for batch in data.validation_batches("web", BatchShard(2, 2), 1):
        assert batch.documents[0][-1] == 199 and batch.documents[1] == [0, 512]
        assert batch.loss_mask[0, 199:].sum() == 0 and batch.loss_mask[1].sum() == 0
