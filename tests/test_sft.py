"""SFT: what is trained, packing that leaks nothing, losses that do not depend on the batch's cut."""

import json

import pytest
import torch
from tiny_models import dialogue_rows, save_tiny_policy, tiny_tokenizer, write_rows
from transformers import AutoModelForCausalLM, Trainer

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.records import read_dialogues
from rlhf import sft, sft_rows
from rlhf.models import load_policy

PAD = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", dialogue_rows(48))


@pytest.fixture(scope="module")
def chat_format():
    return load_chat_format(tiny_tokenizer())


def turns(*texts, system=None):
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def trained_text(example):
    return tiny_tokenizer().decode([label for label in example["labels"] if label != sft_rows.IGNORED])


def test_all_replies_are_trained_or_only_the_last(chat_format):
    messages = turns("the cat", "a dog", "red", "blue house")
    every, _ = sft_rows.encode_dialogue({"messages": messages}, chat_format, 400)
    last, _ = sft_rows.encode_dialogue({"messages": messages, "train_on": "last"}, chat_format, 400)
    assert every["input_ids"] == last["input_ids"]
    assert "a dog" in trained_text(every)
    assert "blue house" in trained_text(every)
    assert trained_text(last).strip().removesuffix("</s>").strip() == "blue house"
    assert last["labels"][-1] == 2
    assert sum(label == 2 for label in every["labels"]) == 2
    assert "the cat" not in trained_text(every)


def test_dialogues_with_a_long_last_reply_are_left_out(chat_format):
    long_before, short = turns("the cat", "a dog the cat a dog", "red", "blue"), turns("red", "a dog")
    rows = [{"messages": long_before}, {"messages": short}]
    # in Llama 2's format a reply is " blue </s>"; what was replied before it does not count
    tokens = [len(tiny_tokenizer().encode(text, add_special_tokens=False)) + 1 for text in (" blue ", " a dog ")]
    assert [sft_rows.last_reply_tokens(row["messages"], chat_format) for row in rows] == tokens
    examples, counts = sft_rows.encode_rows(rows, chat_format, 400, min(tokens))
    assert (len(examples), counts["long_reply"], counts["too_long"]) == (1, 1, 0)
    assert sft_rows.encode_rows(rows, chat_format, 400, max(tokens))[1]["whole"] == 2


def test_long_dialogues_lose_their_oldest_turns_and_keep_the_system_message(chat_format):
    messages = turns("the cat", "a dog", "red", "blue house", "tree", "small", system="large")
    whole = len(chat_format.encode_dialogue(messages).input_ids)
    example, verdict = sft_rows.encode_dialogue({"messages": messages}, chat_format, whole)
    assert verdict == "whole"
    assert len(example["input_ids"]) == whole
    example, verdict = sft_rows.encode_dialogue({"messages": messages}, chat_format, whole - 1)
    expected = turns("red", "blue house", "tree", "small", system="large")
    assert verdict == "shortened"
    assert example["input_ids"] == chat_format.encode_dialogue(expected).input_ids
    rows = [{"messages": turns("the cat " * 50, "a")}, {"messages": messages}]
    examples, counts = sft_rows.encode_rows(rows, chat_format, whole - 1)
    assert len(examples) == 1
    assert counts == {"whole": 0, "shortened": 1, "too_long": 1, "long_reply": 0}


def test_a_ghost_attention_row_never_loses_the_turn_that_holds_its_instruction(chat_format, tmp_path):
    row = {"messages": turns("Always act as Homer. a?", "b", "c?", "d"), "instruction": {"kind": "figure"}}
    path = write_rows(tmp_path / "gatt.jsonl", [row, {**row, "instruction": None}])
    kept, plain = read_dialogues(path, chat_format=chat_format).rows
    length = len(chat_format.encode_dialogue(row["messages"]).input_ids)
    assert sft_rows.encode_dialogue(kept, chat_format, length)[1] == "whole"
    assert sft_rows.encode_dialogue(kept, chat_format, length - 1)[1] == "too_long"
    assert sft_rows.encode_dialogue(plain, chat_format, length - 1)[1] == "shortened"


def test_mix_weights_are_passes_over_a_file():
    first, second = [{"n": i} for i in range(10)], [{"n": 100 + i} for i in range(10)]
    rows = [row["n"] for row in sft_rows.mix([first, second], [2.0, 0.3], seed=0)]
    assert sorted(n for n in rows if n < 100) == sorted(list(range(10)) * 2)
    assert len({n for n in rows if n >= 100}) == len([n for n in rows if n >= 100]) == 3


