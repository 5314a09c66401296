"""The whole recipe as one YAML: stages run in the order of their needs; a finished stage is not run again.

    accelerate launch rlhf/pipeline.py --config configs/demo.yaml --output_dir runs/demo --seed 0

A stage in the YAML is `{name, run, needs, threads, settings}`: `run` is a script of this folder without `.py`, `needs`
are names of stages before it, `settings` its fields. `${output_dir}`, `${seed}`, `${root}` (the repository) and the
names of the YAML's own `variables` are filled in; `--values name=value` gives a variable another value, and a YAML with
`stages_from` has the stages of another one, with values of its own for that one's variables. Every stage writes
`<output_dir>/<name>/` with its settings as `stage.yaml`, so each can be run again by itself with
`accelerate launch rlhf/<run>.py --config <output_dir>/<name>/stage.yaml`. The settings of all stages are checked before
the first one runs: fields, values, and that the files and models they name are there or will be made.

All mains run in one program, because importing the libraries costs many seconds. With `parallel_stages: n` (CPU only)
up to n stages whose needs are met run at once, in the order of the file, each in a forked process with
its `threads` (1).
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

import importlib
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from string import Template
from typing import Any

import torch
import yaml
from rich.console import Console

from configs.errors import UserError
from configs.pipeline_settings import PipelineSettings
from configs.row_files import JSON_SUFFIXES
from rlhf.claims import alone
from rlhf.cli import check, entry, load_yaml, parse

ROOT = Path(__file__).resolve().parents[1]
WHOLE_NAME = re.compile(r"\$\{(\w+)\}")
INPUT_ENDINGS = ("_files", "_file", "_path", "_paths", "_dirs")  # of the names of fields that name what a stage reads


@dataclass(frozen=True)
class Stage:
    """One stage, settings filled in."""

    name: str
    run: str
    needs: tuple[str, ...]
    settings: dict[str, Any]
    folder: Path
    threads: int = 1

    @property
    def begun(self) -> bool:
        """True where the stage was started with these settings."""
        saved = self.folder / "stage.yaml"
        return saved.exists() and yaml.safe_load(saved.read_text()) == self.settings

    @property
    def done(self) -> bool:
        """True where the stage has written its summary for these settings."""
        return self.begun and (self.folder / "summary.json").exists()


def fill(value: Any, names: dict[str, Any]) -> Any:
    """`value` with ${name} replaced in every text in it, unknown names left; a text that becomes a number is one, and a
    text that is nothing but ${name} becomes what the name stands for, number, list or null."""
    if isinstance(value, str):
        if (whole := WHOLE_NAME.fullmatch(value)) and whole[1] in names:
            return names[whole[1]]
        filled = Template(value).safe_substitute(names)
        return yaml.safe_load(filled) if filled != value and filled.lstrip("-").isdigit() else filled
    if isinstance(value, list):
        return [fill(item, names) for item in value]
    if isinstance(value, dict):
        return {key: fill(item, names) for key, item in value.items()}
    return value


def read_variables(settings: PipelineSettings, inherited: dict[str, Any]) -> dict[str, Any]:
    """The values of all variables: those of the YAML named by `stages_from`, of this one, of `values`; the last wins.

    Raises UserError for a variable that the stages do not have, and for one that has the name of a built-in.
    """
    names = {"output_dir": settings.output_dir, "seed": settings.seed, "root": str(ROOT)}
    own = settings.variables
    known = inherited if settings.stages_from else own
    given = {}
    for text in settings.values:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"values: {text!r} is not name=value")
        try:
            given[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"values: {text!r} is not valid YAML after `=`; put it in quotes: {error}") from error
    for where, some in (("variables", own), ("values", given)):
        for name in some:
            if name not in known:
                raise UserError(f"{where}: no stage has a variable '{name}'; there are: {', '.join(sorted(known))}")
    if taken := names.keys() & known.keys():
        raise UserError(f"variables: {', '.join(sorted(taken))} is filled in by itself; take another name")
    values = {**inherited, **own, **given}
    return names | fill(values, names | values)  # a variable may name another


def read_stages(settings: PipelineSettings) -> list[Stage]:
    """Checks the list of stages and fills it in.

    Raises UserError for no stages, a missing or doubled name, an unknown script, a key that no stage has, or a need
    that is not a stage before it.
    """
    rows = settings.stages
    inherited: dict[str, Any] = {}
    if settings.stages_from:
        if rows:
            raise UserError("stages, stages_from: give one of them")
        other = load_yaml(str(fill(settings.stages_from, {"root": str(ROOT)})), "stages_from")
        rows, inherited = other.get("stages") or [], other.get("variables") or {}
    if not rows:
        raise UserError("the pipeline has no stages; give --config with a list `stages:` (see configs/demo.yaml)")
    names = read_variables(settings, inherited)
    stages: list[Stage] = []
    for i, row in enumerate(rows):
        where = f"stage {i + 1} of the pipeline"
        if not isinstance(row, dict) or not {"name", "run"} <= row.keys():
            raise UserError(f"{where} needs the keys `name` and `run`, got: {row}")
        if unknown := row.keys() - {"name", "run", "needs", "threads", "settings"}:
            raise UserError(
                f"{where} ({row['name']}) has unknown keys {sorted(unknown)}; use name, run, needs, threads, settings"
            )
        threads = row.get("threads", 1)
        if not isinstance(threads, int) or not 1 <= threads <= settings.parallel_stages:
            raise UserError(
                f"{where} ({row['name']}) has threads: {threads}; "
                f"give 1 to parallel_stages ({settings.parallel_stages})"
            )
        if not (ROOT / "rlhf" / f"{row['run'].replace('.', '/')}.py").is_file():  # a dot leads into a folder
            raise UserError(f"{where} ({row['name']}) runs '{row['run']}', but there is no rlhf/{row['run']}.py")
        before = [stage.name for stage in stages]
        if row["name"] in before:
            raise UserError(f"{where} has the name '{row['name']}' of an earlier stage; names must differ")
        if missing := [need for need in row.get("needs", []) if need not in before]:
            raise UserError(f"{where} ({row['name']}) needs {missing}, not among the stages before it: {before}")
        folder = Path(settings.output_dir) / row["name"]
        filled = fill(row.get("settings") or {}, names) | {"output_dir": str(folder)}
        filled.setdefault("seed", settings.seed)
        stages.append(Stage(row["name"], row["run"], tuple(row.get("needs", [])), filled, folder, threads))
    return stages


def check_stages(stages: list[Stage], awaited: Collection[str] = ()) -> None:
    """Parses the settings of every stage that is not done as its script will, and looks for what they name.

    Raises UserError naming the stage and the field. A file or model counts as there where an earlier stage's folder
    will hold it, where it is among the `awaited` files, or where it may be a name on the Hub.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "stage.yaml"
        for i, stage in enumerate(stages):
            if stage.done:
                continue
            config.write_text(yaml.safe_dump(stage.settings, sort_keys=False))
            try:
                check(importlib.import_module(f"rlhf.{stage.run}").main, ["--config", str(config)])
            except UserError as error:
                raise UserError(f"stage {stage.name}: {str(error).replace(f'{config}: ', '')}") from error
            made = {earlier.folder for earlier in stages[:i]}
            for name, value in inputs(stage.settings):
                if value in awaited or made & {Path(value), *Path(value).parents} or Path(value).exists():
                    continue
                if _local(value):
                    raise UserError(f"stage {stage.name}: {name}: {value} does not exist")


