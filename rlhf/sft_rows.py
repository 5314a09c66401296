"""Dialogues to rows for SFT: labels on replies, shortening, mixing, packing, and the mask that keeps dialogues apart.

Letters: B rows of a batch, T tokens of a row.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from configs.chat import ChatFormat
from configs.errors import UserError

IGNORED = -100  # label of a token that is not trained


def encode_dialogue(row: dict[str, Any], chat_format: ChatFormat, max_length: int) -> tuple[dict[str, list[int]], str]:
    """One dialogue record -> ({"input_ids", "labels"}, "whole" | "shortened" | "too_long").

    Exchanges are dropped from the oldest until the rest fits into `max_length` tokens; the system message stays. A row
    with an `instruction` (Ghost Attention) is whole or too long, because its first turn holds that instruction.
    """
    messages = row["messages"]
    system, turns = ([messages[0]], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    verdict = "whole"
    while turns:
        kept = system + turns
        encoded = chat_format.encode_dialogue(kept)
        if len(encoded.input_ids) <= max_length:
            labels = [i if on else IGNORED for i, on in zip(encoded.input_ids, encoded.response_mask, strict=True)]
            if row.get("train_on", "all") == "last":  # the prompt's ids are an exact prefix of the dialogue's
                prompt = len(chat_format.encode_prompt(kept[:-1]))
                labels[:prompt] = [IGNORED] * prompt
            return {"input_ids": encoded.input_ids, "labels": labels}, verdict
        if isinstance(row.get("instruction"), dict):  # of Ghost Attention; another data set may call a text so
            break
        turns, verdict = turns[2:], "shortened"
    return {"input_ids": [], "labels": []}, "too_long"


def encode_rows(
    rows: Sequence[dict[str, Any]], chat_format: ChatFormat, max_length: int, max_reply_tokens: int | None = None
) -> tuple[list[dict[str, list[int]]], Counter[str]]:
    """All dialogues that fit, in order, and how many were whole, shortened, left out as too long or for a `long_reply`:
    a last reply of more than `max_reply_tokens` tokens, the one that ends it included."""
    verdicts: Counter[str] = Counter(whole=0, shortened=0, too_long=0, long_reply=0)
    examples = []
    for row in rows:
        if max_reply_tokens is not None and last_reply_tokens(row["messages"], chat_format) > max_reply_tokens:
            verdicts["long_reply"] += 1
            continue
        example, verdict = encode_dialogue(row, chat_format, max_length)
        verdicts[verdict] += 1
        if verdict != "too_long":
            examples.append(example)
    return examples, verdicts


def last_reply_tokens(messages: Sequence[dict[str, str]], chat_format: ChatFormat) -> int:
    """Tokens that a model samples for the last reply, the one that ends it included."""
    encoded = chat_format.encode_dialogue(messages)
    return sum(encoded.response_mask[len(chat_format.encode_prompt(messages[:-1])) :])


def mix(files: Sequence[Sequence[dict[str, Any]]], weights: Sequence[float] | None, seed: int) -> list[dict[str, Any]]:
    """Rows of all files; weight w gives floor(w) whole passes over a file and a seeded draw of the remaining share."""
    rng = random.Random(seed)
    mixed: list[dict[str, Any]] = []
    for rows, weight in zip(files, weights or [1.0] * len(files), strict=True):
        whole, share = divmod(weight, 1.0)
        mixed += list(rows) * int(whole) + rng.sample(list(rows), round(share * len(rows)))
    return mixed


def to_dataset(examples: Sequence[dict[str, list[int]]], max_length: int, packing: bool) -> Dataset:
    """Rows with `input_ids`, `labels` and `seq_lengths` (tokens of each dialogue in the row, in order)."""
    columns = {name: [example[name] for example in examples] for name in ("input_ids", "labels")}
    if packing:
        return pack_dataset(Dataset.from_dict(columns), max_length, "bfd")
    lengths = [len(ids) for ids in columns["input_ids"]]
    return Dataset.from_dict({**columns, "seq_lengths": [[n] for n in lengths], "length": lengths})


@dataclass(frozen=True)
class PackedCollator:
    """Rows of several dialogues -> padded batch in which a token sees the earlier tokens of its own dialogue only.

    `input_ids`, `labels`, `position_ids` are [B, T], positions from 0 in each dialogue; `attention_mask` is
    [B, 1, T, T], True where the query (third axis) may see the key. Padding sees padding, so that no softmax is
    over nothing. Where every row is one dialogue there is no mask: padding stands on the right, where a causal model
    does not look, and attention without a mask is several times faster on long rows.
    """

    pad_token_id: int
    additive: torch.dtype | None = None  # a mask of 0 and -inf in this dtype instead of bool; see `collator_for`

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        input_ids_BT = torch.full(shape, self.pad_token_id)
        labels_BT = torch.full(shape, IGNORED)
        position_ids_BT = torch.zeros(shape, dtype=torch.long)
        dialogue_BT = torch.zeros(shape, dtype=torch.long)  # 1, 2, ... along a row; 0 is padding
        for b, row in enumerate(rows):
            lengths, end = row["seq_lengths"], len(row["input_ids"])
            if sum(lengths) != end:
                raise ValueError(f"a row of {end} tokens says that its dialogues have {lengths}")
            input_ids_BT[b, :end] = torch.tensor(row["input_ids"])
            labels_BT[b, :end] = torch.tensor(row["labels"])
            position_ids_BT[b, :end] = torch.cat([torch.arange(length) for length in lengths])
            dialogue_BT[b, :end] = torch.repeat_interleave(torch.arange(1, len(lengths) + 1), torch.tensor(lengths))
        batch = {"input_ids": input_ids_BT, "labels": labels_BT, "position_ids": position_ids_BT}
        if all(len(row["seq_lengths"]) == 1 for row in rows):
            # Positions without a restart, so that nothing takes the row for a packed one.
            return batch | {"position_ids": torch.arange(shape[1]).expand(shape)}
        mask_B1TT = (dialogue_BT[:, :, None] == dialogue_BT[:, None, :]).tril()[:, None]
        if self.additive is not None:
            lowest = torch.finfo(self.additive).min
            mask_B1TT = torch.zeros(mask_B1TT.shape, dtype=self.additive).masked_fill(~mask_B1TT, lowest)
        return batch | {"attention_mask": mask_B1TT}


def collator_for(model: Any, pad_token_id: int) -> Any:
    """The collator whose mask the model's attention understands.

    Eager attention *adds* the mask to the logits: a bool mask there lets each dialogue see the others, without error.
    FlashAttention takes no mask but finds the dialogues by their positions; trl's padding-free collator is made for it.
    """
    attention = model.config._attn_implementation
    if attention == "sdpa":
        return PackedCollator(pad_token_id)
    if attention == "eager":
        return PackedCollator(pad_token_id, additive=model.dtype)
    if attention.startswith("flash_attention"):
        return DataCollatorForLanguageModeling(pad_token_id, padding_free=True)
    raise UserError(f"attn_implementation: {attention!r} cannot keep packed dialogues apart; use sdpa")
