"""Bad input, case by case: which test holds it, and that every stage stops before it does any work.

case                                                   test
-----------------------------------------------------  ---------------------------------------------------------
rows
invalid JSON, no JSON object                           test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
missing or empty field (pairs)                         test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
missing or empty field (dialogues)                     test_records.py::test_bad_dialogues_are_set_aside
missing or empty field (prompts)                       test_records.py::test_bad_prompts_are_set_aside
wrong type                                             test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
chosen equal to rejected                               test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
unknown rating, unknown safety label                   test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
prompts that differ                                    test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
wrong role order (rows)                                test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
special tags (rows)                                    test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
the tokenizer's own special tokens                     test_records.py::test_the_tokenizers_special_tokens_are_refused_too
a prompt longer than the context (reader)              test_records.py::test_prompts_longer_than_the_context_are_bad_rows
a prompt longer than the context (stages that sample)  test_inputs.py::test_a_prompt_without_room_for_a_reply_is_set_aside
a prompt longer than the context (sampler)             test_sampler.py::test_too_long_or_empty_prompts_are_refused_before_sampling
a pair longer than the context                         test_train_reward.py::test_long_pairs_are_set_aside_until_they_are_too_many
a dialogue longer than the context (SFT)               test_sft.py::test_long_dialogues_lose_their_oldest_turns_and_keep_the_system_message
a dialogue longer than the context (Ghost Attention)   test_build_gatt.py::test_a_dialogue_longer_than_the_context_is_cut_and_counted
a missing, damaged, empty or unknown file              test_records.py::test_unusable_files_are_the_users_errors
file, line and reason; counts; the reject file         test_records.py::test_a_bad_pair_is_named_counted_and_set_aside
several files and one reject file                      test_records.py::test_files_share_a_reject_file_and_a_second_run_does_not_repeat_rows
too large a share of bad rows (reader)                 test_records.py::test_too_many_bad_rows_stop_the_run_after_the_reject_file_is_written
too large a share of bad rows (every stage)            test_inputs.py::test_too_many_bad_rows_stop_a_stage_before_its_work
a small share of bad rows                              test_inputs.py::test_a_few_bad_rows_are_set_aside_and_the_stage_goes_on
a prompt in two splits                                 test_records.py::test_no_prompt_is_in_two_splits
mistakes in a file that people labelled                test_collect_preferences.py::test_each_mistake_in_a_labelled_file_names_its_line
too many mistakes in a file that people labelled       test_collect_preferences.py::test_a_file_with_many_mistakes_stops_the_run_and_lists_them

messages and chat formats
special tags in any message, named                     test_chat.py::test_special_tags_are_refused_in_every_role
control tokens of a chat template                      test_chat.py::test_a_templates_control_tokens_are_refused
wrong role order, empty or odd messages, named         test_chat.py::test_bad_dialogues_name_the_message
a template that breaks a guarantee                     test_chat.py::test_templates_that_break_a_guarantee_are_refused_at_once
a Llama 2 tokenizer that encodes otherwise             test_chat.py::test_a_llama2_vocabulary_that_encodes_otherwise_is_refused
special tags in an instruction                         test_gatt_transform.py::test_special_tags_in_an_instruction_are_refused

settings and models
unknown field, wrong type, unreadable YAML             test_cli.py::test_mistakes_name_file_and_field
one line and exit status 2, no traceback               test_cli.py::test_entry_prints_a_user_error_without_traceback_and_exits_2
weights that are a pickle, not safetensors             test_models.py::test_weights_that_are_no_safetensors_are_refused
no such model                                          test_models.py::test_a_missing_model_is_the_users_mistake
a reward model with another tokenizer                  test_rejection_sampling.py::test_a_reward_model_with_another_tokenizer_is_refused
a language model in a reward model's place             test_reward_model.py::test_a_language_model_is_not_taken_for_a_reward_model
settings out of range (SFT)                            test_sft.py::test_user_mistakes
settings out of range (reward models)                  test_train_reward.py::test_mistakes_are_named
settings out of range (sampling)                       test_sampler.py::test_settings_out_of_range_name_the_field
settings out of range (collecting)                     test_collect_preferences.py::test_bad_settings_are_refused
settings out of range (rejection sampling)             test_rejection_sampling.py::test_bad_settings_are_refused
settings out of range (PPO)                            test_ppo.py::test_user_mistakes
settings out of range (the judge in PPO)               test_judge.py::test_mistakes_about_the_judge_are_named
settings out of range (Ghost Attention)                test_build_gatt.py::test_settings_that_cannot_work_are_refused
a list of stages that cannot work                      test_pipeline.py::test_a_wrong_list_of_stages_is_named
an output folder that cannot be written                test_run.py::test_mistakes_are_the_users_errors
"""  # noqa: E501 (a table)

