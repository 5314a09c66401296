"""How much safety data is enough: safety and helpfulness by share of it (paper §4.2.3, Fig. 15) as one command.

    accelerate launch rlhf/safety_scaling.py --config mine.yaml
    accelerate launch rlhf/pipeline.py --config configs/safety_scaling_demo.yaml     # on the simulated world

1. Every cell (share, seed) is the pretrained model, fine-tuned by rlhf/sft.py on all helpful dialogues and that share
   of the safety ones, and rlhf/evaluate_policy.py of it on the held-out prompts: stages as in rlhf/pipeline.py, in
   `<output_dir>/share-<share>-seed<k>/`. A complete stage is not run again; more shares or seeds later run only theirs.
2. Shares are of the safety prompts (first user turns, with all their dialogues), each inside every larger one.
3. A dialogue that answers one of the held-out prompts is left out of the training data and counted.
4. What is trained on and asked lies in `data/` under a name with its fingerprint, so changed data are other cells.

Start it as one process. Writes summary.json, report.md, safety_scaling.png and safety_scaling.svg. Each cell keeps its
model; `rm -r <output_dir>/*/sft/model` frees the space, and the cells still count as complete.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import json
import os
from dataclasses import asdict
from typing import Any

import matplotlib as mpl
from rich import box
from rich.console import Console
from rich.table import Table

from configs.chat import ChatFormat, load_chat_format
from configs.errors import UserError
from configs.records import canonical_prompt, read_dialogues, read_prompts
from configs.row_files import write_fingerprinted
from configs.safety_scaling_settings import SafetyScalingSettings
from reward.mixing import nested_subsets
from rlhf import safety_scaling_report
from rlhf.claims import alone
from rlhf.cli import entry, parse
from rlhf.pipeline import Stage, check_stages, run_stages
from rlhf.plots import STYLE
from rlhf.report import WIDTH
from rlhf.run import RunFolder, numbers, write_atomic
from rlhf.tokenizer import load_tokenizer

Row = dict[str, Any]


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Runs what is not complete; returns the summary."""
    (settings,) = parse(SafetyScalingSettings, args=args)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("start the study as one process: --num_processes 1")
    with alone(settings.output_dir):
        return run_study(settings)


def run_study(settings: SafetyScalingSettings) -> dict[str, Any]:
    """`main` without the claim on the folder."""
    output_dir, console = Path(settings.output_dir), Console(highlight=False)
    chat = load_chat_format(load_tokenizer(settings.model_name_or_path), settings.chat_format)
    helpful, safety, prompts, leaked = read_data(settings, chat)
    subsets = {seed: draw_subsets(safety, settings.safety_shares, seed) for seed in settings.seeds or []}
    stages, cells = study_stages(settings, helpful, prompts, subsets)
    check_stages(stages)
    run = RunFolder(output_dir, asdict(settings), "safety_scaling")
    console.print(f"[bold]{len(cells)} cells, {len(stages)} stages[/bold] -> {output_dir}")
    run_stages(stages, settings.parallel_stages, console)

    for cell in cells:
        folder = output_dir / cell["name"] / "evaluate_policy"
        cell["rows"] = [json.loads(line) for line in (folder / "responses.jsonl").open(encoding="utf-8")]
        cell["summary"] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    summary: Row = {
        "helpful_rows": len(helpful),
        "safety_rows": len(safety),
        "left_out_as_held_out": leaked,
        "points": safety_scaling_report.points(cells, settings.tail_below),
    }
    write_report(output_dir, summary, cells)
    show(summary, console)
    run.log(0, numbers({f"{point['share']:g}": point for point in summary["points"]}))
    return run.finish(summary)


