"""DeepSpeed ZeRO-3: what can be said of it without DeepSpeed. The runs are in tests/test_ppo.py."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs.errors import UserError
from rlhf import sharding, zero3

LAUNCHED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}  # fmt: skip


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("ZERO_STAGE", "2", "zero_stage .* must be 3"),
        ("ZERO3_INIT", "true", "zero3_init_flag .* must be false"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "offload_optimizer .* must be none"),
        ("OFFLOAD_PARAM_DEVICE", "cpu", "offload_param .* must be none"),
    ],
)
def test_settings_that_ppo_does_not_support_are_refused(monkeypatch, variable, value, message):
    for name, given in {**LAUNCHED, f"ACCELERATE_DEEPSPEED_{variable}": value}.items():
        monkeypatch.setenv(name, given)
    with pytest.raises(UserError, match=message):
        sharding.wanted()


def test_a_launch_without_deepspeed_is_refused(monkeypatch):
    for name, given in LAUNCHED.items():
        monkeypatch.setenv(name, given)
    monkeypatch.setattr(zero3, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        sharding.wanted()


def test_tied_embeddings_stay_whole_and_the_rest_is_split():
    embeddings, layers, norm = nn.Embedding(4, 2), nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]), nn.LayerNorm(2)
    decoder = nn.ModuleDict({"embeddings": embeddings, "layers": layers, "norm": norm})
    assert zero3.largest(decoder, lambda p: True) == [decoder]
    assert zero3.largest(decoder, lambda p: p is not embeddings.weight) == [layers, norm]


@pytest.mark.parametrize(("rank", "expected"), [(0, [1.0, 2.0]), (1, [3.0, 0.0]), (2, [0.0, 0.0])])
def test_the_part_of_a_process_is_filled_up_with_zeros(monkeypatch, rank, expected):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    parameter = SimpleNamespace(ds_tensor=torch.zeros(2))
    assert zero3._own_part(parameter, torch.tensor([[1.0], [2.0], [3.0]])).tolist() == expected
