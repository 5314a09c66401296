"""Selection against tables worked out by hand and against all subsets, one by one."""

import itertools
import math
import statistics
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from rlhf import selection
from rlhf.selection import (
    Picks,
    best_of_n_curve,
    best_of_n_kl,
    best_of_n_values,
    best_of_n_weights,
    check_finite,
    duplicate_of,
    median_of_n_values,
    median_of_n_weights,
    order_statistic_weights,
    rank,
)

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=12)  # few values: ties


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


def test_the_worst_of_equal_scores_is_the_last():
    picks = pick([1.0, 1.0, 1.0], [True] * 3)
    assert (picks.best, picks.median, picks.worst) == (0, 1, 2)


def test_scores_without_a_rank_are_refused():
    with pytest.raises(UserError, match="prompt 7: the safety score of response 1 is inf"):
        check_finite({"combined": [0.0, 1.0], "safety": [0.0, math.inf]}, 7)
    check_finite({"combined": [0.0, -1e300]}, 7)
    with pytest.raises(ValueError, match="score 1 of prompt 0 is nan"):
        selection.pick([0.0, math.nan], [True, True])


def test_duplicates_point_at_the_first_of_their_kind():
    assert duplicate_of(["x", "y", "x", "z", "y", "x"]) == [-1, -1, 0, -1, 1, 0]


def test_order_statistic_weights_by_hand():
    """Of the four triples of 1 2 3 4, rank 2 is the middle of (1 2 3) and (1 2 4), rank 3 of (1 3 4) and (2 3 4)."""
    np.testing.assert_allclose(order_statistic_weights(4, 3, 2), [0, 1 / 2, 1 / 2, 0])
    np.testing.assert_allclose(order_statistic_weights(4, 2, 1), [3 / 6, 2 / 6, 1 / 6, 0])
    with pytest.raises(ValueError, match="no 3-th lowest of 2 drawn from 4"):
        order_statistic_weights(4, 2, 3)


def test_median_weights_by_hand():
    """K = 3: any one; pairs (1 2) (1 3) (2 3), each rank in two of six places; of all three the middle one."""
    np.testing.assert_allclose(median_of_n_weights(3), [[1 / 3] * 3, [1 / 3] * 3, [0, 1, 0]])


@given(SCORES)
def test_maximum_and_median_of_n_are_the_averages_over_all_subsets(scores):
    """In fractions, over every subset, for up to eight samples."""
    scores = scores[:8]
    best, median = (
        best_of_n_values(np.array([scores]), np.array([scores]))[0],
        median_of_n_values(np.array([scores]))[0],
    )
    for n in range(1, len(scores) + 1):
        subsets = list(itertools.combinations([Fraction(score) for score in scores], n))
        assert best[n - 1] == pytest.approx(float(sum(map(max, subsets)) / len(subsets)), abs=1e-12)
        assert median[n - 1] == pytest.approx(float(sum(map(statistics.median, subsets)) / len(subsets)), abs=1e-12)


@given(SCORES, st.randoms(use_true_random=False))
def test_properties_of_the_curves(scores, random):
    values = np.array([scores])
    best, median = best_of_n_values(values, values)[0], median_of_n_values(values)[0]
    assert (np.diff(best) > -1e-9).all(), "more samples never lower the expected maximum"
    assert best[-1] == pytest.approx(max(scores))
    assert best[0] == pytest.approx(np.mean(scores))
    assert median[-1] == pytest.approx(statistics.median(scores))
    assert (best - median > -1e-9).all()
    shuffled = np.array([random.sample(scores, len(scores))])
    np.testing.assert_allclose(best_of_n_values(shuffled, shuffled)[0], best, atol=1e-9)
    np.testing.assert_allclose(median_of_n_values(shuffled)[0], median, atol=1e-9)
    mirrored = -values
    np.testing.assert_allclose(median_of_n_values(mirrored)[0], -median, atol=1e-9)


@given(st.lists(st.tuples(st.integers(-3, 3).map(float), st.booleans()), min_size=1, max_size=10))
def test_picks_are_ordered_and_may_be_kept(responses):
    scores, eligible = [score for score, _ in responses], [ok for _, ok in responses]
    picks = selection.pick(scores, eligible)
    kept = [score for score, ok in responses if ok]
    if not kept:
        assert picks is None
        return
    assert picks is not None
    assert picks.eligible == [i for i, ok in enumerate(eligible) if ok]
    assert scores[picks.best] == max(kept)
    assert scores[picks.worst] == min(kept)
    assert scores[picks.median] == statistics.median_low(kept)
    assert picks.best == min(i for i in picks.eligible if scores[i] == max(kept))


def test_weights_of_a_hundred_samples_are_shares():
    for weights in (best_of_n_weights(100), median_of_n_weights(100)):
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1.0)
