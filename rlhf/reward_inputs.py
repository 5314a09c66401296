"""The pairs that a reward model learns from and is tested on: read, screened, mixed, with a report by file.

Nothing is left out in silence: pairs dropped here are written to `dropped-train.jsonl` with file, line and reason.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.chat import ChatFormat
from configs.errors import UserError
from configs.records import SHOWN_ISSUES, read_preferences, split_by_prompt, write_jsonl
from configs.reward_settings import RewardSettings
from reward.mixing import interleaved, mismatched_pairs, mix, mix_sizes
from reward.screening import Place, find_contradictions, find_duplicates, find_leaks

logger = logging.getLogger(__name__)

Row = dict[str, Any]
DROPPED = "dropped-train.jsonl"  # in the run folder
HALVES = "halves of the prompts"  # the seed of that split: of every run alike, and of no split by a run's seed


@dataclass(frozen=True)
class RewardInputs:
    """What training starts from. `report` has one entry a train file (`share` of all drawn; all else counts of pairs).
    `mismatched` counts the pairs of `mismatched_share`, which are in no entry.

    read = held_out + other_half + leaked + duplicates + available where both are dropped, as is the default; drawn =
    trained on, of which `repeats` are second or later uses. `near_leaks` and `contradictions` are counted only.
    """

    train_rows: list[Row]
    test_rows: list[Row]
    report: list[dict[str, Any]]
    mismatched: int = 0


@dataclass(frozen=True)
class _File:
    """One data file, or its part for training or for testing: the line of each row beside it."""

    path: str
    rows: list[Row]
    lines: list[int]

    def where(self, number: int) -> str:
        return f"{self.path}:{self.lines[number]}"

    def split(self, fraction: float, seed: int | str) -> tuple["_File", "_File"]:
        line_of = {id(row): line for row, line in zip(self.rows, self.lines, strict=True)}
        train, test = (
            _File(self.path, rows, [line_of[id(row)] for row in rows])
            for rows in split_by_prompt(self.rows, fraction, seed)
        )
        return train, test


def read_inputs(settings: RewardSettings, chat_format: ChatFormat, seed: int, folder: Path | None) -> RewardInputs:
    """Read and check the files, drop what the settings say, draw the mixture. The same result on every process.

    `prompt_half` takes half of the training prompts by a hash of the prompt alone: in all files and under all seeds a
    prompt is in the same half.

    `folder`, the run folder, is given on the main process only: bad and dropped rows are written there, warnings and
    the table of the mixture are shown. UserError: bad files, leaks under `leaked_prompts: stop`, a file of which
    nothing is left for its share.
    """

    def read(path: str, split: str) -> _File:
        records = read_preferences(
            path,
            reject_file=None if folder is None else folder / f"rejected-{split}.jsonl",
            max_reject_share=settings.max_reject_share,
            chat_format=chat_format,
            split=split,
        )
        return _File(path, records.rows, records.lines)

    whole = train = [read(path, "train") for path in settings.train_files]
    if settings.eval_files is not None:
        test = [read(path, "test") for path in settings.eval_files]
    else:
        parts = [file.split(settings.eval_fraction, seed) for file in whole]
        train, test = [part[0] for part in parts], [part[1] for part in parts]
    held_out = [len(file.rows) - len(rest.rows) for file, rest in zip(whole, train, strict=True)]
    if settings.prompt_half != "all":
        half = ("first", "second").index(settings.prompt_half)
        train = [file.split(0.5, HALVES)[half] for file in train]
    test_rows = [row for file in test for row in file.rows]
    test_places = [file.where(number) for file in test for number in range(len(file.rows))]

    sources = [file.rows for file in train]
    leaks = find_leaks(sources, test_rows)
    if leaks.same and settings.leaked_prompts == "stop":
        raise UserError(
            f"leaked_prompts: {_named(leaks.same, train)} with a prompt that is also tested; take them out, or set "
            "leaked_prompts to drop or keep"
        )
    leaked = leaks.same if settings.leaked_prompts == "drop" else {}
    repeated = find_duplicates(sources, leaked)
    dropped = {place: ("test prompt", test_places[test]) for place, test in leaked.items()}
    if settings.deduplicate:
        dropped |= {place: ("duplicate", train[s].where(i)) for place, (s, i) in repeated.items()}
    contradictions = find_contradictions(sources, dropped)
    kept = [[row for i, row in enumerate(rows) if (s, i) not in dropped] for s, rows in enumerate(sources)]
    if folder is not None:
        _warn(settings, train, leaks.same, repeated)
        _write_dropped(folder / DROPPED, train, dropped)

    available = [len(rows) for rows in kept]
    sizes = mix_sizes(available, settings.mix_weights, settings.mix_rows)
    report = [
        {
            "file": file.path,
            "read": len(file.rows),
            "held_out": held_out[s],
            "other_half": len(file.rows) - held_out[s] - len(sources[s]),
            "leaked": _count(leaks.same, s),
            "near_leaks": _count(leaks.near, s),
            "duplicates": _count(repeated, s),
            "contradictions": _count(contradictions, s),
            "available": available[s],
            "drawn": sizes[s],
            "repeats": max(0, sizes[s] - available[s]),
            "share": sizes[s] / max(1, sum(sizes)),
        }
        for s, file in enumerate(whole)
    ]
    if folder is not None:
        Console().print(_table(report))
    drawn = mix(kept, sizes, seed)
    mismatched = mismatched_pairs(drawn, settings.mismatched_share, seed)
    return RewardInputs(interleaved(drawn, mismatched, seed), test_rows, report, len(mismatched))


def _count(places: Collection[Place], source: int) -> int:
    return sum(s == source for s, _ in places)


def _named(places: Collection[Place], files: Sequence[_File]) -> str:
    """How many pairs, and where the first few are; never what they say."""
    shown = [files[s].where(i) for s, i in list(places)[:SHOWN_ISSUES]]
    return f"{len(places)} training pairs ({', '.join(shown)}{', ...' if len(places) > len(shown) else ''})"


def _warn(
    settings: RewardSettings, files: Sequence[_File], leaked: Collection[Place], repeated: Collection[Place]
) -> None:
    if leaked:
        fate = f"dropped, see {DROPPED}" if settings.leaked_prompts == "drop" else "kept: the accuracy flatters"
        logger.warning("%s with a prompt that is also tested: %s", _named(leaked, files), fate)
    if repeated:
        fate = f"dropped, see {DROPPED}" if settings.deduplicate else "kept"
        logger.warning("%s that repeat an earlier one: %s", _named(repeated, files), fate)


def _write_dropped(path: Path, files: Sequence[_File], dropped: dict[Place, tuple[str, str]]) -> None:
    """The dropped pairs, each with the place of the test row or earlier pair that it equals."""
    path.unlink(missing_ok=True)  # an earlier run's
    if dropped:
        write_jsonl(
            path,
            (
                {"file": files[s].path, "line": files[s].lines[i], "reason": reason, "detail": f"as {other}",
                 "row": files[s].rows[i]}
                for (s, i), (reason, other) in sorted(dropped.items())
            ),
        )  # fmt: skip


def _table(report: Sequence[dict[str, Any]]) -> Table:
    """The mixture as it is in the summary under `mix`, one column a file."""
    table = Table(title="Training pairs", title_justify="left")
    table.add_column("file")
    for entry in report:
        table.add_column(entry["file"], justify="right", overflow="fold")
    for name in list(report[0])[1:]:
        values = [f"{entry[name]:.1%}" if name == "share" else str(entry[name]) for entry in report]
        table.add_row(name.replace("_", " "), *values)
    return table
