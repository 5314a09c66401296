"""Settings of reward-model training (Llama 2 paper §3.2.2; optimizer as for the base model, §2.2).

Fields that Hugging Face's TrainingArguments has too keep its name and meaning. Defaults follow the paper.
"""

import math
from dataclasses import dataclass, field

from configs.errors import UserError

OBJECTIVES = ("helpfulness", "safety")
MARGINS = ("none", "small", "large")
PROMPT_HALVES = ("all", "first", "second")
LEAKED_PROMPTS = ("drop", "keep", "stop")
STRATEGIES = ("random", "sequential", "group_by_length")
SMALLEST = 1e-12  # for numbers that must be above 0
BELOW_ONE = 1 - 1e-12
BOUNDS: dict[str, tuple[float, float]] = {
    "mix_rows": (1, math.inf),
    "mismatched_share": (0, math.inf),
    "max_length": (1, math.inf),
    "max_reject_share": (0, 1),
    "safety_loss_weight": (0, math.inf),
    "center_rewards_coefficient": (0, math.inf),
    "learning_rate": (SMALLEST, math.inf),
    "min_lr_rate": (0, 1),
    "warmup_ratio": (0, 1),
    "min_warmup_steps": (0, math.inf),
    "adam_beta1": (0, BELOW_ONE),
    "adam_beta2": (0, BELOW_ONE),
    "adam_epsilon": (SMALLEST, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (SMALLEST, math.inf),
    "num_train_epochs": (SMALLEST, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "token_budget": (0, math.inf),
    "eval_steps": (0, math.inf),
    "save_steps": (0, math.inf),
    "save_total_limit": (1, math.inf),
    "score_token_budget": (0, math.inf),
    "num_samples": (0, math.inf),
}


@dataclass(kw_only=True)
class RewardSettings:
    """Data, objective and optimizer of one reward model; run once for helpfulness, once for safety."""

    train_files: list[str] = field(metadata={"help": "Preference files (.jsonl, .jsonl.gz, .parquet) or Hub names."})
    eval_files: list[str] | None = field(
        default=None,
        metadata={"help": "Test files or Hub names. None: eval_fraction of the training prompts is held out."},
    )
    mix_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Share of each train file, e.g. 9 1. None: files count by their pairs."},
    )
    mix_rows: int | None = field(
        default=None,
        metadata={
            "help": "Training pairs in all; a file that has fewer than its share is gone through again. None: as many "
            "as mix_weights allow without repeats."
        },
    )
    mismatched_share: float = field(
        default=0.0,
        metadata={
            "help": "Pairs to add for each training pair: the chosen response before one chosen for another, similar"
            " prompt. Pairs of one policy's samples hardly teach that this is bad. For judges: see docs/data.md."
        },
    )
    deduplicate: bool = field(
        default=True, metadata={"help": "Drop training pairs that repeat an earlier one word for word."}
    )
    leaked_prompts: str = field(
        default="drop",
        metadata={"help": "Training pairs whose prompt is also tested: drop, keep, or stop the run."},
    )
    prompt_half: str = field(
        default="all",
        metadata={
            "help": "all, or train on one half of the prompts, first or second: models of different halves share no "
            "training prompt, so that one can judge what was trained against the other. Test pairs stay whole."
        },
    )
    eval_fraction: float = field(
        default=0.05, metadata={"help": "Share of prompts held out where eval_files is not given."}
    )
    max_length: int = field(
        default=4096,
        metadata={"help": "Tokens per dialogue. Oldest turns of longer prompts are dropped, never the response."},
    )
    max_reject_share: float = field(default=0.05, metadata={"help": "Share of bad rows above which the run stops."})

    objective: str = field(
        default="helpfulness", metadata={"help": "helpfulness or safety; safety adds the safety loss."}
    )
    margin: str = field(
        default="small", metadata={"help": "none, small or large: margin by rating, the paper's Table 27."}
    )
    margin_table: list[float] | None = field(
        default=None, metadata={"help": "Four margins of your own instead, strongest rating first, e.g. 2 1 0.5 0."}
    )
    safety_loss_weight: float | None = field(
        default=None, metadata={"help": "Weight of the safety loss. None: 1 for safety, 0 for helpfulness."}
    )

    center_rewards_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Weight of (r_c + r_r)^2, which centres the scores at 0; 0: none, as in the paper. Try 0.01."
        },
    )

    learning_rate: float = field(
        default=1e-5, metadata={"help": "Peak learning rate. The paper: 5e-6 at 70B, else 1e-5."}
    )
    min_lr_rate: float = field(default=0.1, metadata={"help": "The cosine schedule ends at this share of the peak."})
    warmup_ratio: float = field(default=0.03, metadata={"help": "Share of the steps spent on linear warm-up."})
    min_warmup_steps: int = field(default=5, metadata={"help": "Least number of warm-up steps."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW's beta 1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's beta 2."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "AdamW's epsilon."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW's weight decay; biases and norms have none."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Epochs. More than one over-fits, says the paper."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; above 0 it replaces num_train_epochs."})
    per_device_train_batch_size: int = field(
        default=8,
        metadata={"help": "Pairs per process; times gradient_accumulation_steps: those of an optimizer step."},
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Multiplies the pairs of a step; how they are computed is token_budget's."}
    )
    token_budget: int = field(
        default=0,
        metadata={
            "help": "Tokens of one forward pass, padding included; a step is cut up by length. It changes "
            "memory and speed, not results (but for LoRA's dropout); 0: 8192 on a GPU, 768 on a CPU."
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "random, sequential or group_by_length (as in transformers: 50 steps at a time from long to short)."
        },
    )
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast while training; weights keep their dtype."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade a second forward for less memory."})

    eval_steps: int = field(default=0, metadata={"help": "Evaluate every so many steps; 0: only at the end."})
    save_steps: int = field(default=0, metadata={"help": "Checkpoint every so many steps; 0: none."})
    save_total_limit: int = field(default=2, metadata={"help": "Checkpoints kept; with 2, a damaged one has another."})
    score_token_budget: int = field(
        default=0,
        metadata={"help": "Tokens per batch when scoring the test pairs; 0: 8192 on a GPU, 768 on a CPU."},
    )
    num_samples: int = field(default=16, metadata={"help": "Test pairs written out with their scores."})

    def __post_init__(self) -> None:
        """Refuse what cannot work, naming the field. Table lengths and order are checked where the table is built."""
        for name, choices in (
            ("objective", OBJECTIVES),
            ("margin", MARGINS),
            ("prompt_half", PROMPT_HALVES),
            ("leaked_prompts", LEAKED_PROMPTS),
            ("train_sampling_strategy", STRATEGIES),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}: must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if not self.train_files:
            raise UserError("train_files: name at least one preference file or Hub data set")
        if self.mix_weights is not None:
            if len(self.mix_weights) != len(self.train_files):
                raise UserError(
                    f"mix_weights: {len(self.mix_weights)} weights for {len(self.train_files)} train_files: one each"
                )
            if min(self.mix_weights) <= 0:
                raise UserError(
                    f"mix_weights: every weight must be above 0, got {self.mix_weights}; leave out unused files"
                )
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limits = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
                raise UserError(f"{name}: must be {limits}, got {value}")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"max_steps: must be above 0, or -1 for num_train_epochs, got {self.max_steps}")
        if self.eval_files is None and not 0 < self.eval_fraction < 1:
            raise UserError(f"eval_fraction: must be between 0 and 1, got {self.eval_fraction}; or name eval_files")

    @property
    def safety_weight(self) -> float:
        """The weight of the safety loss with its default filled in."""
        if self.safety_loss_weight is not None:
            return self.safety_loss_weight
        return 1.0 if self.objective == "safety" else 0.0
