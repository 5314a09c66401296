"""scores.npz: all that rejection sampling knows of its responses but their text, as plain arrays.

P prompts x K responses.
[P, K]: the rewards: `combined`, those of the reward models in use, and `function_<name>` of reward functions (nan where
one does not apply); where there are, gold scores; `finished`, `usable`, `tokens` (the end token included), `seed`,
`duplicate_of` (index of an earlier response of equal text, or -1).
[P]: `best`, `median`, `random`, `worst` (index of the pick, -1 where the prompt is left out), `is_safety`, `prompt_id`
(a hash), `seconds` (for sampling and scoring, an equal part of its batch's). [1]: `temperature`.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from rlhf.selection import duplicate_of

SCORES = ("combined", "helpfulness", "safety")  # the rewards, raw scores; a reward model that is not in use has none
FUNCTION = "function_"  # begins the names of scores by the user's own functions
GOLD = ("gold_helpfulness", "gold_safety")
NAME = "scores.npz"
MATRICES = ("combined", "finished", "usable", "tokens", "seed", "duplicate_of")
COLUMNS = ("best", "median", "random", "worst", "is_safety", "prompt_id", "seconds")


def write_scores(folder: Path, rows: list[dict[str, Any]], picks: dict[str, list[int | None]]) -> None:
    """Write scores.npz into a run folder, whole or not at all."""
    names = [name for name in (*SCORES, *GOLD, "finished", "usable") if name in rows[0]]
    arrays = {
        **{name: np.array([row[name] for row in rows]) for name in names},
        **{
            name: np.array([row[name] for row in rows], dtype=np.float64)  # None becomes nan
            for name in rows[0]
            if name.startswith(FUNCTION)
        },
        "tokens": np.array([[len(ids) for ids in row["response_ids"]] for row in rows], dtype=np.int64),
        "seed": np.array([row["seeds"] for row in rows], dtype=np.int64),
        "duplicate_of": np.array([duplicate_of(row["responses"]) for row in rows], dtype=np.int64),
        **{kind: np.array([-1 if i is None else i for i in column]) for kind, column in picks.items()},
        "is_safety": np.array([row["is_safety"] for row in rows]),
        "prompt_id": np.array([_fingerprint([row["prompt"], row["is_safety"]]) for row in rows]),
        "seconds": np.array([row["seconds"] for row in rows]),
        "temperature": np.array([rows[0]["temperature"]]),
    }
    temporary = folder / "scores.tmp.npz"
    np.savez_compressed(temporary, **arrays)
    temporary.replace(folder / NAME)


def read_scores(folder: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a run folder's scores.npz. UserError, naming the file, where it is missing, damaged or partial."""
    path = Path(folder) / NAME
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; name a folder that rlhf/rejection_sampling.py has written") from error
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete summary.json beside it and start its run again: samples are kept"
        ) from error
    if missing := [name for name in (*MATRICES, *COLUMNS, "temperature") if name not in arrays]:
        raise UserError(f"{path} lacks {', '.join(missing)}: it is of an older version; run rejection sampling again")
    prompts, k = arrays["combined"].shape
    optional = [name for name in arrays if name in SCORES or name.startswith(FUNCTION)]
    sizes: dict[str, tuple[int, ...]] = dict.fromkeys((*MATRICES, *optional), (prompts, k))
    sizes |= dict.fromkeys(COLUMNS, (prompts,))
    for name, size in sizes.items():
        if arrays[name].shape != size:
            raise UserError(f"{path}: {name} has the shape {arrays[name].shape}, not {size}")
    for name in [name for name in (*SCORES, *GOLD) if name in arrays]:
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"{path}: {name} holds a value that is no number; such scores cannot be ranked")
    return arrays


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
