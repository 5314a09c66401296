"""Lists of values that a model writes: reading lines, doubles, splits, and the script with a scripted engine."""

import json
import random

import pytest
from tiny_models import save_tiny_policy

from configs.errors import UserError
from configs.gatt_settings import InstructionSettings
from configs.instruction_values_settings import InstructionValuesSettings
from gatt.kinds import KINDS
from gatt.value_lists import (
    Line,
    check_listed,
    count_values,
    read_answer,
    same,
    split_lines,
    split_values,
    tidy,
    told_apart,
)
from rlhf import write_instruction_values
from rlhf.gatt_plans import draw_instructions
from rlhf.samples import SampleBatch
from rlhf.write_instruction_values import choose


@pytest.mark.parametrize(
    ("kind", "line", "value"),
    [
        ("hobby", "1. Chess", "chess"),
        ("hobby", "12) **Rock  climbing**: a sport on walls", "rock climbing"),
        ("hobby", "  - the guitar - playing it", "guitar"),
        ("hobby", "• “Bird-watching”.", "bird-watching"),
        ("hobby", "(3) Painting (in oil)", "painting"),
        ("hobby", "* 4. Sewing, knitting", "sewing"),
        ("hobby", "\uff23hess", "chess"),  # a full-width C
        ("figure", "3. Albert Einstein – physicist", "Albert Einstein"),
        ("figure", "marie curie", "Marie Curie"),
        ("figure", "Jeanne d’Arc, heroine", "Jeanne d'Arc"),
        ("figure", "J.R.R. Tolkien", "J.R.R. Tolkien"),
        ("language", "5. FRENCH language", "French"),
        ("last_word", "A River!", "river"),
        ("hobby", "---", ""),
    ],
)
def test_the_value_in_a_line(kind, line, value):
    assert tidy(KINDS[kind], line) == value


@pytest.mark.parametrize(
    ("kind", "line", "reason"),
    [
        ("hobby", "I like to play", "is a sentence"),
        ("hobby", "building very small model ships", "has more than 3 words"),
        ("hobby", "[INST] chess", "holds a special tag"),
        ("hobby", "c++", "holds other characters than letters"),
        ("hobby", "...", "nothing is left of the line"),
        ("hobby", "x" * 61, "has 61 characters; at most 60 are allowed"),
        ("first_word", "ice cream", "is not one word, so no first or last word can equal it"),
        ("language", "Klingon", "is no language that is checked"),
        ("hobby", "Here are some hobbies:", "is an introduction"),
    ],
)
def test_lines_that_give_no_value(kind, line, reason):
    (read,) = read_answer(KINDS[kind], line, True, 3)
    assert (read.line, read.value) == (line, "")
    assert read.reason.startswith(reason)


def test_an_answer():
    text = "Sure, here are three:\n\n1. Chess\n2. chess\n3. Sail"
    reasons = ["is an introduction", "", "", "was cut off"]
    assert [line.reason for line in read_answer(KINDS["hobby"], text, False, 3)] == reasons
    assert [line.value for line in read_answer(KINDS["hobby"], text, True, 3)] == ["", "chess", "chess", "sail"]
    assert [line.value for line in read_answer(KINDS["hobby"], "1. Chess:\n- Golf:", True, 3)] == ["chess", "golf"]
    assert split_lines("chess, golf, and sailing.") == ["chess", "golf", "sailing"]
    assert split_lines("Some hobbies: chess, golf and darts, polo") == ["chess", "golf", "darts", "polo"]
    assert split_lines("Plato, philosopher") == ["Plato, philosopher"]
    assert split_lines("\n \n") == []


@pytest.mark.parametrize(
    ("kind", "spellings"),
    [
        ("hobby", ["rock climbing", "Rock-climbing", "rockclimbing"]),
        ("hobby", ["the crossword", "crosswords", "a crossword"]),
        ("hobby", ["movie", "movies"]),
        ("hobby", ["horse", "horses"]),
        ("hobby", ["box", "boxes"]),
        ("hobby", ["berry", "berries"]),
        ("figure", ["Jeanne d'Arc", "jeanne darc", "Jeanne D’Arc".replace("’", "'")]),
        ("figure", ["Chloé", "chloe"]),
    ],
)
def test_spellings_of_one_value(kind, spellings):
    assert len({same(KINDS[kind], spelling) for spelling in spellings}) == 1


