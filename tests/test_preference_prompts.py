"""Prompts out of preference data: tags, one a first user turn, nothing trained on among the held-out ones."""

import json
from pathlib import Path

import pytest
from tiny_models import save_tiny_policy

from configs.errors import UserError
from configs.preference_prompts_settings import PreferencePromptsSettings
from configs.records import write_jsonl
from rlhf.preference_prompts import draw, in_turn, main

FILES = ("helpfulness", "safety", "helpfulness_test", "safety_test")


def pair(*turns: str) -> dict[str, str]:
    """An HH-RLHF row; the last user turn is answered in two ways."""
    dialogue = "\n\nAssistant: Yes.".join(f"\n\nHuman: {turn}" for turn in turns)
    return {"chosen": f"{dialogue}\n\nAssistant: Good.", "rejected": f"{dialogue}\n\nAssistant: Bad."}


def turns(folder: Path, name: str) -> list[tuple[str, bool]]:
    """(first user turn, tag) of each row of a written file."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert all(row.keys() == {"prompt", "is_safety", "source"} for row in rows)
    return [(row["prompt"][0]["content"], row["is_safety"]) for row in rows]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_policy(tmp_path_factory.mktemp("model"))


@pytest.fixture
def flags(tmp_path, model) -> list[str]:
    rows = {
        "helpfulness": [pair("Cook?"), pair("Cook?", "How long?"), pair("Sing?"), pair("Read?"), pair("long " * 400)],
        "safety": [pair("Steal?"), pair("Fight?")],
        "helpfulness_test": [pair("Walk?"), pair("sing"), pair("Swim?"), pair("Long long " * 200), pair("Ski?")],
        "safety_test": [pair("Lie?"), pair("Cook"), pair("Cheat?"), pair("Spy?", "Why?"), pair("Spy?")],
    }
    words = ["--model_name_or_path", model, "--output_dir", str(tmp_path / "out"), "--max_prompt_tokens", "200"]
    for name in FILES:
        write_jsonl(tmp_path / f"{name}.jsonl", rows[name])
        words += [f"--{name}_files", str(tmp_path / f"{name}.jsonl")]
    return words


def test_the_files_hold_each_first_turn_once_and_no_tested_one_is_trained_on(flags, tmp_path):
    summary = main([*flags, "--num_validation", "2", "--num_evaluation", "4"])
    prompts, validation, evaluation = (
        turns(tmp_path / "out", name) for name in ("prompts", "validation_prompts", "evaluation_prompts")
    )
    assert [tag for _, tag in prompts] == [False, True] * 2  # two safety prompts, so two of the other kind
    assert {turn for turn, tag in prompts if tag} == {"Steal?", "Fight?"}
    assert {turn for turn, tag in prompts if not tag} < {"Cook?", "Sing?", "Read?"}
    assert [tag for _, tag in validation + evaluation] == [False, True] * 3
    # `sing` and `Cook` are trained on, in other spelling or as the other kind; `Long long ...` is too long.
    assert sorted(validation + evaluation) == [
        ("Cheat?", True), ("Lie?", True), ("Ski?", False), ("Spy?", True), ("Swim?", False), ("Walk?", False),
    ]  # fmt: skip
    assert (summary["train_helpfulness"], summary["train_too_long"], summary["test_too_long"]) == (5, 1, 1)
    assert (summary["prompts"], summary["validation_prompts"], summary["evaluation_prompts"]) == (4, 2, 4)


def test_a_long_training_dialogue_keeps_its_first_turn_out_of_the_test(flags, tmp_path):
    write_jsonl(tmp_path / "safety.jsonl", [pair("Steal?"), pair("Ski!", "long " * 400)])
    with pytest.raises(UserError, match="6 held-out prompts wanted, 4 are left"):  # two of each kind without `Ski?`
        main([*flags, "--num_validation", "2", "--num_evaluation", "4"])


def test_the_seed_draws_and_without_safety_files_nothing_is_tagged(flags, tmp_path):
    plain = [
        *flags[: flags.index("--safety_files")],
        "--helpfulness_test_files",
        str(tmp_path / "helpfulness_test.jsonl"),
    ]
    sizes = ["--num_validation", "1", "--num_evaluation", "2"]
    drawn = set()
    for seed in range(6):
        main([*plain, *sizes, "--seed", str(seed), "--num_prompts", "2"])
        prompts = turns(tmp_path / "out", "prompts")
        assert [tag for _, tag in prompts] == [False] * 2
        drawn.add(tuple(turn for turn, _ in prompts))
    assert len(drawn) > 1


def test_drawing_keeps_one_dialogue_a_first_turn_and_drops_the_seen():
    rows = [{"prompt": [{"role": "user", "content": text}], "n": n} for n, text in enumerate(("A", "a!", "B", "C"))]
    for seed in "xyz":
        drawn = draw(rows, {"c"}, seed)
        assert sorted(row["prompt"][0]["content"][0].lower() for row in drawn) == ["a", "b"]
        assert drawn == draw(rows, {"c"}, seed)
    assert in_turn(rows[:3], rows[3:]) == [rows[0], rows[3]]
    assert in_turn(rows[:3], []) == rows[:3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_validation", "9"], "num_validation . num_evaluation: 521 held-out prompts wanted, 6 are left"),
        (["--num_evaluation", "0"], "num_evaluation must be at least 1"),
        (["--max_reject_share", "1"], "max_reject_share"),
    ],
)
def test_a_mistake_is_named(flags, words, message):
    with pytest.raises(UserError, match=message):
        main([*flags, *words])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"helpfulness_files": ["a"]}, "helpfulness_test_files: name at least one"),
        ({"helpfulness_test_files": ["a"]}, "helpfulness_files: name at least one"),
        ({"helpfulness_files": ["a"], "helpfulness_test_files": ["b"], "safety_files": ["c"]}, "name both or neither"),
    ],
)
def test_files_that_are_missing_are_named(files, message):
    with pytest.raises(UserError, match=message):
        PreferencePromptsSettings(output_dir="o", model_name_or_path="m", **files)
