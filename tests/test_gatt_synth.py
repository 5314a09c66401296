"""Synthesis of dialogues: a scripted engine says what it was asked, and nothing may be lost silently."""

from dataclasses import replace

import pytest

from configs.errors import UserError
from gatt.kinds import KINDS
from gatt.synth import Change, Draft, counts, obedience_by_turn, plan_dialogues, synthesise

NAPOLEON = KINDS["figure"].make("Napoleon")
CHESS = KINDS["hobby"].make("chess")


def obeys(instruction, response):
    return instruction.value in response


class Script:
    """Replies from a list for each row, in order; keeps a tape of what it was asked."""

    def __init__(self, *replies):
        self.replies = [list(r) for r in replies]
        self.tape = []

    def __call__(self, rows, contexts):
        self.tape.append((list(rows), [[m["content"] for m in c] for c in contexts]))
        drafts = [self.replies[row].pop(0) for row in rows]
        return [d if isinstance(d, Draft) else Draft(d) for d in drafts]


def test_turns_are_batched_and_the_instruction_stands_on_each():
    plans = plan_dialogues([["a", "b"], ["c"]], [NAPOLEON, CHESS], ["system", "user"])
    script = Script(["I, Napoleon.", "Napoleon!"], ["chess."])
    first, second = synthesise(plans, script, obeys)
    assert script.tape == [
        ([0, 1], [["Always act as Napoleon.", "a"], ["You enjoy chess. c"]]),
        ([0], [["Always act as Napoleon.", "a", "I, Napoleon.", "Always act as Napoleon. b"]]),
    ]
    assert [m["content"] for m in first.messages] == ["a", "I, Napoleon.", "b", "Napoleon!"]  # plain
    assert (first.cut, second.cut) == ("", "")
    assert first.record("Figure: Napoleon.") == {
        "messages": [
            {"role": "system", "content": "Figure: Napoleon."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "I, Napoleon."},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "Napoleon!"},
        ],
        "train_on": "all",
    }


def test_a_reply_that_fails_is_drawn_again_and_then_cuts_the_dialogue():
    plans = plan_dialogues([["a", "b", "c"]] * 2, [NAPOLEON] * 2, ["user"] * 2)
    script = Script(["no", "Napoleon 1", "Napoleon 2", "Napoleon 3"], ["Napoleon 1", "no", "no"])
    saved, cut = synthesise(plans, script, obeys, max_candidates=2)
    assert [rows for rows, _ in script.tape] == [[0, 1], [0, 1], [0, 1], [0]]  # no one waits for a redraw
    assert [m["content"] for m in saved.messages[1::2]] == ["Napoleon 1", "Napoleon 2", "Napoleon 3"]
    assert [m["content"] for m in cut.messages] == ["a", "Napoleon 1"]
    assert cut.cut == "disobeyed"
    assert counts([saved, cut]) == {
        "planned": 2, "finished": 1, "empty": 0, "replies_kept": 4, "replies_sampled": 7, "turns_not_made": 2,
        "cut_disobeyed": 1, "cut_unfinished": 0, "cut_too_long": 0, "cut_failed": 0,
    }  # fmt: skip
    # turn 1: row 0's first draft failed, row 1's passed; turn 2: passed, failed; turn 3: passed
    assert obedience_by_turn([saved, cut]) == {"1": 0.5, "2": 0.5, "3": 1.0}


def test_unfinished_and_too_long_are_told_apart():
    plans = plan_dialogues([["a", "b"]] * 2, [NAPOLEON] * 2, ["user"] * 2)
    script = Script(
        [Draft("Napoleon is", "unfinished"), Draft("Napoleon is", "unfinished")],
        ["Napoleon.", Draft("", "too_long")],  # and it is not asked a second time: there would be no more room
    )
    unfinished, long = synthesise(plans, script, obeys, max_candidates=2)
    assert (unfinished.cut, unfinished.messages) == ("unfinished", [])
    assert (long.cut, long.turns) == ("too_long", 1)
    assert script.replies == [[], []]
    assert counts([unfinished, long])["empty"] == 1
    assert obedience_by_turn([unfinished, long]) == {"1": 0.5}  # turn 2 was never sampled


