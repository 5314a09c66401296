"""Margins, ranking loss and safety loss against worked numbers."""

import math

import pytest
import torch

from configs.records import RATINGS
from reward.loss import SAFETY_LABELS, margin_table, ranking_loss_sum, safety_loss_sum


@pytest.mark.parametrize(
    ("name", "expected"), [("none", [0, 0, 0, 0]), ("small", [1, 2 / 3, 1 / 3, 0]), ("large", [3, 2, 1, 0])]
)
def test_tables_are_those_of_the_paper(name, expected):
    table = margin_table(name)
    assert [table[rating] for rating in RATINGS] == expected
    assert list(table)[0] == "significantly_better"
    assert list(table)[-1] == "negligibly_better"


def test_own_table_replaces_the_named_one():
    assert margin_table("large", [2, 1, 0.5, 0.25])["slightly_better"] == 0.5


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("huge", None, "none, small, large"),
        ("small", [1, 0], "needs 4 values"),
        ("small", [0, 1, 2, 3], "must not rise"),
        ("small", [3, 2, 1, -1], "negative"),
    ],
)
def test_impossible_tables_are_refused(name, values, message):
    with pytest.raises(ValueError, match=message):
        margin_table(name, values)


@pytest.mark.parametrize(
    ("margin", "loss"),  # -log sigmoid(1 - m), worked out apart from the code
    [(0, 0.313262), (1 / 3, 0.414370), (2 / 3, 0.540306), (1, 0.693147), (2, 1.313262), (3, 2.126928)],
)
def test_ranking_loss_at_a_gap_of_one(margin, loss):
    found = ranking_loss_sum(torch.tensor([1.5]), torch.tensor([0.5]), torch.tensor([float(margin)]))
    assert found.item() == pytest.approx(loss, abs=1e-6)


def test_ranking_loss_is_a_sum_and_stays_finite_far_out():
    # gaps 0 and -1000, margins 0: log 2 + 1000
    found = ranking_loss_sum(torch.tensor([0.0, -500.0]), torch.tensor([0.0, 500.0]), torch.zeros(2))
    assert found.item() == pytest.approx(1000 + math.log(2))


def test_ranking_loss_refuses_to_broadcast():
    with pytest.raises(ValueError, match="equal lengths"):
        ranking_loss_sum(torch.zeros(3), torch.zeros(3), torch.zeros(1))
    with pytest.raises(ValueError, match="equal lengths"):
        ranking_loss_sum(torch.zeros(3, 1), torch.zeros(3, 1), torch.zeros(3, 1))


def test_safety_loss_by_hand():
    # chosen r = log 3 -> R = 3/4, rejected r = -log 3 -> R = 1/4
    r_chosen, r_rejected = torch.full((3,), math.log(3)), torch.full((3,), -math.log(3))
    labels = [SAFETY_LABELS[name] for name in ("chosen_safe", "both_safe", "both_unsafe")]
    chosen_safe, rejected_safe = (torch.tensor(column) for column in zip(*labels, strict=True))
    right, wrong = -math.log(3 / 4), -math.log(1 / 4)
    # per pair the mean of its two responses: right/right, right/wrong, wrong/right
    expected = right + (right + wrong) / 2 + (wrong + right) / 2
    assert safety_loss_sum(r_chosen, r_rejected, chosen_safe, rejected_safe).item() == pytest.approx(expected, rel=1e-6)


def test_unlabelled_pairs_give_no_safety_loss_and_no_gradient():
    r_chosen = torch.tensor([0.0, 2.0], requires_grad=True)
    r_rejected = torch.zeros(2)
    safe = torch.tensor([1.0, float("nan")])
    loss = safety_loss_sum(r_chosen, r_rejected, safe, safe)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))  # (log 2 + log 2) / 2
    assert r_chosen.grad.tolist() == [-0.25, 0.0]  # half of sigmoid(0) - 1
