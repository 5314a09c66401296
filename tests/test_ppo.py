"""PPO: the objective on a rollout, steps that do not depend on the batch's cut, resumption bit for bit, safety nets."""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import prompt_rows, save_tiny_policy, save_tiny_reward_model, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.ppo_settings import PPOSettings
from reward.collate import budget_for
from rlhf import alarms, sharding
from rlhf import ppo as ppo_script
from rlhf import roles as roles_module
from rlhf import rollout as rollout_module
from rlhf import update as update_module
from rlhf.hardware import FLOAT_ATTENTION
from rlhf.load_roles import load_roles
from rlhf.prompts import prompts_of
from rlhf.rollout import advantages_and_returns, collect, rollout_from
from rlhf.samples import Prompt
from rlhf.scoring import Scoring
from rlhf.sequences import Sequences
from rlhf.update import make_optimizer, update

SMALL = {"batch_size": 16, "mini_batch_size": 8, "max_new_tokens": 6, "token_budget": 200, "value_coef": 1.0,
         "learning_rate": 3e-3, "value_learning_rate": 3e-3}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    ending = AutoModelForCausalLM.from_pretrained(save_tiny_policy(root / "ending", 0))
    with torch.no_grad():
        ending.lm_head.weight[2] *= 8  # of the stop token: about half of the responses end before they are cut off
    ending.save_pretrained(root / "ending")
    return {
        "ending": str(root / "ending"),
        "policy": save_tiny_policy(root / "policy", 0),
        "sft": save_tiny_policy(root / "sft", 1),
        "helpfulness": save_tiny_reward_model(root / "helpfulness", 2),
        "safety": save_tiny_reward_model(root / "safety", 3),
        "prompts": write_rows(root / "prompts.jsonl", prompt_rows(24)),
        "held_out": write_rows(root / "held_out.jsonl", prompt_rows(10, seed=5)),
    }


def settings_for(paths, **extra):
    return PPOSettings(
        helpfulness_model_path=paths["helpfulness"], safety_model_path=paths["safety"], **(SMALL | extra)
    )


def load(paths, settings, **model):
    torch.manual_seed(0)
    return load_roles(settings, ModelSettings(model_name_or_path=paths["policy"], **model), tiny_tokenizer(), "cpu", 0)


def test_models_are_split_in_the_cpus_memory(paths, monkeypatch):
    """No GPU has room for a whole 70B model; `meta` stands for one."""
    split = []

    def shard(model, device, gather):
        split.append(({p.device.type for p in model.parameters()}, device.type, gather))

    monkeypatch.setattr(sharding, "wanted", lambda gather: True)
    monkeypatch.setattr(sharding, "shard", shard)
    settings, model = settings_for(paths, gather_weights=False), ModelSettings(model_name_or_path=paths["policy"])
    load_roles(settings, model, tiny_tokenizer(), "meta", 0)
    assert split == [({"cpu"}, "meta", False)] * 5


def test_frozen_embeddings_train_in_neither_policy_nor_value_model(paths):
    roles = load(paths, settings_for(paths), freeze_embeddings=True)
    for model in (roles.policy.model, roles.value.model):
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name}


def some_prompts(count=16):
    chat_format = load_chat_format(tiny_tokenizer())
    rows = prompt_rows(count)
    return [Prompt(row["prompt"], chat_format.encode_prompt(row["prompt"]), row["is_safety"]) for row in rows]


def roll(roles, settings, count=16):
    return collect(roles, some_prompts(count), settings, load_chat_format(tiny_tokenizer()), 3, range(count), "cpu")


def trained(roles):
    return torch.cat([p.detach().flatten() for own in roles.trained.values() for p in own.values()])


def test_sequences_by_hand():
    sequences = Sequences.build([[5, 6], [9]], [[7, 8, 2], [4]], "cpu")
    assert sequences.ids == [[5, 6, 7, 8, 2], [9, 4]]
    assert sequences.response_mask_BR.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    parts = [([1], torch.tensor([4.0])), ([0], torch.tensor([1.0, 2.0, 3.0]))]
    assert torch.equal(sequences.scatter(parts), x)
    assert sequences.flat(x, [1, 0]).tolist() == [4.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("reference", ["start", "sft"])
@pytest.mark.parametrize("lora", [False, True])
def test_a_rollout_equals_plain_one_by_one_computation(paths, reference, lora):
    settings = settings_for(
        paths, reference_model=reference, sft_model_path=paths["sft"] if reference == "sft" else None
    )
    roles = load(paths, settings, use_peft=lora, lora_r=4)
    with torch.no_grad():  # move the policy away from its start, so that a reference that follows it is caught
        for name, p in roles.policy.trained.items():
            if "lora_B" in name or not lora:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)), alpha=0.1)
    rollout = roll(roles, settings)
    start = AutoModelForCausalLM.from_pretrained(paths["sft" if reference == "sft" else "policy"])
    helpfulness, safety = (
        AutoModelForSequenceClassification.from_pretrained(paths[n]) for n in ("helpfulness", "safety")
    )
    total_kl = 0.0
    for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids = torch.tensor([prompt.ids + response])
        first, length = len(prompt.ids), len(response)
        with torch.no_grad():
            for model, ours in ((roles.policy.model, rollout.logprobs_BR), (start, rollout.reference_logprobs_BR)):
                table = model(ids).logits[0].log_softmax(-1)
                expected = torch.stack([table[first + t - 1, token] for t, token in enumerate(response)])
                torch.testing.assert_close(ours[i, :length], expected, atol=1e-4, rtol=1e-4)
            hidden = helpfulness.model(ids).last_hidden_state[0]
            values = helpfulness.score(hidden)[first - 1 : first + length - 1, 0]
            r_h, r_s = helpfulness.score(hidden)[-1, 0], safety.score(safety.model(ids).last_hidden_state[0])[-1, 0]
        torch.testing.assert_close(rollout.values_BR[i, :length], values, atol=1e-4, rtol=1e-4)
        assert rollout.raw["helpfulness"][i].item() == pytest.approx(r_h.item(), abs=1e-4)
        decides = prompt.is_safety or torch.sigmoid(r_s) < 0.15
        assert rollout.scores_B[i].item() == pytest.approx((r_s if decides else r_h).item(), abs=1e-4)
        assert bool(rollout.safety_decides_B[i]) == bool(decides)
        total_kl += float((rollout.logprobs_BR - rollout.reference_logprobs_BR)[i, :length].sum())
        assert not rollout.logprobs_BR[i, length:].any()
        assert not rollout.kl_BR[i, length:].any()
    assert float(rollout.kl_BR.sum()) == pytest.approx(total_kl, abs=1e-3)
    assert abs(total_kl) > 0.1


