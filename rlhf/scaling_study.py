"""Accuracy of reward models by share of the data and by model size (Llama 2 paper §3.2.2, Fig. 6) as one command.

    accelerate launch rlhf/scaling_study.py --config configs/scaling_demo.yaml
    accelerate launch rlhf/scaling_study.py --config mine.yaml --model_name_or_paths 7B 13B --data_shares 0.25 0.5 1

1. Every cell (model, share, seed) is a training of rlhf/train_reward.py with the same settings, epochs included, in a
   run folder of its own, `<output_dir>/<model>-<share>-seed<k>/`. A complete cell is not run again; one that was killed
   goes on from its last checkpoint (`save_steps`). More models, shares or seeds later train only what is missing.
2. Before any training all models are looked up and all data read. A pair that one of the models cannot take is left
   out for all, so that all cells learn from and are tested on the same pairs.
3. Screening and mixing (`deduplicate`, `leaked_prompts`, `mix_weights`, `mix_rows`, `eval_fraction`) are done once, by
   the first seed; the shares are nested parts of that mixture, drawn anew by each seed.

Writes summary.json, report.md, scaling.png, scaling.svg, the subsets in `data/`, and `models/` where `layers` is used.
Each cell keeps its model; `rm -r <output_dir>/*/model` frees the space, and the cells still count as complete.
"""

import gc
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # launched by path, Python puts rlhf/ first: `import reward` would fail
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rlhf import cli  # noqa: E402,I001  (first: it switches off telemetry before trl is imported)

import matplotlib as mpl  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from accelerate import PartialState  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from tqdm.auto import tqdm  # noqa: E402
from transformers import AutoConfig, AutoModelForSequenceClassification  # noqa: E402

from configs.chat import ChatFormat, ChatFormatError, load_chat_format  # noqa: E402
from configs.errors import UserError  # noqa: E402
from configs.row_files import write_fingerprinted  # noqa: E402
from configs.reward_settings import RewardSettings  # noqa: E402
from configs.scaling_settings import CellModelSettings, ScalingSettings, StudyRunSettings  # noqa: E402
from reward.data import encode_pairs  # noqa: E402
from reward.mixing import nested_subsets  # noqa: E402
from rlhf import scaling_report, train_reward  # noqa: E402
from rlhf.models import data_fingerprints, first_layers, save_first_layers  # noqa: E402
from rlhf.tokenizer import load_tokenizer
from rlhf.pipeline import Stage, run_stages  # noqa: E402
from rlhf.plots import STYLE  # noqa: E402
from rlhf.report import WIDTH  # noqa: E402
from rlhf.reward_inputs import read_inputs  # noqa: E402
from rlhf.run import RunFolder, numbers, write_atomic  # noqa: E402

Rows = list[dict[str, Any]]
# What was screened and mixed for all cells is not screened again by each: repeats that `mix_rows` asked for would go.
AS_WRITTEN = {"mix_weights": None, "mix_rows": None, "deduplicate": False, "leaked_prompts": "keep"}
CELL_FIGURES = (
    *("model", "parameters", "share", "seed", "train_pairs", "steps", "train_seconds", "test_pairs"),
    *("accuracy", "ci95", "by_rating", "by_rating_ci95", "by_rating_pairs", "test_prompts_in_training"),
)


