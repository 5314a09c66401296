"""What a scaling study found, from the summaries of its cells: points, fitted lines, table and plot as Fig. 6 [pure].

A cell is {"model", "parameters", "share", "seed"} and what `rlhf.train_reward.pair_summary` gives of its test pairs.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.records import RATINGS
from rlhf.estimates import share_over_seeds
from rlhf.plots import INK, STYLE

LINES = ("#3f87c9", "#e07b39", "#2a9d8f", "#9d66c4", "#8a8f98", "#c05a7a")
NOTE = (
    "Accuracy in per cent, with the 95 % interval that the number of test pairs leaves (Wilson's). All cells are "
    "tested on the same pairs, so two of them differ more surely than their intervals suggest. With several seeds: the "
    "mean, and after ± the standard deviation over the seeds, which the interval does not contain."
)


def points(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One point a model and share, in the order of the cells: the means over the seeds, overall and by rating.

    {"model", "parameters", "share", "pairs", "seeds", "test_pairs", "overall": {"mean", "ci95", "sd"}, "by_rating":
    {rating: the same}, "ceiling", "ceiling_by_rating"}. `pairs` is the mean number of training pairs.
    """
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["model"], cell["share"]), []).append(cell)
    found = []
    for (model, share), group in groups.items():
        first = group[0]
        found.append(
            {
                "model": model,
                "parameters": first["parameters"],
                "share": share,
                "pairs": math.fsum(cell["train_pairs"] for cell in group) / len(group),
                "seeds": [cell["seed"] for cell in group],
                "test_pairs": first["test_pairs"],
                "overall": share_over_seeds([cell["accuracy"] for cell in group], first["test_pairs"]),
                "by_rating": {
                    rating: share_over_seeds([cell["by_rating"][rating] for cell in group], count)
                    for rating, count in first["by_rating_pairs"].items()
                },
                "ceiling": first["ceiling"],
                "ceiling_by_rating": first["ceiling_by_rating"],
            }
        )
    return found


def log_fit(pairs: Sequence[float], accuracies: Sequence[float]) -> dict[str, float] | None:
    """Least squares of accuracy = intercept + per_doubling * log2(pairs), with the standard error of the slope.

    None for fewer than three different numbers of pairs: two points always lie on a line.
    """
    if len(set(pairs)) < 3:
        return None
    x, y = np.log2(np.asarray(pairs, dtype=np.float64)), np.asarray(accuracies, dtype=np.float64)
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    intercept = float(y.mean() - slope * x.mean())
    residual = y - intercept - slope * x
    error = math.sqrt(float((residual**2).sum()) / (x.size - 2) / float((centred**2).sum()))
    return {"intercept": intercept, "per_doubling": slope, "standard_error": error}


def fits(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{model: {"overall": `log_fit` over all its cells, and the same for the strongest rating where there is one}}."""
    found: dict[str, dict[str, Any]] = {}
    for model in dict.fromkeys(cell["model"] for cell in cells):
        mine = [cell for cell in cells if cell["model"] == model]
        pairs = [cell["train_pairs"] for cell in mine]
        found[model] = {"overall": log_fit(pairs, [cell["accuracy"] for cell in mine])}
        if all(RATINGS[0] in cell["by_rating"] for cell in mine):
            found[model][RATINGS[0]] = log_fit(pairs, [cell["by_rating"][RATINGS[0]] for cell in mine])
    return found


def table(found: Sequence[Mapping[str, Any]], between: str = " ") -> tuple[list[str], list[list[str]]]:
    """(column titles, rows of texts) of `points`, for the terminal and for the page; a last row for the ceiling.

    `between` stands between a model and its size, and between a share, its deviation and its interval.
    """
    ratings = [rating for rating in RATINGS if any(rating in point["by_rating"] for point in found)]
    titles = ["model", "share", "pairs", "all", *(rating.removesuffix("_better") for rating in ratings)]
    rows = [
        [
            f"{point['model']}{between}({size(point['parameters'])})",
            f"{point['share']:g}",
            f"{point['pairs']:.0f}",
            _share(point["overall"], between),
            *(_share(point["by_rating"].get(rating), between) for rating in ratings),
        ]
        for point in found
    ]
    if found and found[0]["ceiling"] is not None:
        best = found[0]["ceiling_by_rating"]
        cells = [f"{100 * best[rating]:.1f}" if rating in best else "-" for rating in ratings]
        rows.append(["best possible", "", "", f"{100 * found[0]['ceiling']:.1f}", *cells])
    return titles, rows


def size(parameters: int) -> str:
    """A number of weights in words: 524544 -> "0.52 M"."""
    billions = parameters >= 1e9
    return f"{parameters / (1e9 if billions else 1e6):.3g} {'B' if billions else 'M'}"


def markdown(summary: Mapping[str, Any]) -> str:
    """The page report.md of a study's summary; the plot is scaling.png beside it."""
    titles, rows = table(summary["points"])
    lines = ["# Reward model accuracy by data and model size", "", "![accuracy](scaling.png)", "", NOTE, ""]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *fit_lines(summary["fits"]), ""]
    return "\n".join(lines)


