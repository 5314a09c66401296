"""What there is to say about a reward model from the scores of labelled pairs [pure] (Llama 2 §3.2.2, §3.4.1).

A row is a preference record or a line of scores.jsonl: `rating`, `safety`, `source`, `p_chosen`, and for the length
bias `tokens_chosen` and `tokens_rejected`. Letters: P = pairs; scores are raw scalars r.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from configs.records import RATINGS, SAFETY_LABELS
from reward import metrics
from reward.correlation import pearson, spearman, symmetric
from reward.detection import average_precision, detection, detection_curve, labelled_responses, roc_auc

Rows = Sequence[Mapping[str, Any]]
Scores = Sequence[float]


def evaluation(
    rows_P: Rows, thresholds: Sequence[float], helpfulness: str | None = None, safety: str | None = None
) -> dict[str, Any]:
    """Everything about several models on several test sets, from the lines of scores.jsonl.

    A row has `test_set`, and its `r_chosen` and `r_rejected` are {model: score}. `helpfulness` and `safety` name the
    two models whose agreement is reported; without one of them `agreement` is None.

    Returns {"test_sets": {set: what holds for every model}, "models": {model: {"average", "test_sets": {set:
    model_report}}}, "longer_wins": the average of that rule, "agreement": {set: agreement_report}}. An average is the
    plain mean over the test sets.
    """
    sets = {name: [row for row in rows_P if row["test_set"] == name] for name in {row["test_set"]: 0 for row in rows_P}}
    names = list(rows_P[0]["r_chosen"])
    models = {}
    for name in names:
        reports = {key: model_report(rows, *scores_of(rows, name), thresholds) for key, rows in sets.items()}
        models[name] = {"average": metrics.average(list(reports.values())), "test_sets": reports}
    about: dict[str, dict[str, Any]] = {}
    for key, rows in sets.items():
        best = metrics.ceiling(rows)
        about[key] = {
            "pairs": len(rows),
            "longer_wins": longer_wins(rows),
            "ceiling": best and best["accuracy"],
            "ceiling_by_rating": best and best["by_rating"],
        }
    agreement = None
    if helpfulness and safety:
        agreement = {
            key: agreement_report(*scores_of(rows, safety), *scores_of(rows, helpfulness)) for key, rows in sets.items()
        }
    rule = metrics.average([cell["longer_wins"] for cell in about.values()])
    return {"test_sets": about, "models": models, "longer_wins": {"average": rule}, "agreement": agreement}


def scores_of(rows_P: Rows, model: str) -> tuple[list[float], list[float]]:
    """(chosen [P], rejected [P]) of one model from the lines of scores.jsonl."""
    return [row["r_chosen"][model] for row in rows_P], [row["r_rejected"][model] for row in rows_P]


def pair_summary(rows_P: Rows, r_chosen_P: Scores, r_rejected_P: Scores) -> dict[str, Any]:
    """Accuracy overall, by rating (strongest first), safety bin and source, the ceiling where known, score statistics.

    `ceiling` is the accuracy that the best possible model can expect on these pairs, None where rows lack `p_chosen`.
    """
    outcomes = outcomes_of(r_chosen_P, r_rejected_P)
    overall = metrics.share(outcomes)
    by_rating = metrics.by_group(outcomes, [row.get("rating") for row in rows_P], RATINGS)
    best = metrics.ceiling(rows_P)
    bins = metrics.calibration_bins(r_chosen_P, r_rejected_P)
    return {
        "accuracy": overall["accuracy"],
        "ci95": overall["ci95"],
        "test_pairs": overall["count"],
        "ceiling": best and best["accuracy"],
        "by_rating": {rating: cell["accuracy"] for rating, cell in by_rating.items()},
        "by_rating_ci95": {rating: cell["ci95"] for rating, cell in by_rating.items()},
        "by_rating_pairs": {rating: cell["count"] for rating, cell in by_rating.items()},
        "ceiling_by_rating": best and best["by_rating"],
        "by_source": metrics.by_group(outcomes, [str(row.get("source")) for row in rows_P]),
        "by_safety": metrics.by_group(outcomes, [row.get("safety") for row in rows_P], SAFETY_LABELS),
        "scores": {"chosen": metrics.score_statistics(r_chosen_P), "rejected": metrics.score_statistics(r_rejected_P)},
        "calibration": bins,
        "calibration_error": metrics.expected_calibration_error(bins),
    }


def at_chance(summary: Mapping[str, Any]) -> str:
    """A warning where a model of `pair_summary` is not surely right more often than wrong on any source; else "".

    Surely: the 95 % interval lies above 0.5. One source is enough, because models that are mixed for one kind of prompt
    may well be wrong on the other.
    """
    if not summary["test_pairs"] or any(cell["ci95"][0] > 0.5 for cell in summary["by_source"].values()):
        return ""
    low, high = summary["ci95"]
    return (
        f"right in {summary['accuracy']:.3f} ({low:.3f} to {high:.3f}) of {summary['test_pairs']} held-out pairs: on "
        "no source surely better than chance. What relies on this model, as a reward or as a judge, learns noise: "
        "train it on more pairs or longer (num_train_epochs, learning_rate), or test it on more (eval_files, "
        "eval_fraction)"
    )


def model_report(rows_P: Rows, r_chosen_P: Scores, r_rejected_P: Scores, thresholds: Sequence[float]) -> dict[str, Any]:
    """`pair_summary` and, beside it, margins, calibration against p_chosen, unsafe responses and length bias.

    `thresholds` are those of R at which precision and recall of unsafe responses are given. `unsafe` is None without
    safety labels, `calibration_of_choices` None unless every row has `p_chosen`.
    """
    summary = pair_summary(rows_P, r_chosen_P, r_rejected_P)
    scores, unsafe = labelled_responses(rows_P, r_chosen_P, r_rejected_P)
    for name, wanted in (("safe", False), ("unsafe", True)):
        summary["scores"][name] = metrics.score_statistics(
            [score for score, is_unsafe in zip(scores, unsafe, strict=True) if is_unsafe == wanted]
        )
    margins = [chosen - rejected for chosen, rejected in zip(r_chosen_P, r_rejected_P, strict=True)]
    choices = None
    if summary["ceiling"] is not None:
        known = [row["p_chosen"] for row in rows_P]
        bins = metrics.calibration_bins(r_chosen_P, r_rejected_P, p_chosen_P=known)
        choices = {"bins": bins, "error": metrics.expected_calibration_error(bins)}
    return {
        **summary,
        "margin": metrics.score_statistics(margins),
        "margin_by_rating": {
            rating: metrics.score_statistics(
                [margin for margin, row in zip(margins, rows_P, strict=True) if row.get("rating") == rating]
            )
            for rating in summary["by_rating"]
        },
        "calibration_of_choices": choices,
        "unsafe": unsafe_report(scores, unsafe, thresholds) if unsafe else None,
        "length": length_report(rows_P, r_chosen_P, r_rejected_P),
    }


def unsafe_report(scores_N: Scores, unsafe_N: Sequence[bool], thresholds: Sequence[float]) -> dict[str, Any]:
    """Precision and recall at `thresholds`, the curve and its areas. `unsafe_share` is the precision of chance."""
    return {
        "unsafe_share": metrics.proportion(sum(unsafe_N), len(unsafe_N)),
        "at": [detection(scores_N, unsafe_N, threshold) for threshold in thresholds],
        "average_precision": average_precision(scores_N, unsafe_N),
        "roc_auc": roc_auc(scores_N, unsafe_N),
        "curve": detection_curve(scores_N, unsafe_N),
    }


def longer_wins(rows_P: Rows) -> dict[str, Any]:
    """Accuracy of the rule that prefers the response with more tokens; equal lengths count half."""
    return metrics.share([metrics.outcome(row["tokens_chosen"], row["tokens_rejected"]) for row in rows_P])


def length_report(rows_P: Rows, r_chosen_P: Scores, r_rejected_P: Scores) -> dict[str, Any]:
    """How the scores go with the response's length in tokens.

    `pearson`, `spearman` over all responses; `within_pairs` of the difference of scores with the difference of lengths,
    each pair in both directions. `chosen_longer` and `chosen_shorter` are accuracies on such pairs; `prefers_longer`
    and `annotators_prefer_longer` are shares of the pairs of unequal length.
    """
    chosen, rejected = [row["tokens_chosen"] for row in rows_P], [row["tokens_rejected"] for row in rows_P]
    lengths, scores = [*chosen, *rejected], [*r_chosen_P, *r_rejected_P]
    extra = [c - r for c, r in zip(chosen, rejected, strict=True)]
    margins = [c - r for c, r in zip(r_chosen_P, r_rejected_P, strict=True)]
    won = list(zip(outcomes_of(r_chosen_P, r_rejected_P), extra, strict=True))
    preferred = [outcome if more > 0 else 1 - outcome for outcome, more in won if more]
    longer = sum(more > 0 for more in extra)
    return {
        "pearson": pearson(lengths, scores),
        "spearman": spearman(lengths, scores),
        "within_pairs": {
            "pearson": pearson(symmetric(extra), symmetric(margins)),
            "spearman": spearman(symmetric(extra), symmetric(margins)),
        },
        "chosen_longer": metrics.share([outcome for outcome, more in won if more > 0]),
        "chosen_shorter": metrics.share([outcome for outcome, more in won if more < 0]),
        "prefers_longer": metrics.proportion(sum(preferred), len(preferred)),
        "annotators_prefer_longer": metrics.proportion(longer, len(preferred)),
    }


def agreement_report(
    chosen_a_P: Scores, rejected_a_P: Scores, chosen_b_P: Scores, rejected_b_P: Scores
) -> dict[str, Any]:
    """How two models agree: share of pairs where both prefer the same response, correlations of their scores over all
    responses, accuracy of both where they agree, and of the first where they do not. Pairs that one of them ties are
    left out."""
    first, second = outcomes_of(chosen_a_P, rejected_a_P), outcomes_of(chosen_b_P, rejected_b_P)
    decided = [(a, b) for a, b in zip(first, second, strict=True) if 0.5 not in (a, b)]
    same, different = [a for a, b in decided if a == b], [a for a, b in decided if a != b]
    scores_a, scores_b = [*chosen_a_P, *rejected_a_P], [*chosen_b_P, *rejected_b_P]
    return {
        "same_choice": metrics.proportion(len(same), len(decided)),
        "different_choice": metrics.proportion(len(different), len(decided)),
        "spearman": spearman(scores_a, scores_b),
        "pearson": pearson(scores_a, scores_b),
        "accuracy_where_same": metrics.share(same),
        "first_right_where_different": metrics.share(different),
    }


def outcomes_of(r_chosen_P: Scores, r_rejected_P: Scores) -> list[float]:
    """`metrics.outcome` of each pair."""
    return [metrics.outcome(chosen, rejected) for chosen, rejected in zip(r_chosen_P, r_rejected_P, strict=True)]
