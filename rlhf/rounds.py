"""Rounds of rejection sampling, RLHF-V1 ... Vn, from one YAML (paper §3.2.3).

    accelerate launch rlhf/rounds.py --config configs/rounds_demo.yaml
    accelerate launch rlhf/rounds.py --config configs/rounds_demo.yaml --rounds 4      # goes on after the third

A round collects preferences with the newest policy and trains both reward models on all so far (where
`retrain_from_round` says so), samples from the newest policy, pools with the best of all earlier rounds, fine-tunes the
base model on the pool, and evaluates; a smaller model, the student, can be fine-tuned on the same pool.

1. `pool: all` is the paper's fix for what V3 had lost; `last` fine-tunes on the newest round alone, as up to V3.
2. Every round starts from `base_model_path`, as the paper's versions do, not from the policy before it.
3. Each step is a stage as in rlhf/pipeline.py: a run folder `<output_dir>/v<round>/<stage>/`, not run again once
   complete, continued where it was killed. A changed setting runs its stage and all that is made from it again.
   Samplers draw with another seed in each round; training and evaluation keep theirs: rounds differ by their data.
4. Where people label (`annotator: none`), the run stops at each round's comparisons and says which file it waits for.

Start it as one process: it runs one stage after another, or several at once (`parallel_stages`, CPU).
Writes summary.json, report.md, rounds.png and rounds.svg beside the rounds' folders: scores, KL and length by round, by
family of prompts (`source`) too, with 95 % intervals and the change against the round before.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import hashlib
import json
import os
from dataclasses import asdict
from typing import Any

import matplotlib as mpl
from rich import box
from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from configs.rounds_settings import RoundsSettings
from rlhf import rounds_report
from rlhf.claims import alone
from rlhf.cli import entry, parse
from rlhf.models import save_first_layers
from rlhf.pipeline import ROOT, check_stages, fill, inputs, run_stages
from rlhf.plots import STYLE
from rlhf.report import WIDTH
from rlhf.round_stages import round_stages, waiting_for_people
from rlhf.run import RunFolder, numbers, write_atomic
from rlhf.shards import weights_stamp


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Runs what is not complete; returns the summary. UserError where it waits for labels."""
    (settings,) = parse(RoundsSettings, args=args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("start the rounds as one process: --num_processes 1")
    with alone(settings.output_dir):
        return run_rounds(settings)


def run_rounds(settings: RoundsSettings) -> dict[str, Any]:
    """`main` without the claim on the folder."""
    output_dir, console = Path(settings.output_dir), Console(highlight=False)
    student = student_path(settings)
    stages = round_stages(settings, student)
    labelled = [stage.settings["import_labels"] for stage in stages if "import_labels" in stage.settings]
    check_stages(stages, awaited=labelled)
    # Rounds that by_round plans beyond `rounds`: a misspelt field shows now, but their files may be made until then.
    planned = round_stages(settings, student, max([settings.rounds, *map(int, settings.by_round)]))[len(stages) :]
    check_stages(planned, awaited=[value for stage in planned for _, value in inputs(stage.settings)])
    run = RunFolder(output_dir, asdict(settings), "rounds")
    console.print(f"[bold]{settings.rounds} rounds, {len(stages)} stages[/bold] -> {output_dir}")
    waiting = waiting_for_people(stages)
    run_stages(stages[: waiting[0]] if waiting else stages, settings.parallel_stages, console)

    summary = rounds_report.build(output_dir, settings.rounds)
    if summary["rounds"]:
        write_report(output_dir, summary)
        show(summary, console)
    if waiting:
        file = waiting[1]
        raise UserError(
            f"{file.parent.name} waits for people: label {file.parent / 'collect_preferences' / 'unlabelled.jsonl'}, "
            f"save it as {file}, and start the same command again"
        )
    run.log(settings.rounds, numbers({f"v{entry['round']}": _means(entry) for entry in summary["rounds"]}))
    return run.finish(summary)


def student_path(settings: RoundsSettings) -> str:
    """What the student starts from, "" for none; a model cut to its first layers is made here."""
    names = {"output_dir": settings.output_dir, "seed": str(settings.seed), "root": str(ROOT)}
    path = fill(settings.student_model_path, names)
    if not settings.student_layers:
        return path
    # By source: of another model, or of one that was trained again, it is another student.
    source = hashlib.sha256(json.dumps([path, weights_stamp(path)]).encode()).hexdigest()[:8]
    folder = Path(settings.output_dir) / f"student-{settings.student_layers}-layers-{source}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        return str(save_first_layers(path, settings.student_layers, folder))
    except UserError as error:
        raise UserError(f"student_model_path: {error}") from error


def _means(entry: dict[str, Any]) -> dict[str, float]:
    return {name: figure["mean"] for name, figure in entry["figures"].items()}


def write_report(output_dir: Path, summary: dict[str, Any]) -> None:
    """The page and the plot beside the rounds' folders."""
    with mpl.rc_context(STYLE):
        figure = rounds_report.figure(summary)
        figure.savefig(output_dir / "rounds.png", dpi=110, facecolor="white")
        figure.savefig(output_dir / "rounds.svg", facecolor="white", metadata={"Date": None})
    write_atomic(output_dir / "report.md", rounds_report.markdown(summary))


def show(summary: dict[str, Any], console: Console) -> None:
    """Both tables on the console."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for part, title in (("figures", "Rounds of rejection sampling"), ("families", "By family of prompts")):
        titles, rows = rounds_report.table(summary, part)
        if not rows:
            continue
        table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", padding=(0, 1), collapse_padding=True)
        for i, name in enumerate(titles):
            table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*("\n".join(cell) for cell in row))
        console.print(table)
    console.print(rounds_report.NOTE, markup=False)


if __name__ == "__main__":
    entry(main)
