"""Scores of many dialogues at once: padded batches of similar length, without gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reward.collate import IdList, batches_by_budget, pad_right


@torch.inference_mode()
def score_ids(model: Any, id_lists: Sequence[IdList], token_budget: int = 8192) -> Tensor:
    """Raw score r at the last token of each of N id lists; float32 [N] on the CPU, in the order of the input.

    `model` is from reward.model, with or without LoRA. What stands in the padding never matters: lengths are explicit.
    Raises ValueError for an empty list.
    """
    lengths = [len(ids) for ids in id_lists]
    if 0 in lengths:
        raise ValueError(f"nothing to score: id list {lengths.index(0)} is empty")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    order: list[int] = []
    scores: list[Tensor] = []
    for batch in batches_by_budget(lengths, token_budget):
        input_ids_BT, mask_BT = pad_right([id_lists[i] for i in batch], pad_id=0)
        scores.append(model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device)).logits[:, 0].float())
        order += batch
    model.train(was_training)
    result_N = torch.empty(len(id_lists), dtype=torch.float32)
    if scores:
        result_N[torch.tensor(order)] = torch.cat(scores).cpu()
    return result_N
