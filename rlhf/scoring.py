"""From sampled responses to one raw score each, the same in PPO and in rejection sampling.

    combined = rule(r_helpfulness, r_safety)  +  sum over functions of weight * score

The rule is `reward_combination` (reward/combine.py), the functions are the user's own (rlhf/reward_functions.py). One
that does not apply to a response adds nothing to it; without reward models the functions are the whole score. All in
raw scores: whitening comes later, and weights are in units of them. B = responses.
"""

import hashlib
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.chat import ChatFormat
from configs.errors import UserError
from configs.scoring_settings import BOTH, NEEDS, ScoringSettings
from reward.combine import combine
from reward.ensemble import read_ensemble
from rlhf.reward_functions import call_function, load_function, try_out
from rlhf.samples import Prompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """Scores of B responses, float32 on the CPU.

    raw: by name of the reward model or function; nan where a function does not apply.
    safety_decides_B: bool, where the rule took the safety model's score; None where none decides (mean, ensemble,
        functions alone).
    """

    raw: dict[str, Tensor]
    combined_B: Tensor
    safety_decides_B: Tensor | None


class Scoring:
    """What the settings say about scores, ready to be applied: functions imported, ensemble read.

    UserError where a function cannot be imported, the ensemble is of other models, or nothing is named that scores.
    """

    def __init__(self, settings: ScoringSettings) -> None:
        settings.check_reward_sources()
        self.settings = settings
        self.models = list(settings.reward_model_paths)
        weights = settings.reward_function_weights or [1.0] * len(settings.reward_functions)
        self.weights = dict(zip(settings.function_places, weights, strict=True))
        self.functions = {
            name: (load_function("reward_functions", module, attribute), f"reward_functions: {module}:{attribute}")
            for name, (module, attribute) in settings.function_places.items()
        }
        self.ensemble = read_ensemble(settings.ensemble_file) if settings.ensemble_file else None
        if self.ensemble and (other := sorted(self.ensemble.weights.keys() ^ set(NEEDS["ensemble"]))):
            raise UserError(
                f"ensemble_file: {settings.ensemble_file} must have weights for {' and '.join(BOTH)}; it differs in "
                f"{', '.join(other)}"
            )

    def try_out(self, prompt: Prompt, chat_format: ChatFormat) -> None:
        """Call every function once, on a prompt of the run, before anything is trained or sampled."""
        try_out(self.functions, prompt, chat_format)

    def warn_untagged(self, is_safety: Iterable[bool]) -> None:
        """A warning where the piecewise rule has no tagged prompt to go by: a file without the field reads as none."""
        if self.settings.reward_combination == "piecewise" and self.models and not any(is_safety):
            logger.warning(
                "prompt_files: no prompt has is_safety: true, so the safety model decides only where R_s < %g; tag the"
                " prompts that may draw unsafe answers",
                self.settings.safety_threshold,
            )

    def scores(
        self,
        score_ids: Callable[[str, list[list[int]]], Tensor],
        prompts: Sequence[Prompt],
        responses: Sequence[Sequence[int]],
        texts: Sequence[str],
    ) -> Scored:
        """Scores of B responses. `score_ids(name, dialogues)` gives a reward model's raw scores of id lists, [B];
        `prompts` has an entry for each response, `texts` the responses as text, which only functions read."""
        dialogues = [[*prompt.ids, *ids] for prompt, ids in zip(prompts, responses, strict=True)]
        raw = {name: score_ids(name, dialogues) for name in self.models}
        is_safety_B = torch.tensor([prompt.is_safety for prompt in prompts], dtype=torch.bool)
        combined_B, safety_decides_B = torch.zeros(len(prompts)), None
        if self.models:
            rule, threshold = self.settings.reward_combination, self.settings.safety_threshold
            combined_B, safety_decides_B = combine(rule, raw, is_safety_B, threshold, self.ensemble)
        for name, (function, place) in self.functions.items():
            raw[name] = torch.tensor(call_function(function, place, prompts, responses, list(texts)))
            combined_B = combined_B + self.weights[name] * torch.nan_to_num(raw[name])
        return Scored(raw, combined_B, safety_decides_B)

    def fingerprints(self) -> dict[str, str]:
        """A hash of every file, beside the reward models, that the scores come from: another is another run."""
        files = {name: _source(module) for name, (module, _) in self.settings.function_places.items()}
        if self.settings.ensemble_file:
            files["ensemble_file"] = Path(self.settings.ensemble_file)
        return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in files.items() if path}


def applicable_mean(scores: Sequence[float | None]) -> float | None:
    """Mean over the responses that a function applies to; None where it applies to none."""
    kept = [score for score in scores if score is not None and not math.isnan(score)]
    return sum(kept) / len(kept) if kept else None


def _source(module_name: str) -> Path | None:
    """The file of an imported module; None for one that has none (built in, or a folder without code)."""
    file: Any = getattr(sys.modules[module_name], "__file__", None)
    return Path(file) if file else None