def test_packing_loses_no_dialogue_and_doubles_none():
    examples = [{"input_ids": [i] * (i + 1), "labels": [i] * (i + 1)} for i in range(1, 20)]
    packed = sft_rows.to_dataset(examples, 24, packing=True)
    found = []
    for row in packed:
        assert sum(row["seq_lengths"]) == len(row["input_ids"]) <= 24
        for part in torch.tensor(row["input_ids"]).split(row["seq_lengths"]):
            assert len(set(part.tolist())) == 1
            found.append(part.tolist())
    assert sorted(found) == sorted(example["input_ids"] for example in examples)
    assert len(packed) < 12  # 209 tokens into rows of 24: at least 9


def token_losses(model, batch):
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=sft_rows.IGNORED, reduction="none"
    )
    return losses[losses != 0]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_packed_row_is_worth_its_dialogues_one_by_one(folder, chat_format, attention):
    model = load_policy(ModelSettings(model_name_or_path=folder, attn_implementation=attention))
    examples, _ = sft_rows.encode_rows(dialogue_rows(9, seed=4), chat_format, 200)
    collate = sft_rows.collator_for(model, PAD)
    dataset = sft_rows.to_dataset(examples, 200, packing=True)
    assert any(len(row["seq_lengths"]) > 2 for row in dataset)
    packed = token_losses(model, collate(list(dataset)))
    parameters = [model.lm_head.weight, model.model.layers[0].self_attn.k_proj.weight]
    packed_gradients = torch.autograd.grad(packed.sum(), parameters)
    singles = [token_losses(model, collate([row])) for row in sft_rows.to_dataset(examples, 200, packing=False)]
    plain = torch.cat(singles)
    torch.testing.assert_close(packed.sort().values, plain.sort().values, atol=2e-5, rtol=1e-5)
    for a, b in zip(packed_gradients, torch.autograd.grad(plain.sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_collator_masks_by_hand():
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "seq_lengths": [2, 1]}
    other = {"input_ids": [8], "labels": [8], "seq_lengths": [1]}
    batch = sft_rows.PackedCollator(PAD)([row, other])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert batch["attention_mask"][0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert batch["attention_mask"][1, 0].any(-1).all()  # no query without a key: softmax over nothing is nan


def run_sft(folder, data, output, *extra):
    return sft.main(["--model_name_or_path", folder, "--train_files", data, "--output_dir", str(output),
                     "--use_cpu", "true", "--max_length", "128", "--num_train_epochs", "1", "--learning_rate", "1e-2",
                     "--logging_steps", "1", "--eval_fraction", "0.15", "--num_samples", "2",
                     "--sample_max_new_tokens", "4", "--lr_scheduler_type", "constant", *extra])  # fmt: skip


def weights(output):
    model = AutoModelForCausalLM.from_pretrained(f"{output}/model")
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_one_batch_of_eight_is_four_micro_batches_of_two(folder, data, tmp_path):
    # unpacked rows have unequal numbers of trained tokens, so a mean of micro-batch means would differ
    common = ("--packing", "false", "--max_steps", "3")
    run_sft(folder, data, tmp_path / "a", *common, "--per_device_train_batch_size", "8")
    run_sft(folder, data, tmp_path / "b", *common, "--per_device_train_batch_size", "2",
            "--gradient_accumulation_steps", "4")  # fmt: skip
    difference = (weights(tmp_path / "a") - weights(tmp_path / "b")).abs().max()
    assert difference < 2e-5
    assert (weights(tmp_path / "a") - weights_of(folder)).abs().max() > 1e-3


@pytest.mark.parametrize("extra", [(), ("--use_peft", "true", "--lora_r", "4"), ("--packing", "false"),
                                   ("--gradient_checkpointing", "true")])  # fmt: skip
def test_the_head_on_trained_tokens_only_gives_the_trainers_own_steps(folder, data, tmp_path, monkeypatch, extra):
    run_sft(folder, data, tmp_path / "ours", "--max_steps", "3", *extra)
    monkeypatch.setattr(sft.CpuSFTTrainer, "compute_loss", Trainer.compute_loss)
    run_sft(folder, data, tmp_path / "plain", "--max_steps", "3", *extra)
    ours, plain = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ours", "plain")
    )
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in ours[:3]] == pytest.approx([row[name] for row in plain[:3]], rel=1e-4)
    assert (weights(tmp_path / "ours") - weights(tmp_path / "plain")).abs().max() < 2e-5


