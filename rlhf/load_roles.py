"""The models behind the roles of PPO: five adapters and heads on one base under LoRA, a model each without it."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.ppo_settings import PPOSettings
from reward.adapters import Adapters, is_adapter, read_adapter
from reward.attention import use_tree_attention
from reward.model import BorrowedBackbone, create_reward_model, load_reward_model
from rlhf import sharding
from rlhf.hardware import attend_in_float32
from rlhf.models import decoder_of, freeze_embeddings, load_base, load_policy, lora_config, resolve_dtype, unwrap
from rlhf.roles import Role, Roles, check_plain_head
from rlhf.tokenizer import check_same_tokenizer

POLICY = "default"  # what peft calls an adapter that stands alone: the saved one loads without naming it


def load_roles(ppo: PPOSettings, model_settings: ModelSettings, tokenizer: Any, device: Any, seed: int) -> Roles:
    """Load the models that `ppo` names onto `device`; policy and value model trainable, the others frozen.

    Raises UserError where a model is missing, is not what its field asks for, or reads ids by another tokenizer.
    """
    sharded = sharding.wanted(ppo.gather_weights)
    if sharded and model_settings.load_in_4bit:
        raise UserError("load_in_4bit: 4-bit weights are not sharded; launch without FSDP or DeepSpeed")
    if ppo.value_model == "helpfulness" and not ppo.helpfulness_model_path:
        raise UserError("value_model: helpfulness needs helpfulness_model_path; without one use value_model: policy")
    for field, path in reward_paths(ppo).items():
        check_same_tokenizer(tokenizer, path, field)
    if ppo.reference_model == "sft":
        check_same_tokenizer(tokenizer, str(ppo.sft_model_path), "sft_model_path")
    if model_settings.lora_dropout:
        raise UserError("lora_dropout must be 0 for PPO: with dropout pi and pi_old would differ before any step")
    load = _Shared if model_settings.use_peft else _Separate
    roles = load(ppo, model_settings, tokenizer, torch.device(device), seed).roles()
    check_plain_head(roles.policy.model)
    for role in (roles.policy, roles.reference, roles.value, *roles.reward_models.values()):
        own = role.adapters.model if role.adapters else role.model
        if ppo.bf16 and torch.device(device).type == "cpu" and not isinstance(own, BorrowedBackbone):
            attend_in_float32(unwrap(own))
        if ppo.gradient_checkpointing and role.trained and not isinstance(own, BorrowedBackbone):
            unwrap(own).gradient_checkpointing_enable({"use_reentrant": False})
            own.train()
        if sharded:  # from the CPU's memory: beside embeddings and head no GPU holds more than a layer whole
            sharding.shard(role.model, torch.device(device), ppo.gather_weights)
        else:
            role.model.to(device)
    if sharded:
        roles.refresh()
    return roles


def reward_paths(ppo: PPOSettings) -> dict[str, str]:
    """The reward models that are named, by the fields that name them, and the held-out judge's where there is one."""
    paths = {f"{name}_model_path": path for name, path in ppo.reward_model_paths.items()}
    judges = ("judge_helpfulness_model_path", "judge_safety_model_path")
    return paths | ({field: getattr(ppo, field) for field in judges} if ppo.judge_helpfulness_model_path else {})


class _Loader:
    def __init__(self, ppo: PPOSettings, model: ModelSettings, tokenizer: Any, device: torch.device, seed: int) -> None:
        self.ppo, self.model, self.tokenizer, self.device, self.seed = ppo, model, tokenizer, device, seed
        self.base = model.model_name_or_path

    def reward_model(self, path: str, trainable: bool = False) -> Any:
        model = load_reward_model(path, resolve_dtype(self.model, trainable), self.model.attn_implementation)
        return model if trainable else model.requires_grad_(False)

    def frozen_policy(self, path: str) -> Any:
        return load_policy(replace(self.model, model_name_or_path=path, adapter_path=None), trainable=False)

    def finished(self, policy: Role, reference: Role, value: Role, reward_models: dict[str, Role]) -> Roles:
        return Roles(policy, reference, value, reward_models, self.ppo.temperature, bf16=self.ppo.bf16,
                     one_trunk=self.ppo.value_model == "trunk")  # fmt: skip

    def no_head(self, model: Any) -> Tensor:
        """A scalar head of zeros: values of 0 before the first update, as whitened rewards average 0."""
        return torch.zeros(1, model.config.get_text_config().hidden_size)