def test_recomputed_logprobs_are_the_samplers(paths):
    settings = settings_for(paths, temperature=0.7)
    roles = load(paths, settings)
    sampled, recomputed = roll(roles, settings), roll(roles, replace(settings, recompute_logprobs=True))
    torch.testing.assert_close(sampled.logprobs_BR, recomputed.logprobs_BR, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_continuous_batching_samples_from_the_weights_as_they_are(paths, lora):
    settings = settings_for(paths, sampling_engine="continuous_batching", temperature=0.7)
    roles = load(paths, settings, use_peft=lora, lora_r=4)
    for _ in range(2):
        rollout = roll(roles, settings, 4)
        gap_BR = (rollout.logprobs_BR - rollout.sampler_logprobs_BR).abs()
        assert gap_BR.max() < 1e-4
        assert rollout.sampler_logprobs_BR[rollout.sequences.response_mask_BR].abs().min() > 0
        with torch.no_grad():
            for p in roles.policy.trained.values():
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(7)), alpha=0.3)
    mixed = replace(settings, bf16=True)
    roles = load(paths, mixed)
    with pytest.raises(UserError, match="bf16 on a CPU"):
        roll(roles, mixed, 4)


def test_the_samplers_own_logprobs_need_no_second_pass(paths, monkeypatch):
    settings = settings_for(paths)
    roles = load(paths, settings)
    monkeypatch.setattr(roles, "policy_logprobs", None)
    assert roll(roles, settings).sampler_logprobs_BR is None


