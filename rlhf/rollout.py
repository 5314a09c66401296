"""One iteration's responses with everything known about them before the update (paper 3.2.3, Eq. 4).

Axes: B responses of this process, R response tokens (padded on the right), as in rlhf/sequences.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from configs.chat import ChatFormat
from configs.ppo_settings import PPOSettings
from configs.sampling_settings import SamplingSettings
from reward.combine import combined_reward, whiten
from rlhf.advantages import gae, masked_whiten, moments, per_token_kl, place_rewards
from rlhf.engines import sample_live
from rlhf.roles import Role, Roles
from rlhf.samples import Prompt, require_exact_ids
from rlhf.sequences import Sequences


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. Log-probs are those of the policy that sampled: pi_old of the clipped loss.

    Example of one row: prompt `5 6`, response `7 8 2` (2 is the stop token), R = 4:
    response_mask T T T F; logprobs[0] = log pi(7 | 5 6), values[0] = V(5 6); a score belongs to token 2.
    """

    prompts: Sequence[Prompt]
    responses: Sequence[list[int]]
    sequences: Sequences
    stopped_B: Tensor  # bool: ended with a stop token, not cut off
    logprobs_BR: Tensor
    reference_logprobs_BR: Tensor
    values_BR: Tensor
    r_helpfulness_B: Tensor  # raw scores, float32
    r_safety_B: Tensor
    scores_B: Tensor  # logit(R_c) minus the missing-EOS penalty, not whitened
    safety_decides_B: Tensor  # bool: the score is the safety model's
    seconds: dict[str, float]  # by phase: sample, reward, recompute, reference, value
    sampler_logprobs_BR: Tensor | None = None  # as the sampler had them, where `logprobs_BR` are recomputed

    def kept_B(self, ppo: PPOSettings) -> Tensor:
        """Responses that take part in whitening and losses: all, or with `truncated_responses: mask` those not cut."""
        return self.stopped_B | (ppo.truncated_responses == "keep")

    def kept_mask_BR(self, ppo: PPOSettings) -> Tensor:
        """Their tokens."""
        mask_BR = self.sequences.response_mask_BR
        return mask_BR & self.kept_B(ppo).to(mask_BR.device)[:, None]

    @property
    def kl_BR(self) -> Tensor:
        """Per-token KL (k1) to the reference in nats; its row sums are nats per response."""
        return per_token_kl(self.logprobs_BR, self.reference_logprobs_BR, self.sequences.response_mask_BR)


@torch.no_grad()
def collect(
    roles: Roles,
    prompts: Sequence[Prompt],
    ppo: PPOSettings,
    chat_format: ChatFormat,
    pad_id: int,
    seeds: Sequence[int],
    device: Any,
    k: int = 1,
    with_values: bool = True,
) -> Rollout:
    """Sample k responses a prompt from the policy, score them with both reward models, add log-probs and values.

    `seeds` has one number a response, which depends on its own alone, not on the batch or process that computes it. The
    reward models get the sampled ids themselves, never re-encoded text.
    """
    clock = {"start": time.perf_counter()}
    settings = SamplingSettings(temperature=ppo.temperature, top_p=1.0, top_k=0, max_new_tokens=ppo.max_new_tokens)
    with roles.base_gathered():
        with roles.policy.whole() as policy:
            batch = require_exact_ids(
                sample_live(
                    ppo.sampling_engine,
                    policy,
                    prompts,
                    k,
                    settings,
                    chat_format,
                    pad_id,
                    seeds,
                    ppo.sampling_token_budget,
                )
            )
        prompts = [prompt for prompt in prompts for _ in range(k)]
        responses = batch.response_ids
        sequences = Sequences.build([p.ids for p in prompts], responses, device, k, roles.take_trees)
        clock["sample"] = time.perf_counter()

        r_helpfulness_B, r_safety_B = (
            roles.scores(name, sequences.ids, ppo.token_budget, k) for name in ("helpfulness", "safety")
        )
        is_safety_B = torch.tensor([prompt.is_safety for prompt in prompts])
        scores_B = combined_reward(r_safety_B, r_helpfulness_B, is_safety_B, ppo.safety_threshold)
        safety_decides_B = is_safety_B | (scores_B != r_helpfulness_B)
        stopped_B = torch.tensor([reason == "stop" for reason in batch.finish_reasons])
        scores_B = scores_B - ppo.missing_eos_penalty * (~stopped_B).float()
        clock["reward"] = time.perf_counter()

        micro_batches = sequences.micro_batches(range(len(prompts)), ppo.token_budget)

        def over(role: Role, function: Callable[[Sequence[int]], Tensor]) -> Tensor:
            with role.whole():
                return sequences.scatter([(rows, function(rows)) for rows in micro_batches])

        sampler_BR = torch.zeros(sequences.response_mask_BR.shape, device=device)
        sampler_BR[sequences.response_mask_BR] = torch.cat(
            [torch.as_tensor(row, dtype=torch.float32) for row in batch.logprobs]
        ).to(device)
        logprobs_BR = sampler_BR
        if ppo.recomputes:
            logprobs_BR = over(roles.policy, lambda rows: roles.policy_logprobs(sequences, rows)[0])
        clock["recompute"] = time.perf_counter()
        reference_logprobs_BR = over(roles.reference, lambda rows: roles.reference_logprobs(sequences, rows))
        clock["reference"] = time.perf_counter()
        values_BR = torch.zeros_like(logprobs_BR)
        if with_values:
            values_BR = over(roles.value, lambda rows: roles.values(sequences, rows))
        clock["value"] = time.perf_counter()
    seconds = {after: clock[after] - clock[before] for before, after in pairwise(clock)}
    return Rollout(
        prompts, responses, sequences, stopped_B, logprobs_BR, reference_logprobs_BR, values_BR, r_helpfulness_B,
        r_safety_B, scores_B, safety_decides_B, seconds, sampler_BR if ppo.recomputes else None,
    )  # fmt: skip


def advantages_and_returns(
    rollout: Rollout, ppo: PPOSettings, accelerator: Any, kl_coef: float | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 4 for every response token: whitened score on the last one, minus beta * KL on each; then GAE. Both [B, R].

    Scores and advantages are whitened over the whole iteration, over all processes, without the responses that do not
    take part. `kl_coef` is the current beta of an adaptive controller; None: that of the settings.
    """
    mask_BR, kept_BR = rollout.sequences.response_mask_BR, rollout.kept_mask_BR(ppo)
    all_scores = accelerator.gather(rollout.scores_B.to(mask_BR.device))
    all_kept = accelerator.gather(rollout.kept_B(ppo).to(mask_BR.device))
    white = torch.zeros_like(all_scores)
    if all_kept.any():
        white[all_kept] = whiten(all_scores[all_kept])
    own = slice(
        accelerator.process_index * len(rollout.prompts), (accelerator.process_index + 1) * len(rollout.prompts)
    )
    kl_BR = per_token_kl(rollout.logprobs_BR, rollout.reference_logprobs_BR, mask_BR, ppo.kl_estimator)
    rewards_BR = place_rewards(white[own], kl_BR, mask_BR, ppo.kl_coef if kl_coef is None else kl_coef)
    advantages_BR, returns_BR = gae(rewards_BR, rollout.values_BR, mask_BR, ppo.gamma, ppo.gae_lambda)
    if ppo.whiten_advantages:
        total = accelerator.reduce(moments(advantages_BR, kept_BR).to(mask_BR.device), "sum")
        advantages_BR = masked_whiten(advantages_BR, kept_BR, total)
    return advantages_BR, returns_BR
