"""The sampler's log-probs against the trainer's: importance weights, and figures to watch.

An engine that samples with other kernels, or rounds to bfloat16, draws from a policy mu that is not quite the pi_old
that the trainer computes from the same weights. Truncated importance sampling (Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training") weighs each token's policy loss by min(pi_old / mu, cap).

Axes: N response tokens, laid end to end. Log-probs in nats, both at the sampling temperature.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf.losses import MAX_LOG_RATIO


def importance_weights(logprobs_N: Tensor, sampler_logprobs_N: Tensor, cap: float) -> Tensor:
    """min(pi_old / mu, cap) of each token; exactly 1 where both agree."""
    return (logprobs_N - sampler_logprobs_N).clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def sampler_figures(logprobs_N: Tensor, sampler_logprobs_N: Tensor, cap: float, accelerator: Any) -> dict[str, float]:
    """How far the two are apart over the tokens of all processes, under the names of metrics.jsonl.

    `sampler/kl` is the k3 estimate of KL(mu || pi_old) a token; `sampler/importance_clipped` the share of tokens whose
    weight meets the cap, 0 where `cap` is 0 (off).
    """
    gap_N = (logprobs_N - sampler_logprobs_N).double()
    clipped_N = gap_N.clamp(max=MAX_LOG_RATIO).exp() > cap
    sums = torch.stack([gap_N.abs().sum(), (torch.expm1(gap_N.clamp(max=MAX_LOG_RATIO)) - gap_N).sum(),
                        clipped_N.sum() * float(cap > 0), gap_N.new_tensor(float(len(gap_N)))])  # fmt: skip
    absolute, kl, clipped, tokens = accelerator.reduce(sums, "sum").tolist()
    largest = gap_N.abs().max() if len(gap_N) else gap_N.new_zeros(())
    return {
        "sampler/logprob_gap": absolute / max(tokens, 1.0),
        "sampler/logprob_gap_max": float(accelerator.gather(largest[None]).max()),
        "sampler/kl": kl / max(tokens, 1.0),
        "sampler/importance_clipped": clipped / max(tokens, 1.0),
    }