def test_values_of_one_trunk_come_out_of_the_pass_that_recomputes_log_probs(paths, monkeypatch):
    settings = settings_for(paths, value_model="trunk", recompute_logprobs=True)
    roles = load(paths, settings)
    with torch.no_grad():  # a head of zeros would hide what it reads
        roles.value.model.score.weight.copy_(torch.randn(roles.value.model.score.weight.shape))
    rollout = roll(roles, settings)
    sequences, rows = rollout.sequences, range(len(rollout.prompts))
    with torch.no_grad():
        alone = [sequences.scatter([(rows, x)]) for x in (
            roles.policy_logprobs(sequences, rows)[0], roles.values(sequences, rows))]  # fmt: skip
    torch.testing.assert_close(rollout.logprobs_BR, alone[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rollout.values_BR, alone[1], atol=1e-5, rtol=1e-5)
    assert rollout.values_BR.std() > 0.01
    monkeypatch.setattr(roles, "values", None)
    monkeypatch.setattr(roles, "policy_logprobs", None)
    assert torch.equal(roll(roles, settings).values_BR, rollout.values_BR)


def one_update(paths, settings, change=lambda rollout: rollout):
    """Roll, change, update; weights before and after, figures, and what went in."""
    roles, accelerator = load(paths, settings), Accelerator(cpu=True)
    rollout = change(roll(roles, settings))
    before = trained(roles)
    advantages, returns = advantages_and_returns(rollout, settings, accelerator)
    optimizer = make_optimizer(roles, settings)
    figures, _ = update(roles, optimizer, rollout, advantages, returns, settings, accelerator, 0)
    return before, trained(roles), figures, rollout, advantages


def rows_of(rollout, rows):
    """A rollout of some of its responses, built anew."""
    pick = {name: getattr(rollout, name)[rows] for name in ("stopped_B", "logprobs_BR", "reference_logprobs_BR",
            "values_BR", "scores_B", "safety_decides_B")}  # fmt: skip
    prompts, responses = ([column[row] for row in rows] for column in (rollout.prompts, rollout.responses))
    sequences = Sequences.build([prompt.ids for prompt in prompts], responses, "cpu")
    width = sequences.response_mask_BR.shape[1]
    pick |= {name: x[:, :width] for name, x in pick.items() if name.endswith("_BR")}
    raw = {name: x[rows] for name, x in rollout.raw.items()}
    return replace(rollout, prompts=prompts, responses=responses, sequences=sequences, raw=raw, **pick)


def stop_every_other(rollout):
    return replace(rollout, stopped_B=torch.arange(len(rollout.prompts)) % 2 == 0)


def test_masked_responses_train_as_if_they_were_not_there(paths):
    """Odd responses count as cut off: the step is that of the even ones alone."""
    plain = settings_for(paths, mini_batch_size=16)
    masked = replace(plain, truncated_responses="mask")
    _, with_mask, figures, *_ = one_update(paths, masked, stop_every_other)
    before, alone, expected, *_ = one_update(paths, plain, lambda rollout: rows_of(rollout, list(range(0, 16, 2))))
    assert (alone - before).abs().max() > 1e-3
    torch.testing.assert_close(with_mask, alone, atol=5e-5, rtol=1e-3)
    assert figures == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_mini_batch_of_cut_off_responses_is_no_step(paths, caplog):
    settings = settings_for(paths, mini_batch_size=1, truncated_responses="mask")
    *_, figures, rollout, _ = one_update(paths, settings, stop_every_other)
    assert (figures["optim/steps"], figures["optim/skipped_steps"]) == (8, 0)
    assert figures["policy/first_ratio_error"] < 1e-4
    assert not caplog.records
    nobody = torch.zeros(16, dtype=torch.bool)
    before, after, figures, *_ = one_update(paths, settings, lambda rollout: replace(rollout, stopped_B=nobody))
    assert torch.equal(before, after)
    assert (figures["optim/steps"], figures["optim/skipped_steps"]) == (0, 0)
    assert all(value == value for value in figures.values())
    assert "raise max_new_tokens" in caplog.text


@pytest.mark.parametrize("cap", [2.0, 0.0])
def test_importance_weights_reach_the_policy_loss(paths, cap):
    def drift(rollout):
        noise = torch.randn(rollout.logprobs_BR.shape, generator=torch.Generator().manual_seed(3))
        return replace(rollout, sampler_logprobs_BR=rollout.logprobs_BR - noise)

    settings = settings_for(paths, mini_batch_size=16, recompute_logprobs=True, importance_cap=cap)
    *_, figures, rollout, advantages_BR = one_update(paths, settings, drift)
    ratio_BR = (rollout.logprobs_BR - rollout.sampler_logprobs_BR).exp()
    weights_BR = torch.minimum(ratio_BR, torch.tensor(cap)) if cap else torch.ones_like(ratio_BR)
    tokens = rollout.sequences.response_mask_BR.sum()  # in the first step pi / pi_old is 1
    expected = float(-(weights_BR * advantages_BR).sum() / tokens)
    assert figures["loss/policy"] == pytest.approx(expected, abs=1e-5)
    assert (abs(expected) > 0.01) == bool(cap)  # unweighted, whitened advantages add up to 0


def test_a_rollout_from_responses_that_exist_is_the_sampled_one(paths):
    settings = settings_for(paths)
    roles = load(paths, settings)
    sampled = roll(roles, settings)
    known = [row[: len(r)].tolist() for row, r in zip(sampled.logprobs_BR, sampled.responses, strict=True)]
    given = (roles, sampled.prompts, sampled.responses, sampled.scores_B, settings, "cpu")
    for logprobs, tolerance in ((known, 0.0), (None, 1e-4)):
        made = rollout_from(*given, logprobs=logprobs)
        torch.testing.assert_close(made.logprobs_BR, sampled.logprobs_BR, atol=tolerance, rtol=0)
        for name in ("reference_logprobs_BR", "values_BR", "scores_B"):
            assert torch.equal(getattr(made, name), getattr(sampled, name))
        assert made.stopped_B.all()
    shifted = rollout_from(*given, logprobs=[[x - 1 for x in row] for row in known])  # an older policy's
    mask_BR = sampled.sequences.response_mask_BR
    torch.testing.assert_close(shifted.logprobs_BR[mask_BR], sampled.logprobs_BR[mask_BR] - 1)
    with pytest.raises(ValueError, match="16 prompts, 16 responses and 3 scores"):
        rollout_from(*given[:3], sampled.scores_B[:3], *given[4:])
    with pytest.raises(ValueError, match="one number for every token"):
        rollout_from(*given, logprobs=[row[:-1] for row in known])
    with pytest.raises(ValueError, match="without tokens"):
        rollout_from(*given[:2], [[], *sampled.responses[1:]], *given[3:])


def test_missing_eos_penalty_hits_cut_responses_only(paths):
    plain, fined = (
        roll(load(paths, s), s) for s in (settings_for(paths), settings_for(paths, missing_eos_penalty=5.0))
    )
    assert plain.responses == fined.responses
    cut = torch.tensor([response[-1] != 2 for response in plain.responses])
    assert cut.any()
    torch.testing.assert_close(plain.scores_B - fined.scores_B, 5.0 * cut.float(), atol=1e-5, rtol=0)


def test_cut_responses_can_be_scored_as_if_they_had_ended(paths):
    plain, ended = (roll(load(paths, s), s) for s in (settings_for(paths), settings_for(paths, end_cut_responses=True)))
    assert plain.responses == ended.responses  # what is trained stays as it was sampled
    cut = [response[-1] != 2 for response in plain.responses]
    assert {True, False} <= set(cut)
    safety = AutoModelForSequenceClassification.from_pretrained(paths["safety"])
    for i, (prompt, response) in enumerate(zip(plain.prompts, plain.responses, strict=True)):
        with torch.no_grad():
            hidden = safety.model(torch.tensor([[*prompt.ids, *response, *([2] if cut[i] else [])]])).last_hidden_state
            expected = safety.score(hidden[0, -1]).item()
        assert ended.raw["safety"][i].item() == pytest.approx(expected, abs=1e-4)
        assert (abs(plain.raw["safety"][i].item() - expected) > 1e-3) == cut[i]


def test_rewards_are_whitened_scores_minus_kl(paths):
    settings = settings_for(paths, kl_coef=0.3, gae_lambda=1.0, whiten_advantages=False)
    rollout = roll(load(paths, settings), settings)
    _, returns_BR = advantages_and_returns(rollout, settings, Accelerator(cpu=True))
    # with gamma = lambda = 1 the return of the first token is the sum of all rewards: score - beta * KL
    scores = rollout.scores_B.double()
    white = (scores - scores.mean()) / scores.std(unbiased=False)
    torch.testing.assert_close(returns_BR[:, 0].double(), white - 0.3 * rollout.kl_BR.sum(1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_micro_batches_do_not_change_the_step_and_the_first_ratio_is_one(paths, lora):
    results = []
    for budget in (10_000, 60):
        settings = settings_for(paths, token_budget=budget)
        roles = load(paths, settings, use_peft=lora, lora_r=4)
        rollout = roll(roles, settings)
        before = trained(roles)
        advantages, returns = advantages_and_returns(rollout, settings, Accelerator(cpu=True))
        figures, skipped = update(
            roles, make_optimizer(roles, settings), rollout, advantages, returns, settings, Accelerator(cpu=True), 0
        )
        assert figures["policy/first_ratio_error"] < 1e-4
        assert figures["optim/steps"] == 2
        assert skipped == 0
        results.append((trained(roles) - before, figures))
    (one, figures_one), (many, figures_many) = results
    assert one.abs().max() > 1e-3
    # Adam divides by |g| + 1e-5, so rounding in a tiny gradient grows; the learning rate is 3e-3
    torch.testing.assert_close(one, many, atol=5e-5, rtol=1e-3)
    for name in ("loss/policy", "loss/value", "policy/entropy", "optim/policy_norm", "optim/value_norm"):
        assert figures_one[name] == pytest.approx(figures_many[name], rel=1e-4, abs=1e-6)


def test_steps_that_are_not_finite_are_skipped_and_three_stop(paths, monkeypatch):
    settings = settings_for(paths, mini_batch_size=4)
    roles = load(paths, settings)
    rollout = roll(roles, settings)
    accelerator = Accelerator(cpu=True)
    advantages, returns = advantages_and_returns(rollout, settings, accelerator)
    real, calls = update_module.policy_loss_sum, []

    def broken(limit):
        def loss(*args):
            calls.append(1)
            value, stats = real(*args)
            return value * (float("nan") if len(calls) in limit else 1.0), stats

        return loss

    monkeypatch.setattr(update_module, "policy_loss_sum", broken({2}))
    settings = replace(settings, token_budget=10_000)
    optimizer = make_optimizer(roles, settings)
    figures, skipped = update(roles, optimizer, rollout, advantages, returns, settings, accelerator, 0)
    assert (figures["optim/steps"], figures["optim/skipped_steps"], skipped) == (3, 1, 0)
    assert torch.isfinite(trained(roles)).all()
    calls.clear()
    monkeypatch.setattr(update_module, "policy_loss_sum", broken({1, 2, 3}))
    before = trained(roles)
    with pytest.raises(UserError, match="3 gradient steps in a row"):
        update(roles, optimizer, rollout, advantages, returns, settings, accelerator, 0)
    assert torch.equal(trained(roles), before)


def test_a_run_stopped_by_such_steps_goes_on_from_its_last_good_weights(paths, tmp_path, monkeypatch):
    real = update_module.policy_loss_sum
    seen = []

    def broken(*args):
        seen.append(1)
        value, stats = real(*args)
        return value * (float("nan") if len(seen) > 1 else 1.0), stats

    with monkeypatch.context() as patch:
        patch.setattr(update_module, "policy_loss_sum", broken)
        with pytest.raises(UserError, match="lower learning_rate .* start again to go on"):
            run_ppo(paths, tmp_path, "--token_budget", "10000", "--save_steps", "0", "--mini_batch_size", "4")
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    weights = load_file(tmp_path / "checkpoint-1" / "policy.safetensors")
    start = AutoModelForCausalLM.from_pretrained(paths["policy"]).state_dict()
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert any((w - start[name]).abs().max() > 1e-4 for name, w in weights.items())  # the step before them counts
    again = ("--token_budget", "10000", "--save_steps", "0", "--mini_batch_size", "4", "--learning_rate", "1e-4")
    summary = run_ppo(paths, tmp_path, *again, total=2)
    assert summary["iterations"] == 2
    assert summary["optim/steps"] == 4


def test_a_checkpoint_of_another_run_is_not_continued_in_silence(paths, tmp_path):
    run_ppo(paths, tmp_path, total=2)
    with pytest.raises(UserError, match="a run with another kl_coef. .* --resume false"):
        run_ppo(paths, tmp_path, "--kl_coef", "0.5", total=4)
    assert run_ppo(paths, tmp_path, total=4)["iterations"] == 4
    assert [row["step"] for row in metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert run_ppo(paths, tmp_path, "--kl_coef", "0.5", "--resume", "false", total=1)["iterations"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "LoRA", "adaptive KL, masks, judges", "centered by prompt"])
def test_a_run_killed_again_and_again_is_the_undisturbed_one(paths, tmp_path, kind):
    """SIGKILL at random moments of any phase, the same command each time."""
    judges = ("--judge_helpfulness_model_path", paths["safety"], "--judge_safety_model_path", paths["helpfulness"])
    extra = {"full": (), "LoRA": ("--use_peft", "true", "--lora_r", "4"),
             "adaptive KL, masks, judges": (*ADAPTIVE, *judges),
             "centered by prompt": ("--center_scores", "prompt", "--responses_per_prompt", "2",
                                    "--value_model", "trunk")}[kind]  # fmt: skip
    paths = of_objective(paths, ADAPTIVE if "adaptive" in kind else ())
    extra = ("--save_best", "true", "--save_steps", "1", *extra)
    run_ppo(paths, tmp_path / "straight", *extra, total=8)
    here = Path(__file__).resolve().parent
    code = f"from test_ppo import run_ppo\nrun_ppo({paths!r}, {str(tmp_path / 'killed')!r}, *{extra!r}, total=8)\n"
    found = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    found = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums in one order
    moments = random.Random(kind)
    settings_file = tmp_path / "killed" / "settings.yaml"
    starts = 0
    while True:
        launched = time.time()
        process = subprocess.Popen([sys.executable, "-c", code], env=found)
        starts += 1
        while process.poll() is None and not (
            settings_file.exists() and settings_file.stat().st_mtime > launched
        ):  # imports, before which nothing happens
            time.sleep(0.02)
        try:
            process.wait(timeout=None if starts > 6 else moments.uniform(0.1, 2.0))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert starts > 1
    assert_same_run(tmp_path / "straight", tmp_path / "killed", last=8)


def assert_same_run(straight, killed, last):
    """To the bit: figures, samples, weights, and all that the checkpoint of iteration `last` holds but times."""
    assert metrics(straight) == metrics(killed)
    assert torch.equal(final_weights(straight), final_weights(killed))
    assert (straight / "samples.jsonl").read_text() == (killed / "samples.jsonl").read_text()
    one, other = (folder / f"checkpoint-{last}" for folder in (straight, killed))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for path in one.glob("*.safetensors"):  # policy, value model, moments of the optimizer
        ours, theirs = load_file(path), load_file(other / path.name)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    states = [json.loads((folder / "state.json").read_text()) for folder in (one, other)]
    for state in states:
        timed = [key for key in state["figures"] if key.startswith(("time", "memory"))]
        assert timed
        for key in timed:
            del state["figures"][key]
    assert states[0] == states[1]  # beta, units, zeros, the judge's start, alarms


def test_prompts_pass_through_all_before_any_comes_again():
    prompts = some_prompts(10)
    seen = [id(p) for step in range(5) for p in prompts_of(step, prompts, 4, seed=1)]
    assert all(len(set(seen[i : i + 10])) == 10 for i in (0, 10))
    assert seen[:10] != seen[10:]
    assert seen[4:8] == [id(p) for p in prompts_of(1, prompts, 4, seed=1)]


def run_ppo(paths, output, *extra, total=4):
    return ppo_script.main(
        ["--model_name_or_path", paths["policy"], "--helpfulness_model_path", paths["helpfulness"],
         "--safety_model_path", paths["safety"], "--prompt_files", paths["prompts"],
         "--eval_prompt_file", paths["held_out"], "--output_dir", str(output), "--use_cpu", "true",
         "--logging_steps", "1", "--total_iterations", str(total), "--eval_steps", "2", "--save_steps", "2",
         *[word for name, value in SMALL.items() for word in (f"--{name}", str(value))], *extra]
    )  # fmt: skip


def final_weights(output):
    model = AutoModelForCausalLM.from_pretrained(f"{output}/model")
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def metrics(output):
    lines = [json.loads(line) for line in Path(output, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "memory"))} for line in lines]


def test_main_writes_the_run_folder(paths, tmp_path):
    summary = run_ppo(paths, tmp_path, total=2)
    rows = metrics(tmp_path)
    wanted = {"reward/combined", "reward/helpfulness", "reward/safety", "reward/safety_decides", "policy/kl",
              "policy/entropy", "policy/clip_fraction", "value/explained_variance", "response/tokens",
              "response/stopped", "policy/first_ratio_error", "reward/helpfulness_std", "response/tokens_p95",
              "response/repetition"}  # fmt: skip
    assert wanted <= rows[1].keys()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["eval/kl"] == pytest.approx(0.0, abs=1e-3)
    assert rows[0]["eval/objective"] == pytest.approx(0, abs=1e-3)
    samples = [json.loads(line) for line in Path(tmp_path, "samples.jsonl").read_text().splitlines()]
    assert {"response", "reward_helpfulness", "reward_safety", "kl_nats"} <= samples[0].keys()
    held_out = [row for row in samples if row["split"] == "held_out"]
    assert [row["step"] for row in held_out] == [0] * 4 + [2] * 4
    assert [row["prompt"] for row in held_out[:4]] == [row["prompt"] for row in held_out[4:]]
    assert [row["step"] for row in samples if row["split"] == "training"] == [1] * 4 + [2] * 4
    raw = [json.loads(line) for line in Path(tmp_path, "metrics.jsonl").read_text().splitlines()]
    assert "time/evaluation" in raw[0]
    phases = {"time/sample", "time/reward", "time/recompute", "time/reference", "time/value", "time/update",
              "time/sampled_tokens_per_second", "memory/peak_mib"}  # fmt: skip
    assert phases <= raw[1].keys()
    assert summary["alarms"] == []
    assert summary["iterations"] == 2
    assert summary["stopped_by"] == "total_iterations"
    assert run_ppo(paths, tmp_path, total=2) == summary  # complete: not run again


def test_no_evaluation_between_the_first_and_the_last(paths, tmp_path):
    run_ppo(paths, tmp_path, "--eval_steps", "0", total=3)
    assert [row["step"] for row in metrics(tmp_path) if "eval/objective" in row] == [0, 3]


ADAPTIVE = ("--kl_controller", "adaptive", "--kl_target", "0.001", "--kl_horizon", "16",
            "--truncated_responses", "mask", "--recompute_logprobs", "true")  # fmt: skip


@pytest.mark.parametrize("extra", [(), ("--use_peft", "true", "--lora_r", "4"), ADAPTIVE])
def test_a_killed_run_continues_bit_for_bit(paths, tmp_path, monkeypatch, extra):
    paths = of_objective(paths, extra)
    monkeypatch.setattr(alarms, "KL_NEGATIVE", 10.0)  # raised at iteration 1, and not again after the resumption
    run_ppo(paths, tmp_path / "straight", *extra)
    real = ppo_script.Run.iterate

    def killed(self, step):
        if step == 3:  # the checkpoint is of iteration 2: iteration 3 is run, lost and run again
            raise KeyboardInterrupt
        return real(self, step)

    monkeypatch.setattr(ppo_script.Run, "iterate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_ppo(paths, tmp_path / "killed", *extra)
    monkeypatch.setattr(ppo_script.Run, "iterate", real)
    run_ppo(paths, tmp_path / "killed", *extra)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "killed")
    for name in ("alarms.jsonl", "samples.jsonl"):
        assert Path(tmp_path, "straight", name).read_text() == Path(tmp_path, "killed", name).read_text()
    raised = [json.loads(line) for line in Path(tmp_path, "killed", "alarms.jsonl").read_text().splitlines()]
    assert [(row["step"], row["alarm"]) for row in raised] == [(1, "kl_negative")]
    assert torch.equal(final_weights(tmp_path / "straight"), final_weights(tmp_path / "killed"))
    assert [p.name for p in (tmp_path / "killed").glob("checkpoint-*")] == ["checkpoint-4"]
    check_kl_coef(metrics(tmp_path / "killed"), extra == ADAPTIVE)


def of_objective(paths, extra):
    """Where cut-off responses are masked, some must not be cut off; in lockstep, lengths must differ."""
    return paths | {"policy": paths["ending"]} if extra == ADAPTIVE or extra[-4:] == IN_PARTS else paths


def check_kl_coef(rows, adaptive):
    """beta of every iteration by the rule of Ziegler et al. from the one before: 16 responses, a horizon of 16."""
    expected = 0.01
    for row in rows[1:]:
        assert row["optim/policy_norm"] > 0
        assert (0.2 < row["response/stopped"] < 0.8) == adaptive
        assert row["policy/kl_coef"] == pytest.approx(expected)
        assert ("sampler/logprob_gap" in row) == adaptive  # where old log-probs are recomputed
        expected *= 1 + min(max(row["policy/kl"] / 0.001 - 1, -0.2), 0.2) if adaptive else 1
    assert (expected != 0.01) == adaptive


def test_the_held_out_objective_has_the_beta_of_the_settings(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(ppo_script, "next_kl_coef", lambda *_: 1e6)  # far from the 0.01 of the settings
    run_ppo(of_objective(paths, ADAPTIVE), tmp_path, *ADAPTIVE, "--learning_rate", "0.01")
    state = json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())
    assert state["kl_coef"] == 1e6
    mean, deviation = state["unit"]
    last = metrics(tmp_path)[-1]
    assert last["eval/kl"] > 1e-3
    assert last["eval/objective"] == pytest.approx((last["eval/combined"] - mean) / deviation - 0.01 * last["eval/kl"])


def test_the_kl_cap_stops_and_the_best_held_out_policy_is_kept(paths, tmp_path, monkeypatch):
    scores = iter([0.0, 2.0, 1.0])  # at steps 0, 2 and 4: the policy of step 2 is the best
    real_evaluate, real_sample = ppo_script.Run.evaluate, ppo_script.Run.sample
    kept = {}

    def sample(self, prompts, seed, k=1, with_values=True):
        rollout = real_sample(self, prompts, seed, k, with_values)
        if with_values:
            return rollout
        spread = torch.linspace(-1, 1, len(rollout.scores_B))
        return replace(rollout, scores_B=next(scores) + spread)

    def evaluate(self, step):
        kept[step] = torch.cat([p.detach().flatten() for p in self.roles.policy.model.parameters()])
        return real_evaluate(self, step)

    monkeypatch.setattr(ppo_script.Run, "sample", sample)
    monkeypatch.setattr(ppo_script.Run, "evaluate", evaluate)
    summary = run_ppo(paths, tmp_path, "--save_best", "true", "--kl_coef", "0")
    assert summary["best"]["step"] == 2
    assert torch.equal(final_weights(tmp_path), kept[2])
    assert [path.name for path in tmp_path.glob("best-*")] == ["best-2"]

    scores = iter([1.0])  # at step 6: a run that goes on from its end still has the best of before
    summary = run_ppo(paths, tmp_path, "--save_best", "true", "--kl_coef", "0", total=6)
    assert (summary["iterations"], summary["best"]["step"]) == (6, 2)
    assert torch.equal(final_weights(tmp_path), kept[2])

    scores = iter([0.0, 1.0])
    run_ppo(paths, tmp_path / "no checkpoint", "--save_best", "true", "--save_steps", "0", total=1)
    assert not list((tmp_path / "no checkpoint").glob("best-*"))

    scores = iter([0.0] * 9)
    summary = run_ppo(paths, tmp_path / "capped", "--max_kl_nats", "0.000001", "--learning_rate", "0.01", total=40)
    assert summary["stopped_by"] == "max_kl_nats"
    assert summary["iterations"] < 40


def test_no_policy_beyond_the_kl_cap_is_kept(paths, tmp_path, monkeypatch):
    scores = iter([0.0, 2.0])  # the policy that passed the cap has the better score
    real = ppo_script.Run.sample

    def sample(self, prompts, seed, k=1, with_values=True):
        rollout = real(self, prompts, seed, k, with_values)
        if with_values:
            return rollout
        return replace(rollout, scores_B=next(scores) + torch.linspace(-1, 1, len(rollout.scores_B)))

    monkeypatch.setattr(ppo_script.Run, "sample", sample)
    extra = ("--save_best", "true", "--kl_coef", "0", "--max_kl_nats", "0.000001", "--learning_rate", "0.01")
    summary = run_ppo(paths, tmp_path, *extra, "--eval_steps", "0", total=20)
    last = metrics(tmp_path)[-1]
    assert (summary["stopped_by"], last["eval/combined"]) == ("max_kl_nats", pytest.approx(2.0))
    assert last["eval/kl"] > 0.000001
    assert summary["best"]["step"] == 0
    start = AutoModelForCausalLM.from_pretrained(paths["policy"])
    assert torch.equal(final_weights(tmp_path), torch.cat([p.detach().flatten() for p in start.parameters()]))


def test_a_policy_within_the_cap_takes_the_place_of_one_beyond(paths, tmp_path, monkeypatch):
    """As where the start is already far from the SFT model: steps 0, 2, 4 at 5, 1, 9 nats, the cap between."""
    scores, kls = iter([2.0, 1.0, 4.0]), iter([5.0, 1.0, 9.0])
    real = ppo_script.rollout_figures

    def rollout_figures(rollout, count, gather):
        if count == SMALL["batch_size"]:
            return real(rollout, count, gather)
        rollout = replace(rollout, scores_B=next(scores) + torch.linspace(-1, 1, len(rollout.scores_B)))
        return real(rollout, count, gather) | {"policy/kl": next(kls)}

    monkeypatch.setattr(ppo_script, "rollout_figures", rollout_figures)
    summary = run_ppo(paths, tmp_path, "--save_best", "true", "--kl_coef", "0", "--max_kl_nats", "3")
    assert (summary["iterations"], summary["best"]["step"]) == (4, 2)


def test_alarms_are_said_and_kept(paths, tmp_path, caplog):
    summary = run_ppo(paths, tmp_path, "--max_kl_nats", "0.000001", "--learning_rate", "0.01", total=20)
    (alarm,) = [alarm for alarm in summary["alarms"] if alarm["alarm"] == "kl_high"]
    assert alarm["step"] == summary["iterations"]
    assert alarm["cleared"] is None
    assert f"ppo, iteration {alarm['step']}, kl_high: {alarm['text']}" in caplog.text
    again = run_ppo(paths, tmp_path, "--max_kl_nats", "0.000001", "--learning_rate", "0.01", total=20)
    assert again == summary
    run_ppo(paths, tmp_path, "--resume", "false", total=1)  # another run in the same folder starts without
    assert Path(tmp_path, "alarms.jsonl").read_text() == ""


def test_gold_is_logged_by_kind_of_prompt_and_chooses_nothing(paths, tmp_path, monkeypatch):
    from rlhf.simulation import world

    # 10 held-out prompts, of which "0 ...", "4 ..." and "8 ..." are safety prompts; gold = a function of the prompt
    monkeypatch.setattr(world, "gold_helpfulness", lambda messages, text: int(messages[-1]["content"].split()[0]) / 10)
    monkeypatch.setattr(world, "gold_safety", lambda messages, text: 1.0 if messages[-1]["content"][0] == "8" else 0.0)
    run_ppo(paths, tmp_path / "gold", "--gold", "simulated", total=2)
    run_ppo(paths, tmp_path / "none", total=2)
    gold, none = metrics(tmp_path / "gold"), metrics(tmp_path / "none")
    for step in (0, 2):
        assert gold[step].pop("eval/gold_helpfulness") == pytest.approx((1 + 2 + 3 + 5 + 6 + 7 + 9) / 70)
        assert gold[step].pop("eval/gold_safety") == pytest.approx(1 / 3)
        assert gold[step].pop("eval/gold_safety_se") == pytest.approx((1 / 3 * 2 / 3 / 3) ** 0.5)
        assert gold[step].pop("eval/gold_helpfulness_se") > 0
    assert gold == none  # everything else, the objective included, is what it was


class Killed(BaseException):
    pass


@pytest.mark.parametrize("save_steps", [2, 0])
@pytest.mark.parametrize("moment", ["before the model", "within the model", "before the summary"])
def test_a_run_killed_while_it_hands_over_the_best_policy_finishes(paths, tmp_path, monkeypatch, moment, save_steps):
    extra = ("--save_best", "true", "--max_kl_nats", "0.000001", "--save_steps", str(save_steps))
    straight = run_ppo(paths, tmp_path / "straight", *extra)
    assert straight["stopped_by"] == "max_kl_nats"

    real = ppo_script.replace_folder

    def replace_folder(partial, final):
        if final.name == "model":
            if moment == "within the model":  # the worst place: the old folder is gone, the new one not yet there
                shutil.rmtree(final, ignore_errors=True)
            raise Killed
        real(partial, final)

    def killed(self, *_):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before the summary":
            patch.setattr(ppo_script.RunFolder, "finish", killed)
        else:
            patch.setattr(ppo_script, "replace_folder", replace_folder)
        with pytest.raises(Killed):
            run_ppo(paths, tmp_path / "killed", *extra)
    again = run_ppo(paths, tmp_path / "killed", *extra)
    kept = {name for name in straight if not name.startswith(("time", "memory", "seconds"))}
    assert {name: again[name] for name in kept} == {name: straight[name] for name in kept}
    assert torch.equal(final_weights(tmp_path / "straight"), final_weights(tmp_path / "killed"))
    left = [path.name for path in (tmp_path / "killed").glob("best-*")]
    assert left == [path.name for path in (tmp_path / "straight").glob("best-*")]


def test_a_score_that_is_no_number_does_not_spoil_the_scale_of_values(paths, tmp_path, monkeypatch):
    real = ppo_script.Run.sample

    def sample(self, prompts, seed, k=1, with_values=True):
        rollout = real(self, prompts, seed, k, with_values)
        if with_values and self.state["step"] == 0:
            rollout.scores_B[0] = float("nan")
        return rollout

    monkeypatch.setattr(ppo_script.Run, "sample", sample)
    run_ppo(paths, tmp_path, total=2)
    steps = [(row["optim/steps"], row["optim/skipped_steps"]) for row in metrics(tmp_path)[1:]]
    assert steps == [(0, 2), (2, 0)]
    unit = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())["value_unit"]
    assert all(map(math.isfinite, unit))


