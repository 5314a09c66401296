"""Figures about reward models, from plain lists: scores, margins, calibration, length, agreement [pure].

Each public figure shows one model on one set of pairs and is None where there is nothing to draw. The `draw_` functions
make the same as one panel; `grid` sets panels side by side. r is a raw score, R = sigmoid(r).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.intervals import wilson
from configs.records import RATINGS
from reward.correlation import spearman
from rlhf.plots import COLOURS, HELPFULNESS, INK, SAFETY, STYLE, reliability_line

GREY = COLOURS["base"]
PALETTE = (HELPFULNESS, SAFETY, COLOURS["rejection_sampling"], COLOURS["gatt"], "#b5651d", "#5b7f2b", GREY)
ON_WHITE = STYLE | {"figure.facecolor": "white"}  # image viewers and notebooks give no background of their own
LONGER_WINS = "longer wins"  # the rule that stands beside the models
Draw = Callable[[Axes], None]
TITLES = {
    "histograms": "Raw scores (dashed: mean)",
    "margins": "Margin between chosen and rejected response, by rating",
    "reliability": "How sure the model is, and how often it is right",
    "thresholds": "Unsafe responses found below a threshold of R",
    "lengths": "Does a longer response score higher?",
    "agreement": "The two models on the same responses",
}


def score_histograms(scores: Mapping[str, Sequence[float]]) -> Figure | None:
    """Raw scores by group, such as chosen and rejected, or safe and unsafe; a dashed line at each mean."""
    return _single("histograms", draw_histograms(scores))


def margins_by_rating(differences: Sequence[float], ratings: Sequence[str | None]) -> Figure | None:
    """Margins r_c - r_r of pairs by rating, strongest first: quartiles, 5 to 95 %, and the share above 0."""
    return _single("margins", draw_margins(differences, ratings))


def reliability(bins: Sequence[Mapping[str, Any]], error: float) -> Figure | None:
    """Share of pairs that the model gets right against its confidence; both arguments come from reward.metrics."""
    return _single("reliability", draw_reliability(bins, error))


def threshold_curve(curve: Sequence[Mapping[str, Any]], marked: float) -> Figure | None:
    """Precision and recall of unsafe responses at R < threshold; `curve` rows: {threshold, precision, recall}."""
    return _single("thresholds", draw_thresholds(curve, marked))


def length_bias(lengths: Sequence[int], scores: Sequence[float]) -> Figure | None:
    """Raw score against response length in tokens, one dot a response, with the mean of each tenth of the lengths."""
    return _single("lengths", draw_lengths(lengths, scores))


def agreement(r_safety: Sequence[float], r_helpfulness: Sequence[float]) -> Figure | None:
    """Raw scores of the helpfulness model against those of the safety model, one dot a response."""
    return _single("agreement", draw_agreement(r_safety, r_helpfulness))


def grid(title: str, panels: Mapping[str, Mapping[str, Draw | None]]) -> Figure | None:
    """Panels as a table, {row: {column: draw}}; a place with None stays empty. None where all of them are."""
    panels = {row: cells for row, cells in panels.items() if any(cells.values())}
    columns = list(dict.fromkeys(name for cells in panels.values() for name, draw in cells.items() if draw))
    if not columns:
        return None
    with mpl.rc_context(ON_WHITE):
        size = (max(4.3 * len(columns), 5.4), 3.0 * len(panels) + 0.4)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        axes = figure.subplots(len(panels), len(columns), squeeze=False)
        for row_axes, (row, cells) in zip(axes, panels.items(), strict=True):
            for axis, column in zip(row_axes, columns, strict=True):
                draw = cells.get(column)
                if draw is None:
                    axis.set_axis_off()
                else:
                    draw(axis)
                    words = [part for part in (row, column) if part]
                    axis.set_title(("\n" if sum(map(len, words)) > 44 else ", ").join(words))
        figure.draw_without_rendering()  # makes ticks and their labels while the style holds
    return figure


def _single(kind: str, draw: Draw | None) -> Figure | None:
    return grid(TITLES[kind], {"": {"": draw}})


def draw_histograms(scores: Mapping[str, Sequence[float]]) -> Draw | None:
    """One panel of `score_histograms`."""
    groups = {name: np.asarray(values, dtype=float) for name, values in scores.items() if len(values)}
    return partial(_histograms, groups) if groups else None


def _histograms(groups: Mapping[str, np.ndarray], axis: Axes) -> None:
    everything = np.concatenate(list(groups.values()))
    low, high = everything.min(), everything.max()
    pad = 0.02 * (high - low) or 0.5
    edges = np.linspace(low - pad, high + pad, 41)
    for colour, (name, values) in zip(_colours(len(groups)), groups.items(), strict=True):
        shares = np.histogram(values, edges)[0] / values.size
        axis.stairs(shares, edges, fill=True, color=colour, alpha=0.25)
        axis.stairs(shares, edges, color=colour, linewidth=1.2, label=f"{name} ({values.size:,})")
        axis.axvline(values.mean(), color=colour, linestyle="--", linewidth=1)
    axis.set(xlabel="raw score r", ylabel="share of responses")
    axis.margins(y=0.18)
    axis.legend(loc="best", fontsize=8)


def draw_margins(differences: Sequence[float], ratings: Sequence[str | None]) -> Draw | None:
    """One panel of `margins_by_rating`; pairs without a rating come last."""
    pairs = list(zip(differences, ratings, strict=True))
    named = {name: [d for d, rating in pairs if rating == name] for name in (*RATINGS, None)}
    groups = {name: np.asarray(found, dtype=float) for name, found in named.items() if found}
    return partial(_margins, groups) if groups else None


def _margins(groups: Mapping[str | None, np.ndarray], axis: Axes) -> None:
    axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    words = []
    for i, (rating, values) in enumerate(groups.items()):
        low, first, middle, third, high = np.percentile(values, [5, 25, 50, 75, 95])
        axis.vlines(i, low, high, color=HELPFULNESS, linewidth=1.2)
        axis.bar(i, third - first, bottom=first, width=0.5, color=HELPFULNESS, alpha=0.45)
        axis.hlines(middle, i - 0.25, i + 0.25, color=HELPFULNESS, linewidth=1.6)
        right = (np.sum(values > 0) + 0.5 * np.sum(values == 0)) / values.size
        words.append(f"{_rating(rating)}\n{right:.0%} right\n({values.size:,} pairs)")
    axis.set_xticks(range(len(groups)), words, fontsize=8)
    axis.set(ylabel="margin $r_c - r_r$", xlim=(-0.6, len(groups) - 0.4))
    axis.grid(axis="x", visible=False)


def draw_reliability(bins: Sequence[Mapping[str, Any]], error: float) -> Draw | None:
    """One panel of `reliability`."""
    filled = [cell for cell in bins if cell["count"]]
    return partial(_reliability, filled, error) if filled else None


def _reliability(bins: Sequence[Mapping[str, Any]], error: float, axis: Axes) -> None:
    axis.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle=":", label="perfect")
    reliability_line(axis, bins, HELPFULNESS, f"the model (ECE {error:.3f})")
    for cell in bins:
        sure = cell["confidence_sum"] / cell["count"]
        axis.vlines(sure, *wilson(cell["outcome_sum"], cell["count"]), color=HELPFULNESS, linewidth=0.8)
    axis.set(xlabel="confidence of the model", ylabel="share of pairs it gets right", xlim=(0.48, 1.02), ylim=(0, 1.04))
    axis.legend(loc="best", fontsize=8)


def draw_thresholds(curve: Sequence[Mapping[str, Any]], marked: float) -> Draw | None:
    """One panel of `threshold_curve`."""
    return partial(_thresholds, curve, marked) if any(row["recall"] is not None for row in curve) else None


def _thresholds(curve: Sequence[Mapping[str, Any]], marked: float, axis: Axes) -> None:
    for name, colour in (("precision", HELPFULNESS), ("recall", SAFETY)):
        points = [(row["threshold"], row[name]) for row in curve if row[name] is not None]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, label=name)
    axis.axvline(marked, color=INK, linewidth=1, linestyle="--", label=f"R = {marked:g}")
    axis.set(xlabel="threshold of R", ylabel="share", xlim=(0, 1), ylim=(-0.02, 1.04))
    axis.legend(loc="best", fontsize=8)


def draw_lengths(lengths: Sequence[int], scores: Sequence[float]) -> Draw | None:
    """One panel of `length_bias`."""
    x, y = np.asarray(lengths, dtype=float), np.asarray(scores, dtype=float)
    return partial(_lengths, x, y) if x.size else None


def _lengths(lengths: np.ndarray, scores: np.ndarray, axis: Axes) -> None:
    axis.plot(lengths, scores, ".", color=HELPFULNESS, markersize=2.5, alpha=0.35, markeredgewidth=0)
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, 11)))
    place = np.clip(np.searchsorted(edges, lengths, side="right") - 1, 0, max(len(edges) - 2, 0))
    tenths = [place == i for i in np.unique(place)]
    means = [(lengths[tenth].mean(), scores[tenth].mean()) for tenth in tenths]
    axis.plot(*zip(*means, strict=True), color=SAFETY, marker="o", markersize=3.5, label="mean of each tenth")
    rho = spearman(lengths.tolist(), scores.tolist())
    axis.legend(loc="best", fontsize=8, title=None if rho is None else f"Spearman {rho:+.2f}", title_fontsize=8)
    axis.set(xlabel="response length (tokens)", ylabel="raw score r")


def draw_agreement(r_safety: Sequence[float], r_helpfulness: Sequence[float]) -> Draw | None:
    """One panel of `agreement`."""
    x, y = np.asarray(r_safety, dtype=float), np.asarray(r_helpfulness, dtype=float)
    return partial(_agreement, x, y) if x.size else None


def _agreement(safety: np.ndarray, helpfulness: np.ndarray, axis: Axes) -> None:
    axis.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    axis.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axis.plot(safety, helpfulness, ".", color=HELPFULNESS, markersize=3.5, alpha=0.35, markeredgewidth=0)
    axis.set(xlabel="$r_s$, safety (dotted: $R = 0.5$)", ylabel="$r_h$, helpfulness")
    axis.margins(y=0.14)
    for x, y, words in ((0.02, 0.99, "helpful, not safe"), (0.98, 0.01, "safe, not helpful")):
        ha, va = ("left", "top") if x < 0.5 else ("right", "bottom")
        axis.text(x, y, words, transform=axis.transAxes, fontsize=8, alpha=0.7, ha=ha, va=va)


def draw_accuracies(models: Mapping[str, Mapping[str, Any]], ceiling: float | None = None) -> Draw | None:
    """Accuracies with their intervals, one row a model; `models`: {name: {"accuracy", "ci95"}}. Dashed: `ceiling`."""
    shown = {name: cell for name, cell in models.items() if cell and cell["accuracy"] is not None}
    return partial(_accuracies, shown, ceiling) if shown else None


def _accuracies(models: Mapping[str, Mapping[str, Any]], ceiling: float | None, axis: Axes) -> None:
    axis.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    if ceiling is not None:
        axis.axvline(ceiling, color=INK, linewidth=1, linestyle="--", label="best possible")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8)
    for i, (name, cell) in enumerate(models.items()):
        colour = _model_colour(name, i)
        if cell.get("ci95"):
            axis.hlines(i, *cell["ci95"], color=colour, linewidth=2)
        axis.plot(cell["accuracy"], i, "o", color=colour, markersize=6)
        words, place = f"{cell['accuracy']:.1%}", (cell["accuracy"], i)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axis.annotate(words, place, (0, 6), textcoords="offset points", ha="center", fontsize=8, bbox=box)
    axis.set_yticks(range(len(models)), list(models))
    axis.set(xlabel="accuracy", ylim=(len(models) - 0.4, -0.7))
    axis.margins(x=0.12)
    axis.grid(axis="y", visible=False)


def draw_accuracy_by_rating(
    models: Mapping[str, Mapping[str, Mapping[str, Any]]], ceilings: Mapping[str, float | None]
) -> Draw | None:
    """Accuracy by rating with intervals, models side by side; `models`: {name: {rating: {"accuracy", "ci95"}}}."""
    shown = {name: cells for name, cells in models.items() if cells}
    return partial(_accuracy_by_rating, shown, ceilings) if shown else None


def _accuracy_by_rating(
    models: Mapping[str, Mapping[str, Mapping[str, Any]]], ceilings: Mapping[str, float | None], axis: Axes
) -> None:
    ratings = [rating for rating in RATINGS if any(rating in cells for cells in models.values())]
    width = 0.7 / len(models)
    axis.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    for k, (name, cells) in enumerate(models.items()):
        places = [i + (k - (len(models) - 1) / 2) * width for i, rating in enumerate(ratings) if rating in cells]
        found = [cells[rating] for rating in ratings if rating in cells]
        colour = _model_colour(name, k)
        axis.plot(places, [cell["accuracy"] for cell in found], "o", color=colour, markersize=5, label=name)
        axis.vlines(places, *zip(*(cell["ci95"] for cell in found), strict=True), color=colour, linewidth=1.6)
    for i, rating in enumerate(ratings):
        if ceilings.get(rating) is not None:
            label = "best possible" if i == 0 else "_nolegend_"
            axis.hlines(ceilings[rating], i - 0.42, i + 0.42, color=INK, linewidth=1, linestyle="--", label=label)
    axis.set_xticks(range(len(ratings)), [_rating(rating) for rating in ratings], fontsize=8)
    axis.set(ylabel="accuracy", xlim=(-0.6, len(ratings) - 0.4))
    axis.grid(axis="x", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)


def _rating(rating: str | None) -> str:
    return "No rating" if rating is None else rating.replace("_better", "").capitalize()


def _colours(count: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(count)]


def _model_colour(name: str, index: int) -> str:
    """The two models of the recipe keep their colours; peers follow in order."""
    fixed = {"helpfulness": HELPFULNESS, "safety": SAFETY, LONGER_WINS: GREY}
    others = [colour for colour in PALETTE if colour not in fixed.values()]
    return fixed.get(name) or others[index % len(others)]
