"""[pure] Which of K scored responses to keep, and what best-of-n gives for every n <= K (recipe sheet §4, Figs 7, 8).

Letters: P prompts, K responses a prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Picks:
    """Indices into the K responses of one prompt, all among its eligible responses."""

    best: int  # the first of the highest score
    median: int  # the lower median: of scores 1 2 3 4, the response scored 2
    worst: int
    eligible: list[int]  # in the order of the responses


def rank(scores_K: Sequence[float], eligible_K: Sequence[bool]) -> list[int]:
    """Response indices from worst to best. Responses that may not be kept rank below all others; of equal scores the
    earlier response ranks higher, so the last entry is the first maximum."""
    return sorted(range(len(scores_K)), key=lambda i: (eligible_K[i], scores_K[i], -i))


def pick(scores_K: Sequence[float], eligible_K: Sequence[bool]) -> Picks | None:
    """The picks of one prompt; None where no response is eligible."""
    eligible = [i for i, ok in enumerate(eligible_K) if ok]
    if not eligible:
        return None
    order = rank(scores_K, eligible_K)[len(scores_K) - len(eligible) :]
    return Picks(best=order[-1], median=order[(len(order) - 1) // 2], worst=order[0], eligible=eligible)


def best_of_n_weights(k: int) -> np.ndarray:
    """float64[K, K]: row n - 1 holds the chance of each rank (worst first) to be the best of n drawn from the K.

    Of the C(K, n) subsets, rank i (from 1) is the highest in C(i - 1, n - 1): the others come from the i - 1 below.
    """
    return np.array(
        [[math.comb(i - 1, n - 1) / math.comb(k, n) for i in range(1, k + 1)] for n in range(1, k + 1)],
        dtype=np.float64,
    )


def best_of_n_curve(rank_by_PK: np.ndarray, value_PK: np.ndarray, eligible_PK: np.ndarray | None = None) -> np.ndarray:
    """Expected value of the response that best-of-n picks, for n = 1 .. K, averaged over prompts; float64[K].

    Picked by `rank_by`, valued by `value`: the same array gives the expected maximum, a gold score what the picks are
    worth. Unbiased for every n <= K: an average over all subsets of n of the K samples (order statistics).
    """
    prompts, k = rank_by_PK.shape
    if value_PK.shape != rank_by_PK.shape:
        raise ValueError(f"shapes differ: {rank_by_PK.shape} and {value_PK.shape}")
    eligible = np.ones_like(rank_by_PK, dtype=bool) if eligible_PK is None else eligible_PK
    ordered_PK = np.array([value_PK[p, rank(rank_by_PK[p].tolist(), eligible[p].tolist())] for p in range(prompts)])
    return (ordered_PK @ best_of_n_weights(k).T).mean(axis=0)


def best_of_n_kl(n: int) -> float:
    """Upper bound in nats on KL(best-of-n || policy): log n - (n - 1) / n, exact where no two responses are equal."""
    return math.log(n) - (n - 1) / n
