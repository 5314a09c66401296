"""The prompts of PPO: read and encoded once, dealt out by iteration number alone."""

import random
from collections.abc import Sequence
from typing import Any

from configs.chat import ChatFormat
from configs.records import read_prompts
from rlhf.samples import Prompt


def read_encoded(
    files: Sequence[str],
    chat_format: ChatFormat,
    max_prompt_tokens: int,
    reject_file: str | None,
    max_reject_share: float = 0.05,
) -> list[Prompt]:
    """Prompts of all files. Rows that cannot be used go to `reject_file`, with the reason.

    Raises UserError where a larger share of a file than `max_reject_share` cannot be used.
    """
    options: dict[str, Any] = {
        "reject_file": reject_file,
        "chat_format": chat_format,
        "max_prompt_tokens": max_prompt_tokens,
        "max_reject_share": max_reject_share,
    }
    rows = [row for path in files for row in read_prompts(path, **options).rows]
    return [Prompt(row["prompt"], chat_format.encode_prompt(row["prompt"]), bool(row["is_safety"])) for row in rows]


def prompts_of(step: int, prompts: Sequence[Prompt], batch_size: int, seed: int) -> list[Prompt]:
    """The prompts of iteration `step`: pass after pass over all prompts, each in its own order. Needs no state."""
    batch: list[Prompt] = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, len(prompts))
        if not batch or place == 0:
            order = random.Random(f"{seed}/{epoch}").sample(range(len(prompts)), len(prompts))
        batch.append(prompts[order[place]])
    return batch
