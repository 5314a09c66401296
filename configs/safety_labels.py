"""What is known of a prompt for safety: its risk category and attack vector (Llama 2 §4.2.1), or its place in XSTest.

Messages name file, line and field, never a text: such data hold what nobody wants in a log.
"""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from configs.chat import ChatFormatError, check_messages
from configs.errors import UserError
from configs.record_shapes import prompt_row, required, text
from configs.row_files import BadRow, read_rows

Row = dict[str, Any]

RISK_CATEGORIES = {
    "illicit": "illicit and criminal activities",
    "hateful": "hateful and harmful activities",
    "advice": "unqualified advice",
}
ATTACK_VECTORS = {
    "psychological": "psychological manipulation",
    "logic": "logic manipulation",
    "syntactic": "syntactic manipulation",
    "semantic": "semantic manipulation",
    "perspective": "perspective manipulation",
    "non_english": "non-English languages",
    "other": "others",
}
LABELS = {"risk_category": RISK_CATEGORIES, "attack_vector": ATTACK_VECTORS}
XSTEST_LABELS = ("safe", "unsafe")


def short_name(field: str, value: Any) -> str | None:
    """The short name of a risk category or attack vector, given by its short or whole name in any case, else None."""
    names = {**{name: name for name in LABELS[field]}, **{words.lower(): name for name, words in LABELS[field].items()}}
    return names.get(value.strip().lower()) if isinstance(value, str) else None


def safety_labels(row: Mapping[str, Any], file: str, line: int) -> dict[str, str | None]:
    """The short names of a row's `risk_category` and `attack_vector`, None where it has none.

    Rows may use the short or the whole name, in any case. UserError for any other value.
    """
    found: dict[str, str | None] = {}
    for field, known in LABELS.items():
        value = row.get(field)
        found[field] = short_name(field, value)
        if value is not None and found[field] is None:
            raise UserError(
                f"{file}:{line}: '{field}' is {value!r}; the known ones are {', '.join(known)}, or in whole "
                f"{'; '.join(known.values())}"
            )
    return found


def xstest_labels(row: Mapping[str, Any], file: str, line: int) -> dict[str, str]:
    """{"type", "label"} of a row of XSTest, label "safe" or "unsafe". UserError where one is missing or unknown."""
    try:
        labels = {name: text(dict(row), name).strip() for name in ("type", "label")}
    except BadRow as error:
        raise UserError(f"{file}:{line}: {error}") from error
    if labels["label"] not in XSTEST_LABELS:
        raise UserError(f"{file}:{line}: 'label' is {labels['label']!r}, not one of {', '.join(XSTEST_LABELS)}")
    return labels


def read_xstest(path: str) -> list[Row]:
    """Prompt records of a file in the format of XSTest (Roettger et al. 2024), in its order.

    CSV with a header, or rows as `read_rows` reads them; the columns prompt, type and label ("safe" or "unsafe") are
    needed, others are kept. A record has "prompt" as messages and `is_safety` where it is unsafe. A benchmark with rows
    missing is another benchmark, so any row that cannot be used is a UserError naming its line.
    """
    records = []
    for line, raw in rows_or_csv(path):
        if isinstance(raw, BadRow):
            raise UserError(f"{path}:{line}: {raw.reason}: {raw}")
        try:
            row = prompt_row({**raw, "prompt": required(raw, "prompt")})
            check_messages(row["prompt"], "user")
        except (BadRow, ChatFormatError) as error:
            raise UserError(f"{path}:{line}: {error}") from error
        labels = xstest_labels(raw, path, line)
        records.append({**row, **labels, "is_safety": labels["label"] == "unsafe", "source": "xstest"})
    if not records:
        raise UserError(f"{path} has no rows")
    return records


def rows_or_csv(path: str) -> Iterable[tuple[int, Row | BadRow]]:
    """As `read_rows`, and CSV files with a header too, by the line that a row ends on; empty cells are left out."""
    return _csv_rows(Path(path)) if path.endswith(".csv") else read_rows(path)


def _csv_rows(path: Path) -> list[tuple[int, Row | BadRow]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            return [(reader.line_num, {str(k): v for k, v in row.items() if v}) for row in reader]
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