def test_the_judge_picks_among_replies_that_obey():
    plans = plan_dialogues([["a"]], [NAPOLEON], ["user"])
    script = Script(["Napoleon x", "a much better reply that disobeys", "Napoleon, longer"])

    def judge(rows, contexts, candidates, instructions):
        assert rows == [0]
        assert [context[-1]["content"] for context in contexts] == ["Always act as Napoleon. a"]
        assert candidates == [["Napoleon x", "Napoleon, longer"]]
        return [[len(c) for c in candidates[0]]]

    (dialogue,) = synthesise(plans, script, obeys, max_candidates=3, judge=judge)
    assert dialogue.messages[-1]["content"] == "Napoleon, longer"
    assert dialogue.drafts == 3


def test_the_judge_sees_all_dialogues_whose_turn_is_drawn_at_once():
    plans = plan_dialogues([["a", "b"], ["a", "b"], ["a"]], [NAPOLEON, None, NAPOLEON], ["user"] * 3)
    script = Script(
        ["Napoleon 1", "Napoleon 22", "Napoleon 333", "Napoleon 4"],
        ["yes", "no", "yes", "nono"],
        ["disobeys", "disobeys too"],
    )
    seen = []

    def judge(rows, contexts, candidates, instructions):
        seen.append((rows, [context[-1]["content"] for context in contexts], candidates, instructions))
        return [[-len(text) for text in texts] for texts in candidates]  # the shortest; among equals the earliest

    first, plain, cut = synthesise(plans, script, obeys, max_candidates=2, judge=judge)
    assert seen == [
        ([0, 1], ["Always act as Napoleon. a", "a"], [["Napoleon 1", "Napoleon 22"], ["yes", "no"]], [NAPOLEON, None]),
        ([0, 1], ["Always act as Napoleon. b", "b"], [["Napoleon 333", "Napoleon 4"], ["yes", "nono"]],
         [NAPOLEON, None]),
    ]  # fmt: skip
    assert [m["content"] for m in first.messages] == ["a", "Napoleon 1", "b", "Napoleon 4"]
    assert [m["content"] for m in plain.messages] == ["a", "no", "b", "yes"]
    assert (cut.cut, cut.messages, cut.drafts) == ("disobeyed", [], 2)


@pytest.mark.parametrize("slot", ["system", "user"])
def test_turns_by_themselves_carry_their_instruction_each(slot):
    """The dialogue that comes out is the same as with whole contexts: only what was asked differs."""
    change = Change(3, KINDS["figure"].make("Mozart"), "Figure: Mozart.")
    plan, plain = plan_dialogues([["a", "b", "c"], ["d", "e", "f"]], [NAPOLEON, None], [slot] * 2)
    asked = []

    def reply(rows, contexts):
        asked.extend(contexts)
        return [Draft(text) for text in (f"Napoleon {len(asked)}" if len(asked) < 5 else "Mozart", "yes")]

    judged = []

    def judge(rows, contexts, candidates, instructions):
        judged.extend(contexts)
        return [[0.0] for _ in candidates]

    dialogue, other = synthesise([replace(plan, change=change), plain], reply, obeys, 1, judge, context="turn")
    texts = ["Always act as Napoleon.", "Always act as Napoleon.", "Always act as Mozart."]
    expected = []
    for text, user, alone in zip(texts, "abc", "def", strict=True):
        if slot == "system":
            expected.append([{"role": "system", "content": text}, {"role": "user", "content": user}])
        else:
            expected.append([{"role": "user", "content": f"{text} {user}"}])
        expected.append([{"role": "user", "content": alone}])
    assert asked == judged == expected
    assert [m["content"] for m in dialogue.messages] == ["a", "Napoleon 2", "b", "Napoleon 4", "c", "Mozart"]
    assert [m["content"] for m in other.messages] == ["d", "yes", "e", "yes", "f", "yes"]
    assert dialogue.record("Figure: Napoleon.")["messages"][-2]["content"] == "Figure: Mozart. c"


def test_another_context_is_refused():
    with pytest.raises(UserError, match="unknown context 'all'; use one of: dialogue, turn"):
        synthesise(plan_dialogues([["a"]], [NAPOLEON], ["user"]), Script([]), obeys, context="all")


def test_room_that_ends_after_a_draft_leaves_the_drafts_to_choose_from():
    plans = plan_dialogues([["a"], ["a"]], [NAPOLEON] * 2, ["user"] * 2)
    script = Script(["Napoleon", Draft("", "too_long")], ["no", Draft("", "too_long")])
    kept, cut = synthesise(plans, script, obeys, 3, lambda rows, contexts, texts, given: [[0.0] for _ in texts])
    assert ([m["content"] for m in kept.messages], kept.drafts, kept.cut) == (["a", "Napoleon"], 1, "")
    assert (cut.messages, cut.cut) == ([], "disobeyed")


