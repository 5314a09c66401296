"""What scores responses in PPO and rejection sampling: reward models, their combination, functions of one's own."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError

Combination = Literal["piecewise", "helpfulness", "safety", "min", "mean", "ensemble"]
BOTH = ("helpfulness", "safety")
NEEDS = {"piecewise": BOTH, "helpfulness": BOTH[:1], "safety": BOTH[1:], "min": BOTH, "mean": BOTH, "ensemble": BOTH}
LLAMA2_THRESHOLD = 0.15
# Figures of PPO's log, in which eval/ has those of rewards, KL and responses side by side.
TAKEN = (*BOTH, "combined", "safety_decides", "kl", "objective", "tokens", "tokens_p95", "stopped", "repetition",
         "ordinary_reward", "safety_reward", "ordinary_unsafe")  # fmt: skip
FUNCTION = re.compile(r"(?:(?P<name>\w+)=)?(?P<module>\w+(?:\.\w+)*):(?P<attribute>\w+(?:\.\w+)*)")


@dataclass(kw_only=True)
class ScoringSettings:
    """Where a response's reward comes from. A reward model that is named but not part of the combination is scored and
    logged all the same: to watch, say, safety while helpfulness alone is trained."""

    helpfulness_model_path: str = field(default="", metadata={"help": "Folder of the helpfulness reward model."})
    safety_model_path: str = field(default="", metadata={"help": "Folder of the safety reward model."})
    reward_combination: Combination = field(
        default="piecewise",
        metadata={
            "help": "One reward from two models' raw scores: piecewise (the paper's: safety where the prompt is tagged "
            "or R_s is low, else helpfulness), helpfulness, safety, min, mean, ensemble (weights from ensemble_file)."
        },
    )
    ensemble_file: str | None = field(
        default=None, metadata={"help": "ensemble.json of rlhf/fit_ensemble.py, for reward_combination: ensemble."}
    )
    safety_threshold: float = field(
        default=LLAMA2_THRESHOLD, metadata={"help": "R_s below which safety decides the piecewise reward."}
    )
    end_cut_responses: bool = field(
        default=False,
        metadata={
            "help": "Let reward models read a response that max_new_tokens cut off as if it had ended there: their "
            "score is trained at the end of whole answers, and at any other token it is noise."
        },
    )
    reward_functions: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards of your own, each package.module:function or name=package.module:function, found from the "
            "current folder: added to the combined score, or the whole reward where no reward model is named."
        },
    )
    reward_function_weights: list[float] | None = field(
        default=None, metadata={"help": "What each function's score is multiplied by; none: 1. 0 only logs it."}
    )

    @property
    def reward_model_paths(self) -> dict[str, str]:
        """Path of each reward model that is named, by its name."""
        return {name: path for name in BOTH if (path := getattr(self, f"{name}_model_path"))}

    @property
    def function_places(self) -> dict[str, tuple[str, str]]:
        """(module, attribute) of each reward function by its name: the one given, else the last part."""
        places: dict[str, tuple[str, str]] = {}
        for text in self.reward_functions:
            match = FUNCTION.fullmatch(text)
            if match is None:
                raise UserError(
                    f"reward_functions: {text!r} is neither package.module:function nor name=package.module:function"
                )
            name = match["name"] or match["attribute"].split(".")[-1]
            if name in TAKEN:
                raise UserError(f"reward_functions: {name!r} is a figure of ours; write another_name={text}")
            if name in places:
                raise UserError(
                    f"reward_functions: two are called {name!r}; write another_name=package.module:function"
                )
            places[name] = match["module"], match["attribute"]
        return places

    def check_scoring(self) -> None:
        """UserError for a value out of range, and for one that would be ignored."""
        if not 0.0 < self.safety_threshold < 1.0:
            raise UserError(f"safety_threshold is a probability in (0, 1), not {self.safety_threshold}")
        if self.reward_combination not in NEEDS:
            raise UserError(f"reward_combination: {self.reward_combination!r} is none of {', '.join(NEEDS)}")
        if (self.reward_combination == "ensemble") != bool(self.ensemble_file):
            raise UserError(
                "reward_combination: ensemble and ensemble_file go together; rlhf/fit_ensemble.py writes such a file"
            )
        idle = self.reward_combination != "piecewise" or (self.reward_functions and not self.reward_model_paths)
        if idle and self.safety_threshold != LLAMA2_THRESHOLD:
            raise UserError(f"safety_threshold: {self.safety_threshold} has no effect without the piecewise reward")
        functions, weights = len(self.function_places), self.reward_function_weights
        if weights is not None and len(weights) != functions:
            raise UserError(f"reward_function_weights: {len(weights)} for {functions} reward_functions; give one each")
        if weights is not None and not all(map(math.isfinite, weights)):
            raise UserError(f"reward_function_weights: {weights} must be numbers")

    def check_reward_sources(self) -> None:
        """UserError where what the combination needs is not named."""
        named, how = self.reward_model_paths, self.reward_combination
        if not named and self.reward_functions and how == "piecewise":
            return  # the functions are the whole reward
        if missing := [f"{name}_model_path" for name in NEEDS[how] if name not in named]:
            raise UserError(
                f"{', '.join(missing)}: name the folder of that reward model. reward_combination {how} needs "
                f"{' and '.join(NEEDS[how])}; helpfulness and safety need one model only, reward_functions none"
            )
