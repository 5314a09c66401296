"""PPO's objective, piece by piece and whole: a slow float64 oracle, exact sums over small distributions, hand work."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.ppo_settings import PPOSettings
from rlhf import losses
from rlhf.advantages import explained_variance, gae, masked_whiten, moments, per_token_kl, place_rewards
from rlhf.importance import importance_weights, sampler_figures
from rlhf.kl_control import next_kl_coef
from rlhf.losses import policy_loss_sum, token_logprobs, value_loss_sum
from rlhf.rollout import Rollout, advantages_and_returns
from rlhf.sequences import Sequences

ALL = torch.ones(1, 3, dtype=torch.bool)


# KL estimators -------------------------------------------------------------------------------------------------------


def test_kl_estimators_by_hand():
    # pi 1/2, pi_0 1/4: x = ln 2: k1 .6931, k2 .2402, k3 = 1/2 - 1 + .6931 = .1931; the other way round x = -ln 2:
    # k1 -.6931, k2 .2402, k3 = 2 - 1 - .6931 = .3069; equal: 0
    policy, reference = torch.tensor([[0.5, 0.25, 0.3]]).log(), torch.tensor([[0.25, 0.5, 0.3]]).log()
    expected = {"k1": [0.6931, -0.6931, 0.0], "k2": [0.2402, 0.2402, 0.0], "k3": [0.1931, 0.3069, 0.0]}
    for name, row in expected.items():
        assert per_token_kl(policy, reference, ALL, name)[0].tolist() == pytest.approx(row, abs=1e-4)
    with pytest.raises(ValueError, match="none of k1, k2, k3"):
        per_token_kl(policy, reference, ALL, "k4")


def test_estimators_are_zero_on_padding_and_finite_at_the_extremes():
    mask = torch.tensor([[True, True, False]])
    policy, reference = torch.tensor([[-300.0, -0.1, 9.0]]), torch.tensor([[-0.1, -300.0, float("nan")]])
    for name in ("k1", "k2", "k3"):
        kl = per_token_kl(policy, reference, mask, name)
        assert torch.isfinite(kl).all()
        assert kl[0, 2] == 0


CATEGORICAL = st.lists(st.floats(-2.0, 2.0), min_size=5, max_size=5)


@given(CATEGORICAL, CATEGORICAL)
def test_k1_and_k3_have_the_exact_kl_as_their_mean_and_k2_has_not(policy, reference):
    log_p, log_q = (torch.tensor([x], dtype=torch.float64).log_softmax(1) for x in (policy, reference))
    p, q = log_p.exp()[0].tolist(), log_q.exp()[0].tolist()
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    mean = {
        name: float((log_p.exp() * per_token_kl(log_p, log_q, torch.ones(1, 5, dtype=torch.bool), name)).sum())
        for name in ("k1", "k2", "k3")
    }
    assert mean["k1"] == pytest.approx(exact, abs=1e-12)
    assert mean["k3"] == pytest.approx(exact, abs=1e-12)
    assert mean["k2"] == pytest.approx(sum(a * math.log(a / b) ** 2 / 2 for a, b in zip(p, q, strict=True)), abs=1e-12)


def test_k2_is_biased_by_a_known_amount():
    # p (.9, .1), q (.5, .5): KL = .9 ln 1.8 + .1 ln .2 = .3681;
    # E k2 = .45 ln^2 1.8 + .05 ln^2 .2 = .1555 + .1295 = .2850
    log_p, log_q = torch.tensor([[0.9, 0.1]]).double().log(), torch.tensor([[0.5, 0.5]]).double().log()
    k2 = per_token_kl(log_p, log_q, torch.ones(1, 2, dtype=torch.bool), "k2")
    assert float((log_p.exp() * k2).sum()) == pytest.approx(0.2850, abs=1e-4)


def test_as_a_reward_only_k1_has_the_gradient_of_the_kl():
    """Policy gradient = sum of p(token) * grad log p(token) * estimate, exactly; what docs/ppo.md says of k3."""
    logits = torch.tensor([[0.3, -0.5, 1.1, 0.0]], dtype=torch.float64, requires_grad=True)
    log_q = torch.tensor([[0.1, 0.4, 0.2, -0.7]], dtype=torch.float64).log_softmax(1)
    log_p = logits.log_softmax(1)
    forward = (log_p.exp() * (log_p - log_q)).sum()
    backward = (log_q.exp() * (log_q - log_p)).sum()
    exact, mirrored = (torch.autograd.grad(kl, logits, retain_graph=True)[0] for kl in (forward, backward))

    def as_reward(name):
        penalty = per_token_kl(log_p, log_q, torch.ones(1, 4, dtype=torch.bool), name).detach()
        return torch.autograd.grad((log_p.exp().detach() * log_p * penalty).sum(), logits, retain_graph=True)[0]

    torch.testing.assert_close(as_reward("k1"), exact)
    torch.testing.assert_close(as_reward("k3"), exact - mirrored)
    assert (as_reward("k2") - exact).abs().max() > 0.01


# The controller ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.6, 0.1 * (1 + 0.1 * 0.0512)),  # 10 % above 6: e = 0.1; 512 / 10,000 = 0.0512
        (5.4, 0.1 * (1 - 0.1 * 0.0512)),
        (60.0, 0.1 * (1 + 0.2 * 0.0512)),  # e is clipped
        (-1.0, 0.1 * (1 - 0.2 * 0.0512)),
        (6.0, 0.1),
        (float("nan"), 0.1),
        (float("inf"), 0.1),
    ],
)
def test_the_controller_by_hand(kl, expected):
    assert next_kl_coef(0.1, kl, 6.0, 512, 10_000) == pytest.approx(expected, rel=1e-12)


def test_the_controller_settles_at_its_target():
    beta = 0.01
    for _ in range(2_000):
        beta = next_kl_coef(beta, 0.3 / beta, 6.0, 64, 1_000)  # a world whose KL is 0.3 / beta: 6 nats at 0.05
    assert beta == pytest.approx(0.05, rel=1e-6)


# A rollout against the oracle ----------------------------------------------------------------------------------------


def rollout_of(lengths, seed=0, width=0, scores=None, stopped=None):
    """Random numbers in place of models; what stands at padded places is garbage on purpose."""
    generator = torch.Generator().manual_seed(seed)
    sequences = Sequences.build([[1, 2]] * len(lengths), [[5] * length for length in lengths], "cpu")
    extra = max(0, width - max(lengths))
    mask = torch.nn.functional.pad(sequences.response_mask_BR, (0, extra))
    sequences = replace(sequences, response_mask_BR=mask)

    def draw():
        x_BR = torch.full((len(lengths), mask.shape[1]), 7.7, dtype=torch.float64)
        for row, length in enumerate(lengths):
            x_BR[row, :length] = torch.randn(length, generator=generator, dtype=torch.float64)
        return x_BR

    scores_B = torch.randn(len(lengths), generator=generator, dtype=torch.float64) if scores is None else scores
    stopped_B = torch.ones(len(lengths), dtype=torch.bool) if stopped is None else torch.tensor(stopped)
    return Rollout(
        [None] * len(lengths), [[5] * length for length in lengths], sequences, stopped_B, draw(), draw(), draw(),
        {}, scores_B, None, {},
    )  # fmt: skip


def table(x_BR, lengths):
    return [np.asarray(x_BR[row, :length], dtype=np.float64) for row, length in enumerate(lengths)]


def whitened(values):
    """Population variance, eps 1e-8, element by element."""
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / math.sqrt(variance + 1e-8) for v in values]


def oracle(rollout, lengths, kept, beta, estimator, gamma, lam, whiten_advantages):
    """Rewards, advantages and returns of the kept responses, a token at a time in Python floats."""
    policy, reference, values = (
        table(x, lengths) for x in (rollout.logprobs_BR, rollout.reference_logprobs_BR, rollout.values_BR)
    )
    white = dict(zip(kept, whitened([float(rollout.scores_B[row]) for row in kept]), strict=True))
    advantages, returns = {}, {}
    for row in kept:
        rewards = []
        for t in range(lengths[row]):
            x = policy[row][t] - reference[row][t]
            rewards.append(-beta * {"k1": x, "k2": x * x / 2, "k3": math.exp(-x) - 1 + x}[estimator])
        rewards[-1] += white[row]
        advantage = 0.0
        for t in reversed(range(lengths[row])):
            following = values[row][t + 1] if t + 1 < lengths[row] else 0.0
            advantage = rewards[t] + gamma * following - values[row][t] + gamma * lam * advantage
            advantages[row, t], returns[row, t] = advantage, advantage + values[row][t]
    if whiten_advantages:
        places = sorted(advantages)
        advantages = dict(zip(places, whitened([advantages[place] for place in places]), strict=True))
    return advantages, returns


LENGTHS = [4, 1, 6, 3, 5]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("truncated", ["keep", "mask"])
@pytest.mark.parametrize("whiten_advantages", [True, False])
def test_scores_to_advantages_equal_the_oracle(estimator, truncated, whiten_advantages):
    rollout = rollout_of(LENGTHS, stopped=[True, True, False, True, False])
    settings = PPOSettings(kl_estimator=estimator, truncated_responses=truncated, gamma=0.98, gae_lambda=0.9,
                           whiten_advantages=whiten_advantages, kl_coef=0.5)  # fmt: skip
    kept = [0, 1, 3] if truncated == "mask" else [0, 1, 2, 3, 4]
    assert rollout.kept_B(settings).nonzero()[:, 0].tolist() == kept
    assert int(rollout.kept_mask_BR(settings).sum()) == sum(LENGTHS[row] for row in kept)
    found = advantages_and_returns(rollout, settings, Accelerator(cpu=True), kl_coef=0.3)  # the controller's, not 0.5
    for ours, theirs in zip(
        found, oracle(rollout, LENGTHS, kept, 0.3, estimator, 0.98, 0.9, whiten_advantages), strict=True
    ):
        for place, value in theirs.items():
            assert float(ours[place]) == pytest.approx(value, abs=1e-9)
    if whiten_advantages:  # cut-off responses get no advantage
        assert not found[0][~rollout.kept_mask_BR(settings)].any()


def test_the_check_values_of_whitened_rewards():
    # R_c .10 .90 .20 .50 -> logit -> whitened over the iteration: [-1.1111, 1.5273, -0.6242, 0.2081]
    scores = torch.tensor([0.10, 0.90, 0.20, 0.50], dtype=torch.float64).logit()
    settings = PPOSettings(kl_coef=0.0, gae_lambda=1.0, whiten_advantages=False)
    expected = [-1.1111, 1.5273, -0.6242, 0.2081]
    _, returns = advantages_and_returns(rollout_of([2, 3, 1, 2], scores=scores), settings, Accelerator(cpu=True))
    assert returns[:, 0].tolist() == pytest.approx(expected, abs=5e-5)
    # cut-off responses leave the whitening of the others as it is, whatever their scores
    scores = torch.cat([scores, torch.tensor([50.0, -3.0], dtype=torch.float64)])
    rollout = rollout_of([2, 3, 1, 2, 2, 2], scores=scores, stopped=[True] * 4 + [False] * 2)
    _, returns = advantages_and_returns(rollout, replace(settings, truncated_responses="mask"), Accelerator(cpu=True))
    assert returns[:4, 0].tolist() == pytest.approx(expected, abs=5e-5)


def test_a_constant_for_each_prompt_changes_nothing_with_scores_centered_by_prompt():
    """Pairs of one prompt determine a reward model up to such constants."""
    settings = PPOSettings(center_scores="prompt", responses_per_prompt=2, value_model="trunk", kl_coef=0.1)
    scores = torch.tensor([0.5, -1.0, 2.0, 2.5, 0.0, 3.0], dtype=torch.float64)
    shifts = torch.tensor([4.0, 4.0, -7.0, -7.0, 0.5, 0.5], dtype=torch.float64)
    lengths, accelerator = [2, 3, 1, 2, 4, 2], Accelerator(cpu=True)
    one, two = (
        advantages_and_returns(rollout_of(lengths, scores=s), settings, accelerator) for s in (scores, scores + shifts)
    )
    plain, shifted = (
        advantages_and_returns(
            rollout_of(lengths, scores=s), replace(settings, center_scores="none"), accelerator
        )[0] for s in (scores, scores + shifts)
    )  # fmt: skip
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(plain, shifted, atol=0.1)
    # by hand, of two responses each: 1.5, -1.5; -0.5, 0.5; -3, 3; mean 0, variance (2.25 + 0.25 + 9) / 3
    bare = replace(settings, kl_coef=0.0, gae_lambda=1.0, whiten_advantages=False)
    _, returns = advantages_and_returns(rollout_of(lengths, scores=scores), bare, accelerator)
    deviation = (11.5 / 3) ** 0.5
    expected = [x / deviation for x in (1.5, -1.5, -0.5, 0.5, -3.0, 3.0)]
    assert returns[:, 0].tolist() == pytest.approx(expected, abs=1e-6)


def test_nothing_kept_gives_zeros_and_no_nan():
    rollout = rollout_of([2, 3], stopped=[False, False])
    settings = PPOSettings(truncated_responses="mask")
    advantages, returns = advantages_and_returns(rollout, settings, Accelerator(cpu=True))
    assert not advantages.any()
    assert torch.isfinite(returns).all()
    nothing = moments(returns, rollout.kept_mask_BR(settings))
    assert explained_variance(nothing, nothing) == 0.0


RAGGED = st.lists(st.integers(1, 7), min_size=2, max_size=6)


@given(RAGGED, st.integers(0, 99), st.integers(1, 5))
def test_padding_never_matters(lengths, seed, extra):
    settings, accelerator = PPOSettings(kl_coef=0.2, kl_estimator="k3"), Accelerator(cpu=True)
    narrow = advantages_and_returns(rollout_of(lengths, seed), settings, accelerator)
    wide = advantages_and_returns(rollout_of(lengths, seed, max(lengths) + extra), settings, accelerator)
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a, b[:, : a.shape[1]])
        assert not b[:, a.shape[1] :].any()


@given(RAGGED, st.integers(0, 99), st.randoms(use_true_random=False))
def test_the_order_of_responses_never_matters(lengths, seed, random):
    rollout, settings, accelerator = rollout_of(lengths, seed), PPOSettings(kl_coef=0.2), Accelerator(cpu=True)
    order = list(range(len(lengths)))
    random.shuffle(order)
    mixed = replace(
        rollout, sequences=replace(rollout.sequences, response_mask_BR=rollout.sequences.response_mask_BR[order]),
        **{name: getattr(rollout, name)[order] for name in ("logprobs_BR", "reference_logprobs_BR", "values_BR",
                                                           "scores_B", "stopped_B")},
    )  # fmt: skip
    pairs = zip(*(advantages_and_returns(r, settings, accelerator) for r in (rollout, mixed)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a[order], b)


@given(RAGGED, st.integers(0, 99))
def test_with_lambda_one_returns_are_the_rewards_to_come(lengths, seed):
    rollout = rollout_of(lengths, seed)
    mask = rollout.sequences.response_mask_BR
    kl = per_token_kl(rollout.logprobs_BR, rollout.reference_logprobs_BR, mask)
    rewards = place_rewards(rollout.scores_B, kl, mask, 0.3)
    _, returns = gae(rewards, rollout.values_BR, mask, gamma=1.0, lam=1.0)
    for row, length in enumerate(lengths):
        to_come = [float(rewards[row, t:].sum()) for t in range(length)]
        assert returns[row, :length].tolist() == pytest.approx(to_come, abs=1e-9)


@given(RAGGED, st.integers(0, 99))
def test_whitened_advantages_have_mean_zero_and_variance_one(lengths, seed):
    rollout = rollout_of(lengths, seed)
    mask = rollout.sequences.response_mask_BR
    white = masked_whiten(rollout.values_BR, mask)[mask]
    assert float(white.mean()) == pytest.approx(0.0, abs=1e-6)
    if len(white) > 1:
        assert float(white.var(unbiased=False)) == pytest.approx(1.0, abs=1e-4)


# Losses --------------------------------------------------------------------------------------------------------------


def slow_losses(new, old, advantages, weights, values, old_values, returns, clip):
    """Both losses and the counts of clipped tokens, with d loss / d new and d loss / d value case by case."""
    policy = value = 0.0
    clipped = value_clipped = 0
    d_new, d_value = [], []
    for n, o, a, w, v, ov, g in zip(new, old, advantages, weights, values, old_values, returns, strict=True):
        ratio = math.exp(n - o)
        limited = min(max(ratio, 1 - clip), 1 + clip)
        binds = limited * a < ratio * a
        policy -= w * (limited if binds else ratio) * a
        clipped += binds
        d_new.append(0.0 if binds else -w * a * ratio)  # d ratio / d new = ratio
        near = ov + min(max(v - ov, -clip), clip)
        binds = (near - g) ** 2 > (v - g) ** 2
        value += 0.5 * ((near if binds else v) - g) ** 2
        value_clipped += binds
        d_value.append(0.0 if binds else v - g)
    return policy, value, clipped, value_clipped, d_new, d_value


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_and_their_gradients_equal_the_oracle(weighted):
    rng = np.random.default_rng(4)
    columns = [rng.normal(size=200) * scale for scale in (0.4, 0.4, 1.0, 1.0, 0.5, 1.0)]
    weights = rng.uniform(0.2, 2.0, size=200) if weighted else np.ones(200)
    new, old, advantages, values, old_values, returns = columns
    policy, value, clipped, value_clipped, d_new, d_value = slow_losses(
        new, old, advantages, weights, values, old_values, returns, 0.2
    )
    x, o, a, v, ov, g, w = (torch.tensor(c) for c in (*columns, weights))
    x.requires_grad_(), v.requires_grad_()
    policy_loss, policy_stats = policy_loss_sum(x, o, a, 0.2, w if weighted else None)
    value_loss, value_stats = value_loss_sum(v, ov, g, 0.2)
    (policy_loss + value_loss).backward()
    assert policy_loss.item() == pytest.approx(policy)
    assert value_loss.item() == pytest.approx(value)
    assert (policy_stats["clipped"].item(), value_stats["value_clipped"].item()) == (clipped, value_clipped)
    assert min(clipped, value_clipped, 200 - clipped, 200 - value_clipped) > 20  # all cases occur
    assert x.grad.tolist() == pytest.approx(d_new)
    assert v.grad.tolist() == pytest.approx(d_value)


def test_explained_variance_equals_numpy():
    rng = np.random.default_rng(5)
    returns, values = rng.normal(size=50), rng.normal(size=50) * 0.3
    mask = torch.ones(50, dtype=torch.bool)
    found = explained_variance(moments(torch.tensor(returns), mask), moments(torch.tensor(returns - values), mask))
    assert found == pytest.approx(1 - np.var(returns - values) / np.var(returns))


def test_chunked_entropy_and_logprobs_sum_to_the_whole(monkeypatch):
    """The sum over all targets of exp(logprob) is 1 and that of -p log p the entropy, in chunks of two tokens."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 2 * 9)
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    head = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    columns = [token_logprobs(hidden, head, torch.full((5,), target), 0.8, entropy=True) for target in range(9)]
    logprobs = torch.stack([column[0] for column in columns]).double()
    torch.testing.assert_close(logprobs.exp().sum(0), torch.ones(5, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(-(logprobs.exp() * logprobs).sum(0), columns[0][1].double(), atol=1e-6, rtol=1e-6)


# Importance weights --------------------------------------------------------------------------------------------------


def test_importance_weights_and_figures_by_hand():
    # pi_old / mu = 1.5, 0.5, 4, 1: weights capped at 2; |log| = ln 1.5, ln 2, ln 4, 0
    ratio = torch.tensor([1.5, 0.5, 4.0, 1.0])
    sampler = torch.full((4,), -3.0)
    trainer = sampler + ratio.log()
    torch.testing.assert_close(importance_weights(trainer, sampler, 2.0), torch.tensor([1.5, 0.5, 2.0, 1.0]))
    assert importance_weights(trainer, trainer, 2.0).tolist() == [1.0] * 4  # exactly
    assert importance_weights(torch.tensor([0.0]), torch.tensor([-900.0]), 2.0).item() == 2.0
    figures = sampler_figures(trainer, sampler, 2.0, Accelerator(cpu=True))
    k3 = (0.5 - math.log(1.5)) + (-0.5 - math.log(0.5)) + (3 - math.log(4))
    assert figures == {
        "sampler/logprob_gap": pytest.approx((math.log(1.5) + math.log(2) + math.log(4)) / 4, abs=1e-6),
        "sampler/logprob_gap_max": pytest.approx(math.log(4), abs=1e-6),
        "sampler/kl": pytest.approx(k3 / 4, abs=1e-6),
        "sampler/importance_clipped": 0.25,
    }
    assert sampler_figures(trainer, sampler, 0.0, Accelerator(cpu=True))["sampler/importance_clipped"] == 0.0
    nothing = torch.zeros(0)
    assert set(sampler_figures(nothing, nothing, 2.0, Accelerator(cpu=True)).values()) == {0.0}


def test_uncapped_weights_turn_the_samplers_mean_into_the_trainers():
    """The sum over tokens of mu * w * f is that of pi_old * f, which is what the weights are for."""
    mu, pi = (torch.tensor(x, dtype=torch.float64).softmax(0) for x in ([0.2, -0.3, 1.0], [0.5, 0.1, 0.4]))
    f = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    assert float((mu * importance_weights(pi.log(), mu.log(), 100.0) * f).sum()) == pytest.approx(float((pi * f).sum()))
    # the gradient of the loss at pi = pi_old is that of -E_pi[f], though tokens come from mu
    logprobs = pi.log().requires_grad_()
    weights = importance_weights(pi.log(), mu.log(), 100.0)
    loss, _ = policy_loss_sum(logprobs, pi.log(), f * mu, 0.2, weights)
    torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], -pi * f)


# Settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_estimator": "k4"}, "none of `k1`, `k2`, `k3`"),
        ({"kl_coef": -0.1}, "kl_coef: -0.1"),
        ({"kl_controller": "pid"}, "neither `fixed` nor `adaptive`"),
        ({"kl_controller": "adaptive"}, "needs kl_target"),
        ({"kl_controller": "adaptive", "kl_target": 0.0}, "kl_target: 0.0; give a finite number above 0"),
        ({"kl_controller": "adaptive", "kl_target": 6.0, "kl_coef": 0.0}, "start above 0"),
        ({"kl_controller": "adaptive", "kl_target": 6.0, "kl_horizon": 500}, "below batch_size 512"),
        ({"kl_target": 6.0}, "kl_target has no effect"),
        ({"kl_horizon": 99_999}, "kl_horizon has no effect"),
        ({"truncated_responses": "drop"}, "neither `keep` nor `mask`"),
        ({"truncated_responses": "mask", "missing_eos_penalty": 1.0}, "missing_eos_penalty has no effect"),
        ({"importance_cap": 0.5, "bf16": True}, "at least 1, or 0"),
        ({"importance_cap": float("nan"), "bf16": True}, "at least 1, or 0"),
        ({"center_scores": "True"}, "none of `none`, `model` and `prompt`"),
        ({"center_scores": "model", "reward_combination": "mean"}, "center_scores: model is for reward_combination"),
        ({"center_scores": "model", "value_model": "path", "value_model_path": "x"}, "have their zero"),
        ({"center_scores": "prompt"}, "responses_per_prompt to 2 or more"),
        (
            {"center_scores": "prompt", "responses_per_prompt": 4, "helpfulness_model_path": "x"},
            "value_model: helpfulness.*use `policy` or `trunk`",
        ),
        ({"sampling_engine": "server"}, "weights it has loaded"),
        ({"sampling_engine": "auto"}, "resumed run"),
        ({"sampling_engine": "vllm"}, "neither `in_process` nor `continuous_batching`"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        PPOSettings(**settings)


def test_an_importance_cap_without_effect_is_refused_once_the_weights_are_known():
    with pytest.raises(UserError, match="importance_cap has no effect"):
        PPOSettings(importance_cap=3.0).check_importance()
    PPOSettings(importance_cap=3.0, recompute_logprobs=True).check_importance()


def test_old_logprobs_are_recomputed_where_the_sampler_differs():
    assert not PPOSettings().recomputes
    for settings in ({"bf16": True}, {"recompute_logprobs": True}, {"sampling_engine": "continuous_batching"}):
        assert PPOSettings(importance_cap=3.0, **settings).recomputes
