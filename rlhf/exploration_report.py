"""Tables, sentences and plots of an exploration, from the figures and curves of `rlhf.exploration.analyse` [pure]."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.plots import COLOURS, INK
from rlhf.reward_figures import ON_WHITE
from rlhf.reward_tables import Cell, ResultTable
from rlhf.selection import best_of_n_kl

Json = Mapping[str, Any]
BEST, MEDIAN = COLOURS["rejection_sampling"], COLOURS["base"]
REWARD = "combined reward r (raw)"
GOLD = "true score (gold)"


def tables(figures: Json) -> list[ResultTable]:
    """The expected maximum by temperature and n, its costs, and the gold scores where there are."""
    by_t, sizes = figures["temperatures"], shown_sizes(figures["samples_per_prompt"])
    last = str(figures["samples_per_prompt"])
    rows = [([t], [*(_cell(run["best"]["combined"][str(n)]) for n in sizes), _cell(run["median"]["combined"][last])])
            for t, run in by_t.items()]  # fmt: skip
    note = (
        "Combined reward r (raw) of the best of n, mean over prompts with its 95 % interval. The intervals hold what "
        "differs between prompts; two temperatures are compared on the same prompts, so more surely than they suggest."
    )
    columns = [*(f"best of {n}" for n in sizes), f"median of {last}"]
    made = [ResultTable("Expected maximum reward", ["temperature"], columns, rows, note)]
    rows = [
        ([t], [(f"{run['tokens_per_response']:.1f}", ""), (f"{1000 * run['seconds_per_response']:.1f}", ""),
               *((f"{100 * run[name]:.1f}", "") for name in ("finished", "usable", "distinct")),
               (f"{100 * run['prompts_with_none_to_keep']:.1f}", "")])
        for t, run in by_t.items()
    ]  # fmt: skip
    columns = ["tokens", "ms", "finished %", "usable %", "distinct %", "prompts with none to keep %"]
    note = "Tokens and time (sampling and scoring) a response: times K is the cost of a prompt."
    made.append(ResultTable("What a response costs, and what it is", ["temperature"], columns, rows, note))
    if all("gold_peak" in run for run in by_t.values()):
        rows = [([t], [*(_cell(run["best"]["gold"][str(n)], 3) for n in sizes), (str(run["gold_peak"]["n"]), ""),
                       _cell(run["gold_peak"]["loss_to_all"], 3)]) for t, run in by_t.items()]  # fmt: skip
        note = (
            f"The simulated world's true score of the response that best-of-n picks. Loss: from the highest point to "
            f"n = {last}, each half of the prompts judged where the other half has its highest point; an interval "
            "above 0 is over-optimisation."
        )
        columns = [*(f"best of {n}" for n in sizes), "highest at n", "loss from there"]
        made.append(ResultTable("True score (gold)", ["temperature"], columns, rows, note))
    return made


def shown_sizes(samples: int) -> list[int]:
    """Powers of four up to N, and N."""
    return sorted({4**i for i in range(samples.bit_length()) if 4**i <= samples} | {samples})


def sentences(figures: Json) -> list[str]:
    """The recommendation in words, with what it rests on."""
    advice, samples = figures["recommendation"], figures["samples_per_prompt"]
    k, t = advice["k"], f"{advice['temperature']:g}"
    lines = [f"Recommended: K = {k} at temperature {t}."]
    steps = {step["from"]: step for step in advice["doublings"]}
    if advice["enough"]:
        lines.append(
            f"From K = {k} on, no doubling gains more than {advice['threshold']:.3g} (`min_gain` standard deviations "
            f"of the scores of one prompt); the next one gains {_estimate(steps[k]['gain'])}."
        )
    else:
        gained = f"; the last doubling gained {_estimate(steps[k // 2]['gain'])}" if k > 1 else ""
        lines.append(
            f"That is the largest K looked at{gained}, above the threshold of {advice['threshold']:.3g}: a larger one "
            "may be worth its cost."
        )
    if advice["as_good"]:
        lower = advice["temperature"] < advice["highest"]
        lines.append(
            f"No clear winner among the temperatures: at K = {k} the expected maximum is highest at "
            f"{advice['highest']:g}, from which {' and '.join(advice['as_good'])} cannot be told (95 % intervals of "
            f"the differences on the same prompts){'; recommended is the lower one' if lower else ''}."
        )
    elif advice["clear_winner"]:
        nearest = min(advice["behind_the_best"].items(), key=lambda item: item[1]["mean"])
        lines.append(f"The next best temperature, {nearest[0]}, is behind by {_estimate(nearest[1])}.")
    best = ", ".join(f"{temp:g} (K = {n})" for n, temp in advice["best_temperature_by_k"].items())
    lines.append(f"Temperature of the highest expected maximum: {best}.")
    run = figures["temperatures"][t]
    lines.append(
        f"Cost of a prompt at that K: {k * run['tokens_per_response']:.0f} generated tokens, "
        f"{k * run['seconds_per_response']:.3g} s here. KL of best-of-{k} to the policy at that temperature: at most "
        f"{best_of_n_kl(k):.2f} nats."
    )
    if left_out := figures.get("prompts_left_out"):
        lines.append(f"{left_out} prompts are left out, because not every run has samples of them.")
    if "gold_peak" in run:
        peak = run["gold_peak"]
        found = "over-optimised" if peak["over_optimised"] else "no over-optimisation seen"
        lines.append(
            f"True score at that temperature: highest at n = {peak['n']} of {samples}; from there to n = {samples} it "
            f"loses {_estimate(peak['loss_to_all'])}: {found}."
        )
        top, there = max(figures["temperatures"].items(), key=lambda item: item[1]["gold_peak"]["gold"]["mean"])
        lines.append(
            f"Highest true score of all: {there['gold_peak']['gold']['mean']:.3f}, at temperature {top} and "
            f"n = {there['gold_peak']['n']}; as recommended: {run['best']['gold'][str(k)]['mean']:.3f}."
        )
    return lines


def reward_figure(curves: Sequence[Json], chosen: float) -> Figure:
    """Left, as Fig. 7: expected maximum and median by n at the recommended temperature. Middle, as Fig. 8: the maximum
    by n, a line a temperature. Right: the same by temperature, a line an n, with the highest point of each marked."""
    with mpl.rc_context(ON_WHITE):
        figure, (left, middle, right) = _panels(3)
        for run in (run for run in curves if run["temperature"] == chosen):
            best, median = run["best"]["combined"], run["median"]["combined"]
            left.fill_between(
                range(1, len(best["mean"]) + 1), median["mean"], best["mean"], color=BEST, alpha=0.08, linewidth=0
            )
            _banded(left, best, BEST, "maximum of n")
            _banded(left, median, MEDIAN, "median of n")
        left.set(title=f"Maximum and median at T = {chosen:g}", ylabel=REWARD)
        left.legend(loc="upper left", fontsize=8)
        _by_temperature(middle, curves, "combined")
        middle.set(title="Expected maximum, by temperature")
        for axis in (left, middle):
            _n_axis(axis, len(curves[0]["best"]["combined"]["mean"]))
        temperatures = [run["temperature"] for run in curves]
        sizes = shown_sizes(len(curves[0]["best"]["combined"]["mean"]))
        step = 0.06 * min(np.diff(temperatures), default=1.0)  # lines side by side: bars must not hide each other
        for i, (colour, n) in enumerate(zip(_colours(len(sizes)), sizes, strict=True)):
            shifted = np.array(temperatures) + (i - (len(sizes) - 1) / 2) * step
            points = [{key: values[n - 1] for key, values in run["best"]["combined"].items()} for run in curves]
            means = [point["mean"] for point in points]
            bars = [[p["mean"] - p["low"] for p in points], [p["high"] - p["mean"] for p in points]]
            right.errorbar(shifted, means, yerr=bars, color=colour, linewidth=1.3, capsize=2, label=f"n = {n}")
            top = int(np.argmax(means))
            right.plot(shifted[top], means[top], marker="o", markersize=6, color=colour, linestyle="none")
        right.set(title="The best temperature for each n (dot)", xlabel="temperature")
        right.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
        right.margins(y=0.2)
        right.legend(loc="best", fontsize=8, ncols=2)
    return figure


def cost_figure(curves: Sequence[Json], figures: Json) -> Figure:
    """Expected maximum over the generated tokens a prompt; a line a temperature, the recommended K and T marked."""
    advice = figures["recommendation"]
    with mpl.rc_context(ON_WHITE):
        figure, (axis,) = _panels(1)
        for colour, run in zip(_colours(len(curves)), curves, strict=True):
            means = run["best"]["combined"]["mean"]
            each = figures["temperatures"][f"{run['temperature']:g}"]["tokens_per_response"]
            axis.plot(each * np.arange(1, len(means) + 1), means, color=colour, label=f"T = {run['temperature']:g}")
        k, each = advice["k"], figures["temperatures"][f"{advice['temperature']:g}"]["tokens_per_response"]
        height = next(run["best"]["combined"]["mean"][k - 1] for run in curves
                      if run["temperature"] == advice["temperature"])  # fmt: skip
        axis.plot(k * each, height, marker="o", markersize=8, markerfacecolor="none", color=INK, linestyle="none",
                  label=f"recommended: K = {k}")  # fmt: skip
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        ticks = [digit * 10**power for power in range(9) for digit in (1, 2, 5) if low <= digit * 10**power <= high]
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
        axis.set(title="Reward against cost", xlabel="generated tokens a prompt (log scale)", ylabel=REWARD)
        axis.legend(loc="lower right", fontsize=8)
    return figure


def gold_figure(curves: Sequence[Json]) -> Figure | None:
    """Left: gold score by n, highest points marked. Right: gold against the reward it was picked by, n growing along
    the line, a dot at each power of four: where a line turns down, the reward is over-optimised. None without gold."""
    if not all("gold" in run["best"] for run in curves):
        return None
    with mpl.rc_context(ON_WHITE):
        figure, (left, right) = _panels(2)
        _by_temperature(left, curves, "gold")
        for colour, run in zip(_colours(len(curves)), curves, strict=True):
            gold, proxy = run["best"]["gold"]["mean"], run["best"]["combined"]["mean"]
            peak = int(np.argmax(gold))
            left.plot(peak + 1, gold[peak], marker="o", markersize=6, color=colour, linestyle="none")
            right.plot(proxy, gold, color=colour, linewidth=1.4)
            dots = [n - 1 for n in shown_sizes(len(gold))]
            right.plot(proxy[dots], gold[dots], marker=".", color=colour, linestyle="none")
        _n_axis(left, len(curves[0]["best"]["gold"]["mean"]))
        left.set(title="True score of the best of n (dot: highest)", ylabel=GOLD)
        right.set(title="True score against reward as n grows", xlabel=f"expected maximum, {REWARD}", ylabel=GOLD)
    return figure


def _panels(columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(max(4.3 * columns, 5.4), 3.8), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _colours(count: int) -> list[Any]:
    """From dark violet to orange: temperatures and n have an order. The yellow end is too pale on white."""
    return [mpl.colormaps["plasma"](x) for x in np.linspace(0, 0.82, count)]


def _banded(axis: Axes, curve: Json, colour: Any, label: str, band: bool = True) -> None:
    n = range(1, len(curve["mean"]) + 1)
    axis.plot(n, curve["mean"], color=colour, linewidth=1.4, label=label)
    if band:
        axis.fill_between(n, curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0)


def _by_temperature(axis: Axes, curves: Sequence[Json], score: str) -> None:
    for colour, run in zip(_colours(len(curves)), curves, strict=True):
        # Bands of more than three lines hide each other; the tables have every interval.
        _banded(axis, run["best"][score], colour, f"T = {run['temperature']:g}", band=len(curves) <= 3)
    axis.legend(loc="best", fontsize=8)


def _n_axis(axis: Axes, samples: int) -> None:
    """n on a log scale, and on top the bound on KL that belongs to each n."""
    ticks = shown_sizes(samples)
    ticks = [n for i, n in enumerate(ticks) if i == len(ticks) - 1 or ticks[-1] >= 1.6 * n]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(n) for n in ticks])
    axis.minorticks_off()
    axis.set_xlabel("n")
    top = axis.secondary_xaxis("top")
    top.set_xticks(ticks, [f"{best_of_n_kl(n):.1f}" for n in ticks])
    top.minorticks_off()
    top.set_xlabel("KL to the policy, at most (nats)", fontsize=8)
    top.tick_params(labelsize=8)


def _cell(estimate: Json, digits: int = 2) -> Cell:
    return f"{estimate['mean']:.{digits}f}", f"({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"


def _estimate(estimate: Json) -> str:
    return f"{estimate['mean']:.3g} (95 %: {estimate['low']:.3g} to {estimate['high']:.3g})"
