import numpy as np
import pytest

from igla_mega.config.errors import ConfigError
from igla_mega.data.windows import Windows, feistel_permutation, round_keys


@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 255, 256, 257, 1000, 65537])
def test_the_permutation_is_a_bijection(size):
    permuted = feistel_permutation(np.arange(size), size, round_keys(7, "web", 0)[:-1])
    assert np.array_equal(np.sort(permuted), np.arange(size))


def test_the_permutation_shuffles():
    size = 10_000
    permuted = feistel_permutation(np.arange(size), size, round_keys(7, "web", 0)[:-1])
    assert abs(np.corrcoef(np.arange(size), permuted)[0, 1]) < 0.05
    assert (np.diff(permuted) == 1).sum() < 10


def test_every_epoch_holds_each_window_once():
    windows = Windows("web", 100, 1000, 37, seed=3)
    assert windows.per_epoch == 27
    for epoch in range(5):
        starts = np.sort(windows.starts(np.arange(27 * epoch, 27 * (epoch + 1))))
        assert np.array_equal(np.diff(starts), np.full(26, 37))
        assert starts[0] >= 100
        assert starts[-1] + 37 + 1 <= 1100


def test_epochs_differ_in_order_and_in_their_cuts():
    windows = Windows("web", 0, 1036, 37, seed=3)
    starts = windows.starts(np.arange(windows.per_epoch * 40)).reshape(40, -1)
    assert len({tuple(np.argsort(epoch)) for epoch in starts}) == 40
    assert len(set((starts.min(axis=1)).tolist())) > 10


def test_a_window_depends_on_seed_name_and_index_only():
    indices = np.arange(500)
    windows = Windows("web", 0, 10_000, 16, seed=3)
    together = windows.starts(indices)
    assert [int(windows.starts(np.array([i]))[0]) for i in (0, 17, 499)] == together[[0, 17, 499]].tolist()
    assert not np.array_equal(together, Windows("web", 0, 10_000, 16, seed=4).starts(indices))
    assert not np.array_equal(together, Windows("code", 0, 10_000, 16, seed=3).starts(indices))


def test_the_order_is_the_same_on_every_machine():
    """Recorded once: a resumed run on another machine must read the same windows."""
    assert Windows("web", 0, 1000, 10, seed=1234).starts(np.arange(6)).tolist() == [491, 281, 361, 971, 451, 41]


def test_an_offset_beyond_four_billion_tokens_is_exact():
    windows = Windows("web", 2**40, 2**36, 8192, seed=0)
    starts = windows.starts(np.arange(10**6, 10**6 + 100))
    assert starts.min() >= 2**40
    assert starts.max() + 8193 <= 2**40 + 2**36


def test_too_few_tokens_for_one_window_are_refused_with_both_numbers():
    assert Windows("web", 0, 65, 64, seed=0).starts(np.arange(3)).tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match="64 training tokens are fewer than one window of 64"):
        Windows("web", 0, 64, 64, seed=0)
