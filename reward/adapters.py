"""LoRA adapters on one frozen base, of which one acts at a time: several models for the memory of one.

    adapters = Adapters(base)
    adapters.add("policy", config, weights, trained=True)
    with adapters.acting("policy"):
        ...                             # forward and backward: recomputed activations need the same adapter

All adapters are relative to the same base weights, bfloat16 or 4-bit, which no gradient ever reaches.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from configs.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HEAD = "score.weight"  # how the name of the scalar head ends in the adapter of a reward model


class Adapters:
    """Named LoRA adapters on `base`. Until the first is added, `model` is the base itself."""

    def __init__(self, base: PreTrainedModel) -> None:
        self.model: PreTrainedModel | PeftModel = base.requires_grad_(False)
        self._active: str | None = None
        self._trained: dict[str, dict[str, nn.Parameter]] = {}

    def add(self, name: str, config: LoraConfig, weights: Mapping[str, Tensor] | None, trained: bool) -> None:
        """A new adapter; without `weights` it starts as the identity. Raises UserError where the two do not fit."""
        config.inference_mode = False
        try:
            if isinstance(self.model, PeftModel):
                self.model.add_adapter(name, config)
            else:
                self.model = PeftModel(self.model, config, adapter_name=name)
                self._active = name  # those added later wait for their turn
        except ValueError as error:
            raise UserError(f"lora_target_modules: {error}") from error
        if weights is not None:
            unexpected = set_peft_model_state_dict(self.model, dict(weights), adapter_name=name).unexpected_keys
            if unexpected:
                raise UserError(f"the adapter for {name} has weights for {unexpected[0]}, which the base lacks")
        self._trained[name] = {}
        if trained:
            self._trained[name] = {  # an adapter of embeddings ends in its name, others go on
                key: p for key, p in self.model.named_parameters() if f".{name}." in f"{key}." and "lora_" in key
            }
        self._keep_gradients()

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """What is trained of the adapter `name`, by its name in the model."""
        return self._trained[name]

    def refresh(self) -> None:
        """After sharding, which puts new parameters in the place of the old ones."""
        for name, own in self._trained.items():
            self._trained[name] = {key: self.model.get_parameter(key) for key in own}

    @contextmanager
    def acting(self, name: str | None) -> Iterator[None]:
        """Inside, the model computes with the adapter `name`; with None, as the base alone."""
        before = self._active
        self._switch(name)
        try:
            yield
        finally:
            self._switch(before)

    def _switch(self, name: str | None) -> None:
        if name == self._active:
            return
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(name is not None)
                if name is not None:
                    layer.set_adapter(name)
        self._active = name
        self._keep_gradients()

    def _keep_gradients(self) -> None:
        """peft lets only the active adapter be trained; here each is, or is not, whichever is active."""
        trained = {id(p) for own in self._trained.values() for p in own.values()}
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(id(parameter) in trained)


def is_adapter(path: str | Path) -> bool:
    """Whether `path` (a folder or a Hub name) holds an adapter and no whole model."""
    if Path(path).is_dir():
        return Path(path, CONFIG).exists()
    try:
        return cached_file(str(path), CONFIG) is not None
    except OSError:
        return False


def read_adapter(path: str | Path, base: str, field: str) -> tuple[LoraConfig, dict[str, Tensor], Tensor | None]:
    """The configuration, weights and scalar head ([1, D], None for a language model) of an adapter of `base`.

    Raises UserError, naming `field`, where there is none, where it is not LoRA, where it was made for another base (the
    numbers would fit and mean nothing) and where it changes more than its layers' products.
    """
    try:
        files = [cached_file(str(path), name) for name in (CONFIG, WEIGHTS)]
    except OSError as error:
        raise UserError(f"{field}: no LoRA adapter at {path} ({CONFIG} and {WEIGHTS}): {error}") from error
    described = json.loads(Path(files[0]).read_text(encoding="utf-8"))
    if described.get("peft_type") != "LORA":
        raise UserError(f"{field}: {path} is an adapter of type {described.get('peft_type')}; only LoRA is supported")
    made_for = described.get("base_model_name_or_path")
    if not _same_model(made_for, base):
        raise UserError(
            f"{field}: the adapter {path} was made for {made_for}, the model here is {base}. Train it on this base, "
            f"pass a merged model instead, or correct base_model_name_or_path in its {CONFIG} if both are the same"
        )
    whole = sorted({*(described.get("modules_to_save") or [])} - {"score", "classifier"})  # peft names both of its own
    if whole or described.get("bias", "none") != "none":
        raise UserError(
            f"{field}: the adapter {path} changes weights of the base too ({', '.join(whole) or 'biases'}), which "
            "other roles share; pass a merged model instead"
        )
    config: Any = LoraConfig.from_pretrained(Path(files[0]).parent)
    config.modules_to_save = None  # the scalar head stands beside the base, not in it
    config.task_type = "CAUSAL_LM"
    config.lora_dropout = 0.0  # says how it was trained, not what it is: whoever trains on sets it anew
    weights = load_file(files[1])
    heads = [name for name in weights if name.endswith(HEAD)]
    head = weights[heads[0]] if heads else None
    # peft adds the embeddings where a padding token was added: loaded, they would replace those of the base
    return config, {name: weight for name, weight in weights.items() if "lora_" in name}, head


def _same_model(one: str | None, other: str) -> bool:
    if one is None or one == other:
        return one == other
    return Path(one).exists() and Path(other).exists() and Path(one).resolve() == Path(other).resolve()
