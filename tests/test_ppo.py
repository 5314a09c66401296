"""PPO: the objective on a rollout, steps that do not depend on the batch's cut, resumption bit for bit, safety nets."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from tiny_models import prompt_rows, save_tiny_policy, save_tiny_reward_model, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.ppo_settings import PPOSettings
from rlhf import alarms
from rlhf import ppo as ppo_script
from rlhf import update as update_module
from rlhf.hardware import FLOAT_ATTENTION, token_budget
from rlhf.load_roles import load_roles
from rlhf.prompts import prompts_of
from rlhf.rollout import advantages_and_returns, collect
from rlhf.samples import Prompt
from rlhf.sequences import Sequences
from rlhf.update import make_optimizer, update

SMALL = {"batch_size": 16, "mini_batch_size": 8, "max_new_tokens": 6, "token_budget": 200, "value_coef": 1.0,
         "learning_rate": 3e-3, "value_learning_rate": 3e-3}  # fmt: skip


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
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
    settings = settings_for(paths, reference_model=reference, sft_model_path=paths["sft"])
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
        assert rollout.r_helpfulness_B[i].item() == pytest.approx(r_h.item(), abs=1e-4)
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


def test_missing_eos_penalty_hits_cut_responses_only(paths):
    plain, fined = (
        roll(load(paths, s), s) for s in (settings_for(paths), settings_for(paths, missing_eos_penalty=5.0))
    )
    assert plain.responses == fined.responses
    cut = torch.tensor([response[-1] != 2 for response in plain.responses])
    assert cut.any()
    torch.testing.assert_close(plain.scores_B - fined.scores_B, 5.0 * cut.float(), atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("lora", [False, True])
def test_a_killed_run_continues_bit_for_bit(paths, tmp_path, monkeypatch, lora):
    monkeypatch.setattr(alarms, "KL_NEGATIVE", 10.0)  # raised at iteration 1, and not again after the resumption
    extra = ("--use_peft", "true", "--lora_r", "4") if lora else ()
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
    assert not list(tmp_path.glob("best-*"))

    scores = iter([0.0] * 9)
    summary = run_ppo(paths, tmp_path / "capped", "--max_kl_nats", "0.000001", "--learning_rate", "0.01", total=40)
    assert summary["stopped_by"] == "max_kl_nats"
    assert summary["iterations"] < 40


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
    assert not list((tmp_path / "killed").glob("best-*"))


def test_bf16_rounds_hidden_states_and_little_else(paths):
    settings = settings_for(paths)
    plain, mixed = load(paths, settings), load(paths, replace(settings, bf16=True))
    assert mixed.policy.model.config._attn_implementation == FLOAT_ATTENTION
    one, two = roll(plain, settings), roll(mixed, replace(settings, bf16=True))
    assert one.responses == two.responses  # sampling is left alone
    for name in ("logprobs_BR", "reference_logprobs_BR", "values_BR", "r_helpfulness_B", "r_safety_B"):
        a, b = getattr(one, name), getattr(two, name)
        assert b.dtype == torch.float32
        assert 0 < (a - b).abs().max() < 0.05  # bfloat16 keeps 8 bits: 2**-8 of numbers of order one, a few times over
    advantages, returns = advantages_and_returns(two, settings, Accelerator(cpu=True))
    figures, _ = update(
        mixed, make_optimizer(mixed, settings), two, advantages, returns, settings, Accelerator(cpu=True), 0
    )
    assert figures["policy/first_ratio_error"] < 5e-3
    assert all(p.dtype == torch.float32 for p in mixed.policy.model.parameters())


@pytest.mark.slow
def test_two_processes_reach_what_one_does(paths, tmp_path):
    """Uneven shares included: 9 held-out prompts. Adam's epsilon keeps rounding in tiny gradients from growing."""
    extra = ("--eval_prompts", "9", "--adam_epsilon", "0.01", "--gold", "simulated")
    run_ppo(paths, tmp_path / "one", *extra, total=1)
    here = Path(__file__).resolve().parent
    script = tmp_path / "two.py"
    script.write_text(
        f"from test_ppo import run_ppo\nrun_ppo({paths!r}, {str(tmp_path / 'two')!r}, *{extra!r}, total=1)\n"
    )
    # `accelerate launch --cpu --num_processes 2` starts one process where there is no MPI
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(script)], env=environment, check=True, timeout=180)
    world = json.loads((tmp_path / "two" / "environment.json").read_text())["world_size"]
    assert world == 2
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert two == {name: pytest.approx(value, abs=1e-5, rel=1e-5) for name, value in one.items()}
    start = AutoModelForCausalLM.from_pretrained(paths["policy"])
    moved = final_weights(tmp_path / "one") - torch.cat([p.detach().flatten() for p in start.parameters()])
    assert moved.abs().max() > 1e-4
    torch.testing.assert_close(final_weights(tmp_path / "two"), final_weights(tmp_path / "one"), atol=1e-5, rtol=0)


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
    with pytest.raises(UserError, match="safety_model_path"):
        load(paths, replace(settings_for(paths), safety_model_path=""))
    with pytest.raises(UserError, match="neither `sft` nor `start`"):
        settings_for(paths, reference_model="base")
    with pytest.raises(UserError, match="neither `simulated` nor `none`"):
        settings_for(paths, gold="true")


def test_the_token_budget_is_the_devices_unless_chosen():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (token_budget(0, cpu), token_budget(0, gpu), token_budget(200, cpu)) == (768, 8192, 200)
    with pytest.raises(UserError, match="token_budget"):
        PPOSettings(token_budget=-1)
