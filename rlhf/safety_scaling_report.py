"""What the scaling of safety data found: a point a share, the table, the plot and the page [pure].

A cell is one training: {"share", "seed", "safety_rows", "rows", "summary"}, the last two as rlhf/evaluate_policy.py
writes them. Scores R are sigmoids of the held-out reward models' raw scores of samples at temperature 1: of the safety
model over the risky prompts, of the helpfulness model over the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from rlhf.estimates import mean_with_interval, share_over_seeds
from rlhf.plots import HELPFULNESS, SAFETY, STYLE
from rlhf.score_tail import QUANTILES, sigmoid

# Figures of evaluate_policy's summary that stand beside the scores, where the world gives true ones.
TRUE = {"unsafe_rate": "unsafe", "false_refusal_rate": "false refusals", "gold_helpfulness": "true helpful"}
NOTE = (
    "Mean scores R by reward models that nothing here was trained against, with 95 % intervals over the prompts; "
    "safety on the risky prompts, helpfulness on the others. The tail is the share of risky prompts' answers below the "
    "threshold. With several seeds: their mean, and after ± the standard deviation over the trainings."
)


def score_matrix(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """R [prompts, samples] by the reward model `name`: safety where a prompt has is_safety, helpfulness elsewhere."""
    mine = [row for row in rows if bool(row["is_safety"]) == (name == "safety")]
    return sigmoid([row[f"reward_{name}"] for row in mine])


def points(cells: Sequence[Mapping[str, Any]], below: float) -> list[dict[str, Any]]:
    """One point a share, in the order of the cells: {"share", "safety_rows", "seeds", "safety", "helpfulness", "tail",
    "quantiles", "true"}.

    A mean's interval is over the prompts, each with the mean of its samples and seeds: the prompts are the same for all
    seeds, so more seeds do not narrow it by much. Likewise the tail's (Wilson's, with the prompts as trials).
    """
    shares: dict[float, list[Mapping[str, Any]]] = {}
    for cell in cells:
        shares.setdefault(cell["share"], []).append(cell)
    found = []
    for share, group in shares.items():
        safety = [score_matrix(cell["rows"], "safety") for cell in group]
        pooled = np.concatenate([scores.ravel() for scores in safety])
        found.append(
            {
                "share": share,
                "safety_rows": sum(cell["safety_rows"] for cell in group) / len(group),
                "seeds": [cell["seed"] for cell in group],
                "safety": _mean(safety),
                "helpfulness": _mean([score_matrix(cell["rows"], "helpfulness") for cell in group]),
                "tail": {"below": below}
                | share_over_seeds([float((scores < below).mean()) for scores in safety], len(safety[0])),
                "quantiles": {f"{q:g}": round(float(np.quantile(pooled, q)), 5) for q in QUANTILES},
                "true": {name: _over_seeds(group, name) for name in TRUE if name in group[0]["summary"]},
            }
        )
    return found


def _mean(matrices: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean, interval over the prompts, and deviation of the trainings' means, of one matrix a seed."""
    mean, half = mean_with_interval(np.concatenate(matrices, axis=1).mean(axis=1))
    means = [float(scores.mean()) for scores in matrices]
    return {
        "mean": round(mean, 5),
        "ci95": [round(max(mean - half, 0.0), 5), round(min(mean + half, 1.0), 5)],
        "sd": round(float(np.std(means, ddof=1)), 5) if len(means) > 1 else None,
    }


def _over_seeds(group: Sequence[Mapping[str, Any]], name: str) -> dict[str, Any]:
    """A figure of the cells' summaries: its mean over the seeds, and the mean of the ends of its intervals, which are
    over the same prompts each time."""
    values = [cell["summary"][name] for cell in group]
    ends = [cell["summary"]["ci95"][name] for cell in group]
    return {
        "mean": round(float(np.mean(values)), 5),
        "ci95": [round(float(end), 5) for end in np.mean(ends, axis=0)],
        "sd": round(float(np.std(values, ddof=1)), 5) if len(values) > 1 else None,
    }


def table(found: Sequence[Mapping[str, Any]], between: str = " ") -> tuple[list[str], list[list[str]]]:
    """(column titles, rows of texts) of `points`; `between` stands between a figure, its deviation and its interval."""
    true = [name for name in TRUE if name in found[0]["true"]]
    tail = f"R_s < {found[0]['tail']['below']:g}"
    titles = ["share", "rows", "safety R", "5 %", tail, "helpful R", *(TRUE[name] for name in true)]
    rows = [
        [
            f"{100 * point['share']:g} %",
            f"{point['safety_rows']:.0f}",
            _figure(point["safety"], between),
            f"{point['quantiles']['0.05']:.3f}",
            _figure(point["tail"], between),
            _figure(point["helpfulness"], between),
            *(_figure(point["true"][name], between) for name in true),
        ]
        for point in found
    ]
    return titles, rows


def _figure(cell: Mapping[str, Any], between: str) -> str:
    deviation = [] if cell["sd"] is None else [f"± {cell['sd']:.3f}"]
    low, high = cell["ci95"]
    return between.join([f"{cell['mean']:.3f}", *deviation, f"({low:.2f}-{high:.2f})"])


def markdown(summary: Mapping[str, Any]) -> str:
    """The page report.md; the plot is safety_scaling.png beside it."""
    titles, rows = table(summary["points"])
    counted = (
        f"{summary['helpful_rows']} helpful dialogues in every training, and a share of {summary['safety_rows']} "
        f"safety dialogues; {summary['left_out_as_held_out']} that answer held-out prompts were left out."
    )
    lines = ["# Safety and helpfulness by share of the safety data", "", "![scores](safety_scaling.png)", "", counted]
    lines += ["", NOTE, "", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, ""])


def figure(found: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]]) -> Figure:
    """Left: both mean scores by share, with intervals. Right: the part of the risky prompts' answers below each R.

    Right, a line is a share, all seeds together: the tail is where it rises at the left.
    """
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(9, 3.8), layout="constrained")
        left, right = drawn.subplots(1, 2)
        places = range(len(found))  # evenly spaced: the shares lie too close together at the left for any scale
        for name, colour in (("safety", SAFETY), ("helpfulness", HELPFULNESS)):
            mean = [point[name]["mean"] for point in found]
            low, high = zip(*(point[name]["ci95"] for point in found), strict=True)
            bars = [np.subtract(mean, low), np.subtract(high, mean)]
            left.errorbar(places, mean, yerr=bars, color=colour, marker="o", markersize=3.5, capsize=2, label=name)
        left.set_xticks(places, [f"{100 * point['share']:g}" for point in found])
        left.set(title="Mean score R", xlabel="safety data, per cent", ylabel="R", ylim=(0, 1))
        left.legend(loc="lower right", fontsize=8)
        shades = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, len(found)))
        for point, shade in zip(found, shades, strict=True):
            mine = [score_matrix(cell["rows"], "safety").ravel() for cell in cells if cell["share"] == point["share"]]
            scores = np.sort(np.concatenate(mine))
            heights = np.arange(1, scores.size + 1) / scores.size
            right.step(scores, heights, where="post", color=shade, linewidth=1.3, label=f"{100 * point['share']:g} %")
        right.set(
            title="Risky prompts' answers below R", xlabel="safety score R", ylabel="share", xlim=(0, 1), ylim=(0, 1)
        )
        right.legend(title="safety data", fontsize=8, loc="upper left")
    return drawn
