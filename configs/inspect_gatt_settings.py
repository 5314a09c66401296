"""Settings of `rlhf/inspect_gatt.py`."""

from dataclasses import dataclass, field
from typing import Literal

from configs.errors import UserError


@dataclass
class InspectGattSettings:
    """Training rows as tokens, coloured by whether they carry loss."""

    train_file: str = field(metadata={"help": "gatt.jsonl, or any file of dialogues that rlhf/sft.py takes"})
    model_name_or_path: str = field(metadata={"help": "model whose tokenizer encodes the rows; no weights are loaded"})
    chat_format: Literal["auto", "llama2", "template"] = field(
        default="auto", metadata={"help": "as the training will have it"}
    )
    max_length: int = field(default=4096, metadata={"help": "as the training will have it: longer rows are left out"})
    num_rows: int = field(default=5, metadata={"help": "rows to show, from the first"})
    sources: list[str] | None = field(
        default=None, metadata={"help": "show only rows of these, such as gatt or gatt_plain; default: all"}
    )

    def __post_init__(self) -> None:
        for name in ("max_length", "num_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)}; give at least 1")