def test_a_draft_that_the_engine_failed_on_is_drawn_again():
    plans = plan_dialogues([["a"]] * 3, [NAPOLEON] * 3, ["user"] * 3)
    failed = Draft("", "failed")
    script = Script([failed, "Napoleon"], [failed, failed], [failed, "no"])
    kept, lost, disobeyed = synthesise(plans, script, obeys, max_candidates=2)
    assert ([m["content"] for m in kept.messages], kept.drafts) == (["a", "Napoleon"], 1)
    assert kept.first_draft_obeyed == [True]  # of what was sampled
    assert (lost.cut, lost.drafts, lost.first_draft_obeyed) == ("failed", 0, [])
    assert (disobeyed.cut, disobeyed.first_draft_obeyed) == ("disobeyed", [False])
    assert counts([kept, lost, disobeyed])["cut_failed"] == 1


def test_a_judge_that_leaves_a_reply_without_a_score_is_told():
    plans = plan_dialogues([["a"]], [NAPOLEON], ["user"])
    with pytest.raises(ValueError, match=r"gave \[1\] scores for \[2\] replies"):
        synthesise(plans, Script(["Napoleon", "Napoleon!"]), obeys, 2, lambda *_: [[0.0]])


@pytest.mark.parametrize(
    ("turns", "instructions", "slots", "words"),
    [
        ([], [], [], "no user turns"),
        ([["a"]], [], ["user"], "1 dialogues, 0 instructions and 1 slots"),
        ([["a"], []], [NAPOLEON] * 2, ["user"] * 2, "dialogue 1 has zero user turns"),
        ([["a", " "]], [NAPOLEON], ["user"], "dialogue 0 has an empty user turn"),
    ],
)
def test_contradicting_lists_are_refused(turns, instructions, slots, words):
    with pytest.raises(UserError, match=words):
        plan_dialogues(turns, instructions, slots)


def test_no_candidates_is_refused():
    with pytest.raises(UserError, match="max_candidates is 0"):
        synthesise(plan_dialogues([["a"]], [NAPOLEON], ["user"]), Script(["Napoleon"]), obeys, max_candidates=0)


def test_a_new_instruction_is_sampled_under_and_replaces_the_first():
    change = Change(2, KINDS["figure"].make("Mozart"), "Figure: Mozart.")
    plans = plan_dialogues([["a", "b", "c"], ["a", "b"]], [NAPOLEON] * 2, ["user"] * 2)
    plans = [replace(plan, change=change) for plan in plans]
    # The second reply of dialogue 0 obeys both at first: that is no change. Dialogue 1 never changes and is cut.
    script = Script(["Napoleon", "Mozart, not Napoleon", "Mozart", "Mozart!"], ["Napoleon", "Napoleon", "Napoleon"])
    whole, cut = synthesise(plans, script, obeys, max_candidates=2)
    assert script.tape[-1] == ([0], [[
        "Always act as Napoleon. a", "Napoleon", "Always act as Mozart. b", "Mozart", "Always act as Mozart. c"
    ]])  # fmt: skip
    assert [m["content"] for m in whole.messages] == ["a", "Napoleon", "b", "Mozart", "c", "Mozart!"]  # plain
    assert whole.record("Figure: Napoleon.") == {
        "messages": [
            {"role": "user", "content": "Figure: Napoleon. a"},
            {"role": "assistant", "content": "Napoleon"},
            {"role": "user", "content": "Figure: Mozart. b"},
            {"role": "assistant", "content": "Mozart"},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": "Mozart!"},
        ],
        "train_on": "all",
    }
    assert (whole.change, cut.change, cut.cut) == (change, None, "disobeyed")
    assert [m["content"] for m in cut.record("Act.")["messages"]] == ["Act. a", "Napoleon"]


def test_the_judge_is_told_the_instruction_that_holds():
    change = Change(2, KINDS["figure"].make("Mozart"), "Figure: Mozart.")
    (plan,) = plan_dialogues([["a", "b"]], [NAPOLEON], ["user"])
    told = []

    def judge(rows, contexts, candidates, instructions):
        told.append((contexts[0][-1]["content"], instructions[0].value))
        return [[0.0] * len(each) for each in candidates]

    script = Script(["Napoleon", "Napoleon", "Mozart", "Mozart"])
    synthesise([replace(plan, change=change)], script, obeys, 2, judge)
    assert told == [("Always act as Napoleon. a", "Napoleon"), ("Always act as Mozart. b", "Mozart")]