class _Separate(_Loader):
    """Full fine-tuning: a model for each role."""

    def roles(self) -> Roles:
        policy = load_policy(self.model)
        use_tree_attention(policy)
        sft = self.ppo.reference_model == "sft"
        reference = (
            self.frozen_policy(str(self.ppo.sft_model_path)) if sft else load_policy(self.model, trainable=False)
        )
        reward_models = {}
        for field, path in reward_paths(self.ppo).items():
            if is_adapter(path):
                raise UserError(
                    f"{field}: {path} is an adapter; pass the merged model beside it, or set use_peft: true"
                )
            reward_models[field.removesuffix("_model_path")] = Role(self.reward_model(path))
        value = self.value(policy)
        own = {"score.weight": value.score.weight} if self.ppo.value_model == "trunk" else _trainable(value)
        return self.finished(Role(policy, trained=_trainable(policy)), Role(reference), Role(value, trained=own),
                             reward_models)  # fmt: skip

    def value(self, policy: Any) -> Any:
        if self.ppo.value_model == "trunk":
            return BorrowedBackbone(policy, self.no_head(policy))
        if self.ppo.value_model == "policy":
            dtype = resolve_dtype(self.model, trainable=True)
            value = create_reward_model(self.base, self.tokenizer, dtype, self.model.attn_implementation, self.seed)
            nn.init.zeros_(value.score.weight)
            decoder_of(value).load_state_dict(decoder_of(policy).state_dict())  # adapter_path is merged there only
        else:
            value = self.reward_model(self.ppo.value_path, trainable=True)
        if self.model.freeze_embeddings:
            freeze_embeddings(value)
        return value


class _Shared(_Loader):
    """LoRA: roles are adapters of one base, where their folders hold adapters of it; merged models stand beside it."""

    def roles(self) -> Roles:
        self.causal = load_base(self.model, device=self.device).eval()
        use_tree_attention(self.causal)
        self.adapters = Adapters(self.causal)
        self.start: tuple[Any, Any] = (lora_config(self.model), None)
        if self.model.adapter_path is not None:
            self.start = read_adapter(self.model.adapter_path, self.base, "adapter_path")[:2]
        config, start = self.start
        self.adapters.add(POLICY, config, start, trained=True)
        policy = Role(self.adapters.model, self.adapters, POLICY, self.adapters.parameters(POLICY))
        reference = self.reference()
        reward_models = {}
        for field, path in reward_paths(self.ppo).items():
            name = field.removesuffix("_model_path")
            if is_adapter(path):
                reward_models[name] = self.scorer(f"reward_{name}", path, field)
            else:
                reward_models[name] = Role(self.reward_model(path))
        return self.finished(policy, reference, self.value(policy, reward_models), reward_models)

    def reference(self) -> Role:
        path = self.ppo.sft_model_path if self.ppo.reference_model == "sft" else self.model.adapter_path
        if path is None:
            return Role(self.adapters.model, self.adapters, None)  # the policy with its adapter switched off
        if not is_adapter(path):
            return Role(self.frozen_policy(path))
        config, weights, _ = read_adapter(path, self.base, "sft_model_path")
        self.adapters.add("reference", config, weights, trained=False)
        return Role(self.adapters.model, self.adapters, "reference")

    def scorer(self, name: str, path: str, field: str, trained: bool = False) -> Role:
        """An adapter of the base with the scalar head that was trained with it."""
        config, weights, head_1D = read_adapter(path, self.base, field)
        if head_1D is None:
            raise UserError(f"{field}: the adapter {path} has no scalar head: it is not that of a reward model")
        return self.with_head(name, config, weights, head_1D, trained)

    def with_head(self, name: str, config: Any, weights: Any, head_1D: Tensor, trained: bool) -> Role:
        self.adapters.add(name, config, weights, trained=trained)
        model = BorrowedBackbone(self.causal, head_1D)
        model.score.requires_grad_(trained)
        own = {**self.adapters.parameters(name), "score.weight": model.score.weight} if trained else {}
        return Role(model, self.adapters, name, own)

    def value(self, policy: Role, reward_models: dict[str, Role]) -> Role:
        kind = self.ppo.value_model
        if kind == "trunk":
            model = BorrowedBackbone(self.causal, self.no_head(self.causal))
            return Role(model, self.adapters, POLICY, {"score.weight": model.score.weight})
        if kind == "policy":
            return self.with_head("value", *self.start, self.no_head(self.causal), trained=True)
        path = self.ppo.value_path
        if is_adapter(path):
            return self.scorer("value", path, "value_model", trained=True)
        # A merged reward model: the value model is an adapter on it. Without the adapter it still is the reward model.
        merged = reward_models["helpfulness"].model if kind == "helpfulness" else self.reward_model(path)
        own = Adapters(merged)
        own.add("value", lora_config(self.model, "SEQ_CLS"), None, trained=True)
        model = BorrowedBackbone(merged, merged.score.weight)
        if kind == "helpfulness":
            reward_models["helpfulness"] = Role(merged, own, None)
        return Role(model, own, "value", {**own.parameters("value"), "score.weight": model.score.weight})


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
