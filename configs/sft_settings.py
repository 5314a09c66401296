"""Settings of supervised fine-tuning. Defaults are the paper's where it gives them (3.1; recipe sheet 1, 10.24)."""

from dataclasses import dataclass, field

from configs.errors import UserError


@dataclass(kw_only=True)
class SFTSettings:
    """Data, packing and optimisation of one SFT run. Names follow `transformers.TrainingArguments`."""

    train_files: list[str] = field(
        default_factory=list, metadata={"help": "Dialogue files (JSONL, JSONL.gz, Parquet) or Hub names."}
    )
    mix_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Passes over each train file an epoch, one a file: 0.5 draws half of its rows, 2 repeats."},
    )
    eval_files: list[str] = field(
        default_factory=list, metadata={"help": "Held-out dialogue files; empty: `eval_fraction` of the train prompts."}
    )
    eval_fraction: float = field(
        default=0.02, metadata={"help": "Share of prompts held out for evaluation when eval_files is empty; 0: none."}
    )
    reject_file: str | None = field(default=None, metadata={"help": "Where bad rows go; default: in output_dir."})
    max_reject_share: float = field(default=0.05, metadata={"help": "Larger share of bad rows: stop before training."})
    max_length: int = field(
        default=4096, metadata={"help": "Tokens of a (packed) row. Longer dialogues lose their oldest turns."}
    )
    max_reply_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Dialogues whose last reply has more tokens are left out, and counted: a policy that is to answer"
            " in so many must have seen answers that end. None: all lengths."
        },
    )
    packing: bool = field(default=True, metadata={"help": "Fill rows with several dialogues that cannot see another."})
    train_sampling_strategy: str = field(
        default="random", metadata={"help": "random, or group_by_length: unpacked rows of similar length together."}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows (packed where packing) a micro-batch."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Rows a micro-batch in evaluation."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches an optimizer step."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the data."})
    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; overrides num_train_epochs when positive."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "A scheduler name of transformers."})
    warmup_steps: float = field(default=0.0, metadata={"help": "Warm-up steps; below 1 a share of all steps."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW weight decay."})
    adam_beta1: float = field(default=0.9, metadata={"help": "AdamW beta1."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW beta2."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "AdamW epsilon."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm is clipped to this."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Recompute activations: less memory."})
    bf16: bool = field(default=False, metadata={"help": "bfloat16 autocast."})
    eval_steps: int = field(default=0, metadata={"help": "Evaluate every so many steps; 0: only at the end."})
    save_steps: int = field(default=0, metadata={"help": "Checkpoint every so many steps; 0: none."})
    save_total_limit: int = field(default=1, metadata={"help": "Checkpoints kept."})
    num_samples: int = field(default=4, metadata={"help": "Replies to held-out prompts written to samples.jsonl."})
    sample_max_new_tokens: int = field(default=128, metadata={"help": "Longest of those replies, in tokens."})

    def __post_init__(self) -> None:
        if not 0.0 <= self.eval_fraction < 1.0:
            raise UserError(f"eval_fraction: {self.eval_fraction} is not in [0, 1)")
        if self.mix_weights is not None and len(self.mix_weights) != len(self.train_files):
            raise UserError(f"mix_weights has {len(self.mix_weights)} numbers for {len(self.train_files)} train_files")
        if self.train_sampling_strategy not in ("random", "group_by_length"):
            raise UserError(
                f"train_sampling_strategy: {self.train_sampling_strategy!r} is not random or group_by_length"
            )
        if self.train_sampling_strategy == "group_by_length" and self.packing:
            raise UserError("train_sampling_strategy: group_by_length is for packing: false; packed rows are full")
        if self.max_reply_tokens is not None and self.max_reply_tokens < 1:
            raise UserError(f"max_reply_tokens: {self.max_reply_tokens} leaves no reply")
        if self.max_length < 8:
            raise UserError(f"max_length: {self.max_length} tokens hold no dialogue")
