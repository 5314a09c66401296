"""Mixtures, duplicates, contradictions and leaks: worked cases, and properties of any mixture."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from reward.mixing import interleaved, mismatched_pairs, mix, mix_sizes
from reward.screening import find_contradictions, find_duplicates, find_leaks


@pytest.mark.parametrize(
    ("available", "weights", "sizes"),
    [
        ([900, 900], [9, 1], [900, 100]),
        ([900, 50], [9, 1], [450, 50]),
        ([10, 10], [1, 1], [10, 10]),
        ([7, 0, 3], None, [7, 0, 3]),
    ],
)
def test_without_a_total_nothing_repeats_and_one_source_is_used_up(available, weights, sizes):
    assert mix_sizes(available, weights) == sizes


@pytest.mark.parametrize(
    ("available", "weights", "total", "sizes"),
    [
        ([900, 50], [90, 10], 1000, [900, 100]),  # the second source twice
        ([5, 5, 5], [1, 1, 1], 10, [4, 3, 3]),  # 3 1/3 each: the first gets the row that is left
        ([9, 9, 9], [5, 3, 2], 7, [4, 2, 1]),  # 3.5, 2.1, 1.4: the largest remainder is the first
        ([9, 9, 9], [0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([600, 300], None, 30, [20, 10]),  # no weights: the files as they are, fewer of each
        ([0, 0], None, 30, [0, 0]),
    ],
)
def test_a_total_is_cut_by_the_weights(available, weights, total, sizes):
    assert mix_sizes(available, weights, total) == sizes


@pytest.mark.parametrize(
    ("available", "weights", "total", "source"),
    [([3, 1], [9, 1], None, 2), ([0, 5], [1, 1], None, 1), ([5, 0], [1, 1], None, 2), ([5, 0], [1, 1], 4, 2),
     ([5, 5], [99, 1], 10, 2)],
)  # fmt: skip
def test_a_source_without_any_row_is_refused(available, weights, total, source):
    with pytest.raises(UserError, match=f"source {source} without any row"):
        mix_sizes(available, weights, total)


def test_without_repeats_rows_and_order_are_a_plain_seeded_draw():
    sources = [list(range(20)), list(range(100, 110))]
    rng = random.Random(5)
    expected = rng.sample(sources[0], 18) + rng.sample(sources[1], 6)
    rng.shuffle(expected)
    assert mix(sources, [18, 6], seed=5) == expected


counts = st.lists(st.integers(1, 12), min_size=1, max_size=4)


@given(counts, st.data(), st.integers(1, 60), st.integers(0, 3))
def test_any_mixture_is_exact_seeded_and_repeats_no_row_too_early(available, data, total, seed):
    weights = data.draw(st.lists(st.floats(0.01, 100), min_size=len(available), max_size=len(available)))
    try:
        sizes = mix_sizes(available, weights, total)
    except UserError:
        # A weight that is worth less than one row, which rounding can leave without any.
        assert min(weights) / sum(weights) * total < 1
        return
    assert sum(sizes) == total
    assert all(abs(size - weight / sum(weights) * total) < 1 + 1e-9 for size, weight in zip(sizes, weights))
    assert sizes == mix_sizes([1] * len(available), weights, total)  # what a source has does not change its share
    sources = [[(s, i) for i in range(n)] for s, n in enumerate(available)]
    mixed = mix(sources, sizes, seed)
    assert mixed == mix(sources, sizes, seed)
    for s, (n, size) in enumerate(zip(available, sizes)):
        own = [row for row in mixed if row[0] == s]
        assert len(own) == size
        for start in range(0, size, n):  # in passes, in the order of training too
            assert len(set(own[start : start + n])) == len(own[start : start + n])
        uses = Counter(own)
        assert max(uses.values()) <= 1 + min(uses[row] for row in sources[s])


def turn(role, content):
    return {"role": role, "content": content}


def pair(prompt, chosen="yes", rejected="no"):
    """`prompt`: user and assistant turns in order."""
    turns = [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(prompt)]
    return {"prompt": turns, "chosen": [turn("assistant", chosen)], "rejected": [turn("assistant", rejected)]}


def test_duplicates_are_the_same_words_within_and_across_files():
    first = [pair(["a"]), pair([" a\n"], "yes "), pair(["A"])]  # white space aside, letter case not
    second = [pair(["b"]), pair(["a"]), pair(["a"], "no", "yes"), pair(["a"], "yes", "maybe")]
    assert find_duplicates([first, second]) == {(0, 1): (0, 0), (1, 1): (0, 0)}
    assert find_duplicates([first, second], skip={(0, 0)}) == {(1, 1): (0, 1)}


def test_a_contradiction_prefers_what_an_earlier_pair_rejected():
    rows = [pair(["a"]), pair(["a"], "no", "yes"), pair(["b"], "no", "yes"), pair(["a"], "no", "maybe")]
    assert find_contradictions([rows[:1], rows[1:]]) == {(1, 0)}
    assert find_contradictions([rows[:1], rows[1:]], skip={(0, 0)}) == set()


def test_leaks_are_whole_prompts_and_near_leaks_first_turns():
    tested = [pair(["What is it?"]), pair(["Hi.", "Hello!", "Why?"])]
    training = [
        pair(["what is  IT"]),  # a leak: letters and digits are the same
        pair(["what is it", "A lemon.", "Sure?"]),  # goes on from a tested prompt
        pair(["hi", "hello", "why"]),
        pair(["hi"]),
        pair(["Who is it?"]),
    ]
    leaks = find_leaks([training[:2], training[2:]], tested)
    assert leaks.same == {(0, 0): 0, (1, 0): 1}
    assert leaks.near == {(0, 1), (1, 1)}


def test_the_speaker_is_part_of_a_prompt():
    told = pair([]) | {"prompt": [turn("system", "b"), turn("user", "a")]}
    assert find_leaks([[told]], [pair(["a"]), pair(["b", "a"])]).same == {}
    assert find_leaks([[told]], [told]).same == {(0, 0): 0}


def preference(question: str, answer: str, rating: str | None = "slightly_better"):
    prompt = [{"role": "user", "content": question}]
    sides = ([{"role": "assistant", "content": text}] for text in (answer, f"not {answer}"))
    return {"prompt": prompt, **dict(zip(("chosen", "rejected"), sides, strict=True)), "rating": rating, "margin": 0.5,
            "safety": "both_safe", "source": "mine"}  # fmt: skip


def test_a_mismatched_pair_prefers_the_answer_to_the_question_over_one_to_the_most_similar_other():
    rows = [
        preference("Where does a tiger live?", "In the woods.", None),
        preference("Where does a swan live?", "On a lake."),
        preference("How tall is a house?", "Ten metres."),
        preference("where does a TIGER live", "In Asia."),  # the first prompt but for case and marks: no other question
    ]
    made = {row["chosen"][0]["content"]: row for row in mismatched_pairs(rows, 1.0, seed=0)}
    lent = {answer: row["rejected"][0]["content"] for answer, row in made.items()}
    assert lent["In the woods."] == "On a lake."
    assert lent["In Asia."] == "On a lake."
    assert lent["On a lake."] in ("In the woods.", "In Asia.")
    assert made["On a lake."]["rating"] == "significantly_better"
    assert made["In the woods."]["rating"] is None  # pairs without ratings have no margin
    assert {row["source"] for row in made.values()} == {"mismatched"}
    assert {(row["margin"], row["safety"]) for row in made.values()} == {(None, None)}
    assert mismatched_pairs(rows, 0.0, seed=0) == []
    assert mismatched_pairs([rows[0], rows[3]], 1.0, seed=0) == []  # one question: there is no other answer


@given(st.integers(2, 60), st.floats(0.0, 2.5), st.integers(0, 9))
def test_mismatched_pairs_use_every_row_evenly_and_change_none(count, share, seed):
    rows = [preference(f"question {i} of {i % 7}", f"answer {i}") for i in range(count)]
    before = repr(rows)
    made = mismatched_pairs(rows, share, seed)
    assert repr(rows) == before
    assert made == mismatched_pairs(rows, share, seed)
    assert len(made) == round(share * count)  # of two or more candidates one at least is another question
    uses = Counter(row["chosen"][0]["content"] for row in made)
    assert not uses or max(uses.values()) <= -(-round(share * count) // count)
    answer_of = {row["prompt"][0]["content"]: row["chosen"][0]["content"] for row in rows}
    for row in made:
        assert answer_of[row["prompt"][0]["content"]] == row["chosen"][0]["content"] != row["rejected"][0]["content"]
        assert row["rejected"][0]["content"] in answer_of.values()


def test_interleaved_keeps_both_orders_and_nothing_else_moves_without_more():
    rows, more = [{"n": i} for i in range(20)], [{"n": 100 + i} for i in range(5)]
    both = [row["n"] for row in interleaved(rows, more, seed=3)]
    assert [n for n in both if n < 100] == list(range(20))
    assert [n for n in both if n >= 100] == list(range(100, 105))
    assert both[-5:] != list(range(100, 105))
    assert interleaved(rows, [], seed=3) == rows
