"""From scores and log-probs to advantages: KL, reward placement, GAE, whitening (paper 3.2.3; recipe sheet 5, 10.1-11).

Axes: B responses of an iteration (this process's share), R response tokens, padded on the right. Masks are bool, `True`
where a token was sampled (the stop token included). Log-probs and KL are in nats. Whatever stands at padded places goes
in without effect and comes out as 0.
"""

import torch
from torch import Tensor

from rlhf.losses import MAX_LOG_RATIO


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` over the True places of `mask` (same shape); scalar. 0 where there are none."""
    _same_shape(x, mask)
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """[3] float64: count, sum and sum of squares of `x` over `mask`. They add up over processes."""
    _same_shape(x, mask)
    kept = x[mask].double()
    return torch.stack(
        [torch.tensor(float(kept.numel()), dtype=torch.float64), kept.sum().cpu(), (kept**2).sum().cpu()]
    )


def masked_whiten(x: Tensor, mask: Tensor, total: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the True places, 0 elsewhere; population variance (recipe sheet 10.8).

    `total` are the `moments` summed over all processes; without it, those of `x` alone.
    """
    count, first, second = moments(x, mask) if total is None else total.double()
    mean = first / count.clamp(min=1)
    variance = (second / count.clamp(min=1) - mean**2).clamp(min=0)
    white = (x.double() - mean.to(x.device)) * torch.rsqrt(variance + eps).to(x.device)
    return torch.where(mask, white, 0.0).to(x.dtype)


def per_token_kl(
    logprobs_BR: Tensor, reference_logprobs_BR: Tensor, response_mask_BR: Tensor, estimator: str = "k1"
) -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token, from x = log pi - log pi_0; [B, R].

        k1 = x,   k2 = x^2 / 2,   k3 = exp(-x) - 1 + x      (Schulman, "Approximating KL divergence", 2020)

    The sum of k1 over a response is log pi(g|p) - log pi_0(g|p), whose mean over samples of pi is the KL of Eq. 4;
    single terms may be negative. k3 has the same mean and k2 nearly, close to pi_0; neither is ever negative. As a
    reward only k1 has the gradient of Eq. 4: docs/ppo.md.
    """
    _same_shape(logprobs_BR, reference_logprobs_BR, response_mask_BR)
    x_BR = torch.where(response_mask_BR, logprobs_BR - reference_logprobs_BR, 0.0)
    if estimator == "k1":
        return x_BR
    if estimator == "k2":
        return 0.5 * x_BR**2
    if estimator == "k3":  # expm1: exact near 0, where it lives; the clamp: else inf where pi has left a token to pi_0
        return torch.expm1(-x_BR.clamp(min=-MAX_LOG_RATIO)) + x_BR
    raise ValueError(f"estimator {estimator!r} is none of k1, k2, k3")


def place_rewards(scores_B: Tensor, kl_BR: Tensor, response_mask_BR: Tensor, kl_coef: float) -> Tensor:
    """Per-token rewards [B, R] of Eq. 4: -kl_coef * KL on every response token, plus the score on the last one.

    The last response token is the stop token where the response has one. `scores_B` are already whitened: the KL
    penalty stays outside the whitening.
    """
    _same_shape(kl_BR, response_mask_BR)
    lengths_B = response_mask_BR.sum(1)
    if scores_B.shape != lengths_B.shape:
        raise ValueError(f"{tuple(scores_B.shape)} scores for {len(lengths_B)} responses")
    if (lengths_B == 0).any():
        raise ValueError("a response without tokens has no place for its reward")
    rewards_BR = torch.where(response_mask_BR, -kl_coef * kl_BR, 0.0)
    return rewards_BR.scatter_add(1, (lengths_B - 1)[:, None], scores_B[:, None].to(rewards_BR.dtype))


def gae(
    rewards_BR: Tensor, values_BR: Tensor, response_mask_BR: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns (the value targets), both [B, R].

        delta_t = r_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   returns = A + V

    V_t is the value before token t is chosen; V and A are 0 after the last response token.
    """
    _same_shape(rewards_BR, values_BR, response_mask_BR)
    keep_BR = response_mask_BR.to(values_BR.dtype)
    values_BR, rewards_BR = values_BR * keep_BR, rewards_BR * keep_BR
    next_values_BR = torch.cat([values_BR[:, 1:], torch.zeros_like(values_BR[:, :1])], 1)
    delta_BR = (rewards_BR + gamma * next_values_BR - values_BR) * keep_BR
    columns, running_B = [], torch.zeros_like(values_BR[:, 0])
    for delta_B in reversed(delta_BR.unbind(1)):  # right padding: delta is 0 there, so nothing runs into the response
        running_B = delta_B + gamma * lam * running_B
        columns.append(running_B)
    advantages_BR = torch.stack(columns[::-1], 1)
    return advantages_BR, advantages_BR + values_BR


def explained_variance(returns: Tensor, errors: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect value model, 0 for a constant one.

    Takes the `moments` of returns and of returns - values, [3] each, summed over processes. 0 where they count nothing.
    """
    if not returns[0]:
        return 0.0
    target, error = ((second / count - (first / count) ** 2).clamp(min=0) for count, first, second in (returns, errors))
    return 1.0 - float(error / target.clamp(min=1e-12))


def _same_shape(first: Tensor, *others: Tensor) -> None:
    """Broadcasting here would be a silent error."""
    for other in others:
        if other.shape != first.shape:
            raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(other.shape)}")
