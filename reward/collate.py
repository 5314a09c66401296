"""Lists of token ids -> padded tensors. Letters: B = pairs, N = rows of tokens, T = positions.

Padding is on the right, where causal attention cannot see it; every length is carried along.

A pair's prompt is computed once for both of its responses: `prompt chosen rejected` is one row, in which the rejected
response sees the prompt and itself only and its positions follow the prompt's. Prompt 5 6, responses 7 8 and 9:

    token      5 6 7 8 9        9 sees   x x . . x
    position   0 1 2 3 2        8 sees   x x x x .
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from reward.data import EncodedPair

IdList = Sequence[int] | np.ndarray  # the token ids of one dialogue


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


def collate_shared_pairs(pairs: Sequence[EncodedPair], pad_id: int) -> dict[str, Tensor]:
    """B pairs as B rows, each prompt once (see the module's docstring).

    input_ids, position_ids [B, T]; visible [B, 1, T, T] bool, True where a query (third axis) sees a key (fourth);
    ends [B, 2], the positions of the last chosen and the last rejected token; and what `_targets` adds.
    """
    rows = [np.concatenate([pair.chosen_ids, pair.rejected_ids[pair.shared :]]) for pair in pairs]
    input_ids_BT, _ = pad_right(rows, pad_id)
    shared_B, chosen_B = (torch.tensor(n)[:, None] for n in zip(*((p.shared, len(p.chosen_ids)) for p in pairs)))
    column = torch.arange(input_ids_BT.shape[1])
    rejected_BT = column >= chosen_B  # padding, too: nothing looks at it, and it must see something
    causal = column[:, None] >= column[None, :]
    own = ~rejected_BT[:, :, None] | rejected_BT[:, None, :] | (column < shared_B)[:, None, :]
    return {
        "input_ids": input_ids_BT,
        "position_ids": torch.where(rejected_BT, column - chosen_B + shared_B, column),
        "visible": (causal & own)[:, None],
        "ends": torch.tensor([(len(pair.chosen_ids) - 1, pair.length - 1) for pair in pairs]),
        **_targets(pairs),
    }


def _targets(pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
    """margin, chosen_safe, rejected_safe [B] float32; labels [B] ones, which is how the Hugging Face Trainer counts the
    pairs of an optimizer step.
    """
    return {
        "margin": torch.tensor([pair.margin for pair in pairs], dtype=torch.float32),
        "chosen_safe": torch.tensor([pair.chosen_safe for pair in pairs], dtype=torch.float32),
        "rejected_safe": torch.tensor([pair.rejected_safe for pair in pairs], dtype=torch.float32),
        "labels": torch.ones(len(pairs), dtype=torch.long),
    }
