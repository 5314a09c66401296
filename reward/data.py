"""Preference records -> encoded pairs: margins from ratings, long prompts shortened, sources mixed (paper §3.2.2).

No file is read here; records come checked from configs.records.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.chat import ChatFormat, Message
from configs.errors import UserError
from reward.loss import SAFETY_LABELS
from reward.tree import tree_length


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


def encode_pairs(
    rows: Sequence[Mapping[str, Any]], chat_format: ChatFormat, max_length: int, margins: Mapping[str, float] | None
) -> tuple[list[EncodedPair], list[dict[str, Any]], Counter]:
    """Encode `rows`, both dialogues of a pair with the same prompt, at most `max_length` tokens each.

    A longer prompt loses its oldest turns, never the response. A margin given in the row stands; else its rating's
    margin from `margins`; else 0. With `margins` None (Eq. 1) every margin is 0. `unrated` counts rows with neither.
    Returns (pairs, refused rows with a `reason`, counts of pairs / shortened / refused / unrated).
    """
    pairs: list[EncodedPair] = []
    refused: list[dict[str, Any]] = []
    counts: Counter = Counter(pairs=0, shortened=0, refused=0, unrated=0)
    for row in rows:
        prompt: list[Message] | None = list(row["prompt"])
        while prompt is not None:
            chosen = chat_format.encode_dialogue([*prompt, *row["chosen"]]).input_ids
            rejected = chat_format.encode_dialogue([*prompt, *row["rejected"]]).input_ids
            if max(len(chosen), len(rejected)) <= max_length:
                break
            prompt = shorten_prompt(prompt)
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


def mix_sizes(available: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows to draw from each source so that shares follow `weights`, no row repeats and at least one source is used up.

    The paper's 90/10 and 50/50 (§3.2.2). UserError where a source would give no row at all.
    """
    total = min(rows / weight for rows, weight in zip(available, weights, strict=True))
    sizes = [min(rows, int(total * weight + 1e-9)) for rows, weight in zip(available, weights, strict=True)]
    if 0 in sizes:
        raise UserError(
            f"mix_weights: shares {list(weights)} of sources with {list(available)} rows leave source "
            f"{sizes.index(0) + 1} without any row; add rows or change the weights"
        )
    return sizes


def mix(sources: Sequence[Sequence[Any]], weights: Sequence[float] | None, seed: int) -> list[Any]:
    """Rows of all sources, shuffled; with `weights`, a seeded draw without replacement of `mix_sizes` from each."""
    rng = random.Random(seed)
    sizes = [len(source) for source in sources] if weights is None else mix_sizes([len(s) for s in sources], weights)
    mixed = [row for source, size in zip(sources, sizes, strict=True) for row in rng.sample(list(source), size)]
    rng.shuffle(mixed)
    return mixed