def test_centered_scores_do_not_depend_on_a_reward_models_zero(paths, tmp_path, monkeypatch):
    """A constant on every score of one model must change no step; without `center_scores` it tells prompts' kinds."""
    real = roles_module.Roles.scores

    def shifted(self, name, *args):
        return real(self, name, *args) + (3.0 if name == "helpfulness" else 0.0)

    def weights(folder, *extra):
        run_ppo(paths, tmp_path / folder, "--value_model", "policy", *extra, total=2)
        return final_weights(tmp_path / folder)

    centered, plain = weights("centered", "--center_scores", "model"), weights("plain")
    state = json.loads((tmp_path / "centered" / "checkpoint-2" / "state.json").read_text())
    first = metrics(tmp_path / "centered")[1]  # row 0 is the held-out evaluation
    means = [first["reward/helpfulness"], first["reward/safety"]]
    assert state["zeros"] == pytest.approx(means, abs=1e-5)
    monkeypatch.setattr(roles_module.Roles, "scores", shifted)
    assert torch.allclose(weights("centered_shifted", "--center_scores", "model"), centered, atol=1e-6)
    assert not torch.allclose(weights("plain_shifted"), plain, atol=1e-3)


def test_scores_centered_by_prompt_do_not_depend_on_a_prompts_zero(paths, tmp_path, monkeypatch):
    real = roles_module.Roles.scores

    def shifted(self, name, dialogues, *args):
        """A constant for each prompt: those of a pair of neighbours, the same for both."""
        scores = real(self, name, dialogues, *args)
        return scores + torch.arange(len(scores)).div(2, rounding_mode="floor") * 2.0

    def weights(folder, *extra):
        run_ppo(paths, tmp_path / folder, "--value_model", "trunk", "--responses_per_prompt", "2",
                "--safety_threshold", "0.0001", *extra, total=2)  # fmt: skip
        return final_weights(tmp_path / folder)

    centered, plain = weights("centered", "--center_scores", "prompt"), weights("plain")
    monkeypatch.setattr(roles_module.Roles, "scores", shifted)
    assert torch.allclose(weights("centered_shifted", "--center_scores", "prompt"), centered, atol=1e-6)
    assert not torch.allclose(weights("plain_shifted"), plain, atol=1e-3)