def inputs(settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, text) of everything that a stage's settings name to be read."""
    for name, value in settings.items():
        if (name.endswith(INPUT_ENDINGS) or name == "import_labels") and name != "reject_file":
            for item in value if isinstance(value, list) else [value]:
                if isinstance(item, str) and item:
                    yield name, item


def _local(value: str) -> bool:
    """Whether a name can only be that of a local file or folder: Hub names have one slash and no data file's ending."""
    return value.endswith((*JSON_SUFFIXES, ".parquet")) or value.startswith((".", "/", "~")) or value.count("/") > 1


def _run_stage(stage: Stage) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    config = stage.folder / "stage.yaml"
    config.write_text(yaml.safe_dump(stage.settings, sort_keys=False))
    started = time.time()
    importlib.import_module(f"rlhf.{stage.run}").main(["--config", str(config)])
    (stage.folder / "seconds.json").write_text(json.dumps({"seconds": round(time.time() - started, 1)}))


def _run_forked(stage: Stage, log: Path) -> None:
    """Body of a forked process: output goes to the stage's log; a user's mistake ends it with one line."""
    with log.open("a", buffering=1) as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        sys.stdout = sys.stderr = out  # they need not be files 1 and 2, for instance in a notebook
        try:
            torch.set_num_threads(stage.threads)
            _run_stage(stage)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