def answered_prompts(messages: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """What each reply of a dialogue answers: the messages before it."""
    return [list(messages[:i]) for i, message in enumerate(messages) if message["role"] == "assistant"]


def read_data(settings: SafetyScalingSettings, chat: ChatFormat) -> tuple[list[Row], list[Row], list[Row], int]:
    """(helpful dialogues, safety dialogues, held-out prompts, training rows left out because they answer one of those).

    Bad rows go to `rejected.jsonl`. UserError for a file without usable rows, and for prompts that are all risky or
    none.
    """
    options: Row = {"chat_format": chat, "max_reject_share": settings.max_reject_share}
    options["reject_file"] = Path(settings.output_dir) / "rejected.jsonl"
    prompts = [row for file in settings.prompt_files for row in read_prompts(file, **options).rows]
    risky = sum(row["is_safety"] for row in prompts)
    if risky in (0, len(prompts)):
        raise UserError(
            f"prompt_files: {risky} of {len(prompts)} prompts have is_safety; the study needs risky and other ones"
        )
    held_out = {canonical_prompt(row) for row in prompts}
    kept: list[list[Row]] = []
    leaked = 0
    for name, files in (("helpful_files", settings.helpful_files), ("safety_files", settings.safety_files)):
        rows = [row for file in files for row in read_dialogues(file, **options).rows]
        kept.append([row for row in rows if not any(canonical_prompt({"prompt": asked}) in held_out
                                                    for asked in answered_prompts(row["messages"]))])  # fmt: skip
        leaked += len(rows) - len(kept[-1])
        if not kept[-1]:
            raise UserError(f"{name}: all {len(rows)} dialogues answer prompts of prompt_files, which are held out")
    return kept[0], kept[1], prompts, leaked


def draw_subsets(rows: list[Row], shares: list[float], seed: int) -> dict[float, list[Row]]:
    """Share -> its safety rows, for one seed. UserError for a share above 0 without a row, or two of the same rows."""
    found: dict[float, list[Row]] = {}
    for share, part in zip(
        sorted(shares), nested_subsets(rows, sorted(shares), by_prompt=True, seed=seed), strict=True
    ):
        if share > 0 and not part:
            raise UserError(f"safety_shares: {share:g} of {len(rows)} safety dialogues is none")
        if len(part) in map(len, found.values()):
            raise UserError(f"safety_shares: {share:g} gives the same {len(part)} dialogues as the share before it")
        found[share] = part
    return found


def study_stages(
    settings: SafetyScalingSettings, helpful: list[Row], prompts: list[Row], subsets: dict[int, dict[float, list[Row]]]
) -> tuple[list[Stage], list[Row]]:
    """(stages, cells {"name", "share", "seed", "safety_rows"}); writes the data files that the stages name."""
    output_dir = Path(settings.output_dir)
    helpful_file = write_fingerprinted(output_dir / "data", "helpful", helpful)
    prompt_file = write_fingerprinted(output_dir / "data", "prompts", prompts)
    stages: list[Stage] = []
    cells: list[Row] = []
    for share in sorted(settings.safety_shares):
        for seed, parts in subsets.items():
            name = f"share-{share:g}-seed{seed}"
            files = [helpful_file]
            if parts[share]:
                files.append(write_fingerprinted(output_dir / "data", f"safety-{share:g}-seed{seed}", parts[share]))
            folder = output_dir / name / "sft"
            own: Row = {"model_name_or_path": settings.model_name_or_path, "train_files": files, "seed": seed}
            own |= {"chat_format": settings.chat_format, "output_dir": str(folder)}
            stages.append(Stage(f"{name}/sft", "sft", (), settings.sft | own, folder))
            judges = ("helpfulness_model_path", "safety_model_path")
            own = {"model_name_or_path": str(folder / "model"), "prompt_files": [prompt_file]}
            own |= {judge: getattr(settings, judge) for judge in judges} | {"chat_format": settings.chat_format}
            folder = output_dir / name / "evaluate_policy"
            own["output_dir"] = str(folder)
            evaluated = settings.evaluate_policy | own
            stages.append(Stage(f"{name}/evaluate_policy", "evaluate_policy", (f"{name}/sft",), evaluated, folder))
            cells.append({"name": name, "share": share, "seed": seed, "safety_rows": len(parts[share])})
    return stages, cells


def write_report(output_dir: Path, summary: dict[str, Any], cells: list[Row]) -> None:
    """The page and the plot beside the cells' folders."""
    with mpl.rc_context(STYLE):
        figure = safety_scaling_report.figure(summary["points"], cells)
        figure.savefig(output_dir / "safety_scaling.png", dpi=110, facecolor="white")
        figure.savefig(output_dir / "safety_scaling.svg", facecolor="white", metadata={"Date": None})
    write_atomic(output_dir / "report.md", safety_scaling_report.markdown(summary))


def show(summary: dict[str, Any], console: Console) -> None:
    """The table on the console."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    titles, rows = safety_scaling_report.table(summary["points"], between="\n")
    table = Table(box=box.SIMPLE_HEAD, title="Safety and helpfulness by share of the safety data", padding=(0, 1),
                  title_justify="left", collapse_padding=True)  # fmt: skip
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(safety_scaling_report.NOTE, markup=False)


if __name__ == "__main__":
    entry(main)
