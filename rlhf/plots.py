"""The plots of a report as matplotlib figures, and as SVG inside a page that takes on its text colour [pure].

Made without pyplot, so there is no global state and no display. A function returns None where it has nothing to draw.
"""

import html
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#010203"  # a colour nobody picks: text and axes have it until `to_svg` turns it into the page's own text colour
COLOURS = {  # of middling lightness: readable on white and on near-black
    "base": "#8a8f98",
    "sft": "#3f87c9",
    "rejection_sampling": "#2a9d8f",
    "ppo": "#e07b39",
    "gatt": "#9d66c4",
}
HELPFULNESS, SAFETY = "#3f87c9", "#e07b39"
STYLE = {
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",  # letters stay text: small, and can be searched
    "svg.hashsalt": "report",  # the same figures give the same bytes
}


def to_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an `<svg>` element: no XML head, no metadata, no outside address, ids that start with `name`."""
    buffer = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    head, rest = svg.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)  # the page scales it
    svg = f'{head} role="img" aria-label="{html.escape(description)}">{rest}'
    return svg.replace(INK, "currentColor").replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def to_png(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file on white, whatever its own background."""
    with mpl.rc_context(STYLE):
        figure.savefig(path, format="png", dpi=130, facecolor="white", bbox_inches="tight")