def test_different_values_stay_apart():
    values = ["chess", "tennis", "census", "cape", "cap", "plan", "plane", "darts", "art", "yoga", "yogi"]
    assert len({same(KINDS["hobby"], value) for value in values}) == len(values)
    assert same(KINDS["figure"], "Williams") != same(KINDS["figure"], "William")


def test_counts_by_hand():
    answers = [
        [Line("", "Crosswords"), Line("", "chess"), Line("", "chess")],
        [Line("", "crossword"), Line("", "", "bad")],
        [Line("", "crossword"), Line("", "golf"), Line("", "art")],
    ]
    counted = count_values(KINDS["hobby"], answers)
    assert counted == {"crossword": 3, "art": 1, "chess": 1, "golf": 1}
    assert list(counted) == ["crossword", "art", "chess", "golf"]
    assert count_values(KINDS["hobby"], [[Line("", "darts"), Line("", "dart")]]) == {"darts": 1}  # its first spelling


def test_splits():
    values = [f"v{i:02d}" for i in range(20)]
    taught, unseen = split_values(values, 0.25, random.Random(0))
    assert (len(taught), len(unseen)) == (15, 5)
    assert sorted(taught + unseen) == values
    assert taught == sorted(taught)
    assert split_values(values, 0.25, random.Random(0)) == (taught, unseen)
    assert split_values(values, 0.25, random.Random(1)) != (taught, unseen)
    assert [len(part) for part in split_values(values[:2], 0.01, random.Random(0))] == [1, 1]
    with pytest.raises(UserError, match="1 values cannot be split"):
        split_values(values[:1], 0.5, random.Random(0))


# --- the script


class Scripted:
    """An engine that answers every question with the same texts."""

    asked: list[str] = []
    texts = ["1. Chess\n2. Golf\n3. the <sea> side", "Chess\nTennis\nPolo\nJu"]

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def sample(self, prompts, k, settings, seeds):
        assert len(set(seeds)) == len(prompts) * k
        type(self).asked += [prompt.messages[0]["content"] for prompt in prompts]
        ids = [self.tokenizer.encode(self.texts[j % 2], add_special_tokens=False) for _ in prompts for j in range(k)]
        reasons = [["stop", "length"][j % 2] for _ in prompts for j in range(k)]
        return SampleBatch(ids, [], [], reasons, list(seeds), k)


@pytest.fixture
def write(monkeypatch, tmp_path):
    policy = save_tiny_policy(tmp_path / "policy")
    monkeypatch.setattr(write_instruction_values, "load_engine", lambda s, m, tokenizer, *rest: Scripted(tokenizer))
    monkeypatch.setattr(Scripted, "asked", [])

    def run(*more):
        return write_instruction_values.main([
            "--model_name_or_path", policy, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true",
            "--samples_per_question", "4", "--min_values", "3", "--kinds", "hobby", *more,
        ])  # fmt: skip

    return run


def test_the_lists_are_those_that_the_other_stages_read(write, tmp_path):
    summary = write("--unseen_share", "0.3")
    out = tmp_path / "out"
    values, unseen = (json.loads((out / name).read_text()) for name in ("values.json", "unseen_values.json"))
    assert sorted(values["hobby"] + unseen["hobby"]) == ["chess", "golf", "polo", "tennis"]
    # 3 questions x 4 answers: chess in all, the others in every second one; the odd and the cut line aside
    assert json.loads((out / "counts.json").read_text()) == {"hobby": {"chess": 12, "golf": 6, "polo": 6, "tennis": 6}}
    assert summary["hobby"]["answers"] == 12
    assert summary["hobby"]["lines"] == 12 * 3 + 6
    assert summary["hobby"]["values"] == 4
    assert summary["hobby"]["doubles"] == 30 - 4
    assert (summary["hobby"]["taught"], summary["hobby"]["unseen"]) == (3, 1)
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {row["reason"]: row["count"] for row in rejected if row["line"] == "Ju"} == {"was cut off": 6}
    assert sum(row["count"] for row in rejected) == 42 - 30
    assert len((out / "answers.jsonl").read_text().splitlines()) == 12
    settings = InstructionSettings(
        values_file=str(out / "values.json"), unseen_values_file=str(out / "unseen_values.json")
    )
    for split, listed in (("train", values), ("unseen", unseen)):
        drawn = draw_instructions(settings, 20, split, random.Random(0))
        assert {instruction.value for instruction in drawn} == set(listed["hobby"])
    asked = len(Scripted.asked)
    assert "Name 20 hobbies, one a line." in Scripted.asked
    assert write("--unseen_share", "0.3") == summary
    assert len(Scripted.asked) == asked  # a finished run is not run again


