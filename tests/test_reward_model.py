"""The scalar head, what is on disk, LoRA, and scores that no batch can change. Tiny random Llamas; no download."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.errors import UserError
from reward.model import add_lora, create_reward_model, load_reward_model, save_reward_model
from reward.scorer import score_ids

HIDDEN = 16


def words(**special):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "a": 4, "b": 5}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, "<unk>")), eos_token="</s>", **special
    )


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("language_model")
    config = LlamaConfig(
        vocab_size=64, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_dropout=0.5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer():
    return words(pad_token="<pad>", unk_token="<unk>", bos_token="<s>")


@pytest.fixture
def model(language_model, tokenizer):
    return create_reward_model(language_model, tokenizer, seed=3)


DIALOGUES = [
    [1, 4, 5, 2],
    [1, 5],
    [1] + [4, 5] * 20 + [2],
    [1, 5, 5, 5, 2],
    [1, 4, 3],
]  # the last ends in the padding id


def one_by_one(model, dialogues):
    """The score without padding, batches or our forward: the backbone's last hidden state times the head."""
    with torch.no_grad():
        return torch.stack(
            [model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1])[0] for ids in dialogues]
        )


def test_new_head_is_seeded_and_scaled(language_model, tokenizer, model):
    again = create_reward_model(language_model, tokenizer, seed=3)
    other = create_reward_model(language_model, tokenizer, seed=4)
    assert torch.equal(model.score.weight, again.score.weight)
    assert not torch.equal(model.score.weight, other.score.weight)
    draws = torch.cat([create_reward_model(language_model, tokenizer, seed=i).score.weight[0] for i in range(40)])
    assert draws.std().item() == pytest.approx((HIDDEN + 1) ** -0.5, rel=0.1)  # 640 draws of N(0, 1/sqrt(17))
    assert draws.mean().abs().item() < 0.05


def test_dropout_is_off(model):
    ids = torch.tensor([[1, 4, 5, 4]])
    mask = torch.ones_like(ids)
    model.train()
    assert torch.equal(model(ids, mask).logits, model(ids, mask).logits)
    assert model.config.attention_dropout == 0.0


@pytest.mark.parametrize("token_budget", [1, 50, 8192])
def test_scores_do_not_depend_on_batch_or_padding(model, token_budget):
    model.train()
    scores = score_ids(model, DIALOGUES, token_budget)
    assert scores.dtype == torch.float32
    assert scores.shape == (5,)
    torch.testing.assert_close(scores, one_by_one(model.eval(), DIALOGUES), atol=1e-5, rtol=0)
    order = [3, 1, 4, 0, 2]
    shuffled = score_ids(model, [DIALOGUES[i] for i in order], token_budget)
    torch.testing.assert_close(shuffled, scores[order], atol=1e-5, rtol=0)


def test_scoring_restores_the_mode_and_refuses_nothing_to_score(model):
    model.train()
    score_ids(model, DIALOGUES)
    assert model.training
    assert score_ids(model, []).shape == (0,)
    with pytest.raises(ValueError, match="id list 1 is empty"):
        score_ids(model, [[1], []])


def test_saved_folder_is_plain_and_gives_the_same_scores(model, tokenizer, tmp_path):
    before = score_ids(model, DIALOGUES)
    save_reward_model(model, tokenizer, tmp_path, "# card\n")
    assert {path.suffix for path in tmp_path.iterdir()} <= {".json", ".safetensors", ".md", ".jinja"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    torch.testing.assert_close(score_ids(load_reward_model(tmp_path), DIALOGUES), before)
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, dtype=torch.float32
    )  # the plain class, no padding
    plain_score = plain(torch.tensor([DIALOGUES[0]])).logits[0, 0]
    torch.testing.assert_close(plain_score, before[0], atol=1e-5, rtol=0)


def test_head_stays_float32_in_bfloat16_models(language_model, model, tokenizer, tmp_path):
    assert create_reward_model(language_model, tokenizer, torch.bfloat16).score.weight.dtype == torch.float32
    save_reward_model(model, tokenizer, tmp_path, "")
    loaded = load_reward_model(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.score.weight, model.score.weight)  # not rounded on the way
    assert score_ids(loaded, DIALOGUES).dtype == torch.float32


def test_an_earlier_reward_model_keeps_its_head(model, tokenizer, tmp_path):
    save_reward_model(model, tokenizer, tmp_path, "")
    assert torch.equal(create_reward_model(tmp_path, tokenizer, seed=99).score.weight, model.score.weight)


def test_lora_trains_adapter_and_head_and_merges(model, tokenizer, tmp_path):
    lora = add_lora(model, r=4, alpha=8, dropout=0.0, target_modules=None)
    trainable = {name for name, weight in lora.named_parameters() if weight.requires_grad}
    assert any("score" in name for name in trainable)
    assert all("lora_" in name or "score.modules_to_save" in name for name in trainable)
    with torch.no_grad():
        for _name, weight in lora.named_parameters():
            if weight.requires_grad:
                weight.add_(0.05)
    before = score_ids(lora, DIALOGUES)
    save_reward_model(lora, tokenizer, tmp_path, "")
    torch.testing.assert_close(score_ids(load_reward_model(tmp_path), DIALOGUES), before, atol=1e-5, rtol=1e-4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not any("lora" in name for name in load_file(tmp_path / "model.safetensors"))


def test_a_language_model_is_not_taken_for_a_reward_model(language_model, tmp_path):
    with pytest.raises(UserError, match="is not a reward model"):
        load_reward_model(language_model)
    with pytest.raises(UserError, match="no Hugging Face model at"):
        load_reward_model(tmp_path / "nowhere")


@pytest.mark.parametrize(("special", "fault"), [({}, "no padding token"), ({"pad_token": "</s>"}, "'</s>'")])
def test_padding_must_not_end_a_dialogue(language_model, special, fault):
    with pytest.raises(UserError, match=fault):
        create_reward_model(language_model, words(**special))


def test_embeddings_grow_for_an_added_padding_token(language_model):
    tokenizer = words()
    tokenizer.add_tokens([f"t{i}" for i in range(60)])
    tokenizer.add_special_tokens({"pad_token": "<new pad>"})
    model = create_reward_model(language_model, tokenizer)
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 67
