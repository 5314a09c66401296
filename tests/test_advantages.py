"""Advantages against numbers worked out by hand and a slow float64 oracle."""

import math

import pytest
import torch

from rlhf.advantages import (
    explained_variance,
    gae,
    masked_mean,
    masked_whiten,
    moments,
    per_token_kl,
    place_rewards,
)

MASK = torch.tensor([[True, True, True], [True, False, False]])


def test_masked_mean_counts_only_true_places():
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, float("nan")]])
    assert masked_mean(x, MASK).item() == 3.0  # (1 + 2 + 3 + 6) / 4
    assert masked_mean(x, torch.zeros_like(MASK)).item() == 0.0


def test_masked_whiten_by_hand():
    # 1, 2, 3, 6: mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5
    x = torch.tensor([[1.0, 2.0, 3.0], [6.0, 100.0, 100.0]])
    root = math.sqrt(3.5)
    expected = torch.tensor([[-2 / root, -1 / root, 0.0], [3 / root, 0.0, 0.0]])
    torch.testing.assert_close(masked_whiten(x, MASK), expected)


def test_moments_of_two_processes_whiten_like_one():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    total = moments(x[:2], mask[:2]) + moments(x[2:], mask[2:])
    parts = torch.cat([masked_whiten(x[:2], mask[:2], total), masked_whiten(x[2:], mask[2:], total)])
    torch.testing.assert_close(parts, masked_whiten(x, mask))


def test_kl_is_log_policy_minus_log_reference_and_padding_is_zero():
    policy = torch.tensor([[-1.0, -2.0, -0.5], [-0.1, 9.0, 9.0]])
    reference = torch.tensor([[-1.5, -1.0, -0.5], [-0.6, -9.0, -9.0]])
    expected = torch.tensor([[0.5, -1.0, 0.0], [0.5, 0.0, 0.0]])
    torch.testing.assert_close(per_token_kl(policy, reference, MASK), expected)


def test_reward_goes_to_the_last_response_token_and_kl_to_all():
    kl = torch.tensor([[0.1, 0.2, -0.3], [0.5, 7.0, 7.0]])
    rewards = place_rewards(torch.tensor([2.0, -1.0]), kl, MASK, kl_coef=0.1)
    # -0.1 * kl; + 2 on the third token of row 0, - 1 on the first of row 1, nothing on padding
    torch.testing.assert_close(rewards, torch.tensor([[-0.01, -0.02, 2.03], [-1.05, 0.0, 0.0]]))


def test_place_rewards_refuses_empty_responses_and_wrong_shapes():
    with pytest.raises(ValueError, match="without tokens"):
        place_rewards(torch.zeros(2), torch.zeros(2, 3), torch.tensor([[True] * 3, [False] * 3]), 0.1)
    with pytest.raises(ValueError, match="scores"):
        place_rewards(torch.zeros(2, 1), torch.zeros(2, 3), MASK, 0.1)
    with pytest.raises(ValueError, match="shapes differ"):
        gae(torch.zeros(2, 3), torch.zeros(2, 1), MASK)


def test_gae_by_hand():
    # gamma 1, lambda 0.5, rewards 0 0 1, values 0.5 0.25 0.75:
    # delta = 0 + 0.25 - 0.5 = -0.25; 0 + 0.75 - 0.25 = 0.5; 1 + 0 - 0.75 = 0.25
    # A_2 = 0.25, A_1 = 0.5 + 0.5 * 0.25 = 0.625, A_0 = -0.25 + 0.5 * 0.625 = 0.0625
    rewards = torch.tensor([[0.0, 0.0, 1.0], [2.0, 50.0, 50.0]])
    values = torch.tensor([[0.5, 0.25, 0.75], [0.5, 50.0, 50.0]])
    advantages, returns = gae(rewards, values, MASK, gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.0625, 0.625, 0.25], [1.5, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[0.5625, 0.875, 1.0], [2.0, 0.0, 0.0]]))


def slow_gae(rewards, values, gamma, lam):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, straight from the definition, in Python floats."""
    steps = len(rewards)
    delta = [
        rewards[t] + (gamma * values[t + 1] if t + 1 < steps else 0.0) - values[t]  # the end is terminal
        for t in range(steps)
    ]
    return [sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, steps)) for t in range(steps)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.97, 0.0)])
def test_gae_equals_a_slow_oracle_on_ragged_rows(gamma, lam):
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 7, 4, 9]
    mask = torch.arange(9)[None, :] < torch.tensor(lengths)[:, None]
    rewards = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    values = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = slow_gae(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected)
        assert (advantages[row, length:] == 0).all()
        assert (returns[row, length:] == 0).all()


def test_explained_variance_of_perfect_and_constant_values():
    returns = torch.tensor([[1.0, 2.0, 3.0], [6.0, 0.0, 0.0]])
    perfect, constant, half = returns, torch.full_like(returns, 2.5), returns / 2
    for values, expected in ((perfect, 1.0), (constant, 0.0), (half, 0.75)):  # half: Var(G / 2) = Var(G) / 4
        found = explained_variance(moments(returns, MASK), moments(returns - values, MASK))
        assert found == pytest.approx(expected, abs=1e-6)
