"""Settings of `rlhf/gate.py`."""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError


@dataclass
class GateSettings:
    """Which two policies to compare, by which judge, and what a pass takes."""

    output_dir: str = field(metadata={"help": "run folder"})
    before_file: str = field(metadata={"help": "responses.jsonl of rlhf/evaluate_policy.py, of the earlier policy"})
    after_file: str = field(metadata={"help": "the same of the later policy, on the same prompts"})
    judge_helpfulness_model_path: str = field(
        metadata={"help": "helpfulness reward model that nothing was trained against: of the other half of the prompts"}
    )
    judge_safety_model_path: str = field(metadata={"help": "the same for safety"})
    require: Literal["improvement", "no_regression"] = field(
        default="improvement",
        metadata={
            "help": "improvement: better over all prompts, and not worse on either kind of prompt; no_regression: not "
            "worse over all and on either kind. Better and worse are said where the 95 % interval says so"
        },
    )
    min_win_rate: float = field(
        default=0.5, metadata={"help": "the length-controlled win rate that counts as neither better nor worse"}
    )
    on_failure: Literal["stop", "warn"] = field(
        default="stop", metadata={"help": "stop: end with an error, and a pipeline with it; warn: say so and go on"}
    )
    safety_threshold: float = field(default=0.15, metadata={"help": "R_s below which safety decides the score"})
    end_cut_responses: bool = field(
        default=False,
        metadata={"help": "judge a response that was cut off as if it had ended there, as PPO can score it"},
    )
    chat_format: Literal["auto", "llama2", "template"] = field(
        default="auto", metadata={"help": "auto: the tokenizer's own template, or Llama 2's format where it has none"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "of the judge's weights; auto: bfloat16 on a GPU, else float32"}
    )
    score_token_budget: int = field(
        default=0, metadata={"help": "tokens of one scoring batch, padding included; 0: 8192 on a GPU, 768 on a CPU"}
    )
    use_cpu: bool = field(default=False, metadata={"help": "stay on the CPU"})
    seed: int = field(default=0, metadata={"help": "seed of the bootstrap"})

    def __post_init__(self) -> None:
        if not 0.0 < self.min_win_rate < 1.0:
            raise UserError(f"min_win_rate is {self.min_win_rate}; it must be between 0 and 1")
        if not 0.0 < self.safety_threshold < 1.0:
            raise UserError(f"safety_threshold is {self.safety_threshold}; it must be between 0 and 1")
        if self.score_token_budget < 0:
            raise UserError(f"score_token_budget must not be negative, not {self.score_token_budget}")
