"""Settings that every stage shares: which model, and where the run goes. Flat dataclasses for `rlhf.cli.parse`."""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError

LORA_FIELDS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")


@dataclass
class ModelSettings:
    """The model of a stage. LoRA starts a fresh adapter on it; without LoRA all weights are trained."""

    model_name_or_path: str = field(metadata={"help": "Hugging Face folder or Hub name of the model to start from"})
    chat_format: Literal["auto", "llama2", "template"] = field(
        default="auto", metadata={"help": "auto: the tokenizer's own template, or Llama 2's format where it has none"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "type of the weights; auto: bfloat16 on a GPU for frozen weights (all under LoRA), else float32"
        },
    )
    use_peft: bool = field(default=False, metadata={"help": "train a LoRA adapter instead of all weights"})
    lora_r: int = field(default=16, metadata={"help": "rank of the LoRA update"})
    lora_alpha: int = field(default=32, metadata={"help": "scale of the LoRA update, divided by lora_r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout on the adapter's input, 0 to below 1"})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "module names that get an adapter; none: all linear layers but the head"}
    )
    adapter_path: str | None = field(
        default=None,
        metadata={
            "help": "LoRA adapter of model_name_or_path (a folder `adapter` of an earlier stage) to start from: with "
            "use_peft a copy of it is trained, else it is merged into the weights"
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "hold frozen weights in 4 bits (NF4, needs bitsandbytes); training: under LoRA"},
    )
    freeze_embeddings: bool = field(
        default=False,
        metadata={
            "help": "full fine-tuning: leave token embeddings and output head as they are, so that words which the "
            "data never show keep their place (LoRA leaves them alone anyway)"
        },
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager or flash_attention_2"})

    def __post_init__(self) -> None:
        if self.lora_r < 1 or self.lora_alpha < 1:
            raise UserError(f"lora_r and lora_alpha must be at least 1, not {self.lora_r} and {self.lora_alpha}")
        if self.adapter_path is not None:
            for name in ("lora_r", "lora_alpha", "lora_target_modules"):
                if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                    raise UserError(f"{name}: adapter_path names an adapter with its own {name}; leave one of them out")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise UserError(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")


@dataclass
class RunSettings:
    """The run folder, its seed and its trackers."""

    output_dir: str = field(metadata={"help": "run folder: settings, metrics, samples, summary and the model"})
    seed: int = field(default=0, metadata={"help": "seed of every random draw of the run"})
    report_to: str = field(default="none", metadata={"help": "none, tensorboard, wandb or trackio"})
    logging_steps: int = field(default=10, metadata={"help": "optimizer steps between two lines of metrics.jsonl"})
    resume: bool = field(default=True, metadata={"help": "continue from the last checkpoint in output_dir, if any"})
    use_cpu: bool = field(default=False, metadata={"help": "run on the CPU even where there is a GPU"})

    def __post_init__(self) -> None:
        if self.logging_steps < 1:
            raise UserError(f"logging_steps must be at least 1, not {self.logging_steps}")
        if self.seed < 0:
            raise UserError(f"seed must not be negative, not {self.seed}")
