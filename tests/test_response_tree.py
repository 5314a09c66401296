"""The response tree: the scores and gradients of separate rows, the prompt computed once. Tiny random models."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BloomConfig,
    BloomForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

from reward import tree
from reward.attention import whole_mask
from reward.collate import collate_pair_trees
from reward.data import EncodedPair
from reward.model import add_lora, load_reward_model, takes_trees, tree_scores
from reward.scorer import score_ids, score_positions
from rlhf.hardware import attend_in_float32

SMALL = {"vocab_size": 32, "num_labels": 1, "pad_token_id": 0}
LLAMA = {**SMALL, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA)),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3)
    ),
    "mistral": lambda: MistralForSequenceClassification(MistralConfig(**LLAMA, sliding_window=None)),
    "mistral, windowed": lambda: MistralForSequenceClassification(MistralConfig(**LLAMA, sliding_window=4)),
    "bloom": lambda: BloomForSequenceClassification(BloomConfig(**SMALL, hidden_size=16, n_layer=2, n_head=4)),
}


def pair(prompt, chosen, rejected):
    ids = (np.array([*prompt, *response], dtype=np.int32) for response in (chosen, rejected))
    return EncodedPair(*ids, margin=0.0, chosen_safe=math.nan, rejected_safe=math.nan, row={})


def load(tmp_path_factory, name, attention="sdpa"):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    return load_reward_model(folder, attn_implementation=attention)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return load(tmp_path_factory, "llama")


def scores(model, pairs):
    return tree_scores(model, collate_pair_trees(pairs, pad_id=0))


def scores_apart(model, pairs):
    """Each dialogue in a row of its own."""
    ids = [[torch.tensor(i)[None].long() for i in (p.chosen_ids, p.rejected_ids)] for p in pairs]
    return torch.stack([torch.cat([model(i, torch.ones_like(i)).logits[0] for i in both]) for both in ids])


def test_layout_worked_by_hand():
    # Prompt 5 6, chosen 7 8, rejected 9; and a pair without a prompt, shorter, so that it is padded.
    batch = collate_pair_trees([pair([5, 6], [7, 8], [9]), pair([], [3], [4])], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 2], [0, 0, 0, 0, 0]]
    assert batch["ends"].tolist() == [[3, 4], [0, 1]]
    assert batch["visible"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]
    assert batch["visible"][1, 0, :2, :2].int().tolist() == [[1, 0], [0, 1]]


def test_each_response_keeps_a_token_of_its_own():
    assert tree.shared_tokens([[5, 6, 7, 8], [5, 6, 7, 9]]) == 3  # common beginnings of responses are shared, too
    assert tree.shared_tokens([[5, 6, 7], [5, 6, 7, 9]]) == 2  # one dialogue begins the other
    assert tree.shared_tokens([[5, 6, 7, 8], [5, 6, 9], [5, 4, 7, 8]]) == 1
    assert tree.shared_tokens([[5], [5]]) == 0
    assert pair([5, 6], [7, 8], [7, 9]).length == 5


def test_a_tree_ends_where_its_responses_would_cost_more_than_the_prompt_saves(monkeypatch):
    monkeypatch.setattr(tree, "RESPONSE_TOKENS", 5)
    # prompt 9, responses of 3, 2, 1 and 6 tokens: 3 + 2 fit into 5; 1; a longer one stands alone
    dialogues = [[9, 1, 1, 1], [9, 2, 2], [9, 3], [9, 4, 4, 4, 4, 4, 4]]
    assert tree.split_into_trees(dialogues) == [[0, 1], [2], [3]]
    long = [[9] * 6 + ids[1:] for ids in dialogues]  # a prompt of 6 allows 12 tokens, all there are
    assert tree.split_into_trees(long) == [[0, 1, 2, 3]]


def test_long_prompts_need_no_mask(monkeypatch):
    # Prompts of 2 and 3 tokens: the first 2 queries of both rows see what comes before them, and are left out.
    pairs = [pair([5, 6], [7, 8], [9]), pair([1, 2, 3], [4], [5])]
    whole = collate_pair_trees(pairs, pad_id=0)["visible"]
    monkeypatch.setattr(tree, "CAUSAL_FROM", 2)
    short = collate_pair_trees(pairs, pad_id=0)["visible"]
    assert short.shape == (2, 1, 3, 5)
    assert torch.equal(short, whole[:, :, 2:])
    assert torch.equal(whole_mask(short, 5), whole)
    monkeypatch.setattr(tree, "CAUSAL_FROM", 3)
    assert torch.equal(collate_pair_trees(pairs, pad_id=0)["visible"], whole)


token = st.integers(1, 31)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.lists(token, max_size=9), *[st.lists(token, min_size=1, max_size=6)] * 2), min_size=1,
                max_size=4), st.sampled_from([1, 4, 256]))  # fmt: skip
def test_scores_are_those_of_separate_rows(llama, drawn, causal_from):
    pairs = [pair(*parts) for parts in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "CAUSAL_FROM", causal_from)
        found = scores(llama, pairs)
    torch.testing.assert_close(found, scores_apart(llama, pairs), atol=2e-5, rtol=1e-4)


PAIRS = [pair([5, 6, 9, 3], [7, 8], [9, 2, 2, 4]), pair([1, 6, 2], [3, 3, 3], [4])]


@pytest.mark.parametrize("causal_from", [3, 256])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "float32"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_gradients_are_those_of_separate_rows(tmp_path_factory, monkeypatch, name, attention, causal_from):
    monkeypatch.setattr(tree, "CAUSAL_FROM", causal_from)
    model = load(tmp_path_factory, name, "sdpa" if attention == "float32" else attention)
    if attention == "float32":
        attend_in_float32(model)
    assert takes_trees(model)
    found = []
    for compute in (scores, scores_apart):
        model.zero_grad()
        chosen, rejected = compute(model, PAIRS).unbind(1)
        torch.nn.functional.softplus(rejected - chosen).sum().backward()
        found.append([chosen.detach(), rejected.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for shared, apart in zip(*found, strict=True):
        torch.testing.assert_close(shared, apart, atol=1e-5, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.lists(token, max_size=9), *[st.lists(token, min_size=1, max_size=6)] * 3), min_size=1,
                max_size=4), st.sampled_from([1, 6, 256]), st.sampled_from([1, 20, 1000]))  # fmt: skip
def test_scores_of_k_responses_do_not_depend_on_the_trees(llama, drawn, response_tokens, budget):
    ids = [prompt + response for prompt, *responses in drawn for response in responses]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "RESPONSE_TOKENS", response_tokens)
        as_trees = score_ids(llama, ids, budget, k=3)
    torch.testing.assert_close(as_trees, score_ids(llama, ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_a_named_bar_counts_every_response(llama, capsys, k):
    ids = [[5, 6, 7, last] for last in range(2, 8)]
    score_ids(llama, ids, token_budget=10, k=k)
    assert capsys.readouterr().err == ""
    score_ids(llama, ids, token_budget=10, k=k, progress="safety")
    assert "6/6" in capsys.readouterr().err


def test_a_forward_on_a_cpu_holds_what_suits_it_unless_chosen(llama):
    sizes = []
    hook = llama.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ids = [[5] * 30] * 60  # 1,800 tokens: 25 rows of 30 are the most that 768 tokens hold
    score_ids(llama, ids)
    score_ids(llama, ids, token_budget=1200)
    hook.remove()
    assert sizes == [750, 750, 300, 1200, 600]


def test_a_number_of_dialogues_that_is_no_multiple_of_k_is_refused(llama):
    with pytest.raises(ValueError, match="3 id lists are not 2 a prompt"):
        score_ids(llama, [[1], [2], [3]], k=2)


def test_models_that_take_no_trees_score_row_by_row(tmp_path_factory):
    model = load(tmp_path_factory, "mistral, windowed")
    ids = [[5, 6, 7, 8, 9, 3, 2], [5, 6, 7, 8, 9, 3, 4]]
    torch.testing.assert_close(score_ids(model, ids, k=2), score_ids(model, ids))


def test_layout_of_beginnings_worked_by_hand():
    row = tree.lay_out_beginnings([5, 6, 7], first=1, end_id=9)
    assert row["input_ids"].tolist() == [[5, 6, 7, 9, 9]]
    assert row["position_ids"].tolist() == [[0, 1, 2, 2, 3]]
    assert row["ends"].tolist() == [[3, 4]]
    assert row["visible"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 1, 0, 1],
    ]


@pytest.mark.parametrize(
    ("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa"), ("mistral, windowed", "sdpa")]
)
@pytest.mark.parametrize("end", [[], [2]])
def test_scores_of_all_beginnings_are_those_of_separate_rows(tmp_path_factory, name, attention, end):
    model = load(tmp_path_factory, name, attention).train()
    ids = np.array([5, 6, 9, 3, 7, 8, 9, 2, 2, 4], dtype=np.int32)
    for first in (0, 4, 9):
        found = score_positions(model, ids, first, *end)
        apart = score_ids(model, [[*ids[: last + 1].tolist(), *end] for last in range(first, len(ids))])
        torch.testing.assert_close(found, apart, atol=2e-5, rtol=1e-4)
    assert model.training  # left as it was


@pytest.mark.parametrize("first", [-1, 3])
def test_a_position_outside_the_dialogue_is_refused(llama, first):
    with pytest.raises(ValueError, match=f"position {first} is outside a dialogue of 3 tokens"):
        score_positions(llama, [5, 6, 7], first)


def test_lora_passes_the_layout_through(llama):
    model = add_lora(llama, 4, 8, 0.0, None)
    assert takes_trees(model)
    ids = [ids for p in PAIRS for ids in (p.chosen_ids, p.rejected_ids)]
    torch.testing.assert_close(scores(model, PAIRS).flatten(), score_ids(model, ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "attention"), [("mistral, windowed", "sdpa"), ("bloom", "eager")])
def test_models_that_need_rows_apart_are_known(tmp_path_factory, name, attention):
    assert not takes_trees(load(tmp_path_factory, name, attention))


def test_flash_attention_needs_rows_apart(llama):
    llama.config._attn_implementation = "flash_attention_2"
    try:
        assert not takes_trees(llama)
    finally:
        llama.config._attn_implementation = "sdpa"