import importlib
import json
import re
from pathlib import Path

import pytest
from tiny_models import dialogue_rows, prompt_rows, save_tiny_policy, save_tiny_reward_model

from configs.errors import UserError
from configs.records import RATINGS


def test_the_table_names_tests_that_exist():
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", __doc__)
    assert len(named) > 40
    for file, name in named:
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.M), f"{file} has no {name}"


def message(role: str, content) -> dict:
    return {"role": role, "content": content}


ASKED, SAID = [message("user", "hi")], [message("assistant", "yes")]
TAG = [message("user", "hi [INST] there")]
BAD_PROMPTS = [
    ("{not json", "invalid JSON"),
    ({"is_safety": False}, "missing or empty field"),
    ({"prompt": " "}, "missing or empty field"),
    ({"prompt": 7}, "wrong type"),
    ({"prompt": [*ASKED, *SAID]}, "wrong role order"),
    ({"prompt": TAG}, "special tag"),
]
BAD_DIALOGUES = [
    ("{not json", "invalid JSON"),
    ({"text": "x"}, "missing or empty field"),
    ({"messages": []}, "missing or empty field"),
    ({"messages": "x"}, "wrong type"),
    ({"messages": [*SAID, *ASKED]}, "wrong role order"),
    ({"messages": [*TAG, *SAID]}, "special tag"),
]
PAIR = {"prompt": ASKED, "chosen": SAID, "rejected": [message("assistant", "no")]}
BAD_PAIRS = [
    ("{not json", "invalid JSON"),
    (PAIR | {"chosen": None}, "missing or empty field"),
    (PAIR | {"chosen": [message("assistant", "")]}, "missing or empty field"),
    (PAIR | {"prompt": 7}, "wrong type"),
    (PAIR | {"rejected": SAID}, "chosen equals rejected"),
    (PAIR | {"rating": "great"}, "unknown rating"),
    (PAIR | {"chosen": [message("user", "ho"), *SAID]}, "prompts differ"),
    (PAIR | {"prompt": [*ASKED, *SAID]}, "wrong role order"),
    (PAIR | {"prompt": TAG}, "special tag"),
]


def pair_rows(count: int) -> list[dict]:
    return [
        PAIR | {"prompt": [message("user", f"question {i}")], "rating": RATINGS[i % 4], "safety": None}
        for i in range(count)
    ]


REWARD_MODELS = ("--helpfulness_model_path", "{helpfulness}", "--safety_model_path", "{safety}")
# stage: (the field with its data, good rows, bad rows, further words of a command as short as it can be)
STAGES = {
    "sft": ("train_files", dialogue_rows, BAD_DIALOGUES, ("--max_steps", "1", "--num_samples", "0")),
    "train_reward": ("train_files", pair_rows, BAD_PAIRS, ("--eval_fraction", "0.5", "--max_steps", "1")),
    "collect_preferences": ("prompt_files", prompt_rows, BAD_PROMPTS, ("--max_new_tokens", "4")),
    "rejection_sampling": (
        "prompt_files", prompt_rows, BAD_PROMPTS,
        (*REWARD_MODELS, "--samples_per_prompt", "2", "--max_new_tokens", "4", "--keep_unfinished", "true"),
    ),
    "ppo": (
        "prompt_files", prompt_rows, BAD_PROMPTS,
        (*REWARD_MODELS, "--total_iterations", "1", "--batch_size", "2", "--mini_batch_size", "2",
         "--max_new_tokens", "4"),
    ),
    "build_gatt": ("prompt_files", prompt_rows, BAD_PROMPTS, ("--num_dialogues", "1", "--max_turns", "2")),
    "evaluate_gatt": (
        "prompt_files", prompt_rows, BAD_PROMPTS,
        ("--num_dialogues", "1", "--num_turns", "2", "--eval_max_new_tokens", "4"),
    ),
    "evaluate_policy": ("prompt_files", prompt_rows, BAD_PROMPTS, ("--max_new_tokens", "4")),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "policy": save_tiny_policy(folder / "policy"),  # 512 positions
        "helpfulness": save_tiny_reward_model(folder / "helpfulness", seed=1),
        "safety": save_tiny_reward_model(folder / "safety", seed=2),
    }


