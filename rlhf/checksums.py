"""Checksums of a checkpoint's files: one that is incomplete, truncated or changed is known before it is loaded."""

import hashlib
import json
from pathlib import Path

from rlhf.run import write_atomic

CHECKSUMS = "checksums.json"


def write_checksums(folder: Path) -> None:
    """Write the SHA-256 of every file in `folder` and below to CHECKSUMS in it. The last act of saving a checkpoint."""
    write_atomic(folder / CHECKSUMS, json.dumps(_sums(folder), indent=1) + "\n")


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`; None where every file is as it was written."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"it is incomplete (no {CHECKSUMS}): the run was killed while it saved"
    except ValueError:
        return f"{CHECKSUMS} is not readable"
    found = _sums(folder)
    if missing := sorted(expected.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if extra := sorted(found.keys() - expected.keys()):
        return f"{extra[0]} was added after it was saved"
    changed = sorted(name for name in expected if expected[name] != found[name])
    return f"{changed[0]} was truncated or changed after it was saved" if changed else None


def _sums(folder: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (CHECKSUMS, CHECKSUMS + ".tmp"):
            with path.open("rb") as file:
                sums[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums
