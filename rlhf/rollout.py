"""One iteration's responses with everything known about them before the update (paper 3.2.3, Eq. 4).

Axes: B responses of this process, R response tokens (padded on the right), as in rlhf/sequences.py.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from configs.chat import ChatFormat
from configs.ppo_settings import PPOSettings
from configs.sampling_settings import SamplingSettings
from reward.combine import from_prompt_mean, whiten
from rlhf.advantages import gae, masked_whiten, moments, per_token_kl, place_rewards
from rlhf.engines import sample_live
from rlhf.hardware import mixed_precision
from rlhf.roles import Role, Roles
from rlhf.samples import Prompt, require_exact_ids
from rlhf.scoring import Scoring
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
    raw: dict[str, Tensor]  # raw scores [B] float32 by reward model or function; nan: does not apply
    scores_B: Tensor  # combined raw score, such as logit(R_c), minus the missing-EOS penalty; not whitened
    safety_decides_B: Tensor | None  # bool: the score is the safety model's; None where no one model's
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
    scoring: Scoring | None = None,
) -> Rollout:
    """Sample k responses a prompt from the policy, score them as the settings say, add log-probs and values.

    `seeds` has one number a response, which depends on its own alone, not on the batch or process that computes it. The
    reward models get the sampled ids themselves, never re-encoded text. `scoring` is `Scoring(ppo)`, built here where
    it is not given.
    """
    begin = time.perf_counter()
    settings = SamplingSettings(temperature=ppo.temperature, top_p=1.0, top_k=0, max_new_tokens=ppo.max_new_tokens)
    # Not on a GPU: CUDA graphs would hold casts that autocast drops, and the weights are bfloat16 there as it is.
    autocast = ppo.bf16 and torch.device(device).type == "cpu"
    with roles.base_gathered():
        with roles.policy.whole() as policy, mixed_precision(autocast, "cpu"):
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
        sampled = time.perf_counter()
        texts = [chat_format.decode_response(response) for response in responses] if ppo.reward_functions else []
        end = chat_format.ended if ppo.end_cut_responses else list
        scored = (scoring or Scoring(ppo)).scores(
            lambda name, dialogues: roles.scores(name, [end(ids) for ids in dialogues], ppo.token_budget, k),
            prompts, responses, texts,
        )  # fmt: skip
        stopped_B = torch.tensor([reason == "stop" for reason in batch.finish_reasons])
        scores_B = scored.combined_B - ppo.missing_eos_penalty * (~stopped_B).float()
        seconds = {"sample": sampled - begin, "reward": time.perf_counter() - sampled}
        rollout = _completed(roles, prompts, responses, scores_B, ppo, device, k, stopped_B, batch.logprobs,
                             ppo.recomputes, with_values)  # fmt: skip
    seconds |= rollout.seconds
    return replace(rollout, raw=scored.raw, safety_decides_B=scored.safety_decides_B, seconds=seconds)


@torch.no_grad()
def rollout_from(
    roles: Roles,
    prompts: Sequence[Prompt],
    responses: Sequence[list[int]],
    scores_B: Tensor,
    ppo: PPOSettings,
    device: Any,
    k: int = 1,
    stopped_B: Tensor | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
) -> Rollout:
    """A rollout from responses that exist already, sampled and scored by whatever means: adds log-probs and values.

    Args:
        prompts: one for each response; with k above 1, the k responses to a prompt stand side by side.
        responses: their ids, the stop id included where one ended with it; none may be empty.
        scores_B: a raw score each, any scale: they are whitened over the iteration. `missing_eos_penalty` is not taken
            off them.
        stopped_B: bool, whether each ended by itself: `truncated_responses: mask` leaves out those that did not. None:
            all did.
        logprobs: log pi_old of each response token in nats, at `ppo.temperature`, under the policy that sampled. None:
            they are computed with the policy as it is, which is right for responses that it has just sampled.
    """
    if not len(prompts) == len(responses) == len(scores_B):
        raise ValueError(f"{len(prompts)} prompts, {len(responses)} responses and {len(scores_B)} scores")
    if not all(responses):
        raise ValueError("a response without tokens has no place for its reward")
    if logprobs is not None and list(map(len, logprobs)) != list(map(len, responses)):
        raise ValueError("logprobs: one number for every token of a response")
    if stopped_B is None:
        stopped_B = torch.ones(len(prompts), dtype=torch.bool)
    with roles.base_gathered():
        return _completed(roles, prompts, responses, scores_B, ppo, device, k, stopped_B, logprobs,
                          recompute=logprobs is None, with_values=True)  # fmt: skip


def _completed(
    roles: Roles,
    prompts: Sequence[Prompt],
    responses: Sequence[list[int]],
    scores_B: Tensor,
    ppo: PPOSettings,
    device: Any,
    k: int,
    stopped_B: Tensor,
    logprobs: Sequence[Sequence[float]] | None,
    recompute: bool,
    with_values: bool,
) -> Rollout:
    """As `rollout_from`; a shared base is gathered by the caller."""
    clock = {"start": time.perf_counter()}
    sequences = Sequences.build([p.ids for p in prompts], responses, device, k, roles.take_trees)
    micro_batches = sequences.micro_batches(range(len(prompts)), ppo.token_budget)

    def over(role: Role, function: Callable[[Sequence[int]], tuple[Tensor, ...]]) -> list[Tensor]:
        with role.whole():
            parts = [(rows, function(rows)) for rows in micro_batches]
        return [sequences.scatter([(rows, x) for (rows, _), x in zip(parts, column, strict=True)])
                for column in zip(*(results for _, results in parts), strict=True)]  # fmt: skip

    sampler_BR = None
    if logprobs is not None:
        sampler_BR = torch.zeros(sequences.response_mask_BR.shape, device=device)
        sampler_BR[sequences.response_mask_BR] = torch.cat(
            [torch.as_tensor(row, dtype=torch.float32) for row in logprobs]
        ).to(device)
    values_BR = None if with_values else torch.zeros(sequences.response_mask_BR.shape, device=device)
    if sampler_BR is not None and not recompute:
        logprobs_BR, sampler_BR = sampler_BR, None
    elif roles.one_trunk and with_values:
        logprobs_BR, values_BR = over(
            roles.policy, lambda rows: roles.logprobs_and_values(sequences, rows, entropy=False)[::2]
        )
    else:
        (logprobs_BR,) = over(roles.policy, lambda rows: roles.policy_logprobs(sequences, rows)[:1])
    clock["recompute"] = time.perf_counter()
    (reference_logprobs_BR,) = over(roles.reference, lambda rows: (roles.reference_logprobs(sequences, rows),))
    clock["reference"] = time.perf_counter()
    if values_BR is None:
        (values_BR,) = over(roles.value, lambda rows: (roles.values(sequences, rows),))
    clock["value"] = time.perf_counter()
    seconds = {after: clock[after] - clock[before] for before, after in pairwise(clock)}
    return Rollout(
        prompts, responses, sequences, stopped_B, logprobs_BR, reference_logprobs_BR, values_BR, {}, scores_B.float(),
        None, seconds, sampler_BR,
    )  # fmt: skip


def advantages_and_returns(
    rollout: Rollout, ppo: PPOSettings, accelerator: Any, kl_coef: float | None = None
) -> tuple[Tensor, Tensor]:
    """Eq. 4 for every response token: whitened score on the last one, minus beta * KL on each; then GAE. Both [B, R].

    Scores and advantages are whitened over the whole iteration, over all processes, without the responses that do not
    take part; with `center_scores: prompt` each score first loses its prompt's mean: the `responses_per_prompt`
    responses of a prompt must stand side by side. `kl_coef` is the current beta of an adaptive controller; None: that
    of the settings.
    """
    mask_BR, kept_BR = rollout.sequences.response_mask_BR, rollout.kept_mask_BR(ppo)
    scores_B = rollout.scores_B
    if ppo.center_scores == "prompt":
        scores_B = from_prompt_mean(scores_B, rollout.kept_B(ppo), ppo.responses_per_prompt)
    all_scores = accelerator.gather(scores_B.to(mask_BR.device))
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