def _axes(columns: int, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def score_distributions(
    scores: Mapping[str, Mapping[str, Sequence[float]]], threshold: float | None = None
) -> Figure | None:
    """One ridge a stage and panel. `scores`: {panel title: {stage: raw scores}}; `threshold` marks the safety panel."""
    panels = {title: {name: s for name, s in stages.items() if len(s) > 1} for title, stages in scores.items()}
    panels = {title: stages for title, stages in panels.items() if stages}
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _axes(len(panels), 3.6)
        for axis, (title, stages) in zip(axes, panels.items(), strict=True):
            grid = np.linspace(*_padded(np.concatenate([np.asarray(s) for s in stages.values()])), 140)
            densities = {name: _density(np.asarray(s, dtype=float), grid) for name, s in stages.items()}
            # Cut at three times the lowest peak: a model that always says the same must not flatten the others.
            top = min(max(d.max() for d in densities.values()), 3 * min(d.max() for d in densities.values()))
            for i, (name, density) in enumerate(densities.items()):
                floor, colour = float(len(stages) - 1 - i), COLOURS.get(name, HELPFULNESS)
                ridge = floor + 0.9 * np.minimum(density / top, 1.0)
                axis.fill_between(grid, floor, ridge, color=colour, alpha=0.35, linewidth=0)
                axis.plot(grid, ridge, color=colour, linewidth=1.2)
                axis.plot(np.mean(stages[name]), floor + 0.05, marker="o", color=INK, markersize=3.5, linestyle="none")
            if threshold is not None and title.startswith("Safety"):
                axis.axvline(threshold, color=INK, linestyle=":", linewidth=1)
            axis.set_yticks(range(len(stages)), [label(name) for name in reversed(stages)], va="bottom")
            axis.tick_params(axis="y", length=0)
            axis.set(title=title, xlabel="score (raw)", ylim=(-0.05, len(stages) + 0.1))
            axis.grid(axis="y", visible=False)
    return figure


def label(stage: str) -> str:
    """A stage's name in words."""
    known = {"base": "Base", "sft": "SFT", "rejection_sampling": "Rejection\nsampling", "ppo": "PPO", "gatt": "GAtt"}
    return known.get(stage, stage)


def _padded(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, [0.5, 99.5])
    pad = 0.08 * (high - low) or 0.5
    return float(low - pad), float(high + pad)


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel estimate with Silverman's width, never narrower than one hundredth of the axis."""
    spread = min(values.std(), np.subtract(*np.percentile(values, [75, 25])) / 1.34) or values.std()
    width = max(0.9 * spread * values.size**-0.2, (grid[-1] - grid[0]) / 100)
    kernels = np.exp(-0.5 * ((grid[:, None] - values[None, :]) / width) ** 2)
    return kernels.sum(1) / (values.size * width * np.sqrt(2 * np.pi))


def ppo_curves(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Reward, KL and gold helpfulness, or the held-out judge where there is no gold, over the iterations of
    `ppo/metrics.jsonl`; None where none of them was logged."""
    gold = any(row.get("eval/gold_helpfulness") is not None for row in rows)
    panels = [
        ("Combined reward (raw)", "reward/combined", "eval/combined"),
        ("KL to the reference (nats an answer)", "policy/kl", "eval/kl"),
        ("True helpfulness (gold)", None, "eval/gold_helpfulness")
        if gold
        else ("Held-out judge (raw)", None, "eval/judge_combined"),
    ]
    drawn = [(t, a, b) for t, a, b in panels if any(row.get(k) is not None for row in rows for k in (a, b) if k)]
    if not drawn:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _axes(len(drawn), 3.0)
        for axis, (title, training, held_out) in zip(axes, drawn, strict=True):
            for key, name, colour, marker in (
                (training, "training prompts", COLOURS["base"], ""),
                (held_out, "held-out prompts", COLOURS["ppo"], "."),
            ):
                points = [(row["step"], row[key]) for row in rows if key and row.get(key) is not None]
                if points:
                    axis.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker)
            axis.set(title=title, xlabel="iteration")
        axes[0].legend(loc="best")
    return figure


def best_of_k(summary: Mapping[str, Any]) -> Figure | None:
    """Scores of the best of n answers for n up to K, beside other picks of the K; from rejection sampling's summary."""
    curve = summary.get("best_of_n") or {}
    panels = {
        "combined": "Combined reward (raw)",
        "gold_helpfulness": "True helpfulness (gold)",
        "gold_safety": "True safety (gold)",
    }
    panels = {key: title for key, title in panels.items() if curve.get(key)}
    if not panels:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _axes(len(panels), 3.0)
        for axis, (key, title) in zip(axes, panels.items(), strict=True):
            axis.plot(curve["n"], curve[key], marker=".", color=COLOURS["rejection_sampling"], label="best of n")
            for kind, colour, style in (
                ("median", "#3f87c9", "--"),
                ("random", "#8a8f98", ":"),
                ("worst", "#e07b39", "-."),
            ):
                if (level := (summary.get(kind) or {}).get(key)) is not None:
                    axis.axhline(
                        level, color=colour, linestyle=style, linewidth=1.4, label=f"{kind} of {curve['n'][-1]}"
                    )
            sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n <= curve["n"][-1]]
            axis.set_xscale("log", base=2)
            axis.set_xticks(sizes, [str(n) for n in sizes])
            axis.minorticks_off()
            axis.set(title=title, xlabel="answers to choose from (n)")
        axes[0].legend(loc="best", fontsize=8)
    return figure


def accuracy_by_rating(models: Mapping[str, Mapping[str, Any] | None]) -> Figure | None:
    """Accuracy by rating, strongest first, with intervals and the ceiling; one panel a reward model."""
    shown = {name: model["by_rating"] for name, model in models.items() if model and model.get("by_rating")}
    if not shown:
        return None
    with mpl.rc_context(STYLE):
        figure, axes = _axes(len(shown), 3.0)
        for axis, (name, rows) in zip(axes, shown.items(), strict=True):
            colour = HELPFULNESS if name == "helpfulness" else SAFETY
            rows = [row for row in rows if row["accuracy"] is not None]
            for i, row in enumerate(rows):
                axis.bar(i, row["accuracy"], width=0.6, color=colour, alpha=0.75)
                if row.get("ci95"):
                    axis.vlines(i, *row["ci95"], color=INK, linewidth=1)
                if row.get("ceiling") is not None:
                    best = "best possible" if i == 0 else "_nolegend_"
                    axis.hlines(row["ceiling"], i - 0.42, i + 0.42, color=INK, linestyle="--", label=best)
            axis.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
            words = [row["rating"].replace("_better", "").capitalize() + f"\n({row['n']} pairs)" for row in rows]
            axis.set_xticks(range(len(rows)), words, fontsize=8)
            axis.set(title=f"{name.capitalize()} model", ylim=(0.4, 1.02), ylabel="accuracy")
            axis.grid(axis="x", visible=False)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(loc="upper right")
    return figure


def calibration(tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """How often the reward model is right against how sure it is; `tables` are `calibration` of its summary."""
    tables = {name: filled for name, table in tables.items() if (filled := [cell for cell in table if cell["count"]])}
    if not tables:
        return None
    with mpl.rc_context(STYLE):
        figure, (axis,) = _axes(1, 3.2)
        figure.set_size_inches(4.2, 3.2)
        axis.plot([0.5, 1], [0.5, 1], color=INK, linewidth=0.8, linestyle=":")
        for name, table in tables.items():
            reliability_line(axis, table, HELPFULNESS if name == "helpfulness" else SAFETY, f"{name} model")
        axis.set(xlabel="confidence of the model", ylabel="share of pairs it gets right", xlim=(0.48, 1.02))
        axis.legend(loc="best")
    return figure


def reliability_line(axis: Axes, table: Sequence[Mapping[str, Any]], colour: str, label: str) -> None:
    """Accuracy over confidence for the filled bins of a calibration table; a dot's size grows with its pairs."""
    sure = [cell["confidence_sum"] / cell["count"] for cell in table]
    right = [cell["outcome_sum"] / cell["count"] for cell in table]
    sizes = [8 + 120 * cell["count"] / sum(c["count"] for c in table) for cell in table]
    axis.plot(sure, right, color=colour, linewidth=1.2, label=label)
    axis.scatter(sure, right, s=sizes, color=colour, alpha=0.7, linewidths=0)


def persistence(tables: Mapping[str, Mapping[str, Any] | None]) -> Figure | None:
    """Share of replies that obey the instruction of turn 1, by turn. `tables`: {"baseline", "trained"} of a summary."""
    lines = []
    for name, colour in (("baseline", COLOURS["base"]), ("trained", COLOURS["gatt"])):
        table = tables.get(name)
        if table:
            words = {"baseline": "before Ghost Attention", "trained": "after"}[name]
            lines.append((words, table, colour, "-"))
            if table.get("unseen"):
                lines.append((f"{words}, values never taught", table["unseen"], colour, "--"))
    if not lines:
        return None
    with mpl.rc_context(STYLE):
        figure, (axis,) = _axes(1, 3.2)
        for words, table, colour, style in lines:
            turns = sorted(int(t) for t, share in table.items() if t.isdigit() and share is not None)
            axis.plot(
                turns, [table[str(t)] for t in turns], style, color=colour, marker="o", markersize=2.5, label=words
            )
            bands = [(table.get("ci95") or {}).get(str(t)) for t in turns]
            if bands and all(bands):
                axis.fill_between(turns, *zip(*bands, strict=True), color=colour, alpha=0.13, linewidth=0)
        axis.set(xlabel="turn of the dialogue", ylabel="share obeyed", ylim=(-0.03, 1.03))
        axis.set_xticks(
            range(1, 1 + max((int(t) for _, table, _, _ in lines for t in table if t.isdigit()), default=1))
        )
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
