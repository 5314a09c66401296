"""Figures of attention to the instruction over a dialogue: maps side by side, and curves by turn [pure]."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from rlhf.attention_maps import Reading
from rlhf.plots import COLOURS, HELPFULNESS
from rlhf.reward_figures import ON_WHITE

LINES = {"before": COLOURS["base"], "after": COLOURS["gatt"]}


def maps(binned: Mapping[str, Tensor], reading: Reading, width: int) -> Figure | None:
    """Fig. 10: one map [S, S] a model, all in one scale; the instruction's columns are framed.

    The ticks of both axes are the turns: where each reply begins. `width`: tokens a bin.
    """
    if not binned:
        return None
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(5 * len(binned) + 0.8, 4.8), layout="constrained")
        axes: Any = figure.subplots(1, len(binned), squeeze=False, sharey=True)[0]
        places = [start / width for start, _ in reading.replies]
        step = max(1, len(places) // 10)
        for axis, (name, map_SS) in zip(axes, binned.items(), strict=True):
            size = len(map_SS)
            image = axis.imshow(
                map_SS.numpy(), cmap="magma", vmin=0, vmax=1, extent=(0, size, size, 0), interpolation="nearest"
            )
            for edge in reading.instruction:
                axis.axvline(edge / width, color=HELPFULNESS, linewidth=1)
            numbers = [str(turn) for turn in range(1, len(places) + 1)]
            axis.set_xticks(places[::step], numbers[::step])
            axis.set_yticks(places[::step], numbers[::step])
            axis.grid(visible=False)
            axis.set(title=f"{name} Ghost Attention", xlabel="attended to: reply of turn")
        axes[0].set_ylabel("attending: reply of turn")
        figure.colorbar(image, ax=list(axes), label="largest attention weight", shrink=0.8)
    return figure


def beginning(strips: Mapping[str, Tensor], reading: Reading, width: int, texts: Sequence[str]) -> Figure | None:
    """The left edge of the maps, a column a token: what each later part of the dialogue attends to in the first turn.

    `strips`: [S, K] a model, `width` queries a bin and one key a column; `texts`: of the K tokens. The first token is
    left out of the colour scale: nearly every head rests on it.
    """
    if not strips:
        return None
    top = max(float(strip[:, 1:].max()) for strip in strips.values())
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(5 * len(strips) + 0.8, 4.8), layout="constrained")
        axes: Any = figure.subplots(1, len(strips), squeeze=False, sharey=True)[0]
        places = [start / width for start, _ in reading.replies]
        step = max(1, len(places) // 10)
        for axis, (name, strip) in zip(axes, strips.items(), strict=True):
            size = (0, strip.shape[1], strip.shape[0], 0)
            image = axis.imshow(
                strip.numpy(), cmap="magma", vmin=0, vmax=top, extent=size, interpolation="nearest", aspect="auto"
            )
            for edge in reading.instruction:
                axis.axvline(edge, color=HELPFULNESS, linewidth=1)
            axis.set_xticks([t + 0.5 for t in range(len(texts))], texts, rotation=90, fontsize=7, parse_math=False)
            axis.set_yticks(places[::step], [str(turn) for turn in range(1, len(places) + 1)][::step])
            axis.grid(visible=False)
            axis.set(title=f"{name} Ghost Attention", xlabel="attended to: tokens of the first turn")
        axes[0].set_ylabel("attending: reply of turn")
        figure.colorbar(image, ax=list(axes), label="largest attention weight", shrink=0.8)
    return figure


def curves(
    panels: Mapping[str, Mapping[str, Mapping[int, tuple[float, float]]]],
) -> Figure | None:
    """Attention by turn. `panels`: {what is attended to: {"before" or "after": `attention_maps.by_turn`}}."""
    if not panels:
        return None
    every = [point for lines in panels.values() for points in lines.values() for point in points.values()]
    top = max((mean + half for mean, half in every), default=1.0)
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(4.6 * len(panels), 3.2), layout="constrained")
        axes: Any = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (target, lines) in zip(axes, panels.items(), strict=True):
            for name, points in lines.items():
                turns, means = list(points), [mean for mean, _ in points.values()]
                axis.plot(turns, means, marker="o", markersize=2.5, color=LINES[name], label=f"{name} Ghost Attention")
                low = [mean - half for mean, half in points.values()]
                high = [mean + half for mean, half in points.values()]
                axis.fill_between(turns, low, high, color=LINES[name], alpha=0.15, linewidth=0)
            axis.set(title=f"to {target}", xlabel="turn of the dialogue", ylim=(0, 1.05 * top))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].set_ylabel("largest attention weight")
        axes[0].legend(loc="best")
    return figure
