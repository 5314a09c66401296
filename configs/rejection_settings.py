"""Settings of `rlhf/rejection_sampling.py`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from configs.engine_settings import EngineSettings
from configs.errors import UserError
from configs.sampling_settings import SamplingSettings
from configs.scoring_settings import ScoringSettings


@dataclass(kw_only=True)
class RejectionSettings(EngineSettings, SamplingSettings, ScoringSettings):
    """Best-of-K sampling. Defaults follow the paper where it says something (recipe sheet §4)."""

    temperature: float = field(
        default=1.2, metadata={"help": "the paper found 1.2 to 1.3 best for 10 to 100 samples; tune it each round"}
    )
    prompt_files: list[str] = field(metadata={"help": "prompt records; `is_safety` decides which reward counts"})
    samples_per_prompt: int = field(default=16, metadata={"help": "K; the paper gives none, Llama 3 used 10 to 30"})
    min_score: float | None = field(
        default=None, metadata={"help": "leave prompts out whose best combined reward (raw logit) is below this"}
    )
    keep_unfinished: bool = field(
        default=False, metadata={"help": "let a response that was cut at max_new_tokens be kept"}
    )
    gold: Literal["none", "simulated"] = field(
        default="none", metadata={"help": "simulated: report the simulated world's gold scores of the picks too"}
    )
    max_prompts: int = field(default=0, metadata={"help": "use the first so many prompts; 0: all"})
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
        self.check_scoring()
        self.check_reward_sources()
        if self.engine == "continuous_batching" and self.stop_strings:
            raise UserError("stop_strings: continuous batching ends at token ids only; use sampling_engine in_process")
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
        if self.min_score is not None and not math.isfinite(self.min_score):
            raise UserError(f"min_score must be a number or none, not {self.min_score}")
        if self.temperature == 0.0 and self.samples_per_prompt > 1:
            raise UserError("temperature: greedy sampling gives K equal responses; use a temperature above 0")
