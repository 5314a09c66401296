"""Scores of dialogues that grow, against scores of each dialogue read as a whole."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

from reward.model import load_reward_model
from reward.scorer import score_ids
from rlhf import decoding, growing_scores
from rlhf.growing_scores import GrowingScores
from tests.tiny_models import tiny_config

KINDS = ["llama", "gpt2", "mistral, windowed"]


def make(name: str):
    torch.manual_seed(3)
    small = {"vocab_size": 40, "num_labels": 1, "pad_token_id": 3, "initializer_range": 0.4}
    if name == "gpt2":
        return GPT2ForSequenceClassification(
            GPT2Config(n_embd=16, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **small)
        )  # fmt: skip
    if name == "llama":
        return LlamaForSequenceClassification(tiny_config(40, num_labels=1, pad_token_id=3, initializer_range=0.4))
    return MistralForSequenceClassification(
        MistralConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, sliding_window=4, **small)
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    for name in KINDS:
        make(name).save_pretrained(folder / name)
    return {name: load_reward_model(folder / name) for name in KINDS}


def whole(model, candidates):
    return [score_ids(model, each).tolist() for each in candidates]


def same(found, expected):
    assert [len(each) for each in found] == [len(each) for each in expected]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), atol=1e-5, rtol=1e-4)


def draw(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randrange(4, 40) for _ in range(rng.randint(low, high))]


@pytest.mark.parametrize("feed_tokens", [1024, 20])
@pytest.mark.parametrize("name", KINDS)
def test_scores_are_those_of_the_whole_dialogue(models, monkeypatch, name, feed_tokens):
    """Drafts that share a beginning, a kept draft that is not the last one, dialogues that end, one that comes back."""
    monkeypatch.setattr(decoding, "CPU_FEED_TOKENS", feed_tokens)
    model, rng = models[name], random.Random(5)
    scores = GrowingScores(model)
    histories = {row: draw(rng, 1, 6) for row in range(7)}
    for rows in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 2, 3, 5], [5, 2], [2, 6, 5], [1, 6, 2, 5]):
        drafts = [[histories[row] + draw(rng, 1, 9) for _ in range(rng.randint(1, 3))] for row in rows]
        same(scores(rows, drafts), whole(model, drafts))
        for row, each in zip(rows, drafts, strict=True):
            histories[row] = rng.choice(each) + draw(rng, 1, 5)


ids_of = st.lists(st.integers(4, 39), min_size=1, max_size=8)
asked = st.dictionaries(st.integers(0, 4), st.lists(ids_of, min_size=1, max_size=3), min_size=1)


@settings(max_examples=40, deadline=None)
@given(st.lists(asked, min_size=1, max_size=4))
def test_any_ids_may_follow_any(models, calls):
    """Nothing is promised about what a dialogue is given next: the same ids, a beginning of them, others."""
    scores = GrowingScores(models["llama"])
    for call in calls:
        same(scores(list(call), list(call.values())), whole(models["llama"], list(call.values())))


def test_what_was_read_is_not_read_again(models, monkeypatch):
    """Worked by hand: row 0 reads its five ids, then the two behind the three that both drafts begin with. The last id
    that was read is read again, as its hidden state is scored; a new dialogue takes a row behind the known ones."""
    read = []
    inner = growing_scores.feed

    def feed(model, cache, chunks, begins, pad_id):
        read.append([list(chunk) for chunk in chunks])
        return inner(model, cache, chunks, begins, pad_id)

    monkeypatch.setattr(growing_scores, "feed", feed)
    scores = GrowingScores(models["llama"])
    scores([0, 1], [[[5, 6, 7, 8, 9], [5, 6, 7, 10, 11]], [[20, 21]]])
    assert read == [[[5, 6, 7, 8, 9], [20, 21]], [[10, 11], [21]]]
    scores([1, 0], [[[20, 21, 22]], [[5, 6, 7, 10, 11, 12]]])
    scores([1, 2, 0], [[[20, 21, 22, 23]], [[30, 31]], [[5, 6, 7, 10, 11, 12, 13]]])
    assert read[2:] == [[[21, 22], [11, 12]], [[22, 23], [12, 13], [30, 31]]]
