"""Preference, dialogue and prompt records: read, checked, brought to one form; bad rows reported and set aside.

Normal forms (a message is {"role", "content"}; other keys of a row are kept as they are):

    preference  {"prompt": [messages], "chosen": [message], "rejected": [message], "rating": str | None,
                 "margin": float | None, "safety": str | None, "source": str}
    dialogue    {"messages": [messages], "source": str, optional "train_on": "all" | "last"}
    prompt      {"prompt": [messages], "is_safety": bool, "source": str}
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.chat import SPECIAL_TAGS, ChatFormat, ChatFormatError, check_messages
from configs.errors import UserError
from configs.record_shapes import RATINGS, SAFETY_LABELS, Row, dialogue_row, preference_row, prompt_row, text
from configs.row_files import BadRow, read_rows, source_name, write_jsonl

__all__ = ["RATINGS", "SAFETY_LABELS", "Issue", "Records", "canonical_prompt", "first_user_turn", "read_dialogues",
           "read_preferences", "read_prompts", "split_by_prompt", "write_jsonl"]  # fmt: skip

logger = logging.getLogger(__name__)

SHOWN_ISSUES = 3


@dataclass(frozen=True)
class Issue:
    """One row that was set aside. `line` counts from 1; in Parquet files and on the Hub it is the row."""

    file: str
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: {self.detail}"


@dataclass(frozen=True)
class Records:
    """What a reader returns. `counts` has "read", "kept" and one entry for each reason of `issues`."""

    rows: list[Row]
    lines: list[int]  # of the rows, in the file; see Issue
    issues: list[Issue] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def read_preferences(path_or_hub_name: str | Path, **options: Any) -> Records:
    """Preference records from TRL rows (explicit or implicit prompt), plain strings, or HH-RLHF transcripts.

    Options, the same for all three readers:
        reject_file: JSON Lines file for bad rows (file, line, reason, detail, row). Rows of other files stay in it.
        max_reject_share: share of bad rows (0 to 1) above which UserError is raised, after the reject file is written.
        chat_format: its special tokens are refused in messages, beside Llama 2's tags.
        max_prompt_tokens: prompts that are longer under `chat_format` are bad rows.
        split: split of a Hub data set.
    """
    return _read(path_or_hub_name, preference_row, **options)


def read_dialogues(path_or_hub_name: str | Path, **options: Any) -> Records:
    """Dialogue records for SFT from `messages`, prompt/completion, or instruction/input/output rows (also Dolly's own
    instruction/context/response). Options as in `read_preferences`."""
    return _read(path_or_hub_name, dialogue_row, **options)


def read_prompts(path_or_hub_name: str | Path, **options: Any) -> Records:
    """Prompt records from `prompt` (messages, text or transcript), `messages` that end with the user, instruction/input
    rows, or the prompts of preference rows. Options as in `read_preferences`."""
    return _read(path_or_hub_name, prompt_row, **options)


def split_by_prompt(rows: Sequence[Row], fraction: float, seed: int | str) -> tuple[list[Row], list[Row]]:
    """(train, held out), with about `fraction` of the prompts held out, and no prompt in both.

    The side is a hash of the seed and of the first user turn, so it does not depend on the other rows: files that are
    split one by one agree, and a prompt that goes on from another falls on its side. A small file can end up whole on
    one side. A seed in words is for a split that no number may repeat.
    """
    if not 0.0 <= fraction <= 1.0:
        raise UserError(f"the held-out fraction must be between 0 and 1, not {fraction}")
    train: list[Row] = []
    held_out: list[Row] = []
    for row in rows:
        digest = hashlib.sha256(f"{seed}\n{first_user_turn(row)}".encode()).digest()
        (held_out if int.from_bytes(digest[:8], "big") < fraction * 2**64 else train).append(row)
    return train, held_out


def first_user_turn(row: Row) -> str:
    """The first user turn of a record in canonical form: lower case, letters and digits only (all of it if none)."""
    messages = row["messages"] if "messages" in row else row["prompt"]
    return _letters(next(message["content"] for message in messages if message["role"] == "user"))


def canonical_prompt(row: Row) -> tuple[tuple[str, str], ...]:
    """The whole prompt as (role, text) pairs, each text in the canonical form of `first_user_turn`."""
    return tuple((message["role"], _letters(message["content"])) for message in row["prompt"])


def _letters(content: str) -> str:
    return "".join(c for c in content.lower() if c.isalnum()) or content.strip()


def _read(
    path_or_hub_name: str | Path,
    normalise: Callable[[Row], Row],
    *,
    reject_file: str | Path | None = None,
    max_reject_share: float = 0.05,
    chat_format: ChatFormat | None = None,
    max_prompt_tokens: int | None = None,
    split: str = "train",
) -> Records:
    name = str(path_or_hub_name)
    forbidden = SPECIAL_TAGS + (chat_format.forbidden if chat_format else ())
    rows: list[Row] = []
    lines: list[int] = []
    issues: list[Issue] = []
    rejects: list[Row] = []
    for line, raw in read_rows(path_or_hub_name, split):
        try:
            if isinstance(raw, BadRow):
                raise raw
            row = normalise(raw)
            row["source"] = text(raw, "source") if raw.get("source") is not None else source_name(name)
            _check(row, forbidden)
            if chat_format and max_prompt_tokens:
                _check_length(row, chat_format, max_prompt_tokens)
            rows.append(row)
            lines.append(line)
        except (BadRow, ChatFormatError) as error:
            issues.append(Issue(name, line, error.reason, str(error)))
            row = raw.raw if isinstance(raw, BadRow) else raw
            rejects.append({"file": name, "line": line, "reason": error.reason, "detail": str(error), "row": row})
    if reject_file is not None:
        _write_rejects(Path(reject_file), name, rejects)
    counts = {"read": len(rows) + len(issues), "kept": len(rows), **Counter(issue.reason for issue in issues)}
    _report(name, counts, issues, max_reject_share, reject_file)
    return Records(rows, lines, issues, counts)


def _report(
    name: str, counts: dict[str, int], issues: list[Issue], max_reject_share: float, reject_file: str | Path | None
) -> None:
    if counts["read"] == 0:
        raise UserError(f"{name} has no rows")
    if not issues:
        return
    by_reason = ", ".join(f"{n} {reason}" for reason, n in counts.items() if reason not in ("read", "kept"))
    shown = "".join(f"\n  {issue}" for issue in issues[:SHOWN_ISSUES])
    where = f"; all are in {reject_file}" if reject_file else ""
    summary = f"{name}: {len(issues)} of {counts['read']} rows cannot be used ({by_reason}){where}; the first:{shown}"
    if counts["kept"] == 0:
        raise UserError(f"no row is left. {summary}")
    if len(issues) > max_reject_share * counts["read"]:
        raise UserError(f"more than max_reject_share={max_reject_share:g} of the rows are bad. {summary}")
    logger.warning(summary)


def _write_rejects(path: Path, name: str, rejects: list[Row]) -> None:
    """Replace the rows of this data file in the reject file, which several data files may share."""
    others = []
    if path.exists():
        others = [row for _, row in read_rows(path) if isinstance(row, dict) and row.get("file") != name]
    if rejects or path.exists():
        write_jsonl(path, others + rejects)


def _check(row: Row, forbidden: Sequence[str]) -> None:
    if "messages" in row:
        dialogues = [(row["messages"], "assistant")]
    elif "chosen" in row:
        dialogues = [([*row["prompt"], *row[side]], "assistant") for side in ("chosen", "rejected")]
    else:
        dialogues = [(row["prompt"], "user")]
    for messages, last_role in dialogues:
        check_messages(messages, last_role, forbidden)
        for index, message in enumerate(messages):
            if not message["content"].isascii() and any("\ud800" <= c <= "\udfff" for c in message["content"]):
                raise BadRow("invalid text", f"message {index} has half of a surrogate pair, which is no character")


def _check_length(row: Row, chat_format: ChatFormat, max_prompt_tokens: int) -> None:
    prompt = row["messages"][:-1] if "messages" in row else row["prompt"]
    tokens = len(chat_format.encode_prompt(prompt))
    if tokens > max_prompt_tokens:
        raise BadRow(
            "prompt too long", f"the prompt has {tokens} tokens, more than max_prompt_tokens={max_prompt_tokens}"
        )
