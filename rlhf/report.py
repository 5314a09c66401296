"""Tells how a run of the recipe went: `summary.json`, a table and sample dialogues on the console, and `report.html`.

The page stands alone: plots are inline SVG, nothing is loaded from elsewhere, and all text of models is escaped.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rlhf import plots
from rlhf.report_page import (
    COLUMNS,
    MORE_COLUMNS,
    alarm_text,
    cell,
    distillation_text,
    doubted,
    families_text,
    gate_texts,
    goal_texts,
    known_scores,
    measured,
    page,
)
from rlhf.run import write_atomic
from rlhf.summary import STAGES, build, read_rows

WIDTH = 100  # columns of the console where there is no terminal to ask


KINDS = {
    "helpful": "An ordinary request",
    "risky": "A risky request, which should be declined",
    "scary": "A harmless request that looks risky, which should be answered",
}


def write(
    output_dir: Path,
    wall_seconds: float,
    console: Console,
    goals: Callable[[Mapping[str, Any]], list[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Writes `summary.json` and `report.html` into the folder of a finished pipeline and prints the outcome.

    Args:
        output_dir: holds one folder a stage.
        wall_seconds: what this start of the pipeline took; see `rlhf.summary.active_seconds`.
        goals: from the summary, what the run was to reach: {"goal", "value", "target", "met"} and, where needed,
            "note". None: the run has no goals.

    Returns the content of `summary.json`.
    """
    summary = build(output_dir, wall_seconds)
    summary["goals"] = goals(summary) if goals else []
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(output_dir / "summary.json", text + "\n")
    samples = sample_dialogues(output_dir)
    write_atomic(output_dir / "report.html", page(output_dir, summary, samples))
    show(summary, samples, console)
    for name, doubt in doubted(summary).items():
        console.print(Text(f"{name}: {doubt}", style="red"))
    for alarm in summary["alarms"]:
        console.print(Text(alarm_text(alarm), style="red"))
    console.print(f"\nWritten: {output_dir / 'summary.json'} and {output_dir / 'report.html'}", markup=False)
    return summary


def sample_dialogues(output_dir: Path) -> list[dict[str, Any]]:
    """The first evaluated prompt of each kind with each stage's first answer, and one dialogue with an instruction.

    [{"title", "messages", "answers": [{"stage", "text", "gold", "reward_helpfulness", "reward_safety"}]}]. Stages that
    were evaluated on other prompts are left out.
    """
    rows = {name: read_rows(output_dir / folders.evaluation, "responses.jsonl") for name, folders in STAGES.items()}
    rows = {name: found for name, found in rows.items() if found}
    samples: list[dict[str, Any]] = []
    for kind, title in KINDS.items():
        first = next(
            (row for found in rows.values() for row in found if _kind(row) == kind and row.get("responses")), None
        )
        if first is None:
            continue
        answers = [
            {
                "stage": name,
                "text": row["responses"][0],
                "gold": (row.get("gold_helpfulness") or [None])[0],
                **{key: (row.get(key) or [None])[0] for key in ("reward_helpfulness", "reward_safety")},
            }
            for name, found in rows.items()
            if (row := next((r for r in found if r["prompt"] == first["prompt"] and r.get("responses")), None))
        ]
        samples.append({"title": title, "messages": first["prompt"], "answers": answers})
    dialogues = [
        row for row in read_rows(output_dir / "gatt_trained", "samples.jsonl") if row.get("policy") == "trained"
    ]
    if dialogues and dialogues[0].get("messages"):
        title = "A dialogue after Ghost Attention: the first message gives an instruction that should last"
        samples.append({"title": title, "messages": dialogues[0]["messages"], "answers": []})
    return samples


def _kind(row: Mapping[str, Any]) -> str:
    return row.get("kind") or ("risky" if row.get("is_safety") else "helpful")


