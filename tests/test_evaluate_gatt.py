"""Parts of the persistence measurement: to the limit, a new instruction, helpfulness, tables, a baseline run."""

import json
import random

import pytest
from rich.console import Console
from tiny_models import save_tiny_policy, save_tiny_reward_model, tiny_tokenizer, write_rows

import rlhf.dialogues
from configs.chat import load_chat_format
from configs.errors import UserError
from configs.gatt_settings import PersistenceSettings
from gatt.instructions import parse_instruction
from gatt.kinds import KINDS
from gatt.synth import Draft
from rlhf import evaluate_gatt
from rlhf.gatt_plans import draw_others, draw_turns_without_end
from rlhf.persistence_helpfulness import reward_scorer, score_played, shift
from rlhf.persistence_tables import table_30, tables

FIGURES = [KINDS["figure"].make(v) for v in ("Napoleon", "Mozart", "Homer", "Dante")]


class Attentive:
    """Obeys the newest instruction of its context; dialogue 3 stays with the first; a context holds `room` turns."""

    room = 8

    def __init__(self, *args):
        pass

    def __call__(self, rows, contexts):
        return [self.reply(row, context) for row, context in zip(rows, contexts)]

    def reply(self, row, context):
        if sum(m["role"] == "user" for m in context) > self.room - row:
            return Draft("", "too_long")
        given = [parsed[0] for m in context if m["role"] != "assistant" and (parsed := parse_instruction(m["content"]))]
        return Draft(f"I am {given[0 if row == 3 else -1].value}. yes." if given else "yes.")


def measure(monkeypatch, **more):
    monkeypatch.setattr(rlhf.dialogues, "DialogueEngine", Attentive)
    length = more.pop("turns", 6)
    turns = [[f"q{d}{t}" for t in range(length)] for d in range(4)]
    gold = more.pop("gold", lambda messages, reply: float("yes" in reply))
    reward = more.pop("reward", None)
    settings = PersistenceSettings(**{"num_dialogues": 4, "num_turns": 6, "answer_check": "gold"} | more)
    tokenizer = type("T", (), {"pad_token_id": 3})()
    chat_format = type("F", (), {"encode_prompt": staticmethod(lambda messages: [])})()
    return evaluate_gatt.run_persistence(
        None, tokenizer, chat_format, turns, FIGURES, settings, gold=gold, reward=reward
    )


def test_dialogues_are_played_to_the_context_limit(monkeypatch):
    table = measure(monkeypatch, num_turns=0, turns=100)
    assert table["last_turn"]["turns"] == {"fewest": 5, "median": 6.5, "most": 8}
    assert (table["last_turn"]["share"], table["last_turn"]["dialogues"]) == (1.0, 4)
    assert table["missing"] == {"6": 1, "7": 2, "8": 3}
    assert "9" not in table
    assert table["mean"]["1-8"]["turns"] == 8


def test_a_changed_instruction_is_measured(monkeypatch):
    table = measure(monkeypatch, change_turn=3)
    change = table["change"]
    assert change["turn"] == 3
    assert [change["new"][t] for t in ("1", "2")] == [0.75, 0.75]
    assert change["new"]["missing"] == {"4": 1}
    assert change["old_before"]["mean"] == 1.0
    # Turns 3 to 5 have four replies each, turn 6 three, and those of dialogue 3 alone show the first instruction.
    assert change["old_after"]["mean"] == pytest.approx((3 * 0.25 + 0) / 4)
    (sample,) = [s for s in table["samples"] if s["values"] == "seen, changed"][:1]
    users = [m["content"] for m in sample["messages"] if m["role"] == "user"]
    assert [parse_instruction(text) is not None for text in users[1:]] == [False, True, False, False, False]
    assert "change" not in measure(monkeypatch)


def test_a_change_that_no_dialogue_comes_to_is_said(monkeypatch, caplog):
    assert measure(monkeypatch, num_turns=0, turns=100, change_turn=9)["change"] is None
    assert "no dialogue came to turn 9" in caplog.text


def test_other_values_of_the_same_kind():
    settings = PersistenceSettings(kinds=["figure", "hobby"])
    old = [*FIGURES, KINDS["hobby"].make("chess")]
    others = draw_others(settings, old, "unseen", random.Random(0))
    assert [o.kind for o in others] == [o.kind for o in old]
    assert all(a.value != b.value for a, b in zip(others, old))


def test_turns_without_end_use_every_prompt_before_one_comes_again():
    prompts = [{"prompt": [{"role": "user", "content": f"p{i}"}]} for i in range(10)]
    first, second = draw_turns_without_end(prompts, 2, 100, random.Random(0))
    assert len(first) == 26
    assert set(first[:10]) == set(first[10:20]) == {f"p{i}" for i in range(10)}
    assert len(set(first[20:])) == 6
    assert first != second


def test_shift_takes_the_dialogue_as_its_unit():
    # Dialogue means over the turns that both have: 0.5 -> 0.75, 1 -> 1.25; dialogue 2 has no turn in both.
    found = shift([[0.0, 1.0, 9.0], [1.0], [5.0]], [[0.5, 1.0], [1.25, 7.0], []])
    assert found == {"before": 0.75, "after": 1.0, "change": 0.25, "ci95": [0.25, 0.25], "dialogues": 2}
    assert shift([[]], [[1.0]]) is None


