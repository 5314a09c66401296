"""4-bit LoRA: what is quantised, how it trains, and that the saved model is plain and scores as it was measured.

bitsandbytes computes on CPUs too; without that package only the error message is tested.
"""

import importlib.util
import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import save_tiny_policy, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.ppo_settings import PPOSettings
from configs.records import RATINGS
from reward.model import add_lora, create_reward_model, load_reward_model, save_reward_model
from reward.scorer import score_ids
from rlhf.load_roles import load_roles
from rlhf.models import save_policy
from rlhf.rollout import advantages_and_returns, collect
from rlhf.samples import Prompt
from rlhf.tokenizer import load_tokenizer
from rlhf.train_reward import main
from rlhf.update import make_optimizer, update

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CPU = torch.device("cpu")
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DIALOGUES = [[1, 40, 50, 2], [1, 60], [1, *range(20, 60), 2]]


@pytest.fixture
def base(tmp_path):
    return save_tiny_policy(tmp_path / "base", hidden_size=64, intermediate_size=128)  # blocks of 64 weights


def test_without_the_package_the_error_names_it(base, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="load_in_4bit needs the package bitsandbytes: pip install"):
        create_reward_model(base, load_tokenizer(base), four_bit_device=CPU)


@needs_package
def test_linear_layers_are_quantised_and_the_head_trains_in_float32(base):
    model = create_reward_model(base, load_tokenizer(base), torch.bfloat16, four_bit_device=CPU)
    quantised = {name for name, p in model.named_parameters() if p.dtype == torch.uint8}
    assert quantised == {name for name, _ in model.named_parameters() if name.split(".")[-2] in LINEAR}
    assert model.score.weight.dtype == torch.float32
    tuned = add_lora(model, 4, 8, 0.0, None)
    trained = {name: p.dtype for name, p in tuned.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32}
    assert {name for name in trained if "lora_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }


@needs_package
def test_a_score_between_two_steps_does_not_change_gradients(base):
    def gradient(score_first):
        torch.manual_seed(0)
        model = add_lora(create_reward_model(base, load_tokenizer(base), four_bit_device=CPU), 4, 8, 0.0, None)
        if score_first:
            score_ids(model.eval(), DIALOGUES)
        model.train()
        ids = torch.tensor([DIALOGUES[2]])
        model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, after = gradient(False), gradient(True)
    assert plain.keys() == after.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(after[name], expected, msg=name)
    assert any(g.abs().max() > 0 for name, g in plain.items() if "layers.0" in name)


@needs_package
@pytest.mark.parametrize("targets", [None, ["q_proj"]], ids=["all linear layers", "some"])
def test_the_saved_model_is_plain_and_scores_as_the_quantised_one(base, tmp_path, targets):
    tokenizer = load_tokenizer(base)
    model = add_lora(create_reward_model(base, tokenizer, four_bit_device=CPU), 4, 8, 0.0, targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    measured = score_ids(model.eval(), DIALOGUES)
    save_reward_model(model, tokenizer, tmp_path / "saved", "card")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (tmp_path / "saved" / "adapter" / "adapter_model.safetensors").exists()
    reloaded = load_reward_model(tmp_path / "saved")
    torch.testing.assert_close(score_ids(reloaded, DIALOGUES), measured, atol=1e-4, rtol=1e-4)
    # Shapes and names are those of the class without quantisation; embeddings and norms are the base's own.
    weights, before = load_file(tmp_path / "saved" / "model.safetensors"), load_file(f"{base}/model.safetensors")
    assert {name: w.shape for name, w in weights.items() if name != "score.weight"} == {
        name: w.shape for name, w in before.items() if name != "lm_head.weight"
    }
    assert all(torch.equal(w, before[name]) for name, w in weights.items() if "norm" in name or "embed" in name)
    # NF4 rounds to the nearest of 16 levels: the largest gap is 0.3039 of a block's largest weight, so half of it.
    weight, original = weights["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"]
    if targets is not None:
        assert 0 < (weight - original).abs().max() < 0.16 * original.abs().max()


@needs_package
def test_the_script_trains_four_bits_end_to_end(base, tmp_path):
    def rows(numbers):
        return [
            {"prompt": [{"role": "user", "content": f"question {i}"}], "rating": RATINGS[i % 4],
             "chosen": [{"role": "assistant", "content": f"{i} yes"}],
             "rejected": [{"role": "assistant", "content": f"{i} no"}]}
            for i in numbers
        ]  # fmt: skip

    data = [write_rows(tmp_path / "a.jsonl", rows(range(24))), write_rows(tmp_path / "b.jsonl", rows(range(50, 66)))]
    words = ["--model_name_or_path", base, "--output_dir", str(tmp_path / "run"), "--use_cpu", "true",
             "--train_files", data[0], "--eval_files", data[1], "--use_peft", "true", "--load_in_4bit", "true",
             "--dtype", "bfloat16", "--bf16", "true", "--gradient_checkpointing", "true", "--max_steps", "12",
             "--eval_steps", "4", "--save_steps", "4", "--learning_rate", "1e-2",
             "--min_warmup_steps", "1"]  # fmt: skip
    summary = main(words)
    assert summary["accuracy"] > 0.9  # chance is 0.5
    folder = tmp_path / "run" / "model"
    weights = load_file(folder / "model.safetensors")
    assert weights["score.weight"].dtype == torch.float32
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert AutoModelForSequenceClassification.from_pretrained(folder).num_labels == 1
    # Killed before its summary, after the checkpoint of step 8: the last four steps again, and the same scores.
    (tmp_path / "run" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-12")
    assert main(words)["scores"] == summary["scores"]


@needs_package
def test_roles_on_a_4_bit_base_are_those_of_the_plain_model_it_stands_for(base, tmp_path):
    """All five: policy and reference (fresh adapters), value and both reward models (adapters of their own)."""
    tokenizer = load_tokenizer(base)
    for seed, name in enumerate(("helpfulness", "safety")):
        torch.manual_seed(seed)
        tuned = add_lora(create_reward_model(base, tokenizer, seed=seed), 4, 8, 0.0, None)
        with torch.no_grad():
            for weight_name, weight in tuned.named_parameters():
                if "lora_B" in weight_name:
                    weight.normal_(std=0.1)
        save_reward_model(tuned, tokenizer, tmp_path / name, "card")

    def roles_on(model_path, four_bits):
        folders = {}
        for name in ("helpfulness", "safety"):  # the same adapter, said to be of this base
            folder = shutil.copytree(tmp_path / name / "adapter", tmp_path / f"{name}-{four_bits}")
            described = json.loads((folder / "adapter_config.json").read_text())
            described["base_model_name_or_path"] = str(model_path)
            (folder / "adapter_config.json").write_text(json.dumps(described))
            folders[f"{name}_model_path"] = str(folder)
        ppo = PPOSettings(batch_size=8, mini_batch_size=4, max_new_tokens=5, token_budget=200, **folders)
        model = ModelSettings(model_name_or_path=str(model_path), use_peft=True, lora_r=4, load_in_4bit=four_bits)
        return load_roles(ppo, model, tokenizer, CPU, 0), ppo

    def rolled(roles, ppo):
        prompts = [Prompt([], [1, 40 + i, 50]) for i in range(8)]
        return collect(roles, prompts, ppo, load_chat_format(tokenizer), tokenizer.pad_token_id, range(8), CPU)

    four, ppo = roles_on(base, four_bits=True)
    ours = rolled(four, ppo)
    with four.policy.acting():
        save_policy(four.policy.model, tokenizer, tmp_path / "plain", "card")  # the adapter is still the identity
    theirs = rolled(*roles_on(tmp_path / "plain", four_bits=False))
    assert ours.responses == theirs.responses
    for name in ("logprobs_BR", "reference_logprobs_BR", "values_BR", "raw"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=1e-4, rtol=1e-4)
    assert (ours.raw["helpfulness"] - ours.raw["safety"]).abs().min() > 1e-3
    assert ours.values_BR.std() > 0.01


@needs_package
def test_ppo_on_a_4_bit_base_trains_adapters_and_saves_the_plain_model_it_was(base, tmp_path):
    tokenizer = load_tokenizer(base)
    adapters = {}
    for seed, name in enumerate(("helpfulness", "safety")):
        torch.manual_seed(seed)
        tuned = add_lora(create_reward_model(base, tokenizer, seed=seed), 4, 8, 0.0, None)
        save_reward_model(tuned, tokenizer, tmp_path / name, "card")
        adapters[f"{name}_model_path"] = str(tmp_path / name / "adapter")
    ppo = PPOSettings(batch_size=8, mini_batch_size=4, max_new_tokens=5, token_budget=200, recompute_logprobs=True,
                      learning_rate=1e-2, value_learning_rate=1e-2, **adapters)  # fmt: skip
    model = ModelSettings(model_name_or_path=base, use_peft=True, lora_r=4, load_in_4bit=True)
    roles = load_roles(ppo, model, tokenizer, CPU, 0)
    quantised = sum(p.dtype == torch.uint8 for p in roles.policy.model.parameters())
    assert quantised == 2 * len(LINEAR)  # once, for all five roles
    prompts = [Prompt([], [1, 40 + i, 50]) for i in range(8)]
    rollout = collect(roles, prompts, ppo, load_chat_format(tokenizer), tokenizer.pad_token_id, range(8), CPU)
    accelerator = Accelerator(cpu=True)
    advantages, returns = advantages_and_returns(rollout, ppo, accelerator)
    figures, _ = update(roles, make_optimizer(roles, ppo), rollout, advantages, returns, ppo, accelerator, 0)
    assert figures["optim/steps"] == 2
    assert figures["policy/first_ratio_error"] < 1e-4
    with roles.policy.acting():
        save_policy(roles.policy.model, tokenizer, tmp_path / "policy", "card")
        ids = torch.tensor([DIALOGUES[2]])
        with torch.no_grad():
            ours = roles.policy.model(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    assert not any(p.dtype == torch.uint8 for p in plain.parameters())
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours, atol=1e-3, rtol=1e-3)
        start = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert (ours - start).abs().max() > 0.01
