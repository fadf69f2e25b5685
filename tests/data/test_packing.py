import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.document_packing import best_fit
from igla_mega.data.packing import Packing, fill_row
from igla_mega.data.tuning.chat import Sample


def lengths(n=1000, longest=512, seed=0):
    return np.random.default_rng(seed).lognormal(4.0, 1.0, n).astype(np.int64).clip(2, longest)


def test_an_epoch_holds_every_sample_once_and_no_row_overflows():
    sizes = lengths()
    packing = Packing(sizes, 512, seed=3)
    for epoch in range(3):
        rows = [packing.samples(epoch * packing.num_rows + row) for row in range(packing.num_rows)]
        assert sorted(sample for row in rows for sample in row) == list(range(len(sizes)))
        assert all(sizes[row].sum() <= 512 for row in rows)


def test_rows_are_nearly_as_few_as_can_be():
    sizes = lengths()
    packing = Packing(sizes, 512, seed=3)
    fewest = -(-sizes.sum() // 512)
    print(f"{packing.num_rows} rows, at least {fewest} are needed")
    assert packing.num_rows <= 1.02 * fewest + 1


def test_best_fit_takes_the_fullest_row_with_room():
    # 6 and 5 open rows; 4 fits both and goes to the fuller, which it fills; 3 and 2 fill the other.
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10).tolist() == [0, 1, 0, 1, 1]


def test_rows_are_a_function_of_seed_and_number():
    sizes = lengths()
    one, again, other = Packing(sizes, 512, 3), Packing(sizes, 512, 3), Packing(sizes, 512, 4)
    numbers = range(5, 2 * one.num_rows)
    assert [one.samples(n) for n in numbers] == [again.samples(n) for n in reversed(numbers)][::-1]
    assert [one.samples(n) for n in numbers] != [other.samples(n) for n in numbers]
    first, second = ([one.samples(e * one.num_rows + r) for r in range(one.num_rows)] for e in (0, 1))
    assert first != second, "each epoch has an order of its own"


def test_without_packing_each_sample_has_a_row():
    packing = Packing(lengths(), 512, 3, pack=False)
    assert sorted(packing.samples(row)[0] for row in range(packing.num_rows)) == list(range(1000))
    assert all(len(packing.samples(row)) == 1 for row in range(packing.num_rows))


def test_a_row_shifts_labels_within_documents():
    a = Sample(np.array([10, 11, 12]), np.array([False, True, True]))
    b = Sample(np.array([20, 21]), np.array([True, True]))
    row = fill_row([a, b], 8, pad_id=0)
    assert row.tokens.tolist() == [10, 11, 12, 20, 21, 0, 0, 0]
    assert row.labels.tolist() == [11, 12, 0, 21, 0, 0, 0, 0]
    assert row.loss_mask.tolist() == [1, 1, 0, 1, 0, 0, 0, 0]
    assert row.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert row.documents == [0, 3, 5]
    assert row.loss_mask.dtype == np.float32


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ConfigError, match="sample 1 has 9 tokens, more than the 8"):
        Packing(np.array([3, 9]), 8, 0)
    with pytest.raises(ConfigError, match="no samples"):
        Packing(np.array([], np.int64), 8, 0)


def test_two_hundred_thousand_samples_are_planned_in_seconds():
    import time

    start = time.perf_counter()
    packing = Packing(lengths(200_000, 8192), 8192, 0)
    seconds = time.perf_counter() - start
    print(f"{packing.num_rows} rows of 200,000 samples in {seconds:.2f} s")
    assert seconds < 5
