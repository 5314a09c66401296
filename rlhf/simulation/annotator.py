"""A simulated annotator: sees two responses, draws a choice, a 4-point rating and safety labels from the gold scores.

The perceived difference is d = (u(a) - u(b)) + noise * L with L standard logistic, so P(choose a) = sigma((u(a) -
u(b)) / noise): the Bradley-Terry model. The rating is read off |d|. Because the noise is known, so is the accuracy of
the best possible reward model, the ceiling.
"""

import math
import random
from dataclasses import dataclass

from configs.chat import Message
from configs.records import RATINGS
from rlhf.simulation.world import gold_helpfulness, gold_safety

# |d| from which a choice is significantly better, better, slightly better; below, negligibly better. The strongest is
# for a whole answer against one worth nothing: a right answer without its detail against a wrong one is better (0.6).
RATING_BOUNDS = (0.75, 0.3, 0.1)
SAFE_FROM = 0.4  # gold safety from which a response counts as safe
DEFAULT_NOISE = 0.1


@dataclass(frozen=True)
class Annotation:
    """One comparison.

    Attributes:
        choice: 0 where the first response was chosen, 1 where the second.
        rating: one of `configs.records.RATINGS`.
        safety: "chosen_safe", "both_safe", "both_unsafe", or None where only the rejected one is safe (the paper
            leaves such pairs out).
        p_chosen: probability, given the gold scores and the rating, that the annotator chooses what it chose; a perfect
            model agrees with probability max(p_chosen, 1 - p_chosen).
    """

    choice: int
    rating: str
    safety: str | None
    p_chosen: float


def utility(messages: list[Message], response: str, objective: str) -> float:
    """What the annotator of `objective` looks at, in [0, 1]: helpfulness, or safety and at equal safety helpfulness."""
    if objective == "helpfulness":
        return gold_helpfulness(messages, response)
    if objective == "safety":
        return 0.9 * gold_safety(messages, response) + 0.1 * gold_helpfulness(messages, response)
    raise ValueError(f"objective must be helpfulness or safety, not {objective!r}")


def _cdf(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def choice_and_rating(difference: float, noise: float, rng: random.Random) -> tuple[int, str, float]:
    """Draws (choice, rating, p_chosen) from a gold difference u(a) - u(b); `noise` > 0 is the Bradley-Terry scale."""
    uniform = min(max(rng.random(), 1e-12), 1 - 1e-12)
    perceived = difference + noise * math.log(uniform / (1 - uniform))
    level = next((i for i, bound in enumerate(RATING_BOUNDS) if abs(perceived) >= bound), len(RATING_BOUNDS))
    low = (*RATING_BOUNDS, 0.0)[level]
    high = (math.inf, *RATING_BOUNDS)[level]

    def mass(sign: int) -> float:  # P(perceived * sign in [low, high))
        upper = 1.0 if high == math.inf else _cdf((high - sign * difference) / noise)
        return upper - _cdf((low - sign * difference) / noise)

    chosen_first = perceived >= 0
    first, second = mass(1), mass(-1)
    p_first = first / (first + second) if first + second > 0 else float(difference >= 0)
    return (0, RATINGS[level], p_first) if chosen_first else (1, RATINGS[level], 1 - p_first)


def annotate(
    messages: list[Message],
    a: str,
    b: str,
    rng: random.Random,
    noise: float = DEFAULT_NOISE,
    objective: str = "helpfulness",
) -> Annotation:
    """Compares two responses to `messages` for one objective, "helpfulness" or "safety"."""
    difference = utility(messages, a, objective) - utility(messages, b, objective)
    choice, rating, p_chosen = choice_and_rating(difference, noise, rng)
    safety: str | None
    safe = [gold_safety(messages, response) >= SAFE_FROM for response in (a, b)]
    chosen_safe, rejected_safe = safe[choice], safe[1 - choice]
    if chosen_safe:
        safety = "both_safe" if rejected_safe else "chosen_safe"
    else:
        safety = None if rejected_safe else "both_unsafe"
    return Annotation(choice, rating, safety, p_chosen)
