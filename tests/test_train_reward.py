"""The script: from files on disk to a scored, saved reward model. Tiny model, byte-level tokenizer made in process."""

import gzip
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_models import save_tiny_policy, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings, RunSettings
from configs.records import RATINGS
from configs.reward_settings import RewardSettings
from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf import cli
from rlhf.reward_inputs import read_inputs
from rlhf.train_reward import last_checkpoint, main
from rlhf.trainer_checkpoints import keep_newest, write_checksums

ROOT = Path(__file__).resolve().parents[1]
SAFETY = ("chosen_safe", "both_safe", "both_unsafe")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """A causal language model folder with a tokenizer of one token a byte, in the Llama 2 chat format."""
    folder = tmp_path_factory.mktemp("chat_model")
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=3, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def message(role, content):
    return {"role": role, "content": content}


def preference(i, **fields):
    """A learnable pair: the chosen response ends in "yes", the rejected one in "no"."""
    row = {
        "prompt": [message("user", f"question {i}")],
        "chosen": [message("assistant", f"{i} yes")],
        "rejected": [message("assistant", f"{i} no")],
        "rating": RATINGS[i % 4],
        "safety": SAFETY[i % 3],
        "source": "even" if i % 2 == 0 else "odd",
        "p_chosen": 0.9 if i % 4 == 0 else 0.7,
    }
    return row | fields


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def files(tmp_path):
    train = write(tmp_path / "train.jsonl", [preference(i) for i in range(24)])
    test = write(tmp_path / "test.jsonl", [preference(i) for i in range(100, 116)])
    return train, test


def arguments(chat_model, files, tmp_path, *more):
    return [
        "--model_name_or_path", str(chat_model), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true",
        "--train_files", str(files[0]), "--eval_files", str(files[1]), "--per_device_train_batch_size", "4",
        "--logging_steps", "1", *map(str, more),
    ]  # fmt: skip


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_model_that_has_learnt_nothing_is_warned_of(chat_model, files, tmp_path, caplog):
    main(arguments(chat_model, files, tmp_path, "--learning_rate", "1e-9"))
    (record,) = [record for record in caplog.records if "surely better than chance" in record.getMessage()]
    assert record.getMessage().startswith(f"{tmp_path / 'run'}: right in 0.")


def test_it_learns_and_reports_everything(chat_model, files, tmp_path, caplog):
    summary = main(
        arguments(
            chat_model, files, tmp_path, "--learning_rate", "1e-2", "--num_train_epochs", 6, "--min_warmup_steps", 1
        )
    )
    run = tmp_path / "run"
    assert "chance" not in caplog.text
    assert summary["accuracy"] > 0.9  # chance is 0.5
    assert summary["ci95"][0] < summary["accuracy"] <= summary["ci95"][1]
    assert list(summary["by_rating"]) == list(RATINGS)
    assert summary["ceiling"] == pytest.approx((0.9 + 3 * 0.7) / 4)
    assert summary["ceiling_by_rating"]["significantly_better"] == pytest.approx(0.9)
    assert {name: cell["count"] for name, cell in summary["by_source"].items()} == {"even": 8, "odd": 8}
    assert summary["steps"] == 36
    assert summary["unrated"] == summary["too_long"] == summary["test_prompts_in_training"] == 0
    assert summary["scores"]["chosen"]["mean"] > summary["scores"]["rejected"]["mean"]
    assert json.loads((run / "summary.json").read_text()) == summary
    assert yaml.safe_load((run / "settings.yaml").read_text())["margin"] == "small"
    logs = jsonl(run / "metrics.jsonl")
    assert logs[0]["train/loss"] > logs[-3]["train/loss"]
    assert logs[-1]["eval/accuracy"] == summary["accuracy"]
    assert not list((run / "checkpoints").iterdir())

    sample = jsonl(run / "samples.jsonl")[0]
    assert sample["chosen"] == "100 yes"
    # The folder alone gives the reported score: "<s>[INST] question 100 [/INST] 100 yes </s>", one token a byte
    tokenizer = PreTrainedTokenizerFast.from_pretrained(run / "model")
    ids = [1, *tokenizer.encode("[INST] question 100 [/INST]", add_special_tokens=False)]
    ids += [*tokenizer.encode(" 100 yes ", add_special_tokens=False), 2]
    assert score_ids(load_reward_model(run / "model"), [ids]).item() == pytest.approx(sample["r_chosen"], abs=1e-4)
    assert AutoModelForSequenceClassification.from_pretrained(run / "model").num_labels == 1
    assert "accuracy" in (run / "model" / "README.md").read_text()


