"""Settings of the scaling of safety data (Llama 2 paper §4.2.3, Fig. 15)."""

from dataclasses import dataclass, field
from typing import Any

from configs.errors import UserError

# What the study fills in: a block that sets it too would be overruled in silence, so it is refused.
OWN = {
    "sft": ("model_name_or_path", "train_files", "output_dir", "seed"),
    "evaluate_policy": ("model_name_or_path", "prompt_files", "helpfulness_model_path", "safety_model_path",
                        "output_dir"),
}  # fmt: skip


@dataclass(kw_only=True)
class SafetyScalingSettings:
    """Which data, which shares of the safety data, and what judges. Every share and seed is one cell."""

    output_dir: str = field(metadata={"help": "folder that gets one folder a cell"})
    seed: int = field(default=0, metadata={"help": "first of the seeds, where `seeds` is left out"})
    model_name_or_path: str = field(metadata={"help": "pretrained model that every cell is fine-tuned from"})
    helpful_files: list[str] = field(metadata={"help": "dialogues that every cell is trained on"})
    safety_files: list[str] = field(metadata={"help": "dialogues with safe answers, of which a share is added"})
    safety_shares: list[float] = field(
        default_factory=lambda: [0.0, 0.01, 0.1, 0.25, 0.5, 1.0],
        metadata={"help": "shares of the safety prompts, from 0 to 1; smaller ones lie inside larger ones"},
    )
    seeds: list[int] | None = field(
        default=None, metadata={"help": "each trains all cells, with subsets and an order of its own; none: [seed]"}
    )
    prompt_files: list[str] = field(metadata={"help": "held-out prompts; `is_safety` says which of them are risky"})
    helpfulness_model_path: str = field(metadata={"help": "reward model that judges the other prompts' answers"})
    safety_model_path: str = field(metadata={"help": "reward model that judges the risky prompts' answers"})
    tail_below: float = field(default=0.1, metadata={"help": "R below which a risky prompt's answer is in the tail"})
    chat_format: str = field(default="auto", metadata={"help": "auto, llama2 or template, as in every stage"})
    max_reject_share: float = field(default=0.05, metadata={"help": "larger share of bad rows in a file: stop"})
    parallel_stages: int = field(
        default=1, metadata={"help": "stages that may run at once (forked processes, CPU only)"}
    )
    sft: dict[str, Any] = field(default_factory=dict, metadata={"help": "fields of rlhf/sft.py"})
    evaluate_policy: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "fields of rlhf/evaluate_policy.py"}
    )

    def __post_init__(self) -> None:
        for name in ("helpful_files", "safety_files", "prompt_files", "safety_shares"):
            if not getattr(self, name):
                raise UserError(f"{name}: the list is empty; give at least one")
        for name in ("helpfulness_model_path", "safety_model_path"):
            if not getattr(self, name):
                raise UserError(f"{name}: name the folder of that reward model")
        for share in self.safety_shares:
            if not 0.0 <= share <= 1.0:
                raise UserError(f"safety_shares: must be from 0 to 1, got {share}")
        if self.seeds is None:
            self.seeds = [self.seed]
        elif not self.seeds:
            raise UserError("seeds: the list is empty; give at least one")
        if min([self.seed, *self.seeds]) < 0:
            raise UserError(f"seeds: must not be negative, got {min([self.seed, *self.seeds])}")
        for name, values in (("safety_shares", [f"{x:g}" for x in self.safety_shares]), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise UserError(f"{name}: one of {values} is there twice")
        if not 0.0 < self.tail_below < 1.0:
            raise UserError(f"tail_below is a score R between 0 and 1, not {self.tail_below}")
        if not 0.0 <= self.max_reject_share < 1.0:
            raise UserError(f"max_reject_share must be in [0, 1), not {self.max_reject_share}")
        if self.parallel_stages < 1:
            raise UserError(f"parallel_stages: must be at least 1, got {self.parallel_stages}")
        for block, fields in OWN.items():
            if own := sorted(getattr(self, block).keys() & {*fields, "chat_format"}):
                raise UserError(f"{block}: {', '.join(own)} cannot be set here; the study fills it in")
