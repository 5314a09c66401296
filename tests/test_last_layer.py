"""The last layer where it is read gives what the whole layer gives, gradients included, and others are left alone."""

import copy
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaModel, MistralConfig, MistralModel

from reward import last_layer
from reward.attention import use_tree_attention
from reward.last_layer import Places, hidden_at
from reward.model import create_reward_model
from rlhf.hardware import attend_in_float32, mixed_precision
from tests.tiny_models import save_tiny_policy, tiny_config, tiny_tokenizer

VOCABULARY, LENGTHS, STARTS = 40, (7, 12, 3), (4, 5, 2)  # of three rows padded to 12 tokens


def llama(kind: str = "sdpa", **extra) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel._from_config(tiny_config(VOCABULARY, **extra), attn_implementation=kind).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [3, 12], and True at the places from each row's start on."""
    ids_BT = torch.randint(1, VOCABULARY, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))
    place_T = torch.arange(max(LENGTHS))
    return ids_BT, (place_T >= torch.tensor(STARTS)[:, None]) & (place_T < torch.tensor(LENGTHS)[:, None])


def plain(model, ids_BT, read_BT):
    with mock.patch.object(last_layer, "_skips", return_value=False):
        return hidden_at(model, ids_BT, read_BT)


def gradients(model, hidden_ND) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (hidden_ND * torch.arange(hidden_ND.numel()).view_as(hidden_ND).cos()).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, tolerance: float = 1e-12) -> None:
    ids_BT, read_BT = batch()
    expected, found = plain(model, ids_BT, read_BT), hidden_at(model, ids_BT, read_BT)
    assert last_layer._skips(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    wanted, got = gradients(model, expected), gradients(model, found)
    assert wanted
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-8, atol=100 * tolerance, msg=name)


def test_places_by_hand():
    # rows: . x x . | . . . x
    places = Places.of(torch.tensor([[False, True, True, False], [False, False, False, True]]))
    assert places.row_N.tolist() == [0, 0, 1]
    assert places.place_N.tolist() == [1, 2, 3]
    assert places.slot_N.tolist() == [0, 1, 0]
    t, f = True, False
    assert places.visible_B1ST.tolist() == [[[[t, t, f, f], [t, t, t, f]]], [[[t, t, t, t], [t, f, f, f]]]]


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_same_hidden_states_and_gradients(heads):
    assert_same(llama(num_key_value_heads=heads, attention_bias=True))


def test_same_with_one_place_a_row_and_with_none():
    model, (ids_BT, _) = llama(), batch()
    ends_BT = torch.arange(max(LENGTHS)) == torch.tensor(LENGTHS)[:, None] - 1
    torch.testing.assert_close(hidden_at(model, ids_BT, ends_BT), plain(model, ids_BT, ends_BT), rtol=0, atol=1e-12)
    assert hidden_at(model, ids_BT, torch.zeros_like(ends_BT)).shape == (0, 16)


def test_less_of_the_last_layer_is_computed():
    model, (ids_BT, read_BT) = llama(), batch()
    tokens = []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: tokens.append(inputs[0].shape[:-1].numel()))
    hidden_at(model, ids_BT, read_BT)
    assert tokens == [36, 3 + 7 + 1]


def test_same_under_gradient_checkpointing():
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same(model)


def test_same_under_lora():
    model = llama()
    config = LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(model, config)  # puts the layers into `model` itself
    assert_same(model)


def test_same_with_attention_of_trees_and_under_autocast():
    model = llama().float()
    use_tree_attention(model)
    assert_same(model, 1e-5)
    attend_in_float32(model)
    ids_BT, read_BT = batch()
    with mixed_precision(True, "cpu"), torch.no_grad():
        found, expected = hidden_at(model, ids_BT, read_BT), plain(model, ids_BT, read_BT)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # bfloat16 of numbers up to 4


def test_a_copy_computes_with_its_own_weights():
    model, (ids_BT, read_BT) = llama(), batch()
    before = hidden_at(model, ids_BT, read_BT)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[-1].mlp.up_proj.weight.zero_()
    assert not torch.allclose(hidden_at(other, ids_BT, read_BT), before)
    torch.testing.assert_close(hidden_at(other, ids_BT, read_BT), plain(other, ids_BT, read_BT), rtol=0, atol=1e-12)


def test_the_layer_still_computes_everywhere_when_not_asked():
    model, (ids_BT, read_BT) = llama(), batch()
    before = model(input_ids=ids_BT).last_hidden_state
    hidden_at(model, ids_BT, read_BT)
    assert torch.equal(model(input_ids=ids_BT).last_hidden_state, before)


def test_other_models_are_computed_plainly():
    ids_BT, read_BT = batch()
    sizes = tiny_config(VOCABULARY).to_diff_dict()
    keep = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    mistral = MistralModel(MistralConfig(vocab_size=VOCABULARY, sliding_window=4, **{k: sizes[k] for k in keep}))
    hooked = llama()
    hooked.layers[-1].forward = hooked.layers[-1].forward  # somebody else's, as accelerate's hooks are
    for model in (mistral, llama("eager"), hooked):
        expected = model(input_ids=ids_BT, use_cache=False).last_hidden_state[read_BT]
        assert torch.equal(hidden_at(model, ids_BT, read_BT), expected)
        assert not last_layer._skips(model)


def test_scores_and_their_gradients_are_the_same(tmp_path):
    model = create_reward_model(save_tiny_policy(tmp_path / "policy"), tiny_tokenizer())
    ids_BT, _ = batch()
    mask_BT = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]

    def scores() -> torch.Tensor:
        return model(input_ids=ids_BT, attention_mask=mask_BT.long()).logits

    with mock.patch.object(last_layer, "_skips", return_value=False):
        expected = scores()
        wanted = gradients(model, expected)
    found = scores()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    got = gradients(model, found)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-5, msg=name)
