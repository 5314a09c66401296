"""PPO losses and chunked log-probs against hand-worked numbers and float64 oracles."""

import math

import pytest
import torch

from rlhf import losses
from rlhf.losses import policy_loss_sum, token_logprobs, value_loss_sum


def test_policy_loss_by_hand():
    # ratio 1.5, A 1: min(1.5, 1.2) = 1.2 (clipped);  ratio 1.5, A -1: min(-1.5, -1.2) = -1.5
    # ratio 0.5, A 1: min(0.5, 0.8) = 0.5
    ratio = torch.tensor([1.5, 1.5, 0.5])
    old = torch.full((3,), -2.0)
    loss, stats = policy_loss_sum(old + ratio.log(), old, torch.tensor([1.0, -1.0, 1.0]), clip=0.2)
    assert loss.item() == pytest.approx(-1.2 + 1.5 - 0.5, abs=1e-6)
    assert stats["clipped"].item() == 1
    assert stats["ratio_error"].item() == pytest.approx(1.5, abs=1e-6)
    # k3: 2 * (0.5 - ln 1.5) + (-0.5 - ln 0.5)
    expected = 2 * (0.5 - math.log(1.5)) - 0.5 - math.log(0.5)
    assert stats["kl_old"].item() == pytest.approx(expected, abs=1e-5)


def test_policy_gradient_is_minus_advantage_at_ratio_one_and_zero_where_clipped():
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, _ = policy_loss_sum(logprobs, torch.tensor([-1.0, -2.0]), torch.tensor([0.7, 3.0]))
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-0.7, 0.0]))  # the second ratio is e > 1.2


def test_extreme_log_ratios_stay_finite_with_finite_gradients():
    logprobs = torch.tensor([-1.0, -900.0, -0.5], requires_grad=True)
    old = torch.tensor([-900.0, -1.0, -0.5])
    for sign in (1.0, -1.0):
        loss, _ = policy_loss_sum(logprobs, old, torch.full((3,), sign))
        assert torch.isfinite(loss)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert torch.isfinite(gradient).all()


def test_value_loss_by_hand():
    # V 1, old 0.5, clip 0.2 -> V_clipped 0.7. G 0: max(1, 0.49) = 1; G 1: max(0, 0.09) = 0.09, the clip decides
    values, old, returns = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])
    loss, stats = value_loss_sum(values, old, returns, clip=0.2)
    assert loss.item() == pytest.approx(0.5 * 1.09)
    assert stats["value_clipped"].item() == 1
    assert value_loss_sum(values, old, returns, clip=0.0)[0].item() == pytest.approx(0.5)


def test_sums_add_up_over_micro_batches():
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(10, generator=generator, dtype=torch.float64) for _ in range(3))
    for function in (policy_loss_sum, value_loss_sum):
        whole = function(a, b, c)[0]
        parts = sum(function(a[i : i + 3], b[i : i + 3], c[i : i + 3])[0] for i in range(0, 10, 3))
        torch.testing.assert_close(whole, parts)


def test_logprob_and_entropy_by_hand():
    # hidden 1, head (0, ln 3): p = 1/4, 3/4; entropy = ln 4 - 3/4 ln 3
    head = torch.tensor([[0.0], [math.log(3.0)]])
    logprobs, entropy = token_logprobs(torch.ones(2, 1), head, torch.tensor([0, 1]), entropy=True)
    assert logprobs.tolist() == pytest.approx([math.log(0.25), math.log(0.75)], abs=1e-6)
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3)] * 2, abs=1e-6)
    # temperature 1/2 doubles the logits: p = 1/10, 9/10
    hot, _ = token_logprobs(torch.ones(1, 1), head, torch.tensor([1]), temperature=0.5)
    assert hot.item() == pytest.approx(math.log(0.9), abs=1e-6)


@pytest.mark.parametrize("elements", [2**24, 5 * 11, 11])
def test_chunks_equal_a_float64_oracle_in_values_and_gradients(monkeypatch, elements):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(13, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(11, (13,), generator=generator)
    weights = torch.randn(13, generator=generator, dtype=torch.float64)

    table = torch.log_softmax(hidden @ head.T / 1.3, -1)
    expected = table[torch.arange(13), targets]
    expected_gradients = torch.autograd.grad((expected * weights).sum(), (hidden, head))

    logprobs, entropy = token_logprobs(hidden, head, targets, temperature=1.3, entropy=True)
    gradients = torch.autograd.grad((logprobs * weights).sum(), (hidden, head))
    torch.testing.assert_close(logprobs.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(entropy.double(), -(table.exp() * table).sum(-1), atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