def test_scores_of_a_function_alone_are_centered_by_prompt(paths, tmp_path):
    """A reward of one's own with the baseline of RLOO."""
    alone = paths | {"helpfulness": "", "safety": ""}
    extra = ("--reward_functions", "docs.examples.short_answers:brevity", "--value_model", "policy",
             "--responses_per_prompt", "2")  # fmt: skip
    run_ppo(alone, tmp_path / "run", *extra, "--center_scores", "prompt", total=1)
    row = metrics(tmp_path / "run")[1]
    assert row["reward/combined"] == row["reward/brevity"] < 0
    run_ppo(alone, tmp_path / "plain", *extra, total=1)
    assert not torch.equal(final_weights(tmp_path / "run"), final_weights(tmp_path / "plain"))
    with pytest.raises(UserError, match="center_scores: model is for two reward models, not for reward_functions"):
        run_ppo(alone, tmp_path / "model", *extra, "--center_scores", "model", total=1)


def test_a_run_without_tagged_prompts_says_so(paths, tmp_path, caplog):
    rows = [row | {"is_safety": False} for row in prompt_rows(24)]
    run_ppo(paths | {"prompts": write_rows(tmp_path / "plain.jsonl", rows)}, tmp_path / "plain", total=1)
    assert "no prompt has is_safety: true, so the safety model decides only where R_s < 0.15" in caplog.text
    caplog.clear()
    run_ppo(paths, tmp_path / "tagged", total=1)
    assert "is_safety" not in caplog.text


def test_centered_values_start_from_the_helpfulness_models_own_zero(paths, tmp_path):
    """The value model's head reads raw helpfulness scores: their mean must become 0 on the whitened, centered scale."""
    run_ppo(paths, tmp_path, "--center_scores", "model", "--save_steps", "1", total=1)
    state = json.loads((tmp_path / "checkpoint-1" / "state.json").read_text())
    shift, scale = state["value_unit"]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    centered_mean = row["reward/combined"] - (
        row["reward/safety_decides"] * state["zeros"][1] + (1 - row["reward/safety_decides"]) * state["zeros"][0]
    )
    assert shift == pytest.approx(state["zeros"][0] + centered_mean, abs=1e-5)
    assert scale > 0


def test_bf16_rounds_hidden_states_and_little_else(paths, monkeypatch):
    settings = settings_for(paths)
    plain, mixed = load(paths, settings), load(paths, replace(settings, bf16=True))
    assert mixed.policy.model.config._attn_implementation == FLOAT_ATTENTION
    real, autocast = rollout_module.sample_live, []

    def watched(*args):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return real(*args)

    monkeypatch.setattr(rollout_module, "sample_live", watched)
    one, two = roll(plain, settings), roll(mixed, replace(settings, bf16=True))
    assert autocast == [False, True]
    same = rollout_from(mixed, one.prompts, one.responses, one.scores_B, replace(settings, bf16=True), "cpu")
    pairs = [
        (getattr(one, name), getattr(same, name)) for name in ("logprobs_BR", "reference_logprobs_BR", "values_BR")
    ]
    dialogues = [prompt.ids + response for prompt, response in zip(one.prompts, one.responses, strict=True)]
    pairs += [(raw_B, mixed.scores(name, dialogues, 768)) for name, raw_B in one.raw.items()]
    pairs += [(two.sampler_logprobs_BR, two.logprobs_BR)]  # sampling, too
    for a, b in pairs:
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.05  # bfloat16 keeps 8 bits: 2**-8 of numbers of order one, a few times over
    advantages, returns = advantages_and_returns(two, settings, Accelerator(cpu=True))
    figures, _ = update(
        mixed, make_optimizer(mixed, settings), two, advantages, returns, settings, Accelerator(cpu=True), 0
    )
    assert figures["policy/first_ratio_error"] < 5e-3
    assert all(p.dtype == torch.float32 for p in mixed.policy.model.parameters())


FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}  # what accelerate's launcher passes on of its file
ZERO3 = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
         "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "DS_ACCELERATOR": "cpu"}  # fmt: skip
NO_BUILD = "import deepspeed.ops\ndeepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"  # takes minutes
with_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
LORA = ("--use_peft", "true", "--lora_r", "4", "--gradient_checkpointing", "true")
# A few rows at a time, so that responses of different lengths make for different numbers of forwards.
IN_PARTS = ("--sampling_token_budget", "64", "--gather_weights", "false")


def start_two(paths, script, output, *extra, environment, total):
    here = Path(__file__).resolve().parent
    before = NO_BUILD if environment is ZERO3 else ""
    script.write_text(
        f"{before}from test_ppo import run_ppo\nrun_ppo({paths!r}, {str(output)!r}, *{extra!r}, total={total})\n"
    )
    # `accelerate launch --cpu --num_processes 2` starts one process where there is no MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = os.pathsep.join([str(here.parent), str(here), os.environ.get("PYTHONPATH", "")])
    found = {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([*launch, str(script)], env=found)


def run_on_two(*args, **kwargs):
    assert start_two(*args, **kwargs).wait(timeout=180) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "extra"),
    [
        ({}, ()),
        ({}, ADAPTIVE),
        (FSDP2, ()),
        (FSDP2, LORA),
        pytest.param(ZERO3, (), marks=with_deepspeed),
        pytest.param(ZERO3, LORA, marks=with_deepspeed),
        (FSDP2, IN_PARTS),
        (FSDP2, LORA + IN_PARTS),
        pytest.param(ZERO3, IN_PARTS, marks=with_deepspeed),
        pytest.param(ZERO3, LORA + IN_PARTS, marks=with_deepspeed),
    ],
    ids=["copies", "masked copies", "sharded", "sharded LoRA", "ZeRO-3", "ZeRO-3 LoRA", "in parts", "in parts LoRA",
         "ZeRO-3 in parts", "ZeRO-3 in parts LoRA"],
)  # fmt: skip
def test_two_processes_reach_what_one_does(paths, tmp_path, environment, extra):
    """Uneven shares included: 9 held-out prompts. Adam's epsilon keeps rounding in tiny gradients from growing."""
    paths = of_objective(paths, extra)
    extra = ("--eval_prompts", "9", "--adam_epsilon", "0.01", "--gold", "simulated", "--save_steps", "1", *extra)
    run_ppo(paths, tmp_path / "one", *(extra[:-2] if extra[-4:] == IN_PARTS else extra), total=2)
    run_on_two(paths, tmp_path / "two.py", tmp_path / "two", *extra, environment=environment, total=1)
    run_on_two(paths, tmp_path / "two.py", tmp_path / "two", *extra, environment=environment, total=2)  # goes on
    world = json.loads((tmp_path / "two" / "environment.json").read_text())["world_size"]
    assert world == 2
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        # the run that ended after one step evaluated there; counts of clipped tokens may turn on the last digit
        shared = {k for k in one.keys() & two.keys() if "clip_fraction" not in k}
        assert {k: two[k] for k in shared} == {k: pytest.approx(one[k], abs=1e-5, rel=2e-5) for k in shared}
    start = AutoModelForCausalLM.from_pretrained(paths["policy"])
    moved = final_weights(tmp_path / "one") - torch.cat([p.detach().flatten() for p in start.parameters()])
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(final_weights(tmp_path / "two"), final_weights(tmp_path / "one"), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{}, FSDP2], ids=["copies", "sharded"])
def test_two_processes_of_which_one_is_killed_again_and_again_are_the_undisturbed_run(paths, tmp_path, environment):
    """SIGKILL of either at random moments of any phase: the launcher ends the other, the same command goes on."""
    extra = ("--save_steps", "1", "--save_best", "true")
    run_on_two(paths, tmp_path / "straight.py", tmp_path / "straight", *extra, environment=environment, total=6)
    moments = random.Random(7)
    settings_file = tmp_path / "killed" / "settings.yaml"
    kills = 0
    while True:
        launched = time.time()
        launcher = start_two(
            paths, tmp_path / "killed.py", tmp_path / "killed", *extra, environment=environment, total=6
        )
        while launcher.poll() is None and not (settings_file.exists() and settings_file.stat().st_mtime > launched):
            time.sleep(0.02)
        try:
            assert launcher.wait(timeout=120 if kills >= 5 else moments.uniform(0.1, 2.0)) == 0
            break
        except subprocess.TimeoutExpired:
            moments.choice(psutil.Process(launcher.pid).children()).kill()
            assert launcher.wait(timeout=60) != 0
            kills += 1
    assert kills >= 1
    assert_same_run(tmp_path / "straight", tmp_path / "killed", last=6)


