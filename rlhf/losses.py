"""PPO's losses as sums, and token log-probs without full-vocabulary logits (paper 3.2.3; recipe sheet 5, 10.3).

Axes: N response tokens of a micro-batch, laid end to end (no padding); D hidden size; V vocabulary. Every loss is a
**sum** over tokens. The caller divides by the token count of the whole mini-batch over all micro-batches and processes,
so that neither their number nor their composition changes the result.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far outside any clip, far inside float32
CHUNK_ELEMENTS = 2**24  # logits held at once: 64 MiB in float32


def token_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """log softmax(h W^T / temperature) at the targets, and the entropy of that distribution; both [N], float32, nats.

    `hidden_ND` are the hidden states *before* each target, at response positions only. Logits exist for one chunk of
    tokens at a time; with several chunks, backward recomputes a chunk instead of keeping it. The entropy is a figure
    to watch and carries no gradient.
    """
    if hidden_ND.shape[0] != targets_N.shape[0]:
        raise ValueError(f"{hidden_ND.shape[0]} hidden states for {targets_N.shape[0]} targets")
    tokens = max(1, CHUNK_ELEMENTS // head_VD.shape[0])
    if hidden_ND.shape[0] <= tokens:
        return _chunk_logprobs(hidden_ND, head_VD, targets_N, temperature, entropy)
    parts = [
        checkpoint(_chunk_logprobs, hidden, head_VD, targets, temperature, entropy, use_reentrant=False)
        for hidden, targets in zip(hidden_ND.split(tokens), targets_N.split(tokens), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]) if entropy else None


def _chunk_logprobs(
    hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits_NV = (hidden_ND @ head_VD.T).float()
    if temperature != 1.0:
        logits_NV = logits_NV / temperature
    log_total_N = logits_NV.logsumexp(1)
    logprobs_N = logits_NV.gather(1, targets_N[:, None])[:, 0] - log_total_N
    if not entropy:
        return logprobs_N, None
    with torch.no_grad():  # H = -sum p log p = log Z - sum p * logit
        mean_logit_N = ((logits_NV - log_total_N[:, None]).exp() * logits_NV).sum(1)
    return logprobs_N, log_total_N.detach() - mean_logit_N


def policy_loss_sum(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    clip: float = 0.2,
    weights_N: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of -w min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = pi / pi_old; and sums to watch.

    The weights w are those of rlhf/importance.py; none: 1 each.
    `clipped` counts tokens at which the clip takes the gradient away; `ratio_error` sums |ratio - 1|; `kl_old` sums
    the k3 estimate of KL(pi_old || pi), (ratio - 1) - log ratio, which is never negative.
    """
    log_ratio_N = (logprobs_N - old_logprobs_N).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # else inf * 0 = nan in backward
    ratio_N = log_ratio_N.exp()
    plain_N = -advantages_N * ratio_N
    limited_N = -advantages_N * ratio_N.clamp(1.0 - clip, 1.0 + clip)
    loss_N = torch.maximum(plain_N, limited_N)
    loss = (loss_N if weights_N is None else weights_N * loss_N).sum()
    with torch.no_grad():
        stats = {
            "clipped": (limited_N > plain_N).sum(),
            "ratio_error": (ratio_N - 1.0).abs().sum(),
            "kl_old": (torch.expm1(log_ratio_N) - log_ratio_N).sum(),  # expm1: exact near 0, where it lives
        }
    return loss, stats


def value_loss_sum(
    values_N: Tensor, old_values_N: Tensor, returns_N: Tensor, clip: float = 0.2
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sum of 1/2 max((V - G)^2, (V_clipped - G)^2), V_clipped within `clip` of the value at sampling; `clip` 0: off.

    `value_clipped` counts tokens at which the clip decides.
    """
    error_N = (values_N - returns_N) ** 2
    if clip <= 0:
        return 0.5 * error_N.sum(), {"value_clipped": torch.zeros((), dtype=torch.long, device=values_N.device)}
    near_N = old_values_N + (values_N - old_values_N).clamp(-clip, clip)
    limited_N = (near_N - returns_N) ** 2
    return 0.5 * torch.maximum(error_N, limited_N).sum(), {"value_clipped": (limited_N > error_N).sum()}
