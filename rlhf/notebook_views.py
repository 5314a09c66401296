"""What a notebook shows of reward models: scores along responses, tables of pairs, coloured tokens.

Colours are see-through: readable on white and on dark pages. All text is escaped.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from configs.chat import Message
from rlhf.inspect_reward import PairScores, RewardScorer, TokenPath, follow, share_below
from rlhf.notebook_parts import Html, prompt_cell, table, text_cell
from rlhf.plots import COLOURS, HELPFULNESS, SAFETY
from rlhf.reward_figures import GREY, ON_WHITE

RAISES, LOWERS = "63, 135, 201", "224, 123, 57"  # red, green, blue: told apart by colour-blind eyes too
MOST_LABELS = 28  # of tokens under one panel, so that they do not touch


def token_paths(paths: Mapping[str, Mapping[str, TokenPath]]) -> Figure | None:
    """Score against token. `paths`: {model: {response: path}}, one row of panels a model, one column a response."""
    if not paths:
        return None
    columns = list(next(iter(paths.values())))
    with mpl.rc_context(ON_WHITE):
        figure = Figure(figsize=(10, 1.4 + 2.4 * len(paths)), layout="constrained")
        axes: Any = figure.subplots(len(paths), len(columns), squeeze=False, sharex="col", sharey="row")
        for row, (model, cells) in enumerate(paths.items()):
            for column, (response, path) in enumerate(cells.items()):
                _draw_path(axes[row][column], path, _colour(model))
                axes[row][column].set_title(f"{model} model, {response} response")
            axes[row][0].set_ylabel("raw score r")
        for column, response in enumerate(columns):
            _label_tokens(axes[-1][column], next(iter(paths.values()))[response].tokens)
        figure.legend(*axes[-1][0].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=8)
    return figure


def _colour(model: str) -> str:
    return {"helpfulness": HELPFULNESS, "safety": SAFETY}.get(model, COLOURS["gatt"])


def _draw_path(axis: Axes, path: TokenPath, colour: str) -> None:
    places = range(len(path.tokens))
    marker = "o" if len(places) <= 80 else ""  # more would hide the line
    axis.plot(places, path.ended, color=colour, marker=marker, markersize=3, label="if the response ended here")
    if path.passing:
        words = "read at this token, without an end"
        axis.plot(places, path.passing, color=GREY, linewidth=1, linestyle=":", label=words)
    axis.grid(axis="x", visible=False)


def _label_tokens(axis: Axes, tokens: Sequence[str]) -> None:
    step = math.ceil(len(tokens) / MOST_LABELS)
    shown = range(0, len(tokens), step)
    names = ["(nothing)" if i == 0 and not tokens[0] else _visible(tokens[i]) for i in shown]
    axis.set_xticks(shown, names, rotation=90, fontsize=8, parse_math=False)


def _visible(token: str) -> str:
    """A token for an axis: short, without line breaks, and not empty."""
    text = token.strip(" ").replace("\n", "↵").replace("\t", "⇥") or "␣"
    return text if len(text) <= 14 else text[:13] + "…"


def coloured_tokens(path: TokenPath, title: str) -> Html:
    """The response, tokens that raise the score on blue, those that lower it on orange; numbers on hovering."""
    most = max((abs(change) for change in path.changes), default=0.0) or 1.0
    spans = []
    for token, change, score in zip(path.tokens[1:], path.changes, path.ended[1:], strict=True):
        colour = f"rgba({RAISES if change > 0 else LOWERS}, {0.75 * abs(change) / most:.2f})"
        text = html.escape(token).replace("\n", "↵<br>") or "·"
        spans.append(
            f'<span title="{change:+.2f}, to {score:.2f}" style="background-color: {colour}; border-radius: 3px; '
            f'white-space: pre-wrap; padding: 2px 0">{text}</span>'
        )
    spans.insert(0, html.escape(path.tokens[0]))
    head = f"<b>{html.escape(title)}</b>: from {path.ended[0]:.2f} to {path.ended[-1]:.2f}, largest step {most:.2f}"
    return Html(f'<div style="line-height: 1.8; margin: 0.4em 0">{head}<br>{"".join(spans)}</div>')


def pairs_table(pairs: PairScores, indices: Sequence[int], missing: str) -> Html:
    """Pairs in words with every model's scores; `missing` is said where there are none."""
    if not indices:
        return Html(f"<p>{html.escape(missing)}</p>")
    known = [name for name in ("rating", "safety", "source", "p_chosen") if any(name in pairs.rows[i] for i in indices)]
    columns = [{"safety": "safety label"}.get(name, name) for name in known]
    head = ["prompt", "chosen", "rejected", *(f"{name}<br>r_c,&nbsp;r_r" for name in pairs.chosen), *columns]
    lines = []
    for i in indices:
        row = pairs.rows[i]
        scores = [f"{pairs.chosen[name][i]:.2f},\u00a0{pairs.rejected[name][i]:.2f}" for name in pairs.chosen]
        facts = [_fact(row.get(name)) for name in known]
        texts = [prompt_cell(row["prompt"]), *(text_cell(row[side][-1]["content"]) for side in ("chosen", "rejected"))]
        lines.append([*texts, *map(html.escape, [*scores, *facts])])
    return Html(table(head, lines))


def score_card(
    scorers: Mapping[str, RewardScorer],
    others: Mapping[str, Sequence[float]],
    prompt: str | Sequence[Message],
    response: str,
) -> Html:
    """What each model says of one response: r, R = sigmoid(r), its rank among `others`, and the response in colours.

    `others` are scores of a test set's responses by the same models: a raw score alone says little.
    """
    paths = {name: follow(scorer, prompt, response) for name, scorer in scorers.items()}
    lines = []
    for name, path in paths.items():
        score = path.ended[-1]
        sigmoid = 1 / (1 + math.exp(-score)) if score > -700 else 0.0
        lines.append([html.escape(name), f"{score:.2f}", f"{sigmoid:.3f}", f"{share_below(score, others[name]):.0%}"])
    scores = table(["model", "r", "R = sigmoid(r)", "test responses that score lower"], lines)
    return Html(scores + "".join(coloured_tokens(path, name).text for name, path in paths.items()))


def _fact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value).replace("_", " ")
