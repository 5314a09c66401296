"""How the policies of the rounds compare: figures with intervals, paired differences, families, table and plot [pure].

A round is read from the folder of its evaluation (rlhf/evaluate_policy.py). The unit is the prompt: with several
samples a prompt, their mean. Everything is of samples at temperature 1.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.estimates import mean_with_interval, paired_bootstrap
from rlhf.plots import STYLE

Row = dict[str, Any]
FIGURES = {  # field of responses.jsonl -> title
    "gold_helpfulness": "helpfulness (gold)",
    "gold_safety": "safety (gold)",
    "reward_combined": "reward R_c (raw)",
    "kl_nats": "KL to start, nats",
    "response_tokens": "tokens",
}
OF_REWARD_MODELS = ("reward_combined",)
NOTE = (
    "Means over the prompts at temperature 1, with 95 % intervals; below, the change against the round before on the "
    "same prompts (bootstrap over prompts). Rewards are compared only where the same reward models gave them."
)
LINES = ("#3f87c9", "#e07b39", "#2a9d8f", "#9d66c4", "#8a8f98", "#c05a7a", "#b08900", "#5b6abf", "#7a9a01", "#d1495b",
         "#00798c", "#6d597a")  # fmt: skip


def read_round(folder: Path) -> Row | None:
    """{"rows", "models"} of a finished evaluation: its responses, and which reward models scored them; else None."""
    if not (folder / "summary.json").exists():
        return None
    with (folder / "responses.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    settings = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
    return {"rows": rows, "models": [settings[f"{name}_model_path"] for name in ("helpfulness", "safety")]}


def prompt_means(rows: Sequence[Row], field: str) -> dict[int, float]:
    """Prompt's place -> mean of `field` over its samples, for the prompts that have it."""
    return {i: sum(row[field]) / len(row[field]) for i, row in enumerate(rows) if row.get(field)}


def family_score(row: Row) -> str | None:
    """The field that says how good an answer to this prompt is: gold where there is one, else the reward."""
    return next((name for name in ("gold_helpfulness", "gold_safety", "reward_combined") if row.get(name)), None)


def compare(now: Mapping[str, Any], before: Mapping[str, Any] | None) -> Row:
    """{"figures", "families"}: each {name: {"mean", "ci95", "prompts", and after a round "change", "change_ci95"}}.

    No change is given where the two rounds answered different prompts, and of rewards where the models differ.
    """
    same = before is not None and [r["prompt"] for r in now["rows"]] == [r["prompt"] for r in before["rows"]]
    earlier = before if same else None
    figures: Row = {}
    for name in FIGURES:
        values = prompt_means(now["rows"], name)
        comparable = earlier and (name not in OF_REWARD_MODELS or now["models"] == earlier["models"])
        if values:
            figures[name] = _figure(values, prompt_means(earlier["rows"], name) if earlier and comparable else {})
    families: Row = {}
    for family in sorted({str(row.get("source")) for row in now["rows"]}):
        mine = [i for i, row in enumerate(now["rows"]) if str(row.get("source")) == family]
        scores = {i: family_score(now["rows"][i]) for i in mine}
        if not all(scores.values()) or len(set(scores.values())) > 1:
            continue  # no score, or two kinds of it under one name
        field = str(scores[mine[0]])
        comparable = earlier and (field not in OF_REWARD_MODELS or now["models"] == earlier["models"])
        past = prompt_means(earlier["rows"], field) if earlier and comparable else {}
        values = {i: value for i, value in prompt_means(now["rows"], field).items() if i in scores}
        families[family] = {"score": field} | _figure(values, {i: past[i] for i in values if i in past})
    return {"figures": figures, "families": families}


def _figure(values: Mapping[int, float], past: Mapping[int, float]) -> Row:
    mean, half = mean_with_interval(list(values.values()))
    found: Row = {
        "mean": round(mean, 4),
        "ci95": [round(mean - half, 4), round(mean + half, 4)],
        "prompts": len(values),
    }
    if values.keys() == past.keys():
        change, interval = paired_bootstrap([past[i] for i in values], list(values.values()), draws=4000)
        found |= {"change": round(change, 4), "change_ci95": [round(x, 4) for x in interval]}
    return found


def build(output_dir: Path, rounds: int) -> Row:
    """{"rounds": [...], "students": [...]} of what is evaluated so far: "round", "pool", "pool_by_round", `compare`."""
    found: Row = {"rounds": [], "students": []}
    for kind, name in (("rounds", "evaluate_policy"), ("students", "student_evaluate_policy")):
        before = None
        for number in range(rounds + 1):
            folder = output_dir / f"v{number}"
            now = read_round(folder / name)
            if now is None:
                continue
            pooled = folder / "pool_samples" / "summary.json"
            pool = json.loads(pooled.read_text(encoding="utf-8")) if pooled.exists() else None
            rows = (
                {"pool": pool["rows"], "pool_by_round": [r["kept"] for r in pool["rounds"]]} if pool else {"pool": None}
            )
            found[kind].append({"round": number, **rows, **compare(now, before)})
            before = now
    return found


