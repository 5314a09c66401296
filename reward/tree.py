"""The response tree: a prompt and several responses to it as one row, so that the prompt is computed once.

A response sees the prompt and itself only, and its positions follow the prompt's: scores and gradients are those of
separate rows. Prompt 5 6, responses 7 8 and 9:

    token      5 6 7 8 9        9 sees   x x . . x
    position   0 1 2 3 2        8 sees   x x x x .

Letters: B trees, K responses of the largest tree, T positions.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

IdList = Sequence[int] | np.ndarray  # the token ids of one dialogue

# Every token of a row is compared with every other, so long responses side by side cost more attention than their
# prompt saves: a tree's responses take at most this many tokens, or twice the prompt's.
RESPONSE_TOKENS = 256
# Prompts from this length on are left to the causal kernel (reward/attention.py); below, two calls cost more than one.
CAUSAL_FROM = 256


def shared_tokens(dialogues: Sequence[IdList]) -> int:
    """Tokens that all dialogues begin with, fewer than the shortest has: each keeps a token of its own."""
    shortest = min(len(ids) for ids in dialogues)
    first = np.asarray(dialogues[0][:shortest])
    shared = shortest - 1
    for ids in dialogues[1:]:
        different = np.flatnonzero(first[:shared] != np.asarray(ids[:shared]))
        shared = int(different[0]) if len(different) else shared
    return shared


def tree_length(dialogues: Sequence[IdList]) -> int:
    """Tokens of the dialogues as one tree."""
    shared = shared_tokens(dialogues)
    return shared + sum(len(ids) - shared for ids in dialogues)


def split_into_trees(dialogues: Sequence[IdList]) -> list[list[int]]:
    """Indices of dialogues with one prompt, by tree: in order, as many in each as `RESPONSE_TOKENS` allows."""
    shared = shared_tokens(dialogues)
    most = max(RESPONSE_TOKENS, 2 * shared)
    trees: list[list[int]] = []
    filled = 0  # response tokens of the last tree
    for index, ids in enumerate(dialogues):
        own = len(ids) - shared
        if trees and filled + own <= most:
            trees[-1].append(index)
            filled += own
        else:
            trees.append([index])
            filled = own
    return trees


def collate_trees(trees: Sequence[Sequence[IdList]], pad_id: int) -> dict[str, Tensor]:
    """Each entry of `trees` (dialogues that begin alike) becomes one row, padded on the right.

    input_ids, position_ids [B, T]; visible [B, 1, Q, T] bool, True where a query (third axis) sees a key (fourth), for
    the last Q tokens: all T, or those after the shortest prompt where that is long; ends [B, K], the position of each
    dialogue's last token, 0 where a tree has fewer than K.
    """
    shape = (len(trees), max(map(tree_length, trees)))
    input_ids_BT: np.ndarray = np.full(shape, pad_id, dtype=np.int64)
    position_ids_BT: np.ndarray = np.zeros(shape, dtype=np.int64)
    branch_BT = np.full(shape, -1)  # 0 the prompt, 1, 2, ... the responses; padding sees the prompt and padding
    ends_BK: np.ndarray = np.zeros((len(trees), max(map(len, trees))), dtype=np.int64)
    for b, dialogues in enumerate(trees):
        shared = end = shared_tokens(dialogues)
        input_ids_BT[b, :shared] = dialogues[0][:shared]
        position_ids_BT[b, :shared] = np.arange(shared)
        branch_BT[b, :shared] = 0
        for k, ids in enumerate(dialogues):
            own = slice(end, end + len(ids) - shared)
            input_ids_BT[b, own], position_ids_BT[b, own] = ids[shared:], np.arange(shared, len(ids))
            branch_BT[b, own], end, ends_BK[b, k] = k + 1, own.stop, own.stop - 1
    branch = torch.from_numpy(branch_BT)
    shortest = min(map(shared_tokens, trees))
    causal = shortest if shortest >= CAUSAL_FROM else 0
    key, query = branch[:, None, :], branch[:, causal:, None]
    order = torch.arange(shape[1])
    return {
        "input_ids": torch.from_numpy(input_ids_BT),
        "position_ids": torch.from_numpy(position_ids_BT),
        "visible": (((key == 0) | (key == query)) & (order[None] <= order[causal:, None]))[:, None],
        "ends": torch.from_numpy(ends_BK),
    }


def lay_out_beginnings(ids: IdList, first: int, end_id: int | None = None) -> dict[str, Tensor]:
    """One row that scores each beginning of a dialogue, from ids[: first + 1] to all of it; as `collate_trees`, B = 1.

    With `end_id`, each beginning has an end token of its own, behind the dialogue: dialogue 5 6 7, first 1, end 9

        token      5 6 7 9 9        the first 9 sees   x x . x .
        position   0 1 2 2 3        the second 9 sees  x x x . x
    """
    stem = torch.arange(len(ids))
    last = stem[first:]  # of each beginning
    if end_id is None:
        tree = collate_trees([[ids]], pad_id=0)
        return tree | {"ends": last[None]}
    leaves = len(ids) + torch.arange(len(last))
    input_ids = torch.cat([torch.as_tensor(ids, dtype=torch.int64), torch.full_like(last, end_id)])
    visible = torch.eye(len(input_ids), dtype=torch.bool)
    visible[:, : len(ids)] = torch.cat([stem, last])[:, None] >= stem
    position_ids = torch.cat([stem, last + 1])
    return {
        "input_ids": input_ids[None],
        "position_ids": position_ids[None],
        "visible": visible[None, None],
        "ends": leaves[None],
    }
