"""Which K and which temperature: best-of-n for every n up to N, by temperature (Llama 2 paper §3.2.3, Figs 7 and 8).

    accelerate launch rlhf/explore_sampling.py --config configs/explore_demo.yaml
    accelerate launch rlhf/explore_sampling.py --from_runs runs/rs-0.8 runs/rs-1.2 --output_dir runs/explore

1. Each temperature is a run of rlhf/rejection_sampling.py in a folder of its own, `<output_dir>/T-1.2/`, with the same
   prompts and seeds: resumable, its samples kept, its best.jsonl ready for fine-tuning. Another temperature later
   samples that one only. `from_runs` reads finished runs instead.
2. From the N samples a prompt come the expected maximum, median and (simulated world) gold score of best-of-n for every
   n <= N, averaged over all subsets (rlhf/exploration.py), with intervals over prompts.
3. The rule behind the recommended K and temperature is in `rlhf.exploration.recommend`.

Writes summary.json, exploration.json (every curve), report.md and plots/.
"""

import gc
import json
import sys
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import numpy as np
import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from rich.text import Text

from configs.engine_settings import NOT_SAMPLED
from configs.errors import UserError
from configs.explore_settings import ExploreModelSettings, ExploreSettings, check_source
from configs.model_settings import RunSettings
from configs.rejection_settings import RejectionSettings
from rlhf import exploration_report, rejection_sampling
from rlhf.cli import entry, parse
from rlhf.exploration import analyse, explore
from rlhf.models import data_fingerprints
from rlhf.plots import to_png
from rlhf.reward_report import WIDTH
from rlhf.run import RunFolder, numbers, write_atomic
from rlhf.score_files import NAME, read_scores

