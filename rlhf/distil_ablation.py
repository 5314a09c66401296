"""What the gate of safety context distillation is for: the report of a pipeline that distils in several ways.

For a pipeline whose stages `distil_<name>` and `evaluate_<name>` are the distillation and the evaluation of the policy
trained on it; `evaluate_start` is of the policy before (configs/distil_demo.yaml). Writes report.md and summary.json.

What a gate avoids is a difference over the same prompts: each gated policy less the one that was distilled without a
gate (`ungated`; `ungated_all` for names that end in `_all`), by a paired bootstrap.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlhf.estimates import paired_bootstrap
from rlhf.report import WIDTH
from rlhf.run import write_atomic
from rlhf.simulation.annotator import SAFE_FROM
from rlhf.simulation.world import is_refusal

FIGURES = {
    "unsafe_rate": "unsafe",
    "false_refusal_rate": "false refusals",
    "gold_helpfulness": "helpfulness",
    "kl_nats": "KL, nats",
}
NOTE = (
    "Each policy is the one before, fine-tuned on what was distilled and on the same ordinary dialogues. helpful: how "
    "many of the kept answers are to harmless requests; unsafe: share of risky requests answered unsafely; false "
    "refusals: share of harmless requests that look risky and were declined; helpfulness: the true score over the "
    "harmless requests; KL to the policy before. 95 % intervals over the prompts."
)
PAIRED_NOTE = "Less the same distillation without a gate, over the same prompts (paired bootstrap, 95 %)."
START = "start"
UNGATED, ALL = "ungated", "_all"


def write(output_dir: Path, wall_seconds: float, console: Console) -> dict[str, Any]:
    """Writes both files into the folder of a finished pipeline, prints the table; returns the summary."""
    summary: dict[str, Any] = {"stage": "distil_ablation", "wall_seconds": wall_seconds, "policies": gather(output_dir)}
    summary["less_ungated"] = less_ungated(output_dir, [entry["policy"] for entry in summary["policies"]])
    write_atomic(output_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    titles, rows = table(summary["policies"])
    page = ["# Safety context distillation with and without its gate", "", NOTE, "", "| " + " | ".join(titles) + " |"]
    page += [
        "|" + "---|" * len(titles),
        *("| " + " | ".join(" ".join(cell) for cell in row) + " |" for row in rows),
        "",
        PAIRED_NOTE,
        "",
        "| " + " | ".join(["policy", *PAIRED.values()]) + " |",
        "|" + "---|" * (1 + len(PAIRED)),
        *("| " + " | ".join(row) + " |" for row in difference_rows(summary["less_ungated"])),
        "",
    ]
    write_atomic(output_dir / "report.md", "\n".join(page))
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    drawn = Table(box=box.SIMPLE_HEAD, title="Safety context distillation", title_justify="left", padding=(0, 1),
                  collapse_padding=True)  # fmt: skip
    for i, title in enumerate(titles):
        drawn.add_column(title, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*("\n".join(cell) for cell in row))
    console.print(drawn)
    console.print(NOTE, markup=False)
    if summary["less_ungated"]:
        console.print(PAIRED_NOTE, markup=False)
    for policy, *cells in difference_rows(summary["less_ungated"]):
        shown = ", ".join(f"{name} {cell}" for name, cell in zip(PAIRED.values(), cells, strict=True))
        console.print(f"  {policy}: {shown}", markup=False)
    return summary


def gather(output_dir: Path) -> list[dict[str, Any]]:
    """One entry a policy, the start first: {"policy", "gate", "helpful_prompts", "kept", "kept_helpful", and of each
    figure {"mean", "ci95"}}. Stages that are not there are left out."""
    names = sorted(path.name.removeprefix("evaluate_") for path in output_dir.glob("evaluate_*"))
    found = []
    for name in sorted(names, key=lambda name: name != START):
        evaluated = _summary(output_dir / f"evaluate_{name}")
        distilled = _summary(output_dir / f"distil_{name}")
        if evaluated is None or (distilled is None and name != START):
            continue
        entry: dict[str, Any] = {"policy": name}
        entry |= {key: (distilled or {}).get(key) for key in ("prompts", "kept", "kept_helpful")}
        for figure in FIGURES:
            if figure in evaluated:
                entry[figure] = {"mean": evaluated[figure], "ci95": evaluated["ci95"][figure]}
        found.append(entry)
    return found


PAIRED = {"unsafe_rate": "unsafe", "false_refusal_rate": "false refusals"}


def less_ungated(output_dir: Path, policies: Sequence[str]) -> list[dict[str, Any]]:
    """For each gated policy {"policy", "ungated", and of each figure of `PAIRED` {"difference", "ci95"}}."""
    found = []
    for name in policies:
        ungated = UNGATED + (ALL if name.endswith(ALL) else "")
        if name in (START, ungated) or ungated not in policies:
            continue
        theirs, mine = (_by_prompt(output_dir / f"evaluate_{policy}") for policy in (ungated, name))
        entry: dict[str, Any] = {"policy": name, "ungated": ungated}
        for figure in PAIRED:
            if mine[figure] and mine[figure].keys() == theirs[figure].keys():
                before, after = ([values[figure][key] for key in mine[figure]] for values in (theirs, mine))
                difference, interval = paired_bootstrap(before, after)
                entry[figure] = {"difference": round(difference, 4), "ci95": [round(x, 4) for x in interval]}
        found.append(entry)
    return found


def _by_prompt(folder: Path) -> dict[str, dict[str, float]]:
    """Of each figure of `PAIRED` {prompt: share of its samples}, over the prompts that it is defined on."""
    shares: dict[str, dict[str, float]] = {figure: {} for figure in PAIRED}
    path = folder / "responses.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        row = json.loads(line)
        marks = {
            "unsafe_rate": [score < SAFE_FROM for score in row.get("gold_safety", [])],
            "false_refusal_rate": [is_refusal(text) for text in row["responses"] if row.get("kind") == "scary"],
        }
        for figure, values in marks.items():
            if values:
                shares[figure][json.dumps(row["prompt"])] = sum(values) / len(values)
    return shares


def difference_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of a table: the policy, and each difference with its interval."""
    return [
        [
            entry["policy"],
            *(
                "{:+.3f} ({:+.3f} to {:+.3f})".format(entry[f]["difference"], *entry[f]["ci95"]) if f in entry else "-"
                for f in PAIRED
            ),
        ]
        for entry in found
    ]


def _summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def table(policies: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[list[str]]]]:
    """(column titles, rows of cells); a cell is a figure and, below it, its interval."""
    figures = [name for name in FIGURES if any(name in policy for policy in policies)]
    titles = ["policy", "kept", "helpful", *(FIGURES[name] for name in figures)]
    rows = []
    for policy in policies:
        counts = ["-" if policy[key] is None else str(policy[key]) for key in ("kept", "kept_helpful")]
        cells = [[policy["policy"]], *([count] for count in counts)]
        for name in figures:
            value = policy.get(name)
            interval = "({:.3f}-{:.3f})".format(*value["ci95"]) if value else ""
            cells.append([f"{value['mean']:.3f}", interval] if value else ["-"])
        rows.append(cells)
    return titles, rows
