"""How much helpfulness moves: the same user turns, answered before and after, or without and with an instruction."""

from collections.abc import Callable, Sequence
from typing import Any

from configs.chat import ChatFormat, ChatFormatError
from rlhf.estimates import paired_bootstrap
from rlhf.persistence_dialogues import Played, asked

Scores = list[list[float]]  # by dialogue, by turn
Scorer = Callable[[Sequence[tuple[str, str]]], Sequence[float]]  # (user text, reply) pairs -> scores


def score_played(scorer: Scorer, user_turns: Sequence[Sequence[str]], replies: Played) -> Scores:
    """The score of every reply, each judged by its own user turn."""
    pairs = [pair for turns, texts in zip(user_turns, replies, strict=True) for pair in zip(turns, texts, strict=False)]
    scores = iter(scorer(pairs))
    return [[float(next(scores)) for _ in texts] for texts in replies]


def shift(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> dict[str, Any] | None:
    """How far scores of the same dialogues move, over the turns that both came to.

    The dialogue is the unit, because its replies depend on each other: mean over dialogues of the mean over turns, with
    a paired bootstrap 95 % interval of the difference.

    Returns:
        {"before", "after", "change", "ci95": [low, high], "dialogues"}; None where no dialogue has a turn in both.
    """
    both = [(b[: len(a)], a[: len(b)]) for b, a in zip(before, after, strict=True) if b and a]
    if not both:
        return None
    first, then = ([sum(scores) / len(scores) for scores in side] for side in zip(*both, strict=True))
    change, (low, high) = paired_bootstrap(first, then)
    return {
        "before": sum(first) / len(both),
        "after": sum(then) / len(both),
        "change": change,
        "ci95": [low, high],
        "dialogues": len(both),
    }


def reward_scorer(score_ids: Callable[[list[list[int]]], Sequence[float]], chat_format: ChatFormat) -> Scorer:
    """Raw scores r by a reward model; `score_ids` gives those of dialogues as ids."""

    def encode(user_text: str, reply: str) -> list[int]:
        try:
            return chat_format.encode_dialogue([*asked(user_text), {"role": "assistant", "content": reply}]).input_ids
        except ChatFormatError:  # a reply that is empty, or that poses as a turn, counts as an empty one
            return chat_format.ended(chat_format.encode_prompt(asked(user_text)))

    return lambda pairs: score_ids([encode(user_text, reply) for user_text, reply in pairs])
