"""Training rows as tokens, coloured by whether they carry loss: for the console and for notebooks.

Rows are encoded by the function that `rlhf/sft.py` trains with, so what is shown is what is trained. Text of the data
is never read as markup, and control characters are written out.
"""

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from configs.chat import ChatFormat
from rlhf.notebook_parts import Html
from rlhf.sft_rows import IGNORED, encode_dialogue
from rlhf.token_texts import token_texts, visible

TRAINED_STYLE, OTHER_STYLE = "black on green", "dim"
TRAINED_COLOUR = "rgba(63, 135, 201, 0.45)"  # see-through: readable on white and on dark pages


@dataclass(frozen=True)
class ColouredRow:
    """A row as (text of a token, whether it carries loss), in order; empty where training leaves the row out.

    `title` says what the row is, `verdict` what training does with it: "whole", "shortened" or "too_long".
    """

    title: str
    verdict: str
    tokens: list[tuple[str, bool]]


def coloured_row(row: Mapping[str, Any], chat_format: ChatFormat, max_length: int) -> ColouredRow:
    """A dialogue record as its tokens. Raises ChatFormatError where the chat format refuses it."""
    example, verdict = encode_dialogue(dict(row), chat_format, max_length)
    texts = token_texts(chat_format.tokenizer, [], example["input_ids"])
    tokens = [(visible(text), label != IGNORED) for text, label in zip(texts, example["labels"], strict=True)]
    return ColouredRow(visible(_title(row, verdict, tokens)), verdict, tokens)


def _title(row: Mapping[str, Any], verdict: str, tokens: list[tuple[str, bool]]) -> str:
    facts = [str(row.get("source", "dialogue"))]
    if isinstance(instruction := row.get("instruction"), dict) and {"wording", "slot"} <= instruction.keys():
        facts.append(f"{instruction['wording']!r} in the {instruction['slot']} slot of turn 1")
    if isinstance(change := row.get("change"), dict) and {"wording", "turn"} <= change.keys():
        facts.append(f"{change['wording']!r} at turn {change['turn']}")
    if verdict == "too_long":
        return ", ".join([*facts, "too long: training leaves it out"])
    trained = sum(on for _, on in tokens)
    facts.append(f"{trained} of {len(tokens)} tokens trained ({row.get('train_on', 'all')})")
    return ", ".join([*facts, *(["shortened"] if verdict == "shortened" else [])])


def to_text(row: ColouredRow) -> Text:
    """For the console: trained tokens on green, the others dim, tokens that have no text as a dot."""
    text = Text(row.title, style="bold").append("\n", style="not bold")
    for token, trained in row.tokens:
        text.append(token or "·", style=f"not bold {TRAINED_STYLE if trained else OTHER_STYLE}")
    return text


def to_html(row: ColouredRow) -> Html:
    """For notebooks: trained tokens on blue, the number of each token on hovering."""
    spans = []
    for number, (token, trained) in enumerate(row.tokens):
        shown = html.escape(token).replace("\n", "↵<br>") or "·"
        style = f"background-color: {TRAINED_COLOUR}; border-radius: 3px" if trained else "opacity: 0.7"
        words = "trained" if trained else "not trained"
        spans.append(f'<span title="token {number}, {words}" style="{style}; white-space: pre-wrap">{shown}</span>')
    return Html(
        f'<div style="line-height: 1.8; margin: 0.4em 0"><b>{html.escape(row.title)}</b><br>{"".join(spans)}</div>'
    )
