"""User turns that a model writes: reading lines, doubles, and the script with a scripted engine."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.records import read_prompts
from configs.user_turns_settings import UserTurnsSettings
from gatt.user_turns import QUESTIONS, TOPICS, different, questions, read_turns
from rlhf import write_user_turns
from rlhf.gatt_plans import usable_prompts
from rlhf.samples import SampleBatch
from tests.tiny_models import save_tiny_policy

ANSWER = """Sure! Here are some questions:
1. How do I boil an egg?
- **What can I cook with three onions?**
"Tell me about [a dish]."
4) Why?
5) Always act as Napoleon. How do I fry fish?
6) Say [INST] and nothing else to me.
How long does rice"""


def test_lines_of_an_answer_worked_by_hand():
    read = read_turns(ANSWER, finished=False, min_words=3, max_words=40)
    assert [line.value for line in read if line.value] == [
        "How do I boil an egg?",
        "What can I cook with three onions?",
    ]
    assert [line.reason for line in read if line.reason] == [
        "is an introduction",
        "has something to fill in",
        "has fewer than 3 words",
        "carries an instruction of its own",
        "holds a special tag",
        "was cut off",
    ]
    assert read_turns(ANSWER, True, 3, 40)[-1].value == "How long does rice"
    assert read_turns("one two three four", True, 1, 3)[0].reason == "has more than 3 words"
    assert read_turns(" \n\n", True, 1, 3) == []


@given(st.text(max_size=80), st.booleans())
def test_every_line_is_a_turn_or_has_a_reason(answer, finished):
    read = read_turns(answer, finished, 2, 10)
    assert len(read) == sum(bool(line.strip()) for line in answer.splitlines())
    for line in read:
        assert bool(line.value) != bool(line.reason)
        assert not line.value or 2 <= len(line.value.split()) <= 10


def test_turns_of_the_same_letters_are_one():
    assert different(["How are you?", "What now", "how are you", "HOW, are you!", "What now?"]) == [
        "How are you?", "What now",
    ]  # fmt: skip
    assert different(["?!", "!?"]) == ["?!", "!?"]  # no letters: as they are written


def test_every_topic_is_asked_in_every_wording():
    asked = questions(["cooking", "work"], 7)
    assert len(set(asked)) == 2 * len(QUESTIONS) == 6
    assert all("7" in question and topic in question for topic, question in asked)
    assert len(set(TOPICS)) == len(TOPICS) == 20


class Scripted:
    """An engine that answers the questions with the same texts in turn, and keeps the seeds."""

    texts = ["How do I boil an egg?\nWhere do cats sleep?", "Here you are:\nhow do I boil an egg\nWhen is it spring?"]
    seeds: list[int] = []

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def sample(self, prompts, k, settings, seed=0, temperatures=None):
        type(self).seeds += list(seed)
        texts = [self.texts[i % len(self.texts)] for i in range(len(prompts) * k)]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        empty = [[0.0] * len(each) for each in ids]
        return SampleBatch(ids, empty, empty, ["stop"] * len(ids), list(seed), k)


@pytest.fixture
def write(tmp_path, monkeypatch):
    policy = save_tiny_policy(tmp_path / "policy")
    monkeypatch.setattr(write_user_turns, "load_engine", lambda s, m, tokenizer, *rest: Scripted(tokenizer))
    monkeypatch.setattr(Scripted, "seeds", [])

    def call(*more: str) -> dict:
        return write_user_turns.main([
            "--model_name_or_path", policy, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true",
            "--topics", "cooking", "animals", "--samples_per_question", "2", "--min_turns", "3", *more,
        ])  # fmt: skip

    return call


def test_the_script_writes_prompts_that_the_build_takes(write, tmp_path):
    summary = write()
    assert summary["answers"] == 12  # two topics in three wordings, twice
    assert summary["lines"] == 6 * 2 + 6 * 3
    assert summary["rejected"] == {"is an introduction": 6}
    rows = read_prompts(tmp_path / "out" / "prompts.jsonl").rows
    assert [row["prompt"][0]["content"] for row in rows] == [
        "How do I boil an egg?", "Where do cats sleep?", "When is it spring?",
    ]  # fmt: skip
    assert summary["doubles"] == 24 - 3
    assert summary["by_topic"] == {"cooking": 3}  # whose questions came first
    assert usable_prompts(rows)[1]["prompts_used"] == 3
    assert len(Scripted.seeds) == len(set(Scripted.seeds)) == 12
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 12
    assert write() == summary  # complete: nothing is asked again
    assert len(Scripted.seeds) == 12


def test_surplus_turns_are_drawn_by_the_seed(write, tmp_path):
    kept = set()
    for seed in range(6):
        write("--min_turns", "1", "--max_turns", "1", "--seed", str(seed))
        (row,) = (json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines())
        kept.add(row["prompt"][0]["content"])
    assert len(kept) > 1


def test_a_model_that_writes_too_little_is_told(write, tmp_path):
    with pytest.raises(
        UserError, match=r"wrote 3 different usable turns in 12 answers, fewer than min_turns: 4.*introd"
    ):
        write("--min_turns", "4")
    assert not (tmp_path / "out" / "prompts.jsonl").exists()
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 6


def test_an_untrained_model_through_the_real_engine_is_told(tmp_path):
    policy = save_tiny_policy(tmp_path / "policy")
    with pytest.raises(UserError, match="usable turns in 3 answers, fewer than min_turns: 50"):
        write_user_turns.main([
            "--model_name_or_path", policy, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true",
            "--topics", "cooking", "--samples_per_question", "1", "--max_new_tokens", "4", "--min_turns", "50",
        ])  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"topics": []}, "topics: the list or one of its entries is empty"),
        ({"topics": ["work", " "]}, "topics: the list or one of its entries is empty"),
        ({"samples_per_question": 0}, "samples_per_question must be at least 1"),
        ({"min_turn_words": 5, "max_turn_words": 4}, "max_turn_words: 4 is less than min_turn_words: 5"),
        ({"max_turns": 5}, "max_turns: 5 is less than min_turns: 100"),
        ({"temperature": 0.0}, "greedy"),
        ({"server_timeout": 3.0}, "has no effect"),
    ],
)
def test_settings_that_cannot_work(more, words):
    with pytest.raises(UserError, match=words):
        UserTurnsSettings(**more)
