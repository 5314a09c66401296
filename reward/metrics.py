"""Reward-model metrics as sums and counts, so that parts add up (Llama 2 paper §3.2.2, Tables 7 and 8).

Letters: P = pairs. Lists and floats only; scores are raw scalars r.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from configs.intervals import wilson
from configs.records import RATINGS


def outcome(r_chosen: float, r_rejected: float) -> float:
    """1 when the reward model prefers the chosen response, 0 when the rejected one, one half for a tie.

    A tie counted as right would make a constant model perfect; as wrong, worse than a coin.
    """
    if math.isnan(r_chosen) or math.isnan(r_rejected):
        raise ValueError(f"scores are not numbers: chosen {r_chosen}, rejected {r_rejected}")
    return 0.5 if r_chosen == r_rejected else float(r_chosen > r_rejected)


def proportion(successes: float, count: int) -> dict[str, Any]:
    """{"share", "ci95": [low, high], "count"}; share is None when there is no trial."""
    return {"share": successes / count if count else None, "ci95": list(wilson(successes, count)), "count": count}


def share(outcomes: Sequence[float]) -> dict[str, Any]:
    """{"accuracy", "ci95": [low, high], "count"} of outcomes in {0, 0.5, 1}; accuracy is None when there are none."""
    cell = proportion(sum(outcomes), len(outcomes))
    return {"accuracy": cell.pop("share"), **cell}


def average(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Plain mean of the accuracies of several `share` cells, with an interval from theirs (MOVER, Zou and Donner 2008).

    low = mean - sqrt(sum (p_i - low_i)^2) / k,  high alike
    """
    accuracies = [cell["accuracy"] for cell in cells]
    if not cells or None in accuracies:
        return {"accuracy": None, "ci95": [0.0, 1.0]}
    mean = sum(accuracies) / len(cells)
    below, above = (
        math.sqrt(sum((cell["accuracy"] - cell["ci95"][side]) ** 2 for cell in cells)) / len(cells) for side in (0, 1)
    )
    return {"accuracy": mean, "ci95": [mean - below, mean + above]}


def by_group(outcomes: Sequence[float], groups: Sequence[str | None], order: Sequence[str] = ()) -> dict[str, dict]:
    """`share` for each group, first those of `order`, then the others by name; rows of group None are left out."""
    found = {group for group in groups if group is not None}
    ordered = [group for group in order if group in found] + sorted(found - set(order))
    pairs = list(zip(outcomes, groups, strict=True))
    return {name: share([value for value, group in pairs if group == name]) for name in ordered}


def ceiling(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The accuracy that the best possible model can expect, where the annotator's choice probability is known.

    `p_chosen` of a row is the probability with which a simulated annotator picks the response that it did pick. A
    model that knew it would name the likelier response and be right with max(p, 1 - p). By rating this holds as long
    as the rating tells nothing about which of the two was picked. Returns None unless every row has the field.
    """
    if not rows or any(row.get("p_chosen") is None for row in rows):
        return None
    best = [max(row["p_chosen"], 1 - row["p_chosen"]) for row in rows]
    return {
        "accuracy": sum(best) / len(best),
        "by_rating": {
            rating: cell["accuracy"]
            for rating, cell in by_group(best, [row.get("rating") for row in rows], RATINGS).items()
        },
    }


def calibration_bins(
    r_chosen_P: Sequence[float],
    r_rejected_P: Sequence[float],
    bins: int = 10,
    p_chosen_P: Sequence[float] | None = None,
) -> list[dict[str, Any]]:
    """Reliability of the preference probability sigmoid(|r_c - r_r|) in equal bins over [0.5, 1], as sums and counts.

    The model names a winner with that confidence; each bin's `outcome_sum / count` should equal its
    `confidence_sum / count`. With `p_chosen_P`, the probability that an annotator picks the chosen response, an outcome
    is the probability that one picks the named winner, in place of the one choice that was made.
    """
    table = [
        {
            "low": 0.5 + 0.5 * i / bins,
            "high": 0.5 + 0.5 * (i + 1) / bins,
            "count": 0,
            "confidence_sum": 0.0,
            "outcome_sum": 0.0,
        }
        for i in range(bins)
    ]
    for i, (r_chosen, r_rejected) in enumerate(zip(r_chosen_P, r_rejected_P, strict=True)):
        won = outcome(r_chosen, r_rejected)
        if p_chosen_P is not None:
            won = won * p_chosen_P[i] + (1 - won) * (1 - p_chosen_P[i])
        confidence = 1 / (1 + math.exp(-abs(r_chosen - r_rejected)))
        cell = table[min(int((confidence - 0.5) * 2 * bins), bins - 1)]
        cell["count"] += 1
        cell["confidence_sum"] += confidence
        cell["outcome_sum"] += won
    return table


def expected_calibration_error(table: Sequence[Mapping[str, Any]]) -> float:
    """Mean distance of confidence and accuracy over the pairs of `calibration_bins`; 0 for an empty table."""
    gaps = sum(abs(cell["confidence_sum"] - cell["outcome_sum"]) for cell in table)
    return gaps / max(sum(cell["count"] for cell in table), 1)


def score_statistics(scores: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (population) and range of raw scores; empty for no scores."""
    if not scores:
        return {}
    mean = sum(scores) / len(scores)
    std = math.sqrt(sum((score - mean) ** 2 for score in scores) / len(scores))
    return {"mean": mean, "std": std, "min": min(scores), "max": max(scores)}
