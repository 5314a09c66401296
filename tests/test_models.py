"""Loading and saving of tokenizers and policies."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import save_tiny_policy, save_tiny_reward_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import UserError
from configs.model_settings import ModelSettings
from reward.model import create_reward_model, load_reward_model
from rlhf.models import data_fingerprint, load_policy, model_card, save_policy
from rlhf.tokenizer import check_same_tokenizer, load_tokenizer

IDS = torch.tensor([[1, 40, 41, 42, 43]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


def test_a_pad_token_is_added_where_there_is_none_and_old_logits_stay(tmp_path):
    path = save_tiny_policy(tmp_path, pad=False)
    before = AutoModelForCausalLM.from_pretrained(path)
    tokenizer, model = load_tokenizer(path), load_policy(ModelSettings(model_name_or_path=path))
    old = before.get_input_embeddings().weight.shape[0]
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", old)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == old + 1
    assert model.config.pad_token_id == old
    torch.testing.assert_close(model(IDS).logits[..., :old], before(IDS).logits)
    torch.testing.assert_close(model.lm_head.weight[old], before.lm_head.weight.mean(0))


def test_pad_equal_to_eos_is_replaced(tmp_path):
    path = save_tiny_policy(tmp_path, pad=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(path)
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.eos_token == "</s>"


def test_a_saved_policy_is_a_plain_folder_with_equal_logits(folder, tmp_path):
    model, tokenizer = load_policy(ModelSettings(model_name_or_path=folder)), load_tokenizer(folder)
    save_policy(model, tokenizer, tmp_path, "card")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, atol=0, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    assert (tmp_path / "README.md").read_text() == "card"
    assert not list(tmp_path.rglob("*.bin"))
    assert not list(tmp_path.rglob("*.pt"))
    assert again.generation_config.eos_token_id in (2, [2])


def test_lora_saves_merged_weights_and_the_adapter_and_leaves_the_model_alone(folder, tmp_path):
    torch.manual_seed(0)
    settings = ModelSettings(model_name_or_path=folder, use_peft=True, lora_r=4, lora_alpha=8)
    model = load_policy(settings)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    with torch.no_grad():  # B starts at 0, so an untrained adapter would prove nothing
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = model(IDS).logits
    plain = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    assert (expected - plain).abs().max() > 0.1

    save_policy(model, load_tokenizer(folder), tmp_path, "card")
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, expected, atol=1e-5, rtol=1e-5
    )
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert any("lora_A" in key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


def test_dtypes(folder):
    settings = ModelSettings(model_name_or_path=folder, dtype="bfloat16")
    assert load_policy(settings, trainable=False).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in load_policy(settings, trainable=False).parameters())
    with pytest.raises(UserError, match="dtype: 'int3'"):
        load_policy(ModelSettings(model_name_or_path=folder, dtype="int3"))


def test_a_missing_model_is_the_users_mistake():
    with pytest.raises(UserError, match="model_name_or_path"):
        load_tokenizer("/nowhere/at/all")


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    policy, reward = Path(save_tiny_policy(tmp_path / "policy")), Path(save_tiny_reward_model(tmp_path / "reward", 0))
    for folder in (policy, reward):
        weights = folder / "model.safetensors"
        torch.save(load_file(weights), folder / "pytorch_model.bin")  # a pickle, which transformers would load
        weights.unlink()
    with pytest.raises(UserError, match="safetensors"):
        load_policy(ModelSettings(model_name_or_path=str(policy)))
    with pytest.raises(UserError, match="safetensors"):
        load_reward_model(reward)
    with pytest.raises(UserError, match="safetensors"):
        create_reward_model(policy, load_tokenizer(str(policy)))


def test_model_card_and_fingerprint(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"abc")  # SHA-256 of "abc", FIPS 180-2 appendix B.1
    expected = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert data_fingerprint(str(path)) == expected
    card = model_card("sft", {"model_name_or_path": "base"}, {str(path): expected}, {"eval_loss": 0.5, "steps": 3})
    assert "base_model: base" in card
    assert expected in card
    assert "| eval_loss | 0.5 |" in card
    assert "| steps | 3 |" in card


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        (lambda tokenizer: None, None),
        (lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}), None),  # never read
        (lambda tokenizer: tokenizer.add_tokens(["another"]), "1 tokens differ, such as 'another'"),
    ],
)
def test_tokenizers_may_differ_in_their_padding_token_only(folder, tmp_path, change, refused):
    other = AutoTokenizer.from_pretrained(folder)
    change(other)
    other.save_pretrained(tmp_path)
    if refused is None:
        check_same_tokenizer(load_tokenizer(folder), str(tmp_path), "safety_model_path")
        return
    with pytest.raises(UserError, match=f"^safety_model_path: .*{refused}"):
        check_same_tokenizer(load_tokenizer(folder), str(tmp_path), "safety_model_path")


def test_a_folder_without_a_tokenizer_is_taken_to_have_the_same(folder, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    check_same_tokenizer(load_tokenizer(folder), str(tmp_path), "safety_model_path")
