"""Settings of `rlhf/distil_safety.py` (paper §4.2.4; recipe sheet §7)."""

from dataclasses import dataclass, field
from typing import Literal

from configs.engine_settings import EngineSettings
from configs.errors import UserError
from configs.sampling_settings import SamplingSettings


@dataclass(kw_only=True)
class DistilSettings(EngineSettings, SamplingSettings):
    """Safety context distillation: which prompts, under which preprompts, and what is kept."""

    prompt_files: list[str] = field(metadata={"help": "prompt records; those with `is_safety` are distilled"})
    safety_model_path: str = field(metadata={"help": "folder of the safety reward model, which picks and gates"})
    helpfulness_model_path: str | None = field(
        default=None,
        metadata={
            "help": "with include_helpful: folder of the helpfulness reward model, whose score picks and gates where a "
            "prompt is not a safety prompt and the answer not unsafe (the piecewise rule of PPO's reward)"
        },
    )
    preprompt_kind: Literal["generic", "targeted"] = field(
        default="generic",
        metadata={"help": "generic: adjectives in a template; targeted: of the prompt's risk category, with steps"},
    )
    preprompts_file: str | None = field(
        default=None, metadata={"help": "JSON with your own wordings: adjectives, generic, targeted by category"}
    )
    preprompt_slot: Literal["system", "user"] = field(
        default="system", metadata={"help": "in the system message, or in front of the last user message"}
    )
    category_field: str = field(
        default="risk_category", metadata={"help": "field of a prompt record with its risk category, for targeted"}
    )
    uncategorised: Literal["generic", "reject"] = field(
        default="generic", metadata={"help": "targeted: what a prompt without a risk category gets"}
    )
    samples_per_prompt: int = field(
        default=1, metadata={"help": "answers sampled under the preprompt; the best by safety score is the candidate"}
    )
    gate: bool = field(
        default=True,
        metadata={"help": "keep the candidate only where its score is above the original answer's"},
    )
    include_helpful: bool = field(
        default=False,
        metadata={"help": "distil prompts without `is_safety` too: only to measure the false refusals that this makes"},
    )
    keep_unfinished: bool = field(
        default=False, metadata={"help": "let a response that was cut at max_new_tokens be kept"}
    )
    end_cut_responses: bool = field(
        default=False,
        metadata={"help": "let the reward model read a response that was cut off as if it had ended there"},
    )
    gold: Literal["none", "simulated"] = field(
        default="none", metadata={"help": "simulated: report the simulated world's gold scores too"}
    )
    max_prompts: int = field(default=0, metadata={"help": "distil the first so many usable prompts; 0: all"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "longer prompts are refused by the reader"})
    max_reject_share: float = field(default=0.05, metadata={"help": "share of bad rows above which the run stops"})
    prompts_per_shard: int = field(default=128, metadata={"help": "prompts between two writes: what a kill can lose"})
    token_budget: int = field(default=32_768, metadata={"help": "cache columns of one sampling batch, over all rows"})
    score_token_budget: int = field(
        default=0, metadata={"help": "tokens of one scoring batch, padding included; 0: 8192 on a GPU, 768 on a CPU"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_engine()
        if not self.prompt_files:
            raise UserError("prompt_files: name at least one file of prompt records")
        if not self.safety_model_path:
            raise UserError("safety_model_path: name the folder of the safety reward model")
        if self.engine == "continuous_batching" and self.stop_strings:
            raise UserError("stop_strings: continuous batching ends at token ids only; use sampling_engine in_process")
        if self.helpfulness_model_path and not self.include_helpful:
            raise UserError(
                "helpfulness_model_path: no effect without include_helpful, as safety alone decides on safety prompts; "
                "leave it out"
            )
        counts = ("samples_per_prompt", "prompts_per_shard", "max_prompt_tokens", "token_budget")
        for name in counts:
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_prompts < 0:
            raise UserError(f"max_prompts must not be negative, not {self.max_prompts}; 0 uses all")
        if self.score_token_budget < 0:
            raise UserError(f"score_token_budget must not be negative, not {self.score_token_budget}")
        if not 0.0 <= self.max_reject_share < 1.0:
            raise UserError(f"max_reject_share must be in [0, 1), not {self.max_reject_share}")
        if self.temperature == 0.0 and self.samples_per_prompt > 1:
            raise UserError("temperature: greedy sampling gives equal responses; use samples_per_prompt 1")
        if self.preprompt_kind == "generic" and self.uncategorised != "generic":
            raise UserError("uncategorised: no effect with preprompt_kind generic; use targeted, or leave it out")
