"""[pure] Which of K scored responses to keep, and what best-of-n gives for every n <= K (recipe sheet §4, Figs 7, 8).

Letters: P prompts, K responses a prompt.

Ties and duplicates. Of equal scores the earliest response counts as the higher, so every pick is determined. Responses
with the same text are one training example whichever of them is picked, so they cannot change the best or the worst.
The median, the random pick and all curves count them as often as they were drawn: they stand for what the policy says
without selection, and a policy that repeats itself would look worse than it is if its favourite counted once.
`duplicate_of` says which responses repeat an earlier one.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from configs.errors import UserError


@dataclass(frozen=True)
class Picks:
    """Indices into the K responses of one prompt, all among its eligible responses."""

    best: int  # the first of the highest score
    median: int  # the lower median: of scores 1 2 3 4, the response scored 2
    worst: int  # the last of the lowest score
    eligible: list[int]  # in the order of the responses


def check_finite(scores: Mapping[str, Sequence[float]], prompt: int) -> None:
    """UserError, naming the prompt, the score and the response, where a score is nan or infinite: it has no rank."""
    for name, values in scores.items():
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise UserError(
                    f"prompt {prompt}: the {name} score of response {i} is {value}; such scores cannot be ranked. "
                    "Check the reward model (a training that diverged, or a dtype that overflows)"
                )


def duplicate_of(responses: Sequence[Hashable]) -> list[int]:
    """For each response the index of the first one equal to it, -1 where no earlier one is."""
    first: dict[Hashable, int] = {}
    return [-1 if (j := first.setdefault(response, i)) == i else j for i, response in enumerate(responses)]


def rank_all(scores_PK: np.ndarray, eligible_PK: np.ndarray) -> np.ndarray:
    """int64[P, K]: response indices from worst to best. Responses that may not be kept rank below all others; of equal
    scores the earlier response ranks higher, so the last entry is the first maximum. ValueError for nan or infinity."""
    if not np.isfinite(scores_PK).all():
        p, i = np.argwhere(~np.isfinite(scores_PK))[0]
        raise ValueError(f"score {i} of prompt {p} is {scores_PK[p, i]}")
    earlier_PK = np.broadcast_to(-np.arange(scores_PK.shape[1]), scores_PK.shape)
    return np.lexsort((earlier_PK, scores_PK, eligible_PK))  # the last key counts first


def rank(scores_K: Sequence[float], eligible_K: Sequence[bool]) -> list[int]:
    """`rank_all` of one prompt."""
    return rank_all(np.array([scores_K], dtype=np.float64), np.array([eligible_K], dtype=bool))[0].tolist()


def pick(scores_K: Sequence[float], eligible_K: Sequence[bool]) -> Picks | None:
    """The picks of one prompt; None where no response is eligible."""
    eligible = [i for i, ok in enumerate(eligible_K) if ok]
    if not eligible:
        return None
    order = rank(scores_K, eligible_K)[len(scores_K) - len(eligible) :]
    return Picks(best=order[-1], median=order[(len(order) - 1) // 2], worst=order[0], eligible=eligible)


def order_statistic_weights(k: int, n: int, m: int) -> np.ndarray:
    """float64[K]: the chance of each rank (worst first) to be the m-th lowest of n drawn from K without replacement.

    Rank i (from 1) is the m-th lowest of a subset where m - 1 others come from the i - 1 below it and n - m from the
    K - i above: C(i - 1, m - 1) C(K - i, n - m) of the C(K, n) subsets.
    """
    if not 1 <= m <= n <= k:
        raise ValueError(f"no {m}-th lowest of {n} drawn from {k}")
    subsets = math.comb(k, n)
    return np.array([math.comb(i - 1, m - 1) * math.comb(k - i, n - m) / subsets for i in range(1, k + 1)])


@cache
def best_of_n_weights(k: int) -> np.ndarray:
    """float64[K, K]: row n - 1 holds the chance of each rank (worst first) to be the best of n drawn from the K."""
    return np.array([order_statistic_weights(k, n, n) for n in range(1, k + 1)])


@cache
def median_of_n_weights(k: int) -> np.ndarray:
    """float64[K, K]: row n - 1 holds the share of each rank (worst first) in the median of n drawn from the K.

    The median of n is its (n + 1)/2-th lowest for odd n; for even n the mean of its n/2-th and (n/2 + 1)-th lowest,
    and by linearity so are the weights. (The lower median alone would drop at every even n: at n = 2 to the minimum.)
    """
    rows = []
    for n in range(1, k + 1):
        low, high = order_statistic_weights(k, n, (n + 1) // 2), order_statistic_weights(k, n, n // 2 + 1)
        rows.append((low + high) / 2)
    return np.array(rows)


def best_of_n_values(rank_by_PK: np.ndarray, value_PK: np.ndarray, eligible_PK: np.ndarray | None = None) -> np.ndarray:
    """Expected value of the response that best-of-n picks, by prompt and n = 1 .. K; float64[P, K].

    Picked by `rank_by`, valued by `value`: the same array gives the expected maximum, a gold score what the picks are
    worth. Unbiased for every n <= K: an average over all subsets of n of the K samples (order statistics). Where no
    response of a subset is eligible, the highest-scored one stands in.
    """
    if value_PK.shape != rank_by_PK.shape:
        raise ValueError(f"shapes differ: {rank_by_PK.shape} and {value_PK.shape}")
    eligible = np.ones_like(rank_by_PK, dtype=bool) if eligible_PK is None else eligible_PK
    ordered_PK = np.take_along_axis(value_PK, rank_all(rank_by_PK, eligible), axis=1)
    return ordered_PK @ best_of_n_weights(rank_by_PK.shape[1]).T


def best_of_n_curve(rank_by_PK: np.ndarray, value_PK: np.ndarray, eligible_PK: np.ndarray | None = None) -> np.ndarray:
    """`best_of_n_values` averaged over prompts; float64[K]."""
    return best_of_n_values(rank_by_PK, value_PK, eligible_PK).mean(axis=0)


def median_of_n_values(value_PK: np.ndarray) -> np.ndarray:
    """Expected median of n of the K values, by prompt and n = 1 .. K, over all subsets of n; float64[P, K]."""
    return np.sort(value_PK, axis=1) @ median_of_n_weights(value_PK.shape[1]).T


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats on KL(best-of-n || policy): log n - (n - 1) / n, exact where no two responses are equal."""
    return math.log(n) - (n - 1) / n