def _clear(folder: Path) -> None:
    """Empties a stage's folder but for `shards/`: the store knows by itself which of its rows the new settings and
    inputs would sample again just so (rlhf/shards.py), and they may have cost days."""
    # stage.yaml goes last: killed before that, the next start still sees that the rest is of other settings.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "stage.yaml"):
        if path.name == "shards":
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def run_stages(stages: list[Stage], parallel: int, console: Console) -> None:
    """Runs the stages that are not done; a stage starts when all that it needs is done.

    Raises UserError with the end of the log where a stage fails; stages already running are waited for.
    """
    done = {stage.name for stage in stages if stage.done}
    for stage in stages:
        if stage.name in done and any(need not in done for need in stage.needs):
            done.discard(stage.name)  # what it was made from is made anew
    for name in [stage.name for stage in stages if stage.name in done]:
        console.print(f"[dim]{name}: complete, not run again[/dim]")
    waiting = [stage for stage in stages if stage.name not in done]
    for stage in waiting:
        stale = not stage.begun or any(need not in done for need in stage.needs)
        if stale and (stage.folder / "stage.yaml").exists():
            _clear(stage.folder)  # its checkpoints are of other settings or of other inputs
    if parallel == 1:
        for i, stage in enumerate(waiting):
            console.print(f"[bold]{stage.name}[/bold] ({i + 1} of {len(waiting)}) ...")
            _run_stage(stage)
        return
    for run in {stage.run for stage in waiting}:
        importlib.import_module(f"rlhf.{run}")  # imported once, before the forks, which share it
    _run_parallel(waiting, done, parallel, console)


def _run_parallel(waiting: list[Stage], done: set[str], parallel: int, console: Console) -> None:
    torch.set_num_threads(1)  # a thread pool does not survive a fork, and small models gain nothing from one
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    context = multiprocessing.get_context("fork")
    running: dict[str, tuple[Any, Stage, float]] = {}
    failed: tuple[Stage, int] | None = None
    started, total = time.time(), len(waiting)
    while running or (waiting and not failed):
        for stage in list(waiting):
            busy = sum(other.threads for _, other, _ in running.values())
            if failed or not all(need in done for need in stage.needs):
                continue
            if busy + stage.threads > parallel:
                break  # the stages keep their order: a later one does not overtake one that waits for threads
            waiting.remove(stage)
            stage.folder.mkdir(parents=True, exist_ok=True)
            process = context.Process(target=_run_forked, args=(stage, stage.folder / "log.txt"), name=stage.name)
            process.start()
            running[stage.name] = (process, stage, time.time())
            console.print(f"{time.time() - started:6.0f} s  {stage.name}: started")
        time.sleep(0.2)
        for name, (process, stage, since) in list(running.items()):
            if process.exitcode is None:
                continue
            del running[name]
            if process.exitcode:
                failed = failed or (stage, process.exitcode)
                console.print(f"[red]{time.time() - started:6.0f} s  {name}: failed[/red]")
                continue
            done.add(name)
            console.print(
                f"{time.time() - started:6.0f} s  [green]{name}: done[/green] in {time.time() - since:.0f} s "
                f"({total - len(waiting) - len(running)} of {total})"
            )
    if failed:
        stage, _ = failed
        tail = "\n".join((stage.folder / "log.txt").read_text().splitlines()[-15:])
        raise UserError(
            f"stage {stage.name} failed; the end of {stage.folder / 'log.txt'}:\n{tail}\n"
            "Start the same command again to continue."
        )


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Runs the pipeline; returns the summary of the report module, or {}."""
    (settings,) = parse(PipelineSettings, args=args)
    stages = read_stages(settings)
    check_stages(stages)
    console = Console(highlight=False)
    started = time.time()
    with alone(settings.output_dir):
        console.print(f"[bold]{len(stages)} stages[/bold] -> {settings.output_dir}")
        run_stages(stages, settings.parallel_stages, console)
        if not settings.report:
            return {}
        report = importlib.import_module(f"rlhf.{settings.report}")
        return report.write(Path(settings.output_dir), wall_seconds=round(time.time() - started, 1), console=console)


if __name__ == "__main__":
    entry(main)
