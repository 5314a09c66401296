"""What the notebook of PPO runs shows: curves, reward against KL, samples over time, alarms, time by phase.

Figures have one colour a run and are None where there is nothing to draw; tables are HTML, and all text is escaped.
"""

import html
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.alarms import JUDGES, RULES
from rlhf.inspect_ppo import PPORun, answers, frontier, held_out_prompts, latest, phases, spread
from rlhf.notebook_parts import Html, prompt_cell, table, text_cell
from rlhf.reward_figures import GREY, PALETTE, Draw, grid

RED = "#d4493f"
# Panels of `curves`: title, then (figure, line, label); solid is training, dots are held out, dotted is more of it.
Lines = Sequence[tuple[str, str, str]]
POLICY: dict[str, Lines] = {
    "KL to the reference (nats a response)": [("policy/kl", "-", "training"), ("eval/kl", "o-", "held-out")],
    "Entropy (nats a token)": [("policy/entropy", "-", "training")],
    "Clip fraction": [("policy/clip_fraction", "-", "training")],
    "Explained variance of the values": [("value/explained_variance", "-", "training")],
}
RESPONSES: dict[str, Lines] = {
    "Response length (tokens)": [
        ("response/tokens", "-", "mean"), ("response/tokens_p95", ":", "95th percentile"),
        ("eval/tokens", "o-", "mean, held-out"),
    ],
    "Correlation of reward and length": [
        ("response/length_correlation", "-", "training"), ("eval/length_correlation", "o-", "held-out"),
    ],
    "Share that ended by itself": [("response/stopped", "-", "training"), ("eval/stopped", "o-", "held-out")],
    "Repeated 4-grams": [("response/repetition", "-", "training"), ("eval/repetition", "o-", "held-out")],
    "Share decided by safety": [("reward/safety_decides", "-", "training"), ("eval/safety_decides", "o-", "held-out")],
}  # fmt: skip
NO_MODEL = ("combined", "safety_decides")
LOWEST_EXPLAINED = -1.0  # the first iterations may explain -10 and would hide the rest


def reward_panels(runs: Sequence[PPORun]) -> dict[str, Lines]:
    """The combined reward and one panel for each reward model that was logged."""
    names = {name.removeprefix("reward/") for run in runs for name in run.figures if name.startswith("reward/")}
    models = sorted(name for name in names if not name.endswith("_std") and name not in NO_MODEL)
    titles = {"combined": "Combined reward (raw)"} | {name: f"Reward model: {name} (raw)" for name in models}
    return {
        title: [(f"reward/{name}", "-", "training"), (f"eval/{name}", "o-", "held-out")]
        for name, title in titles.items()
    }


def judge_panels() -> dict[str, Lines]:
    """Those who judge without having a say in training."""
    return {words.capitalize(): [(figure, "o-", "held-out")] for figure, words in JUDGES.items()}


def curves(title: str, runs: Sequence[PPORun], panels: Mapping[str, Lines]) -> Figure | None:
    """Figures over the iterations, a panel each; dotted red: an alarm on that figure was raised."""
    drawn: dict[str, Draw | None] = {}
    for name, lines in panels.items():
        known = [line for line in lines if any(line[0] in run.figures for run in runs)]
        if known:
            drawn[name] = partial(_draw_curves, runs, known)
    return grid(title, {"": drawn}) if drawn else None


def _draw_curves(runs: Sequence[PPORun], lines: Lines, axis: Axes) -> None:
    alarmed = {rule.name for rule in RULES if rule.figure in [figure for figure, _, _ in lines]}
    alarmed |= {f"{name.removeprefix('eval/').removesuffix('_combined')}_falls" for name, _, _ in lines}
    for run, colour in _coloured(runs):
        for figure, style, label in lines:
            steps, values = run.series(figure)
            if not steps:
                continue
            held_out = style == "o-"
            words = label if len(runs) == 1 else f"{run.name}, {label}"
            fade = 0.55 if not held_out and any(other == "o-" for _, other, _ in lines) else 1.0
            axis.plot(steps, values, style, color=colour, markersize=3.5, linewidth=1.3, alpha=fade, label=words)
        for alarm in run.alarms:
            if alarm["alarm"] in alarmed:
                axis.axvline(alarm["step"], color=RED, linestyle=":", linewidth=1.2)
    if lines[0][0] == "value/explained_variance":
        axis.set_ylim(bottom=max(axis.get_ylim()[0], LOWEST_EXPLAINED))
    axis.set_xlabel("iteration")
    if len(runs) > 1 or len(lines) > 1:
        axis.legend(loc="best", fontsize=7)


def _coloured(runs: Sequence[PPORun]) -> list[tuple[PPORun, str]]:
    return [(run, PALETTE[i % len(PALETTE)]) for i, run in enumerate(runs)]


def frontiers(runs: Sequence[PPORun]) -> Figure | None:
    """Reward, and what judges say, against KL; a star on the best checkpoint, small figures are iterations."""
    panels: dict[str, Draw | None] = {}
    for figure, words in {"eval/combined": "combined reward (held-out)", **JUDGES}.items():
        if any(len(frontier(run, figure)) > 1 for run in runs):
            panels[words] = partial(_draw_frontier, runs, figure)
    return grid("Reward against KL (star: best checkpoint)", {"": panels}) if panels else None


