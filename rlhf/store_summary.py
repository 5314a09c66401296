"""What is in a sample store, read without changing anything: shards by state, and figures about their rows."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from configs.errors import UserError
from rlhf.claims import is_claimed
from rlhf.shards import DamagedShard, Row, lock_path, read_shard, shard_path

# Scores of rejection sampling (one a response), and of the evaluation of reward models (one a row).
SCORES = ("combined", "helpfulness", "safety", "gold_helpfulness", "gold_safety", "chosen", "rejected")


def find_stores(output_dir: str | Path) -> list[Path]:
    """The folders of all stores of a run. Raises UserError where there is none."""
    found = sorted(path.parent for path in Path(output_dir).glob("shards/*/settings.json"))
    if not found:
        raise UserError(f"output_dir: no samples in {output_dir}; name a run folder, one that has shards/ in it")
    return found


def store_summary(folder: Path) -> dict[str, Any]:
    """One store: identity, settings, bytes on disk, its shards by state (see `read_state`), and the rows' `Figures`."""
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        count, size = int(settings.pop("items")), int(settings.pop("items_per_shard"))
        if count < 0 or size < 1:
            raise ValueError(f"{count} items, {size} a shard")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / 'settings.json'} cannot be read: {error!r}") from error
    states: dict[str, list[int]] = {"done": [], "claimed": [], "missing": [], "damaged": []}
    figures = Figures()
    for shard in range(-(-count // size)):
        state, rows = read_state(folder, shard)
        states[state].append(shard)
        for row in rows:
            figures.add(row)
    return {
        "store": folder.name,
        "items": count,
        "shards": {name: len(numbers) for name, numbers in states.items()},
        "damaged_shards": [str(shard_path(folder, shard)) for shard in states["damaged"]],
        **figures.summary(),
        "bytes": sum(map(_size, folder.iterdir())),
        "settings": settings,
    }


def _size(path: Path) -> int:
    """Bytes; 0 for a file that a process has renamed or removed since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def read_state(folder: Path, shard: int) -> tuple[str, list[Row]]:
    """A shard's state and rows: done, claimed (by a live process, and not written yet), missing or damaged."""
    try:
        return "done", read_shard(shard_path(folder, shard))
    except FileNotFoundError:
        state = "missing"
    except DamagedShard:
        state = "damaged"
    return ("claimed" if is_claimed(lock_path(folder, shard)) else state), []


class Figures:
    """Counts and means over rows of any stage, gathered row by row: a store may be larger than the memory."""

    def __init__(self) -> None:
        self.items: set[int] = set()
        self.rows = self.tokens = 0
        self.failed: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.sums: defaultdict[str, float] = defaultdict(float)
        self.counts: Counter[str] = Counter()

    def add(self, row: Row) -> None:
        self.rows += 1
        if "error" in row:
            self.failed[row["error"]] += 1
            return
        self.items.add(row.get("index", self.rows))
        self.reasons.update(finish_reasons(row))
        self.tokens += sum(map(len, row.get("response_ids", [])))
        for name in SCORES:
            values = row.get(name, [])
            finite = [v for v in (values if isinstance(values, list) else [values]) if math.isfinite(v)]
            self.sums[name] += math.fsum(finite)
            self.counts[name] += len(finite)

    def summary(self) -> dict[str, Any]:
        """Items with a result, failed ones by reason, samples by finish reason, tokens of responses, mean raw scores.

        `tokens` is None in stores that keep texts only.
        """
        return {
            "items_done": len(self.items),
            "failed": dict(self.failed.most_common()),
            "samples": self.reasons.total(),
            "finish_reasons": dict(self.reasons.most_common()),
            "tokens": self.tokens or None,
            "mean_scores": {name: round(self.sums[name] / n, 5) for name, n in self.counts.items() if n},
        }


def finish_reasons(row: Row) -> list[str]:
    """How each sample of a row ended; a row of collected preferences has two, and none where the pair was skipped."""
    if "finish_reasons" in row:
        return row["finish_reasons"]
    if "finished" in row:
        return ["stop" if finished else "length" for finished in row["finished"]]
    if "unfinished" in row:
        return ["length"] * row["unfinished"] + ["stop"] * (2 - row["unfinished"])
    return []
