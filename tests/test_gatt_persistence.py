"""Persistence by turn: numbers worked out by hand or from published tables."""

import pytest

from configs.errors import UserError
from gatt.persistence import Observation, by_turn, change_table, last_turn, range_mean, since, summarise

# two dialogues; the second breaks off after turn 2
OBSERVATIONS = [
    Observation(0, 1, "figure", True),
    Observation(0, 2, "figure", True, answer_ok=False),  # says the word, does not answer: must not count
    Observation(0, 3, "figure", False),
    Observation(1, 1, "hobby", True),
    Observation(1, 2, "hobby", True),
]


def test_a_turn_counts_only_if_it_obeys_and_answers():
    assert by_turn(OBSERVATIONS) == {1: (2, 2), 2: (1, 2), 3: (0, 1)}


def test_summary():
    summary = summarise(OBSERVATIONS, 4, 2, ranges=((1, 20), (2, 3), (6, 20)))
    assert [summary[str(turn)] for turn in range(1, 5)] == [1.0, 0.5, 0.0, None]
    assert summary["by_kind"] == {"figure": {"1": 1.0, "2": 0.0, "3": 0.0}, "hobby": {"1": 1.0, "2": 1.0}}
    assert summary["obeyed"] == {"1": 1.0, "2": 1.0, "3": 0.0, "4": None}
    assert summary["answered"] == {"1": 1.0, "2": 0.5, "3": 1.0, "4": None}
    assert summary["missing"] == {"3": 1, "4": 2}  # the dialogue that broke off is counted, not dropped in silence
    assert summary["dialogues"] == 2
    assert summary["mean"]["1-4"]["mean"] == pytest.approx(0.5)  # (1 + 0.5 + 0) / 3, over the turns that were observed
    assert summary["mean"]["1-4"]["turns"] == 3
    assert summary["mean"]["2-3"]["mean"] == pytest.approx(0.25)
    assert "6-20" not in summary["mean"]
    low, high = summary["ci95"]["1"]
    assert low < 1.0 == high
    assert summary["ci95"]["4"] == [0.0, 1.0]


def test_kinds_have_intervals_of_their_own():
    summary = summarise(OBSERVATIONS, 4, 2, ranges=((1, 20),))
    # Wilson, one of one: low = (1 + z^2/2 - z sqrt(z^2/4)) / (1 + z^2) = 1 / (1 + z^2) = 0.206549
    assert summary["by_kind_ci95"]["hobby"]["1"] == pytest.approx([0.206549, 1.0], abs=1e-6)
    assert summary["by_kind_ci95"]["figure"]["2"] == pytest.approx([0.0, 1 - 0.206549], abs=1e-6)
    assert summary["by_kind_mean"]["figure"]["1-4"]["mean"] == pytest.approx(1 / 3)
    assert summary["by_kind_mean"]["hobby"]["1-4"]["turns"] == 2


def test_the_last_turn_is_each_dialogue_s_own():
    found = last_turn(OBSERVATIONS[::-1])  # in any order
    assert found is not None
    # Dialogue 0 ends at turn 3, disobeyed; dialogue 1 at turn 2, obeyed. Wilson, one of two: 0.5 -+ 0.405469
    assert found["share"] == 0.5
    assert found["ci95"] == pytest.approx([0.094531, 0.905469], abs=1e-6)
    assert found["turns"] == {"fewest": 2, "median": 2.5, "most": 3}
    assert last_turn([]) is None


def test_a_change_of_the_instruction():
    # The new instruction comes at turn 2. Dialogue 0 follows it; dialogue 1 goes on with the first one.
    new = [Observation(0, 1, "figure", False), Observation(0, 2, "figure", True), Observation(0, 3, "figure", True)]
    new += [Observation(1, 1, "figure", True), Observation(1, 2, "figure", False), Observation(1, 3, "figure", False)]
    old = [Observation(o.dialogue, o.turn, o.kind, o.turn == 1 or o.dialogue == 1, answer_ok=False) for o in new]
    assert [o.turn for o in since(new, 2)] == [1, 2, 1, 2]
    table = change_table(new, old, 2, 3, 2)
    assert table["turn"] == 2
    assert (table["new"]["1"], table["new"]["2"]) == (0.5, 0.5)
    assert table["new"]["last_turn"]["share"] == 0.5
    assert "3" not in table["new"]
    assert table["old_before"]["mean"] == 0.0  # obeyed, but not answered
    assert table["old_after"]["mean"] == 0.5  # it shows, answered or not


def test_range_interval_takes_the_dialogue_as_its_unit():
    # Ten dialogues of 20 turns, five obey throughout, five never: the mean is 0.5 and the data are worth 10 trials,
    # not 200.
    rows = [Observation(d, turn, "figure", d < 5) for d in range(10) for turn in range(1, 21)]
    result = range_mean(rows, 1, 20)
    assert result is not None
    assert result["mean"] == 0.5
    # d_i = +-0.5/10; var = 10 * 0.0025 * 10/9 = 0.027778 -> half width 1.959964 * 0.166667 = 0.326661
    assert (result["low"], result["high"]) == pytest.approx((0.173339, 0.826661), abs=1e-5)
    perfect = range_mean([Observation(d, 1, "figure", True) for d in range(20)], 1, 1)
    assert perfect is not None
    assert (perfect["low"], perfect["high"]) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)  # Wilson: still not certain
    assert range_mean(rows, 21, 30) is None


def test_turns_weigh_equally():
    rows = [Observation(d, 1, "figure", True) for d in range(3)] + [Observation(0, 2, "figure", False)]
    result = range_mean(rows, 1, 2)
    assert result is not None
    assert result["mean"] == 0.5  # not 3/4


def test_nothing_to_measure_is_an_error():
    with pytest.raises(UserError, match="turns is 0"):
        summarise([], 0, 5)
    with pytest.raises(UserError, match="num_dialogues is 0"):
        summarise([], 20, 0)


def test_each_part_of_a_combination_is_told():
    """Two replies under figure+hobby: both parts obeyed, then the hobby alone; the second reply obeys nothing whole."""
    parts = [{"figure": True, "hobby": True}, {"figure": False, "hobby": True}]
    seen = [Observation(0, t + 1, "figure+hobby", all(p.values()), parts=p) for t, p in enumerate(parts)]
    table = summarise(seen, 2, 1)
    assert (table["1"], table["2"]) == (1.0, 0.0)
    assert table["by_part"] == {"figure": {"1": 1.0, "2": 0.0}, "hobby": {"1": 1.0, "2": 1.0}}
