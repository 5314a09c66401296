"""Settings of `rlhf/collect_preferences.py`."""

from dataclasses import dataclass, field
from typing import Literal

from configs.engine_settings import EngineSettings
from configs.errors import UserError


@dataclass(kw_only=True)
class CollectSettings(EngineSettings):
    """Two responses a comparison, from two model variants or temperatures (recipe sheet §2)."""

    model_name_or_path: str = field(default="", metadata={"help": "model of the first response"})
    second_model_name_or_path: str | None = field(
        default=None, metadata={"help": "model of the second response; none: the first model again"}
    )
    chat_format: Literal["auto", "llama2", "template"] = field(
        default="auto", metadata={"help": "auto: the tokenizer's own template, or Llama 2's format where it has none"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={"help": "type of the weights"})
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa or eager"})
    prompt_files: list[str] = field(
        default_factory=list, metadata={"help": "prompt records; `is_safety` chooses the data set"}
    )
    max_prompts: int = field(default=0, metadata={"help": "use the first so many prompts; 0: all"})
    max_prompt_tokens: int = field(default=1024, metadata={"help": "longer prompts are refused by the reader"})
    pairs_per_prompt: int = field(default=1, metadata={"help": "comparisons a prompt"})
    temperature_a: float = field(default=0.8, metadata={"help": "temperature of the first model's response"})
    temperature_b: float = field(default=1.1, metadata={"help": "temperature of the second model's response"})
    top_p: float = field(default=1.0, metadata={"help": "keep the smallest set of tokens with at least this mass"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest response in tokens, its end token included"})
    max_resamples: int = field(
        default=3,
        metadata={"help": "times that a pair of equal or unusable texts is drawn again before it is left out"},
    )
    annotator: Literal["simulated", "none"] = field(
        default="none", metadata={"help": "simulated: the simulated annotator; none: write pairs for people to label"}
    )
    annotator_noise: float = field(
        default=0.1, metadata={"help": "Bradley-Terry scale of the simulated annotator, in units of the gold score"}
    )
    import_labels: str | None = field(
        default=None, metadata={"help": "a labelled file (as written with annotator none) to turn into records"}
    )
    max_reject_share: float = field(default=0.05, metadata={"help": "share of bad rows above which the run stops"})
    test_fraction: float = field(default=0.1, metadata={"help": "share of the prompts held out into *_test.jsonl"})
    prompts_per_shard: int = field(default=256, metadata={"help": "prompts between two writes: what a kill can lose"})
    token_budget: int = field(default=32_768, metadata={"help": "cache columns of one sampling batch, over all rows"})

    def __post_init__(self) -> None:
        self.check_engine()
        if self.engine == "server" and self.second_model_name_or_path is not None:
            raise UserError(
                "second_model_name_or_path: one server samples one model; leave it out, or leave server_url out"
            )
        if self.import_labels is None and not (self.model_name_or_path and self.prompt_files):
            raise UserError("model_name_or_path and prompt_files are needed, or import_labels to read labels back")
        for name in ("pairs_per_prompt", "prompts_per_shard", "max_prompt_tokens", "token_budget"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("max_prompts", "max_resamples"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("temperature_a", "temperature_b"):
            if not 0.0 < getattr(self, name) <= 100.0:
                raise UserError(f"{name} must be above 0, not {getattr(self, name)}: equal responses compare nothing")
        if not self.annotator_noise > 0.0:
            raise UserError(f"annotator_noise must be above 0, not {self.annotator_noise}")
        for name in ("max_reject_share", "test_fraction"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise UserError(f"{name} must be in [0, 1), not {getattr(self, name)}")
