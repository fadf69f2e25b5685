import numpy as np
import pytest

from igla_mega.data import blend

helpers = pytest.importorskip("igla_mega._helpers", reason="csrc/ is not built")


@pytest.mark.parametrize(
    "counts", [[1], [0, 3], [1, 1, 1], [45, 25, 10, 10, 10], [1, 999], [7, 0, 13, 29, 1], [333, 334, 333]]
)
def test_the_compiled_blend_schedule_equals_the_python_one(counts):
    wanted = np.array(counts, dtype=np.int64)
    assert np.array_equal(helpers.blend_schedule(wanted), blend.blend_schedule(wanted))


def test_every_prefix_holds_each_source_within_one_of_its_share():
    counts = np.random.default_rng(0).integers(1, 2000, size=17)
    schedule = helpers.blend_schedule(counts)
    held = np.cumsum(schedule[:, None] == np.arange(17), axis=0)
    share = np.arange(1, len(schedule) + 1)[:, None] * counts / counts.sum()
    assert np.array_equal(held[-1], counts)
    assert np.abs(held - share).max() < 1


def test_negative_or_too_many_counts_are_refused():
    with pytest.raises(ValueError, match="negative"):
        helpers.blend_schedule(np.array([3, -1]))
    with pytest.raises(ValueError, match="2\\^31"):
        helpers.blend_schedule(np.array([2**31, 1]))
