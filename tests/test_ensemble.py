"""The learnt ensemble of reward models: its fit against numbers by hand, brute force and the gradient in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.ensemble import Ensemble, fit, fit_ensemble


def test_one_model_by_hand():
    # Three of four pairs differ by +1, one by -1: sigmoid(w) = 3/4, w = log 3. In other units of r the weight follows.
    differences = torch.tensor([[1.0], [1.0], [1.0], [-1.0]])
    assert fit(differences, l2=0.0).item() == pytest.approx(math.log(3), abs=1e-10)
    assert fit(100 * differences, l2=0.0).item() == pytest.approx(math.log(3) / 100, abs=1e-12)
    # with l2 on w times the r.m.s. difference, here 1: the derivative l2 w - 3/4 sigmoid(-w) + 1/4 sigmoid(w) is zero
    w = fit(differences, l2=0.5).item()
    assert 0.5 * w - 0.75 / (1 + math.exp(w)) + 0.25 / (1 + math.exp(-w)) == pytest.approx(0, abs=1e-12)


def simulated(pairs: int, seed: int) -> torch.Tensor:
    """Differences of two models on different scales, chosen by sigmoid(d0 + 0.1 * d1), the rest sign-flipped."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(pairs, 2, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 15.0])
    preferred = torch.rand(pairs, generator=generator) < torch.sigmoid(x @ torch.tensor([1.0, 0.1]).double())
    return torch.where(preferred[:, None], x, -x)


def loss(w0: float, w1: float, x: torch.Tensor, l2: float) -> float:
    """The objective in plain Python, pair by pair."""
    rows = x.tolist()
    scale = [math.sqrt(sum(row[m] ** 2 for row in rows) / len(rows)) for m in (0, 1)]
    ridge = l2 / 2 * ((scale[0] * w0) ** 2 + (scale[1] * w1) ** 2)
    return sum(math.log1p(math.exp(-(w0 * a + w1 * b))) for a, b in rows) / len(rows) + ridge


@pytest.mark.parametrize("l2", [0.0, 1e-3, 0.3])
def test_two_models_against_brute_force(l2):
    x = simulated(300, seed=1)
    w0, w1 = fit(x, l2).tolist()
    best = loss(w0, w1, x, l2)
    for step in (0.3, 0.03, 0.003):
        for a in (-step, 0, step):
            for b in (-step / 15, 0, step / 15):
                assert loss(w0 + a, w1 + b, x, l2) >= best
    v = torch.tensor([w0, w1], dtype=torch.float64, requires_grad=True)
    scaled = v * x.pow(2).mean(0).sqrt()
    (torch.nn.functional.softplus(-x @ v).mean() + l2 / 2 * scaled @ scaled).backward()
    assert v.grad.abs().max() < 1e-9


def test_the_weights_that_made_the_labels_come_back():
    w = fit(simulated(40_000, seed=2), l2=0.0)
    torch.testing.assert_close(w, torch.tensor([1.0, 0.1], dtype=torch.float64), atol=0.03, rtol=0.05)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_the_units_of_a_model_do_not_matter(seed, a, b):
    x, units = simulated(60, seed), torch.tensor([a, b], dtype=torch.float64)
    torch.testing.assert_close(fit(x * units) * units, fit(x), rtol=1e-6, atol=1e-9)


def test_fits_that_have_no_single_answer_of_their_own():
    assert torch.isfinite(fit(torch.tensor([[1.0], [2.0]]))).all()  # every pair ordered well: l2 keeps it finite
    torch.testing.assert_close(fit(torch.tensor([[1.0, 1.0], [3.0, 3.0], [-1.0, -1.0]])).diff().abs(),
                               torch.zeros(1).double(), atol=1e-9, rtol=0)  # fmt: skip  # the same model twice
    assert fit(torch.zeros(3, 2)).tolist() == [0.0, 0.0]  # models that see no difference
    huge = fit(torch.tensor([[1000.0], [-3.0], [1000.0]]))
    assert 0 < huge.item() < 1
    for bad in (torch.zeros(0, 2), torch.tensor([[math.nan]]), torch.tensor([1.0])):
        with pytest.raises(ValueError, match="must be finite"):
            fit(bad)


def test_the_ensemble_has_names_and_a_centre():
    chosen = {"h": torch.tensor([3.0, 1.0, 2.0, 0.0]), "s": torch.tensor([10.0, 10.0, 10.0, 10.0])}
    rejected = {"h": torch.tensor([2.0, 0.0, 1.0, 1.0]), "s": torch.tensor([10.0, 10.0, 10.0, 10.0])}
    ensemble = fit_ensemble(chosen, rejected, l2=0.0)  # differences of h: 1, 1, 1, -1; s says nothing
    assert ensemble.weights["h"] == pytest.approx(math.log(3))
    assert ensemble.weights["s"] == 0.0
    assert ensemble.bias == pytest.approx(-math.log(3) * 10 / 8)  # the mean h of the eight responses is 10 / 8
    scores = torch.cat([ensemble.scores(chosen), ensemble.scores(rejected)])
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert Ensemble({"h": 2.0}).scores({"h": torch.tensor([1.5]), "s": torch.tensor([9.0])}).tolist() == [3.0]
