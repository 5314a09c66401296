"""Settings of `rlhf/evaluate_policy.py`."""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError
from configs.scoring_settings import ScoringSettings


@dataclass
class EvaluateSettings(ScoringSettings):
    """What to evaluate, on which prompts, and against what. Scored as in PPO, or by one reward model alone, or not."""

    output_dir: str = field(metadata={"help": "run folder"})
    model_name_or_path: str = field(metadata={"help": "policy to evaluate"})
    prompt_files: list[str] = field(
        metadata={"help": "prompt records; `is_safety` and `kind` are used where they stand"}
    )
    sft_model_path: str = field(default="", metadata={"help": "SFT policy for the KL; empty: no KL"})
    gold: str = field(default="none", metadata={"help": "simulated: gold scores of the simulated world; none"})
    chat_format: Literal["auto", "llama2", "template"] = field(
        default="auto", metadata={"help": "auto: the tokenizer's own template, or Llama 2's format where it has none"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto takes the type the weights were saved in"}
    )
    samples_per_prompt: int = field(default=1, metadata={"help": "samples a prompt at temperature 1"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "longer prompts are refused by the reader"})
    max_reject_share: float = field(default=0.05, metadata={"help": "share of bad rows above which the run stops"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest response"})
    seed: int = field(default=0, metadata={"help": "seed of the samples"})
    use_cpu: bool = field(default=False, metadata={"help": "stay on the CPU"})

    def __post_init__(self) -> None:
        if self.gold not in ("simulated", "none"):
            raise UserError(f"gold is {self.gold!r}; use simulated or none")
        if not self.prompt_files:
            raise UserError("prompt_files: name at least one file of held-out prompt records")
        for name in ("samples_per_prompt", "max_prompt_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0.0 <= self.max_reject_share < 1.0:
            raise UserError(f"max_reject_share is {self.max_reject_share}; it must be in [0, 1)")
        self.check_scoring()
        if self.end_cut_responses and not self.reward_model_paths:
            raise UserError("end_cut_responses: no reward model is named that would read them")
        if self.combines:
            self.check_reward_sources()

    @property
    def combines(self) -> bool:
        """Whether there is a combined score: not of one model alone, nor of none."""
        alone = len(self.reward_model_paths) < 2 and not self.reward_functions
        return not (alone and self.reward_combination == "piecewise")
