"""Rows of a Ghost Attention data set as tokens, those that carry loss in colour.

    accelerate launch rlhf/inspect_gatt.py --train_file runs/llama2-7b/gatt-data/gatt.jsonl \\
        --model_name_or_path runs/llama2-7b/ppo/model

Any file of dialogues that `rlhf/sft.py` takes can be shown. Only the tokenizer is loaded; give the chat format and
`max_length` that the training will have.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # launched by path, Python puts rlhf/ first

from rich.console import Console

from configs.chat import load_chat_format
from configs.errors import UserError
from configs.inspect_gatt_settings import InspectGattSettings
from configs.records import read_dialogues
from rlhf.cli import entry, parse


def main(args: list[str] | None = None) -> int:
    """Prints the rows; returns how many."""
    (settings,) = parse(InspectGattSettings, args=args)
    from rlhf.tokenizer import load_tokenizer
    from rlhf.trained_tokens import coloured_row, to_text

    chat_format = load_chat_format(load_tokenizer(settings.model_name_or_path), settings.chat_format)
    rows = read_dialogues(settings.train_file, chat_format=chat_format).rows
    sources = sorted({row["source"] for row in rows})
    if settings.sources is not None:
        rows = [row for row in rows if row["source"] in settings.sources]
    if not rows:
        raise UserError(f"sources: {settings.train_file} has no row of these; it has {', '.join(sources)}")
    console = Console()
    for row in rows[: settings.num_rows]:
        console.print(to_text(coloured_row(row, chat_format, settings.max_length)), "", highlight=False)
    console.print(f"{min(len(rows), settings.num_rows)} of {len(rows)} rows; tokens in colour carry loss")
    return min(len(rows), settings.num_rows)


if __name__ == "__main__":
    entry(main)
