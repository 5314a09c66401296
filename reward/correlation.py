"""Correlation of two lists, of values or of ranks [pure]."""

from collections.abc import Sequence

import numpy as np


def pearson(x_N: Sequence[float], y_N: Sequence[float]) -> float | None:
    """Pearson's correlation; None where it is not defined (fewer than two values, or one list constant)."""
    x = np.asarray(x_N, dtype=np.float64)
    y = np.asarray(y_N, dtype=np.float64)
    if x.shape != y.shape:
        raise ValueError(f"{x.size} values against {y.size}")
    if x.size < 2 or (x == x[0]).all() or (y == y[0]).all():
        return None
    return _cosine(x - x.mean(), y - y.mean())


def spearman(x_N: Sequence[float], y_N: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties at their average rank; None where it is not defined."""
    return pearson(ranks(x_N).tolist(), ranks(y_N).tolist())


def ranks(values_N: Sequence[float]) -> np.ndarray:
    """Ranks from 1 [N]; equal values share the average of their places."""
    _, place, counts = np.unique(np.asarray(values_N, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def symmetric(differences_N: Sequence[float]) -> list[float]:
    """Differences a - b of pairs together with b - a, so that a correlation of two such lists does not depend on which
    side of a pair is called first."""
    return [*differences_N, *(-d for d in differences_N)]


def _cosine(x: np.ndarray, y: np.ndarray) -> float | None:
    # Each is scaled first: squares of tiny or huge values would leave the range of a float.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    return float(np.clip(x @ y / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))
