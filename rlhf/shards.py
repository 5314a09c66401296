"""Work in shards, each written whole: a run that was killed continues, redoing at most one shard a process.

Shards lie in `<output_dir>/shards/<identity>/00012.jsonl`. The identity hashes everything that shapes their content, so
rows of other settings, prompts or weights are never taken for this run's, and none are deleted.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.records import write_jsonl

Row = dict[str, Any]


def shard_folder(output_dir: str | Path, content: Mapping[str, Any]) -> Path:
    """Folder of the shards whose content is a function of `content` (plain JSON values)."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return Path(output_dir) / "shards" / digest[:16]


def weights_stamp(path: str) -> list[list[Any]]:
    """Name, size and change time of each weight and config file of a local model folder; empty for a Hub name."""
    files = [file for end in ("*.safetensors", "*.json") for file in Path(path).glob(end)]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]


def run_shards(
    folder: Path, count: int, size: int, work: Callable[[range], list[Row]], process: int = 0, processes: int = 1
) -> Iterator[int]:
    """Do this process's part of the items 0 .. count - 1, `size` a shard; yields the items done after each shard.

    `work` gets the indices of one shard and returns its rows. Shards already on disk are not computed again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(process, -(-count // size), processes):
        items = range(shard * size, min((shard + 1) * size, count))
        path = folder / f"{shard:05d}.jsonl"
        if not path.exists():
            write_jsonl(path, work(items))
        yield items.stop


def read_shards(folder: Path, count: int, size: int) -> list[Row]:
    """All rows of all shards, in order. Raises FileNotFoundError where a shard is missing."""
    rows: list[Row] = []
    for shard in range(-(-count // size)):
        with (folder / f"{shard:05d}.jsonl").open(encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    return rows


def without_failed(rows: list[Row], max_failed_share: float, count: int) -> list[Row]:
    """The rows of the items that have a result; `count` items in all.

    Raises UserError where more than `max_failed_share` of them failed, with the reasons.
    """
    reasons = Counter(row["error"] for row in rows if "error" in row)
    failed = sum(reasons.values())
    if failed > max_failed_share * count:
        shown = "".join(f"\n  {number} x {reason}" for reason, number in reasons.most_common(3))
        raise UserError(
            f"{failed} of {count} prompts failed, all others are kept; start the same command again to try just these, "
            f"or raise max_failed_share to go on without them. Why they failed:{shown}"
        )
    return [row for row in rows if "error" not in row]
