"""The preferences of several collections as one folder, so that a mixture counts them as one source (paper §3.2.1).

    accelerate launch rlhf/pool_preferences.py --preference_dirs runs/x/collect runs/y/collect --output_dir runs/pairs

Writes helpfulness.jsonl, safety.jsonl and their `_test` files, the oldest collection first. A prompt may be held out in
one collection and not in another: rlhf/train_reward.py drops training pairs whose prompt is tested, and repeated pairs.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

from dataclasses import asdict
from typing import Any

from configs.errors import UserError
from configs.model_settings import RunSettings
from configs.records import write_jsonl
from configs.rounds_settings import PairsSettings
from configs.row_files import BadRow, read_rows
from rlhf.cli import entry, parse
from rlhf.models import data_fingerprints
from rlhf.run import RunFolder, numbers

FILES = ("helpfulness", "helpfulness_test", "safety", "safety_test")


def read_folder(folder: str) -> dict[str, list[dict[str, Any]]]:
    """The four files of one collection. UserError for a missing file or a line that is no record."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in FILES:
        path = Path(folder) / f"{name}.jsonl"
        if not path.exists():
            raise UserError(f"preference_dirs: {path} is missing; is {folder} a folder of rlhf/collect_preferences.py?")
        found[name] = []
        for line, row in read_rows(path):
            if isinstance(row, BadRow):
                raise UserError(f"{path}, line {line}: {row}")
            found[name].append(row)
    return found


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Joins the files; returns the counts by file and folder."""
    settings, run = parse(PairsSettings, RunSettings, args=args)
    files = [str(Path(path) / f"{name}.jsonl") for path in settings.preference_dirs for name in FILES]
    resolved = asdict(settings) | asdict(run) | {"data": data_fingerprints(files)}
    if completed := RunFolder.completed(run.output_dir, resolved):
        return completed
    folders = {path: read_folder(path) for path in settings.preference_dirs}
    folder = RunFolder(run.output_dir, resolved, stage="pool_preferences")
    summary: dict[str, Any] = {}
    for name in FILES:
        if folder.is_main:
            write_jsonl(folder.path / f"{name}.jsonl", [row for found in folders.values() for row in found[name]])
        summary[name] = sum(len(found[name]) for found in folders.values())
    summary["by_folder"] = {path: {name: len(found[name]) for name in FILES} for path, found in folders.items()}
    folder.log(0, numbers(summary))
    return folder.finish(summary)


if __name__ == "__main__":
    entry(main)
