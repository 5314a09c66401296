"""How often one policy beats another: plain, and with the length of the answers held equal [pure].

Letters: P = prompts. A preference is what a judge thinks of one prompt: 1 the later policy's answer is better, 0 the
earlier one's is, one half a tie; with several answers a prompt the mean over their pairs. The prompt is the unit that
intervals are for, so several answers to it do not count as several trials.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from configs.intervals import Z_95, wilson

Interval = tuple[float, float]

RIDGE = 0.01  # bounds the fit where every answer wins or length decides all; worth a hundredth of four even trials


def win_rate(preferences_P: Sequence[float]) -> tuple[float, Interval]:
    """The mean preference and its Wilson 95 % interval. ValueError for no prompts or a preference outside [0, 1]."""
    y_P = _checked(preferences_P)
    return float(y_P.mean()), wilson(float(y_P.sum()), y_P.size)


def length_controlled_win_rate(
    preferences_P: Sequence[float], length_differences_P: Sequence[float], ridge: float = RIDGE
) -> tuple[float, Interval]:
    """The win rate that answers of equal length would have, and its 95 % interval; both are shares.

    As in length-controlled AlpacaEval (arXiv 2404.04475), without its terms for models and prompts:

        P(later wins) = sigmoid(a + b x),  x = tanh(d / sd(d)),  d = tokens of the later answer - tokens of the earlier

    maximises sum y log p + (1 - y) log(1 - p) - ridge/2 (a^2 + b^2), and sigmoid(a) is the win rate at d = 0. Where
    all differences are equal, length cannot be told from quality, and x is 0: the plain win rate.

    The interval holds every a whose best b comes within Z^2/2 of the maximum (profile likelihood). Unlike a normal
    interval of a it keeps its meaning where all answers win, and unlike one from resampling it is wide where the
    later answers are all longer, so that d = 0 was hardly seen. Ties vary less than the trials it is made for: with
    many it is wider than need be. ValueError as in `win_rate`, or where the lists differ in length.
    """
    y_P = _checked(preferences_P)
    d_P = np.asarray(length_differences_P, dtype=np.float64)
    if d_P.shape != y_P.shape:
        raise ValueError(f"{y_P.size} preferences and {d_P.size} length differences")
    deviation = d_P.std()
    x_P = np.tanh(d_P / deviation) if deviation > 1e-9 * max(1.0, np.abs(d_P).max()) else np.zeros_like(d_P)
    (a, _), best = _maximise(y_P, np.stack([np.ones_like(x_P), x_P], 1), np.zeros_like(x_P), ridge)

    def drop(other: float) -> float:
        """Twice the fall of the penalised log-likelihood from its maximum where a is held at `other`."""
        _, value = _maximise(y_P, x_P[:, None], np.full_like(x_P, other), ridge)
        return 2 * (best - value + ridge / 2 * other**2)

    low, high = (_sigmoid(_crossing(drop, a, side)) for side in (-1.0, 1.0))
    return _sigmoid(a), (low, high)


def _checked(preferences_P: Sequence[float]) -> np.ndarray:
    y_P = np.asarray(preferences_P, dtype=np.float64)
    if y_P.size == 0 or not ((y_P >= 0) & (y_P <= 1)).all():
        raise ValueError("a win rate needs at least one preference, each from 0 to 1")
    return y_P


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def _maximise(y_P: np.ndarray, x_PF: np.ndarray, offset_P: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """The F weights w that maximise the penalised log-likelihood of sigmoid(offset + x w), and that maximum.

    Newton's steps, halved until they climb: the function is strictly concave, so there is one maximum and they reach
    it.
    """

    def value(w_F: np.ndarray) -> float:
        z_P = offset_P + x_PF @ w_F
        return float(np.sum(y_P * z_P - np.logaddexp(0, z_P)) - ridge / 2 * w_F @ w_F)

    w_F = np.zeros(x_PF.shape[1])
    now = value(w_F)
    for _ in range(100):
        p_P = 0.5 * (1 + np.tanh((offset_P + x_PF @ w_F) / 2))
        gradient_F = x_PF.T @ (y_P - p_P) - ridge * w_F
        curvature_FF = (x_PF * (p_P * (1 - p_P))[:, None]).T @ x_PF + ridge * np.eye(w_F.size)
        step_F = np.linalg.solve(curvature_FF, gradient_F)
        while (after := value(w_F + step_F)) < now and np.abs(step_F).max() > 1e-12:
            step_F = step_F / 2
        if after <= now:
            break
        w_F, now = w_F + step_F, after
    return w_F, now


def _crossing(drop: Callable[[float], float], start: float, side: float) -> float:
    """Where `drop`, 0 at `start` and growing away from it, reaches Z^2 to one side."""
    reach = 1.0
    while drop(start + side * reach) < Z_95**2:
        reach *= 2
    inside, outside = 0.0, reach
    while outside - inside > 1e-7 * max(1.0, outside):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if drop(start + side * middle) < Z_95**2 else (inside, middle)
    return start + side * (inside + outside) / 2