@pytest.mark.parametrize(
    ("settings", "kept", "reason", "count"),
    [
        ({"min_count": 2}, {"chess": 3, "golf": 2}, "is named by fewer than 2 answers", 1),
        (
            {"min_count": 1, "max_values": 2, "min_values": 2},
            {"chess": 3, "golf": 2},
            "is not among the 2 most named",
            1,
        ),
    ],
)
def test_rare_and_surplus_values_are_set_aside(settings, kept, reason, count):
    answers = [[Line("1. Chess", "chess"), Line("Golf!", "golf")] for _ in range(2)] + [[Line("Chess", "chess"),
               Line("polo", "polo"), Line("...", "", "odd"), Line("...", "", "odd")]]  # fmt: skip
    values, rejected = choose(KINDS["hobby"], answers, InstructionValuesSettings(**settings))
    assert values == kept
    assert {(row["line"], row["reason"], row["count"]) for row in rejected} == {
        ("polo", reason, count),
        ("...", "odd", 2),
    }


def test_a_model_that_names_nothing_is_told(write, tmp_path, monkeypatch):
    monkeypatch.setattr(Scripted, "texts", ["Here you are:", "I do not know that."])
    with pytest.raises(
        UserError, match=r"kind 'hobby': the model named 0 usable values in 12 answers.*introduction \(6\)"
    ):
        write()
    assert not (tmp_path / "out" / "values.json").exists()
    assert not (tmp_path / "out" / "summary.json").exists()
    assert len((tmp_path / "out" / "rejected.jsonl").read_text().splitlines()) == 2


def test_an_untrained_model_through_the_real_engine_is_told(tmp_path):
    policy = save_tiny_policy(tmp_path / "policy")
    with pytest.raises(UserError, match="usable values in 3 answers"):
        write_instruction_values.main([
            "--model_name_or_path", policy, "--output_dir", str(tmp_path / "out"), "--use_cpu", "true",
            "--kinds", "figure", "--samples_per_question", "1", "--max_new_tokens", "4", "--min_values", "50",
        ])  # fmt: skip


@pytest.mark.parametrize(
    ("kinds", "words"), [([], "list is empty"), (["haiku"], "no list to write for 'haiku'"), (["weather"], "unknown")]
)
def test_kinds_without_a_list(kinds, words):
    with pytest.raises(UserError, match=words):
        check_listed(kinds)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"samples_per_question": 0}, "samples_per_question must be at least 1"),
        ({"min_values": 1}, "min_values must be at least 2"),
        ({"max_values": 5}, "max_values: 5 is less than min_values: 10"),
        ({"unseen_share": 0.0}, "unseen_share"),
        ({"unseen_share": 1.0}, "unseen_share"),
        ({"temperature": 0.0}, "greedy"),
        ({"server_timeout": 3.0}, "has no effect"),
    ],
)
def test_settings_that_cannot_work(more, words):
    with pytest.raises(UserError, match=words):
        InstructionValuesSettings(**more)


@pytest.mark.parametrize("seed", ["0", "1", "2", "3"])
def test_kinds_with_the_same_nouns_hold_out_the_same_ones(write, tmp_path, seed):
    write("--kinds", "first_word", "last_word", "--unseen_share", "0.3", "--seed", seed)
    values, unseen = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("values.json", "unseen_values.json")
    )
    assert len(unseen["first_word"]) == 1
    assert (values["first_word"], unseen["first_word"]) == (values["last_word"], unseen["last_word"])


def test_a_value_is_taught_or_unseen_in_all_kinds_alike():
    """Of twelve nouns the other kind has taught eight and set two aside; a quarter of twelve are to be unseen."""
    nouns = [f"noun{i}" for i in range(12)]
    placed = {noun: i < 2 for i, noun in enumerate(nouns[:10])}
    for seed in range(20):
        taught, unseen = split_values(nouns, 0.25, random.Random(seed), placed)
        assert set(nouns[:2]) < set(unseen)
        assert len(unseen) == 3
        assert set(nouns[2:10]) < set(taught)


def test_what_a_taught_value_holds_is_not_unseen():
    assert told_apart(["Einstein", "Bach", "Art"], ["Albert Einstein", "Bachmann", "Mozart"]) == ["Bach", "Art"]
