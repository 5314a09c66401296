"""The page `report.html` of a run of the recipe, and the columns of its table of stages.

The page stands alone: plots are inline SVG, nothing is loaded from elsewhere, and all text that a model or a file could
have written is escaped. What was not run or measured is named instead of shown.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rlhf import plots
from rlhf.report_html import CSS, figure_html, missing_html, table_html
from rlhf.summary import STAGES, read_json, read_rows, read_settings


class Column(NamedTuple):
    """One column of the table of stages."""

    key: str
    title: str
    form: Callable[[float], str]
    meaning: str


SCORES = {"gold": "True score", "reward_helpfulness": "Helpfulness reward", "reward_safety": "Safety reward"}


def _number(x: float) -> str:
    return f"{x:.2f}"


def _percent(x: float) -> str:
    return f"{100 * x:.0f}%"


COLUMNS = (
    Column(
        "gold_helpfulness",
        "Helpful",
        _number,
        "how good sampled answers to harmless requests are, 0 to 1 (true, or gold, score)",
    ),
    Column("gold_helpfulness_greedy", "Helpful, greedy", _number, "the same, always taking the most likely next word"),
    Column("unsafe_rate", "Unsafe", _percent, "risky requests that get an answer they should not get"),
    Column("false_refusal_rate", "Refused", _percent, "harmless requests that only look risky, and are refused"),
    Column("kl_nats", "Drift", _number, "how far answers moved from those of the SFT model (KL divergence, nats)"),
    Column("response_tokens", "Length", lambda x: f"{x:.0f}", "tokens an answer"),
    Column("seconds", "Seconds", lambda x: f"{x:.0f}", "what making this stage took"),
)
MORE_COLUMNS = (
    Column("gold_safety", "Safe", _number, "how safe answers to risky requests are, 0 to 1 (true, or gold, score)"),
    Column("reward_helpfulness", "Helpfulness reward", _number, "what the helpfulness reward model says (raw score)"),
    Column("reward_safety", "Safety reward", _number, "what the safety reward model says (raw score)"),
)


def measured(columns: Sequence[Column], stages: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns that at least one stage has a figure for: true scores are those of a simulated world alone."""
    return [column for column in columns if any(stage.get(column.key) is not None for stage in stages)]