@dataclass(frozen=True)
class StudyModel:
    """One line of the plot."""

    label: str
    path: str
    layers: int | None  # keep the first so many; None: the whole model
    parameters: int  # of the reward model


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Train what is missing, gather, report; returns the summary that is also in `output_dir/summary.json`."""
    parts = cli.parse(ScalingSettings, RewardSettings, CellModelSettings, StudyRunSettings, args=args)
    settings, reward, model_settings, run_settings = parts
    not_set = ("model_name_or_path", "seed")  # each cell's own
    resolved = {k: v for part in parts for k, v in asdict(part).items() if k not in not_set}
    resolved["data"] = data_fingerprints(reward.train_files, reward.eval_files)
    output_dir, console = Path(run_settings.output_dir), Console(highlight=False)
    if done := RunFolder.completed(output_dir, resolved):
        _show(done, console)
        return done
    state = PartialState(cpu=run_settings.use_cpu)
    if settings.parallel_cells > 1 and (state.num_processes > 1 or not run_settings.use_cpu):
        raise UserError("parallel_cells: more than 1 is for one process on the CPU; add --use_cpu true or set it to 1")

    # Everything that can be wrong is looked at before the first training.
    models = study_models(settings)
    train_reward.rating_margins(reward)
    main_folder = output_dir if state.is_main_process else None
    train_rows, test_rows = read_data(reward, settings, model_settings.chat_format, main_folder)
    subsets = {seed: draw_subsets(train_rows, settings, seed) for seed in settings.seeds}

    run = RunFolder(output_dir, resolved, "scaling_study")
    common = asdict(reward) | asdict(model_settings) | asdict(run_settings) | AS_WRITTEN
    data = output_dir / "data"
    test_file = write_fingerprinted(data, "test", test_rows, state.is_main_process)
    cells: dict[str, dict[str, Any]] = {}
    stages: list[Stage] = []
    for share in sorted(settings.data_shares):  # the small ones first: they soon show whether the settings are any good
        files = {
            seed: write_fingerprinted(data, f"train-{share:g}-seed{seed}", parts[share], state.is_main_process)
            for seed, parts in subsets.items()
        }
        for model in models:
            path = _model_folder(model, output_dir, state)
            for seed in settings.seeds:
                name = f"{model.label}-{share:g}-seed{seed}"
                own = {"model_name_or_path": path, "seed": seed, "output_dir": str(output_dir / name),
                       "train_files": [files[seed]], "eval_files": [test_file]}  # fmt: skip
                stages.append(Stage(name, "train_reward", (), common | own, output_dir / name))
                cells[name] = {"model": model.label, "parameters": model.parameters, "share": share, "seed": seed}
    state.wait_for_everyone()  # until the data files are there
    waiting = [stage for stage in stages if not _complete(stage)]
    if state.is_main_process:
        console.print(f"[bold]{len(stages)} cells[/bold] -> {output_dir}; {len(stages) - len(waiting)} are complete")
    train_cells(waiting, settings.parallel_cells, state, console)

    # Results
    for stage in stages:
        cells[stage.name] |= json.loads((stage.folder / "summary.json").read_text(encoding="utf-8"))
    order = {model.label: i for i, model in enumerate(models)}
    gathered = sorted(cells.values(), key=lambda cell: (order[cell["model"]], cell["share"], cell["seed"]))
    summary = {
        "cells": [{name: cell[name] for name in CELL_FIGURES} for cell in gathered],
        "points": scaling_report.points(gathered),
        "fits": scaling_report.fits(gathered),
    }
    run.log(0, numbers({name: {"accuracy": cell["accuracy"]} for name, cell in cells.items()}))
    if state.is_main_process:
        _write_report(output_dir, summary)
    summary = run.finish(summary)
    if state.is_main_process:
        _show(summary, console)
    state.wait_for_everyone()
    return summary


def _complete(stage: Stage) -> bool:
    """Whether the cell has been trained, with these settings and data, as rlhf/train_reward.py itself would find."""
    data = data_fingerprints(stage.settings["train_files"], stage.settings["eval_files"])
    return RunFolder.completed(stage.folder, stage.settings | {"data": data}) is not None


def study_models(settings: ScalingSettings) -> list[StudyModel]:
    """The models of the study, each with its number of weights; none is loaded.

    Raises UserError for a model that is not there, has no reward model class, no tokenizer, or fewer layers than asked.
    """
    found = []
    for label, path in zip(settings.labels, settings.model_name_or_paths, strict=True):
        try:
            config = AutoConfig.from_pretrained(path)
            load_tokenizer(path)
        except (OSError, ValueError, UserError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"model_name_or_paths: {path!r} cannot be used as a model: {reason}") from error
        choices: list[int | None] = [None] if settings.layers is None else [*settings.layers]
        for n in choices:
            if n is not None and n > config.num_hidden_layers:
                raise UserError(f"layers: {n}, but {path} has {config.num_hidden_layers} layers")
            name = label if n is None else f"{label}-{n}layer{'s' if n > 1 else ''}"
            whole = n is None or n == config.num_hidden_layers
            found.append(StudyModel(name, path, None if whole else n, _parameters(path, n)))
    return found


def _parameters(path: str, layers: int | None) -> int:
    """Weights of the reward model that `path` with so many layers gives; shapes only, no memory."""
    config = AutoConfig.from_pretrained(path, num_labels=1)
    try:
        if layers is not None:
            config = AutoConfig.from_pretrained(path, num_labels=1, **first_layers(config, layers))
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config).num_parameters()
    except ValueError as error:
        raise UserError(f"model_name_or_paths: no reward model can be made of {path!r}: {error}") from error


def read_data(
    reward: RewardSettings, settings: ScalingSettings, chat_format: str, folder: Path | None
) -> tuple[Rows, Rows]:
    """(training rows, test rows), screened and mixed as for one training, that every model can take (`_usable`).

    `folder`, given on the main process only, gets the lists of bad and of dropped rows. UserError where more than
    `max_reject_share` of the rows do not suit one of the models, or none is left.
    """
    formats = [load_chat_format(load_tokenizer(path), chat_format) for path in settings.model_name_or_paths]
    inputs = read_inputs(reward, formats[0], settings.seeds[0], folder)
    found = []
    for name, rows in (("train_files", inputs.train_rows), ("eval_files", inputs.test_rows)):
        kept = _usable(rows, formats, reward.max_length, name)
        if not kept or len(rows) - len(kept) > reward.max_reject_share * len(rows):
            raise UserError(
                f"{name}: {len(rows) - len(kept)} of {len(rows)} pairs do not fit max_length {reward.max_length} "
                f"or hold special tokens of a model, over max_reject_share {reward.max_reject_share}"
            )
        found.append(kept)
    return found[0], found[1]


def _usable(rows: Rows, formats: list[ChatFormat], max_length: int, name: str) -> Rows:
    """The rows that each chat format can encode in at most `max_length` tokens; all cells see the same pairs."""

    def fits(row: dict[str, Any]) -> bool:
        try:
            return all(encode_pairs([row], chat_format, max_length, None)[0] for chat_format in formats)
        except ChatFormatError:
            return False

    return [row for row in tqdm(rows, desc=f"check {name}", unit="pair", leave=False) if fits(row)]


def draw_subsets(rows: Rows, settings: ScalingSettings, seed: int) -> dict[float, Rows]:
    """Share -> its training rows, for one seed. UserError for a share without a pair, or two of the same pairs."""
    parts = nested_subsets(rows, settings.data_shares, settings.subset_by == "prompt", seed)
    found: dict[float, Rows] = {}
    for share, part in sorted(zip(settings.data_shares, parts, strict=True)):
        if not part:
            raise UserError(
                f"data_shares: {share:g} of {len(rows)} training pairs, by {settings.subset_by}, is no pair"
            )
        if len(part) in map(len, found.values()):
            raise UserError(f"data_shares: {share:g} gives the same {len(part)} pairs as the share before it")
        found[share] = part
    return found


def _model_folder(model: StudyModel, output_dir: Path, state: PartialState) -> str:
    """Where the cells of `model` load it from; a model cut to its first layers is made here."""
    if model.layers is None:
        return model.path
    folder = output_dir / "models" / model.label
    if state.is_main_process:
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_first_layers(model.path, model.layers, folder)
    return str(folder)


def train_cells(cells: list[Stage], parallel: int, state: PartialState, console: Console) -> None:
    """Train the cells in their order: in this process, all of its fellows too, or `parallel` of them in forked ones."""
    if parallel > 1:
        run_stages(cells, parallel, console)
        return
    for i, cell in enumerate(cells, 1):
        config = cell.folder / "stage.yaml"
        if state.is_main_process:
            console.print(f"[bold]{cell.name}[/bold] ({i} of {len(cells)}) ...")
            cell.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(config, yaml.safe_dump(cell.settings, sort_keys=False))
        state.wait_for_everyone()
        result = train_reward.main(["--config", str(config)])
        gc.collect()  # a trainer and its model refer to each other: uncollected, two models would be in memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if state.is_main_process:
            console.print(f"{cell.name}: accuracy {result['accuracy']:.3f} after {result['train_pairs']} pairs")


def _write_report(output_dir: Path, summary: dict[str, Any]) -> None:
    with mpl.rc_context(STYLE):
        figure = scaling_report.figure(summary["points"], summary["fits"])
        figure.savefig(output_dir / "scaling.png", dpi=110, facecolor="white")
        figure.savefig(output_dir / "scaling.svg", facecolor="white", metadata={"Date": None})
    write_atomic(output_dir / "report.md", scaling_report.markdown(summary))


def _show(summary: dict[str, Any], console: Console) -> None:
    titles, rows = scaling_report.table(summary["points"], between="\n")
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    title = "Reward model accuracy by data and model size, per cent"
    close = {"padding": (0, 1), "collapse_padding": True, "pad_edge": False}  # seven columns in 100 characters
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", **close)
    for i, name in enumerate(titles):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in [*scaling_report.fit_lines(summary["fits"]), scaling_report.NOTE]:
        console.print(line, markup=False)


if __name__ == "__main__":
    cli.entry(main)