Json = dict[str, Any]
Arrays = dict[str, np.ndarray]
# What the runs of one exploration may differ in: not in what is sampled, only in how hot and where it was computed.
MAY_DIFFER = (
    *NOT_SAMPLED,
    *("temperature", "output_dir", "report_to", "logging_steps", "resume", "use_cpu", "seed", "min_score", "dtype"),
    *("prompts_per_shard", "token_budget", "score_token_budget", "max_reject_share", "attn_implementation"),
    *("use_peft", "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "freeze_embeddings"),  # of training
    *("prompt_files", "max_prompts", "max_prompt_tokens"),  # the prompts themselves are compared
)


def main(args: list[str] | None = None) -> Json:
    """Sample what is missing, analyse, report; returns the summary that is also in `output_dir/summary.json`."""
    settings, model, run = parse(ExploreSettings, ExploreModelSettings, RunSettings, args=args)
    check_source(settings, model)
    resolved = asdict(settings) | asdict(model) | asdict(run)
    if settings.from_runs:
        resolved["data"] = data_fingerprints([str(Path(folder) / NAME) for folder in settings.from_runs])
    output_dir, console = Path(run.output_dir), Console(highlight=False)
    if done := RunFolder.completed(output_dir, resolved):
        _show(done, output_dir, console)
        return done
    state = PartialState(cpu=run.use_cpu)
    if settings.from_runs:
        loaded, left_out = load_runs(settings.from_runs)  # before the folder is touched
        if (samples := loaded[0][0]["combined"].shape[1]) < settings.affordable_samples:
            raise UserError(
                f"affordable_samples is {settings.affordable_samples}, but the runs have {samples} samples a prompt"
            )
        folder = RunFolder(output_dir, resolved, "explore_sampling")
    else:
        folder = RunFolder(output_dir, resolved, "explore_sampling")
        cells = sample_cells(settings, model, run, state, console)
        state.wait_for_everyone()  # until the main process has written the last scores.npz
        loaded, left_out = load_runs(cells)

    affordable = settings.affordable_samples or loaded[0][0]["combined"].shape[1]
    runs = [explore(arrays, keep_unfinished) for arrays, keep_unfinished in loaded]
    figures, curves = analyse(runs, loaded[0][0]["is_safety"], affordable, settings.min_gain, run.seed)
    figures["prompts_left_out"] = left_out
    figures["from"] = settings.from_runs or [str(cell) for cell in cells]
    folder.log(0, numbers(figures))
    if state.is_main_process:
        _write(output_dir, figures, curves)
    summary = folder.finish(figures)
    if state.is_main_process:
        _show(summary, output_dir, console)
    state.wait_for_everyone()
    return summary


def sample_cells(
    settings: ExploreSettings, model: ExploreModelSettings, run: RunSettings, state: PartialState, console: Console
) -> list[Path]:
    """Run rejection sampling at each temperature, in all processes; returns the run folders. Complete ones return at
    once, one that was killed goes on."""
    common = {one.name: getattr(settings, one.name) for one in fields(RejectionSettings)} | asdict(model) | asdict(run)
    folders = []
    for i, temperature in enumerate(sorted(settings.temperatures), 1):
        folder = Path(run.output_dir) / f"T-{temperature:g}"
        config = folder / "stage.yaml"
        if state.is_main_process:
            console.print(f"[bold]temperature {temperature:g}[/bold] ({i} of {len(settings.temperatures)}) ...")
            folder.mkdir(parents=True, exist_ok=True)
            own = {"temperature": temperature, "output_dir": str(folder)}
            write_atomic(config, yaml.safe_dump(common | own, sort_keys=False))
        state.wait_for_everyone()
        rejection_sampling.main(["--config", str(config)])
        gc.collect()  # modules refer to each other: uncollected, the models of two temperatures would be in memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        folders.append(folder)
    return folders


def load_runs(folders: list[Any]) -> tuple[list[tuple[Arrays, bool]], int]:
    """(arrays, keep_unfinished) of each run folder, by rising temperature, over the prompts that all runs have; and the
    number of prompts left out because a run failed on them.

    UserError where one is unfinished or damaged, has the temperature of another, other prompts, or other settings.
    """
    loaded = []
    for folder in folders:
        summary = RunFolder.completed(folder) or {}
        if summary.get("stage") != "rejection_sampling":
            raise UserError(f"from_runs: {folder} holds no finished run of rlhf/rejection_sampling.py")
        settings = yaml.safe_load((Path(folder) / "settings.yaml").read_text(encoding="utf-8"))
        loaded.append((folder, settings, read_scores(folder), summary.get("failed", 0)))
    loaded.sort(key=lambda each: float(each[2]["temperature"][0]))
    first, settings, arrays, _ = loaded[0]
    for before, (folder, other_settings, other, _) in zip(loaded, loaded[1:], strict=False):
        if other["temperature"][0] == before[2]["temperature"][0]:
            raise UserError(f"from_runs: {before[0]} and {folder} have the same temperature, {other['temperature'][0]}")
        names = sorted((settings.keys() | other_settings.keys()) - set(MAY_DIFFER))
        if differ := [name for name in names if settings.get(name) != other_settings.get(name)]:
            raise UserError(
                f"from_runs: {first} and {folder} differ in {', '.join(differ)}; only temperatures may differ"
            )
    shared, left_out = shared_prompts([(folder, arrays, failed) for folder, _, arrays, failed in loaded])
    return [(arrays, bool(settings["keep_unfinished"])) for arrays in shared], left_out


def shared_prompts(runs: list[tuple[Any, Arrays, int]]) -> tuple[list[Arrays], int]:
    """The arrays of each run for the prompts that all runs have, in one order, and how many others there are.

    `runs`: (folder, arrays, number of prompts that it failed on) of each. UserError where a run lacks more than it
    failed on, being one of other prompts, and where none are shared.
    """
    named = [_occurrences(arrays["prompt_id"]) for _, arrays, _ in runs]
    known = set().union(*named)
    for mine, (folder, _, failed) in zip(named, runs, strict=True):
        if len(known) - len(mine) > failed:
            other = next(run[0] for theirs, run in zip(named, runs, strict=True) if theirs.keys() - mine.keys())
            raise UserError(f"from_runs: {other} and {folder} have other prompts; temperatures need the same ones")
    shared = [name for name in named[0] if all(name in mine for mine in named)]
    if not shared:
        raise UserError("from_runs: the runs failed on so many prompts that they have none in common")
    arrays = [
        {name: array if name == "temperature" else array[[mine[key] for key in shared]] for name, array in run.items()}
        for mine, (_, run, _) in zip(named, runs, strict=True)
    ]
    return arrays, len(known) - len(shared)


def _occurrences(ids: np.ndarray) -> dict[tuple[str, int], int]:
    """(id, how often it came before) -> its place: a file may have a prompt twice."""
    seen: Counter[str] = Counter()
    places = {}
    for place, name in enumerate(ids.tolist()):
        places[name, seen[name]] = place
        seen[name] += 1
    return places


def _write(output_dir: Path, figures: Json, curves: list[Json]) -> None:
    """exploration.json, plots/ and report.md."""
    write_atomic(output_dir / "exploration.json", json.dumps({"curves": curves}, default=lambda x: x.round(6).tolist()))
    plots = output_dir / "plots"
    plots.mkdir(exist_ok=True)
    chosen = figures["recommendation"]["temperature"]
    made = {
        "reward": exploration_report.reward_figure(curves, chosen),
        "cost": exploration_report.cost_figure(curves, figures),
        "gold": exploration_report.gold_figure(curves),
    }
    lines = ["# Best of n by temperature", ""]
    lines += [*(f"- {line}" for line in exploration_report.sentences(figures)), ""]
    for name, figure in made.items():
        if figure is not None:
            to_png(figure, plots / f"{name}.png")
            lines += [f"![{name}](plots/{name}.png)", ""]
    lines += [table.markdown() for table in exploration_report.tables(figures)]
    write_atomic(output_dir / "report.md", "\n".join(lines))


def _show(figures: Json, output_dir: Path, console: Console) -> None:
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    for table in exploration_report.tables(figures):
        console.print(table.rich())
        console.print(Text(f" {table.note}\n", style="dim"))
    for line in exploration_report.sentences(figures):
        console.print(Text(line))
    console.print(Text(f"Written to {output_dir}: report.md, plots/, exploration.json, summary.json"), soft_wrap=True)


if __name__ == "__main__":
    entry(main)
