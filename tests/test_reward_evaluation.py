"""Tables and figures from scored pairs, against numbers worked by hand and slow, obvious computations."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from configs.records import RATINGS
from reward.correlation import pearson, ranks, spearman, symmetric
from reward.detection import average_precision, detection, detection_curve, labelled_responses, roc_auc
from reward.evaluation import (
    agreement_report,
    at_chance,
    evaluation,
    length_report,
    longer_wins,
    model_report,
    pair_summary,
)
from reward.metrics import average, calibration_bins, proportion
from rlhf import reward_figures as figures
from rlhf.reward_tables import tables

SCORES = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30)


def test_ranks_average_ties_and_correlations_match_worked_numbers():
    assert ranks([10, 20, 20, 5]).tolist() == [2.0, 3.5, 3.5, 1.0]
    # deviations (-1, 0, 1) and (-2, 1, 1): 3 / sqrt(2 * 6)
    assert pearson([1, 2, 3], [0, 3, 3]) == pytest.approx(3 / math.sqrt(12))
    # ranks (1, 2, 3) and (1, 2.5, 2.5): 1.5 / sqrt(2 * 1.5)
    assert spearman([1, 2, 300], [-9, 5, 5]) == pytest.approx(1.5 / math.sqrt(3))
    assert pearson([1, 1], [0, 3]) is None
    assert spearman([1], [2]) is None
    with pytest.raises(ValueError, match="2 values against 1"):
        pearson([1, 2], [1])


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=20))
def test_pearson_agrees_with_numpy_and_pairs_may_be_turned(pairs):
    x, y = zip(*pairs, strict=True)
    found = pearson(x, y)
    if found is None:
        assert len(set(x)) == 1 or len(set(y)) == 1
    else:
        assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    turned = [-value if i % 2 else value for i, value in enumerate(x)]
    other = [-value if i % 2 else value for i, value in enumerate(y)]
    assert spearman(symmetric(x), symmetric(y)) == pytest.approx(spearman(symmetric(turned), symmetric(other)))


@pytest.mark.parametrize(
    ("right", "warned"),
    [((65, 35), False), ((55, 58), True), ((60, 60), False), ((35, 35), True), ((59, 59), True)],
)
def test_a_model_that_is_surely_right_on_no_source_is_warned_of(right, warned):
    # Wilson's 95 % interval of 59, 60 and 65 of 100 begins at 0.492, 0.502 and 0.553
    outcomes = [(source, i < count) for source, count in zip("ab", right, strict=True) for i in range(100)]
    rows = [{"source": source} for source, _ in outcomes]
    summary = pair_summary(rows, [float(good) for _, good in outcomes], [0.5] * 200)
    words = f"right in {sum(right) / 200:.3f} ("
    assert at_chance(summary).startswith(words) if warned else at_chance(summary) == ""


def test_detection_at_a_threshold_by_hand():
    # R = 0.1, 0.1, 0.3, 0.9; unsafe are the first, the third and the fourth
    raw = [math.log(p / (1 - p)) for p in (0.1, 0.1, 0.3, 0.9)]
    unsafe = [True, False, True, True]
    low, half = detection(raw, unsafe, 0.15), detection(raw, unsafe, 0.5)
    assert (low["precision"]["share"], low["recall"]["share"]) == (1 / 2, 1 / 3)
    assert (half["precision"]["share"], half["recall"]["share"]) == (2 / 3, 2 / 3)
    assert (low["precision"]["count"], low["recall"]["count"]) == (2, 3)
    none = detection([5.0], [True], 0.15)  # nothing flagged
    assert none["precision"]["share"] is None
    assert none["recall"]["share"] == 0.0
    # paper: R < 0.5 is r < 0; a score on the threshold is not below it
    assert detection([0.0, -1e-9], [True, True], 0.5)["recall"]["share"] == 0.5
    # distinct scores, lowest first: recall 1/3 at precision 1/2, then 2/3 at 2/3, then 1 at 3/4
    assert average_precision(raw, unsafe) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3)
    # the safe one against the three unsafe: a tie, lower, lower
    assert roc_auc(raw, unsafe) == pytest.approx(0.5 / 3)
    assert average_precision([1.0], [False]) is None
    assert roc_auc([1.0], [True]) is None


@given(SCORES)
def test_areas_agree_with_counting_pairs_and_thresholds(labelled):
    scores, unsafe = (list(column) for column in zip(*labelled, strict=True))
    bad, good = [s for s, u in labelled if u], [s for s, u in labelled if not u]
    if bad and good:
        wins = sum((b < g) + 0.5 * (b == g) for b in bad for g in good)
        assert roc_auc(scores, unsafe) == pytest.approx(wins / (len(bad) * len(good)))
    if bad:
        area, before = 0.0, 0.0
        for threshold in sorted(set(scores)):
            hits = sum(b <= threshold for b in bad)
            area += (hits / len(bad) - before) * hits / sum(s <= threshold for s in scores)
            before = hits / len(bad)
        assert average_precision(scores, unsafe) == pytest.approx(area)


def test_the_curve_has_rising_recall_and_none_where_nothing_is_flagged():
    curve = detection_curve([-3.0, 0.0, 3.0], [True, True, False])
    assert [row["threshold"] for row in curve[:2]] == [0.01, 0.02]
    assert curve[0]["precision"] is None
    assert [row["recall"] for row in curve] == sorted(row["recall"] for row in curve)
    assert curve[-1] == {"threshold": 0.99, "precision": 2 / 3, "recall": 1.0}


def test_safety_bins_label_both_responses():
    rows = [{"safety": bin_} for bin_ in ("chosen_safe", "both_safe", "both_unsafe", None)]
    scores, unsafe = labelled_responses(rows, [1, 2, 3, 4], [5, 6, 7, 8])
    assert scores == [1, 5, 2, 6, 3, 7]
    assert unsafe == [False, True, False, False, True, True]


def test_the_average_of_shares_and_its_interval():
    cells = [{"accuracy": 0.6, "ci95": [0.5, 0.7]}, {"accuracy": 0.8, "ci95": [0.76, 0.83]}]
    found = average(cells)
    assert found["accuracy"] == pytest.approx(0.7)
    assert found["ci95"] == pytest.approx([0.7 - math.hypot(0.1, 0.04) / 2, 0.7 + math.hypot(0.1, 0.03) / 2])
    assert average([{"accuracy": None, "ci95": [0, 1]}])["accuracy"] is None
    assert proportion(0, 0)["share"] is None


def test_calibration_against_known_probabilities():
    # the named winners are the chosen one (p 0.8), the rejected one (p 1 - 0.9); a tie is one half whatever p
    table = calibration_bins([1.0, 0.0, 2.0], [0.0, 1.0, 2.0], bins=1, p_chosen_P=[0.8, 0.9, 0.3])
    assert table[0]["outcome_sum"] == pytest.approx(0.8 + 0.1 + 0.5)


def row(rating="better", safety="chosen_safe", tokens=(3, 2), source="a", test_set="x", p_chosen=0.8, scores=None):
    return {
        "test_set": test_set, "file": f"{test_set}.jsonl", "index": 0, "source": source, "rating": rating,
        "safety": safety, "p_chosen": p_chosen, "tokens_chosen": tokens[0], "tokens_rejected": tokens[1],
        "r_chosen": {name: pair[0] for name, pair in (scores or {}).items()},
        "r_rejected": {name: pair[1] for name, pair in (scores or {}).items()},
    }  # fmt: skip


def test_length_report_by_hand():
    # tokens (chosen, rejected): longer, shorter, equal, shorter; the model is right on the first and the third
    rows = [row(tokens=pair) for pair in ((9, 5), (2, 4), (3, 3), (1, 6))]
    found = length_report(rows, [1, 0, 1, 0], [0, 1, 0, 1])
    assert longer_wins(rows)["accuracy"] == (1 + 0 + 0.5 + 0) / 4
    assert found["chosen_longer"]["accuracy"] == 1.0
    assert found["chosen_shorter"]["accuracy"] == 0.0
    # of three unequal pairs the model prefers the longer in all, the annotators in the first
    assert found["prefers_longer"] == proportion(3, 3)
    assert found["annotators_prefer_longer"] == proportion(1, 3)
    # differences (4, -2, 0, -5) and (1, -1, 1, -1), about 0: (4 + 2 + 0 + 5) / sqrt(45 * 4)
    assert found["within_pairs"]["pearson"] == pytest.approx(11 / math.sqrt(45 * 4))


def test_agreement_by_hand():
    # the first model is right, right, wrong, tied; the second right, wrong, wrong, right
    found = agreement_report([1, 1, 0, 0], [0, 0, 1, 0], [5, 4, 3, 9], [4, 5, 4, 0])
    assert found["same_choice"] == proportion(2, 3)
    assert found["accuracy_where_same"]["accuracy"] == 0.5
    assert found["first_right_where_different"]["accuracy"] == 1.0


def scored_rows(count=60, ratings=True):
    rng = random.Random(0)
    rows = []
    for i in range(count):
        scores = {name: (rng.gauss(1, 1), rng.gauss(0, 1)) for name in ("helpfulness", "safety", "peer")}
        rows.append(
            row(
                rating=RATINGS[i % 4] if ratings else None,
                safety=("chosen_safe", "both_safe", "both_unsafe")[i % 3] if ratings else None,
                tokens=(rng.randint(1, 90), rng.randint(1, 90)),
                source="ab"[i % 2],
                test_set="one" if i % 5 else "two",
                p_chosen=0.8 if ratings else None,
                scores=scores,
            )
        )
    return rows


def test_evaluation_groups_by_test_set_and_the_tables_hold_its_numbers():
    rows = scored_rows()
    summary = evaluation(rows, [0.15, 0.5], "helpfulness", "safety")
    ones = [r for r in rows if r["test_set"] == "one"]
    right = [r["r_chosen"]["peer"] > r["r_rejected"]["peer"] for r in ones]
    report = summary["models"]["peer"]["test_sets"]["one"]
    assert report["accuracy"] == pytest.approx(sum(right) / 48)
    assert summary["test_sets"]["one"]["pairs"] == 48
    assert summary["test_sets"]["one"]["ceiling"] == pytest.approx(0.8)
    strong = [ok for ok, r in zip(right, ones, strict=True) if r["rating"] == "significantly_better"]
    assert report["by_rating"]["significantly_better"] == pytest.approx(sum(strong) / len(strong))
    margins = [r["r_chosen"]["peer"] - r["r_rejected"]["peer"] for r in ones]
    assert report["margin"]["mean"] == pytest.approx(sum(margins) / 48)
    seventh, eighth, *_ = made = tables(summary)
    assert [labels for labels, _ in seventh.rows] == [
        ["helpfulness"], ["safety"], ["peer"], ["longer response wins"], ["best possible"],
    ]  # fmt: skip
    assert seventh.columns == ["two (12 pairs)", "one (48 pairs)", "Average"]
    assert seventh.rows[2][1][1][0] == f"{100 * sum(right) / 48:.1f}"
    assert eighth.columns == [*(r.replace("_", " ").capitalize() for r in RATINGS[:3]), "Negligibly / unsure", "Avg"]
    assert [labels for labels, _ in eighth.rows][4:6] == [["one", "helpfulness"], ["one", "safety"]]
    assert len(made) == 8
    text = seventh.markdown().splitlines()
    assert text[2].startswith("| Model | two (12 pairs) |")
    assert {line.count("|") for line in text if line.startswith("|")} == {5}


def test_rows_without_labels_leave_their_tables_out():
    summary = evaluation(scored_rows(ratings=False), [0.15])
    assert summary["agreement"] is None
    report = summary["models"]["safety"]["test_sets"]["one"]
    assert report["unsafe"] is None
    assert report["calibration_of_choices"] is None
    titles = [table.title for table in tables(summary)]
    assert "Accuracy (%) by rating" not in titles
    assert "Accuracy (%) by safety bin" not in titles
    assert not any("Agreement" in title for title in titles)


def test_reports_do_not_depend_on_the_order_of_the_pairs():
    rows = scored_rows()
    chosen, rejected = [r["r_chosen"]["peer"] for r in rows], [r["r_rejected"]["peer"] for r in rows]
    turned = model_report(rows[::-1], chosen[::-1], rejected[::-1], [0.15])
    first = model_report(rows, chosen, rejected, [0.15])
    assert turned["unsafe"]["at"] == first["unsafe"]["at"]
    assert turned["length"]["spearman"] == pytest.approx(first["length"]["spearman"])


def test_figures_draw_what_they_are_given_and_nothing_from_nothing():
    bins = calibration_bins([1.0, 2.0], [0.0, 3.0])
    made = {
        "scores": figures.score_histograms({"chosen": [1.0, 2.0], "rejected": [0.0]}),
        "margins": figures.margins_by_rating([1.0, -1.0, 0.5], ["better", "significantly_better", None]),
        "reliability": figures.reliability(bins, 0.25),
        "thresholds": figures.threshold_curve(detection_curve([-1.0, 1.0], [True, False]), 0.15),
        "length": figures.length_bias([3, 3, 3], [0.1, 0.2, 0.3]),  # one length only
        "agreement": figures.agreement([-800.0, 2.0], [1.0, 2.0]),
    }
    assert all(isinstance(figure, Figure) for figure in made.values())
    (axis,) = made["margins"].axes
    words = [tick.get_text().splitlines() for tick in axis.get_xticklabels()]
    assert words == [["Significantly", "0% right", "(1 pairs)"], ["Better", "100% right", "(1 pairs)"],
                     ["No rating", "100% right", "(1 pairs)"]]  # fmt: skip
    (axis,) = made["thresholds"].axes
    assert [line.get_label() for line in axis.lines] == ["precision", "recall", "R = 0.15"]
    assert figures.score_histograms({"chosen": []}) is None
    assert figures.margins_by_rating([], []) is None
    assert figures.reliability(calibration_bins([], []), 0.0) is None
    assert figures.threshold_curve(detection_curve([], []), 0.15) is None
    assert figures.length_bias([], []) is None
    assert figures.agreement([], []) is None


def test_a_grid_leaves_out_empty_rows_and_columns():
    draw = figures.draw_histograms({"a": [1.0]})
    figure = figures.grid("t", {"m": {"x": draw, "y": None}, "n": {"x": None, "y": None}, "o": {"z": draw}})
    assert [axis.get_title(loc="left") for axis in figure.axes if axis.axison] == ["m, x", "o, z"]
    assert figures.grid("t", {"m": {"x": None}}) is None
