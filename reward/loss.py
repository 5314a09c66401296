"""Margins and losses of the reward models (Llama 2 paper §3.2.2, Eq. 1 and 2, Table 27).

Letters: P = pairs in the batch. Scores are raw scalars r, before any sigmoid: a margin of 3 cannot be met in (0, 1).
Losses are sums over pairs; the loop divides by the number of pairs of the whole optimizer step, over all micro-batches
and processes, so that neither accumulation nor the number of processes changes the result.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.records import RATINGS

# Strongest rating first, the order of RATINGS: significantly, better, slightly, negligibly better / unsure.
MARGIN_TABLES: dict[str, tuple[float, ...]] = {
    "none": (0.0, 0.0, 0.0, 0.0),
    "small": (1.0, 2 / 3, 1 / 3, 0.0),
    "large": (3.0, 2.0, 1.0, 0.0),
}

# (chosen is safe, rejected is safe) by safety bin. The fourth case, an unsafe response chosen over a safe one, is
# excluded when the data are collected (§3.2.1). NaN: no label, no auxiliary loss.
SAFETY_LABELS: dict[str | None, tuple[float, float]] = {
    "chosen_safe": (1.0, 0.0),
    "both_safe": (1.0, 1.0),
    "both_unsafe": (0.0, 0.0),
    None: (float("nan"), float("nan")),
}


def margin_table(name: str, values: Sequence[float] | None = None) -> dict[str, float]:
    """The map rating -> margin: Table 27's `small` or `large`, `none`, or `values` (strongest rating first) instead.

    A pair without a rating gets margin 0 (reward.data): Eq. 2 becomes Eq. 1 for it.

    Raises ValueError for an unknown name, a wrong number of values, or values that do not fall with the rating.
    """
    if values is None:
        if name not in MARGIN_TABLES:
            raise ValueError(f"margin must be one of {', '.join(MARGIN_TABLES)}, not {name!r}")
        values = MARGIN_TABLES[name]
    if len(values) != len(RATINGS):
        raise ValueError(
            f"margin_table needs {len(RATINGS)} values, one each for {', '.join(RATINGS)}; got {len(values)}"
        )
    if any(weaker > stronger for stronger, weaker in zip(values, values[1:], strict=False)) or values[-1] < 0:
        raise ValueError(
            f"margin_table must not rise from the strongest rating to the weakest nor be negative: {list(values)}"
        )
    return dict(zip(RATINGS, (float(value) for value in values), strict=True))


def ranking_loss_sum(r_chosen_P: Tensor, r_rejected_P: Tensor, margin_P: Tensor) -> Tensor:
    """Eq. 2 summed over the pairs: sum_P -log sigmoid(r_c - r_r - m). Returns a scalar."""
    if not r_chosen_P.shape == r_rejected_P.shape == margin_P.shape or r_chosen_P.dim() != 1:
        raise ValueError(f"one dimension, equal lengths: {r_chosen_P.shape}, {r_rejected_P.shape}, {margin_P.shape}")
    return -F.logsigmoid(r_chosen_P - r_rejected_P - margin_P).sum()


def safety_loss_sum(r_chosen_P: Tensor, r_rejected_P: Tensor, chosen_safe_P: Tensor, rejected_safe_P: Tensor) -> Tensor:
    """The safety reward model's auxiliary loss, summed over the pairs; the paper gives its purpose, not its formula.

    Binary cross-entropy of R = sigmoid(r) against safe = 1, unsafe = 0, averaged over the two responses of a pair. A
    label of NaN leaves its response out (its share of the average is 0). Returns a scalar.
    """
    r_2P = torch.cat([r_chosen_P, r_rejected_P])
    safe_2P = torch.cat([chosen_safe_P, rejected_safe_P]).to(r_2P.dtype)
    if r_2P.shape != safe_2P.shape or r_2P.dim() != 1:
        raise ValueError(f"one dimension, equal lengths: scores {r_2P.shape}, labels {safe_2P.shape}")
    labelled_2P = ~safe_2P.isnan()
    losses_2P = F.binary_cross_entropy_with_logits(r_2P, safe_2P.nan_to_num(0.0), reduction="none")
    return losses_2P.masked_fill(~labelled_2P, 0.0).sum() / 2


def centring_loss_sum(r_chosen_P: Tensor, r_rejected_P: Tensor) -> Tensor:
    """(r_c + r_r)^2 summed over the pairs: pulls the mean score to 0, which ranking alone leaves open.

    Eisenstein et al. 2023, "Helping or Herding?"; trl's `center_rewards_coefficient`. The Llama 2 paper has no such
    term. Returns a scalar.
    """
    if r_chosen_P.shape != r_rejected_P.shape or r_chosen_P.dim() != 1:
        raise ValueError(f"one dimension, equal lengths: {r_chosen_P.shape}, {r_rejected_P.shape}")
    return (r_chosen_P + r_rejected_P).square().sum()
