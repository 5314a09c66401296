"""Weights that lie in parts on several GPUs (one process a GPU), and how they come together.

`accelerate launch --config_file configs/accelerate/fsdp2.yaml rlhf/ppo.py ...` asks for it, or zero3.yaml for DeepSpeed
(rlhf/zero3.py); nothing else knows which it is. While gradients are
computed a layer is gathered when it is needed and given up after it; sampling and scoring, which run a model hundreds
of times, gather it once and keep it (paper 3.2.3: generation under FSDP was 20 times slower). Heads stay whole on each
GPU: log-probs read their weight directly, and they are a small part.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.errors import UserError
from rlhf import zero3
from rlhf.models import decoder_of, unwrap

# Of accelerate's configuration, passed on by its launcher. Its Accelerator reads them on a GPU only.
ENABLED, VERSION, RESHARD, OFFLOAD, RAM_EFFICIENT = (
    "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
)  # fmt: skip


def wanted() -> bool:
    """Whether this run was launched with FSDP or DeepSpeed. UserError for what PPO does not support of them."""
    if zero3.wanted():
        zero3.check()
        return True
    if not _flag(ENABLED):
        return False
    if os.environ.get(VERSION, "1") != "2":
        raise UserError("fsdp_version in accelerate's configuration must be 2 for PPO")
    if _flag(OFFLOAD):
        raise UserError("fsdp_offload_params in accelerate's configuration must be false for PPO")
    if _flag(RAM_EFFICIENT):  # transformers would leave the weights of all processes but one empty
        raise UserError("fsdp_cpu_ram_efficient_loading in accelerate's configuration must be false for PPO")
    return True


def shard(model: Any) -> None:
    """Split the decoder of `model`, layer by layer, over all processes. Its parameters are new objects afterwards."""
    decoder = decoder_of(model)
    if isinstance(decoder, FSDPModule) or any(map(zero3.is_part, decoder.parameters())):
        return
    whole = _head_weights(model)
    if zero3.wanted():
        zero3.shard(zero3.largest(decoder, lambda p: p not in whole))
        return
    options: dict[str, Any] = {"reshard_after_forward": _flag(RESHARD, "true"), "ignored_params": whole}
    layers = set(decoder._no_split_modules or [])
    for module in decoder.modules():
        if type(module).__name__ in layers:
            fully_shard(module, **options)
    fully_shard(decoder, **options)
    for module in _sharded(decoder):
        module.set_gradient_divide_factor(1.0)  # losses are sums over a global count: gradients are summed
        module.set_force_sum_reduction_for_comms(True)  # gloo, for CPUs, knows nothing else


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Inside, every process holds all weights of `model`: forwards need no traffic, in any number per process."""
    decoder = decoder_of(model)
    if not is_sharded(decoder.parameters()) or getattr(decoder, "_is_gathered", False):
        yield
        return
    decoder._is_gathered = True
    try:
        with zero3.gathered(decoder) if zero3.wanted() else _unsharded(decoder):
            yield
    finally:
        decoder._is_gathered = False


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them is in parts: then all processes must run forward and backward equally often."""
    return any(isinstance(p, DTensor) or zero3.is_part(p) for p in parameters)


def dimensions(parameter: Tensor) -> int:
    """2 for a matrix, in parts or not."""
    return len(parameter.ds_shape) if zero3.is_part(parameter) else parameter.ndim


@torch.no_grad()
def whole(tensor: Tensor | zero3.Moment) -> Tensor:
    """A tensor with all its parts; every process has to ask for it."""
    if isinstance(tensor, zero3.Moment):
        return tensor.whole()
    if zero3.is_part(tensor):
        return zero3.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, sample: Tensor) -> Tensor:
    """A whole tensor split as `sample` is."""
    if not isinstance(sample, DTensor):
        return tensor
    return distribute_tensor(tensor.to(sample.device), sample.device_mesh, sample.placements)


@torch.no_grad()
def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Put a whole tensor into a parameter."""
    if zero3.is_part(parameter):
        zero3.assign(parameter, value)
    else:
        parameter.copy_(like(value, parameter))


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients down to `max_norm` over all of them, parts of other processes included; the norm before."""
    parts = [p for p in parameters if zero3.is_part(p)]
    groups = [[p for p in parameters if p.grad is not None and is_sharded([p]) == split] for split in (False, True)]
    norms = [whole(torch.nn.utils.get_total_norm([p.grad for p in group])) for group in groups if group]
    norms += [zero3.gradient_norm(parts)] if parts else []
    norm = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    for group in groups:
        torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    zero3.scale_gradients(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


@contextmanager
def _unsharded(decoder: Any) -> Iterator[None]:
    modules = list(_sharded(decoder))
    for module in modules:
        module.unshard()
    decoder.set_reshard_after_forward(False)
    try:
        yield
    finally:
        decoder.set_reshard_after_forward(_flag(RESHARD, "true"))
        for module in modules:
            module.reshard()


def _head_weights(model: Any) -> set[nn.Parameter]:
    """What stays whole: the output head and, where it is tied to them, the embeddings."""
    plain = unwrap(model)
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    return set() if head is None else {head.weight}


def _sharded(decoder: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in decoder.modules() if isinstance(module, FSDPModule))


def _flag(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).lower() in ("true", "1")
