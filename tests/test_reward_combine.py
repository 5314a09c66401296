"""The piecewise reward, its whitening and the other combinations against the worked numbers of the recipe."""

import pytest
import torch

from reward.combine import combine, combined_reward, from_own_zeros, from_prompt_mean, whiten
from reward.ensemble import Ensemble


def logit(probability: float) -> float:
    return float(torch.logit(torch.tensor(probability, dtype=torch.float64)))


def test_each_branch_of_the_rule():
    #                   tagged   unsafe answer   safe answer
    r_safety = torch.tensor([2.0, -1.7347, -1.7346])  # logit(0.15) = -1.734601
    r_helpfulness = torch.tensor([5.0, 6.0, 7.0])
    is_safety = torch.tensor([True, False, False])
    found = combined_reward(r_safety, r_helpfulness, is_safety)
    torch.testing.assert_close(found, torch.tensor([2.0, -1.7347, 7.0]))


def test_scores_are_measured_from_the_zero_of_the_model_that_decided():
    found = from_own_zeros(torch.tensor([2.0, -1.0, 0.5]), torch.tensor([True, False, False]), -1.5, 1.25)
    torch.testing.assert_close(found, torch.tensor([0.75, 0.5, 2.0]))


def test_scores_are_measured_from_the_mean_of_the_prompts_other_responses():
    scores = torch.tensor([1.0, 2.0, 6.0, -3.0, 100.0, -5.0])
    everything = torch.ones(6, dtype=torch.bool)
    # by hand: 1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2,
    # -3 - (100 - 5) / 2, 100 + (3 + 5) / 2, -5 - (100 - 3) / 2
    expected = torch.tensor([-3.0, -1.5, 4.5, -50.5, 104.0, -53.5])
    torch.testing.assert_close(from_prompt_mean(scores, everything, 3), expected)
    # one that is left out is no baseline, even where it is no number; its own result does not matter
    scores[4], kept = float("nan"), torch.tensor([True, True, True, True, False, True])
    found = from_prompt_mean(scores, kept, 3)
    torch.testing.assert_close(found[[0, 1, 2, 3, 5]], torch.tensor([-3.0, -1.5, 4.5, 2.0, -2.0]))
    # the only one kept has nothing to be compared with
    assert from_prompt_mean(torch.tensor([7.0, 1.0]), torch.tensor([True, False]), 2)[0] == 0.0
    with pytest.raises(ValueError, match="do not come 4 a prompt"):
        from_prompt_mean(scores, kept, 4)
    with pytest.raises(ValueError, match="at least 2"):
        from_prompt_mean(scores, kept, 1)


def test_raw_scores_survive_where_a_sigmoid_would_saturate():
    found = combined_reward(torch.tensor([9.0, -200.0]), torch.tensor([40.0, 1.0]), torch.tensor([False, False]))
    assert found.tolist() == [40.0, -200.0]


def test_threshold_is_a_setting_and_strict():
    r_safety, r_helpfulness, tagged = torch.zeros(1), torch.ones(1), torch.tensor([False])
    assert combined_reward(r_safety, r_helpfulness, tagged, threshold=0.5).item() == 1.0  # R_s = 0.5 is not below 0.5
    assert combined_reward(r_safety, r_helpfulness, tagged, threshold=0.6).item() == 0.0
    with pytest.raises(ValueError, match="threshold"):
        combined_reward(r_safety, r_helpfulness, tagged, threshold=0.0)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        combined_reward(torch.zeros(2), torch.zeros(2), torch.tensor([True]))


def test_whitened_logits_of_the_recipe():
    r_c = torch.tensor([logit(p) for p in (0.10, 0.90, 0.20, 0.50)])
    torch.testing.assert_close(r_c, torch.tensor([-2.1972, 2.1972, -1.3863, 0.0]), atol=5e-5, rtol=0)
    expected = torch.tensor([-1.1111, 1.5273, -0.6242, 0.2081])
    torch.testing.assert_close(whiten(r_c), expected, atol=5e-5, rtol=0)


def test_whitening_gives_mean_zero_and_population_variance_one():
    white = whiten(torch.tensor([3.0, 5.0]))
    torch.testing.assert_close(white, torch.tensor([-1.0, 1.0]))  # the sample variance would give 0.7071
    assert whiten(torch.full((4,), 2.5)).tolist() == [0.0] * 4


TWO = {"helpfulness": torch.tensor([5.0, -1.0, 2.0]), "safety": torch.tensor([-3.0, 7.0, 2.0])}
TAGGED = torch.tensor([False, True, False])


@pytest.mark.parametrize(
    ("how", "expected", "of_safety"),
    [
        ("piecewise", [-3.0, 7.0, 2.0], [True, True, False]),  # -3 < logit(0.15); tagged; neither
        ("helpfulness", [5.0, -1.0, 2.0], [False, False, False]),
        ("safety", [-3.0, 7.0, 2.0], [True, True, True]),
        ("min", [-3.0, -1.0, 2.0], [True, False, False]),
        ("mean", [1.0, 3.0, 2.0], None),
        ("ensemble", [7.5, 0.5, 4.0], None),  # 10 - 1.5 - 1, -2 + 3.5 - 1, 4 + 1 - 1
    ],
)
def test_every_combination_by_hand(how, expected, of_safety):
    found, decides = combine(how, TWO, TAGGED, 0.15, Ensemble({"helpfulness": 2.0, "safety": 0.5}, bias=-1.0))
    assert found.tolist() == expected
    assert (decides if decides is None else decides.tolist()) == of_safety
    for name in ("helpfulness", "safety"):
        if how == name:  # one model is enough
            assert torch.equal(combine(how, {name: TWO[name]}, TAGGED)[0], found)


def test_combinations_refuse_what_they_cannot_combine():
    with pytest.raises(ValueError, match="no rule 'median'"):
        combine("median", TWO, TAGGED)
    with pytest.raises(ValueError, match="needs an ensemble"):
        combine("ensemble", TWO, TAGGED)
    with pytest.raises(ValueError, match="needs scores of judge"):
        combine("ensemble", TWO, TAGGED, ensemble=Ensemble({"helpfulness": 1.0, "judge": 1.0}))
