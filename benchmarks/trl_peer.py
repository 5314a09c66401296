"""The peer of the reward benchmarks: `trl.RewardTrainer` on the token ids and hyper-parameters that ours gets.

It is given ids, so both train on the same tokens: its own `max_length` drops longer pairs where ours shortens them.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from configs.reward_settings import RewardSettings
from reward.data import EncodedPair


def to_dataset(pairs: Sequence[EncodedPair]) -> Dataset:
    """Rows of `chosen_ids` and `rejected_ids`; `length` is what `group_by_length` sorts by, the longer of the two."""
    rows = [
        {
            "chosen_ids": pair.chosen_ids.tolist(),
            "rejected_ids": pair.rejected_ids.tolist(),
            "length": max(len(pair.chosen_ids), len(pair.rejected_ids)),
        }
        for pair in pairs
    ]
    return Dataset.from_list(rows)


def trl_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[EncodedPair],
    settings: RewardSettings,
    output_dir: str,
    **options: Any,
) -> RewardTrainer:
    """A trainer with the optimizer, schedule and batch of `settings`; `options` are fields of RewardConfig that win."""
    steps = settings.max_steps
    if steps < 0:
        steps = -(-len(pairs) // settings.per_device_train_batch_size) * int(settings.num_train_epochs)
    fields: dict[str, Any] = {
        "output_dir": output_dir,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.min_lr_rate},
        "warmup_steps": max(-(-int(1000 * settings.warmup_ratio) * steps // 1000), settings.min_warmup_steps),
        "adam_beta1": settings.adam_beta1,
        "adam_beta2": settings.adam_beta2,
        "adam_epsilon": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "num_train_epochs": settings.num_train_epochs,
        "max_steps": settings.max_steps,
        "per_device_train_batch_size": settings.per_device_train_batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "bf16": settings.bf16,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "max_length": None,
        "disable_dropout": True,
        "remove_unused_columns": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
    }
    return RewardTrainer(
        model=model,
        args=RewardConfig(**(fields | options)),
        processing_class=tokenizer,
        train_dataset=to_dataset(pairs),
    )
