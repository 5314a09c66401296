"""DeepSpeed ZeRO-3 for rlhf/sharding.py: weights, gradients and optimizer states in parts, one process a GPU.

One engine holds the decoders of all roles, frozen ones too. It steps once a mini-batch; its parts of gradients and
states are read and written through DeepSpeed's functions for that, as its own clipping knows one norm, PPO two, and its
own checkpoints are pickled. Loaded only where it is launched with: deepspeed is no requirement.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn

from configs.errors import UserError

Hooks = tuple[Mapping[int, Any], Mapping[int, Any]]


def wanted() -> bool:
    """Whether this run was launched with DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1")


def check() -> None:
    """Raises UserError for settings of accelerate's configuration under which PPO would not run as it should."""
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage != 3:
        raise UserError(f"zero_stage in accelerate's configuration must be 3 for PPO, not {plugin.zero_stage}")
    if plugin.zero3_init_flag:
        raise UserError("zero3_init_flag in accelerate's configuration must be false for PPO: heads stay whole")
    for name, device in _zero_settings().items():
        if isinstance(device, Mapping) and device.get("device") not in (None, "none"):
            raise UserError(f"{name} in accelerate's configuration must be none for PPO")
    if find_spec("deepspeed") is None:
        raise UserError("launched with DeepSpeed, which is not installed: pip install deepspeed, or launch with FSDP2")


def is_part(tensor: Any) -> bool:
    """Whether it is a parameter of which each process holds a part."""
    return hasattr(tensor, "ds_id")


def largest(module: nn.Module, fits: Callable[[nn.Parameter], bool]) -> list[nn.Module]:
    """The largest modules of `module` whose parameters all fit."""
    if all(map(fits, module.parameters())):
        return [module]
    return [part for child in module.children() for part in largest(child, fits)]


def shard(modules: Iterable[nn.Module]) -> None:
    """Split the parameters of `modules` over all processes; they stay the same objects, empty while given up."""
    import deepspeed

    deepspeed.init_distributed(deepspeed.accelerator.get_accelerator().communication_backend_name())
    for module in modules:
        deepspeed.zero.Init(module=module, config_dict_or_path=_config())


