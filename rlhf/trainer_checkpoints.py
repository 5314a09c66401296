"""Checkpoints of the Hugging Face Trainer that can be trusted: checksums, the newest whole one, and which ones to keep.

A checkpoint is a folder `checkpoint-<step>`. The checksums of its files are written last, so that one that is
incomplete, truncated or changed is known before anything is loaded from it.
"""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

from rlhf.run import write_atomic

CHECKSUMS = "checksums.json"

logger = logging.getLogger(__name__)


def write_checksums(checkpoint: Path) -> None:
    """Write the SHA-256 of every file in the folder and below to CHECKSUMS in it: the last act of saving."""
    write_atomic(checkpoint / CHECKSUMS, json.dumps(_sums(checkpoint), indent=1) + "\n")


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None where every file is as it was written."""
    try:
        expected = json.loads((checkpoint / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it is incomplete (no {CHECKSUMS}): the run was killed while it saved"
    except ValueError:
        expected = None
    if not isinstance(expected, dict):
        return f"{CHECKSUMS} is not readable"
    found = _sums(checkpoint)
    if missing := sorted(expected.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(found.keys() - expected.keys()):
        return f"{extra[0]} was added after it was saved"
    changed = sorted(name for name in expected if expected[name] != found[name])
    return f"{changed[0]} was truncated or changed after it was saved" if changed else None


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is as it was written; None without one. Each refused one is a warning."""
    for checkpoint in reversed(_checkpoints(folder)):
        if (fault := damage(checkpoint)) is None:
            return checkpoint
        logger.warning("%s is not used: %s", checkpoint, fault)
    return None


def drop_newer(folder: Path, step: int) -> None:
    """Remove checkpoints of later steps than `step`: refused ones, whose steps are about to be taken again."""
    for checkpoint in _checkpoints(folder):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)


def keep_newest(folder: Path, count: int) -> None:
    """Remove all but the newest `count` checkpoints. Call it once the newest has its checksums."""
    for checkpoint in _checkpoints(folder)[:-count]:
        shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    """The number of optimizer steps that a checkpoint was written after."""
    return int(checkpoint.name.split("-")[-1])


def _checkpoints(folder: Path) -> list[Path]:
    """Whole or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=step_of)


def _sums(checkpoint: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and not path.name.startswith(CHECKSUMS):  # nor what a kill left of one
            with path.open("rb") as file:
                sums[path.relative_to(checkpoint).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
