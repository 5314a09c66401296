"""A learnt ensemble of reward models: one weight each, fitted to labelled preference pairs.

    P(chosen is preferred) = sigmoid(sum_m w_m (r_m(chosen) - r_m(rejected)))

is the Bradley-Terry model of the summed score, that is logistic regression without intercept on score differences. The
weights learn both how far each model is to be trusted and the scale of its scores. A bias cannot be learnt from
differences; it is set so that the mean response of the fitted pairs scores 0.

Letters: P = pairs, M = models, B = responses.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError

STEPS = 100  # of Newton's method, which takes fewer than twenty


@dataclass(frozen=True)
class Ensemble:
    """combined = bias + sum of weights[name] * raw score of that model."""

    weights: dict[str, float]
    bias: float = 0.0

    def scores(self, raw: Mapping[str, Tensor]) -> Tensor:
        """The combined score from the [B] raw scores of each model, in their own type; ValueError for a missing one."""
        if missing := sorted(self.weights.keys() - raw.keys()):
            raise ValueError(f"the ensemble needs scores of {', '.join(missing)}")
        return self.bias + torch.stack([weight * raw[name] for name, weight in self.weights.items()]).sum(0)


def fit(differences_PM: Tensor, l2: float = 1e-3) -> Tensor:
    """The weights [M], float64, that minimise the mean of log(1 + exp(-differences @ w)) + l2 / 2 * sum (s_m w_m)^2.

    s_m is the root mean square of model m's differences, so the penalty does not depend on the scale of its scores;
    without any, pairs that the models order without fault would have no finite best weights. Newton's method, as the
    loss is convex. ValueError where there is no pair or a difference is no number.
    """
    x_PM = differences_PM.double()
    if x_PM.ndim != 2 or not x_PM.numel() or not torch.isfinite(x_PM).all():
        raise ValueError("score differences must be finite, for one pair and one model at least")
    scale_M = x_PM.pow(2).mean(0).sqrt()
    scale_M = torch.where(scale_M > 0, scale_M, 1.0)
    x_PM = x_PM / scale_M
    ridge_MM = l2 * torch.eye(x_PM.shape[1], dtype=torch.float64)

    v_M = torch.zeros(x_PM.shape[1], dtype=torch.float64)
    for _ in range(STEPS):
        wrong_P = torch.sigmoid(-x_PM @ v_M)  # P(rejected is preferred)
        gradient_M = l2 * v_M - (wrong_P[:, None] * x_PM).mean(0)
        if gradient_M.abs().max() < 1e-12:
            break
        hessian_MM = (x_PM * (wrong_P * (1 - wrong_P))[:, None]).T @ x_PM / len(x_PM) + ridge_MM
        step_M = torch.linalg.lstsq(hessian_MM, gradient_M[:, None]).solution[:, 0]
        v_M = v_M - step_M
    return v_M / scale_M


def fit_ensemble(r_chosen: Mapping[str, Tensor], r_rejected: Mapping[str, Tensor], l2: float = 1e-3) -> Ensemble:
    """The ensemble of the models named in both, from their [P] raw scores of chosen and rejected responses."""
    names = list(r_chosen)
    chosen_PM, rejected_PM = (torch.stack([r[name].double() for name in names], 1) for r in (r_chosen, r_rejected))
    weights_M = fit(chosen_PM - rejected_PM, l2)
    bias = -float((torch.cat([chosen_PM, rejected_PM]) @ weights_M).mean())
    return Ensemble(dict(zip(names, weights_M.tolist(), strict=True)), bias)


def read_ensemble(path: str) -> Ensemble:
    """An ensemble from JSON: {"weights": {name: number}, "bias": number}, other keys ignored. UserError naming the file
    where it is none."""
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"ensemble_file: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"ensemble_file: {path} is no JSON ({error})") from error
    content = content if isinstance(content, dict) else {}
    weights, bias = content.get("weights"), content.get("bias", 0.0)
    numbers = [*weights.values(), bias] if isinstance(weights, dict) and weights else [None]
    if not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers):
        raise UserError(
            f'ensemble_file: {path} must hold {{"weights": {{name: number}}, "bias": number}}, as rlhf/fit_ensemble.py '
            "writes it"
        )
    return Ensemble({name: float(weight) for name, weight in dict(weights).items()}, float(bias))
