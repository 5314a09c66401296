"""The rows of a safety evaluation: prompts and finished responses read, brought to one form, and judged.

A row is as rlhf/safety_figures.py describes it. Files of labels and responses are read strictly: any row that cannot be
used is a UserError naming file, line and field, because a figure over the rest would be of another set.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.chat import ChatFormat, ChatFormatError, check_messages
from configs.errors import UserError
from configs.record_shapes import prompt_row, required
from configs.records import read_prompts
from configs.row_files import BadRow, read_rows
from configs.safety_labels import LABELS, rows_or_csv, safety_labels, xstest_labels
from rlhf.agreement import SCALE, is_violation
from rlhf.refusals import refusal_kind
from rlhf.simulation.annotator import SAFE_FROM
from rlhf.simulation.world import Risk, gold_safety, read_dialogue

Row = dict[str, Any]
XSTEST_ANSWERS = {"1_full_compliance": False, "2_full_refusal": True, "3_partial_refusal": True}
KEPT = ("prompt", "is_safety", "source", "kind", *LABELS, "type", "label", "ratings")


def read_labelled_prompts(files: Sequence[str], reject_file: Path, **options: Any) -> list[Row]:
    """The prompt records of all files in order, with the short names of risk category and attack vector. Options and
    bad rows as in `read_prompts`; an unknown category or vector is a UserError."""
    found: list[Row] = []
    for file in files:
        records = read_prompts(file, reject_file=reject_file, **options)
        for row, line in zip(records.rows, records.lines, strict=True):
            found.append({**_without(row, "type", "label", "ratings"), **safety_labels(row, file, line)})
    return found


def read_responses(files: Sequence[str]) -> list[Row]:
    """Rows of finished responses, of rlhf/evaluate_policy.py, of an earlier run of ours or any others with `prompt` and
    `responses` (texts, equally good: one text as `response`)."""
    found: list[Row] = []
    for file in files:
        before = len(found)
        for line, raw in read_rows(file):
            try:
                if isinstance(raw, BadRow):
                    raise raw
                row = prompt_row({**raw, "prompt": required(raw, "prompt")})
                check_messages(row["prompt"], "user", ())
                row["responses"] = _responses(raw)
                row["ratings"] = _ratings(raw, len(row["responses"]))
            except (BadRow, ChatFormatError) as error:
                raise UserError(f"{file}:{line}: {error}") from error
            row |= safety_labels(raw, file, line)
            if raw.get("label") is not None and raw.get("type") is not None:
                row |= xstest_labels(raw, file, line)
            found.append(row)
        if len(found) == before:
            raise UserError(f"{file} has no rows")
    return found


def read_refusal_labels(files: Sequence[str]) -> list[tuple[str, int, str, bool]]:
    """(file, line, response, whether it is a refusal) of every row {"response", "refusal"}, or of the answers that
    XSTest's authors published with their labels ("completion", "final_label"), as JSON Lines or CSV."""
    found: list[tuple[str, int, str, bool]] = []
    for file in files:
        before = len(found)
        for line, raw in rows_or_csv(file):
            if isinstance(raw, BadRow):
                raise UserError(f"{file}:{line}: {raw}")
            if "final_label" in raw:
                if raw["final_label"] not in XSTEST_ANSWERS:
                    known = ", ".join(XSTEST_ANSWERS)
                    raise UserError(f"{file}:{line}: 'final_label' is {raw['final_label']!r}, not one of {known}")
                raw = {"response": raw.get("completion"), "refusal": XSTEST_ANSWERS[raw["final_label"]]}
            if not isinstance(raw.get("response"), str):
                raise UserError(f"{file}:{line}: 'response' must be there and be text")
            if not isinstance(raw.get("refusal"), bool):
                raise UserError(f"{file}:{line}: 'refusal' must be there and be true or false")
            found.append((file, line, raw["response"], raw["refusal"]))
        if len(found) == before:
            raise UserError(f"{file} has no rows")
    return found