def weights_of(folder):
    return torch.cat([p.detach().flatten() for p in AutoModelForCausalLM.from_pretrained(folder).parameters()])


def test_main_trains_writes_the_run_folder_and_does_not_run_twice(folder, data, tmp_path):
    summary = run_sft(folder, data, tmp_path, "--num_train_epochs", "12", "--per_device_train_batch_size", "4")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert summary["held_out_dialogues"] > 0
    assert summary["held_out_dialogues"] + summary["train_dialogues"] == 48
    assert summary["eval_tokens"] > 0
    assert summary["eval_perplexity"] == pytest.approx(2.718281828 ** summary["eval_loss"], rel=1e-6)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2
    assert {"prompt", "response"} <= samples[0].keys()
    assert not list(tmp_path.glob("checkpoint-*"))
    assert "eval_loss" in (tmp_path / "model" / "README.md").read_text()
    stamp = (tmp_path / "model" / "config.json").stat().st_mtime_ns
    assert run_sft(folder, data, tmp_path, "--num_train_epochs", "12", "--per_device_train_batch_size", "4") == summary
    assert (tmp_path / "model" / "config.json").stat().st_mtime_ns == stamp


def test_held_out_loss_is_the_mean_over_tokens(folder, data, tmp_path, chat_format):
    held_out = write_rows(tmp_path / "held_out.jsonl", dialogue_rows(7, seed=9))
    summary = run_sft(folder, data, tmp_path / "run", "--eval_files", held_out, "--max_steps", "1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    examples, _ = sft_rows.encode_rows(dialogue_rows(7, seed=9), chat_format, 128)
    rows = sft_rows.to_dataset(examples, 128, packing=False)
    losses = torch.cat([token_losses(model, sft_rows.PackedCollator(PAD)([row])) for row in rows])
    assert summary["eval_tokens"] == len(losses)
    assert summary["eval_loss"] == pytest.approx(losses.mean().item(), abs=1e-4)


def test_lora_trains_and_saves_a_plain_model(folder, data, tmp_path):
    run_sft(folder, data, tmp_path, "--use_peft", "true", "--lora_r", "4", "--max_steps", "2")
    assert (weights(tmp_path) - weights_of(folder)).abs().max() > 1e-4
    assert (tmp_path / "model" / "adapter" / "adapter_model.safetensors").exists()


def named_weights(model_folder):
    return dict(AutoModelForCausalLM.from_pretrained(model_folder).named_parameters())


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_frozen_embeddings_stay_and_everything_else_learns(folder, data, tmp_path, checkpointing):
    run_sft(folder, data, tmp_path, "--freeze_embeddings", "true", "--gradient_checkpointing", checkpointing,
            "--max_steps", "2")  # fmt: skip
    before, after = named_weights(folder), named_weights(tmp_path / "model")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "embed_tokens" in name or "lm_head" in name}
    assert same


def test_a_killed_run_continues_to_the_same_weights(folder, data, tmp_path, monkeypatch):
    common = ("--per_device_train_batch_size", "2", "--max_steps", "4", "--save_steps", "2")
    run_sft(folder, data, tmp_path / "straight", *common)

    real = sft.RunFolderCallback.on_log

    def killed(self, args, state, control, logs=None, **kwargs):
        real(self, args, state, control, logs, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sft.RunFolderCallback, "on_log", killed)
    with pytest.raises(KeyboardInterrupt):
        run_sft(folder, data, tmp_path / "killed", *common)
    monkeypatch.setattr(sft.RunFolderCallback, "on_log", real)
    run_sft(folder, data, tmp_path / "killed", *common)
    assert torch.equal(weights(tmp_path / "straight"), weights(tmp_path / "killed"))


def test_user_mistakes(folder, data, tmp_path):
    with pytest.raises(UserError, match="max_length=8"):
        run_sft(folder, data, tmp_path / "a", "--max_length", "8")
    with pytest.raises(UserError, match="max_length=4096 and max_reply_tokens=1 tokens"):
        run_sft(folder, data, tmp_path / "c", "--max_length", "4096", "--max_reply_tokens", "1")
    with pytest.raises(UserError, match="max_reply_tokens: 0 leaves no reply"):
        run_sft(folder, data, tmp_path / "d", "--max_reply_tokens", "0")
    with pytest.raises(UserError, match="mix_weights has 2 numbers for 1"):
        run_sft(folder, data, tmp_path / "b", "--mix_weights", "1", "2")
