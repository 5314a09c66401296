"""Dialogues of many turns against generate on the whole history."""

import copy

import pytest
import torch

from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from rlhf import decoding
from rlhf.sessions import DialogueSession
from tests.tiny_models import PAD, STOP, ragged_model, ragged_prompts


@pytest.fixture(scope="module")
def model():
    return ragged_model()


def extend_as_generate_does(model, histories, new, replies, max_new_tokens) -> None:
    """Each reply equals greedy `generate` on its history, which grows by it; a cut reply is closed by the stop id."""
    for history, ids, reply in zip(histories, new, replies, strict=True):
        history.extend(ids)
        prompt = torch.tensor([history])
        mask = torch.ones_like(prompt)
        expected = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
        assert reply == expected[0, len(history) :].tolist()
        history.extend(reply if reply[-1] == STOP else [*reply, STOP])


@pytest.mark.parametrize("feed_tokens", [1024, 40])
def test_session_equals_prefilling_the_whole_dialogue(model, monkeypatch, feed_tokens):
    """Ragged turns, greedy: each reply equals generate on the full history; cut replies are closed by the stop id."""
    monkeypatch.setattr(decoding, "CPU_FEED_TOKENS", feed_tokens)
    settings = SamplingSettings(temperature=0.0, max_new_tokens=7)
    session = DialogueSession(model, PAD, [STOP], max_length=256)
    histories: list[list[int]] = [[] for _ in range(9)]
    reasons = set()
    for turn in range(8):
        new = [[1, *ids] for ids in ragged_prompts(9, seed=turn)]
        replies = session.reply(new, settings)
        extend_as_generate_does(model, histories, new, replies, 7)
        reasons |= {reply[-1] == STOP for reply in replies}
    assert reasons == {True, False}
    assert session.cache.columns < 2 * max(map(len, histories)), "it grows by half at most"


def test_rows_of_uneven_dialogues_hold_their_own_tokens_only(model):
    """Each turn another dialogue has the long message; the cache is as wide as the longest dialogue asks for."""
    settings = SamplingSettings(temperature=0.0, max_new_tokens=3)
    session = DialogueSession(model, PAD, [STOP], max_length=256)
    histories: list[list[int]] = [[] for _ in range(6)]
    for turn in range(12):
        new = [[5 + (turn + d) % 30] * (25 if turn % 6 == d else 1) for d in range(6)]
        extend_as_generate_does(model, histories, new, session.reply(new, settings), 3)
    assert session.cache.columns <= 1.5 * max(map(len, histories)) + 3


def test_session_draws_anew_each_turn(model):
    """Logits that ignore the history: only the random numbers can make two turns differ."""
    flat = copy.deepcopy(model)
    torch.nn.init.zeros_(flat.lm_head.weight)
    session = DialogueSession(flat, PAD, [STOP], max_length=256)
    settings = SamplingSettings(max_new_tokens=12)
    first, second = session.reply([[5], [5]], settings, seed=3), session.reply([[5], [5]], settings, seed=3)
    assert len({tuple(ids) for ids in first + second}) == 4
    again = DialogueSession(flat, PAD, [STOP], max_length=256)
    assert again.reply([[5], [5]], settings, seed=3) == first


def test_session_refuses_stop_strings(model):
    session = DialogueSession(model, PAD, [STOP], max_length=40)
    with pytest.raises(UserError, match="stop_strings"):
        session.reply([[5]], SamplingSettings(stop_strings=["a"]))


def test_session_refuses_a_dialogue_past_its_limit(model):
    settings = SamplingSettings(max_new_tokens=8)
    session = DialogueSession(model, PAD, [STOP], max_length=40)
    session.reply([[5], [5]], settings)
    session.reply([[5], [5]], settings)
    with pytest.raises(UserError, match="dialogue 0, turn 3: .* the limit is 40"):
        session.reply([[5] * 30, [5]], settings)
