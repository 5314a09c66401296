"""Encoding, shortening and margins, with a chat format of one token a word."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from reward.collate import batches_by_budget, collate_pairs, pad_right
from reward.data import encode_pairs, shorten_prompt
from reward.loss import margin_table


class WordFormat:
    """Every word is the token int(word)."""

    def encode_dialogue(self, messages):
        ids = [int(word) for message in messages for word in message["content"].split()]
        return SimpleNamespace(input_ids=ids, response_mask=[True] * len(ids))


def turn(role, content):
    return {"role": role, "content": content}


def row(prompt, chosen="7", rejected="8 8", **fields):
    base = {"rating": None, "margin": None, "safety": None, "source": "test"}
    return {
        "prompt": prompt,
        "chosen": [turn("assistant", chosen)],
        "rejected": [turn("assistant", rejected)],
        **base,
        **fields,
    }


LONG = [
    turn("system", "1"),
    turn("user", "2 2"),
    turn("assistant", "3"),
    turn("user", "4"),
    turn("assistant", "5"),
    turn("user", "6"),
]


def test_shortening_drops_the_oldest_exchange_and_keeps_the_system_message():
    shorter = shorten_prompt(LONG)
    assert [m["content"] for m in shorter] == ["1", "4", "5", "6"]
    assert [m["content"] for m in shorten_prompt(shorter)] == ["1", "6"]
    assert shorten_prompt(shorten_prompt(shorter)) is None
    assert shorten_prompt([turn("user", "2")]) is None


def test_long_prompts_lose_turns_never_the_response():
    # Whole: 7 prompt tokens + 2 of the longer response = 9. One exchange less: 4 + 2 = 6.
    pairs, refused, counts = encode_pairs([row(LONG)], WordFormat(), max_length=8, margins=None)
    assert pairs[0].chosen_ids.tolist() == [1, 4, 5, 6, 7]
    assert pairs[0].rejected_ids.tolist() == [1, 4, 5, 6, 8, 8]
    assert pairs[0].length == 7  # the prompt once, 4, and the responses, 1 and 2
    assert not refused
    assert counts["shortened"] == 1
    pairs, _, counts = encode_pairs([row(LONG)], WordFormat(), max_length=9, margins=None)
    assert pairs[0].length == 10
    assert counts["shortened"] == 0


def test_a_last_turn_that_is_too_long_is_refused_with_its_reason():
    pairs, refused, counts = encode_pairs(
        [row(LONG), row([turn("user", "2")])], WordFormat(), max_length=3, margins=None
    )
    assert counts == {"pairs": 1, "shortened": 0, "refused": 1, "unrated": 1}
    assert refused[0]["reason"] == "last turn alone has 4 tokens, max_length is 3"
    assert pairs[0].rejected_ids.tolist() == [2, 8, 8]


def test_margins_come_from_the_row_then_the_rating_then_nothing():
    prompt = [turn("user", "2")]
    rows = [row(prompt, rating="better"), row(prompt, rating="better", margin=0.1), row(prompt)]
    pairs, _, counts = encode_pairs(rows, WordFormat(), 99, margin_table("large"))
    assert [pair.margin for pair in pairs] == [2.0, 0.1, 0.0]
    assert counts["unrated"] == 1
    pairs, _, _ = encode_pairs(rows, WordFormat(), 99, None)
    assert [pair.margin for pair in pairs] == [0.0, 0.0, 0.0]


def test_collated_rows_are_chosen_then_rejected():
    rows = [row([turn("user", "2")], "7", "8 8", safety="chosen_safe"), row([turn("user", "3")], "9 9 9", "5")]
    pairs, _, _ = encode_pairs(rows, WordFormat(), 99, None)
    batch = collate_pairs(pairs, pad_id=0)
    assert batch["input_ids"].tolist() == [[2, 7, 0, 0], [3, 9, 9, 9], [2, 8, 8, 0], [3, 5, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [2, 4, 3, 2]
    assert batch["chosen_safe"][0] == 1
    assert batch["rejected_safe"][0] == 0
    assert math.isnan(batch["chosen_safe"][1])


def test_padding_does_not_depend_on_the_padding_token():
    ids, mask = pad_right([[4, 9], np.asarray([5], dtype=np.int32)], pad_id=9)
    assert ids.tolist() == [[4, 9], [5, 9]]
    assert mask.tolist() == [[1, 1], [1, 0]]
    assert ids.dtype == torch.long


def test_batches_hold_every_row_once_within_the_budget():
    lengths = [3, 10, 4, 4, 1, 30]
    batches = batches_by_budget(lengths, token_budget=12)
    # 30 alone although beyond the budget; 10 alone, as two rows of 10 exceed 12; then 3 rows of 4, one being 3 long
    assert batches == [[5], [1], [2, 3, 0], [4]]
