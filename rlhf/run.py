"""Run folders: what a stage was told, what it measured, and whether it finished.

    settings.yaml      the resolved settings           environment.json   versions, platform, commit
    metrics.jsonl      one object a logged step         samples.jsonl      decoded samples with scores
    alarms.jsonl       warnings of PPO, raised and cleared (where there were any)
    summary.json       written last and atomically: its presence means that the stage is complete

Only the main process writes. Metrics also go to the trackers named by `report_to`.
"""

import importlib.util
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from configs.whole_files import replace_file, writing
from rlhf.claims import claim

TRACKERS = ("tensorboard", "wandb", "trackio")
# Where or how often a run writes, or how GPUs share its work, does not change its results, so a changed value does not
# make it another run.
NOT_COMPARED = ("output_dir", "report_to", "logging_steps", "resume", "processes", "gather_weights")


class RunFolder:
    """The output folder of one stage.

    Args:
        output_dir: created with its parents.
        settings: the resolved settings, flat.
        stage: the stage's name, put into the summary and used as the tracker's project.
        resume_step: the step of the checkpoint that the stage continues from (0: a fresh start). Lines of
            metrics.jsonl, samples.jsonl and alarms.jsonl past it are dropped, because these steps will be run again.
    """

    def __init__(self, output_dir: str | Path, settings: Mapping[str, Any], stage: str, resume_step: int = 0) -> None:
        self.path = Path(output_dir)
        self.stage = stage
        self.is_main = _rank() == 0
        self.settings = plain(dict(settings))
        self.started = time.perf_counter()
        self._trackers: list[Any] = []
        names = _tracker_names(self.settings.get("report_to"))  # checked on every rank, so that all stop alike
        if not self.is_main:
            return
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path} is a file; name a folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be created: {error.strerror}") from error
        self._begin(resume_step)  # from here on the folder belongs to a new, unfinished run
        write_atomic(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        self._trackers = [_start_tracker(name, stage, self.path, self.settings) for name in names]

    def _begin(self, resume_step: int) -> None:
        (self.path / "summary.json").unlink(missing_ok=True)
        for name in ("metrics.jsonl", "samples.jsonl", "alarms.jsonl"):
            _drop_steps_after(self.path / name, resume_step)
        write_atomic(self.path / "settings.yaml", yaml.safe_dump(self.settings, sort_keys=False, allow_unicode=True))

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Around the writing of all results of a stage whose work several commands on this folder may share.

        They write one after the other, each from the start: the folder never mixes files or lines of two of them.
        """
        if not self.is_main:
            yield
            return
        with claim(self.path / "finish.lock", wait=True):
            self._begin(resume_step=0)
            yield

    @staticmethod
    def completed(output_dir: str | Path, settings: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """The summary of a finished run in this folder, else None.

        With `settings`, a run made with other settings (but for NOT_COMPARED) counts as not there.
        """
        folder = Path(output_dir)
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            saved = yaml.safe_load((folder / "settings.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return None
        if settings is not None and _compared(saved or {}) != _compared(plain(dict(settings))):
            return None
        return summary

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and send it to the trackers. Values are plain numbers or 0-dim tensors."""
        if not self.is_main:
            return
        values = {name: _number(value) for name, value in metrics.items()}
        _append(self.path / "metrics.jsonl", [{"step": step, **values}])
        for tracker in self._trackers:
            tracker.log({name: value for name, value in values.items() if value is not None}, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append decoded samples with their scores to samples.jsonl."""
        if self.is_main:
            _append(self.path / "samples.jsonl", [{"step": step, **plain(row)} for row in rows])

    def alarms(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Append warnings to alarms.jsonl."""
        if self.is_main and rows:
            _append(self.path / "alarms.jsonl", [{"step": step, **plain(row)} for row in rows])

    def finish(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """Close the trackers, then write summary.json atomically. Returns what was written."""
        result = plain(dict(summary))
        result = {"stage": self.stage, **result}
        result.setdefault("seconds", round(time.perf_counter() - self.started, 3))
        if self.is_main:
            for tracker in self._trackers:
                tracker.finish()
            write_atomic(self.path / "summary.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return result


def numbers(summary: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The plain numbers of a nested summary, named by their path: {"a": {"b": 1}, "c": "x"} -> {"a/b": 1}. For the one
    line that a stage without steps logs."""
    found: dict[str, float] = {}
    for name, value in summary.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{prefix}{name}"] = value
    return found


def saved_settings(output_dir: str | Path) -> dict[str, Any]:
    """The settings of the run in this folder; empty where there is none."""
    try:
        return yaml.safe_load((Path(output_dir) / "settings.yaml").read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError):
        return {}


def write_atomic(path: Path, text: str) -> None:
    """`replace_file` for text."""
    replace_file(path, text.encode("utf-8"))


def environment() -> dict[str, Any]:
    """What a result may depend on besides its settings. Holds no environment variables, so no secrets."""
    packages = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy", "tokenizers")
    versions = {name: metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": versions,
        "commit": _commit(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))  # set by accelerate launch and torchrun in every process


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _drop_steps_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").split("\n"):  # splitlines would cut text at U+2028 and its like
        try:
            row = json.loads(line)
        except ValueError:  # the last line of a killed run may be cut short
            continue
        if step > 0 and row["step"] <= step:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept))


def _append(path: Path, rows: list[dict[str, Any]]) -> None:
    with writing(path.parent), path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _number(value: Any) -> float | int | None:
    number = value.item() if hasattr(value, "item") else value
    # JSON has no NaN; null keeps the line readable by every reader and still shows that the step had no value.
    return None if isinstance(number, float) and not math.isfinite(number) else number


def plain(value: Any) -> Any:
    """`value` in the types of YAML and JSON: unknown objects (paths) as text, tensors and numpy scalars as numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(item) for item in value]
    if isinstance(value, str | bool) or value is None:
        return str(value) if isinstance(value, str) else value
    if isinstance(value, int | float) or getattr(value, "ndim", None) == 0:
        return _number(value)
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NOT_COMPARED}


def _tracker_names(report_to: Any) -> list[str]:
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    names = [name for name in names if name not in ("none", "")]
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"report_to is {name!r}; choose none, {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"report_to is {name!r}, but that package is not installed: pip install {name}")
    return names


def _start_tracker(name: str, stage: str, folder: Path, settings: dict[str, Any]) -> Any:
    from accelerate import tracking

    tracker_type = {
        "tensorboard": tracking.TensorBoardTracker,
        "wandb": tracking.WandBTracker,
        "trackio": getattr(tracking, "TrackioTracker", None),
    }[name]
    if tracker_type is None:
        raise UserError(f"report_to is {name!r}, which this version of accelerate does not know; update accelerate")
    where = {"logging_dir": str(folder)} if name == "tensorboard" else {}
    tracker = tracker_type(stage, **where)
    if hasattr(tracker, "start"):
        tracker.start()
    tracker.store_init_configuration({key: value for key, value in settings.items() if _is_scalar(value)})
    return tracker


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float | bool)