@contextmanager
def whole_inside(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, every process holds all of those that are in parts."""
    parts = [p for p in parameters if is_part(p)]
    if not parts:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        yield


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, every process holds all weights of `module`, without the engine's hooks, which would give them up."""
    with whole_inside(module.parameters()), _without_hooks(module):
        yield


@contextmanager
def by_layer(module: nn.Module, layers: Collection[nn.Module]) -> Iterator[None]:
    """Inside, each of `layers` is whole for its own forwards, what belongs to none of them all the time.

    No gradients: the engine's hooks are off. They gather matrix by matrix and ahead, in the order of the last forward,
    which is not the same on every process.
    """
    within = {p for layer in layers for p in layer.parameters()}

    opened: dict[nn.Module, AbstractContextManager[None]] = {}

    @torch.inference_mode(False)  # scores are computed under it, and a weight that it has touched cannot be trained
    @torch.no_grad()
    def gather(layer: nn.Module, *_: Any) -> None:
        opened[layer] = whole_inside(layer.parameters())
        opened[layer].__enter__()

    @torch.inference_mode(False)
    @torch.no_grad()
    def give_up(layer: nn.Module, *_: Any) -> None:
        opened.pop(layer).__exit__(None, None, None)

    with whole_inside(p for p in module.parameters() if p not in within), _without_hooks(module):
        for layer in layers:
            layer.register_forward_pre_hook(gather)
            layer.register_forward_hook(give_up)
        yield


@dataclass(frozen=True)
class Moment:
    """A tensor of the optimizer's state, in parts."""

    parameter: Any
    name: str

    def whole(self) -> Tensor:
        """All of it; every process has to ask."""
        return self.parameter._z3_optimizer.get_full_hp_param(self.parameter, self.name)


def whole(parameter: Tensor) -> Tensor:
    """A parameter with all its parts; every process has to ask."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def assign(parameter: Any, value: Tensor) -> None:
    """Put a whole tensor, which every process has, into a parameter in parts and the copy that the optimizer steps."""
    own = _own_part(parameter, value)
    parameter.ds_tensor.data.copy_(own)
    if hasattr(parameter, "_z3_optimizer"):
        parameter._z3_optimizer.set_local_hp_param(own, parameter)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Of the whole gradient, summed over processes."""
    square = torch.nn.utils.get_total_norm([_gradient(p) for p in parameters]) ** 2
    torch.distributed.all_reduce(square)
    return square.sqrt()


def scale_gradients(parameters: Iterable[nn.Parameter], factor: Tensor) -> None:
    """To be called once before each step: put the sum over processes, times `factor`, in the place of their mean."""
    for parameter in parameters:
        parameter._z3_optimizer.set_local_grad_for_param(_gradient(parameter) * factor, parameter)


class Optimizer:
    """An optimizer of parameters in parts, through the engine, and of whole ones; to the loop it is torch's."""

    def __init__(
        self,
        modules: Iterable[nn.Module],
        groups: list[dict[str, Any]],
        make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
    ) -> None:
        """`modules` hold all that `shard` has split. A group has parameters in parts only or whole ones only."""
        import deepspeed

        split = [group for group in groups if is_part(group["params"][0])]
        rest = [group for group in groups if not is_part(group["params"][0])]
        self.param_groups = [*map(dict, split), *rest]  # DeepSpeed changes the groups it is given
        self.split = [p for group in split for p in group["params"]]
        self.rest = make(rest) if rest else None
        self.inner = make(split)
        model = nn.ModuleList(part for module in modules for part in largest(module, is_part))
        self.engine = deepspeed.initialize(model=model, optimizer=self.inner, config=_config())[0]
        self.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        self.engine.backward(loss)

    def step(self) -> None:
        """One step of all parameters."""
        self.engine.step()
        if self.rest is not None:
            self.rest.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients. The engine only overwrites those that the next backward reaches: none is left over."""
        zero = self.engine.optimizer
        zero.zero_grad()
        zero.grad_partitions_flat_buffer.zero_()
        zero.micro_step_id = 1  # add to what is there, whichever backward comes first
        if self.rest is not None:
            self.rest.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with `Moment` for tensors in parts."""
        states: list[dict[str, Any]] = []
        for parameter in self.split:
            own = self.inner.state.get(self._flat(parameter), {})
            states.append({name: x.clone() if x.ndim == 0 else Moment(parameter, name) for name, x in own.items()})
        rest = self.rest.state_dict()["state"] if self.rest is not None else {}
        state = {index: own for index, own in enumerate(states) if own}
        return {"state": state | {len(states) + index: own for index, own in rest.items()}, "param_groups": []}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, of whole tensors."""
        state = state_dict["state"]
        for index, parameter in enumerate(self.split):
            for name, value in state.get(index, {}).items():
                flat = self._flat(parameter)
                own = self.inner.state[flat]
                if value.ndim == 0:
                    own[name] = value.clone()
                    continue
                own.setdefault(name, torch.zeros_like(flat))
                self.engine.optimizer.set_local_hp_param(_own_part(parameter, value), parameter, name)
        if self.rest is not None:
            count = len(self.split)
            rest = {index - count: own for index, own in state.items() if index >= count}
            self.rest.load_state_dict({"state": rest, "param_groups": self.rest.state_dict()["param_groups"]})

    def _flat(self, parameter: Any) -> Tensor:
        """Of the tensors that are stepped, that which holds this parameter's part."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat[zero.grad_position[zero.get_param_id(parameter)][0]]


def _own_part(parameter: Any, value: Tensor) -> Tensor:
    """This process's part of a whole tensor, filled up with zeros to the size that all parts have."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    own = value.flatten()[rank * size : (rank + 1) * size].to(parameter.ds_tensor)
    return torch.nn.functional.pad(own, (0, size - own.numel()))


def _gradient(parameter: Any) -> Tensor:
    """This process's part of the gradient, summed over processes; the engine has taken their mean."""
    return parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter) * torch.distributed.get_world_size()


@contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Inside, the hooks of `module` are off, those of all its modules too; what is put on there is off afterwards."""
    modules = list(module.modules())
    hooks = [_swap_hooks(m, (OrderedDict(), OrderedDict())) for m in modules]
    try:
        yield
    finally:
        for own, kept in zip(modules, hooks, strict=True):
            _swap_hooks(own, kept)


def _swap_hooks(module: Any, hooks: Hooks) -> Hooks:
    before = (module._forward_pre_hooks, module._forward_hooks)
    module._forward_pre_hooks, module._forward_hooks = hooks
    return before


def _zero_settings() -> dict[str, Any]:
    """What accelerate's configuration says of ZeRO, without what it leaves to accelerate."""
    settings = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    return {name: value for name, value in settings.items() if value != "auto"}


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # the loop counts tokens itself; only their ratio matters to the engine
        "gradient_accumulation_steps": 1,
        "zero_optimization": {**_zero_settings(), "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,  # the loop clips
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
