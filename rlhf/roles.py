"""The five roles of PPO behind one interface: policy, reference, value, helpfulness and safety reward model.

The loop asks for log-probs, values and scores and does not know what stands behind them. Under LoRA all roles are
adapters and heads on one frozen base (reward/adapters.py); full fine-tuning holds a model for each. rlhf/load_roles.py
makes them.

Axes: B sequences (prompt + response), R response tokens, N response tokens of a micro-batch, as in rlhf/sequences.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from reward.adapters import Adapters
from reward.model import takes_trees
from reward.scorer import score_ids
from rlhf.hardware import mixed_precision
from rlhf.losses import token_logprobs
from rlhf.models import unwrap
from rlhf.sequences import Sequences
from rlhf.sharding import at_own_pace, gathered


@dataclass
class Role:
    """A model, and the adapter under which it plays the role (None: the base alone, or a model of its own)."""

    model: Any  # policy, reference: a causal language model; the others: a model with a scalar head `score`
    adapters: Adapters | None = None
    adapter: str | None = None
    trained: dict[str, nn.Parameter] = field(default_factory=dict)  # by name in `model`; empty where it is frozen

    def acting(self) -> AbstractContextManager[None]:
        """Inside, `model` computes as this role. Backward belongs inside too: it may recompute activations."""
        return nullcontext() if self.adapters is None else self.adapters.acting(self.adapter)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """As `acting`, for many forwards without gradients: sharded weights are gathered, or processes go in lockstep.

        Gives the model.
        """
        with self.acting(), at_own_pace(self.model):
            yield self.model


@dataclass
class Roles:
    """What the loop needs of the models.

    With `bf16` hidden states come from autocast; heads, log-probs and scores are float32 products of them.
    """

    policy: Role
    reference: Role
    value: Role
    reward_models: dict[str, Role]  # by name: "helpfulness", "safety"
    temperature: float = 1.0
    value_shift: float = 0.0  # V = (head - shift) / scale: puts a reward model's head on the scale of whitened scores
    value_scale: float = 1.0
    one_trunk: bool = False  # the value head reads the policy's own hidden states
    bf16: bool = False

    @property
    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """What the optimizer changes and a checkpoint holds, by role and name."""
        return {"policy": self.policy.trained, "value": self.value.trained}

    @property
    def everyone(self) -> tuple[Role, ...]:
        """All roles, the policy first."""
        return (self.policy, self.reference, self.value, *self.reward_models.values())

    def refresh(self) -> None:
        """After sharding (rlhf/sharding.py), which puts new parameters in the place of the old ones."""
        for adapters in {id(role.adapters): role.adapters for role in self.everyone if role.adapters}.values():
            adapters.refresh()
        for role in (self.policy, self.value):
            holder = role.adapters.model if role.adapters else role.model
            role.trained = {
                name: (role.model if name == "score.weight" else holder).get_parameter(name) for name in role.trained
            }

    @property
    def take_trees(self) -> bool:
        """Whether several responses to a prompt may be computed as one row (reward/tree.py)."""
        return all(takes_trees(role.model) for role in (self.policy, self.reference, self.value))

    @contextmanager
    def base_gathered(self) -> Iterator[None]:
        """Around the phases without gradients: a shared base is gathered once for all of them."""
        with gathered(self.policy.model) if self.policy.adapters else nullcontext():
            yield

    def policy_logprobs(
        self, sequences: Sequences, rows: Sequence[int], entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """log pi of the response tokens [N] (at the sampling temperature), with gradient; and the entropy [N]."""
        return self._logprobs(self.policy, *self._hidden(self.policy, sequences, rows), entropy)

    @torch.no_grad()
    def reference_logprobs(self, sequences: Sequences, rows: Sequence[int]) -> Tensor:
        """log pi_0 of the response tokens, [N]."""
        return self._logprobs(self.reference, *self._hidden(self.reference, sequences, rows), False)[0]

    def values(self, sequences: Sequences, rows: Sequence[int]) -> Tensor:
        """V before each response token, [N] float32, with gradient."""
        return self._values(self._hidden(self.value, sequences, rows)[0])

    def logprobs_and_values(
        self, sequences: Sequences, rows: Sequence[int], entropy: bool = True
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """log pi, its entropy and V, [N] each, out of one pass: for `one_trunk`."""
        hidden_ND, targets_N = self._hidden(self.policy, sequences, rows)
        logprobs_N, entropy_N = self._logprobs(self.policy, hidden_ND, targets_N, entropy)
        return logprobs_N, entropy_N, self._values(hidden_ND)

    def scores(self, name: str, id_lists: Sequence[Sequence[int]], token_budget: int, k: int = 1) -> Tensor:
        """Raw scores of whole dialogues by the reward model `name`, [B] float32 on the CPU; k as in `score_ids`."""
        role = self.reward_models[name]
        with role.whole() as model, mixed_precision(self.bf16, next(model.parameters()).device.type):
            return score_ids(model, id_lists, token_budget, k)

    def _logprobs(
        self, role: Role, hidden_ND: Tensor, targets_N: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        head_VD = unwrap(role.model).get_output_embeddings().weight
        return token_logprobs(hidden_ND.to(head_VD.dtype), head_VD, targets_N, self.temperature, entropy)

    def _values(self, hidden_ND: Tensor) -> Tensor:
        return (unwrap(self.value.model).score(hidden_ND.float())[:, 0] - self.value_shift) / self.value_scale

    def _hidden(self, role: Role, sequences: Sequences, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        with role.acting(), mixed_precision(self.bf16, sequences.device.type):
            return sequences.hidden(role.model, rows)


def rescaled_logits(model: Any) -> str | None:
    """The config field by which `model` changes hidden states times its head's weight before they are logits."""
    config = unwrap(model).config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
    return next((name for name in names if getattr(config, name, None) not in (None, 1.0)), None)


def check_plain_head(policy: Any) -> None:
    """Log-probs are taken from hidden states times the head's weight; refuse models that do more than that."""
    if name := rescaled_logits(policy):
        raise UserError(f"model_name_or_path: PPO does not support models whose logits are rescaled ({name})")
    if not isinstance(unwrap(policy).get_output_embeddings(), nn.Linear):
        raise UserError("lora_target_modules: leave the output head out; PPO reads its weight directly")