def label(entry: Mapping[str, Any], student: bool = False) -> str:
    """A round's name: start, V1, V2, ..."""
    name = f"V{entry['round']}" if entry["round"] else "start"
    return f"{name} student" if student else name


def table(summary: Mapping[str, Any], part: str) -> tuple[list[str], list[list[list[str]]]]:
    """(column titles, rows of cells of lines) of `part`, "figures" or "families"; a cell is mean, interval, change."""
    entries = [(label(entry, kind == "students"), entry) for kind in ("rounds", "students") for entry in summary[kind]]
    if part == "figures":
        names = [name for name in FIGURES if any(name in entry["figures"] for _, entry in entries)]
        rows = [
            [[text], [_pool_text(entry)], *(_cell(entry["figures"].get(n)) for n in names)] for text, entry in entries
        ]
        return ["round", "pool", *(FIGURES[name] for name in names)], rows
    families = sorted({name for _, entry in entries for name in entry["families"]})
    rows = [[[name], *(_cell(entry["families"].get(name)) for _, entry in entries)] for name in families]
    return ["family", *(text for text, _ in entries)], rows


def _pool_text(entry: Mapping[str, Any]) -> str:
    if not entry["pool"]:
        return ""
    parts = [str(count) for count in entry["pool_by_round"]]
    return f"{entry['pool']}" + (f" = {' + '.join(parts)}" if len(parts) > 1 else "")


def _cell(figure: Mapping[str, Any] | None) -> list[str]:
    if figure is None:
        return [""]
    lines = [f"{figure['mean']:.3f}", f"{figure['ci95'][0]:.3f} to {figure['ci95'][1]:.3f}"]
    if "change" in figure:
        low, high = figure["change_ci95"]
        lines.append(f"{figure['change']:+.3f} ({low:+.3f} to {high:+.3f})")
    return lines


def markdown(summary: Mapping[str, Any]) -> str:
    """The page report.md; the plot is rounds.png beside it."""
    lines = ["# Rounds of rejection sampling", "", NOTE, "", "![rounds](rounds.png)", ""]
    for part, title in (("figures", "Policies"), ("families", "By family of prompts")):
        titles, rows = table(summary, part)
        if rows:
            lines += [f"## {title}", "", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
            lines += ["| " + " | ".join("<br>".join(cell) for cell in row) + " |" for row in rows] + [""]
    return "\n".join(lines)


def figure(summary: Mapping[str, Any]) -> Figure:
    """Scores over the rounds at the left, families at the right, with 95 % intervals; students dashed."""
    names = [name for name in FIGURES if name not in ("kl_nats", "response_tokens")]
    found = {name for entry in summary["rounds"] for name in entry["figures"]}
    gold = [name for name in names if name in found and name not in OF_REWARD_MODELS] or [
        n for n in names if n in found
    ]
    families = sorted({name for entry in summary["rounds"] for name in entry["families"]})
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(10, 3.8), layout="constrained")
        left, right = drawn.subplots(1, 2)
        for i, name in enumerate(gold):
            _line(left, summary["rounds"], "figures", name, LINES[i], "-", FIGURES[name])
            if summary["students"]:
                _line(left, summary["students"], "figures", name, LINES[i], "--", f"{FIGURES[name]}, student")
        for i, name in enumerate(families):
            _line(right, summary["rounds"], "families", name, LINES[i % len(LINES)], "-", name, 0.03 * i)
        for axis, title in ((left, "All prompts"), (right, "By family of prompts")):
            ticks = [entry["round"] for entry in summary["rounds"]]
            axis.set_xticks(ticks, [label(entry) for entry in summary["rounds"]])
            axis.set(title=title, xlabel="round", ylabel="score")
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7)
    return drawn


def _line(axis: Axes, entries: Sequence[Row], part: str, name: str, colour: str, style: str, text: str,
          shift: float = 0.0) -> None:  # fmt: skip
    """One score by round; `shift` moves it sideways, so that error bars do not hide each other."""
    found = [(entry["round"] + shift, entry[part][name]) for entry in entries if name in entry[part]]
    x, means = [at for at, _ in found], [cell["mean"] for _, cell in found]
    bars = [
        [cell["mean"] - cell["ci95"][0] for _, cell in found],
        [cell["ci95"][1] - cell["mean"] for _, cell in found],
    ]
    axis.errorbar(x, means, yerr=bars, color=colour, linestyle=style, marker="o", markersize=3, linewidth=1.3,
                  capsize=2, label=text)  # fmt: skip
