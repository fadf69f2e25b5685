"""That a covering subset holds every pair, each whole value, and fewer cases than the full cross."""

from itertools import product

import pytest
from covering import covering, pairs

CROSSES = {
    "two factors": [["a", "b", "c"], [1, 2]],
    "four of three": [range(3)] * 4,
    "of different sizes": [range(5), range(4), range(3), range(2), range(2)],
}


def numbered(case) -> dict:
    return {str(number): value for number, value in enumerate(case)}


@pytest.mark.parametrize("name", CROSSES)
def test_every_pair_of_a_full_cross_is_in_the_subset(name):
    cases = list(product(*CROSSES[name]))
    chosen = covering(cases, numbered)
    assert set().union(*(pairs(numbered(case)) for case in chosen)) == set().union(
        *(pairs(numbered(case)) for case in cases)
    )
    assert len(set(chosen)) == len(chosen) and set(chosen) <= set(cases)


def test_the_subset_is_near_the_smallest():
    assert len(covering(list(product(range(3), repeat=4)), numbered)) <= 13  # 9 of 81 is the smallest
    assert len(covering(list(product(range(2), repeat=7)), numbered)) <= 10  # of 128


def test_only_pairs_that_a_case_has_are_wanted():
    cases = [{"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "kind": "b"}]
    assert covering(cases, dict) == cases, "a name that is absent is a value too"
    assert covering([{"a": 1, "b": 1}, {"a": 1, "b": 1}], dict) == [{"a": 1, "b": 1}]


def test_each_value_of_a_whole_occurs():
    cases = list(product(range(6), range(2), range(2)))
    chosen = covering(cases, lambda case: {"b": case[1], "c": case[2]}, each=lambda case: case[0])
    assert {case[0] for case in chosen} == set(range(6)) and len(chosen) == 6