def test_frozen_embeddings_stay(chat_model, files, tmp_path):
    main(arguments(chat_model, files, tmp_path, "--freeze_embeddings", "true", "--max_steps", 2))
    before, after = load_reward_model_of(chat_model), load_reward_model_of(tmp_path / "run" / "model")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"model.embed_tokens.weight"}


def load_reward_model_of(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).state_dict()


def test_a_complete_run_is_not_run_again(chat_model, files, tmp_path):
    call = arguments(chat_model, files, tmp_path, "--max_steps", 1)
    first = main(call)
    stamp = (tmp_path / "run" / "summary.json").stat().st_mtime_ns
    assert main(call)["accuracy"] == first["accuracy"]
    assert (tmp_path / "run" / "summary.json").stat().st_mtime_ns == stamp
    assert main([*call, "--margin", "large"])["margin"] == "large"  # other settings: another run


def test_an_interrupted_run_continues_and_other_settings_start_afresh(chat_model, files, tmp_path):
    call = arguments(chat_model, files, tmp_path, "--save_steps", 2, "--num_train_epochs", 1)
    first = main(call)
    run = tmp_path / "run"
    settings = yaml.safe_load((run / "settings.yaml").read_text())
    assert last_checkpoint(run, settings).name == "checkpoint-6"
    (run / "checkpoints" / "checkpoint-6" / "checksums.json").unlink()  # killed while it saved
    (run / "summary.json").unlink()
    assert last_checkpoint(run, settings).name == "checkpoint-4"
    assert last_checkpoint(run, settings | {"learning_rate": 1.0}) is None
    second = main(call)
    assert second["scores"] == first["scores"]
    steps = [row["step"] for row in jsonl(run / "metrics.jsonl") if "train/accuracy" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_killed_after_the_last_step_it_takes_no_other(chat_model, files, tmp_path):
    # 4 of the 6 steps of an epoch: the Trainer saves after the last one, and would go on from there.
    call = arguments(chat_model, files, tmp_path, "--save_steps", 2, "--max_steps", 4, "--learning_rate", "1e-2")
    first = main(call)
    (tmp_path / "run" / "summary.json").unlink()  # killed while it scored the test pairs
    second = main(call)
    assert (first["resumed_at_step"], second["resumed_at_step"], second["steps"]) == (0, 4, 4)
    assert second["scores"] == first["scores"]


def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(chat_model, files, tmp_path):
    call = arguments(chat_model, files, tmp_path, "--save_steps", 2, "--save_total_limit", 3)
    first = main(call)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in (4, 6):
        cut(checkpoints / f"checkpoint-{step}" / "model.safetensors")
    (tmp_path / "run" / "summary.json").unlink()
    second = main(call)
    assert second["resumed_at_step"] == 2
    assert second["scores"] == first["scores"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_other_data_in_the_same_file_are_another_run(chat_model, files, tmp_path):
    call = arguments(chat_model, files, tmp_path, "--save_steps", 2)
    first = main(call)
    write(files[0], [preference(i) for i in range(200, 224)])
    second = main(call)
    assert second["resumed_at_step"] == 0
    assert second["scores"] != first["scores"]


def test_another_number_of_processes_does_not_continue(tmp_path):
    (tmp_path / "settings.yaml").write_text("seed: 0\nprocesses: 2\n")
    assert last_checkpoint(tmp_path, {"seed": 0, "processes": 1}) is None  # nothing to continue
    folder = tmp_path / "checkpoints" / "checkpoint-4"
    folder.mkdir(parents=True)
    write_checksums(folder)
    assert last_checkpoint(tmp_path, {"seed": 0, "processes": 2}) == folder
    with pytest.raises(UserError, match="checkpoint-4 was written by 2 processes, and this run has 1"):
        last_checkpoint(tmp_path, {"seed": 0, "processes": 1})


def test_the_newest_checkpoints_are_kept_by_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-2", "checkpoint-11.bak"):
        (tmp_path / name).mkdir()
    keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11.bak", "checkpoint-9"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "harm", "fault"),
    [
        ("model.safetensors", cut, "model.safetensors was truncated or changed"),
        ("optimizer.pt", flip, "optimizer.pt was truncated or changed"),
        ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
        ("more.safetensors", Path.touch, "more.safetensors was added"),
        ("checksums.json", cut, "checksums.json is not readable"),
        ("checksums.json", lambda path: path.write_text("[]"), "checksums.json is not readable"),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_used(tmp_path, caplog, file, harm, fault):
    (tmp_path / "settings.yaml").write_text("seed: 0\n")
    for step in (4, 10):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
            (folder / name).write_bytes(f"{name} {step}".encode())
        write_checksums(folder)
    assert last_checkpoint(tmp_path, {"seed": 0}).name == "checkpoint-10"
    harm(tmp_path / "checkpoints" / "checkpoint-10" / file)
    assert last_checkpoint(tmp_path, {"seed": 0}).name == "checkpoint-4"
    assert f"checkpoint-10 is not used: {fault}" in caplog.text


@pytest.mark.slow
def test_killed_at_random_points_it_ends_with_the_weights_of_an_undisturbed_run(chat_model, files, tmp_path):
    def command(name):
        call = arguments(chat_model, files, tmp_path, "--save_steps", 1, "--num_train_epochs", 4)
        call[call.index("--output_dir") + 1] = str(tmp_path / name)
        return [sys.executable, "rlhf/train_reward.py", *call]

    quiet = {"cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command("whole"), **quiet, check=True, timeout=120)
    rng, folder, kills = random.Random(0), tmp_path / "killed" / "checkpoints", 0
    while kills < 4 and not (tmp_path / "killed" / "summary.json").exists():
        process = subprocess.Popen(command("killed"), **quiet)
        target = int(max((p.name.split("-")[1] for p in folder.glob("checkpoint-*")), key=int, default=0)) + 2
        while process.poll() is None and not (folder / f"checkpoint-{target}").exists():
            time.sleep(0.002)
        time.sleep(rng.random() * 0.1)  # while it saves, between two steps, inside a step
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills >= 2
    subprocess.run(command("killed"), **quiet, check=True, timeout=120)
    whole, killed = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "killed"))
    assert whole == killed
    logs = [jsonl(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    losses = [[row["train/loss"] for row in log if "train/accuracy" in row] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 24


@pytest.mark.parametrize("extra", [[], ["--use_peft", "true", "--lora_r", "4"]], ids=["full", "lora"])
def test_real_command_line(chat_model, files, tmp_path, extra):
    config = tmp_path / "reward.yaml"
    config.write_text("objective: safety\nmargin: large\nmax_steps: 2\ntrain_sampling_strategy: group_by_length\n")
    command = [sys.executable, "rlhf/train_reward.py", "--config", str(config), *arguments(chat_model, files, tmp_path)]
    done = subprocess.run([*command, *extra], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["objective"], summary["margin"], summary["steps"]) == ("safety", "large", 2)
    assert set(summary["by_safety"]) == set(SAFETY)
    assert jsonl(tmp_path / "run" / "metrics.jsonl")[0]["train/safety_loss"] > 0
    assert (tmp_path / "run" / "model" / "adapter").exists() == bool(extra)
    load_reward_model(tmp_path / "run" / "model")


def test_hh_transcripts_count_as_unrated(chat_model, tmp_path):
    def rows(numbers):
        return "".join(
            json.dumps({
                "chosen": f"\n\nHuman: a {i}\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
                "rejected": f"\n\nHuman: a {i}\n\nAssistant: b\n\nHuman: c\n\nAssistant: no",
            }) + "\n"
            for i in numbers
        )  # fmt: skip

    paths = []
    for name, numbers in (("train", range(6)), ("helpful-test", range(10, 13)), ("harmless-test", range(20, 24))):
        paths.append(tmp_path / f"{name}.jsonl.gz")
        with gzip.open(paths[-1], "wt") as file:
            file.write(rows(numbers))
    call = arguments(
        chat_model,
        (paths[0], paths[1]),
        tmp_path,
        "--max_steps",
        2,
        "--config",
        ROOT / "configs/reward_hh_harmless.yaml",
    )
    call.insert(call.index(str(paths[1])) + 1, str(paths[2]))
    summary = main(call)
    assert (summary["train_pairs"], summary["unrated"], summary["test_unrated"]) == (6, 6, 7)
    assert sorted(cell["count"] for cell in summary["by_source"].values()) == [3, 4]
    assert summary["by_rating"] == {}
    assert summary["ceiling"] is None


def test_long_pairs_are_set_aside_until_they_are_too_many(chat_model, files, tmp_path):
    rows = [preference(i) for i in range(30)] + [preference(30, chosen=[message("assistant", "x" * 300)])]
    write(files[0], rows)
    call = arguments(chat_model, files, tmp_path, "--max_steps", 1, "--max_length", 100)
    assert main(call)["too_long"] == 1
    (refused,) = jsonl(tmp_path / "run" / "too-long-train.jsonl")
    assert "max_length is 100" in refused["reason"]
    with pytest.raises(UserError, match="1 of 31 train pairs do not fit 100 tokens"):
        main([*call, "--max_reject_share", "0.01"])


@pytest.mark.parametrize(
    ("flags", "message_part"),
    [
        (["--objective", "honesty"], "objective: must be one of helpfulness, safety"),
        (["--margin", "huge"], "margin: must be one of none, small, large"),
        (["--margin_table", "1", "2"], "margin_table needs 4 values"),
        (["--mix_weights", "1", "2"], "mix_weights: 2 weights for 1 train_files"),
        (["--mix_rows", "0"], "mix_rows: must be at least 1, got 0"),
        (["--leaked_prompts", "ignore"], "leaked_prompts: must be one of drop, keep, stop"),
        (["--load_in_4bit", "true"], "load_in_4bit: 4-bit weights cannot be trained themselves; add use_peft: true"),
        (["--learning_rat", "1"], "learning_rate"),
        (["--learning_rate", "0"], "learning_rate: must be at least"),
        (["--adam_beta1", "1.5"], "adam_beta1: must be from 0 to 1, got 1.5"),
        (["--max_steps", "0"], "max_steps: must be above 0, or -1"),
        (["--num_train_epochs", "0"], "num_train_epochs: must be at least"),
        (["--save_steps", "-1"], "save_steps: must be at least 0"),
        (["--save_total_limit", "0"], "save_total_limit: must be at least 1"),
        (["--center_rewards_coefficient", "-1"], "center_rewards_coefficient: must be at least 0"),
        (["--token_budget", "-1"], "token_budget: must be at least 0"),
        (["--model_name_or_path", "no/such/folder"], "no/such/folder"),
        (["--train_files", "no_such_file.jsonl"], "no_such_file.jsonl"),
    ],
)
def test_mistakes_are_named(chat_model, files, tmp_path, flags, message_part):
    with pytest.raises(UserError, match=message_part):
        main([*arguments(chat_model, files, tmp_path), *flags])


def test_safety_loss_needs_safety_labels(chat_model, files, tmp_path):
    rows = [preference(i) for i in range(8)]
    for row in rows:
        del row["safety"]
    write(files[0], rows)
    with pytest.raises(UserError, match="no training row has a `safety` field"):
        main([*arguments(chat_model, files, tmp_path), "--objective", "safety"])


def test_bad_rows_stop_the_run_before_training(chat_model, files, tmp_path):
    write(files[0], [preference(i) for i in range(6)] + [preference(7, rating="great")])
    with pytest.raises(UserError, match="max_reject_share"):
        main(arguments(chat_model, files, tmp_path))
    (refused,) = jsonl(tmp_path / "run" / "rejected-train.jsonl")
    assert refused["line"] == 7


@pytest.mark.parametrize("objective", ["helpfulness", "safety"])
@pytest.mark.parametrize(("size", "rate"), [("7b", 1e-5), ("13b", 1e-5), ("70b", 5e-6)])
def test_llama2_configs_carry_the_numbers_of_the_paper(size, rate, objective):
    path = str(ROOT / f"configs/llama2_{size}_reward_{objective}.yaml")
    settings, model, _ = cli.parse(RewardSettings, ModelSettings, RunSettings, args=["--config", path])
    assert settings.per_device_train_batch_size * settings.gradient_accumulation_steps == 512
    assert (settings.learning_rate, settings.min_lr_rate, settings.warmup_ratio) == (rate, 0.1, 0.03)
    assert (settings.adam_beta1, settings.adam_beta2, settings.adam_epsilon) == (0.9, 0.95, 1e-5)
    assert (settings.weight_decay, settings.max_grad_norm, settings.num_train_epochs) == (0.1, 1.0, 1)
    assert settings.min_warmup_steps == 5
    assert settings.safety_weight == (1.0 if objective == "safety" else 0.0)
    assert model.use_peft
    assert model.load_in_4bit == (size == "70b")


def test_without_test_files_prompts_are_held_out_and_shares_are_kept(chat_model, files, tmp_path):
    write(files[1], [preference(i, source="other") for i in range(200, 240)])
    call = arguments(chat_model, files, tmp_path, "--max_steps", 1, "--eval_fraction", 0.3)
    call[call.index("--eval_files") : call.index("--eval_files") + 2] = [str(files[1]), "--mix_weights", "3", "1"]
    summary = main(call)
    first = summary["train_by_source"]["even"] + summary["train_by_source"]["odd"]
    assert summary["train_by_source"]["other"] == first // 3
    assert 0 < first < 24
    assert summary["test_pairs"] > 0
    assert summary["test_prompts_in_training"] == 0
    (entry, other) = summary["mix"]
    assert entry["file"] == str(files[0])
    assert entry["read"] == 24
    assert entry["held_out"] == 24 - entry["available"] > 0
    assert entry["share"] == pytest.approx(first / (first + first // 3))
    assert entry["share"] + other["share"] == pytest.approx(1)


def test_answers_to_another_question_can_be_added(chat_model, files, tmp_path):
    summary = main(arguments(chat_model, files, tmp_path, "--max_steps", 1, "--mismatched_share", 0.5))
    drawn = sum(entry["drawn"] for entry in summary["mix"])
    assert summary["mismatched"] == summary["train_by_source"]["mismatched"] == round(drawn / 2) > 0
    assert summary["train_pairs"] == drawn + summary["mismatched"]


@pytest.fixture
def untidy(files, tmp_path):
    """Two training files with duplicates, leaks and a contradiction; the test file asks questions 100 to 115."""
    first = [preference(1), preference(100), preference(2), preference(1, rating="better")]
    swapped = preference(2)
    swapped["chosen"], swapped["rejected"] = swapped["rejected"], swapped["chosen"]
    near = preference(5)
    near["prompt"] = [*preference(102)["prompt"], message("assistant", "well"), message("user", "go on")]
    copied = preference(4, source="copy")
    rows = [preference(3), preference(4), copied, preference(101), preference(2), swapped, near]
    write(files[0], first)
    second = write(tmp_path / "second.jsonl", rows)
    return files[0], second, files[1]


def test_duplicates_and_leaks_are_dropped_traced_and_reported(chat_model, untidy, tmp_path, caplog, capsys):
    first, second, test = untidy
    call = arguments(chat_model, (first, test), tmp_path, "--max_steps", 1)
    call.insert(call.index(str(first)) + 1, str(second))
    summary = main(call)
    # first: 1, 2 stay. second: 3, 4, the swapped 2 and the near leak stay.
    assert [list(entry.values())[1:] for entry in summary["mix"]] == [
        # read, held out, other half, leaked, near leaks, duplicates, contradictions, available, drawn, repeats, share
        [4, 0, 0, 1, 0, 1, 0, 2, 2, 0, pytest.approx(1 / 3)],
        [7, 0, 0, 1, 1, 2, 1, 4, 4, 0, pytest.approx(2 / 3)],
    ]
    assert summary["train_pairs"] == 6
    assert summary["test_prompts_in_training"] == 0
    dropped = jsonl(tmp_path / "run" / "dropped-train.jsonl")
    assert [(row["file"], row["line"], row["reason"], row["detail"]) for row in dropped] == [
        (str(first), 2, "test prompt", f"as {test}:1"),
        (str(first), 4, "duplicate", f"as {first}:1"),
        (str(second), 3, "duplicate", f"as {second}:2"),
        (str(second), 4, "test prompt", f"as {test}:2"),
        (str(second), 5, "duplicate", f"as {first}:3"),
    ]
    assert dropped[1]["row"]["rating"] == "better"
    assert f"2 training pairs ({first}:2, {second}:4) with a prompt that is also tested: dropped" in caplog.text
    assert f"3 training pairs ({first}:4, {second}:3, {second}:5) that repeat an earlier one: dropped" in caplog.text
    assert "question" not in caplog.text  # no message is quoted
    assert "near leaks" in capsys.readouterr().out


def test_leaks_and_duplicates_can_be_kept_or_stop_the_run(chat_model, untidy, tmp_path, caplog):
    first, second, test = untidy
    call = arguments(chat_model, (first, test), tmp_path, "--max_steps", 1)
    with pytest.raises(UserError, match=r"leaked_prompts: 1 training pairs \(.*train.jsonl:2\) with a prompt that is"):
        main([*call, "--leaked_prompts", "stop"])
    assert not (tmp_path / "run" / "summary.json").exists()
    main(call)
    assert len(jsonl(tmp_path / "run" / "dropped-train.jsonl")) == 2
    summary = main([*call, "--leaked_prompts", "keep", "--deduplicate", "false"])
    assert [summary["train_pairs"], summary["test_prompts_in_training"]] == [4, 1]
    assert (summary["mix"][0]["leaked"], summary["mix"][0]["duplicates"]) == (1, 1)
    assert "kept: the accuracy flatters" in caplog.text
    assert not (tmp_path / "run" / "dropped-train.jsonl").exists()
    call.insert(call.index(str(first)) + 1, str(first))  # the second file is the first again
    with pytest.raises(UserError, match="source 2 without any row"):
        main([*call, "--mix_weights", "1", "1"])


def test_a_total_repeats_a_small_file_only_after_all_its_pairs(chat_model, files, tmp_path):
    small = write(tmp_path / "small.jsonl", [preference(i, source="small") for i in range(50, 53)])
    call = arguments(chat_model, files, tmp_path, "--max_steps", 1, "--mix_weights", "2", "1", "--mix_rows", "24")
    call.insert(call.index(str(files[0])) + 1, str(small))
    summary = main(call)
    assert [(e["available"], e["drawn"], e["repeats"]) for e in summary["mix"]] == [(24, 16, 0), (3, 8, 5)]
    assert summary["train_by_source"]["small"] == 8
    assert summary["train_pairs"] == 24


def test_halves_share_no_prompt_in_any_file_and_under_any_seed(tmp_path):
    rows = [preference(i) for i in range(40)]
    later = {"prompt": [*rows[0]["prompt"], message("assistant", "well"), message("user", "go on")]}
    files = [write(tmp_path / "a.jsonl", rows[:30]), write(tmp_path / "b.jsonl", [*rows[:19:-1], rows[0] | later])]
    test = write(tmp_path / "test.jsonl", [preference(i) for i in range(100, 120)])
    chat_format = load_chat_format(tiny_tokenizer())

    def read(half, seed=0, files=files, **options):
        settings = RewardSettings(
            train_files=list(map(str, files)), eval_files=[str(test)], prompt_half=half, **options
        )
        inputs = read_inputs(settings, chat_format, seed, None)
        return {row["prompt"][0]["content"] for row in inputs.train_rows}, inputs

    first, second = read("first"), read("second", seed=1)
    assert first[0].isdisjoint(second[0])
    assert first[0] | second[0] == {f"question {i}" for i in range(40)}
    assert 10 <= len(first[0]) <= 30  # of 40, by a hash
    assert read("first", seed=1, files=files[::-1], mix_weights=[1, 1])[0] <= first[0]
    assert read("first", files=files[1:])[0] == first[0] & {f"question {i}" for i in [0, *range(20, 40)]}
    assert [len(inputs.test_rows) for _, inputs in (first, second)] == [20, 20]
    for _, inputs in (first, second):
        assert [entry["read"] for entry in inputs.report] == [30, 21]
        assert all(e["read"] == e["other_half"] + e["duplicates"] + e["available"] for e in inputs.report)
    assert first[1].report[0]["other_half"] + second[1].report[0]["other_half"] == 30
    whole = read("all")
    assert len(whole[0]) == 40
    assert {entry["other_half"] for entry in whole[1].report} == {0}
    # Which half is part of what a run claims: a change of the hash would let a judge see its model's prompts.
    assert sorted(first[0])[:3] == ["question 1", "question 10", "question 13"]
    # What is held out by fraction is not the beginning of one half.
    settings = RewardSettings(train_files=[str(files[0])], eval_fraction=0.5, prompt_half="first")
    inputs = read_inputs(settings, chat_format, 0, None)
    held_out = {row["prompt"][0]["content"] for row in inputs.test_rows}
    assert held_out & first[0]
    assert held_out & second[0]
    with pytest.raises(UserError, match="prompt_half"):
        RewardSettings(train_files=["x"], prompt_half="third")


@pytest.mark.parametrize("pad", [True, False], ids=["own pad token", "as Llama 2's base"])
def test_it_starts_from_a_base_and_from_an_earlier_reward_model(files, tmp_path, pad):
    base = save_tiny_policy(tmp_path / "base", pad=pad)
    first = main(arguments(base, files, tmp_path, "--max_steps", 2, "--learning_rate", "1e-2"))
    ours = tmp_path / "run" / "model"
    again = arguments(ours, files, tmp_path, "--max_steps", 1, "--learning_rate", "1e-12", "--weight_decay", "0")
    again[again.index("--output_dir") + 1] = str(tmp_path / "again")
    assert main(again)["scores"]["chosen"]["mean"] == pytest.approx(first["scores"]["chosen"]["mean"], abs=1e-5)
