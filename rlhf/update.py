"""The PPO update over one iteration's responses: one gradient step a mini-batch (paper 3.2.3; recipe sheet 5).

Losses are sums divided by the response tokens of the whole mini-batch, over micro-batches and processes, so how a
mini-batch is cut into micro-batches or spread over processes does not change the step.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.ppo_settings import PPOSettings
from rlhf import zero3
from rlhf.importance import importance_weights
from rlhf.losses import policy_loss_sum, value_loss_sum
from rlhf.models import decoder_of
from rlhf.roles import Roles
from rlhf.rollout import Rollout
from rlhf.sequences import Sequences
from rlhf.sharding import clip_gradients, dimensions, is_sharded

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 3


class NotFinite(UserError):
    """So many gradient steps in a row were refused that the run cannot go on as it is set up."""


class AdamW(torch.optim.AdamW):
    """AdamW that is told of backward passes, as DeepSpeed has to be."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        loss.backward()


Optimizer = AdamW | zero3.Optimizer


def make_optimizer(roles: Roles, ppo: PPOSettings) -> Optimizer:
    """AdamW over policy and value model, each with its learning rate; weight decay on matrices only."""
    groups = []
    for role, rate in ((roles.policy, ppo.learning_rate), (roles.value, ppo.value_learning_rate)):
        for split in (False, True):  # the optimizer's fused step takes sharded tensors or whole ones
            trained = [p for p in role.trained.values() if is_sharded([p]) == split]
            groups.append(
                {"params": [p for p in trained if dimensions(p) > 1], "lr": rate, "weight_decay": ppo.weight_decay}
            )
            groups.append({"params": [p for p in trained if dimensions(p) <= 1], "lr": rate, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    make = partial(AdamW, betas=(ppo.adam_beta1, ppo.adam_beta2), eps=ppo.adam_epsilon, fused=True)
    if zero3.wanted():
        decoders = {id(decoder): decoder for role in roles.everyone for decoder in [decoder_of(role.model)]}
        return zero3.Optimizer(decoders.values(), groups, make)
    return make(groups)


def mini_batches(responses: int, ppo: PPOSettings, seed: int) -> Iterable[list[int]]:
    """Global response indices of each mini-batch, every epoch in a new order; the same on every process.

    Responses to one prompt stay together, as their prompt is computed once for them.
    """
    generator = torch.Generator().manual_seed(seed)
    k = ppo.responses_per_prompt
    for _ in range(ppo.ppo_epochs):
        prompts = torch.randperm(responses // k, generator=generator).tolist()
        order = [prompt * k + i for prompt in prompts for i in range(k)]
        yield from (order[i : i + ppo.mini_batch_size] for i in range(0, responses, ppo.mini_batch_size))


def update(
    roles: Roles,
    optimizer: Optimizer,
    rollout: Rollout,
    advantages_BR: Tensor,
    returns_BR: Tensor,
    ppo: PPOSettings,
    accelerator: Any,
    seed: int,
    skipped_in_a_row: int = 0,
) -> tuple[dict[str, float], int]:
    """Take the iteration's gradient steps; returns its figures and how many steps in a row were skipped at its end.

    A step whose loss or gradient is not finite is skipped: it would write NaN into every weight. Three in a row raise
    NotFinite. Process r holds the responses r * B to (r + 1) * B - 1 of the iteration. Responses that do not take part
    (`truncated_responses: mask`) are not computed; a mini-batch of nothing else is no step.
    """
    own = len(rollout.prompts)
    first = accelerator.process_index * own
    kept = rollout.kept_B(ppo).tolist()
    device = advantages_BR.device
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=device))
    parameters = [list(role.trained.values()) for role in (roles.policy, roles.value)]
    steps = skipped = 0
    for mini_batch in mini_batches(own * accelerator.num_processes, ppo, seed):
        rows = [index - first for index in mini_batch if first <= index < first + own and kept[index - first]]
        tokens = accelerator.reduce(rollout.sequences.response_mask_BR[rows].sum(), "sum")
        if ppo.truncated_responses == "mask" and not tokens:  # the same on all processes; else a step of decay alone
            continue
        batches = _micro_batches(rollout.sequences, rows, ppo.token_budget, parameters, accelerator)
        stats = _backward(roles, optimizer, rollout, batches, advantages_BR, returns_BR, tokens, ppo)
        _sum_gradients(parameters, accelerator)
        policy_norm, value_norm = (clip_gradients(group, ppo.max_grad_norm) for group in parameters)
        if torch.isfinite(policy_norm + value_norm):  # the one point of a step at which the device is waited for
            optimizer.step()
            skipped_in_a_row = 0
            steps += 1
            for name, value in stats.items():
                sums[name] += value
            sums["policy_norm"] += policy_norm
            sums["value_norm"] += value_norm
            if steps == 1:
                sums["first_ratio_error"] += stats["ratio_error"]
                sums["first_tokens"] += stats["tokens"]
        else:
            skipped += 1
            skipped_in_a_row += 1
        optimizer.zero_grad(set_to_none=True)
        if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NotFinite(
                f"{skipped_in_a_row} gradient steps in a row were not finite. The weights before them are in the "
                "newest checkpoint of output_dir: lower learning_rate or value_learning_rate, or check the "
                "reward models' scores, and start again to go on from it."
            )
    if not steps + skipped and accelerator.is_main_process:
        logger.warning(
            "truncated_responses mask: no response of this iteration ended by itself, so nothing was trained;"
            " raise max_new_tokens"
        )
    return _figures(sums, steps, skipped, accelerator), skipped_in_a_row


def _backward(
    roles: Roles,
    optimizer: Optimizer,
    rollout: Rollout,
    micro_batches: Sequence[tuple[list[int], float]],
    advantages_BR: Tensor,
    returns_BR: Tensor,
    tokens: Tensor,
    ppo: PPOSettings,
) -> dict[str, Tensor]:
    """Add the gradient of this process's share of a mini-batch, micro-batch by micro-batch; returns sums to watch."""
    sequences = rollout.sequences
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=tokens.device))
    for rows, weight in micro_batches:
        old_N, advantages_N, old_values_N, returns_N = (
            sequences.flat(x_BR, rows) for x_BR in (rollout.logprobs_BR, advantages_BR, rollout.values_BR, returns_BR)
        )
        weights_N = None
        if rollout.sampler_logprobs_BR is not None and ppo.importance_cap:
            sampler_N = sequences.flat(rollout.sampler_logprobs_BR, rows)
            weights_N = importance_weights(old_N, sampler_N, ppo.importance_cap)
        with roles.policy.acting():
            if roles.one_trunk:
                logprobs_N, entropy_N, values_N = roles.logprobs_and_values(sequences, rows)
                value_loss, value_stats = value_loss_sum(values_N, old_values_N, returns_N, ppo.value_clip_range)
            else:
                logprobs_N, entropy_N = roles.policy_logprobs(sequences, rows, entropy=True)
            policy_loss, policy_stats = policy_loss_sum(logprobs_N, old_N, advantages_N, ppo.clip_range, weights_N)
            loss = policy_loss + ppo.value_coef * value_loss if roles.one_trunk else policy_loss
            optimizer.backward(weight * loss / tokens)
        if not roles.one_trunk:
            with roles.value.acting():
                values_N = roles.values(sequences, rows)
                value_loss, value_stats = value_loss_sum(values_N, old_values_N, returns_N, ppo.value_clip_range)
                optimizer.backward(weight * ppo.value_coef * value_loss / tokens)

        for name, value in {**policy_stats, **value_stats}.items():
            sums[name] += weight * value
        sums["policy_loss"] += weight * policy_loss.detach()
        sums["value_loss"] += weight * value_loss.detach()
        assert entropy_N is not None  # both were asked for it
        sums["entropy"] += weight * entropy_N.sum()
        sums["tokens"] += weight * len(old_N)
    return sums


