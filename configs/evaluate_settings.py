"""Settings of `rlhf/evaluate_policy.py`."""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError


@dataclass
class EvaluateSettings:
    """What to evaluate, on which prompts, and against what."""

    output_dir: str = field(metadata={"help": "run folder"})
    model_name_or_path: str = field(metadata={"help": "policy to evaluate"})
    prompt_files: list[str] = field(
        metadata={"help": "prompt records; `is_safety` and `kind` are used where they stand"}
    )
    sft_model_path: str = field(default="", metadata={"help": "SFT policy for the KL; empty: no KL"})
    helpfulness_model_path: str = field(default="", metadata={"help": "helpfulness reward model; empty: no such score"})
    safety_model_path: str = field(default="", metadata={"help": "safety reward model; empty: no such score"})
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
