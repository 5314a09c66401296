"""Work in shards, each written whole: a run that was killed continues, redoing at most one shard a process.

Shards lie in `<output_dir>/shards/<identity>/00012.jsonl.gz`, beside the settings that they were made with
(settings.json). The identity hashes everything that shapes their content, so rows of other settings, prompts or weights
are never taken for this run's, and none are deleted. gzip carries a checksum and a length: a damaged shard shows.

Any number of processes, of one launch or of many, started at any time, share a folder: each takes the first shard that
nobody has (rlhf/claims.py), and at the end waits for those that others still work on, or takes them over.

A row with `error` (a server failed on the item) stands for an item without a result; the next start tries it again.
"""

import gzip
import hashlib
import json
import logging
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.records import write_jsonl
from configs.whole_files import replace_file, writing
from rlhf.claims import claim

Row = dict[str, Any]
Stamp = tuple[int, int, int] | None

POLL_SECONDS = 1.0  # between two looks at shards that others work on
LONG_LIST = 50  # a longer list in the settings is kept as its length and its hash

logger = logging.getLogger(__name__)


class DamagedShard(Exception):
    """A shard that was cut short or changed; the message names the file."""


def shard_folder(output_dir: str | Path, content: Mapping[str, Any], count: int, size: int) -> Path:
    """Folder of the shards of `count` items, `size` a shard, whose content is a function of `content` (JSON values).

    Creates it and writes settings.json: `content` with its long lists shortened, and both numbers.
    """
    folder = Path(output_dir) / "shards" / _digest(content)[:16]
    settings = {name: _short(value) for name, value in content.items()} | {"items": count, "items_per_shard": size}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "settings.json").exists():
        replace_file(folder / "settings.json", (json.dumps(settings, indent=2, default=str) + "\n").encode())
    return folder


def weights_stamp(path: str) -> list[list[Any]]:
    """Name, size and change time of each weight, config and tokenizer file of a local model folder; empty for a Hub
    name."""
    ends = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
    files = [file for end in ends for file in Path(path).glob(end)]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)]


def run_shards(folder: Path, count: int, size: int, work: Callable[[Sequence[int]], list[Row]]) -> Iterator[int]:
    """Compute the items 0 .. count - 1 together with every other process on this folder; ends when all are there.

    `work` gets the indices of one shard, or of those of its items that failed before this start, and returns their
    rows; where an item may fail, all rows have its `index`. Yields how many items are done, by whichever process.

    Raises UserError where the disk is full or not writable; shards that are written stay.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    waiting: dict[int, Stamp] = {}  # shards to do, each with the file that stood there at the start
    done = 0
    for shard in range(-(-count // size)):
        path, items = shard_path(folder, shard), shard_items(shard, count, size)
        before = _stamp(path)
        try:
            to_do, _ = _to_do(path, items)
        except DamagedShard as error:
            logger.warning("%s; its %d items are computed again", error, len(items))
            to_do = items
        if to_do:
            waiting[shard] = before
        else:
            done += len(items)
            yield done
    while waiting:
        for shard, before in list(waiting.items()):
            if _stamp(shard_path(folder, shard)) not in (None, before):
                del waiting[shard]
                done += len(shard_items(shard, count, size))
                yield done
        kept = f"{done} of {count} items are kept in {folder}"
        took = any(_take(folder, n, shard_items(n, count, size), before, work, kept) for n, before in waiting.items())
        if waiting and not took:
            time.sleep(POLL_SECONDS)


def _take(
    folder: Path, shard: int, items: range, before: Stamp, work: Callable[[Sequence[int]], list[Row]], kept: str
) -> bool:
    """Claim a shard and do it. False where another process has it."""
    path = shard_path(folder, shard)
    with claim(lock_path(folder, shard)) as mine:
        if not mine or _stamp(path) != before:  # another process is at it, or finished it since we looked
            return mine
        for leftover in folder.glob(f"{path.name}.*.tmp"):  # of a killed process: a live one would have the claim
            leftover.unlink(missing_ok=True)
        try:
            to_do, rows = _to_do(path, items)
        except DamagedShard:
            to_do, rows = items, []
        rows += work(to_do)
        if to_do != items:  # failed items take their places between the others
            rows.sort(key=lambda row: row["index"])
        try:
            write_jsonl(path, rows)
        except UserError as error:
            raise UserError(f"{error}; {kept}") from error
        return True


def _to_do(path: Path, items: range) -> tuple[Sequence[int], list[Row]]:
    """The items of a shard that are missing or failed, and the rows of the others."""
    if not path.exists():
        return items, []
    rows = read_shard(path)
    failed = {row["index"] for row in rows if "error" in row}
    return sorted(failed), [row for row in rows if row.get("index") not in failed] if failed else rows


def shard_items(shard: int, count: int, size: int) -> range:
    """The items of a shard."""
    return range(shard * size, min((shard + 1) * size, count))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.jsonl.gz"


def lock_path(folder: Path, shard: int) -> Path:
    return folder / f"{shard:05d}.lock"


def read_shard(path: Path) -> list[Row]:
    """The rows of one shard. Raises DamagedShard, and FileNotFoundError where there is none."""
    try:
        with gzip.open(path, "rb") as file:  # its end has a checksum and the length
            rows = [json.loads(line) for line in file]
    except FileNotFoundError:
        raise
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DamagedShard(f"{path} is damaged ({error})") from error
    if not rows:
        raise DamagedShard(f"{path} is damaged (it is empty)")
    return rows


def read_shards(folder: Path, count: int, size: int) -> list[Row]:
    """All rows of all shards, in order. Raises FileNotFoundError where a shard is missing, else as `read_shard`."""
    return [row for shard in range(-(-count // size)) for row in read_shard(shard_path(folder, shard))]


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


def _stamp(path: Path) -> Stamp:
    """What tells one file of this name from another; None where there is none."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return None
    return about.st_mtime_ns, about.st_ino, about.st_size


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _short(value: Any) -> Any:
    """A setting as settings.json shows it: a long list (the prompts) by its length and hash."""
    if isinstance(value, list) and len(value) > LONG_LIST:
        return {"items": len(value), "sha256": _digest(value)}
    return value
