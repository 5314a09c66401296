"""The figures and samples by which a PPO run is watched: means over the responses of all processes.

`gather(count, *columns)` gives [count, len(columns)] float32, the [B] tensors of all processes in the order of their
prompts (`Run.gathered`). Axes: B responses of this process, N of all, R response tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from configs.chat import ChatFormat
from reward.correlation import pearson
from rlhf.advantages import explained_variance, moments
from rlhf.importance import sampler_figures
from rlhf.rollout import Rollout

NGRAM = 4
Gather = Callable[..., Tensor]


def repeated_share(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of a response's n-grams that repeat an earlier one, 1 - distinct / all; 0 for fewer than n tokens.

    seq-rep-n of Welleck et al. 2020 (arXiv 1908.04319, section 6), on tokens, the stop token included.
    """
    grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def length_correlation(scores_N: Tensor, tokens_N: Tensor, k: int) -> float | None:
    """Pearson's correlation of score and length over the differences from the mean of each prompt's `k` responses,
    which lie side by side; with `k` 1 over all responses. None where either never differs.
    """
    groups = [column_N.double().reshape(-1, k) for column_N in (scores_N, tokens_N)]
    within = groups if k == 1 else [group - group.mean(1, keepdim=True) for group in groups]
    return pearson(*(group.flatten().tolist() for group in within))


def rollout_figures(rollout: Rollout, count: int, gather: Gather) -> dict[str, float]:
    """Rewards, KL, lengths and repetition of a rollout of `count` prompts.

    `reward/` has every reward model and function, over the responses that it applies to. `_std` are standard
    deviations over responses, raw scores in the units of their model; `policy/kl` is a sum over a response, in nats;
    `response/tokens_p95` is the 95th percentile, `response/length_correlation` that of combined score and length within
    a prompt: far from 0, PPO is asked for longer or shorter responses. `prompts/` has the combined score of the prompts
    that are and are not tagged safety, and the share of the latter's responses whose score is the safety model's.
    """
    rewards = {f"reward/{name}": scores_B for name, scores_B in {"combined": rollout.scores_B, **rollout.raw}.items()}
    columns = rewards | {
        "policy/kl": rollout.kl_BR.sum(1),
        "response/tokens": rollout.sequences.response_mask_BR.sum(1),
        "response/stopped": rollout.stopped_B,
        "response/repetition": torch.tensor([repeated_share(response) for response in rollout.responses]),
    }
    # By kind of prompt, because an iteration's share of safety prompts moves the means over all of them.
    tagged_B = torch.tensor([prompt.is_safety for prompt in rollout.prompts])
    nothing_B = torch.full(tagged_B.shape, torch.nan)
    columns["prompts/ordinary_reward"] = torch.where(tagged_B, nothing_B, rollout.scores_B)
    columns["prompts/safety_reward"] = torch.where(tagged_B, rollout.scores_B, nothing_B)
    if rollout.safety_decides_B is not None:
        columns["reward/safety_decides"] = rollout.safety_decides_B
        columns["prompts/ordinary_unsafe"] = torch.where(tagged_B, nothing_B, rollout.safety_decides_B.float())
    by_name = dict(zip(columns, gather(count, *columns.values()).unbind(1), strict=True))
    lengthwise = length_correlation(by_name["reward/combined"], by_name["response/tokens"], rollout.sequences.k)
    by_name = {name: values_N[~values_N.isnan()] for name, values_N in by_name.items()}  # nan: does not apply
    figures = {name: float(values_N.mean()) for name, values_N in by_name.items() if len(values_N)}
    figures |= {f"{name}_std": float(by_name[name].std(unbiased=False)) for name in rewards if name in figures}
    figures["response/tokens_p95"] = float(by_name["response/tokens"].quantile(0.95))
    if lengthwise is not None:
        figures["response/length_correlation"] = lengthwise
    return figures


def sampler_gap(rollout: Rollout, cap: float, accelerator: Any) -> dict[str, float]:
    """The sampler against the trainer where old log-probs are recomputed; else `policy/first_ratio_error` tells."""
    if rollout.sampler_logprobs_BR is None:
        return {}
    mask_BR = rollout.sequences.response_mask_BR
    return sampler_figures(rollout.logprobs_BR[mask_BR], rollout.sampler_logprobs_BR[mask_BR], cap, accelerator)


def value_figures(rollout: Rollout, returns_BR: Tensor, mask_BR: Tensor, accelerator: Any) -> dict[str, float]:
    """How much of the returns the values foresaw, over the tokens that take part."""
    own = [moments(x_BR, mask_BR) for x_BR in (returns_BR, returns_BR - rollout.values_BR)]
    total = accelerator.reduce(torch.stack(own).to(mask_BR.device), "sum")
    return {"value/explained_variance": explained_variance(*total)}


def gold_figures(rollout: Rollout, count: int, chat_format: ChatFormat, gather: Gather) -> dict[str, float]:
    """What the simulated annotators would think of held-out responses: helpfulness of the answers to ordinary
    prompts, safety of those to safety prompts; `_se` are standard errors over prompts. Shown only: neither `objective`
    nor any other choice reads it.
    """
    from rlhf.simulation.world import gold_helpfulness, gold_safety

    texts = [chat_format.decode_response(response) for response in rollout.responses]
    gold = [(gold_safety if prompt.is_safety else gold_helpfulness)(prompt.messages, text)
            for prompt, text in zip(rollout.prompts, texts, strict=True)]  # fmt: skip
    is_safety = torch.tensor([prompt.is_safety for prompt in rollout.prompts])
    gold_N, is_safety_N = gather(count, torch.tensor(gold), is_safety).unbind(1)
    groups = {"eval/gold_helpfulness": gold_N[is_safety_N == 0], "eval/gold_safety": gold_N[is_safety_N == 1]}
    groups = {name: values for name, values in groups.items() if len(values)}
    errors = {f"{name}_se": float(v.std(unbiased=False)) / len(v) ** 0.5 for name, v in groups.items()}
    return {name: float(values.mean()) for name, values in groups.items()} | errors


def time_figures(rollout: Rollout, begin: float, collected: float, done: float, processes: int) -> dict[str, float]:
    """Seconds by phase of an iteration that began, had its rollout and was done at these times, and tokens a second:
    all of them over the iteration, those of responses over sampling."""
    sampled = int(rollout.sequences.response_mask_BR.sum()) * processes
    return {
        **{f"time/{name}": seconds for name, seconds in rollout.seconds.items()},
        "time/update": done - collected,
        "time/iteration": done - begin,
        "time/tokens_per_second": rollout.sequences.tokens * processes / (done - begin),
        "time/sampled_tokens_per_second": sampled / max(rollout.seconds["sample"], 1e-9),
    }


def decoded(rollout: Rollout, rows: int, chat_format: ChatFormat, split: str) -> list[dict[str, Any]]:
    """The first response to each of the first `rows` prompts as text with its scores: the first place where reward
    hacking shows.
    """
    kl_B = rollout.kl_BR.sum(1).tolist()
    return [
        {
            "split": split,
            "prompt": rollout.prompts[i].messages,
            "response": chat_format.decode_response(rollout.responses[i]),
            "is_safety": rollout.prompts[i].is_safety,
            **{f"reward_{name}": float(scores_B[i]) for name, scores_B in rollout.raw.items()},
            "reward_combined": float(rollout.scores_B[i]),
            "kl_nats": kl_B[i],
            "tokens": len(rollout.responses[i]),
            "stopped": bool(rollout.stopped_B[i]),
        }
        for i in range(0, len(rollout.prompts), rollout.sequences.k)[:rows]
    ]
