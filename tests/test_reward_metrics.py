"""Metrics against numbers worked out by hand."""

import pytest

from reward.metrics import (
    by_group,
    calibration_bins,
    ceiling,
    expected_calibration_error,
    outcome,
    share,
)


def test_a_tie_counts_half_and_nan_is_refused():
    assert [outcome(1, 0), outcome(0, 1), outcome(2, 2)] == [1.0, 0.0, 0.5]
    with pytest.raises(ValueError, match="not numbers"):
        outcome(float("nan"), 0.0)


def test_groups_follow_the_given_order_and_leave_none_out():
    groups = by_group(
        [1, 0, 0.5, 1], ["better", None, "significantly_better", "better"], ["significantly_better", "better"]
    )
    assert list(groups) == ["significantly_better", "better"]
    assert groups["better"]["accuracy"] == 1.0
    assert groups["better"]["count"] == 2
    assert groups["significantly_better"]["accuracy"] == 0.5
    assert list(by_group([1, 1, 1], ["b", "a", "z"], ["z"])) == ["z", "a", "b"]
    assert share([])["accuracy"] is None


def test_ceiling_is_the_accuracy_of_knowing_the_annotator():
    rows = [
        {"p_chosen": 0.9, "rating": "significantly_better"},
        {"p_chosen": 0.4, "rating": "slightly_better"},  # the less likely response was picked: a perfect model is wrong
        {"p_chosen": 0.6, "rating": "slightly_better"},
    ]
    found = ceiling(rows)
    assert found["accuracy"] == pytest.approx((0.9 + 0.6 + 0.6) / 3)
    assert found["by_rating"] == pytest.approx({"significantly_better": 0.9, "slightly_better": 0.6})
    assert list(found["by_rating"]) == ["significantly_better", "slightly_better"]
    assert ceiling([*rows, {"rating": None}]) is None
    assert ceiling([]) is None


def test_calibration_counts_the_named_winner():
    # gaps log 3 (confidence 3/4, right), -log 3 (3/4, wrong), 100 (1, right), 0 (1/2, tie)
    log3 = 1.0986122886681098
    table = calibration_bins([log3 + 0.001, 0.0, 100.0, 1.0], [0.0, log3 + 0.001, 0.0, 1.0], bins=2)
    assert [cell["count"] for cell in table] == [1, 3]
    assert table[0]["outcome_sum"] == 0.5
    assert table[1]["outcome_sum"] == 2.0
    assert table[1]["confidence_sum"] == pytest.approx(2.5, abs=1e-3)
    # |0.5 - 0.5| + |2.5 - 2| over 4 pairs
    assert expected_calibration_error(table) == pytest.approx(0.125, abs=1e-3)