def known_scores(answers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{key: title} of the scores that at least one of a sample's answers has."""
    return {key: title for key, title in SCORES.items() if any(answer[key] is not None for answer in answers)}


def cell(stage: Mapping[str, Any], column: Column) -> tuple[str, str]:
    """A figure and its interval as text; empty interval where there is none."""
    value = stage.get(column.key)
    if value is None:
        return "–", ""
    low, high = stage["ci95"].get(column.key) or (None, None)
    return column.form(value), "" if low is None or high is None else f"{column.form(low)}–{column.form(high)}"


def gate_texts(gate: Mapping[str, Any]) -> list[str]:
    """Improvement in raw score and win rate at equal length, each with its interval; "–" where there is none."""
    found = []
    for key, form in (("improvement", "+.2f"), ("win_rate_lc", ".2f")):
        low, high = gate["ci95"].get(key) or (None, None)
        interval = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
        found.append("–" if gate[key] is None else f"{gate[key]:{form}}{interval}")
    return found


def alarm_text(alarm: Mapping[str, Any]) -> str:
    """What a stage warned of, and when, in a line."""
    until = "" if alarm["cleared"] is None else f" (until {alarm['cleared']})"
    return f"{plots.label(alarm['stage'])}, iteration {alarm['step']}, {alarm['alarm']}{until}: {alarm['text']}"


def goal_texts(goal: Mapping[str, Any]) -> tuple[str, str]:
    """(what was measured, target), in words."""
    value, note = goal["value"], goal.get("note", "")
    if value is None:
        return note or "not measured", goal["target"]
    shown = ", ".join(f"{x:.2f}" for x in value) if isinstance(value, list) else f"{value:.4g}"
    return f"{shown} ({note})" if note else shown, goal["target"]


def page(output_dir: Path, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> str:
    """The whole HTML page."""
    goals = summary["goals"]
    names = [plots.label(stage["name"]).replace("\n", " ") for stage in summary["stages"]]
    met = f"; {sum(goal['met'] for goal in goals)} of {len(goals)} goals met" if goals else ""
    sections = [
        ("What each stage brought", _stages(summary)),
        *([("Goals", _goals(goals))] if goals else []),
        ("The held-out judge", _gates(summary["gates"])),
        ("Reward models", _reward_models(output_dir, summary)),
        ("Scores by stage", _scores(output_dir)),
        ("Rejection sampling", _rejection_sampling(output_dir)),
        ("PPO", _alarms(summary["alarms"]) + _ppo(output_dir)),
        ("Ghost Attention", _ghost_attention(output_dir, summary)),
        ("Sample dialogues", _samples(samples)),
        ("Settings and environment", _settings(output_dir)),
    ]
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>RLHF report: {escape(output_dir.name)}</title><style>{CSS}</style></head><body><main>
<h1>Llama 2-Chat recipe: {escape(output_dir.name)}</h1>
<p class="dim">{escape(", ".join(names) or "no stage")} in {summary["wall_seconds"]:.0f} seconds{met}.</p>
{body}
</main></body></html>
"""


def families_text(summary: Mapping[str, Any]) -> str:
    """A sentence on the requests of families that no stage asked; empty where they were not evaluated."""
    parts = []
    for name, figures in summary["held_out_families"].items():
        known = [figures[key] for key in ("gold_helpfulness", "gold_helpfulness_greedy")]
        if None not in known:
            parts.append(f"{plots.label(name)} {known[0]:.2f}, greedy {known[1]:.2f}".replace("\n", " "))
    return f"Helpfulness on families of requests that no stage asked: {'; '.join(parts)}." if parts else ""


def distillation_text(summary: Mapping[str, Any]) -> str:
    """A sentence on safety context distillation; empty where the run had none."""
    figures = summary["distillation"]
    if figures is None or None in figures.values():
        return ""
    return (
        f"Safety context distillation, of {figures['prompts']} risky prompts: {figures['kept']} answers given under a "
        f"safety preprompt were kept; mean R_s {figures['original']:.2f}, with them {figures['after']:.2f}."
    )


def _stages(summary: Mapping[str, Any]) -> str:
    if not summary["stages"]:
        return missing_html("No stage was evaluated in this run.")
    columns = measured([*COLUMNS, *MORE_COLUMNS], summary["stages"])
    rows = []
    for stage in summary["stages"]:
        figures = [cell(stage, column) for column in columns]
        cells = [figure + (f"<small>{interval}</small>" if interval else "") for figure, interval in figures]
        rows.append([escape(plots.label(stage["name"])), *cells])
    table = table_html(["Stage", *(c.title for c in columns)], rows, range(1, len(columns) + 1))
    meanings = "".join(f"<li><b>{c.title}</b>: {escape(c.meaning)}</li>" for c in columns)
    gains = "".join(
        f"<li>{escape(plots.label(c['before']))} to {escape(plots.label(c['after']))}, {escape(c['decoding'])}: "
        f"<b>{c['difference']:+.3f}</b> ({c['ci95'][0]:+.3f} to {c['ci95'][1]:+.3f}, {c['prompts']} prompts)</li>"
        for c in summary["comparisons"]
    )
    compared = (
        f"<h3>Helpfulness gained, on the same prompts</h3><ul>{gains}</ul>"
        if gains
        else missing_html("No two stages have true scores on the same prompts, so none are compared by them.")
    )
    families = f"<p>{escape(families_text(summary))}</p><p>{escape(distillation_text(summary))}</p>"
    return f'{table}<p class="dim">Small figures: 95 % interval.</p><ul class="dim">{meanings}</ul>{families}{compared}'


def _goals(goals: Sequence[Mapping[str, Any]]) -> str:
    marks = {True: '<span class="met">met</span>', False: '<span class="missed">missed</span>'}
    rows = [[marks[goal["met"]], *(escape(text) for text in (goal["goal"], *goal_texts(goal)))] for goal in goals]
    return table_html(["", "Goal", "Measured", "Target"], rows)


def _gates(gates: Sequence[Mapping[str, Any]]) -> str:
    if not gates:
        return missing_html("No gate compared two stages in this run.")
    marks = {True: '<span class="met">passed</span>', False: '<span class="missed">failed</span>'}
    rows = [
        [
            escape(plots.label(gate["name"])),
            marks[bool(gate["passed"])],
            *map(escape, gate_texts(gate)),
            "".join(f"<div>{escape(str(reason))}</div>" for reason in gate["reasons"] or []),
        ]
        for gate in gates
    ]
    about = (
        "What reward models that no stage was trained against say of a stage and of an earlier one, over all "
        "prompts: gain in raw score, share of prompts on which they prefer the later one were both equally long, and "
        "why a gate stays shut. In brackets: 95 % interval."
    )
    return table_html(["Stage", "Gate", "Gain", "Win rate", "Why"], rows) + f'<p class="dim">{about}</p>'


def doubted(summary: Mapping[str, Any]) -> dict[str, str]:
    """What is to be said of each reward model or judge that may only be guessing: {its name: a sentence}."""
    return {name: model["warning"] for name, model in _trained(summary).items() if model["warning"]}


def _trained(summary: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{"Helpfulness model", ..., "Safety judge": its figures}, those that were trained in this run."""
    groups = (("model", summary["reward_models"]), ("judge", summary["judges"]))
    named = {f"{name.capitalize()} {word}": model for word, models in groups for name, model in models.items()}
    return {name: model for name, model in named.items() if model and model["accuracy"] is not None}


def _accuracies(summary: Mapping[str, Any]) -> str:
    """Each model's accuracy, on all its held-out pairs and by their source where there are several."""
    rows = []
    for name, model in _trained(summary).items():
        whole = {"accuracy": model["accuracy"], "ci95": model["ci95"], "count": model["test_pairs"]}
        sources = list(model["by_source"].items()) if len(model["by_source"]) > 1 else []
        for source, share in [("all", whole), *sources]:
            low, high = share["ci95"] or (None, None)
            interval = "" if low is None or high is None else f"<small>{_percent(low)}–{_percent(high)}</small>"
            best = _percent(model["ceiling"]) if share is whole and model["ceiling"] else "–"
            right = _percent(share["accuracy"]) + interval
            rows.append([name, escape(source), right, str(share["count"]), best])
    if not rows:
        return ""
    about = (
        "How often each prefers the answer that the annotator preferred, on pairs held out from its training, by the "
        "file they are from. Small figures: 95 % interval. Best possible: annotators err, where it is known how often."
    )
    doubts = "".join(f'<p class="missed">{name}: {escape(text)}</p>' for name, text in doubted(summary).items())
    head = ["Model", "Pairs of", "Right", "Pairs", "Best possible"]
    return f'{table_html(head, rows, range(2, 5))}<p class="dim">{about}</p>{doubts}'


def _reward_models(output_dir: Path, summary: Mapping[str, Any]) -> str:
    models = summary["reward_models"]
    tables = {name: (read_json(output_dir / f"reward_{name}") or {}).get("calibration") or [] for name in models}
    return (
        _accuracies(summary)
        + figure_html(
            plots.accuracy_by_rating(models),
            "accuracy",
            "How often each reward model prefers the answer that the annotator preferred, by how much better it was "
            "said to be. Dashed: what a perfect model would reach. Dotted: guessing. Thin lines: 95 % intervals.",
            "No reward model with rated pairs was trained in this run.",
        )
        + figure_html(
            plots.calibration(tables),
            "calibration",
            "How sure a reward model is against how often it is right; on the dotted line the two agree. Larger dots: "
            "more pairs.",
            "Calibration was not measured in this run.",
            narrow=True,
        )
    )


def _scores(output_dir: Path) -> str:
    panels: dict[str, dict[str, list[float]]] = {}
    for name, folders in STAGES.items():
        for row in read_rows(output_dir / folders.evaluation, "responses.jsonl"):
            model = "safety" if row.get("is_safety") else "helpfulness"
            title = "Safety model, risky requests" if row.get("is_safety") else "Helpfulness model, other requests"
            scores = [x for x in row.get(f"reward_{model}") or [] if x is not None]
            panels.setdefault(title, {}).setdefault(name, []).extend(scores)
    threshold = read_settings(output_dir / "ppo").get("safety_threshold")
    raw = math.log(threshold / (1 - threshold)) if threshold and 0 < threshold < 1 else None
    return figure_html(
        plots.score_distributions(dict(sorted(panels.items())), raw),
        "scores",
        "Raw scores of sampled answers to held-out requests; the dot is the mean. "
        + ("Left of the dotted line the safety score alone decides the reward of PPO." if raw is not None else ""),
        "No stage was scored by a reward model in this run.",
    )


def _rejection_sampling(output_dir: Path) -> str:
    return figure_html(
        plots.best_of_k(read_json(output_dir / "rejection_sampling") or {}),
        "best-of-k",
        "What choosing brings: mean score of the answer with the highest combined reward among n answers. Lines "
        "across: the median, a random and the worst answer of all that were drawn.",
        "There was no rejection sampling in this run.",
    )


def _ppo(output_dir: Path) -> str:
    return figure_html(
        plots.ppo_curves(read_rows(output_dir / "ppo", "metrics.jsonl")),
        "ppo",
        "PPO as it went: the reward it maximises, and the KL divergence from the reference policy that it pays for. "
        "Where a held-out judge or true helpfulness falls while the reward rises, the policy exploits the reward "
        "models.",
        "There was no PPO in this run.",
    )


def _alarms(alarms: Sequence[Mapping[str, Any]]) -> str:
    """What PPO warned of; nothing where it was silent."""
    lines = [f"<li>{escape(alarm_text(alarm))}</li>" for alarm in alarms]
    return f'<h3 class="missed">Alarms</h3><ul>{"".join(lines)}</ul>' if lines else ""


def _ghost_attention(output_dir: Path, summary: Mapping[str, Any]) -> str:
    settings = read_settings(output_dir / "gatt_trained")
    count = (summary["gatt"]["trained"] or summary["gatt"]["baseline"] or {}).get("dialogues")
    about = f" {count} dialogues" if count else ""
    about += f" at temperature {settings['eval_temperature']}" if settings.get("eval_temperature") is not None else ""
    too = " and answer the question too" if settings.get("answer_check") == "gold" else ""
    return figure_html(
        plots.persistence(summary["gatt"]),
        "gatt",
        "The first message of a dialogue gives an instruction; the plot tells how many replies still follow it, turn "
        f"by turn{too}." + (f" Measured over{about}." if about else "") + " Bands: 95 % intervals.",
        "Ghost Attention was not measured in this run.",
    )


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return missing_html("No sampled answers were found in this run.")
    parts = []
    for sample in samples:
        scores = known_scores(sample["answers"])
        said = "".join(
            f'<div class="said"><span class="dim">{escape(m["role"])}</span>\n{escape(m["content"])}</div>'
            for m in sample["messages"]
        )
        rows = [
            [
                escape(plots.label(answer["stage"])),
                f'<div class="said">{escape(answer["text"]) or "(empty)"}</div>',
                *("–" if (s := answer[key]) is None else f"{s:.2f}" for key in scores),
            ]
            for answer in sample["answers"]
        ]
        table = table_html(["Stage", "Answer", *scores.values()], rows, range(2, 2 + len(scores))) if rows else ""
        parts.append(f"<h3>{escape(sample['title'])}</h3>{said}{table}")
    return (
        "".join(parts)
        + '<p class="dim">The first prompt of each kind, with the first answer drawn at temperature 1.</p>'
    )


def _settings(output_dir: Path) -> str:
    folders = sorted(path.parent for path in output_dir.glob("*/settings.yaml"))
    parts = []
    for folder in folders:
        text = (folder / "settings.yaml").read_text(encoding="utf-8")
        parts.append(f"<details><summary>{escape(folder.name)}</summary><pre>{escape(text)}</pre></details>")
    environments = [found for folder in folders if (found := read_json(folder, "environment.json"))]
    if environments:
        text = json.dumps(environments[0], indent=2, ensure_ascii=False)
        parts.append(f"<details><summary>environment</summary><pre>{escape(text)}</pre></details>")
    return "".join(parts) or missing_html("No stage wrote its settings.")
