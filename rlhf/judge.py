"""The held-out judge: a second pair of reward models, trained on the prompts that the first pair has not seen.

What is trained against a reward model learns its mistakes, so its own score cannot say whether a policy got better. A
re-training on the other half of the preference prompts (`prompt_half` of rlhf/train_reward.py) with another seed makes
other mistakes. It scores as the first pair does (piecewise rule of paper 3.2.3, raw scores) and nothing is trained
against it; it can still share what both halves of the data have in common, such as a taste for length.

Letters: B = responses, P = prompts, K = responses a prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from reward.combine import combined_reward
from reward.metrics import outcome
from reward.model import load_reward_model
from rlhf.estimates import paired_bootstrap
from rlhf.tokenizer import check_same_tokenizer
from rlhf.win_rates import length_controlled_win_rate, win_rate

HELPFULNESS, SAFETY = "judge_helpfulness", "judge_safety"
IdLists = Sequence[Sequence[int]]
PerPrompt = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Judgement:
    """Raw scores of B responses, float32 [B] on the CPU."""

    helpfulness_B: Tensor
    safety_B: Tensor
    combined_B: Tensor  # of the model that the piecewise rule picks


def load_judges(
    helpfulness_path: str, safety_path: str, tokenizer: Any, dtype: torch.dtype, device: Any
) -> dict[str, Any]:
    """Both models by name, on `device`. UserError where one has another tokenizer than that given."""
    judges = {}
    for name, path in ((HELPFULNESS, helpfulness_path), (SAFETY, safety_path)):
        check_same_tokenizer(tokenizer, path, f"{name}_model_path")
        judges[name] = load_reward_model(path, dtype).to(device)
    return judges


def judge(
    score: Callable[[str, IdLists], Tensor],
    prompts: IdLists,
    responses: IdLists,
    is_safety: Sequence[bool],
    threshold: float = 0.15,
) -> Judgement:
    """Scores of B responses of ids to prompts of ids; `score(name, id lists)` is the raw score of one of the two."""
    whole = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    helpfulness_B, safety_B = score(HELPFULNESS, whole), score(SAFETY, whole)
    combined_B = combined_reward(safety_B, helpfulness_B, torch.tensor(is_safety), threshold)
    return Judgement(helpfulness_B, safety_B, combined_B)


def held_out_figures(columns_B4: Tensor, start_B2: Sequence[Sequence[float]]) -> dict[str, float]:
    """PPO's figures of one response to each held-out prompt, under eval/.

    Columns are the judge's helpfulness, safety and combined score and the length in tokens; `start_B2` has the last two
    of the starting policy's responses to the same prompts. `_se` is a standard error over prompts.
    """
    means = columns_B4.double().mean(0).tolist()
    figures = dict(zip(("eval/judge_helpfulness", "eval/judge_safety", "eval/judge_combined"), means, strict=False))
    figures["eval/judge_combined_se"] = float(columns_B4[:, 2].double().std(unbiased=False)) / len(columns_B4) ** 0.5
    before, after = torch.tensor(start_B2), columns_B4[:, 2:]
    compared = compare(*[side[:, column : column + 1].tolist() for column in (0, 1) for side in (before, after)])
    for name in ("improvement", "win_rate_lc"):
        low, high = compared["ci95"][name]
        figures |= {f"eval/judge_{name}": compared[name], f"eval/judge_{name}_low": low}
        figures[f"eval/judge_{name}_high"] = high
    return figures


def compare(
    before_PK: PerPrompt,
    after_PK: PerPrompt,
    before_tokens_PK: PerPrompt,
    after_tokens_PK: PerPrompt,
    seed: int = 0,
) -> dict[str, Any]:
    """What the judge thinks of a later policy beside an earlier one, from combined scores and lengths on P prompts.

    Both may have several responses a prompt, and not equally many: each of one is compared with each of the other.

        before, after       mean scores
        improvement         mean of after - before, in raw scores (logits)
        win_rate            share of prompts on which the later is preferred, ties half
        win_rate_lc         the same were the responses equally long
        extra_tokens        mean length of the later responses less that of the earlier

    The first three of these have a 95 % interval beside them in "ci95"; the improvement's is of a paired bootstrap
    over prompts, seeded by `seed`. ValueError where the lists do not name the same number of prompts, or none.
    """
    before_P, after_P = [list(map(fmean, scores)) for scores in (before_PK, after_PK)]
    improvement, improvement_interval = paired_bootstrap(before_P, after_P, seed=seed)
    preferences_P = [
        fmean(outcome(later, earlier) for later in after for earlier in before)
        for before, after in zip(before_PK, after_PK, strict=True)
    ]
    extra_P = [fmean(after) - fmean(before) for before, after in zip(before_tokens_PK, after_tokens_PK, strict=True)]
    rate, rate_interval = win_rate(preferences_P)
    controlled, controlled_interval = length_controlled_win_rate(preferences_P, extra_P)
    return {
        "prompts": len(preferences_P),
        "before": fmean(before_P),
        "after": fmean(after_P),
        "improvement": improvement,
        "win_rate": rate,
        "win_rate_lc": controlled,
        "extra_tokens": fmean(extra_P),
        "ci95": {
            "improvement": list(improvement_interval),
            "win_rate": list(rate_interval),
            "win_rate_lc": list(controlled_interval),
        },
    }
