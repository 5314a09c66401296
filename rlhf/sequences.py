"""Prompts with their responses as tensors, and the hidden states before each response token.

Axes: B sequences (prompt + response), T tokens, R response tokens (padded on the right), M sequences of a micro-batch,
N response tokens of a micro-batch laid end to end, sequence after sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reward.collate import batches_by_budget, budget_for, pad_right
from reward.last_layer import hidden_at
from reward.model import tree_layout
from reward.tree import collate_trees, shared_tokens, split_into_trees, tree_length
from rlhf.losses import token_logprobs
from rlhf.models import decoder_of, unwrap


@dataclass(frozen=True)
class Sequences:
    """Sequences of ids; `k` in a row are responses to one prompt, which trees compute once for them.

    Example: prompt 5 6, response 7 8 -> ids 5 6 7 8, starts 2, response_mask T T.
    """

    ids: list[list[int]]
    starts: list[int]  # of each response: the length of its prompt
    response_mask_BR: Tensor
    k: int = 1
    trees: bool = False  # the models take them (reward.model.takes_trees)

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        device: Any,
        k: int = 1,
        trees: bool = False,
    ) -> "Sequences":
        """B prompts and responses of ids; k responses to each prompt stand side by side."""
        ids = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        lengths_B = torch.tensor([len(r) for r in responses])
        mask_BR = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
        return cls(ids, [len(p) for p in prompts], mask_BR.to(device), k, trees and k > 1)

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.response_mask_BR.device

    @property
    def tokens(self) -> int:
        """Tokens of all prompts and responses."""
        return sum(map(len, self.ids))

    def micro_batches(self, rows: Sequence[int], token_budget: int) -> list[list[int]]:
        """`rows` split into groups of similar length whose padded size fits the budget; trees stay whole."""
        if not self.trees:
            groups = batches_by_budget([len(self.ids[row]) for row in rows], token_budget)
            return [[rows[i] for i in group] for group in groups]
        trees = self._trees(rows)
        groups = batches_by_budget([tree_length([self.ids[row] for row in tree]) for tree in trees], token_budget)
        return [[row for i in group for row in trees[i]] for group in groups]

    def hidden(self, model: Any, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Hidden states before each response token of `rows` [N, D], and those tokens [N]."""
        return self._hidden_of_trees(model, rows) if self.trees else self._hidden_of_rows(model, rows)

    def _hidden_of_rows(self, model: Any, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        ids_MT, _ = pad_right([self.ids[row] for row in rows], pad_id=0)
        lengths_M = torch.tensor([len(self.ids[row]) for row in rows])
        starts_M = torch.tensor([self.starts[row] for row in rows])
        place_T = torch.arange(ids_MT.shape[1] - 1)  # the last token predicts none
        predicts_MT = (place_T >= starts_M[:, None] - 1) & (place_T < lengths_M[:, None] - 1)
        ids_MT, predicts_MT = ids_MT.to(self.device), predicts_MT.to(self.device)
        return hidden_at(decoder_of(model), ids_MT[:, :-1], predicts_MT), ids_MT[:, 1:][predicts_MT]

    def _hidden_of_trees(self, model: Any, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As rows, with the prompt once: a token of a response at position p of its dialogue stands at p in its tree
        where all begin alike, else at the beginning of its branch plus what of the branch comes before it.
        """
        trees = [[self.ids[row] for row in tree] for tree in self._trees(rows)]
        places: dict[int, tuple[int, Tensor]] = {}  # by sequence: its tree, and where in it the hidden states stand
        for b, (tree, dialogues) in enumerate(zip(self._trees(rows), trees, strict=True)):
            shared = branch = shared_tokens(dialogues)
            for row, ids in zip(tree, dialogues, strict=True):
                before = torch.arange(self.starts[row] - 1, len(ids) - 1)
                places[row] = b, torch.where(before < shared, before, before - shared + branch)
                branch += len(ids) - shared
        batch = {name: x.to(self.device) for name, x in collate_trees(trees, pad_id=0).items()}
        hidden_BTD = decoder_of(model)(
            input_ids=batch["input_ids"], use_cache=False, **tree_layout(model, batch["visible"], batch["position_ids"])
        ).last_hidden_state
        tree_N = torch.cat([torch.full_like(places[row][1], places[row][0]) for row in rows])
        place_N = torch.cat([places[row][1] for row in rows])
        targets_N = torch.tensor([token for row in rows for token in self.ids[row][self.starts[row] :]])
        return hidden_BTD[tree_N.to(self.device), place_N.to(self.device)], targets_N.to(self.device)

    def _trees(self, rows: Sequence[int]) -> list[list[int]]:
        """`rows` by tree, in order of their first row: responses to one prompt, as many as a tree should hold."""
        by_prompt: dict[int, list[int]] = {}
        for row in rows:
            by_prompt.setdefault(row // self.k, []).append(row)
        return [
            [own[i] for i in tree]
            for own in by_prompt.values()
            for tree in split_into_trees([self.ids[row] for row in own])
        ]

    def flat(self, x_BR: Tensor, rows: Sequence[int]) -> Tensor:
        """The response tokens of some rows laid end to end, in the order of `hidden`: [B, R] -> [N]."""
        return x_BR[rows][self.response_mask_BR[rows]]

    def scatter(self, parts: Sequence[tuple[Sequence[int], Tensor]]) -> Tensor:
        """The inverse of `flat` over (rows, x_N) of all micro-batches; 0 at padding: -> [B, R] float32."""
        x_BR = torch.zeros(self.response_mask_BR.shape, device=self.device)
        for rows, x_N in parts:
            x_MR = torch.zeros(len(rows), x_BR.shape[1], device=x_BR.device)
            x_MR[self.response_mask_BR[rows]] = x_N.float()
            x_BR[rows] = x_MR
        return x_BR


@torch.inference_mode()
def teacher_forced_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], token_budget: int = 0
) -> Tensor:
    """log pi of each response token in nats, float32 [B, R] on the CPU, 0 at padding: plain forwards, no cache, of
    `token_budget` tokens (0: what suits the device)."""
    head_VD = unwrap(model).get_output_embeddings().weight
    sequences = Sequences.build(prompts, responses, head_VD.device)
    parts: list[tuple[Sequence[int], Tensor]] = []
    for rows in sequences.micro_batches(range(len(prompts)), budget_for(token_budget, head_VD.device)):
        hidden_ND, targets_N = sequences.hidden(model, rows)
        parts.append((rows, token_logprobs(hidden_ND, head_VD, targets_N)[0]))
    return sequences.scatter(parts).cpu()
