"""Selection against tables worked out by hand and against all subsets, one by one."""

import itertools
import math

import numpy as np
import pytest

from rlhf import selection
from rlhf.selection import Picks, best_of_n_curve, best_of_n_kl, best_of_n_weights, rank


def pick(scores: list[float], eligible: list[bool]) -> Picks:
    picks = selection.pick(scores, eligible)
    assert picks is not None
    return picks


def test_picks_of_a_hand_worked_prompt():
    picks = pick([0.3, 2.0, -1.0, 2.0, 0.5], [True] * 5)
    # Sorted: -1.0 (2), 0.3 (0), 0.5 (4), 2.0 (3), 2.0 (1): the first of the tied maxima is the best.
    assert (picks.best, picks.median, picks.worst) == (1, 4, 2)
    assert rank([0.3, 2.0, -1.0, 2.0, 0.5], [True] * 5) == [2, 0, 4, 3, 1]


def test_an_even_number_takes_the_lower_median():
    picks = pick([4.0, 1.0, 3.0, 2.0], [True] * 4)
    assert (picks.best, picks.median, picks.worst) == (0, 3, 1)


def test_responses_that_may_not_be_kept_are_never_picked():
    picks = pick([9.0, 1.0, 3.0, -5.0], [False, True, True, False])
    assert (picks.best, picks.median, picks.worst, picks.eligible) == (2, 1, 1, [1, 2])
    assert selection.pick([1.0, 2.0], [False, False]) is None


def test_best_of_n_weights_by_hand():
    """K = 4, n = 2: six pairs; the top rank wins three of them, the next two, the next one."""
    np.testing.assert_allclose(best_of_n_weights(4)[1], [0, 1 / 6, 2 / 6, 3 / 6])
    np.testing.assert_allclose(best_of_n_weights(4)[0], [0.25] * 4)
    np.testing.assert_allclose(best_of_n_weights(4)[3], [0, 0, 0, 1])
    np.testing.assert_allclose(best_of_n_weights(30).sum(axis=1), 1.0)


def test_curve_by_hand():
    """Scores 1 2 4: mean 7/3; pairs (1 2) (1 4) (2 4) give 2, 4, 4: 10/3; all three give 4."""
    np.testing.assert_allclose(best_of_n_curve(*[np.array([[4.0, 1.0, 2.0]])] * 2), [7 / 3, 10 / 3, 4])


@pytest.mark.parametrize("with_exclusions", [False, True])
def test_curve_equals_the_average_over_all_subsets(with_exclusions):
    generator = np.random.default_rng(0)
    proxy = generator.integers(0, 4, size=(5, 6)).astype(float)  # with ties
    gold = generator.normal(size=(5, 6))
    eligible = generator.random((5, 6)) < 0.7 if with_exclusions else np.ones((5, 6), bool)
    curve = best_of_n_curve(proxy, gold, eligible)
    for n in range(1, 7):
        values = []
        for p in range(5):
            for subset in itertools.combinations(range(6), n):
                top = max((bool(eligible[p, i]), proxy[p, i]) for i in subset)
                first = next(i for i in subset if (bool(eligible[p, i]), proxy[p, i]) == top)
                values.append(gold[p, first])
        assert curve[n - 1] == pytest.approx(np.mean(values))


def test_curve_refuses_shapes_that_differ():
    with pytest.raises(ValueError, match="shapes differ"):
        best_of_n_curve(np.zeros((2, 3)), np.zeros((2, 1)))


def test_kl_of_best_of_n():
    """n = 2 on a continuum: density 2u on [0, 1], so KL = integral of 2u log 2u = log 2 - 1/2."""
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)
