"""One reward out of the two reward models (Llama 2 paper §3.2.3).

    R_c = R_s   if the prompt is tagged as possibly eliciting an unsafe answer, or R_s < 0.15
          R_h   otherwise
    reward = whiten(logit(R_c))      the KL penalty is subtracted later, outside the whitening

R = sigmoid(r) and logit undoes it, so everything here stays in raw scores r: no round trip through a sigmoid, which
would saturate. Letters: B = responses.
"""

import math

import torch
from torch import Tensor


def combined_reward(
    r_safety_B: Tensor, r_helpfulness_B: Tensor, is_safety_B: Tensor, threshold: float = 0.15
) -> Tensor:
    """logit(R_c), the raw score of the reward model that the rule picks, for each of B responses; [B], float.

    `is_safety_B` is boolean. `threshold` is on R_s, in (0, 1); compared is r_s < logit(threshold), strictly.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold is a probability R_s in (0, 1), got {threshold}")
    if not r_safety_B.shape == r_helpfulness_B.shape == is_safety_B.shape:
        raise ValueError(f"shapes differ: {r_safety_B.shape}, {r_helpfulness_B.shape}, {is_safety_B.shape}")
    use_safety_B = is_safety_B.bool() | (r_safety_B < math.log(threshold / (1 - threshold)))
    return torch.where(use_safety_B, r_safety_B, r_helpfulness_B)


def whiten(x_B: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over all of `x_B`: (x - mean) / sqrt(var + eps), with the population variance.

    Pass every score of an iteration, over all processes. Equal scores give zeros.
    """
    return (x_B - x_B.mean()) * torch.rsqrt(x_B.var(unbiased=False) + eps)
