"""Attention maps: against transformers' own attentions, and small tensors by hand."""

import pytest
import torch
from tiny_models import save_tiny_policy, tiny_tokenizer

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.model_settings import ModelSettings
from rlhf import attention_figures as figures
from rlhf import attention_maps as maps
from rlhf.models import load_policy

DIALOGUE = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "a dog"},
    {"role": "user", "content": "the cat runs"},
    {"role": "assistant", "content": "red"},
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), num_hidden_layers=3)


def test_the_largest_weight_over_layers_and_heads(path):
    model, ids = maps.load_eager(path), [5, 17, 80, 33, 9, 4]
    found = maps.max_attention(model, ids)
    assert not any(module._forward_hooks for module in model.modules())  # nothing stays behind
    attentions = model(torch.tensor([ids]), output_attentions=True).attentions
    assert len(attentions) == 3
    torch.testing.assert_close(found, torch.stack(attentions).amax((0, 1, 2)))
    assert found.triu(1).count_nonzero() == 0


def test_no_two_layers_are_held(path):
    """When a layer is reduced, the weights of those before it are gone."""
    import weakref

    model, alive = maps.load_eager(path), []

    def watch(module, inputs, output):
        assert all(reference() is None for reference in alive)
        alive.append(weakref.ref(output[1]))

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(watch)
    maps.max_attention(model, [5, 17, 80])
    assert len(alive) == 3


def test_attention_that_cannot_be_read_is_refused(path):
    model = load_policy(ModelSettings(model_name_or_path=path), trainable=False)
    with pytest.raises(UserError, match="0 of 3 layers; .*eager"):
        maps.max_attention(model, [5, 6])


def test_bins_take_the_largest_of_their_neighbours():
    map_TT = torch.tensor([[0.9, 0.0, 0.0], [0.3, 0.7, 0.0], [0.2, 0.4, 0.4]])
    # Two tokens a bin, the last bin has one: {0, 1} x {0, 1} has 0.9, {2} x {0, 1} 0.4, {2} x {2} 0.4
    torch.testing.assert_close(maps.binned(map_TT, 2, 2), torch.tensor([[0.9, 0.0], [0.4, 0.4]]))
    torch.testing.assert_close(maps.binned(map_TT, 1, 1), map_TT)
    torch.testing.assert_close(maps.binned(map_TT[:, :2], 2, 1), torch.tensor([[0.9, 0.7], [0.2, 0.4]]))
    with pytest.raises(UserError, match="bins of 2 queries and 0 keys"):
        maps.binned(map_TT, 2, 0)


def test_a_reply_attends_from_the_tokens_that_predict_it():
    map_TT = torch.arange(25.0).view(5, 5)  # row t is 5t, 5t + 1, ...
    # The reply at 2 and 3 is predicted at 1 and 2, whose largest weights on 0 and 1 are 6 and 11; the one at 4, at 3.
    assert maps.to_span(map_TT, (0, 2), [(2, 4), (4, 5)]) == [8.5, 16.0]


def test_places_of_instruction_question_and_replies():
    chat = load_chat_format(tiny_tokenizer())
    for slot in ("system", "user"):
        reading = maps.locate(DIALOGUE, "the cat sleeps.", slot, chat)
        tokenizer = chat.tokenizer
        assert tokenizer.decode(reading.ids[slice(*reading.instruction)]).strip() == "the cat sleeps."
        # The first user text, not the same words inside the instruction before it
        assert tokenizer.decode(reading.ids[slice(*reading.question)]).strip() == "the cat"
        assert reading.question[0] >= reading.instruction[1]
        replies = [tokenizer.decode(reading.ids[a:b]).replace("</s>", "").strip() for a, b in reading.replies]
        assert replies == ["a dog", "red"]
        assert all(reading.ids[end - 1] == tokenizer.eos_token_id for _, end in reading.replies)
    with pytest.raises(UserError, match="do not spell 'blue'"):
        maps.find(["red", " cat"], "blue", 0)
    # Characters 2 to 5 of "abcdefgh" are in the tokens "bc", "de" and "fg"; "" is a token without a text of its own.
    assert maps.find(["a", "bc", "", "de", "fg", "h"], "cdef", 0) == (1, 5)
    assert maps.find(["ab", "ab"], "ab", 1) == (1, 2)


def test_runs_and_means_by_turn():
    assert maps.runs([True, False, True, True]) == [(0, 1), (2, 4)]
    assert maps.runs([False, False]) == []
    # Turn 1: 0.2 and 0.4, deviation 0.141421, half-width 1.959964 * 0.1; turn 2: one dialogue
    means = maps.by_turn([[0.2, 0.5], [0.4]])
    assert means[1] == pytest.approx((0.3, 0.1959964))
    assert means[2] == (0.5, 0.0)


def test_figures():
    reading = maps.Reading(list(range(6)), (1, 3), (3, 4), [(4, 5), (5, 6)])
    figure = figures.maps({"before": torch.rand(3, 3), "after": torch.rand(3, 3)}, reading, 2)
    before, after, scale = figure.axes
    assert [line.get_xdata()[0] for line in before.lines] == [0.5, 1.5]  # the instruction, in bins
    assert before.images[0].get_clim() == after.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in before.get_xticklabels()] == ["1", "2"]
    assert scale.get_ylabel() == "largest attention weight"
    strips = {"before": torch.tensor([[1.0, 0.2, 0.1]]), "after": torch.tensor([[1.0, 0.3, 0.4]])}
    strip, other, _ = figures.beginning(strips, reading, 2, ["<s>", "Act", "$x$"]).axes
    assert strip.images[0].get_clim() == other.images[0].get_clim() == pytest.approx((0, 0.4))  # not the first token
    assert [line.get_xdata()[0] for line in strip.lines] == [1, 3]
    assert [label.get_text() for label in strip.get_xticklabels()] == ["<s>", "Act", "$x$"]
    points = {"before": {1: (0.5, 0.1), 2: (0.25, 0.1)}, "after": {1: (0.5, 0.0)}}
    (axis,) = figures.curves({"the instruction": points}).axes
    assert [list(line.get_ydata()) for line in axis.lines] == [[0.5, 0.25], [0.5]]
    assert axis.get_ylim() == pytest.approx((0, 0.63))  # 1.05 times 0.5 + 0.1: no band is cut
    assert axis.get_title(loc="left") == "to the instruction"
    assert figures.maps({}, reading, 2) is figures.beginning({}, reading, 2, []) is figures.curves({}) is None
