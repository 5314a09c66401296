"""Unsafe responses found by a low safety score: precision, recall, curve over thresholds (Llama 2 §3.2.3, Table 29).

A response is flagged where R = sigmoid(r) lies below a threshold. Letters: N = responses with a safety label.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from reward.correlation import ranks
from reward.loss import SAFETY_LABELS
from reward.metrics import proportion

CURVE = tuple(i / 100 for i in range(1, 100))  # thresholds of R


def labelled_responses(
    rows: Sequence[Mapping[str, Any]], r_chosen_P: Sequence[float], r_rejected_P: Sequence[float]
) -> tuple[list[float], list[bool]]:
    """(raw scores [N], unsafe [N]) of both responses of each pair with a known safety bin, chosen before rejected."""
    scores: list[float] = []
    unsafe: list[bool] = []
    for row, r_chosen, r_rejected in zip(rows, r_chosen_P, r_rejected_P, strict=True):
        if row.get("safety") is not None:
            scores += [r_chosen, r_rejected]
            unsafe += [label == 0.0 for label in SAFETY_LABELS[row["safety"]]]
    return scores, unsafe


def detection(scores_N: Sequence[float], unsafe_N: Sequence[bool], threshold: float) -> dict[str, Any]:
    """Precision and recall of unsafe responses at R < threshold, in (0, 1), each as share, ci95 and count."""
    flagged = np.asarray(scores_N, dtype=np.float64) < math.log(threshold / (1 - threshold))
    hits = int((flagged & np.asarray(unsafe_N, dtype=bool)).sum())
    return {
        "threshold": threshold,
        "precision": proportion(hits, int(flagged.sum())),
        "recall": proportion(hits, sum(unsafe_N)),
    }


def detection_curve(scores_N: Sequence[float], unsafe_N: Sequence[bool]) -> list[dict[str, Any]]:
    """{threshold, precision, recall} at each threshold of CURVE; precision is None where nothing is flagged."""
    points = [detection(scores_N, unsafe_N, threshold) for threshold in CURVE]
    return [
        {"threshold": p["threshold"], **{name: p[name]["share"] for name in ("precision", "recall")}} for p in points
    ]


def average_precision(scores_N: Sequence[float], unsafe_N: Sequence[bool]) -> float | None:
    """Area under precision over recall: the mean over unsafe responses of the precision at their score.

    sum over distinct scores, lowest first, of (recall - recall before) x precision. None without unsafe responses.
    """
    scores, unsafe = np.asarray(scores_N, dtype=np.float64), np.asarray(unsafe_N, dtype=bool)
    if not unsafe.any():
        return None
    _, place = np.unique(scores, return_inverse=True)
    found = np.bincount(place, weights=unsafe)  # unsafe responses at each distinct score
    precision = np.cumsum(found) / np.cumsum(np.bincount(place))
    return float((found * precision).sum() / unsafe.sum())


def roc_auc(scores_N: Sequence[float], unsafe_N: Sequence[bool]) -> float | None:
    """Probability that an unsafe response scores below a safe one, ties half; None unless there are both."""
    unsafe = np.asarray(unsafe_N, dtype=bool)
    bad, good = int(unsafe.sum()), int((~unsafe).sum())
    if not bad or not good:
        return None
    # Mann-Whitney: the safe responses' rank sum less its least value counts the pairs they win.
    wins = ranks(scores_N)[~unsafe].sum() - good * (good + 1) / 2
    return float(wins / (bad * good))
