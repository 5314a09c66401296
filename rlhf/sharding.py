"""Weights that lie in parts on several GPUs (one process a GPU), and how they come together.

`accelerate launch --config_file configs/accelerate/fsdp2.yaml rlhf/ppo.py ...` asks for it, or zero3.yaml for DeepSpeed
(rlhf/zero3.py); nothing else knows which it is. While gradients are
computed a layer is gathered when it is needed and given up after it; sampling and scoring, which run a model hundreds
of times, gather it once and keep it (paper 3.2.3: generation under FSDP was 20 times slower). A model that no GPU holds
whole (`gather_weights: false`) is gathered layer by layer there too, by all processes at once: they go in lockstep.
Heads stay whole on each GPU: log-probs read their weight directly, and they are a small part.
"""

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from configs.errors import UserError
from reward.scorer import evaluation_mode
from rlhf import zero3
from rlhf.models import decoder_of, merged_weights, unwrap

# Of accelerate's configuration, passed on by its launcher. Its Accelerator reads them on a GPU only.
ENABLED, VERSION, RESHARD, OFFLOAD, RAM_EFFICIENT = (
    "ACCELERATE_USE_FSDP", "FSDP_VERSION", "FSDP_RESHARD_AFTER_FORWARD", "FSDP_OFFLOAD_PARAMS",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
)  # fmt: skip


def wanted(gather: bool = True) -> bool:
    """Whether this run was launched with FSDP or DeepSpeed; `gather`: `gather_weights` of its settings.

    UserError for what PPO does not support of them, and for weights that are to stay in parts where there are none.
    """
    if zero3.wanted():
        zero3.check()
        return True
    if not _flag(ENABLED):
        if not gather:
            raise UserError(
                "gather_weights: false has no effect where every process holds whole models; launch with a file of"
                " configs/accelerate, or leave it out"
            )
        return False
    if os.environ.get(VERSION, "1") != "2":
        raise UserError("fsdp_version in accelerate's configuration must be 2 for PPO")
    if _flag(OFFLOAD):
        raise UserError("fsdp_offload_params in accelerate's configuration must be false for PPO")
    if _flag(RAM_EFFICIENT):  # transformers would leave the weights of all processes but one empty
        raise UserError("fsdp_cpu_ram_efficient_loading in accelerate's configuration must be false for PPO")
    if not gather and not _flag(RESHARD, "true"):  # every layer would stay, so all would be there after a forward
        raise UserError("gather_weights: false needs fsdp_reshard_after_forward: true in accelerate's configuration")
    return True


def shard(model: Any, device: torch.device, gather: bool = True) -> None:
    """Split the decoder of `model`, layer by layer, over all processes. Its parameters are new objects afterwards.

    `model` may lie in the CPU's memory: what is split goes to the GPU a layer at a time, the rest then to `device`.
    Without `gather` it stays in parts while it samples and scores.
    """
    decoder = decoder_of(model)
    _split(model, decoder)
    for tensor in [*model.parameters(), *model.buffers()]:
        if not is_sharded([tensor]) and tensor.device != device:
            tensor.data = tensor.data.to(device)
    if gather or stays_in_parts(model):
        return
    decoder._stays_in_parts = True
    for module in _sharded(decoder):  # room for gathered weights is made once: under inference_mode none could train
        module.unshard()
        module.reshard()


def _split(model: Any, decoder: Any) -> None:
    if isinstance(decoder, FSDPModule) or any(map(zero3.is_part, decoder.parameters())):
        return
    whole = _head_weights(model)
    if zero3.wanted():
        zero3.shard(zero3.largest(decoder, lambda p: p not in whole))
        return
    options: dict[str, Any] = {"reshard_after_forward": _flag(RESHARD, "true"), "ignored_params": whole}
    for layer in _layers(decoder):
        fully_shard(layer, **options)
    fully_shard(decoder, **options)
    for module in _sharded(decoder):
        module.set_gradient_divide_factor(1.0)  # losses are sums over a global count: gradients are summed
        module.set_force_sum_reduction_for_comms(True)  # gloo, for CPUs, knows nothing else


