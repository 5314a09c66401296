"""The figures by which PPO is watched, by hand on a made rollout."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from configs.chat import load_chat_format
from rlhf import ppo_figures
from rlhf.rollout import Rollout
from rlhf.samples import Prompt
from rlhf.sequences import Sequences


def test_repeated_share_by_hand():
    # 1 2 1 2 1 2 has the 4-grams 1212 2121 1212: two of three are distinct
    assert ppo_figures.repeated_share([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
    assert ppo_figures.repeated_share([7] * 12) == pytest.approx(8 / 9)  # nine 4-grams, one distinct
    assert ppo_figures.repeated_share([1, 2, 3, 4, 5, 6]) == 0.0
    assert ppo_figures.repeated_share([1, 1, 1]) == 0.0  # too short for a 4-gram
    assert ppo_figures.repeated_share([1, 2, 1, 2], n=2) == pytest.approx(1 / 3)  # 12 21 12


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repeated_share_counts_the_ngrams_seen_before(tokens):
    grams = [tokens[i : i + 4] for i in range(len(tokens) - 3)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert ppo_figures.repeated_share(tokens) == pytest.approx(again / len(grams) if grams else 0.0)


def rollout() -> Rollout:
    tokenizer = tiny_tokenizer()
    words = [tokenizer.encode(text, add_special_tokens=False) for text in ("red cat", "blue dog sleeps", "the house")]
    responses = [words[0] + [2], words[1] * 4, words[2] + [2]]
    prompts = [Prompt([{"role": "user", "content": f"{i}"}], [5, 6], is_safety=i == 2) for i in range(3)]
    sequences = Sequences.build([prompt.ids for prompt in prompts], responses, "cpu")
    mask_BR = sequences.response_mask_BR
    return Rollout(
        prompts, responses, sequences,
        stopped_B=torch.tensor([True, False, True]),
        logprobs_BR=torch.where(mask_BR, -1.0, 0.0),
        reference_logprobs_BR=torch.where(mask_BR, -1.5, 0.0),
        values_BR=torch.where(mask_BR, 1.0, 0.0),
        raw={"helpfulness": torch.tensor([1.0, 2.0, 6.0]), "safety": torch.tensor([4.0, 4.0, 4.0])},
        scores_B=torch.tensor([1.0, 2.0, 4.5]),
        safety_decides_B=torch.tensor([False, False, True]),
        seconds={"sample": 2.0, "reward": 0.5},
    )  # fmt: skip


def gather(count, *columns):
    return torch.stack([column.float() for column in columns], 1)[:count]


def test_rollout_figures_by_hand():
    made = rollout()
    lengths = [len(response) for response in made.responses]
    figures = ppo_figures.rollout_figures(made, 3, gather)
    assert figures["reward/combined"] == pytest.approx(2.5)
    assert figures["reward/combined_std"] == pytest.approx(((1.5**2 + 0.5**2 + 2**2) / 3) ** 0.5)
    assert figures["reward/helpfulness"] == pytest.approx(3.0)
    assert figures["reward/helpfulness_std"] == pytest.approx((14 / 3) ** 0.5)  # 4, 1 and 9 over 3
    assert figures["reward/safety"] == pytest.approx(4.0)
    assert figures["reward/safety_std"] == 0.0
    assert figures["reward/safety_decides"] == pytest.approx(1 / 3)
    by_kind = {"ordinary_reward": 1.5, "safety_reward": 4.5, "ordinary_unsafe": 0.0}  # the third prompt is tagged
    assert {name: figures[f"prompts/{name}"] for name in by_kind} == by_kind
    assert figures["policy/kl"] == pytest.approx(0.5 * sum(lengths) / 3)  # half a nat a token, summed over a response
    assert figures["response/stopped"] == pytest.approx(2 / 3)
    assert figures["response/tokens"] == pytest.approx(sum(lengths) / 3)
    low, high = sorted(lengths)[1:]
    assert figures["response/tokens_p95"] == pytest.approx(low + 0.9 * (high - low))  # 0.95 * 2 lies at 1.9
    n = len(made.responses[1]) // 4  # four times the same n tokens: n distinct 4-grams of 4 n - 3
    assert figures["response/repetition"] == pytest.approx((1 - n / (4 * n - 3)) / 3)
    assert ppo_figures.rollout_figures(made, 2, gather)["reward/combined"] == pytest.approx(1.5)  # the surplus is left


def test_rewards_are_held_against_lengths_within_a_prompt():
    scores, tokens = torch.tensor([1.0, 3.0, 9.0, 5.0]), torch.tensor([10.0, 20.0, 2.0, 6.0])
    # Less their prompt's mean: scores -1 1 2 -2, tokens -5 5 -2 2; (5 + 5 - 4 - 4) / sqrt(10 * 58)
    assert ppo_figures.length_correlation(scores, tokens, 2) == pytest.approx(2 / 580**0.5)
    assert ppo_figures.length_correlation(scores, tokens, 1) == pytest.approx(np.corrcoef(scores, tokens)[0, 1])
    assert ppo_figures.length_correlation(scores, torch.tensor([5.0, 5.0, 8.0, 8.0]), 2) is None
    assert ppo_figures.length_correlation(torch.ones(4), tokens, 1) is None
    made = rollout()
    expected = np.corrcoef([1.0, 2.0, 4.5], [len(response) for response in made.responses])[0, 1]
    figure = "response/length_correlation"
    assert ppo_figures.rollout_figures(made, 3, gather)[figure] == pytest.approx(expected)
    made.scores_B.fill_(1.0)
    assert figure not in ppo_figures.rollout_figures(made, 3, gather)


def test_time_figures_by_hand():
    made = rollout()
    sampled = sum(len(response) for response in made.responses)
    times = ppo_figures.time_figures(made, begin=10.0, collected=13.0, done=15.0, processes=2)
    assert times == {"time/sample": 2.0, "time/reward": 0.5, "time/update": 2.0, "time/iteration": 5.0,
                     "time/tokens_per_second": 2 * (sampled + 6) / 5.0,  # three prompts of two tokens
                     "time/sampled_tokens_per_second": 2 * sampled / 2.0}  # fmt: skip


def test_gold_figures_have_standard_errors(monkeypatch):
    from rlhf.simulation import world

    gold = iter([0.2, 0.8])
    monkeypatch.setattr(world, "gold_helpfulness", lambda messages, text: next(gold))
    monkeypatch.setattr(world, "gold_safety", lambda messages, text: 1.0)
    figures = ppo_figures.gold_figures(rollout(), 3, load_chat_format(tiny_tokenizer()), gather)
    assert figures == {"eval/gold_helpfulness": pytest.approx(0.5), "eval/gold_safety": 1.0, "eval/gold_safety_se": 0.0,
                       "eval/gold_helpfulness_se": pytest.approx(0.3 / 2**0.5)}  # fmt: skip


def test_decoded_samples():
    made = rollout()
    rows = ppo_figures.decoded(made, 2, load_chat_format(tiny_tokenizer()), "held_out")
    assert [row["split"] for row in rows] == ["held_out", "held_out"]
    assert rows[0]["response"] == "red cat"
    assert rows[0]["prompt"] == [{"role": "user", "content": "0"}]
    assert (rows[0]["stopped"], rows[1]["stopped"]) == (True, False)
    assert [row["tokens"] for row in rows] == [len(response) for response in made.responses[:2]]
    assert rows[0]["kl_nats"] == pytest.approx(0.5 * rows[0]["tokens"])
    assert (rows[1]["reward_helpfulness"], rows[1]["reward_safety"], rows[1]["reward_combined"]) == (2.0, 4.0, 2.0)
    assert len(ppo_figures.decoded(made, 9, load_chat_format(tiny_tokenizer()), "training")) == 3
