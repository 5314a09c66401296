"""Preference records -> encoded pairs: margins from ratings, long prompts shortened (paper §3.2.2).

No file is read here; records come checked from configs.records.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from configs.chat import ChatFormat, Message
from reward.loss import SAFETY_LABELS
from reward.tree import tree_length

T = TypeVar("T", bound=Sized)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One comparison, ready to be padded. NaN in a safety label: not labelled."""

    chosen_ids: np.ndarray  # int32: prompt and chosen response, one dialogue
    rejected_ids: np.ndarray  # int32: the same prompt and the rejected response
    margin: float
    chosen_safe: float
    rejected_safe: float
    row: Mapping[str, Any]  # the record, for grouping metrics and for samples

    @property
    def length(self) -> int:
        """Tokens of the pair as one row, the common ones counted once."""
        return tree_length((self.chosen_ids, self.rejected_ids))


def shorten_prompt(prompt: Sequence[Message]) -> list[Message] | None:
    """`prompt` without its oldest user and assistant message; a system message stays. None: no turn can be spared."""
    system = list(prompt[:1]) if prompt and prompt[0]["role"] == "system" else []
    turns = list(prompt[len(system) :])
    return system + turns[2:] if len(turns) > 2 else None


def encode_replies(
    row: Mapping[str, Any], encode: Callable[[list[Message]], T], max_length: int
) -> tuple[tuple[T, T], list[Message] | None]:
    """(chosen, rejected) of a record as `encode` gives them, both with the same prompt, and that prompt.

    The prompt loses its oldest turns until both have at most `max_length` tokens; None where not even the last fits.
    """
    prompt: list[Message] | None = list(row["prompt"])
    while prompt is not None:
        chosen, rejected = encode([*prompt, *row["chosen"]]), encode([*prompt, *row["rejected"]])
        if max(len(chosen), len(rejected)) <= max_length:
            break
        prompt = shorten_prompt(prompt)
    return (chosen, rejected), prompt


def encode_pairs(
    rows: Sequence[Mapping[str, Any]], chat_format: ChatFormat, max_length: int, margins: Mapping[str, float] | None
) -> tuple[list[EncodedPair], list[dict[str, Any]], Counter]:
    """Encode `rows`, both dialogues of a pair with the same prompt, at most `max_length` tokens each.

    A longer prompt loses its oldest turns, never the response. A margin given in the row stands; else its rating's
    margin from `margins`; else 0. With `margins` None (Eq. 1) every margin is 0. `unrated` counts rows with neither.
    Returns (pairs, refused rows with a `reason`, counts of pairs / shortened / refused / unrated).
    """

    def dialogue_ids(messages: list[Message]) -> list[int]:
        return chat_format.encode_dialogue(messages).input_ids

    pairs: list[EncodedPair] = []
    refused: list[dict[str, Any]] = []
    counts: Counter = Counter(pairs=0, shortened=0, refused=0, unrated=0)
    for row in rows:
        (chosen, rejected), prompt = encode_replies(row, dialogue_ids, max_length)
        if prompt is None:
            tokens = max(len(chosen), len(rejected))
            refused.append({**row, "reason": f"last turn alone has {tokens} tokens, max_length is {max_length}"})
            counts["refused"] += 1
            continue
        rating, margin = row.get("rating"), row.get("margin")
        counts["unrated"] += rating is None and margin is None
        if margins is None:
            margin = 0.0
        elif margin is None:
            margin = 0.0 if rating is None else margins[rating]
        chosen_safe, rejected_safe = SAFETY_LABELS[row.get("safety")]
        counts["pairs"] += 1
        counts["shortened"] += len(prompt) < len(row["prompt"])
        pairs.append(
            EncodedPair(
                chosen_ids=np.asarray(chosen, dtype=np.int32),
                rejected_ids=np.asarray(rejected, dtype=np.int32),
                margin=float(margin),
                chosen_safe=chosen_safe,
                rejected_safe=rejected_safe,
                row=row,
            )
        )
    return pairs, refused, counts