def test_ppo_raises_the_reward(paths, tmp_path):
    run_ppo(paths, tmp_path, "--learning_rate", "3e-2", "--batch_size", "64", "--mini_batch_size", "32",
            "--kl_coef", "0.0", total=10)  # fmt: skip
    objectives = [row["eval/objective"] for row in metrics(tmp_path) if "eval/objective" in row]
    assert objectives[0] == pytest.approx(0.0, abs=1e-3)
    assert objectives[-1] > 0.5  # standard deviations of the starting policy's scores; 10 prompts


def test_user_mistakes(paths, tmp_path):
    with pytest.raises(UserError, match="not a multiple of mini_batch_size"):
        settings_for(paths, batch_size=10)
    with pytest.raises(UserError, match="needs sft_model_path"):
        settings_for(paths, reference_model="sft")
    with pytest.raises(UserError, match="sft_model_path has no effect with reference_model: start"):
        settings_for(paths, sft_model_path=paths["sft"])
    with pytest.raises(UserError, match="lora_dropout must be 0 for PPO"):
        load(paths, settings_for(paths), use_peft=True, lora_dropout=0.1)
    with pytest.raises(UserError, match="gold: simulated scores held-out responses; it needs eval_prompt_file"):
        settings_for(paths, gold="simulated")
    with pytest.raises(UserError, match="safety_model_path"):
        Scoring(replace(settings_for(paths), safety_model_path=""))
    with pytest.raises(UserError, match="value_model: helpfulness needs helpfulness_model_path"):
        load(paths, replace(settings_for(paths), helpfulness_model_path=""))
    with pytest.raises(UserError, match="neither `sft` nor `start`"):
        settings_for(paths, reference_model="base")
    with pytest.raises(UserError, match="eval_prompts: 0"):
        settings_for(paths, eval_prompts=0)
    with pytest.raises(UserError, match="neither `simulated` nor `none`"):
        settings_for(paths, gold="true")


@pytest.mark.parametrize(
    ("name", "wrong", "range_"),
    [
        ("mini_batch_size", 0, "a finite number, 1 or more"),
        ("ppo_epochs", 0, "a finite number, 1 or more"),
        ("responses_per_prompt", 0, "a finite number, 1 or more"),
        ("max_prompt_tokens", 0, "a finite number, 1 or more"),
        ("eval_steps", -1, "a finite number, 0 or more"),
        ("learning_rate", -1.0, "a finite number, 0 or more"),
        ("value_coef", math.nan, "a finite number, 0 or more"),
        ("missing_eos_penalty", -1.0, "a finite number, 0 or more"),
        ("kl_coef", math.inf, "a finite number, 0 or more"),
        ("clip_range", 0.0, "a finite number above 0"),
        ("max_kl_nats", -1.0, "a finite number above 0"),
        ("temperature", 0.0, "a finite number above 0"),
        ("adam_beta1", 1.0, "0 to below 1"),
        ("gamma", 2.0, "0 to 1"),
        ("gae_lambda", -0.1, "0 to 1"),
    ],
)
def test_numbers_have_ranges(paths, name, wrong, range_):
    with pytest.raises(UserError, match=f"^{name}: {wrong}; give {range_}$"):
        settings_for(paths, **{name: wrong})


def test_the_ends_of_ranges_are_inside(paths):
    settings_for(paths, max_grad_norm=math.inf)  # no clipping
    settings_for(paths, gamma=1.0, gae_lambda=0.0, adam_beta1=0.0, learning_rate=0.0, value_clip_range=0.0)


def test_the_token_budget_is_the_devices_unless_chosen():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (budget_for(0, cpu), budget_for(0, gpu), budget_for(200, cpu)) == (768, 8192, 200)
    assert (budget_for(0, cpu, True), budget_for(0, gpu, True), budget_for(200, cpu, True)) == (2048, 8192, 200)
    with pytest.raises(UserError, match="token_budget"):
        PPOSettings(token_budget=-1)


def test_a_held_out_score_that_is_no_number_does_not_spoil_the_unit():
    scores = torch.tensor([1.0, float("nan"), 3.0, float("inf")])
    assert ppo_script.moments_of(scores, "score") == [2.0, 1.0]  # population deviation of 1 and 3
    with pytest.raises(UserError, match="no held-out score is a number"):
        ppo_script.moments_of(torch.tensor([float("nan")]), "held-out score")


def test_fewer_iterations_than_are_done_is_a_mistake(paths, tmp_path):
    run_ppo(paths, tmp_path, total=4)
    with pytest.raises(UserError, match="checkpoint of iteration 4, behind total_iterations 2"):
        run_ppo(paths, tmp_path, total=2)


def test_bfloat16_weights_have_their_old_logprobs_recomputed(paths, tmp_path):
    with pytest.raises(UserError, match="importance_cap has no effect"):
        run_ppo(paths, tmp_path, "--importance_cap", "3", total=1)
    run_ppo(paths, tmp_path, "--dtype", "bfloat16", "--importance_cap", "3", total=1)
    row = metrics(tmp_path)[1]
    assert 0 < row["sampler/logprob_gap"] < 0.1  # bfloat16 rounds the cached forward otherwise
    assert row["policy/first_ratio_error"] < 1e-3