def fit_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence a model: what a doubling of the data brought over the range studied."""
    lines = []
    for model, by_subset in found.items():
        texts = [
            f"{100 * fit['per_doubling']:+.2f} points (standard error {100 * fit['standard_error']:.2f}) on "
            + ("all pairs" if subset == "overall" else _words(subset))
            for subset, fit in by_subset.items()
            if fit is not None
        ]
        if texts:
            lines.append(f"- {model}: a doubling of the data brought {', '.join(texts)}.")
    return lines


def figure(found: Sequence[Mapping[str, Any]], fitted: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Accuracy over training pairs (log scale), a line a model, 95 % intervals; at its right the strongest rating."""
    strongest = all(RATINGS[0] in point["by_rating"] for point in found)
    panels = [("overall", f"All {found[0]['test_pairs']} test pairs")]
    panels += [(RATINGS[0], _words(RATINGS[0]).capitalize())] if strongest else []
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(9 if strongest else 5, 3.8), layout="constrained")
        axes: list[Axes] = list(drawn.subplots(1, len(panels), squeeze=False)[0])
        for axis, (subset, title) in zip(axes, panels, strict=True):
            for i, model in enumerate(dict.fromkeys(point["model"] for point in found)):
                mine = sorted((p for p in found if p["model"] == model), key=lambda p: p["pairs"])
                _line(axis, mine, subset, LINES[i % len(LINES)], 1 + 0.02 * i)
                if fit := fitted[model].get(subset):
                    ends = np.array([mine[0]["pairs"], mine[-1]["pairs"]])
                    heights = fit["intercept"] + fit["per_doubling"] * np.log2(ends)
                    axis.plot(ends, heights, color=LINES[i % len(LINES)], linestyle=":", linewidth=1)
            ceiling = found[0]["ceiling"] if subset == "overall" else (found[0]["ceiling_by_rating"] or {}).get(subset)
            if ceiling is not None:
                axis.axhline(ceiling, color=INK, linestyle="--", linewidth=1, label="best possible")
            axis.set_xscale("log", base=2)
            ticks = sorted({round(point["pairs"]) for point in found})
            apart = [tick for i, tick in enumerate(ticks) if i == 0 or tick > 1.3 * ticks[i - 1]]
            axis.set_xticks(apart, [f"{tick:,}" for tick in apart])
            axis.minorticks_off()
            axis.set(title=title, xlabel="training pairs (log scale)", ylabel="accuracy")
        axes[0].legend(loc="lower right", fontsize=8)
    return drawn


def _line(axis: Axes, mine: Sequence[Mapping[str, Any]], subset: str, colour: str, shift: float) -> None:
    """One model's points; `shift` moves them sideways by that factor, so that error bars do not hide each other."""
    cells = [point["overall"] if subset == "overall" else point["by_rating"][subset] for point in mine]
    mean, (low, high) = [c["mean"] for c in cells], zip(*(c["ci95"] for c in cells), strict=True)
    bars = [np.subtract(mean, low), np.subtract(high, mean)]
    x = [point["pairs"] * shift for point in mine]
    name = f"{mine[0]['model']} ({size(mine[0]['parameters'])})"
    axis.errorbar(x, mean, yerr=bars, color=colour, marker="o", markersize=3.5, linewidth=1.4, capsize=2, label=name)


def _words(rating: str) -> str:
    return rating.removesuffix("_better") + " better"


def _share(cell: Mapping[str, Any] | None, between: str) -> str:
    if cell is None or cell["mean"] is None:
        return "-"
    deviation = [] if cell["sd"] is None else [f"± {100 * cell['sd']:.1f}"]
    low, high = cell["ci95"]
    return between.join([f"{100 * cell['mean']:.1f}", *deviation, f"({100 * low:.1f}-{100 * high:.1f})"])
