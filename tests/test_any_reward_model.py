"""Any sequence-classification reward model: what it reads, and scores equal to plain one-by-one forwards."""

import pytest
import torch
from tiny_models import save_tiny_policy, save_tiny_reward_model, tiny_config, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from configs.chat import ChatFormatError
from configs.errors import UserError
from reward.any_model import AnyRewardModel, prompt_text
from reward.data import encode_replies
from reward.model import load_reward_model, save_reward_model

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "initializer_range": 0.3, "num_labels": 1, "pad_token_id": 0}  # fmt: skip


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte; [CLS] a [SEP] b [SEP] with segments, as BERT's; no EOS token."""
    special = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def save_encoder(folder, kind="bert", labels=1, positions=128):
    torch.manual_seed(0)
    tokenizer = encoder_tokenizer()
    sizes = SIZES | {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "num_labels": labels}
    if kind == "bert":
        model = BertForSequenceClassification(BertConfig(**sizes))
    else:
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
        model = DebertaV2ForSequenceClassification(DebertaV2Config(**sizes, **relative))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def message(role, content):
    return {"role": role, "content": content}


def record(prompt, chosen, rejected):
    turns = [message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(prompt)]
    return {"prompt": turns, "chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}


RECORDS = [
    record(["the cat"], "runs", "sleeps over the small house"),
    record(["a", "b", "the dog?"], "a large tree", "no"),
    record(["x"], "y", "z"),
]


def loaded(path, input_format="auto"):
    model = AnyRewardModel(path, input_format)
    model.load(torch.float32, "sdpa", torch.device("cpu"))
    return model


def scores(model, budget=4096):
    return model.scores([d for r in RECORDS for d in encode_replies(r, model.encode, 512)[0]], budget)


@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_an_encoder_scores_text_pairs_as_transformers_does_one_by_one(tmp_path, kind):
    path = save_encoder(tmp_path, kind)
    model = loaded(path)
    assert (model.input_format, model.is_decoder, model.context) == ("text_pair", False, 128)
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = encoder_tokenizer()
    expected = []
    with torch.no_grad():
        for prompt in ("the cat", "Human: a\n\nAssistant: b\n\nHuman: the dog?", "x"):
            for side in ("chosen", "rejected"):
                answer = RECORDS[len(expected) // 2][side][0]["content"]
                expected.append(plain(**tokenizer(prompt, answer, return_tensors="pt")).logits.item())
    assert len(set(expected)) == 6
    assert scores(model) == pytest.approx(expected, abs=1e-5)
    assert scores(model, budget=1) == pytest.approx(expected, abs=1e-5)  # every row alone: padding changes nothing
    model.unload()
    assert model.model is None


def chatml_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def save_chatml_decoder(folder, save=None):
    tokenizer = chatml_tokenizer()
    torch.manual_seed(0)
    config = tiny_config(len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = LlamaForSequenceClassification(config)
    if save:
        save(model, tokenizer, folder, "")
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_decoder_of_others_reads_its_template_to_the_end(tmp_path):
    path = save_chatml_decoder(tmp_path)
    model = loaded(path)
    assert (model.input_format, model.is_decoder) == ("template", True)
    plain = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = chatml_tokenizer()
    expected = []
    with torch.no_grad():
        for each in RECORDS:
            for side in ("chosen", "rejected"):
                inputs = tokenizer.apply_chat_template([*each["prompt"], *each[side]], return_tensors="pt")
                ids = inputs["input_ids"]
                assert tokenizer.decode(ids[0]).endswith("<|im_end|>\n")
                expected.append(plain(input_ids=ids).logits.item())
    assert scores(model) == pytest.approx(expected, abs=1e-5)
    as_ours = scores(loaded(path, "chat"))  # ends in <|im_end|>
    assert max(abs(a - b) for a, b in zip(as_ours, expected, strict=True)) > 1e-3


def test_our_models_are_known_by_their_config_and_read_our_format(tmp_path):
    path = save_chatml_decoder(tmp_path, save_reward_model)
    model = loaded(path)
    assert model.input_format == "chat"
    ids = model.encode([*RECORDS[0]["prompt"], *RECORDS[0]["chosen"]]).input_ids
    assert chatml_tokenizer().decode(ids).endswith("runs<|im_end|>")
    assert load_reward_model(path).config.reward_input_format == "chat"


def test_a_decoder_without_a_template_reads_llama_2s_format(tmp_path):
    model = AnyRewardModel(save_tiny_reward_model(tmp_path, seed=0))
    assert model.input_format == "chat"
    ids = model.encode([message("user", "a"), message("assistant", "b")]).input_ids
    assert tiny_tokenizer().decode(ids) == "<s>[INST] a [/INST] b </s>"


def test_system_messages_and_turns_become_one_text():
    assert prompt_text([message("system", "s"), message("user", "u")]) == "s\n\nu"


def test_mistakes_are_named(tmp_path):
    path = save_encoder(tmp_path / "one")
    with pytest.raises(UserError, match="input_format: must be one of"):
        AnyRewardModel(path, "pair")
    with pytest.raises(UserError, match="has no chat template"):
        AnyRewardModel(path, "template")
    with pytest.raises(UserError, match="is not a reward model"):
        AnyRewardModel(save_encoder(tmp_path / "two", labels=2))
    with pytest.raises(UserError, match="is not a reward model"):
        AnyRewardModel(save_tiny_policy(tmp_path / "policy"))
    with pytest.raises(ChatFormatError, match="special tag"):
        AnyRewardModel(path).encode([message("user", "a [SEP] b"), message("assistant", "c")])


@pytest.mark.parametrize(
    "save", [save_encoder, lambda folder: save_tiny_reward_model(folder, 0)], ids=["bert", "llama"]
)
def test_weights_without_their_head_are_refused(tmp_path, save):
    from safetensors.torch import load_file, save_file

    path = save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith(("score", "classifier"))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weights lack"):
        loaded(path)


def test_weights_that_are_no_safetensors_are_refused(tmp_path):
    path = save_encoder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no weights can be loaded"):
        loaded(path)


def test_a_decoder_that_pads_with_its_end_token_is_read_where_its_own_class_reads_it(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    torch.manual_seed(0)
    plain = LlamaForSequenceClassification(tiny_config(len(tokenizer), num_labels=1, pad_token_id=2)).eval()
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = AnyRewardModel(str(tmp_path))
    model.load(torch.float32, "sdpa", torch.device("cpu"))
    found = scores(model)
    expected = []
    for record in RECORDS:
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template([*record["prompt"], *record[side]], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            assert ids[0, -1] == 2
            expected.append(plain(input_ids=ids).logits.item())
    assert found == pytest.approx(expected, abs=1e-5)
