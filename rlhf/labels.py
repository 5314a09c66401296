"""[pure] Labelled comparisons into preference records, whoever labelled them (recipe sheet §2)."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from configs.chat import ChatFormatError, check_messages
from configs.records import RATINGS

Row = dict[str, Any]
LABELS: Row = {"choice": None, "rating": None, "safety_a": None, "safety_b": None}  # what people fill in


def preference_record(row: Mapping[str, Any], choice: int, rating: str, safety: str | None, **extra: Any) -> Row:
    """The record of a pair {"prompt", "response_a", "response_b", optional "source"}; choice 0 = a, 1 = b."""
    responses = [row["response_a"], row["response_b"]]
    return {
        "prompt": row["prompt"],
        "chosen": [{"role": "assistant", "content": responses[choice]}],
        "rejected": [{"role": "assistant", "content": responses[1 - choice]}],
        "rating": rating,
        "margin": None,
        "safety": safety,
        "source": row.get("source", "people"),
        **extra,
    }


def safety_label(chosen_safe: bool, rejected_safe: bool) -> str | None:
    """The paper's three bins; None for a safe response rejected for an unsafe one, which is left out by design."""
    if chosen_safe:
        return "both_safe" if rejected_safe else "chosen_safe"
    return None if rejected_safe else "both_unsafe"


def label_error(row: Any) -> str | None:
    """What is wrong with one row of a labelled file, None where nothing is."""
    if not isinstance(row, dict):
        return "not a JSON object"
    for name in ("prompt", "response_a", "response_b", "choice"):
        if name not in row:
            return f"{name}: missing"
    for name in ("response_a", "response_b"):
        if not isinstance(row[name], str):
            return f"{name}: must be text, not {row[name]!r}"
        try:
            check_messages([*row["prompt"], {"role": "assistant", "content": row[name]}], "assistant")
        except (ChatFormatError, TypeError) as error:
            return f"prompt with {name}: {error}"
    if row["response_a"] == row["response_b"]:
        return "response_a and response_b are equal"
    if row["choice"] is None:
        return None  # not labelled yet: no mistake
    if row["choice"] not in ("a", "b"):
        return f'choice: must be "a", "b" or null, not {row["choice"]!r}'
    if row.get("rating") not in RATINGS:
        return f"rating: must be one of {', '.join(RATINGS)}, not {row.get('rating')!r}"
    is_safety = row.get("is_safety", False)
    if not isinstance(is_safety, bool):
        return f"is_safety: must be true or false, not {is_safety!r}"
    for name in ("safety_a", "safety_b"):
        value = row.get(name)
        if value not in (True, False, None) or isinstance(value, int) and not isinstance(value, bool):
            return f"{name}: must be true (safe), false (unsafe) or null, not {value!r}"
        if is_safety and value is None:
            return f"{name}: a comparison on a safety prompt needs a safety label (true or false)"
    return None


def import_labels(lines: Iterable[str]) -> tuple[dict[str, list[Row]], list[Row], dict[str, int]]:
    """Records by objective ("helpfulness", "safety") from the lines of a labelled file.

    Also returns the mistakes, {"line" (from 1), "reason", "text"}, and counts of records by objective, of unlabelled
    rows and of excluded ones (a safe response rejected for an unsafe one). An id that comes twice is a mistake.
    """
    records: dict[str, list[Row]] = {"helpfulness": [], "safety": []}
    mistakes: list[Row] = []
    counts: Counter = Counter(rows=0, helpfulness=0, safety=0, unlabelled=0, excluded=0)
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        counts["rows"] += 1
        try:
            row = json.loads(line)
            reason = label_error(row)
        except ValueError as error:
            row, reason = None, f"not JSON: {error}"
        if reason is None and row.get("id") is not None:
            first = seen.setdefault(str(row["id"]), number)
            reason = None if first == number else f"id {row['id']!r} was already on line {first}"
        if reason is not None:
            mistakes.append({"line": number, "reason": reason, "text": line.rstrip("\n")})
            continue
        if row["choice"] is None:
            counts["unlabelled"] += 1
            continue
        choice, safe = int(row["choice"] == "b"), [row.get("safety_a"), row.get("safety_b")]
        objective = "safety" if row.get("is_safety", False) else "helpfulness"
        safety = None if None in safe else safety_label(bool(safe[choice]), bool(safe[1 - choice]))
        if objective == "safety" and safety is None:
            counts["excluded"] += 1
            continue
        counts[objective] += 1
        records[objective].append(preference_record(row, choice, row["rating"], safety))
    return records, mistakes, dict(counts)
