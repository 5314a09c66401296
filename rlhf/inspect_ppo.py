"""A PPO run as its folder tells it, finished or still going: series, reward against KL, samples, time by phase.

What notebooks/ppo_run.ipynb reads; rlhf/ppo_views.py shows it. Nothing is loaded but the folder's text files.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from configs.errors import UserError
from rlhf.alarms import spells
from rlhf.summary import read_json, read_rows, read_settings

# time/<phase> of metrics.jsonl in the order of an iteration; `other` is what they leave of it.
PHASES = ("sample", "reward", "recompute", "reference", "value", "update", "other", "evaluation")
SMALL = 0.002


@dataclass(frozen=True)
class PPORun:
    """What a run folder holds so far."""

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]  # metrics.jsonl, by step
    samples: Sequence[Mapping[str, Any]]
    alarms: Sequence[Mapping[str, Any]]  # rlhf.alarms.spells
    summary: Mapping[str, Any] | None  # None while it runs

    def series(self, figure: str) -> tuple[list[int], list[float]]:
        """Steps at which a figure was logged, and its values."""
        points = [(row["step"], row[figure]) for row in self.rows if row.get(figure) is not None]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def figures(self) -> set[str]:
        """Names of all figures that were logged."""
        return {name for row in self.rows for name, value in row.items() if value is not None}

    @property
    def best_step(self) -> int | None:
        """The evaluation with the best objective so far; the one that `save_best` keeps."""
        if self.summary and self.summary.get("best"):
            return self.summary["best"]["step"]
        steps, values = self.series("eval/objective")
        return steps[max(range(len(values)), key=values.__getitem__)] if values else None


class Point(NamedTuple):
    """One evaluation on the plane of reward against KL."""

    step: int
    kl: float  # nats a response
    reward: float


def load_runs(paths: Sequence[str | Path]) -> list[PPORun]:
    """The runs in these folders, under the shortest names that tell them apart. UserError where one is no PPO run."""
    folders = [Path(str(path).strip()) for path in paths if str(path).strip()]
    if not folders:
        raise UserError("no run is named; put one or more PPO run folders into the first cell")
    return [_load(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    depth = max(len(folder.parts) for folder in folders)
    for length in range(1, depth + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(folders):
            return names
    raise UserError("a run is named twice in the first cell")


def _load(folder: Path, name: str) -> PPORun:
    settings = read_settings(folder)
    if not settings:
        raise UserError(
            f"there is no PPO run at {folder}. Run `make demo` (about ten minutes) to get the demo's in runs/demo/ppo, "
            "or name the output_dir of a run of yours in the first cell; it may still be running."
        )
    if "kl_coef" not in settings:
        raise UserError(f"{folder} is a run of another stage, not of rlhf/ppo.py")
    rows = {row["step"]: row for row in read_rows(folder, "metrics.jsonl") if "step" in row}
    alarms = spells(read_rows(folder, "alarms.jsonl"))
    ordered = [rows[step] for step in sorted(rows)]
    return PPORun(name, settings, ordered, read_rows(folder, "samples.jsonl"), alarms, read_json(folder))


def status(run: PPORun) -> str:
    """How far a run is, in a sentence."""
    total = run.settings.get("total_iterations", 0)
    done = run.rows[-1]["step"] if run.rows else 0
    best = f"; best held-out policy so far: iteration {run.best_step}" if run.best_step is not None else ""
    if run.summary:
        return f"{run.name}: finished after {done} of {total} iterations ({run.summary.get('stopped_by')}){best}"
    _, seconds = run.series("time/iteration")
    recent = seconds[-10:]
    left = f", about {(total - done) * sum(recent) / len(recent) / 60:.0f} minutes to go" if recent else ""
    return f"{run.name}: {done} of {total} iterations, not finished{left}{best}"


def frontier(run: PPORun, reward: str = "eval/combined") -> list[Point]:
    """Reward against KL, evaluation by evaluation; over training iterations where there are no evaluations."""
    kl = "eval/kl"
    if "eval/kl" not in run.figures and reward == "eval/combined":
        reward, kl = "reward/combined", "policy/kl"
    known = [row for row in run.rows if row.get(reward) is not None and row.get(kl) is not None]
    return [Point(row["step"], row[kl], row[reward]) for row in known]


def phases(run: PPORun) -> tuple[list[int], dict[str, list[float]]]:
    """Iterations and the seconds of each phase in them, without phases below SMALL of the whole."""
    rows = [row for row in run.rows if row.get("time/iteration") is not None]
    table: dict[str, list[float]] = {name: [] for name in PHASES}
    for row in rows:
        for name in PHASES:
            table[name].append(row.get(f"time/{name}") or 0.0)
        inside = sum(table[name][-1] for name in PHASES if name not in ("other", "evaluation"))
        table["other"][-1] = max(row["time/iteration"] - inside, 0.0)
    total = sum(map(sum, table.values()))
    shown = {name: values for name, values in table.items() if sum(values) > SMALL * total}
    return [row["step"] for row in rows], shown


def held_out_prompts(runs: Sequence[PPORun]) -> list[list[dict[str, str]]]:
    """Prompts whose held-out answers are in samples.jsonl of all runs, in the order of the first run."""
    by_run = [[row["prompt"] for row in run.samples if row.get("split") == "held_out"] for run in runs]
    found: list[list[dict[str, str]]] = []
    for prompt in by_run[0]:
        if prompt not in found and all(prompt in prompts for prompts in by_run):
            found.append(prompt)
    return found


def answers(run: PPORun, prompt: Sequence[Mapping[str, str]]) -> dict[int, Mapping[str, Any]]:
    """The held-out answers to one prompt, by step."""
    return {row["step"]: row for row in run.samples if row.get("split") == "held_out" and row["prompt"] == list(prompt)}


def latest(run: PPORun, count: int) -> list[Mapping[str, Any]]:
    """Training samples of the last step that has any."""
    rows = [row for row in run.samples if row.get("split", "training") == "training"]
    return [row for row in rows if row["step"] == rows[-1]["step"]][:count]


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread, the first and the last among them."""
    ordered = sorted(set(steps))
    if len(ordered) <= count:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (count - 1))] for i in range(count)]
