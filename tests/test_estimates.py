"""Intervals against published or hand-worked numbers."""

import math

import pytest

from rlhf.estimates import mean_with_interval, paired_bootstrap, share_with_interval


def test_mean_with_interval():
    # 1, 2, 3: standard deviation 1, so 1.96 / sqrt(3) = 1.1316
    mean, half = mean_with_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (pytest.approx(2.0), pytest.approx(1.1316, abs=1e-4))
    assert mean_with_interval([5.0]) == (5.0, 0.0)
    assert all(math.isnan(x) for x in mean_with_interval([]))


def test_wilson_interval_of_the_textbook_case():
    # 10 of 10: low = 10 / (10 + 1.96^2) = 0.7225 (Wilson 1927), high = 1
    share, (low, high) = share_with_interval(10, 10)
    assert (share, low, high) == (1, pytest.approx(0.7225, abs=1e-4), pytest.approx(1.0))
    assert share_with_interval(0, 10)[1] == (pytest.approx(0.0, abs=1e-12), pytest.approx(0.2775, abs=1e-4))


def test_paired_bootstrap_sees_a_constant_gain_exactly():
    before = [0.0, 1.0, 0.5, 0.2]
    assert paired_bootstrap(before, [x + 0.25 for x in before]) == (
        pytest.approx(0.25),
        (pytest.approx(0.25), pytest.approx(0.25)),
    )
    # differences -1 and 1: means of two draws are -1, 0, 1 with 1/4, 1/2, 1/4, so the interval is [-1, 1]
    assert paired_bootstrap([0.0, 1.0], [1.0, 0.0], draws=2000) == (pytest.approx(0.0), (-1.0, 1.0))
    with pytest.raises(ValueError, match="equally many"):
        paired_bootstrap([1.0], [])
