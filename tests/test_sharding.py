"""Sharded weights that stay in parts: processes in lockstep, each with its own number of forwards."""

import os
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_ppo import FSDP2, NO_BUILD, ZERO3, with_deepspeed
from tiny_models import ragged_model, save_tiny_policy
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from configs.errors import UserError
from configs.ppo_settings import PPOSettings
from rlhf import sharding
from rlhf.models import merged_state_dict


class Decoder(torch.nn.Module):
    """Notes each forward: its mode, and whether gradients are on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, input_ids, use_cache):
        self.calls.append((tuple(input_ids.shape), self.training, torch.is_grad_enabled()))
        return input_ids


def others(monkeypatch, computing):
    """Stand-ins for the other processes: how many of them compute, round after round."""
    rounds = iter(computing)
    monkeypatch.setattr(dist, "all_reduce", lambda flag: flag.add_(next(rounds)))
    return rounds


@pytest.mark.parametrize(
    ("own", "computing", "idle"),
    [(2, [1, 1, 1, 2, 0], 2), (0, [1, 0], 1), (3, [0, 0, 0, 0], 0)],
    ids=["done first", "nothing to do", "done last"],
)
def test_a_process_that_is_done_goes_on_until_all_are(monkeypatch, own, computing, idle):
    rounds, decoder = others(monkeypatch, computing), Decoder()
    with sharding.lockstep(decoder):
        for _ in range(own):
            decoder(input_ids=torch.zeros(3, 4), use_cache=True)
    assert next(rounds, None) is None
    assert decoder.calls[:own] == [((3, 4), True, True)] * own
    assert decoder.calls[own:] == [((1, 1), False, False)] * idle
    assert decoder.training
    decoder(input_ids=torch.zeros(1, 1), use_cache=False)  # outside nobody is told


def test_what_is_raised_in_lockstep_does_not_wait_for_the_others(monkeypatch):
    others(monkeypatch, [])
    with pytest.raises(UserError, match="disk"), sharding.lockstep(Decoder()):
        raise UserError("disk")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "configs/accelerate"),
        ({**FSDP2, sharding.RESHARD: "false"}, "fsdp_reshard_after_forward: true"),
    ],
)
def test_launches_in_which_weights_cannot_stay_in_parts_are_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"gather_weights: false .*{message}"):
        sharding.wanted(gather=False)
    assert sharding.wanted() == bool(environment)


def test_only_the_engine_of_this_process_samples_in_lockstep():
    with pytest.raises(UserError, match="gather_weights: false samples in lockstep"):
        PPOSettings(gather_weights=False, sampling_engine="continuous_batching")


def test_what_is_not_split_goes_to_the_device(monkeypatch):
    moved = []
    parameter = SimpleNamespace(device="cpu", data=SimpleNamespace(to=lambda device: moved.append(device) or "there"))
    part = SimpleNamespace(device="cpu", data=None, ds_id=0)
    model = SimpleNamespace(parameters=lambda: [parameter, part], buffers=list)
    monkeypatch.setattr(sharding, "decoder_of", lambda _: object())
    monkeypatch.setattr(sharding, "_split", lambda *_: moved.append("split"))
    sharding.shard(model, "gpu")
    assert moved == ["split", "gpu"]
    assert (parameter.data, part.data) == ("there", None)


def test_tied_weights_are_saved_as_one(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_policy(tmp_path / "tied", tie_word_embeddings=True))
    weights = sharding.merged(model, keep=True)
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert len({x.data_ptr() for x in weights.values()}) == len(weights) - 1


def most_gathered(model):
    """The number of layers of `model` that are whole at once, at most over the forwards to come."""
    most, layers = [0], sharding._layers(sharding.decoder_of(model))

    def is_whole(layer):
        return all(p.numel() and not isinstance(p, DTensor) for p in layer.parameters())

    def counting(compute):
        def computed(*args):
            most[0] = max(most[0], sum(map(is_whole, layers)))
            return compute(*args)

        return computed

    for layer in layers:
        layer.mlp.forward = counting(layer.mlp.forward)  # no hook: ZeRO's own are off meanwhile, and these with them
    return most


@contextmanager
def joined(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    yield
    dist.barrier()
    os._exit(0)  # gloo's threads, which DeepSpeed keeps, now and then abort a process that ends in the plain way


def differing_forwards(rank, folder, environment):
    """A process of two: 1 forward here and 4 there, then none here and 2 there, all as the whole model has them."""
    torch.set_num_threads(1)
    os.environ |= environment | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    if environment == ZERO3:
        exec(NO_BUILD)
    with joined(rank, folder):
        model, plain = ragged_model(), ragged_model()
        sharding.shard(model, torch.device("cpu"), gather=False)
        most = most_gathered(model)
        for turn, count in enumerate(((1, 4), (0, 2))[t][rank] for t in range(2)):
            with sharding.gathered(model), sharding.at_own_pace(model), torch.inference_mode():  # as scores are
                for i in range(count):
                    ids = torch.arange(4, 7 + i + 2 * rank + turn)[None]
                    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
            assert sharding.is_sharded(model.model.parameters())
        assert most == [1]
        saved, expected = sharding.merged(model, keep=rank == 0), merged_state_dict(plain)[1]
        assert saved.keys() == (expected.keys() if rank == 0 else set())
        for name, weight in saved.items():
            assert torch.equal(weight, expected[name])
        assert sharding.is_sharded(model.model.parameters())
        if environment == ZERO3:  # which trains through an engine only: tests/test_ppo.py
            assert not any(p.numel() for p in model.model.layers.parameters())
            return
        ids = torch.arange(4, 9)[None]  # all alike: with gradients, outside
        for each in (model, plain):
            each(ids).logits.square().mean().backward()
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            grad = sharding.whole(own.grad)  # summed over the two, but for the head, which stays whole
            torch.testing.assert_close(grad, other.grad * (2 if sharding.is_sharded([own]) else 1))


@pytest.mark.slow
@pytest.mark.parametrize("environment", [FSDP2, pytest.param(ZERO3, marks=with_deepspeed)], ids=["FSDP2", "ZeRO-3"])
def test_two_processes_run_their_own_numbers_of_forwards(tmp_path, environment):
    mp.spawn(differing_forwards, (str(tmp_path), environment), nprocs=2)
