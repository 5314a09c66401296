"""[pure] One token per row from logits, with random numbers that belong to the sample and not to the batch.

Letters: B rows, V vocabulary.

Step t of a sample uses `uniforms(seed, t)`, a hash (splitmix64) of its own seed and of t. Whatever else is in the
batch, in whatever order, the sample sees the same numbers; a torch.Generator would hand out numbers by position in the
batch.
"""

import math

import torch
from torch import Tensor

from configs.sampling_settings import SamplingSettings


def _signed(value: int) -> int:
    """The 64-bit pattern `value` as the signed integer that torch.int64 holds."""
    return value - (1 << 64) if value >= 1 << 63 else value


# The constants of splitmix64 (Steele, Lea, Flood 2014). int64 products wrap modulo 2^64 as the algorithm needs.
_STRIDE = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit in from the left."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(state: Tensor, counter: Tensor) -> Tensor:
    """Output number `counter` (from 0) of the splitmix64 generator started at `state`; int64 tensors that broadcast."""
    z = state + (counter + 1) * _STRIDE
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def sample_seeds(seed: int, count: int, first: int = 0) -> list[int]:
    """Seeds of samples first .. first + count - 1 under one run seed: in [0, 2^63), the same in any grouping."""
    index = torch.arange(first, first + count, dtype=torch.int64)
    # The run seed is hashed first: seeds 0 and 1 must not give the same numbers shifted by one sample.
    state = splitmix64(torch.tensor(_signed(seed % (1 << 64))), torch.tensor(0))
    return (splitmix64(state, index) & ((1 << 63) - 1)).tolist()


def uniforms(seed_B: Tensor, step_B: Tensor) -> Tensor:
    """float32[B, 2] in [0, 1): two numbers for each seed and step, of these alone. Multiples of 2^-24, exact."""
    bits_B = splitmix64(seed_B, step_B)
    return torch.stack([_shift_right(bits_B, 40), _shift_right(bits_B, 16) & 0xFFFFFF], dim=-1).float() * 2.0**-24


def truncate(scaled_BV: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Set to -inf the logits outside top-k, then outside top-p of what is left, then below min-p of the likeliest.

    Ties at the k-th logit all stay. The order and the borders are those of transformers' logits warpers.
    """
    if 0 < top_k < scaled_BV.shape[-1]:
        kth_B1 = scaled_BV.topk(top_k, dim=-1).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < kth_B1, -torch.inf)
    if top_p < 1.0:
        sorted_BV, order_BV = scaled_BV.sort(dim=-1, descending=True)
        share_BV = sorted_BV.softmax(dim=-1)
        # A token goes when the tokens before it already hold top_p: the one that crosses the border stays.
        drop_BV = share_BV.cumsum(dim=-1) - share_BV >= top_p
        drop_BV[:, 0] = False
        scaled_BV = scaled_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV), -torch.inf)
    if min_p > 0.0:
        # p / p_max >= min_p, compared as logits.
        lowest_B1 = scaled_BV.amax(dim=-1, keepdim=True) + math.log(min_p)
        scaled_BV = scaled_BV.masked_fill(scaled_BV < lowest_B1, -torch.inf)
    return scaled_BV


def draw(
    logits_BV: Tensor, settings: SamplingSettings, uniform_B2: Tensor, temperature_B: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row; temperature_B (all above 0) stands in for the settings' temperature where it is given.

    Returns (token_B int64, log-prob_B under the distribution drawn from, log-prob_B under the model at temperature 1),
    log-probs float32 in nats. Greedy draws have log-prob 0 under the distribution they are drawn from.
    """
    logits_BV = logits_BV.float()
    if temperature_B is None and settings.temperature == 0.0:
        token_B = logits_BV.argmax(dim=-1)
        return token_B, torch.zeros_like(uniform_B2[:, 0]), _log_prob(logits_BV, token_B)
    cut = settings.top_p < 1.0 or settings.top_k > 0 or settings.min_p > 0.0
    plain = temperature_B is None and settings.temperature == 1.0 and not cut
    divisor = settings.temperature if temperature_B is None else temperature_B[:, None]
    scaled_BV = logits_BV if plain else truncate(logits_BV / divisor, settings.top_k, settings.top_p, settings.min_p)
    peak_B1 = scaled_BV.amax(dim=-1, keepdim=True)
    token_B1, total_B1 = _pick(scaled_BV, peak_B1, uniform_B2)
    log_prob_B = (scaled_BV.gather(-1, token_B1) - peak_B1 - total_B1.log()).squeeze(-1)
    token_B = token_B1.squeeze(-1)
    return token_B, log_prob_B, log_prob_B if plain else _log_prob(logits_BV, token_B)


def _pick(scaled_BV: Tensor, peak_B1: Tensor, uniform_B2: Tensor) -> tuple[Tensor, Tensor]:
    """A token a row, [B, 1], with chances in proportion to exp(scaled - peak), and the sum of these weights, [B, 1].

    Inverse CDF in two stages: a block of about sqrt(V) neighbouring tokens by its summed weight, then a token of it. A
    draw flips where rounding, which differs with the batch, moves a border of the CDF across the random number. Two
    CDFs of sqrt(V) borders each flip far less often than one of V, and blocks are summed faster than cumulated.
    """
    rows, vocabulary = scaled_BV.shape
    size = math.isqrt(vocabulary - 1) + 1
    weights_BV = scaled_BV.new_zeros(rows, -(-vocabulary // size) * size)
    torch.sub(scaled_BV, peak_B1, out=weights_BV[:, :vocabulary]).exp_()
    blocks_BNS = weights_BV.view(rows, -1, size)
    block_B1, total_B1 = _inverse_cdf(blocks_BNS.sum(dim=2), uniform_B2[:, :1])
    inside_BS = blocks_BNS[torch.arange(rows, device=scaled_BV.device), block_B1.squeeze(1)]
    place_B1, _ = _inverse_cdf(inside_BS, uniform_B2[:, 1:])
    return (block_B1 * size + place_B1).clamp_(max=vocabulary - 1), total_B1


def _inverse_cdf(weights_BN: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first place whose cumulative weight exceeds u * total, and the total. `right=True` skips weights of 0;
    u * total may round up to total, where there is no such place, so it is kept one step below."""
    cumulative_BN = weights_BN.cumsum(dim=-1)
    total_B1 = cumulative_BN[:, -1:].contiguous()
    target_B1 = torch.minimum(uniform_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # The clamp matters for nan logits only: the caller reports those by their log-prob.
    place_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True).clamp_(max=weights_BN.shape[-1] - 1)
    return place_B1, total_B1


def _log_prob(logits_BV: Tensor, token_B: Tensor) -> Tensor:
    return logits_BV.gather(-1, token_B[:, None]).squeeze(-1) - logits_BV.logsumexp(dim=-1)
