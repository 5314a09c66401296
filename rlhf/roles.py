"""The five roles of PPO behind one interface: policy, reference, value, helpfulness and safety reward model.

The loop asks for log-probs and values of token sequences and does not know what stands behind them: full fine-tuning
holds five models; under LoRA with `reference_model: start` the reference is the policy with its adapter switched off.

Axes: B sequences (prompt + response, padded on the right), T tokens, R response tokens, M rows of a micro-batch, N
response tokens of a micro-batch laid end to end, row after row.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoTokenizer

from configs.errors import UserError
from configs.model_settings import ModelSettings
from configs.ppo_settings import PPOSettings
from reward.collate import batches_by_budget, pad_right
from reward.model import add_lora, create_reward_model, load_reward_model
from reward.scorer import score_ids
from rlhf.hardware import attend_in_float32, mixed_precision
from rlhf.losses import token_logprobs
from rlhf.models import freeze_embeddings, load_policy, resolve_dtype


@dataclass(frozen=True)
class Sequences:
    """Prompts with their responses, as ids. `predicts_BT` is True where the *next* token is a response token."""

    ids_BT: Tensor
    lengths: list[int]
    predicts_BT: Tensor
    response_mask_BR: Tensor

    @classmethod
    def build(cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], device: Any) -> "Sequences":
        """Example: prompt 5 6, response 7 8 -> ids 5 6 7 8, predicts F T T F, response_mask T T."""
        ids_BT, _ = pad_right([[*p, *r] for p, r in zip(prompts, responses, strict=True)], pad_id=0)
        ends_B = torch.tensor([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
        starts_B = torch.tensor([len(p) for p in prompts])
        place_T = torch.arange(ids_BT.shape[1])
        predicts_BT = (place_T >= starts_B[:, None] - 1) & (place_T < ends_B[:, None] - 1)
        width = max(len(r) for r in responses)
        mask_BR = torch.arange(width) < (ends_B - starts_B)[:, None]
        return cls(ids_BT.to(device), ends_B.tolist(), predicts_BT.to(device), mask_BR.to(device))

    def micro_batches(self, rows: Sequence[int], token_budget: int) -> list[Tensor]:
        """`rows` split into groups of similar length whose padded size fits the budget."""
        groups = batches_by_budget([self.lengths[row] for row in rows], token_budget)
        return [torch.tensor([rows[i] for i in group], device=self.ids_BT.device) for group in groups]

    def hidden(self, decoder: nn.Module, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states before each response token [N, D], and those tokens [N].

        No attention mask: under a causal model nothing looks right, so padding on the right changes no real token,
        and SDPA takes its fast causal path.
        """
        width = max(self.lengths[row] for row in rows_M.tolist()) - 1  # the last token predicts none
        ids_MT, next_MT = self.ids_BT[rows_M, :width], self.ids_BT[rows_M, 1 : width + 1]
        predicts_MT = self.predicts_BT[rows_M, :width]
        hidden_MTD = decoder(input_ids=ids_MT, use_cache=False).last_hidden_state
        return hidden_MTD[predicts_MT], next_MT[predicts_MT]

    def flat(self, x_BR: Tensor, rows_M: Tensor) -> Tensor:
        """The response tokens of some rows laid end to end, in the order of `hidden`: [B, R] -> [N]."""
        return x_BR[rows_M][self.response_mask_BR[rows_M]]

    def scatter(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The inverse of `flat` over (rows_M, x_N) of all micro-batches; 0 at padding: -> [B, R] float32."""
        x_BR = torch.zeros(self.response_mask_BR.shape, device=self.ids_BT.device)
        for rows_M, x_N in parts:
            x_MR = torch.zeros(len(rows_M), x_BR.shape[1], device=x_BR.device)
            x_MR[self.response_mask_BR[rows_M]] = x_N.float()
            x_BR[rows_M] = x_MR
        return x_BR


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a PEFT wrapper (its layers carry the adapter), or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


@torch.inference_mode()
def teacher_forced_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], token_budget: int = 8192
) -> Tensor:
    """log pi of each response token in nats, float32 [B, R] on the CPU, 0 at padding: plain forwards, no cache."""
    causal = unwrap(model)
    sequences = Sequences.build(prompts, responses, next(causal.parameters()).device)
    parts: list[tuple[Tensor, Tensor]] = []
    for rows_M in sequences.micro_batches(range(len(prompts)), token_budget):
        hidden_ND, targets_N = sequences.hidden(getattr(causal, causal.base_model_prefix), rows_M)
        logprobs_N, _ = token_logprobs(hidden_ND, causal.get_output_embeddings().weight, targets_N)
        parts.append((rows_M, logprobs_N))
    return sequences.scatter(parts).cpu()


@dataclass
class Roles:
    """What the loop needs of the five models. `reference` None: the policy without its adapter.

    With `bf16` hidden states come from autocast; heads, log-probs and scores are float32 products of them.
    """

    policy: Any
    reference: Any
    value: Any
    reward_models: dict[str, Any]  # by name: "helpfulness", "safety"
    temperature: float = 1.0
    value_shift: float = 0.0  # V = (head - shift) / scale: puts a reward model's head on the scale of whitened scores
    value_scale: float = 1.0
    bf16: bool = False

    def policy_logprobs(
        self, sequences: Sequences, rows_M: Tensor, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """log pi of the response tokens [N] (at the sampling temperature), with gradient; and the entropy [N]."""
        return self._logprobs(self.policy, sequences, rows_M, entropy)

    @torch.no_grad()
    def reference_logprobs(self, sequences: Sequences, rows_M: Tensor) -> Tensor:
        """log pi_0 of the response tokens, [N]."""
        if self.reference is not None:
            return self._logprobs(self.reference, sequences, rows_M, False)[0]
        with self.policy.disable_adapter():
            return self._logprobs(self.policy, sequences, rows_M, False)[0]

    def values(self, sequences: Sequences, rows_M: Tensor) -> Tensor:
        """V before each response token, [N] float32, with gradient."""
        model = unwrap(self.value)
        hidden_ND, _ = self._hidden(model, sequences, rows_M)
        return (model.score(hidden_ND.float())[:, 0] - self.value_shift) / self.value_scale

    def scores(self, name: str, id_lists: Sequence[Sequence[int]], token_budget: int, k: int = 1) -> Tensor:
        """Raw scores of whole dialogues by the reward model `name`, [B] float32 on the CPU; k as in `score_ids`."""
        model = self.reward_models[name]
        with mixed_precision(self.bf16, next(model.parameters()).device.type):
            return score_ids(model, id_lists, token_budget, k)

    def _logprobs(
        self, model: Any, sequences: Sequences, rows_M: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        causal = unwrap(model)
        hidden_ND, targets_N = self._hidden(causal, sequences, rows_M)
        head_VD = causal.get_output_embeddings().weight
        return token_logprobs(hidden_ND.to(head_VD.dtype), head_VD, targets_N, self.temperature, entropy)

    def _hidden(self, model: Any, sequences: Sequences, rows_M: Tensor) -> tuple[Tensor, Tensor]:
        with mixed_precision(self.bf16, rows_M.device.type):
            return sequences.hidden(getattr(model, model.base_model_prefix), rows_M)


def load_roles(ppo: PPOSettings, model_settings: ModelSettings, tokenizer: Any, device: Any, seed: int) -> Roles:
    """Load the models that `ppo` names onto `device`; policy and value model trainable, the others frozen."""
    for field in ("helpfulness_model_path", "safety_model_path"):
        if not getattr(ppo, field):
            raise UserError(f"{field}: name the folder of that reward model")
        _check_same_tokenizer(tokenizer, field, getattr(ppo, field))
    model_settings = replace(model_settings, lora_dropout=0.0)  # dropout: pi and pi_old would differ before any step
    policy = load_policy(model_settings)
    _check_plain_head(policy)
    if ppo.reference_model == "sft":
        _check_same_tokenizer(tokenizer, "sft_model_path", str(ppo.sft_model_path))
        reference = load_policy(replace(model_settings, model_name_or_path=str(ppo.sft_model_path)), trainable=False)
    else:
        reference = None if model_settings.use_peft else load_policy(model_settings, trainable=False)

    frozen, trained = resolve_dtype(model_settings, trainable=False), resolve_dtype(model_settings, trainable=True)
    attention = model_settings.attn_implementation
    helpfulness = load_reward_model(ppo.helpfulness_model_path, frozen, attention)
    safety = load_reward_model(ppo.safety_model_path, frozen, attention)
    if ppo.value_model == "helpfulness":  # recipe sheet 10.2
        value: Any = load_reward_model(ppo.helpfulness_model_path, trained, attention)
    else:
        value = create_reward_model(model_settings.model_name_or_path, tokenizer, trained, attention, seed)
        nn.init.zeros_(value.score.weight)  # values of 0 before the first update, as whitened rewards average 0
    if model_settings.use_peft:
        lora = model_settings
        value = add_lora(value, lora.lora_r, lora.lora_alpha, 0.0, lora.lora_target_modules)
    elif model_settings.freeze_embeddings:
        freeze_embeddings(value)
    if ppo.gradient_checkpointing:
        for model in (policy, value):
            unwrap(model).gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
    for model in (helpfulness, safety):
        model.requires_grad_(False)
    for model in (policy, reference, value, helpfulness, safety):
        if model is not None:
            model.to(device)
            if ppo.bf16 and torch.device(device).type == "cpu":
                attend_in_float32(unwrap(model))
    reward_models = {"helpfulness": helpfulness, "safety": safety}
    return Roles(policy, reference, value, reward_models, ppo.temperature, bf16=ppo.bf16)


def _check_same_tokenizer(tokenizer: Any, field: str, path: str) -> None:
    """Ids go from role to role as they are, so every role must read them alike."""
    with contextlib.suppress(OSError, ValueError):
        other = AutoTokenizer.from_pretrained(path).get_vocab()
        ours = tokenizer.get_vocab()
        if (
            any(ours.get(token, index) != index for token, index in other.items())
            or len(other.keys() ^ ours.keys()) > 1
        ):
            raise UserError(f"{field}: {path} has another tokenizer than the policy; ids cannot pass between them")


def rescaled_logits(model: Any) -> str | None:
    """The config field by which `model` changes hidden states times its head's weight before they are logits."""
    config = unwrap(model).config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    return next((name for name in names if getattr(config, name, None) not in (None, 1.0)), None)


def _check_plain_head(policy: Any) -> None:
    """Log-probs are taken from hidden states times the head's weight; refuse models that do more than that."""
    if name := rescaled_logits(policy):
        raise UserError(f"model_name_or_path: PPO does not support models whose logits are rescaled ({name})")
    if not isinstance(unwrap(policy).get_output_embeddings(), nn.Linear):
        raise UserError("lora_target_modules: leave the output head out; PPO reads its weight directly")
