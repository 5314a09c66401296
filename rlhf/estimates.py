"""Estimates with 95 % intervals [pure]."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.intervals import Z_95, wilson


def mean_with_interval(values: list[float] | np.ndarray) -> tuple[float, float]:
    """Mean and the half-width of its normal 95 % interval; the half-width is 0 for one value, both are nan for none."""
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        return math.nan, math.nan
    return float(x.mean()), float(Z_95 * x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else 0.0


def share_with_interval(successes: float, n: int) -> tuple[float, tuple[float, float]]:
    """A share and its Wilson 95 % interval (sensible at 0 and at n, unlike the normal one); nan for n = 0."""
    if n == 0:
        return math.nan, (math.nan, math.nan)
    return successes / n, wilson(successes, n)


def over_prompts(
    values: Sequence[float | None], k: int, share: bool = False
) -> tuple[float, tuple[float, float]] | None:
    """Mean and 95 % interval of k values a prompt, in the order of the prompts; None where there are no values.

    The k samples of a prompt are alike, so they count as one value, their mean: taken as k independent ones the
    interval would be too narrow. A `share` (of 0 and 1) has Wilson's interval at the number of prompts. A value of
    None does not apply and is left out.
    """
    prompts = [[value for value in values[i : i + k] if value is not None] for i in range(0, len(values), k)]
    means = [math.fsum(each) / len(each) for each in prompts if each]
    if not means:
        return None
    if share:
        return share_with_interval(math.fsum(means), len(means))
    mean, half = mean_with_interval(means)
    return mean, (mean - half, mean + half)


def paired_bootstrap(
    before: list[float], after: list[float], draws: int = 10_000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean of `after - before` over the same prompts and its percentile bootstrap 95 % interval.

    Raises ValueError where the two lists differ in length or are empty.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"a paired comparison needs equally many values, got {len(before)} and {len(after)}")
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.array([difference[rng.integers(0, difference.size, difference.size)].mean() for _ in range(draws)])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), (float(low), float(high))


def share_over_seeds(shares: Sequence[float], n: int) -> dict[str, Any]:
    """{"mean", "ci95", "sd"} of a share that several trainings reached on the same n trials.

    The interval is Wilson's of the mean at n: the trials are the same each time, so more seeds do not narrow it, and
    it says nothing of how trainings differ. That is `sd`, over the trainings (n - 1 form; None for one). All None for
    no trials.
    """
    if n == 0 or not shares:
        return {"mean": None, "ci95": None, "sd": None}
    mean = min(math.fsum(shares) / len(shares), 1.0)
    deviation = float(np.std(shares, ddof=1)) if len(shares) > 1 else None
    return {"mean": mean, "ci95": list(wilson(mean * n, n)), "sd": deviation}
