"""Gwet's coefficients against published examples and a slow restatement; the majority of raters."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.intervals import Z_95
from rlhf.agreement import SCALE, gwet, is_violation, quadratic_weights

# Gwet (2014), p. 120: four raters, twelve units, as in the R package irrCAC (cac.raw4raters).
RATERS = (
    (1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None),
    (1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3),
    (None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None),
    (1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None),
)


def test_ac1_of_a_published_example_with_missing_ratings():
    found = gwet(list(zip(*RATERS, strict=True)))
    assert found["ac"] == pytest.approx(0.77544, abs=5e-6)
    assert (found["agreement"], found["by_chance"]) == (
        pytest.approx(0.81818, abs=1e-5),
        pytest.approx(0.19032, abs=1e-5),
    )
    assert (found["ac"] - found["ci95"][0]) / Z_95 == pytest.approx(0.14295, abs=1e-5)  # its standard error
    assert found["ci95"][1] == 1.0
    assert found["count"] == 11  # one unit has a single rating


def test_ac1_of_a_published_table_of_two_raters():
    table = ((13, 0, 0), (0, 20, 7), (0, 4, 56))  # irrCAC, cont3x3abstractors: AC1 0.8493305, agreement 0.89
    ratings = [(i, j) for i, row in enumerate(table) for j, count in enumerate(row) for _ in range(count)]
    found = gwet(ratings, (0, 1, 2))
    assert (found["ac"], found["agreement"]) == (pytest.approx(0.8493305, abs=1e-7), pytest.approx(0.89))


def test_by_hand():
    # Three responses, two raters, yes or no: agree, agree, differ. pa = 2/3; pi(yes) = (1 + 0 + 1/2) / 3 = 1/2, so
    # pe = 2 x 1/2 x 1/2 = 1/2 and AC1 = (2/3 - 1/2) / (1/2) = 1/3.
    found = gwet([(1, 1), (0, 0), (0, 1)], (0, 1))
    assert found["ac"] == pytest.approx(1 / 3)
    # The first two ratings are all that count: a response nobody rated changes nothing.
    assert gwet([(1, 1), (0, 0), (0, 1), (None, None)], (0, 1)) == found


@given(st.lists(st.lists(st.sampled_from([None, *SCALE]), min_size=3, max_size=3), min_size=2, max_size=8))
def test_ac2_equals_its_definition_pair_by_pair(rows):
    def weight(a: int, b: int) -> float:
        return 1 - (a - b) ** 2 / 16

    rated = [[r for r in row if r is not None] for row in rows]
    rated = [row for row in rated if row]
    several = [row for row in rated if len(row) > 1]
    found = gwet(rows, weights_QQ=quadratic_weights(SCALE))
    if not several:
        assert found["ac"] is None
        return
    pa = sum(
        sum(weight(a, b) for a, b in itertools.permutations(row, 2)) / (len(row) * (len(row) - 1)) for row in several
    ) / len(several)
    pi = {value: sum(row.count(value) / len(row) for row in rated) / len(rated) for value in SCALE}
    total = sum(weight(a, b) for a in SCALE for b in SCALE)
    pe = total / 20 * sum(p * (1 - p) for p in pi.values())
    assert found["ac"] == pytest.approx((pa - pe) / (1 - pe))
    assert math.isclose(found["by_chance"], pe, abs_tol=1e-12)


def test_nothing_rated_twice_and_unknown_ratings():
    assert gwet([(1, None), (None, None)])["ac"] is None
    with pytest.raises(ValueError, match=r"\[6\] are not among"):
        gwet([(1, 6)])


@pytest.mark.parametrize(
    ("ratings", "violation"),
    [((1, 2, 5), True), ((2, 3, 5), False), ((1, None, None), True), ((2, 3), True), ((None,), None), ((), None)],
)
def test_the_majority_decides_and_a_tie_is_a_violation(ratings, violation):
    assert is_violation(ratings) is violation