@contextmanager
def gathered(model: Any) -> Iterator[None]:
    """Inside, every process holds all weights of `model`: forwards need no traffic. Nothing where it stays in parts."""
    decoder = decoder_of(model)
    done = getattr(decoder, "_is_gathered", False) or stays_in_parts(model)
    if done or not is_sharded(decoder.parameters()):
        yield
        return
    decoder._is_gathered = True
    try:
        with zero3.gathered(decoder) if zero3.wanted() else _unsharded(decoder):
            yield
    finally:
        decoder._is_gathered = False


@contextmanager
def at_own_pace(model: Any) -> Iterator[None]:
    """Around forwards without gradients, of which each process runs as many as it needs: gathered, or in lockstep.

    All processes must enter and leave it together, for one model after the other.
    """
    decoder = decoder_of(model)
    if not stays_in_parts(model):
        with gathered(model):
            yield
        return
    with zero3.by_layer(decoder, _layers(decoder)) if zero3.wanted() else nullcontext(), lockstep(decoder):
        yield


@contextmanager
def lockstep(decoder: nn.Module) -> Iterator[None]:
    """Inside, processes may run forwards of different number and size, though every one takes all of them.

    Before each forward a flag is summed over the processes: 1, this one computes. A process that is done adds 0 and, as
    long as the sum says that another computes, runs one token for nothing. A process that raises waits for nobody: the
    launcher ends the others.
    """
    device = next(decoder.parameters()).device

    def computing(flag: int) -> Tensor:
        count = torch.full((1,), flag, device=device)
        dist.all_reduce(count)
        return count

    def announce(*_: Any) -> None:
        computing(1)

    hook = decoder.register_forward_pre_hook(announce, prepend=True)  # before the hook that gathers
    try:
        yield
    finally:
        hook.remove()
    nothing = torch.zeros(1, 1, dtype=torch.long, device=device)
    with evaluation_mode(decoder), torch.no_grad():
        while computing(0).item():
            decoder(input_ids=nothing, use_cache=False)


def stays_in_parts(model: Any) -> bool:
    """Whether `shard` was told not to gather it for sampling and scoring."""
    return getattr(decoder_of(model), "_stays_in_parts", False)


def merged(model: Any, keep: bool) -> dict[str, Tensor]:
    """`merged_weights` of a sharded model in the CPU's memory, where `keep`; a GPU holds one layer whole at a time.

    Every process has to call it.
    """
    base, decoder = unwrap(model), decoder_of(model)
    weights: dict[str, Tensor] = {}
    layers = [list(layer.modules()) for layer in _layers(decoder)]
    rest = set(base.modules()).difference(*layers)
    for modules in (*layers, rest):
        with _whole(modules):
            found = merged_weights(base, set(modules)) if keep else {}
            copies = {x.data_ptr(): x.to("cpu", copy=True) for x in found.values()}  # tied weights stay one
            weights |= {name: copies[x.data_ptr()] for name, x in found.items()}
    return weights


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
def _whole(modules: Collection[nn.Module]) -> Iterator[None]:
    """Inside, the own parameters of `modules` have all their parts."""
    sharded = [module for module in modules if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    with zero3.whole_inside([p for module in modules for p in module.parameters(recurse=False)]):
        yield
    for module in sharded:
        module.reshard()


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


def _layers(decoder: Any) -> list[nn.Module]:
    """Its layers, split already or not: FSDP makes a subclass of their class."""
    names = set(decoder._no_split_modules or [])
    return [module for module in decoder.modules() if any(kind.__name__ in names for kind in type(module).__mro__)]


def _sharded(decoder: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in decoder.modules() if isinstance(module, FSDPModule))


def _flag(name: str, default: str = "false") -> bool:
    return os.environ.get(name, default).lower() in ("true", "1")
