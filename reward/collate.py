"""Lists of token ids -> padded tensors. Letters: B = pairs, N = rows of tokens, T = positions.

Padding is on the right, where causal attention cannot see it; every length is carried along.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from reward.data import EncodedPair
from reward.tree import IdList, collate_trees

# A core's cache holds the activations of under a thousand tokens of a small model, and short micro-batches hold less
# padding: 768 took 2.6 s where 8192 took 6.8 s (an update over 256 responses, 1.2 M parameters). Scores of 64 dialogues
# by SmolLM2-135M on one thread: 256 tokens 17.4 s, 512 16.6, 1,024 16.8, 2,048 17.6, 8,192 26.0. A GPU wants more.
CPU_TOKENS, GPU_TOKENS = 768, 8192
# bfloat16 activations take half the room, and each micro-batch casts all weights anew: 15 % off an iteration.
CPU_TOKENS_BF16 = 2048


def budget_for(chosen: int, device: torch.device, bf16: bool = False) -> int:
    """Tokens of one forward, padding included: the chosen number, or for 0 what suits device and number format."""
    on_cpu = CPU_TOKENS_BF16 if bf16 else CPU_TOKENS
    return chosen or (on_cpu if device.type == "cpu" else GPU_TOKENS)


def batches_by_budget(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices grouped longest first, rows x longest <= `token_budget`; a row beyond the budget goes alone.

    Similar lengths share a batch, so little is padding. The longest come first, so memory runs out at once or never.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def pad_right(id_lists: Sequence[IdList], pad_id: int) -> tuple[Tensor, Tensor]:
    """N id lists -> input_ids [N, T] and attention mask [N, T] (1 = real token), T the longest."""
    width = max(len(ids) for ids in id_lists)
    input_ids_NT = torch.full((len(id_lists), width), pad_id, dtype=torch.long)
    mask_NT = torch.zeros((len(id_lists), width), dtype=torch.long)
    for row, ids in enumerate(id_lists):
        input_ids_NT[row, : len(ids)] = torch.as_tensor(ids, dtype=torch.long)
        mask_NT[row, : len(ids)] = 1
    return input_ids_NT, mask_NT


def collate_pairs(pairs: Sequence[EncodedPair], pad_id: int) -> dict[str, Tensor]:
    """B pairs as one batch: rows 0..B-1 the chosen dialogues, rows B..2B-1 the rejected ones.

    input_ids, attention_mask [2B, T] and what `_targets` adds.
    """
    input_ids_NT, mask_NT = pad_right(
        [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs], pad_id
    )
    return {"input_ids": input_ids_NT, "attention_mask": mask_NT, **_targets(pairs)}


def collate_pair_trees(pairs: Sequence[EncodedPair], pad_id: int) -> dict[str, Tensor]:
    """B pairs as one tree each (reward/tree.py): what `collate_trees` and `_targets` give; ends [B, 2]."""
    return {**collate_trees([(pair.chosen_ids, pair.rejected_ids) for pair in pairs], pad_id), **_targets(pairs)}


def _targets(pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
    """margin, chosen_safe, rejected_safe [B] float32."""
    return {
        "margin": torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        "chosen_safe": torch.tensor([pair.chosen_safe for pair in pairs], dtype=torch.float32),
        "rejected_safe": torch.tensor([pair.rejected_safe for pair in pairs], dtype=torch.float32),
    }