def _draw_frontier(runs: Sequence[PPORun], figure: str, axis: Axes) -> None:
    for run, colour in _coloured(runs):
        points = frontier(run, figure)
        if not points:
            continue
        axis.plot([p.kl for p in points], [p.reward for p in points], "o-", color=colour, markersize=3.5, alpha=0.7,
                  linewidth=1, label=run.name)  # fmt: skip
        for step in spread([p.step for p in points], 4):
            point = next(p for p in points if p.step == step)
            axis.annotate(str(step), (point.kl, point.reward), xytext=(4, 4), textcoords="offset points", fontsize=7)
        for point in points:
            if point.step == run.best_step:
                axis.plot(point.kl, point.reward, marker="*", markersize=13, color=colour, linestyle="none")
    axis.set_xlabel("KL (nats a response)")
    if len(runs) > 1:
        axis.legend(loc="best", fontsize=7)


def time_split(runs: Sequence[PPORun]) -> Figure | None:
    """Seconds of each phase, stacked over the iterations; one panel a run."""
    panels: dict[str, Draw | None] = {}
    for run in runs:
        steps, seconds = phases(run)
        if steps:
            panels[run.name] = partial(_draw_time, steps, seconds)
    return grid("Where the time of an iteration goes", {"": panels}) if panels else None


def _draw_time(steps: Sequence[int], seconds: Mapping[str, Sequence[float]], axis: Axes) -> None:
    colours = [PALETTE[i % len(PALETTE)] if name != "other" else GREY for i, name in enumerate(seconds)]
    base = [0.0] * len(steps)
    for (name, values), colour in zip(seconds.items(), colours, strict=True):
        axis.bar(steps, values, bottom=base, width=1.0, color=colour, alpha=0.8, linewidth=0, label=name)
        base = [low + value for low, value in zip(base, values, strict=True)]
    axis.set(xlabel="iteration", ylabel="seconds")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)


def time_table(runs: Sequence[PPORun]) -> Html:
    """Mean seconds and share of each phase, tokens a second, peak memory."""
    lines = []
    for run in runs:
        steps, seconds = phases(run)
        if not steps:
            continue
        total = sum(map(sum, seconds.values()))
        split = ", ".join(f"{name} {sum(v) / len(steps):.2f} s ({sum(v) / total:.0%})" for name, v in seconds.items())
        rates = [_mean(run, f"time/{name}") for name in ("tokens_per_second", "sampled_tokens_per_second")]
        peak = max(run.series("memory/peak_mib")[1], default=None)
        cells = [*rates, "–" if peak is None else f"{peak:,.0f} MiB"]
        lines.append([html.escape(run.name), html.escape(split), *cells])
    head = ["run", "mean seconds of an iteration", "tokens/s, iteration", "tokens/s, sampling", "peak memory"]
    return Html(table(head, lines)) if lines else Html("<p>No iteration is finished yet.</p>")


def _mean(run: PPORun, figure: str) -> str:
    _, values = run.series(figure)
    return f"{sum(values) / len(values):,.0f}" if values else "–"


def alarm_table(runs: Sequence[PPORun]) -> Html:
    """Every alarm, those that last first."""
    found = [(run, alarm) for run in runs for alarm in run.alarms]
    if not found:
        return Html("<p>No alarms.</p>")
    found.sort(key=lambda item: (item[1]["cleared"] is not None, -item[1]["step"]))
    lines = []
    for run, alarm in found:
        until = "lasts" if alarm["cleared"] is None else f"until {alarm['cleared']}"
        lines.append([html.escape(str(x)) for x in (run.name, alarm["step"], until, alarm["alarm"], alarm["text"])])
    return Html(table(["run", "iteration", "", "alarm", "what it means"], lines))


def samples_over_time(runs: Sequence[PPORun], prompts: int = 4, steps: int = 4) -> Html:
    """Held-out answers to the same prompts: one table a prompt, a row a run, a column for each of a few iterations."""
    shown = held_out_prompts(runs)[:prompts]
    if not shown:
        return Html("<p>No held-out samples that all runs share: set eval_prompt_file and num_samples.</p>")
    parts = []
    for prompt in shown:
        by_run = [answers(run, prompt) for run in runs]
        columns = spread([step for found in by_run for step in found], steps)
        lines = [
            [html.escape(run.name), *(_answer(found.get(step)) for step in columns)]
            for run, found in zip(runs, by_run, strict=True)
        ]
        parts.append(
            f"<p>{prompt_cell(prompt)}</p>" + table(["run", *(f"iteration {step}" for step in columns)], lines)
        )
    return Html("".join(parts))


def _answer(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    known = {"reward": row.get("reward_combined"), "KL": row.get("kl_nats")}
    facts = ", ".join(f"{name} {value:.2f}" for name, value in known.items() if value is not None)
    end = "" if row.get("stopped", True) else " …(cut off)"
    return f"{text_cell(row['response'])}{end}<br><small>{html.escape(facts)}</small>"


def latest_samples(runs: Sequence[PPORun], count: int = 4) -> Html:
    """The newest responses to training prompts, with all their scores."""
    lines = []
    for run in runs:
        for row in latest(run, count):
            scores = {name.removeprefix("reward_"): value for name, value in row.items() if name.startswith("reward_")}
            said = "<br>".join(
                f"{html.escape(name)}&nbsp;{value:.2f}" for name, value in scores.items() if value is not None
            )
            where = f"{html.escape(run.name)}<br>iteration {row['step']}"
            lines.append([where, prompt_cell(row["prompt"]), text_cell(row["response"]), said, f"{row['kl_nats']:.2f}"])
    if not lines:
        return Html("<p>No samples yet: they are written every logging_steps iterations.</p>")
    return Html(table(["run", "prompt", "response", "scores", "KL (nats)"], lines))
