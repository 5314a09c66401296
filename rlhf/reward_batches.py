"""What the reward trainer's data loader gives: one optimizer step at a time, cut into micro-batches of similar length.

The pairs of a step are drawn by seed and epoch alone. They are then shared among the processes and grouped by tokens,
so the number of processes and the size of a micro-batch change the cost of a step and not its result.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from reward.collate import batches_by_budget, collate_pair_trees, collate_pairs
from reward.data import EncodedPair

Step = dict[str, Any]  # "pairs": pairs of the step over all processes; "micro_batches": this process's, longest first


class StepSampler(Sampler[list[int]]):
    """Indices of the pairs of each optimizer step, all processes' together; a batch sampler.

    `strategy`: `random` and `group_by_length` (transformers': stretches of 50 steps, each sorted from long to short)
    shuffle anew each epoch, `sequential` does not.
    It draws from a generator of its own, seeded by seed and epoch, so that a run resumed in the middle of an epoch sees
    the order of the undisturbed run.
    """

    def __init__(self, lengths: Sequence[int], pairs_per_step: int, strategy: str, seed: int) -> None:
        self.lengths, self.pairs_per_step, self.strategy = list(lengths), pairs_per_step, strategy
        self.seed, self.epoch = seed, 0

    @property
    def batch_sampler(self) -> "StepSampler":
        """Itself: where the Trainer looks for `set_epoch`, which it calls at the start of each epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next pass over the data belongs to."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.pairs_per_step)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        if self.strategy == "sequential":
            order = list(range(len(self.lengths)))
        elif self.strategy == "random":
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        else:
            order = get_length_grouped_indices(self.lengths, self.pairs_per_step, generator=generator)
        yield from (order[i : i + self.pairs_per_step] for i in range(0, len(order), self.pairs_per_step))


class StepCollator:
    """(index, pair) of a whole step -> this process's share of it, as micro-batches of at most `token_budget` tokens.

    A micro-batch has what `collate_pair_trees` (or, without `as_trees`, `collate_pairs`) gives, `rows` [B] (the pairs'
    indices) and `weight`: 1, or 0 for the stand-in of a process that got no pair, which must take part all the same.
    """

    def __init__(self, pad_id: int, token_budget: int, as_trees: bool, rank: int, processes: int) -> None:
        self.pad_id, self.token_budget, self.as_trees = pad_id, token_budget, as_trees
        self.rank, self.processes = rank, processes

    def tokens(self, pair: EncodedPair) -> int:
        """Tokens that the pair costs in a batch."""
        return pair.length if self.as_trees else 2 * max(len(pair.chosen_ids), len(pair.rejected_ids))

    def __call__(self, step: Sequence[tuple[int, EncodedPair]]) -> Step:
        # Dealt out from the longest: every process gets about the same tokens.
        dealt = sorted(step, key=lambda row: -self.tokens(row[1]))
        mine = dealt[self.rank :: self.processes]
        batches = [
            [(mine or dealt)[i] for i in batch]
            for batch in batches_by_budget([self.tokens(pair) for _, pair in mine or dealt[-1:]], self.token_budget)
        ]
        return {"pairs": len(step), "micro_batches": [self._micro_batch(b, float(bool(mine))) for b in batches]}

    def _micro_batch(self, rows: Sequence[tuple[int, EncodedPair]], weight: float) -> dict[str, Any]:
        collate = collate_pair_trees if self.as_trees else collate_pairs
        batch = collate([pair for _, pair in rows], self.pad_id)
        return {**batch, "rows": torch.tensor([index for index, _ in rows]), "weight": weight}