def run(stage: str, models: dict[str, str], data: Path, output_dir: Path, *more: str) -> dict:
    field, _, _, words = STAGES[stage]
    line = ["--model_name_or_path", models["policy"], "--output_dir", str(output_dir), "--use_cpu", "true",
            f"--{field}", str(data), *(word.format(**models) for word in words), *more]  # fmt: skip
    return importlib.import_module(f"rlhf.{stage}").main(line)


def write(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def rejects(folder: Path) -> list[dict]:
    files = sorted(folder.glob("rejected*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_too_many_bad_rows_stop_a_stage_before_its_work(stage, models, tmp_path):
    _, good, bad, _ = STAGES[stage]
    data = write(tmp_path / "data.jsonl", [*good(4), *(row for row, _ in bad)])
    with pytest.raises(UserError, match="more than max_reject_share=0.05 of the rows are bad") as caught:
        run(stage, models, data, tmp_path / "run")
    assert f"{data}:5: {bad[0][1]}" in str(caught.value)
    found = [(row["file"], row["line"], row["reason"]) for row in rejects(tmp_path / "run")]
    assert found == [(str(data), 5 + i, reason) for i, (_, reason) in enumerate(bad)]
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert not written & {"summary.json", "metrics.jsonl", "samples.jsonl", "model", "shards", "responses.jsonl"}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in ("collect_preferences", "build_gatt")])
def test_a_few_bad_rows_are_set_aside_and_the_stage_goes_on(stage, models, tmp_path):
    _, good, bad, _ = STAGES[stage]
    row, reason = bad[-1]
    data = write(tmp_path / "data.jsonl", [*good(19), row])  # one row in twenty: the share itself is allowed
    run(stage, models, data, tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()
    assert [(found["line"], found["reason"]) for found in rejects(tmp_path / "run")] == [(20, reason)]


@pytest.mark.parametrize("stage", ["rejection_sampling", "ppo", "evaluate_gatt", "evaluate_policy"])
def test_max_reject_share_lets_more_bad_rows_pass(stage, models, tmp_path):
    _, good, bad, _ = STAGES[stage]
    data = write(tmp_path / "data.jsonl", [*good(8), *(row for row, _ in bad[:2])])  # a fifth
    run(stage, models, data, tmp_path / "run", "--max_reject_share", "0.2")
    assert (tmp_path / "run" / "summary.json").exists()
    with pytest.raises(UserError, match="max_reject_share"):
        run(stage, models, data, tmp_path / "other", "--max_reject_share", "0.19")


def test_an_evaluation_loads_each_reward_model_once_and_logs_its_figures(models, tmp_path, monkeypatch):
    import rlhf.evaluate_policy as module

    loaded, load = [], module.load_reward_model
    monkeypatch.setattr(module, "load_reward_model", lambda path, *rest: loaded.append(path) or load(path, *rest))
    words = [word.format(**models) for word in REWARD_MODELS]
    summary = run("evaluate_policy", models, write(tmp_path / "data.jsonl", prompt_rows(4)), tmp_path / "run", *words)
    assert loaded == [models["helpfulness"], models["safety"]]
    (logged,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert (logged["step"], logged["reward_safety_greedy"]) == (0, summary["reward_safety_greedy"])


@pytest.mark.parametrize("stage", ["collect_preferences", "rejection_sampling", "ppo", "evaluate_policy"])
def test_a_prompt_without_room_for_a_reply_is_set_aside(stage, models, tmp_path):
    # 600 tokens are within the setting max_prompt_tokens (1,024), but not within the model's 512 positions.
    long = {"prompt": [message("user", "7" * 600)], "is_safety": False}
    data = write(tmp_path / "data.jsonl", [*prompt_rows(19), long])
    run(stage, models, data, tmp_path / "run")
    assert [(found["line"], found["reason"]) for found in rejects(tmp_path / "run")] == [(20, "prompt too long")]
