"""The training loop on tiny Llamas: grouping of pairs, schedule, logs, checkpoints."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
from transformers.trainer_utils import get_last_checkpoint

from configs.errors import UserError
from configs.model_settings import RunSettings
from configs.reward_settings import RewardSettings
from reward.data import EncodedPair
from reward.loss import ranking_loss_sum, safety_loss_sum
from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf.reward_batches import StepCollator, StepSampler
from rlhf.reward_training import RewardTrainer, score_pairs, training_arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("reward_model")
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_labels=1, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(path)
    return path


def make_pairs(count, seed=0):
    rng = np.random.default_rng(seed)

    def ids():
        return rng.integers(1, 32, rng.integers(3, 12)).astype(np.int32)

    labels = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0), (math.nan, math.nan)]
    return [EncodedPair(ids(), ids(), [1.0, 2 / 3, 0.0][i % 3], *labels[i % 4], row={}) for i in range(count)]


def train(folder, tmp_path, pairs, logs=None, **settings):
    run = RunSettings(output_dir=str(tmp_path), use_cpu=True, logging_steps=1)
    options = {"train_sampling_strategy": "sequential", "learning_rate": 1e-2, "min_warmup_steps": 1} | settings
    settings = RewardSettings(train_files=["unused"], **options)
    model = load_reward_model(folder)
    log = (lambda step, values: None) if logs is None else (lambda step, values: logs.append((step, values)))
    trainer = RewardTrainer(model, training_arguments(run, settings), settings, pairs, 0, None, log)
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(f"{tmp_path}/checkpoints") if settings.save_steps else None
    )
    return trainer


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def test_how_a_step_is_cut_up_does_not_change_it(folder, tmp_path):
    # 11 pairs: the second step holds 3. Means per micro-batch would weigh the pairs of a small one more. Gradient norms
    # are compared too, as Adam hides a constant factor.
    def run(batch, accumulation, token_budget):
        logs = []
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        options |= {"token_budget": token_budget, "objective": "safety", "center_rewards_coefficient": 0.1}
        trainer = train(folder, tmp_path, make_pairs(11), logs, **options)
        return weights(trainer.model), [values["optim/grad_norm"] for _, values in logs if "optim/grad_norm" in values]

    whole, whole_norms = run(8, 1, 10_000)
    start = weights(load_reward_model(folder))
    assert (whole - start).abs().max() > 1e-3  # it did train
    assert len(whole_norms) == 2
    for batch, accumulation, token_budget in [(2, 4, 10_000), (8, 1, 60), (8, 1, 1)]:
        parts, parts_norms = run(batch, accumulation, token_budget)
        assert parts_norms == pytest.approx(whole_norms, rel=1e-4)
        torch.testing.assert_close(whole, parts, atol=2e-5, rtol=0)
    other, _ = run(3, 3, 10_000)  # steps of 9 and 2 pairs
    assert (whole - other).abs().max() > 1e-3


def test_logged_loss_is_the_loss_per_pair(folder, tmp_path):
    pairs, logs = make_pairs(6), []
    train(
        folder, tmp_path, pairs, logs, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        objective="safety", safety_loss_weight=0.5,
    )  # fmt: skip
    model = load_reward_model(folder)
    chosen, rejected = (
        score_ids(model, [getattr(pair, name) for pair in pairs]) for name in ("chosen_ids", "rejected_ids")
    )
    ranking = ranking_loss_sum(chosen, rejected, torch.tensor([pair.margin for pair in pairs])) / 6
    labels = [torch.tensor([getattr(pair, name) for pair in pairs]) for name in ("chosen_safe", "rejected_safe")]
    safety = safety_loss_sum(chosen, rejected, *labels) / 6
    step, first = logs[0]
    assert step == 1
    assert first["train/loss"] == pytest.approx((ranking + 0.5 * safety).item(), rel=1e-5)
    assert first["train/ranking_loss"] == pytest.approx(ranking.item(), rel=1e-5)
    assert first["train/safety_loss"] == pytest.approx(safety.item(), rel=1e-5)
    assert first["train/accuracy"] == pytest.approx((chosen > rejected).float().mean().item())
    assert {"optim/learning_rate", "optim/grad_norm"} <= set(first)


def test_margins_change_the_loss(folder, tmp_path):
    logs = []
    pair = make_pairs(1)[0]
    for margin in (0.0, 3.0):
        one = [EncodedPair(pair.chosen_ids, pair.rejected_ids, margin, math.nan, math.nan, {})]
        train(folder, tmp_path, one, logs, max_steps=1)
    gap = score_ids(load_reward_model(folder), [pair.chosen_ids, pair.rejected_ids])
    gap = (gap[0] - gap[1]).item()
    losses = [values["train/loss"] for _, values in logs if "train/ranking_loss" in values]
    assert losses == pytest.approx([math.log1p(math.exp(-gap)), math.log1p(math.exp(3 - gap))], rel=1e-5)


def test_warm_up_has_a_least_number_of_steps_and_the_cosine_ends_at_a_tenth(folder, tmp_path):
    logs = []
    train(folder, tmp_path, make_pairs(20), logs, per_device_train_batch_size=1, learning_rate=1.0, min_warmup_steps=5,
          adam_epsilon=1e6)  # fmt: skip
    rates = [values["optim/learning_rate"] for _, values in logs if "optim/learning_rate" in values]
    assert rates[:6] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])  # 3 % of 20 steps would be a single step
    # last step: 14 of 15 cosine steps done, 0.1 + 0.9 (1 + cos(14/15 pi)) / 2
    assert rates[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(14 / 15 * math.pi)) / 2)


def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(folder, tmp_path):
    options = {
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "group_by_length",
        "save_steps": 4,
        "num_train_epochs": 2,
    }
    undisturbed = train(folder, tmp_path / "a", make_pairs(12), **options)
    # Stopped after step 8, in the middle of the second epoch: the later checkpoint is as if never written.
    train(folder, tmp_path / "b", make_pairs(12), **options)
    last = tmp_path / "b" / "checkpoints" / "checkpoint-12"
    last.rename(tmp_path / "gone")
    resumed = train(folder, tmp_path / "b", make_pairs(12), **options)
    assert undisturbed.state.global_step == resumed.state.global_step == 12
    assert torch.equal(weights(undisturbed.model), weights(resumed.model))


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_pair(folder, tmp_path):
    broken = make_pairs(6)
    broken[4] = EncodedPair(broken[4].chosen_ids, broken[4].rejected_ids, math.nan, 1.0, 0.0, {"source": "mine"})
    with pytest.raises(UserError, match=r"step 2 is not a number, because of training pairs 4 \(mine\) \("):
        train(folder, tmp_path, broken, per_device_train_batch_size=4)
    (line,) = (tmp_path / "not-finite-0.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert (found["pair"], found["loss"], found["row"]) == (4, "nan", {"source": "mine"})
    assert math.isfinite(float(found["r_chosen"]))


def test_weights_that_are_no_numbers_are_not_blamed_on_pairs(folder, tmp_path):
    # A first step so large that the weights overflow; the loss before it was a number.
    with pytest.raises(UserError, match=r"step 2 is not a number, because the weights are not \("):
        train(folder, tmp_path, make_pairs(4), per_device_train_batch_size=2, learning_rate=1e38, min_warmup_steps=0,
              warmup_ratio=0.0)  # fmt: skip
    assert not list(tmp_path.glob("not-finite*"))


def test_a_gradient_that_is_no_number_is_not_stepped(folder, tmp_path, monkeypatch):
    seen = []

    def poison(self, model, batch):
        loss = loss_sum(self, model, batch)
        weight = next(p for p in model.parameters() if p.requires_grad)
        seen.append(weights(model))
        return loss + torch.where(weight[0, 0] == 0, weight[0, 0], weight[0, 0] * 0).sqrt().nan_to_num(0.0)

    loss_sum = RewardTrainer._loss_sum
    monkeypatch.setattr(RewardTrainer, "_loss_sum", poison)
    with pytest.raises(UserError, match="the gradient norm of step 1 is (nan|inf), though its loss is a number"):
        train(folder, tmp_path, make_pairs(2))
    assert torch.equal(seen[0], weights(load_reward_model(folder)))


def test_centring_is_added_per_pair(folder, tmp_path):
    pairs, logs = make_pairs(3), []
    for weight in (0.0, 0.5):
        train(folder, tmp_path, pairs, logs, max_steps=1, center_rewards_coefficient=weight)
    model = load_reward_model(folder)
    chosen, rejected = score_pairs(model, pairs, token_budget=64)
    expected = sum((c + r) ** 2 for c, r in zip(chosen, rejected, strict=True)) / 3
    without, with_it = (values["train/loss"] for _, values in logs if "train/ranking_loss" in values)
    assert with_it - without == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_every_pair_is_in_one_step_and_the_order_follows_the_epoch(strategy):
    lengths = [int(x) for x in np.random.default_rng(0).integers(1, 100, 402)]
    sampler = StepSampler(lengths, 4, strategy, seed=1)
    first = list(sampler)
    assert len(first) == len(sampler) == 101
    assert sorted(map(len, first)) == [2] + [4] * 100
    assert sorted(i for step in first for i in step) == list(range(402))
    assert list(sampler) == first
    sampler.batch_sampler.set_epoch(1)
    second = list(sampler)
    assert (second == first) == (strategy == "sequential")
    assert sorted(i for step in second for i in step) == list(range(402))

    def padded(steps):
        return sum(len(step) * max(lengths[i] for i in step) for step in steps)

    if strategy == "group_by_length":
        assert padded(first) < 0.75 * padded([list(range(402))[i : i + 4] for i in range(0, 402, 4)])


@pytest.mark.parametrize("as_trees", [True, False])
def test_processes_share_a_step_by_tokens(as_trees):
    step = list(enumerate(make_pairs(7, seed=3)))
    given = [StepCollator(0, 60, as_trees, rank, 3)(step) for rank in range(3)]
    rows = [[i for batch in each["micro_batches"] for i in batch["rows"].tolist()] for each in given]
    assert sorted(i for mine in rows for i in mine) == list(range(7))
    assert [len(mine) for mine in rows] == [3, 2, 2]
    assert all(each["pairs"] == 7 for each in given)
    for each in given:
        for batch in each["micro_batches"]:
            assert batch["weight"] == 1.0
            assert batch["input_ids"].numel() <= 60 or len(batch["rows"]) == 1
            assert len(batch["margin"]) == len(batch["rows"])
    # The longest pairs go to different processes.
    longest = sorted(range(7), key=lambda i: -StepCollator(0, 60, as_trees, 0, 3).tokens(step[i][1]))[:3]
    assert [next(r for r in range(3) if i in rows[r]) for i in longest] == [0, 1, 2]


def test_a_process_without_a_pair_takes_part_with_weight_zero():
    (batch,) = StepCollator(0, 60, True, 1, 2)(list(enumerate(make_pairs(1))))["micro_batches"]
    assert (batch["weight"], batch["rows"].tolist()) == (0.0, [0])


def test_pair_scores_come_in_order(folder):
    pairs, model = make_pairs(5), load_reward_model(folder)
    chosen, rejected = score_pairs(model, pairs, token_budget=16)
    assert chosen == pytest.approx(score_ids(model, [pair.chosen_ids for pair in pairs]).tolist(), abs=1e-6)
    assert rejected == pytest.approx(score_ids(model, [pair.rejected_ids for pair in pairs]).tolist(), abs=1e-6)


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import test_reward_training as t

folder, out = map(Path, sys.argv[1:])
logs = []
options = {"per_device_train_batch_size": 4, "objective": "safety", "token_budget": 40}
trainer = t.train(folder, out, t.make_pairs(17), logs, **options)
rank, size = trainer.args.process_index, trainer.args.world_size
scores = t.score_pairs(trainer.accelerator.unwrap_model(trainer.model), t.make_pairs(5), 64, rank, size)
(out / f"{rank}.json").write_text(json.dumps([logs, scores, size]))
"""


@pytest.mark.slow
def test_two_processes_of_four_pairs_equal_one_of_eight(folder, tmp_path):
    # 17 pairs: in the last of the three steps one process has no pair.
    logs = []
    one = train(folder, tmp_path, make_pairs(17), logs, per_device_train_batch_size=8, objective="safety")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    here = Path(__file__).resolve().parent
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(script), str(folder), str(tmp_path)], env=environment, check=True, timeout=120)
    for rank in (0, 1):
        two_logs, scores, size = json.loads((tmp_path / f"{rank}.json").read_text())
        assert size == 2
        assert scores == [pytest.approx(side, abs=1e-4) for side in score_pairs(one.model, make_pairs(5), 64)]
        for (_, found), (_, expected) in zip(two_logs[:3], logs[:3], strict=True):
            for name in ("train/loss", "train/accuracy", "train/safety_loss", "optim/grad_norm"):
                assert found[name] == pytest.approx(expected[name], rel=1e-4)
