"""The adaptive KL coefficient (Ziegler et al. 2019, arXiv 1909.08593, 2.2; code: lm-human-preferences)."""

import math

MAX_ERROR = 0.2


def next_kl_coef(kl_coef: float, kl_nats: float, target: float, episodes: int, horizon: int) -> float:
    """beta for the next iteration, from this one's mean KL to the reference in nats a response.

        e = clip(KL / target - 1, -0.2, 0.2),   beta <- beta (1 + e episodes / horizon)

    `episodes` are the responses of the iteration; the paper writes K_beta = 0.1 where its code has episodes / horizon.
    A KL that is not finite says nothing and leaves beta as it is.
    """
    if not math.isfinite(kl_nats):
        return kl_coef
    error = min(max(kl_nats / target - 1.0, -MAX_ERROR), MAX_ERROR)
    return kl_coef * (1.0 + error * episodes / horizon)
