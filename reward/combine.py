"""One reward out of the two reward models (Llama 2 paper §3.2.3).

    R_c = R_s   if the prompt is tagged as possibly eliciting an unsafe answer, or R_s < 0.15
          R_h   otherwise
    reward = whiten(logit(R_c))      the KL penalty is subtracted later, outside the whitening

R = sigmoid(r) and logit undoes it, so everything here stays in raw scores r: no round trip through a sigmoid, which
would saturate. Letters: B = responses.

Beside that rule: one model alone, and `min` and `mean` of the two raw scores as they are. Nothing puts two models on
one scale there: the one whose scores spread more has more say. What learns the scales from labelled pairs is
`ensemble` (reward/ensemble.py).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reward.ensemble import Ensemble


def safety_decides(r_safety_B: Tensor, is_safety_B: Tensor, threshold: float = 0.15) -> Tensor:
    """Where R_c is R_s; bool [B]. `threshold` is on R_s, in (0, 1); compared is r_s < logit(threshold), strictly."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is a probability R_s in (0, 1), got {threshold}")
    return is_safety_B.bool() | (r_safety_B < math.log(threshold / (1 - threshold)))


def combined_reward(
    r_safety_B: Tensor, r_helpfulness_B: Tensor, is_safety_B: Tensor, threshold: float = 0.15
) -> Tensor:
    """logit(R_c), the raw score of the reward model that the rule picks, for each of B responses; [B], float.

    `is_safety_B` is boolean; `threshold` as in `safety_decides`.
    """
    if not r_safety_B.shape == r_helpfulness_B.shape == is_safety_B.shape:
        raise ValueError(f"shapes differ: {r_safety_B.shape}, {r_helpfulness_B.shape}, {is_safety_B.shape}")
    return torch.where(safety_decides(r_safety_B, is_safety_B, threshold), r_safety_B, r_helpfulness_B)


def from_own_zeros(scores_B: Tensor, safety_decides_B: Tensor, helpfulness_zero: float, safety_zero: float) -> Tensor:
    """Combined raw scores [B], each measured from the zero of the reward model that decided it.

    Pairs determine a model's scores up to a constant: two models have no common zero unless they are given one.
    """
    return scores_B - torch.where(safety_decides_B, safety_zero, helpfulness_zero)


def from_prompt_mean(scores_B: Tensor, kept_B: Tensor, k: int) -> Tensor:
    """Scores [B] less the mean score of the same prompt's other kept responses; k neighbours share a prompt.

    The leave-one-out baseline (Kool et al. 2019; RLOO, Ahmadian et al. 2024): independent of the response itself, so
    the policy gradient's mean is not moved. 0 where no other response is kept; `kept_B` is bool.
    """
    if k < 2 or len(scores_B) % k:
        raise ValueError(f"{len(scores_B)} scores do not come {k} a prompt, k at least 2")
    scores_PK, kept_PK = scores_B.double().view(-1, k), kept_B.view(-1, k)
    counted_PK = torch.where(kept_PK, scores_PK, 0.0)
    others_PK = kept_PK.sum(1, keepdim=True) - kept_PK.long()
    mean_PK = (counted_PK.sum(1, keepdim=True) - counted_PK) / others_PK.clamp(min=1)
    return torch.where(others_PK > 0, scores_PK - mean_PK, 0.0).flatten().to(scores_B.dtype)


def combine(
    how: str,
    raw: Mapping[str, Tensor],
    is_safety_B: Tensor,
    threshold: float = 0.15,
    ensemble: Ensemble | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(combined raw score [B], where it is the safety model's [B] bool) by one of the rules of the module docstring.

    `raw` has the [B] scores "helpfulness" and "safety", or the one that the rule needs. The second result is None where
    the score belongs to no one model (mean, ensemble). In a tie `min` counts as helpfulness.
    """
    if how == "ensemble":
        if ensemble is None:
            raise ValueError("the rule `ensemble` needs an ensemble")
        return ensemble.scores(raw), None
    if how == "mean":
        return (raw["helpfulness"] + raw["safety"]) / 2, None
    if how == "helpfulness":
        return raw[how], torch.zeros_like(is_safety_B, dtype=torch.bool)
    if how == "safety":
        return raw[how], torch.ones_like(is_safety_B, dtype=torch.bool)
    if how == "min":
        return torch.minimum(raw["helpfulness"], raw["safety"]), raw["safety"] < raw["helpfulness"]
    if how == "piecewise":
        scores_B = combined_reward(raw["safety"], raw["helpfulness"], is_safety_B, threshold)
        return scores_B, safety_decides(raw["safety"], is_safety_B, threshold)
    raise ValueError(f"no rule {how!r}")


def whiten(x_B: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over all of `x_B`: (x - mean) / sqrt(var + eps), with the population variance.

    Pass every score of an iteration, over all processes. Equal scores give zeros.
    """
    return (x_B - x_B.mean()) * torch.rsqrt(x_B.var(unbiased=False) + eps)
