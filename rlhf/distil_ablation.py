"""What the gate of safety context distillation is for: the report of a pipeline that distils in several ways.

For a pipeline whose stages `distil_<name>` and `evaluate_<name>` are the distillation and the evaluation of the policy
trained on it; `evaluate_start` is of the policy before (configs/distil_demo.yaml). Writes report.md and summary.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from rlhf.report import WIDTH
from rlhf.run import write_atomic

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
START = "start"


def write(output_dir: Path, wall_seconds: float, console: Console) -> dict[str, Any]:
    """Writes both files into the folder of a finished pipeline, prints the table; returns the summary."""
    summary: dict[str, Any] = {"stage": "distil_ablation", "wall_seconds": wall_seconds, "policies": gather(output_dir)}
    write_atomic(output_dir / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    titles, rows = table(summary["policies"])
    page = ["# Safety context distillation with and without its gate", "", NOTE, "", "| " + " | ".join(titles) + " |"]
    page += [
        "|" + "---|" * len(titles),
        *("| " + " | ".join(" ".join(cell) for cell in row) + " |" for row in rows),
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