def show(summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints the table of stages, the judge's verdicts, the goals and the sample dialogues."""
    width = console.width
    if not console.is_terminal:
        console.width = max(width, WIDTH)
    try:
        _show_stages(summary, console)
        _show_gates(summary, console)
        _show_goals(summary, console)
        _show_samples(samples, console)
    finally:
        console.width = width


def _show_stages(summary: Mapping[str, Any], console: Console) -> None:
    console.print()
    if not summary["stages"]:
        console.print("No stage was evaluated, so there is no table of stages.")
        return
    table = Table(
        box=box.SIMPLE_HEAD, title="What each stage of the recipe brought", title_justify="left", padding=(0, 1)
    )
    table.add_column("Stage", no_wrap=True)
    stages = summary["stages"]
    known = measured(COLUMNS, stages)
    true_scores = any(column.key.startswith("gold_") for column in known)
    columns = known if true_scores else [*measured(MORE_COLUMNS, stages), *known]
    for column in columns:
        table.add_column(column.title, justify="right")
    for stage in stages:
        cells = [cell(stage, column) for column in columns]
        lines = [
            Text(figure) + (Text(f"\n{interval}", style="dim") if interval else Text()) for figure, interval in cells
        ]
        table.add_row(Text(plots.label(stage["name"])), *lines)
    console.print(table)
    for column in columns:
        console.print(Text.assemble((f"  {column.title:<18}", "bold"), column.meaning))
    unseen = " No training stage sees the true scores." if true_scores else ""
    console.print(Text(f"  Below each figure stands its 95 % interval.{unseen}", style="dim"))
    for text in (families_text(summary), distillation_text(summary)):
        if text:
            console.print(Text(f"  {text}", style="dim"))


def _show_goals(summary: Mapping[str, Any], console: Console) -> None:
    goals = summary["goals"]
    if not goals:
        return
    title = f"Goals: {sum(goal['met'] for goal in goals)} of {len(goals)} met"
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title=title, title_justify="left")
    for name in ("", "Goal", "Measured", "Target"):
        table.add_column(name)
    for goal in goals:
        mark = Text("met", style="green") if goal["met"] else Text("MISSED", style="bold red")
        table.add_row(mark, *(Text(text) for text in (goal["goal"], *goal_texts(goal))))
    console.print()
    console.print(table)


def _show_gates(summary: Mapping[str, Any], console: Console) -> None:
    for gate in summary["gates"]:
        mark = Text("passed", style="green") if gate["passed"] else Text("FAILED", style="bold red")
        gain, win_rate = gate_texts(gate)
        figures = f", improvement {gain}, win rate at equal length {win_rate}"
        console.print(Text.assemble("Held-out judge, ", printable(gate["name"]), ": ", mark, figures))


def _show_samples(samples: Sequence[Mapping[str, Any]], console: Console) -> None:
    for sample in samples:
        console.print()
        console.print(Text(sample["title"], style="bold underline"))
        shown = (
            sample["messages"] if len(sample["messages"]) <= 9 else [*sample["messages"][:7], *sample["messages"][-2:]]
        )
        for i, message in enumerate(shown):
            if len(shown) < len(sample["messages"]) and i == 7:
                console.print(Text("     ... some turns later ...", style="dim"))
            line = Text.assemble((f"{message['role']}: ", "dim"), printable(message["content"]))
            console.print(Padding(line, (0, 0, 0, 2)))
        if not sample["answers"]:
            continue
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
        table.add_column("Stage", no_wrap=True)
        table.add_column("Answer", ratio=1, overflow="fold")
        known = known_scores(sample["answers"])
        for title in known.values():
            table.add_column(title, justify="right", width=11)
        for answer in sample["answers"]:
            scores = [answer[key] for key in known]
            texts = [Text("–" if score is None else f"{score:.2f}") for score in scores]
            table.add_row(Text(plots.label(answer["stage"])), Text(printable(answer["text"]) or "(empty)"), *texts)
        console.print(table)


def printable(text: str) -> str:
    """`text` without characters that steer a terminal: a model may write any."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
