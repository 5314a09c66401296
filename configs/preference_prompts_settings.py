"""Settings of `rlhf/preference_prompts.py`."""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError


@dataclass(kw_only=True)
class PreferencePromptsSettings:
    """Which preference data to take prompts from, and how many."""

    output_dir: str = field(metadata={"help": "run folder; gets the three prompt files"})
    model_name_or_path: str = field(metadata={"help": "model whose tokenizer and chat template measure the prompts"})
    helpfulness_files: list[str] = field(
        default_factory=list, metadata={"help": "preference files or Hub names; of the latter the split `train`"}
    )
    safety_files: list[str] = field(
        default_factory=list, metadata={"help": "the same; their prompts get is_safety: true, all of them"}
    )
    helpfulness_test_files: list[str] = field(
        default_factory=list, metadata={"help": "for the held-out prompts; of Hub names the split `test`"}
    )
    safety_test_files: list[str] = field(default_factory=list, metadata={"help": "the same for safety"})
    num_prompts: int = field(default=0, metadata={"help": "prompts to train on, of both kinds together; 0: all"})
    num_validation: int = field(default=256, metadata={"help": "held-out prompts that choose PPO's checkpoint"})
    num_evaluation: int = field(default=512, metadata={"help": "other held-out prompts, for evaluation and gates"})
    max_prompt_tokens: int = field(default=512, metadata={"help": "longer prompts are left out, and counted"})
    max_reject_share: float = field(default=0.05, metadata={"help": "share of bad rows above which the run stops"})
    chat_format: Literal["auto", "llama2", "template"] = field(
        default="auto", metadata={"help": "auto: the tokenizer's own template, or Llama 2's format where it has none"}
    )
    seed: int = field(default=0, metadata={"help": "seed of the draw"})

    def __post_init__(self) -> None:
        for name in ("helpfulness_files", "helpfulness_test_files"):
            if not getattr(self, name):
                raise UserError(f"{name}: name at least one preference file or Hub data set")
        if bool(self.safety_files) != bool(self.safety_test_files):
            raise UserError("safety_files, safety_test_files: name both or neither")
        for name, least in (("num_prompts", 0), ("num_validation", 1), ("num_evaluation", 1), ("max_prompt_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not 0.0 <= self.max_reject_share < 1.0:
            raise UserError(f"max_reject_share must be in [0, 1), not {self.max_reject_share}")
