"""Scores of many dialogues at once: padded batches of similar length, without gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reward.collate import batches_by_budget, budget_for, pad_right
from reward.model import takes_trees, tree_scores
from reward.tree import IdList, collate_trees, lay_out_beginnings, split_into_trees, tree_length


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, gradient checkpointing inert; each module's mode comes back, also where models share modules."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.inference_mode()
def score_ids(model: Any, id_lists: Sequence[IdList], token_budget: int = 0, k: int = 1, progress: str = "") -> Tensor:
    """Raw score r at the last token of each of N id lists; float32 [N] on the CPU, in the order of the input.

    `model` is from reward.model, with or without LoRA. What stands in the padding never matters: lengths are explicit.
    With `k` above 1, entries p * k to p * k + k - 1 are responses to one prompt, which is then computed once for as
    many of them as is cheaper (reward/tree.py), where the model allows it. `token_budget` bounds the tokens of a
    forward, padding included; 0: what suits the device. `progress` names a bar to show; none by default. Raises
    ValueError for an empty list, or where N is not a multiple of k.
    """
    lengths = [len(ids) for ids in id_lists]
    if 0 in lengths:
        raise ValueError(f"nothing to score: id list {lengths.index(0)} is empty")
    if len(id_lists) % k:
        raise ValueError(f"{len(id_lists)} id lists are not {k} a prompt")
    device = next(model.parameters()).device
    token_budget = budget_for(token_budget, device)
    result_N = torch.empty(len(id_lists), dtype=torch.float32)
    bar = tqdm(total=len(id_lists), desc=progress, unit="response", disable=not progress)
    with evaluation_mode(model), bar:
        if k > 1 and takes_trees(model):
            trees = [
                [first + i for i in tree]
                for first in range(0, len(id_lists), k)
                for tree in split_into_trees(id_lists[first : first + k])
            ]
            dialogues = [[id_lists[i] for i in tree] for tree in trees]
            for batch in batches_by_budget([tree_length(each) for each in dialogues], token_budget):
                inputs = collate_trees([dialogues[b] for b in batch], pad_id=0)
                scores_BK = tree_scores(model, {name: tensor.to(device) for name, tensor in inputs.items()}).cpu()
                for b, scores_K in zip(batch, scores_BK, strict=True):
                    result_N[trees[b]] = scores_K[: len(trees[b])]
                    bar.update(len(trees[b]))
        else:
            for batch in batches_by_budget(lengths, token_budget):
                input_ids_BT, mask_BT = pad_right([id_lists[i] for i in batch], pad_id=0)
                scores_B1 = model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
                result_N[batch] = scores_B1[:, 0].cpu()
                bar.update(len(batch))
    return result_N


@torch.inference_mode()
def score_positions(model: Any, ids: IdList, first: int, end_id: int | None = None) -> Tensor:
    """Raw score of every beginning of one dialogue: ids[: first + 1], ids[: first + 2], ..., all of `ids`.

    With `end_id`, each beginning is followed by that token: what it would score if the response ended there. Training
    reads the score at a dialogue's last token, an end token, so without it the scores are how the model leans
    on its way, which nobody taught it to say. float32 [len(ids) - first] on the CPU, in one forward where the model
    takes trees. Raises ValueError for a `first` outside the dialogue.
    """
    if not 0 <= first < len(ids):
        raise ValueError(f"position {first} is outside a dialogue of {len(ids)} tokens")
    if not takes_trees(model):
        end = [] if end_id is None else [end_id]
        return score_ids(model, [[*ids[: last + 1], *end] for last in range(first, len(ids))])
    device = next(model.parameters()).device
    inputs = lay_out_beginnings(ids, first, end_id)
    with evaluation_mode(model):
        return tree_scores(model, {name: tensor.to(device) for name, tensor in inputs.items()})[0].cpu()