def _micro_batches(
    sequences: Sequences, rows: Sequence[int], token_budget: int, parameters: Any, accelerator: Any
) -> list[tuple[list[int], float]]:
    """This process's rows of a mini-batch, cut to the budget, each part with weight 1.

    Sharded weights are gathered by all processes at once, so those with fewer parts add ones that weigh 0.
    """
    parts = [(batch, 1.0) for batch in (sequences.micro_batches(rows, token_budget) if rows else [])]
    if not any(map(is_sharded, parameters)):
        return parts
    most = int(accelerator.gather(torch.tensor([len(parts)], device=sequences.device)).max())
    shortest = min(range(len(sequences.ids)), key=lambda row: len(sequences.ids[row]))
    return parts + [([shortest], 0.0)] * (most - len(parts))


def _sum_gradients(parameters: Sequence[Sequence[nn.Parameter]], accelerator: Any) -> None:
    """Sum gradients over processes (the losses are sums over a global count, so the sum is the gradient)."""
    if accelerator.num_processes == 1:
        return
    for parameter in (p for group in parameters for p in group if not is_sharded([p])):
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = accelerator.reduce(gradient, "sum")


def _figures(sums: dict[str, Tensor], steps: int, skipped: int, accelerator: Any) -> dict[str, float]:
    """Means over tokens of all processes, under the names of metrics.jsonl."""
    norms = {f"optim/{name}": float(sums[name]) / max(steps, 1) for name in ("policy_norm", "value_norm")}
    names = sorted({"tokens", "first_tokens", "first_ratio_error", "policy_loss", "value_loss", "entropy", "clipped",
                    "kl_old", "value_clipped"})  # fmt: skip
    total = accelerator.reduce(torch.stack([sums[name] for name in names]).float(), "sum").tolist()
    by_name = dict(zip(names, total, strict=True))
    tokens = max(by_name["tokens"], 1.0)
    return {
        "loss/policy": by_name["policy_loss"] / tokens,
        "loss/value": by_name["value_loss"] / tokens,
        "policy/entropy": by_name["entropy"] / tokens,
        "policy/clip_fraction": by_name["clipped"] / tokens,
        "policy/kl_old": by_name["kl_old"] / tokens,
        "policy/first_ratio_error": by_name["first_ratio_error"] / max(by_name["first_tokens"], 1.0),
        "value/clip_fraction": by_name["value_clipped"] / tokens,
        "optim/steps": float(steps),
        "optim/skipped_steps": float(skipped),
        **norms,
    }