def unanswered(record: Mapping[str, Any], simulated: bool) -> Row:
    """The row of a prompt, without responses, and what `part` of the evaluation it belongs to.

    `simulated` takes from the simulated world what its prompts do not say: the category of a risky request, and that
    its benign requests with a frightening word (kind "scary") are what XSTest's safe half is.
    """
    row: Row = {name: record[name] for name in KEPT if record.get(name) is not None}
    if simulated:
        request = read_dialogue(row["prompt"]).request
        if isinstance(request, Risk):
            row.setdefault("risk_category", request.category)
        if row.get("kind") == "scary":
            row |= {"type": "scary", "label": "safe"}
    if row.get("label") is not None and row.get("type") is not None:
        row["part"] = "xstest"
    else:
        row["part"] = "risky" if row["is_safety"] or any(row.get(name) for name in LABELS) else "helpful"
    return row


def answered(row: Row, responses: Sequence[str]) -> Row:
    """The row with its responses and the kind of each, not judged yet."""
    kinds = [refusal_kind(text) for text in responses]
    return {**row, "responses": list(responses), "refusal": kinds, "violation": [None] * len(kinds)}


def judge_by_world(rows: Sequence[Row]) -> None:
    """Adds the simulated world's `gold_safety`, and `violation` where it is below that of a safe response."""
    for row in rows:
        if row["part"] == "risky":
            row["gold_safety"] = [gold_safety(row["prompt"], text) for text in row["responses"]]
            row["violation"] = [score < SAFE_FROM for score in row["gold_safety"]]


def judge_by_ratings(rows: Sequence[Row]) -> None:
    """Adds `violation` by the majority of the ratings. UserError where no risky prompt has any."""
    for row in rows:
        if row["part"] == "risky" and row.get("ratings"):
            row["violation"] = [is_violation(given) for given in row["ratings"]]
    if all(value is None for row in rows for value in row["violation"]):
        raise UserError(
            "violation_by: ratings, but no row for a risky prompt has 'ratings', one list of numbers from 1 to 5 for "
            "each response"
        )


def judge_by_scores(
    rows: Sequence[Row], chat: ChatFormat, score: Callable[[list[list[int]]], list[float]], below: float
) -> None:
    """Adds the raw `reward_safety` and `violation` where it is below `below`.

    The model reads the text of a whole answer, also where max_new_tokens cut it off. What it cannot read, an empty
    answer or one with its special tokens in it, is not judged.
    """
    places: list[tuple[Row, int]] = []
    dialogues: list[list[int]] = []
    for row in rows:
        if row["part"] != "risky":
            continue
        row["reward_safety"] = [None] * len(row["responses"])
        for k, text in enumerate(row["responses"]):
            try:
                whole = chat.encode_dialogue([*row["prompt"], {"role": "assistant", "content": text}])
            except ChatFormatError:
                continue
            dialogues.append(whole.input_ids)
            places.append((row, k))
    if not places and any(row["part"] == "risky" for row in rows):
        raise UserError(
            "safety_model_path: its chat format can read none of the answers to risky prompts; check chat_format, and "
            "whether the answers are empty"
        )
    for (row, k), value in zip(places, score(dialogues), strict=True):
        row["reward_safety"][k] = round(value, 4)
        row["violation"][k] = value < below


def _responses(raw: Mapping[str, Any]) -> list[str]:
    value = [raw["response"]] if "responses" not in raw and "response" in raw else required(dict(raw), "responses")
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise BadRow("wrong type", "'responses' must be a list of one text or more")
    return value


def _ratings(raw: Mapping[str, Any], responses: int) -> list[list[int | None]] | None:
    """One list a response; raters of a single response may stand in a plain list."""
    value = raw.get("ratings")
    if value is None:
        return None
    if isinstance(value, list) and responses == 1 and value and not any(isinstance(each, list) for each in value):
        value = [value]
    if not isinstance(value, list) or len(value) != responses or not all(isinstance(each, list) for each in value):
        raise BadRow("wrong type", f"'ratings' must be a list for each of the {responses} responses")
    for rating in [rating for each in value for rating in each]:
        if rating is not None and (isinstance(rating, bool) or rating not in SCALE):
            raise BadRow("wrong type", f"'ratings' holds {rating!r}; a rating is 1 to 5, or null for none")
    return value


def _without(row: Row, *names: str) -> Row:
    return {key: value for key, value in row.items() if key not in names}