def test_helpfulness_of_plain_and_of_instructed_replies(monkeypatch):
    # What only obeys is left out before gold looks: "I am Napoleon. yes." is judged as "yes."
    seen = []

    def gold(messages, reply):
        seen.append(reply)
        return 0.5

    table = measure(monkeypatch, gold=gold, reward=lambda pairs: [float(len(user)) for user, _ in pairs])
    assert set(seen) == {"yes."}
    assert table["plain_scores"] == {
        "gold": [[0.5] * n for n in (6, 6, 6, 5)],
        "reward": [[3.0] * n for n in (6, 6, 6, 5)],
    }
    assert table["helpfulness_under_instruction"]["seen"]["change"] == 0.0
    assert "plain_scores" in measure(monkeypatch, answer_check="none")
    assert measure(monkeypatch, answer_check="none")["plain_scores"] == {}


def test_a_reward_model_reads_each_turn_by_itself():
    chat = load_chat_format(tiny_tokenizer())
    read = []

    def score_ids(ids):
        read.extend(ids)
        return [float(len(each)) for each in ids]

    replies = [["a cat", ""], ["[INST] x [/INST]"]]
    scores = score_played(reward_scorer(score_ids, chat), [["the dog", "red", "blue"], ["red"]], replies)
    user = [{"role": "user", "content": "red"}]
    assert (
        read[0]
        == chat.encode_dialogue(
            [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "a cat"}]
        ).input_ids
    )
    assert read[1] == read[2] == [*chat.encode_prompt(user), chat.stop_ids[-1]]  # empty, and one that poses as a turn
    assert [len(each) for each in scores] == [2, 1]


def figures(share):
    interval = {"low": share - 0.01, "high": share + 0.01}
    table = {str(t): share for t in range(1, 21)} | {"ci95": {str(t): [share - 0.1, share + 0.1] for t in range(1, 21)}}
    table["mean"] = {"1-20": {"mean": share, **interval, "turns": 20}}
    table["by_kind_mean"] = {"figure": table["mean"]}
    table["last_turn"] = {"share": share, "ci95": [0.0, 1.0], "dialogues": 9}
    return table


def test_table_30_has_both_policies_side_by_side():
    baseline, trained = figures(0.25) | {"unseen": figures(0.125)}, figures(0.75) | {"unseen": figures(0.5)}
    baseline["4"] = None  # no dialogue came as far
    moved = {"gold": {"before": 0.5, "after": 0.25, "change": -0.25, "ci95": [-0.5, 0.125], "dialogues": 9}}
    summary = {"baseline": baseline, "trained": trained, "helpfulness_change": moved}
    table = table_30(summary)
    assert list(table) == ["2", "4", "6", "10", "20", "1-20", "last"]
    assert table["6"]["baseline"]["seen"] == {"share": 0.25, "ci95": [0.15, 0.35]}
    assert table["1-20"]["trained"]["unseen"] == {"share": 0.5, "ci95": [0.49, 0.51]}
    by_turn, by_kind, helpfulness = tables(summary)
    assert by_turn.columns == ["baseline", "baseline, values never taught", "trained", "trained, values never taught"]
    assert by_turn.rows[1] == (["4"], [("–", ""), ("12.5", "[2.5, 22.5]"), ("75.0", "[65.0, 85.0]"),
                                       ("50.0", "[40.0, 60.0]")])  # fmt: skip
    assert by_kind.rows[0][1][0] == ("25.0", "[24.0, 26.0]")
    assert helpfulness.rows[0][1] == [("0.500", ""), ("0.250", ""), ("-0.250", "[-0.500, +0.125]")]
    console = Console(width=120, record=True, quiet=True)
    console.print(by_turn.rich())
    trained["change"] = {"turn": 5, "new": figures(0.5), "old_before": None, "old_after": trained["mean"]["1-20"]}
    (changes,) = [t for t in tables(summary) if t.title == "Another instruction at turn 5"]
    assert changes.columns == ["trained"]
    assert [cells[0][0] for _, cells in changes.rows] == ["–", "75.0", "50.0", "50.0", "50.0"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("persistence")
    rows = [{"prompt": [{"role": "user", "content": f"{i} red cat"}], "is_safety": False} for i in range(6)]
    return [
        "--prompt_files", write_rows(folder / "prompts.jsonl", rows), "--num_dialogues", "2", "--num_turns", "3",
        "--eval_max_new_tokens", "4", "--max_length", "400", "--use_cpu", "true", "--change_turn", "2",
        "--helpfulness_reward_model", save_tiny_reward_model(folder / "reward", 0),
    ], [save_tiny_policy(folder / name, seed) for seed, name in enumerate(("before", "after"))]  # fmt: skip


def test_a_finished_run_can_be_the_baseline(inputs, tmp_path, capsys):
    words, (before, after) = inputs
    both = ["--model_name_or_path", after, "--baseline_model_name_or_path", before, "--output_dir", f"{tmp_path}/both"]
    whole = evaluate_gatt.main(words + both)
    assert "Table 30" in capsys.readouterr().out
    assert set(whole["helpfulness_change"]) == {"reward"}
    assert whole["helpfulness_change"]["reward"]["change"] != 0
    evaluate_gatt.main([*words, "--model_name_or_path", before, "--output_dir", f"{tmp_path}/first"])

    def after_first(folder, first="first", *more):
        paths = ["--baseline_dir", f"{tmp_path}/{first}", "--output_dir", f"{tmp_path}/{folder}"]
        return evaluate_gatt.main([*words, "--model_name_or_path", after, *paths, *more])

    parts = after_first("second")
    for name in ("baseline", "trained", "table_30", "helpfulness_change"):
        assert parts[name] == whole[name]
    with pytest.raises(UserError, match="measured with another seed"):
        after_first("third", "first", "--seed", "1")
    with pytest.raises(UserError, match="holds no finished run"):
        after_first("third", "none")
    assert not (tmp_path / "third").exists()
    assert json.loads((tmp_path / "both" / "plain_scores.json").read_text()).keys() == {"reward"}
